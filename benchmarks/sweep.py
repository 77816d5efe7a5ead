"""A sweep around recipe smaug: one change at a time, scored on the val split.

    python -m benchmarks.sweep                    # two cores: --part 0 2 and --part 1 2 side by side

Each setting trains for the same number of steps, so with the same clips, and appends one line to the results: what was
changed, GFLOP of a step once pruning is warm, R@1. Lines that are there are not run again. One seed, 500 candidates:
differences under four points are noise, as the second seed of the unchanged recipe shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench_time_to_result import RESULTS, Trial, append, read
from smaug import ops, recipe
from smaug.masks import TextMask
from smaug.recipe import Recipe
from smaug.step import training_step

Change = Callable[[Recipe], Recipe]


def at(path: str, value: Any) -> Change:
    """Sets the field at a dotted path of the recipe, objectives by their names."""

    def change(target: Any, names: list[str]) -> Any:
        if not names:
            return value
        if isinstance(target, dict):
            return {**target, names[0]: change(target[names[0]], names[1:])}
        return dataclasses.replace(target, **{names[0]: change(getattr(target, names[0]), names[1:])})

    return lambda r: change(r, path.split("."))


def both(*changes: Change) -> Change:
    def change(r: Recipe) -> Recipe:
        for each in changes:
            r = each(r)
        return r

    return change


def without(objective: str) -> Change:
    return lambda r: dataclasses.replace(r, objectives={k: v for k, v in r.objectives.items() if k != objective})


PRUNE, KEEP, DECODER = "model.video.prune", "model.selector.keep", "objectives.mvm.decoder"
PRUNE_WARMUP = 30  # steps, as in the recipe's own schedule
RANDOM_FRAMES = at("model.selector.score", "random")
SETTINGS: dict[tuple[str, str], Change] = {
    ("recipe", "seed 0"): at("seed", 0),
    ("recipe", "seed 1"): at("seed", 1),
    **{("mask ratio", str(x)): at("video_mask.ratio", x) for x in (0.75, 0.25, 0.0)},
    ("pruning", "none"): at(f"{PRUNE}.blocks", ()),
    ("pruning", "random"): at(f"{PRUNE}.score", "random"),
    **{("pruning keeps", str(x)): at(f"{PRUNE}.keep", x) for x in (0.15, 0.5)},
    ("frames kept", "1"): at(KEEP, 1),
    ("frames kept", "1, random"): both(at(KEEP, 1), RANDOM_FRAMES),
    ("mvm", "none"): without("mvm"),
    ("patches", "16"): at("model.video.patch", 16),
    **{("frames in", str(x)): at("model.video.frames", x) for x in (4, 16)},
    ("no mask, pruning keeps", "0.15"): both(at("video_mask.ratio", 0.0), at(f"{PRUNE}.keep", 0.15)),
    ("no mask, pruning keeps", "0.15, random"): both(
        at("video_mask.ratio", 0.0), at(f"{PRUNE}.keep", 0.15), at(f"{PRUNE}.score", "random")
    ),
    **{("learning rate", str(x)): at("optim.lr", x) for x in (7e-4, 1.5e-3)},
    ("mask kind", "tube"): at("video_mask.kind", "tube"),
    ("pruning at block", "1"): at(f"{PRUNE}.blocks", (1,)),
    ("pruned tokens", "dropped, not fused"): at(f"{PRUNE}.fuse", "none"),
    ("decoder share", "1.0"): at(f"{DECODER}.share", 1.0),
    ("decoder input", "mask"): at(f"{DECODER}.decoder_input", "mask"),
    ("frames in", "16, 2 kept"): both(at("model.video.frames", 16), at(KEEP, 2)),
    ("frames in", "16, 2 kept, random"): both(at("model.video.frames", 16), at(KEEP, 2), RANDOM_FRAMES),
    ("vtm negatives", "1"): at("objectives.vtm.negatives", 1),
    ("vtc sees", "85 % of the words"): at("text_mask", TextMask(0.15)),
    ("last steps unmasked", "10 %"): at("unmask_last", 0.1),
    **{
        ("one sequence a clip, mask kind", kind): both(at("model.video.attend", "clip"), at("video_mask.kind", kind))
        for kind in ("random", "block", "frame")
    },
}


@dataclass(frozen=True)
class Options:
    steps: int = 240
    part: tuple[int, int] = (0, 1)  # this process's share of the settings: every second of the pair, from the first
    only: str = ""  # settings whose name holds this
    results: Path = RESULTS / "sweep.csv"


def run(name: tuple[str, str], options: Options, console: Console) -> None:
    base = recipe.load("smaug")
    base = dataclasses.replace(base, optim=dataclasses.replace(base.optim, steps=options.steps))
    chosen = SETTINGS[name](at(f"{PRUNE}.warmup", PRUNE_WARMUP / options.steps)(base))
    trial = Trial(chosen)
    for _ in range(options.steps):
        losses = trial.step()
    ops.register_flops()
    batch = dataclasses.replace(trial.loader.batch(0), step=options.steps // 2)
    with trial.way.autocast(), FlopCounterMode(display=False) as counter:
        training_step(trial.model, chosen, batch)[0].backward()
    result: dict[str, object] = {"setting": name[0], "value": name[1], "steps": options.steps}
    result["gflop"] = f"{counter.get_total_flops() / 1e9:.2f}"
    how: dict[str, dict[str, bool]] = {"": {}, "_shuffled": {"shuffle": True}, "_dense": {"sparse": False}}
    for suffix, flags in how.items():
        scores = trial.evaluate(**flags)
        result[f"t2v_r1{suffix}"] = f"{scores['t2v_r1']:.3f}"
        if not suffix:
            result["t2v_r1_dual"] = f"{scores['t2v_r1_dual']:.3f}"
    result |= {k: f"{losses[k].item():.3f}" if k in losses else "" for k in ("vtc", "vtm", "mlm", "mvm")}
    append(options.results, list(result), [list(result.values())])
    console.print("  ".join(f"{k} {v}" for k, v in result.items()), highlight=False)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    torch.set_num_threads(1 if options.part[1] > 1 else torch.get_num_threads())
    wanted = [name for name in SETTINGS if options.only in ": ".join(name)]
    for name in wanted[options.part[0] :: options.part[1]]:
        # looked up anew each time: another process may have done it
        if not options.results.exists() or name not in {(r["setting"], r["value"]) for r in read(options.results)}:
            run(name, options, Console())


if __name__ == "__main__":
    main()
