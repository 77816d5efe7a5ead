"""Questions about shapes are fair, and those of annotation files become samples."""

import json
from collections import Counter, defaultdict

import pytest

from smaug.data import shapes
from smaug.data.clips import DataConfig, open_shapes
from smaug.data.manifest import ManifestError, Sample, Skip
from smaug.data.questions import OPPOSITES, ask_about_shapes, question_samples, questions_about

SMALL = DataConfig(shapes=(64, 16, 16))


def asked(split, task, clips=500):
    scenes = shapes.draw_split(split, clips)
    samples = [Sample(f"{i:05d}", "video", (s.caption,), f"{i:05d}") for i, s in enumerate(scenes)]
    return scenes, ask_about_shapes(scenes, samples, split, task)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_answers_of_a_type_are_equally_frequent(split):
    _, questions = asked(split, "qa")
    counts = defaultdict(Counter)
    for one in questions:
        counts[one.type][one.answers] += 1
    assert set(counts) == {"colour", "shape", "beside", "changes", *(f"order/{what}" for what in OPPOSITES)}
    for of_type in counts.values():
        assert len(of_type) > 1 and len(set(of_type.values())) == 1


def test_every_order_question_is_asked_of_both_twins_with_opposite_answers():
    _, questions = asked("test", "qa")
    by_clip = defaultdict(dict)
    for one in questions:
        if one.type.startswith("order"):
            by_clip[int(one.name)][one.captions[0]] = one.answers[0]
    assert len(by_clip) == 500
    for clip, answers in by_clip.items():
        twin = by_clip[clip ^ 1]
        assert answers.keys() == twin.keys() and all(shapes.REVERSE[a] == twin[q] for q, a in answers.items())


def test_a_question_has_one_answer_and_the_scene_tells_it():
    scene = next(s for s in shapes.draw_split("train", 100) if s.shape != s.still_shape and s.change == "moves left")
    found = {question: answer for _, question, answer in questions_about(scene)}
    assert len(found) == len(questions_about(scene)) == 8
    assert found[f"does the {scene.colour} {scene.shape} move left or right"] == "moves left"
    assert found[f"what colour is the {scene.still_shape}"] == scene.still_colour
    assert found[f"what is beside the {scene.colour} {scene.shape}"] == f"{scene.still_colour} {scene.still_shape}"
    alike = next(s for s in shapes.draw_split("train", 100) if s.shape == s.still_shape)
    assert not any(kind == "colour" for kind, _, _ in questions_about(alike))  # it would have two answers


def test_multiple_choice_has_the_twins_caption_and_texts_one_word_apart():
    scenes, questions = asked("test", "mc")
    places = Counter()
    for i, (scene, one) in enumerate(zip(scenes, questions, strict=True)):
        pair = {scene.caption, scene.reversed().caption}
        assert one.captions == one.answers == (scene.caption,)
        assert len(set(one.options)) == 5 and pair <= set(one.options)
        for other in set(one.options) - pair:
            apart = [sum(a != b for a, b in zip(other.split(), own.split(), strict=True)) for own in pair]
            assert min(apart) == 1
        assert set(one.options) == set(questions[i ^ 1].options)  # so the words alone cannot tell twins apart
        places[one.options.index(scene.caption)] += 1
    assert set(places) == set(range(5)) and max(places.values()) < 150


def test_a_question_is_shown_the_clip_it_is_about(shapes_cache):
    captions = open_shapes("test", SMALL, 64, lambda *_: None)
    for task in ("qa", "mc"):
        mapped = open_shapes("test", SMALL, 64, lambda *_: None, task=task)
        assert len(mapped) >= 16 and mapped.places is not None
        number = {sample.path: i for i, sample in enumerate(captions.samples)}
        for i in (0, 7, len(mapped) - 1):
            view = [(lambda times: [0, 15], None, False)]
            own = captions.read([number[mapped.samples[i].path]], view)[0].frames
            assert own.equal(mapped.read([i], view)[0].frames)


def test_questions_of_annotation_files(tmp_path):
    (tmp_path / "v1.mp4").write_bytes(b"x")
    (tmp_path / "q.jsonl").write_text(
        '{"video_id": "v1", "question": "what is it", "answer": "a dog", "question_id": 7, "answer_type": "what"}\n'
        '{"video_id": "v2", "question": "who", "answer": "x", "question_id": 8}\n'
    )
    skipped: list[Skip] = []
    (one,) = question_samples("msrvtt_qa", [tmp_path / "q.jsonl"], None, "qa", skipped=skipped)
    assert (one.captions, one.answers, one.options, one.type) == (("what is it",), ("a dog",), (), "what")
    assert len(skipped) == 1 and "not there" in skipped[0].reason
    rows = [{"video": "v1.mp4", "caption": ["a", "b", "c"], "answer": 1}]
    (tmp_path / "mc.json").write_text(json.dumps(rows))
    (one,) = question_samples("msrvtt_mc", [tmp_path / "mc.json"], None, "mc")
    assert (one.captions, one.answers, one.options) == (("b",), ("b",), ("a", "b", "c"))
    with pytest.raises(ManifestError, match="no question is open-ended; recipe mc"):
        question_samples("msrvtt_mc", [tmp_path / "mc.json"], None, "qa")
    with pytest.raises(ManifestError, match=r"name one by --data\.format"):
        question_samples("msrvtt", [tmp_path / "mc.json"], None, "qa")
    (tmp_path / "mc.json").write_text(json.dumps([*rows, {"video": "v1.mp4", "caption": ["a", "b"], "answer": 1}]))
    with pytest.raises(ManifestError, match="some have 2, some 3"):
        question_samples("msrvtt_mc", [tmp_path / "mc.json"], None, "mc")
