"""The specification of dense ↔ sparse and of moving features between sets of voxels: plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

#: How `reduce_features` joins the rows that share an index.
REDUCTIONS = ("sum", "mean", "max")


def occupancy_to_coords(occupancy: Tensor, threshold: float) -> Tensor:
    return (occupancy > threshold).nonzero().to(torch.int32).contiguous()


def cells(coords: Tensor, batch_size: int, shape: list[int]) -> Tensor:
    """``[N]`` the place of every voxel in a dense volume, one past its end for those outside."""
    x, y, z = shape
    limit = torch.tensor([batch_size, x, y, z], device=coords.device)
    inside = ((coords >= 0) & (coords < limit)).all(-1)
    b, i, j, k = coords.long().unbind(-1)
    return torch.where(inside, ((b * x + i) * y + j) * z + k, batch_size * x * y * z)


def to_dense(feats: Tensor, coords: Tensor, batch_size: int, shape: list[int], fill: float) -> Tensor:
    size = batch_size * shape[0] * shape[1] * shape[2]
    rows = torch.arange(len(coords), device=coords.device)
    row = torch.full((size + 1,), len(coords), device=coords.device)
    row = row.scatter_reduce(0, cells(coords, batch_size, shape), rows, "amin")  # of equal voxels the lowest row counts
    filled = torch.cat([feats, feats.new_full((1, feats.shape[1]), fill)])
    volume = filled[row[:-1]].view(batch_size, *shape, feats.shape[1])
    return volume.movedim(-1, 1).contiguous()


def from_dense(dense: Tensor, coords: Tensor) -> Tensor:
    batch_size, channels, *shape = dense.shape
    rows = dense.movedim(1, -1).reshape(batch_size * shape[0] * shape[1] * shape[2], channels)
    return torch.cat([rows, rows.new_zeros(1, channels)])[cells(coords, batch_size, shape)]


def gather_features(feats: Tensor, index: Tensor, fill: float) -> Tensor:
    rows = torch.cat([feats, feats.new_full((1, feats.shape[1]), fill)])
    absent = (index < 0) | (index >= len(feats))
    return rows[torch.where(absent, len(feats), index)]


def reduce_features(feats: Tensor, index: Tensor, num_rows: int, reduction: int, include_self: bool) -> Tensor:
    wide = feats if feats.dtype == torch.float64 else feats.float()
    # Rows of index −1 go to an extra row that is cut off.
    index = torch.where((index < 0) | (index >= num_rows), num_rows, index).long()
    name = REDUCTIONS[reduction]
    if name == "max":
        start = wide.new_full((num_rows + 1, feats.shape[1]), 0.0 if include_self else float("-inf"))
        out = start.scatter_reduce(0, index[:, None].expand_as(wide), wide, "amax")
        if not include_self:
            out = torch.where((row_counts(index, num_rows + 1) == 0)[:, None], 0.0, out)
    else:
        out = wide.new_zeros(num_rows + 1, feats.shape[1]).index_add(0, index, wide)
        if name == "mean":
            out = out / (row_counts(index, num_rows + 1) + int(include_self)).clamp_min(1)[:, None]
    return out[:num_rows].to(feats.dtype)


def row_counts(index: Tensor, num_rows: int) -> Tensor:
    """``[num_rows]`` how often each row is named; −1 and whatever else is out of range is not counted."""
    place = torch.where((index < 0) | (index >= num_rows), num_rows, index).long()
    return torch.zeros(num_rows + 1, dtype=torch.int64, device=index.device).index_add(
        0, place, torch.ones_like(place)
    )[:num_rows]


def max_backward(grad: Tensor, feats: Tensor, index: Tensor, out: Tensor, include_self: bool) -> Tensor:
    """The gradient of the maximum goes to the lowest row that attains it; to none where the initial zero does."""
    num_rows = out.shape[0]
    rows = torch.arange(len(feats), device=feats.device)[:, None].expand_as(feats)
    place = torch.where((index < 0) | (index >= num_rows), num_rows, index).long()
    pad = out.new_zeros(1, out.shape[1])
    attains = feats == torch.cat([out, pad])[place]
    if include_self:
        attains = attains & (feats > 0)
    candidates = torch.where(attains, rows, len(feats))
    first = rows.new_full((num_rows + 1, feats.shape[1]), len(feats))
    first = first.scatter_reduce(0, place[:, None].expand_as(rows), candidates, "amin")
    wins = attains & (first[place] == rows) & (place < num_rows)[:, None]
    return torch.where(wins, torch.cat([grad, pad])[place], 0.0)
