"""Match scores of many pairs of texts and clips, as fast as they go.

A pair costs what only it has. Keys and values of a clip are projected once, a text goes through the fusion encoder's
first self-attention once, and pairs are ordered by the frames that they see, so that all texts which meet a clip are
the queries of one attention: no key or value is copied. The device is read once a block of clips, where a frame
selector has chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from smaug.evaluate.encode import Block, EncodedTexts
from smaug.evaluate.ensemble import Ensemble, ensemble
from smaug.model.fusion import KeyValue
from smaug.model.model import Model
from smaug.tokens import PackedTokens, take_rows

ROWS = 4096  # words fused at once: their hidden states are what fills a cache, however many pairs they belong to


def has_match_head(model: Model) -> bool:
    return model.fusion is not None and "vtm" in model.heads


def read_texts(model: Model, texts: EncodedTexts) -> PackedTokens:
    """The texts as far as they do not depend on a clip: made once, for any number of calls of `match`."""
    assert model.fusion is not None and texts.words is not None
    words = model.fusion.read(texts.words)
    if len(model.fusion.blocks) == 1:  # then nobody reads any word but [CLS] again
        words = take_rows(words, words.first_rows(), 1)
    return words


def match(
    model: Model,
    block: Block,
    texts: EncodedTexts,
    read: PackedTokens,
    text_ids: np.ndarray,
    video_ids: np.ndarray,
    *,
    how: Ensemble = "concat",
    select: bool = True,
) -> Tensor:
    """Match logits, yes less no, of the pairs (text_ids[p], clip video_ids[p] of the block), (P,) fp32 on the device.

    text_ids, video_ids (P,) int64 on the host, in any order; `read` is `read_texts`. With `how` other than "concat",
    each frame that a pair sees is scored by itself. `select`: the frame selector chooses, where the model has one.
    """
    assert model.fusion is not None
    device = block.features.device
    if not len(text_ids):
        return torch.empty(0, device=device)
    frame_ids = block.frame_ids
    if model.selector is not None and select:
        of_text, of_video = (torch.from_numpy(x).to(device) for x in (text_ids, video_ids))
        # The gate is left: outside training it is 0.
        frame_ids, _ = model.selector(
            block.summaries, texts.features.index_select(0, of_text), frame_ids.index_select(0, of_video)
        )
        seen = frame_ids.cpu().numpy()
    else:
        seen = frame_ids.cpu().numpy()[video_ids]
    there = seen >= 0
    asked = text_ids if how == "concat" else np.repeat(text_ids, there.sum(1))
    seen = seen if how == "concat" else seen[there][:, None]

    order = np.lexsort((asked, *seen.T[::-1]))
    logits = _ask(model, block, model.fusion.project(block.frames), read, asked[order], seen[order])
    scores = torch.empty_like(logits).index_copy_(0, torch.from_numpy(order).to(device), logits)
    if how == "concat":
        return scores
    places = torch.from_numpy(np.flatnonzero(there)).to(device)
    units = scores.new_zeros(there.size).index_copy_(0, places, scores).view(there.shape)
    return ensemble(units, torch.from_numpy(there).to(device), how)


def _ask(
    model: Model,
    block: Block,
    keys_values: Sequence[KeyValue],
    read: PackedTokens,
    text_ids: np.ndarray,
    seen: np.ndarray,
) -> Tensor:
    """Logits of texts and the frames that each sees, (n, M), those who see the same next to each other."""
    assert model.fusion is not None
    device = block.features.device
    lengths = np.broadcast_to(np.asarray(read.lengths), (read.num_sequences,))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    new = np.concatenate([[True], (seen[1:] != seen[:-1]).any(1)])  # sees others than the one before it
    rows = np.cumsum(lengths[text_ids])
    logits = []
    first = 0
    while first < len(text_ids):
        done = rows[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(rows, done + ROWS, side="right")))
        mine, length = text_ids[first:last], lengths[text_ids[first:last]]
        ends = np.cumsum(length)
        rows_read = np.repeat(starts[mine] - (ends - length), length) + np.arange(ends[-1])
        words = take_rows(read, torch.from_numpy(rows_read).to(device), length.tolist())
        heads = np.flatnonzero(new[first:last] | (np.arange(first, last) == first))
        together = np.diff(np.append(heads, last - first)).tolist()
        kv_ids = torch.from_numpy(seen[first:last][heads]).to(device)
        fused = model.fusion.fuse(
            words, block.frames, kv_ids, rows=words.first_rows(), lengths=1, keys_values=keys_values, together=together
        )
        answers = model.heads["vtm"](fused.values).float()
        logits.append(answers[:, 1] - answers[:, 0])
        first = last
    return torch.cat(logits)
