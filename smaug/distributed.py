"""Many processes, one batch: who takes part, what they tell each other, and PyTorch's engines around the model.

The world is what `torchrun` puts into the environment. A process that was started without it is alone, and then nothing
here communicates.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

# What is called of a block, or of a step, besides its forward. FSDP2 has to gather the weights for each of them, and
# lets a block's go at the end of each, so none may be called in the middle of another.
ENTRANCES = ("attend", "mlp", "end", "see", "encode", "judge")


# Groups of all processes besides the default one: of one group all must call in one order, and DDP begins with its sums
# as gradients are ready. What holds a group stays until the process ends, see `leave`.
_groups: dict[str, dist.ProcessGroup] = {}
_kept: list[Any] = []


def asked() -> bool:
    """Whether torchrun, or somebody who speaks its language, has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def start(device: torch.device, minutes: float) -> torch.device:
    """Joins the others -> the device of this process. A collective that waits longer than `minutes` is an error."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    patience = timedelta(minutes=minutes)
    store, number, size = next(dist.rendezvous("env://", timeout=patience))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun on one machine keeps its store when it starts the processes again, with the addresses of the dead.
        store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=size, timeout=patience)
    if size > 1:
        _groups["host"] = dist.new_group(backend="gloo", timeout=patience)
        _groups["vectors"] = dist.new_group(backend=backend, timeout=patience)
    return device


def host_group() -> dist.ProcessGroup | None:
    """Another group of all processes, over host memory, for a thread that talks beside the training. None if alone."""
    return _groups.get("host")


def leave(code: int) -> NoReturn:
    """Ends this process: as one of several, without its destructors. A process group's joins a thread that waits for
    Python's lock, which the destructor of DDP holds: a deadlock at the end of one in some ten runs (PyTorch 2.13)."""
    sys.stdout.flush()
    sys.stderr.flush()
    if asked():
        os._exit(code)
    sys.exit(code)


def ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if ranks() > 1 else 0


def tell(value: Any) -> Any:
    """What the first process says, on all of them: any plain Python value."""
    if ranks() == 1:
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
    return told[0]


def wait() -> None:
    """For all others."""
    if ranks() > 1:
        total(torch.zeros(1))


def collect(value: Any) -> list[Any]:
    """What each process says, in their order; any plain Python value."""
    if ranks() == 1:
        return [value]
    every: list[Any] = [None] * ranks()
    dist.all_gather_object(every, value)
    return every


@contextlib.contextmanager
def one_before_others(of_all: bool = False) -> Iterator[None]:
    """The first process of each machine (or of all) does what is inside, and then the others do."""
    follows = rank() > 0 if of_all else int(os.environ.get("LOCAL_RANK", "0")) > 0
    if follows:
        wait()
    yield
    if not follows:
        wait()


def total(x: Tensor) -> Tensor:
    """The sum over all processes, of a tensor that has no gradient."""
    if ranks() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([x, keys.view(torch.float32)], 1)
        every = x.new_empty((ranks() * len(x), both.shape[1]))
        dist.all_gather_single(every, both, group=_groups["vectors"])
        vectors, bits = every.split([x.shape[1], both.shape[1] - x.shape[1]], 1)
        every_key = bits.contiguous().view(keys.dtype)
        ctx.mark_non_differentiable(every_key)
        return vectors.contiguous(), every_key

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0]
        own = grad.new_empty((len(grad) // ranks(), *grad.shape[1:]))
        dist.reduce_scatter_single(own, grad.contiguous(), group=_groups["vectors"])
        return own, None


def gather_rows(x: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """(B, D) fp32 and (B, K) int64 of each process -> (ranks * B, D) and (ranks * B, K), in the order of the processes.

    In one message, keys as bits: processes wait for each other once. Backward: each gets the sum of what all of them
    have to say about its rows of x.
    """
    if ranks() == 1:
        return x, keys
    vectors, every_key = _Gather.apply(x, keys)
    return vectors, every_key


def replicate(step: nn.Module, device: torch.device, unused: bool) -> DistributedDataParallel:
    """DDP: every process holds all weights; gradients are averaged while the backward still runs. unused: whether some
    step may leave some weights without a gradient."""
    ids = [device] if device.type == "cuda" else None
    # MB of gradients that are sent at once. Over gloo two messages of 2.3 MB took 2.7 ms and one of 4.6 MB 5.9 ms; for
    # NCCL torch knows.
    size = None if ids else 2
    engine = DistributedDataParallel(
        step, device_ids=ids, find_unused_parameters=unused, gradient_as_bucket_view=True, bucket_cap_mb=size
    )
    _kept.append(engine)
    return engine


def shard(step: nn.Module, blocks: type | tuple[type, ...]) -> None:
    """FSDP2: every process holds a part of each weight, its gradient and its moments. A block gathers its weights when
    it is entered and lets them go when it is left; what is in no block stays gathered from forward to backward."""
    for module in [*(m for m in step.modules() if isinstance(m, blocks)), step]:
        fully_shard(module)
        for name in ENTRANCES:
            if hasattr(module, name):
                register_fsdp_forward_method(module, name)


def average_gradients(parameters: Sequence[Tensor]) -> None:
    """What DDP does, for backwards that it has not watched: in one piece, and after them."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    every = torch.cat([grad.flatten() for grad in gradients])
    dist.all_reduce(every)
    every /= ranks()
    for grad, mean in zip(gradients, every.split([g.numel() for g in gradients]), strict=True):
        grad.copy_(mean.view_as(grad))


def whole(x: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a part. All processes have to ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x
