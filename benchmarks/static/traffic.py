"""What a launch asks of the tensor cores and of memory: counted program by program under Triton's interpreter.

    issued   FLOPs of all products, with their padding, over those of the formula: 4 * E a pair of query and key for
             attention forward, 6 and 8 backward, 2 for scores; 2 * rows * P * D for patch_embed
    moved    bytes that loads and stores ask for, as if there were no cache, over the bytes of the places that they
             touch, each once: what a cache that forgets nothing would read and write. Masked lanes count for nothing,
             and sectors of 32 bytes that are read in part count for what is asked of them.

Both depend on tile sizes and lengths alone, not on a device. Attention has them for eight sequences of 12 to 96 tokens,
and as issued_197, moved_197 for one of 197; other kernels for their case. Rows that the yardstick pads are neither
useful nor needed. fp16 stands for bf16, which the interpreter does not have. Of patch_embed the interpreter would take
too long: `_embed` and `_dweight` have the same numbers from their grids and trips, which the tests compare with it on a
small case; `_tables` and `_dvideo` have none.

The interpreter must be chosen before Triton is imported, so `counts` runs this file as a process of its own.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.static import cases
from smaug.kernels import launch
from smaug.kernels.launch import Launch
from smaug.ops.warmup import OnKernels

COLUMNS = ("issued", "moved", "issued_197", "moved_197")
_BUFFER = 1 << 22  # addresses that are kept before those that repeat are dropped


def name(case: str, launched: Launch) -> str:
    """What the counts of a launch depend on: kernel, case, constants, sizes of its types."""
    parameters = inspect.signature(launched.kernel.fn).parameters
    constants = " ".join(
        f"{name}={value}"
        for name, value in launched.meta.items()
        if name in parameters and "constexpr" in str(parameters[name].annotation)
    )
    kinds = [str(x.dtype).replace("bfloat16", "float16") for x in launched.args if isinstance(x, torch.Tensor)]
    return f"{launched.name} ({case}) {constants} {' '.join(kinds)}"


def counts(wanted: Iterable[str]) -> dict[str, dict[str, float]]:
    """By name, COLUMNS of the launches wanted; a column that says nothing of a kernel is missing."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "benchmarks.static.traffic"]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command,
        input=json.dumps(list(wanted)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
        cwd=root,
    )
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


class _Work:
    """Counts what the interpreter does for one kernel."""

    def __init__(self) -> None:
        self.flops = self.bytes = 0
        self._touched: dict[tuple[str, int], list[np.ndarray]] = {}  # addresses by (load or store, bytes of an element)

    def access(self, what: str, pointers: Any, mask: Any) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        lanes = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)  # some masks are integers
        addresses = np.asarray(pointers.data)[lanes]
        self.bytes += size * addresses.size
        buffer = self._touched.setdefault((what, size), [])
        buffer.append(np.unique(addresses))
        if sum(len(part) for part in buffer) > _BUFFER:
            buffer[:] = [np.unique(np.concatenate(buffer))]

    def product(self, a: Any, b: Any) -> None:
        self.flops += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]

    def touched(self) -> int:
        return sum(size * len(np.unique(np.concatenate(parts))) for (_, size), parts in self._touched.items())


def _pairs(values: dict[str, Any]) -> int:
    """Pairs of a query and a key that it attends to, of one head."""
    if "lengths" in values:  # padded
        return int((values["lengths"].long() ** 2).sum())
    queries, keys = values["cu_q"].diff().long(), values["cu_k"].diff().long()
    ids = values["kv_ids"]
    if ids is None:
        return int((queries * keys).sum())
    ids = ids.long().reshape(len(queries), -1)
    return int((queries[:, None] * torch.where(ids >= 0, keys[ids.clamp(min=0)], 0)).sum())


def _useful(launched: Launch, values: dict[str, Any]) -> int:
    """FLOPs of the formula."""
    kernel, grid = launched.name, launched.grid
    if kernel in ("_embed", "_dweight", "_dvideo"):  # in tests: a small case
        return int(2 * values["rows"] * values["d"] * 3 * values["T"] * values["PH"] * values["PW"])
    products = {"forward": 2, "queries": 3, "keys": 4}.get(kernel.rpartition("_")[2], 0)
    if kernel == "attention_scores":
        heads, products = values["heads"], 1
        if values["FIRST_ONLY"]:
            values = values | {"cu_q": torch.arange(len(values["cu_q"]))}
    elif kernel.startswith("padded_"):
        heads = values["heads"]
    else:
        heads = grid[1] * (values["GROUP"] if kernel == "attention_backward_keys" else 1)
    return int(2 * products * heads * values["E"] * _pairs(values))


def _needed(launched: Launch, values: dict[str, Any], touched: int) -> int:
    if not launched.name.startswith("padded_"):
        return touched
    real = values["lengths"]
    sequences = len(real)
    wide = [x for x in launched.args if isinstance(x, torch.Tensor) and x.dim() > 1]
    a_row = sum(x.element_size() * x.numel() // (sequences * x.shape[2]) for x in wide)  # of all heads, all tensors
    return a_row * int(real.sum()) + real.element_size() * sequences


def of_patch_embed(launched: Launch) -> dict[str, float]:
    """issued and moved of `_embed` and `_dweight`, the prefix and cu_seqlens left out: they are a row in a hundred."""
    values = dict(zip(launched.kernel.arg_names, launched.args, strict=False)) | launched.meta
    rows, d, p = values["rows"], values["d"], 3 * values["T"] * values["PH"] * values["PW"]
    size = {each: x.element_size() for each, x in values.items() if isinstance(x, torch.Tensor)}

    def tiles(count: int, block: str) -> int:
        return -(-count // values[block])

    m, n = tiles(rows, "BLOCK_M"), tiles(d, "BLOCK_D")
    pixels = rows * p * size["video"]
    if launched.name == "_embed":
        k = tiles(p, "BLOCK_K") * values["BLOCK_K"]
        out = rows * (d * size["values"] + 8)  # and ids and sizes
        own = rows * d * size["position"] if values["position"] is not None else 0
        table = min(own, values["position"].numel() * size["position"]) if own else 0
        weights = d * p * size["weight"] + d * size.get("bias", 0)
        asked = n * (pixels + 4 * rows) + m * weights + own + out
        least = pixels + 4 * rows + weights + table + out
    else:
        k_tiles = tiles(p, "BLOCK_P")
        k = k_tiles * values["BLOCK_P"]
        splits = launched.grid[0] // (n * k_tiles)
        grad, out = rows * d * size["grad"], splits * d * (p + 1) * 4
        # the first tile of P reads grad, and ids, once more for the bias
        asked = n * (k_tiles + 1) * 4 * rows + n * pixels + (k_tiles + 1) * grad + out
        least = 4 * rows + pixels + grad + out
    return {
        "issued": m * values["BLOCK_M"] * n * values["BLOCK_D"] * k / (rows * d * p),
        "moved": asked / least,
    }


def counted(run: Callable[[], None]) -> list[tuple[Launch, float | None, float]]:
    """Runs launches under the interpreter -> each with issued (None without products) and moved."""
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    found: list[tuple[Launch, float | None, float]] = []
    hooked = ("create_masked_load", "create_masked_store", "create_dot")
    plain = {each: getattr(InterpreterBuilder, each) for each in hooked}
    start = InterpretedFunction.run
    work = _Work()

    def load(builder: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        work.access("load", pointers, mask)
        return plain["create_masked_load"](builder, pointers, mask, *rest, **named)

    def store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        work.access("store", pointers, mask)
        return plain["create_masked_store"](builder, pointers, value, mask, *rest, **named)

    def dot(builder: Any, a: Any, b: Any, acc: Any, *rest: Any, **named: Any) -> Any:
        work.product(a, b)
        return acc  # no address depends on a product, and numpy's in fp16 take most of the time

    def started(kernel: Any, *args: Any, grid: Any, warmup: bool, **meta: Any) -> Any:
        nonlocal work
        work = _Work()
        out = start(kernel, *args, grid=grid, warmup=warmup, **meta)
        launched = Launch(kernel, grid, args, meta)
        values = dict(zip(kernel.arg_names, args, strict=False)) | meta
        issued = work.flops / _useful(launched, values) if work.flops else None
        found.append((launched, issued, work.bytes / _needed(launched, values, work.touched())))
        return out

    for each, hook in zip(hooked, (load, store, dot), strict=True):
        setattr(InterpreterBuilder, each, hook)
    InterpretedFunction.run = started
    try:
        with OnKernels():
            run()
    finally:
        for each, method in plain.items():
            setattr(InterpreterBuilder, each, method)
        InterpretedFunction.run = start
    return found


def _all(wanted: set[str]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for architecture in cases.ARCHITECTURES:
        for case in cases.cases():
            with launch.record(architecture) as launches, OnKernels():
                case.run()
            names = {name(case.name, launched): launched for launched in launches}
            names = {each: launched for each, launched in names.items() if each in wanted and each not in found}
            if any(launched.name == "_embed" for launched in launches):
                for each, launched in names.items():
                    numbers = of_patch_embed(launched) if launched.name in ("_embed", "_dweight") else {}
                    found[each] = {column: round(number, 2) for column, number in numbers.items()}
            elif names:
                attention = any("attention" in each or each.startswith("padded") for each in names)
                for suffix, lengths in (("", cases.RAGGED), ("_197", cases.EVEN))[: 1 + attention]:
                    launch._architecture, cases.device, cases.lengths = architecture, "cpu", lengths
                    for launched, issued, moved in counted(case.run):
                        row = found.setdefault(name(case.name, launched), {})
                        row |= {f"moved{suffix}": round(moved, 2)}
                        row |= {f"issued{suffix}": round(issued, 2)} if issued else {}
                    launch._architecture, cases.device, cases.lengths = None, "meta", cases.RAGGED
    return {each: row for each, row in found.items() if each in wanted}


if __name__ == "__main__":
    print(json.dumps(_all(set(json.load(sys.stdin)))))
