"""dense: the baseline. SMAUG's encoder with nothing masked but mlm's words, nothing pruned, every frame fused.

Ours, as the yardstick of the time-to-result benchmark: the same sizes, speed path and optimiser, and four moments
of a clip. SMAUG's own recipe has as many, but two at tiny.

    python -m smaug.train dense --fast
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
    video = replace(model.video, attend="frame", tubes="spread", frames=4 * model.video.tubelet, temporal_layers=1)
    fusion = FusionConfig(depth=1 if size == "tiny" else 3, heads=model.text.heads)
    return Recipe(
        name="dense",
        model=replace(model, video=video, fusion=fusion),
        video_mask=VideoMask(ratio=0.0, kind="even"),
        text_mask=TextMask(ratio=0.0),
        objectives={"vtc": Vtc(), "vtm": Vtm(), "mlm": Mlm()},
        data=DataConfig(batch=128),
        optim=OptimConfig(lr=1e-3, steps=600),
        eval_top=16 if size == "tiny" else 128,
    )
