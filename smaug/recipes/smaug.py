"""SMAUG: both sides masked, unimportant patches pruned in the encoder, unimportant frames after it.

Lin et al., ICCV 2023, arXiv 2211.11446.

Published: a masked autoencoder on both modalities; patches pruned inside the image encoder, frame by frame; a
text-guided frame selector on visual and textual features; pixels of masked patches as the target; at least 1.9x less
pre-training cost, about 50 A6000 GPU-hours. Everything else here is ours, since the ratios, blocks, rates and the
selector's form are not in public text; docs/method.md tells how they were chosen.

    python -m smaug.train smaug --fast
"""

from __future__ import annotations

from dataclasses import replace

from smaug.data.clips import DataConfig
from smaug.masks import TextMask, VideoMask
from smaug.model.decoder import DecoderConfig
from smaug.model.frame_selector import FrameSelectorConfig
from smaug.model.fusion import FusionConfig
from smaug.model.model import SIZES
from smaug.model.video_encoder import PruneConfig
from smaug.objectives.mlm import Mlm
from smaug.objectives.mvm import Mvm
from smaug.objectives.vtc import Vtc
from smaug.objectives.vtm import Vtm
from smaug.optim import OptimConfig
from smaug.recipe import Recipe


def recipe(size: str = "tiny") -> Recipe:
    model = SIZES[size]
    video = replace(
        model.video,
        attend="frame",
        tubes="spread",
        frames=(2 if size == "tiny" else 4) * model.video.tubelet,
        temporal_layers=1,
        # Three blocks have no room for EViT's places and 0.7; docs/method.md has the sweep.
        prune=PruneConfig(blocks=(0,), keep=0.3, warmup=0.05) if size == "tiny" else PruneConfig(blocks=(3, 6, 9)),
    )
    return Recipe(
        name="smaug",
        model=replace(
            model,
            video=video,
            fusion=FusionConfig(depth=1 if size == "tiny" else 3, heads=model.text.heads),
            # Off at tiny: two moments that span a clip are nearly alike, and a random one does as well as a chosen one.
            selector=FrameSelectorConfig(keep=0 if size == "tiny" else 2),
        ),
        video_mask=VideoMask(ratio=0.5, kind="even"),
        text_mask=TextMask(ratio=0.0),
        objectives={"vtc": Vtc(), "vtm": Vtm(), "mlm": Mlm(), "mvm": Mvm(decoder=DecoderConfig(share=0.25))},
        data=DataConfig(batch=128),
        optim=OptimConfig(lr=1e-3, steps=600),
        eval_top=16 if size == "tiny" else 128,
    )
