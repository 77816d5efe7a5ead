"""Which decoder reads a clip."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Literal

import torch

from smaug.data.decode.contract import MAX_SECONDS, Decoder, Got, Want
from smaug.data.decode.pyav import PyavDecoder

Choice = Literal["auto", "pyav", "dali", "torchcodec"]


def open_decoder(choice: Choice, device: torch.device, workers: int = 2, seconds: float = MAX_SECONDS) -> Decoder:
    """Frames come out on `device`. ValueError, with what to install, if a decoder that was asked for cannot be had.

    auto: on a GPU dali where it is installed, and pyav for each clip that dali cannot read; on a CPU pyav, the
    fastest there for H.264 (benchmarks/bench_data.py).
    """
    if choice == "dali" or (choice == "auto" and device.type == "cuda" and _has_dali()):
        from smaug.data.decode.dali import DaliDecoder

        dali = DaliDecoder(device, workers, seconds)
        return dali if choice == "dali" else Second(dali, on_device(PyavDecoder(workers, seconds), device))
    if choice == "torchcodec":
        from smaug.data.decode.torchcodec import TorchcodecDecoder

        return on_device(TorchcodecDecoder(workers, seconds), device)
    return on_device(PyavDecoder(workers, seconds), device)


def _has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # of `nvidia`
        return False


class Second:
    """Asks another decoder about the clips that the first cannot decode; the other's word is the last."""

    def __init__(self, first: Decoder, other: Decoder):
        self.first, self.other = first, other
        self.name = f"{first.name}, else {other.name}"

    def decode(self, wants: Sequence[Want], size: int) -> list[Got]:
        got = self.first.decode(wants, size)
        failed = [i for i, one in enumerate(got) if one.frames is None]
        for i, one in zip(failed, self.other.decode([wants[i] for i in failed], size), strict=True):
            got[i] = one
        return got

    def close(self) -> None:
        self.first.close()
        self.other.close()


def on_device(decoder: Decoder, device: torch.device) -> Decoder:
    return decoder if device.type == "cpu" else _OnDevice(decoder, device)


class _OnDevice:
    """Frames of a decoder that works in host memory, on the device."""

    def __init__(self, decoder: Decoder, device: torch.device):
        self.decoder, self.device, self.name = decoder, device, decoder.name

    def decode(self, wants: Sequence[Want], size: int) -> list[Got]:
        return [
            one if one.frames is None else Got(one.frames.to(self.device), "", one.decoder)
            for one in self.decoder.decode(wants, size)
        ]

    def close(self) -> None:
        self.decoder.close()
