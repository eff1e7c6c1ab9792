"""The specification of coarser and finer sets of voxels: plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from cvctoolkit.ops.voxels.order_reference import coords_of, voxel_keys


def coarsen(coords: Tensor, factor: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    steps = torch.tensor([1, *factor], device=coords.device)
    parents = torch.div(coords, steps, rounding_mode="floor")
    keys, inverse, counts = torch.unique(voxel_keys(parents), return_inverse=True, return_counts=True)
    return coords_of(keys), inverse, counts


def children(coords: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    octants = torch.tensor([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)], device=coords.device)
    fine = 2 * coords.long()[:, None, 1:] + octants
    batch = coords.long()[:, None, :1].expand(-1, 8, 1)
    fine = torch.cat([batch, fine], -1)
    parent = torch.arange(len(coords), device=coords.device)[:, None].expand(-1, 8)
    chosen = torch.ones_like(parent, dtype=torch.bool) if mask is None else mask
    fine, parent = fine[chosen], parent[chosen]
    order = torch.argsort(voxel_keys(fine), stable=True)
    return fine[order].to(torch.int32), parent[order]


def child_slots(coords: Tensor, coarse_row: Tensor, factor: list[int]) -> Tensor:
    """``[N]`` the place of every voxel among the x·y·z children, x slowest, of all coarse ones."""
    x, y, z = (coords[:, 1 + k].long() % factor[k] for k in range(3))
    return ((coarse_row * factor[0] + x) * factor[1] + y) * factor[2] + z
