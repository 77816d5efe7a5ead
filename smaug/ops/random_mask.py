"""Which patches stay: random masks from a counter, the same on every device and for every split of the batch."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from smaug.ops.implementation import reference_of, refuse

Kind = Literal["random", "tube", "block", "frame"]

_LOW32 = 0xFFFFFFFF
_OFFSET_ID = 0xFFFFFFFF  # the counter id whose words place the lattice of "block"; no patch has it


def keep_count(n: int, ratio: float) -> int:
    """How many of n stay when ``ratio`` of them is masked: ``max(1, floor((1 - ratio) * n + 1e-6))``.

    A plain int() would turn 10 * (1 - .9) into 0.
    """
    return max(1, math.floor((1 - ratio) * n + 1e-6))


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of constant * x, both unsigned 32-bit numbers held in int64."""
    # below 2^64: where the sign bit is set, the 64 bits are still those of the product
    product = constant * x
    return (product >> 32) & _LOW32, product & _LOW32


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011): four words of a counter and two of a key -> four random words.

    All are unsigned 32-bit numbers in int64 tensors that broadcast. Bit-equal to Random123 and to Triton's philox.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_ in range(10):
        if round_:
            k0, k1 = (k0 + 0x9E3779B9) & _LOW32, (k1 + 0xBB67AE85) & _LOW32
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def _lowest(word: Tensor, keep: int, units: Tensor) -> tuple[Tensor, Tensor]:
    """Units (U,) with the lowest (word (B, U), unit), and the others; both ascending."""
    # one unique sort key: 32 bits of word above 31 bits of unit
    order = ((word << 31) | units).sort(dim=1).values & 0x7FFFFFFF
    return order[:, :keep].sort(dim=1).values, order[:, keep:].sort(dim=1).values


@torch.library.custom_op("smaug::random_mask", mutates_args=())
def _random_mask(
    samples: Tensor,
    seed: Tensor,
    draw: Tensor,
    frames: int,
    rows: int,
    columns: int,
    keep: int,
    kind: str,
    stream: int,
) -> tuple[Tensor, Tensor]:
    device = samples.device
    n = rows * columns
    sample = samples[:, None]
    key = (seed & _LOW32, (seed >> 32) & _LOW32)
    word1 = (stream | (draw << 8)) & _LOW32

    def words(ids: Tensor) -> tuple[Tensor, ...]:
        return philox((ids & _LOW32, word1, sample & _LOW32, (sample >> 32) & _LOW32), key)

    if kind == "tube":
        units = torch.arange(n, device=device)
        parts = _lowest(words(units)[0], keep // frames, units)
        first = torch.arange(frames, device=device)[:, None] * n
        ids = [(first + part[:, None, :]).flatten(1) for part in parts]
    elif kind == "frame":
        units = torch.arange(frames, device=device)
        parts = _lowest(words(units)[0], keep // n, units)
        patch = torch.arange(n, device=device)
        ids = [(part[:, :, None] * n + patch).flatten(1) for part in parts]
    elif kind == "block":
        side = _block_side(rows, columns)
        offset = words(torch.full((1,), _OFFSET_ID, dtype=torch.int64, device=device))
        units = torch.arange(frames * n, device=device)
        row, column = units % n // columns, units % columns
        block = (row + offset[0] % side) // side * (columns // side + 2) + (column + offset[1] % side) // side
        ids = list(_lowest(words(block)[0], keep, units))
    else:
        units = torch.arange(frames * n, device=device)
        ids = list(_lowest(words(units)[0], keep, units))
    return ids[0].to(torch.int32), ids[1].to(torch.int32)


@_random_mask.register_fake
def _(
    samples: Tensor,
    seed: Tensor,
    draw: Tensor,
    frames: int,
    rows: int,
    columns: int,
    keep: int,
    kind: str,
    stream: int,
) -> tuple[Tensor, Tensor]:
    b, n = samples.shape[0], frames * rows * columns
    return samples.new_empty((b, keep), dtype=torch.int32), samples.new_empty((b, n - keep), dtype=torch.int32)


_random_mask_reference = reference_of(_random_mask)


def _block_side(rows: int, columns: int) -> int:
    return max(1, min(rows, columns) // 4)


def _host_scalar(value: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(torch.int64)
    value &= 0xFFFFFFFFFFFFFFFF
    # int64 holds the same 64 bits; full() fills on the device, tensor(list) would copy
    return torch.full((), value - (1 << 64) if value >> 63 else value, dtype=torch.int64, device=device)


def random_mask(
    samples: Tensor,
    grid: tuple[int, int] | tuple[int, int, int],
    keep: int,
    *,
    kind: Kind = "random",
    seed: int | Tensor,
    draw: int | Tensor = 0,
    stream: int = 0,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The patches that stay and those that go -> ids_keep (B, K), ids_removed (B, F * N - K), int32, ascending.

    samples  (B,) int64, global sample numbers. A row depends on nothing else of the batch.
    grid     (F, N) or (F, rows, columns); an id is frame * N + patch.
    keep     K, a host int a clip; from a ratio by `keep_count`.
    seed     int or int64 tensor () on the device; draw likewise: the epoch, a new mask each time a sample is seen.
    stream   0 video, 1 text, 2 partial decoder.

    Philox4x32-10, key (seed low, seed high), counter (id, stream | draw << 8, sample low, sample high). Units rank by
    (word 0 as unsigned 32 bits, id); the lowest stay.

    "random"  the unit is a patch, id = frame * N + patch.
    "tube"    the unit is a position in the frame, the same in all frames (VideoMAE); keep is a multiple of F.
    "frame"   the unit is a whole frame; keep is a multiple of N.
    "block"   the unit is a square that lasts through all frames, so that motion leaks nothing (as in V-JEPA). With
              b = max(1, min(rows, columns) // 4) and words w of the counter id 2^32 - 1,
                  square = ((row + w0 % b) // b) * (columns // b + 2) + (column + w1 % b) // b;
              patches rank by (word 0 of the id "square", frame * N + patch). The count is exact: the last square
              may be cut. Needs a grid with rows and columns.

    No host read; works on meta. Two sorts of (B, F * N) int64. 0 < keep <= F * N.
    """
    if len(grid) == 3:
        frames, rows, columns = grid
    else:
        (frames, columns), rows = grid, 1
        if kind == "block":
            raise ValueError('kind="block" needs the rows and columns of a frame; pass grid=(F, rows, columns).')
    n = rows * columns
    if kind not in ("random", "tube", "block", "frame"):
        raise ValueError(f'kind={kind!r} is unknown; use "random", "tube", "block" or "frame".')
    if not 0 < keep <= frames * n:
        raise ValueError(f"keep={keep} must be at least 1 and at most the {frames * n} patches of a clip.")
    if kind == "tube" and keep % frames:
        raise ValueError(f'kind="tube" keeps the same patches in all {frames} frames; keep={keep} must be a multiple.')
    if kind == "frame" and keep % n:
        raise ValueError(f'kind="frame" keeps whole frames of {n} patches; keep={keep} must be a multiple.')
    if samples.ndim != 1:
        raise ValueError(f"samples must be (B,), one number a clip, but is {tuple(samples.shape)}.")
    device = samples.device
    refuse(impl, "random_mask", samples)
    op = _random_mask_reference if impl == "reference" else _random_mask
    return op(
        samples.to(torch.int64),
        _host_scalar(seed, device),
        _host_scalar(draw, device),
        frames,
        rows,
        columns,
        keep,
        kind,
        stream,
    )


def _flops(*args: object, out_val: object = None, **kwargs: object) -> int:
    return 0  # integer work only


FLOPS = {
    torch.ops.smaug.random_mask: _flops,
    torch.ops.smaug.random_mask_reference: _flops,
}
