"""What a compiled kernel asks of the GPU, read from its cubin with the tools that come with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def _ask(tool: str, built: Any, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        return subprocess.run([TOOLS / tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def resources(built: Any) -> dict[str, int]:
    """REG (a thread), STACK, SHARED, LOCAL, ... in bytes; STACK and LOCAL are 0 where nothing spills."""
    (line,) = [line for line in _ask("cuobjdump", built, "-res-usage").splitlines() if "REG:" in line]
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", line)}


def instructions(built: Any) -> str:
    """The machine code (SASS)."""
    return _ask("nvdisasm", built, "-c")
