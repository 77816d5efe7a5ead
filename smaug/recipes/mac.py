"""MAC: mask both sides, then align (Shu et al. 2022, arXiv 2212.00986).

A random part of the patches and of the words is left out, the visible rest goes through two encoders, and contrast
alone trains them: no reconstruction, no fusion encoder.

Published: random masks on both sides, visible patches only, joint space-time attention with one [CLS], separate tables
for place and time, contrast as the only loss, four frames. Ours: the mask ratios (not in public text), leaving masked
words out instead of replacing them by [MASK] (`--text-mask.kind mask` does that), all sizes but `base`, the schedule.

    python -m smaug.train mac --fast
"""

from __future__ import annotations

from smaug.masks import TextMask, VideoMask
from smaug.model.model import SIZES
from smaug.objectives.vtc import Vtc
from smaug.recipe import Recipe


def recipe(size: str = "tiny") -> Recipe:
    return Recipe(
        name="mac",
        model=SIZES[size],
        video_mask=VideoMask(ratio=0.6),
        text_mask=TextMask(ratio=0.15),
        objectives={"vtc": Vtc()},
    )
