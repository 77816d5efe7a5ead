"""mc: fine-tuning for multiple choice, such as TGIF's action and transition questions; for the embedded set too.

The match head of pre-training scores each option with the clip; cross-entropy compares the scores, as LAVENDER does
(Li et al. 2023). MSRVTT-MC has no training split: there a retrieval model is evaluated as it is, by
`python -m smaug.evaluate RUN --task mc`. Rates are ours.

    python -m smaug.train mc --init runs/NAME --fast
    python -m smaug.train mc --init runs/NAME --data.format tgif_qa --data.manifest Train_action_question.csv --fast
"""

from __future__ import annotations

from dataclasses import replace

from smaug.data.clips import DataConfig
from smaug.masks import TextMask, VideoMask
from smaug.model.fusion import FusionConfig
from smaug.model.model import SIZES
from smaug.objectives.mc import Mc
from smaug.optim import OptimConfig
from smaug.recipe import Recipe


def recipe(size: str = "tiny") -> Recipe:
    model = SIZES[size]
    frames = (2 if size == "tiny" else 4) * model.video.tubelet
    video = replace(model.video, attend="frame", tubes="spread", frames=frames, temporal_layers=1)
    return Recipe(
        name="mc",
        task="mc",
        model=replace(
            model, video=video, fusion=FusionConfig(depth=1 if size == "tiny" else 3, heads=model.text.heads)
        ),
        video_mask=VideoMask(ratio=0.0, kind="even"),
        text_mask=TextMask(ratio=0.0),
        objectives={"vtm": Mc()},
        data=DataConfig(batch=64),
        optim=OptimConfig(lr=5e-4 if size == "tiny" else 1e-5, steps=1500),
    )
