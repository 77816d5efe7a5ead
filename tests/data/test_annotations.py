"""The benchmarks' own annotation files are read to the last row, and a wrong or damaged one is said in a sentence."""

import csv
import json
import pickle
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from smaug.data.annotations import CAPTIONS, QUESTIONS, Format, read_answers, read_captions, read_questions
from smaug.data.manifest import ManifestError, Skip

TRUE = Path(__file__).resolve().parents[3] / "shared/data/annotations"
needs_true = pytest.mark.skipif(not TRUE.is_dir(), reason=f"the shared annotation files are not at {TRUE}")


def put(folder: Path, *names: str) -> Path:
    """Files of these names, which stand for videos."""
    for parent in {(folder / name).parent for name in names}:
        parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def write(path: Path, content) -> Path:
    """Text as it is; rows as JSONL if it ends so, else as JSON."""
    if not isinstance(content, str):
        lines = path.suffix == ".jsonl"
        content = "\n".join(map(json.dumps, content)) if lines else json.dumps(content)
    path.write_text(content, encoding="utf-8")
    return path


def brief(samples) -> list[tuple[str, tuple[str, ...]]]:
    return [(sample.path.name, sample.captions) for sample in samples]


def true_json(name: str):
    return json.loads((TRUE / name).read_text())


# True files


@needs_true
def test_webvid_true(tmp_path):
    file = TRUE / "webvid/results_2M_val.csv"
    rows = list(csv.DictReader(file.open()))
    put(tmp_path / "videos", *(f"{row['page_dir']}/{row['videoid']}.mp4" for row in rows[:8]))
    put(tmp_path, f"flat/{rows[8]['videoid']}.mp4")
    samples = read_captions("webvid", [file], tmp_path, skipped=(skipped := []))
    assert len(rows) == 9 == len(samples) and skipped == []
    assert samples[1].captions == ("Horse grazing - seperated on green screen",)
    assert samples[1].path == tmp_path / "videos/054101_054150/5641526.mp4"
    assert (samples[1].kind, samples[1].name) == ("video", "5641526")


@needs_true
def test_msrvtt_1ka_true(tmp_path):
    file = TRUE / "msrvtt_1ka/MSRVTT_JSFUSION_test.csv"
    put(tmp_path, *(f"{row['video_id']}.mp4" for row in csv.DictReader(file.open())))
    samples = read_captions("msrvtt", [file], tmp_path)
    assert len(samples) == 1000 and all(len(sample.captions) == 1 for sample in samples)
    assert brief(samples)[0] == ("video9770.mp4", ("a person is connecting something to system",))
    assert brief(samples)[-1] == ("video9871.mp4", ("bearded guy in grey tshirt talking to the camera",))


@needs_true
@pytest.mark.parametrize(
    ("name", "count", "key"), [("MSRVTT_train.7k.csv", 7010, "sentences"), ("MSRVTT_train.9k.csv", 9000, "annotations")]
)
def test_msrvtt_train_lists_true(tmp_path, name, count, key):
    """The whole MSRVTT_data.json is not free; this one has its layout, two captions a video."""
    video = "video_id" if key == "sentences" else "image_id"
    rows = [{"caption": f"caption {n} of {i}", video: f"video{i}", "sen_id": i} for n in range(2) for i in range(2000)]
    data = write(tmp_path / "MSRVTT_data.json", {"info": {}, "videos": [{"video_id": "video0"}], key: rows})
    put(tmp_path, "videos/video0.mp4", "videos/video9.mp4", "videos/video9770.mp4")  # the last is a test video
    samples = read_captions("msrvtt", [TRUE / "msrvtt_1ka" / name, data], tmp_path, skipped=(skipped := []))
    assert brief(samples) == [
        ("video0.mp4", ("caption 0 of 0", "caption 1 of 0")),
        ("video9.mp4", ("caption 0 of 9", "caption 1 of 9")),
    ]
    assert len(skipped) == count - 2
    assert Skip("video1", f"no file below {tmp_path} is certainly its") in skipped


@needs_true
@pytest.mark.parametrize(("split", "videos", "moments"), [("val", 263, 300), ("test", 93, 100)])
def test_didemo_true(tmp_path, split, videos, moments):
    file = TRUE / f"didemo/{split}_data.json"
    rows = true_json(f"didemo/{split}_data.json")
    paragraphs: dict[str, list[str]] = {}
    for row in rows:
        paragraphs.setdefault(row["video"].rpartition(".")[0], []).append(row["description"].strip())
    put(tmp_path, *(f"{name}.mp4" for name in paragraphs))  # encoded again
    samples = read_captions("didemo", [file], tmp_path, skipped=(skipped := []))
    assert (len(rows), len(samples), skipped) == (moments, videos, [])
    assert {sample.path.stem: sample.captions for sample in samples} == {
        name: (" ".join(texts),) for name, texts in paragraphs.items()
    }


@needs_true
@pytest.mark.parametrize(("split", "listed", "found"), [("train", 1200, 181), ("val", 100, 18), ("test", 670, 101)])
def test_msvd_true(tmp_path, split, listed, found):
    captions, names = TRUE / "msvd/training_label.json", TRUE / f"msvd/{split}_list.txt"
    rows = {row["id"]: tuple(row["caption"]) for row in true_json("msvd/training_label.json")}
    put(tmp_path, *rows)
    samples = read_captions("msvd", [names, captions], tmp_path, skipped=(skipped := []))
    assert len(samples) == found and len(skipped) == listed - found
    assert all(sample.captions == rows[sample.path.name] for sample in samples)
    assert len(read_captions("msvd", [captions], tmp_path)) == 300


@needs_true
def test_msrvtt_qa_true(tmp_path):
    file = TRUE / "msrvtt_qa/val.jsonl"
    put(tmp_path, *(f"video{i}.mp4" for i in range(6513, 6593)))  # not the last one, 6593
    questions = read_questions("msrvtt_qa", [file], tmp_path, skipped=(skipped := []))
    first = questions[0]
    assert (first.path, first.question) == (tmp_path / "video6513.mp4", "what are three people sitting on?")
    assert (first.answers, first.options, first.type, first.id) == (("couch",), (), "what", "val.jsonl:1")
    assert first.name == "video6513"
    assert len(questions) + len(skipped) == 2000 and skipped
    assert skipped[-1] == Skip("video6593", "val.jsonl:2000: its video is not there")


@needs_true
def test_answers_true():
    answers = read_answers(TRUE / "msrvtt_qa/train_ans2label.json")
    assert len(answers) == 1500 and (answers[0], answers[2], answers[1499]) == ("accept", "act", "zoom")


@needs_true
@pytest.mark.parametrize("prefix", ["", "v_"])
def test_activitynet_qa_true(tmp_path, prefix):
    rows = true_json("activitynet_qa/val_q.json")
    put(tmp_path, *{f"{prefix}{row['video_name']}.mkv" for row in rows})
    files = [TRUE / "activitynet_qa/val_a.json", TRUE / "activitynet_qa/val_q.json"]
    questions = read_questions("activitynet_qa", files, tmp_path, skipped=(skipped := []))
    assert len(questions) == 500 and skipped == []
    assert (questions[0].question, questions[0].answers) == ("is the no.3 athlete playing indoor", ("yes",))
    assert (questions[0].id, questions[0].type, questions[0].name) == ("v_TIEzvhv6xaI_2", "3", "TIEzvhv6xaI")
    assert questions[0].path == tmp_path / f"{prefix}TIEzvhv6xaI.mkv"
    assert (questions[-1].id, questions[-1].answers, questions[-1].type) == ("v_-MB6Wxglgzw_10", ("easier",), "8")


@needs_true
@pytest.mark.parametrize(
    ("task", "question", "answer", "options", "type", "id"),
    [
        ("action", "What does the butterfly do 10 or more than 10 times ?", "flap wings", 5, "", "ACTION4"),
        ("transition", "What does the man do before point to the camera ?", "sing passionately", 5, "", "TRANS23"),
        ("count", "How many times does the man adjust waistband ?", "3", 0, "", "COUNT12"),
        ("frameqa", "what is being placed in the white ice cream cone ?", "cookie", 0, "0", "FRAMEQA1159"),
    ],
)
def test_tgif_qa_true(tmp_path, task, question, answer, options, type, id):
    file = TRUE / f"tgif_qa/Test_{task}_question.csv"
    put(tmp_path, *{f"gifs/{line.split()[0]}.gif" for line in file.read_text().splitlines()[1:]})
    questions = read_questions("tgif_qa", [file], tmp_path, skipped=(skipped := []))
    first = questions[0]
    assert len(questions) == 399 and skipped == [] and first.path.suffix == ".gif"
    assert (first.question, first.answers, first.type, first.id) == (question, (answer,), type, id)
    assert len(first.options) == options and (not options or first.options[4] == answer)


@needs_true
def test_cc3m_true(tmp_path):
    put(tmp_path, "IMG_3422.jpg")
    (sample,) = read_captions("cc3m", [TRUE / "cc3m/one_row.tsv"], tmp_path)
    assert (sample.kind, sample.path.name) == ("image", "IMG_3422.jpg")
    assert sample.captions == ("a very typical bus station",) and sample.name.endswith("IMG_3422.JPG?imgmax=800")


# Layouts whose true files are not free


@pytest.mark.parametrize(("format", "key"), [("webvid", "video"), ("msrvtt", "image"), ("msvd", "video")])
def test_singularity_captions(tmp_path, format, key):
    rows = [{key: "a/1.mp4", "caption": "one"}, {key: "b/2.mp4", "caption": ["two", "zwei"]}]
    put(tmp_path / "v", "a/1.mp4", "b/2.mp4")
    samples = read_captions(format, [write(tmp_path / "s.json", rows)], tmp_path / "v")
    assert brief(samples) == [("1.mp4", ("one",)), ("2.mp4", ("two", "zwei"))]


@pytest.mark.parametrize(("format", "suffix"), [("didemo", ".json"), ("activitynet", ".jsonl")])
def test_paragraphs(tmp_path, format, suffix):
    """A list of captions becomes one; rows of one video too, but not those of two files."""
    put(tmp_path, "x.mp4")
    one = write(tmp_path / f"1{suffix}", [{"video": "x.avi", "caption": ["A dog. ", "It runs."]}])
    two = write(tmp_path / f"2{suffix}", [{"video": "x.avi", "caption": text} for text in ("A cat.", "It", "sits.")])
    assert brief(read_captions(format, [one, two], None)) == [("x.mp4", ("A dog. It runs.", "A cat. It sits."))]


def test_activitynet_captions_are_joined_in_time_order(tmp_path):
    put(tmp_path, "v_abc.mp4", "def.mkv")
    file = write(
        tmp_path / "val_1.json",
        {
            "v_abc": {"duration": 9.5, "timestamps": [[5, 9.5], [0, 4]], "sentences": [" It ends.", "It begins."]},
            "v_def": {"duration": 3, "timestamps": [[0, 3]], "sentences": ["All."]},
            "v_odd": {"duration": 3, "timestamps": [[0, 3]], "sentences": ["All.", "And more."]},
        },
    )
    samples = read_captions("activitynet", [file], None, skipped=(skipped := []))
    assert brief(samples) == [("v_abc.mp4", ("It begins. It ends.",)), ("def.mkv", ("All.",))]
    assert skipped == [Skip("v_odd", "val_1.json[2]: needs one [start, end] a sentence; it has 2 sentences")]


def test_msrvtt_jsonl_and_lists_of_names(tmp_path):
    put(tmp_path, "video1.mp4", "video2.mp4", "video3.mp4")
    rows = [{"clip_name": f"video{n}", "caption": text} for n, text in ((1, "a"), (2, "b"), (1, "a"), (3, "c"))]
    captions = write(tmp_path / "all.jsonl", rows)
    assert brief(read_captions("msrvtt", [captions], None))[0] == ("video1.mp4", ("a", "a"))  # twice is twice
    for names in ("video1\nvideo3\n", ["video1", "video3"]):
        split = write(tmp_path / "train_list_jsfusion.txt", names)
        assert brief(read_captions("msrvtt", [captions, split], None)) == [
            ("video1.mp4", ("a", "a")),
            ("video3.mp4", ("c",)),
        ]


def test_msvd_qa(tmp_path):
    put(tmp_path, "-4w_5_15.avi", "vid2.avi")
    names = write(tmp_path / "youtube_mapping.txt", "-4w_5_15 vid1\n-4w_60_70 vid2\n")
    rows = [{"answer": "nut", "id": 7, "question": "what is eaten?", "video_id": n} for n in (1, 2)]
    questions = read_questions("msvd_qa", [write(tmp_path / "test_qa.json", rows), names], None)
    assert [(q.path.name, q.name, q.id) for q in questions] == [("-4w_5_15.avi", "1", "7"), ("vid2.avi", "2", "7")]


def test_msrvtt_qa_other_layouts(tmp_path):
    put(tmp_path, "video5.mp4")
    raw = [{"category_id": 1, "video_id": 5, "question": "who?", "answer": "man", "id": 0}]
    singularity = [{"video": "video5.mp4", "question": "who?", "answer": ["man", "boy"], "question_id": 0}]
    violet = [{"video": "video5", "question": "who?", "answer": -1, "answer_text": "man"}]
    for rows, answers in ((raw, ("man",)), (singularity, ("man", "boy")), (violet, ("man",))):
        (question,) = read_questions("msrvtt_qa", [write(tmp_path / "qa.json", rows)], None)
        assert (question.path.name, question.answers) == ("video5.mp4", answers)
    rows = [*raw, {"video_id": 5, "question": "who?", "answer": 17}]
    read_questions("msrvtt_qa", [write(tmp_path / "qa.json", rows)], None, skipped=(skipped := []))
    assert skipped == [Skip("5", "qa.json[1]: the answer must be text, not 17")]


def test_msrvtt_mc(tmp_path):
    put(tmp_path, "video5.mp4")
    options = ["a cat", "a dog", "a cow"]
    for row in (
        {"qid": 3, "clip_name": "video5", "answer": "1", "options": options},
        {"video": "video5.mp4", "caption": options, "answer": 1, "question_id": 3},
    ):
        for name in ("mc.jsonl", "mc.json"):
            (question,) = read_questions("msrvtt_mc", [write(tmp_path / name, [row])], None)
            assert (question.question, question.answers, question.options) == ("", ("a dog",), tuple(options))
            assert question.id == "3"


def test_an_answer_that_is_no_option(tmp_path):
    put(tmp_path, "video5.mp4")
    answers = [0, 3, -1, "a dog", None, True, "²"]
    rows = [{"clip_name": "video5", "answer": answer, "options": ["a cat", "a dog", "a cow"]} for answer in answers]
    rows.append({"clip_name": "video5", "answer": 0, "options": ["a cat", ""]})
    questions = read_questions("msrvtt_mc", [write(tmp_path / "mc.json", rows)], None, skipped=(skipped := []))
    assert len(questions) == 1
    assert [skip.reason.partition(": ")[2] for skip in skipped] == [
        *(f"the answer to 3 options is a number from 0, not {answer!r}" for answer in answers[1:]),
        "an empty option, or fewer than two",
    ]


def test_tgif_qa_jsonl(tmp_path):
    put(tmp_path, "tumblr_a.gif")
    choice = {"gif_name": "tumblr_a", "question": "What?", "options": ["run", "sit"], "answer": 1}
    count = {"gif_name": "tumblr_a", "question": "How many times?", "answer": 3}
    frame = {"gif_name": "tumblr_a", "question": "What?", "answer": "cat", "answer_type": "object"}
    files = [write(tmp_path / f"{n}.jsonl", [row]) for n, row in enumerate((choice, count, frame))]
    assert [(q.answers, q.options, q.type) for q in read_questions("tgif_qa", files, None)] == [
        (("sit",), ("run", "sit"), ""),
        (("3",), (), ""),
        (("cat",), (), "object"),
    ]


def test_a_lone_quote_in_tab_separated_text(tmp_path):
    put(tmp_path, "a.gif", "b.gif", "c1.jpg", "c2.jpg")
    text = 'gif_name\tquestion\tanswer\tvid_id\na\twhat does "he hold ?\tcup\tF1\nb\t"who" ?\tman\tF2\n'
    questions = read_questions("tgif_qa", [write(tmp_path / "t.csv", text)], None)
    assert [q.question for q in questions] == ['what does "he hold ?', '"who" ?']
    text = '"a lone quote\thttp://x/c1.jpg\n\na second, with comma\thttp://x/c2.jpg\nno address\tnone\nno tab\n'
    samples = read_captions("cc3m", [write(tmp_path / "c.tsv", text)], None, skipped=(skipped := []))
    assert brief(samples) == [("c1.jpg", ('"a lone quote',)), ("c2.jpg", ("a second, with comma",))]
    assert [skip.name for skip in skipped] == ["c.tsv:5", "none"]


def test_commas_and_lines_in_quotes(tmp_path):
    put(tmp_path, "p/1.mp4", "p/2.mp4")
    text = '\ufeffvideoid, page_dir, name\r\n1,p,"a dog, ""Rex""\nruns"\r\n2,p,\r\n,p,x\r\n2,p,a,b\r\n2,p,a cat\r\n'
    samples = read_captions("webvid", [write(tmp_path / "r.csv", text)], None, skipped=(skipped := []))
    assert brief(samples) == [("1.mp4", ('a dog, "Rex"\nruns',)), ("2.mp4", ("a cat",))]
    assert skipped == [
        Skip("2", "r.csv:4: empty caption"),
        Skip("r.csv:5", "r.csv:5: names no video"),
        Skip("r.csv:6", "4 fields in 3 columns; quote a field with commas"),
    ]


# Files on disk


def test_a_name_finds_its_file(tmp_path):
    put(
        tmp_path / "v",
        *("exact/a.mp4", "other/a.mp4", "a.mkv", "b.json", "b.txt", "deep/er/b.WEBM", "c.mov.mp4", "._d.mp4", "e."),
        *("f.g.mp4", "odd.m2v", "-h.mp4"),
    )
    names = {
        "exact/a.mp4": "exact/a.mp4",
        "b": "deep/er/b.WEBM",
        "c.mov": "c.mov.mp4",
        "e.": "e.",
        "f.g": "f.g.mp4",
        "odd.m2v": "odd.m2v",
        "-h.3gp": "-h.mp4",
        "./exact/../exact/a.avi": None,  # the same stem, at none of the paths: the first one
    }
    rows = [{"video": name, "caption": name} for name in names] + [{"video": "d", "caption": "d"}]
    samples = read_captions("webvid", [write(tmp_path / "w.json", rows)], tmp_path / "v", skipped=(skipped := []))
    found = {
        caption: sample.path.relative_to(tmp_path / "v").as_posix() for sample in samples for caption in sample.captions
    }
    assert found == {**names, "./exact/../exact/a.avi": "a.mkv"}
    assert skipped == [Skip("d", f"no file below {tmp_path / 'v'} is certainly its")]


def test_an_absolute_name_and_links(tmp_path):
    put(tmp_path, "v/1.mp4", "elsewhere/2.mp4", "far/3.mp4")
    (tmp_path / "v/again").symlink_to(tmp_path / "v")  # a loop
    (tmp_path / "v/self").symlink_to(tmp_path / "v/self")
    (tmp_path / "v/linked").symlink_to(tmp_path / "elsewhere")
    rows = [{"video": name, "caption": "x"} for name in ("1", "2", str(tmp_path / "far/3.mp4"))]
    samples = read_captions("webvid", [write(tmp_path / "w.json", rows)], tmp_path / "v")
    assert [s.path for s in samples] == [tmp_path / "v/1.mp4", tmp_path / "v/linked/2.mp4", tmp_path / "far/3.mp4"]


def test_no_video_is_there(tmp_path):
    put(tmp_path / "v", "other.mp4")
    captions = write(tmp_path / "c.json", [{"video": "x.mp4", "caption": "x"}])
    questions = write(tmp_path / "q.json", [{"video": "x.mp4", "question": "x", "answer": "y"}])
    for read, format, file in ((read_captions, "msrvtt", captions), (read_questions, "msvd_qa", questions)):
        with pytest.raises(ManifestError, match=f"says nothing of a file below {tmp_path / 'v'}; .* left out, x.mp4: "):
            read(format, [file], tmp_path / "v")
    with pytest.raises(ManifestError, match="is not a folder; root is the folder that holds the videos"):
        read_captions("msrvtt", [captions], tmp_path / "none")


URLS = [f"http://x.org/{n}/image.jpg?size=800" for n in range(4)] + ["http://x.org/sea%20gull.png"]


def test_cc3m_finds_what_only_its_url_can_be(tmp_path):
    """Not by a last part that recurs, nor by a number, as downloads number their images."""
    put(tmp_path, "image.jpg", "sea gull.webp", "7.jpg", "twice.jpg", "b/twice.jpg")
    urls = [*URLS, "http://x.org/7.jpg", "http://x.org/twice.jpg"]
    file = write(tmp_path / "t.tsv", "".join(f"caption\t{url}\n" for url in urls))
    (sample,) = read_captions("cc3m", [file], None, skipped=(skipped := []))
    assert (sample.name, sample.path.name) == (URLS[4], "sea gull.webp")
    assert [skip.name for skip in skipped] == [url for url in urls if url != URLS[4]]


def test_cc3m_of_img2dataset(tmp_path):
    for split, number in (("train", 0), ("val", 2)):  # the same keys in both
        put(tmp_path / split, "00001/2.jpg", *(f"00000/00000000{key}" for key in ("0.jpg", "1.jpg", "1.json")))
        keys = {"url": URLS[number : number + 2], "key": ["000000000", "000000001"]}
        pyarrow.parquet.write_table(pyarrow.table(keys), tmp_path / f"{split}/00000.parquet")
    (tmp_path / "train/00001.parquet").write_bytes(b"PAR1")
    file = write(tmp_path / "t.tsv", "".join(f"caption {n}\t{url}\n" for n, url in enumerate(URLS)))
    samples = read_captions("cc3m", [file], None, skipped=(skipped := []))
    assert [sample.path.relative_to(tmp_path).as_posix() for sample in samples] == [
        *("train/00000/000000000.jpg", "train/00000/000000001.jpg"),
        *("val/00000/000000000.jpg", "val/00000/000000001.jpg"),
    ]
    assert [Path(skip.name).name for skip in skipped] == ["00001.parquet", "sea%20gull.png"]


def test_cc3m_paths_are_taken_as_they_are(tmp_path):
    put(tmp_path, "train/0.jpg", "val/0.jpg", "val/1.jpg")
    names = ("train/0.jpg", "0.jpg", "train/1.jpg")
    file = write(tmp_path / "cc3m.json", [{"image": name, "caption": name} for name in names])
    samples = read_captions("cc3m", [file], None, skipped=(skipped := []))
    assert [sample.name for sample in samples] == ["train/0.jpg"]
    assert [skip.name for skip in skipped] == ["0.jpg", "train/1.jpg"]


# What is wrong is said


def refused(format: Format, *files: Path) -> str:
    read = read_captions if format in CAPTIONS else read_questions
    with pytest.raises(ManifestError) as raised:
        read(format, list(files), None)
    return str(raised.value)


def test_wrong_pairings(tmp_path):
    put(tmp_path, "x.mp4", "video1.mp4", "video2.mp4")
    names = write(tmp_path / "names.csv", "video_id\nvideo1\n")
    data = write(tmp_path / "data.json", {"sentences": [{"video_id": "video2", "caption": "x"}]})
    asked = write(tmp_path / "val_q.json", [{"video_name": "x", "question": "who", "question_id": "v_x_1"}])
    answered = write(tmp_path / "val_a.json", [{"answer": "yes", "type": 3, "question_id": "v_y_1"}])
    labels = write(tmp_path / "ans2label.json", {"video": 0, "question": 1})
    assert "names.csv says nothing" in refused("msrvtt", names)
    assert "data.json holds training and test videos alike; give a split list" in refused("msrvtt", data)
    assert "video1: has no caption" in refused("msrvtt", names, data)
    assert "x: val_q.json[0]: empty answer. activitynet_qa is read from val_q" in refused("activitynet_qa", asked)
    assert "val_a.json says nothing" in refused("activitynet_qa", answered)
    assert "x: val_q.json[0]: empty answer" in refused("activitynet_qa", answered, asked)
    assert "a list of answers is read by read_answers" in refused("msrvtt_qa", labels)


def test_each_lost_question_is_named(tmp_path):
    put(tmp_path, "x.mp4")
    asked = [{"video_name": "x", "question": q, "question_id": f"v_x_{n}"} for n, q in enumerate(["who", "", "what"])]
    answered = [{"answer": "yes", "type": 3, "question_id": f"v_x_{n}"} for n in (0, 1, 9)]
    files = [write(tmp_path / "q.json", asked), write(tmp_path / "a.json", answered)]
    questions = read_questions("activitynet_qa", files, None, skipped=(skipped := []))
    assert [question.id for question in questions] == ["v_x_0"]
    assert skipped == [Skip("x", "q.json[1]: empty question"), Skip("x", "q.json[2]: empty answer")]


@pytest.mark.parametrize("format", [*CAPTIONS, *QUESTIONS])
def test_the_file_of_another_format(tmp_path, format):
    for content in ("some text\nand more of it\n", {"a": {"b": 1}}, [{"x": 1}], [], "a,b\n1,2\n"):
        said = refused(format, write(tmp_path / "wrong.json", content))
        assert "wrong.json" in said, said


def test_formats_and_their_readers(tmp_path):
    assert [*CAPTIONS, *QUESTIONS] == [*Format.__args__]
    with pytest.raises(ManifestError, match="'tgif_qa' is not one of webvid, "):
        read_captions("tgif_qa", [tmp_path], None)
    with pytest.raises(ManifestError, match="no annotation file is given"):
        read_captions("didemo", [], None)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", b'[{"video": "a",\n "caption": }]', "line 2, column 13: not JSON (Expecting value); download"),
        ("a.jsonl", b'{"video": "a", "caption": "b"}\n\n{"video" "a"}\n', "a.jsonl, line 3, column 10: not JSON"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b'[{"video": "a", "caption": "b"}, 5]', "a.json[1]: a int where an object is needed"),
        ("a.jsonl", b'{"video": "a", "caption": "b"}\n{"video": "\xe9"}', "a.jsonl, line 2, is not UTF-8"),
        ("a.csv", b"video_id,sentence\na,b\nc,\xff\n", "a.csv, line 3, is not UTF-8; save it"),
        ("a.csv", b'video_id,sentence\na,"b\nc,d\n', "close every quote, double it"),
        ("a.json", b"\n \n", "a.json is empty"),
        ("a.json", b"[]", "names no videos; it has []"),
        ("a.json", b'[{"video": "a", "caption": ""}]', "the first of 1 left out, a: a.json[0]: empty caption"),
        ("a.json", b'[{"video": "a", "caption": 5}]', "the caption must be text, not 5"),
        ("a.json", b"\x1f\x8b123", "is compressed; unpack it"),
        ("a.json", b"<!DOCTYPE html>", "is a web page"),
        ("a.json", b"version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
    ],
)
def test_damaged_files(tmp_path, name, content, complaint):
    (tmp_path / name).write_bytes(content)
    assert complaint in refused("msrvtt", tmp_path / name)


def test_files_that_cannot_be_opened(tmp_path):
    write(tmp_path / "train_7k.json", [])
    assert "No such file or directory; did you mean train_7k.json" in refused("msrvtt", tmp_path / "train7k.json")
    assert "cannot be read: Is a directory." in refused("msrvtt", tmp_path)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["raw-captions.pkl", "captions.json"])
def test_pickles_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "was run")))
    assert "is a pickle, and reading one runs its code" in refused("msvd", tmp_path / name)
    with pytest.raises(ManifestError, match="is a pickle"):
        read_answers(tmp_path / name)
    assert not (tmp_path / "was run").exists()


def test_answers(tmp_path):
    for name, content in (
        ("1.json", {"no": 1, "yes": 0, "video": 2}),
        ("2.json", ["yes", "no", "video"]),
        ("3.txt", "\ufeffyes\nno\r\nvideo\n\n"),
    ):
        assert read_answers(write(tmp_path / name, content)) == ["yes", "no", "video"]
    for content, complaint in (
        ({"yes": 0, "no": 2}, "without gaps"),
        ({"yes": 0, "no": 0}, "without gaps"),
        ({"yes": "0"}, "number the answers"),
        (["yes", 5], "answers are text"),
        (["yes", "yes"], "none comes twice"),
        ([], "at least one"),
        ('{"question": "who", "answer": "he"}\n' * 2, "not JSON"),
    ):
        with pytest.raises(ManifestError, match=complaint):
            read_answers(write(tmp_path / "a.json", content))


def test_time_grows_with_the_rows_only(tmp_path):
    """Every name in one file, several captions a name: quadratic would take minutes."""
    put(tmp_path, "0.mp4")
    text = "videoid,page_dir,name\n" + "".join(f"{n % 20000},p,caption {n}\n" for n in range(40000))
    begin = time.perf_counter()
    samples = read_captions("webvid", [write(tmp_path / "w.csv", text)], None, skipped=(skipped := []))
    assert len(samples) == 1 and len(samples[0].captions) == 2 and len(skipped) == 19999
    assert time.perf_counter() - begin < 20
