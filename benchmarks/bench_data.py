"""Encoded clips to frames: decoders side by side, what the training loop waits for, and memory over many clips.

    python -m benchmarks.bench_data                              # all of it, interleaved: the README's tables
    python -m benchmarks.bench_data --what decoders|wait|memory
    pytest benchmarks/bench_data.py --benchmark-only             # one decoder at a time; on a GPU dali too

Clips are 10 s of 640 x 360 at 25 frames a second, made here: a ground that pans, shapes that move, grain. Each is shown
as 224 x 224 squares. `linear` is the loop that one writes first with PyAV: decode from the start, keep what is wanted.
decord2 and torchcodec take part where they can be imported, with one thread a clip and as many clips at once as ours.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from smaug.data.clips import DataConfig, open_shapes
from smaug.data.decode import Want, open_decoder
from smaug.data.frames import middle_segments
from smaug.data.loader import Loader
from smaug.data.text import train_tokenizer
from smaug.device import describe
from smaug.masks import TextMask

SIZE, SECONDS, RATE, SHAPE = 224, 10, 25, (360, 640)
CODECS = {"h264": ("libx264", ".mp4", {"crf": "23", "preset": "fast"}),
          "vp9": ("libvpx-vp9", ".webm", {"crf": "32", "b": "0", "deadline": "realtime", "cpu-used": "7"})}  # fmt: skip
CASES = [(codec, group, frames) for codec in CODECS for group in (25, 250) for frames in (4, 64)]
WORKERS = 2
CLIPS = {4: 8, 64: 4}  # decoded for one number

Decode = Callable[[Sequence[Path], list[int]], list[Tensor]]  # clips, indices -> (F, SIZE, SIZE, 3) uint8 of each


def make_clip(folder: Path, codec: str, group: int) -> Path:
    """A clip with a key frame every `group` frames; made once a folder."""
    name, suffix, options = CODECS[codec]
    path = folder / f"{codec}-{group}{suffix}"
    if path.exists():
        return path
    rng = np.random.default_rng(0)
    height, width = SHAPE
    ground = sum(
        np.kron(rng.uniform(-1, 1, (1 + height // cell, 1 + 2 * width // cell)), np.ones((cell, cell)))[
            :height, : 2 * width
        ]
        * cell
        for cell in (4, 12, 40)
    )
    grain = rng.normal(0, 3, (4, height, width))
    y, x = np.mgrid[:height, :width]
    with av.open(str(path), "w") as file:
        stream = file.add_stream(name, rate=Fraction(RATE), options={**options, "g": str(group)})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for i in range(SECONDS * RATE):
            level = 110 + 1.2 * ground[:, 2 * i : 2 * i + width] + grain[i % 4]
            picture = np.stack([level, level * 0.9, level * 0.8], -1)
            for k in range(3):
                centre = 180 + 120 * np.sin(i / (20 + 9 * k) + k), 320 + 260 * np.cos(i / (31 - 7 * k) + 2 * k)
                picture[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < (30 + 12 * k) ** 2, k] = 235
            frame = av.VideoFrame.from_ndarray(picture.clip(0, 255).astype(np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def of_ours(name: str, device: torch.device) -> Decode:
    decoder = open_decoder(name, device, WORKERS)

    def decode(paths: Sequence[Path], indices: list[int]) -> list[Tensor]:
        got = decoder.decode([Want(path, "video", lambda times: indices) for path in paths], SIZE)
        if problems := [one.reason for one in got if one.frames is None]:
            raise ValueError(f"{name}: {problems[0]}")
        return [one.frames for one in got]

    return decode


def in_threads(one: Callable[[str, list[int]], Tensor]) -> Decode:
    pool = ThreadPoolExecutor(WORKERS)
    return lambda paths, indices: list(pool.map(lambda path: one(str(path), indices), paths))


def linear(path: str, indices: list[int]) -> Tensor:
    frames = []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(stream)):
            if number in indices:
                scale = SIZE / min(frame.width, frame.height)
                size = {"width": round(frame.width * scale), "height": round(frame.height * scale)}
                frames.append(frame.to_ndarray(format="rgb24", interpolation="BICUBIC", **size))
    top, left = ((side - SIZE) // 2 for side in frames[0].shape[:2])
    return torch.from_numpy(np.stack([frame[top : top + SIZE, left : left + SIZE] for frame in frames]))


def middle_square(frames: Tensor) -> Tensor:
    """(F, 3, H, W) uint8 -> (F, SIZE, SIZE, 3), by torch's antialiased bicubic filter."""
    scale = SIZE / min(frames.shape[-2:])
    small = interpolate(
        frames, size=[round(side * scale) for side in frames.shape[-2:]], mode="bicubic", antialias=True
    )
    top, left = ((side - SIZE) // 2 for side in small.shape[-2:])
    return small[..., top : top + SIZE, left : left + SIZE].permute(0, 2, 3, 1).contiguous()


def of_decord() -> Decode:
    import decord  # the package decord2

    return in_threads(
        lambda path, indices: middle_square(
            torch.from_numpy(decord.VideoReader(path, num_threads=1).get_batch(indices).asnumpy()).permute(0, 3, 1, 2)
        )
    )


def of_torchcodec(mode: str) -> Decode:
    from torchcodec.decoders import VideoDecoder  # RuntimeError where its libraries are not

    return in_threads(
        lambda path, indices: middle_square(
            VideoDecoder(path, seek_mode=mode, num_ffmpeg_threads=1).get_frames_at(indices).data
        )
    )


PROVIDERS: dict[str, Callable[[], Decode]] = {
    "pyav": lambda: of_ours("pyav", torch.device("cpu")),
    "linear": lambda: in_threads(linear),
    "dali": lambda: of_ours("dali", torch.device("cpu")),
    "torchcodec, exact": lambda: of_torchcodec("exact"),
    "torchcodec, approximate": lambda: of_torchcodec("approximate"),
    "decord2": of_decord,
}


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def race(folder: Path, rounds: int) -> Iterable[str]:
    """A row a case: clips/s of each provider, all in a random order each round, so that noise meets all alike."""
    able: dict[str, Decode] = {}
    for name, make in PROVIDERS.items():
        try:
            able[name] = make()
        except (ImportError, RuntimeError, ValueError) as error:
            yield f"{name} is left out: {str(error).strip().splitlines()[0]}"
    torch.set_num_threads(1)  # two clips at once fill two cores
    yield "| clips/s (CPU seconds a clip) | " + " | ".join(able) + " |"
    yield "|---" * (len(able) + 1) + "|"
    for codec, group, frames in CASES:
        paths = [make_clip(folder, codec, group)] * CLIPS[frames]
        indices = middle_segments(SECONDS * RATE, frames)
        wall: dict[str, list[float]] = {}
        used: dict[str, list[float]] = {}
        seen: dict[str, Tensor] = {}
        runners = {name: decode for name, decode in able.items() if name != "dali" or codec == "vp9"}
        for _ in range(rounds + 1):
            for name in random.sample(list(runners), len(runners)):
                began, cpu = time.perf_counter(), cpu_seconds()
                out = runners[name](paths, indices)
                wall.setdefault(name, []).append((time.perf_counter() - began) / len(paths))
                used.setdefault(name, []).append((cpu_seconds() - cpu) / len(paths))
                seen.setdefault(name, out[0].float())
        for name, frames_seen in seen.items():  # the right frames, up to filters and colour tables
            assert (frames_seen - seen["pyav"]).abs().mean() < 4, name
        cells = [
            f"{1 / statistics.median(wall[n][1:]):.1f} ({statistics.median(used[n][1:]):.3f})" if n in wall else ""
            for n in able
        ]
        yield f"| {codec}, key frame every {group}, {frames} frames | " + " | ".join(cells) + " |"


def wait(steps: int) -> Iterable[str]:
    """What the training loop of smaug waits for, from the map of decoded clips and from the files."""
    yield "| training on shapes | ms a step | of it waiting for data |"
    yield "|---|---|---|"
    for how in ("--data.cache", "--data.no-cache"):
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder, "run")
            command = [sys.executable, "-m", "smaug.train", "--fast", "--max-steps", str(steps), how]
            subprocess.run([*command, "--run-dir", str(run)], check=True, stdout=subprocess.DEVNULL)
            rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
        first, last = rows[1], rows[-1]  # the first rows hold the start: threads, first batches, warm-up
        data, device = (last[key] - first[key] for key in ("data_seconds", "device_seconds"))
        took = 1000 * (data + device) / (last["step"] - first["step"])
        yield f"| {'decoded map' if how == '--data.cache' else 'files'} | {took:.0f} | {data / (data + device):.1%} |"


def memory(clips: int) -> Iterable[str]:
    """Resident memory while `clips` clips of shapes are decoded from their files, batch by batch."""
    config = DataConfig(cache=False, batch=100)
    source = open_shapes("train", config, 64, lambda *a: None)
    tokenizer = train_tokenizer([sample.captions[0] for sample in source.samples], config.vocabulary)
    loader = Loader(source, tokenizer, config, frames=8, max_words=16, text_mask=TextMask(0.0), seed=0)
    page = os.sysconf("SC_PAGE_SIZE") / 2**20
    for step in range(clips // loader.size):
        loader.batch(step)
        if (step + 1) * loader.size in (clips // 10, clips // 2, clips):
            gc.collect()
            held = int(Path("/proc/self/statm").read_text().split()[1]) * page
            yield f"after {(step + 1) * loader.size} clips: {held:.0f} MiB"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("frames", [4, pytest.param(64, marks=pytest.mark.full)])
@pytest.mark.parametrize("group", [25, 250])
@pytest.mark.parametrize("codec", CODECS)
def test_decode(benchmark, folder, codec, group, frames, provider):
    if provider == "dali" and codec != "vp9":
        pytest.skip("dali decodes H.264 on a GPU only")
    try:
        decode = PROVIDERS[provider]()
    except (ImportError, RuntimeError, ValueError) as error:
        pytest.skip(str(error).strip().splitlines()[0])
    torch.set_num_threads(1)
    paths, indices = [make_clip(folder, codec, group)] * CLIPS[frames], middle_segments(SECONDS * RATE, frames)
    benchmark.group = f"{codec}, key frame every {group}, {frames} frames of {SECONDS * RATE}"
    benchmark.extra_info |= {"machine": describe(torch.device("cpu")), "clips": len(paths)}
    out = benchmark.pedantic(decode, args=(paths, indices), rounds=3, warmup_rounds=1)
    assert out[0].shape == (frames, SIZE, SIZE, 3) and out[0].dtype == torch.uint8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("group", [25, 250])
@pytest.mark.parametrize("provider", ["dali", "pyav"])
def test_decode_keeps_ahead_of_a_step(benchmark, folder, group, provider):
    """A batch of 8 frames a clip at 224 onto the GPU. To compare with a step of `bench_train_step`'s at size base."""
    device = torch.device("cuda")
    decode = of_ours(provider, device)
    paths, indices = [make_clip(folder, "h264", group)] * 64, middle_segments(SECONDS * RATE, 8)

    def once():
        out = decode(paths, indices)
        torch.cuda.synchronize()
        return out

    benchmark.group = f"64 clips of H.264 to the GPU, key frame every {group}"
    benchmark.extra_info |= {"machine": describe(device)}
    assert benchmark.pedantic(once, rounds=5, warmup_rounds=1)[0].is_cuda


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=("decoders", "wait", "memory"), help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(describe(torch.device("cpu")), time.strftime("%Y-%m-%d"))
    with tempfile.TemporaryDirectory() as folder:
        parts = {
            "decoders": lambda: race(Path(folder), options.rounds),
            "wait": lambda: wait(120),
            "memory": lambda: memory(10_000),
        }
        for name, part in parts.items():
            if options.what in (None, name):
                for line in part():
                    print(line, flush=True)


if __name__ == "__main__":
    main()
