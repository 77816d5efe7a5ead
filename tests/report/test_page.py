"""The page: what is in it, and in a real browser that it draws, prints, and asks nobody for anything.

pip install -e '.[browser]' && apt-get install chromium chromium-driver && pytest -m slow tests/report/test_page.py
"""

import base64
import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest

from smaug.report.compare import compare
from smaug.report.page import differing, page
from smaug.report.published import PUBLISHED
from smaug.report.runs import read_runs

ARTEFACTS = Path(__file__).resolve().parents[1] / "artefacts"  # not in git
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --window-size=1200,900"
)
NASTY = "<img src=x onerror=alert(1)>&b"


def split(html):
    """The page without plotly, and its charts."""
    charts = re.search(r"^const figures = (.*);$", html, re.M).group(1)
    return re.sub(r"<script>.*?</script>", "", html, flags=re.S), json.loads(charts)


@pytest.fixture
def several(write_run):
    folders = [
        write_run(NASTY, scores=(0.1, 0.2, 0.4)),
        write_run("dense", scores=(0.1, 0.2, 0.3), recipe="dense", pace=90.0, turns=2),
        write_run("old", ledger=False, command="python -m smaug.train --run-dir '</script><b>'"),
        write_run("running", finished=False),
    ]
    return read_runs(folders)


def test_the_page_says_it_all_and_escapes_it(several):
    html = page(several, [compare(run, several[1], None) for run in several if run is not several[1]])
    words, charts = split(html)
    assert html.count("<script>") == html.count("</script>") == 2
    assert "<img" not in words and "<b>" not in words and "onerror" in unescape(words)
    assert "&lt;/script&gt;&lt;b&gt;" in words and "<img" not in json.dumps(charts)
    assert re.search(r"<h1>&lt;img.*reached R@1 = 30.0% on shapes val in .* of dense: 3.00x</h1>", words)
    for said in (
        "objectives.mvm",
        "has no ledger",
        "not finished: at step 60 of 600",
        "30 to 60",
        "Not here, since what its scores cost is not known: old.",
    ):
        assert said in unescape(words), said
    # Each published number is a cell of the table, with its source; the runs' chart has none of them.
    for one in PUBLISHED:
        assert one.source in words and one.label in words
        assert all(f"<td class=n>{100 * score:.1f}</td>" in words for score in one.scores.values())
    assert "Neither axis can be read across" in words
    texts = {trace.get("name") for trace in charts["score0"]["data"]}
    assert "dense" in texts and not any("VindLU" in str(trace) for trace in charts["score0"]["data"])
    [known] = [trace for trace in charts["score_published"]["data"] if trace["mode"] == "markers+text"]
    assert known["text"][0] == "Singularity 5M" and len(known["x"]) == 5
    # Nothing is asked of a network: links alone lead outside.
    assert re.findall(r'<[^>]* (?:src|href)="?([^"> ]+)', words) == [one.source for one in PUBLISHED]
    assert "default-src 'none'" in words


def test_published_stand_beside_runs_on_their_data(write_run, recipes):
    data = recipes["smaug"]["data"] | {"manifest": ["a.csv"], "eval_manifest": ["test.csv"], "format": "msrvtt"}
    words, charts = split(page(read_runs([write_run("a", changes={"data": data})]), []))
    assert any("VindLU 5M" in trace.get("text", []) for trace in charts["score0"]["data"])
    assert "score_published" not in charts and "Neither axis" not in words


def test_twenty_runs_and_none_with_a_score(write_run):
    folders = [write_run(f"run-with-a-rather-long-name-{i}", pace=10.0 + i) for i in range(20)]
    words, charts = split(page(read_runs(folders), []))
    looks = {
        json.dumps([t["line"]["color"], t["line"]["dash"], t["marker"]["symbol"]]) for t in charts["curve0"]["data"]
    }
    assert len(looks) == 20 and words.count("<details") == 20
    (folders[0] / "metrics.jsonl").write_text("")
    (folders[0] / "ledger.json").unlink()
    (folders[0] / "result.json").unlink()
    words, charts = split(page(read_runs(folders[:1]), []))
    assert "Not here, having no score yet: run-with-a-rather-long-name-0" in words and "smaug has no score yet" in words


def test_long_runs_are_thinned_and_the_page_says_so(write_run):
    folder = write_run("a")
    rows = [json.dumps({"step": i, "loss": None if i == 801 else 1.0, "grad_norm": 0.0}) for i in range(1, 1002)]
    (folder / "metrics.jsonl").write_text("\n".join(rows))
    words, charts = split(page(read_runs([folder]), []))
    trace = charts["curve0"]["data"][0]
    assert len(trace["x"]) == 334 and "every n-th log line is drawn, 400 at most" in words


def test_differing():
    a, b = {"x": 1, "y": {"z": [1], "w": 2}, "o": {"m": 1}}, {"x": 1, "y": {"z": [2], "w": 2}, "o": {}}
    assert list(differing([a, b])) == [("y.z", [[1], [2]]), ("o.m", [1, "absent"])]


@pytest.fixture
def browser(tmp_path):
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install 'smaug[browser]'")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium: apt-get install chromium chromium-driver")
def test_in_a_browser(browser, several, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page(several, [compare(several[0], several[1], None)]))

    def ask(code):
        return browser.execute_script(f"return {code}")

    ARTEFACTS.mkdir(exist_ok=True)
    for width in (1200, 400):
        how = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", how)
        browser.get(path.as_uri())
        assert ask("document.querySelectorAll('.js-plotly-plot .main-svg').length") > 20  # all are drawn
        assert ask("document.documentElement.scrollWidth") == width  # nothing sticks out
        assert ask("Math.max(...all('.main-svg').map(e => e.getBoundingClientRect().right))") <= width
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
        (ARTEFACTS / f"report-{width}.png").write_bytes(base64.b64decode(shot["data"]))
        print(f"screenshot: {ARTEFACTS / f'report-{width}.png'}")
    assert ask("document.querySelectorAll('img').length") == 0

    # A run is taken out of the curves; a command is copied, or at least selected.
    browser.find_element("css selector", '.key input[value="1"]').click()
    assert ask("document.getElementById('curve0').data.map(t => t.visible === false)") == [False, True, False, False]
    browser.find_elements("css selector", "summary")[2].click()
    browser.find_elements("css selector", "details:nth-of-type(3) button.copy")[0].click()
    assert "</script><b>" in ask("getSelection().toString()")

    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True, "paperWidth": 8.27})
    (ARTEFACTS / "report.pdf").write_bytes(base64.b64decode(printed["data"]))
    ask("dispatchEvent(new Event('beforeprint'))")
    assert ask("document.querySelectorAll('details:not([open])').length") == 0

    asked = {
        match
        for row in browser.get_log("performance")
        if "Network.requestWillBeSent" in row["message"]
        for match in re.findall(r'"url":"([a-z]+:)', row["message"])
    }
    assert asked <= {"file:", "chrome:", "data:"}  # chrome: its own empty tab
    assert [row for row in browser.get_log("browser") if row["level"] == "SEVERE"] == []
