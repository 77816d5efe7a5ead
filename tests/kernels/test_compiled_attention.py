"""The attention kernels as a GPU would run them, judged without one: launches, registers, memory and instructions."""

import re

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from smaug import ops  # noqa: F401  registers the ops that the launchers must agree with
from smaug.kernels import attention as kernels
from smaug.kernels import cubin, launch

TENSOR_CORE = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HG?MMA", 100: r"UTC\w*MMA|HMMA"}
MAIN = "attention_forward", "attention_backward_queries", "attention_backward_keys"


def _meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, device="meta", dtype=dtype)


def _inputs(e, full, rows=640, sequences=5, segments=3, heads_kv=2, dtype=torch.bfloat16):
    """What the ops take, but scale and what follows: everything at once, or plain self-attention of one projection."""
    cu = _meta(sequences + 1, dtype=torch.int32)
    q, k, v = _meta(rows, 3, 2, e, dtype=dtype).unbind(1)
    if not full:
        return q, k, v, cu, cu, None, None, None
    k, v = (_meta(rows, heads_kv, e, dtype=dtype) for _ in range(2))
    ids = _meta(sequences, segments, dtype=torch.int32)
    return q, k, v, cu, cu, ids, _meta(sequences, segments), _meta(rows)


def _record(architecture, inputs, scores="", bias_grad=True, grad_lse=True):
    with launch.record(architecture) as launches:
        out = kernels.attention(*inputs, 0.1, scores, [], [])
        lse = out[1] if grad_lse else None
        grads = kernels.attention_backward(out[0], lse, *inputs[:3], *out[:2], *inputs[3:], 0.1, bias_grad, [], [])
    return launches, out, grads


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("e", [16, 24, 72, 256])
def test_launches_shapes_and_no_host_read(e, full):
    """On meta a host read raises. Forward 1, with scores 2; backward 2, with a bias 3."""
    inputs = _inputs(e, full)
    for scores in ("", "cls", "mean"):
        launches, out, grads = _record(80, inputs, scores)
        names = [found.name for found in launches]
        assert names == [
            "attention_forward",
            *(["attention_scores"] if scores else []),
            "attention_backward_queries",
            "attention_backward_keys",
            *(["attention_backward_biases"] if full else []),
        ]
        want = torch.ops.smaug.attention(*inputs, 0.1, scores, [], [])
        want_grads = torch.ops.smaug.attention_backward(
            out[0], None, *inputs[:3], *out[:2], *inputs[3:], 0.1, True, [], []
        )
        for a, b in zip((*out, *grads), (*want, *want_grads), strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()
    assert len(_record(80, inputs, bias_grad=False)[0]) == 3


def test_many_entries_are_indexed_without_a_host_read():
    launches, _, _ = _record(80, _inputs(16, True, sequences=200, segments=100))
    order, starts = launches[2].args[14:16]
    assert order.shape == (20_000,) and starts.shape == (201,)


def judge(found, architecture):
    """Compiles a launch -> its registers, spills, shared memory and counts of instructions."""
    built = launch.compile_for(found, architecture)
    used, sass = cubin.resources(built), cubin.listing(built)
    count = lambda pattern: len(re.findall(rf"\b(?:{pattern})\b", sass))  # noqa: E731
    return {
        "registers": used["REG"],
        "stack": used["STACK"] + used["LOCAL"] + count("LDL") + count("STL"),
        "shared": built.metadata.shared,
        "tensor core": count(TENSOR_CORE[architecture]),
        "async copy": count("LDGSTS|UTMALDG"),
        "through descriptors": count("UTMALDG"),
        "atomic": len(cubin.atomics(built)),
    }


def test_what_comes_through_descriptors():
    """The streamed side of 16-bit products on sm_90 to sm_110, in one or two parts, and never without an address."""
    for architecture, dtype, e, parts in (
        (89, torch.bfloat16, 64, 0),
        (120, torch.bfloat16, 64, 0),
        (90, torch.float32, 64, 0),
        (90, torch.bfloat16, 64, 2),
        (110, torch.float16, 72, 4),
    ):
        for rows in (640, 0):
            launches, _, _ = _record(architecture, _inputs(e, False, rows, dtype=dtype))
            for found in launches:
                made = [x for x in found.args if isinstance(x, TensorDescriptor)]
                assert len(made) == parts and all(x.base.numel() for x in made), (found.name, architecture, dtype, e)


@pytest.mark.parametrize(("architecture", "e"), [(80, 64), (90, 80)])  # the others are in benchmarks/results/static.csv
def test_no_spills_no_atomics_tensor_cores_and_asynchronous_copies(architecture, e):
    everything, _, _ = _record(architecture, _inputs(e, True), "mean")
    plain, _, _ = _record(architecture, _inputs(e, False), grad_lse=False)
    wrong = []
    for kind, launches in (("full", everything), ("plain", plain)):
        for found in launches:
            facts = judge(found, architecture)
            print(f"sm_{architecture} E={e} {kind} {found.name} {facts}")
            good = facts["stack"] == 0 and facts["atomic"] == 0 and facts["shared"] <= cubin.BLOCK_BYTES[architecture]
            if found.name in MAIN:
                good = good and facts["tensor core"] > 0 and facts["async copy"] > 0
                good = good and (facts["through descriptors"] > 0) == (architecture == 90)
            if not good:
                wrong.append((kind, found.name, facts))
    assert not wrong
