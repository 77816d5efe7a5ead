"""A trained model as Hugging Face knows models: from_pretrained, save_pretrained, push_to_hub and the Auto classes.

    from smaug.integrations.hub import SmaugModel, SmaugProcessor
    model, processor = SmaugModel.from_pretrained("runs/NAME"), SmaugProcessor.from_pretrained("runs/NAME")
    vectors = model.embed_videos(**processor(videos=["clip.mp4"]))

`from_pretrained` takes the folder of a run, a folder that `save_pretrained` wrote, or a name on the Hub. Weights are
read from safetensors alone, and no code of a folder is run. As a command, which makes such a folder of a run, with
weights, tokenizer and model card:

    python -m smaug.integrations.hub RUN OUT [--push NAME]
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import shutil
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image, ImageOps
from rich.console import Console
from safetensors import SafetensorError
from tokenizers import Tokenizer, processors
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import smaug.integrations.transformers  # noqa: F401  before transformers itself: see the trap that it steps around
from smaug import recipe as recipes
from smaug.data import text as words
from smaug.data.decode import DecodeError, Want, open_decoder
from smaug.data.decode.images import rgb, square
from smaug.data.decode.pyav import middle_squares
from smaug.data.frames import Pick
from smaug.data.media import kind_of
from smaug.device import Way, choose
from smaug.embed import pack_texts
from smaug.model.video_encoder import EncodedVideo
from smaug.objectives.vtc import contrast_of
from smaug.recipe import Recipe
from smaug.run import Run, build, load_run, read_config, read_tokenizer, refuse
from smaug.tokens import PackedTokens, packed_ragged

INSTALL = "pip install -c constraints.txt -e '.[hub]'"
try:
    from huggingface_hub import HfApi, snapshot_download

    # HTTPError is of the library that it speaks HTTP by, which changes with its version.
    from huggingface_hub.errors import HFValidationError, HTTPError
    from huggingface_hub.utils import validate_repo_id
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoProcessor,
        BatchFeature,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerFast,
        ProcessorMixin,
        initialization,
    )
    from transformers.utils import ModelOutput, logging

    from smaug.integrations.model_card import load_lines, model_card
except ImportError as error:
    reason = ImportError(f"smaug.integrations.hub needs transformers 5 ({error}): {INSTALL}")
    if __name__ == "__main__":
        sys.exit(refuse(reason))
    raise reason from error

Source = str | os.PathLike[str]


class SmaugConfig(PreTrainedConfig):
    """What a model is made from.

    recipe      a `Recipe` as `smaug.recipe.to_json` writes it
    vocab_size  words of the tokenizer
    fast        whether it computes in the fastest way of the machine it is on, as `--fast` does (bf16 where the machine
                has it); otherwise in fp32 by the reference ops, the same everywhere. That of the run, by default
    run         what the model card tells of the training: command, machine, step, scores, checksum of the weights
    """

    model_type = "smaug"

    recipe: dict[str, Any] | None = None
    vocab_size: int = 0
    fast: bool = False
    run: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("transformers_weights"):  # a file that transformers would load, be it a pickle
            raise ValueError("smaug takes no transformers_weights in a config.json; the weights are model.safetensors")
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Source, **kwargs: Any) -> tuple[dict[str, Any], Any]:
        if _is_run(pretrained_model_name_or_path):
            return _read_run(Path(pretrained_model_name_or_path))[0], kwargs
        found: tuple[dict[str, Any], Any] = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return found

    def to_recipe(self) -> Recipe:
        """Raises ValueError for a recipe of another version of smaug."""
        if self.recipe is None:
            raise ValueError(
                "a SmaugConfig needs a recipe; take it from a run: SmaugConfig.from_pretrained('runs/NAME')"
            )
        made: Recipe = recipes.from_json(self.recipe)
        return made


@dataclass
class SmaugOutput(ModelOutput):
    """All fp32. T texts, V videos, P pairs."""

    text_embeds: Tensor | None = None  # (T, embed_dim), unit vectors
    video_embeds: Tensor | None = None  # (V, embed_dim), unit vectors
    logits_per_text: Tensor | None = None  # (T, V), their products over the learned temperature
    logits_per_video: Tensor | None = None  # (V, T)
    # (P, 2), no and yes of the match head. Evaluation ranks by the logit of the contrast plus yes minus no.
    match_logits: Tensor | None = None


class SmaugModel(PreTrainedModel):
    """`smaug.model.model.Model`, with all its heads.

    Weights are fp32, as they were trained, and a model of a `--fast` run computes under autocast as the run did; in a
    user's own autocast that one counts. After `half()`, `to(torch.bfloat16)` or `dtype=...` it computes in the type of
    its weights. `from_pretrained(..., fast=False)` computes in fp32. Vectors and logits are always fp32.
    """

    config_class = SmaugConfig
    main_input_name = "pixel_values_videos"
    _made = False

    def __init__(self, config: SmaugConfig) -> None:
        super().__init__(config)
        self.model = build(config.to_recipe(), config.vocab_size, "auto" if config.fast else "reference")
        self.post_init()
        self._made = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Source | None, *args: Any, **kwargs: Any) -> Any:
        """Folder of a run (its newest whole checkpoint), folder of `save_pretrained`, or name on the Hub.

        Takes what every from_pretrained of transformers takes. ValueError where there are no safetensors.
        """
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError("smaug reads weights from safetensors alone; leave use_safetensors out")
        source = pretrained_model_name_or_path
        if source is not None and _is_run(source):
            fields, run = _read_run(Path(source))
            fields["fast"] = kwargs.pop("fast", fields["fast"])
            state = {f"model.{name}": value for name, value in run.model.state_dict().items()}
            config = kwargs.pop("config", None) or SmaugConfig(**fields)
            return super().from_pretrained(None, *args, config=config, state_dict=state, **kwargs)
        if source is not None:
            source = _folder(source, kwargs)
            _only_safetensors(source / (kwargs.get("subfolder") or ""))
        return super().from_pretrained(source, *args, **kwargs)

    def initialize_weights(self) -> None:
        """What a checkpoint lacks, of which transformers warns, becomes as in a new model of the recipe."""
        missing = {n: p for n, p in self.model.named_parameters() if not getattr(p, "_is_hf_initialized", False)}
        if not self._made or not missing:  # transformers calls it in __init__, too, when all is new
            return
        fresh = build(self.config.to_recipe(), self.config.vocab_size, "reference").state_dict()
        for name, parameter in missing.items():
            initialization.copy_(parameter, fresh[name])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        pairs: Tensor | Sequence[Sequence[int]] | None = None,
        return_dict: bool | None = None,
    ) -> SmaugOutput | tuple[Tensor, ...]:
        """Texts, videos or both; nothing is masked, pruning and frame selection are as they were trained.

        input_ids            (T, L) int64, [CLS] first, as the processor gives them
        attention_mask       (T, L), 0 where a text is padded; by default nothing is
        pixel_values_videos  (V, F, H, W, 3) uint8, frames as the processor gives them; F = 1 for pictures
        pairs                (P, 2) int64, (text, video) to ask the match head about

        ValueError for a wrong shape or type, and for pairs where the recipe has no `vtm`.
        """
        found = SmaugOutput()
        with self._autocast():
            texts = None if input_ids is None else self._encode_texts(input_ids, attention_mask)
            videos = None if pixel_values_videos is None else self._encode_videos(pixel_values_videos)
            if texts is None and videos is None:
                raise ValueError("nothing to do: give input_ids, pixel_values_videos or both")
            heads = contrast_of(self.model)
            if heads is not None and texts is not None:
                found.text_embeds = heads.embed_text(texts[0])
            if heads is not None and videos is not None:
                found.video_embeds = heads.embed_video(videos.features)
            if heads is not None and texts is not None and videos is not None:
                found.logits_per_text = heads.scores(texts[0], videos.features)
                found.logits_per_video = found.logits_per_text.T
            if pairs is not None:
                if texts is None or videos is None:
                    raise ValueError("pairs need both input_ids and pixel_values_videos")
                found.match_logits = self._match(texts, videos, torch.as_tensor(pairs, device=self.device))
        use_dict = self.config.return_dict if return_dict is None else return_dict
        return found if use_dict else found.to_tuple()

    @torch.no_grad()
    def embed_videos(self, pixel_values_videos: Tensor) -> Tensor:
        """(V, F, H, W, 3) uint8 -> (V, embed_dim) fp32 unit vectors: those of `smaug.embed.embed_videos`."""
        found = self(pixel_values_videos=pixel_values_videos, return_dict=True).video_embeds
        return self._trained_with_a_contrast(found)

    @torch.no_grad()
    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(T, L) int64 -> (T, embed_dim) fp32 unit vectors: those of `smaug.embed.embed_texts`."""
        found = self(input_ids=input_ids, attention_mask=attention_mask, return_dict=True).text_embeds
        return self._trained_with_a_contrast(found)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.text.word

    def save_pretrained(self, save_directory: Source, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """config.json, model.safetensors (or several, of `max_shard_size`), and the model card README.md.

        A README.md that is there already is kept, with a warning. ValueError for the folder of a run, whose own
        config.json would be lost.
        """
        self._save(save_directory, str(save_directory), *args, **kwargs)
        if push_to_hub:
            self.push_to_hub(kwargs.get("repo_id") or Path(save_directory).name, token=kwargs.get("token"))

    def push_to_hub(self, repo_id: str, *, max_shard_size: int | str | None = "50GB", **kwargs: Any) -> str:
        """Weights, configuration and model card -> address of the commit. Other arguments: see `_push`."""

        def save(folder: Path, name: str) -> None:
            self._save(folder, name, max_shard_size=max_shard_size or "50GB")

        return _push(save, repo_id, **kwargs)

    def _save(self, folder: Source, name: str, *args: Any, **kwargs: Any) -> None:
        _not_into_a_run(folder)
        try:
            super().save_pretrained(folder, *args, **kwargs)
        except SafetensorError as error:  # a full disk
            raise OSError(f"{folder} cannot be written: {error}") from None
        for weights in Path(folder).glob("*.safetensors"):  # safetensors writes for the owner alone
            weights.chmod((Path(folder) / "config.json").stat().st_mode)
        card = Path(folder) / "README.md"
        if self.config.run is None:
            return
        if card.exists():
            warnings.warn(f"{card} was there already and is kept; it may tell of other weights", stacklevel=3)
            return
        about = {
            "parameters": self.num_parameters(),
            "changed": _checksum(self.model) != self.config.run["weights"],
            "starts": _starts(self.config.recipe, self.config.run),
        }
        model_card(self.config.to_recipe(), self.config.run, name, **about).save(card)

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.dtype is not torch.float32 or torch.is_autocast_enabled(self.device.type):
            return contextlib.nullcontext()
        return _way(self.config.fast, self.device.type).autocast()

    @staticmethod
    def _trained_with_a_contrast(found: Tensor | None) -> Tensor:
        if found is None:
            raise ValueError("embedding needs the vtc objective; this model was trained without it")
        return found

    def _encode_videos(self, video: Tensor) -> EncodedVideo:
        config = self.model.video.config
        size = config.image_size
        if video.dtype != torch.uint8 or video.ndim != 5 or tuple(video.shape[2:]) != (size, size, 3):
            raise ValueError(
                f"pixel_values_videos is (videos, frames, {size}, {size}, 3) uint8, but this is {tuple(video.shape)} "
                f"{str(video.dtype).removeprefix('torch.')}; let SmaugProcessor make it"
            )
        video = video.to(self.device)
        encoded: EncodedVideo = self.model.video([(video, config.every_patch(video))])
        return encoded

    def _encode_texts(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, PackedTokens]:
        """Padding is dropped, not computed."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if input_ids.ndim != 2 or mask.shape != input_ids.shape:
            raise ValueError(
                f"input_ids and attention_mask are both (texts, words), not {tuple(input_ids.shape)} and "
                f"{tuple(mask.shape)}"
            )
        lengths = mask.bool().sum(1).tolist()
        most = self.model.text.config.max_words
        if not lengths or not 1 <= min(lengths) <= max(lengths) <= most:
            raise ValueError(f"texts have 1 to {most} words, [CLS] included, but these have {lengths[:8]}")
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        values = input_ids[mask.bool()].to(self.device)
        features, encoded = self.model.text(packed_ragged(values, cu_seqlens.to(self.device), lengths=tuple(lengths)))
        return features, encoded

    def _match(self, texts: tuple[Tensor, PackedTokens], videos: EncodedVideo, pairs: Tensor) -> Tensor:
        if self.model.fusion is None or "vtm" not in self.model.heads:
            raise ValueError("pairs need a match head, but this model was trained without the objective vtm")
        if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs):
            raise ValueError(f"pairs are (pairs, 2), a text and a video each, not {tuple(pairs.shape)}")
        (features, encoded), of_text, of_video = texts, pairs[:, 0], pairs[:, 1]
        each = encoded.values.split(encoded.cu_seqlens.diff().tolist())
        chosen = [each[number] for number in of_text.tolist()]
        lengths = tuple(len(one) for one in chosen)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(self.device)
        paired = packed_ragged(torch.cat(chosen), cu_seqlens, lengths=lengths)
        kv_ids, gate = videos.frame_ids.index_select(0, of_video), None
        if self.model.selector is not None:
            kv_ids, gate = self.model.selector(videos.summaries, features.index_select(0, of_text), kv_ids)
        fused = self.model.fusion([paired], videos.frames, kv_ids, gate, rows=paired.first_rows(), lengths=1)
        logits: Tensor = self.model.heads["vtm"](fused.values).float()
        return logits


class SmaugProcessor(ProcessorMixin):
    """Texts as the run's words, videos and pictures as the frames that the run's evaluation shows."""

    def __init__(self, tokenizer: Any, recipe: dict[str, Any] | None = None, frames: int | None = None) -> None:
        """recipe as in `SmaugConfig`; frames of a video, by default those of the recipe's evaluation."""
        if recipe is None:
            raise ValueError(
                "a SmaugProcessor needs a recipe; take it from a run: SmaugProcessor.from_pretrained('runs/NAME')"
            )
        if frames is not None and frames < 1:
            raise ValueError(f"a video has at least one frame, not {frames}")
        super().__init__(tokenizer)
        self.recipe, self.frames = recipe, frames
        self._recipe: Recipe = recipes.from_json(recipe)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Source, *args: Any, **kwargs: Any) -> Any:
        """As that of SmaugModel. frames=8 shows the model 8 frames of a video."""
        if not _is_run(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        folder = Path(pretrained_model_name_or_path)
        config = read_config(folder)
        own = _tokenizer(recipes.from_json(config["recipe"]), read_tokenizer(folder))
        return cls(own, config["recipe"], kwargs.get("frames"))

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        images: Any = None,
        *,
        frame_rate: float | None = None,
        return_tensors: str | None = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """-> input_ids and attention_mask (T, L) int64 of the texts, padded on the right; pixel_values_videos
        (V, F, H, W, 3) uint8 of the videos, or of the images with F = 1, the middle square of each.

        text        one or several; the words beyond what the model reads are cut
        videos      one or several of: path of a file; (F, H, W, 3) uint8 array or tensor, or list of PIL images, of all
                    the frames of a clip in the order of time
        images      one or several of: path of a file; PIL image; (H, W, 3) uint8 array or tensor
        frame_rate  frames a second of videos that are no files, where the run samples by time (sampler kind "fps")

        ValueError for a file that cannot be decoded, naming it, and for what is none of these.
        """
        if kwargs:
            raise ValueError(
                f"SmaugProcessor has no argument {', '.join(sorted(kwargs))}: all else is as it was trained"
            )
        if videos is not None and images is not None:
            raise ValueError("give videos or images, not both: they have different numbers of frames")
        if text is None and videos is None and images is None:
            raise ValueError("nothing to do: give text, videos or images")
        data: dict[str, Tensor] = {}
        if text is not None:
            data |= self._words([text] if isinstance(text, str) else list(text))
        if videos is not None:
            data["pixel_values_videos"] = self._see(_each(videos, 4), "video", frame_rate)
        if images is not None:
            data["pixel_values_videos"] = self._see(_each(images, 3), "image", None)
        return BatchFeature(data, tensor_type=return_tensors)

    def save_pretrained(
        self, save_directory: Source, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """processor_config.json, tokenizer.json and tokenizer_config.json. ValueError for the folder of a run."""
        _not_into_a_run(save_directory)
        saved: list[str] = super().save_pretrained(save_directory, *args, **kwargs)
        if push_to_hub:
            self.push_to_hub(kwargs.get("repo_id") or Path(save_directory).name, token=kwargs.get("token"))
        return saved

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Only its own files: transformers' would put an empty model card beside them."""
        kwargs.pop("max_shard_size", None)  # of the common signature
        return _push(lambda folder, _: self.save_pretrained(folder), repo_id, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values_videos"]

    def _words(self, texts: list[str]) -> dict[str, Tensor]:
        if not texts or not all(isinstance(one, str) for one in texts):
            raise ValueError("text is one text or several")
        own = self.tokenizer.backend_tokenizer
        own.no_padding()  # what a call of the tokenizer itself has left set
        own.no_truncation()
        packed = pack_texts(self._recipe, own, texts)
        assert packed.lengths is not None and not isinstance(packed.lengths, int)
        rows = packed.values.split(list(packed.lengths))
        ids = pad_sequence(list(rows), batch_first=True, padding_value=words.number(own, words.PAD))
        lengths = torch.tensor(list(packed.lengths))
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}

    def _see(self, given: list[Any], kind: str, frame_rate: float | None) -> Tensor:
        """(V, F, size, size, 3) uint8."""
        video = self._recipe.model.video
        count = self.frames or self._recipe.test_frames
        video.times(count)  # raises for a number that does not fill the tubes
        pick = self._recipe.data.sampler.pick(count, video.view)
        files = [number for number, one in enumerate(given) if isinstance(one, str | os.PathLike)]
        seen = dict(zip(files, self._read([Path(given[n]) for n in files], kind, pick), strict=True))
        for number, one in enumerate(given):
            if number in seen:
                continue
            if kind == "image":
                seen[number] = _picture(one, video.image_size)
            elif frame_rate is None and self._recipe.data.sampler.kind == "fps":
                raise ValueError("the run samples frames by time: say the frame_rate of videos that are no files")
            else:
                seen[number] = _clip(one, video.image_size, pick, frame_rate or 1.0)
        if len({len(frames) for frames in seen.values()}) > 1:
            raise ValueError("videos and pictures have different numbers of frames; give pictures by images=, apart")
        return torch.stack([seen[number] for number in range(len(given))])

    def _read(self, paths: list[Path], kind: str, pick: Pick) -> list[Tensor]:
        if not paths:
            return []
        wants = [
            Want(path, "image" if kind == "image" or kind_of(path.suffix[1:]) == "image" else "video", pick)
            for path in paths
        ]
        # Not the run's: who loads the model may have neither its decoder nor its GPU. All keep to one contract.
        workers = min(len(paths), self._recipe.data.workers or os.cpu_count() or 1)
        decoder = open_decoder("auto", torch.device("cpu"), workers, self._recipe.data.clip_seconds)
        try:
            got = decoder.decode(wants, self._recipe.model.video.image_size)
        finally:
            decoder.close()
        bad = [f"{path}: {one.reason}" for path, one in zip(paths, got, strict=True) if one.frames is None]
        if bad:
            more = f" (and {len(bad) - 1} more of {len(paths)})" if len(bad) > 1 else ""
            raise ValueError(f"cannot be decoded: {bad[0]}{more}")
        return [one.frames for one in got if one.frames is not None]


def _each(given: Any, dimensions: int) -> list[Any]:
    """One or several as a list. One: a path, a picture, an array of so many dimensions, the pictures of a video."""
    if isinstance(given, str | os.PathLike | Image.Image) or getattr(given, "ndim", None) == dimensions:
        return [given]
    if not isinstance(given, Iterable) or not (several := list(given)):
        raise ValueError(f"videos and images are paths, arrays or PIL images, one or several, not {given!r}")
    return [several] if dimensions == 4 and all(isinstance(one, Image.Image) for one in several) else several


def _clip(given: Any, size: int, pick: Pick, frame_rate: float) -> Tensor:
    """Picked frames of a video in memory: (F, size, size, 3) uint8, resized as those of a file are."""
    pictures = isinstance(given, Sequence) and bool(given) and all(isinstance(one, Image.Image) for one in given)
    frames = given if pictures else _array(given, "(F, H, W, 3)")
    chosen = [frames[number] for number in pick(np.arange(len(frames)) / frame_rate)]
    if pictures and len({one.size for one in chosen}) > 1:
        raise ValueError("the PIL images of a video are of one size")
    try:
        squares = middle_squares([np.asarray(rgb(one)) if pictures else one for one in chosen], size)
    except DecodeError as error:
        raise ValueError(f"a video cannot be used: {error.reason}") from None
    return torch.from_numpy(squares)


def _picture(given: Any, size: int) -> Tensor:
    """The same of a picture: (1, size, size, 3)."""
    if not isinstance(given, Image.Image):
        given = Image.fromarray(_array(given, "(H, W, 3)"))
    return torch.from_numpy(np.asarray(square(ImageOps.exif_transpose(given), size))[None].copy())


def _array(given: Any, expected: str) -> np.ndarray:
    array = given.cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    if array.dtype != np.uint8 or array.ndim != expected.count(",") + 1 or array.shape[-1] != 3 or not array.size:
        raise ValueError(
            f"a path, PIL images or a {expected} uint8 array is expected, not {type(given).__name__} of shape "
            f"{array.shape} and type {array.dtype}"
        )
    return array


def _tokenizer(recipe: Recipe, own: Tokenizer) -> Any:
    """The run's tokenizer for transformers; called alone, too, it gives what the model was trained on."""
    probe = pack_texts(recipe, own, [words.UNK]).values.tolist()
    end = f" {words.SEP}" if probe[-1] == words.number(own, words.SEP) else ""
    used = [piece for piece in (words.CLS, words.SEP) if piece == words.CLS or end]
    own.post_processor = processors.TemplateProcessing(
        single=f"{words.CLS} $A{end}", special_tokens=[(piece, words.number(own, piece)) for piece in used]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=own,
        pad_token=words.PAD,
        unk_token=words.UNK,
        cls_token=words.CLS,
        sep_token=words.SEP,
        mask_token=words.MASK,
        model_max_length=recipe.model.text.max_words,
        model_input_names=["input_ids", "attention_mask"],
    )


@functools.lru_cache
def _way(fast: bool, device: str) -> Way:
    return choose(fast, device)


def _is_run(source: Source) -> bool:
    """Whether it is the folder of a run, not one of save_pretrained's and not a name on the Hub."""
    path = Path(source) / "config.json"
    if not path.is_file():
        return False
    try:
        found = json.loads(path.read_text())
    except ValueError:  # damaged, and transformers says so
        return False
    return isinstance(found, dict) and "recipe" in found and "model_type" not in found


def _folder(source: Source, kwargs: dict[str, Any]) -> Path:
    """The folder itself, or what the Hub has under this name, in its cache: by pattern, so no pickle is fetched."""
    if Path(source).is_dir():
        return Path(source)
    passed_on = ("cache_dir", "force_download", "local_files_only", "token", "revision")
    how = {key: kwargs[key] for key in passed_on if key in kwargs}
    inside = f"{kwargs['subfolder']}/" if kwargs.get("subfolder") else ""
    wanted = [f"{inside}{name}" for name in ("config.json", "model*.json", "model*.safetensors")]
    try:
        return Path(snapshot_download(str(source), allow_patterns=wanted, **how))
    except HFValidationError:
        raise ValueError(f"{source} is neither a folder nor a name on the Hub") from None


def _only_safetensors(folder: Path) -> None:
    """Raises ValueError where transformers would find no safetensors, or would read a pickle nevertheless."""
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} has no .safetensors, and smaug reads weights from nothing else: no .bin, no pickle")
    for index in folder.glob("*.safetensors.index.json"):
        for name in json.loads(index.read_text())["weight_map"].values():
            if not name.endswith(".safetensors"):
                raise ValueError(f"{index} names {name}, and smaug reads weights from .safetensors alone")
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder} has an adapter, of which peft may read a pickle; load it by peft, after the model")


def _not_into_a_run(folder: Source) -> None:
    if _is_run(folder):
        raise ValueError(f"{folder} is the folder of a run, whose files would be lost; save to another")


def _read_run(folder: Path) -> tuple[dict[str, Any], Run]:
    """The fields of SmaugConfig, and the run itself."""
    config, run = read_config(folder), load_run(folder, "cpu")
    if contrast_of(run.model) is None and "vtm" not in run.model.heads:
        names = ", ".join(run.recipe.objectives)
        raise ValueError(f"{folder} was trained for {names}, and SmaugModel gives what vtc and vtm are trained for")
    told = {key: config[key] for key in ("size", "fast", "command", "machine", "smaug")}
    told |= {"step": run.step, "weights": _checksum(run.model)}
    if config.get("init"):  # another run that it began from
        told["init"] = Path(config["init"]).name
    path = folder / "result.json"
    if path.exists():
        try:
            result = json.loads(path.read_text())
            # the names of the files that were skipped are nobody's business
            result["evaluation_skipped"] = len(result["evaluation_skipped"])
            same = result["step"] == run.step
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it, or write it again by --resume") from None
        if same:  # else they are the scores of other weights
            told["result"] = result
    fields = {"recipe": config["recipe"], "vocab_size": run.tokenizer.get_vocab_size(), "fast": config["fast"]}
    return fields | {"run": told}, run


def _starts(recipe: Any, run: dict[str, Any]) -> list[str]:
    """What the weights began from: checkpoints of others, by a recipe as JSON, and another run."""
    found = [part["start"] for part in recipe["model"].values() if isinstance(part, dict) and part.get("start")]
    return list(dict.fromkeys(found)) + [f"the run {name}" for name in (run.get("init"),) if name]


def _checksum(model: nn.Module) -> int:
    crc = 0
    for _, value in sorted(model.state_dict().items()):
        crc = zlib.crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def _push(
    save: Callable[[Path, str], object],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    **commit: Any,
) -> str:
    """What `save(folder, name)` writes, to a repository on the Hub, made if it is not there -> address of the commit.

    private: a new repository; token: by default that of `hf auth login`; revision: a branch, made if it is not there.
    commit: commit_message, commit_description, create_pr.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), repo_id)
        done = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, **commit)
    url: str = done.commit_url
    return url


AutoConfig.register(SmaugConfig.model_type, SmaugConfig)
AutoModel.register(SmaugConfig, SmaugModel)
AutoProcessor.register(SmaugConfig, SmaugProcessor)


def export(run: Path, out: Path, name: str | None = None) -> None:
    """A run as a folder for the Hub: whole, or not there at all. name: by which the model card tells how to load it.

    Raises ValueError where `run` is no run, or `out` is there and not empty.
    """
    read_config(run)  # first, for its words on what is missing
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already and not empty; name a folder that is not")
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.parent / f".{out.name}.aside"
    shutil.rmtree(aside, ignore_errors=True)  # of an export that was killed
    aside.mkdir()
    try:
        SmaugModel.from_pretrained(run)._save(aside, name or str(out))
        SmaugProcessor.from_pretrained(run).save_pretrained(aside)
        os.replace(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


@dataclass(frozen=True)
class Options:
    run: Annotated[Path, tyro.conf.Positional]  # folder of a run
    out: Annotated[Path, tyro.conf.Positional]  # folder to write
    push: str | None = None  # also upload it under this name, as alice/smaug-tiny; it quotes the run's command


def main() -> int:
    options = tyro.cli(Options, prog="python -m smaug.integrations.hub", description=__doc__)
    console = Console(markup=False)

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    logging.disable_progress_bar()  # of transformers, for moments; that of an upload stays
    try:
        if options.push is not None:
            validate_repo_id(options.push)
        export(options.run, options.out, options.push)
        say(f"{options.out} holds the model, its processor and a model card. To use it:\n")
        say(load_lines(recipes.from_json(read_config(options.run)["recipe"]), str(options.out)) + "\n")
        if options.push is not None:
            say(f"pushed to {_push_folder(options.out, options.push)}")
        else:
            say(f"README.md and config.json quote the command of the run, with its paths: read {options.out}/README.md")
            say(f"before you share it. To share it: hf upload NAME {shlex.quote(str(options.out))}")
        return 0
    except (ValueError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 130


def _push_folder(out: Path, name: str) -> str:
    try:
        return _push(lambda folder, _: shutil.copytree(out, folder, dirs_exist_ok=True), name)
    except (OSError, ValueError, HTTPError) as error:
        raise ValueError(
            f"{out} is whole, but could not be pushed to {name} ({' '.join(str(error).split())}). When that is mended, "
            f"or after `hf auth login`: hf upload {name} {shlex.quote(str(out))}"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
