"""The benchmarks' own parts: providers compute the same, lengths are what they say, pictures are drawn."""

import json
import sys
from pathlib import Path

import pytest
import torch

from smaug.testing import relative_error

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import attention_on_cpu, plots
from benchmarks.attention_rivals import HEADS, PROVIDERS, WIDTH, Unavailable, lengths_of

del sys.path[0]  # or transformers would take our folder `kernels` for its own package


def test_lengths():
    assert lengths_of("equal", 0.1, 3) == [21] * 3
    spread, tail = lengths_of("spread", 0.4, 2000), lengths_of("longtail", 0.4, 2000)
    assert sum(spread) / 2000 == pytest.approx(79, abs=2) and min(spread) >= 15 and max(spread) <= 143
    assert sum(tail) / 2000 == pytest.approx(79, abs=4) and min(tail) == 1 and max(tail) == 4 * 79
    assert lengths_of("spread", 0.4, 16) == spread[:16]  # the same for everybody


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("provider", [name for name in PROVIDERS if name not in ("eager_compiled", "flex")])
def test_providers_agree(provider):
    """Compiled ones are checked where they are timed: compiling takes half a minute."""
    lengths = [3, 1, 5]
    q, k, v = (torch.randn(9, HEADS, WIDTH, requires_grad=True) for _ in range(3))
    if provider in ("torch_varlen", "flash_attn", "xformers") and not torch.cuda.is_available():
        with pytest.raises(Unavailable, match=r"is not installed|takes 16-bit CUDA tensors"):
            PROVIDERS[provider](q, k, v, lengths)
        return
    got, want = (PROVIDERS[name](q, k, v, lengths)() for name in (provider, "looped_sdpa"))
    assert relative_error(got.detach(), want.detach()) < 1e-5
    grads = [torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert relative_error(a, b) < 1e-5


def test_table_of_the_race():
    point = {"dtype": "bf16", "pass": "step", "distribution": "equal", "keep": "0.4", "batch": "16"}
    rows = [
        point | {"smaug": "1", "padded_sdpa": "2", "looped_sdpa": "3", "nested_sdpa": "9", "flex": "", "eager": "0.5"},
        point | {"smaug": "2", "padded_sdpa": "9", "looped_sdpa": "1", "nested_sdpa": "9", "flex": "", "eager": "9"},
    ]
    last = attention_on_cpu.table(rows).splitlines()[-1]
    assert last.startswith("| forward and backward, bf16 | 2 | 1.00x | 0.50x (equal, 40%, 16) | 0.50x |")


def test_pictures(tmp_path, capsys):
    def row(provider, seconds):
        name = f"test_attention[{provider}]"
        info = {"shape": "4 sequences", "dtype": "bfloat16", "machine": "here"}
        stats = {"median": seconds, "min": seconds / 2}
        return {
            "name": name, "fullname": f"benchmarks/bench_attention.py::{name}", "stats": stats, "extra_info": info,
            "params": {"provider": provider, "passed": "step"},
        }  # fmt: skip

    saved = {"datetime": "2026-11-25T10:00:00", "benchmarks": [row("smaug", 0.01), row("flex", 0.2)]}
    (tmp_path / "times.json").write_text(json.dumps(saved))
    plots.main(tmp_path / "times.json", tmp_path / "out")
    assert (tmp_path / "out/bench_attention-attention-step.png").stat().st_size > 5000
    (tmp_path / "empty.json").write_text("[]")
    for bad in ("empty.json", "not there.json"):
        with pytest.raises(SystemExit, match=f"{bad} is no file that"):
            plots.main(tmp_path / bad, tmp_path)
