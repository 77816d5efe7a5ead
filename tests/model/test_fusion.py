"""Fusion through kv_ids equals copying each pair's frames into a padded, masked cross-attention."""

import pytest
import torch
from torch.nn import functional as F

from smaug.model.fusion import Fusion, FusionConfig
from smaug.testing import offsets, relative_error
from smaug.tokens import cat_tokens, packed_ragged, packed_uniform

WIDTH, VIDEO_WIDTH, HEADS = 32, 24, 2
TEXTS = (4, 1, 6, 3, 2)
FRAMES = (5, 2, 7, 1)
# Frames are shared by pairs, named twice by one, missing in others; the last text sees none at all.
KV_IDS = torch.tensor([[0, 1, 2], [2, -1, -1], [-1, 3, 0], [2, 2, 1], [-1, -1, -1]], dtype=torch.int32)


def fusion(impl="auto", depth=2):
    torch.manual_seed(0)
    made = Fusion(WIDTH, VIDEO_WIDTH, FusionConfig(depth=depth, heads=HEADS), impl)
    for name, p in made.named_parameters():
        if p.ndim == 1:
            p.data = torch.randn_like(p) * 0.1 + ("norm" in name and name.endswith("weight"))
    return made


def inputs():
    generator = torch.Generator().manual_seed(1)
    words = torch.randn(sum(TEXTS), WIDTH, generator=generator).requires_grad_()
    frames = torch.randn(sum(FRAMES), VIDEO_WIDTH, generator=generator).requires_grad_()
    gate = torch.randn(KV_IDS.shape, generator=generator).requires_grad_()
    return words, frames, gate


def tokens(words, frames):
    return (
        [packed_ragged(words, offsets(TEXTS), lengths=TEXTS)],
        packed_ragged(frames, offsets(FRAMES), lengths=FRAMES),
    )


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def copied(made, words, frames, gate):
    """The same in padded tensors: (P, L, D) words, (P, K, D_v) keys copied for each pair, -inf on the rest."""
    p, length, parts = len(TEXTS), max(TEXTS), frames.split(list(FRAMES))
    longest = sum(sorted(FRAMES)[-2:]) * 2
    rows, keys, bias = [], [], []
    for pair, own in enumerate(words.split(list(TEXTS))):
        rows.append(F.pad(own, (0, 0, 0, length - len(own))))
        named = [(i, m) for m, i in enumerate(KV_IDS[pair].tolist()) if i >= 0]
        here = torch.cat([parts[i] for i, _ in named]) if named else frames[:0]
        logit = torch.cat([gate[pair, m].expand(FRAMES[i]) for i, m in named]) if named else gate[0, :0]
        keys.append(F.pad(here, (0, 0, 0, longest - len(here))))
        bias.append(F.pad(logit, (0, longest - len(here)), value=float("-inf")))
    x, keys, bias = torch.stack(rows), torch.stack(keys), torch.stack(bias)[:, None, None]
    mask = torch.arange(length) < torch.tensor(TEXTS)[:, None]
    blind = (bias == float("-inf")).all(-1, keepdim=True)
    for block in made.blocks:
        q, k, v = (heads(t) for t in block.attention.qkv(block.norm1(x)).chunk(3, dim=-1))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = x + block.attention.proj(o.transpose(1, 2).flatten(2))
        q = heads(block.query(block.norm_cross(x)))
        k, v = (heads(t) for t in block.key_value(keys).chunk(2, dim=-1))
        logits = q @ k.transpose(2, 3) * (WIDTH // HEADS) ** -0.5 + bias.masked_fill(blind, 0)
        o = (logits.softmax(-1) @ v).masked_fill(blind, 0)  # with nothing to see nothing is added
        x = x + block.proj(o.transpose(1, 2).flatten(2))
        x = x + block.down(F.gelu(block.up(block.norm2(x))))
    assert x.shape == (p, length, WIDTH)
    return made.norm(x)[mask]


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("gated", [False, True])
def test_equals_copied_keys(gated, impl):
    made, (words, frames, gate) = fusion(impl), inputs()
    got = made(*tokens(words, frames), KV_IDS, gate if gated else None).values
    want = copied(made, words, frames, gate if gated else torch.zeros_like(gate))
    assert relative_error(got, want) < 2e-6

    g = torch.randn(got.shape, generator=torch.Generator().manual_seed(2))
    leaves = {**dict(made.named_parameters()), "words": words, "frames": frames} | ({"gate": gate} if gated else {})
    for name, a, b in zip(
        leaves,
        torch.autograd.grad(got, leaves.values(), g),
        torch.autograd.grad(want, leaves.values(), g),
        strict=True,
    ):
        assert b.norm() > 1e-3 and relative_error(a, b) < 2e-5, name


def test_each_frame_is_projected_once_however_many_pairs_use_it():
    made, rows = fusion(depth=3), []
    for block in made.blocks:
        block.key_value.register_forward_hook(lambda _, given, out: rows.append(len(given[0])))
    words, frames, _ = inputs()
    many = KV_IDS[[0] * 40]
    texts = packed_uniform(torch.randn(40 * 3, WIDTH), 3)
    made([texts], tokens(words, frames)[1], many, None)
    assert rows == [sum(FRAMES)] * 3


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_keys_and_values_made_once_serve_several_calls(impl):
    made, (words, frames, _) = fusion(impl), inputs()
    (texts, images), rows = tokens(words, frames), []
    want = made(texts, images, KV_IDS, None).values
    keys_values = made.project(images)
    for block in made.blocks:
        block.key_value.register_forward_hook(lambda _, given, out: rows.append(len(out)))
    for _ in range(2):
        assert torch.equal(made(texts, images, KV_IDS, None, keys_values=keys_values).values, want)
    assert rows == []


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_texts_that_see_the_same_frames_ask_together(impl):
    """Pairs ordered by video, one row of kv_ids for the neighbours: what each would read alone."""
    made, (words, frames, _) = fusion(impl), inputs()
    (texts,), images = tokens(words, frames)
    together, videos = (2, 2, 1), KV_IDS[[0, 2, 4]]
    read = made.read(texts)
    got = made.fuse(read, images, videos, keys_values=made.project(images), together=together).values
    alone = made([texts], images, videos.repeat_interleave(torch.tensor(together), 0), None).values
    torch.testing.assert_close(got, alone, atol=2e-6, rtol=1e-5)
    assert not torch.allclose(got, made([texts], images, KV_IDS, None).values, atol=1e-3)
    first = made.fuse(read, images, videos, rows=texts.first_rows(), lengths=1, together=together).values
    torch.testing.assert_close(first, alone[texts.first_rows()], atol=2e-6, rtol=1e-5)


def test_a_text_that_meets_several_videos_reads_itself_once():
    """In the first block; the same as if it had been copied, forward and backward."""
    made, (words, frames, _) = fusion(), inputs()
    ((texts,), images), rows = tokens(words, frames), []
    other = packed_uniform(torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(4)), 3)
    for block in made.blocks:
        block.attention.register_forward_hook(lambda _, given, out: rows.append(given[0].rows))
    kv_ids = torch.cat([KV_IDS, KV_IDS.flip(0), KV_IDS[:2], KV_IDS.roll(1, 0)])
    parts = [texts, texts, other, texts]
    once = made(parts, images, kv_ids, None).values
    assert rows == [sum(TEXTS) + 6, 3 * sum(TEXTS) + 6]
    copied = made([cat_tokens(parts)], images, kv_ids, None).values
    assert relative_error(once, copied) < 2e-6
    g = torch.randn(once.shape, generator=torch.Generator().manual_seed(2))
    leaves = [words, frames, *made.parameters()]
    for a, b in zip(torch.autograd.grad(once, leaves, g), torch.autograd.grad(copied, leaves, g), strict=True):
        assert relative_error(a, b) < 2e-5


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("gated", [False, True])
def test_only_the_words_that_are_asked_for_look_at_the_frames_last(gated, impl):
    made, (words, frames, gate) = fusion(impl), inputs()
    given = (*tokens(words, frames), KV_IDS, gate if gated else None)
    lengths = tuple(min(n, i % 3) for i, n in enumerate(TEXTS))  # none of some
    first = offsets(TEXTS).tolist()
    rows = torch.tensor([first[i] + TEXTS[i] - n + j for i, n in enumerate(lengths) for j in range(n)])
    seen = []
    made.blocks[-1].up.register_forward_hook(lambda _, given, out: seen.append(len(out)))
    some, everything = made(*given, rows=rows, lengths=lengths).values, made(*given).values
    assert 0 < len(some) == len(rows) == seen[0] < seen[1]
    torch.testing.assert_close(some, everything[rows], atol=2e-6, rtol=1e-5)
    g = torch.randn(some.shape, generator=torch.Generator().manual_seed(2))
    leaves = [words, frames, *made.parameters()]
    want = torch.autograd.grad(everything, leaves, torch.zeros_like(everything).index_copy(0, rows, g))
    for a, b in zip(torch.autograd.grad(some, leaves, g), want, strict=True):
        assert relative_error(a, b) < 2e-5


def test_a_pair_does_not_see_its_neighbours():
    made, (words, frames, gate) = fusion(), inputs()
    texts, images = tokens(words, frames)
    together = made(texts, images, KV_IDS, gate).values.split(list(TEXTS))
    for pair, own in enumerate(words.split(list(TEXTS))):
        alone = made([packed_uniform(own, len(own))], images, KV_IDS[pair : pair + 1], gate[pair : pair + 1]).values
        torch.testing.assert_close(alone, together[pair], atol=2e-6, rtol=1e-5)


def test_a_frame_that_is_not_named_is_not_seen():
    made, (words, frames, _) = fusion(), inputs()
    kv_ids = KV_IDS.masked_fill(KV_IDS == 1, -1)
    other = torch.cat([x + 5 * (i == 1) for i, x in enumerate(frames.split(list(FRAMES)))])
    one, two = (made(*tokens(words, x), kv_ids, None).values for x in (frames, other))
    assert torch.equal(one, two)
    assert not torch.equal(
        made(*tokens(words, other), KV_IDS, None).values, made(*tokens(words, frames), KV_IDS, None).values
    )


ONE = torch.tensor([[0], [2], [3], [2], [-1]], dtype=torch.int32)  # a frame for each text, shared by two; none for one


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_gate_on_the_only_frame_changes_nothing_while_it_is_zero(impl):
    made, (words, frames, _) = fusion(impl), inputs()
    plain, gated = (made(*tokens(words, frames), ONE, gate).values for gate in (None, torch.zeros(len(TEXTS), 1)))
    assert torch.equal(plain, gated)
    g = torch.randn(plain.shape, generator=torch.Generator().manual_seed(2))
    leaves = [words, frames, *made.parameters()]
    for a, b in zip(torch.autograd.grad(gated, leaves, g), torch.autograd.grad(plain, leaves, g), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_gate_on_the_only_frame_learns_from_what_was_read(depth):
    """d loss / d gate of a pair: the sum of grad_o * o over its words, in every block; and as differences say."""
    made, (words, frames, _) = fusion("reference", depth).double(), inputs()
    words, frames, read = words.double(), frames.double(), []
    g = torch.randn(words.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def loss(gate):
        return (made(*tokens(words, frames), ONE, gate).values * g).sum()

    gate = torch.zeros(len(TEXTS), 1, dtype=torch.float64, requires_grad=True)
    for block in made.blocks:
        block.proj.register_forward_hook(lambda _, given, out: read.append(given[0]))
    total = loss(gate)
    (got, *grads) = torch.autograd.grad(total, [gate, *read])
    products = sum((grad * o).sum(1) for grad, o in zip(grads, read, strict=True))  # o itself, as the gate is 0
    assert len(read) == depth
    want = torch.stack([own.sum() for own in products.split(list(TEXTS))])[:, None]
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-9)
    assert (want[:-1].abs() > 1e-3).all() and want[-1] == 0  # who sees nothing has nothing to scale
    with torch.no_grad():
        eps = 1e-5 * torch.eye(len(TEXTS), dtype=torch.float64)[:, :, None]
        slope = torch.stack([(loss(e) - loss(-e)) / 2e-5 for e in eps])[:, None]
    torch.testing.assert_close(got, slope, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_each_text_has_the_gate_of_its_own_pair(impl):
    """With -1 it reads nothing, as if it saw no frame; the others read as they did."""
    made, (words, frames, _) = fusion(impl), inputs()
    gate = torch.zeros(len(TEXTS), 1)
    before = made(*tokens(words, frames), ONE, gate).values.split(list(TEXTS))
    for pair in range(len(TEXTS) - 1):
        closed = gate.index_fill(0, torch.tensor(pair), -1.0)
        blind = ONE.index_fill(0, torch.tensor(pair), -1)
        after, truth = (made(*tokens(words, frames), i, c).values for i, c in ((ONE, closed), (blind, gate)))
        torch.testing.assert_close(after, truth, atol=1e-6, rtol=1e-5)
        for other, rows in enumerate(after.split(list(TEXTS))):
            moved = (rows - before[other]).abs().amax(1)
            assert (moved > 1e-2).all() if other == pair else (moved < 1e-6).all()


def test_the_gate_on_the_only_frame_keeps_the_precision_of_autocast():
    made, (words, frames, _) = fusion(), inputs()
    gate, inside = torch.zeros(len(TEXTS), 1, requires_grad=True), []
    made.blocks[0].proj.register_forward_hook(lambda _, given, out: inside.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        made(*tokens(words, frames), ONE, gate).values.square().sum().backward()
    assert inside == [torch.bfloat16] and gate.grad.dtype == torch.float32 and gate.grad[:-1].abs().min() > 0
