"""Measures workloads: every contestant does the same work, is checked first, then timed in interleaved rounds.

A *contestant* is one of our backends (per instruction set) or a peer library. The first run of each is compared with
the result of the contestant marked as ``truth``; whoever differs is shown as inexact and gets no ratio. The ratio of
an exact contestant is (median of the best exact peer) / (its own median): above 1 it is faster than every exact peer.
A *yardstick* does not do the work, but moves as many bytes as the work must move, say. It is timed with the others, and
is no peer.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import multiprocessing
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks import display, machine, report, results

FAMILIES = (
    "cameras",
    "epipolar",
    "pointmap",
    "mesh",
    "sdf",
    "voxels",
    "voxels_dense",
    "voxels_resample",
    "sparse_conv",
    "sparse_attention",
    "distillation",
    "flow",
    "matching",
)
MEMORY_RUN_LIMIT_S = 5.0  # slower contestants are not run a second time just for their peak memory
ONE_RUN_S = 3.0  # slower contestants are timed once, by the run that is checked
SHORTEST_S = 0.01  # shorter runs are timed as a loop: alone, they would time the cores' awakening from the pause
SETTLE_S = 0.005  # between runs, so that one library's spinning worker threads do not slow the next one down


@dataclass(frozen=True)
class Settings:
    """What the command line asked for; handed to every workload."""

    device: str = "cpu"
    threads: int = 1
    quick: bool = False
    memory: bool = True

    @property
    def seconds_per_contestant(self) -> float:
        return 0.6 if self.quick else 1.2

    def rounds(self, seconds: float) -> int:
        """How often to run a contestant that takes so long."""
        if seconds > ONE_RUN_S:
            return 1
        least = 3 if self.quick or seconds > 1 else 7  # on a shared machine single runs differ by a quarter
        return min(9 if self.quick else 25, max(least, int(self.seconds_per_contestant / seconds)))


@dataclass(frozen=True)
class Contestant:
    """One way to do a workload's work.

    Attributes:
        name: Shown in tables, e.g. ``"Open3D closest point"``.
        run: Does the work and returns what it made.
        read: Turns that into what the check compares; not timed.
        package: The peer's distribution name, for its version; empty for ours.
        version: Overrides the version found for ``package``.
        truth: Whether its result is what the others are compared with (one per workload).
        isa: For ours: the instruction set that the CPU kernels are restricted to.
        warm_up: Called once in every process before the first run; not measured. Compiles.
        yardstick: Does not do the work: neither checked nor ranked.
    """

    name: str
    run: Callable[[], Any]
    read: Callable[[Any], Any] = lambda result: result
    package: str = ""
    version: str = ""
    truth: bool = False
    isa: str = ""
    warm_up: Callable[[], Any] = lambda: None
    yardstick: bool = False

    @property
    def is_ours(self) -> bool:
        return not self.package and not self.version and not self.yardstick


@dataclass(frozen=True)
class Prepared:
    """A workload with its data in memory.

    Attributes:
        contestants: In any order.
        check: (result, truth) → empty when equal, else what differs, with a count.
        floor_bytes: Bytes that any implementation must read and write.
        items: What the truth holds: voxels, triangles, …
        bytes_per_item: Bytes of output per item, on top of ``floor_bytes``.
    """

    contestants: list[Contestant]
    check: Callable[[Any, Any], str]
    floor_bytes: int = 0
    items: Callable[[Any], int | None] = lambda truth: None
    bytes_per_item: int = 0


@dataclass(frozen=True)
class Workload:
    family: str
    name: str
    prepare: Callable[[Settings], Prepared]
    quick: bool = True  # whether it is part of a quick run
    fresh_memory: bool = True  # measure peak memory in a process of its own: exact, but prepares the data again


@dataclass
class _Measurement:
    contestant: Contestant
    times: list[float]
    verdict: str
    peak_bytes: int | None
    result_bytes: int | None


def ours(
    make: Callable[[str], Callable[[], Any]],
    settings: Settings,
    *,
    by_isa: bool = True,
    on_cpu_too: bool = True,
    **extra: Any,
) -> list[Contestant]:
    """Our default backend.

    Args:
        make: device → the function that does the work there.
        settings: On a CPU there is one contestant per instruction set that this machine has.
        by_isa: False where a family has no kernels per instruction set.
        on_cpu_too: On CUDA, the CPU takes part as well, to compare with.
        **extra: Further fields of every contestant.
    """
    from cvctoolkit import _native

    if settings.device != "cpu":
        found = [Contestant("cvctoolkit (cuda)", make(settings.device), isa="cuda", **extra)]
        cpu = [Contestant("cvctoolkit (CPU)", make("cpu"), isa=_native.isa() or "", **extra)] if on_cpu_too else []
        return [*found, *cpu]
    if not by_isa or _native.isa() is None:
        return [Contestant("cvctoolkit", make("cpu"), isa=_native.isa() or "", **extra)]
    run, found = make("cpu"), []
    for wish in ("avx512", "avx2", "baseline"):
        with _native.restricted_isa(wish) as granted:
            if granted == wish:
                found.append(Contestant(f"cvctoolkit ({wish})", run, isa=wish, **extra))
    return found


def copy_of(read: int, written: int, device: str = "cpu") -> Contestant:
    """The yardstick: reads and writes so many bytes with torch's own kernels, into new memory like any operator."""
    source, size = torch.ones(read // 4, device=device), written // 4

    def run() -> torch.Tensor:
        target, both = source.new_empty(size), min(size, len(source))
        target[:both].copy_(source[:both])
        if both < size:
            target[both:].fill_(1)
        elif both < len(source):
            source[both:].sum()
        return target

    return Contestant(results.COPY, run, yardstick=True)


def with_truth(contestants: list[Contestant], preferred: str) -> list[Contestant]:
    """Marks as truth the first whose name starts so, or where that peer is not installed our CPU path, or the first."""
    for start in (preferred, "cvctoolkit (CPU)", ""):
        for chosen in contestants:
            if chosen.name.startswith(start):
                return [replace(c, truth=c is chosen) for c in contestants]
    return contestants


def workloads(families: Iterable[str]) -> list[Workload]:
    """All workloads of the families, in order."""
    found = []
    for family in families:
        if family not in FAMILIES:
            raise SystemExit(f"bench: no family {family!r}; there are {', '.join(FAMILIES)}")
        found += importlib.import_module(f"benchmarks.{family}").WORKLOADS
    return found


def _run(contestant: Contestant, settings: Settings, loops: int = 1) -> tuple[float, Any]:
    """Timed runs: (seconds of one, the last result)."""
    from cvctoolkit import _native

    with _native.restricted_isa("" if contestant.isa == "cuda" else contestant.isa):
        time.sleep(SETTLE_S)
        if settings.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(loops):
            result = contestant.run()
        if settings.device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / loops, result


def _peak_extra(contestant: Contestant, settings: Settings) -> tuple[float, Any, int | None]:
    """One run with the memory that it needed on top of what was there: (seconds, result, bytes)."""
    from cvctoolkit import _native

    if settings.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds, result = _run(contestant, settings)
        peak = torch.cuda.max_memory_allocated() - before
        return seconds, result, peak or None  # nothing: it ran on the CPU
    gc.collect()
    if _native.unavailable("cpu") is None:
        _native.kernels.release_scratch()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before = _status("VmRSS")
    except OSError:
        return *_run(contestant, settings), None
    seconds, result = _run(contestant, settings)
    return seconds, result, _status("VmHWM") - before


def bytes_of(result: Any) -> int | None:
    """Memory of a tensor, an array or a sequence of them, each storage once; None for anything else."""
    parts = result if isinstance(result, (list, tuple)) else [result]
    storages: dict[int, int] = {}
    for part in parts:
        if isinstance(part, torch.Tensor):
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        elif hasattr(part, "nbytes"):
            storages[id(part)] = part.nbytes
        else:
            return None
    return sum(storages.values())


def _status(key: str) -> int:
    """A size from /proc/self/status in bytes."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(key)


def _memory_child(family: str, workload: str, contestant: str, settings: Settings, answer: Any) -> None:
    """In a fresh process, so that nothing an earlier run left behind can serve this one."""
    torch.set_num_threads(settings.threads)
    prepared = next(w for w in workloads([family]) if w.name == workload).prepare(settings)
    chosen = next(c for c in prepared.contestants if c.name == contestant)
    chosen.warm_up()
    answer.put(_peak_extra(chosen, settings)[2])


def peak_in_fresh_process(workload: Workload, contestant: Contestant, settings: Settings) -> int | None:
    """Peak extra memory of one run in a process of its own; None when that process failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "numpy", "benchmarks.harness"])
    answer = context.SimpleQueue()
    child = context.Process(
        target=_memory_child, args=(workload.family, workload.name, contestant.name, settings, answer)
    )
    child.start()
    child.join()
    return answer.get() if child.exitcode == 0 else None


def measure(workload: Workload, settings: Settings, report: Callable[[str], None] = lambda text: None) -> list[dict]:
    """Checks and times one workload; returns a row per contestant."""
    prepared = workload.prepare(settings)
    contestants = sorted(prepared.contestants, key=lambda c: not c.truth)  # the truth first
    importable = workload.family in FAMILIES  # those made up in tests are not
    fresh = importable and workload.fresh_memory and settings.memory and settings.device == "cpu"
    measured, truth, items = [], None, None
    for contestant in contestants:
        report(f"{contestant.name}: check")
        contestant.warm_up()
        seconds, result, peak = _peak_extra(contestant, settings)
        size, found = bytes_of(result), contestant.read(result)
        if contestant.truth:
            truth, items = found, prepared.items(found)
        unchecked = contestant.truth or contestant.yardstick
        verdict = "" if unchecked else prepared.check(found, truth)
        del result, found
        if fresh and seconds < MEMORY_RUN_LIMIT_S and not contestant.yardstick:
            peak = peak_in_fresh_process(workload, contestant, settings)
        # A first run includes page faults and thread start-up: it counts only where more would take too long.
        times = [seconds] if seconds > ONE_RUN_S else [_run(contestant, settings)[0]]
        measured.append(_Measurement(contestant, times, verdict, peak, size))
    del truth
    rounds = [settings.rounds(m.times[0]) for m in measured]
    loops = []
    for m in measured:
        loops.append(1)
        while m.times[0] * loops[-1] < SHORTEST_S:
            loops[-1] *= 2
            m.times[0] = _run(m.contestant, settings, loops[-1])[0]
    gc.collect()
    gc.disable()
    try:
        for turn in range(1, max(rounds)):
            report(f"round {turn + 1} of {max(rounds)}")
            for m, last, count in zip(measured, rounds, loops, strict=True):
                if turn < last:
                    m.times.append(_run(m.contestant, settings, count)[0])
    finally:
        gc.enable()
    return _rows(workload, prepared, measured, items, settings)


def _rows(
    workload: Workload, prepared: Prepared, measured: list[_Measurement], items: int | None, settings: Settings
) -> list[dict]:
    ranked = [m for m in measured if not m.verdict and not m.contestant.yardstick]
    peers = [statistics.median(m.times) for m in ranked if not m.contestant.is_ours]
    least = prepared.floor_bytes + prepared.bytes_per_item * (items or 0)
    floor = least / machine.bandwidth(settings.device) if least else None
    rows = []
    for m in measured:
        median = statistics.median(m.times)
        version = m.contestant.version or machine.version_of(m.contestant.package or "cvctoolkit")
        rows.append(
            results.row(
                family=workload.family,
                workload=workload.name,
                contestant=m.contestant.name,
                exact=results.YARDSTICK if m.contestant.yardstick else m.verdict or "yes",
                median_s=median,
                min_s=min(m.times),
                rounds=len(m.times),
                ratio=min(peers) / median if peers and m in ranked else None,
                peak_bytes=None if m.contestant.yardstick else m.peak_bytes,
                result_bytes=m.result_bytes,
                items=items,
                floor_s=floor,
                device=settings.device,
                threads=settings.threads,
                isa=m.contestant.isa,
                versions=f"{version}; torch {torch.__version__}",
            )
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    """``cvctoolkit bench``."""
    parser = argparse.ArgumentParser(prog="cvctoolkit bench", description=__doc__.split("\n", 1)[0])
    parser.add_argument("families", nargs="*", metavar="family", help=f"among {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, the small workloads only")
    parser.add_argument("--filter", default="", help="only workloads whose name contains this")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--no-memory", action="store_true", help="skip the memory measurement in fresh processes")
    parser.add_argument("--csv", type=pathlib.Path, help="the rows' file (default: benchmarks/results/<machine>.csv)")
    parser.add_argument("--json", type=pathlib.Path, help="also write this run's rows as JSON")
    parser.add_argument("--report", action="store_true", help="only rewrite docs/benchmarks.md from the CSV files")
    args = parser.parse_args(argv)
    if args.report:
        report.write()
        return 0
    settings = Settings(args.device, args.threads, args.quick, not args.no_memory)
    torch.set_num_threads(settings.threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads))  # read by the peers when they load
    chosen = [
        w
        for w in workloads(args.families or FAMILIES)
        if args.filter in f"{w.family}: {w.name}" and (w.quick or not settings.quick)
    ]
    rows, failures = [], 0
    with display.make(len(chosen)) as show:
        for w in chosen:
            try:
                found = measure(w, settings, lambda text, w=w: show.status(f"{w.name} · {text}"))
                rows += found
                show.rows(f"{w.family}: {w.name}", found)
            except Exception:
                failures += 1
                show.failure(f"{w.family}: {w.name}")
            show.advance()
    if not settings.quick or args.csv:
        path = args.csv or results.FOLDER / f"{machine.kind(settings.device)}.csv"
        results.merge(path, rows)
        print(f"{len(rows)} rows → {path}")
        if not args.csv and find_spec("matplotlib"):
            report.write()
            print("redrawn: docs/benchmarks.md")
    if args.json:
        results.write_json(args.json, rows)
        print(f"{len(rows)} rows → {args.json}")
    return 1 if failures else 0
