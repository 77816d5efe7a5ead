"""Where words look: the weights are those that the block computes with, and each lands on its patch."""

import numpy as np
import pytest
import torch

from smaug.data import text
from smaug.data.loader import middle_frames
from smaug.model.fusion import Fusion, FusionConfig
from smaug.tokens import packed_ragged
from smaug.visualise.attention import cross_attention, text_to_patches, words_of
from smaug.visualise.look import look

GRID = (3, 2, 2)


@pytest.fixture
def fused():
    """Three moments of [CLS], some of four patches, and fused tokens; a text of five; two of the moments are fused."""
    # moment * 4 + patch; -1 is [CLS] where a moment begins, else a fused token
    ids = torch.tensor([-1, 0, 2, 3, -1, -1, 5, -1, 11, 8, 10, -1, -1], dtype=torch.int32)
    ends = torch.tensor([0, 5, 7, 13])
    frames = packed_ragged(torch.randn(13, 48), ends, ids=ids, lengths=(5, 2, 6))
    words = packed_ragged(torch.randn(5, 64), torch.tensor([0, 5]), lengths=(5,))
    fusion = Fusion(64, 48, FusionConfig(depth=3, heads=4), impl="reference")
    for parameter in fusion.parameters():  # not of the start: attention is far from even
        parameter.data.normal_(std=0.3)
    return fusion, words, frames, torch.tensor([[0, 2]], dtype=torch.int32), torch.zeros(1, 2)


@torch.no_grad()
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("moments", [[[0, 2]], [[1]], [[2, -1]]])
def test_weights_are_those_of_the_block(fused, number, moments):
    """o = w v is what the block's attention hands to its projection."""
    fusion, words, frames, _, _ = fused
    kv_ids, block, given = torch.tensor(moments, dtype=torch.int32), fusion.blocks[number], []
    gate = torch.zeros(kv_ids.shape)
    hook = block.proj.register_forward_pre_hook(lambda _, o: given.append(o[0]))
    fusion([words], frames, kv_ids, gate)
    hook.remove()
    weights, rows = cross_attention(fusion, number, words, frames, kv_ids, gate)
    assert weights.shape == (4, 5, sum((5, 2, 6)[m] for m in moments[0] if m >= 0)) and weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 5))
    v = block.key_value(frames.values)[rows, 64:].unflatten(1, (4, 16))
    torch.testing.assert_close(torch.einsum("htk,khe->the", weights, v).flatten(1), given[0], atol=1e-5, rtol=0)
    assert weights.max() > 1.5 / weights.shape[-1]  # far from even, so that an error would show
    with torch.autocast("cpu", torch.bfloat16):  # a run that trains in bf16 is looked at in fp32 too
        again, _ = cross_attention(fusion, number, words, frames, kv_ids, gate)
    assert torch.equal(again, weights)


@torch.no_grad()
def test_each_share_lands_on_its_patch(fused):
    fusion, words, frames, kv_ids, gate = fused
    named = [("red", [1]), ("triangle", [2, 3, 4])]
    seen = text_to_patches(fusion, -1, words, frames, kv_ids, gate, named, GRID)
    weights, rows = cross_attention(fusion, 2, words, frames, kv_ids, gate)
    assert (seen.block, seen.blocks, seen.heads, seen.keys) == (2, 3, 4, 11)
    assert seen.words == ("mean of the words", "[CLS] of the text", "red", "triangle")
    by_row = dict(zip(rows.tolist(), weights.mean(0).T, strict=True))  # token of a frame -> (5,)
    for row, pieces in ((1, [0]), (2, [1]), (3, [2, 3, 4])):
        shares = {token: column[pieces].mean().item() for token, column in by_row.items()}
        flat = seen.patches[row].flatten()
        where = {1: 0, 2: 2, 3: 3, 8: 11, 9: 8, 10: 10}  # token -> patch
        assert flat[list(where.values())] == pytest.approx([shares[token] for token in where], abs=1e-6)
        assert np.isnan(np.delete(flat, list(where.values()))).all()  # pruned, or of the moment that is not fused
        assert seen.cls[row] == pytest.approx(shares[0] + shares[7], abs=1e-6)
        assert seen.fused[row] == pytest.approx(shares[4] + shares[11] + shares[12], abs=1e-6)
    assert np.allclose(np.nansum(seen.patches, axis=(1, 2, 3)) + seen.cls + seen.fused, 1, atol=1e-6)
    assert np.allclose(seen.patches[0], seen.patches[2:].mean(0), atol=1e-6, equal_nan=True)


def test_a_block_that_there_is_not(fused):
    fusion, *given = fused
    for number in (3, -4):
        with pytest.raises(ValueError, match=rf"--block {number}: the fusion encoder has 3 blocks, the last is 2"):
            text_to_patches(fusion, number, *given, [("red", [1])], GRID)


def test_a_clip_is_looked_at_where_a_patch_is_left(run, clips):
    (group,), _ = middle_frames(clips, [5], 8, view=2)
    shown = look(run, group, "The red RING grows")
    seen = shown.attention
    assert seen.words[2:] == ("The", "red", "RING", "grows") and (seen.block, seen.blocks) == (1, 2)
    there = shown.kept[2] & shown.selected[:, None, None]
    assert (~np.isnan(seen.patches) == there).all() and there.sum() == 3 * shown.kept[2][0].sum()
    assert seen.keys == there.sum() + 3 * (1 + 2)  # [CLS] and the fused tokens of two pruning blocks
    assert np.allclose(np.nansum(seen.patches, axis=(1, 2, 3)) + seen.cls + seen.fused, 1, atol=1e-5)
    assert not np.allclose(look(run, group, "The red RING grows", 0).attention.cls, seen.cls, atol=1e-4)


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("the red ring", ["the", "red", "ring"]),
        ("  The ring's\tÉ", ["The", "ring", "' [UNK]", "s", "É"]),
        ("", ["[UNK]"]),
        ("\u200b", ["[UNK]"]),
        ("视频 <b>", ["视 [UNK]", "频 [UNK]", "< [UNK]", "b", "> [UNK]"]),
    ],
)
def test_words_are_named_as_the_text_has_them(run, said, names):
    words, cut = words_of(run.tokenizer, said, 32)
    assert [name for name, _ in words] == names and cut == 0
    packed = text.encode(run.tokenizer, [said], 32)[0]
    assert [row for _, rows in words for row in rows] == list(range(1, 1 + len(packed)))


def test_words_that_do_not_fit_are_counted(run):
    words, cut = words_of(run.tokenizer, "red ring " * 20, 8)
    assert [name for name, _ in words] == ["red", "ring", "red", "ring", "red", "ring", "red"] and cut == 33
