"""torch.compile: of every public op, of SparseAttention and of the encoder one graph, forward and backward, that serves
batches of every length. A case is (f, make): what is compiled, and a batch of random lengths for it."""

import dataclasses
import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils import _pytree as pytree

from smaug import ops
from smaug.model.video_encoder import PruneConfig, VideoEncoder, VideoEncoderConfig
from smaug.testing import packed
from smaug.tokens import PackedTokens, packed_ragged, packed_uniform

SETS = 20
IMAGE = dict(mean=(0.48, 0.45, 0.40), std=(0.22, 0.23, 0.25))


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def lengths_of(r, most=9):
    """Of 2 to 7 sequences, some of them empty; two rows at least, since torch compiles 0 and 1 on their own."""
    return [2 + r.randint(0, most), *(r.randint(0, most) for _ in range(r.randint(1, 6)))]


def tokens_of(r, kind, d=24):
    """PackedTokens whose lengths the host knows as one int, as a tuple, or not at all; then with a tail."""
    if kind == "int":
        return packed_uniform(leaf(r.randint(2, 6) * (n := r.randint(6, 12)), d), n)
    lengths = lengths_of(r)
    values, cu_seqlens = packed(lengths, d, tail=0 if kind == "tuple" else r.randint(2, 4), seed=r.randint(0, 99))
    known = tuple(lengths) if kind == "tuple" else None
    values = values.nan_to_num().requires_grad_()  # SparseAttention projects the tail too
    return packed_ragged(values, cu_seqlens, lengths=known, max_seqlen=max(lengths))


def random_mask():
    def f(samples, keep, seed, draw):
        kinds = "random", "tube", "block"
        return [ops.random_mask(samples, (2, 4, 4), keep, kind=kind, seed=seed, draw=draw) for kind in kinds]

    def make(r):
        return torch.arange(r.randint(2, 9)), 2 * r.randint(1, 14), torch.tensor(r.randint(0, 99)), torch.tensor(3)

    return f, make


def pixels(r, uniform=False, last=False):
    """Video of 2 x 2 x 4 patches of 2 x 4 x 4 pixels, ids of the patches that stay and of those that go."""
    clips, each = r.randint(2, 6), r.randint(1, 6)
    picture = (8, 16, 3) if last else (3, 8, 16)
    video = torch.randint(256, (clips, 4, *picture), dtype=torch.uint8)
    kind = "tube" if uniform else "random"
    return video, *ops.random_mask(torch.arange(clips), (2, 2, 4), 2 * each, kind=kind, seed=r.randint(0, 99))


def patch_embed(prefix_per, uniform=False, last=False):
    parameters = leaf(24, 96), leaf(24), leaf(16, 24), leaf(1, 24)

    def f(video, ids, weight, bias, position, prefix):
        kw = dict(patch=(2, 4, 4), position=position, prefix=prefix, prefix_per=prefix_per, uniform=uniform)
        return ops.patch_embed(video, ids, weight, bias, **kw, **IMAGE)

    return f, lambda r: (*pixels(r, uniform, last)[:2], *parameters)


def gather_and_scatter(one_tensor):
    fill = leaf(24)

    def f(x, ids, length, cu_seqlens):
        grid = ops.scatter_tokens(x, ids, length, 2.5 if one_tensor else fill, cu_seqlens)
        return grid, ops.gather_tokens(grid * 2, ids, cu_seqlens)

    def make(r):
        length = r.randint(12, 30)
        if one_tensor:
            clips, kept = r.randint(2, 6), r.randint(2, 11)
            return leaf(clips, kept, 24), torch.arange(kept).repeat(clips, 1), length, None
        tokens = tokens_of(r, None)
        return tokens.values, tokens.ids, length, tokens.cu_seqlens

    return f, make


def select_tokens(kind, **how):
    def f(tokens, scores):
        return ops.select_tokens(tokens, scores, prefix=1, **how)

    def make(r):
        tokens = tokens_of(r, kind)
        return tokens, torch.rand(tokens.rows, requires_grad=True)

    return f, make


def attention(kind, **options):
    """kind as in `tokens_of`; "cross", "one" sequence of keys for each of the queries' by kv_ids, or "many"."""

    def f(q, k, v, cu_seqlens_q, cu_seqlens_k, more):
        return ops.attention(q, k, v, cu_seqlens_q, cu_seqlens_k, return_lse=True, **more, **options)

    def make(r):
        own = tokens_of(r, kind if kind in ("int", "tuple") else None, 4 * 16)
        other, more = own, {}
        if kind == "cross":
            lengths = [r.randint(0, 9) for _ in range(own.num_sequences)]
            other = packed_ragged(*packed(lengths, 64, tail=2))
            more = dict(segment_bias=leaf(own.num_sequences, 1))
        elif kind in ("one", "many"):
            other = tokens_of(r, None, 64)
            shape = (own.num_sequences,) if kind == "one" else (own.num_sequences, r.randint(2, 4))
            more = dict(kv_ids=torch.randint(-1, other.num_sequences, shape, dtype=torch.int32))
            if kind == "many":
                more.update(segment_bias=leaf(*shape), key_bias=leaf(other.rows))
        else:
            more = dict(lengths_q=tuple(own.lengths) if kind == "tuple" else own.lengths, max_seqlen_q=own.max_seqlen)
        q, k, v = own.values.view(-1, 4, 16), *(leaf(other.rows, 2, 16) for _ in range(2))
        return q, k, v, own.cu_seqlens, None if other is own else other.cu_seqlens, more

    return f, make


def pixel_loss(normalise):
    def f(pred, video, ids):
        return ops.pixel_loss(pred, video, ids, patch=(2, 4, 4), normalise=normalise)

    def make(r):
        video, _, ids = pixels(r)
        return leaf(*ids.shape, 96), video, ids

    return f, make


def sparse_attention(kind):
    layer = ops.SparseAttention(32, 2, batch_first=True)

    def make(r):
        if kind == "padded":
            clips = r.randint(2, 6)
            return layer.in_proj_weight, leaf(clips, r.randint(2, 9), 32), leaf(clips, r.randint(2, 9), 32)
        tokens = tokens_of(r, None if kind == "cross" else kind, 32)
        other = tokens_of(r, None, 32) if kind == "cross" else tokens
        if kind == "cross":  # as many sequences on both sides
            count = min(tokens.num_sequences, other.num_sequences) + 1
            tokens, other = (dataclasses.replace(x, cu_seqlens=x.cu_seqlens[:count].clone()) for x in (tokens, other))
        return layer.in_proj_weight, tokens, other

    def f(weight, query, key):
        return layer(query, key, key_scores="mean")

    return f, make


def encoder(images, **options):
    """All of it: embed, attend, prune, attend. Videos alone, or with images in the same packed batch."""
    base = dict(width=32, heads=2, image_size=16, patch=4, frames=4)
    model = VideoEncoder(VideoEncoderConfig(**base, **options)).double()  # the sums of a gradient cancel in fp32

    def f(groups, *parameters):
        made = model(groups)
        return made.features, made.frames, made.frame_ids, made.stayed, made.left

    def make(r):
        groups, each = [], r.randint(9, 14)
        for frames in (4, 1) if images else (4,):
            clips, grid = r.randint(2, 6), model.config.grid(frames)
            video = torch.randint(256, (clips, frames, 16, 16, 3), dtype=torch.uint8)
            groups.append((video, ops.random_mask(torch.arange(clips), grid, each * grid[0], kind="tube", seed=1)[0]))
        return groups, *model.parameters()

    return f, make


CASES = {
    "random_mask": (random_mask,),
    "patch_embed, clips": (patch_embed, "clip"),
    "patch_embed, frames": (patch_embed, "frame", False, True),
    "patch_embed, equal frames": (patch_embed, "frame", True),
    "gather_tokens and scatter_tokens, packed": (gather_and_scatter, False),
    "gather_tokens and scatter_tokens, one tensor": (gather_and_scatter, True),
    **{
        f"select_tokens, {name}, {kind}": (select_tokens, kind, how)
        for name, how in {"count": dict(keep=2), "ratio": dict(keep=0.4), "mass": dict(mass=0.5)}.items()
        for kind in ("int", "tuple", None)
    },
    **{f"attention, {kind}": (attention, kind) for kind in ("int", "tuple", "cross", "one")},
    "attention, self": (attention, None, dict(key_scores="cls")),
    "attention, many": (attention, "many", dict(key_scores="mean")),
    "pixel_loss": (pixel_loss, "patch_channel"),
    **{f"SparseAttention, {kind}": (sparse_attention, kind) for kind in ("int", "tuple", None, "cross", "padded")},
    "encoder, pruned clips": (encoder, False, dict(depth=2, tubelet=2, prune=PruneConfig(blocks=(0,)))),
    "encoder, clips with images": (encoder, True, dict(depth=1, tubelet=2)),
}


def without_tuples(x):
    """What a compiled function goes by: there a tuple of lengths counts as known to the device alone."""
    if isinstance(x, PackedTokens) and not isinstance(x.lengths, int):
        return dataclasses.replace(x, lengths=None)
    return x


def results(out, inputs):
    """Its tensors, and the gradients of all that asks for one."""
    tensors = [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
    wanted = [x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.requires_grad]
    loss = sum(x.masked_fill(x.isinf(), 0).square().sum() for x in tensors if x.requires_grad)
    grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True) if wanted else ()
    return *(x.detach() for x in tensors), *grads


@pytest.fixture
def strict():
    """Recompiling raises and tells why; sizes that are equal by chance in the first batch are not taken for one."""
    with torch._dynamo.config.patch(error_on_recompile=True), torch.fx.experimental._config.patch(use_duck_shape=False):
        torch.compiler.reset()
        counters.clear()
        yield


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.slow if c.startswith("encoder") else ()) for c in CASES]
)
def test_one_graph_for_all_lengths(case, strict):
    make_case, *rest = CASES[case]
    options = rest.pop() if rest and isinstance(rest[-1], dict) else {}
    f, make = make_case(*rest, **options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    frames = 0
    for number in range(SETS):
        torch.manual_seed(number)
        inputs = make(random.Random(number))
        got = results(compiled(*inputs), inputs)
        frames = frames or counter.frame_count
        same = pytree.tree_map(without_tuples, inputs, is_leaf=lambda x: isinstance(x, PackedTokens))
        for a, b in zip(got, results(f(*same), same), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert frames > 0 and counter.frame_count == frames
    assert not counters["graph_break"]


def test_every_public_op_is_compiled():
    assert [name for name in ops.__all__ if not any(name in case for case in CASES)] == [
        "keep_count",
        "register_flops",
        "warmup",
    ]
