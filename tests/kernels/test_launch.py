import json
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from smaug.kernels import launch, pixel_loss

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.static import cases

del sys.path[0]  # or transformers finds our folder `kernels`, takes it for its own package and fails


@triton.jit(do_not_specialize=["n"])
def scale(x, y, n, by, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n).to(tl.float32) * by, mask=i < n)


def test_a_recorded_launch_compiles_for_every_architecture():
    x, y = torch.empty(64, device="meta", dtype=torch.bfloat16), torch.empty(64, device="meta")
    with launch.record(90) as launches:
        assert launch.architecture() == 90
        launch.launch(scale, (4,), x, y, 64, 0.5, BLOCK=16, num_warps=2)
    assert [(found.name, found.grid) for found in launches] == [("scale", (4,))]
    for capability in (80, 86, 89, 90, 100):
        built = launch.compile_for(launches[0], capability)
        assert built.metadata.target.arch == capability and built.metadata.num_warps == 2
        assert len(built.asm["cubin"]) > 1000


@pytest.fixture
def configure(monkeypatch, tmp_path):
    """configure(kernels) makes launchers read them from a file."""

    def configure(kernels):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(kernels if isinstance(kernels, str) else json.dumps(kernels))
        monkeypatch.setenv(launch.VARIABLE, str(path))
        return path

    return configure


def test_every_setting_of_every_kernel_reaches_its_launch(configure):
    """And SETTINGS names them all: a launch of another kernel, or a tile size it lacks, would show here."""
    plain = cases.recorded(80)
    configure({name: [dict.fromkeys((*settings, "num_warps"), 16)] for name, settings in launch.SETTINGS.items()})
    seen = set()
    for (case, before), (_, after) in zip(plain, cases.recorded(80), strict=True):
        if not case.ours:
            continue
        seen.add(after.name)
        constants = {parameter.name for parameter in after.kernel.params if parameter.is_constexpr}
        wanted = {*launch.SETTINGS[after.name], "num_warps"}
        assert wanted <= constants | {"num_warps"}
        assert {name: after.meta[name] for name in wanted} == dict.fromkeys(wanted, 16), after.name
        kept = {name for name in before.meta if name in constants - wanted} - {"BLOCK_M"}  # of dq, in the sum of biases
        assert {name: after.meta[name] for name in kept} == {name: before.meta[name] for name in kept}, after.name
    assert seen == set(launch.SETTINGS)


def test_the_first_entry_whose_conditions_hold_counts(configure):
    entries = [
        {"architecture": 90, "width": 64, "dtype": "bfloat16", "num_warps": 8},
        {"architecture": 90, "width": 64, "num_warps": 2},
        {"width": 32, "num_stages": 1, "maxnreg": 80},
    ]
    configure({"_scale": entries})

    def chosen(architecture, dtype, width):
        with launch.record(architecture):
            return launch.configured(pixel_loss._scale, dict(BLOCK=64, num_warps=4), dtype, width)

    assert chosen(90, torch.bfloat16, 64) == dict(BLOCK=64, num_warps=8)
    assert chosen(90, torch.float16, 64) == dict(BLOCK=64, num_warps=2)
    assert chosen(80, torch.bfloat16, 64) == dict(BLOCK=64, num_warps=4)
    assert chosen(80, torch.bfloat16, 32) == dict(BLOCK=64, num_warps=4, num_stages=1, maxnreg=80)


@pytest.mark.parametrize(
    ("kernels", "sentence"),
    [
        ("{", r"0.json is no JSON: .*line 1.*; correct it or unset SMAUG_KERNEL_CONFIG\.$"),
        ([], "must be an object of kernels"),
        ({"attention": []}, "there is no kernel 'attention'; the kernels are attention_forward, "),
        ({"_embed": {"BLOCK_M": 64}}, "_embed must be a list of entries"),
        ({"_embed": [{}, {"BLOCK_N": 64}]}, r"_embed\[1\] has 'BLOCK_N', .* it knows BLOCK_M, BLOCK_D, BLOCK_K, num_w"),
        ({"_embed": [{"BLOCK_M": 48}]}, r"_embed\[0\]: BLOCK_M is 48; Triton takes powers of two"),
        ({"_embed": [{"num_stages": "3"}]}, "num_stages is '3'; give a positive integer"),
        ({"_embed": [{"dtype": "bf16"}]}, "dtype 'bf16' is none; name one of torch"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(configure, kernels, sentence):
    configure(kernels)
    with launch.record(80), pytest.raises(ValueError, match=sentence):
        launch.configured(scale, {}, torch.float32, 1)


def test_a_file_that_is_not_there(monkeypatch):
    monkeypatch.setenv(launch.VARIABLE, "/nowhere/a.json")
    with (
        launch.record(80),
        pytest.raises(ValueError, match=r"SMAUG_KERNEL_CONFIG=/nowhere/a.json cannot be read: No such file"),
    ):
        launch.configured(scale, {}, torch.float32, 1)
