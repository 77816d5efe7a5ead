"""Pictures of saved benchmarks: one PNG for each benchmark and pass, a group of bars for each shape.

    pytest benchmarks/ --benchmark-only --benchmark-json=times.json
    python -m benchmarks.plots times.json --out plots

Bars are medians as multiples of ours at that shape, cut at 8; beside each stands the time. The title says which machine
and day the numbers are of.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import tyro

Rows = list[dict[str, Any]]


def read(path: Path) -> tuple[str, dict[str, Rows]]:
    """What the numbers are of, and the benchmarks by picture."""
    try:
        saved = json.loads(path.read_text())
        rows = [row for row in saved["benchmarks"] if "shape" in row["extra_info"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"{path} is no file that `pytest benchmarks/ --benchmark-only --benchmark-json={path}` writes: {error}"
        ) from None
    if not rows:
        raise SystemExit(f"{path} holds no benchmark of ours; nothing is drawn.")
    pictures: dict[str, Rows] = defaultdict(list)
    for row in rows:
        parts = [Path(row["fullname"].split("::")[0]).stem, row["name"].split("[")[0].removeprefix("test_")]
        parts += [str(row["params"][name]) for name in ("op", "passed") if name in (row["params"] or {})]
        pictures["-".join(parts)].append(row)
    return f"{rows[0]['extra_info']['machine']}, {saved['datetime'][:10]}", pictures


def _provider(row: dict[str, Any]) -> str:
    return str((row["params"] or {}).get("provider", "smaug"))


def draw(title: str, rows: Rows, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("Pictures need matplotlib: pip install 'smaug[plots]'") from None
    providers = list(dict.fromkeys(map(_provider, rows)))
    groups: dict[str, Rows] = defaultdict(list)
    for row in rows:
        groups[f"{row['extra_info']['shape']}\n{row['extra_info']['dtype']}"].append(row)
    figure = Figure(figsize=(10, 1.5 + 0.22 * len(rows) + 0.3 * len(groups)), layout="constrained")
    axes = figure.subplots()
    y, ticks = 0.0, []
    for group in groups.values():
        ticks.append(y + (len(group) - 1) / 2)
        times = {_provider(row): 1e3 * row["stats"]["median"] for row in group}
        ours = times.get("smaug") or times.get("fast") or min(times.values())
        for provider, ms in times.items():
            axes.barh(y, min(ms / ours, 8), color=f"C{providers.index(provider) % 10}", height=0.85)
            axes.text(min(ms / ours, 8), y, f" {provider} {ms:.3g} ms", va="center", fontsize=7)
            y += 1
        y += 0.8
    axes.set_yticks(ticks, list(groups), fontsize=7)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.5)
    axes.margins(x=0.2)
    axes.set_xlabel("median time, ours = 1")
    axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=120)


def main(saved: tyro.conf.Positional[Path], out: Path = Path("plots")) -> None:
    """Draw PNGs from what --benchmark-json saved. out: folder, made if it is not there."""
    machine, pictures = read(saved)
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in pictures.items():
        draw(f"{name}: {machine}", rows, out / f"{name}.png")
        print(out / f"{name}.png")


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
