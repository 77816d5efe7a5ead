"""One clip as a trained model treats it, in a picture: `python -m smaug.visualise RUN --clip 3 --out clip.png`."""

from __future__ import annotations

import importlib.util
import math
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from smaug.data import text
from smaug.data.frames import in_views
from smaug.data.loader import VisualGroup, middle_frames
from smaug.data.shapes import DamagedError
from smaug.model.decoder import Decoder
from smaug.model.model import Model
from smaug.model.video_encoder import EncodedVideo, VideoEncoderConfig
from smaug.objectives.mvm import Mvm
from smaug.recipe import Recipe
from smaug.run import load_run, open_split, refuse
from smaug.step import video_mask
from smaug.tokens import PackedTokens


@dataclass(frozen=True)
class Options:
    run: Annotated[Path, tyro.conf.Positional]  # folder of a run
    clip: int  # its number in the evaluation data, from 0
    out: Path  # the PNG file to write
    text: str | None = None  # to select moments for; default: the clip's first caption
    split: Literal["val", "test"] = "test"  # of the embedded data set
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True)
class Shown:
    """A clip of F frames in M moments, and what became of its patches. What does not happen to it is None or empty."""

    frames: np.ndarray  # (F, H, W, 3) uint8, in the order in which the encoder takes them
    times: np.ndarray  # (M, F / M) int, the places of a moment's frames among the F in the order of time
    visible: np.ndarray | None  # (M, rows, columns) bool, True for a patch that the training mask leaves
    kept: dict[int, np.ndarray]  # pruning block -> (M, rows, columns) bool, True for a patch that is there after it
    selected: np.ndarray | None  # (M,) bool, True for a moment that is fused with the text
    scores: np.ndarray | None  # (M,) fp32, cosine of a moment and the text; None also where chance selects
    rebuilt: np.ndarray | None  # (F, H, W, 3) uint8, the frames with the decoder's pixels where a patch was masked


def main() -> int:
    options = tyro.cli(Options, prog="python -m smaug.visualise", description=__doc__)
    console = Console(markup=False)  # a file may be called clip[1].mp4
    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("drawing needs matplotlib: pip install -c constraints.txt -e '.[plots]'")
        if options.out.suffix != ".png":
            raise ValueError(f"--out {options.out}: the name of the picture must end in .png")
        if not options.out.parent.is_dir():
            raise ValueError(f"--out {options.out}: there is no folder {options.out.parent}")
        run = load_run(options.run, options.device)
        clips = open_split(run.recipe, options.split, console, run.way.device)
        if not 0 <= options.clip < len(clips):
            raise ValueError(f"--clip {options.clip}: {clips.name} has the clips 0 to {len(clips) - 1}")
        config = run.model.video.config
        frames = run.recipe.eval_frames or config.frames
        config.times(frames)  # raises for a number that does not fill the tubes
        groups, bad = middle_frames(clips, [options.clip], frames, view=config.view)
        if bad:
            raise ValueError(f"--clip {options.clip}: {bad[0].name}: {bad[0].reason}")

        caption = clips.samples[options.clip].captions[0]
        wanted = caption if options.text is None else options.text
        run.model.eval()
        with run.way.autocast():
            shown = look(run.model, run.recipe, groups[0], pack_caption(run.tokenizer, wanted, run.model))
        if options.text is not None and shown.selected is None:
            raise ValueError("--text selects moments, but this run's model uses all moments of this clip")
        what = f'clip {options.clip} of {clips.name}, "{caption}"'
        draw(shown, options.out, what, wanted)
        console.print(f"{'wrote':<11}{options.out}: {what}", highlight=False, soft_wrap=True)
        return 0
    except (ValueError, OSError, DamagedError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 130


def pack_caption(tokenizer: Tokenizer, caption: str, model: Model) -> PackedTokens:
    config = model.text.config
    return text.pack_captions(tokenizer, [caption], config.max_words, config.sep)


@torch.no_grad()
def look(model: Model, recipe: Recipe, clip: VisualGroup, words: PackedTokens) -> Shown:
    """One clip (a group of one) and the words that moments are selected for.

    Mask and rebuilding are those of training, in its first epoch; pruning and selection are those of evaluation: of the
    whole clip, at the full rate.
    """
    device = next(model.parameters()).device
    video, samples = clip.video.to(device), clip.samples.to(device)
    config, count = model.video.config, video.shape[1]
    grid = config.grid(count)
    everything = torch.arange(math.prod(grid), dtype=torch.int32, device=device)[None]
    ids_keep, ids_removed = video_mask(recipe, 0).draw(samples, grid, seed=recipe.seed, epoch=0, impl=model.impl)
    whole = model.video([(video, everything)])
    selected, scores = select(model, whole, tree_map_only(Tensor, lambda x: x.to(device), words))
    visible = rebuilt = None
    if ids_removed.numel():
        stays = np.zeros(math.prod(grid), dtype=bool)
        stays[ids_keep[0].cpu().numpy()] = True
        visible = stays.reshape(grid)
        rebuilt = rebuild(model, recipe, video, ids_keep, ids_removed)
    return Shown(
        frames=clip.video[0].numpy(),
        times=np.array(in_views(list(range(count)), config.view)).reshape(grid[0], -1),
        visible=visible,
        kept=after_pruning(config, whole, count),
        selected=selected,
        scores=scores,
        rebuilt=rebuilt,
    )


def after_pruning(config: VideoEncoderConfig, whole: EncodedVideo, frames: int) -> dict[int, np.ndarray]:
    """For each pruning block, (M, rows, columns) bool: the patches of an unmasked clip that are there after it."""
    grid = config.grid(frames)
    there = np.ones(math.prod(grid), dtype=bool)
    patches = there.size // config.sequences(frames)
    left = iter(whole.left)
    kept = {}
    for block in range(config.depth):
        if block in config.prune.blocks:
            stay = config.prune.count(patches, config.prune.keep)
            if stay < patches:  # the encoder lists only the blocks where a patch left
                there[next(left)[1].flatten().cpu().numpy()] = False
                patches = stay
            kept[block] = there.reshape(grid).copy()
    return kept


def select(model: Model, whole: EncodedVideo, words: PackedTokens) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Which moments of a clip the text is fused with, (M,) bool, and their scores, (M,); None where it is all."""
    selector, moments = model.selector, whole.frame_ids.shape[1]
    if selector is None or selector.config.keep >= moments:
        return None, None
    feature, _ = model.text(words)
    ids, _ = selector(whole.summaries, feature, whole.frame_ids)
    selected = np.zeros(moments, dtype=bool)
    selected[ids[0].cpu().numpy()] = True  # of a single clip: its sequences are numbered like its moments
    if selector.config.score == "random":
        return selected, None
    # The selector returns no scores. This is its scale-free score, so the order is the same.
    scores = F.cosine_similarity(selector.frame(whole.summaries).float(), selector.text(feature).float(), dim=-1)
    return selected, scores.cpu().numpy()


def rebuild(model: Model, recipe: Recipe, video: Tensor, ids_keep: Tensor, ids_removed: Tensor) -> np.ndarray | None:
    """The clip (1, F, H, W, 3) with all masked patches as the decoder sees them -> (F, H, W, 3) uint8.

    In training it is asked for a random `share` of them at a time. None if there is no decoder, or if its table of
    places is too short, because evaluation has more moments than training had.
    """
    mvm = next(((name, o) for name, o in recipe.objectives.items() if isinstance(o, Mvm)), None)
    if mvm is None:
        return None
    name, objective = mvm
    decoder = model.heads[name]
    assert isinstance(decoder, Decoder)
    config, count = model.video.config, video.shape[1]
    if config.times(count) * config.patches > len(decoder.position):
        return None
    masked = model.video([(video, ids_keep)], seed=recipe.seed)
    visible = [masked.stayed] + (masked.left if objective.decoder.decoder_input == "exit" else [])
    pred = decoder(visible, ids_removed.view(config.sequences(count), -1), masked.cls).float().flatten(0, 1)
    tube = decoder.tube
    if count == 1:  # an image: the mean over the tube's frames speaks for it, as in `Mvm`
        pred, tube = pred.unflatten(1, (3, tube[0], -1)).mean(2).flatten(1), (1, *tube[1:])
    return paste(video[0], ids_removed[0], pred, tube).cpu().numpy()


def paste(video: Tensor, ids: Tensor, pred: Tensor, tube: tuple[int, int, int]) -> Tensor:
    """video (F, H, W, 3) uint8 with the patches ids (R,) replaced by pred (R, 3 * t * p * p) -> the same, uint8.

    pred is what `pixel_loss` compares: normalised by its patch, in the order channel, frame, row, column. Mean and
    standard deviation are those of the true patch, as in MAE's demo: the decoder never learns to tell them.
    """
    t, high, wide = tube
    frames, height, width, _ = video.shape
    tubes = (video.float() / 255).view(frames // t, t, height // high, high, width // wide, wide, 3)
    tubes = tubes.permute(0, 2, 4, 6, 1, 3, 5)  # (moment, row, column, channel, frame, y, x)
    flat = tubes.reshape(-1, pred.shape[1])
    ids = ids.long()
    var, mean = torch.var_mean(flat[ids], dim=1, keepdim=True)
    flat[ids] = pred * (var + 1e-6).sqrt() + mean
    pixels = flat.view(tubes.shape).permute(0, 4, 1, 5, 2, 6, 3).reshape(video.shape)
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)


def draw(shown: Shown, path: Path, what: str, wanted: str) -> None:
    """The picture, as PNG: a row for each thing that happens to the clip, a column for each moment."""
    from matplotlib.figure import Figure  # an optional extra

    moments, size = len(shown.times), shown.frames.shape[1]
    rows = rows_of(shown, wanted)
    # Pixels; a cell is a whole multiple of the frame, so that all its pixels are squares of one size.
    cell, gap, names, line, dpi = size * max(1, round(256 / size)), 12, 330, 27, 160
    width = names + moments * (cell + gap)
    heading = textwrap.wrap(what, width // 13)
    above = [gap + line * titles[0].count("\n") + line * bool(titles[0]) for _, _, titles in rows]
    height = gap + line * len(heading) + sum(above) + len(rows) * cell + gap

    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    # parse_math: a caption may have dollar signs
    figure.text(gap / width, 1 - gap / height, "\n".join(heading), va="top", fontsize=10, parse_math=False)
    bottom = height - gap - line * len(heading)
    for (name, images, titles), room in zip(rows, above, strict=True):
        bottom -= room + cell
        middle = (bottom + cell / 2) / height
        figure.text(gap / width, middle, name, va="center", fontsize=9, linespacing=1.4, parse_math=False)
        for moment, (image, title) in enumerate(zip(images, titles, strict=True)):
            left = names + moment * (cell + gap)
            axes = figure.add_axes((left / width, bottom / height, cell / width, cell / height))
            axes.imshow(image, interpolation="nearest")
            axes.set_title(title, fontsize=8, pad=3)
            axes.set_axis_off()
    figure.savefig(path, format="png")


def rows_of(shown: Shown, wanted: str) -> list[tuple[str, np.ndarray, list[str]]]:
    """Name, images (M, H, W, 3) uint8 and their titles, of every row. A moment is shown by its first frame."""
    moments = len(shown.times)
    frames, untitled = shown.frames[:: shown.times.shape[1]], [""] * moments
    titles = [f"moment {m}\nframes {' '.join(map(str, t))}" for m, t in enumerate(shown.times)]
    rows = [("clip\nfirst frame of\neach moment", frames, titles)]
    if shown.visible is not None:
        name = f"visible in training\n{shown.visible.sum()} of {shown.visible.size} patches"
        rows.append((name, greyed(frames, shown.visible, 1.0), untitled))
    for block, there in shown.kept.items():
        name = f"unmasked clip\nafter pruning in block {block}\n{there.sum()} of {there.size} patches"
        rows.append((name, greyed(frames, there, 0.75), untitled))
    if shown.selected is not None:
        name = f"selected for\n{textwrap.fill(wanted, 24)}\n{shown.selected.sum()} of {moments} moments"
        said = ["kept" if kept else "left out" for kept in shown.selected]
        if shown.scores is not None:
            said = [f"{word}, score {score:.3f}" for word, score in zip(said, shown.scores, strict=True)]
        rows.append((name, greyed(frames, shown.selected[:, None, None], 0.75), said))
    if shown.rebuilt is not None:
        name = "rebuilt from the visible\npatches; mean and spread\nare those of the true ones"
        rows.append((name, shown.rebuilt[:: shown.times.shape[1]], untitled))
    return rows


def greyed(images: np.ndarray, there: np.ndarray, share: float) -> np.ndarray:
    """images (M, H, W, 3) uint8 with `share` of grey over the patches where there (M, rows, columns) is False."""
    _, height, width, _ = images.shape
    _, rows, columns = there.shape
    pixels = there.repeat(height // rows, axis=1).repeat(width // columns, axis=2)[..., None]
    return np.where(pixels, images, (1 - share) * images + share * 190).astype(np.uint8)


if __name__ == "__main__":
    sys.exit(main())
