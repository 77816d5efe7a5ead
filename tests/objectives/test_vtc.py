"""vtc against its formula, written out pair by pair in fp64."""

import math
from types import SimpleNamespace

import pytest
import torch

from smaug.model.model import ModelConfig
from smaug.model.text_encoder import TextEncoderConfig
from smaug.model.video_encoder import VideoEncoderConfig
from smaug.objectives.seen import Seen
from smaug.objectives.vtc import Vtc
from smaug.testing import relative_error

SIZES = ModelConfig(VideoEncoderConfig(width=24), TextEncoderConfig(width=16))
B = 6
ALONE = torch.eye(B, dtype=torch.bool)
# Texts 0 and 3 are equal, so each belongs to both videos; videos 1, 2 and 5 are one, so each text belongs to all three.
REPEATED = ALONE.clone()
for group in ((0, 3), (1, 2, 5)):
    for i in group:
        REPEATED[i, list(group)] = True
# No batch has one, but it tells rows from columns: text 0 belongs to video 3 too, text 3 not to video 0.
ONE_WAY = ALONE.clone()
ONE_WAY[0, 3] = True


def heads_of(vtc=Vtc(embed_dim=10)):  # noqa: B008
    torch.manual_seed(0)
    heads = vtc.heads(SIZES, 0)
    for p in heads.parameters():
        if p.numel() > 1:
            p.data = torch.randn_like(p)
    return heads


def shows(video, text, positives):
    """What the contrast looks at; it asks for nothing else."""
    return Seen(SimpleNamespace(features=video), text, positives, [], 0, 0)


def seen(positives, seed=1):
    generator = torch.Generator().manual_seed(seed)
    video, text = torch.randn(B, 24, generator=generator), torch.randn(B, 16, generator=generator)
    return shows(video.requires_grad_(), text.requires_grad_(), positives)


def written_out(video, text, positives, temperature):
    """Unit vectors in fp64 -> the mean over rows and columns of the mean over positives of -log softmax."""
    s = torch.stack([torch.stack([(t * v).sum() for v in video]) for t in text]) / temperature
    total = 0.0
    for way, belongs in ((s, positives), (s.T, positives.T)):
        for row, own in zip(way, belongs, strict=True):
            every = row.exp().sum().log()
            total = total + sum(every - row[j] for j in range(B) if own[j]) / int(own.sum())
    return total / (2 * B)


def truth_of(heads, shown):
    """The loss in fp64, as a function of the same leaves."""
    unit = []
    for layer, x in ((heads.video, shown.video.features), (heads.text, shown.text)):
        y = x.double() @ layer.weight.double().T + layer.bias.double()
        unit.append(y / y.square().sum(1, keepdim=True).sqrt())
    return written_out(*unit, shown.positives, heads.log_temperature.double().exp())


@pytest.mark.parametrize("positives", [ALONE, REPEATED, ONE_WAY], ids=["alone", "repeated", "one way"])
def test_is_the_formula_with_its_gradients(positives):
    heads, shown = heads_of(), seen(positives)
    loss, truth = Vtc()(heads, shown), truth_of(heads, shown)
    assert abs(loss.item() / truth.item() - 1) < 1e-6
    leaves = {**dict(heads.named_parameters()), "seen video": shown.video.features, "seen text": shown.text}
    got, want = (torch.autograd.grad(x, leaves.values()) for x in (loss, truth))
    for name, a, b in zip(leaves, got, want, strict=True):
        assert b.norm() > 1e-4, name
        assert relative_error(a, b) < 1e-5, name


def test_repeated_captions_and_videos_are_no_negatives():
    """Where all that belongs together is equal, the loss is the entropy of the targets: no less is possible."""
    group = torch.tensor([0, 1, 1, 0, 2, 1])
    heads = Vtc(embed_dim=3, temperature=0.001).heads(
        ModelConfig(VideoEncoderConfig(width=3, heads=1), TextEncoderConfig(width=3, heads=1)), 0
    )
    for layer in (heads.video, heads.text):
        layer.weight.data = torch.eye(3)
    places = torch.eye(3)[group]
    shown = shows(places, places, REPEATED)
    entropy = (2 * math.log(2) + 3 * math.log(3)) / B
    assert Vtc()(heads, shown).item() == pytest.approx(entropy, rel=1e-6)
    alone = shows(places, places, ALONE)
    assert Vtc()(heads, alone).item() == pytest.approx(entropy, rel=1e-6)
    # A positive that is told to be a negative costs what the formula says, so the mask is really read.
    torch.manual_seed(0)
    assert Vtc()(heads_of(), seen(REPEATED)).item() != pytest.approx(Vtc()(heads_of(), seen(ALONE)).item(), rel=1e-3)


def test_symmetric():
    """Texts and videos may change places."""
    heads, shown = heads_of(), seen(REPEATED)
    loss = Vtc()(heads, shown)
    heads.video, heads.text = heads.text, heads.video
    other = shows(shown.text, shown.video.features, REPEATED.T)
    torch.testing.assert_close(Vtc()(heads, other), loss)


def test_order_of_pairs_does_not_matter():
    heads, shown = heads_of(), seen(REPEATED)
    p = torch.tensor([4, 2, 0, 5, 1, 3])
    other = shows(shown.video.features[p], shown.text[p], REPEATED[p][:, p])
    torch.testing.assert_close(Vtc()(heads, other), Vtc()(heads, shown))


@pytest.mark.parametrize(("wild", "held"), [(1e-5, 0.001), (3.0, 0.5), (0.2, 0.2)])
def test_temperature_is_clamped(wild, held):
    heads, shown = heads_of(), seen(ALONE)
    heads.log_temperature.data.fill_(math.log(wild))
    loss = Vtc()(heads, shown)
    (gradient,) = torch.autograd.grad(loss, heads.log_temperature)
    assert math.isfinite(gradient.item()) and (gradient != 0) == (wild == held)
    heads.log_temperature.data.fill_(math.log(held))
    assert loss.item() == pytest.approx(Vtc()(heads, shown).item(), rel=1e-5)


def test_bf16_features_are_compared_in_fp32():
    heads, shown = heads_of(), seen(ALONE)
    with torch.autocast("cpu", torch.bfloat16):
        assert heads.embed_video(shown.video.features.bfloat16()).dtype == torch.float32
        assert heads.embed_text(shown.text.bfloat16()).dtype == torch.float32
        scores = heads.scores(shown.text.bfloat16(), shown.video.features.bfloat16())
        texts, videos = heads.embed_text(shown.text), heads.embed_video(shown.video.features)
    assert scores.dtype == torch.float32
    truth = texts @ videos.T / heads.log_temperature.exp()
    torch.testing.assert_close(scores, truth, atol=0, rtol=1e-5)
    torch.testing.assert_close(heads.embed_video(shown.video.features).norm(dim=1), torch.ones(B))
    start = Vtc(temperature=0.2).heads(SIZES, 0).log_temperature
    assert start.exp().item() == pytest.approx(0.2) and start.requires_grad
