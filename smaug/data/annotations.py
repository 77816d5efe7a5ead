"""The annotation files of the benchmarks, as their authors publish them, become samples and questions.

What a file holds (captions, a split, questions, answers) is told by its content, not by its name. Annotations name
videos by an id, so the folder of the videos is scanned once, and an id finds its file by the name without suffix,
wherever below the folder it lies; of several, the one at the very path named, else the first in alphabetical order.
Text is UTF-8, with or without a byte order mark. Pickles are refused: reading one runs its code.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from smaug.data.manifest import ManifestError, Sample, Skip, _line_not_utf8, _near_file

Format = Literal[
    "webvid",
    "cc3m",
    "msrvtt",
    "didemo",
    "activitynet",
    "msvd",
    "msrvtt_qa",
    "msrvtt_mc",
    "activitynet_qa",
    "msvd_qa",
    "tgif_qa",
]

# What people have on disk, for the messages.
FILES = {
    "webvid": "results_2M_train.csv (videoid, name), or a JSON list of {video, caption}",
    "cc3m": "Train_GCC-training.tsv (caption, tab, URL), or a JSON list of {image, caption}",
    "msrvtt": "MSRVTT_data.json with MSRVTT_train.9k.csv, MSRVTT_JSFUSION_test.csv, or {video, caption} as JSON(L)",
    "didemo": "val_data.json (a list of {video, description}), or {video, caption} as JSON(L)",
    "activitynet": 'val_1.json ({"v_id": {timestamps, sentences}}), or {video, caption} as JSON(L)',
    "msvd": "training_label.json or AllVideoDescriptions.txt with train_list.txt, or {video, caption} as JSON(L)",
    "msrvtt_qa": "train.jsonl or train_qa.json ({video_id, question, answer})",
    "msrvtt_mc": "msrvtt_mc_test.jsonl ({clip_name, options, answer}), or a JSON list of {video, caption, answer}",
    "activitynet_qa": "val_q.json with val_a.json, or a JSON list of {video, question, answer}",
    "msvd_qa": "train.jsonl or train_qa.json ({video_id, question, answer})",
    "tgif_qa": "Train_action_question.csv (tab separated), or {gif_name, question, answer} as JSON(L)",
}
# fmt: off
VIDEOS = frozenset({
    ".3g2", ".3gp", ".asf", ".avi", ".divx", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
    ".mts", ".ogv", ".qt", ".ts", ".vob", ".webm", ".wmv",
})
# fmt: on
IMAGES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
VIDEO_KEYS = ("video", "image", "clip_name", "video_id", "video_name", "image_id", "gif_name")
CAPTION_KEYS = ("caption", "sentence", "description")
ID_KEYS = ("question_id", "qid", "vid_id", "id")  # TGIF-QA: vid_id numbers the questions, key the GIFs
TYPE_KEYS = ("answer_type", "type", "question_type")
HEADER = {"videoid", "video_id", "gif_name", "clip_name", "caption", "question", "sentence", "url"}
STARTS = {  # of files that are something else than they are called
    b"\x1f\x8b": "is compressed; unpack it (gunzip) and give the file inside",
    b"PK\x03\x04": "is a zip archive; unpack it and give the file inside",
    b"\xff\xfe": "is UTF-16; save it as UTF-8",
    b"\xfe\xff": "is UTF-16; save it as UTF-8",
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself; run git lfs pull in its repository",
    b"<!": "is a web page, not an annotation file; download the file itself again",
    b"<html": "is a web page, not an annotation file; download the file itself again",
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
    Hu and Sha 2018): the sentences of one file, DiDeMo's in file order, ActivityNet's in time order. MSR-VTT and MSVD
    take split lists and leave out the videos that are in none; MSVD without a list is all of its file. MSR-VTT's 1k-A
    has its own sentences, so MSRVTT_data.json is not read beside it. CC3M: see `_image_finder`.
    Rows without a caption and videos that are not there are appended to `skipped`.

    Raises ManifestError if a file cannot be read or is another's, if no caption is usable, or no video is found.
    """
    reader = _reader(format, CAPTIONS, "captions", "read_questions")
    opened, folder = _open_all(format, files, root)
    skips: list[Skip] = []
    captions: dict[str, list[str]] = {}
    # Two files of ActivityNet (val_1, val_2) are two paragraphs, not one of double length.
    for group in [[file] for file in opened] if format in PARAGRAPHS else [opened]:
        said: dict[str, list[str]] = {}
        known: dict[str, str] = {}  # DiDeMo has 33234611@N00_3567949618_0bee41c6f7 both as .mov and as .mp4
        for where, name, value in reader(format, group, skips):
            texts, reason = _texts(value, "caption")
            if not name:
                skips.append(Skip(where, "names no video"))
            elif reason:
                skips.append(Skip(where, f"{reason} (of {name})"))
            else:
                same = known.setdefault(_stem(name), name) if format in PARAGRAPHS else name
                said.setdefault(same, []).extend(texts)
        for name, texts in said.items():
            captions.setdefault(name, []).extend([" ".join(texts)] if format in PARAGRAPHS else texts)
    if not captions:
        raise _nothing(format, opened, "caption", skips)
    find = _image_finder(folder, captions, skips) if format == "cc3m" else _video_finder(format, folder, opened)
    kind: Literal["video", "image"] = "image" if format == "cc3m" else "video"
    found: dict[str, tuple[str, list[str]]] = {}  # path -> name, captions: two names may be one file
    for name, texts in captions.items():
        path, reason = find(name)
        if path:
            found.setdefault(path, (name, []))[1].extend(texts)
        else:
            skips.append(Skip(name, reason))
    if not found:
        raise _none_there(folder, opened, next(iter(captions)), len(captions))
    if skipped is not None:
        skipped += skips + [Skip(path, "a folder that cannot be read") for path in folder.unread]
    return [Sample(Path(folder.root, path), kind, tuple(texts), name) for path, (name, texts) in found.items()]


def read_questions(
    format: Format, files: Sequence[Path], root: Path | None, *, skipped: list[Skip] | None = None
) -> list[Question]:
    """Questions of all files, in their order; every one has a video below `root`.

    Questions and answers in files of their own (ActivityNet-QA) are joined by question_id. The answer to a multiple
    choice is an index from 0. Closed answer lists among the files are passed over; `read_answers` reads them.
    Each question lost (no answer, no video) is one Skip, so the share of a benchmark that was lost can be told.

    Raises ManifestError if a file cannot be read or is another's, if no question is usable, or no video is found.
    """
    reader = _reader(format, QUESTIONS, "questions", "read_captions")
    opened, folder = _open_all(format, files, root)
    skips: list[Skip] = []
    asked = []
    for where, row in reader(format, opened, skips):
        question = _question(format, where, row)
        if isinstance(question, Skip):
            skips.append(question)
        else:
            asked.append(question)
    if not asked:
        raise _nothing(format, opened, "question", skips)
    find = _video_finder(format, folder, opened)
    paths = {name: find(name) for name in dict.fromkeys(question["name"] for question in asked)}
    found = []
    for question in asked:
        path, reason = paths[question["name"]]
        if path:
            found.append(Question(path=Path(folder.root, path), **question))
        else:
            skips.append(Skip(question["name"], f"{reason}, for question {question['id']}"))
    if not found:
        raise _none_there(folder, opened, asked[0]["name"], len(paths))
    if skipped is not None:
        skipped += skips + [Skip(path, "a folder that cannot be read") for path in folder.unread]
    return found


def read_answers(file: Path) -> list[str]:
    """A closed answer list: {"answer": number} in order of the numbers, a JSON list, or a text file, one a line.

    The place in the list is the class, so numbers must be 0, 1, 2, ... without gaps and no answer may come twice.
    """
    opened = _open(file, "ans2label.json, a JSON list of answers, or a text file with one answer a line")
    if isinstance(opened.data, dict):
        numbers = opened.data
        if wrong := [answer for answer, number in numbers.items() if type(number) is not int]:
            raise ManifestError(f'{file}: {wrong[0]!r} has no number; an answer list is {{"yes": 0, "no": 1, ...}}.')
        answers = sorted(numbers, key=numbers.__getitem__)
        for place, answer in enumerate(answers):
            if numbers[answer] != place:
                raise ManifestError(
                    f"{file}: {answer!r} has number {numbers[answer]} where {place} is next; "
                    "number the answers 0, 1, 2, ... without gaps."
                )
    elif opened.layout == "json":
        answers = opened.data
        if wrong := [answer for answer in answers if not isinstance(answer, str)]:
            raise ManifestError(f"{file}: an answer must be text, not {wrong[0]!r:.60}.")
    elif opened.layout == "jsonl":
        raise ManifestError(f"{file} has one object a line, so it is no answer list; perhaps it holds the questions.")
    else:
        answers = [line.strip() for _, line in opened.lines() if line.strip()]
    if not answers:
        raise ManifestError(f"{file} has no answers.")
    if len(set(answers)) < len(answers):
        twice = Counter(answers).most_common(1)[0][0]
        raise ManifestError(f"{file} has {twice!r} more than once; an answer is one class, so name it once.")
    return answers


# Files


@dataclass(frozen=True, slots=True, eq=False)
class _File:
    """An annotation file that was looked into; JSON is loaded, the others are read when asked for."""

    path: Path
    layout: Literal["json", "jsonl", "table", "text"]
    columns: frozenset[str]  # of the header or the first object; empty if there is none
    data: Any = None
    delimiter: str = ","

    def rows(self, skips: list[Skip], key: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
        """(where, row) of a table, JSONL, a JSON list of objects, or the one under `key` of a JSON object."""
        if self.layout == "table":
            yield from self._table(skips)
        elif self.layout == "jsonl":
            for number, line in self.lines():
                if line.strip():
                    where = f"{self.path.name}:{number}"
                    yield where, _object(self.path.parent / where, _json(self.path, line, number))
        else:
            place = f"{self.path.name}{f': {key}' if key else ''}"
            for index, row in enumerate(self.data[key] if key else self.data):
                where = f"{place}[{index}]"
                yield where, _object(self.path.parent / where, row)

    def _table(self, skips: list[Skip]) -> Iterator[tuple[str, dict[str, Any]]]:
        with _said(self.path), self.path.open(encoding="utf-8-sig", newline="") as file:
            if self.delimiter == "\t":  # a quote in web text is itself
                reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            else:  # strict: a quote that is never closed would swallow the rest of the file
                reader = csv.reader(file, strict=True)
            try:
                header = [column.strip() for column in next(filter(any, reader))]
                for fields in reader:
                    where = f"{self.path.name}:{reader.line_num}"
                    if len(fields) > len(header):
                        reason = f"{len(fields)} fields in {len(header)} columns; quote a field with commas"
                        skips.append(Skip(where, reason))
                    elif any(fields):
                        yield where, dict(zip(header, fields, strict=False))
            except csv.Error as error:
                raise ManifestError(
                    f"{self.path}:{reader.line_num}: {error}; close every quote, and double it inside a quoted field."
                ) from None

    def lines(self) -> Iterator[tuple[int, str]]:
        with _said(self.path), self.path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                yield number, line.rstrip("\r\n")


@contextmanager
def _said(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ManifestError(f"{path} does not exist; check the path{_near_file(path)}.") from None
    except IsADirectoryError:
        raise ManifestError(f"{path} is a folder; name the annotation file in it.") from None
    except PermissionError:
        raise ManifestError(f"{path} may not be read by this user; change its permissions.") from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read: {error.strerror or error}; download or copy it again.") from None
    except UnicodeDecodeError:
        raise ManifestError(
            f"{path}, line {_line_not_utf8(path)}, is not UTF-8; save the file as UTF-8, "
            f"for example: iconv -f latin1 -t utf-8 {path.name} > utf8{path.suffix}"
        ) from None


def _open(path: Path, instead: str) -> _File:
    """Looks into a file; `instead` says what could be given in its place."""
    with _said(path), path.open("rb") as file:
        start = file.read(32)
    if path.suffix.lower() in (".pkl", ".pickle") or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5"):
        raise ManifestError(f"{path} is a pickle, and reading a pickle runs its code; use instead {instead}.")
    if reason := next((reason for magic, reason in STARTS.items() if start.startswith(magic)), ""):
        raise ManifestError(f"{path} {reason}.")
    with _said(path), path.open(encoding="utf-8-sig") as text:
        first = next((line for line in text if line.strip()), "").strip()
        more = any(line.strip() for line in text) if first[:1] == "{" else False
    if not first:
        raise ManifestError(f"{path} is empty; download or copy it again.")
    if first[0] == "{" and more and _is_object(first):
        return _File(path, "jsonl", frozenset(json.loads(first)))
    if first[0] in "[{":
        with _said(path):
            data = _json(path, path.read_text(encoding="utf-8-sig"), 0)
        if isinstance(data, dict) and any(isinstance(data.get(key), str) for key in VIDEO_KEYS):
            return _File(path, "jsonl", frozenset(data))  # of one line
        head = data[0] if isinstance(data, list) and data else data
        return _File(path, "json", frozenset(head) if isinstance(head, dict) else frozenset(), data)
    delimiter = "\t" if "\t" in first else ","
    columns = frozenset(column.strip().strip('"') for column in first.split(delimiter))
    return _File(path, "table" if columns & HEADER else "text", columns & HEADER and columns, delimiter=delimiter)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json(path: Path, text: str, number: int) -> Any:
    """`number`: the line of JSONL that `text` is, 0 for a whole file."""
    advice = "repair this line, or download the file again" if number else "download or copy the file again"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = number or error.lineno
        raise ManifestError(f"{path}, line {line}, column {error.colno}: not JSON ({error.msg}); {advice}.") from None
    except RecursionError:
        raise ManifestError(f"{path}, line {number or 1}, column 1: nested too deeply; {advice}.") from None
    except ValueError as error:  # a number of thousands of digits
        raise ManifestError(f"{path}, line {number or 1}, column 1: not JSON ({error}); {advice}.") from None


def _object(where: Path, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ManifestError(f"{where}: a {type(row).__name__} where an object is needed, such as {{...}}.")
    return row


def _reader(format: str, readers: dict[str, Any], content: str, other: str) -> Any:
    if format not in FILES:
        raise ManifestError(f"there is no annotation format {format!r}; choose from {', '.join(FILES)}.")
    if format not in readers:
        raise ManifestError(f"{format} has no {content}; use {other}, or one of {', '.join(readers)}.")
    return readers[format]


def _open_all(format: str, files: Sequence[Path], root: Path | None) -> tuple[list[_File], _Folder]:
    if not files:
        raise ManifestError(f"{format} needs its annotation files: {FILES[format]}.")
    opened = [_open(Path(file), FILES[format]) for file in dict.fromkeys(files)]
    root = Path(files[0]).parent if root is None else root
    return opened, _scan(root, IMAGES if format == "cc3m" else VIDEOS)


def _nothing(format: str, files: Sequence[_File], content: str, skips: Sequence[Skip]) -> ManifestError:
    first = f"; the first of {len(skips)} rows, {skips[0].name}: {skips[0].reason}" if skips else ""
    return ManifestError(f"{_these(files)} has no usable {content}{first}. {format} is read from {FILES[format]}.")


def _these(files: Sequence[_File]) -> str:
    return " with ".join(str(file.path) for file in files)


def _wrong(format: str, file: _File, has: str) -> ManifestError:
    columns = f" (it has {', '.join(map(repr, sorted(file.columns)[:8]))})" if file.columns else ""
    return ManifestError(f"{file.path} has no {has}{columns}; {format} is read from {FILES[format]}.")


# Rows


def _text(row: dict[str, Any], keys: Iterable[str]) -> str:
    """The first of `keys` that is text or a whole number; "" if none is."""
    for key in keys:
        value = row.get(key)
        if type(value) is int:
            return str(value)
        if isinstance(value, str) and value.strip():
            return value.strip()
    return ""


def _texts(value: Any, what: str) -> tuple[list[str], str]:
    """What is said by a text or a list of texts, and why nothing is."""
    said = value if isinstance(value, list) else [value]
    if wrong := [text for text in said if text is not None and not isinstance(text, str)]:
        return [], f"the {what} must be text, not {wrong[0]!r:.60}"
    texts = [text.strip() for text in said if text and text.strip()]
    return texts, "" if texts else f"empty {what}"


_Captions = Iterator[tuple[str, str, Any]]  # where, name of the video, caption or captions


def _plain(format: str, files: Sequence[_File], skips: list[Skip]) -> _Captions:
    """One object a video, or a caption: {video, caption}, by whichever of the usual names."""
    keys = (*VIDEO_KEYS, "id") if format == "msvd" else VIDEO_KEYS
    for file in files:
        caption = next((key for key in CAPTION_KEYS if key in file.columns), "")
        if file.layout == "text" or (file.layout == "json" and not isinstance(file.data, list)):
            raise _wrong(format, file, "captions")
        if file.data != [] and (not caption or not file.columns & set(keys)):
            raise _wrong(format, file, "videos with a caption")
        for where, row in file.rows(skips):
            yield where, _text(row, keys), row.get(caption)


def _webvid(format: str, files: Sequence[_File], skips: list[Skip]) -> _Captions:
    for file in files:
        if file.layout != "table":
            yield from _plain(format, [file], skips)
            continue
        if not {"videoid", "name"} <= file.columns:
            raise _wrong(format, file, "columns videoid and name")
        for where, row in file.rows(skips):
            name, folder = _text(row, ["videoid"]), _text(row, ["page_dir"])
            yield where, name and f"{folder}/{name}.mp4".lstrip("/"), row.get("name")


def _cc3m(format: str, files: Sequence[_File], skips: list[Skip]) -> _Captions:
    for file in files:
        if file.layout == "json" or file.layout == "jsonl":
            yield from _plain(format, [file], skips)
            continue
        for number, line in file.lines():
            where = f"{file.path.name}:{number}"
            caption, tab, url = line.partition("\t")
            url = url.partition("\t")[0].strip()
            if "://" in url:
                yield where, url, caption
            elif line.strip():
                skips.append(Skip(where, "no URL in its second column" if tab else "no tab between caption and URL"))


def _msrvtt(format: str, files: Sequence[_File], skips: list[Skip]) -> _Captions:
    """1k-A's own sentence is its only query, so MSRVTT_data.json beside it is not needed."""
    lists, rest = _lists(files)
    test = [file for file in rest if file.layout == "table"]
    whole = {file.path: key for file in rest for key in ("sentences", "annotations") if _has_list(file, key)}
    if test and lists:
        raise ManifestError(
            f"{_these([*test, *lists])}: the first brings its own sentences, the other is a list of videos; "
            "training and test split are read apart, one call each."
        )
    if test:
        yield from _plain(format, [file for file in rest if file.path not in whole], skips)
        return
    if whole and not lists:
        raise ManifestError(
            f"{next(iter(whole))} holds training and test videos alike; give a split list with it, "
            "such as MSRVTT_train.9k.csv or train_list_jsfusion.txt."
        )
    yield from _of_split(format, lists, rest, _msrvtt_rows(format, rest, whole, skips), skips)


def _msrvtt_rows(format: str, files: Sequence[_File], whole: dict[Path, str], skips: list[Skip]) -> _Captions:
    for file in files:
        if key := whole.get(file.path):
            for where, row in file.rows(skips, key):
                yield where, _text(row, ("video_id", "image_id")), row.get("caption")
        else:
            yield from _plain(format, [file], skips)


def _msvd(format: str, files: Sequence[_File], skips: list[Skip]) -> _Captions:
    lists, rest = _lists([file for file in files if not _is_mapping(file)])
    yield from _of_split(format, lists, rest, _msvd_rows(format, rest, skips), skips, _mapping(files))


def _msvd_rows(format: str, files: Sequence[_File], skips: list[Skip]) -> _Captions:
    for file in files:
        if file.layout != "text":
            yield from _plain(format, [file], skips)
            continue
        for number, line in file.lines():  # AllVideoDescriptions.txt: id, blank, caption; its head is marked with #
            name, _, caption = line.strip().partition(" ")
            if name and not name.startswith("#"):
                if not re.fullmatch(r".+_\d+_\d+|vid\d+", name):
                    raise _wrong(format, file, f"captions: its line {number} does not begin with a video's id")
                yield f"{file.path.name}:{number}", name, caption


def _activitynet(format: str, files: Sequence[_File], skips: list[Skip]) -> _Captions:
    for file in files:
        if not isinstance(file.data, dict):
            yield from _plain(format, [file], skips)
            continue
        for name, event in file.data.items():
            where = f"{file.path.name}: {name}"
            if not isinstance(event, dict) or not isinstance(event.get("sentences"), list):
                raise ManifestError(
                    f"{file.path}: {name!r} has no list of sentences; {format} is read from {FILES[format]}."
                )
            sentences, times = event["sentences"], event.get("timestamps")
            if times is None:
                yield where, name, sentences
            elif not _are_times(times) or len(times) != len(sentences):
                skips.append(Skip(where, f"needs one [start, end] a sentence; it has {len(sentences)} sentences"))
            else:
                order = sorted(range(len(times)), key=times.__getitem__)
                yield where, name, [sentences[place] for place in order]


def _are_times(times: Any) -> bool:
    return isinstance(times, list) and all(
        isinstance(pair, list) and all(isinstance(time, int | float) for time in pair) for pair in times
    )


PARAGRAPHS = {"didemo", "activitynet"}
CAPTIONS: dict[str, Callable[[str, Sequence[_File], list[Skip]], _Captions]] = {
    "webvid": _webvid,
    "cc3m": _cc3m,
    "msrvtt": _msrvtt,
    "didemo": _plain,
    "activitynet": _activitynet,
    "msvd": _msvd,
}


# Splits


def _has_list(file: _File, key: str) -> bool:
    return isinstance(file.data, dict) and isinstance(file.data.get(key), list)


def _lists(files: Sequence[_File]) -> tuple[list[_File], list[_File]]:
    """Files that only name videos, one a line or row, and the others."""
    lists = [file for file in files if _is_list(file)]
    return lists, [file for file in files if file not in lists]


def _is_list(file: _File) -> bool:
    if file.layout == "table":
        return "video_id" in file.columns and not file.columns & {*CAPTION_KEYS, "question"}
    if file.layout == "json":
        return isinstance(file.data, list) and bool(file.data) and isinstance(file.data[0], str)
    return file.layout == "text" and all(len(line.split()) < 2 for _, line in itertools.islice(file.lines(), 100))


def _listed(file: _File) -> Iterator[str]:
    if file.layout == "table":
        yield from (name for _, row in file.rows([]) if (name := _text(row, ["video_id"])))
    elif file.layout == "json":
        yield from (name for name in file.data if isinstance(name, str))
    else:
        yield from (name for _, line in file.lines() if (name := line.strip()))


def _of_split(
    format: str,
    lists: Sequence[_File],
    files: Sequence[_File],
    rows: _Captions,
    skips: list[Skip],
    other_name: dict[str, str] | None = None,
) -> _Captions:
    """Those of the `rows` whose video is in one of the lists; all of them if there is no list."""
    if not files:
        raise ManifestError(
            f"{_these(lists)} names videos but has no captions; give the file of the captions with it: {FILES[format]}."
        )
    if not lists:
        yield from rows
        return
    missing = dict.fromkeys(name for file in lists for name in _listed(file))
    wanted = {_stem(name): name for name in missing}
    total = len(missing)
    for where, name, value in rows:
        stem = _stem(name)
        listed = wanted.get(stem) or wanted.get((other_name or {}).get(stem, ""))
        if listed:
            missing.pop(listed, None)
            yield where, name, value
    if len(missing) == total:
        raise ManifestError(
            f"{_these(files)} has no caption of the {total} videos that {_these(lists)} names, "
            f"such as {next(iter(missing), '')!r}; give the files of one data set."
        )
    captioned = ", ".join(file.path.name for file in files)
    skips.extend(Skip(name, f"no caption in {captioned}") for name in missing)


def _is_mapping(file: _File) -> bool:
    """youtube_mapping.txt of MSVD: `-4wsuPCjDBc_5_15 vid1` a line."""
    if file.layout != "text":
        return False
    head = [line.split() for _, line in itertools.islice(file.lines(), 100) if line.strip()]
    return all(len(words) == 2 and words[1].startswith("vid") and words[1][3:].isdigit() for words in head)


def _mapping(files: Sequence[_File]) -> dict[str, str]:
    """The other name of a video of MSVD, both ways."""
    pairs = [line.split() for file in files if _is_mapping(file) for _, line in file.lines()]
    both = [(words[0], words[1]) for words in pairs if len(words) == 2]
    return dict(both) | {short: long for long, short in both}


# Questions


def _asked(format: str, files: Sequence[_File], skips: list[Skip]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each question, with its answer; those of ActivityNet-QA may lie in two files."""
    files = [file for file in files if not _is_mapping(file) and not _is_answer_list(file)]
    for file in files:
        if file.layout == "text" or isinstance(file.data, dict) or not file.columns & {"question", "options", "answer"}:
            raise _wrong(format, file, "questions")
    apart = [file for file in files if not file.columns & {"answer", "answer_text"}]
    answers = [file for file in files if not file.columns & {"question", "options", "caption"}]
    if apart and not answers:
        pair = f"; {format} is read from {FILES[format]}"
        raise ManifestError(f"{_these(apart)} holds questions without answers; add the file of their answers{pair}.")
    if answers and not apart:
        pair = f"; {format} is read from {FILES[format]}"
        raise ManifestError(f"{_these(answers)} holds answers without questions; add the file of them{pair}.")
    answered: dict[str, dict[str, Any]] = {}
    places: dict[str, str] = {}
    for file in answers:
        for where, row in file.rows(skips):
            key = _text(row, ID_KEYS)
            answered.setdefault(key, row)
            places.setdefault(key, where)
    joined = 0
    for file in files:
        if file in answers:
            continue
        whole = file not in apart
        for where, row in file.rows(skips):
            if whole:
                yield where, row
            elif (key := _text(row, ID_KEYS)) in answered:
                joined += 1
                places.pop(key, None)
                yield where, answered[key] | row
            else:
                skips.append(Skip(key or where, f"{where}: no answer in {', '.join(a.path.name for a in answers)}"))
    if apart and not joined:
        raise ManifestError(
            f"{_these(answers)} answers no question of {_these(apart)}; give the two files of one split, "
            "such as val_q.json and val_a.json."
        )
    skips.extend(Skip(key or where, f"{where}: answers a question that no file asks") for key, where in places.items())


QUESTIONS = dict.fromkeys(("msrvtt_qa", "msrvtt_mc", "activitynet_qa", "msvd_qa", "tgif_qa"), _asked)


def _is_answer_list(file: _File) -> bool:
    """ans2label.json, or a JSON list of answers."""
    if isinstance(file.data, dict):
        return all(type(number) is int for number in file.data.values())
    return isinstance(file.data, list) and bool(file.data) and isinstance(file.data[0], str)


def _question(format: str, where: str, row: dict[str, Any]) -> dict[str, Any] | Skip:
    """Fields of a Question, except its path."""
    name = _text(row, VIDEO_KEYS)
    if name.isdecimal():  # the authors' own files have numbers
        name = {"msvd_qa": "vid", "msrvtt_qa": "video"}.get(format, "") + name
    question = _text(row, ["question"])
    if not name:
        return Skip(where, "names no video")
    if not question and format != "msrvtt_mc":
        return Skip(where, f"empty question (of {name})")
    options: list[str] = []
    value = row.get("answer_text", row.get("answer"))
    given = _options(row) if format in ("msrvtt_mc", "tgif_qa") else None
    if given is not None or format == "msrvtt_mc":
        options, reason = _texts(given, "option")
        if reason or not isinstance(given, list) or len(options) != len(given) or len(options) < 2:
            return Skip(where, f"{reason or 'an empty option, or fewer than two'} (of {name})")
        number = str(row.get("answer")).strip()
        if not (number.isascii() and number.isdigit() and int(number) < len(options)):
            return Skip(
                where, f"the answer to {len(options)} options is a number from 0, not {row.get('answer')!r:.60}"
            )
        answers = [options[int(number)]]
    else:
        if type(value) is int and format == "tgif_qa":  # how many times
            value = str(value)
        answers, reason = _texts(value, "answer")
        if reason:
            return Skip(where, f"{reason} (of {name})")
    return {
        "question": question,
        "answers": tuple(answers),
        "options": tuple(options),
        "id": _text(row, ID_KEYS) or where,
        "type": _text(row, TYPE_KEYS),
        "name": name,
    }


def _options(row: dict[str, Any]) -> Any:
    """Options of a multiple choice: a list, a list of captions (Singularity), columns a1.. or option_0..; else None."""
    for key in ("options", "caption"):
        if isinstance(row.get(key), list):
            return row[key]
    for keys in ([f"a{number}" for number in range(1, 10)], [f"option_{number}" for number in range(10)]):
        if keys[0] in row:
            return [row[key] for key in keys if key in row]
    return None


# Videos and images on disk


@dataclass(slots=True)
class _Folder:
    root: str
    suffixes: frozenset[str]
    first: dict[str, str] = field(default_factory=dict)  # name without suffix -> path below root
    more: dict[str, list[str]] = field(default_factory=dict)  # and the others of that name
    shards: list[str] = field(default_factory=list)  # .parquet files
    unread: list[str] = field(default_factory=list)

    def named(self, name: str) -> list[str]:
        """Files of this name, with another suffix or one more (a.mov: a.mov, a.mp4, a.mov.mp4); the best one first."""
        base = name.rpartition("/")[2]
        paths = []
        for key in dict.fromkeys((base, _stem(base, self.suffixes))):
            if key in self.first:
                paths += [self.first[key], *self.more.get(key, ())]
        if len(paths) > 1:
            paths.sort(
                key=lambda path: (path != name, not path.endswith(f"/{name}"), os.path.basename(path) != base, path)
            )
        return paths

    def find(self, name: str) -> str:
        name = os.path.normpath(name)
        suffix = os.path.splitext(name)[1].lower()
        if os.path.isabs(name) or name.startswith("../") or (len(suffix) > 1 and suffix not in self.suffixes):
            return name if os.path.isfile(os.path.join(self.root, name)) else next(iter(self.named(name)), "")
        return next(iter(self.named(name)), "")


def _stem(name: str, suffixes: frozenset[str] = VIDEOS) -> str:
    """Without folder, and without suffix if it is one: a dot may also be part of an id. DiDeMo has a name `x.`."""
    base = name.rpartition("/")[2]
    stem, _, suffix = base.rpartition(".")
    return stem if stem and (not suffix or f".{suffix.lower()}" in suffixes) else base


def _scan(root: Path, suffixes: frozenset[str]) -> _Folder:
    """Every video or image below `root`, by one look at each folder; a folder met again through a link is left out."""
    if not root.is_dir():
        raise ManifestError(f"{root} is not a folder; root is the folder that holds the videos or images.")
    folder = _Folder(str(root), suffixes)
    first, seen, todo = folder.first, set(), [""]
    while todo:
        here = todo.pop()
        below = []
        try:
            found = os.stat(os.path.join(root, here))
            if (found.st_dev, found.st_ino) in seen:
                continue
            seen.add((found.st_dev, found.st_ino))
            with os.scandir(os.path.join(root, here)) as entries:
                for entry in entries:
                    name, stem = entry.name, _stem(entry.name, suffixes)
                    path = f"{here}/{name}" if here else name
                    kind = _kind(entry)
                    if name.startswith(".") or not kind:
                        pass  # ._video0.mp4 of a Mac, .cache; a link to nothing
                    elif kind == "folder":
                        below.append(path)
                    elif name.endswith(".parquet"):
                        folder.shards.append(path)
                    elif stem == name and "." in name:
                        pass  # video0.json beside video0.mp4
                    elif stem in first:
                        folder.more.setdefault(stem, []).append(path)
                    else:
                        first[stem] = path
        except OSError:
            folder.unread.append(here or ".")
        todo += sorted(below, reverse=True)
    return folder


def _kind(entry: os.DirEntry[str]) -> str:
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else ""
    except OSError:  # a link to itself
        return ""


def _none_there(folder: _Folder, files: Sequence[_File], name: str, names: int) -> ManifestError:
    has = f"has {len(folder.first)} files, such as {next(iter(folder.first.values()))}" if folder.first else "has none"
    unread = f" (its folder {folder.unread[0]} could not be read)" if folder.unread else ""
    kind = "images" if folder.suffixes is IMAGES else "videos"
    return ManifestError(
        f"none of the {names} {kind} that {_these(files)} names is in {folder.root}, for example {name!r}; "
        f"that folder {has}{unread}. Give the folder that holds the {kind} as root; they keep their names, "
        "the suffix may differ."
    )


_Find = Callable[[str], tuple[str, str]]  # name -> path below root, or why there is none


def _video_finder(format: str, folder: _Folder, files: Sequence[_File]) -> _Find:
    other_name = _mapping(files) if format in ("msvd", "msvd_qa") else {}

    def find(name: str) -> tuple[str, str]:
        for tried in _also(format, name, other_name):
            if path := folder.find(tried):
                return path, ""
        return "", f"no video of this name in {folder.root}"

    return find


def _also(format: str, name: str, other_name: dict[str, str]) -> Iterator[str]:
    """Names under which the same video is kept."""
    yield name
    front, slash, base = name.rpartition("/")
    if format in ("activitynet", "activitynet_qa"):
        yield f"{front}{slash}v_{base}"
        if base.startswith("v_"):
            yield f"{front}{slash}{base[2:]}"
    elif (stem := _stem(name)) in other_name:
        yield other_name[stem]


def _image_finder(folder: _Folder, names: Iterable[str], skips: list[Skip]) -> _Find:
    """Images of CC3M. A name that is a path must be that path, since downloads number their images and numbers recur.

    A URL finds what can only be its own file: img2dataset's <shard>/<key>.jpg through <shard>.parquet, which says the
    URL of each key; <md5 of the URL>; <crc32 of the URL>, alone or after the row's number and "_", as the download
    scripts of ViLBERT and others have it; the last part of the URL. The last two only if no other URL of the files
    comes to the same, and not if it may be a running number (a crc32 below 10 million, a last part of digits): such a
    number proves nothing about a URL, as shards have any size, so folders with running numbers need their .parquet.
    Of the URLs whose image is missing, about 1 in 1000 finds another's by its crc32 among 3 million images.
    """
    urls = [name for name in names if "://" in name]
    sure = _shard_images(folder, urls, skips)
    running = 10_000_000
    crcs = Counter(zlib.crc32(_bytes(url)) for url in urls)
    lasts = Counter(_last(url) for url in urls)
    numbered: dict[int, str] = {}  # crc32 -> files <number>_<crc32>
    for stem, path in folder.first.items():
        number, bar, crc = stem.rpartition("_")
        if bar and number.isdecimal() and crc.isdecimal() and running <= int(crc) and int(crc) in crcs:
            numbered[int(crc)] = min(path, numbered.get(int(crc), path))  # the same URL in two rows

    def find(name: str) -> tuple[str, str]:
        if "://" not in name:
            name = os.path.normpath(name)
            paths = [path for path in folder.named(name) if path == name or path.endswith(f"/{name}")]
            if len(paths) == 1 or name in paths:
                return paths[0], ""
            if not paths and os.path.isfile(os.path.join(folder.root, name)):
                return name, ""
            return "", f"{'several images end in' if paths else 'no image of'} this path in {folder.root}"
        if name in sure:
            return sure[name], ""
        crc, last = zlib.crc32(_bytes(name)), _last(name)
        if path := folder.first.get(hashlib.md5(_bytes(name), usedforsecurity=False).hexdigest()):
            return path, ""
        if crc >= running and crcs[crc] == 1 and (path := folder.first.get(str(crc)) or numbered.get(crc)):
            return path, ""
        paths = folder.named(last) if last else []
        if paths and last.isdecimal():
            return "", f"an image is called {last}, but that may be a running number, which proves nothing about a URL"
        if len(paths) == 1 and lasts[last] == 1:
            return paths[0], ""
        if paths:
            return "", f"{lasts[last]} URLs and {len(paths)} images are called {last}, so which is whose is unknown"
        return "", f"no image of this URL in {folder.root} (by img2dataset's .parquet, md5, crc32 or last part)"

    return find


def _bytes(url: str) -> bytes:
    return url.encode("utf-8", "replace")  # JSON can hold half a surrogate pair


def _last(url: str) -> str:
    """The last part of a URL without suffix: http://a/b/IMG_3422.JPG?imgmax=800 -> IMG_3422."""
    return _stem(unquote(url.partition("?")[0].partition("#")[0].rpartition("/")[2]), IMAGES)


def _shard_images(folder: _Folder, urls: Sequence[str], skips: list[Skip]) -> dict[str, str]:
    """URL -> image, from the .parquet files with columns url and key that img2dataset writes beside its folders."""
    if not folder.shards:
        return {}
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ManifestError(f"reading {folder.shards[0]} needs pyarrow; install it: pip install pyarrow") from None
    wanted = set(urls)
    images: dict[str, str] = {}
    for shard in sorted(folder.shards):
        inside = shard.removesuffix(".parquet")
        try:
            with pyarrow.parquet.ParquetFile(os.path.join(folder.root, shard)) as file:
                if not {"url", "key"} <= set(file.schema_arrow.names):
                    continue
                for batch in file.iter_batches(columns=["url", "key"]):
                    for row in batch.to_pylist():
                        if row["url"] in wanted:
                            paths = (path for path in folder.named(str(row["key"])) if os.path.dirname(path) == inside)
                            if path := next(paths, ""):
                                images.setdefault(row["url"], path)
        except (pyarrow.ArrowException, OSError):
            skips.append(Skip(shard, "not a whole Parquet file, so its images have no URL; download the shard again"))
    return images
