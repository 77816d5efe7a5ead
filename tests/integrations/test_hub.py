"""A run as a Hugging Face model: the same vectors by every way in, nothing read but safetensors, an honest card."""

import base64
import hashlib
import json
import logging
import math
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import smaug.integrations.transformers  # noqa: F401  before transformers itself

pytest.importorskip("transformers")
import huggingface_hub
from huggingface_hub import ModelCard, metadata_load
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

from smaug import train
from smaug.data.loader import middle_frames
from smaug.embed import embed_texts, embed_videos
from smaug.integrations import hub
from smaug.integrations.hub import SmaugConfig, SmaugModel, SmaugProcessor, export
from smaug.integrations.model_card import model_card
from smaug.run import build, load_run, open_split

SMALL = [
    "--model.video.width=32", "--model.video.depth=1", "--model.video.heads=2", "--model.video.frames=4",
    "--model.video.tubelet=2", "--model.text.width=32", "--model.text.depth=1", "--model.text.heads=2",
    "--model.fusion.heads=2", "--model.selector.keep=1", "--model.selector.width=8", "--data.batch=16",
    "--data.shapes", "64", "16", "16", "--optim.steps=2",
]  # fmt: skip
TEXTS = ["a red ring", "the white triangle beside the red ring that grows", "☃", "", "ring " * 40]
SHARED = Path(__file__).resolve().parents[3] / "shared/data"


@pytest.fixture(scope="module")
def run(shapes_cache, tmp_path_factory):
    """Of the smallest model that has everything: pruning, frame selection, all heads; two steps, --fast."""
    folder = tmp_path_factory.mktemp("hub") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["smaug", "smaug", "--fast", *SMALL, "--run-dir", str(folder)])
        assert train.main() == 0
    return folder


@pytest.fixture(scope="module")
def exported(run):
    out = run.with_name("exported")
    export(run, out)
    return out


@pytest.fixture
def other(run, tmp_path):
    """other(**changes) -> a copy of the run with a changed config.json."""

    def make(**changes):
        folder = tmp_path / "other"
        shutil.copytree(run, folder)
        config = json.loads((folder / "config.json").read_text())
        for key, value in changes.items():
            part = config["recipe"]["data"] if key in config["recipe"]["data"] else config
            part[key] = value
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def own(run, count=6):
    """Vectors of the run itself, by smaug.embed: of test clips, read as its evaluation does, and of texts."""
    loaded = load_run(run, "cpu")
    clips = open_split(loaded.recipe, "test", Console(quiet=True))
    video = loaded.recipe.model.video
    groups, _ = middle_frames(clips, range(count), video.frames, view=video.view)
    return clips, groups[0].video, embed_videos(loaded, groups[0].video), embed_texts(loaded, TEXTS)


def files(clips, count=6):
    return [sample.path for sample in clips.samples[:count]]


def test_every_way_in_gives_the_vectors_of_the_run(run, exported):
    clips, video, videos, texts = own(run)
    ways = [(run, SmaugModel, SmaugProcessor), (exported, SmaugModel, SmaugProcessor)]
    for source, model_class, processor_class in [*ways, (str(exported), AutoModel, AutoProcessor)]:
        model, processor = model_class.from_pretrained(source), processor_class.from_pretrained(source)
        assert type(model) is SmaugModel and type(processor) is SmaugProcessor and not model.training
        batch = processor(videos=files(clips))
        assert torch.equal(batch["pixel_values_videos"], video)
        assert torch.equal(model.embed_videos(**batch), videos)
        assert torch.equal(model.embed_texts(**processor(text=TEXTS)), texts)
    assert model.num_parameters() == sum(p.numel() for p in load_run(run, "cpu").model.parameters())
    assert model.dtype is torch.float32 and model.config.dtype is torch.float32
    config = AutoConfig.from_pretrained(exported)
    assert type(config) is SmaugConfig and config.fast and config.to_recipe() == load_run(run, "cpu").recipe


def test_a_run_that_was_not_fast_computes_in_fp32(run, other, exported):
    plain = other(fast=False)
    _, video, videos, texts = own(plain)
    for model in (SmaugModel.from_pretrained(plain), SmaugModel.from_pretrained(exported, fast=False)):
        processor = SmaugProcessor.from_pretrained(plain)
        assert torch.equal(model.embed_videos(video), videos)
        assert torch.equal(model.embed_texts(**processor(text=TEXTS)), texts)


def test_forward_ranks_as_the_evaluation_did(run, exported):
    """The recalls of result.json, from the contrast's logits and the match head's for every pair."""
    model, processor = SmaugModel.from_pretrained(exported), SmaugProcessor.from_pretrained(exported)
    clips, *_ = own(run)
    captions = [sample.captions[0] for sample in clips.samples]
    batch = processor(text=captions, videos=files(clips, 16))
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16))
    with torch.no_grad():
        out = model(**batch, pairs=pairs)
    assert out.logits_per_text.shape == (16, 16) and torch.equal(out.logits_per_text, out.logits_per_video.T)
    temperature = math.exp(load_file(exported / "model.safetensors")["model.heads.vtc.log_temperature"])
    torch.testing.assert_close(out.logits_per_text, out.text_embeds @ out.video_embeds.T / temperature)
    scores = out.logits_per_text + (out.match_logits[:, 1] - out.match_logits[:, 0]).view(16, 16)
    result = json.loads((run / "result.json").read_text())
    for key, side in (("t2v", scores), ("v2t", scores.T)):
        ranks = (side >= side.diagonal()[:, None]).sum(1)
        for k in (1, 5, 10):
            assert (ranks <= k).float().mean().item() == pytest.approx(result[f"{key}_r{k}"])

    assert isinstance(model(**batch, return_dict=False), tuple)
    one = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert set(one.keys()) == {"text_embeds"}
    model.train()
    loss = model(**batch, pairs=pairs[:4])
    (loss.logits_per_text.diagonal().sum() + loss.match_logits.sum()).backward()
    assert all(p.grad is not None for p in [*model.model.video.parameters(), *model.model.text.parameters()])


def test_padding_does_not_count(exported):
    model, processor = SmaugModel.from_pretrained(exported, fast=False), SmaugProcessor.from_pretrained(exported)
    batch = processor(text=TEXTS)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape == (5, 32) and mask.sum(1).tolist()[-1] == 32 and mask.sum(1).min() == 2
    vectors = model.embed_texts(ids, mask)
    for i in range(len(TEXTS)):
        torch.testing.assert_close(model.embed_texts(**processor(text=TEXTS[i])), vectors[i : i + 1])
        n = int(mask[i].sum())
        left = torch.zeros_like(ids[i : i + 1]), torch.zeros_like(mask[i : i + 1])
        left[0][0, 32 - n :], left[1][0, 32 - n :] = ids[i, :n], 1
        torch.testing.assert_close(model.embed_texts(*left), vectors[i : i + 1])
    # The tokenizer alone gives the same, but for texts without a word.
    tokenizer = AutoTokenizer.from_pretrained(exported)
    alone = tokenizer([TEXTS[0], TEXTS[1], TEXTS[4]], padding=True, truncation=True, return_tensors="pt")
    assert torch.equal(alone["input_ids"], ids[[0, 1, 4]]) and torch.equal(alone["attention_mask"], mask[[0, 1, 4]])
    processor.tokenizer(TEXTS, padding="max_length", max_length=64)  # leaves its padding set
    assert torch.equal(processor(text=TEXTS)["input_ids"], ids)


def test_standard_features(run, exported, tmp_path):
    _, video, videos, texts = own(run)
    model, processor = SmaugModel.from_pretrained(exported), SmaugProcessor.from_pretrained(exported)
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    again = SmaugModel.from_pretrained(tmp_path / "shards")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert torch.equal(again.embed_videos(video), videos)

    for dtype in (torch.float16, torch.bfloat16):
        for low in (SmaugModel.from_pretrained(exported, dtype=dtype), SmaugModel.from_pretrained(exported).to(dtype)):
            assert low.dtype is dtype
            got = low.embed_videos(video)
            assert got.dtype is torch.float32
            torch.testing.assert_close(got, videos, atol=0.02, rtol=0)
            torch.testing.assert_close(low.embed_texts(**processor(text=TEXTS)), texts, atol=0.02, rtol=0)
    config = AutoConfig.from_pretrained(exported)
    torch.manual_seed(1)
    new = AutoModel.from_config(config)
    torch.manual_seed(1)
    ours = build(config.to_recipe(), config.vocab_size, "auto")
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), ours.parameters(), strict=True))
    low.save_pretrained(tmp_path / "low")
    assert SmaugModel.from_pretrained(tmp_path / "low").dtype is torch.bfloat16


def test_a_missing_tensor_is_told_and_begins_as_new(exported, tmp_path, caplog):
    folder = shutil.copytree(exported, tmp_path / "holes")
    weights = load_file(folder / "model.safetensors")
    gone = ["model.heads.vtc.log_temperature", "model.video.position", "model.text.norm.weight"]
    kept = {name: value for name, value in weights.items() if name not in gone}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        model, info = SmaugModel.from_pretrained(folder, output_loading_info=True)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert set(info["missing_keys"]) == set(gone)
    assert all(name in caplog.text for name in gone) and "MISSING" in caplog.text
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in kept.items())
    assert state[gone[0]].item() == pytest.approx(math.log(0.07))
    assert 0.01 < state[gone[1]].std() < 0.03 and state[gone[2]].eq(1).all()


class Bomb:
    """What a pickle can do when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_loads_a_pickle(exported, tmp_path):
    gone_off = tmp_path / "gone off"
    for number, (name, complaint) in enumerate(
        {
            "pytorch_model.bin": "has no .safetensors",
            "model.safetensors.index.json": "from .safetensors alone",
            "adapter_config.json": "load it by peft",
            "config.json": "transformers_weights",
        }.items()
    ):
        folder = shutil.copytree(exported, tmp_path / str(number))
        torch.save(Bomb(gone_off), folder / "adapter_model.bin")
        if name == "pytorch_model.bin":
            (folder / "model.safetensors").unlink()
            torch.save(Bomb(gone_off), folder / name)
        elif name == "model.safetensors.index.json":
            (folder / "model.safetensors").rename(folder / "other.safetensors")
            index = {"metadata": {}, "weight_map": {"model.video.cls": "adapter_model.bin"}}
            (folder / name).write_text(json.dumps(index))
        else:
            config = json.loads((folder / "config.json").read_text()) | {"transformers_weights": "adapter_model.bin"}
            (folder / name).write_text(json.dumps(config))
        for load in (SmaugModel, AutoModel):
            with pytest.raises(ValueError, match=complaint) as error:
                load.from_pretrained(folder)
            assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="safetensors alone"):
        SmaugModel.from_pretrained(exported, use_safetensors=False)
    assert not gone_off.exists()
    with pytest.raises(ValueError, match="neither a folder nor a name on the Hub"):
        SmaugModel.from_pretrained(tmp_path / "nowhere/at/all")


def test_processor_takes_what_people_have(run, exported):
    clips, video, *_ = own(run)
    processor = SmaugProcessor.from_pretrained(exported)
    path = files(clips)[0]
    seen = processor(videos=path)["pixel_values_videos"]
    assert torch.equal(seen, video[:1]) and torch.equal(processor(videos=[str(path)])["pixel_values_videos"], seen)
    assert processor(videos=[path, path], return_tensors="np")["pixel_values_videos"].shape == (2, 4, 64, 64, 3)

    frames = np.random.default_rng(0).integers(256, size=(11, 72, 96, 3), dtype=np.uint8)
    as_array = processor(videos=frames)["pixel_values_videos"]
    for same in (torch.from_numpy(frames), [frames], frames[None], [Image.fromarray(f) for f in frames]):
        assert torch.equal(processor(videos=same)["pixel_values_videos"], as_array)
    square = frames[:, :64, :64]
    as_run_picks = processor._recipe.data.sampler.pick(4, 2)(np.arange(11.0))
    assert torch.equal(processor(videos=square)["pixel_values_videos"][0], torch.from_numpy(square[as_run_picks]))
    eight = SmaugProcessor.from_pretrained(exported, frames=8)
    assert eight(videos=frames)["pixel_values_videos"].shape == (1, 8, 64, 64, 3)

    picture = processor(images=frames[0])["pixel_values_videos"]
    assert picture.shape == (1, 1, 64, 64, 3)
    for same in (Image.fromarray(frames[0]), [Image.fromarray(frames[0])], torch.from_numpy(frames[:1])):
        assert torch.equal(processor(images=same)["pixel_values_videos"], picture)
    assert SmaugModel.from_pretrained(exported).embed_videos(picture).shape == (1, 128)


def test_arrays_of_a_film_look_as_its_file(exported):
    """Within the rounding of colours: files are resized before they become RGB."""
    import av

    film = SHARED / "clips/asl_again.mkv"
    if not film.exists():
        pytest.skip("shared/data is not here")
    processor = SmaugProcessor.from_pretrained(exported)
    frames = np.stack([frame.to_ndarray(format="rgb24") for frame in av.open(str(film)).decode(video=0)])
    difference = processor(videos=frames)["pixel_values_videos"].float() - processor(videos=film)["pixel_values_videos"]
    assert difference.abs().mean() < 1.5 and difference.abs().max() < 16


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({}, "nothing to do"),
        ({"videos": "nowhere.mp4"}, r"cannot be decoded: nowhere.mp4: file not found"),
        ({"videos": [__file__, "nowhere.mp4"]}, r"test_hub.py: .* \(and 1 more of 2\)"),
        ({"images": __file__}, "test_hub.py: not a picture"),
        ({"videos": np.zeros((4, 3, 8, 8), np.uint8)}, r"\(F, H, W, 3\) uint8 .* \(4, 3, 8, 8\)"),
        ({"videos": np.zeros((4, 8, 8, 3))}, "uint8 array is expected, .* float64"),
        ({"videos": [Image.new("RGB", (9, 9)), Image.new("RGB", (8, 8))]}, "of one size"),
        ({"videos": []}, "paths, arrays or PIL"),
        ({"images": 3}, "paths, arrays or PIL"),
        ({"videos": "a.mp4", "images": "a.png"}, "not both"),
        ({"text": [3]}, "one text or several"),
        ({"text": "a", "max_length": 8}, "no argument max_length"),
    ],
)
def test_processor_says_what_is_wrong(exported, given, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        SmaugProcessor.from_pretrained(exported)(**given)
    assert "\n" not in str(error.value)


def test_model_says_what_is_wrong(exported):
    model = SmaugModel.from_pretrained(exported)
    video, ids = torch.zeros(1, 4, 64, 64, 3, dtype=torch.uint8), torch.tensor([[2, 7]])
    with pytest.raises(ValueError, match="at least one frame"):
        SmaugProcessor.from_pretrained(exported, frames=-4)
    for given, complaint in [
        ({}, "nothing to do"),
        ({"pixel_values_videos": video.float()}, "64, 64, 3. uint8, but this is .* float32"),
        ({"pixel_values_videos": video[:, :, :32]}, "let SmaugProcessor make it"),
        ({"pixel_values_videos": video[:, :3]}, "do not fill tubelets"),
        ({"input_ids": ids[0]}, "both .texts, words."),
        ({"input_ids": ids, "attention_mask": ids * 0}, "1 to 32 words"),
        ({"input_ids": ids.repeat(1, 20)}, "1 to 32 words"),
        ({"input_ids": ids, "pairs": ids}, "need both"),
        ({"input_ids": ids, "pixel_values_videos": video, "pairs": ids[0]}, "a text and a video each"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            model(**given)
    with pytest.raises(ValueError, match="needs a recipe"):
        SmaugModel(SmaugConfig())
    with pytest.raises(ValueError, match="needs a recipe"):
        SmaugProcessor(AutoTokenizer.from_pretrained(exported))


def test_the_card_tells_what_the_run_knows(run, exported):
    result, card = json.loads((run / "result.json").read_text()), ModelCard.load(exported / "README.md")
    assert card.data.library_name == "smaug" and card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "feature-extraction" and "datasets" not in metadata_load(exported / "README.md")
    scores = {one.metric_name: one.metric_value for one in card.data.eval_results}
    assert scores == {
        "text to video, R@1": round(result["t2v_r1"], 4), "text to video, R@5": round(result["t2v_r5"], 4),
        "text to video, R@10": round(result["t2v_r10"], 4), "text to video, median rank": result["t2v_medr"],
        "video to text, R@1": round(result["v2t_r1"], 4), "video to text, R@5": round(result["v2t_r5"], 4),
        "video to text, R@10": round(result["v2t_r10"], 4), "video to text, median rank": result["v2t_medr"],
    }  # fmt: skip
    text = card.text
    assert f"| text to video, by the vectors alone | {result['t2v_r1_dual']:.1%} | | | |" in text
    recalls = " | ".join(f"{result[f'v2t_{key}']:.1%}" for key in ("r1", "r5", "r10"))
    assert f"| video to text | {recalls} | {result['v2t_medr']:g} |" in text
    assert f"{result['device_seconds'] / 3600:.3g} device-hours" in text and result["machine"] in text
    assert json.loads((run / "config.json").read_text())["command"] in text
    assert "2 of the recipe's 2 steps of 16 pairs" in text and "50% of the patches (even)" in text
    assert "70% of a frame's patches at each of blocks 0" in text and "1 of 2 moments of a clip" in text
    assert "50% of the words that mlm asks for" in text
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    assert len(code.splitlines()) == 3 and repr(str(exported)) in code
    scope = {}
    exec(code.replace("clip.mp4", str(files(own(run)[0])[0])), scope)
    assert scope["vectors"].shape == (1, 128)


def test_the_card_does_not_claim_more(run, other, tmp_path, exported):
    """Weights that were changed, scores of another step, data of the user's own, pairs that were trained on."""
    model = SmaugModel.from_pretrained(exported)
    with torch.no_grad():
        model.model.video.cls += 1
    model.save_pretrained(tmp_path / "changed")
    card = ModelCard.load(tmp_path / "changed/README.md")
    assert card.data.eval_results is None and "weights were changed or rounded since" in card.text

    folder = other(manifest=["/home/alice/secret/clips.csv"])
    SmaugModel.from_pretrained(folder).save_pretrained(tmp_path / "own")
    card = ModelCard.load(tmp_path / "own/README.md")
    assert card.data.license == "other" and card.data.eval_results is None
    assert "of pairs that the model was trained on" in card.text and "whose licence smaug does not know" in card.text
    assert "clips.csv" in card.text and "/home/alice" not in card.text

    result = json.loads((folder / "result.json").read_text())
    result["evaluation_skipped"] = ["private.mp4: damaged"]
    (folder / "result.json").write_text(json.dumps(result))
    config = SmaugConfig.from_pretrained(folder)
    assert config.run["result"]["evaluation_skipped"] == 1 and "private" not in config.to_json_string()
    (folder / "result.json").write_text(json.dumps(result | {"step": 1}))
    SmaugModel.from_pretrained(folder).save_pretrained(tmp_path / "stale")
    card = ModelCard.load(tmp_path / "stale/README.md")
    assert card.data.eval_results is None and "were not evaluated" in card.text and "R@1" not in card.text


def test_the_card_names_what_the_weights_began_from(run, other):
    config = SmaugConfig.from_pretrained(run)
    assert hub._starts(config.recipe, config.run) == []
    assert SmaugConfig.from_pretrained(other(init="/home/alice/runs/first")).run["init"] == "first"
    begun = {"model": {"type": "ModelConfig", "video": {"start": "org/vit"}, "text": {"start": "org/bert"}}}
    assert hub._starts(begun, {"init": "first"}) == ["org/vit", "org/bert", "the run first"]
    starts = hub._starts(begun, {})
    card = model_card(config.to_recipe(), config.run, "name", parameters=1, changed=False, starts=starts)
    assert card.data.license == "other" and card.data.eval_results
    assert "- began from org/vit and org/bert" in card.text and "whose licence applies to them too" in card.text
    with pytest.raises(ValueError, match=r"result\.json lacks 't2v_r5'"):
        without = {key: value for key, value in config.run["result"].items() if key != "t2v_r5"}
        model_card(config.to_recipe(), config.run | {"result": without}, "name", parameters=1, changed=False)


def test_the_card_of_a_run_that_answers_questions(run):
    """It has no vectors to offer, and no retrieval to be compared by."""
    config = SmaugConfig.from_pretrained(run)
    recipe = replace(config.to_recipe(), objectives={"vtm": config.to_recipe().objectives["vtm"]})
    result = {key: value for key, value in config.run["result"].items() if key[:4] not in ("t2v_", "v2t_", "cand")}
    told = config.run | {"result": result | {"acc": 0.5, "acc_prior": 0.25}}
    card = model_card(recipe, told, "name", parameters=1, changed=False)
    assert card.data.eval_results is None and "model_name" not in card.data.to_dict()
    assert "| acc | 50.0% |\n| acc_prior | 25.0% |" in card.text and "R@1" not in card.text
    assert "embed_videos" not in card.text and "Vectors" not in card.text
    code = re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    assert len(code.splitlines()) == 3
    scope = {}
    exec(code.replace("clip.mp4", str(files(own(run)[0])[0])).replace("'name'", repr(str(run))), scope)
    assert scope["yes"].ndim == 0


def test_nothing_that_is_there_is_lost(run, exported, tmp_path):
    model, processor = SmaugModel.from_pretrained(exported), SmaugProcessor.from_pretrained(exported)
    (tmp_path / "README.md").write_text("mine")
    with pytest.warns(UserWarning, match="was there already and is kept"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    before = {path: path.read_bytes() for path in run.glob("*.json")}
    for one in (model, processor):
        with pytest.raises(ValueError, match="folder of a run"):
            one.save_pretrained(run)
    assert {path: path.read_bytes() for path in run.glob("*.json")} == before


def test_as_a_command(run, other, call, tmp_path, monkeypatch):
    code, out, _ = call(hub.main, run, "out")
    assert code == 0 and "SmaugModel.from_pretrained('out')" in out and "hf upload NAME out" in out
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "processor_config.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert Path("out/model.safetensors").stat().st_mode == Path("out/config.json").stat().st_mode
    broken = other()
    (broken / "tokenizer.json").write_text("{")
    unread = shutil.copytree(run, tmp_path / "unread")
    (unread / "result.json").write_text("{")
    for arguments, complaint in [
        ((unread, "new"), "result.json is damaged"),
        ((run, "out"), "out is there already and not empty"),
        (("nowhere", "new"), "nowhere holds no run"),
        (("out", "new"), "holds a model for Hugging Face, not a run"),
        ((broken, "new"), "tokenizer.json is damaged"),
        ((run, "new", "--push", "a b/c"), "Repo id must"),
    ]:
        code, _, err = call(hub.main, *arguments)
        assert code == 1 and complaint in err and len(err.splitlines()) == 1

    def full(*_, **__):
        raise OSError("No space left on device")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for stop, wanted in ((full, 1), (interrupted, 130)):
        monkeypatch.setattr(SmaugProcessor, "save_pretrained", stop)
        assert call(hub.main, run, "new")[0] == wanted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "unread"]  # and no half of `new`


class Hub(ThreadingHTTPServer):
    """The part of huggingface.co that is needed to make a repository, to commit to it and to load from it."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.served = {}, []


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    COMMIT = "1" * 40

    def log_message(self, *_):
        """Nothing on the screen."""

    def answer(self, body, code=200, **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": len(data), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def do_POST(self):
        body, hub = self.body(), self.server
        path = self.path.partition("?")[0]
        name = path.removeprefix("/api/models/").rsplit("/", 2)[0]
        if self.headers.get("Authorization") != "Bearer hf_alice":
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'alice')}/{asked['name']}"
            hub.repositories.setdefault(name, {})
            self.answer({"url": f"{hub.address}/{name}", "name": name, "id": name})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            asked = [file["path"] for file in json.loads(body)["files"]]
            how = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self.answer({"files": [{"path": path, **how} for path in asked]})
        elif path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    hub.repositories[name][line["value"]["path"]] = content
            url = f"{hub.address}/{name}/commit/{self.COMMIT}"
            self.answer({"success": True, "commitOid": self.COMMIT, "commitUrl": url, "pullRequestUrl": None})
        else:
            self.answer({"error": "not found"}, 404)

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        if match := re.fullmatch(r"/(\w+/\w+)/resolve/\w+/(.*)", path):
            data = hub.repositories.get(match[1], {}).get(match[2])
            if data is None:
                self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.COMMIT)
            else:
                hub.served.append(match[2])
                self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=self.COMMIT)
        elif match := re.fullmatch(r"/api/models/(\w+/\w+)/tree/.*", path):
            rows = [(name, data) for name, data in hub.repositories.get(match[1], {}).items()]
            each = [{"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()} for n, d in rows]
            self.answer(each)
        elif (match := re.fullmatch(r"/api/models/(\w+/\w+)(/revision/\w+)?", path)) and match[1] in hub.repositories:
            siblings = [{"rfilename": name} for name in hub.repositories[match[1]]]
            self.answer({"id": match[1], "sha": self.COMMIT, "private": False, "tags": [], "siblings": siblings})
        else:
            self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A hub at home, for everything that asks huggingface.co."""
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    constants = huggingface_hub.constants
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    for name, value in {
        "ENDPOINT": server.address, "HF_HUB_DISABLE_XET": True, "HF_TOKEN_PATH": str(tmp_path / "token"),
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # made once, with the address of then
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    yield server
    server.shutdown()
    server.server_close()


def test_pushed_and_loaded_by_name(run, exported, server, call, tmp_path):
    """Against a server of our own that speaks huggingface.co's protocol; huggingface_hub and all of HTTP are real."""
    code, out, _ = call(hub.main, run, "out", "--push", "alice/tiny")
    assert code == 0 and f"pushed to {server.address}/alice/tiny/commit/1" in out
    assert server.repositories["alice/tiny"] == {path.name: path.read_bytes() for path in Path("out").iterdir()}
    assert b"SmaugModel.from_pretrained('alice/tiny')" in server.repositories["alice/tiny"]["README.md"]

    server.repositories["alice/tiny"]["pytorch_model.bin"] = b"no pickle is even fetched"
    _, video, videos, texts = own(run)
    cache = {"cache_dir": tmp_path / "cache"}
    model = SmaugModel.from_pretrained("alice/tiny", **cache)
    processor = AutoProcessor.from_pretrained("alice/tiny", **cache)
    assert torch.equal(AutoModel.from_pretrained("alice/tiny", **cache).embed_videos(video), videos)
    assert torch.equal(model.embed_texts(**processor(text=TEXTS)), texts)
    assert "pytorch_model.bin" not in server.served and "model.safetensors" in server.served

    for number, name in enumerate(("bob/one", "bob/two")):
        first, second = (model, processor)[:: -1 if number else 1]
        first.push_to_hub(name)
        assert ("README.md" in server.repositories[name]) is (first is model)
        second.push_to_hub(name, commit_message="the rest")
        card = server.repositories[name]["README.md"].decode()
        assert f"from_pretrained('{name}')" in card and "device-hours" in card
        assert set(server.repositories[name]) == {path.name for path in Path("out").iterdir()}


def test_a_push_that_fails_is_one_line(run, server, call, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, _, err = call(hub.main, run, "out", "--push", "alice/tiny")
    assert code == 1 and len(err.splitlines()) == 1 and "could not be pushed to alice/tiny" in err
    assert "Invalid username or password" in err and "hf upload alice/tiny out" in err
    assert Path("out/model.safetensors").exists() and server.repositories == {}


FRESH = """
import sys, torch
import smaug.integrations.hub
from transformers import AutoModel, AutoProcessor
folder, clip, out = sys.argv[1:]
model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
torch.save([model.embed_videos(**processor(videos=[clip])), model.embed_texts(**processor(text=["a red ring"]))], out)
"""


@pytest.mark.slow
def test_in_a_process_of_its_own(run, exported, tmp_path):
    """Where nothing but the folder is known; and where transformers is missing, one line says what to install."""
    clips, video, *_ = own(run)
    arguments = [str(exported), str(files(clips)[0]), str(tmp_path / "out.pt")]
    done = subprocess.run([sys.executable, "-c", FRESH, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = torch.load(tmp_path / "out.pt")
    loaded = load_run(run, "cpu")
    assert torch.equal(got[0], embed_videos(loaded, video[:1])) and torch.equal(got[1], embed_texts(loaded, TEXTS[:1]))

    without = "import sys, runpy; sys.modules['transformers'] = None; "
    as_command = without + "runpy.run_module('smaug.integrations.hub', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", as_command], capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and hub.INSTALL in done.stderr
