"""The annotation files of the benchmarks, as their authors publish them, become samples and questions.

CAPTIONS and QUESTIONS say what each format calls things. Any file is read as rows, and the keys of its first row, not
its name, tell whether it holds captions, a split list, questions or answers. Videos are named by an id, so their folder
is scanned once, and an id finds its file by the name without suffix, wherever below the folder it lies; of several, the
one at the very path named, else the first. Text is UTF-8. Pickles are refused: reading one runs its code.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO
from urllib.parse import unquote

from smaug.data.manifest import ManifestError, Sample, Skip, line_not_utf8, near_file

VIDEO = ("video", "image", "clip_name", "video_id", "video_name", "image_id", "gif_name", "videoid")


@dataclass(frozen=True, slots=True)
class Layout:
    """What the rows of a format are called; of several keys, the first that a row has counts."""

    files: str  # what people have on disk, for the messages
    text: tuple[str, ...]  # keys of the caption or captions; of what is asked
    video: tuple[str, ...] = VIDEO  # keys of the video's name
    prefix: str = ""  # what stands before the id in the one place, but perhaps not in the other
    paragraph: bool = False  # a video's captions become one


# fmt: off
Format = Literal[
    "webvid", "cc3m", "msrvtt", "didemo", "activitynet", "msvd",
    "msrvtt_qa", "msrvtt_mc", "activitynet_qa", "msvd_qa", "tgif_qa",
]
CAPTIONS: dict[str, Layout] = {
    "webvid": Layout("results_2M_train.csv, or {video, caption}", ("caption", "name")),
    "cc3m": Layout("Train_GCC-training.tsv (caption, tab, URL), or {image, caption}", ("caption",)),
    "msrvtt": Layout("MSRVTT_data.json with MSRVTT_train.9k.csv, MSRVTT_JSFUSION_test.csv, or {video, caption}",
                     ("caption", "sentence")),
    "didemo": Layout("val_data.json, or {video, caption}", ("caption", "description"), paragraph=True),
    "activitynet": Layout('val_1.json ({"v_id": {timestamps, sentences}}), or {video, caption}',
                          ("caption", "sentences"), prefix="v_", paragraph=True),
    "msvd": Layout("training_label.json with train_list.txt, or {video, caption}", ("caption",), (*VIDEO, "id")),
}
QUESTIONS: dict[str, Layout] = {
    "msrvtt_qa": Layout("train.jsonl, train_qa.json, or {video, question, answer}", ("question",), prefix="video"),
    "msrvtt_mc": Layout("{clip_name, options, answer}, or {video, caption, answer}", ("options", "caption")),
    "activitynet_qa": Layout("val_q.json with val_a.json, or {video, question, answer}", ("question",), prefix="v_"),
    "msvd_qa": Layout("train_qa.json (with youtube_mapping.txt unless files are called vid1.avi), or {video, question, "
                      "answer}", ("question",), prefix="vid"),
    "tgif_qa": Layout("Train_action_question.csv, or {gif_name, question, options or none, answer}", ("question",)),
}
VIDEOS = frozenset({  # the empty one: DiDeMo has names that end in a dot
    "", "3g2", "3gp", "asf", "avi", "divx", "flv", "gif", "m2ts", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts",
    "ogv", "qt", "ts", "vob", "webm", "wmv",
})
# fmt: on
IMAGES = frozenset({"bmp", "gif", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp"})
ID_KEYS = ("question_id", "qid", "vid_id", "id")  # TGIF-QA: vid_id numbers the questions, key the GIFs
TYPE_KEYS = ("answer_type", "type", "question_type")
HEADER = {*VIDEO, "answer"}.union(*(layout.text for layout in [*CAPTIONS.values(), *QUESTIONS.values()]))
# By what separates them, the columns of files without a header: CC3M, lists of videos, MSVD's youtube_mapping.txt.
NO_HEADER = {"\t": ["caption", "video"], ",": ["video_id"], " ": ["video_id", "other_name"]}
STARTS = {  # of files that are something else than they are called
    b"\x1f\x8b": "is compressed; unpack it (gunzip) and give the file inside",
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; run git lfs pull in its repository",
    b"<": "is a web page, not an annotation file; download the file itself again",
}


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one video."""

    path: Path
    question: str  # "" in MSRVTT-MC, which asks only which caption is the right one
    answers: tuple[str, ...]  # open-ended: what counts as right, the file's first; multiple choice: the right option
    options: tuple[str, ...]  # empty when open-ended
    id: str  # as the file has it, else where it is: "val.jsonl:12"
    type: str  # as the file has it (MSRVTT-QA "what", ActivityNet-QA "3"), "" if none
    name: str  # the video, as the file has it


def read_captions(
    format: Format, files: Sequence[Path], root: Path | None, *, skipped: list[Skip] | None = None
) -> list[Sample]:
    """Samples of all files, in order of first mention; every one has a file below `root`.

    `root` is the folder of the videos or images, by default that of the first file. Captions keep their order, repeated
    ones too. DiDeMo and ActivityNet Captions describe a video by one paragraph, as paragraph retrieval has it (Zhang,
    Hu and Sha 2018): the sentences of one file, DiDeMo's in file order, ActivityNet's in time order. A file of videos
    without captions is a split list; what no list names is left out. CC3M: see `_image_finder`. Rows without a caption
    and videos that are not there are appended to `skipped`.

    Raises ManifestError if a file cannot be read or is another's, or if nothing is left.
    """
    layout = _layout(format, files, CAPTIONS)
    root = Path(files[0]).parent if root is None else root
    skips: list[Skip] = []
    said: list[tuple[Path, str, list[str]]] = []  # file, name of the video, captions
    listed: dict[str, None] = {}
    other_names: dict[str, str] = {}
    whole: Path | None = None
    for path, keys, rows in _open_all(files, skips, other_names):
        if keys.isdisjoint(layout.video):
            raise _wrong(format, layout, f"{path} names no videos; it has {sorted(keys)[:8]}")
        if keys.isdisjoint(layout.text):
            listed |= {_text(row, layout.video): None for _, row in rows}
            continue
        if format == "msrvtt" and "caption" in keys and keys & {"video_id", "image_id"}:  # MSRVTT_data.json
            whole = path
        for where, row in rows:
            name = _text(row, layout.video)
            try:
                said.append((path, name, _captions(name, row, layout)))
            except ValueError as error:
                skips.append(Skip(name or where, f"{where}: {error}"))
    if whole and not listed:
        advice = "give a split list with it; the test set's own CSV has its own sentences and is read alone"
        raise _wrong(format, layout, f"{whole} holds training and test videos alike; {advice}")
    named = listed or dict.fromkeys(name for _, name, _ in said)
    if format == "cc3m":
        find = _image_finder(root, named, skips)
    else:
        find = _video_finder(root, layout.prefix, other_names, skips)
    skips += [Skip(name, f"no file below {root} is certainly its") for name in named if not find(name)]
    wanted = {found: name for name in named if (found := find(name))}
    # Two files of ActivityNet (val_1, val_2) are two paragraphs, not one of double length.
    paragraphs: dict[tuple[Path, str], list[str]] = {}
    for path, name, texts in said:
        if (found := find(name)) in wanted:
            paragraphs.setdefault((path, found), []).extend(texts)
    captions: dict[str, list[str]] = {}
    for (_, found), texts in paragraphs.items():
        captions.setdefault(found, []).extend([" ".join(texts)] if layout.paragraph else texts)
    skips += [Skip(name, "has no caption") for found, name in wanted.items() if found not in captions]
    if not captions:
        raise _wrong(format, layout, f"{' with '.join(map(str, files))} says nothing of a file below {root}", skips)
    if skipped is not None:
        skipped += skips
    kind: Literal["video", "image"] = "image" if format == "cc3m" else "video"
    return [Sample(Path(found), kind, tuple(texts), wanted[found]) for found, texts in captions.items()]


def read_questions(
    format: Format, files: Sequence[Path], root: Path | None, *, skipped: list[Skip] | None = None
) -> list[Question]:
    """Questions of all files, in their order; every one has a video below `root`.

    Questions and answers in files of their own (ActivityNet-QA) are joined by question_id. The answer to a multiple
    choice is an index from 0. Each question lost (no answer, no video) is one Skip, so that the lost share is known.

    Raises ManifestError if a file cannot be read or is another's, or if nothing is left.
    """
    layout = _layout(format, files, QUESTIONS)
    root = Path(files[0]).parent if root is None else root
    skips: list[Skip] = []
    asked: list[tuple[str, dict[str, Any]]] = []
    answers: dict[str, dict[str, Any]] = {}
    other_names: dict[str, str] = {}
    for path, keys, rows in _open_all(files, skips, other_names):
        if not keys.isdisjoint(layout.video) and not keys.isdisjoint(layout.text):
            asked += rows
        elif "answer" in keys:
            answers |= {id: row for _, row in rows if (id := _text(row, ID_KEYS))}
        else:
            raise _wrong(format, layout, f"{path} has no questions; it has {sorted(keys)[:8]}")
    find = _video_finder(root, layout.prefix, other_names, skips)
    questions = []
    for where, row in asked:
        name = _text(row, layout.video)
        answered = row if "answer" in row else answers.get(_text(row, ID_KEYS), {}) | row
        try:
            questions.append(_question(format, where, answered, name, find(name)))
        except ValueError as error:
            skips.append(Skip(name or where, f"{where}: {error}"))
    if not questions:
        raise _wrong(format, layout, f"{' with '.join(map(str, files))} says nothing of a file below {root}", skips)
    if skipped is not None:
        skipped += skips
    return questions


def read_answers(file: Path) -> list[str]:
    """A closed answer list: {"answer": number} in order of the numbers, a JSON list, or a text file, one a line.

    The place in the list is the class, so numbers must be 0, 1, 2, ... without gaps and no answer may come twice.
    """
    with _opened(file) as opened:
        text = opened.read().strip()
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    answers = _json(file, text) if text.startswith(("{", "[")) else lines
    if isinstance(answers, dict):
        numbers = list(answers.values())
        if any(type(number) is not int for number in numbers) or sorted(numbers) != list(range(len(numbers))):
            raise ManifestError(f'{file}: number the answers 0, 1, 2, ... without gaps: {{"yes": 0, "no": 1, ...}}.')
        answers = sorted(answers, key=answers.__getitem__)
    if not all(isinstance(answer, str) for answer in answers) or not 0 < len(set(answers)) == len(answers):
        raise ManifestError(f"{file}: answers are text, at least one, and none comes twice, as each is one class.")
    return answers


def _layout(format: str, files: Sequence[Path], layouts: dict[str, Layout]) -> Layout:
    if format not in layouts:
        raise ManifestError(f"{format!r} is not one of {', '.join(layouts)}, which this reads.")
    if not files:
        raise _wrong(format, layouts[format], "no annotation file is given")
    return layouts[format]


def _wrong(format: str, layout: Layout, problem: str, skips: Sequence[Skip] = ()) -> ManifestError:
    first = f"; the first of {len(skips)} left out, {skips[0].name}: {skips[0].reason}" if skips else ""
    return ManifestError(f"{problem}{first}. {format} is read from {layout.files} (as a JSON list or JSONL).")


# Fields of a row. A ValueError says why the row cannot be used.


def _text(row: dict[str, Any], keys: Sequence[str]) -> str:
    """The first of `keys` that is text or a whole number; "" if none is."""
    values = [str(row[key]).strip() for key in keys if type(row.get(key)) in (str, int)]
    return next(filter(None, values), "")


def _texts(value: Any, what: str) -> list[str]:
    """What is said by a text or a list of texts."""
    said = value if isinstance(value, list) else [value]
    if wrong := [text for text in said if text is not None and not isinstance(text, str)]:
        raise ValueError(f"the {what} must be text, not {wrong[0]!r:.60}")
    texts = [text.strip() for text in said if text and text.strip()]
    if not texts:
        raise ValueError(f"empty {what}")
    return texts


def _captions(name: str, row: dict[str, Any], layout: Layout) -> list[str]:
    if not name:
        raise ValueError("names no video")
    value = next((row[key] for key in layout.text if key in row), None)
    times = row.get("timestamps")
    if isinstance(value, list) and times is not None:
        try:
            value = [text for _, text in sorted(zip(times, value, strict=True), key=lambda pair: pair[0])]
        except (TypeError, ValueError):
            raise ValueError(f"needs one [start, end] a sentence; it has {len(value)} sentences") from None
    return _texts(value, "caption")


def _question(format: str, where: str, row: dict[str, Any], name: str, path: str) -> Question:
    question = _text(row, ["question"])
    if not name:
        raise ValueError("names no video")
    if not question and format != "msrvtt_mc":
        raise ValueError("empty question")
    if not path:
        raise ValueError("its video is not there")
    given: list[Any] = []
    options: list[str] = []
    if format in ("msrvtt_mc", "tgif_qa"):
        given = next((row[key] for key in ("options", "caption") if isinstance(row.get(key), list)), [])
        given = given or [row[key] for key in ("a1", "a2", "a3", "a4", "a5") if key in row]
    if given or format == "msrvtt_mc":
        options = _texts(given, "option")
        if len(options) < max(2, len(given)):
            raise ValueError("an empty option, or fewer than two")
        number = _text(row, ["answer"])
        if not (number.isdecimal() and int(number) < len(options)):
            raise ValueError(f"the answer to {len(options)} options is a number from 0, not {row.get('answer')!r:.60}")
        answers = [options[int(number)]]
    elif format == "tgif_qa":
        answers = _texts(_text(row, ["answer"]), "answer")  # how many times may be a number
    else:
        answers = _texts(row.get("answer_text", row.get("answer")), "answer")  # VIOLET: a text beside its class
    id, type = _text(row, ID_KEYS) or where, _text(row, TYPE_KEYS)
    return Question(Path(path), question, tuple(answers), tuple(options), id, type, name)


# Files as rows

_Rows = Iterator[tuple[str, dict[str, Any]]]  # where, such as "val.jsonl:12", and what
_File = tuple[Path, set[str], _Rows]  # and the keys of the first row


def _open_all(files: Sequence[Path], skips: list[Skip], other_names: dict[str, str]) -> Iterator[_File]:
    """Path, keys of the first row, and rows of each file; youtube_mapping.txt goes to `other_names`, both ways."""
    for path in dict.fromkeys(files):
        rows = _rows(path, skips)
        first = list(itertools.islice(rows, 1))
        keys = {key for _, row in first for key in row}
        rows = itertools.chain(first, rows)
        if "other_name" in keys:
            for _, row in rows:
                name, other = row["video_id"], row.get("other_name", "")
                other_names |= {name: other, other: name}
        else:
            yield path, keys, rows


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open("rb") as file:
            start = file.read(32)
        if path.suffix.lower() in (".pkl", ".pickle") or start[:1] == b"\x80":
            raise ManifestError(f"{path} is a pickle, and reading one runs its code; use the data set's text files.")
        for magic, reason in STARTS.items():
            if start.startswith(magic):
                raise ManifestError(f"{path} {reason}.")
        with path.open(encoding="utf-8-sig", newline="") as text:
            yield text
    except OSError as error:
        near = "" if os.path.exists(path) else near_file(path)
        raise ManifestError(f"{path} cannot be read: {error.strerror or error}{near}.") from None
    except UnicodeDecodeError:
        line = line_not_utf8(path)
        raise ManifestError(f"{path}, line {line}, is not UTF-8; save it as that: iconv -f latin1 -t utf-8") from None


def _rows(path: Path, skips: list[Skip]) -> _Rows:
    with _opened(path) as file:
        first = file.read(4096).lstrip().partition("\n")[0].rstrip()
        file.seek(0)
        if not first:
            raise ManifestError(f"{path} is empty; download or copy it again.")
        yield from _json_rows(path, file.read()) if first[0] in "[{" else _table_rows(path, file, first, skips)


def _table_rows(path: Path, file: TextIO, first: str, skips: list[Skip]) -> _Rows:
    delimiter = next((mark for mark in NO_HEADER if mark in first), ",")
    if delimiter == ",":  # strict: a quote that is never closed would swallow the rest of the file
        reader = csv.reader(file, strict=True)
    else:  # a quote in web text is itself
        reader = csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    try:
        header = [column.strip() for column in next(filter(any, reader))]
        rows: Iterator[list[str]] = reader
        if HEADER.isdisjoint(header) or "://" in first:
            rows, header = itertools.chain([header], reader), NO_HEADER[delimiter]
        for fields in rows:
            where = f"{path.name}:{reader.line_num}"
            if len(fields) > len(header):
                skips.append(Skip(where, f"{len(fields)} fields in {len(header)} columns; quote a field with commas"))
            elif any(fields):
                yield where, dict(zip(header, fields, strict=False))
    except csv.Error as error:
        raise ManifestError(f"{path}:{reader.line_num}: {error}; close every quote, double it inside.") from None


def _json_rows(path: Path, text: str) -> _Rows:
    """Rows of JSONL, of a list, of MSR-VTT's list inside an object, or of ActivityNet's {video: row}."""
    first, _, more = text.strip().partition("\n")
    if first[0] == "{" and first.rstrip()[-1] == "}" and (more or path.suffix == ".jsonl"):
        lines = enumerate(text.split("\n"), 1)
        rows = ((f"{path.name}:{number}", _json(path, line, number)) for number, line in lines if line.strip())
    else:
        data = _json(path, text)
        if isinstance(data, dict):
            lists = [data[key] for key in ("sentences", "annotations") if isinstance(data.get(key), list)]
            if not lists and not all(isinstance(row, dict) for row in data.values()):
                raise ManifestError(f"{path} is no list of rows; a list of answers is read by read_answers.")
            data = lists[0] if lists else [{"video": name} | row for name, row in data.items()]
        rows = ((f"{path.name}[{number}]", row) for number, row in enumerate(data))
    for where, row in rows:
        if not isinstance(row, dict | str):
            raise ManifestError(f"{path.parent / where}: a {type(row).__name__} where an object is needed.")
        yield where, {"video_id": row} if isinstance(row, str) else row  # a text: in a list of videos


def _json(path: Path, text: str, line: int = 0) -> Any:
    """`line`: that of JSONL that `text` is, 0 for a whole file."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError itself: a number of thousands of digits
        line, column = line or getattr(error, "lineno", 1), getattr(error, "colno", 1)
        reason = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", error)
        raise ManifestError(f"{path}, line {line}, column {column}: not JSON ({reason}); download it again.") from None


# Videos and images on disk


def _stem(name: str, suffixes: frozenset[str]) -> str:
    """Without folder, and without suffix if it is one: a dot may also be part of an id."""
    base = name.rpartition("/")[2]
    stem, _, suffix = base.rpartition(".")
    return stem if stem and suffix.lower() in suffixes else base


def _scan(root: Path, suffixes: frozenset[str], skips: list[Skip]) -> dict[str, list[str]]:
    """Name without suffix -> files below `root`. A folder met again through a link is left out."""
    if not root.is_dir():
        raise ManifestError(f"{root} is not a folder; root is the folder that holds the videos or images.")
    files: dict[str, list[str]] = {}
    seen = set()
    unread: list[OSError] = []
    for folder, below, names in os.walk(root, onerror=unread.append, followlinks=True):
        here = os.stat(folder)
        if (here.st_dev, here.st_ino) in seen:
            below.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            stem = _stem(name, suffixes)
            if stem != name and not name.startswith("."):  # ._video0.mp4 of a Mac
                files.setdefault(stem, []).append(os.path.join(folder, name))
    skips += [Skip(str(error.filename), "a folder that cannot be read") for error in unread]
    return files


def _video_finder(root: Path, prefix: str, other_names: Mapping[str, str], skips: list[Skip]) -> Callable[[str], str]:
    """Name of a video -> its file, or "". Encoded again, a.mov may be called a.mp4 or a.mov.mp4."""
    files = _scan(root, VIDEOS, skips)

    @functools.cache
    def find(name: str) -> str:
        stem = _stem(name, VIDEOS)
        names = [name.rpartition("/")[2], stem, prefix + stem, stem.removeprefix(prefix)]
        names += [other_names[name] for name in names if name in other_names]
        found = next((files[name] for name in names if name in files), [])
        if len(found) == 1 or ("." not in name and "/" not in name):  # an id is no path: save a look at the disk
            return next(iter(found), "")
        path = os.path.join(root, name)
        return path if os.path.isfile(path) else next(iter(found), "")

    return find


def _image_finder(root: Path, names: Iterable[str], skips: list[Skip]) -> Callable[[str], str]:
    """Name or URL of an image of CC3M -> its file, or "".

    A name is the path below `root`, since downloads number their images and numbers recur. A URL finds what can only be
    its own: what img2dataset's .parquet says, else what alone is called as its last part, if that is no number.
    """
    files = _scan(root, IMAGES, skips)
    # http://a/b/IMG_3422.JPG?imgmax=800 -> IMG_3422
    last = {url: _stem(unquote(url.partition("?")[0].partition("#")[0]), IMAGES) for url in names if "://" in url}
    sure = _shard_images(files, last, skips)
    urls = Counter(last.values())

    @functools.cache
    def find(name: str) -> str:
        if name not in last:
            path = os.path.join(root, name)
            return path if os.path.isfile(path) else ""
        found = files.get(last[name], [])
        alone = len(found) == 1 and urls[last[name]] == 1 and not last[name].isdecimal()
        return sure.get(name) or (found[0] if alone else "")

    return find


def _shard_images(files: dict[str, list[str]], urls: Collection[str], skips: list[Skip]) -> dict[str, str]:
    """URL -> image, from the .parquet files with columns url and key that img2dataset writes beside its folders."""
    import pyarrow.parquet

    folders = sorted({os.path.dirname(path) for paths in files.values() for path in paths})
    images: dict[str, str] = {}
    for folder in filter(lambda folder: os.path.isfile(f"{folder}.parquet"), folders):
        try:
            with pyarrow.parquet.ParquetFile(f"{folder}.parquet") as shard:
                for batch in shard.iter_batches(columns=["url", "key"]):
                    for row in batch.to_pylist():
                        if row["url"] in urls:
                            for path in files.get(str(row["key"]), []):
                                if os.path.dirname(path) == folder:
                                    images.setdefault(row["url"], path)
        except (pyarrow.ArrowException, OSError, KeyError):
            skips.append(Skip(f"{folder}.parquet", "not a whole Parquet file of img2dataset; download the shard again"))
    return images
