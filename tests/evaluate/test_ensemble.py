"""Late ensembles: of each row's valid units alone, by the formula; what stands in the padding is not looked at."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smaug.evaluate.ensemble import ensemble

FORMULA = {
    "mean": lambda x: sum(x) / len(x),
    "max": max,
    "lse": lambda x: math.log(sum(math.exp(a) for a in x) / len(x)),
}


@pytest.mark.parametrize("how", FORMULA)
@given(
    st.lists(
        st.lists(st.one_of(st.floats(-30, 30, width=32), st.none()), min_size=4, max_size=4), min_size=1, max_size=5
    )
)
def test_equals_the_formula_of_what_is_there(how, rows):
    valid = torch.tensor([[x is not None for x in row] for row in rows])
    logits = torch.tensor([[math.nan if x is None else x for x in row] for row in rows])
    want = [FORMULA[how]([x for x in row if x is not None]) if any(x is not None for x in row) else -math.inf
            for row in rows]  # fmt: skip
    assert ensemble(logits, valid, how).tolist() == pytest.approx(want, rel=1e-5, abs=1e-5)
    classes = torch.stack([logits, logits + 1, -logits], 2)
    by_class = ensemble(classes, valid, how)
    for i in range(3):
        assert torch.equal(by_class[:, i], ensemble(classes[..., i], valid, how))


def test_lse_does_not_grow_with_the_number_of_frames():
    for n in (1, 2, 7):
        assert ensemble(torch.full((1, n), 3.0), torch.ones(1, n, dtype=torch.bool), "lse").item() == pytest.approx(3)


def test_a_frame_that_is_not_a_number_is_not_hidden():
    logits = torch.tensor([[1.0, math.nan], [1.0, 2.0]])
    for how in FORMULA:
        assert ensemble(logits, torch.ones(2, 2, dtype=torch.bool), how).isnan().tolist() == [True, False]


def test_concat_is_no_late_ensemble():
    with pytest.raises(ValueError, match=r"concat.*use mean, max or lse"):
        ensemble(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), "concat")
