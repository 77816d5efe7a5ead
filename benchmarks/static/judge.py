"""What a compiled kernel asks of a multiprocessor, counted in its machine code, and what is not let through.

Everything here is static: instructions are counted where they stand in the code, not how often they run, and nothing
of it is a speed.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from smaug.kernels import cubin, launch
from smaug.kernels.launch import Launch


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor; CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    shared_kb: int
    warps: int
    blocks: int
    tensor_core: str  # what Triton's products become: one of the columns
    registers: int = 65_536  # given to a warp in units of 256
    tensor_memory: int = 512  # columns; sm_100 alone has them


LIMITS = {
    80: Limits(164, 64, 32, "hmma"),
    86: Limits(100, 48, 16, "hmma"),
    89: Limits(100, 48, 24, "hmma"),
    90: Limits(228, 64, 32, "hgmma"),
    100: Limits(228, 64, 32, "utchmma"),
}
RESERVED = 1024  # bytes of shared memory that the system takes for each block

# Kernels whose work is products of matrices. attention_scores: its tile of keys stays, and queries stream past it.
MATRIX = {
    *("_embed", "_dweight", "_dvideo"),
    *("attention_forward", "attention_scores", "attention_backward_queries", "attention_backward_keys"),
}

COUNTED = {  # by the first part of an instruction's name
    "spills": r"STL|LDL",
    "hmma": "HMMA",
    "hgmma": "HGMMA",
    "utchmma": r"UTC\w*MMA",
    "ldgsts": "LDGSTS",
    "utmaldg": "UTMALDG",
    "global": r"LDG|STG|LDGSTS",
    "mufu": "MUFU",
}
PRODUCT = rf"{COUNTED['hmma']}|{COUNTED['hgmma']}|{COUNTED['utchmma']}"


def blocks_a_multiprocessor(registers: int, shared: int, warps: int, tensor_memory: int, limits: Limits) -> int:
    """How many blocks fit at once. Warps live in four partitions, each with a quarter of the registers."""
    of_a_warp = -(-registers * 32 // 256) * 256
    resident = limits.registers // 4 // max(of_a_warp, 1) * 4
    fit = [limits.blocks, min(limits.warps, resident) // warps]
    fit.append(limits.shared_kb * 1024 // (-(-shared // 128) * 128 + RESERVED))
    if tensor_memory:
        fit.append(limits.tensor_memory // tensor_memory)
    return min(fit)


def facts(launched: Launch, architecture: int) -> dict[str, Any]:
    """Compiles a launch and counts. The numbers of one row of the table."""
    built = launch.compile_for(launched, architecture)
    used, code = cubin.resources(built), cubin.listing(built)
    lines = cubin.instructions(code)
    names = Counter(name for _, name in lines)
    count = {column: _count(names, pattern) for column, pattern in COUNTED.items()}
    count["wide"] = sum(n for name, n in names.items() if re.fullmatch(r"(LDG|STG|LDGSTS)\..*\.(128|256)(\..*)?", name))
    limits, data = LIMITS[architecture], built.metadata
    loop = Counter(name for _, name in _inner_loop(code))
    products = _count(loop, PRODUCT)
    mufu = count.pop("mufu")
    return {
        "registers": used["REG"],
        "stack": used["STACK"] + used["LOCAL"],
        "shared": data.shared,
        "blocks": blocks_a_multiprocessor(used["REG"], data.shared, data.num_warps, data.tmem_size, limits),
        "warps": data.num_warps,
        **count,
        "atomics": len(cubin.atomics(built)),
        "mufu": mufu,
        "mufu_per_product": round(_count(loop, "MUFU") / products, 2) if products else "",
    }


def wrong(kernel: str, architecture: int, row: dict[str, Any]) -> list[str]:
    """Why a kernel of ours is not let through: nothing, or a phrase for each reason."""
    limits, most = LIMITS[architecture], cubin.BLOCK_BYTES[architecture]
    found = []
    if int(row["spills"]) or int(row["stack"]):
        found.append(f"spills ({row['spills']} instructions, {row['stack']} bytes of stack)")
    if int(row["atomics"]):
        found.append(f"{row['atomics']} atomics")
    if int(row["shared"]) > most:
        found.append(f"{row['shared']} bytes of shared memory, where a block may have {most}")
    if kernel in MATRIX and "float16" in row["dtypes"]:  # or bfloat16; tensor cores make no fp32 products
        if not int(row[limits.tensor_core]) + int(row["hmma"]):  # small tiles have no HGMMA, and HMMA is let through
            found.append("no tensor-core instruction")
        if not int(row["ldgsts"]) + int(row["utmaldg"]):
            found.append("no asynchronous copy")
    return found


def key(launched: Launch, architecture: int) -> str:
    """Names what the compiler is given: source, types, alignments, constants, options, architecture, Triton's version.

    Neither comments nor where a kernel stands in its file are in it, as they are in Triton's own hash.
    """
    parts = _source(launched.kernel, set()), launch.specialisation(launched, architecture), architecture
    return hashlib.sha256(str((*parts, triton.__version__)).encode()).hexdigest()[:12]


def configuration(launched: Launch) -> str:
    """What was compiled in by name, and the compiler's options."""
    running = {parameter.name for parameter in launched.kernel.params if not parameter.is_constexpr}
    return " ".join(f"{name}={value}" for name, value in launched.meta.items() if name not in running)


def dtypes(launched: Launch) -> str:
    """The types of the tensors, each once, in the order of the arguments; index tensors left out."""
    values = (*launched.args, *launched.meta.values())
    kinds = [str(x.dtype).removeprefix("torch.") for x in values if isinstance(x, torch.Tensor)]
    return " ".join(dict.fromkeys(kind for kind in kinds if kind not in ("int32", "int64")))


_sources: dict[int, str] = {}


def _source(kernel: JITFunction[Any], inside: set[int]) -> str:
    """A kernel and the functions and constants of its module that it uses, as their syntax trees."""
    if id(kernel) in inside:
        return ""
    if id(kernel) not in _sources:
        tree = ast.parse(kernel.src)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
                del node.body[0]
        parts = [ast.dump(tree)]
        for name in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
            value = kernel.fn.__globals__.get(name)
            if isinstance(value, JITFunction):
                parts.append(_source(value, inside | {id(kernel)}))
            elif isinstance(value, triton.language.constexpr):
                parts.append(f"{name}={value.value!r}")
        _sources[id(kernel)] = "\n".join(parts)
    return _sources[id(kernel)]


def _count(names: Counter[str], pattern: str) -> int:
    return sum(n for name, n in names.items() if re.fullmatch(pattern, name.partition(".")[0]))


def _inner_loop(code: str) -> list[tuple[int, str]]:
    """The instructions of the smallest loop that has products in it; of everything where there is none."""
    everything = cubin.instructions(code)
    labels: dict[str, int] = {}
    waiting: list[str] = []
    jumps = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            waiting.append(label[1])
        elif found := re.search(r"/\*([0-9a-f]{4,})\*/\s+(.*)", line):
            address = int(found[1], 16)
            labels |= dict.fromkeys(waiting, address)
            waiting = []
            if target := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", found[2]):
                jumps.append((address, target[1]))
    loops = [(labels[label], end) for end, label in jumps if label in labels and labels[label] <= end]
    for first, last in sorted(loops, key=lambda loop: loop[1] - loop[0]):
        inside = [(address, name) for address, name in everything if first <= address <= last]
        if _count(Counter(name for _, name in inside), PRODUCT):
            return inside
    return everything
