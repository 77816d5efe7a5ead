import torch
import triton
import triton.language as tl

from smaug.kernels import launch


@triton.jit(do_not_specialize=["n"])
def scale(x, y, n, by, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n).to(tl.float32) * by, mask=i < n)


def test_a_recorded_launch_compiles_for_every_architecture():
    x, y = torch.empty(64, device="meta", dtype=torch.bfloat16), torch.empty(64, device="meta")
    with launch.record(90) as launches:
        assert launch.architecture() == 90
        launch.launch(scale, (4,), x, y, 64, 0.5, BLOCK=16, num_warps=2)
    assert [(found.name, found.grid) for found in launches] == [("scale", (4,))]
    for capability in (80, 86, 89, 90, 100):
        built = launch.compile_for(launches[0], capability)
        assert built.metadata.target.arch == capability and built.metadata.num_warps == 2
        assert len(built.asm["cubin"]) > 1000
