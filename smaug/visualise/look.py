"""What becomes of a clip in a trained model: masked, pruned, selected, looked at by the words, and rebuilt."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from smaug import ops
from smaug.data import text
from smaug.data.frames import in_views
from smaug.data.loader import VisualGroup
from smaug.model.decoder import Decoder
from smaug.model.model import Model
from smaug.model.video_encoder import EncodedVideo, VideoEncoderConfig
from smaug.objectives.mvm import Mvm
from smaug.recipe import Recipe
from smaug.run import Run
from smaug.step import video_mask
from smaug.visualise.attention import Attention, text_to_patches, words_of


@dataclass(frozen=True)
class Shown:
    """A clip of F frames in M moments, and what became of its patches. What does not happen to it is None or empty."""

    frames: np.ndarray  # (F, H, W, 3) uint8, in the order in which the encoder takes them
    times: np.ndarray  # (M, F / M) int, the places of a moment's frames among the F in the order of time
    grid: tuple[int, int, int]  # of its patches: (M, rows, columns)
    visible: np.ndarray | None  # (M, rows, columns) bool, True for a patch that the training mask leaves
    rebuilt: np.ndarray | None  # (F, H, W, 3) uint8, the frames with the decoder's pixels where a patch was masked
    error: float | None  # of what is rebuilt: the loss of `Mvm` over all masked patches; 1 is a patch's mean colour
    kept: dict[int, np.ndarray]  # pruning block -> (M, rows, columns) bool, True for a patch that is there after it
    selected: np.ndarray | None  # (M,) bool, True for a moment that is fused with the text
    scores: np.ndarray | None  # (M,) fp32, cosine of a moment and the text; None also where chance selects
    attention: Attention | None  # of the text's words to the patches that are left
    absent: tuple[str, ...]  # what there is not to see, and why, in sentences


@torch.no_grad()
def look(run: Run, clip: VisualGroup, wanted: str, block: int = -1) -> Shown:
    """One clip (a group of one) and a text that moments are selected for and whose words look at the patches.

    Mask and rebuilding are those of training, in its first epoch; pruning and selection are those of evaluation: of the
    whole clip, at the full rate. `block` of the fusion encoder is looked into; ValueError if there is no such block.
    """
    model, recipe, device = run.model.eval(), run.recipe, run.way.device
    video, samples = clip.video.to(device), clip.samples.to(device)
    config, words_config, count = model.video.config, model.text.config, video.shape[1]
    grid = config.grid(count)
    ids_keep, ids_removed = video_mask(recipe, 0).draw(samples, grid, seed=recipe.seed, epoch=0, impl=model.impl)
    packed = text.pack_captions(run.tokenizer, [wanted], words_config.max_words, words_config.sep)
    with run.way.autocast():
        whole = model.video([(video, config.every_patch(video))])
        feature, words = model.text(packed.to(device))
        kv_ids, gate, scores = select(model, whole, feature)
        visible = rebuilt = error = None
        if ids_removed.numel():
            stays = np.zeros(math.prod(grid), dtype=bool)
            stays[ids_keep[0].cpu().numpy()] = True
            visible = stays.reshape(grid)
            rebuilt, error = rebuild(model, recipe, video, ids_keep, ids_removed)
    selected = attention = None
    if kv_ids.shape[1] < whole.frame_ids.shape[1]:
        selected = np.zeros(grid[0], dtype=bool)
        selected[kv_ids[0].cpu().numpy()] = True  # of a single clip: its sequences are numbered like its moments
    if model.fusion is not None:
        names, cut = words_of(run.tokenizer, wanted, words_config.max_words - words_config.sep)
        attention = text_to_patches(model.fusion, block, words, whole.frames, kv_ids, gate, names, grid, cut)
    kept = after_pruning(config, whole, count)

    absent = []
    if visible is None:
        absent.append("Nothing is masked when this model is trained, so nothing is rebuilt.")
    elif not any(isinstance(objective, Mvm) for objective in recipe.objectives.values()):
        absent.append("Nothing is rebuilt: the model was trained without the mvm objective.")
    elif rebuilt is None:
        absent.append("Nothing is rebuilt: the decoder has places for fewer moments than the clip has here.")
    if not kept:
        absent.append("Nothing is pruned.")
    if attention is None:
        absent.append(
            f"No word looks at a patch: recipe {recipe.name} has no fusion encoder, text and clip meet as two vectors."
        )
    elif selected is None:
        absent.append("No moments are selected: the text is fused with all of them.")
    return Shown(
        frames=clip.video[0].cpu().numpy(),
        times=np.array(in_views(list(range(count)), config.view)).reshape(grid[0], -1),
        grid=grid,
        visible=visible,
        rebuilt=rebuilt,
        error=error,
        kept=kept,
        selected=selected,
        scores=scores,
        attention=attention,
        absent=tuple(absent),
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


def select(model: Model, whole: EncodedVideo, feature: Tensor) -> tuple[Tensor, Tensor | None, np.ndarray | None]:
    """The moments that a text of this feature (1, D) is fused with, (1, kept) int32; the gate; and all their scores,
    (M,), None where it is fused with all or chance selects."""
    selector = model.selector
    if selector is None or selector.config.keep >= whole.frame_ids.shape[1]:
        return whole.frame_ids, None, None
    kv_ids, gate = selector(whole.summaries, feature, whole.frame_ids)
    if selector.config.score == "random":
        return kv_ids, gate, None
    # The selector returns no scores. This is its scale-free score, so the order is the same.
    scores = F.cosine_similarity(selector.frame(whole.summaries).float(), selector.text(feature).float(), dim=-1)
    return kv_ids, gate, scores.cpu().numpy()


def rebuild(
    model: Model, recipe: Recipe, video: Tensor, ids_keep: Tensor, ids_removed: Tensor
) -> tuple[np.ndarray | None, float | None]:
    """The clip (1, F, H, W, 3) with all masked patches as the decoder sees them -> (F, H, W, 3) uint8, and its loss.

    In training it is asked for a random `share` of them at a time. None if there is no decoder, or if its table of
    places is too short, because evaluation has more moments than training had.
    """
    mvm = next(((name, o) for name, o in recipe.objectives.items() if isinstance(o, Mvm)), None)
    if mvm is None:
        return None, None
    name, objective = mvm
    decoder = model.heads[name]
    assert isinstance(decoder, Decoder)
    config, count = model.video.config, video.shape[1]
    if config.times(count) * config.patches > len(decoder.position):
        return None, None
    masked = model.video([(video, ids_keep)], seed=recipe.seed)
    visible = [masked.stayed] + (masked.left if objective.decoder.decoder_input == "exit" else [])
    pred = decoder(visible, ids_removed.view(config.sequences(count), -1), masked.cls).float().flatten(0, 1)
    tube = decoder.tube
    if count == 1:  # an image: the mean over the tube's frames speaks for it, as in `Mvm`
        pred, tube = pred.unflatten(1, (3, tube[0], -1)).mean(2).flatten(1), (1, *tube[1:])
    error = ops.pixel_loss(pred[None], video, ids_removed, patch=tube, impl=model.impl)
    return paste(video[0], ids_removed[0], pred, tube).cpu().numpy(), error.item()


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
