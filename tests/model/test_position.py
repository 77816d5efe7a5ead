"""Tables of time."""

import pytest
import torch

from smaug.model.position import more_places, resample_time


def test_time_for_other_numbers_of_moments():
    table = torch.tensor([[0.0, 7.0], [1.0, 5.0], [2.0, 3.0], [3.0, 1.0]], requires_grad=True)
    assert resample_time(table, 4) is table
    torch.testing.assert_close(resample_time(table, 1), torch.tensor([[1.5, 4.0]]))
    torch.testing.assert_close(resample_time(table, 2), torch.tensor([[0.5, 6.0], [2.5, 2.0]]))
    # Twice as many: a quarter of a step to either side, and the ends held.
    torch.testing.assert_close(
        resample_time(table, 8)[:, 0], torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.0])
    )
    resample_time(table, 3).sum().backward()
    assert (table.grad != 0).all()


def test_one_moment_is_the_same_at_all_times():
    table = torch.tensor([[2.0, 5.0]])
    assert torch.equal(resample_time(table, 3), table.expand(3, 2))


def test_more_places_keep_what_was_trained_and_repeat_the_words_places():
    table = torch.arange(4.0)[:, None]
    assert more_places(table, 9)[:, 0].tolist() == [0, 1, 2, 3, 1, 2, 3, 1, 2]
    assert torch.equal(more_places(table, 4), table) and torch.equal(more_places(table, 2), table[:2])
    with pytest.raises(ValueError, match="1 places"):
        more_places(table[:1], 5)
