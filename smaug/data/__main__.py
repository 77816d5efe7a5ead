"""Looks after training data: `python -m smaug.data check /data/videos`, and `convert` or `reencode` where it pays."""

from __future__ import annotations

import sys
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape

from smaug.data.check import CheckOptions, check
from smaug.data.convert import ConvertOptions, convert
from smaug.data.reencode import ReencodeOptions, reencode

Options = (
    Annotated[CheckOptions, tyro.conf.subcommand("check")]
    | Annotated[ConvertOptions, tyro.conf.subcommand("convert")]
    | Annotated[ReencodeOptions, tyro.conf.subcommand("reencode")]
)


def main() -> int:
    options = tyro.cli(
        Options,
        prog="python -m smaug.data",
        description=__doc__,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    errors = Console(stderr=True, markup=False)
    try:
        if isinstance(options, CheckOptions):
            # markup=False: a file may be called clip[1].mp4
            return check(options, errors if str(options.json) == "-" else Console(markup=False))
        if isinstance(options, ConvertOptions):
            return convert(options, Console(markup=False))
        return reencode(options, Console(markup=False))
    except (ValueError, OSError) as error:
        # what a run calls --data.root is --root here
        text = escape(str(error).replace("--data.", "--"))
        errors.print(f"[red]smaug:[/] {text}", markup=True, highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        errors.print("smaug: stopped; the same command goes on from here.", highlight=False, soft_wrap=True)
        return 130


if __name__ == "__main__":
    sys.exit(main())
