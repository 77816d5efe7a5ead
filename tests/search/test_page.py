"""The page in a real browser: a query typed, results seen, one played; by keyboard, on a phone, and when it fails.

pip install -e '.[browser]' && apt-get install chromium chromium-driver && pytest -m slow tests/search/test_page.py
"""

import re
import shutil
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from werkzeug.serving import make_server

from smaug.run import load_run
from smaug.search.index import IndexOptions, index
from smaug.search.query import open_index
from smaug.search.serve import make_app

ARTEFACTS = Path(__file__).resolve().parents[1] / "artefacts"  # not in git
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1200,900"
)
NASTY = "<img src=x onerror=alert(1)> & film.webm"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium: apt-get install chromium chromium-driver"),
]


@pytest.fixture(scope="module")
def address(models, tmp_path_factory, write_video):
    folder = tmp_path_factory.mktemp("page")
    media = folder / "media"
    media.mkdir()
    write_video(media / NASTY, 20, codec="libvpx-vp9", size=128)
    write_video(media / "short.webm", 3, codec="libvpx-vp9", size=128, seed=10)
    write_video(media / "old.avi", 4, size=128)  # MPEG-4 part 2, which no browser plays
    assert index(IndexOptions(media, models / "a", folder / "index", device="cpu", workers=1), Console(quiet=True)) == 0
    opened = open_index(folder / "index")
    server = make_server("127.0.0.1", 0, make_app(opened, load_run(models / "a", "cpu"), "127.0.0.1"), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", media, server
    server.shutdown()
    thread.join()


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


def until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.1)
    return found


def css(browser, selector):
    return browser.find_elements("css selector", selector)


def state(browser, video):
    return browser.execute_script("const v = arguments[0]; return [v.currentTime, v.readyState, v.videoWidth]", video)


def thumbnails_are_there(browser):
    return browser.execute_script(
        "const i = [...document.querySelectorAll('#hits img')]; return i.length && i.every(x => x.naturalWidth === 320)"
    )


def test_search_and_play(browser, address):
    from selenium.webdriver.common.keys import Keys

    url, *_ = address
    browser.get(url)
    box = browser.switch_to.active_element
    assert box.get_attribute("id") == "text"  # one may type at once
    box.send_keys("a dog jumps", Keys.ENTER)
    until(lambda: len(css(browser, "#hits li")) == 3)
    assert {e.text for e in css(browser, ".file")} == {NASTY, "short.webm", "old.avi"}  # as text, whatever it says
    assert "The 3 best" in css(browser, "#status")[0].text and browser.current_url == f"{url}?q=a+dog+jumps"
    until(lambda: thumbnails_are_there(browser))

    # With the keyboard: to the button of the long film, and play its window.
    button = next(e for e in css(browser, "button.screen") if "onerror" in e.get_attribute("aria-label"))
    start = {"0:00 to 0:08": 0, "0:08 to 0:16": 8, "0:16 to 0:20": 16}[button.get_attribute("aria-label")[-12:]]
    for _ in range(10):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        if browser.switch_to.active_element == button:
            break
    assert browser.switch_to.active_element == button
    button.send_keys(Keys.ENTER)
    video = until(lambda: css(browser, "video"))[0]
    assert browser.switch_to.active_element == video
    until(lambda: state(browser, video)[0] > start + 0.5)
    now, ready, width = state(browser, video)
    assert start < now < start + 8 and ready >= 2 and width == 128

    # What the browser cannot play comes as a preview, and is said to be one.
    next(e for e in css(browser, "button.screen") if "old.avi" in e.get_attribute("aria-label")).click()
    until(lambda: "cannot play the file; this is a preview" in browser.page_source)
    preview = until(lambda: [v for v in css(browser, "video") if "/preview/" in v.get_attribute("src")])[0]
    until(lambda: state(browser, preview)[0] > 0.3)
    assert state(browser, preview)[2] == 320
    browser.execute_script("window.scrollTo(0, 0)")
    ARTEFACTS.mkdir(exist_ok=True)
    assert browser.save_screenshot(str(ARTEFACTS / "search.png"))
    print(f"screenshot: {ARTEFACTS / 'search.png'}")

    # No script ran from a name, nothing was refused by the policy, and nobody else was asked for anything.
    assert [row for row in browser.get_log("browser") if row["level"] == "SEVERE"] == []
    asked = {
        match
        for row in browser.get_log("performance")
        if "Network.requestWillBeSent" in row["message"]
        for match in re.findall(r'"url":"(\w+://[^/"]+)', row["message"])
    }
    assert {one for one in asked if not one.startswith("chrome://")} == {url.rstrip("/")}  # those: its own empty tab


def test_states(browser, address):
    url, media, server = address
    browser.set_window_size(500, 800)  # a phone; Chromium makes no window narrower
    browser.get(f"{url}?q=a+dog&windows=1")
    until(lambda: len(css(browser, "#hits li")) == 5)  # every window
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert css(browser, "#windows")[0].is_selected()
    css(browser, "#windows")[0].click()
    until(lambda: len(css(browser, "#hits li")) == 3)
    browser.back()
    until(lambda: len(css(browser, "#hits li")) == 5)

    kept = (media / "short.webm").read_bytes()
    (media / "short.webm").unlink()
    try:
        browser.get(f"{url}?q=red+ring")
        until(lambda: "the file is not there any more" in browser.page_source)
    finally:
        (media / "short.webm").write_bytes(kept)
    box = css(browser, "#text")[0]
    box.clear()
    box.submit()
    until(lambda: not css(browser, "#hits li"))
    assert css(browser, "#status")[0].text == ""
    browser.execute_script("document.getElementById('text').removeAttribute('maxlength')")
    browser.execute_script("arguments[0].value = 'x'.repeat(2500)", box)
    box.submit()
    until(lambda: "2500 characters; a query has at most 2000" in css(browser, "#status.error")[0].text)
    server.shutdown()
    server.server_close()
    browser.execute_script("arguments[0].value = 'a dog'", box)
    box.submit()
    until(lambda: "is it still running?" in css(browser, "#status.error")[0].text)
