"""A local page over an index: a search box, and clips that play.

Werkzeug serves it: tensorboard brings it along anyway, and its answers to Range and If-Range are better tried than ours
would be. The page asks for files by number; a path never comes from outside. What it may be asked, and by whom:

    /  /page.js  /page.css     the page
    /search?q=TEXT[&windows=1] hits as JSON
    /thumbnail/ROW             JPEG of a window's middle frame, the middle square
    /file/ROW                  the video or picture itself, with Range
    /preview/ROW               the window as MP4 without sound, for what a browser cannot play
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import json
import os
import re
import socket
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import av
import numpy as np
import tyro
from av.video.frame import VideoFrame
from PIL import Image
from rich.console import Console

from smaug.data.decode import DecodeError, read_frames, read_image
from smaug.data.journal import one_line
from smaug.data.media import printable
from smaug.embed import embed_texts
from smaug.run import Run
from smaug.search.query import Hit, Index, check_text, open_index, open_run, search, span, unknown_words
from smaug.search.store import Entry

TOP = 24  # hits on the page
SIZE = 320  # pixels of a thumbnail or preview, square
RATE = 15  # frames a second of a preview
SECONDS = 20.0  # that a thumbnail or a preview may take to decode
AT_ONCE = 2  # of these made at once, however many a page asks for

# What a file is sent as; nothing is ever sent as a page. Browsers look into the file themselves.
TYPES = {
    "avif": "image/avif", "bmp": "image/bmp", "gif": "image/gif", "jpeg": "image/jpeg", "jpg": "image/jpeg",
    "png": "image/png", "webp": "image/webp", "m4v": "video/mp4", "mkv": "video/x-matroska", "mov": "video/mp4",
    "mp4": "video/mp4", "ogv": "video/ogg", "webm": "video/webm",
}  # fmt: skip
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",  # no other page may show what is served here
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}


@dataclass(frozen=True)
class ServeOptions:
    """Serves a page to search in and to play what is found. Ctrl-C ends it."""

    index: Annotated[Path, tyro.conf.Positional]
    host: str = "127.0.0.1"  # address to listen on; by default nobody else can reach it
    port: int = 8080  # 0: any free one
    model: Path | None = None  # folder of the run, if it was moved since
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Refused(Exception):
    """An answer that is not 200, and a reason that the page shows."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


def serve(options: ServeOptions, console: Console) -> int:
    """Until Ctrl-C. Raises ValueError for an index or a run that cannot be used, and for an address that is taken."""
    try:
        from werkzeug.serving import make_server
    except ImportError as error:
        raise ValueError(f"serving needs werkzeug ({error}): pip install 'smaug[search]'") from None
    index = open_index(options.index)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(options.host, options.port))  # before the model, which takes seconds
        run = open_run(options.index, index.made, options.model, options.device)
        app = make_app(index, run, options.host)
        host, port = listener.getsockname()[:2]
        server = make_server(host, port, app, threaded=True, request_handler=_quiet(), fd=listener.fileno())
        if not ipaddress.ip_address(host).is_loopback:
            console.print(
                f"warning    {host} can be reached from other machines: whoever reaches port {port} sees these videos",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
        if not Path(index.made.folder).is_dir():
            console.print(
                f"warning    {one_line(index.made.folder)} is not there, so nothing can be played; "
                f"if it was moved, `index` it where it is, with --out {options.index}",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
        shown = f"[{host}]" if ":" in host else host
        what = f"{len(index.files)} files, {len(index.of_row)} clips of {one_line(index.made.folder)}"
        console.print(f"serving    {what}", highlight=False, soft_wrap=True)
        console.print(f"open       http://{shown}:{port}/ and end with Ctrl-C", highlight=False)
        server.serve_forever()  # until Ctrl-C, which it takes for its end
        console.print("stopped")
    return 0


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 65536:
        raise ValueError(f"--port {port} is no port; one is 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"--host {host} is no address of this machine: {error.strerror or error}") from None
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise ValueError(
            f"{host}:{port} cannot be used: {os.strerror(error.errno or 0)}; choose another --port, or 0 for a free one"
        ) from None


def _quiet() -> Any:
    from werkzeug.serving import WSGIRequestHandler

    class Quiet(WSGIRequestHandler):
        """No line a request, and none for a player that hangs up in the middle of a video, as they do."""

        timeout = 60  # seconds without a byte; a thread does not wait for ever

        def log(self, type: str, message: str, *args: Any) -> None:
            if type == "error" and "Timeout" not in message:
                super().log(type, message, *args)

        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            return

    return Quiet


def make_app(index: Index, run: Run, host: str) -> Callable[..., Any]:
    """The WSGI application. Any thread may call it."""
    from werkzeug.exceptions import RequestedRangeNotSatisfiable
    from werkzeug.wrappers import Request, Response
    from werkzeug.wsgi import FileWrapper

    names = {"localhost", host.lower()}
    if not _is_loopback(host):
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    # One thread for all: OpenMP starts its own threads anew for each that computes, and the server has one a request.
    encoder, decoding = ThreadPoolExecutor(1, "smaug-search"), threading.Semaphore(AT_ONCE)
    encoder.submit(embed_texts, run, ["warm up"])  # the first takes longer

    @lru_cache(maxsize=256)
    def hits(text: str, all_windows: bool) -> list[Hit]:
        def work() -> list[Hit]:
            return search(index, embed_texts(run, [text])[0].cpu().numpy(), TOP, all_windows)

        return encoder.submit(work).result()

    def made(make: Callable[[Path, str, float, float], bytes], row: int) -> bytes:
        entry, (start, end) = index.files[index.of_row[row]], index.times[row].tolist()
        with decoding:
            return make(Path(index.made.folder, entry.name), entry.kind, start, end)

    thumbnails, previews = (
        lru_cache(maxsize=kept)(lambda row, make=make: made(make, row))
        for make, kept in ((thumbnail, 1024), (preview, 32))  # 20 KB and up to 2 MB each
    )

    def answer(request: Request) -> Response:
        if not _is_for_us(request.host, names):
            raise Refused(421, "this server answers to its own address only")  # DNS rebinding: a name that leads here
        if request.method not in ("GET", "HEAD"):
            raise Refused(405, "only GET")
        if request.path in PAGE:
            name, kind = PAGE[request.path]
            return Response((files("smaug.search") / "page" / name).read_bytes(), content_type=f"{kind}; charset=utf-8")
        if request.path == "/favicon.ico":  # browsers ask for it unasked
            return Response(status=204)
        if request.path == "/search":
            text = request.args.get("q", "")
            try:
                check_text(text)
            except ValueError as error:
                raise Refused(400, str(error)) from None
            rows = [_shown(hit) for hit in hits(text.strip(), request.args.get("windows") == "1")]
            said = json.dumps({"hits": rows, "unknown": unknown_words(run, text.strip())})
            return Response(said, content_type="application/json")
        what, _, number = request.path[1:].partition("/")
        if what not in ("file", "thumbnail", "preview") or not re.fullmatch("[0-9]{1,12}", number):
            raise Refused(404, "there is nothing here")
        row = int(number)
        if row >= len(index.of_row):
            raise Refused(404, f"the index has no clip {row}")
        entry = index.files[index.of_row[row]]
        if what == "preview" and entry.kind == "image":
            raise Refused(404, "a picture has no preview")
        file = open_unchanged(index, entry)  # also before a cached picture of it is sent
        if what != "file":
            file.close()
            try:
                data = thumbnails(row) if what == "thumbnail" else previews(row)
            except DecodeError as error:
                raise Refused(500, error.reason) from None
            return Response(data, content_type="image/jpeg" if what == "thumbnail" else "video/mp4")
        found = os.fstat(file.fileno())
        kind = TYPES.get(Path(entry.name).suffix[1:].lower(), "application/octet-stream")
        response = Response(FileWrapper(file, 256 * 1024), content_type=kind, direct_passthrough=True)
        response.call_on_close(file.close)
        response.content_length = found.st_size
        response.set_etag(f"{found.st_mtime_ns:x}-{found.st_size:x}")
        # A server may ignore a range, and must where the unit is another; werkzeug would answer 416, as it would to the
        # last megabyte of a smaller file.
        asked = request.range
        if asked is None or asked.units != "bytes" or len(asked.ranges) > 1 or asked.ranges[0][0] < -found.st_size:
            request.environ.pop("HTTP_RANGE", None)
        try:
            return response.make_conditional(request.environ, accept_ranges=True, complete_length=found.st_size)
        except RequestedRangeNotSatisfiable:
            response.close()
            raise Refused(416, f"the file has {found.st_size} bytes") from None

    @Request.application
    def app(request: Request) -> Response:
        try:
            response = answer(request)
        except Refused as error:
            response = Response(json.dumps({"error": error.reason}), error.status, content_type="application/json")
        response.headers.extend(HEADERS)
        response.headers["Cache-Control"] = "no-cache"  # asks each time, so that a file that changed is not shown
        return response

    return app


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _is_for_us(host: str, names: set[str]) -> bool:
    """Whether a Host header names this server. An address does: only a name can be made to lead elsewhere."""
    name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
    try:
        ipaddress.ip_address(name.strip("[]"))
        return True
    except ValueError:
        return name.lower() in names


def _shown(hit: Hit) -> dict[str, Any]:
    return {
        "row": hit.row, "file": printable(hit.file), "start": hit.start, "end": hit.end, "when": span(hit),
        "score": round(hit.score, 3), "picture": hit.kind == "image" or hit.file.lower().endswith(".gif"),
    }  # fmt: skip


def open_unchanged(index: Index, entry: Entry) -> io.BufferedReader:
    """An indexed file, as it was indexed. Raises Refused for one that is not that any more."""
    path = Path(index.made.folder, entry.name)
    try:
        # not a pipe, which would wait for a writer; and what was no link then is none now
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if entry.real else os.O_NOFOLLOW))
    except FileNotFoundError:
        raise Refused(404, "the file is not there any more") from None
    except OSError as error:
        raise Refused(410, f"the file cannot be opened any more: {error.strerror}") from None
    file = os.fdopen(descriptor, "rb")
    found = os.fstat(descriptor)
    same = stat.S_ISREG(found.st_mode) and entry.is_of(found) and os.path.realpath(path) == (entry.real or str(path))
    if not same:
        file.close()
        raise Refused(410, "the file has changed since it was indexed; run `index` again")
    return file


def thumbnail(path: Path, kind: str, start: float, end: float) -> bytes:
    """JPEG of the frame in the middle of a window. Raises DecodeError."""
    if kind == "image":
        square = read_image(path, SIZE)[0]
    else:
        square = read_frames(path, lambda times: [_at(times, (start + end) / 2)], SIZE, seconds=SECONDS)[0]
    out = io.BytesIO()
    Image.fromarray(square).save(out, "JPEG", quality=85)
    return out.getvalue()


def preview(path: Path, kind: str, start: float, end: float) -> bytes:
    """A window as H.264 in MP4, the middle square, without sound. Raises DecodeError."""
    moments = np.arange(start, max(end, start + 1 / RATE), 1 / RATE)
    frames = read_frames(path, lambda times: [_at(times, moment) for moment in moments], SIZE, seconds=SECONDS)
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as target:
        stream = target.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "crf": "23", "threads": "1"})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            target.mux(stream.encode(VideoFrame.from_ndarray(frame, "rgb24")))
        target.mux(stream.encode(None))
    return out.getvalue()


def _at(times: np.ndarray, moment: float) -> int:
    """The frame that is shown at a moment."""
    return int(np.clip(np.searchsorted(times, moment + 1e-6, side="right") - 1, 0, len(times) - 1))
