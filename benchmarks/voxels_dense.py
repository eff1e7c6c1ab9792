"""Dense ↔ sparse, against plain torch and NumPy; the voxels are the narrow band of the scene's mesh."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from benchmarks import moving
from benchmarks.harness import Contestant, Prepared, Settings, Workload
from benchmarks.peers import scattered_lines
from cvctoolkit import ops


def _occupancy(resolution: int):
    def prepare(settings: Settings) -> Prepared:
        coords = moving.band(resolution)
        dense = ops.to_dense(coords, torch.ones(len(coords), 1), (resolution,) * 3, 1)[:, 0]
        volume, array = dense.to(settings.device), dense.numpy()
        peers: moving.Peers = [
            ("torch nonzero", "torch", lambda: (volume > 0.5).nonzero().int()),
            ("NumPy argwhere", "numpy", lambda: np.argwhere(array > 0.5).astype(np.int32)),
        ]
        return moving.prepare(
            lambda **backend: ops.occupancy_to_coords(volume, 0.5, **backend),
            peers,
            settings,
            reads=4 * volume.numel(),
            writes=moving.COORD * len(coords),
            reference=False,
        )

    return prepare


def _to_dense(resolution: int, channels: int):
    def prepare(settings: Settings) -> Prepared:
        coords = moving.band(resolution).to(settings.device)
        feats = moving.normal(len(coords), channels).to(settings.device)

        def torch_index() -> Tensor:
            dense = feats.new_zeros(1, resolution, resolution, resolution, channels)
            dense[tuple(coords.long().unbind(-1))] = feats
            return dense.movedim(-1, 1).contiguous()

        def torch_channels_first() -> Tensor:
            dense = feats.new_zeros(channels, resolution**3)
            dense[:, moving.cells(coords, resolution)] = feats.T
            return dense.view(1, channels, resolution, resolution, resolution)

        return moving.prepare(
            lambda **backend: ops.to_dense(coords, feats, (resolution,) * 3, 1, **backend),
            [("torch index_put", "torch", torch_index), ("torch per channel", "torch", torch_channels_first)],
            settings,
            reads=(moving.COORD + 4 * channels) * len(coords),
            writes=4 * channels * resolution**3,
        )

    return prepare


def _from_dense(resolution: int, channels: int, *, from_ours: bool = False):
    """Out of a volume that torch made, in small pages of memory, or `to_dense`, in huge ones where the system has them.

    What must move is counted in lines of the cache, the least that can be read.

    Of the voxels alone, 4 bytes a cell: 7.8 MB of the band at 256³ with 8 channels; in the distinct lines of 64 bytes
    that these cells lie in, plane by plane: 26.3 MB. The copy reads as many bytes one after the other. How long these
    very lines take, and the coordinates and rows, is the other yardstick's time.
    """

    def prepare(settings: Settings) -> Prepared:
        coords = moving.band(resolution).to(settings.device)
        if from_ours:
            feats = moving.normal(len(coords), channels).to(settings.device)
            dense = ops.to_dense(coords, feats, (resolution,) * 3, 1)
        else:
            dense = moving.normal(1, channels, *(resolution,) * 3).to(settings.device)

        def torch_index() -> Tensor:
            return dense.view(channels, -1)[:, moving.cells(coords, resolution)].T.contiguous()

        # A cell cannot be read without its line of the cache, 16 cells; these lie far apart.
        lines = torch.unique(moving.cells(coords, resolution) // 16)
        prepared = moving.prepare(
            lambda **backend: ops.from_dense(dense, coords, **backend),
            [("torch indexing", "torch", torch_index)],
            settings,
            reads=moving.COORD * len(coords) + 64 * channels * len(lines),
            writes=4 * channels * len(coords),
            reference=False,
        )
        if settings.device != "cpu" or not scattered_lines.available():
            return prepared
        first = 16 * lines
        moved = Contestant(
            "the same lines, coordinates and rows alone (C++)",
            lambda: scattered_lines.touch(dense, first, coords, settings.threads),
            yardstick=True,
        )
        return replace(prepared, contestants=[*prepared.contestants, moved])

    return prepare


def _gather(resolution: int, channels: int):
    def prepare(settings: Settings) -> Prepared:
        coords = moving.band(resolution)
        part = coords[coords[:, 1] % 2 == 0]
        index = ops.voxel_lookup(part, coords).to(settings.device)
        feats = moving.normal(len(part), channels).to(settings.device)

        def torch_where() -> Tensor:
            return torch.where((index >= 0)[:, None], feats[index.clamp_min(0)], 0.0)

        def torch_put() -> Tensor:
            out = feats.new_zeros(len(index), channels)
            known = index >= 0
            out[known] = feats[index[known]]
            return out

        reads, writes = moving.ROW * len(index) + 4 * channels * len(part), 4 * channels * len(index)
        peers: moving.Peers = [("torch where", "torch", torch_where), ("torch masked put", "torch", torch_put)]
        run = lambda **backend: ops.gather_features(feats, index, **backend)  # noqa: E731
        return moving.prepare(run, peers, settings, reads, writes)

    return prepare


WORKLOADS = [
    Workload("voxels_dense", "occupancy to coordinates, 256³", _occupancy(256)),
    Workload("voxels_dense", "to dense, 256³ × 8 channels", _to_dense(256, 8)),
    Workload("voxels_dense", "to dense, 128³ × 32 channels", _to_dense(128, 32)),
    Workload("voxels_dense", "from dense, 256³ × 8 channels", _from_dense(256, 8)),
    Workload("voxels_dense", "from dense of to_dense, 256³ × 8 channels", _from_dense(256, 8, from_ours=True)),
    Workload("voxels_dense", "from dense, 256³ × 32 channels", _from_dense(256, 32), quick=False),
    Workload(
        "voxels_dense",
        "from dense of to_dense, 256³ × 32 channels",
        _from_dense(256, 32, from_ours=True),
        quick=False,
    ),
    Workload("voxels_dense", "from dense, 512³ × 1 channel", _from_dense(512, 1)),
    Workload("voxels_dense", "part in its superset, 512³ band × 32 channels", _gather(512, 32)),
]
