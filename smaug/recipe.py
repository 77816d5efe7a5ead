"""A recipe is data: everything that makes one system differ from another, in frozen dataclasses."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from smaug.data.clips import DataConfig
from smaug.data.questions import Task
from smaug.masks import TextMask, VideoMask
from smaug.model.model import SIZES, ModelConfig
from smaug.objectives.answer import Answer
from smaug.objectives.mc import Mc
from smaug.objectives.mlm import Mlm
from smaug.objectives.mvm import Mvm
from smaug.objectives.vtc import Vtc
from smaug.objectives.vtm import Vtm
from smaug.optim import OptimConfig


@dataclass(frozen=True)
class Recipe:
    name: str
    model: ModelConfig = field(default_factory=ModelConfig)
    video_mask: VideoMask = field(default_factory=VideoMask)
    text_mask: TextMask = field(default_factory=TextMask)
    unmask_last: float = 0.0  # share of the steps, at the end, in which no patch is masked
    objectives: dict[str, Vtc | Vtm | Mlm | Mvm | Mc | Answer] = field(
        default_factory=dict
    )  # by the name under which they are logged
    task: Task = "retrieval"  # what the data asks and what is evaluated: captions, open questions, multiple choice
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval_frames: int = 0  # of a clip at evaluation; 0: as many as in training
    eval_top: int = 16  # candidates of the dual encoder that the match head ranks again
    seed: int = 0

    @property
    def test_frames(self) -> int:
        """Frames of a clip at evaluation."""
        return self.eval_frames or self.model.video.frames


def names() -> list[str]:
    """All recipes, by the names of their files."""
    return sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent / "recipes")]))


def load(name: str, size: str = "tiny") -> Recipe:
    """The recipe in `smaug/recipes/{name}.py`, at a size of `SIZES`."""
    if name not in names():
        raise ValueError(f"there is no recipe {name!r}{_hint(name, names())} Recipes: {', '.join(names())}.")
    if size not in SIZES:
        raise ValueError(f"there is no size {size!r}{_hint(size, SIZES)} Sizes: {', '.join(SIZES)}.")
    recipe: Recipe = importlib.import_module(f"smaug.recipes.{name}").recipe(size)
    return recipe


def _hint(wrong: str, known: Iterable[str]) -> str:
    close = get_close_matches(wrong, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else "."


def to_json(value: Any) -> Any:
    """A recipe as plain JSON values. A dataclass says its type, so that a member of a union can be told apart."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def from_json(value: Any, kind: Any = Recipe) -> Any:
    """The inverse of `to_json`. A type name is looked up among the field's own members only."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in members:
            return None
        members = tuple(m for m in members if m is not type(None))
        named = [m for m in members if isinstance(value, dict) and m.__name__ == value.get("type")]
        if isinstance(value, dict) and len(named) != 1:
            known = ", ".join(m.__name__ for m in members)
            raise ValueError(f"the configuration names the type {value.get('type')!r}; here it can be: {known}")
        return from_json(value, named[0] if named else members[0])
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise ValueError(f"the configuration has {value!r} where a {kind.__name__} of this version of smaug stands")
        hints = typing.get_type_hints(kind)
        unknown = set(value) - set(hints) - {"type"}
        if unknown or value.get("type") != kind.__name__:
            what = f"unknown fields {sorted(unknown)}" if unknown else f"a {value.get('type')!r}"
            raise ValueError(f"the configuration has {what} where a {kind.__name__} of this version of smaug stands")
        return kind(**{k: from_json(v, hints[k]) for k, v in value.items() if k != "type"})
    if origin is dict:
        return {k: from_json(v, members[1]) for k, v in value.items()}
    if origin is tuple:
        inner = [members[0]] * len(value) if len(members) == 2 and members[1] is Ellipsis else members
        return tuple(from_json(v, m) for v, m in zip(value, inner, strict=True))
    return Path(value) if kind is Path else value
