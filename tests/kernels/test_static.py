"""benchmarks/results/static.csv is what `python -m benchmarks.static --all` would make today."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
from benchmarks.static import judge, table

del sys.path[0]  # or transformers finds our folder `kernels`, takes it for its own package and fails


@pytest.fixture(scope="module")
def variants():
    return table.variants()


def test_the_table_is_current(variants):
    """The same variants: no kernel's source, shape or configuration and no Triton is newer than the table."""
    kept = set(table.read())
    missing = [f"{v.launch.name} sm_{v.architecture} ({v.case.name})" for key, v in variants.items() if key not in kept]
    gone = sorted(kept - set(variants))
    again = "make it again: python -m benchmarks.static --all --jobs 2"
    assert not missing and not gone, f"{again}; {len(missing)} variants missing {missing[:5]}, {len(gone)} gone"


def test_every_kernel_passes_the_gate():
    assert table.failures(table.read()) == []


@pytest.mark.slow
def test_a_variant_of_each_kernel_compiles_to_the_same(variants):
    chosen, kept = table.sample(variants), table.read()
    assert len(chosen) <= 40
    changed = {key: table.changes(kept.get(key), row) for key, row in table.make(chosen, {}, with_work=False).items()}
    assert {key: found for key, found in changed.items() if found} == {}


def test_what_the_gate_stops():
    row = dict(dtypes="bfloat16 float32", spills=0, stack=0, atomics=0, shared=0)
    row |= dict(hmma=4, hgmma=0, utchmma=0, ldgsts=4, utmaldg=0)
    assert judge.wrong("_embed", 80, row) == []
    for change, reason in (
        (dict(spills=1), "spills"),
        (dict(stack=8), "spills"),
        (dict(atomics=1), "atomics"),
        (dict(hmma=0), "tensor-core"),
        (dict(ldgsts=0), "asynchronous"),
        (dict(shared=101_377), "shared memory"),
    ):
        (found,) = judge.wrong("_embed", 86, row | change)
        assert reason in found
    no_tensor_core = row | dict(hmma=0, ldgsts=0)
    assert judge.wrong("_embed", 86, no_tensor_core | dict(dtypes="uint8 float32")) == []
    assert judge.wrong("_embed", 86, no_tensor_core | dict(dtypes="float32", spills=1)) != []
    assert judge.wrong("_mask", 86, no_tensor_core) == []  # multiplies nothing


def test_blocks_a_multiprocessor():
    """As NVIDIA's occupancy calculator has them."""

    def fit(architecture, registers, shared, warps, tensor_memory=0):
        limits = judge.LIMITS[architecture]
        return judge.blocks_a_multiprocessor(registers, shared, warps, tensor_memory, limits)

    assert fit(80, 255, 0, 4) == 2  # 8 warps of 8,192 registers fill 65,536
    assert fit(80, 32, 0, 1) == 32  # blocks
    assert fit(86, 32, 0, 4) == 12  # 48 warps
    assert fit(86, 64, 49 * 1024, 4) == 2  # 2 * (49 + 1) KB are all of it
    assert fit(86, 64, 50 * 1024, 4) == 1
    assert fit(90, 168, 0, 4) == 3
    assert fit(100, 64, 0, 4, tensor_memory=256) == 2
