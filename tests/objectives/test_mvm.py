"""mvm against its formula: the masked patches' pixels, normalised a patch, and nothing else."""

import dataclasses

import pytest
import torch

from smaug.masks import VideoMask
from smaug.model.decoder import DecoderConfig
from smaug.model.model import ModelConfig
from smaug.model.video_encoder import PruneConfig, VideoEncoder, VideoEncoderConfig
from smaug.objectives.mvm import Mvm
from smaug.objectives.seen import Removed, Seen

VIDEO = VideoEncoderConfig(
    width=32, depth=2, heads=2, image_size=24, patch=4, tubelet=2, frames=4, attend="frame",
    prune=PruneConfig(blocks=(1,), keep=0.5),
)  # fmt: skip
WHOLE = DecoderConfig(width=32, depth=1, heads=2, share=1.0)
TUBE = 3 * 2 * 4 * 4


def made(decoder=WHOLE):
    torch.manual_seed(0)
    return VideoEncoder(VIDEO), Mvm(decoder=decoder).heads(ModelConfig(video=VIDEO), 0)


def groups(images=True):
    generator = torch.Generator().manual_seed(1)
    found = []
    for count, frames, first in ((3, 4, 10), (2, 1, 40)):
        if frames > 1 or images:
            video = torch.randint(0, 256, (count, frames, 24, 24, 3), dtype=torch.uint8, generator=generator)
            found.append((video, torch.arange(first, first + count)))
    return found


def see(encoder, groups, ratio=0.5, epoch=0):
    visible, removed = [], []
    for video, samples in groups:
        keep, gone = VideoMask(ratio, "even").draw(samples, VIDEO.grid(video.shape[1]), seed=0, epoch=0, impl="auto")
        visible.append((video, keep))
        removed.append(Removed(video, samples, gone, VIDEO.sequences(video.shape[1])))
    return Seen(encoder(visible), None, None, removed, 0, epoch)


def targets(video, ids):
    """(n, TUBE or 48) fp64: one patch at a time, (channel, frame, row, column), of mean 0 and variance 1."""
    out, tubelet = [], min(2, len(video))
    for i in ids.tolist():
        moment, place = divmod(i, 36)
        row, column = divmod(place, 6)
        patch = video[moment * tubelet : (moment + 1) * tubelet, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
        x = patch.permute(3, 0, 1, 2).flatten().double() / 255
        out.append((x - x.mean()) / (x.var() + 1e-6).sqrt())
    return torch.stack(out)


def test_is_the_formula_for_videos_and_images():
    encoder, decoder = made()
    seen = see(encoder, groups())
    loss = Mvm(decoder=WHOLE)(decoder, seen)
    per_frame = torch.cat([group.ids.view(-1, 18) for group in seen.removed])
    pred = decoder([seen.video.stayed, *seen.video.left], per_frame)
    squares, first = [], 0
    for group in seen.removed:
        count = len(group.video) * group.sequences
        own = pred[first : first + count].reshape(len(group.video), -1, TUBE)
        first += count
        if group.video.shape[1] == 1:  # an image stands still: the mean over the tube's frames
            own = own.view(2, 18, 3, 2, 16).mean(3).flatten(2)
        for i, video in enumerate(group.video):
            squares.append((own[i].double() - targets(video, group.ids[i])).square().mean(1))
    truth = torch.cat(squares).mean()  # every masked patch weighs the same, of an image or a video
    assert abs(loss.item() / truth.item() - 1) < 1e-5
    parameters = [*decoder.parameters(), *encoder.blocks.parameters()]
    got, want = (torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in (loss, truth))
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_only_masked_patches_are_compared():
    encoder, decoder = made()
    seen = see(encoder, groups(images=False))
    (group,) = seen.removed
    loss = Mvm(decoder=WHOLE)(decoder, seen)
    gone = torch.zeros(3, 72, dtype=torch.bool).scatter_(1, group.ids.long(), True).view(3, 2, 1, 6, 1, 6, 1, 1)
    gone = gone.expand(-1, -1, 2, -1, 4, -1, 4, 3).reshape(group.video.shape)
    for hidden, equal in ((gone, True), (~gone, False)):
        other = dataclasses.replace(group, video=torch.where(hidden, group.video, 255 - group.video))
        again = Mvm(decoder=WHOLE)(decoder, dataclasses.replace(seen, removed=[other]))
        assert torch.equal(again, loss) == equal


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_share_of_the_masked_patches_is_rebuilt(share):
    encoder, decoder = made()
    mvm, asked = Mvm(decoder=dataclasses.replace(WHOLE, share=share)), []
    decoder.register_forward_pre_hook(lambda _, given: asked.append(given[1]))
    seen = see(encoder, groups())
    losses = [mvm(decoder, dataclasses.replace(seen, epoch=epoch)).item() for epoch in (0, 0, 1)]
    assert all(ids.shape == (8, round(share * 18)) and (ids.diff(dim=1) > 0).all() for ids in asked)
    every = torch.cat([group.ids.view(-1, 18) for group in seen.removed])
    assert all(torch.isin(one, own).all() for ids in asked for one, own in zip(ids, every, strict=True))
    assert losses[0] == losses[1] and (losses[0] == losses[2]) == (share == 1.0)
    if share < 1:  # frames draw for themselves, and a clip's draw does not depend on its neighbours
        place = [(own[:, None] == one).nonzero()[:, 0].tolist() for one, own in zip(asked[0], every, strict=True)]
        assert len({tuple(p) for p in place}) > 5
        mvm(decoder, see(encoder, [(v[1:], s[1:]) for v, s in groups()]))
        assert torch.equal(asked[-1], asked[0][[2, 3, 4, 5, 7]])


def test_exit_states_are_seen_or_not():
    encoder, decoder = made()
    seen = see(encoder, groups())
    given = []
    decoder.register_forward_pre_hook(lambda _, given_: given.append(given_[0]))
    changed = dataclasses.replace(
        seen, video=dataclasses.replace(seen.video, left=[(s + 1, i) for s, i in seen.video.left])
    )
    for entry, matters in (("exit", True), ("mask", False)):
        mvm = Mvm(decoder=dataclasses.replace(WHOLE, decoder_input=entry))
        assert (mvm(decoder, seen) != mvm(decoder, changed)) == matters
        visible = torch.cat([ids for _, ids in given[-1]], 1)
        assert visible.shape == (8, 18 if matters else 9) and (visible >= 0).all()


def test_nothing_masked_costs_nothing():
    encoder, decoder = made()
    loss = Mvm()(decoder, see(encoder, groups(), ratio=0.0))
    assert loss == 0 and loss.shape == () and loss.dtype == torch.float32
