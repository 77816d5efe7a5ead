"""Published results with a stated cost: points to hold a run against, each with where it was read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """Scores after fine-tuning, and what the pre-training before it cost on the authors' own devices."""

    system: str
    pairs: str  # what it was pre-trained on
    hours: float  # device-hours
    device: str
    cost: str  # as published, and what was made of it
    label: str  # of the hours: "published", or "derived from published" (days and devices, multiplied)
    source: str
    scores: dict[str, float]  # fractions; of retrieval text-to-video R@1, of questions accuracy; {}: not at hand


# Scores were read in the repositories' own tables. Weights that training began from (BEiT, BERT) are in no one's hours.
PUBLISHED = (
    Published(
        "SMAUG", "not known", 50, "A6000", "about 50 GPU-hours", "published", "https://arxiv.org/abs/2211.11446", {}
    ),
    Published(
        "Singularity 5M", "5 M", 72, "A100", "about 1 day on 3 GPUs", "derived from published",
        "https://github.com/jayleicn/singularity",
        {"MSR-VTT": 0.368, "DiDeMo": 0.474, "ActivityNet": 0.430, "MSRVTT-QA": 0.427, "ActivityNet-QA": 0.418,
         "MSRVTT-MC": 0.920},
    ),
    Published(
        "VindLU 5M", "5 M", 360, "V100", "15 GPU-days", "derived from published",
        "https://github.com/klauscc/VindLU",
        {"MSR-VTT": 0.438, "DiDeMo": 0.546, "ActivityNet": 0.511, "MSRVTT-QA": 0.436, "ActivityNet-QA": 0.442,
         "MSRVTT-MC": 0.952},
    ),
    Published(
        "VindLU 25M", "25 M", 1968, "V100", "82 GPU-days", "derived from published",
        "https://github.com/klauscc/VindLU",
        {"MSR-VTT": 0.465, "DiDeMo": 0.612, "ActivityNet": 0.550, "MSRVTT-QA": 0.446, "ActivityNet-QA": 0.447,
         "MSRVTT-MC": 0.971},
    ),
    Published(
        "UMT-B 25M, stage 2", "25 M", 768, "A100", "24 hours on 32 GPUs; stage 1 comes on top and is not stated",
        "derived from published", "https://github.com/OpenGVLab/unmasked_teacher/issues/35",
        {"MSR-VTT": 0.510, "DiDeMo": 0.616, "ActivityNet": 0.583, "MSRVTT-QA": 0.449, "ActivityNet-QA": 0.448,
         "MSRVTT-MC": 0.963},
    ),
    Published(
        "UMT-L 25M", "25 M", 4608, "A100", "6 days on 32 GPUs, all stages", "derived from published",
        "https://github.com/OpenGVLab/unmasked_teacher",
        {"MSR-VTT": 0.588, "DiDeMo": 0.704, "ActivityNet": 0.668, "MSRVTT-QA": 0.471, "ActivityNet-QA": 0.479,
         "MSRVTT-MC": 0.973},
    ),
)  # fmt: skip
# What smaug.data calls these data sets (--data.format).
NAMES = {
    "msrvtt": "MSR-VTT", "didemo": "DiDeMo", "activitynet": "ActivityNet", "msrvtt_qa": "MSRVTT-QA",
    "activitynet_qa": "ActivityNet-QA", "msrvtt_mc": "MSRVTT-MC",
}  # fmt: skip
