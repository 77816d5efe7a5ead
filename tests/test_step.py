"""One training step, whole: its gradients, its two ways, its silence towards the host, and its numbers.

After a change that is meant to alter the numbers, renew the golden losses and say why in the commit:

    python -m tests.test_step
"""

import dataclasses
import itertools
import json
import math
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smaug import ops
from smaug import step as steps
from smaug.data import shapes
from smaug.data.loader import Batch, Loader, VisualGroup
from smaug.data.text import pack, train_tokenizer
from smaug.device import choose
from smaug.ledger import count_tokens, encoded
from smaug.masks import TextMask, VideoMask
from smaug.model.video_encoder import PruneConfig
from smaug.objectives.vtc import VtcHeads
from smaug.objectives.vtm import Vtm
from smaug.optim import adamw, learning_rate
from smaug.recipe import Recipe, load, names
from smaug.run import build, open_loader, open_split
from smaug.step import keep_rate, positives, training_step, video_mask
from smaug.testing import HostReads, relative_error
from smaug.tokens import packed_uniform

GOLDEN = Path(__file__).parent / "golden"
STEPS = 5


def made(name: str) -> tuple[Recipe, Loader, Tokenizer]:
    """A recipe on the small embedded set, in batches of 16. It prunes from the second step on, without a warm-up.

    smaug has all its parts: at this size the recipe leaves the selector out.
    """
    recipe = load(name)
    if name == "smaug":
        selector = dataclasses.replace(recipe.model.selector, keep=1)
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, selector=selector))
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, shapes=(64, 16, 16), batch=16))
    recipe = with_prune(recipe, warmup=0.0)
    clips = open_split(recipe, "train", Console(quiet=True))
    if "answer" in recipe.objectives:  # the decoder is more than the classifier
        recipe = dataclasses.replace(
            recipe, objectives={"answer": dataclasses.replace(recipe.objectives["answer"], by="decoder")}
        )
    texts = [t for s in clips.samples for t in (*s.captions, *s.options, *s.answers)]
    tokenizer = train_tokenizer(texts, recipe.data.vocabulary)
    return recipe, open_loader(recipe, clips, tokenizer), tokenizer


def with_prune(recipe, **how):
    video = recipe.model.video
    video = dataclasses.replace(video, prune=dataclasses.replace(video.prune, **how))
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, video=video))


def model_of(recipe, tokenizer, impl="reference"):
    torch.manual_seed(recipe.seed)
    return build(recipe, tokenizer.get_vocab_size(), impl)


def five_losses(name: str) -> list[float]:
    """The first losses of a recipe on the plain path in fp32."""
    recipe, loader, tokenizer = made(name)
    model = model_of(recipe, tokenizer)
    optimizer = adamw(model, recipe.optim)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.optim)
        loss, _ = training_step(model, recipe, loader.batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# The default suite has no time for more; retrieval is dense without mlm.
SLOW = {"mc", "qa", "retrieval"}
RECIPES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names()]


@pytest.fixture(scope="module", params=RECIPES)
def setup(request, shapes_cache):
    """The batch is that of step 0, told that it is step 1, at which patches are pruned."""
    recipe, loader, tokenizer = made(request.param)
    return recipe, dataclasses.replace(loader.batch(0), step=1), tokenizer


def settled(recipe, monkeypatch):
    """The same recipe with every choice made by the counter-based generator: patches, frames and negatives.

    Two ways of computing then choose the same, whatever they round, and the rest can be compared. What is left of the
    selector is its gate.
    """
    draw = steps.hard_negatives
    monkeypatch.setattr(steps, "hard_negatives", lambda scores, *rest: draw(torch.zeros_like(scores), *rest))
    recipe = with_prune(recipe, score="random")
    selector = dataclasses.replace(recipe.model.selector, score="random")
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, selector=selector))


def with_images(batch: Batch) -> Batch:
    """The last four clips as pictures: their first frames."""
    (group,) = batch.groups
    stills = VisualGroup(group.video[-4:, :1], group.samples[-4:])
    return dataclasses.replace(batch, groups=(VisualGroup(group.video[:-4], group.samples[:-4]), stills))


def gradients(model, recipe, batch):
    loss, _ = training_step(model, recipe, batch)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def cancelled(recipe):
    """Parameters that add the same to the scores of all options, and so have no gradient."""
    return ("heads.vtm.bias", "fusion.norm.bias") if recipe.task == "mc" else ()


def agree(recipe, got, truth, bound):
    """Gradients by name. Multiple choice is about differences of options, in which most of the gradient cancels: five
    times the bound there."""
    for name in truth.keys() - set(cancelled(recipe)):
        assert relative_error(got[name], truth[name]) < (5 * bound if recipe.task == "mc" else bound), name


@pytest.mark.parametrize("images", [False, True])
def test_every_parameter_learns(setup, images):
    recipe, batch, tokenizer = setup
    batch = with_images(batch) if images else batch
    loss, grads = gradients(model_of(recipe, tokenizer, "auto"), recipe, batch)
    assert loss.shape == () and loss.isfinite()
    for name, grad in grads.items():
        assert grad is not None, name
        if name in cancelled(recipe):
            continue
        # Rounding leaves about 1e-10 where the formula's gradient is 0.
        assert grad.isfinite().all() and grad.abs().max() > 1e-7, name


def test_loss_is_the_weighted_sum_of_its_parts(setup):
    recipe, batch, tokenizer = setup
    heavy = {name: dataclasses.replace(o, weight=0.25 + i) for i, (name, o) in enumerate(recipe.objectives.items())}
    recipe = dataclasses.replace(recipe, objectives=heavy)
    with torch.no_grad():
        loss, parts = training_step(model_of(recipe, tokenizer), recipe, batch)
    torch.testing.assert_close(loss, sum(o.weight * parts[name] for name, o in heavy.items()))


def test_an_unmasked_step_teaches_all_but_the_decoder(setup):
    """With nothing removed there is nothing to rebuild: the decoder gets no gradient, and is left as it is."""
    recipe, batch, tokenizer = setup
    recipe = dataclasses.replace(recipe, unmask_last=0.5)
    batch = dataclasses.replace(batch, step=recipe.optim.steps - 1)
    loss, grads = gradients(model_of(recipe, tokenizer, "auto"), recipe, batch)
    assert loss.isfinite()
    for name, grad in grads.items():
        assert (grad is None) == name.startswith("heads.mvm."), name
        assert grad is None or (grad.isfinite().all() and grad.abs().sum() > 0), name


@pytest.mark.parametrize("images", [False, True])
def test_fast_and_plain_agree_in_fp32(setup, images, monkeypatch):
    """Choices settled; that both choose alike is the next test."""
    recipe, batch, tokenizer = setup
    recipe = settled(recipe, monkeypatch)
    batch = with_images(batch) if images else batch
    plain, plain_grads = gradients(model_of(recipe, tokenizer, "reference"), recipe, batch)
    fast, fast_grads = gradients(model_of(recipe, tokenizer, "auto"), recipe, batch)
    assert abs(fast - plain) <= 1e-5 * abs(plain)
    agree(recipe, fast_grads, plain_grads, 1e-5)


def test_fast_and_plain_choose_alike(setup, monkeypatch):
    """Wherever the last that stays and the first that leaves are further apart than 1e-3."""
    recipe, batch, tokenizer = setup
    if not recipe.model.video.prune.blocks:
        pytest.skip("it prunes nothing")
    select, calls = ops.select_tokens, []

    def watched(tokens, scores, **how):
        kept, ids_kept, dropped = select(tokens, scores, **how)
        calls.append((tokens, scores, ids_kept, how["keep"]))
        return kept, ids_kept, dropped

    monkeypatch.setattr(ops, "select_tokens", watched)
    recipe, chosen = with_prune(recipe, keep=0.25), []  # among the best, scores are further apart
    for impl in ("reference", "auto"):
        model = model_of(recipe, tokenizer, impl)
        for block in model.video.blocks:  # as trained ones, it prefers
            block.attention.qkv.weight.data[: 2 * recipe.model.video.width] *= 4
        model.video.cls.data.normal_(generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            training_step(model, recipe, with_images(batch))
        chosen.append(calls[:])
        calls.clear()
    assert len(chosen[0]) == len(chosen[1]) == len(recipe.model.video.prune.blocks)
    for (tokens, scores, plain, keep), (_, _, fast, _) in zip(*chosen, strict=True):
        ranked = scores.view(tokens.num_sequences, -1)[:, 1:].sort(1, descending=True).values
        clear = ranked[:, keep - 1] - ranked[:, keep] > 1e-3
        assert clear.float().mean() > 0.3  # or nothing would be compared
        plain, fast = (x.view(tokens.num_sequences, -1)[clear] for x in (plain, fast))
        assert torch.equal(plain, fast)


def test_bf16_is_as_good_as_eager(setup, monkeypatch):
    """Against plain fp32, the fast path in bf16 is at most twice as wrong as the plain path in bf16; and neither is
    wrong by more than a tenth of the gradient."""
    recipe, batch, tokenizer = setup
    recipe = settled(recipe, monkeypatch)
    truth_loss, truth = gradients(model_of(recipe, tokenizer), recipe, batch)
    loss, error = {}, {}
    for impl in ("auto", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            loss[impl], grads = gradients(model_of(recipe, tokenizer, impl), recipe, batch)
        assert all(g.dtype == torch.float32 for g in grads.values())
        got, want = (torch.cat([g.flatten() for g in x.values()]) for x in (grads, truth))
        error[impl] = relative_error(got, want)
    assert error["auto"] <= 2 * error["reference"] and error["auto"] < 0.1, error
    assert abs(loss["auto"] - truth_loss) < max(2 * abs(loss["reference"] - truth_loss), 2e-3 * truth_loss), loss


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_host_never_asks(setup, impl, autocast):
    recipe, batch, tokenizer = setup
    model, batch = model_of(recipe, tokenizer, impl), with_images(batch)
    optimizer = adamw(model, recipe.optim)
    with HostReads() as reads:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, _ = training_step(model, recipe, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert reads.found == []
    assert len(reads.launched) > 100
    with HostReads() as reads:  # and the counter counts
        loss.item()
    assert reads.found


@pytest.mark.parametrize("images", [False, True])
def test_a_batch_with_capacity_gives_the_same(setup, images):
    """And nothing of it is read on the host, which does not know its lengths."""
    recipe, batch, tokenizer = setup
    batch = with_images(batch) if images else batch
    rounded = batch.rounded(64)
    assert rounded.words.lengths is None and rounded.words.rows % 64 == 0 < rounded.words.rows - batch.words.rows
    assert (rounded.contrast is rounded.words) == (batch.contrast is batch.words)
    loss, grads = gradients(model_of(recipe, tokenizer, "auto"), recipe, batch)
    model = model_of(recipe, tokenizer, "auto")
    with HostReads() as reads:
        got, got_grads = gradients(model, recipe, rounded)
    assert reads.found == []
    assert abs(got - loss) <= 1e-6 * abs(loss)
    agree(recipe, got_grads, grads, 1e-6)


def test_with_capacity_a_step_draws_by_the_counters_on_the_device(setup, monkeypatch):
    """As a captured graph does: the host's numbers stay, the tensor changes, and it is the step of that tensor."""
    recipe, batch, tokenizer = setup
    recipe = settled(recipe, monkeypatch)
    later = dataclasses.replace(batch, epoch=3, step=6)
    replayed = dataclasses.replace(batch.rounded(64), counters=torch.tensor([3, 6]))
    assert video_mask(recipe, 1) == video_mask(recipe, 6) and keep_rate(recipe, 1) == keep_rate(recipe, 6)
    (own, _), (want, truth), (got, grads) = (
        gradients(model_of(recipe, tokenizer, "auto"), recipe, each) for each in (batch, later, replayed)
    )
    assert abs(got - want) <= 1e-6 * abs(want)
    assert (abs(want - own) > 1e-4 * abs(want)) == (recipe.task == "retrieval")  # the others draw nothing
    agree(recipe, grads, truth, 1e-6)


class Copies(TorchDispatchMode):
    """Lists what is copied from one device to another."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if len({x.device for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}) > 1:
            self.found.append(func)
        return out


def test_with_capacity_nothing_comes_from_the_host(setup):
    """A captured graph cannot copy pageable memory. Batches of videos and images still do."""
    recipe, batch, tokenizer = setup
    meta = torch.device("meta")
    with meta:
        model = build(recipe, tokenizer.get_vocab_size(), "auto")
    batch = batch.rounded(64).to(meta)
    with Copies() as copies:
        loss, _ = training_step(model, recipe, batch)
        loss.backward()
    assert copies.found == []
    with copies:  # and it would have seen one
        torch.ones(1).to(meta)
    assert len(copies.found) == 1


@pytest.mark.parametrize(("impl", "bucket"), [("auto", None), ("auto", 64), ("reference", None)])
@pytest.mark.parametrize("name", RECIPES)
def test_base_on_the_meta_device(name, impl, bucket):
    """The full size, forward and backward, without one number: the meta device refuses every host read."""
    recipe = load(name, "base")
    if impl == "reference" and recipe.model.fusion.depth:
        pytest.skip("the plain formula of attention reads on the host which keys belong to which query")
    video = recipe.model.video
    with torch.device("meta"):
        model = build(recipe, 30522, impl)
    side, n, images = video.image_size, 12, 4
    groups = [
        VisualGroup(torch.empty(count, frames, side, side, 3, dtype=torch.uint8), torch.arange(count))
        for count, frames in ((n, video.frames), (images, 1))
    ]
    words = [[7] * (3 + i % 5) for i in range(n + images)]
    kept, ends = [torch.arange(1, len(w)) for w in words], pack(words, 2).cu_seqlens[:-1].long()
    batch = Batch(
        groups=tuple(groups), words=pack(words, 2), contrast=pack(words, 2, kept), masked=pack(words, 2, kept, 4),
        masked_rows=ends + 1, masked_labels=torch.full((n + images,), 7), masked_counts=(1,) * (n + images),
        video_keys=torch.arange(n + images),
        caption_keys=torch.arange(n + images), epoch=0, step=recipe.optim.steps - 1, names=("",) * (n + images),
        options=pack(words * 5, 2), answers=torch.zeros(n + images, dtype=torch.int64),
    )  # fmt: skip
    batch = (batch if bucket is None else batch.rounded(bucket)).to(torch.device("meta"))
    loss, parts = training_step(model, recipe, batch)
    assert loss.is_meta and loss.shape == () and set(parts) == set(recipe.objectives)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.shape == p.shape, name


def test_order_of_the_batch_does_not_matter(setup):
    recipe, batch, tokenizer = setup
    (group,) = batch.groups
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(3))

    def moved(words, order=order):
        starts, ends = words.cu_seqlens[:-1].tolist(), words.cu_seqlens[1:].tolist()
        rows = torch.cat([torch.arange(starts[i], ends[i]) for i in order])
        lengths = tuple(words.lengths[i] for i in order)
        return dataclasses.replace(
            words, values=words.values[rows], ids=words.ids[rows], lengths=lengths,
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        ), rows  # fmt: skip

    other = dataclasses.replace(
        batch, groups=(VisualGroup(group.video[order], group.samples[order]),), words=moved(batch.words)[0],
        contrast=moved(batch.contrast)[0], video_keys=batch.video_keys[order], caption_keys=batch.caption_keys[order],
    )  # fmt: skip
    if batch.masked is not None:
        masked, rows = moved(batch.masked)
        label = torch.full((masked.rows,), -1).index_copy(0, batch.masked_rows, batch.masked_labels)[rows]
        at = (label >= 0).nonzero()[:, 0]
        other = dataclasses.replace(
            other,
            masked=masked,
            masked_rows=at,
            masked_labels=label[at],
            masked_counts=tuple(batch.masked_counts[i] for i in order),
        )
    if batch.options is not None:
        options = moved(batch.options, (5 * order[:, None] + torch.arange(5)).flatten())[0]
        other = dataclasses.replace(other, options=options, answers=batch.answers[order])
    if batch.begun is not None:
        which = torch.cat([(batch.begun_of == i).nonzero()[:, 0] for i in order])
        place = torch.empty_like(order).index_copy(0, order, torch.arange(len(order)))
        other = dataclasses.replace(
            other, begun=moved(batch.begun, which)[0], begun_labels=batch.begun_labels[which],
            begun_of=place[batch.begun_of[which]],
        )  # fmt: skip
    model = model_of(recipe, tokenizer)
    with torch.no_grad():
        parts, shuffled = (training_step(model, recipe, b)[1] for b in (batch, other))
        for name in parts:
            if not isinstance(recipe.objectives[name], Vtm):  # whose negatives are drawn by places in the batch
                torch.testing.assert_close(parts[name], shuffled[name], atol=0, rtol=2e-6)
        # The masks belong to the clips, not to the places: with another clip's number a clip is masked otherwise.
        wrong = dataclasses.replace(batch, groups=(VisualGroup(group.video, group.samples + 1),))
        other_masks = training_step(model, recipe, wrong)[1]
        for name in parts:
            assert (other_masks[name] != parts[name]) == (recipe.video_mask.ratio > 0), name


def test_masks_change_with_the_epoch_and_the_seed(setup):
    recipe, batch, tokenizer = setup
    model = model_of(recipe, tokenizer)
    other_seed = dataclasses.replace(recipe, seed=recipe.seed + 1)
    with torch.no_grad():
        losses = [
            training_step(model, r, b)[0].item()
            for r, b in (
                (recipe, batch), (recipe, batch), (recipe, dataclasses.replace(batch, epoch=1)), (other_seed, batch)
            )
        ]  # fmt: skip
    assert losses[0] == losses[1]
    # Where no patch is masked, the epoch draws nothing here, and the seed draws negatives alone.
    negatives = any(isinstance(objective, Vtm) for objective in recipe.objectives.values())
    drawn = 3 if recipe.video_mask.ratio else 2 if negatives else 1
    assert len(set(losses)) == drawn and (losses[3] != losses[0]) == (drawn > 1)


def test_the_contrast_in_parts_never_has_the_scores_of_all_pairs(shapes_cache, monkeypatch):
    recipe, loader, tokenizer = made("mac")
    vtc = dataclasses.replace(recipe.objectives["vtc"], part=4)
    recipe = dataclasses.replace(recipe, objectives=recipe.objectives | {"vtc": vtc})
    monkeypatch.setattr(VtcHeads, "scores", None)  # not to be called
    training_step(model_of(recipe, tokenizer, "auto"), recipe, loader.batch(0))


def test_positives_share_the_clip_or_the_caption():
    batch = SimpleNamespace(video_keys=torch.tensor([5, 6, 7, 5]), caption_keys=torch.tensor([1, 2, 1, 3]))
    assert positives(batch).int().tolist() == [[1, 0, 1, 1], [0, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]


@pytest.mark.parametrize("kind", ["drop", "mask"])
def test_words_that_are_left_out_are_not_computed(setup, kind, shapes_cache):
    recipe, _, _ = setup
    half = dataclasses.replace(recipe, text_mask=TextMask(0.5, kind))
    _, loader, tokenizer = made(recipe.name)
    batch = open_loader(half, loader.clips, tokenizer).batch(0)
    assert (batch.contrast.rows < 0.7 * batch.words.rows) == (kind == "drop")
    model, rows = model_of(half, tokenizer), []
    model.text.blocks[0].up.register_forward_hook(lambda _, given, out: rows.append(len(given[0])))
    assert training_step(model, half, batch)[0].isfinite()
    whole = any(name in recipe.objectives for name in ("vtm", "answer")) and recipe.task != "mc"
    seen = [batch.contrast, batch.words if whole else None, batch.masked, batch.options]
    assert rows == [sum(words.rows for words in seen if words is not None)]


@pytest.mark.parametrize("images", [False, True])
def test_each_pair_is_fused_as_if_alone(setup, images, monkeypatch):
    """First every text with its own video, then with its negatives; the masked captions with their own videos. So the
    answer to "do they belong together?" is nowhere but in the text and the frames."""
    recipe, batch, tokenizer = setup
    if "mlm" not in recipe.objectives:
        pytest.skip("it fuses nothing, or no pairs and masked captions")
    batch, calls, fuse = with_images(batch) if images else batch, [], steps.fuse
    monkeypatch.setattr(steps, "fuse", lambda *given: (calls.append((given, fuse(*given))), calls[-1][1])[1])
    model, b = model_of(recipe, tokenizer, "auto"), len(batch)
    with torch.no_grad():
        training_step(model, recipe, batch)
        (((_, _, _, video, features, words, same, _), seen),) = calls
        pairs, masked = seen["pairs"], seen["masked"]
        scores = model.heads["vtc"].scores(features["contrast"], video.features)
        negatives, _ = steps.hard_negatives(scores, same, recipe.objectives["vtm"].negatives, recipe.seed, batch.step)

        def alone(view, text, clip):
            start, end = words[view].cu_seqlens[text : text + 2].tolist()
            kv_ids, gate = video.frame_ids[clip : clip + 1], None
            if model.selector is not None:
                kv_ids, gate = model.selector(video.summaries, features[view][text : text + 1], kv_ids)
            own = packed_uniform(words[view].values[start:end], end - start)
            return model.fusion([own], video.frames, kv_ids, gate).values

        assert pairs.labels.tolist() == [1] * b + [0] * 2 * b and pairs.features.shape[0] == 3 * b
        clips = [list(range(b)), negatives[:, 0].tolist(), negatives[:, 1].tolist()]
        truth = torch.cat([alone("match", i, clip[i])[:1] for clip in clips for i in range(b)])
        torch.testing.assert_close(pairs.features, truth, atol=1e-5, rtol=1e-4)
        assert pairs.valid[:b].all() and not (same.gather(1, negatives) & pairs.valid[b:].view(2, b).T).any()
        truth = torch.cat([alone("masked", i, i) for i in range(b)])[batch.masked_rows]
        torch.testing.assert_close(masked.features, truth, atol=1e-5, rtol=1e-4)
        assert torch.equal(masked.labels, batch.masked_labels)


@pytest.mark.parametrize("query", ["pair", "own"])
def test_whose_words_choose_the_frames(query, shapes_cache):
    recipe, loader, tokenizer = made("smaug")
    selector = dataclasses.replace(recipe.model.selector, query=query)
    recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, selector=selector))
    model, seen = model_of(recipe, tokenizer, "auto"), []
    model.fusion.register_forward_pre_hook(lambda _, given: seen.append(given[2]))
    with torch.no_grad():
        training_step(model, recipe, loader.batch(0))
    chosen: dict[int, set[tuple[int, ...]]] = {}
    for row in seen[0].tolist():
        chosen.setdefault(row[0] // 2, set()).add(tuple(row))  # a clip has two moments
    assert len(chosen) == 16 and len(seen[0]) == 16 * 4
    most = max(len(rows) for rows in chosen.values())
    assert most == 1 if query == "own" else most > 1


@pytest.mark.parametrize("words", ["whole", "contrast"])
def test_what_the_match_head_reads(words, shapes_cache):
    recipe, loader, tokenizer = made("smaug")
    objectives = recipe.objectives | {"vtm": dataclasses.replace(recipe.objectives["vtm"], words=words)}
    recipe = dataclasses.replace(recipe, text_mask=TextMask(0.5), objectives=objectives)
    batch = open_loader(recipe, loader.clips, tokenizer).batch(0)
    views = steps.text_views(recipe, batch)
    assert batch.contrast.rows < batch.words.rows
    assert views["match"] is (batch.words if words == "whole" else batch.contrast)


def test_every_view_of_the_words_is_encoded_as_if_alone(setup):
    recipe, batch, tokenizer = setup
    views = {"contrast": batch.contrast, "match": batch.words}
    views |= {"masked": batch.masked} if batch.masked is not None else {}
    model = model_of(recipe, tokenizer)
    with torch.no_grad():
        features, words = steps.encode_texts(model, views)
        for name, view in views.items():
            truth, tokens = model.text(view)
            torch.testing.assert_close(features[name], truth, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(words[name].values, tokens.values, atol=1e-5, rtol=1e-4)
            assert words[name].lengths == view.lengths and torch.equal(words[name].ids, view.ids)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("step", [0, 1, -1])
def test_counted_tokens_are_the_rows_that_ran(setup, step, images):
    """At a step before pruning, at one with it, and at the last, where nothing is masked."""
    recipe, batch, tokenizer = setup
    recipe = dataclasses.replace(recipe, unmask_last=0.1, text_mask=TextMask(0.0))
    batch = with_images(batch) if images else batch
    batch = dataclasses.replace(batch, step=step % recipe.optim.steps, contrast=batch.words)
    rows = {}

    def run(recipe):
        model = model_of(recipe, tokenizer)
        for kind, blocks in (("video", model.video.blocks), ("text", model.text.blocks)):
            rows[kind] = []
            for block in blocks:
                block.up.register_forward_hook(lambda _, given, out, kind=kind: rows[kind].append(len(given[0])))
        with torch.no_grad():
            training_step(model, recipe, batch)
        assert len(rows["video"]) == recipe.model.video.depth and len(set(rows["text"])) == 1
        return round(sum(rows["video"]) / len(rows["video"])) + rows["text"][0]

    computed, dense = encoded(count_tokens(recipe, batch))
    assert computed == run(recipe)
    everything = with_prune(dataclasses.replace(recipe, video_mask=VideoMask(0.0, recipe.video_mask.kind)), blocks=())
    assert dense == run(everything)
    masked = recipe.video_mask.ratio > 0 and step != -1
    pruned = bool(recipe.model.video.prune.blocks) and step != 0
    assert (computed < dense) == (masked or pruned)


def test_the_rate_of_pruning_falls_by_a_cosine():
    recipe = dataclasses.replace(load("mac"), optim=dataclasses.replace(load("mac").optim, steps=1000))
    recipe = with_prune(recipe, keep=0.6, warmup=0.2)
    assert recipe.model.video.prune == PruneConfig(keep=0.6, warmup=0.2)
    rates = [keep_rate(recipe, step) for step in range(1000)]
    assert rates[0] == 1 and rates[100] == pytest.approx(0.8) and rates[50] == pytest.approx(0.6 + 0.4 * 0.853553)
    assert set(rates[200:]) == {0.6} and all(a > b for a, b in itertools.pairwise(rates[:201]))
    at_once = with_prune(recipe, warmup=0.0)
    assert [keep_rate(at_once, step) for step in (1, 500)] == [0.6, 0.6]


def test_nothing_is_masked_at_the_end():
    recipe = dataclasses.replace(
        load("mac"), unmask_last=0.1, video_mask=VideoMask(0.75, "tube"),
        optim=dataclasses.replace(load("mac").optim, steps=200),
    )  # fmt: skip
    assert [video_mask(recipe, step) for step in (0, 100, 179)] == [recipe.video_mask] * 3
    assert [video_mask(recipe, step) for step in (180, 199)] == [VideoMask(0.0, "tube")] * 2
    always = dataclasses.replace(recipe, unmask_last=0.0)
    assert video_mask(always, 199) == recipe.video_mask


def trained(recipe, loader, tokenizer, steps, change=lambda batch: batch):
    """A model after some steps of the fast path, and that path."""
    recipe = dataclasses.replace(recipe, optim=dataclasses.replace(recipe.optim, steps=steps, lr=2e-3))
    model, way = model_of(recipe, tokenizer, "auto"), choose(True, "cpu")
    optimizer = adamw(model, recipe.optim)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe.optim)
        with way.autocast():
            loss, _ = training_step(model, recipe, change(loader.batch(step)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, way


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smaug"])
def test_nothing_but_the_video_tells_which_pairs_match(name, shapes_cache):
    """With new noise in every frame at each step there is nothing to find: neither what a pair is made of nor how its
    negatives are drawn may say which is which."""
    recipe, loader, tokenizer = made(name)
    generator, logits, count = torch.Generator().manual_seed(0), [], 40

    def noisy(batch):
        (group,) = batch.groups
        video = torch.randint(256, group.video.shape, generator=generator, dtype=torch.uint8)
        return dataclasses.replace(batch, groups=(VisualGroup(video, group.samples),))

    model, way = trained(recipe, loader, tokenizer, 60, noisy)
    model.heads["vtm"].register_forward_hook(lambda module, given, out: logits.append(out.double()))
    losses = []
    with torch.no_grad(), way.autocast():
        for step in range(60, 60 + count):
            losses.append(training_step(model, recipe, noisy(loader.batch(step)))[1]["vtm"].double())
    scores = torch.stack([x[:, 1] - x[:, 0] for x in logits])
    match, other = scores[:, : loader.size].flatten(), scores[:, loader.size :].flatten()
    m, n = len(match), len(other)
    assert (m, n) == (count * 16, count * 32) and scores.std() > 1e-3  # it does answer, and not always the same
    # The standard error of the AUC of two samples of one distribution, Mann and Whitney 1947: here 0.014. That a text
    # and a video are in one true pair and about two false ones makes it no larger.
    error = math.sqrt((m + n + 1) / (12 * m * n))
    auc = (match[:, None] > other).double().mean() + (match[:, None] == other).double().mean() / 2
    assert abs(auc - 0.5) < 3.5 * error, auc
    # Who knows only that a third of the pairs match pays their entropy; the error is that of a mean over the batches.
    entropy = math.log(3) - 2 / 3 * math.log(2)
    loss = torch.stack(losses)
    assert loss.mean() > entropy - 4 * loss.std() / math.sqrt(count), loss.mean()


# Words by what they tell of. "moves" is not asked for: only a caption that says it is a word longer.
KINDS = {
    "colour": list(shapes.COLOURS),
    "shape": list(shapes.SHAPES),
    "motion": ["grows", "shrinks", "left", "right", "up", "down"],
}


@pytest.mark.slow
def test_masked_words_are_read_from_the_video(shapes_cache):
    """With every colour, shape and motion hidden, the words are right with the caption's own video and not with the
    next clip's. The clips are those of the training, so a motion may be known by how its clip looks."""
    recipe, loader, tokenizer = made("smaug")
    # Most words hidden in training too, or captions would be known from what is left of them. Pixels are not
    # asked for, to save a third of the time.
    objectives = {k: o for k, o in recipe.objectives.items() if k != "mvm"}
    objectives["mlm"] = dataclasses.replace(objectives["mlm"], ratio=0.8)
    recipe = dataclasses.replace(with_prune(recipe, warmup=0.3), objectives=objectives)
    clips = dataclasses.replace(loader.clips, samples=loader.clips.samples[:32], frames=loader.clips.frames[:32])
    model, way = trained(recipe, open_loader(recipe, clips, tokenizer), tokenizer, 150)

    recipe = dataclasses.replace(recipe, video_mask=VideoMask(0.0, "even"))
    all_clips = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, batch=32))
    batch = open_loader(all_clips, clips, tokenizer).batch(0)
    assert not (positives(batch) & torch.eye(32).roll(1, 0).bool()).any()  # the next clip has another caption
    numbers = {kind: torch.tensor([tokenizer.token_to_id(w) for w in words]) for kind, words in KINDS.items()}
    words = batch.words.values
    hidden = torch.isin(words, torch.cat([*numbers.values(), torch.tensor([tokenizer.token_to_id("moves")])]))
    masked = batch.words.with_values(words.masked_fill(hidden, tokenizer.token_to_id("[MASK]")))
    rows = hidden.nonzero()[:, 0]
    counts = tuple(part.sum().item() for part in hidden.split(list(batch.words.lengths)))
    own = dataclasses.replace(
        batch, masked=masked, masked_rows=rows, masked_labels=words[rows], masked_counts=counts, step=1000
    )
    (group,) = batch.groups
    other = dataclasses.replace(own, groups=(VisualGroup(group.video.roll(1, 0), group.samples),))
    said = []
    model.heads["mlm"].register_forward_hook(lambda module, given, out: said.append(out.argmax(1) == words[rows]))
    with torch.no_grad(), way.autocast():
        training_step(model, recipe, own)
        training_step(model, recipe, other)
    right = {k: [x[torch.isin(words[rows], ids)].float().mean().item() for x in said] for k, ids in numbers.items()}
    # The words that are left are the same, so whoever does not look at the video answers the same and gains nothing.
    # With this seed the gains are 0.61, 0.47 and 0.44; with one that learns late 0.44, 0.19 and 0.25.
    for kind, least in (("colour", 0.25), ("shape", 0.15), ("motion", 0.2)):
        seen, unseen = right[kind]
        assert seen > unseen + least, right


@pytest.mark.parametrize("name", RECIPES)
def test_golden_losses(name, shapes_cache):
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    assert five_losses(name) == pytest.approx(golden["losses"], rel=1e-4), "see the top of this file"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SMAUG_CACHE"] = folder
        GOLDEN.mkdir(exist_ok=True)
        for recipe_name in names():
            golden_file = GOLDEN / f"{recipe_name}.json"
            golden_file.write_text(json.dumps({"losses": five_losses(recipe_name), "torch": torch.__version__}) + "\n")
            print(golden_file, golden_file.read_text(), end="")
