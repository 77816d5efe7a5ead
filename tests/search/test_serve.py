"""What the page's server gives, and to whom: indexed files as they were indexed, by number, under its own name."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import av
import pytest
from PIL import Image
from rich.console import Console
from werkzeug.test import Client

from smaug.run import load_run
from smaug.search import __main__ as search_main
from smaug.search import store
from smaug.search.index import IndexOptions, index
from smaug.search.query import open_index
from smaug.search.serve import make_app


@pytest.fixture(scope="module")
def served(_media, models, tmp_path_factory, write_video):
    """A folder, and its index in memory with its run."""
    folder = tmp_path_factory.mktemp("served")
    media = Path(shutil.copytree(_media, folder / "media"))
    write_video(media / "a & <b>.mp4", 2)
    assert index(IndexOptions(media, models / "a", folder / "index", device="cpu", workers=1), Console(quiet=True)) == 0
    return media, open_index(folder / "index"), load_run(models / "a", "cpu")


@pytest.fixture
def client(served):
    return Client(make_app(served[1], served[2], "127.0.0.1"))


@pytest.fixture
def rows(client):
    """Row of the first window of each file."""
    hits = client.get("/search?q=a+dog&windows=1").json["hits"]
    return {hit["file"]: hit["row"] for hit in sorted(hits, key=lambda hit: -hit["start"])}


def test_the_page_is_its_own(client):
    page = client.get("/")
    assert page.status_code == 200 and page.content_type == "text/html; charset=utf-8"
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "//" not in page.text.replace("<!doctype", "") and "style=" not in page.text and "onclick" not in page.text
    for name in ("page.js", "page.css"):
        answer = client.get(f"/{name}")
        assert answer.status_code == 200 and "http" not in answer.text.replace("https", "http")
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "innerHTML" not in client.get("/page.js").text


def test_a_search(client):
    answer = client.get("/search", query_string={"q": "a dog jumps"})
    hits = answer.json["hits"]
    assert {hit["file"] for hit in hits} == {"short.mp4", "films/long.mp4", "picture.png", "a & <b>.mp4"}
    assert [hit["score"] for hit in hits] == sorted((hit["score"] for hit in hits), reverse=True)
    assert len(client.get("/search?q=a+dog&windows=1").json["hits"]) == 9
    assert answer.json["unknown"] == [] and client.get("/search?q=a+zebra").json["unknown"] == ["zebra"]
    for text, reason in [("", "the text is empty"), ("x" * 2001, "2001 characters")]:
        answer = client.get("/search", query_string={"q": text})
        assert answer.status_code == 400 and reason in answer.json["error"]


def test_a_file_comes_in_ranges(client, rows, served):
    data = (served[0] / "films/long.mp4").read_bytes()
    address = f"/file/{rows['films/long.mp4']}"
    whole = client.get(address)
    assert whole.data == data and whole.content_type == "video/mp4" and whole.headers["Accept-Ranges"] == "bytes"
    for asked, got in [("10-19", data[10:20]), ("100-", data[100:]), ("-7", data[-7:]), (f"5-{10**9}", data[5:])]:
        part = client.get(address, headers={"Range": f"bytes={asked}"})
        assert part.status_code == 206 and part.data == got
        start = len(data) - 7 if asked == "-7" else int(asked.split("-")[0])
        assert part.headers["Content-Range"] == f"bytes {start}-{start + len(got) - 1}/{len(data)}"
    # what no range is, or none that is answered, is the whole file
    for asked in ("bytes=0-1,5-6", "items=0-1", "bytes=5-1", "bytes=x", f"bytes=-{10**9}"):
        whatever = client.get(address, headers={"Range": asked})
        assert whatever.status_code == 200 and whatever.data == data, asked
    beyond = client.get(address, headers={"Range": f"bytes={len(data)}-"})
    assert beyond.status_code == 416 and beyond.json["error"] == f"the file has {len(data)} bytes"
    head = client.head(address)
    assert head.status_code == 200 and head.content_length == len(data) and not head.data
    assert client.get(address, headers={"If-None-Match": whole.headers["ETag"]}).status_code == 304


def test_pictures_and_previews(client, rows):
    for name in rows:
        answer = client.get(f"/thumbnail/{rows[name]}")
        assert answer.content_type == "image/jpeg" and Image.open(io.BytesIO(answer.data)).size == (320, 320)
    last = rows["films/long.mp4"] + 5
    shades = []
    for row in (rows["films/long.mp4"], last):
        answer = client.get(f"/preview/{row}")
        assert answer.content_type == "video/mp4"
        with av.open(io.BytesIO(answer.data)) as film:
            frames = [frame.to_ndarray(format="gray").mean() for frame in film.decode(video=0)]
        shades.append(sum(frames) / len(frames))
        assert len(frames) / 15 == pytest.approx(8 if row != last else 4, abs=0.2)
    assert shades[1] > shades[0] + 100  # each shows its own part of the film
    assert client.get(f"/preview/{rows['picture.png']}").status_code == 404


@pytest.mark.parametrize(
    "path",
    ["/file/../index.json", "/file/..%2f..%2fetc%2fpasswd", "/file//etc/passwd", "/file/-1", "/file/1.0", "/file/",
     "/etc", "/file/²", "/file/0/0", "/page.html", "/file/99", "/thumbnail/" + "9" * 400],
)  # fmt: skip
def test_nothing_else_is_there(client, path):
    answer = client.get(path)
    assert answer.status_code == 404 and "error" in answer.json


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8080", 200), ("localhost:8080", 200), ("[::1]:8080", 200), ("LOCALHOST", 200),
     ("192.168.1.7:8080", 200), ("evil.example", 421), ("evil.example:8080", 421), ("localhost.evil.example", 421),
     ("127.0.0.1.evil.example", 421)],
)  # fmt: skip
def test_only_its_own_name_is_answered(client, rows, host, status):
    for path in ("/", "/search?q=a", f"/file/{rows['short.mp4']}"):
        assert client.get(path, headers={"Host": host}).status_code == status
    assert client.post("/search?q=a").status_code == 405


def test_a_file_that_is_not_what_was_indexed(client, rows, served, tmp_path):
    path = served[0] / "short.mp4"
    addresses = [f"/{what}/{rows['short.mp4']}" for what in ("file", "thumbnail", "preview")]
    assert [client.get(address).status_code for address in addresses] == [200] * 3  # and now they are cached
    kept, found = path.read_bytes(), path.stat()
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * len(kept))
    os.utime(secret, ns=(found.st_atime_ns, found.st_mtime_ns))  # as like as it can be

    def refused(status, reason):
        for address in addresses:
            answer = client.get(address)
            assert answer.status_code == status and reason in answer.json["error"], address

    try:
        path.unlink()
        refused(404, "not there any more")
        path.symlink_to(secret)
        refused(410, "cannot be opened any more")
        path.unlink()
        os.mkfifo(path)
        refused(410, "has changed")
        path.unlink()
        path.write_bytes(kept[:-1])
        refused(410, "run `index` again")
    finally:
        path.unlink(missing_ok=True)
        path.write_bytes(kept)
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert client.get(addresses[0]).data == kept
    # the folder itself led elsewhere
    films, row = served[0] / "films", rows["films/long.mp4"]
    shutil.move(films, tmp_path / "films")
    films.symlink_to(tmp_path / "films")
    try:
        assert client.get(f"/file/{row}").status_code == 410
    finally:
        films.unlink()
        shutil.move(tmp_path / "films", films)
    assert client.get(f"/file/{row}").status_code == 200


def test_a_port_that_is_taken(call, media, models):
    assert call(search_main.main, "index", media, "--model", models / "a", "--device", "cpu", "--workers", 1)[0] == 0
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = call(search_main.main, "serve", "media.search", "--port", port)
    assert code == 1 and err == (
        f"smaug: 127.0.0.1:{port} cannot be used: Address already in use; choose another --port, or 0 for a free one\n"
    )
    code, _, err = call(search_main.main, "serve", "media.search", "--port", "70000")
    assert code == 1 and "--port 70000 is no port" in err
    code, _, err = call(search_main.main, "serve", "media.search", "--host", "no.such.host.invalid")
    assert code == 1 and "no address of this machine" in err and err.count("\n") == 1


def command(*arguments, **more):
    save = "import sys, smaug.search.index as i, smaug.search.__main__ as m; i.SAVE_SECONDS = 0; sys.exit(m.main())"
    line = [sys.executable, "-c", save, *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


@pytest.mark.slow
def test_kill_serve_and_ctrl_c(media, models, tmp_path, write_video):
    """As a person does it: `index` is killed and goes on; `serve` says where it is and ends with Ctrl-C."""
    for number in range(20):
        write_video(media / f"{number}.mp4", 9, seed=number % 15)
    asked = ["index", media, "--model", models / "a", "--out", tmp_path / "out", "--workers", 1, "--batch", 1]
    process = command(*asked)
    lines = tmp_path / "out/files-0.jsonl"
    deadline = time.monotonic() + 60
    while not (lines.exists() and lines.stat().st_size > 1) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.communicate()
    left = len(store.read_entries(tmp_path / "out", store.read_made(tmp_path / "out"))[0])
    assert 0 < left < 24
    said = command(*asked).communicate()[0]
    assert "done       " in said and "23 files, 28 clips" in said and f" {24 - left} new files" in said, said

    process = command("serve", tmp_path / "out", "--port", 0, "--host", "0.0.0.0", bufsize=1)
    said = [process.stdout.readline() for _ in range(3)]
    assert said[0].startswith("warning    0.0.0.0 can be reached from other machines")
    assert said[1] == f"serving    23 files, 28 clips of {media}\n"
    port = said[2].split("/")[2].rpartition(":")[2]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/search?q=a+dog", timeout=30) as answer:
        assert len(json.load(answer)["hits"]) == 23
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=20)
    assert (process.returncode, rest) == (0, "stopped\n")
