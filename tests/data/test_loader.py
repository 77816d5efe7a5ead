"""A batch is a function of (seed, epoch, index), whatever was read before, by how many threads, from files or a map.

The brightness of frame i of clip c is about 20 + 12 * i, its colour tells c, so a wrong frame or clip is seen.
"""

import random
import threading
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from smaug.data import shapes, text
from smaug.data.clips import DataConfig, open_manifest, open_shapes
from smaug.data.decode import Got
from smaug.data.loader import AHEAD, IGNORED, Loader, _received, caption_key, middle_frames
from smaug.data.manifest import ManifestError, Skip
from smaug.masks import TextMask

SMALL = DataConfig(shapes=(64, 16, 16))
VIDEOS, IMAGES = 9, 4
FRAMES = 12


def loader(clips, batch=4, seed=0, frames=4, view=1, mask=TextMask(0.4), mlm=0.5, ranks=(0, 1), **config):  # noqa: B008
    tokenizer = text.train_tokenizer([c for s in clips.samples for c in s.captions], 300)
    config = DataConfig(batch=batch, **config)
    return Loader(
        clips, tokenizer, config, frames=frames, view=view, max_words=16, text_mask=mask, mlm_ratio=mlm, seed=seed,
        rank=ranks[0], ranks=ranks[1],
    )  # fmt: skip


def same_words(a, b):
    return a is b is None or (
        torch.equal(a.values, b.values)
        and torch.equal(a.ids, b.ids)
        and torch.equal(a.cu_seqlens, b.cu_seqlens)
        and a.lengths == b.lengths
    )


def same(a, b):
    return (
        [g.video.shape for g in a.groups] == [g.video.shape for g in b.groups]
        and all(torch.equal(x.video, y.video) for x, y in zip(a.groups, b.groups, strict=True))
        and all(torch.equal(x.samples, y.samples) for x, y in zip(a.groups, b.groups, strict=True))
        and all(same_words(getattr(a, view), getattr(b, view)) for view in ("words", "contrast", "masked"))
        and torch.equal(a.masked_rows, b.masked_rows)
        and a.masked_counts == b.masked_counts
        and torch.equal(a.masked_labels, b.masked_labels)
        and torch.equal(a.video_keys, b.video_keys)
        and torch.equal(a.caption_keys, b.caption_keys)
        and (a.epoch, a.step, a.names) == (b.epoch, b.step, b.names)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos v0 .. v8 with 1 + c % 3 captions, and images i0 .. i3."""
    folder = tmp_path_factory.mktemp("clips")
    rows = ["video,image,caption"]
    for c in range(VIDEOS):
        frames = np.repeat(20 + 12 * np.arange(FRAMES), 48 * 48 * 3).reshape(FRAMES, 48, 48, 3).astype(np.uint8)
        (folder / f"v{c}.webm").write_bytes(shapes.encode(frames))
        rows += [f"v{c}.webm,,video {c} said {k}" for k in range(1 + c % 3)]
    for c in range(IMAGES):
        Image.new("RGB", (40 + c, 40), (50 * c, 50 * c, 50 * c)).save(folder / f"i{c}.png")
        rows.append(f",i{c}.png,image {c}")
    (folder / "m.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def mixed(folder):
    return open_manifest([folder / "m.csv"], DataConfig(), 32)


def test_a_batch_depends_on_seed_and_step_alone(mixed):
    first = loader(mixed)
    batches = [first.batch(step) for step in range(8)]  # 13 clips: 3 batches an epoch
    assert [b.epoch for b in batches] == [0, 0, 0, 1, 1, 1, 2, 2]
    again = loader(mixed, workers=5)
    for step in random.Random(0).sample(range(8), 8):
        assert same(again.batch(step), batches[step])
    assert not same(batches[0], batches[3])
    assert not same(loader(mixed, seed=1).batch(0), batches[0])


def shown(batch):
    """What a batch shows of each clip, by name."""
    frames = [frames for group in batch.groups for frames in group.video]
    return {name: (frames[i].numpy().tobytes(), batch.words.lengths[i]) for i, name in enumerate(batch.names)}


def test_ranks_share_the_batch_of_one_process(mixed):
    whole = loader(mixed, batch=12)
    for ranks in (2, 3):
        shares = [loader(mixed, batch=12, ranks=(rank, ranks)) for rank in range(ranks)]
        for step in (0, 1, 5):
            parts = [shown(share.batch(step)) for share in shares]
            assert all(len(part) == 12 // ranks for part in parts)
            assert {name: what for part in parts for name, what in part.items()} == shown(whole.batch(step))
    with pytest.raises(ValueError, match="a batch of 13 pairs cannot be shared equally by 2 processes"):
        loader(mixed, batch=13, ranks=(0, 2))


def test_batches_of_images_and_of_videos_by_ratio(mixed):
    source = loader(mixed, batch=2, image_share=0.25)
    batches = [source.batch(step) for step in range(32)]
    kinds = ["image" if batch.names[0].startswith("i") else "video" for batch in batches]
    assert kinds == ["video", "video", "video", "image"] * 8
    assert all(len({name[0] for name in batch.names}) == 1 for batch in batches)
    images, videos = ([b for b, k in zip(batches, kinds, strict=True) if k == kind] for kind in ("image", "video"))
    assert [b.epoch for b in images] == [0, 0, 1, 1, 2, 2, 3, 3]  # 4 images, 2 a batch
    assert [b.epoch for b in videos][:9] == [0, 0, 0, 0, 1, 1, 1, 1, 2]  # 9 videos: one is left out each time
    assert all(len({n for b in images[i : i + 2] for n in b.names}) == 4 for i in range(0, 8, 2))
    assert same(loader(mixed, batch=2, image_share=0.25).batch(23), batches[23])
    videos_only = replace(mixed, samples=mixed.samples[:VIDEOS])
    with pytest.raises(ManifestError, match=r"--data.image-share 0.5 needs images and videos .* 0 images and 9 videos"):
        loader(videos_only, image_share=0.5)


def test_crops_and_flips_are_drawn_for_seed_epoch_and_sample(mixed, monkeypatch):
    source = loader(mixed, batch=13, crop=(0.3, 0.6), flip="always")
    views = {(n, epoch): source._view(n, epoch)[1:] for n in range(13) for epoch in range(8)}
    assert len(set(views.values())) == len(views) and all(0.3 <= crop.area <= 0.6 for crop, _ in views.values())
    assert 0.3 < sum(flip for _, flip in views.values()) / len(views) < 0.7
    again = loader(mixed, batch=3, workers=1, crop=(0.3, 0.6), flip="always")
    assert all(again._view(n, epoch)[1:] == view for (n, epoch), view in views.items())
    assert not any(loader(mixed, flip="never")._view(n, 0)[2] for n in range(13))
    sided = replace(mixed, samples=[replace(s, captions=("to the left", "x")) for s in mixed.samples])
    assert not any(loader(sided, flip="auto")._view(n, e)[2] for n in range(13) for e in range(4))
    assert any(loader(mixed, flip="auto")._view(n, e)[2] for n in range(13) for e in range(4))
    turns = replace(mixed, samples=[replace(s, answers=("to the left",)) for s in mixed.samples])
    assert not any(loader(turns, flip="auto")._view(n, e)[2] for n in range(13) for e in range(4))
    plain = loader(mixed, crop=None, flip="never")._view(0, 0)
    assert plain[1:] == (None, False)
    # which frames are seen does not depend on how they are cropped
    times = np.arange(FRAMES) / 8
    assert plain[0](times) == source._view(0, 0)[0](times)


def test_every_clip_once_an_epoch(mixed):
    with_rest = loader(mixed, batch=5)
    for epoch in range(3):  # of two batches; the other three clips are left out
        names = [name for i in range(2) for name in with_rest.batch(2 * epoch + i).names]
        assert len(names) == len(set(names)) == 10
    for batch in (13, 100):  # more than there are: all of them
        whole = loader(mixed, batch=batch)
        assert whole.size == 13
        assert sorted(whole.batch(4).names) == sorted(s.name for s in mixed.samples)
    assert whole.batch(0).names != whole.batch(1).names  # in another order each time
    orders = {loader(mixed, batch=1).batch(step).names for step in range(13)}
    assert len(orders) == 13


def test_frames_are_from_their_intervals_and_differ_by_visit(mixed):
    source = loader(mixed, batch=13)
    seen = [Counter() for _ in range(4)]
    for epoch in range(30):
        videos, images = source.batch(epoch).groups
        assert videos.video.shape == (9, 4, 32, 32, 3) and images.video.shape == (4, 1, 32, 32, 3)
        assert videos.video.dtype == torch.uint8
        numbers = ((videos.video.float().mean((2, 3, 4)) - 20) / 12).round().int()
        for interval in range(4):
            seen[interval].update(numbers[:, interval].tolist())
    for interval, count in enumerate(seen):  # 270 draws of 3 frames
        assert set(count) == {3 * interval, 3 * interval + 1, 3 * interval + 2}
        assert min(count.values()) > 55


def test_images_and_videos_mix_and_captions_stand_in_their_order(mixed):
    source = loader(mixed, batch=6, mask=TextMask(0.0), mlm=0.0)
    cls = source.cls
    kinds = set()
    for step in range(12):
        batch = source.batch(step)
        assert len(batch) == 6 and sum(len(g.samples) for g in batch.groups) == 6
        assert [g.video.shape[1] for g in batch.groups] in ([4, 1], [4], [1])
        kinds.add(len(batch.groups))
        numbers = torch.cat([g.samples for g in batch.groups])
        assert torch.equal(numbers, batch.video_keys)
        assert batch.names == tuple(mixed.samples[n].name for n in numbers)
        rows = batch.words.values.split(list(batch.words.lengths))
        for n, key, row in zip(numbers.tolist(), batch.caption_keys.tolist(), rows, strict=True):
            captions = mixed.samples[n].captions
            caption = captions[batch.epoch % len(captions)]  # several rotate by epoch
            assert key == caption_key(caption)
            assert row.tolist() == [cls, *text.encode(_tokenizer(mixed), [caption], 16)[0]]
        for group in batch.groups:
            if group.video.shape[1] == 1:  # an image's gray tells which one it is
                assert [int(v.float().mean() / 50 + 0.5) for v in group.video] == [n - VIDEOS for n in group.samples]
        assert batch.contrast is batch.words and batch.masked is None and len(batch.masked_rows) == 0
        assert batch.words.rows == len(batch.words.values) == sum(batch.words.lengths)
    assert 2 in kinds


def _tokenizer(clips):
    return text.train_tokenizer([c for s in clips.samples for c in s.captions], 300)


def test_masked_words_are_dropped_or_replaced(mixed):
    dropped, masked = (loader(mixed, batch=13, mask=TextMask(0.5, kind)) for kind in ("drop", "mask"))
    for epoch in range(3):
        a, b = dropped.batch(epoch), masked.batch(epoch)
        assert a.words.rows == b.words.rows == b.contrast.rows == sum(a.words.lengths)
        assert a.contrast.lengths == tuple(n - round(0.5 * (n - 1)) for n in a.words.lengths)
        assert a.contrast.values.tolist() == b.contrast.values[b.contrast.values != masked.mask].tolist()
        assert a.contrast.ids.tolist() == b.contrast.ids[b.contrast.values != masked.mask].tolist()


def test_masked_rows_and_labels_point_at_the_masked_words(mixed):
    source = loader(mixed, batch=13, mask=TextMask(0.0), mlm=0.5)
    for epoch in range(4):
        batch = source.batch(epoch)
        assert batch.contrast is batch.words and batch.masked.lengths == batch.words.lengths
        rows = batch.masked_rows
        counts = [round(0.5 * (n - 1)) for n in batch.words.lengths]
        assert len(rows) == sum(counts) > 0 and (rows.diff() > 0).all()
        assert batch.masked_labels.tolist() == batch.words.values[rows].tolist()
        assert (batch.masked.values[rows] == source.mask).all()
        of = torch.searchsorted(batch.masked.cu_seqlens[1:].long(), rows, right=True)
        assert torch.bincount(of, minlength=6).tolist() == list(batch.masked_counts)
        hidden = torch.zeros(batch.words.rows, dtype=torch.bool).index_fill(0, rows, True)
        assert torch.equal(batch.masked.values[~hidden], batch.words.values[~hidden])  # the others are as they were
        assert torch.equal(batch.masked.ids, batch.words.ids)
        assert [int(part.sum()) for part in hidden.split(list(batch.words.lengths))] == counts


def test_mlm_and_the_contrast_hide_different_words(mixed):
    source = loader(mixed, batch=13, mask=TextMask(0.5, "mask"), mlm=0.5)
    pairs = [(b.contrast.values == source.mask, b.masked.values == source.mask) for b in map(source.batch, range(6))]
    one, other = (torch.cat(hidden) for hidden in zip(*pairs, strict=True))
    assert one.sum() == other.sum() and 0.2 < (one & other).sum() / one.sum() < 0.8


def test_the_same_caption_has_the_same_key(tmp_path, folder):
    (tmp_path / "m.csv").write_text("video,caption\nv0.webm,a\nv1.webm,b\nv2.webm,a\n")
    config = DataConfig(manifest=(tmp_path / "m.csv",), root=folder)
    batch = loader(open_manifest(config.manifest, config, 32), batch=3).batch(0)
    key = dict(zip(batch.names, batch.caption_keys.tolist(), strict=True))
    assert key["v0.webm"] == key["v2.webm"] != key["v1.webm"] and len(set(batch.video_keys.tolist())) == 3


@pytest.fixture
def broken(folder, mixed, tmp_path):
    """The same clips, of which v3 and i1 cannot be decoded."""
    (tmp_path / "v3.webm").write_bytes((folder / "v3.webm").read_bytes()[:200])
    (tmp_path / "i1.png").write_bytes(b"no picture")
    bad = {"v3.webm", "i1.png"}
    samples = [replace(s, path=tmp_path / s.name) if s.name in bad else s for s in mixed.samples]
    return replace(mixed, samples=samples)


def test_undecodable_files_are_skipped_named_and_replaced(broken, mixed):
    source = loader(broken, max_bad=0.2)
    batches = [source.batch(step) for step in range(12)]
    assert {skip.name for skip in source.skipped.values()} == {"v3.webm", "i1.png"} and len(source.skipped) == 2
    assert source.skipped[VIDEOS + 1] == Skip("i1.png", "not a picture") and source.skipped[3].reason
    assert all(len(b) == 4 and not {"v3.webm", "i1.png"} & set(b.names) for b in batches)
    whole = [loader(mixed).batch(step) for step in range(12)]
    assert all(set(w.names) - {"v3.webm", "i1.png"} <= set(b.names) for b, w in zip(batches, whole, strict=True))
    for step in (11, 5, 0):  # the same one takes the place after a restart, and when one thread reads
        assert same(loader(broken, max_bad=0.2, workers=1).batch(step), batches[step])


def test_too_many_undecodable_files_stop_the_run(broken):
    source = loader(broken, max_bad=0.1)
    with pytest.raises(ManifestError, match=r"2 of 13 files cannot be used, more than the 10%.*--data.max-bad"):
        for _ in source.ahead(0, 12):
            pass
    assert not _threads()
    broken.skipped.append(Skip("gone.mp4", "file not found"))  # what was missing from the start counts too
    with pytest.raises(ManifestError, match="3 of 14 files"):
        [loader(broken, max_bad=0.2).batch(step) for step in range(12)]


@pytest.mark.parametrize("good", [0, 1])
def test_one_good_file_of_two_is_found(mixed, monkeypatch, good):
    two = replace(mixed, samples=mixed.samples[:2])
    read = type(two).read

    def one(self, numbers, views):
        got = read(self, numbers, views)
        return [one if n == good else Got(None, "bad", "pyav") for n, one in zip(numbers, got, strict=True)]

    monkeypatch.setattr(type(two), "read", one)
    for seed in range(4):
        source = loader(two, batch=1, max_bad=0.5, seed=seed)
        assert {source.batch(step).names for step in range(4)} == {(f"v{good}.webm",)}


def test_not_one_good_file(mixed, monkeypatch):
    def none(self, numbers, views):
        return [Got(None, "bad", "pyav") for _ in numbers]

    monkeypatch.setattr(type(mixed), "read", none)
    with pytest.raises(ManifestError, match="none of the 13 files can be decoded"):
        loader(mixed, max_bad=1.0).batch(0)


def _threads():
    return [t for t in threading.enumerate() if t.name == "smaug-loader"]


def test_prefetched_equals_direct(mixed):
    source, direct = loader(mixed), loader(mixed)
    made = list(source.ahead(2, 9))
    assert len(made) == 7 and all(same(b, direct.batch(step)) for step, b in enumerate(made, 2))
    assert list(source.ahead(5, 5)) == [] and not _threads()


def test_batches_are_made_ahead_but_not_without_end(mixed, monkeypatch):
    source, made = loader(mixed), []
    batch = source.batch
    monkeypatch.setattr(source, "batch", lambda step: (made.append(step), batch(step))[1])
    batches = source.ahead(0, 1000)
    next(batches)
    until = time.monotonic() + 10
    while len(made) < AHEAD + 2 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.2)
    assert made == list(range(AHEAD + 2))  # one taken, AHEAD waiting, one in the maker's hands
    batches.close()
    assert not _threads() and len(made) == AHEAD + 2


def test_rounded_batches_have_few_sets_of_shapes(shapes_cache):
    source = loader(open_shapes("train", SMALL, 64, lambda *a: None), batch=16)
    batches = [source.batch(step) for step in range(100)]
    shapes = [
        len({tuple(x.shape for x in tensors(b)) for b in some}) for some in (batches, [b.rounded(64) for b in batches])
    ]
    assert shapes[0] > 20 and shapes[1] <= 2, shapes
    a, b = batches[0], batches[0].rounded(64)
    assert b.masked_counts.tolist() == list(a.masked_counts)
    n = len(a.masked_rows)
    assert torch.equal(b.masked_rows[:n], a.masked_rows) and torch.equal(b.masked_labels[:n], a.masked_labels)
    assert n < len(b.masked_rows) == len(b.masked_labels) and (b.masked_labels[n:] == IGNORED).all()
    assert any(x is b.masked_counts for x in tensors(b))  # it travels


def test_batches_for_the_cpu_are_not_copied(mixed, monkeypatch):
    source, made = loader(mixed), []
    batch = source.batch
    monkeypatch.setattr(source, "batch", lambda step: (made.append(batch(step)), made[-1])[1])
    got = list(source.ahead(0, 3, torch.device("cpu")))
    for a, b in zip(got, made, strict=True):
        assert all(x is y for x, y in zip(tensors(a), tensors(b), strict=True)) and len(tensors(a)) > 10


def test_batches_ahead_may_be_rounded(mixed):
    source = loader(mixed)
    for step, got in enumerate(source.ahead(0, 3, bucket=64)):
        batch = source.batch(step)
        assert got.words.rows % 64 == 0 and torch.equal(got.words.values[: batch.words.rows], batch.words.values)
        assert got.counters.tolist() == [batch.epoch, step] and batch.counters is None


def tensors(batch):
    found = []
    batch.map(lambda x: (found.append(x), x)[1])
    return found


def test_a_batch_under_way_is_waited_for_and_its_memory_kept(mixed, monkeypatch):
    """What `ahead` does on a CUDA device once the copy is ordered, told by a stream that only takes notes."""
    batch, done = loader(mixed).batch(0), []
    stream = SimpleNamespace(wait_event=lambda event: done.append(event))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, of: done.append((id(x), of)), raising=True)
    got = _received(batch, "arrived", stream)
    assert done[0] == "arrived"  # before any use
    assert done[1:] == [(id(x), stream) for x in tensors(batch)]
    assert all(x is y for x, y in zip(tensors(got), tensors(batch), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_batches_on_a_stream_of_their_own(mixed):
    """Their numbers are right while the device is busy with the step before, and after their memory was given back."""
    source, direct, device = loader(mixed), loader(mixed), torch.device("cuda", torch.cuda.current_device())
    a = torch.randn(4096, 4096, device=device)
    sums = []
    for batch in source.ahead(0, 12, device):
        assert {x.device for x in tensors(batch)} == {device}
        for _ in range(20):
            a = torch.tanh(a @ a)  # the step, which reads its batch late
        sums.append([x.double().sum() for x in tensors(batch)])
    for step, of_batch in enumerate(sums):
        assert [x.item() for x in of_batch] == [x.double().sum().item() for x in tensors(direct.batch(step))]


def test_errors_of_the_thread_reach_who_asked(mixed, monkeypatch):
    source = loader(mixed)
    batch = source.batch

    def fail(step):
        if step == 2:
            raise MemoryError("no room for batch 2")
        return batch(step)

    monkeypatch.setattr(source, "batch", fail)
    batches = source.ahead(0, 10)
    assert same(next(batches), batch(0)) and same(next(batches), batch(1))
    with pytest.raises(MemoryError, match="no room for batch 2") as error:
        next(batches)
    assert "fail" in [entry.name for entry in error.traceback]  # with the place where it happened
    assert not _threads()


def test_live_decoding_gives_the_batches_of_the_map(shapes_cache):
    mapped = loader(open_shapes("train", SMALL, 64, lambda *a: None), batch=16)
    live_clips = open_shapes("train", DataConfig(shapes=SMALL.shapes, cache=False), 64, lambda *a: None)
    live = loader(live_clips, batch=16)
    assert mapped.clips.frames is not None and live.clips.frames is None
    assert all(same(mapped.batch(step), live.batch(step)) for step in (0, 3, 4))


def test_to_moves_everything(mixed):
    batch = loader(mixed, batch=6).batch(0)
    moved = batch.to(torch.device("meta"))
    tensors = [moved.masked_rows, moved.masked_labels, moved.video_keys, moved.caption_keys]
    for view in ("words", "contrast", "masked"):
        words = getattr(moved, view)
        tensors += [words.values, words.cu_seqlens, words.ids, words.size]
        assert words.lengths == getattr(batch, view).lengths
    tensors += [t for g in moved.groups for t in (g.video, g.samples)]
    tensors += [batch.rounded(8).to(torch.device("meta")).counters]
    assert all(t.device.type == "meta" for t in tensors) and moved.names == batch.names
    assert same(batch.to(torch.device("cpu")), batch)
    # What is one object stays one, so that the step does not encode the same captions twice.
    whole = loader(mixed, batch=6, mask=TextMask(0.0)).batch(0)
    assert whole.contrast is whole.words
    for device in ("cpu", "meta"):
        moved = whole.to(torch.device(device))
        assert moved.contrast is moved.words


def test_middle_frames(broken):
    groups, skipped = middle_frames(broken, range(1, 12), 4)
    assert [g.samples.tolist() for g in groups] == [[1, 2, 4, 5, 6, 7, 8], [9, 11]]
    assert [s.name for s in skipped] == ["v3.webm", "i1.png"]
    numbers = ((groups[0].video.float().mean((2, 3, 4)) - 20) / 12).round().int()
    assert numbers.tolist() == [[1, 4, 7, 10]] * 7
    shuffled, _ = middle_frames(broken, range(1, 12), 4, shuffle=True)
    again, _ = middle_frames(broken, range(5, 8), 4, shuffle=True)  # a clip's order depends on nothing else
    mixed_up = ((shuffled[0].video.float().mean((2, 3, 4)) - 20) / 12).round().int()
    assert mixed_up.sort(1).values.tolist() == numbers.tolist() and len({tuple(r) for r in mixed_up.tolist()}) > 2
    assert torch.equal(again[0].video, shuffled[0].video[3:6])


def test_views_span_the_clip(mixed):
    """Of 8 frames, one from each eighth of the clip, a view has every second: it begins in the first quarter and ends
    in the last. All else in the batch is as without views."""
    source, plain = loader(mixed, batch=13, frames=8, view=4), loader(mixed, batch=13, frames=8)
    for epoch in range(4):
        batch, before = source.batch(epoch), plain.batch(epoch)
        videos, images = batch.groups
        assert videos.video.shape == (9, 8, 32, 32, 3) and images.video.shape == (4, 1, 32, 32, 3)
        numbers = ((videos.video.float().mean((2, 3, 4)) - 20) / 12).round().int().view(9, 2, 4)
        assert (numbers.diff(dim=2) > 0).all()
        assert (numbers[..., 0] < FRAMES / 4).all() and (numbers[..., 3] >= FRAMES * 3 / 4 - 0.5).all()
        assert torch.equal(videos.video, before.groups[0].video[:, [0, 2, 4, 6, 1, 3, 5, 7]])
        assert same(replace(batch, groups=(before.groups[0], images)), before)


def test_middle_frames_in_views(broken):
    ((videos, images), _) = middle_frames(broken, range(1, 12), 4, view=2)
    plain, _ = middle_frames(broken, range(1, 12), 4)
    numbers = ((videos.video.float().mean((2, 3, 4)) - 20) / 12).round().int()
    assert numbers.tolist() == [[1, 7, 4, 10]] * 7
    assert torch.equal(images.video, plain[1].video) and torch.equal(videos.samples, plain[0].samples)
    # Shuffled are all frames of the clip, and not those within a view or the views.
    shuffled, _ = middle_frames(broken, range(9), 4, view=2, shuffle=True)
    mixed_up = ((shuffled[0].video.float().mean((2, 3, 4)) - 20) / 12).round().int()
    assert mixed_up.sort(1).values.tolist() == [[1, 4, 7, 10]] * 8
    assert len({frozenset(row[:2]) for row in mixed_up.tolist()}) > 2
