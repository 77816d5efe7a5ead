"""Patches that leave inside the encoder: which, how many, in what state, and that nothing is lost or counted twice."""

import dataclasses

import pytest
import torch

from smaug.masks import VideoMask
from smaug.model import video_encoder
from smaug.model.video_encoder import PruneConfig, VideoEncoder, VideoEncoderConfig

WIDTH, PATCHES = 48, 36
SIZES = dict(width=WIDTH, depth=4, heads=3, image_size=24, patch=4, tubelet=2, frames=4, temporal_layers=1)


def encoder(impl="auto", attend="frame", temporal_layers=1, **prune):
    torch.manual_seed(0)
    sizes = SIZES | dict(temporal_layers=temporal_layers)
    made = VideoEncoder(VideoEncoderConfig(**sizes, attend=attend, prune=PruneConfig(**prune)), impl)
    for name, p in made.named_parameters():
        if p.ndim == 1:
            p.data = torch.randn_like(p) * 0.1 + ("norm" in name and name.endswith("weight"))
        elif name in ("position", "time", "cls"):
            p.data = torch.randn_like(p)
        elif "qkv" in name:
            p.data *= 3  # so that attention prefers
    return made


def group(made, count=3, frames=4, ratio=0.5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    video = torch.randint(0, 256, (count, frames, 24, 24, 3), dtype=torch.uint8, generator=generator)
    mask = VideoMask(ratio, "even")
    keep, _ = mask.draw(torch.arange(count), made.config.grid(frames), seed=5, epoch=2, impl="reference")
    return video, keep


def by_sequence(made, groups):
    """The visible ids of each sequence, (S, n)."""
    return torch.cat([ids.view(len(v) * made.config.times(v.shape[1]), -1) for v, ids in groups])


@pytest.fixture
def selected(monkeypatch):
    """What went into each `select_tokens`, and the arguments."""
    calls, select = [], video_encoder.ops.select_tokens

    def watched(tokens, scores, **how):
        calls.append((tokens, scores, how))
        return select(tokens, scores, **how)

    monkeypatch.setattr(video_encoder.ops, "select_tokens", watched)
    return calls


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("score", ["attention", "random"])
def test_keeping_all_equals_no_pruning(score, impl):
    plain, pruned = encoder(impl), encoder(impl, blocks=(1, 2), keep=1.0, score=score)
    groups = [group(plain)]
    a, b = plain(groups), pruned(groups)
    assert torch.equal(a.features, b.features) and torch.equal(a.frames.values, b.frames.values)
    assert torch.equal(a.stayed[0], b.stayed[0]) and torch.equal(a.stayed[1], b.stayed[1]) and b.left == []
    # and a rate of 1, as at the start of the warm-up, is as good as a configuration of 1
    c = encoder(impl, blocks=(1, 2), keep=0.3, score=score)(groups, keep_rate=1.0)
    assert torch.equal(c.features, a.features) and c.left == []


@pytest.mark.parametrize(
    ("patches", "rate", "stay"), [(18, 0.7, 13), (10, 0.7, 7), (18, 0.5, 9), (18, 0.01, 1), (7, 1.0, 7), (26, 0.7, 19)]
)
def test_count_rounds_up(patches, rate, stay):
    assert PruneConfig().count(patches, rate) == stay


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("fuse", ["mean", "sum", "none"])
def test_counts_of_two_pruning_blocks(fuse, impl):
    made = encoder(impl, blocks=(0, 2), keep=0.6, fuse=fuse)
    groups, rows = [group(made)], []
    for block in made.blocks:
        block.up.register_forward_hook(lambda _, given, out: rows.append(len(given[0])))
    encoded = made(groups)
    extra = fuse != "none"
    first, second = 1 + 11 + extra, 1 + 7 + 2 * extra  # of 18; 60% of 11 is 6.6
    assert rows == [6 * first, 6 * first, 6 * second, 6 * second]
    assert encoded.frames.lengths == second and encoded.frames.num_sequences == 6
    assert encoded.stayed[1].shape == (6, 7) and [ids.shape for _, ids in encoded.left] == [(6, 7), (6, 4)]
    last = encoded.frames.ids.view(6, -1)
    assert (last[:, 0] == -1).all() and torch.equal(last[:, 1:8], encoded.stayed[1])
    assert (last[:, 8:] == -1).all()
    assert encoded.features.shape == (3, WIDTH) and encoded.summaries.shape == (6, WIDTH)
    assert encoded.frame_ids.tolist() == [[0, 1], [2, 3], [4, 5]]
    # every visible patch is spoken for, by itself or by a fused token
    assert torch.equal(encoded.frames.size.view(6, -1).sum(1), torch.full((6,), 1.0 + (18 if extra else 7)))


@pytest.mark.parametrize("fuse", ["mean", "none"])
def test_who_stayed_and_who_left_are_the_visible_patches(fuse):
    made = encoder(blocks=(0, 1, 3), keep=0.7, fuse=fuse)
    groups = [group(made), group(made, 2, 1, seed=2)]
    encoded = made(groups)
    everyone = torch.cat([encoded.stayed[1], *(ids for _, ids in encoded.left)], 1)
    assert torch.equal(everyone.sort(1).values, by_sequence(made, groups))  # none twice, none lost, no -1
    for states, ids in (encoded.stayed, *encoded.left):
        assert states.shape == (*ids.shape, WIDTH) and (ids.diff(dim=1) > 0).all()


def test_states_are_those_at_the_moment_of_leaving(selected):
    """A patch that leaves is handed on exactly as it was between attention and MLP of its last block."""
    made = encoder(blocks=(1, 2), keep=0.5)
    encoded = made([group(made)])
    assert len(selected) == len(encoded.left) == 2
    for (tokens, _, _), (states, ids) in zip(selected, encoded.left, strict=True):
        for s in range(6):
            rows = slice(s * tokens.lengths, (s + 1) * tokens.lengths)
            place = [tokens.ids[rows].tolist().index(i) for i in ids[s].tolist()]
            assert torch.equal(states[s], tokens.values[rows][place])
    # The block's input is checked without the encoder: blocks 0 and 1 by hand.
    with torch.no_grad():
        tokens, _ = made.blocks[1].attend(made.blocks[0](made.embed(*group(made))), score=True)
    assert torch.equal(tokens.values, selected[0][0].values)
    # Those that stayed are as the last block left them, before the norm.
    sum(x.sum() for x in (encoded.left[0][0], encoded.stayed[0])).backward()
    assert made.patch_embed.weight.grad.abs().sum() > 0 and made.temporal[0].up.weight.grad is None
    assert made.norm.weight.grad is None


def test_those_with_the_least_attention_leave(selected):
    made = encoder(blocks=(1, 3), keep=0.5)
    encoded = made([group(made)])
    for number, (tokens, scores, how) in enumerate(selected):
        assert how["prefix"] == 1 and how["keep"] == (9, 5 + 1)[number]
        scores, ids = scores.view(6, -1), tokens.ids.view(6, -1)
        gone = encoded.left[number][1]
        for s in range(6):
            lost = torch.isin(ids[s], gone[s])
            stays = ~lost & (ids[s] >= 0)
            assert lost.sum() == gone.shape[1] and scores[s][lost].max() <= scores[s][stays].min()
    plain = encoder(blocks=())
    tokens = plain.blocks[0](plain.embed(*group(plain)))
    norm, attention = plain.blocks[1].norm1, plain.blocks[1].attention
    q, k, _ = attention.qkv(norm(tokens.values)).view(6, -1, 3, 3, 16).permute(2, 0, 3, 1, 4)
    truth = (q[:, :, :1] @ k.transpose(2, 3) / 4).softmax(-1)[:, :, 0].mean(1)
    torch.testing.assert_close(selected[0][1].view(6, -1), truth, atol=1e-6, rtol=1e-4)


def planted(patch, **prune):
    """In block 1 [CLS] looks for a mark that one patch carries in every frame."""
    made = encoder(blocks=(1,), keep=1 / PATCHES, **prune)
    mark = torch.zeros(WIDTH)
    mark[5], mark[6] = 60.0, -60.0
    made.position.data[patch] = mark
    made.blocks[0].attention.proj.weight.data.zero_()
    made.blocks[0].down.weight.data.zero_()
    qkv = made.blocks[1].attention.qkv
    qkv.weight.data[: 2 * WIDTH] = 0
    qkv.bias.data[: 2 * WIDTH] = 0
    qkv.bias.data[:WIDTH] = 1.0  # every query looks ...
    qkv.weight.data[WIDTH : 2 * WIDTH, 5], qkv.weight.data[WIDTH : 2 * WIDTH, 6] = 1.0, -1.0  # ... for the mark
    return made


@pytest.mark.parametrize("patch", [0, 17, 35])
def test_the_patch_that_cls_looks_at_survives(patch):
    made = planted(patch)
    encoded = made([group(made, ratio=0.0), group(made, 2, 1, ratio=0.0)])
    assert (encoded.stayed[1] % PATCHES == patch).all() and encoded.stayed[1].shape == (8, 1)


def test_the_random_twin_does_not_look(selected):
    made = planted(17, score="random")
    groups = [group(made, 20, ratio=0.0)]
    first = made(groups, seed=3, step=0)
    found = first.stayed[1] % PATCHES == 17
    assert found.float().mean() < 0.3  # one in 36
    assert len({int(i) for i in first.stayed[1] % PATCHES}) > 10
    assert torch.equal(made(groups, seed=3, step=0).stayed[1], first.stayed[1])
    for seed, step in ((3, 1), (4, 0)):
        assert (made(groups, seed=seed, step=step).stayed[1] != first.stayed[1]).float().mean() > 0.5


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("temporal_layers", [0, 2])
def test_images_and_videos_in_one_batch_equal_each_alone(impl, temporal_layers):
    made = encoder(impl, temporal_layers=temporal_layers, blocks=(1, 2), keep=0.6)
    groups = [group(made), group(made, 2, 1, seed=2), group(made, 1, 8, seed=3)]
    encoded = made(groups)
    assert encoded.frame_ids.tolist() == [
        [0, 1, -1, -1], [2, 3, -1, -1], [4, 5, -1, -1], [6, -1, -1, -1], [7, -1, -1, -1], [8, 9, 10, 11]
    ]  # fmt: skip
    clips = [(v[i : i + 1], ids[i : i + 1]) for v, ids in groups for i in range(len(v))]
    for alone in ([made([g]) for g in groups], [made([c]) for c in clips]):
        for get in (
            lambda e: e.features, lambda e: e.summaries, lambda e: e.frames.values, lambda e: e.stayed[0],
            lambda e: e.left[0][0], lambda e: e.left[1][0],
        ):  # fmt: skip
            torch.testing.assert_close(get(encoded), torch.cat([get(e) for e in alone]), atol=5e-6, rtol=1e-5)
        assert torch.equal(encoded.stayed[1], torch.cat([e.stayed[1] for e in alone]))
        assert torch.equal(encoded.left[1][1], torch.cat([e.left[1][1] for e in alone]))


def test_moments_meet_in_the_temporal_layers_alone():
    video, keep = group(encoder())
    other = video.clone()
    other[:, 2:] = 255 - other[:, 2:]  # the second moment
    for layers in (0, 1):
        made = encoder(temporal_layers=layers)
        one, two = made([(video, keep)]), made([(other, keep)])
        assert (one.features - two.features).abs().amax(1).min() > 1e-3
        first = [e.summaries.view(3, 2, -1)[:, 0] for e in (one, two)]
        assert torch.equal(*first) == (layers == 0)
        rows = [e.frames.values.view(3, 2, 19, -1)[:, 0, 1:] for e in (one, two)]
        assert torch.equal(*rows)  # patches never know of another moment
        torch.testing.assert_close(one.features, one.summaries.view(3, 2, -1).mean(1))


def test_a_clip_as_one_sequence_can_be_pruned_too():
    made = encoder(attend="clip", temporal_layers=0, blocks=(1,), keep=0.5)
    video, keep = group(made)
    encoded = made([(video, keep)])
    assert encoded.frames.lengths == 1 + 18 + 1 and encoded.frame_ids.tolist() == [[0], [1], [2]]
    assert torch.equal(torch.cat([encoded.stayed[1], encoded.left[0][1]], 1).sort(1).values, keep)


def test_sequences_of_several_lengths_are_refused():
    made = encoder(attend="clip", temporal_layers=0, blocks=(1,), keep=0.5)
    with pytest.raises(ValueError, match="pruning needs sequences of one length: use attend='frame'"):
        made([group(made), group(made, 2, 1)])


def test_gradients_reach_what_was_fused():
    """The fused token hands gradient back to the patches that melted into it, so a pruned patch still teaches."""
    made = encoder(blocks=(1,), keep=0.5)
    no_fuse = encoder(blocks=(1,), keep=0.5, fuse="none")
    no_fuse.load_state_dict(made.state_dict())
    grads = []
    for one in (made, no_fuse):
        one([group(one)]).frames.values.square().sum().backward()
        grads.append(one.patch_embed.weight.grad)
    assert all(g.isfinite().all() for g in grads) and not torch.allclose(*grads)
    assert dataclasses.replace(made.config.prune, fuse="none") == no_fuse.config.prune
