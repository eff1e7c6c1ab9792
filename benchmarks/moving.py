"""Workloads of `voxels_dense` and `voxels_resample`: the scene's voxels, and contestants of which most only move bytes.

Every workload states the bytes that it must read (inputs, once) and write (outputs, once), and a copy of as many bytes
takes part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import workload
from benchmarks.harness import Contestant, Prepared, Settings, copy_of, ours
from cvctoolkit import ops

BAND = 2
COORD, ROW = 16, 8  # bytes of a voxel's coordinates, of a row index


@functools.cache
def band(resolution: int) -> Tensor:
    """``[N, 4]`` the voxels within two of the surface, in lexicographic order."""
    data = workload.load(518)
    vertices, faces = torch.from_numpy(data.vertices), torch.from_numpy(data.faces)
    return ops.narrow_band_udf(vertices, faces, resolution, BAND).coords


def normal(*shape: int) -> Tensor:
    """The same random numbers every time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def arrays(result: Any) -> list[np.ndarray]:
    """What a contestant returned, less what is None."""
    result = (result,) if isinstance(result, (Tensor, np.ndarray)) else result
    return [r.detach().cpu().numpy() if isinstance(r, Tensor) else r for r in result if r is not None]


def compare(tolerance: float) -> Callable[[Any, Any], str]:
    """Integers bit for bit, floats within a tolerance of the largest value."""

    def check(found: list[np.ndarray], truth: list[np.ndarray]) -> str:
        for a, b in zip(found, truth, strict=True):
            if a.shape != b.shape:
                return f"shape {list(a.shape)} instead of {list(b.shape)}"
            limit = tolerance * float(np.abs(b).max(initial=0)) if b.dtype.kind == "f" else 0
            if different := int((np.abs(a.astype(np.float64) - b) > limit).sum()):
                return f"{different} of {a.size} values differ"
        return ""

    return check


Peers = list[tuple[str, str, Callable[[], Any]]]


def prepare(
    run: Callable[..., Any],
    peers: Peers,
    settings: Settings,
    reads: int,
    writes: int,
    *,
    tolerance: float = 0.0,
    reference: bool = True,
    read: Callable[[Any], Any] = arrays,
) -> Prepared:
    """The first peer is the truth; our native kernels, our reference and a copy of the same bytes follow."""
    found = [
        Contestant(name, peer, read=read, package=package, truth=k == 0)
        for k, (name, package, peer) in enumerate(peers)
    ]
    found += ours(lambda device: run, settings, by_isa=False, on_cpu_too=False, read=read)
    if reference:
        found.append(Contestant("cvctoolkit (reference)", lambda: run(backend="reference"), read=read))
    found.append(copy_of(reads, writes, settings.device))
    return Prepared(found, compare(tolerance), floor_bytes=reads + writes, items=lambda truth: len(truth[0]))


def keys(coords: Tensor) -> Tensor:
    """``[N, 4]`` voxels as packed numbers in the same order."""
    b, x, y, z = coords.long().unbind(-1)
    return b << 48 | x << 32 | y << 16 | z


def coords(keys: Tensor) -> Tensor:
    """Packed numbers as ``[N, 4]`` voxels."""
    return torch.stack([keys >> 48, keys >> 32 & 65535, keys >> 16 & 65535, keys & 65535], -1).int()


def cells(coords: Tensor, resolution: int) -> Tensor:
    """``[N]`` the place of every voxel in the dense volume of batch 0."""
    _, x, y, z = coords.long().unbind(-1)
    return (x * resolution + y) * resolution + z
