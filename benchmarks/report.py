"""docs/benchmarks.md and its plots, drawn from the committed rows."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from benchmarks import results

DOCS = pathlib.Path(__file__).parents[1] / "docs"
OURS, EXACT, INEXACT = "#2a7f62", "#8a99ad", "#d9a441"

INTRODUCTION = """# Benchmarks

Written by `python -m cvctoolkit bench --report` from the rows in `benchmarks/results/`; do not edit. Make your own rows
with `make bench`.

Every contestant of a workload does the same work on the same data in one interleaved run and is checked first.

- **×**: speed-up over the best *exact* peer, its median time divided by the contestant's. A contestant whose result
  differs is marked with what is wrong and gets no figure.
- **ours vs it**: the peer's time divided by that of our best row.
- **floor**: how many times longer it takes than a plain copy of the inputs and outputs, into memory that is in use.
- **of copy**: where a *copy of the same bytes* took part: its time divided by the contestant's. It reads as many bytes
  as the inputs have and writes as many as the outputs have, by torch's copy, into new memory as every operator does.
- **peak MB**: memory on top of the inputs, results included; **beyond result** leaves those out, as every exact
  contestant makes them; **B/item** divides the peak by the voxels or triangles made.

Times are shown for GPUs only: on a CPU, ratios are what carries over to another machine.

The scene is a bunny, a sphere, a torus and a backdrop, ray-cast to a point map of 518×518 pixels (364 k triangles,
184 k vertices) or 2048×2048 (5.8 M triangles) and scaled into [−1, 1]³. The photograph is the Middlebury *Motorcycle*
pair. "Restated" peers are our transcription of code that cannot be installed.
"""


def write() -> None:
    """All machines: a section each, with a plot and a table per workload."""
    sections = [INTRODUCTION]
    for path in sorted(results.FOLDER.glob("*.csv")):
        rows = _in_declared_order(results.read(path))
        if not rows:
            continue
        about = rows[-1]
        sections.append(
            f"## {path.stem}\n\n{about['threads']} threads, {about['versions'].split('; ')[-1]}, {about['date']}.\n"
        )
        for family, group in groupby(rows, key=lambda r: r["family"]):
            group = list(group)
            name = f"benchmarks-{path.stem}-{family}.png"
            if plot(group, DOCS / "images" / name):
                sections.append(f"![time of every peer relative to ours, {family}](images/{name})\n")
            name = f"benchmarks-{path.stem}-{family}-sizes.png"
            if plot_sizes(group, DOCS / "images" / name):
                sections.append(
                    f"![time over the number of rows, in copies of inputs and outputs, {family}](images/{name})\n"
                )
            sections.append(tables(group))
    (DOCS / "benchmarks.md").write_text("\n".join(sections))


def _in_declared_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from benchmarks import harness

    declared = {(w.family, w.name): place for place, w in enumerate(harness.workloads(harness.FAMILIES))}
    return sorted(rows, key=lambda r: declared.get((r["family"], r["workload"]), len(declared)))


def tables(rows: list[dict[str, Any]]) -> str:
    """A table per workload, fastest first."""
    return "\n".join(_table(family, workload, group) for family, workload, group in _workloads(rows))


def _workloads(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    for (family, workload), group in groupby(rows, key=lambda r: (r["family"], r["workload"])):
        yield family, workload, sorted(group, key=lambda r: r["median_s"])


def _is_ours(row: dict[str, Any]) -> bool:
    return row["contestant"].startswith("cvctoolkit")


def _table(family: str, workload: str, rows: list[dict[str, Any]]) -> str:
    best = next((r["median_s"] for r in rows if _is_ours(r) and r["exact"] == "yes"), None)
    gpu = rows[0]["device"] == "cuda"
    items = rows[0]["items"]
    copied = any(r["contestant"] == results.COPY for r in rows)
    headings = [
        "contestant",
        *(["time"] if gpu else []),
        "×",
        "ours vs it",
        "floor",
        *(["of copy"] if copied else []),
        "peak MB",
        "beyond result",
        "B/item",
        "result",
    ]
    lines = [f"### {family}: {workload}" + (f" → {items:,} items" if items else ""), ""]
    lines += ["| " + " | ".join(headings) + " |", "|---|" + "--:|" * (len(headings) - 2) + "---|"]
    for r in rows:
        ours = _is_ours(r)
        cells = [f"**{r['contestant']}**" if ours else r["contestant"]]
        cells += [results.duration(r["median_s"])] if gpu else []
        cells += [f"{r['ratio']:.3g}" if r["ratio"] else ""]
        cells += [f"{r['median_s'] / best:.3g}×" if best and not ours else ""]
        cells += [f"{r['median_s'] / r['floor_s']:,.0f}×" if r["floor_s"] else ""]
        cells += [results.of_copy(r, rows)] if copied else []
        cells += results.megabytes(r)
        cells += [f"{r['peak_bytes'] / items:.0f}" if items and r["peak_bytes"] is not None else ""]
        cells += [results.verdict(r)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# Workloads of one kind over sizes are drawn as curves, not as bars.
_SIZE = re.compile(r"(.*), (\d+) ([kM]) rows")


def _sizes(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Workloads called "…, 10 k rows": by what they do, by contestant, (rows, time in units of the floor)."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for r in rows:
        match = _SIZE.fullmatch(r["workload"])
        if match and r["floor_s"] and r["exact"] == "yes":
            count = int(match[2]) * {"k": 1e3, "M": 1e6}[match[3]]
            curves = found.setdefault(match[1], {})
            curves.setdefault(r["contestant"], []).append((count, r["median_s"] / r["floor_s"]))
    return found


def plot_sizes(rows: list[dict[str, Any]], path: pathlib.Path) -> bool:
    """Time over the number of rows, as a multiple of a plain copy of inputs and outputs; False without such rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = _sizes(rows)
    if not found:
        return False
    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 4), layout="constrained", squeeze=False)
    for axis, (what, curves) in zip(axes[0], found.items(), strict=True):
        for name, points in curves.items():
            mine = name.startswith("cvctoolkit") and "reference" not in name
            style = {"color": OURS, "linewidth": 2.5, "zorder": 3} if mine else {"linewidth": 1}
            axis.plot(*zip(*sorted(points)), marker="o", markersize=3, label=name, **style)
        axis.set(xscale="log", yscale="log", title=what, xlabel="rows")
        axis.title.set_fontsize(9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    axes[0][0].set_ylabel("time / plain copy of inputs and outputs", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> bool:
    """How long each peer takes relative to our best exact contestant, on a logarithmic axis; False without peers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars: list[tuple[str, float, str]] = []
    for _, workload, group in _workloads(rows):
        best = next((r["median_s"] for r in group if _is_ours(r) and r["exact"] == "yes"), None)
        peers = [r for r in group if not _is_ours(r) and r["exact"] != results.YARDSTICK]
        if best is None or not peers or _SIZE.fullmatch(workload):
            continue
        bars.append((workload, 0.0, ""))
        bars += [(r["contestant"], r["median_s"] / best, EXACT if r["exact"] == "yes" else INEXACT) for r in peers]
    if not bars:
        return False
    figure, axis = plt.subplots(figsize=(9, 0.23 * len(bars) + 0.9), layout="constrained")
    lengths = [length for _, length, _ in bars if length]
    for y, (label, length, colour) in zip(range(len(bars))[::-1], bars, strict=True):
        place = {"transform": axis.get_yaxis_transform(), "ha": "right", "va": "center"}
        if not length:
            axis.text(-0.01, y, label, weight="bold", fontsize=9, **place)
            continue
        axis.text(-0.01, y, label, fontsize=8, **place)
        axis.barh(y, length - 1, left=1, color=colour, height=0.72)
        text = f"{length:.2g}×" if length < 100 else f"{length:.0f}×"
        outside = length * 1.05 if length > 1 else length / 1.05
        axis.text(outside, y, text, va="center", ha="left" if length > 1 else "right", fontsize=8)
    axis.axvline(1, color=OURS, linewidth=2)
    axis.set(xscale="log", xlim=(min(0.5, min(lengths) / 2), max(2, max(lengths)) * 2), yticks=[])
    axis.set_ylim(-0.8, len(bars) - 0.3)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axis.set_xlabel("time relative to cvctoolkit (green); yellow: the result differs", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
