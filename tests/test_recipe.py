"""Recipes: found by file name, and the same after a trip through JSON."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from smaug.masks import VideoMask
from smaug.model.model import SIZES
from smaug.model.video_encoder import VideoEncoder
from smaug.objectives.vtc import Vtc
from smaug.recipe import Recipe, from_json, load, names, to_json


def trip(value, kind):
    return from_json(json.loads(json.dumps(to_json(value))), kind)


def test_every_file_is_a_recipe_of_its_name():
    files = {p.stem for p in (Path(__file__).parents[1] / "smaug/recipes").glob("*.py")} - {"__init__"}
    assert set(names()) == files and "mac" in files
    for name in names():
        assert load(name).name == name
        assert load(name).objectives


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", names())
def test_round_trip(name, size):
    recipe = load(name, size)
    assert trip(recipe, Recipe) == recipe
    assert recipe.model.video.image_size % recipe.model.video.patch == 0
    changed = dataclasses.replace(
        recipe,
        video_mask=VideoMask(0.25, "tube"),
        objectives={"vtc": Vtc(weight=0.5, temperature=0.1), "again": Vtc()},
        data=dataclasses.replace(recipe.data, manifest=(Path("a b.csv"), Path("c.tsv")), root=Path("/x"), cache=False),
        optim=dataclasses.replace(recipe.optim, lr=1 / 3, betas=(0.1, 0.2)),
        seed=7,
    )
    assert trip(changed, Recipe) == changed != recipe


def test_a_wrong_name_gets_a_hint():
    with pytest.raises(ValueError, match=r"no recipe 'macc'; did you mean 'mac'\? Recipes: .*mac"):
        load("macc")
    with pytest.raises(ValueError, match=r"no recipe 'wxyz'\. Recipes: .*mac"):
        load("wxyz")
    with pytest.raises(ValueError, match=r"no size 'tinny'; did you mean 'tiny'\? Sizes: tiny, small, base, large"):
        load("mac", "tinny")


@dataclass(frozen=True)
class Sum:
    weight: float = 1.0


@dataclass(frozen=True)
class Product:
    weight: float = 2.0
    places: tuple[int, ...] = ()


@dataclass(frozen=True)
class Elsewhere:
    """Known to Python, but no member of the field below."""

    weight: float = 3.0


@dataclass(frozen=True)
class Plan:
    first: Sum | Product = field(default_factory=Sum)
    maybe: Product | None = None
    many: dict[str, Sum | Product] = field(default_factory=dict)
    folder: Path | None = None
    pair: tuple[int, str] = (1, "a")


def test_union_members_are_told_apart():
    plan = Plan(Product(places=(1, 2)), Product(), {"a": Sum(4.0), "b": Product(4.0)}, Path("x/y"), (2, "b"))
    again = trip(plan, Plan)
    assert again == plan
    assert type(again.first) is Product and type(again.many["a"]) is Sum and isinstance(again.folder, Path)
    assert trip(Plan(), Plan) == Plan()


@pytest.mark.parametrize(
    ("place", "value", "sentence"),
    [
        (("first", "type"), "Elsewhere", r"names the type 'Elsewhere'; here it can be: Sum, Product"),
        (("first", "type"), "Vtc", r"names the type 'Vtc'; here it can be: Sum, Product"),
        (("many", "a", "type"), "Plan", r"names the type 'Plan'; here it can be: Sum, Product"),
        (("first", "type"), "os.system", r"names the type 'os.system'"),
        (("type",), "Sum", r"a 'Sum' where a Plan of this version of smaug stands"),
        (("maybe",), {"type": "Sum", "weight": 1.0}, r"names the type 'Sum'; here it can be: Product"),
        (("first", "wait"), 1.0, r"unknown fields \['wait'\] where a Sum of this version of smaug stands"),
        (("frist",), 1.0, r"unknown fields \['frist'\] where a Plan of this version of smaug stands"),
    ],
)
def test_what_a_field_does_not_know_is_refused(place, value, sentence):
    config = json.loads(json.dumps(to_json(Plan(many={"a": Sum()}))))
    inner = config
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(ValueError, match=sentence):
        from_json(config, Plan)


def test_a_number_where_a_dataclass_stands_is_refused():
    config = to_json(load("mac"))
    config["video_mask"] = 0.6
    with pytest.raises(ValueError, match=r"0\.6 where a VideoMask of this version of smaug stands"):
        from_json(config)


def test_base_is_vit_b16():
    video = SIZES["base"].video
    with torch.device("meta"):
        encoder = VideoEncoder(video)
    # 12 blocks of 4 * 768^2 for attention and 8 * 768^2 for the MLP, 9 * 768 biases and 2 norms.
    assert sum(p.numel() for p in encoder.blocks.parameters()) == 12 * (12 * 768**2 + 13 * 768) == 85_054_464
    assert (video.image_size, video.patch, video.patches) == (224, 16, 196)
    assert sum(p.numel() for p in encoder.patch_embed.parameters()) == video.tubelet * 3 * 16**2 * 768 + 768
