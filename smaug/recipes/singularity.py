"""Singularity: train on a single frame, test on many (Lei et al., ACL 2023, arXiv 2206.03428).

Published: one random frame in training, cross-attention from text to frame, vtc + vtm + mlm with unit weights, mlm rate
0.5, at test the frames' tokens concatenated for fusion and averaged for the contrast. Ours: sizes but `base`, schedule,
random initial weights, and `tubelet=1`, since a single frame has no motion to embed.

    python -m smaug.train singularity --fast
"""

from __future__ import annotations

from dataclasses import replace

from smaug.data.clips import DataConfig
from smaug.masks import TextMask, VideoMask
from smaug.model.fusion import FusionConfig
from smaug.model.model import SIZES
from smaug.objectives.mlm import Mlm
from smaug.objectives.vtc import Vtc
from smaug.objectives.vtm import Vtm
from smaug.optim import OptimConfig
from smaug.recipe import Recipe


def recipe(size: str = "tiny") -> Recipe:
    model = SIZES[size]
    video = replace(model.video, attend="frame", tubelet=1, frames=1)
    fusion = FusionConfig(depth=1 if size == "tiny" else 3, heads=model.text.heads)
    return Recipe(
        name="singularity",
        model=replace(model, video=video, fusion=fusion),
        video_mask=VideoMask(ratio=0.0, kind="even"),
        text_mask=TextMask(ratio=0.0),
        objectives={"vtc": Vtc(), "vtm": Vtm(), "mlm": Mlm()},
        eval_frames=4,
        data=DataConfig(batch=128),
        optim=OptimConfig(lr=1e-3, steps=600),
        eval_top=16 if size == "tiny" else 128,
    )
