"""The command that predicts: its numbers add up, are those of arithmetic by hand, and its page asks for nothing."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser

import pytest

from smaug import cost, estimate

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture
def call(monkeypatch, capsys):
    """call(*arguments) -> exit code, output, errors."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["estimate", *map(str, arguments)])
        try:
            code = estimate.main()
        except SystemExit as error:  # the parser's
            code = error.code
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def numbers(call):
    def numbers(*arguments):
        code, out, _ = call(*arguments, "--json", "-")
        assert code == 0
        return json.loads(out)

    return numbers


@pytest.mark.parametrize(
    ("arguments", "row"),
    [
        ("", "video blocks"),
        ("--gpus 8 --shard --size large", "gathering"),
        ("--gpu a100 --gpus 16 --data.batch 512", "gradient traffic"),
        ("--gpu h100 --data.batch 2", "wait: host"),
        ("--gpu h100 --clips raw", "wait: clips"),
        ("qa --objectives.answer.by decoder", "decoder"),
        ("singularity --size tiny --checkpoint-blocks", "optimiser"),
    ],
)
def test_numbers_add_up(numbers, arguments, row):
    found = numbers(*arguments.split())
    assert row in found["parts"]
    for of, parts in (("", found["parts"]), ("dense_", found["dense_parts"])):
        assert sum(part["gpu_hours"] for part in parts.values()) == pytest.approx(found[f"{of}gpu_hours"])
        per_pair = sum(part["flops"] for part in parts.values())
        assert found[f"{of}flops"] == pytest.approx(per_pair * found["pairs"] * found["epochs"])
    assert found["ratio"] == pytest.approx(found["dense_gpu_hours"] / found["gpu_hours"])
    assert sum(found["bound"].values()) == pytest.approx(1)
    assert found["hours"] * found["gpus"] == pytest.approx(found["gpu_hours"])
    steps = found["pairs"] * found["epochs"] / found["batch"]
    assert found["seconds_per_step"] * steps / 3600 == pytest.approx(found["hours"])
    assert found["clips_per_second"] == pytest.approx(found["batch"] / found["seconds_per_step"])
    assert found["range"][0] <= found["gpu_hours"] * (1 + 1e-9) <= found["range"][1] * (1 + 2e-9)
    assert found["what"].startswith("PREDICTION") and len(found["assumptions"]) > 5


def test_a_step_is_that_of_the_cost_model(numbers):
    """At every point of the schedule; with what it waits for."""
    found = numbers("--gpus", "8", "--gpu", "h100", "--words", "12")
    recipe = estimate.recipes.load(found["recipe"], "base")
    cluster, seconds = cost.CLUSTERS["H100"], []
    for load in cost.schedule(recipe, cost.Load(16, words=12, world=8)):
        counted = cost.parts(recipe, load, vocabulary=recipe.data.vocabulary)
        seconds.append(
            cost.step_time(counted, load, cost.Job(8), cluster, embed_dim=recipe.objectives["vtc"].embed_dim).step
        )
    assert found["seconds_per_step"] == pytest.approx(sum(seconds) / len(seconds))


def test_a_vit_by_hand(numbers):
    """Singularity's ViT-B/16 on one frame: 196 patches and [CLS], width 768. Matrices of a block have 12 width^2
    weights, attention takes two products of rows^2 x width, and a multiply-add is two FLOPs. The backward takes twice
    the products, and 2.5 times those of attention. 5 M x 10 such clips at a quarter of 154.8 TFLOP/s."""
    found = numbers("singularity")
    rows, width = 197, 768
    by_hand = 12 * (3 * 2 * rows * 12 * width**2 + 3.5 * 2 * 2 * rows**2 * width)
    assert found["parts"]["video blocks"]["flops"] == pytest.approx(by_hand, rel=1e-6)
    assert found["parts"]["video blocks"]["gpu_hours"] == pytest.approx(
        5e7 * by_hand / (154.8e12 / 4) / 3600, rel=0.001
    )
    assert found["dense_parts"] == found["parts"] and found["ratio"] == 1  # nothing of it is masked
    assert found["tokens_by_block"] == pytest.approx([197] * 12)


def test_what_moves_the_hours(numbers):
    base = numbers()
    quick, slow = (numbers("--efficiency", share) for share in (0.43, 0.1))
    assert [quick["gpu_hours"], slow["gpu_hours"]] == base["range"]
    assert quick["gpu_hours"] < base["gpu_hours"] < slow["gpu_hours"]
    assert quick["parts"]["optimiser"] == slow["parts"]["optimiser"]  # moves bytes, and computes nothing
    again = numbers("--checkpoint-blocks", "--epochs", 20)
    assert again["flops"] == pytest.approx(2 * base["flops"]) and again["gpu_hours"] > 2.4 * base["gpu_hours"]
    assert again["memory_bytes"] < 0.4 * base["memory_bytes"]
    other = numbers("--video-mask.ratio", 0.75, "--words", 32)
    assert other["ratio"] > base["ratio"] > 2
    assert other["parts"]["text encoder"]["flops"] > 1.9 * base["parts"]["text encoder"]["flops"]
    assert base["tokens_by_block"] == sorted(base["tokens_by_block"], reverse=True)
    assert base["dense_tokens_by_block"] == pytest.approx([4 * 197] * 12)
    assert max(base["tokens_by_block"]) < 4 * 197


def test_this_machine(call, numbers, monkeypatch):
    """Calibrated, so that there is no share of a peak: products at 200 GFLOP/s, 1 ms to start each operation."""
    rates = {f"product {width}": (2e-12, 3e-12) for width in cost.WIDTHS} | {"launch": (1e-3, 0.0)}
    device = cost.Device("this machine", 2e11, 1e10, 8e9, rates=rates)
    monkeypatch.setattr(cost, "calibrate", lambda way: device)
    given = ["--gpu", "cpu", "--size", "tiny", "--pairs", "6000", "--epochs", "1", "--efficiency", "0.1"]
    found = numbers(*given)
    assert found["device"] == "CPU" and found["range"] is found["efficiency"] is None
    assert found["memory_bytes"] < cost.CONTEXT  # a GPU has one
    assert sum(part["gpu_hours"] for part in found["parts"].values()) == pytest.approx(found["gpu_hours"])
    recipe = estimate.recipes.load(found["recipe"])
    counted = cost.parts(recipe, cost.Load(128, words=16), vocabulary=recipe.data.vocabulary)
    launched = cost.total(counted.values()).launches * 1e-3
    assert found["bound"]["host"] * found["seconds_per_step"] == pytest.approx(launched, rel=0.05)
    attention = cost.total(counted.values()).attention_flops * 3.5  # has no rate here
    products = cost.total(counted.values()).step_flops - attention
    assert found["bound"]["compute"] * found["seconds_per_step"] == pytest.approx(products / 2e11, rel=0.05)
    code, out, _ = call(*given)
    minutes = estimate.number(60 * found["gpu_hours"])
    assert code == 0 and f"CPU-hours ({minutes} minutes)" in out and "range" not in out


def test_the_table(call, numbers):
    code, out, err = call("--pairs", 4e6)
    assert code == 0 and not err
    lines = out.splitlines()
    assert lines[0] == "PREDICTION, from counted FLOPs and bytes: nobody measured it."
    assert "4,000,000 pairs x 10 epochs, 128 a step" in lines[1]
    found = numbers("--pairs", 4e6)
    for part in found["parts"]:
        (line,) = (line for line in lines if line.startswith(f" {part}"))
        assert estimate.number(found["parts"][part]["gpu_hours"]) in line
        assert f"{found['parts'][part]['gpu_hours'] / found['gpu_hours']:.0%}" in line
    hours, dense = (estimate.number(found[of]) for of in ("gpu_hours", "dense_gpu_hours"))
    assert f"{hours} A6000-hours; dense {dense}; dense / this {found['ratio']:.2f}x" in out
    assert "at 43% of the peak" in out and "at 10%" in out and f"{hours} is at 25%" in out
    for said in found["assumptions"]:
        assert said in " ".join(out.split()), said


def test_a_line_for_each_device(call, numbers):
    code, out, _ = call("--gpu", "all", "h200")
    lines = [line.split()[0] for line in out.splitlines() if re.search(r"\d+x ", line)]
    assert code == 0 and lines == [*cost.CLUSTERS, "H200"]
    both = numbers("--gpu", "a6000", "4090")
    assert [one["device"] for one in both] == ["A6000", "4090"]


def test_what_does_not_fit_and_what_would(call, numbers):
    code, _, err = call("--gpu", "4090")
    assert code == 0 and "a step needs 24.1 GB, and 4090 has 24" in err
    batch, again = re.search(r"--data.batch (\d+) fits", err)[1], re.search(r"blocks it needs ([\d.]+)", err)[1]
    assert numbers("--gpu", "4090", "--data.batch", batch)["memory_bytes"] < 24e9
    needs = numbers("--gpu", "4090", "--checkpoint-blocks")["memory_bytes"]
    assert estimate.number(needs / 1e9) == again
    assert "not even one pair fits" in call("--gpu", "4090", "--data.batch", 1, "--data.vocabulary", 2_000_000)[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("singularty", "did you mean 'singularity'"),
        ("--size bse", "did you mean 'base'"),
        ("--gpu a600", "did you mean 'a6000'"),
        ("--gpu cpu --gpus 2", "this machine alone"),
        ("--pairs 0 --epochs 0", "must be above 0, not 0 and 0"),
        ("--pairs nan", "must be above 0, not nan and 10"),
        ("--pairs 5M", "could not convert string to float: '5M'"),
        ("--efficiency 2", "a share of the peak, above 0 and at most 1, not 2"),
        ("--words 33", "--words must be 1 to 32"),
        ("--gpus 0", "at least one GPU, not 0"),
        ("--gpus 3", "a batch of 128 pairs (--data.batch) cannot be shared equally by 3 GPUs"),
        ("--shard", "say among how many by --gpus"),
        ("--html nowhere/page.html", "there is no folder nowhere"),
        ("--json /dev/null", "is no file"),
        ("--data.bach 12", "--data.batch"),
    ],
)
def test_errors(call, arguments, said):
    code, out, err = call(*arguments.split())
    assert code in (1, 2) and said in " ".join(err.split()) and not out
    assert code == 2 or len(err.splitlines()) == 1


def test_without_plotly(call, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    code, _, err = call("--html", tmp_path / "page.html")
    assert code == 1 and "pip install -c constraints.txt -e '.[plots]'" in err


class Tags(HTMLParser):
    """Attributes that could ask a network for something, scripts apart, and the text of cells."""

    def __init__(self):
        super().__init__()
        self.addresses, self.tags, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]

    def handle_data(self, data):
        self.text.append(data)


def test_the_page(call, tmp_path):
    file = tmp_path / "page.html"
    nasty = "<img src=x>&"
    code, *_ = call("--gpu", "a6000", "h100", "--html", file, "--json", tmp_path / "numbers.json", "--name", nasty)
    found, text = json.loads((tmp_path / "numbers.json").read_text()), file.read_text()
    assert code == 0 and text.count("plotly.js v") == 1 and "default-src 'none'" in text
    page = Tags()
    page.feed(text)
    assert page.addresses == [] and not {"img", "link", "iframe"} & set(page.tags)
    assert any(nasty in piece for piece in page.text)
    for one in found:
        for side in ("parts", "dense_parts"):
            assert {estimate.number(part["gpu_hours"]) for part in one[side].values()} <= set(page.text)
        assert set(one["assumptions"]) <= set(page.text)


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium: apt-get install chromium chromium-driver")
@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_in_a_browser(call, tmp_path, width):
    """Charts are drawn, nothing is wider than the page, and no request but for the file."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install 'smaug[browser]'")
    file = tmp_path / "page.html"
    assert call("--gpu", "all", "--html", file)[0] == 0
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    for flag in [*flags.split(), "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'p'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get(file.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert len(browser.find_elements("css selector", ".js-plotly-plot .main-svg")) >= 2
        assert len(browser.find_elements("css selector", ".bars .point")) >= 12 * 5  # parts of six devices, twice
        log = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [one["params"] for one in log if one["method"] == "Network.requestWillBeSent"]
        own = {one["request"]["url"] for one in asked if one["documentURL"] == file.as_uri()}  # not of its empty tab
        assert own == {file.as_uri()}
        assert browser.get_log("browser") == []
    finally:
        browser.quit()
