import json

import pytest

from smaug.report.compare import compare, reached
from smaug.report.runs import read_runs
from smaug.report.words import headline, other_costs, sentence

TOP = "16 candidates of the match head"
FRAMES = f"another evaluation: sparse has 8 frames, {TOP}, dense has 16 frames, {TOP}"


def test_reached_is_straight_between_points():
    curve = [(0.2, 1.0), (0.6, 3.0), (0.5, 4.0)]
    assert reached(curve, 0.1) == pytest.approx(0.5)  # from nothing at 0
    assert reached(curve, 0.2) == pytest.approx(1) and reached(curve, 0.5) == pytest.approx(2.5)
    assert reached(curve, 0.61) is None and reached([], 0.1) is None
    assert reached([(0.2, 1.0), (0.6, None)], 0.5) is None


@pytest.fixture
def pair(write_run):
    def of(mine=None, theirs=None, target=None):
        folders = [
            write_run("sparse", **(mine or {})),
            write_run("dense", **{"recipe": "dense", "pace": 90.0} | (theirs or {})),
        ]
        return compare(*read_runs(folders), target)

    return of


def test_the_highest_score_that_both_reached(pair):
    one = pair(mine={"scores": (0.1, 0.2, 0.4)}, theirs={"scores": (0.1, 0.2, 0.3)})
    assert one.score == 0.3 and one.refused == ""
    assert one.warnings == [FRAMES]  # the recipes are not evaluated alike, and the page has to say so

    assert one.spent["hours"] == (pytest.approx(0.025), pytest.approx(0.075)) and one.ratio() == pytest.approx(3)
    assert one.ratio("clips") == pytest.approx(7680 / 6400) and one.ratio("flops") == pytest.approx(6 / 5)
    said = (
        "sparse reached R@1 = 30.0% on shapes val in 0.025 device-hours (90 s) against 0.075 device-hours (270 s) of "
    )
    assert sentence(one) == said + "dense: 3.00x"
    assert other_costs(one) == "clips: 6.4 k against 7.68 k, 1.20x; FLOPs: 5 T against 6 T, 1.20x"
    assert headline([one.run, one.base], [one]) == sentence(one)


def test_a_target_that_was_not_reached(pair):
    one = pair(theirs={"scores": (0.1, 0.2, 0.3)}, target=0.35)
    assert one.ratio() is None and one.refused == "dense did not reach it, its best is 30.0%"
    assert sentence(one) == "sparse and dense are not compared at R@1 = 35.0% on shapes val: " + one.refused
    assert headline([one.run, one.base], [one]).startswith(
        "smaug reached R@1 40.0% on shapes test in 0.03 device-hours"
    )


def test_a_score_before_the_first_evaluation_is_a_guess(pair):
    one = pair(target=0.05)
    assert one.ratio() == pytest.approx(2.5) and len(one.warnings) == 3
    assert "sparse was above it at its first evaluation" in one.warnings[1]


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (
            {"changes": {"data": {"shapes": [6000, 200, 200]}}},
            "of different data: shapes of (500, 500) and of (200, 200)",
        ),
        ({"changes": {"data": {"manifest": ["a.csv"]}}}, "of different data: shapes and a.csv"),
        ({"changes": {"task": "mc"}}, "of different data: shapes and shapes, multiple choice"),
        ({"scores": (0, 0, 0)}, "one of them never had a score above 0"),
    ],
)
def test_what_is_not_comparable_is_not_compared(pair, theirs, said):
    one = pair(theirs=theirs)
    assert said in one.refused and one.ratio() is None and one.refused in sentence(one)


def test_other_candidates_or_no_curve(write_run):
    a, b, c = write_run("a"), write_run("b"), write_run("c")
    result = json.loads((b / "result.json").read_text())
    (b / "result.json").write_text(json.dumps(result | {"candidates": 1000.0}))
    (c / "metrics.jsonl").unlink()
    (c / "ledger.json").unlink()
    runs = read_runs([a, b, c])
    assert compare(runs[0], runs[1], None).refused == "their scores differ in candidates: 500.0 and 1000.0"
    assert compare(runs[0], runs[2], None).refused == "c has no curve"


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"machine": "AMD EPYC, 2 threads, 24 GiB; torch 2.13.0"}, "another machine: sparse has AMD EPYC, 1 threads"),
        ({"fast": False}, "another choice of --fast: sparse has True, dense has False"),
        ({"init": "/runs/x"}, "another start: sparse has its recipe's, dense has /runs/x"),
        (
            {"changes": {"data": {"shapes": [64, 500, 500]}}},
            "another set of training data: sparse has [6000, 500, 500]",
        ),
    ],
)
def test_what_else_differs_is_warned_of(pair, theirs, said):
    one = pair(theirs=theirs)
    assert [said in one.warnings[0], *one.warnings[1:]] == [True, FRAMES] and one.ratio() == pytest.approx(2.5)
    assert ("not counting the run that dense began from" in sentence(one)) == ("init" in theirs)


def test_without_a_ledger_costs_are_not_known(pair):
    one = pair(theirs={"ledger": False})
    assert one.score == 0.4 and one.ratio() is None
    assert sentence(one) == "sparse and dense both reached R@1 = 40.0% on shapes val, at a cost that is not known"
