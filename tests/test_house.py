"""Imports go down only, a name says what is in the room, and the wheel holds what the folders hold."""

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each line may import its own names and those above it. A name is what follows "smaug." in the import.
LAYERS: list[set[str]] = [
    {"kernels"},
    {"tokens", "ops"},
    {"model", "masks", "data", "distributed"},
    {"objectives", "optim"},
    {"recipe"},
    {"recipes"},
    {"step", "micro_batches", "graphs"},
    {"train", "loop", "run", "embed", "evaluate", "device", "checkpoint", "metrics", "cost", "ledger", "calibration"}
    | {"blocks", "pretrained", "estimate", "report", "doctor", "search", "visualise", "integrations", "testing"},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
# So that a loader can be used without a model. masks: the loader masks words.
DATA_MAY_IMPORT = {"data", "masks", "tokens", "ops"}
KERNELS_MAY_IMPORT = {"kernels", "torch", "triton"} | sys.stdlib_module_names
NO_DOOR_PLATE = {"utils", "util", "common", "misc", "registry", "factory"}  # a name everything fits is no name


def house(root: Path) -> dict[str, Path]:
    """Module name -> file, of everything that is installed."""
    found = {}
    for top, package in (("smaug", "smaug"), ("kernels", "smaug.kernels")):
        for path in sorted((root / top).rglob("*.py")):
            inside = [part for part in path.relative_to(root / top).with_suffix("").parts if part != "__init__"]
            found[".".join([package, *inside])] = path
    return found


def imports(name: str, path: Path) -> Iterator[str]:
    """Full names of what a module imports, at its top or inside a function; `from a import b` gives a.b."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join(parts + ([node.module] if node.module else []))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room(name: str) -> str:
    """smaug.model.layers -> model; smaug itself, or one of its attributes, -> "" (it holds no code)."""
    top, _, rest = name.partition(".")
    first = rest.partition(".")[0]
    return first if top == "smaug" and not first.startswith("__") else ""


def wrong_imports(root: Path) -> list[str]:
    wrong = []
    for name, path in house(root).items():
        here = room(name)
        if here and here not in LAYER:
            wrong.append(f"{name}: give {here} a layer in LAYERS of tests/test_house.py")
            continue
        for target in imports(name, path):
            top, there = target.partition(".")[0], room(target)
            if top in {"tests", "benchmarks"}:
                wrong.append(f"{name} imports {target}: smaug stands without tests/ and benchmarks/")
            elif top == "kernels":
                wrong.append(f"{name} imports {target}: it is installed as smaug.kernels")
            elif here == "" and top == "smaug":
                wrong.append(f"{name} imports {target}: importing smaug imports nothing else")
            elif here == "kernels" and (there or top) not in KERNELS_MAY_IMPORT:
                wrong.append(f"{name} imports {target}: kernels import torch and triton only")
            elif there and there not in LAYER:
                wrong.append(f"{name} imports {target}: give {there} a layer in LAYERS of tests/test_house.py")
            elif there and LAYER[there] > LAYER[here]:
                wrong.append(f"{name} imports {target}: imports go down only")
            elif here == "data" and there and there not in DATA_MAY_IMPORT:
                wrong.append(f"{name} imports {target}: data may import {sorted(DATA_MAY_IMPORT)} only")
    return wrong


def nameless_rooms(root: Path) -> list[str]:
    return [
        f"{name}: {part} says nothing of what is inside; ask which file's one sentence the line would make longer"
        for name in house(root)
        for part in name.split(".")
        if part in NO_DOOR_PLATE
    ]


def named_recipes(root: Path) -> list[str]:
    """Where code outside smaug/recipes/ knows one recipe by name: an import, a path in a string, or load("name")."""
    modules = house(root)
    recipes = {name.rpartition(".")[2] for name in modules if name.startswith("smaug.recipes.")}
    by_path = re.compile(rf"\brecipes[./]({'|'.join(map(re.escape, sorted(recipes))) or '(?!)'})\b")
    found = []
    for name, path in modules.items():
        if room(name) == "recipes":
            continue
        found += [f"{name} imports {target}" for target in imports(name, path) if by_path.search(target)]
        tree = ast.parse(path.read_text())
        prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                found += [f"{name}:{node.lineno} has {node.value!r}"] * bool(by_path.search(node.value))
            elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "load" and node.args:
                first = node.args[0]
                if isinstance(first, ast.Constant) and first.value in recipes:
                    found.append(f"{name}:{node.lineno} loads {first.value!r}")
    return found


def test_imports_go_down_only():
    assert not (wrong := wrong_imports(ROOT)), "\n".join(wrong)


def test_every_room_has_a_door_plate():
    assert not (wrong := nameless_rooms(ROOT)), "\n".join(wrong)


def test_no_file_outside_recipes_names_a_recipe():
    found = named_recipes(ROOT)
    default = [line for line in found if line.startswith("smaug.train")]  # the one place of the default
    assert len(default) <= 1 and found == default, "\n".join(found)


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("smaug/tokens.py", "from smaug.model import layers", "imports go down only"),
        ("smaug/ops/attention.py", "from ..step import training_step", "imports go down only"),
        ("smaug/ops/__init__.py", "def f():\n    from .. import train", "imports go down only"),
        ("smaug/model/__init__.py", "from smaug.brandnew import x", "give brandnew a layer"),
        ("smaug/brandnew.py", "", "give brandnew a layer"),
        ("smaug/data/loader.py", "from smaug import model", "data may import"),
        ("smaug/train.py", "import tests.ops.inputs", "stands without tests/"),
        ("smaug/ops/attention.py", "from kernels import attention", "installed as smaug.kernels"),
        ("smaug/__init__.py", "from smaug import ops", "imports nothing else"),
        ("kernels/attention.py", "import numpy", "torch and triton only"),
        ("kernels/attention.py", "from smaug.tokens import PackedTokens", "torch and triton only"),
        ("smaug/model/utils.py", "", "utils says nothing"),
        ("smaug/registry/__init__.py", "", "registry says nothing"),
        ("smaug/step.py", "from smaug.recipes.mac import mac", "imports smaug.recipes.mac.mac"),
        ("smaug/step.py", "from smaug.recipes import mac", "imports smaug.recipes.mac"),
        ("smaug/report.py", "path = 'smaug/recipes/mac.py'", "has 'smaug/recipes/mac.py'"),
        ("smaug/report.py", "import smaug.recipe\nx = smaug.recipe.load('mac')", "loads 'mac'"),
    ],
)
def test_the_rules_can_fail(tmp_path, file, source, complaint):
    (tmp_path / "smaug/recipes").mkdir(parents=True)
    (tmp_path / "smaug/recipes/mac.py").write_text("from smaug.recipe import Recipe\n")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(source)
    complaints = wrong_imports(tmp_path) + nameless_rooms(tmp_path) + named_recipes(tmp_path)
    assert any(complaint in line for line in complaints), complaints


def test_what_the_rules_let_through(tmp_path):
    for file, source in {
        "smaug/recipes/mac.py": "from smaug.recipe import Recipe\nfrom smaug.recipes import smaug",
        "smaug/recipes/smaug.py": "from smaug.objectives import vtc",
        "smaug/recipe.py": "import importlib\ndef load(x):\n    importlib.import_module(f'smaug.recipes.{x}')",
        "smaug/objectives/vtc.py": "from smaug import ops\nfrom smaug.model import heads",
        "smaug/ops/attention.py": "from smaug import __version__, tokens\nfrom smaug.kernels.attention import attend",
        "smaug/data/loader.py": "import numpy\nfrom smaug.masks import TextMask\nfrom . import decode",
        "smaug/train.py": '"""Runs smaug/recipes/mac.py."""\nfrom smaug.evaluate import retrieval\ntorch.load("x")',
        "kernels/attention.py": "import math\nimport triton.language as tl\nfrom .launch import blocks",
        "kernels/pixel_loss.py": "import torch\nfrom . import launch",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(source)
    assert wrong_imports(tmp_path) + nameless_rooms(tmp_path) + named_recipes(tmp_path) == []


def build(folder: Path, kind: str, out: Path) -> Path:
    """The sdist or wheel of `folder`, by setuptools itself: no network and no pip."""
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.tar.gz" if kind == "sdist" else "*.whl"))


def test_sdist_and_wheel_hold_the_house(tmp_path):
    # The copy keeps build/ out of the checkout, and holds no egg-info whose old file list setuptools would trust.
    source = tmp_path / "source"
    pages = (ROOT / "smaug/search/page").iterdir()
    data = [ROOT / "smaug/py.typed", *(ROOT / f"smaug/{room}/page.html" for room in ("report", "visualise")), *pages]
    for path in [*house(ROOT).values(), *data]:
        (source / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        (source / path.relative_to(ROOT)).write_bytes(path.read_bytes())
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    with tarfile.open(build(source, "sdist", tmp_path)) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    unpacked = next((tmp_path / "unpacked").iterdir())
    assert (unpacked / "kernels/__init__.py").is_file()
    with zipfile.ZipFile(build(unpacked, "wheel", tmp_path)) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    # A folder without __init__.py is dropped silently by setuptools, so compare everything.
    expected = {str(path.relative_to(ROOT)) for path in [*house(ROOT).values(), *data]}
    expected = {f"smaug/{name}" if name.startswith("kernels/") else name for name in expected}
    assert "smaug/kernels/__init__.py" in files and not any(name.startswith("kernels") for name in files)
    assert files == expected, f"missing {sorted(expected - files)}, too many {sorted(files - expected)}"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_kernels_is_imported_as_smaug_kernels_only():
    wrong = python("import kernels")
    assert wrong.returncode != 0 and "installed as smaug.kernels" in wrong.stderr, wrong.stderr
    right = python("import smaug.kernels, sys; print('triton' in sys.modules, smaug.kernels.triton_status())")
    assert right.returncode == 0, right.stderr
    light, _, status = right.stdout.strip().partition(" ")
    assert light == "False"
    assert status == "ok" or status.endswith(".")


def test_importing_smaug_is_light():
    assert python("import smaug, sys; sys.exit('torch' in sys.modules)").returncode == 0


def test_importing_ops_imports_torch_and_little_else():
    done = python("import smaug.ops, sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))")
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & {"triton", "transformers", "av", "rich", "tyro", "pyarrow", "tensorboard"}


def test_version_is_said_once():
    from smaug import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert __version__ == project["version"]


def test_constraints_are_exact_and_name_every_dependency():
    """One `name==version` a line, no addresses; and every name that pyproject.toml asks for is pinned."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line)] == []
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [line for lines in (project["dependencies"], *project["optional-dependencies"].values()) for line in lines]
    names = {re.split(r"[^A-Za-z0-9_.-]", line)[0].lower() for line in asked} - {"smaug"}
    assert names <= pinned, names - pinned
