"""The page stands alone, shows the numbers of the model, and takes no word of a caption for HTML."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from smaug.data.loader import middle_frames
from smaug.run import load_run, open_split
from smaug.visualise.look import look
from smaug.visualise.page import page

SAID = "<script>alert('x')</script> &amp; \"$title\" zebra"


class Parsed(HTMLParser):
    """Elements as (tag, attributes), text by the tag around it, and whether all that was opened is closed."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts, self.open = [], [], []
        self.feed(html)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag, **wanted):
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in wanted.items())]

    def text(self, tag):
        return "".join(data for where, data in self.texts if where == tag)


@pytest.fixture(scope="module")
def made(run, clips):
    (group,), _ = middle_frames(clips, [5], 8, view=2)
    shown = look(run, group, SAID)
    html = page(shown, f'clip "5", {SAID}', SAID, "recipe <smaug>")
    return shown, html, Parsed(html)


def test_it_asks_nothing_of_a_network(made):
    _, html, parsed = made
    for _, attributes in parsed.elements:
        for name in ("href", "src", "xlink:href"):
            assert re.match(r"#|data:image/png;base64,", attributes.get(name, "#"))
    assert "url(" not in re.sub(r"url\(#\w+\)", "", html) and "http" not in html.replace("http-equiv", "")
    (policy,) = parsed.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'; img-src data:;")


def test_words_of_people_are_no_html(made):
    _, _, parsed = made
    assert parsed.text("h1") == parsed.text("title") == f'clip "5", {SAID}'
    assert len(parsed.all("script")) == 1 and "alert" not in parsed.text("script")
    assert [a["data-said"].partition(":")[0] for a in parsed.all("label") if "data-said" in a][2:6] == [
        "< [UNK]", "script [UNK]", "> [UNK]", "alert",
    ]  # fmt: skip


def test_images_are_the_frames(made):
    shown, _, parsed = made
    images = {a["id"]: a["href"] for a in parsed.all("image")}
    assert len(images) == 16
    for letter, frames in (("f", shown.frames), ("r", shown.rebuilt)):
        for number, frame in enumerate(frames):
            data = base64.b64decode(images[f"{letter}{number // 2}-{number % 2}"].partition(",")[2])
            assert np.array_equal(np.array(Image.open(io.BytesIO(data))), frame)
    assert {a["href"][1:] for a in parsed.all("use")} <= set(images)


def test_patches_and_numbers_are_those_of_the_model(made):
    shown, html, parsed = made
    squares = {}
    for a in parsed.all("path"):
        squares[a["class"]] = squares.get(a["class"], 0) + a["d"].count("M")
    left_out = 64 * (~shown.selected).sum()
    assert squares["gone"] == (~shown.visible).sum()
    assert squares["pruned"] == sum((~there).sum() for there in shown.kept.values()) + left_out
    assert squares["hatched"] == np.isnan(shown.attention.patches[0]).sum()
    for said in ("100 of 256 patches", f"error {shown.error:.3f}", "3 of 4 moments", f"{shown.kept[2].sum()} of 256"):
        assert said in html
    for score, kept in zip(shown.scores, shown.selected, strict=True):
        assert f"{'kept' if kept else 'left out'}, score {score:.3f}" in html


def test_the_script_finds_what_it_moves(made):
    shown, html, parsed = made
    ids = {a["id"] for _, a in parsed.elements if "id" in a}
    classes = {name for _, a in parsed.elements for name in a.get("class", "").split()}
    assert set(re.findall(r'getElementById\("(\w+)"\)', html)) == {"frame", "which", "mix", "said"} <= ids
    assert {name for what in re.findall(r'all\("([^"]+)"\)', html) for name in re.findall(r"\.(\w+)", what)} <= classes
    for attribute in re.findall(r"url\(#(\w+)\)", html):
        assert attribute in ids
    (seen,) = re.findall(r"const seen = (.*);", html)
    opacities = np.array(json.loads(seen))
    rects = [a for a in parsed.all("rect") if "fill-opacity" in a]
    there = ~np.isnan(shown.attention.patches[0])
    assert opacities.shape == (len(shown.attention.words), len(rects)) == (opacities.shape[0], there.sum())
    assert [(int(a["y"]), int(a["x"])) for a in rects] == [(y, x) for _, y, x in np.argwhere(there)]
    assert [float(a["fill-opacity"]) for a in rects] == opacities[0].tolist()
    shares = shown.attention.patches[:, there]
    assert np.abs(opacities - 0.85 * shares / shares.max(1, keepdims=True)).max() < 1e-3
    labels = [a for a in parsed.all("label") if "data-moments" in a]
    assert len(labels) == len(opacities) and all(a["data-moments"].count(";") == 3 for a in labels)
    assert sum("checked" in a for a in parsed.all("input", type="radio")) == 1


def test_a_row_that_there_is_not_is_explained(folders):
    run = load_run(folders / "masked", "cpu")
    (group,), _ = middle_frames(open_split(run.recipe, "val", Console(quiet=True)), [0], 8)
    html = page(look(run, group, "a ring"), "clip", "a ring", "recipe mac")
    parsed = Parsed(html)
    assert "recipe mac has no fusion encoder" in parsed.text("li") and "Where the words look" not in html
    assert not parsed.all("input", type="radio") and "const seen = [];" in html
    assert "Visible in training" in html and "Rebuilt" not in html
