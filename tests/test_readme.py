"""The README's Python runs as it stands there."""

import re
import textwrap
from pathlib import Path

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_python_in_the_readme_runs():
    blocks = [b for b in re.findall(r"(?:^    .*\n|^\n)+", README, re.M) if "import " in b]
    assert len(blocks) == 1, "a block of Python is indented by four spaces and imports what it uses"
    exec(textwrap.dedent(blocks[0]), {})
