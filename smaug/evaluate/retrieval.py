"""Retrieval with the dual encoder: every caption against every clip. Nothing is masked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils._pytree import tree_map_only

from smaug.data import text
from smaug.data.clips import Clips, check_share
from smaug.data.loader import middle_frames
from smaug.data.manifest import Skip
from smaug.metrics import recalls, retrieval_ranks
from smaug.model.model import Model
from smaug.objectives.vtc import VtcHeads

CANDIDATES = 500  # at most this many clips, the first of the set
BATCH = 100  # fixed, so that a score does not depend on the machine's memory


@dataclass(frozen=True)
class Retrieval:
    """`scores`: recalls by name as fractions, and how many candidates there were; `skipped`: clips left out."""

    scores: dict[str, float]
    skipped: list[Skip]


@torch.no_grad()
def retrieval(
    model: Model, clips: Clips, tokenizer: Tokenizer, *, frames: int, max_bad: float, shuffle: bool = False
) -> Retrieval:
    """t2v_r1 ... v2t_medr of the first 500 clips, and t2v_r1_{subset} for each subset among all candidates.

    The video side is one vector a clip, from `frames` middle frames, in shuffled order with `shuffle`.
    """
    heads = model.heads["vtc"]
    if not isinstance(heads, VtcHeads):
        raise ValueError("retrieval needs the vtc objective; this model was trained without it")
    device = next(model.parameters()).device
    videos: list[Tensor] = []
    numbers: list[int] = []
    skipped: list[Skip] = []
    total = min(CANDIDATES, len(clips))
    for start in range(0, total, BATCH):
        groups, bad = middle_frames(clips, range(start, min(start + BATCH, total)), frames, shuffle=shuffle)
        skipped += bad
        check_share(skipped, total, max_bad)
        for group in groups:
            everything = torch.arange(math.prod(model.video.config.grid(group.video.shape[1])), dtype=torch.int32)
            ids = everything.expand(len(group.video), -1).to(device)
            videos.append(heads.embed_video(model.video([(group.video.to(device), ids)])[0]))
            numbers += group.samples.tolist()

    captions = [(i, c) for i, n in enumerate(numbers) for c in clips.samples[n].captions]
    words = text.encode(tokenizer, [c for _, c in captions], model.text.config.max_words)
    cls = text.number(tokenizer, text.CLS)
    texts = [
        heads.embed_text(
            model.text(tree_map_only(Tensor, lambda t: t.to(device), text.pack(words[i : i + BATCH], cls)))[0]
        )
        for i in range(0, len(words), BATCH)
    ]

    scores = (torch.cat(texts) @ torch.cat(videos).T).cpu()
    video_of_text = torch.tensor([i for i, _ in captions])
    t2v, v2t = retrieval_ranks(scores, video_of_text)
    found = recalls(t2v, "t2v") | recalls(v2t, "v2t") | {"candidates": float(len(numbers))}
    for name, member in clips.subsets.items():
        of_text = torch.from_numpy(member)[torch.tensor(numbers)][video_of_text]
        if of_text.any():
            found[f"t2v_r1_{name}"] = recalls(t2v[of_text], "t2v")["t2v_r1"]
    return Retrieval(found, skipped)
