"""A step whose encoders never see more than a few pairs at once, with the loss and the gradients of the whole step.

The contrast compares every pair with every other, so micro-batches that are stepped through one after the other would
compute another loss. GradCache (Gao et al. 2021, section 3) cuts the graph behind the encoders: encode all pairs
without a graph, in parts; compute the objectives on the results, and the results' gradients; encode each part again,
with a graph, and let those gradients flow into it. The encoders run forward once more, and hold the activations of one
part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from smaug.data.loader import Batch
from smaug.model.video_encoder import EncodedVideo
from smaug.step import Encoded, Step, draw_masks, seed_of, text_views
from smaug.tokens import PackedTokens, cat_tokens, known_cu_seqlens

Visible = list[tuple[Tensor, Tensor]]  # (video, ids_keep) by group


def backward_in_parts(
    step: Step, batch: Batch, pairs: int, precision: Callable[[], AbstractContextManager[object]] = nullcontext,
    going_back: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """The loss of `training_step` and its parts, with the gradients of all parameters accumulated.

    pairs: how many are encoded at once. The lengths of texts must be known to the host. precision: the autocast of the
    forwards; a backward within it would compute in bf16 what the forward computed in fp32, such as the contrast.
    going_back: what backwards run in, a clock's phase.
    """
    removed, visible = draw_masks(step.model, step.recipe, batch)
    views = text_views(step.recipe, batch)
    ends = [*range(pairs, len(batch), pairs), len(batch)]
    given = [
        (replace(batch, first=batch.first + start), _clips(visible, start, end), _texts(views, len(batch), start, end))
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    with torch.no_grad(), precision():
        parts = [step.encode(*one) for one in given]
    tensors = [_tensors(part) for part in parts]
    leaves = [torch.cat(same).requires_grad_() for same in zip(*tensors, strict=True)]
    with precision():
        loss, means = step.judge(batch, removed, _joined(parts, leaves))
    with going_back():
        loss.backward(seed_of(loss))
    sizes = [[len(x) for x in same] for same in zip(*tensors, strict=True)]
    grads = [leaf.grad.split(each) if leaf.grad is not None else None for leaf, each in zip(leaves, sizes, strict=True)]
    del parts, tensors, leaves
    for number, one in enumerate(given):
        with precision():
            outputs = _tensors(step.encode(*one))
        flows = [(x, grad[number]) for x, grad in zip(outputs, grads, strict=True) if grad is not None]
        with going_back():
            torch.autograd.backward([x for x, _ in flows], [grad for _, grad in flows])
    return loss.detach(), means


def _clips(visible: Visible, start: int, end: int) -> Visible:
    """Of pairs start .. end - 1, which stand in the order of the groups."""
    found, first = [], 0
    for video, ids_keep in visible:
        a, b = max(start - first, 0), min(end - first, len(video))
        if a < b:
            found.append((video[a:b], ids_keep[a:b]))
        first += len(video)
    return found


def _texts(views: dict[str, PackedTokens], pairs: int, start: int, end: int) -> dict[str, PackedTokens]:
    """What is one object stays one: the step encodes each once."""
    parts = {id(view): _sequences(view, pairs, start, end) for view in views.values()}
    return {name: parts[id(view)] for name, view in views.items()}


def _sequences(tokens: PackedTokens, pairs: int, start: int, end: int) -> PackedTokens:
    each = tokens.num_sequences // pairs  # texts of a pair
    lengths = tokens.lengths
    if lengths is None:
        raise ValueError("micro-batches need texts whose lengths the host knows")
    lengths = [lengths] * tokens.num_sequences if isinstance(lengths, int) else lengths
    rows = [0, *itertools.accumulate(lengths)]
    a, b, own = rows[start * each], rows[end * each], tuple(lengths[start * each : end * each])
    values, ids, size = tokens.values[a:b], tokens.ids[a:b], tokens.size[a:b]
    cu_seqlens = known_cu_seqlens(own, values.device)
    return PackedTokens(values, cu_seqlens, ids, size, max(own), own)


def _distinct(encoded: Encoded) -> list[str]:
    """A view for each of the texts that were encoded."""
    return list({id(words): name for name, words in encoded.words.items()}.values())


def _tensors(encoded: Encoded) -> list[Tensor]:
    """All that may have a gradient, by rows of pairs, sequences or tokens."""
    video, views = encoded.video, _distinct(encoded)
    return [
        video.features, video.frames.values, video.summaries, video.stayed[0], *(states for states, _ in video.left),
        *([] if video.cls is None else [video.cls]),
        *(encoded.features[view] for view in views), *(encoded.words[view].values for view in views),
    ]  # fmt: skip


def _joined(parts: Sequence[Encoded], values: Sequence[Tensor]) -> Encoded:
    """All parts as one, with these values in the order of `_tensors`."""
    videos, rest = [part.video for part in parts], iter(values)
    moments = max(video.frame_ids.shape[1] for video in videos)
    first, frame_ids = 0, []
    for video in videos:
        ids = video.frame_ids + first * (video.frame_ids >= 0)
        frame_ids.append(F.pad(ids, (0, moments - ids.shape[1]), value=-1))
        first += video.frames.num_sequences
    frames = cat_tokens([video.frames for video in videos])
    ids_left = [torch.cat([ids for _, ids in same]) for same in zip(*(v.left for v in videos), strict=True)]
    video = EncodedVideo(
        features=next(rest),
        frames=frames.with_values(next(rest)),
        summaries=next(rest),
        frame_ids=torch.cat(frame_ids).to(torch.int32),
        stayed=(next(rest), torch.cat([v.stayed[1] for v in videos])),
        left=[(next(rest), ids) for ids in ids_left],
        cls=None if videos[0].cls is None else next(rest),
    )
    views = _distinct(parts[0])
    features = {id(parts[0].words[view]): next(rest) for view in views}
    words = {
        id(parts[0].words[view]): cat_tokens([part.words[view] for part in parts]).with_values(next(rest))
        for view in views
    }
    names = {name: id(own) for name, own in parts[0].words.items()}
    return Encoded(
        video, {name: features[key] for name, key in names.items()}, {name: words[key] for name, key in names.items()}
    )
