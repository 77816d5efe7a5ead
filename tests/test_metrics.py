"""Ranks and recalls: against torchmetrics, scikit-learn and counting by hand, and ties against the model."""

import math
import statistics

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.retrieval import retrieval_hit_rate, retrieval_recall, retrieval_reciprocal_rank

from smaug import metrics
from smaug.metrics import recalls, retrieval_ranks

INF, NAN = math.inf, math.nan


def by_hand(scores, video_of_text):
    """Loops over Python floats; whatever is not certainly below the right one stands before it."""
    rows = scores.tolist()
    t2v = []
    for row, own in zip(rows, video_of_text, strict=True):
        t2v.append(1 + sum(not row[v] < row[own] for v in range(len(row)) if v != own))
    v2t = []
    for v in range(scores.shape[1]):
        mine = [row[v] for row, own in zip(rows, video_of_text, strict=True) if own == v]
        best = NAN if any(map(math.isnan, mine)) else max(mine, default=None)
        others = [row[v] for row, own in zip(rows, video_of_text, strict=True) if own != v]
        v2t.append(0 if best is None else 1 + sum(not x < best for x in others))
    return t2v, v2t


@pytest.mark.parametrize("texts", [30, 75])
def test_against_torchmetrics(texts):
    torch.manual_seed(texts)
    scores = torch.rand(texts, 30)
    video_of_text = torch.cat([torch.arange(30), torch.randint(0, 30, (texts - 30,))])[torch.randperm(texts)]
    t2v, v2t = retrieval_ranks(scores, video_of_text)
    target = video_of_text[:, None] == torch.arange(30)
    found = recalls(t2v, "t2v") | recalls(v2t, "v2t")
    for k in (1, 5, 10):
        hits = [retrieval_hit_rate(s, t, top_k=k).item() for s, t in zip(scores, target, strict=True)]
        assert found[f"t2v_r{k}"] == pytest.approx(statistics.mean(hits))
    for rank, s, t in zip(t2v, scores, target, strict=True):
        assert 1 / rank.item() == pytest.approx(retrieval_reciprocal_rank(s, t).item())
    # A video's best text among all *other* videos' texts: its own lesser texts do not stand before it.
    for v in range(30):
        column, mine = scores[:, v], target[:, v]
        keep = ~mine
        keep[column.masked_fill(~mine, -1).argmax()] = True
        assert 1 / v2t[v].item() == pytest.approx(retrieval_reciprocal_rank(column[keep], mine[keep]).item())
        for k in (1, 5, 10):
            assert (v2t[v] <= k).item() == bool(retrieval_hit_rate(column[keep], mine[keep], top_k=k))


@pytest.mark.parametrize("seed", range(20))
def test_by_hand_with_ties_infinities_and_nan(seed):
    g = torch.Generator().manual_seed(seed)
    texts, videos = 12, 7
    scores = torch.randint(0, 4, (texts, videos), generator=g).float()  # ties everywhere
    for value, share in ((NAN, 0.1), (INF, 0.05), (-INF, 0.1)):
        scores[torch.rand(texts, videos, generator=g) < share * (seed % 3)] = value
    video_of_text = torch.randint(0, videos, (texts,), generator=g)
    t2v, v2t = retrieval_ranks(scores, video_of_text)
    assert (t2v.tolist(), v2t.tolist()) == by_hand(scores, video_of_text.tolist())


def test_a_model_that_says_the_same_of_all_is_last():
    for value in (0.0, NAN, INF, -INF):
        t2v, v2t = retrieval_ranks(torch.full((4, 4), value), torch.arange(4))
        assert t2v.tolist() == v2t.tolist() == [4] * 4
    found = recalls(t2v, "t2v")
    assert (found["t2v_r1"], found["t2v_r5"]) == (0, 1)


def test_nan_loses():
    scores = torch.eye(3)
    scores[0, 0] = NAN  # the right one: last. For text 2 and video 2 the wrong one is NaN, and stands before theirs.
    scores[2, 1] = NAN
    t2v, v2t = retrieval_ranks(scores, torch.arange(3))
    assert t2v.tolist() == [3, 1, 2] and v2t.tolist() == [3, 2, 1]


def test_several_captions_a_video_and_one_without():
    #                       video 0, 1, 2
    scores = torch.tensor([[0.9, 0.1, 0.2],  # of video 0
                           [0.2, 0.3, 0.1],  # of video 0 too, and wrong
                           [0.5, 0.4, 0.3]])  # of video 1  # fmt: skip
    t2v, v2t = retrieval_ranks(scores, torch.tensor([0, 0, 1]))
    assert t2v.tolist() == [1, 2, 2]
    assert v2t.tolist() == [1, 1, 0]  # the best of two counts; the last video has no text


@pytest.mark.parametrize("ranks", [[1], [1, 2], [1, 2, 10, 11], [5, 1, 3], [1, 1, 6, 500], list(range(1, 101))])
def test_recalls_and_the_median(ranks):
    found = recalls(torch.tensor(ranks), "x")
    assert found["x_medr"] == statistics.median(ranks)
    assert {k: found[f"x_r{k}"] for k in (1, 5, 10)} == {
        k: pytest.approx(sum(r <= k for r in ranks) / len(ranks), abs=1e-12) for k in (1, 5, 10)
    }
    assert found["x_meanr"] == pytest.approx(statistics.mean(ranks))
    assert list(found) == ["x_r1", "x_r5", "x_r10", "x_medr", "x_meanr"]
    assert recalls(torch.tensor(ranks), "x", "_dsl") == {f"{key}_dsl": value for key, value in found.items()}


@st.composite
def tied(draw):
    """A matrix of whole scores, few of them different, above 0, since torchmetrics' recall takes others for not found;
    and the right column of each row."""
    n, m = draw(st.integers(1, 5)), draw(st.integers(3, 15))  # of two classes scikit-learn wants one score
    numbers = draw(st.lists(st.integers(1, 6), min_size=n * m, max_size=n * m))
    own = draw(st.lists(st.integers(0, m - 1), min_size=n, max_size=n))
    return torch.tensor(numbers).view(n, m).float(), torch.tensor(own)


def against(scores, own):
    """The same scores with the right one a little lower: what others break as they like is then broken against it."""
    return scores.scatter_add(1, own[:, None], torch.full_like(scores, -0.5))


@settings(max_examples=8)  # torchmetrics takes a row at a time
@given(tied())
def test_ties_against_torchmetrics_and_scikit_learn(case):
    scores, own = case
    ranks = metrics.text_to_video_ranks(scores, own)
    found, untied = recalls(ranks, "t2v"), against(scores, own)
    target = own[:, None] == torch.arange(scores.shape[1])
    for k in (1, 5, 10):
        hits = [retrieval_hit_rate(s, t, top_k=k).item() for s, t in zip(untied, target, strict=True)]
        recalled = [retrieval_recall(s, t, top_k=k).item() for s, t in zip(untied, target, strict=True)]
        assert found[f"t2v_r{k}"] == pytest.approx(statistics.mean(hits))
        assert found[f"t2v_r{k}"] == pytest.approx(statistics.mean(recalled))
        columns = np.arange(scores.shape[1])
        if k < len(columns):  # else it says 1 and warns
            top = sklearn.metrics.top_k_accuracy_score(own.numpy(), untied.numpy(), k=k, labels=columns)
            assert found[f"t2v_r{k}"] == pytest.approx(top)
    places = 1 + np.array([np.flatnonzero(np.argsort(-s) == o)[0] for s, o in zip(untied.numpy(), own, strict=True)])
    assert (found["t2v_medr"], found["t2v_meanr"]) == pytest.approx((np.median(places), places.mean()))
    # one text a clip: the same the other way round
    square = scores[:, : len(scores)] if len(scores) <= scores.shape[1] else scores[: scores.shape[1]]
    one = torch.arange(len(square))
    assert torch.equal(metrics.video_to_text_ranks(square.T, one), metrics.text_to_video_ranks(square, one))


def test_ranks_in_parts_are_the_same(monkeypatch):
    scores, own = torch.randint(0, 4, (23, 9)).float(), torch.randint(0, 9, (23,))
    whole = retrieval_ranks(scores, own)
    monkeypatch.setattr(metrics, "BLOCK", 40)
    for one, other in zip(whole, retrieval_ranks(scores, own), strict=True):
        assert torch.equal(one, other)
