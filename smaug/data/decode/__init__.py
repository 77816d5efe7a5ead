"""Encoded clips to frames: one contract, several decoders.

decoder = open_decoder("auto", torch.device("cuda"))
got = decoder.decode([Want(Path("a.mp4"), "video", FrameSampler().pick(8))], size=224)
got[0].frames  # (8, 224, 224, 3) uint8 on the device, or None and got[0].reason
"""

from smaug.data.decode.choose import open_decoder
from smaug.data.decode.contract import DecodeError, Decoder, Got, Want
from smaug.data.decode.images import read_image
from smaug.data.decode.pyav import read_frames

__all__ = ["DecodeError", "Decoder", "Got", "Want", "open_decoder", "read_frames", "read_image"]
