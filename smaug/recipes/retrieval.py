"""retrieval: fine-tuning for text-to-video and video-to-text retrieval: MSR-VTT, DiDeMo, ActivityNet Captions, MSVD.

Singularity's (Lei et al. 2023, appendix and code): vtc and vtm without mlm, nothing masked, learning rate 1e-5, the
best 128 of the dual encoder ranked again; 12 frames at test (ActivityNet: 32, `--eval-frames 32`). DiDeMo and
ActivityNet are paragraphs: `--model.text.max-words 64` and 150.

    python -m smaug.train retrieval --init runs/NAME --data.format msrvtt --data.manifest MSRVTT_data.json \\
        MSRVTT_train.9k.csv --data.root videos --data.eval-manifest MSRVTT_JSFUSION_test.csv --fast
"""

from __future__ import annotations

from dataclasses import replace

from smaug.data.clips import DataConfig
from smaug.masks import TextMask, VideoMask
from smaug.model.fusion import FusionConfig
from smaug.model.model import SIZES
from smaug.objectives.vtc import Vtc
from smaug.objectives.vtm import Vtm
from smaug.optim import OptimConfig
from smaug.recipe import Recipe


def recipe(size: str = "tiny") -> Recipe:
    model = SIZES[size]
    frames = (2 if size == "tiny" else 4) * model.video.tubelet
    video = replace(model.video, attend="frame", tubes="spread", frames=frames, temporal_layers=1)
    return Recipe(
        name="retrieval",
        model=replace(
            model, video=video, fusion=FusionConfig(depth=1 if size == "tiny" else 3, heads=model.text.heads)
        ),
        video_mask=VideoMask(ratio=0.0, kind="even"),
        text_mask=TextMask(ratio=0.0),
        objectives={"vtc": Vtc(), "vtm": Vtm()},
        data=DataConfig(batch=128 if size == "tiny" else 32),
        optim=OptimConfig(lr=5e-4 if size == "tiny" else 1e-5, steps=600),
        eval_frames=0 if size == "tiny" else 12,
        eval_top=16 if size == "tiny" else 128,
    )
