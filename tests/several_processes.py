"""What each process does in tests/test_distributed.py: `torchrun ... several_processes.py OUT RECIPE HOW...`.

The first writes, by HOW, the losses of a few steps, the gradients of the first and the weights after the last.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from smaug import distributed
from smaug.blocks import checkpoint_blocks, compile_blocks
from smaug.micro_batches import backward_in_parts
from smaug.model.fusion import FusionBlock
from smaug.model.layers import Block
from smaug.optim import Update
from smaug.run import open_loader
from smaug.step import Step
from tests.test_step import made, model_of

STEPS, AMONG = 3, 4  # pairs among which negatives are drawn, whatever the number of processes


def setting(name):
    """Recipe, loader and tokenizer, the same in the processes and in the test; with all that an update can do."""
    recipe, loader, tokenizer = made(name)
    if "vtm" in recipe.objectives and recipe.task == "retrieval":
        vtm = dataclasses.replace(recipe.objectives["vtm"], among=AMONG)
        recipe = dataclasses.replace(recipe, objectives=recipe.objectives | {"vtm": vtm})
    optim = dataclasses.replace(recipe.optim, clip=0.5, ema=0.5, warmup=0.0)
    return dataclasses.replace(recipe, optim=optim), loader, tokenizer


def steps(recipe, loader, tokenizer, how):
    """-> losses, gradients of the first step, weights and their means after the last."""
    model = model_of(recipe, tokenizer, "auto")
    if "compiled" in how:
        compile_blocks(model, "eager")
    if "recomputed" in how:
        checkpoint_blocks(model)
    step = Step(model, recipe)
    engine = step
    if "ddp" in how:
        engine = distributed.replicate(step, torch.device("cpu"), unused=False)
    if "fsdp" in how:
        distributed.shard(step, (Block, FusionBlock))
    update, losses, gradients = Update(model, recipe.optim), [], {}
    for number in range(STEPS):
        batch = dataclasses.replace(loader.batch(number), step=number + 1)  # from step 1 on patches are pruned
        if "parts" in how:
            loss, _ = backward_in_parts(step, batch, 3)
            if "ddp" in how:
                distributed.average_gradients(update.parameters)
        else:
            loss, _ = engine(batch)
            loss.backward()
        losses.append((distributed.total(loss) / distributed.ranks()).item())
        if number == 0:
            gradients = {
                k: distributed.whole(p.grad).clone() for k, p in model.named_parameters() if p.grad is not None
            }
        update(number)
    weights = {k: distributed.whole(p.detach()).contiguous() for k, p in model.named_parameters()}
    means = {k: distributed.whole(x).contiguous() for k, x in update.ema.items()}
    return losses, gradients, weights, means


def main():
    out, name, *ways = sys.argv[1:]
    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"), minutes=2)
    recipe, alone, tokenizer = setting(name)
    loader = open_loader(recipe, alone.clips, tokenizer, distributed.rank(), distributed.ranks())
    for how in ways:
        losses, *tensors = steps(recipe, loader, tokenizer, how)
        if distributed.rank() == 0:
            (Path(out) / f"{how}.json").write_text(json.dumps(losses))
            for what, values in zip(("gradients", "weights", "means"), tensors, strict=True):
                save_file(values, Path(out) / f"{how} {what}.safetensors")
    distributed.leave(0)


if __name__ == "__main__":
    main()
