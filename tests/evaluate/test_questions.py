"""Questions: scores by type against scikit-learn, the ways to answer against each other, and what a run prints."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score

from smaug import recipe as recipes
from smaug.data.clips import DataConfig, open_shapes
from smaug.data.manifest import Sample
from smaug.data.text import encode, train_tokenizer
from smaug.device import choose
from smaug.embed import embed_texts, embed_videos
from smaug.evaluate.encode import Look
from smaug.evaluate.questions import Answers, answer_questions, priors, spell_answers
from smaug.evaluate.scores import How, evaluate
from smaug.objectives.answer import Answer
from smaug.objectives.mlm import Mlm
from smaug.run import Run, build, with_answers
from smaug.tokens import packed_uniform

SMALL = DataConfig(shapes=(64, 16, 16))


@pytest.fixture(scope="module")
def clips(shapes_cache):
    return {task: open_shapes("test", SMALL, 64, lambda *_: None, task=task) for task in ("retrieval", "qa", "mc")}


def small(name, clips, **objectives):
    made = recipes.load(name)
    video = replace(made.model.video, width=32, depth=1, heads=2)
    text = replace(made.model.text, width=32, depth=1, heads=2)
    fusion = replace(made.model.fusion, heads=2)
    made = replace(made, model=replace(made.model, video=video, text=text, fusion=fusion), data=SMALL)
    objectives = objectives or made.objectives
    if "answer" in objectives and isinstance(objectives["answer"], Answer):
        objectives = {"answer": replace(objectives["answer"], decoder=fusion)}
    made = with_answers(replace(made, objectives=objectives), clips)
    tokenizer = train_tokenizer([t for s in clips.samples for t in (*s.captions, *s.options, *s.answers)], 300)
    model = build(made, tokenizer.get_vocab_size(), "auto").eval()
    return made, model, tokenizer


def test_accuracy_by_type_is_scikit_learns():
    rng = np.random.default_rng(0)
    right, given = (rng.integers(3, size=200).astype(str) for _ in range(2))
    types = rng.choice(["a", "order/x", "order/y", ""], 200)
    samples = [Sample("", "video", ("q",), "", (r,), (), t) for r, t in zip(right, types, strict=True)]
    found = Answers(samples, list(range(200)), list(given), []).scores()
    assert found.pop("questions") == 200
    expected = {"acc": np.full(200, True), "acc_order": np.char.startswith(types, "order")}
    expected |= {f"acc_{t}": types == t for t in ("a", "order/x", "order/y")}
    assert found == pytest.approx({k: accuracy_score(right[m], given[m]) for k, m in expected.items()})
    majority = {t: max(np.unique(right[types == t], return_counts=True)[1]) for t in set(types)}
    assert priors(samples)["acc"] == pytest.approx(sum(majority.values()) / 200)
    assert priors([Sample("", "video", ("a",), "", ("a",), ("a", "b", "c", "d"))])["acc"] == 0.25
    assert priors([Sample("", "video", ("a",), "", ("a",), ("a", "b", "a", "d"))])["acc"] == 0.5


def test_any_of_several_answers_is_right_and_one_that_is_nearly_so_is_not():
    samples = [Sample("", "video", ("q",), "", ("a dog", "dog"))] * 3
    assert Answers(samples, [0, 1, 2], ["dog", "a dog", "Dog"], []).scores()["acc"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("by", "how"),
    [
        ("classifier", "concat"),
        ("classifier", "lse"),
        ("decoder", "concat"),
        ("decoder", "max"),
        ("masked words", "mean"),
    ],
)
def test_open_questions_get_an_answer_of_the_list(clips, by, how):
    objective = Mlm() if by == "masked words" else Answer(by=by)
    made, model, tokenizer = small("qa", clips["qa"], answer=objective)
    answers = made.objectives["answer"].answers if by != "masked words" else ("red", "red cross", "grows")
    found = answer_questions(model, clips["qa"], tokenizer, answers, Look(16), ensemble=how, max_bad=0.1)
    assert len(found.given) == len(clips["qa"]) and set(found.given) <= set(answers)
    assert sorted(s.captions for s in found.samples) == sorted(s.captions for s in clips["qa"].samples)


def test_the_answer_does_not_depend_on_what_else_is_asked(clips, monkeypatch):
    made, model, tokenizer = small("qa", clips["qa"], answer=Answer(by="decoder"))
    how = dict(answers=made.objectives["answer"].answers, look=Look(16), max_bad=0.1)
    together = answer_questions(model, clips["qa"], tokenizer, **how)
    monkeypatch.setattr("smaug.evaluate.questions.TEXTS", 3)
    apart = answer_questions(model, clips["qa"], tokenizer, batch=1, **how)
    assert together.given == apart.given and len(set(together.given)) > 1


def test_spelling_ranks_by_the_product_of_all_words(clips):
    made, model, tokenizer = small("qa", clips["qa"], answer=Answer(by="decoder"))
    answers = made.objectives["answer"].answers
    words = encode(tokenizer, answers, 32)
    questions = packed_uniform(torch.randn(6, 32), 3)
    scores = spell_answers(model.heads["answer"], tokenizer, questions, words)
    assert scores.shape == (2, len(answers)) and (scores < 0).all()
    # the chance of all answers together, spelled to the end, is below 1
    assert (scores.exp().sum(1) < 1).all()


def test_a_tie_between_options_is_lost_and_blindness_is_blind(clips):
    _, model, tokenizer = small("mc", clips["mc"])
    for parameter in model.heads["vtm"].parameters():
        torch.nn.init.zeros_(parameter)
    found = answer_questions(model, clips["mc"], tokenizer, (), Look(16), max_bad=0.1)
    assert found.scores()["acc"] == 0
    _, model, tokenizer = small("mc", clips["mc"])
    model.fusion.blocks[0].proj.weight.data *= 100  # so that what is seen matters to an untrained model
    seen, blind = (
        answer_questions(model, clips["mc"], tokenizer, (), Look(16), max_bad=0.1, blind=b).given for b in (False, True)
    )
    # twins have the same options, and a blind model cannot tell them apart
    assert blind[::2] == blind[1::2] and seen != blind


def test_a_tie_between_answers_is_lost(clips):
    made, model, tokenizer = small("qa", clips["qa"])
    for value in (0.0, float("nan")):
        for parameter in model.heads["answer"].parameters():
            torch.nn.init.constant_(parameter, value)
        answers = made.objectives["answer"].answers
        assert answer_questions(model, clips["qa"], tokenizer, answers, Look(16), max_bad=0.1).scores()["acc"] == 0
    _, model, tokenizer = small("qa", clips["qa"], answer=Answer(by="decoder"))
    alike = sorted({s.answers[0] for s in clips["qa"].samples})
    alike += [answer.upper() for answer in alike]  # which the tokenizer cannot tell from the others
    assert answer_questions(model, clips["qa"], tokenizer, alike, Look(16), max_bad=0.1).scores()["acc"] == 0


def test_an_answer_as_long_as_a_text_may_be(clips):
    _, model, tokenizer = small("qa", clips["qa"], answer=Mlm())
    long = ("red", "red blue " * 40)
    assert set(answer_questions(model, clips["qa"], tokenizer, long, Look(16), max_bad=0.1).given) <= set(long)


def test_what_is_lost_is_told(clips):
    made, model, tokenizer = small("mc", clips["mc"])
    gone = replace(
        clips["mc"], frames=None, places=None, samples=[replace(s, path="x.webm") for s in clips["mc"].samples]
    )
    with pytest.raises(ValueError, match="none of the 1 clips of shapes test can be read; the first: file not found"):
        answer_questions(model, gone, tokenizer, (), Look(16), max_bad=1)
    long = [replace(s, options=(*s.options[:4], s.options[4] + " red" * 40)) for s in clips["mc"].samples]
    result = evaluate(
        model, made, replace(clips["mc"], samples=long), tokenizer, choose(False), how=How(controls=False)
    )
    assert (result["captions_cut"], result["captions"]) == (16, 80)
    assert "16 texts cut to 32 word pieces; ties" in result["protocol"]


def test_a_pre_trained_model_chooses_without_training(clips):
    """By the match and the dual logit: as in the second stage of retrieval."""
    made, model, tokenizer = small("dense", clips["mc"])
    with torch.no_grad():
        model.heads["vtm"].weight.zero_()
    by_dual = answer_questions(model, clips["mc"], tokenizer, (), Look(16), max_bad=0.1).given
    run = Run(made, model, tokenizer, choose(False), 0, 1)
    pick = clips["mc"].sampler.pick(16, made.model.video.view)
    for i in range(4):
        sample = clips["mc"].samples[i]
        frames = clips["mc"].read([i], [(pick, None, False)])[0].frames
        best = (embed_texts(run, sample.options) @ embed_videos(run, frames[None])[0]).argmax()
        assert by_dual[i] == sample.options[best]


def test_a_result_says_what_it_is(clips):
    made, model, tokenizer = small("qa", clips["qa"])
    result = evaluate(model, made, clips["qa"], tokenizer, choose(False), how=How(ensemble="mean"))
    assert {"acc", "acc_shuffled", "acc_text_only", "acc_prior", "acc_order", "ceiling", "questions"} <= set(result)
    assert "mean" in result["protocol"] and "exact match" in result["protocol"] and result["task"] == "qa"
    with pytest.raises(ValueError, match="cannot replace the list"):
        evaluate(model, made, clips["qa"], tokenizer, choose(False), how=How(answers=("red",)))
    few = replace(made, objectives={"answer": replace(made.objectives["answer"], answers=("red", "blue"))})
    model = build(few, tokenizer.get_vocab_size(), "auto")
    result = evaluate(model, few, clips["qa"], tokenizer, choose(False), how=How(controls=False))
    red_or_blue = [s.answers[0] in ("red", "blue") for s in clips["qa"].samples]
    assert result["ceiling"] == pytest.approx(np.mean(red_or_blue)) and "acc_shuffled" not in result
