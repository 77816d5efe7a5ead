"""The launches of patch_embed and pixel_loss at ViT-B/16 shapes, compiled without a GPU and looked at."""

import re

import pytest
import torch

import smaug.ops  # noqa: F401  before the kernels: it defines the ops they are registered for
from smaug.kernels import cubin, launch
from smaug.kernels.patch_embed import patch_embed, patch_embed_backward
from smaug.kernels.pixel_loss import pixel_loss, pixel_loss_backward

PRODUCT = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
CLIPS, FRAMES, KEEP, REMOVED, D, PATCH = 64, 16, 157, 1411, 768, (2, 16, 16)
MEAN, STD = (0.48, 0.45, 0.40), (0.22, 0.23, 0.25)


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def recorded(architecture, last, pixels=torch.uint8, dtype=torch.bfloat16, per_frame=False):
    """-> launches of patch_embed forward, backward, of pixel_loss forward, backward."""
    picture = (224, 224, 3) if last else (3, 224, 224)
    video = meta(CLIPS, FRAMES, *picture, dtype=pixels)
    ids, removed = (meta(CLIPS, n, dtype=torch.int32) for n in (KEEP, REMOVED))
    weight, bias, position, prefix = (meta(*s, dtype=dtype) for s in ((D, 1536), (D,), (KEEP + REMOVED, D), (1, D)))
    rest = PATCH, MEAN, STD, per_frame, False
    parts = []
    with launch.record(architecture) as launches:

        def part():
            parts.append(launches[sum(map(len, parts)) :])

        values = patch_embed(video, ids, weight, bias, position, prefix, *rest, dtype)[0]
        part()
        patch_embed_backward(values, video, ids, weight, KEEP + REMOVED, 1, *rest, pixels != torch.uint8)
        part()
        loss, difference = pixel_loss(meta(CLIPS, REMOVED, 1536, dtype=dtype), video, removed, PATCH, "patch", True)
        part()
        pixel_loss_backward(loss, difference)
        part()
    return parts


def compiled(launched, architecture):
    built = launch.compile_for(launched, architecture)
    used, names = cubin.resources(built), [name for _, name in cubin.instructions(cubin.listing(built))]
    print(f"sm_{architecture} {launched.name}: {used['REG']} registers, {built.metadata.shared} bytes shared")
    assert not cubin.atomics(built), launched.name
    assert used["STACK"] == used["LOCAL"] == 0, launched.name
    assert not {"STL", "LDL"} & {name.partition(".")[0] for name in names}, launched.name
    assert built.metadata.shared <= cubin.BLOCK_BYTES[architecture]
    return built.asm["ptx"], names


def check_all(parts, architecture, last):
    """Everything that is asked of a kernel, of every launch."""
    for launched in (x for part in parts for x in part):
        ptx, names = compiled(launched, architecture)
        if launched.name in ("_embed", "_dweight", "_dvideo"):
            assert any(name.startswith(PRODUCT[architecture]) for name in names), launched.name
        if launched.name in ("_embed", "_dweight") or (launched.name == "_differences" and not last):
            # pixels 16 bytes at a time, by cp.async or to registers, and none by the byte
            assert re.search(r"cp\.async\.c\S* .* 0x10,|ld\.global\S*\.v4\.b32", ptx), launched.name
            assert not re.search(r"ld\.global\S*\.[bu]8\b", ptx), launched.name
        if launched.name == "_embed":
            assert not re.search(r"cp\.async\.c\S* .* 0x[48],", ptx), launched.name
        if launched.name in ("_differences", "_scale"):
            assert sum(name.startswith("STG.E.128") for name in names), launched.name


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("architecture", [80, *(pytest.param(each, marks=pytest.mark.slow) for each in (86, 90))])
def test_a_training_step_of_uint8_video(architecture, last):
    parts = recorded(architecture, last)
    assert [[x.name for x in part] for part in parts] == [
        ["_embed"], ["_dweight", "_tables"], ["_differences", "_mean"], ["_scale"],
    ]  # fmt: skip
    check_all(parts, architecture, last)


def test_blackwell():
    (forward, backward, *_) = recorded(100, False)
    check_all([forward, backward], 100, False)


def test_float_video_that_wants_a_gradient_and_frames_of_unknown_length():
    _, backward, *_ = recorded(90, True, torch.bfloat16, per_frame=True)
    assert [x.name for x in backward] == ["_dweight", "_tables", "_dvideo"]
    for launched in backward:
        compiled(launched, 90)
