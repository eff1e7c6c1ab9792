"""The specification of partitions of voxels into windows: plain PyTorch, given a way to sort."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: (coords, order) → (coords, permutation, inverse), as `order_reference.voxel_sort`.
Sort = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]

ORDERS = {"morton": 1, "hilbert": 2}


def _edges(first: Tensor) -> Tensor:
    """Offsets of the runs that begin where ``first``, and the end."""
    end = torch.tensor([len(first)], device=first.device)
    return torch.cat([first.nonzero().squeeze(1), end])


def _begins(*keys: Tensor) -> Tensor:
    """Where any key differs from the one before; the very first, too."""
    first = torch.zeros(len(keys[0]), dtype=torch.bool, device=keys[0].device)
    first[:1] = True
    for key in keys:
        first[1:] |= key[1:] != key[:-1]
    return first


def window_partition(
    coords: Tensor, window_size: Sequence[int], shift: Sequence[int], sort: Sort
) -> tuple[Tensor, Tensor, Tensor]:
    """Window (x + shift) // window_size; windows ascending, rows of a window in their order."""
    size, offset = (
        torch.tensor([*start, *v], device=coords.device) for start, v in (((1,), window_size), ((0,), shift))
    )
    inside = ((coords >= 0) & (coords < torch.iinfo(torch.int16).max * 2 + 2)).all(-1, keepdim=True)
    windows = torch.where(inside, (coords.long() + offset) // size, coords.long())
    found, permutation, inverse = sort(windows.to(torch.int32), 0)
    return permutation, _edges(_begins(*found.unbind(1))), inverse


def serialized_partition(
    coords: Tensor, window_size: int, order: int, shift: int, sort: Sort
) -> tuple[Tensor, Tensor, Tensor]:
    """Window (place along the curve, in its batch item, + shift) // window_size."""
    found, permutation, inverse = sort(coords, order)
    batch = found[:, 0].contiguous()
    place = torch.arange(len(batch), device=coords.device)
    window = (place - torch.searchsorted(batch, batch) + shift) // window_size
    return permutation, _edges(_begins(batch, window)), inverse
