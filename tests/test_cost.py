"""The cost model counts what torch counts: FLOPs, weights, what the backward needs."""

import contextlib
import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from smaug import calibration, cost, device, ops
from smaug.blocks import checkpoint_blocks
from smaug.data.loader import Batch, VisualGroup
from smaug.data.text import beginnings, pack
from smaug.masks import TextMask, VideoMask
from smaug.model.decoder import DecoderConfig
from smaug.model.frame_selector import FrameSelectorConfig
from smaug.model.video_encoder import PruneConfig
from smaug.objectives.answer import Answer
from smaug.objectives.mvm import Mvm
from smaug.recipe import load, names
from smaug.run import build
from smaug.step import training_step

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import scaling
from benchmarks.launches import Launches
from benchmarks.timing import peak_memory

del sys.path[0]  # or transformers would take our folder `kernels` for its own package

VOCABULARY, CLS, MASK, SEP = 200, 2, 4, 3
ops.register_flops()


def batch_of(recipe, pairs, *, words=(9, 11, 13), frames=None, device="meta"):
    """Shapes without values. `words` of captions come in turn, [CLS] not counted; a third of them are masked."""
    video = recipe.model.video
    shape = (pairs, frames or video.frames, video.image_size, video.image_size, 3)
    lengths = [words[i % len(words)] for i in range(pairs)]
    captions = [[7] * n for n in lengths]
    whole = pack(captions, CLS)
    hidden = [torch.arange(n // 3, n) for n in lengths]
    contrast = whole
    if recipe.text_mask.ratio:
        contrast = pack(captions, CLS, [torch.arange(round(recipe.text_mask.ratio * n), n) for n in lengths])
    rows = [first + 1 + i for first, n in zip(whole.first_rows().tolist(), lengths, strict=True) for i in range(n // 3)]
    spelled = any(isinstance(o, Answer) and o.by == "decoder" for o in recipe.objectives.values())
    parts, after, belongs = beginnings([[8, 9]] * pairs, SEP)
    batch = Batch(
        (VisualGroup(torch.zeros(shape, dtype=torch.uint8, device=device), torch.arange(pairs)),),
        words=whole, contrast=contrast, masked=pack(captions, CLS, hidden, MASK), masked_rows=torch.tensor(rows),
        masked_labels=torch.full((len(rows),), 7), masked_counts=tuple(n // 3 for n in lengths),
        video_keys=torch.arange(pairs), caption_keys=torch.arange(pairs), epoch=0, step=recipe.optim.steps // 2,
        names=("",) * pairs, options=pack([c for c in captions for _ in range(5)], CLS),
        answers=torch.zeros(pairs, dtype=torch.int64), begun=pack(parts, CLS) if spelled else None,
        begun_labels=torch.tensor(after), begun_of=torch.tensor(belongs),
    )  # fmt: skip
    return batch.to(torch.device(device))


def load_of(batch, **more):
    pairs = len(batch)
    return cost.Load(
        pairs, words=batch.words.rows / pairs, masked=len(batch.masked_rows) / pairs, begun_words=2, **more
    )  # answers of two words: beginnings of 1, 2 and 3 rows


def counted(recipe, batch):
    with batch.video_keys.device:
        model = build(recipe, VOCABULARY, "auto")
    with FlopCounterMode(display=False) as counter:
        training_step(model, recipe, batch)[0].backward()
    return model, counter.get_total_flops()


def check(recipe, pairs, device="meta", **shape):
    """Within 0.3 %: what is left are small things such as the means of fused tokens, and captions of unequal length."""
    batch = batch_of(recipe, pairs, device=device, **shape)
    model, flops = counted(recipe, batch)
    predicted = cost.total(cost.parts(recipe, load_of(batch, **shape), vocabulary=VOCABULARY).values())
    assert predicted.step_flops == pytest.approx(flops, rel=0.003)
    assert predicted.weights == sum(p.numel() for p in model.parameters())


QUICK = {("smaug", "base"), *((name, "tiny") for name in names())}


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=() if (name, size) in QUICK else pytest.mark.slow)
        for name in names()
        for size in ("tiny", "base", "large")
    ],
)
def test_flops_and_weights_are_those_that_torch_counts(name, size):
    """At tiny what runs, at the other sizes shapes."""
    check(load(name, size), *((12, "cpu") if size == "tiny" else (4, "meta")))


def changed(recipe, video=None, **fields):
    model = dataclasses.replace(recipe.model, video=dataclasses.replace(recipe.model.video, **(video or {})))
    return dataclasses.replace(recipe, model=dataclasses.replace(model, **fields.pop("model", {})), **fields)


SMAUG = load("smaug")
MVM = dataclasses.replace(SMAUG.objectives["mvm"], decoder=DecoderConfig(depth=3, share=1.0, decoder_input="mask"))
VARIANTS = {
    "nothing masked": changed(SMAUG, video_mask=VideoMask(0.0, "even")),
    "nothing masked at the end": changed(SMAUG, unmask_last=0.6),
    "pruned twice, nothing fused": changed(
        SMAUG, {"depth": 6, "prune": PruneConfig((1, 3), keep=0.5, fuse="none"), "temporal_layers": 0}
    ),
    "pruned at every block, fused": changed(SMAUG, {"depth": 4, "prune": PruneConfig((0, 1, 2, 3), keep=0.6)}),
    "one sequence a clip": changed(SMAUG, {"attend": "clip", "temporal_layers": 0}, video_mask=VideoMask(0.4)),
    "frames selected": changed(SMAUG, {"frames": 16}, model={"selector": FrameSelectorConfig(keep=2)}),
    "no frame left out": changed(SMAUG, model={"selector": FrameSelectorConfig(keep=2)}),
    "a deep decoder of all patches": changed(SMAUG, objectives=SMAUG.objectives | {"mvm": MVM}),
    "MAE's decoder": changed(SMAUG, objectives=SMAUG.objectives | {"mvm": Mvm(decoder=DecoderConfig(cls=True))}),
    "words dropped": changed(SMAUG, text_mask=TextMask(0.4)),
    "deep fusion": changed(SMAUG, model={"fusion": dataclasses.replace(SMAUG.model.fusion, depth=3)}),
    "answers spelled": changed(load("qa"), objectives={"answer": Answer(by="decoder")}),
    "BERT and CLIP's ViT": changed(
        SMAUG, {"norm_before": True},
        model={
            "text": dataclasses.replace(SMAUG.model.text, norm="post", sep=True, start="x"),
            "fusion": dataclasses.replace(SMAUG.model.fusion, norm="post"),
        },
    ),
    "BEiT": changed(SMAUG, {"relative_position": True}),
}  # fmt: skip


FIRST = ("pruned at every block, fused", "frames selected", "a deep decoder of all patches", "answers spelled")


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(r, id=name, marks=() if name in FIRST else pytest.mark.slow) for name, r in VARIANTS.items()],
)
def test_flops_and_weights_of_what_flags_can_ask_for(recipe):
    check(recipe, 12)


@pytest.mark.parametrize("name", ["smaug", pytest.param("singularity", marks=pytest.mark.slow)])
def test_images(name):
    check(load(name), 8, frames=1)


def test_attention_is_a_part_that_can_be_told():
    batch = batch_of(SMAUG, 12, words=(12,))
    with torch.device("meta"):
        model = build(SMAUG, VOCABULARY, "auto")
    with FlopCounterMode(display=False) as counter:
        training_step(model, SMAUG, batch)
    attention = counter.get_flop_counts()["Global"][torch.ops.smaug.attention]
    predicted = cost.total(cost.parts(SMAUG, load_of(batch), vocabulary=VOCABULARY).values())
    assert predicted.attention_flops == attention


class Bytes(TorchDispatchMode):
    """Of what operations read and write; each of our ops is one on the meta device."""

    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns):  # views move nothing
            each = {id(x): x.nbytes for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
            self.moved += sum(each.values())
        return out


@pytest.mark.parametrize("name", [n if n == "smaug" else pytest.param(n, marks=pytest.mark.slow) for n in names()])
def test_bytes_are_at_most_those_that_operations_move(name):
    """The forward's are nearly all of them. Eager PyTorch reads gradients of sums and biases more often than is
    needed."""
    recipe = load(name, "base")
    batch = batch_of(recipe, 8)
    with torch.device("meta"):
        model = build(recipe, VOCABULARY, "auto")
    with Bytes() as forward:
        loss = training_step(model, recipe, batch)[0]
    with Bytes() as backward:
        loss.backward()
    counted = cost.parts(recipe, load_of(batch), vocabulary=VOCABULARY, precision=cost.FP32)
    del counted["optimiser"]
    predicted = cost.total(counted.values())
    assert 0.97 < predicted.bytes / forward.moved <= 1
    assert 0.75 < predicted.backward_bytes / backward.moved <= 1


def test_every_part_is_there_with_its_bytes():
    counted = cost.parts(load("smaug", "base"), cost.Load(8, world=8))
    expected = {"patch embedding", "word embedding", "temporal layer 0", "video norm", "frame selector", "optimiser"}
    expected |= {f"video block {n}" for n in range(12)} | {f"text block {n}" for n in range(9)}
    expected |= {f"fusion block {n}" for n in range(3)} | {"vtc projections", "vtc contrast", "vtm head"}
    expected |= {"mlm transform", "mlm vocabulary", "mvm entrance", "mvm block 0", "mvm pixels"}
    assert expected <= counted.keys() <= expected | {"fusion blocks' norm"}
    assert all(work.bytes > 0 or name == "optimiser" for name, work in counted.items())
    assert all(work.backward_bytes > 0 for work in counted.values())
    assert "gradients" in cost.collectives(counted, cost.Load(8, world=8), cost.Job(8))


def kept_for_the_backward(recipe, batch, bf16):
    """Bytes of all storages that autograd keeps, without the model's own and the video's."""
    with torch.device(batch.video_keys.device):
        model = build(recipe, VOCABULARY, "auto")
    own = {x.untyped_storage()._cdata for x in [*model.parameters(), *(group.video for group in batch.groups)]}
    found, alive = {}, []

    def keep(x):
        storage = x.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage.nbytes()
            alive.append(x)  # or another storage may get its number
        return x

    kept = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with kept, torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext():
        training_step(model, recipe, batch)
    return sum(found.values())


@pytest.mark.parametrize("name", ["smaug", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dense", "mac"))])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(name, bf16):
    recipe = load(name)
    batch = batch_of(recipe, 24, device="cpu" if bf16 else "meta")  # meta has no autocast
    precision = cost.BF16_CPU if bf16 else cost.FP32
    predicted = cost.total(cost.parts(recipe, load_of(batch), vocabulary=VOCABULARY, precision=precision).values())
    assert predicted.saved == pytest.approx(kept_for_the_backward(recipe, batch, bf16), rel=0.04)


@pytest.mark.parametrize("name", ["smaug", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dense", "mac"))])
def test_launches_are_those_that_the_benchmark_counts(name):
    recipe = load(name)
    batch = batch_of(recipe, 4, device="cpu")
    model = build(recipe, VOCABULARY, "auto")
    with Launches() as counter:
        with torch.autocast("cpu", torch.bfloat16):
            loss = training_step(model, recipe, batch)[0]
        loss.backward()
    predicted = cost.total(cost.parts(recipe, load_of(batch), vocabulary=VOCABULARY).values())
    assert predicted.launches == pytest.approx(counter.dense.total() + counter.outside.total(), rel=0.05)


A100, A6000 = cost.CLUSTERS["A100-80"], cost.CLUSTERS["A6000"]


def test_a_ring_inside_a_machine_and_between_two():
    """7 of 8 parts of 8 GB over 240 GB/s; and between two machines half of each GPU's 1 GB over its own 20 GB/s."""
    inside = 7 * 2e-6 + 7 / 8 * 8e9 / 240e9
    assert cost.ring(8e9, 8, A100) == pytest.approx(inside)
    assert cost.ring(8e9, 16, A100) == pytest.approx(inside + 5e-6 + 0.5 * 1e9 / 20e9)
    assert cost.ring(8e9, 1, A100) == 0
    # one adapter for eight GPUs
    assert cost.ring(8e9, 16, A6000) > 7 / 8 * 8e9 / 18.9e9 + 0.5 * 8e9 / 20e9


def test_memory_of_a_gpu():
    recipe = load("smaug", "base")
    counted = cost.parts(recipe, cost.Load(32))
    weights = cost.total(counted.values()).weights
    jobs = cost.Job(8), cost.Job(8, shard=True), cost.Job(8, checkpoint_blocks=True)
    whole, part, again = (cost.memory(counted, job) for job in jobs)
    assert whole["weights"] + whole["gradients"] + whole["moments"] == 16 * weights
    assert part["moments"] == whole["moments"] / 8 and part["activations"] == whole["activations"]
    assert 4 * weights > part["gathered"] > 0
    assert again["activations"] < 0.3 * whole["activations"] and again["weights"] == whole["weights"]
    twice = cost.memory(cost.parts(recipe, cost.Load(64)), cost.Job(8))["activations"]
    copies = 2 * weights  # do not grow with the batch, as bf16 copies of matrices
    assert 2 * whole["activations"] - copies < twice < 2 * whole["activations"]


def test_where_scaling_stops():
    """128 pairs a GPU hide all collectives; a batch of 1,024 on 128 GPUs with one adapter a machine waits for them;
    decoding stops what computes faster; small batches wait for the host."""
    recipe = load("smaug", "base")

    def found(pairs, gpus, cluster, **more):
        load = cost.Load(pairs, world=gpus)
        return cost.step_time(cost.parts(recipe, load), load, cost.Job(gpus), cluster, **more)

    alone, many = found(128, 1, A100), found(128, 128, A100)
    assert many.limit == "compute" and many.step < 1.01 * alone.step
    assert alone.gather == alone.reduce == 0
    assert found(8, 128, A6000).limit == "collectives"
    assert found(128, 8, A100, clips=cost.RAW, efficiency=0.43).limit == "decoding"
    assert found(128, 8, A100, clips=cost.Clips("huge", 1e9, 0.0)).limit == "storage"
    slow, counted = found(1, 1, A100, launch=1e-3), cost.parts(recipe, cost.Load(1))
    adamw = cost.computing(counted, A100.device, cost.Job())[2]  # waits for the host, too
    assert slow.compute == pytest.approx(1e-3 * cost.total(counted.values()).launches + adamw)


@pytest.mark.parametrize("kind", ["A6000", "H100"])
def test_a_faster_gpu_is_never_slower(kind):
    """8 pairs on each of 128: the host is the limit, and gradients hide behind a backward that waits for it."""
    recipe, load_of_one = load("smaug", "base"), cost.Load(8, world=128)
    counted = cost.parts(recipe, load_of_one)
    steps = [
        cost.step_time(counted, load_of_one, cost.Job(128), cost.CLUSTERS[kind], efficiency=share).step
        for share in (0.05, 0.1, 0.2, 0.25, 0.43, 1.0)
    ]
    assert steps == sorted(steps, reverse=True) and steps[0] > steps[-1]


def test_what_travels():
    """4 bytes a weight: an all-reduce; or two all-gathers, of what runs in two pieces twice, and a reduce-scatter."""
    counted = cost.parts(load("smaug", "base"), cost.Load(16, world=8))
    weights = cost.total(counted.values()).weights
    assert cost.collectives(counted, cost.Load(16), cost.Job(1)) == {}
    ddp, fsdp = (cost.collectives(counted, cost.Load(16), cost.Job(8, shard=s), 128) for s in (False, True))
    assert ddp["gradients"].bytes == fsdp["gradients"].bytes == 4 * weights
    assert ddp["features"].bytes == 8 * 16 * (2 * 128 * 4 + 16)
    assert ddp["gradients"].seconds(8, A100) == 2 * ddp["gradients"].count * cost.ring(cost.BUCKET, 8, A100)
    pruned_and_fused = sum(w.weights for n, w in counted.items() if n in PIECES)
    assert fsdp["weights, forward"].bytes == 4 * (weights + pruned_and_fused) and len(PIECES) == 6
    # counted on one process at tiny: 11 gathers in the forward for 8 blocks, one pruned, one of the fusion encoder
    tiny = cost.parts(load("smaug"), cost.Load(16))
    assert cost.collectives(tiny, cost.Load(16), cost.Job(2, shard=True))["weights, forward"].count == 11


PIECES = [f"video block {n}" for n in (3, 6, 9)] + [f"fusion block {n}" for n in range(3)]


def test_fsdp_moves_more_than_ddp_and_needs_less_memory():
    load_of_one = cost.Load(8, world=64)
    counted = cost.parts(load("smaug", "large"), load_of_one)
    ddp, fsdp = (cost.step_time(counted, load_of_one, cost.Job(64, shard=shard), A6000) for shard in (False, True))
    assert fsdp.gather > ddp.gather and fsdp.compute < ddp.compute  # the optimiser has a 64th of the work
    assert fsdp.step > ddp.step


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "mac"])
def test_peak_memory_with_blocks_computed_again(name):
    """Measured peaks also hold what the backward works with, and the gradients that are there by then."""
    recipe = changed(load(name), {"depth": 8})
    batch = batch_of(recipe, 32, device="cpu")
    counted = cost.parts(recipe, load_of(batch), vocabulary=VOCABULARY, precision=cost.FP32)
    for again in (False, True):
        model = build(recipe, VOCABULARY, "auto")
        if again:
            checkpoint_blocks(model)
        training_step(model, recipe, batch)[0].backward()
        model.zero_grad()
        peak = peak_memory(lambda model=model: training_step(model, recipe, batch)[0].backward(), torch.device("cpu"))
        predicted = cost.memory(counted, cost.Job(checkpoint_blocks=again))["activations"]
        assert 0.95 * predicted < peak < 1.15 * predicted + 4 * cost.total(counted.values()).weights


def test_blocks_computed_again_cost_a_forward():
    counted = cost.parts(load("smaug", "base"), cost.Load(128))
    (forward, backward, optimiser), (_, again, same) = (
        cost.computing(counted, A100.device, cost.Job(checkpoint_blocks=on)) for on in (False, True)
    )
    assert 0.9 * forward < again - backward < forward and optimiser == same > 0


def test_a_contrast_in_parts_holds_less():
    pairs, world = 256, 128
    whole = 16 * pairs * pairs * world  # as in one piece
    assert cost.contrast(pairs, world, 128, 8192).saved < 0.5 * whole + 8 * pairs * world * 128
    assert cost.contrast(pairs, 1, 128, 8192).flops == 2 * pairs * pairs * 128


def test_tokens_of_a_frame_by_hand():
    """Half of 196 patches are seen; at blocks 3, 6 and 9 of 12, 70 % of them stay, rounded up, and one token for those
    that leave. Warmed up; before, all stay; and at the end nothing is masked. What a block does is behind it."""
    recipe = changed(load("smaug", "base"), unmask_last=0.1)
    seen = cost.video_tokens(recipe, recipe.optim.steps // 2)
    assert seen == cost.video_tokens(recipe) and (seen.sequences, seen.masked) == (4, 98)
    assert list(seen.rows) == [99] * 4 + [1 + 69 + 1] * 3 + [1 + 49 + 2] * 3 + [1 + 35 + 3] * 3
    assert cost.video_tokens(recipe, 0).rows == (99,) * 13
    unmasked = cost.video_tokens(recipe, recipe.optim.steps - 1, frames=1)
    assert (unmasked.sequences, unmasked.masked) == (1, 0)
    assert unmasked.patches[::4] == (196, 138, 97, 68)
    clip = cost.video_tokens(
        changed(recipe, {"attend": "clip", "depth": 3, "prune": PruneConfig((0, 2), keep=0.5, fuse="none")})
    )
    assert clip.rows == (1 + 4 * 98, 1 + 196, 1 + 196, 1 + 98) and (clip.sequences, clip.masked) == (1, 392)


def test_steps_that_are_alike_are_counted_once():
    """30 % of them warm up, one by one, and in the last tenth nothing is masked."""
    recipe = changed(load("smaug", "base"), unmask_last=0.1)
    found = cost.stages(recipe, cost.Load(8))
    assert [share for share, *_ in found] == [0.05] * 6 + [0.6, 0.1]
    every = [cost.total(cost.parts(recipe, each).values()).flops for each in cost.schedule(recipe, cost.Load(8))]
    mean = sum(stage.share * cost.total(stage.counted.values()).flops for stage in found)
    assert mean == pytest.approx(sum(every) / len(every))
    assert [stage.share for stage in cost.stages(recipe, cost.Load(8), steps=60)] == [0.05] * 20


def test_a_run_costs_more_while_pruning_warms_up():
    recipe = load("smaug", "base")
    flops = [cost.total(cost.parts(recipe, each).values()).step_flops for each in cost.schedule(recipe, cost.Load(8))]
    assert flops == sorted(flops, reverse=True) and flops[0] > 1.3 * flops[-1]


def test_tables_of_the_page_are_those_of_the_model():
    """docs/scaling.md cannot drift from smaug/cost.py; `python -m benchmarks.scaling` renews it."""
    page, found = scaling.PAGE.read_text(), scaling.tables()
    assert scaling.renewed(page, found) == page
    measured = {"machines", "published", "rates"}
    for name, table in found.items():
        headers = [block.splitlines()[0] for block in table.split("\n\n") if block.startswith("|")]
        assert headers and (name in measured or all("prediction" in header for header in headers)), name
    with pytest.raises(ValueError, match="needs one '<!-- table parts -->'"):
        scaling.renewed("nothing", found)


def test_what_cannot_be():
    for wrong in ({"pairs": 0}, {"pairs": 8, "words": 0.5}, {"pairs": 8, "world": 0}):
        with pytest.raises(ValueError, match="at least one pair, one word and one process"):
            cost.Load(**wrong)
    with pytest.raises(ValueError, match="at least one GPU, not 0"):
        cost.Job(0)
    with pytest.raises(ValueError, match="3 frames do not fill tubelets of 4"):
        cost.parts(SMAUG, cost.Load(8, frames=3))
    with pytest.raises(ValueError, match="attend='frame' needs 'even' or 'tube'"):
        cost.parts(changed(SMAUG, video_mask=VideoMask(0.35, "random")), cost.Load(1))


@pytest.mark.parametrize(
    ("said", "means"),
    [
        ("a6000", "A6000"), ("a100", "A100-80"), ("4090", "4090"), ("h100", "H100"), ("l40s", "L40S"), ("B200", "B200"),
        ("NVIDIA GeForce RTX 4090", "4090"), ("NVIDIA A100-SXM4-40GB", "A100-40"), ("h100 pcie", "H100 PCIe"),
    ],
)  # fmt: skip
def test_a_device_is_found_by_its_name(said, means):
    assert cost.find_device(said) is cost.DEVICES[means]


def test_a_device_that_is_not_known():
    with pytest.raises(ValueError, match=r"no GPU 'a600' in the table.*did you mean 'a6000'.* It knows A6000, 3090"):
        cost.find_device("a600")
    with pytest.raises(ValueError, match=r"no GPU '' in the table of smaug.cost. It knows"):
        cost.find_device("")
    # others have no such rate, though their names look alike
    assert all(cost.of_gpu(f"NVIDIA {n}") is None for n in ("GH200 480GB", "RTX 6000 Ada Generation", "RTX A6000 x"))


@pytest.mark.parametrize("name", names())
def test_the_dense_baseline_leaves_nothing_out(name):
    recipe = cost.dense(load(name, "base"))
    seen, video = cost.video_tokens(recipe), recipe.model.video
    assert seen.masked == 0 and seen.sequences * seen.patches[-1] == video.times(video.frames) * video.patches
    assert len(set(seen.rows)) == 1 and len(seen.rows) == video.depth + 1
    assert all(view.words == 12 for view in cost._views(recipe, cost.Load(8)).values())
    assert not any("selector" in part or "mvm" in part for part in cost.parts(recipe, cost.Load(8)))
    assert cost.dense(recipe) == recipe


@pytest.mark.parametrize("threads", scaling.THREADS)
def test_steps_that_were_measured_on_this_cpu(threads):
    """Of numbers of one day that are kept; so a change of the model cannot spoil it unseen."""
    found = scaling.points(threads)
    assert len(found) >= 12 and len({point.row["configuration"].split(",")[0] for point in found}) == 7
    assert scaling.median_error(found) <= scaling.BAND
    assert max(abs(point.error) for point in found) <= 0.3


def test_between_two_sizes():
    assert cost.between(48, (16, 144)) == pytest.approx({16: 0.5, 144: 0.5})
    assert cost.between(1, (8, 16, 32)) == {8: 1, 16: 0} and cost.between(99, (8, 16, 32)) == {16: 0, 32: 1}


WAY = device.choose(True, "cpu")


def test_a_calibration_tells_every_rate_that_a_step_needs():
    told = {piece.tells for piece in calibration.pieces(WAY)} | {"adamw"}
    for name in names():
        for size in ("tiny", "large"):
            counted = cost.total(cost.parts(load(name, size), cost.Load(4)).values())
            assert cost.amounts(counted).keys() <= told
    assert all(cost.amounts(piece.work)[piece.tells] > 0 for piece in calibration.pieces(WAY))


def test_a_short_calibration():
    """Twice the work takes twice the time, but for what a call costs."""
    found = cost.calibrate(WAY, seconds=0.1)
    assert all(there >= 0 and back >= 0 for there, back in found.rates.values())
    assert 1e-7 < sum(found.rates["launch"]) < 1e-2 and found.rates["product 384"][0] > 0
    one, two = (
        sum(cost.computing(cost.parts(SMAUG, cost.Load(pairs), precision=cost.BF16_CPU), found, cost.Job()))
        for pairs in (64, 128)
    )
    assert one < two < 2.1 * one


def test_a_calibrated_device_does_one_thing_after_the_other():
    rates = {"norm": (1.0, 2.0), "launch": (10.0, 0.0), "moved": (0.0, 0.5)}
    work = cost.norm(3, 5, cost.FP32) + cost.Work(bytes=4, backward_bytes=6)
    assert cost.calibrated(work, rates) == (15 + 20, 30 + 5)
    slow = dataclasses.replace(cost.DEVICES["A6000"], rates={"adamw": (0.0, 1.0), **rates})
    counted = {"block": dataclasses.replace(work, enters=1.0), "optimiser": cost.Work(amounts={"adamw": 7.0})}
    assert cost.computing(counted, slow, cost.Job()) == (35, 35, 7)
    assert cost.computing(counted, slow, cost.Job(checkpoint_blocks=True)) == (35, 70, 7)
