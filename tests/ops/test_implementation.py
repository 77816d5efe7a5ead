"""`impl`: "reference" never reaches an op that has a kernel, in the backward neither and compiled neither."""

import importlib
import math

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch.utils.flop_counter import flop_registry

from smaug import ops
from smaug.ops.implementation import KERNELS, load_kernels
from smaug.testing import HostReads
from smaug.tokens import packed_uniform

ops.register_flops()


X = torch.randn(300, requires_grad=True)


def leaf(*shape):
    return X[: math.prod(shape)].view(shape)


def random_mask(impl):
    return ops.random_mask(torch.arange(2), (2, 8), 6, seed=0, impl=impl)[0].float().sum().requires_grad_()


def patch_embed(impl):
    video, ids = torch.zeros(2, 2, 3, 8, 8, dtype=torch.uint8), torch.tensor([[0, 3, 7], [1, 2, 4]])
    kw = dict(patch=4, mean=(0.5,) * 3, std=(0.25,) * 3)
    return ops.patch_embed(video, ids, leaf(6, 48), position=leaf(4, 6), prefix=leaf(1, 6), impl=impl, **kw).values


def move_tokens(impl):
    ids = torch.tensor([[0, 3], [1, 2]])
    return ops.scatter_tokens(ops.gather_tokens(leaf(2, 5, 6), ids, impl=impl), ids, 5, leaf(6), impl=impl)


def select_tokens(impl):
    return ops.select_tokens(packed_uniform(leaf(8, 6), 4), leaf(8), keep=2, impl=impl)[0].values


def pixel_loss(impl):
    video, ids = torch.zeros(2, 2, 3, 8, 8, dtype=torch.uint8), torch.tensor([[0, 3, 7], [1, 2, 4]])
    return ops.pixel_loss(leaf(2, 3, 48), video, ids, patch=4, impl=impl)


def attention(impl):
    cu = torch.tensor([0, 3, 5], dtype=torch.int32)
    return ops.attention(leaf(5, 2, 16), leaf(5, 2, 16), leaf(5, 2, 16), cu, lengths_q=(3, 2), impl=impl)


CALLS = [random_mask, patch_embed, move_tokens, select_tokens, pixel_loss, attention]


@pytest.fixture(scope="module")
def kernels():
    """Names of the ops that a CUDA tensor would take to a kernel."""
    pytest.importorskip("triton")
    for name in KERNELS:
        importlib.import_module(f"smaug.kernels.{name}")
    every = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("smaug::")}
    have = {name for name in every if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")}
    assert have == {name for name in every if not name.endswith("_reference")} and have
    return have


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_reference_reaches_no_kernel_forward_or_backward(call, kernels):
    for impl in ("reference", "auto"):
        with HostReads() as seen:
            call(impl).sum().backward()
        ours = {name for name in seen.launched if name.startswith("smaug::")}
        if impl == "reference":
            assert not ours & kernels and bool(ours) == (call is not attention)  # whose reference is no op
        else:
            assert ours and ours <= kernels


@pytest.mark.parametrize("call", [patch_embed, move_tokens, select_tokens, pixel_loss], ids=lambda call: call.__name__)
def test_so_it_does_compiled(call, kernels):
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=keep))("reference").sum().backward()
    targets = {
        str(node.target).replace(".", "::", 1).removesuffix(".default") for g in graphs for node in g.graph.nodes
    }
    ours = {target for target in targets if target.startswith("smaug::")}
    assert len(graphs) == 2 and len(ours) > 1 and not ours & kernels


def test_reference_is_the_same_code():
    for call in CALLS[:-1]:
        assert torch.equal(call("auto"), call("reference"))


def test_every_op_has_a_flop_formula():
    named = {str(op).replace(".", "::", 1) for op in flop_registry if str(op).startswith("smaug.")}
    assert named == {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("smaug::")}


@pytest.mark.filterwarnings("ignore:smaug.ops runs on PyTorch's own operations")
def test_asking_for_the_kernels_does_not_break_a_graph():
    """On a GPU impl="triton" asks again; there they were loaded with smaug.ops."""

    def f(x):
        return x + 1 if load_kernels() == "ok" else x - 1

    x = torch.ones(2)
    want = f(x)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="eager")(x), want)


def test_a_refusal_inside_a_compiled_function_says_why():
    def f(x):
        return ops.gather_tokens(x, torch.tensor([[0]]), impl="triton") * 2

    with pytest.raises(RuntimeError, match=r'runs on CUDA tensors, and these are on the cpu; use impl="auto"'):
        torch.compile(f, backend="eager")(torch.ones(1, 2, 3))
