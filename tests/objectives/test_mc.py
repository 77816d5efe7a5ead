"""Multiple choice: the formula, and that an option's place does not matter."""

import torch
from torch.nn import functional as F

from smaug.model.model import ModelConfig
from smaug.objectives.mc import Mc
from smaug.objectives.seen import Choices, Seen


def test_it_is_the_cross_entropy_of_the_match_logits():
    head = Mc().heads(ModelConfig(), 10)
    features, labels = torch.randn(6, 128), torch.tensor([2, 0])
    loss = Mc()(head, Seen(None, None, None, [], 0, 0, choices=Choices(features, labels)))
    scores = [[head(features[3 * i + j]).diff().item() for j in range(3)] for i in range(2)]
    expected = -sum(F.log_softmax(torch.tensor(row), 0)[label] for row, label in zip(scores, (2, 0), strict=True)) / 2
    torch.testing.assert_close(loss, expected)
