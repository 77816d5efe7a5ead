"""qa: fine-tuning for open-ended questions, such as MSRVTT-QA, MSVD-QA and ActivityNet-QA; for the embedded set too.

By a class for each answer of a closed list (ALPRO, Li et al. 2022: the 1,500 most frequent answers of MSRVTT-QA), or by
a decoder that spells answers and ranks the list (Singularity, Lei et al. 2023: `--objectives.answer.by decoder`, the
decoder as deep as the fusion encoder and started from it). Rates are ours.

    python -m smaug.train qa --init runs/NAME --fast
    python -m smaug.train qa --init runs/NAME --data.format msrvtt_qa --data.manifest train_qa.json \\
        --data.root videos --data.eval-manifest test_qa.json --fast
"""

from __future__ import annotations

from dataclasses import replace

from smaug.data.clips import DataConfig
from smaug.masks import TextMask, VideoMask
from smaug.model.fusion import FusionConfig
from smaug.model.model import SIZES
from smaug.objectives.answer import Answer
from smaug.optim import OptimConfig
from smaug.recipe import Recipe


def recipe(size: str = "tiny") -> Recipe:
    model = SIZES[size]
    frames = (2 if size == "tiny" else 4) * model.video.tubelet
    video = replace(model.video, attend="frame", tubes="spread", frames=frames, temporal_layers=1)
    fusion = FusionConfig(depth=1 if size == "tiny" else 3, heads=model.text.heads)
    return Recipe(
        name="qa",
        task="qa",
        model=replace(model, video=video, fusion=fusion),
        video_mask=VideoMask(ratio=0.0, kind="even"),
        text_mask=TextMask(ratio=0.0),
        objectives={"answer": Answer(decoder=fusion)},
        data=DataConfig(batch=128 if size == "tiny" else 64),
        optim=OptimConfig(lr=5e-4 if size == "tiny" else 1e-5, steps=1200),
    )
