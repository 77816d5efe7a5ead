"""The decoder sees what it is given, at the places it is told, one sequence at a time."""

import pytest
import torch

from smaug.model.decoder import Decoder, DecoderConfig
from smaug.model.video_encoder import VideoEncoderConfig
from smaug.testing import relative_error
from smaug.tokens import packed_uniform

VIDEO = VideoEncoderConfig(width=24, heads=1, image_size=24, patch=4, tubelet=2, frames=4)
S, N = 3, 36


def decoder(depth=2):
    torch.manual_seed(0)
    made = Decoder(DecoderConfig(width=32, depth=depth, heads=2), VIDEO)
    made.position.data = torch.randn_like(made.position)
    made.mask_token.data = torch.randn_like(made.mask_token)
    return made


def inputs():
    """Visible states and ids of three frames, two of the first moment and one of the second, and ids to rebuild."""
    generator = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(N, generator=generator) for _ in range(S)]).int()
    order += torch.tensor([0, 0, N])[:, None].int()
    return torch.randn(S, 10, 24, generator=generator), order[:, :10], order[:, 10:17]


def test_shape_is_a_tube_of_pixels_a_masked_patch():
    states, ids, masked = inputs()
    assert decoder()([(states, ids)], masked).shape == (S, 7, 3 * 2 * 4 * 4)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_last_block_answers_for_masked_patches_alone(depth):
    """As plain blocks would, of which the answers for visible patches are thrown away; forward and backward."""
    made, (states, ids, masked), rows = decoder(depth), inputs(), []
    made.blocks[-1].up.register_forward_hook(lambda _, given, out: rows.append(len(out)))
    pred = made([(states, ids)], masked)
    place = made.position[torch.cat([ids, masked], 1).long()]
    x = torch.cat([made.enter(states), made.mask_token.expand(S, 7, -1)], 1) + place
    tokens = packed_uniform(x.flatten(0, 1), 17)
    for block in made.blocks:
        tokens = block(tokens)
    plain = made.pixels(made.norm(tokens.values.view_as(x)[:, 10:]))
    assert rows == [7 * S, 17 * S] and relative_error(pred, plain) < 1e-6
    g = torch.randn(pred.shape, generator=torch.Generator().manual_seed(2))
    for (name, _), a, b in zip(made.named_parameters(), *(
        torch.autograd.grad(y, list(made.parameters()), g) for y in (pred, plain)
    ), strict=True):  # fmt: skip
        assert relative_error(a, b) < 1e-5, name


@pytest.mark.parametrize("depth", [0, 2])
def test_permuting_masked_patches_permutes_predictions(depth):
    made, (states, ids, masked) = decoder(depth), inputs()
    p = torch.tensor([3, 0, 6, 5, 1, 2, 4])
    pred = made([(states, ids)], masked)
    assert relative_error(made([(states, ids)], masked[:, p]), pred[:, p]) < 1e-5
    assert (pred[:, :-1] - pred[:, 1:]).abs().amax(-1).min() > 1e-3  # the place matters
    elsewhere = masked.clone()
    elsewhere[0, 0] = ids[0, 0]
    assert not torch.allclose(made([(states, ids)], elsewhere)[0, 0], pred[0, 0], atol=1e-3)


def test_parts_and_order_of_the_visible_do_not_matter_but_states_and_places_do():
    made, (states, ids, masked) = decoder(), inputs()
    pred = made([(states, ids)], masked)
    p = torch.tensor([9, 3, 1, 0, 2, 8, 7, 4, 6, 5])
    parts = [(states[:, p[:4]], ids[:, p[:4]]), (states[:, p[4:]], ids[:, p[4:]])]
    assert relative_error(made(parts, masked), pred) < 1e-5
    assert relative_error(made([(states[:, p], ids)], masked), pred) > 1e-3  # each with another's place
    assert relative_error(made([(states[:, :6], ids[:, :6])], masked), pred) > 1e-3  # some left out


def test_a_frame_sees_itself_alone():
    made, (states, ids, masked) = decoder(), inputs()
    pred = made([(states, ids)], masked)
    other = torch.cat([states[:1], states[1:] + 3])
    changed = made([(other, ids)], masked)
    assert torch.equal(changed[0], pred[0]) and (changed[1:] - pred[1:]).abs().amax((1, 2)).min() > 1e-3
    for s in range(S):
        alone = made([(states[s : s + 1], ids[s : s + 1])], masked[s : s + 1])
        assert relative_error(alone[0], pred[s]) < 1e-5
