"""The examples of docs/ops.md run as they stand there, and print what stands there."""

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = (Path(__file__).resolve().parents[1] / "docs" / "ops.md").read_text()
EXAMPLES = re.findall(r"^## ([^\n]+)$|^```python\n(.+?)^```\n\n```\n(.*?)^```$", DOCS, re.M | re.S)


def examples():
    title = ""
    for heading, code, printed in EXAMPLES:
        title = heading or title
        if code:
            yield pytest.param(code, printed, id=title.partition(":")[0].replace("`", ""))


def test_every_op_has_an_example():
    from smaug import ops

    assert DOCS.count("```") == 4 * len(list(examples())), "a block of Python is followed by what it prints"
    called = "".join(code for _, code, _ in EXAMPLES)
    assert [name for name in ops.__all__ if name not in called] == ["register_flops"]


@pytest.mark.parametrize(("code", "printed"), list(examples()))
def test_example(code, printed):
    if "from transformers" in code:
        pytest.importorskip("transformers")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    assert out.getvalue() == printed
