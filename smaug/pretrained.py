"""Pre-trained starts: encoders that begin with the weights of others, from the Hugging Face Hub or a local folder.

Vision: ViT, BEiT, MAE (`vit_mae`) and CLIP's vision tower. Text: BERT, whose last layers become the fusion encoder's.
`fit` gives a model the sizes of a checkpoint, `load_weights` fills it, `load_tokenizer` reads the words that belong to
it. With nothing masked and nothing pruned the encoders then compute what the checkpoints' own models do. Only
safetensors are read, and no pickle; transformers is not needed. docs/pretrained.md tells what is folded or new.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch.nn import functional as F

from smaug.data import text
from smaug.model.decoder import Decoder
from smaug.model.fusion import FusionBlock
from smaug.model.layers import Block
from smaug.model.model import Model, ModelConfig
from smaug.model.video_encoder import VideoEncoder, VideoEncoderConfig
from smaug.objectives.mlm import MlmHead

FILES = [
    *("config.json", "preprocessor_config.json", "processor_config.json", "model.safetensors"),
    *("model.safetensors.index.json", "model-*.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
]
Kind = Literal["vision", "text"]
# By model_type: in front of the encoder's tensors where the checkpoint is of a model around it.
PREFIX = {"vit": "vit.", "beit": "beit.", "vit_mae": "vit.", "clip_vision_model": "vision_model.", "bert": "bert."}
HALF, IMAGENET = ((0.5,) * 3, (0.5,) * 3), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Mean and standard deviation of pixels, where no preprocessor_config.json says them: those of the models' papers.
PIXELS = {
    "vit": HALF,
    "beit": HALF,
    "vit_mae": IMAGENET,
    "clip_vision_model": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}
# What a config.json need not say, since it is transformers' default.
DEFAULTS: dict[str, dict[str, Any]] = {
    "every": {
        **dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
        **dict(hidden_act="gelu", layer_norm_eps=1e-12, patch_size=16, num_channels=3, is_decoder=False),
        **dict(position_embedding_type="absolute"),
        **dict(use_relative_position_bias=False, use_shared_relative_position_bias=False),
    },
    "vit_mae": {
        **dict(decoder_hidden_size=512, decoder_num_hidden_layers=8),
        **dict(decoder_num_attention_heads=16, decoder_intermediate_size=2048),
    },
    "clip_vision_model": dict(hidden_act="quick_gelu", layer_norm_eps=1e-5, patch_size=32),
}
# Where our block's tensors are in a layer of theirs; q, k and v are one matrix here.
VIT = {
    "qkv": [f"attention.attention.{name}" for name in ("query", "key", "value")],
    "proj": "attention.output.dense",
    **{"norm1": "layernorm_before", "norm2": "layernorm_after", "up": "intermediate.dense", "down": "output.dense"},
}
CLIP = {
    "qkv": [f"self_attn.{name}_proj" for name in "qkv"],
    "proj": "self_attn.out_proj",
    **{"norm1": "layer_norm1", "norm2": "layer_norm2", "up": "mlp.fc1", "down": "mlp.fc2"},
}
BERT = {
    "qkv": [f"attention.self.{name}" for name in ("query", "key", "value")],
    "proj": "attention.output.dense",
    **{"norm1": "attention.output.LayerNorm", "norm2": "output.LayerNorm"},
    **{"up": "intermediate.dense", "down": "output.dense"},
}


@dataclass(frozen=True)
class Start:
    """A checkpoint as it was found: what it is called, where it lies, and its encoder's part of config.json."""

    name: str
    folder: Path
    kind: str  # model_type of the encoder
    config: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.config[key]


def fit(model: ModelConfig, vision: str = "", text: str = "") -> ModelConfig:
    """The same model with the sizes of the checkpoints, each a hub name (`owner/name@revision`) or a folder.

    What a checkpoint does not decide stays: image size, frames, tubes, masks, pruning. Of BERT's layers the fusion
    encoder gets as many as it has, the text encoder those before. ValueError for what cannot be a start, in a line.
    """
    if vision:
        model = replace(model, video=_fit_video(model.video, _find(vision, "vision")))
    if text:
        start = _find(text, "text")
        layers = start["num_hidden_layers"]
        fusion = min(model.fusion.depth, layers - 1)
        if model.fusion.depth and not fusion:
            raise ValueError(f"{text} has a single layer, and both the text and the fusion encoder need one")
        sizes = {**_sizes(start), "norm": "post"}
        width = start["hidden_size"]  # which the fusion encoder takes from the text encoder
        words = replace(model.text, **sizes, width=width, depth=layers - fusion, sep=True, start=text)
        model = replace(model, text=words, fusion=replace(model.fusion, **sizes, depth=fusion))
    return model


def load_tokenizer(name: str) -> Tokenizer:
    """A checkpoint's own, from its tokenizer.json or vocab.txt; it neither pads nor cuts. ValueError if not BERT's."""
    start = _find(name, "text")
    path, words = start.folder / "tokenizer.json", start.folder / "vocab.txt"
    try:
        if path.exists():
            tokenizer = Tokenizer.from_file(str(path))
            tokenizer.no_padding()  # tokenizer.json may ask for either, as MiniLM's does
            tokenizer.no_truncation()
        elif words.exists():
            said = _json(start.folder / "tokenizer_config.json")
            tokenizer = text.word_pieces(
                models.WordPiece.read_file(str(words)),
                lowercase=said.get("do_lower_case", True),
                strip_accents=said.get("strip_accents"),
                handle_chinese_chars=said.get("tokenize_chinese_chars", True),
            )
        else:
            raise ValueError(f"{name} has no tokenizer: {start.folder} has neither tokenizer.json nor vocab.txt")
    except ValueError:
        raise
    except Exception as error:  # what tokenizers raises is of no class of its own
        raise ValueError(f"the tokenizer of {name} in {start.folder} cannot be read: {error}") from None
    missing = [p for p in (text.UNK, text.CLS, text.SEP, text.MASK) if tokenizer.token_to_id(p) is None]
    if missing:
        raise ValueError(f"the tokenizer of {name} has no {', '.join(missing)}, which BERT's has")
    return tokenizer


@torch.no_grad()
def load_weights(model: Model, config: ModelConfig) -> list[str]:
    """Fills the encoders that name a start -> a sentence each: what came, what was left out, what is new.

    config is what the model was built from. ValueError where it does not fit its checkpoint.
    """
    fitted = fit(config, config.video.start, config.text.start)
    wrong = []
    for part, free in {"video": {"mean", "std"}, "text": {"depth", "sep"}, "fusion": {"depth"}}.items():
        asked, found = vars(getattr(config, part)), vars(getattr(fitted, part))
        for key in asked.keys() - free:
            if asked[key] != found[key]:
                wrong.append(f"--model.{part}.{key.replace('_', '-')} is {asked[key]}, the checkpoint's {found[key]}")
    if wrong:
        raise ValueError(f"the weights do not fit: {'; '.join(sorted(wrong))}. Leave that out: the start sets it")
    said = []
    if config.video.start:
        said.append(_load_video(model, _find(config.video.start, "vision")))
    if config.text.start:
        said.append(_load_text(model, _find(config.text.start, "text")))
    return said


@functools.lru_cache  # a run asks several times, and the Hub need not
def _find(name: str, kind: Kind) -> Start:
    folder = Path(name).expanduser() if Path(name).expanduser().is_dir() else _fetch(name)
    raw = _json(folder / "config.json")
    if not raw:
        raise ValueError(f"{name} is no checkpoint: there is no config.json in {folder}")
    if kind == "vision" and raw.get("model_type") == "clip":
        raw = {"model_type": "clip_vision_model", **(raw.get("vision_config") or {})}
    model_type = raw.get("model_type")
    known = ("bert",) if kind == "text" else tuple(PIXELS)
    if model_type not in known:
        raise ValueError(f"{name} is a {model_type!r}; a {kind} encoder can start from: {', '.join(known)}")
    if not any((folder / file).exists() for file in ("model.safetensors", "model.safetensors.index.json")):
        raise ValueError(
            f"{name} has no model.safetensors in {folder}, and other formats are not read. On the Hub a conversion "
            f"often waits as a pull request: name it as {name.partition('@')[0]}@refs/pr/N, with its number for N"
        )
    return Start(name, folder, model_type, DEFAULTS["every"] | DEFAULTS.get(model_type, {}) | raw)


def _fetch(name: str) -> Path:
    """The folder of a repository on the Hub, fetched or from its cache."""
    from huggingface_hub import errors, snapshot_download  # 0.3 s, which a run without a start need not wait for

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=FILES))
    except errors.HFValidationError:
        raise ValueError(f"there is no folder {name}, and on the Hugging Face Hub nothing can be called so") from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{repository} has no revision {revision} on the Hugging Face Hub") from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"there is no folder {name}, and the Hugging Face Hub shows no such model; for one that is not public, "
            "log in with `hf auth login`"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise ValueError(
            f"there is no folder {name}, and the Hugging Face Hub cannot be reached and has left no copy of it on this "
            "machine; name a folder that holds config.json and model.safetensors"
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name} cannot be fetched from the Hugging Face Hub: {reason}") from None


def _json(path: Path) -> dict[str, Any]:
    """What a file says; nothing, if there is none."""
    if not path.exists():
        return {}
    try:
        said = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(said, dict):
        raise ValueError(f"{path} holds no JSON object")
    return said


def _sizes(start: Start) -> dict[str, Any]:
    """Fields of all three configurations."""
    width, heads, inner = start["hidden_size"], start["num_attention_heads"], start["intermediate_size"]
    if start["hidden_act"] not in ("gelu", "quick_gelu"):
        raise ValueError(f"{start.name} has the activation {start['hidden_act']!r}; known are gelu and quick_gelu")
    if start["position_embedding_type"] != "absolute" or start["is_decoder"]:
        raise ValueError(f"{start.name} is a decoder or has positions that are not absolute; neither can be a start")
    each = width // heads
    if width % heads or each % 8 or not 16 <= each <= 256:
        raise ValueError(f"{start.name} has heads {each} wide; known are multiples of 8 from 16 to 256")
    ratio = inner / width
    if int(ratio * width) != inner:  # rounded down
        ratio = math.nextafter(ratio, math.inf)
    return {"heads": heads, "mlp_ratio": ratio, "eps": start["layer_norm_eps"], "activation": start["hidden_act"]}


def _fit_video(video: VideoEncoderConfig, start: Start) -> VideoEncoderConfig:
    if start["num_channels"] != 3:
        raise ValueError(f"{start.name} takes pictures of {start['num_channels']} channels; a video has 3")
    said, (mean, std) = _pixels(start), PIXELS[start.kind]
    if not said.get("do_normalize", True) or abs(said.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-4:
        raise ValueError(f"{start.name} takes pixels in a way that is not known here, see its preprocessor_config.json")
    return replace(
        video,
        **_sizes(start),
        width=start["hidden_size"],
        depth=start["num_hidden_layers"],
        patch=_square(start["patch_size"], start),
        mean=_three(said.get("image_mean", mean), start),
        std=_three(said.get("image_std", std), start),
        norm_before=start.kind == "clip_vision_model",
        relative_position=start["use_relative_position_bias"] or start["use_shared_relative_position_bias"],
        start=start.name,
    )


def _pixels(start: Start) -> dict[str, Any]:
    """How the checkpoint's pictures are made, as it says itself; newer files nest it."""
    said = _json(start.folder / "preprocessor_config.json")
    found: dict[str, Any] = said or _json(start.folder / "processor_config.json").get("image_processor", {})
    return found


def _three(numbers: Sequence[float], start: Start) -> tuple[float, float, float]:
    if len(numbers) != 3:
        raise ValueError(f"{start.name} has {len(numbers)} means or deviations of pixels, and not one a colour")
    return (numbers[0], numbers[1], numbers[2])


def _square(size: Any, start: Start) -> int:
    sides = {*size} if isinstance(size, list) else {size}
    if len(sides) != 1:
        raise ValueError(f"{start.name} has patches that are not square: {size}")
    return int(sides.pop())


class Weights:
    """A checkpoint's tensors, and which of them nobody has asked for. Names are those inside the encoder; those around
    it, of the model that it was trained in, begin with a dot."""

    def __init__(self, start: Start) -> None:
        self.start = start
        raw: dict[str, Tensor] = {}
        index = _json(start.folder / "model.safetensors.index.json").get("weight_map", {})
        for path in [start.folder / file for file in sorted(set(index.values())) or ["model.safetensors"]]:
            try:
                raw |= load_file(path)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from None
        prefix = PREFIX[start.kind]
        within = any(name.startswith(prefix) for name in raw)
        self.tensors = {}
        for name, tensor in raw.items():
            name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)  # TensorFlow's names, in the first BERTs
            name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
            inside = name.startswith(prefix) or not within
            self.tensors[name.removeprefix(prefix) if inside else "." + name] = tensor
        self.left = {n for n in self.tensors if not n.endswith(("position_ids", "relative_position_index"))}

    def get(self, name: str) -> Tensor | None:
        return self[name] if name in self.tensors else None

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ValueError(f"{self.start.name} lacks the weights {name.lstrip('.')}, which a {self.start.kind} has")
        self.left.discard(name)
        return self.tensors[name].float()

    def put(self, own: Tensor, name: str, value: Tensor | None = None) -> None:
        """Copies the tensor of that name, or what was made from it, over one of ours."""
        value = self[name] if value is None else value
        if own.shape != value.shape:
            shapes = f"{tuple(value.shape)}, not {tuple(own.shape)}"
            raise ValueError(f"{name.lstrip('.')} of {self.start.name} is {shapes}: its config.json tells otherwise")
        own.copy_(value)

    def layer(self, own: nn.Linear | nn.LayerNorm, name: str, scale: Tensor | None = None) -> None:
        """Weight and bias, 0 where theirs has none, of a linear layer or a LayerNorm, times scale (outputs,)."""
        weight = self[name + ".weight"]
        self.put(own.weight, name + ".weight", weight if scale is None else weight * scale[:, None])
        bias = self.get(name + ".bias")
        bias = torch.zeros(len(weight)) if bias is None else bias
        self.put(own.bias, name + ".bias", bias if scale is None else bias * scale)

    def block(self, own: Block | FusionBlock, at: str, names: dict[str, Any]) -> None:
        """A layer of theirs, whose names begin with `at`. BEiT's scales of a layer's branches are folded into them."""
        scales = [self.get(at + name) for name in ("lambda_1", "lambda_2")]
        attention = own.attention
        parts = [at + name for name in names["qkv"]]
        self.put(attention.qkv.weight, parts[0], torch.cat([self[p + ".weight"] for p in parts]))
        # No key bias changes a softmax: it adds the same to all logits of a query.
        biases = [self.get(p + ".bias") for p in parts]
        none = torch.zeros(len(attention.proj.bias))
        self.put(attention.qkv.bias, parts[0], torch.cat([none if bias is None else bias for bias in biases]))
        self.layer(attention.proj, at + names["proj"], scales[0])
        self.layer(own.down, at + names["down"], scales[1])
        for key in ("norm1", "norm2", "up"):
            self.layer(getattr(own, key), at + names[key])

    def left_out(self) -> str:
        """The parts of their model that have no place in ours."""
        parts = set()
        for name in self.left:
            words = name.lstrip(".").removesuffix(".weight").removesuffix(".bias").split(".")
            parts.add(".".join(words[:3] if words[0] in ("embeddings", "encoder", "cls") else words[:1]))
        return ", ".join(sorted(parts))


def _load_video(model: Model, start: Start) -> str:
    weights, video, clip = Weights(start), model.video, start.kind == "clip_vision_model"
    config, rows = video.config, video.config.rows
    if max(config.prune.blocks, default=0) >= config.depth:
        raise ValueError(
            f"--model.video.prune.blocks {' '.join(map(str, config.prune.blocks))}, counted from 0: {start.name} has "
            f"{config.depth} blocks"
        )
    patch = "embeddings.patch_embedding" if clip else "embeddings.patch_embeddings.projection"
    # A tube that stands still gives what its picture does.
    flat = weights[patch + ".weight"].flatten(2)[:, :, None] / config.tubelet
    weights.put(video.patch_embed.weight, patch, flat.expand(-1, -1, config.tubelet, -1).flatten(1))
    video.patch_embed.bias.zero_()
    if not clip:
        weights.put(video.patch_embed.bias, patch + ".bias")

    cls = weights["embeddings.class_embedding" if clip else "embeddings.cls_token"].view(1, -1)
    places = "embeddings.position_embedding.weight" if clip else "embeddings.position_embeddings"
    video.position.zero_()
    video.time.zero_()
    old = rows
    if places in weights:  # BEiT may have none
        table = weights[places].flatten(0, -2)
        cls = cls + table[:1]
        old = math.isqrt(len(table) - 1)
        weights.put(video.position, places, resize_grid(table[1:], rows))
    weights.put(video.cls, "cls_token", cls)

    names, layer = (CLIP, "encoder.layers.{}.") if clip else (VIT, "encoder.layer.{}.")
    shared = "encoder.relative_position_bias.relative_position_bias_table"
    for number, block in enumerate(video.blocks):
        assert isinstance(block, Block)
        weights.block(block, layer.format(number), names)
        if block.attention.relative is not None:
            # Shared by all layers, as in BEiT's pre-training, it becomes one a layer, as its fine-tuning has it.
            own = layer.format(number) + "attention.attention.relative_position_bias.relative_position_bias_table"
            table = weights[shared if shared in weights else own]
            old = (math.isqrt(len(table) - 3) + 1) // 2
            # bilinear, as transformers does it
            offsets = resize_grid(table[:-3], 2 * rows - 1, "bilinear")
            weights.put(block.attention.relative.table, own, torch.cat([offsets, table[-3:]]))
    new = ["table of times (zero)"]
    if clip:
        assert isinstance(video.before, nn.LayerNorm)
        weights.layer(video.before, "pre_layrnorm")
    # BEiT with mean pooling has no norm over all tokens; its pooler's was trained on their mean.
    last = next((n for n in ("post_layernorm", "layernorm", "pooler.layernorm") if n + ".weight" in weights), None)
    if last is None:
        new.append("last LayerNorm")
    else:
        weights.layer(video.norm, last)
    for block in video.temporal:
        assert isinstance(block, Block)
        for end in (block.attention.proj, block.down):
            end.weight.zero_()
            end.bias.zero_()
    if video.temporal:
        new.append(f"{len(video.temporal)} temporal layer{'s' * (len(video.temporal) > 1)} (the identity)")

    said = [f"vision {start.name}: {start.kind}, {config.depth} layers of {config.width}"]
    if old != rows:
        said[0] += f", places {old} x {old} interpolated to {rows} x {rows}"
    if not _pixels(start):
        said.append(f"no preprocessor_config.json, so pixels are normalised as usual for {start.kind}")
    for head in model.heads.values():
        if isinstance(head, Decoder) and ".decoder.decoder_embed.weight" in weights:
            said.append(_load_decoder(head, weights, video))
    return _sentence(said, new, weights)


def _load_decoder(decoder: Decoder, weights: Weights, video: VideoEncoder) -> str:
    """MAE's decoder, if ours has its sizes."""
    start, rows = weights.start, video.config.rows
    ours = decoder.enter.out_features, len(decoder.blocks), decoder.cls_place is not None
    width, depth = start["decoder_hidden_size"], start["decoder_num_hidden_layers"]
    heads, inner = start["decoder_num_attention_heads"], start["decoder_intermediate_size"]
    blocks = [block for block in decoder.blocks if isinstance(block, Block)]
    if ours != (width, depth, True) or (blocks[0].attention.heads, blocks[0].up.out_features) != (heads, inner):
        sizes = {"width": width, "depth": depth, "heads": heads, "mlp-ratio": f"{inner / width:g}", "cls": ""}
        flags = " ".join(f"--objectives.mvm.decoder.{key} {size}" for key, size in sizes.items())
        return f"its decoder would fit with {flags.strip()}"
    at = ".decoder.decoder_"
    assert isinstance(decoder.before, nn.LayerNorm) and decoder.cls_place is not None
    weights.layer(decoder.before, "layernorm")
    weights.layer(decoder.enter, at + "embed")
    weights.put(decoder.mask_token, ".decoder.mask_token", weights[".decoder.mask_token"].flatten())
    table = weights[at + "pos_embed"].flatten(0, -2)
    weights.put(decoder.cls_place, at + "pos_embed", table[:1])
    moments = len(decoder.position) // rows**2
    weights.put(decoder.position, at + "pos_embed", resize_grid(table[1:], rows).repeat(moments, 1))
    layer = at + ("layers.{}." if at + "layers.0.layernorm_before.weight" in weights else "encoder.layer.{}.")
    for number, block in enumerate(blocks):
        weights.block(block, layer.format(number), VIT)
    weights.layer(decoder.norm, at + "norm")
    # A patch of theirs is (row, column, channel), one of ours (channel, frame, row, column), each frame alike.
    frames, high, wide = decoder.tube
    for own, end in ((decoder.pixels.weight, ".weight"), (decoder.pixels.bias, ".bias")):
        theirs = weights[at + "pred" + end].unflatten(0, (high, wide, 3)).movedim(2, 0)[:, None]
        weights.put(own, at + "pred" + end, theirs.expand(-1, frames, *theirs.shape[2:]).flatten(0, 3))
    return "with its decoder"


def _load_text(model: Model, start: Start) -> str:
    weights, encoder = Weights(start), model.text
    config, layers = encoder.config, start["num_hidden_layers"]
    words = weights["embeddings.word_embeddings.weight"]
    if len(words) < len(encoder.word.weight):
        raise ValueError(
            f"the tokenizer of {start.name} knows {len(encoder.word.weight)} pieces, its weights only {len(words)}"
        )
    weights.put(encoder.word.weight, "embeddings.word_embeddings.weight", words[: len(encoder.word.weight)])
    places = weights["embeddings.position_embeddings.weight"]
    if len(places) < config.max_words:
        raise ValueError(f"--model.text.max-words {config.max_words}: {start.name} has places for {len(places)}")
    # All words are of the first type, so its embedding goes into the places.
    places = places[: config.max_words] + weights["embeddings.token_type_embeddings.weight"][0]
    weights.put(encoder.position, "embeddings.position_embeddings.weight", places)
    assert isinstance(encoder.before, nn.LayerNorm)
    weights.layer(encoder.before, "embeddings.LayerNorm")

    fusion = [] if model.fusion is None else list(model.fusion.blocks)
    if max(config.depth, len(fusion)) > layers:
        raise ValueError(
            f"--model.text.depth {config.depth}, --model.fusion.depth {len(fusion)}: {start.name} has {layers} layers"
        )
    own = [*enumerate(encoder.blocks), *enumerate(fusion, layers - len(fusion))]
    for number, block in own:
        assert isinstance(block, Block | FusionBlock)
        weights.block(block, f"encoder.layer.{number}.", BERT)
    said = [f"text {start.name}: {start.kind}, {layers} layers of {config.width}"]
    if fusion:
        said[0] += f", the first {config.depth} for text, the last {len(fusion)} for fusion"
    new = ["cross-attention"] if fusion else []
    for head in model.heads.values():
        if isinstance(head, MlmHead):
            if ".cls.predictions.transform.dense.weight" in weights:
                at = ".cls.predictions."  # whose matrix of words is that of the embeddings
                weights.layer(head.transform, at + "transform.dense")
                weights.layer(head.norm, at + "transform.LayerNorm")
                weights.put(head.words.weight, at + "decoder.weight", words[: len(head.words.weight)])
                weights.put(head.words.bias, at + "bias", weights[at + "bias"][: len(head.words.bias)])
                weights.left.discard(at + "decoder.weight")
                weights.left.discard(at + "decoder.bias")
                said.append("with its mlm head")
            else:
                new.append("mlm head")
    return _sentence(said, new, weights)


def _sentence(said: Sequence[str], new: Sequence[str], weights: Weights) -> str:
    ends = [f"new: {', '.join(new)}"] * bool(new) + [f"left out: {weights.left_out()}"] * bool(weights.left)
    return "; ".join([*said, *ends])


def resize_grid(table: Tensor, rows: int, mode: str = "bicubic") -> Tensor:
    """table (old * old, D) of a square grid, row by row -> (rows * rows, D), interpolated between cell centres."""
    old = math.isqrt(len(table))
    if old * old != len(table):
        raise ValueError(f"a table of {len(table)} places is no square grid")
    if old == rows:
        return table
    grid = table.T.unflatten(1, (old, old))[None]
    return F.interpolate(grid, size=(rows, rows), mode=mode, align_corners=False)[0].flatten(1).T
