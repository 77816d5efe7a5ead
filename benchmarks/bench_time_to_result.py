"""Device time to the same retrieval score: the sparse recipe, the dense baselines, and the random twins of its parts.

    python -m benchmarks.bench_time_to_result --variants smaug dense --seeds 0 1 2 --seconds 240
    python -m benchmarks.bench_time_to_result --report

The first line trains, the second makes the table and the picture from what is in the results. A run trains one variant
with one seed; its clock stops whenever no step is computed, and every `--every` seconds for an evaluation on the val
split. It appends one line a point to the curves and one line to the runs; runs that have their line are not repeated.
Seeds are the outer loop, so that variants share whatever the machine does meanwhile. On a CPU with several cores, give
each of several processes one (`OMP_NUM_THREADS=1 taskset -c 0 ...`) and other variants.

The variants of smaug, dense and singularity have the same sizes, speed path, batch, optimiser and schedule (linear
warm-up over 30 steps, then constant); mac has the batch and warm-up of its recipe. All have the same learning rate.
The targets were fixed before the runs: 20, 30 and 40 %, where a model blind to order tops out at 50 %.
"""

from __future__ import annotations

import csv
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
import tyro
from rich.console import Console
from torch import Tensor

from benchmarks.timing import clock
from smaug import device, recipe
from smaug.data.text import train_tokenizer
from smaug.evaluate.retrieval import retrieval
from smaug.optim import adamw, learning_rate
from smaug.recipe import Recipe
from smaug.report import compare
from smaug.run import build, open_loader, open_split
from smaug.step import training_step

RESULTS = Path(__file__).parent / "results"
TARGETS = (0.2, 0.3, 0.4)
# Of 7e-4, 1e-3 and 1.5e-3 none is ahead beyond the noise for smaug, dense or singularity (results/learning_rates.csv).
LR = 1e-3


@dataclass(frozen=True)
class Options:
    variants: tuple[str, ...] = ("smaug", "dense")
    seeds: tuple[int, ...] = (0, 1, 2)
    seconds: float = 240.0  # device time of a run
    every: float = 20.0  # device seconds between evaluations
    lr: float = LR  # the report shows runs with `LR` alone
    runs: Path = RESULTS / "time_to_result.csv"
    curves: Path = RESULTS / "time_to_result_curves.csv"
    report: bool = False  # train nothing: table and picture of the results


def variant(name: str) -> Recipe:
    """A recipe by its name, or a changed one: a twin of smaug with a part random or off, or a cheaper dense one."""
    base = recipe.load(name.split("-")[0])
    video = base.model.video

    def model(**changes: object) -> Recipe:
        return dataclasses.replace(base, name=name, model=dataclasses.replace(base.model, **changes))

    def seen(**changes: object) -> Recipe:
        return model(video=dataclasses.replace(video, **changes))

    at_random, nowhere = (dataclasses.replace(video.prune, **how) for how in ({"score": "random"}, {"blocks": ()}))
    learned, random = (dataclasses.replace(base.model.selector, keep=1, score=score) for score in ("learned", "random"))
    made = {
        base.name: base,
        # A frame chosen for each pair as well, and the two sparsifiers against their random twins.
        "smaug-selector": model(selector=learned),
        "smaug-selector-random-pruning": model(selector=learned, video=dataclasses.replace(video, prune=at_random)),
        "smaug-selector-random-frames": model(selector=random),
        "smaug-no-pruning": seen(prune=nowhere),
        # Of 16 patches a moment few can be spared.
        "smaug-large-patches": dataclasses.replace(
            seen(patch=2 * video.patch, prune=nowhere),
            video_mask=dataclasses.replace(base.video_mask, ratio=0.25),
        ),
        # Half and a quarter of the frames, and as many tokens a clip as smaug's encoder sees.
        "dense-two-tubes": seen(frames=2 * video.tubelet),
        "dense-one-tube": seen(frames=video.tubelet),
        "dense-large-patches": seen(patch=2 * video.patch),
    }
    if name not in made:
        raise ValueError(f"there is no variant {name!r}; there are the recipes and {', '.join(list(made)[1:])}")
    return made[name]


class Trial:
    """A recipe in training on the embedded data set, its clock stopped whenever no step is computed.

    Batches are made between the steps and not beside them, so that what they cost is known exactly.
    """

    def __init__(self, chosen: Recipe) -> None:
        quiet = Console(quiet=True)
        self.recipe, self.way = chosen, device.choose(True)
        self.clips, self.held_out = open_split(chosen, "train", quiet), open_split(chosen, "val", quiet)
        self.tokenizer = train_tokenizer([c for s in self.clips.samples for c in s.captions], chosen.data.vocabulary)
        torch.manual_seed(chosen.seed)
        self.model = build(chosen, self.tokenizer.get_vocab_size(), self.way.impl).to(self.way.device)
        self.optimizer = adamw(self.model, chosen.optim)
        self.loader = open_loader(chosen, self.clips, self.tokenizer)
        self.steps = 0
        self.seconds = self.data_seconds = 0.0
        self.clock = clock(self.way.device)

    def step(self) -> dict[str, Tensor]:
        """One training step -> its losses."""
        before = self.clock()
        batch = self.loader.batch(self.steps).to(self.way.device)
        got = self.clock()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.steps, self.recipe.optim)
        with self.way.autocast():
            loss, parts = training_step(self.model, self.recipe, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.way.device.type == "cuda":
            torch.cuda.synchronize()
        self.steps += 1
        self.data_seconds += got - before
        self.seconds += self.clock() - got
        return parts

    def evaluate(self, **how: bool) -> dict[str, float]:
        """Retrieval on the val split, in the way that the recipe is evaluated."""
        self.model.eval()
        frames = self.recipe.eval_frames or self.recipe.model.video.frames
        with self.way.autocast():
            found = retrieval(
                self.model, self.held_out, self.tokenizer, frames=frames, max_bad=0.0, top=self.recipe.eval_top, **how
            )
        self.model.train()
        return found.scores

    def decoding(self) -> float:
        """Seconds to decode a batch's frames from the files by as many threads as a run has; a mean over 4 batches."""
        live = dataclasses.replace(self.recipe, data=dataclasses.replace(self.recipe.data, cache=False))
        clips = open_split(live, "train", Console(quiet=True))
        loader = open_loader(self.recipe, clips, self.tokenizer)
        loader.batch(0)
        before = time.perf_counter()
        for step in range(1, 5):
            loader.batch(step)
        return (time.perf_counter() - before) / 4


def run(name: str, seed: int, options: Options, console: Console) -> None:
    chosen = variant(name)
    # Pruning's warm-up is a share of the schedule, so that the schedule is the recipe's; its rate stays at the peak.
    optim = dataclasses.replace(chosen.optim, lr=options.lr, min_lr=1.0)
    trial = Trial(dataclasses.replace(chosen, seed=seed, optim=optim))
    decoding = trial.decoding()
    points: list[dict[str, float]] = []
    while trial.seconds < options.seconds:
        trial.step()
        if trial.seconds >= options.every * (len(points) + 1):
            scores = trial.evaluate()
            point = {"step": trial.steps, "device_seconds": trial.seconds, "data_seconds": trial.data_seconds}
            points.append(point | {"t2v_r1": scores["t2v_r1"]})
            console.print(f"{name} seed {seed} lr {options.lr:g}: {trial.seconds:.0f} s, step {trial.steps}, R@1 "
                          f"{scores['t2v_r1']:.1%}", highlight=False)  # fmt: skip

    who = {"variant": name, "seed": seed, "lr": f"{options.lr:g}"}
    rows = [[*who.values(), *(f"{v:.4g}" if k == "t2v_r1" else f"{v:.1f}" for k, v in p.items())] for p in points]
    append(options.curves, [*who, *points[0]], rows)
    result: dict[str, object] = {**who, "steps": trial.steps, "batch": trial.loader.size}
    result["device_ms_a_step"] = f"{1e3 * trial.seconds / trial.steps:.1f}"
    result["data_ms_a_step"] = f"{1e3 * trial.data_seconds / trial.steps:.1f}"
    result["live_decoding_ms_a_step"] = f"{1e3 * decoding:.1f}"
    for target in TARGETS:
        result[f"seconds_to_{target:.0%}"] = text(reached(points, target))
    result |= {"machine": device.describe(trial.way.device), "date": time.strftime("%Y-%m-%d")}
    append(options.runs, list(result), [list(result.values())])


def reached(points: Sequence[dict[str, float]], target: float, of: str = "device_seconds") -> float | None:
    """Where the curve first meets the target; None if it never does."""
    return compare.reached([(point["t2v_r1"], point[of]) for point in points], target)


def value_at(points: Sequence[dict[str, float]], where: float, along: str) -> float | None:
    """R@1 at a place of the curve; None beyond its end."""
    last = {"t2v_r1": 0.0, along: 0.0}
    for point in points:
        if point[along] >= where:
            part = (where - last[along]) / (point[along] - last[along])
            return last["t2v_r1"] + part * (point["t2v_r1"] - last["t2v_r1"])
        last = point
    return None


def text(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def append(path: Path, header: Sequence[object], rows: list[list[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(header)
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def report(options: Options, console: Console) -> None:
    """A table in Markdown on the screen, and the curves as a picture beside their CSV."""
    runs = [r for r in read(options.runs) if float(r["lr"]) == LR]
    curves: dict[tuple[str, str], list[dict[str, float]]] = {}
    for row in read(options.curves):
        if float(row["lr"]) == LR:
            point = {k: float(row[k]) for k in ("step", "device_seconds", "data_seconds", "t2v_r1")}
            curves.setdefault((row["variant"], row["seed"]), []).append(point)
    names = sorted(dict.fromkeys(r["variant"] for r in runs), key=lambda name: (not name.startswith("smaug"), name))
    time_ = min(points[-1]["device_seconds"] for points in curves.values())
    steps = min(points[-1]["step"] for points in curves.values())
    batch = int(runs[0]["batch"])
    last = TARGETS[-1]
    head = [*(f"seconds to {t:.0%}" for t in TARGETS), f"dense / this, {last:.0%}", f"with live decoding, {last:.0%}",
            "ms a step", f"R@1 after {time_:.0f} s", f"R@1 after {steps * batch / 1000:.0f} k clips"]  # fmt: skip
    lines = ["| variant | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for name in names:
        own = {r["seed"]: r for r in runs if r["variant"] == name}
        seconds = {t: [reached(curves[name, s], t) for s in own] for t in TARGETS}
        cells = [spread(seconds[t]) for t in TARGETS]
        ratios = [
            dense / mine
            for s in own
            if (mine := reached(curves[name, s], last)) and (dense := reached(curves.get(("dense", s), []), last))
        ]
        cells.append(f"{mean(ratios):.1f}x ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "")
        live = []
        for s, r in own.items():
            at, after = reached(curves[name, s], last), reached(curves[name, s], last, "step")
            decoding = float(r["live_decoding_ms_a_step"])
            live.append(None if at is None or after is None else at + after * decoding / 1e3)
        cells += [spread(live), f"{mean(float(r['device_ms_a_step']) for r in own.values()):.0f}"]
        for where, along in ((time_, "device_seconds"), (steps, "step")):
            ends = [value_at(curves[name, s], where, along) for s in own]
            cells.append(f"{mean(e for e in ends if e is not None):.1%}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
    machines = {r["machine"] for r in runs}
    console.print(f"{len({r['seed'] for r in runs})} seeds; {'; '.join(machines)}; {runs[0]['date']}", highlight=False)
    plot(names, curves, options.curves.with_suffix(".png"))


def spread(values: Sequence[float | None]) -> str:
    """The mean, and the range; of values that are all there."""
    there = [v for v in values if v is not None]
    if len(there) < len(values):
        return f"not reached by {len(values) - len(there)} of {len(values)}"
    return f"{mean(there):.0f} ({min(there):.0f} to {max(there):.0f})"


def plot(names: Sequence[str], curves: dict[tuple[str, str], list[dict[str, float]]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("the picture needs matplotlib: pip install -c constraints.txt -e '.[plots]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharey=True)
    for axis, along, label in ((axes[0], "device_seconds", "device seconds"), (axes[1], "step", "training steps")):
        for i, name in enumerate(names):
            for j, seed in enumerate(s for n, s in curves if n == name):
                x, y = zip(*((p[along], 100 * p["t2v_r1"]) for p in curves[name, seed]), strict=True)
                axis.plot((0, *x), (0, *y), color=f"C{i}", lw=1.2, label=None if j else name)
        for target in TARGETS:
            axis.axhline(100 * target, color="gray", lw=0.8, ls=":")
        axis.set_xlabel(label)
    axes[0].set_ylabel("text to video R@1 of 500, %")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    options, console = tyro.cli(Options, description=__doc__), Console()
    if options.report:
        return report(options, console)
    for name in options.variants:
        variant(name)  # a wrong name ends here, not after hours
    for seed in options.seeds:
        for name in options.variants:
            done = options.runs.exists() and [(r["variant"], r["seed"], float(r["lr"])) for r in read(options.runs)]
            if not done or (name, str(seed), options.lr) not in done:
                run(name, seed, options, console)


if __name__ == "__main__":
    main()
