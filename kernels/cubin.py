"""What a compiled kernel asks of a GPU, read from its machine code with the tools that Triton's wheel brings."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

# Bytes of shared memory that one block may have; CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability". Triton's compiler does not complain about more.
BLOCK_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}


def _ask(tool: str, built: Any, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        return subprocess.run([TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def resources(built: Any) -> dict[str, int]:
    """REG (a thread), STACK, SHARED, LOCAL, ... in bytes; STACK and LOCAL are 0 where nothing spills."""
    (line,) = [line for line in _ask("cuobjdump", built, "-res-usage").splitlines() if "REG:" in line]
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", line)}


def listing(built: Any) -> str:
    """The machine code (SASS) as nvdisasm prints it."""
    return _ask("nvdisasm", built, "-c", "-ndf")  # without data-flow analysis, which nobody here reads


def instructions(code: str) -> list[tuple[int, str]]:
    """(address, name) of every instruction of a listing, without predicates; names as LDG.E.128."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]+)", code)
    return [(int(address, 16), name) for address, name in found]


def atomics(built: Any) -> list[str]:
    """Of the PTX. In the machine code the assembler adds ATOMS of its own where it hands out tensor memory."""
    return re.findall(r"(?<!\w)(?:atom|red)\.\S+", built.asm["ptx"])  # st.shared. is none
