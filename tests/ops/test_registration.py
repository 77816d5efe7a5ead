"""Every op that smaug registers, found in torch's own list: schema, fake, autograd and tracing agree with its code."""

import pytest
import torch

from smaug import ops  # noqa: F401  (registers them)
from smaug.testing import offsets, packed

PATCH, MEAN, STD = [2, 4, 4], [0.48, 0.45, 0.40], [0.22, 0.23, 0.25]
OPS = sorted(
    name.removeprefix("smaug::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("smaug::")
)


def leaf(*shape):
    return torch.randn(shape, requires_grad=True)


def plain(*values):
    return [x.detach() if isinstance(x, torch.Tensor) else x for x in values]


def random_mask():
    for kind in ("random", "tube", "block", "frame"):
        yield kind, (torch.arange(3), torch.tensor(1), torch.tensor(0), 2, 4, 4, 16, kind, 0)


def noise():
    for like in (torch.empty(3, 4), torch.empty(0, 2, dtype=torch.bfloat16)):
        yield str(tuple(like.shape)), (like, 5, 2, 1)
    yield "draw on the device", (torch.empty(3), 5, 0, 1, torch.tensor(2))


def _patches():
    """Videos of 2 x 2 x 2 patches, of both layouts and kinds of pixels, and the ids of some."""
    ids = torch.tensor([[0, 2, 5, 6], [1, 3, 4, 7]], dtype=torch.int32)
    first = torch.randint(256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    yield "channels first", first, ids
    yield "channels last", first.permute(0, 1, 3, 4, 2).contiguous(), ids
    yield "float", (first / 255).requires_grad_(), ids.long()


def patch_embed():
    table, fp32 = (leaf(6), leaf(8, 6), leaf(2, 6)), torch.float32
    for pixels, video, ids in _patches():
        inputs = video, ids, leaf(6, 96)
        yield f"{pixels}, nothing more", (*inputs, None, None, None, PATCH, MEAN, STD, False, False, fp32)
        for per_frame in (False, True):
            yield f"{pixels}, {per_frame=}", (*inputs, *table, PATCH, MEAN, STD, per_frame, False, fp32)
    yield "equal frames", (*inputs, *table, PATCH, MEAN, STD, True, True, fp32)
    yield "empty frames", (*inputs, None, None, None, PATCH, MEAN, STD, True, False, fp32)
    table = leaf(6), leaf(4, 6), leaf(1, 6)
    yield "bf16", (*inputs, *table, PATCH, MEAN, STD, False, False, torch.bfloat16)


def patch_embed_backward():
    for mode, args in patch_embed():
        video, ids, weight, _, position, prefix, *rest, _ = plain(*args)
        grad = torch.randn_like(torch.ops.smaug.patch_embed(*plain(*args))[0])
        rows = (0 if x is None else x.shape[0] for x in (position, prefix))
        yield mode, (grad, video, ids, weight, *rows, *rest, video.is_floating_point())


def _moved():
    """(x (T, D), ids, cu_seqlens) packed with a tail, and as one tensor."""
    x, cu_seqlens = packed([3, 0, 1, 3], 6, tail=2)
    ids = torch.tensor([0, 3, 4, -1, 2, 0, 4, 1, 1], dtype=torch.int32)
    yield "packed", x.requires_grad_(), ids, cu_seqlens
    yield "one tensor", leaf(4, 2, 6), torch.tensor([[0, 3], [1, 2], [0, 1], [3, 4]]), None


def gather_tokens():
    for mode, _, ids, cu_seqlens in _moved():
        yield mode, (leaf(4, 5, 6), ids, cu_seqlens)


def scatter_tokens():
    for mode, x, ids, cu_seqlens in _moved():
        yield f"{mode}, zeros", (x, ids, 5, None, cu_seqlens)
        yield f"{mode}, filled", (x, ids, 5, leaf(6), cu_seqlens)


def scatter_fill_grad():
    for mode, _, ids, cu_seqlens in _moved():
        yield mode, (torch.randn(4, 5, 6), ids, cu_seqlens)


def select_tokens():
    ids, size = torch.arange(20, dtype=torch.int32), torch.ones(20)
    hows = {  # keep, ratio, mass, uniform, rows of the result, of ids_kept and of ids_dropped
        "uniform": (2, -1, -1.0, True, [16, 12, 8]),
        "count": (2, -1, -1.0, False, [16, 12, 20]),
        "ratio": (-1, 32768, -1.0, False, [20, 16, 20]),
        "mass": (-1, -1, 0.5, False, [13, 13, 20]),
        "a tail": (2, -1, -1.0, False, [30, 12, 20]),
    }
    for name, (keep, ratio, mass, uniform, sizes) in hows.items():
        cu_seqlens = offsets([5, 5, 5, 5] if uniform else [7, 0, 9, 2])
        for fuse, scores in (("mean", leaf(20)), ("sum", leaf(20)), ("mean", torch.rand(20)), ("", torch.rand(20))):
            if fuse == "sum" and name not in ("uniform", "count"):
                continue
            rows = [sizes[0] - (4 if uniform and not fuse else 0), *sizes[1:]]
            rest = 1, keep, ratio, mass, fuse, uniform, rows
            mode = f"{name}, {fuse=}, scores that {'learn' if scores.requires_grad else 'do not'}"
            yield mode, (leaf(20, 3), scores, cu_seqlens, ids, size, *rest)


def select_tokens_backward():
    for mode, args in select_tokens():
        values, scores, cu_seqlens, *_, fuse, uniform, _ = plain(*args)
        out = torch.ops.smaug.select_tokens(*plain(*args))
        of_scores = (values, scores) if args[1].requires_grad else (None, None)
        yield mode, (torch.randn_like(out[0]), *of_scores, cu_seqlens, out[5], *out[7:], fuse, uniform)


def attention():
    (q, cu_q), (k, cu_k), (v, _) = (packed(n, 4, 16, tail=2, seed=len(n)) for n in ([3, 0, 5], [4, 2, 7, 1], [14, 0]))
    q, k, v = (x.nan_to_num().requires_grad_() for x in (q, k, v))
    own = cu_k, cu_k, None
    one, many = torch.tensor([1, 3, 0]).int(), torch.tensor([[0, -1], [2, 2], [3, 1]]).int()
    yield "self", (k, k, v, *own, None, None, 0.25, "", [], [])
    yield "self, cls scores", (k, k, v, *own, None, leaf(16), 0.25, "cls", [], [])
    yield "lengths known", (k[:14], k[:14], v[:14], *own, None, None, 0.25, "mean", [4, 2, 7, 1], [4, 2, 7, 1])
    grouped = k[:, :2], v[:, :2]
    yield "cross, grouped heads", (q, *grouped, cu_q, cu_k[:4], None, leaf(3, 1), None, 0.25, "mean", [], [])
    yield "kv_ids", (q, k, v, cu_q, cu_k, one, None, None, 0.25, "cls", [], [])
    yield "everything", (q, *grouped, cu_q, cu_k, many, leaf(3, 2), leaf(16), 0.25, "mean", [], [])


def attention_backward():
    for mode, args in attention():
        q, k, v, *rest, scale, _, lengths_q, lengths_k = plain(*args)
        o, lse, _ = torch.ops.smaug.attention(*plain(*args))
        tail = scale, any(x is not None for x in args[6:8]), lengths_q, lengths_k
        for given, grads in (("o", (o, None)), ("lse", (None, lse)), ("both", (o, lse))):
            # the gradient of an lse of a query with no key is not read
            yield f"{mode}, gradient of {given}", (*grads, q, k, v, o, lse, *rest, *tail)


def pixel_loss():
    for pixels, video, ids in _patches():
        for normalise in ("patch", "patch_channel", "")[: 1 if pixels == "channels last" else 3]:
            yield f"{pixels}, {normalise=}", (leaf(2, 4, 96), video.detach(), ids, PATCH, normalise, True)
    yield "no gradient", (torch.randn(2, 4, 96), video.detach(), ids, PATCH, "patch", False)


def pixel_loss_backward():
    yield "the only mode", (torch.tensor(2.0), torch.randn(2, 4, 96))


MODES = {
    make.__name__: make
    for make in (
        random_mask, noise, patch_embed, patch_embed_backward, gather_tokens, scatter_tokens, scatter_fill_grad,
        select_tokens, select_tokens_backward, attention, attention_backward, pixel_loss, pixel_loss_backward,
    )
}  # fmt: skip


LONG = "select_tokens", "patch_embed", "attention"  # five seconds each


@pytest.mark.parametrize("op", [pytest.param(op, marks=pytest.mark.slow if op in LONG else ()) for op in OPS])
def test_opcheck(op, subtests):
    """Of a reference, which is the same function under a name of its own, in the first mode only. Tracing, which takes
    most of the time, of a backward in its first mode: it has no gradient, and its op's own tracing runs it in all."""
    modes = list(MODES[op.removesuffix("_reference")]())
    for number, (mode, args) in enumerate(modes[:1] if op.endswith("_reference") else modes):
        tracing = () if op.endswith("_backward") and number else ("test_aot_dispatch_dynamic",)
        with subtests.test(mode):
            torch.library.opcheck(
                getattr(torch.ops.smaug, op), args, rtol=1e-3, atol=1e-3,
                test_utils=("test_schema", "test_autograd_registration", "test_faketensor", *tracing),
            )  # fmt: skip


def test_every_registered_op_has_its_modes():
    assert {op.removesuffix("_reference") for op in OPS} == set(MODES)
