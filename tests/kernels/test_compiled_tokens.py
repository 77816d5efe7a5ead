"""The mask, gather and select kernels as a GPU would run them: launches counted, built offline, and their code read."""

import pytest
import torch

from smaug.kernels import cubin, gather_tokens, launch, noise, random_mask, select_tokens

ARCHITECTURES = [80, 90]
SEQUENCES = 1024


def meta(*shape, dtype=torch.int32):
    return torch.empty(shape, dtype=dtype, device="meta")


def launches_of(f, architecture, *names):
    """What f launches, which must be these kernels."""
    with launch.record(architecture) as launches:
        f()
    assert tuple(found.name for found in launches) == names
    return launches


def built(found, architecture):
    """The compiled launch, after the checks that hold for every kernel."""
    kernel = launch.compile_for(found, architecture)
    assert not cubin.atomics(kernel), f"{found.name} for {architecture}: {cubin.atomics(kernel)}"
    used = cubin.resources(kernel)
    assert used["STACK"] == used["LOCAL"] == 0, f"{found.name} for {architecture} spills: {used}"
    assert used["REG"] <= 168, (
        f"{found.name} for {architecture}: {used['REG']} registers leave no room for a third block"
    )
    return kernel


def moves_wide(kernel, stores=True):
    """Whether rows are moved by 128 bits a thread."""
    code = cubin.listing(kernel)
    return "LDG.E.128" in code and (not stores or "STG.E.128" in code)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_noise(architecture):
    """One compiled kernel for every seed and step, and one for every step that is on the device."""
    like, there = meta(128, 128, dtype=torch.float32), meta(dtype=torch.int64)
    for on_device in (None, there):
        found = []
        for seed, draw in ((0, 0), (2**40 + 1, 16), (-1, 2**23)):
            found += launches_of(lambda: noise.noise(like, seed, draw, 3, on_device), architecture, "_noise")  # noqa: B023
            built(found[-1], architecture)
        assert len({launch.specialisation(each, architecture) for each in found}) == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_mask(architecture):
    for kind, grid, keep in (("random", (8, 14, 14), 157), ("tube", (16, 16, 16), 416), ("random", (16, 16, 16), 410)):
        args = meta(SEQUENCES, dtype=torch.int64), meta(dtype=torch.int64), meta(dtype=torch.int64)
        (found,) = launches_of(lambda: random_mask.random_mask(*args, *grid, keep, kind, 0), architecture, "_mask")  # noqa: B023
        assert found.grid == (SEQUENCES,)
        built(found, architecture)


def test_random_mask_of_the_other_kinds_and_the_largest():
    args = meta(64, dtype=torch.int64), meta(dtype=torch.int64), meta(dtype=torch.int64)
    for kind, grid, keep in (("block", (8, 14, 14), 157), ("frame", (32, 16, 16), 1024)):
        (found,) = launches_of(lambda: random_mask.random_mask(*args, *grid, keep, kind, 0), 90, "_mask")  # noqa: B023
        built(found, 90)


@pytest.mark.parametrize(
    ("architecture", "d", "dtype", "packed"),
    [(80, 768, torch.bfloat16, True), (90, 768, torch.bfloat16, True), (90, 1408, torch.float16, False),
     (80, 72, torch.float16, False)],
)  # fmt: skip
def test_gather_tokens(architecture, d, dtype, packed):
    n, k = 1568, 157
    ids = meta(SEQUENCES * k) if packed else meta(SEQUENCES, k)
    cu = meta(SEQUENCES + 1) if packed else None
    grid, x, fill = meta(SEQUENCES, n, d, dtype=dtype), meta(*ids.shape, d, dtype=dtype), meta(d, dtype=torch.float32)
    (gather,) = launches_of(lambda: gather_tokens.gather_tokens(grid, ids, cu), architecture, "_gather")
    (scatter,) = launches_of(lambda: gather_tokens.scatter_tokens(x, ids, n, fill, cu), architecture, "_scatter")
    assert moves_wide(built(gather, architecture)) and moves_wide(built(scatter, architecture))
    of_a_split, of_all = launches_of(
        lambda: gather_tokens.scatter_fill_grad(grid, ids, cu),
        architecture,
        "_fill_grad_of_a_split",
        "_fill_grad_of_all",
    )
    built(of_all, architecture)
    assert moves_wide(built(of_a_split, architecture), stores=False)


def select(keep, ratio, mass, fuse, uniform, dtype, d=768, capacity=None, for_scores=True):
    """Calls forward and backward of 1,024 frames of 197 tokens."""
    rows = SEQUENCES * 197
    kept = SEQUENCES * (1 + keep)
    sizes = [kept + (SEQUENCES if fuse else 0), kept, rows - kept] if uniform else [capacity or rows] * 2 + [rows]
    values, scores, cu = meta(rows, d, dtype=dtype), meta(rows, dtype=torch.float32), meta(SEQUENCES + 1)
    size = meta(rows, dtype=torch.float32)
    out = select_tokens.select_tokens(values, scores, cu, meta(rows), size, 1, keep, ratio, mass, fuse, uniform, sizes)
    of_scores = (values, scores) if for_scores else (None, None)
    select_tokens.select_tokens_backward(
        meta(sizes[0], d, dtype=dtype), *of_scores, cu, out[5], *out[7:], fuse, uniform
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_select_tokens(architecture):
    """The main path: a count of uniform frames, detached scores."""
    forward, backward = launches_of(
        lambda: select(137, -1, -1.0, "mean", True, torch.bfloat16, for_scores=False),
        architecture,
        "_select",
        "_backward",
    )
    assert forward.grid == backward.grid == (SEQUENCES, 3)
    assert moves_wide(built(forward, architecture)) and moves_wide(built(backward, architecture))


def test_select_tokens_of_ragged_groups_with_a_gradient_to_the_scores():
    forward, backward = launches_of(
        lambda: select(-1, 45875, -1.0, "sum", False, torch.float16, d=1408), 90, "_select", "_backward"
    )
    assert moves_wide(built(forward, 90)) and moves_wide(built(backward, 90))


def test_select_tokens_by_mass():
    mass, forward, backward = launches_of(
        lambda: select(-1, -1, 0.9, "mean", False, torch.bfloat16, capacity=100_000),
        80,
        "_mass",
        "_select",
        "_backward",
    )
    assert mass.grid == (SEQUENCES,) and forward.grid == (select_tokens.CUTTERS, 3)
    built(mass, 80)
    assert moves_wide(built(forward, 80)) and moves_wide(built(backward, 80))
