"""The counts of benchmarks/static/traffic.py against counts by hand: tiles, trips of the loop and rows."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3]))
from benchmarks.static import cases, table, traffic
from smaug import ops
from smaug.kernels import launch
from smaug.testing import offsets

LENGTHS = (3, 70)


@pytest.fixture(autouse=True)
def _values(monkeypatch):
    monkeypatch.setattr(launch, "_architecture", 80)
    monkeypatch.setattr(cases, "device", "cpu")
    monkeypatch.setattr(cases, "lengths", LENGTHS)


def count(run):
    return {launched.name: (launched, issued, moved) for launched, issued, moved in traffic.counted(run)}


def tiles(n, block):
    return -(-n // block)


def test_attention_of_a_width_of_72():
    """Computed as 64 + 16. A query tile reads all keys and values of its sequence, a key tile all of its queries."""
    found = count(lambda: cases.attention_of_one_projection(72, scores="cls"))
    pairs, rows = sum(n * n for n in LENGTHS), sum(LENGTHS)
    row = 72 * 2
    for name, products in (("attention_forward", 2), ("attention_backward_queries", 3)):
        launched, issued, moved = found[name]
        m, n = launched.meta["BLOCK_M"], launched.meta["BLOCK_N"]
        trips = sum(tiles(length, m) * tiles(length, n) for length in LENGTHS)
        assert issued == pytest.approx(2 * products * trips * m * n * 80 / (2 * products * pairs * 72))
        own = {
            "attention_forward": (2 * row + 4, 2 * row + 4),
            "attention_backward_queries": (4 * row + 8, 4 * row + 8),
        }
        again = sum(tiles(length, m) * length * 2 * row for length in LENGTHS)
        least = rows * (own[name][1] + 2 * row)
        assert moved == pytest.approx((rows * own[name][0] + again) / least, rel=0.02)  # and cu_seqlens
    launched, issued, moved = found["attention_backward_keys"]
    m, n = launched.meta["BLOCK_M"], launched.meta["BLOCK_N"]
    trips = sum(tiles(length, m) * tiles(length, n) for length in LENGTHS)
    assert issued == pytest.approx(trips * m * n * 80 / (pairs * 72))
    again = sum(tiles(length, n) * length * (2 * row + 8) for length in LENGTHS)  # q, g, lse, delta
    assert moved == pytest.approx((rows * 4 * row + again) / (rows * (6 * row + 8)), rel=0.02)
    launched, issued, _ = found["attention_scores"]  # of the first query alone
    assert launched.meta["BLOCK_M"] == 16
    trips = sum(tiles(length, launched.meta["BLOCK_N"]) for length in LENGTHS)
    assert issued == pytest.approx(trips * launched.meta["BLOCK_N"] * 16 * 80 / (rows * 72))


def test_the_table_has_these_counts(monkeypatch):
    kept = {
        row["kernel"]: row
        for row in table.read().values()
        if (row["architecture"], row["case"], row["dtypes"]) == ("sm_80", "self", "bfloat16 float32")
        and "E=72 " in row["configuration"]
    }
    for suffix, lengths in (("", cases.RAGGED), ("_197", cases.EVEN)):
        monkeypatch.setattr(cases, "lengths", lengths)
        for launched, issued, moved in traffic.counted(lambda: cases.attention_of_one_projection(72)):
            row = kept[launched.name]
            assert float(row[f"issued{suffix}"]) == round(issued, 2) and float(row[f"moved{suffix}"]) == round(moved, 2)


def test_the_pairs_of_kv_ids():
    q, cu = torch.zeros(10, 2, 16, dtype=torch.float16), offsets((10,))
    k, ids = torch.zeros(sum(LENGTHS), 1, 16, dtype=torch.float16), torch.tensor([[1, 0, -1]], dtype=torch.int32)
    found = count(lambda: ops.attention(q, k, k, cu, offsets(LENGTHS), kv_ids=ids))
    launched, issued, _ = found["attention_forward"]
    m, n = launched.meta["BLOCK_M"], launched.meta["BLOCK_N"]
    assert issued == pytest.approx((tiles(70, n) + 1) * m * n / (10 * 73))


def test_the_yardstick_pays_for_padding():
    """A short sequence among long ones has as many tiles as they; of equal ones, least is what is touched."""
    (launched, issued, moved), *_ = count(lambda: cases.padded_attention_of_one_projection(64)).values()
    m, n = launched.meta["BLOCK_M"], launched.meta["BLOCK_N"]
    assert launched.name == "padded_forward"
    trips = sum(tiles(max(LENGTHS), m) * tiles(length, n) for length in LENGTHS)
    assert issued == pytest.approx(trips * m * n / sum(length**2 for length in LENGTHS))
    # to the end of the tile that the last real key is in, at most the end of the batch
    keys = sum(min(tiles(length, n) * n, 70) for length in LENGTHS) * tiles(70, m)
    asked = 2 * 70 * (2 * 128 + 4) + keys * 2 * 128
    assert moved == pytest.approx(asked / (sum(LENGTHS) * (4 * 128 + 4)), rel=0.02)


def test_patch_embed_from_its_grid_is_what_the_interpreter_counts():
    # channels last: in the other order the interpreter also reads a tile that the compiler sees nobody use
    video = torch.zeros(4, 2, 16, 16, 3, dtype=torch.uint8)
    ids = torch.arange(8, dtype=torch.int32).repeat(4, 1)  # of two frames of four patches: every place of the table
    weight, bias, position = (torch.zeros(*shape, requires_grad=True) for shape in ((72, 192), (72,), (8, 72)))

    def run():
        image = dict(patch=8, mean=(0.5,) * 3, std=(0.2,) * 3)
        ops.patch_embed(video, ids, weight, bias, **image, position=position).values.sum().backward()

    found = count(run)
    for kernel in ("_embed", "_dweight"):
        launched, issued, moved = found[kernel]
        numbers = traffic.of_patch_embed(launched)
        assert numbers["issued"] == pytest.approx(issued)
        assert numbers["moved"] == pytest.approx(moved, rel=0.01), kernel


def test_a_gather_moves_what_it_must():
    x, ids = torch.zeros(1, 50, 128, dtype=torch.float16), torch.arange(0, 50, 2, dtype=torch.int32)[None]
    ((_, issued, moved),) = count(lambda: ops.gather_tokens(x, ids)).values()
    assert issued is None and moved == 1
