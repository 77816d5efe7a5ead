"""Retrieval on a model whose vectors are planted, so that every rank is known beforehand."""

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from smaug.data import text
from smaug.data.clips import Clips, DataConfig
from smaug.data.decode.pyav import PyavDecoder
from smaug.data.loader import middle_frames
from smaug.data.manifest import Sample, Skip
from smaug.data.text import train_tokenizer
from smaug.device import choose
from smaug.evaluate import encode
from smaug.evaluate import match as matching
from smaug.evaluate.retrieval import retrieval
from smaug.evaluate.scores import How, evaluate, provenance, split_of
from smaug.model.frame_selector import FrameSelectorConfig
from smaug.model.fusion import FusionConfig
from smaug.model.model import ModelConfig
from smaug.model.text_encoder import TextEncoderConfig
from smaug.model.video_encoder import EncodedVideo, PruneConfig, VideoEncoderConfig
from smaug.objectives.vtc import Vtc
from smaug.objectives.vtm import Vtm
from smaug.recipe import Recipe
from smaug.run import build
from smaug.tokens import packed_uniform

WORDS = [a + b for a in "bdfgklmnpr" for b in ("aba", "obo", "uku")]


class Planted(nn.Module):
    """Clip i, whose first frame has the brightness i, is the i-th axis; caption t is a row of `table`."""

    def __init__(self, table, tokenizer, frame=0):
        super().__init__()
        texts, videos = table.shape
        width = dict(width=videos, heads=1)
        config = ModelConfig(VideoEncoderConfig(**width, image_size=8, patch=8), TextEncoderConfig(**width))
        heads = Vtc(embed_dim=videos).heads(config, 0)
        for layer in (heads.video, heads.text):
            layer.weight.data, layer.bias.data = torch.eye(videos), torch.zeros(videos)
        self.heads = nn.ModuleDict({"vtc": heads})
        self.video_calls = []
        words = {tokenizer.token_to_id(WORDS[t]): t for t in range(texts)}

        def video(groups, keep_rate):
            ((pixels, ids),) = groups
            self.video_calls.append((pixels, ids))
            features = nn.functional.one_hot(pixels[:, frame, 0, 0, 0].long(), videos).float()
            ids = torch.arange(len(pixels), dtype=torch.int32)[:, None]
            return EncodedVideo(features, packed_uniform(features, 1), features, ids, (features, ids), [])

        def texts_of(packed):
            numbers = packed.values[packed.cu_seqlens[:-1].long() + 1].tolist()
            return torch.stack([table[words[n]] for n in numbers]), packed

        self.video, self.text, self.fusion, self.selector = video, texts_of, None, None
        video.config = VideoEncoderConfig(image_size=8, patch=8, tubelet=1)
        texts_of.config = SimpleNamespace(max_words=4, sep=False)


def planted(table, captions, frame=0, frames_of=None, subsets=None):
    """captions[i] are the rows of `table` that tell of clip i."""
    tokenizer = train_tokenizer(WORDS, 500)
    assert all(tokenizer.token_to_id(word) is not None for word in WORDS)
    samples = [
        Sample(Path(f"{i}.mp4"), "video", tuple(WORDS[t] for t in own), f"{i}.mp4") for i, own in enumerate(captions)
    ]
    level = np.arange(len(captions), dtype=np.uint8)[:, None] + np.zeros(4, np.uint8)
    frames = (
        np.ones((len(captions), 4, 8, 8, 3), np.uint8)
        * (level if frames_of is None else frames_of)[:, :, None, None, None]
    )
    return (
        Planted(table, tokenizer, frame),
        Clips("planted", samples, 8, PyavDecoder(1), frames, subsets or {}),
        tokenizer,
    )


def with_ranks(ranks):
    """A score table in which text i finds its video i at rank `ranks[i]`."""
    n = len(ranks)
    generator = torch.Generator().manual_seed(0)
    table = torch.zeros(n, n)
    for i, rank in enumerate(ranks):
        others = [j for j in torch.randperm(n, generator=generator).tolist() if j != i]
        order = [*others[: rank - 1], i, *others[rank - 1 :]]
        table[i, order] = torch.rand(n, generator=generator).sort(descending=True).values  # no two alike
    return table


def test_recall_is_what_was_planted():
    ranks = [1, 2, 11, 5, 1, 6, 10, 1, 3, 12, 4, 1]
    table = with_ranks(ranks)
    new = np.array([i in (1, 4, 7) for i in range(12)])
    model, clips, tokenizer = planted(table, [(i,) for i in range(12)], subsets={"new": new, "none": new & False})
    found = retrieval(model, clips, tokenizer, frames=4, max_bad=0.05)
    assert found.skipped == []
    s = found.scores
    assert (s["t2v_r1"], s["t2v_r5"], s["t2v_r10"]) == pytest.approx((4 / 12, 8 / 12, 10 / 12))
    assert s["t2v_medr"] == 3.5 and s["candidates"] == 12
    assert s["t2v_r1_new"] == pytest.approx(2 / 3) and "t2v_r1_none" not in s
    unit = (table / table.norm(dim=1, keepdim=True)).numpy()
    v2t = np.array([1 + (unit[:, i] > unit[i, i]).sum() for i in range(12)])
    assert len(set(v2t.tolist())) > 3
    for k in (1, 5, 10):
        assert s[f"v2t_r{k}"] == pytest.approx((v2t <= k).mean())
    assert s["v2t_medr"] == np.median(v2t)


def test_several_captions_of_a_clip():
    """Three texts of clip 0 at ranks 1, 2, 3; one of clip 1, one of clip 2. Each text is asked for, each video once."""
    table = torch.tensor([[3.0, 1, 2], [2, 3, 1], [1, 3, 2], [1, 3, 2], [3, 2.5, 1]])
    model, clips, tokenizer = planted(table, [(0, 1, 2), (3,), (4,)], subsets={"odd": np.array([True, False, True])})
    s = retrieval(model, clips, tokenizer, frames=2, max_bad=0.05).scores
    assert s["t2v_r1"] == pytest.approx(2 / 5) and s["t2v_medr"] == 2
    assert s["t2v_r1_odd"] == pytest.approx(1 / 4)  # of texts 0, 1, 2 and 4
    # Video 0 finds its own first text, ahead of text 4; video 1 has text 3 level with its rivals 1 and 2, and ties
    # lose; video 2 finds text 4 last.
    assert s["v2t_r1"] == pytest.approx(1 / 3) and s["v2t_medr"] == 3


def test_ties_lose():
    model, clips, tokenizer = planted(torch.ones(12, 12), [(i,) for i in range(12)])
    s = retrieval(model, clips, tokenizer, frames=4, max_bad=0.05).scores
    assert s["t2v_r10"] == s["v2t_r10"] == 0 and s["t2v_medr"] == 12


def test_every_token_of_the_asked_frames_is_seen():
    model, clips, tokenizer = planted(torch.eye(3), [(0,), (1,), (2,)])
    for frames in (1, 2, 4):
        retrieval(model, clips, tokenizer, frames=frames, max_bad=0.05)
        pixels, ids = model.video_calls[-1]
        assert pixels.shape[:2] == (3, frames) and ids.tolist() == [list(range(frames))] * 3


def test_shuffle_permutes_the_frames_of_each_clip():
    frames_of = np.arange(12, dtype=np.uint8)[:, None] * 10 + np.arange(4, dtype=np.uint8)
    _, clips, _ = planted(torch.eye(12), [(i,) for i in range(12)], frames_of=frames_of)
    read = {}
    for shuffle in (False, True):
        ((group,), skipped) = middle_frames(clips, range(12), 4, shuffle=shuffle)
        assert skipped == [] and group.samples.tolist() == list(range(12))
        read[shuffle] = group.video[..., 0, 0, 0].numpy()
    assert (read[False] == frames_of).all()
    assert (np.sort(read[True], 1) == frames_of).all()
    assert len({tuple(row % 10) for row in read[True]}) > 4  # in several orders
    again = middle_frames(clips, range(12), 4, shuffle=True)[0][0].video[..., 0, 0, 0].numpy()
    assert (again == read[True]).all()
    some = middle_frames(clips, [7, 3], 4, shuffle=True)[0][0].video[..., 0, 0, 0].numpy()
    assert (some == read[True][[7, 3]]).all()  # whatever else is in the batch


def test_scores_say_what_shuffling_costs():
    """Only the first frame tells the clip; the three others show the next clip, or the one after that, ..."""
    n = 12
    frames_of = ((np.arange(n)[:, None] + np.arange(4)) % n).astype(np.uint8)
    model, clips, tokenizer = planted(torch.eye(n) + 0.01, [(i,) for i in range(n)], frames_of=frames_of)
    recipe, way = Recipe("planted"), choose(fast=False, device="cpu")
    plain = evaluate(model, recipe, clips, tokenizer, way, how=How(frames=4))
    mixed = evaluate(model, recipe, clips, tokenizer, way, how=How(frames=4, shuffle=True))
    assert plain["t2v_r1"] == plain["v2t_r1"] == 1.0
    assert plain["t2v_r1_shuffled"] == mixed["t2v_r1"] == mixed["t2v_r1_shuffled"] < 0.7
    assert plain["frames"] == 4 and plain["evaluated_on"] == "planted"
    assert mixed["evaluated_on"] == "planted, frames shuffled"


def test_a_model_without_contrast_is_refused():
    model, clips, tokenizer = planted(torch.eye(3), [(0,), (1,), (2,)])
    model.heads["vtc"] = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="needs the vtc objective"):
        retrieval(model, clips, tokenizer, frames=1, max_bad=0.05)
    del model.heads["vtc"]
    with pytest.raises(ValueError, match="needs the vtc objective"):
        retrieval(model, clips, tokenizer, frames=1, max_bad=0.05)


SMALL_VIDEO = VideoEncoderConfig(
    width=32, depth=2, heads=2, image_size=8, patch=4, tubelet=1, attend="frame", temporal_layers=1,
    prune=PruneConfig(blocks=(1,), keep=0.5),
)  # fmt: skip
SMALL = ModelConfig(
    SMALL_VIDEO,
    TextEncoderConfig(width=32, depth=1, heads=2),
    FusionConfig(depth=1, heads=2),
    FrameSelectorConfig(keep=2),
)


def two_stages(n=12, config=SMALL):
    """A random model of all parts, n noisy clips, and 1 + i % 3 captions of clip i."""
    tokenizer = train_tokenizer(WORDS, 500)
    words = itertools.cycle(WORDS)
    said = [tuple(f"{next(words)} {WORDS[i % 30]}" for _ in range(1 + i % 3)) for i in range(n)]
    samples = [Sample(Path(f"{i}.mp4"), "video", own, f"{i}.mp4") for i, own in enumerate(said)]
    frames = np.random.default_rng(0).integers(0, 256, (n, 4, 8, 8, 3), dtype=np.uint8)
    torch.manual_seed(0)
    recipe = Recipe("small", config, objectives={"vtc": Vtc(embed_dim=16), "vtm": Vtm()})
    model = build(recipe, tokenizer.get_vocab_size(), "auto")
    for name, p in model.named_parameters():
        if name.endswith(("word.weight", "position", "cls", "time")):
            p.data.normal_()
    return model, Clips("small", samples, 8, PyavDecoder(1), frames, {}), tokenizer


@torch.no_grad()
def one_by_one(model, clips, tokenizer, sparse):
    """(texts, videos) dual and match scores, each pair encoded and fused by itself, and the video of each text."""
    captions = [(i, c) for i, s in enumerate(clips.samples) for c in s.captions]
    dual, match = torch.zeros(2, len(captions), len(clips.samples))
    for v in range(len(clips.samples)):
        ((group,), _) = middle_frames(clips, [v], 4)
        everything = torch.arange(16, dtype=torch.int32)[None]
        video = model.video([(group.video, everything)], keep_rate=0.5 if sparse else 1.0)
        assert video.frames.lengths == (1 + 2 + 1 if sparse else 5)
        for t, (_, caption) in enumerate(captions):
            words = text.pack(text.encode(tokenizer, [caption], 32), text.number(tokenizer, text.CLS))
            features, encoded = model.text(words)
            heads = model.heads["vtc"]
            dual[t, v] = (heads.embed_text(features) * heads.embed_video(video.features)).sum()
            kv_ids, gate = video.frame_ids, None
            if sparse:
                kv_ids, gate = model.selector(video.summaries, features, kv_ids)
            fused = model.fusion([encoded], video.frames, kv_ids, gate).values[:1]
            no, yes = model.heads["vtm"](fused)[0]
            match[t, v] = yes - no
    return dual, match, torch.tensor([i for i, _ in captions])


def expected(t2v, v2t, own):
    """Ranks by counting, ties against the model; then recalls and medians, as numbers a person would write down."""
    ranks = [sum(bool(x >= row[o]) for x in row) for row, o in zip(t2v, own, strict=True)]
    back = []
    for v in range(t2v.shape[1]):
        best = v2t[own == v, v].max()
        back.append(1 + sum(bool(x >= best) for x in v2t[own != v, v]))
    found = {}
    for key, r in (("t2v", ranks), ("v2t", back)):
        found |= {f"{key}_r{k}": np.mean(np.array(r) <= k) for k in (1, 5, 10)} | {
            f"{key}_medr": np.median(r), f"{key}_meanr": np.mean(r),
        }  # fmt: skip
    return found


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("top", [100, 12, 4, 1])
def test_the_match_head_ranks_the_best_again(top, sparse, monkeypatch):
    monkeypatch.setattr(matching, "ROWS", 17)  # so that clips, captions and pairs come in several parts
    model, clips, tokenizer = two_stages()
    found = retrieval(model, clips, tokenizer, frames=4, max_bad=0.05, top=top, sparse=sparse, batch=5).scores
    dual, match, own = one_by_one(model, clips, tokenizer, sparse)
    ranked = {}
    for key, dim in (("t2v", 1), ("v2t", 0)):
        best = dual.topk(min(top, dual.shape[dim]), dim=dim).indices
        among = torch.zeros(dual.shape, dtype=torch.bool).scatter(dim, best, True)
        assert among.all() == (top == 100 or (top == 12 and dim == 1))
        both = match + dual / 0.07  # the dual score as the contrast has it, over its temperature
        ranked[key] = both.masked_fill(~among, float("-inf"))  # what is not among them ranks behind
    truth = expected(ranked["t2v"], ranked["v2t"], own)
    assert {key: found[key] for key in truth} == pytest.approx(truth)
    before = expected(dual, dual, own)
    for key in ("t2v", "v2t"):
        assert found[f"{key}_r1_dual"] == pytest.approx(before[f"{key}_r1"])
    if top == 1:  # a first place of the match head is then one of the dual encoder, and else one is last
        assert found["t2v_r1"] == found["t2v_r1_dual"] and found["t2v_medr"] == 12


def test_dense_scoring_prunes_nothing_and_fuses_every_frame(monkeypatch):
    model, clips, tokenizer = two_stages()
    lengths, kept = [], []

    fuse = model.fusion.fuse

    def watch(words, frames, kv_ids, **others):
        lengths.append(frames.lengths)
        kept.append(kv_ids.shape[1])
        return fuse(words, frames, kv_ids, **others)

    monkeypatch.setattr(model.fusion, "fuse", watch)
    for sparse in (True, False):
        retrieval(model, clips, tokenizer, frames=4, max_bad=0.05, sparse=sparse)
    assert (lengths, kept) == ([4, 5], [2, 4])  # one call: a pair that is asked for both ways is scored once
    assert model.video(
        [(torch.zeros(1, 4, 8, 8, 3, dtype=torch.uint8), torch.arange(16, dtype=torch.int32)[None])]
    ).frames.lengths == 4  # fmt: skip


def units(model, video, t):
    """Match logits of a text with each sequence of a video that it selects, one at a time."""
    features, encoded = t
    kv_ids = video.frame_ids
    if model.selector is not None:
        kv_ids, _ = model.selector(video.summaries, features, kv_ids)
    fused = [
        model.fusion([encoded], video.frames, kv_ids[:, m : m + 1], None).values[:1] for m in range(kv_ids.shape[1])
    ]
    logits = model.heads["vtm"](torch.cat(fused))
    return logits[:, 1] - logits[:, 0]


LATE = {
    "mean": lambda x: x.mean(),
    "max": lambda x: x.max(),
    "lse": lambda x: x.exp().mean().log(),
}


@pytest.mark.parametrize("attend", ["frame", "clip"])
@pytest.mark.parametrize("how", LATE)
@torch.no_grad()
def test_a_late_ensemble_scores_each_frame_by_itself(how, attend, monkeypatch):
    """attend=clip: two views of the clip by 2 frames each, 0 2 and 1 3, encoded by themselves; dual: the mean."""
    config = SMALL
    if attend == "clip":
        whole = replace(SMALL_VIDEO, attend="clip", temporal_layers=0, frames=2)
        config = replace(SMALL, video=whole, selector=FrameSelectorConfig())
    model, clips, tokenizer = two_stages(6, config)
    monkeypatch.setattr(matching, "ROWS", 17)
    found = retrieval(model, clips, tokenizer, frames=4, max_bad=0, top=100, ensemble=how, batch=4).scores
    captions = [(i, c) for i, s in enumerate(clips.samples) for c in s.captions]
    words = [text.pack(text.encode(tokenizer, [c], 32), text.number(tokenizer, text.CLS)) for _, c in captions]
    texts, own = [model.text(w) for w in words], torch.tensor([i for i, _ in captions])
    scores, dual = torch.zeros(2, len(texts), 6)
    for v in range(6):
        ((group,), _) = middle_frames(clips, [v], 4)
        views = [group.video] if attend == "frame" else [group.video[:, [0, 2]], group.video[:, [1, 3]]]
        seen = [model.video([(view, torch.arange(4 * view.shape[1], dtype=torch.int32)[None])]) for view in views]
        features = torch.stack([part.features for part in seen]).mean(0)
        for t, encoded in enumerate(texts):
            dual[t, v] = model.heads["vtc"].scores(encoded[0], features)
            scores[t, v] = LATE[how](torch.cat([units(model, part, encoded) for part in seen]))
    truth = expected(scores + dual, scores + dual, own)
    assert {key: found[key] for key in truth} == pytest.approx(truth)


def test_tokens_that_are_not_kept_are_encoded_again(monkeypatch):
    model, clips, tokenizer = two_stages()
    kept = retrieval(model, clips, tokenizer, frames=4, max_bad=0, top=4, batch=5)
    monkeypatch.setattr(encode, "KEEP", 5 * 4 * 4 * 32 * 4)  # of one block
    seen, rows = [], []
    model.video.register_forward_hook(lambda _, given, got: seen.append(len(given[0][0][0])))
    model.fusion.blocks[0].key_value.register_forward_hook(lambda _, given, got: rows.append(len(got)))
    reported = []
    again = retrieval(
        model, clips, tokenizer, frames=4, max_bad=0, top=4, batch=5, report=lambda *what: reported.append(what)
    )
    assert again == kept and seen == [5, 5, 2, 5, 2]
    assert sum(rows) == 12 * 4 * 4  # each frame was projected once
    assert [r for r in reported if r[0] == "clips encoded"] == [("clips encoded", n, 12) for n in (5, 10, 12)]
    assert reported[-1][0] == "pairs matched" and reported[-1][1] == reported[-1][2]


def test_every_clip_of_the_set_is_a_candidate():
    """500 was the most once; MSR-VTT 1k-A has 1,000, ActivityNet Captions 4,917."""
    model, clips, tokenizer = two_stages(520)
    found = retrieval(model, clips, tokenizer, frames=1, max_bad=0, top=1)
    assert found.scores["candidates"] == 520 and found.captions == sum(1 + i % 3 for i in range(520))


def test_dual_softmax_stands_beside_the_plain_numbers():
    table = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) + torch.eye(8) * 0.3
    model, clips, tokenizer = planted(table, [(i,) for i in range(8)])
    plain = retrieval(model, clips, tokenizer, frames=1, max_bad=0).scores
    both = retrieval(model, clips, tokenizer, frames=1, max_bad=0, dual_softmax=True).scores
    assert {key: both[key] for key in plain} == plain
    logits = (table / table.norm(dim=1, keepdim=True) / 0.07).double().numpy()
    for key, axis in (("t2v", 0), ("v2t", 1)):
        shares = np.exp(logits) / np.exp(logits).sum(axis, keepdims=True)
        scores = torch.from_numpy(logits * shares)
        truth = expected(scores, scores, torch.arange(8))
        assert both[f"{key}_r1_dsl"] == pytest.approx(truth[f"{key}_r1"])
        assert both[f"{key}_meanr_dsl"] == pytest.approx(truth[f"{key}_meanr"])
    assert any(both[f"{key}_dsl"] != both[key] for key in ("t2v_r1", "v2t_r1", "t2v_meanr", "v2t_meanr"))


def test_an_ensemble_that_has_nothing_to_join_is_refused():
    model, clips, tokenizer = planted(torch.eye(3), [(0,), (1,), (2,)])
    with pytest.raises(ValueError, match=r"--ensemble mean joins .* without"):
        retrieval(model, clips, tokenizer, frames=1, max_bad=0, ensemble="mean")
    whole = replace(SMALL_VIDEO, attend="clip", temporal_layers=0, frames=2)
    model, clips, tokenizer = two_stages(3, replace(SMALL, video=whole, selector=FrameSelectorConfig()))
    for frames in (2, 3):
        with pytest.raises(ValueError, match=f"must be a multiple of that, such as 4, not {frames}"):
            retrieval(model, clips, tokenizer, frames=frames, max_bad=0, ensemble="max")


def test_a_result_says_what_it_is():
    model, clips, tokenizer = two_stages(4)
    model.text.config = replace(model.text.config, max_words=2)
    clips.skipped = [Skip("gone.mp4", "does not exist")]
    recipe, way = Recipe("small", SMALL, data=DataConfig(batch=7)), choose(fast=False, device="cpu")
    result = evaluate(model, recipe, clips, tokenizer, way, how=How(2, 3, "lse", controls=False), split="val")
    assert result["captions"] == result["captions_cut"] == 7
    assert (result["frames"], result["batch"], result["split"]) == (2, 7, "val")
    assert result["evaluation_skipped"] == ["gone.mp4: does not exist"]
    for part in ("7 texts", "rank 4 clips (1 of the set are missing)", "of which the best counts", "2 frames",
                 "best 3 ranked again", "the 2 frames that the text selects, lse", "7 texts cut", "ties"):  # fmt: skip
        assert part in result["protocol"]
    assert "t2v_r1_shuffled" not in result and "t2v_r1_dense" not in result


def test_zero_shot_is_another_data_set():
    def data(*paths, eval=(), **others):
        return DataConfig(manifest=tuple(map(Path, paths)), eval_manifest=tuple(map(Path, eval)), **others)

    def zero_shot(trained, evaluated):
        return provenance(trained, evaluated)["zero_shot"]

    msrvtt, mine = data("a/MSRVTT_train.9k.csv", format="msrvtt"), data("mine/train.csv")
    assert not zero_shot(DataConfig(), DataConfig()) and not zero_shot(msrvtt, msrvtt)
    assert not zero_shot(msrvtt, data("b/MSRVTT_JSFUSION_test.csv", format="msrvtt"))
    assert not zero_shot(msrvtt, data("c/mc_test.json", format="msrvtt_mc"))  # the same videos
    assert zero_shot(data("a/webvid.csv", format="webvid"), msrvtt) and zero_shot(DataConfig(), msrvtt)
    assert not zero_shot(mine, data("mine/train.csv", eval=["mine/test.csv"]))
    assert zero_shot(mine, data("mine/train.csv", eval=["other/test.csv"]))
    assert provenance(msrvtt, mine)["trained_on"] == "MSRVTT_train.9k.csv"
    names = ("MSRVTT_JSFUSION_test.csv", "didemo/val_data.json", "clips.csv")
    assert [split_of(data(n, eval=[n]), "test") for n in names] == ["test", "val", "unnamed"]
    assert split_of(mine, "test") == "train" and split_of(DataConfig(), "val") == "val"


def spread(model):
    """The same model with tubes of 4 frames that span the clip; its weights are then of the wrong size."""
    model.video.config = replace(model.video.config, tubelet=4, tubes="spread")
    return model


@pytest.mark.parametrize("frames", [2, 6])
def test_frames_that_do_not_fill_the_tubes_are_refused_before_any_is_read(frames, monkeypatch):
    model, clips, tokenizer = two_stages()
    monkeypatch.setattr(Clips, "read", lambda *given: pytest.fail("it read a clip"))
    with pytest.raises(ValueError, match=f"{frames} frames do not fill .*multiple of 4") as error:
        retrieval(spread(model), clips, tokenizer, frames=frames, max_bad=0.05)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tubes, order", [("adjacent", [0, 1, 2, 3]), ("spread", [0, 2, 1, 3])])
def test_the_model_sees_frames_in_the_order_of_its_tubes(tubes, order):
    frames_of = np.zeros((3, 4), np.uint8) + np.arange(4, dtype=np.uint8)
    model, clips, tokenizer = planted(torch.eye(4)[:3], [(0,), (1,), (2,)], frames_of=frames_of)
    model.video.config = replace(model.video.config, tubelet=2, tubes=tubes)
    retrieval(model, clips, tokenizer, frames=4, max_bad=0.05)
    assert model.video_calls[-1][0][:, :, 0, 0, 0].tolist() == [order] * 3
