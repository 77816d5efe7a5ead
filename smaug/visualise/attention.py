"""How much each word of a text looks at each patch of a clip: the cross-attention of one fusion block."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from smaug.data.text import CLS, UNK
from smaug.model.fusion import Fusion, FusionBlock
from smaug.tokens import PackedTokens


@dataclass(frozen=True)
class Attention:
    """Where the words look, each word's shares summing to 1 over patches, fused and [CLS]; means over the heads.

    M are the clip's moments. Row 0 is the mean of the text's words, row 1 the text's [CLS], then come the W words.
    """

    block: int  # of the fusion encoder, from 0
    blocks: int  # that it has
    heads: int
    words: tuple[str, ...]  # (2 + W,)
    patches: np.ndarray  # (2 + W, M, rows, columns) fp32; nan for a patch that was pruned, or whose moment is not fused
    fused: np.ndarray  # (2 + W,) fp32, of the tokens into which pruning fuses what it drops
    cls: np.ndarray  # (2 + W,) fp32, of the [CLS] of moments
    keys: int  # tokens that a word can look at
    cut: int  # words at the text's end that the model does not take


def text_to_patches(
    fusion: Fusion,
    number: int,
    text: PackedTokens,
    frames: PackedTokens,
    kv_ids: Tensor,
    gate: Tensor | None,
    words: list[tuple[str, list[int]]],
    grid: tuple[int, int, int],
    cut: int = 0,
) -> Attention:
    """The attention of fusion block `number` (negative: from the end) when one text is fused with one clip.

    text     one sequence of encoded words, (T, D), [CLS] first.
    frames   the clip's encoded patches with their `ids`, -1 for [CLS], the first token of a sequence, and for fused.
    words    names, and the rows of `text` that are each word's pieces.
    grid     (moments, rows, columns) of the clip.
    Raises ValueError for a block that there is not.
    """
    blocks = len(fusion.blocks)
    if not -blocks <= number < blocks:
        raise ValueError(
            f"--block {number}: the fusion encoder has {blocks} block{'s' * (blocks > 1)}, the last is {blocks - 1}"
        )
    number %= blocks
    weights, rows = cross_attention(fusion, number, text, frames, kv_ids, gate)
    by_piece = weights.mean(0)
    by_word = torch.stack([by_piece[pieces].mean(0) for _, pieces in words])
    shares = torch.cat([by_word.mean(0, keepdim=True), by_piece[:1], by_word]).cpu()

    ids = frames.ids[rows].long().cpu()
    first = torch.isin(rows, frames.first_rows()).cpu()
    patches = torch.full((len(shares), grid[0] * grid[1] * grid[2]), float("nan"))
    patches[:, ids[ids >= 0]] = shares[:, ids >= 0]
    return Attention(
        block=number,
        blocks=blocks,
        heads=len(weights),
        words=("mean of the words", f"{CLS} of the text", *(name for name, _ in words)),
        patches=patches.view(-1, *grid).numpy(),
        fused=shares[:, (ids < 0) & ~first].sum(1).numpy(),
        cls=shares[:, first].sum(1).numpy(),
        keys=len(rows),
        cut=cut,
    )


def cross_attention(
    fusion: Fusion, number: int, text: PackedTokens, frames: PackedTokens, kv_ids: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights (heads, T, K), fp32, of T words for the K tokens of the frames that kv_ids (1, M) names; and the tokens'
    rows in `frames`, (K,).

    The softmax of the block's own queries and keys, in fp32 whatever the run computes in. The selector's gate is 0 and
    changes no weight.
    """
    block = fusion.blocks[number]
    assert isinstance(block, FusionBlock)
    seen: list[Tensor] = []
    # What the words are when they reach this block's cross-attention is the fusion encoder's business: it says so.
    hook = block.norm_cross.register_forward_hook(lambda _, given, normed: seen.append(normed))
    bounds = frames.cu_seqlens.tolist()
    rows = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in kv_ids[0].tolist() if i >= 0])
    rows = rows.to(frames.values.device)
    with torch.autocast(text.values.device.type, enabled=False):
        text, frames = (tokens.with_values(tokens.values.float()) for tokens in (text, frames))
        try:
            fusion([text], frames, kv_ids, gate)
        finally:
            hook.remove()
        q = block.query(seen[0]).unflatten(1, (block.heads, -1))
        k = block.key_value(frames.values[rows]).view(len(rows), 2, block.heads, -1)[:, 0]
        logits = q.transpose(0, 1) @ k.permute(1, 2, 0) * q.shape[-1] ** -0.5
    return logits.softmax(-1), rows


def words_of(tokenizer: Tokenizer, text: str, max_words: int) -> tuple[list[tuple[str, list[int]]], int]:
    """The words of a text as it has them, each with its rows in `text.pack`; and how many more do not fit.

    A word that the tokenizer reads as unknown is marked so. One that is cut in the middle ends there.
    """
    found = tokenizer.encode(text, add_special_tokens=False)
    own: dict[int | None, list[int]] = {}
    for piece, word in enumerate(found.word_ids):
        own.setdefault(word, []).append(piece)
    words = []
    for pieces in own.values():
        if fits := [piece for piece in pieces if piece < max_words - 1]:
            name = text[found.offsets[fits[0]][0] : found.offsets[fits[-1]][1]]
            unknown = f" {UNK}" if found.tokens[fits[0]] == UNK else ""
            words.append((name + unknown, [piece + 1 for piece in fits]))
    # As `text.encode`: a text without any sign that the tokenizer reads is one unknown word.
    return (words, len(own) - len(words)) if words else ([(UNK, [1])], 0)
