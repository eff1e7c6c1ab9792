"""Set algebra of voxels against torch, numpy, polars, pandas and a numba hash, all on packed keys.

Two surface sets share half of their voxels, as the views of an object from two sides do. The peers are handed packed
keys and return keys; ours reads and writes coordinates. Whoever does not return every map is not among them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Contestant, Prepared, Settings, Workload, ours
from benchmarks.peers import packed_voxels as packed
from benchmarks.workload import DATA
from cvctoolkit import ops

ROWS = 500_000


@cache
def surface_sets(count: int) -> tuple[Tensor, Tensor]:
    """The sets of `_surface_sets`, from the cache or made now: every process that measures memory needs them."""
    path = DATA / f"surface_sets_{count}.npz"
    if not path.exists():
        DATA.mkdir(exist_ok=True)
        np.savez(path, **dict(zip("ab", (s.numpy() for s in _surface_sets(count)), strict=True)))
    with np.load(path) as stored:
        return torch.from_numpy(stored["a"]), torch.from_numpy(stored["b"])


def _surface_sets(count: int) -> tuple[Tensor, Tensor]:
    """Two sets of about ``count`` voxels on the surface of a bumpy ball, in lexicographic order; half is in both."""
    rng = np.random.default_rng(0)
    resolution = int(np.sqrt(count / 1.7))
    direction = rng.standard_normal((6 * count, 3), dtype=np.float32)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    radius = 0.42 + 0.05 * np.sin(9 * direction).prod(1, keepdims=True)
    cells = ((direction * radius + 0.5) * resolution).astype(np.int64)
    keys = np.unique(cells[:, 0] << 32 | cells[:, 1] << 16 | cells[:, 2])
    xyz = np.stack([keys >> 32, keys >> 16 & 0xFFFF, keys & 0xFFFF], 1)
    side = xyz @ np.array([1.0, 2.0, 3.0])
    low, high = np.quantile(side, [1 / 3, 2 / 3])
    coords = torch.from_numpy(np.concatenate([np.zeros((len(xyz), 1)), xyz], 1).astype(np.int32))
    return coords[torch.from_numpy(side <= high)], coords[torch.from_numpy(side >= low)]


def _sets(count: int, shuffled: bool) -> tuple[Tensor, Tensor]:
    sets = surface_sets(count)
    if not shuffled:
        return sets
    generator = torch.Generator().manual_seed(0)
    a, b = (s[torch.randperm(len(s), generator=generator)] for s in sets)
    return a, b


def _read_ours(result: Any) -> list[np.ndarray]:
    """Voxels as keys, so that they compare with those of the peers."""
    parts = (result,) if isinstance(result, Tensor) else result
    return [(ops.voxel_keys(p) if p.dim() == 2 else p).cpu().numpy() for p in parts]


def _read(result: Any) -> list[np.ndarray]:
    parts = result if isinstance(result, tuple) else (result,)
    return [p.numpy() if isinstance(p, Tensor) else np.asarray(p) for p in parts]


def _equal(found: list[np.ndarray], truth: list[np.ndarray]) -> str:
    for k, (a, b) in enumerate(zip(found, truth, strict=True)):
        if a.shape != b.shape:
            return f"output {k}: shape {list(a.shape)} instead of {list(b.shape)}"
        if different := int((a != b).sum()):
            return f"output {k}: {different} of {a.size} values differ"
    return ""


def _prepared(
    run: Callable[..., Any], sets: tuple[Tensor, ...], peers: dict[str, Callable[..., Any]], settings: Settings,
    bytes_out: Callable[[list[np.ndarray]], int],
) -> Prepared:  # fmt: skip
    """Ours on coordinates; the peers on keys, torch tensors or numpy arrays, or, by rows, on coordinates."""
    on_device = tuple(s.to(settings.device) for s in sets)
    keys = tuple(ops.voxel_keys(s) for s in sets)
    arrays = tuple(k.numpy() for k in keys)
    contestants = [
        *ours(lambda device: partial(run, *on_device), settings, by_isa=False, on_cpu_too=False, read=_read_ours),
        Contestant("cvctoolkit (reference)", partial(run, *on_device, backend="reference"), read=_read_ours),
    ]
    for name, peer in peers.items() if settings.device == "cpu" else ():
        package = re.split("[ .]", name)[0]
        if find_spec(package) is None:
            continue
        inputs = sets if "dim=0" in name else keys if package == "torch" else arrays
        read = _read_ours if "dim=0" in name else _read
        if package == "numba":
            peer(*inputs)  # compiles
        contestants.append(
            Contestant(name, partial(peer, *inputs), read=read, package=package, truth=name.startswith("numpy"))
        )
    if settings.device != "cpu":
        contestants[-1] = Contestant(contestants[-1].name, contestants[-1].run, read=_read_ours, truth=True)
    truth = _read(run(*sets))
    return Prepared(
        contestants, _equal, floor_bytes=sum(16 * len(s) for s in sets) + bytes_out(truth), items=lambda t: len(t[0])
    )


def _bytes(parts: list[np.ndarray]) -> int:
    return sum(p.nbytes for p in parts)


def _unique(count: int, shuffled: bool, settings: Settings) -> Prepared:
    coords = torch.cat(_sets(count, shuffled))
    if shuffled:
        coords = coords[torch.randperm(len(coords), generator=torch.Generator().manual_seed(1))]
    peers = {
        "torch.unique, packed keys": packed.torch_unique,
        "numpy sort, packed keys": packed.numpy_unique,
        "polars group_by, packed keys": packed.polars_unique,
        "pandas factorize, packed keys": packed.pandas_unique,
    }
    if count <= ROWS and not shuffled:  # takes seconds
        peers["torch.unique(dim=0)"] = packed.torch_unique_rows
    return _prepared(ops.voxel_unique, (coords,), peers, settings, _bytes)


def _union(count: int, shuffled: bool, settings: Settings) -> Prepared:
    peers = {
        "torch.unique, packed keys": packed.torch_union,
        "numpy sort-merge, packed keys": packed.numpy_union,
        "polars unique and join, packed keys": packed.polars_union,
        "pandas factorize, packed keys": packed.pandas_union,
    }
    if count <= ROWS and not shuffled:
        peers["torch.unique(dim=0)"] = packed.torch_union_rows
    return _prepared(ops.voxel_union, _sets(count, shuffled), peers, settings, _bytes)


def _isin(count: int, shuffled: bool, settings: Settings) -> Prepared:
    peers = {
        "torch.isin, packed keys": torch.isin,
        "numpy.isin, packed keys": np.isin,
        "polars is_in, packed keys": packed.polars_isin,
        "pandas isin, packed keys": packed.pandas_isin,
    }
    if find_spec("numba"):
        from benchmarks.peers import numba_voxels

        peers["numba hash, 1 thread, packed keys"] = numba_voxels.isin
    return _prepared(ops.voxel_isin, _sets(count, shuffled), peers, settings, _bytes)


def _lookup(count: int, shuffled: bool, settings: Settings) -> Prepared:
    peers = {
        "torch sort and searchsorted, packed keys": packed.torch_lookup,
        "numpy sort and searchsorted, packed keys": packed.numpy_lookup,
        "polars join, packed keys": packed.polars_lookup,
        "pandas get_indexer, packed keys": packed.pandas_lookup,
    }
    if find_spec("numba"):
        from benchmarks.peers import numba_voxels

        peers["numba hash, 1 thread, packed keys"] = numba_voxels.lookup
    return _prepared(ops.voxel_lookup, _sets(count, shuffled), peers, settings, _bytes)


def _curve(operation: Callable[[int, bool, Settings], Prepared], size: int, settings: Settings) -> Prepared:
    """A point of a curve over the number of rows: of large sets only those are measured that come close."""
    prepared = operation(size // 2, False, settings)
    slow = ("cvctoolkit (reference)", "polars", "pandas", "torch.unique(dim=0)", "numpy.isin")
    close = [c for c in prepared.contestants if size < 1_000_000 or c.truth or not c.name.startswith(slow)]
    return replace(prepared, contestants=close)


OPERATIONS = {"unique": _unique, "union": _union, "isin": _isin, "lookup": _lookup}
SIZES = {"10 k": 10_000, "100 k": 100_000, "1 M": 1_000_000, "10 M": 10_000_000}

WORKLOADS = [
    *(
        Workload(
            "voxels",
            f"{name}, 2 × 500 k, {'shuffled' if shuffled else 'in order'}",
            partial(f, ROWS, shuffled),
            fresh_memory=not shuffled,  # which takes longer than all the rest
        )
        for name, f in OPERATIONS.items()
        for shuffled in (False, True)
    ),
    # Drawn as curves over the number of rows.
    *(
        Workload("voxels", f"{name}, in order, {label} rows", partial(_curve, f, size), quick=False, fresh_memory=False)
        for name, f in OPERATIONS.items()
        for label, size in SIZES.items()
    ),
]
