"""The rows that benchmarks leave: their columns, the CSV file per machine kind, JSON for one run."""

from __future__ import annotations

import csv
import datetime
import json
import pathlib
from typing import Any

FOLDER = pathlib.Path(__file__).parent / "results"
COLUMNS = (
    "family", "workload", "contestant", "exact", "median_s", "min_s", "rounds", "ratio", "peak_bytes",
    "result_bytes", "items", "floor_s", "device", "threads", "isa", "versions", "date",
)  # fmt: skip
YARDSTICK = "a yardstick"  # in place of "yes": it does not do the work
COPY = "copy of the same bytes"
NUMBERS = {
    **dict.fromkeys(("median_s", "min_s", "ratio", "floor_s"), float),
    **dict.fromkeys(("rounds", "peak_bytes", "result_bytes", "items"), int),
}


def row(**values: Any) -> dict[str, Any]:
    """One row; ``date`` is today."""
    values["date"] = datetime.date.today().isoformat()
    return {name: values[name] for name in COLUMNS}


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a file, numbers parsed, None where a cell is empty."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [
            {k: (NUMBERS[k](v) if v else None) if k in NUMBERS else v for k, v in r.items()}
            for r in csv.DictReader(file)
        ]


def merge(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Replaces the workloads that were measured again, keeps the others."""
    renewed = {(r["family"], r["workload"]) for r in rows}
    kept = [r for r in read(path) if (r["family"], r["workload"]) not in renewed]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for r in sorted(kept + rows, key=lambda r: (r["family"], r["workload"])):  # a stable order for diffs
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else "" if v is None else v for k, v in r.items()})


def write_json(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """One run's rows as a JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1))


def megabytes(row: dict[str, Any]) -> tuple[str, str]:
    """Peak memory on top of the inputs, and what of it is not the result; empty where unknown."""
    peak, result = row["peak_bytes"], row.get("result_bytes")
    if peak is None:
        return "", ""
    return f"{peak / 1e6:.0f}", "" if result is None else f"{max(peak - result, 0) / 1e6:.0f}"


def of_copy(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Its share of the bandwidth at which the same bytes are copied into new memory; empty where nobody copied."""
    copies = [r["median_s"] for r in rows if r["contestant"] == COPY]
    return f"{100 * copies[0] / row['median_s']:.0f} %" if copies else ""


def verdict(row: dict[str, Any]) -> str:
    """What the check found."""
    return {"yes": "exact", YARDSTICK: YARDSTICK}.get(row["exact"], f"inexact: {row['exact']}")


def duration(seconds: float) -> str:
    """``1.23 ms`` or ``4.56 s``."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
