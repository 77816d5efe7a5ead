"""Searches one's own videos: `python -m smaug.search index FOLDER --model RUN`, then `query` or `serve` the index."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import tyro
from rich.console import Console

from smaug.run import refuse
from smaug.search.index import IndexOptions, index
from smaug.search.query import QueryOptions, query
from smaug.search.serve import ServeOptions, serve

Options = (
    Annotated[IndexOptions, tyro.conf.subcommand("index")]
    | Annotated[QueryOptions, tyro.conf.subcommand("query")]
    | Annotated[ServeOptions, tyro.conf.subcommand("serve")]
)


def main() -> int:
    options = tyro.cli(
        Options, prog="python -m smaug.search", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)
    )
    console = Console(markup=False, emoji=False)  # a file may be called clip[1].mp4 or a:dog:b.mp4
    try:
        if isinstance(options, IndexOptions):
            return index(options, console)
        if isinstance(options, QueryOptions):
            return query(options, console)
        return serve(options, console)
    except BrokenPipeError:  # `query --json | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        return 0
    except (ValueError, OSError) as error:
        return refuse(error)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
