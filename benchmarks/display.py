"""What a benchmark run shows: with rich a progress bar and tables, without it (a bare GPU machine) plain lines."""

from __future__ import annotations

import traceback
from contextlib import contextmanager
from typing import Any

from benchmarks.results import YARDSTICK, duration, megabytes, of_copy, verdict

HEADINGS = (
    "contestant",
    "median",
    "min",
    "rounds",
    "× best exact peer",
    "of copy",
    "peak MB",
    "beyond result",
    "result",
)


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """A row of a workload's rows as text, under `HEADINGS`."""
    return (
        row["contestant"],
        duration(row["median_s"]),
        duration(row["min_s"]),
        str(row["rounds"]),
        "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        of_copy(row, rows),
        *megabytes(row),
        verdict(row),
    )


class Plain:
    """Lines on standard output."""

    def status(self, text: str) -> None:
        pass

    def advance(self) -> None:
        pass

    def rows(self, title: str, rows: list[dict[str, Any]]) -> None:
        print(f"\n{title}")
        for row in sorted(rows, key=lambda r: r["median_s"]):
            print(
                "  "
                + " | ".join(
                    f"{h} {c}" if h in ("min", "of copy", "peak MB", "beyond result") else c
                    for h, c in zip(HEADINGS, cells(row, rows), strict=True)
                )
            )

    def failure(self, title: str) -> None:
        print(f"\n{title} failed")
        traceback.print_exc(limit=-4)


class Rich(Plain):
    """A live progress bar and tables."""

    def __init__(self, progress: Any, total: int) -> None:
        self.progress, self.task = progress, progress.add_task("", total=total)

    def status(self, text: str) -> None:
        self.progress.update(self.task, description=text)

    def advance(self) -> None:
        self.progress.advance(self.task)

    def rows(self, title: str, rows: list[dict[str, Any]]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left")
        for heading in HEADINGS:
            table.add_column(heading, justify="left" if heading in ("contestant", "result") else "right")
        for row in sorted(rows, key=lambda r: r["median_s"]):
            table.add_row(
                *map(Text, cells(row, rows)), style={"yes": None, YARDSTICK: "dim"}.get(row["exact"], "yellow")
            )
        self.progress.console.print(table)

    def failure(self, title: str) -> None:
        self.progress.console.print(f"[red]{title} failed")
        self.progress.console.print_exception(max_frames=4)


@contextmanager
def make(total: int):
    """The display for ``total`` workloads."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield Plain()
        return
    console = Console() if Console().is_terminal else Console(width=130)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        yield Rich(progress, total)
