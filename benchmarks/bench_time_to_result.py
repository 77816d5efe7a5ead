"""Device time to the same retrieval score: the sparse recipe, the dense baselines, and the random twins of its parts.

    python -m benchmarks.bench_time_to_result --seconds 240 --target 0.3

Each run trains one variant with one seed for a fixed device time, stops its clock every `--every` seconds to evaluate
on the val split, and appends one line a point to the curves and one line a run to the results. Runs that have their
line are not repeated. Seeds are the outer loop, so that variants share whatever the machine does meanwhile. All have
the same sizes, speed path, batch, optimiser and schedule: linear warm-up, then constant.
"""

from __future__ import annotations

import csv
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.console import Console

from smaug import device, recipe
from smaug.data.text import train_tokenizer
from smaug.evaluate.retrieval import retrieval
from smaug.optim import adamw, learning_rate
from smaug.recipe import Recipe
from smaug.run import build, open_loader, open_split
from smaug.step import training_step

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Options:
    variants: tuple[str, ...] = ("smaug", "dense")
    seeds: tuple[int, ...] = (0, 1, 2)
    seconds: float = 240.0  # device time of a run
    every: float = 30.0  # device seconds between evaluations
    target: float = 0.3  # t2v R@1 as a fraction, chosen before the runs
    lr: float = 1e-3
    results: Path = RESULTS / "time_to_result.csv"
    curves: Path = RESULTS / "time_to_result_curves.csv"


def variant(name: str) -> Recipe:
    """A recipe by its name, or one of smaug's twins."""
    if name in recipe.names():
        return recipe.load(name)
    smaug = recipe.load("smaug")
    video = smaug.model.video

    def model(**changes: object) -> Recipe:
        return dataclasses.replace(smaug, name=name, model=dataclasses.replace(smaug.model, **changes))

    if name == "smaug-random-pruning":
        prune = dataclasses.replace(video.prune, score="random")
        return model(video=dataclasses.replace(video, prune=prune))
    if name == "smaug-random-frames":
        return model(selector=dataclasses.replace(smaug.model.selector, score="random"))
    if name == "smaug-no-pruning":
        return model(video=dataclasses.replace(video, prune=dataclasses.replace(video.prune, blocks=())))
    if name == "smaug-no-selector":
        return model(selector=dataclasses.replace(smaug.model.selector, keep=0))
    if name == "smaug-no-mvm":
        objectives = {k: v for k, v in smaug.objectives.items() if k != "mvm"}
        return dataclasses.replace(smaug, name=name, objectives=objectives)
    if name == "smaug-no-mask":
        mask = dataclasses.replace(smaug.video_mask, ratio=0.0)
        return dataclasses.replace(smaug, name=name, video_mask=mask)
    if name == "dense-one-moment":
        dense = recipe.load("dense")
        one = dataclasses.replace(dense.model.video, frames=dense.model.video.tubelet)
        return dataclasses.replace(dense, name=name, model=dataclasses.replace(dense.model, video=one))
    raise ValueError(f"there is no variant {name!r}")


def run(name: str, seed: int, options: Options, console: Console) -> None:
    chosen = variant(name)
    optim = dataclasses.replace(chosen.optim, lr=options.lr, min_lr=1.0)  # constant after the warm-up
    chosen = dataclasses.replace(chosen, seed=seed, optim=optim)
    way = device.choose(True)
    clips, held_out = open_split(chosen, "train", console), open_split(chosen, "val", console)
    tokenizer = train_tokenizer([c for s in clips.samples for c in s.captions], chosen.data.vocabulary)
    torch.manual_seed(seed)
    model = build(chosen, tokenizer.get_vocab_size(), way.impl).to(way.device)
    optimizer = adamw(model, chosen.optim)
    loader = open_loader(chosen, clips, tokenizer)
    points: list[tuple[float, float, float, int]] = []  # device seconds, with waiting for data, R@1, steps
    clock = waited = 0.0
    step = 0
    batches = loader.ahead(0, 10**9)
    try:
        while clock < options.seconds:
            before = time.perf_counter()
            batch = next(batches).to(way.device)
            got = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, chosen.optim)
            with way.autocast():
                loss, _ = training_step(model, chosen, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if way.device.type == "cuda":
                torch.cuda.synchronize()
            step += 1
            waited += got - before
            clock += time.perf_counter() - got
            if clock >= options.every * (len(points) + 1):
                model.eval()
                frames = chosen.eval_frames or chosen.model.video.frames
                with way.autocast():
                    found = retrieval(model, held_out, tokenizer, frames=frames, max_bad=0.0, top=chosen.eval_top)
                model.train()
                points.append((clock, clock + waited, found.scores["t2v_r1"], step))
                console.print(f"{name} seed {seed}: {clock:.0f} s, step {step}, R@1 {points[-1][2]:.1%}")
    finally:
        batches.close()

    append(options.curves, ["variant", "seed", "device_seconds", "with_data", "t2v_r1", "step"],
           [[name, seed, f"{a:.1f}", f"{b:.1f}", f"{r:.4f}", n] for a, b, r, n in points])  # fmt: skip
    result = {
        "variant": name,
        "seed": seed,
        "target": options.target,
        "seconds_to_target": reached(points, 0, options.target),
        "with_data": reached(points, 1, options.target),
        "best_t2v_r1": f"{max(p[2] for p in points):.4f}",
        "clips_per_second": f"{step * loader.size / clock:.0f}",
        "machine": device.describe(way.device),
        "date": time.strftime("%Y-%m-%d"),
    }
    append(options.results, list(result), [list(result.values())])


def reached(points: Sequence[tuple[float, float, float, int]], column: int, target: float) -> str:
    """Seconds at which the curve, straight between its points, first meets the target; empty if it never does."""
    last = (0.0, 0.0, 0.0, 0)
    for point in points:
        if point[2] >= target:
            part = (target - last[2]) / (point[2] - last[2])
            return f"{last[column] + part * (point[column] - last[column]):.1f}"
        last = point
    return ""


def append(path: Path, header: list[str], rows: list[list[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(header)
        writer.writerows(rows)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    console = Console()
    done = set()
    if options.results.exists():
        with open(options.results, newline="") as file:
            done = {(row["variant"], int(row["seed"])) for row in csv.DictReader(file)}
    for name in options.variants:
        variant(name)  # a wrong name ends here, not after hours
    for seed in options.seeds:
        for name in options.variants:
            if (name, seed) not in done:
                run(name, seed, options, console)


if __name__ == "__main__":
    main()
