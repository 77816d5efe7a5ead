"""A whole training step of recipe mac at size tiny: forward, backward, AdamW.

    pytest benchmarks/bench_train_step.py --benchmark-only

`fast` and `reference` are our two ways in one precision. `plain_masked` is what one would write in PyTorch: the kept
patches gathered, nn.TransformerEncoder, captions padded. `plain_dense` is the same with nothing masked: what a step
costs without the method.
"""

import dataclasses

import pytest
import torch
from torch import nn

from smaug.data.loader import Batch, VisualGroup
from smaug.data.text import pack
from smaug.masks import VideoMask
from smaug.model.video_encoder import EncodedVideo
from smaug.objectives.seen import Seen
from smaug.optim import adamw
from smaug.recipe import load
from smaug.run import build
from smaug.step import positives, training_step

B, VOCABULARY = 32, 200


def batch_of(recipe, device):
    """Noise in the shapes of the embedded data set; time does not depend on what is seen."""
    generator = torch.Generator().manual_seed(0)
    video = recipe.model.video
    clips = torch.randint(
        0, 256, (B, video.frames, video.image_size, video.image_size, 3), dtype=torch.uint8, generator=generator
    )
    lengths = torch.randint(6, 14, (B,), generator=generator).tolist()
    captions = [torch.randint(5, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    words = pack(captions, 2)
    return Batch(
        (VisualGroup(clips, torch.arange(B)),), words=words, contrast=words, masked=None,
        masked_rows=torch.arange(0), masked_labels=torch.arange(0), masked_counts=(), video_keys=torch.arange(B),
        caption_keys=torch.arange(B), epoch=0, step=0, names=("",) * B,
    ).to(device)  # fmt: skip


class Plain(nn.Module):
    """The same two encoders and heads of PyTorch's own parts."""

    def __init__(self, recipe):
        super().__init__()
        self.recipe = recipe
        video, text = recipe.model.video, recipe.model.text
        tube = (video.tubelet, video.patch, video.patch)
        self.embed = nn.Conv3d(3, video.width, tube, tube)
        self.place = nn.Parameter(torch.randn(video.times(video.frames) * video.patches, video.width) * 0.02)
        self.cls = nn.Parameter(torch.randn(1, 1, video.width) * 0.02)
        self.word = nn.Embedding(VOCABULARY, text.width)
        self.position = nn.Parameter(torch.randn(text.max_words, text.width) * 0.02)
        self.video, self.text = (
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(
                    c.width, c.heads, int(c.mlp_ratio * c.width), 0.0, "gelu", batch_first=True, norm_first=True
                ),
                c.depth, nn.LayerNorm(c.width), enable_nested_tensor=False,
            )
            for c in (video, text)
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: o.heads(recipe.model, VOCABULARY) for name, o in recipe.objectives.items()})

    def forward(self, batch):
        (group,) = batch.groups
        config = self.recipe.model.video
        mean, std = (torch.tensor(s, device=group.video.device)[:, None, None, None] for s in (config.mean, config.std))
        x = self.embed((group.video.permute(0, 4, 1, 2, 3) / 255 - mean) / std).flatten(2).transpose(1, 2) + self.place
        ids, _ = self.recipe.video_mask.draw(
            group.samples, config.grid(group.video.shape[1]), seed=0, epoch=0, impl="auto"
        )
        x = x.gather(1, ids.long()[..., None].expand(-1, -1, x.shape[2]))
        x = self.video(torch.cat([self.cls.expand(len(x), -1, -1).to(x.dtype), x], 1))
        numbers, mask = batch.words.to_padded()
        places, _ = batch.words.with_values(batch.words.ids).to_padded()
        y = self.text(self.word(numbers) + self.position[places.long()], src_key_padding_mask=~mask)
        video = EncodedVideo(x[:, 0], *[None] * 5)  # the contrast asks for no more
        seen = Seen(video, y[:, 0], positives(batch), [], None, None, 0, 0)
        return sum(o.weight * o(self.heads[name], seen) for name, o in self.recipe.objectives.items())


@pytest.mark.parametrize("provider", ["fast", "reference", "plain_masked", "plain_dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_train_step(timed, device, dtype, provider):
    recipe = load("mac")
    batch = batch_of(recipe, device)
    torch.manual_seed(0)
    if provider == "plain_dense":
        recipe = dataclasses.replace(recipe, video_mask=VideoMask(0.0))
    if provider.startswith("plain"):
        model = Plain(recipe).to(device)
    else:
        model = build(recipe, VOCABULARY, "auto" if provider == "fast" else "reference").to(device)
    optimizer = adamw(model, recipe.optim)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(batch) if provider.startswith("plain") else training_step(model, recipe, batch)[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    video = recipe.model.video
    times = video.times(video.frames)
    kept = recipe.video_mask.keep(times, video.patches)
    shape = f"{B} pairs, {kept} of {times * video.patches} tokens kept, width {video.width}, {video.depth} blocks"
    timed(step, shape, dtype, rounds=8)
