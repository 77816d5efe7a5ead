"""The model: two encoders, what joins them, and the heads that the recipe's objectives name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from smaug.model.frame_selector import FrameSelector, FrameSelectorConfig
from smaug.model.fusion import Fusion, FusionConfig
from smaug.model.text_encoder import TextEncoder, TextEncoderConfig
from smaug.model.video_encoder import VideoEncoder, VideoEncoderConfig


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the whole model."""

    video: VideoEncoderConfig = field(default_factory=VideoEncoderConfig)
    text: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    selector: FrameSelectorConfig = field(default_factory=FrameSelectorConfig)


SIZES: dict[str, ModelConfig] = {
    # The embedded data set on two CPU cores.
    "tiny": ModelConfig(),
    "small": ModelConfig(
        VideoEncoderConfig(width=384, depth=12, heads=6, image_size=224, patch=16, tubelet=1),
        TextEncoderConfig(width=384, depth=6, heads=6),
    ),
    # ViT-B/16 and BERT-base, whose last three layers will be the fusion encoder of the systems that have one.
    "base": ModelConfig(
        VideoEncoderConfig(width=768, depth=12, heads=12, image_size=224, patch=16, tubelet=1),
        TextEncoderConfig(width=768, depth=9, heads=12),
    ),
    "large": ModelConfig(
        VideoEncoderConfig(width=1024, depth=24, heads=16, image_size=224, patch=16, tubelet=1),
        TextEncoderConfig(width=1024, depth=18, heads=16),
    ),
}


class Model(nn.Module):
    """`heads` holds the small networks of each objective under its name; the step hands them to it."""

    def __init__(
        self, config: ModelConfig, vocabulary: int, heads: Mapping[str, nn.Module], impl: str = "auto"
    ) -> None:
        super().__init__()
        self.impl = impl
        self.video = VideoEncoder(config.video, impl)
        self.text = TextEncoder(config.text, vocabulary, impl)
        width = config.text.width
        self.fusion = Fusion(width, config.video.width, config.fusion, impl) if config.fusion.depth else None
        self.selector = FrameSelector(config.video.width, width, config.selector) if config.selector.keep else None
        self.heads = nn.ModuleDict(heads)
