"""The specification of `marching_cubes`: plain PyTorch over sorted voxel keys, any float dtype and device."""

from __future__ import annotations

import torch
from torch import Tensor

from cvctoolkit.ops.sdf import marching_cubes_table as cube

OUTSIDE = 1.0  # the value of an absent voxel


def _keys(place: Tensor, resolution: int) -> Tensor:
    """(batch, x, y, z), coordinates from -1 to the resolution, as one ascending number."""
    side = resolution + 2
    batch, x, y, z = place.long().unbind(-1)
    # Shifted so that 2^15 batches of 65538³ lattice points fit 64 bits.
    return (((batch - 2**14) * side + (x + 1)) * side + (y + 1)) * side + (z + 1)


def _places(keys: Tensor, resolution: int) -> Tensor:
    side = resolution + 2
    z, keys = keys % side, keys.div(side, rounding_mode="floor")
    y, keys = keys % side, keys.div(side, rounding_mode="floor")
    x, batch = keys % side, keys.div(side, rounding_mode="floor")
    return torch.stack([batch + 2**14, x - 1, y - 1, z - 1], -1)


def marching_cubes(
    coords: Tensor,
    sdf: Tensor,
    resolution: int,
    level: float,
    lo: float,
    hi: float,
    join: bool,
    with_edges: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Vertices, faces, batch index and (rows of the two ends, axis) of the grid edge of every vertex."""
    device = coords.device
    offset = torch.tensor([(0, *c) for c in cube.CORNERS], device=device)
    edges = torch.tensor(cube.EDGES, device=device)  # [12, 2] corner, axis
    axes = torch.eye(4, dtype=torch.long, device=device)[1:]
    triangles = torch.tensor(cube.padded_table(join), device=device)  # [256, 5, 3], -1 beyond a case's last

    keys, order = torch.sort(_keys(coords, resolution))

    def row_of(place: Tensor) -> Tensor:
        """The voxel there, -1 if absent."""
        wanted = _keys(place, resolution)
        if keys.numel() == 0:
            return torch.full_like(wanted, -1)
        at = torch.searchsorted(keys, wanted).clamp_max(keys.numel() - 1)
        return torch.where(keys[at] == wanted, order[at], -1)

    def value_of(row: Tensor) -> Tensor:
        padded = torch.cat([sdf, sdf.new_tensor([OUTSIDE])])
        return padded[row]  # row -1 is the last

    # Every cell of the surface has an inside corner, and inside corners are stored.
    inside = coords[sdf < level].long()
    cells = torch.unique((inside[:, None] - offset).reshape(-1, 4), dim=0)  # sorted
    corners = cells[:, None] + offset
    code = ((value_of(row_of(corners)) < level) << torch.arange(8, device=device)).sum(-1)
    cells, corners, code = (t[(code > 0) & (code < 255)] for t in (cells, corners, code))

    # One vertex per crossed grid edge: named by its lower end and its axis, numbered in that order.
    low, high = edges[:, 0], edges[:, 0] + (4 >> edges[:, 1])
    crossed = (code[:, None] >> low & 1) != (code[:, None] >> high & 1)
    ends, end_of = torch.unique(_keys(corners[:, low][crossed], resolution), return_inverse=True)
    names, vertex_of = torch.unique(end_of * 3 + edges[:, 1].expand_as(crossed)[crossed], return_inverse=True)
    place, axis = _places(ends, resolution)[names // 3], names % 3
    vertex = torch.zeros(crossed.shape, dtype=torch.long, device=device)
    vertex[crossed] = vertex_of

    lower, upper = row_of(place), row_of(place + axes[axis])
    a, b = value_of(lower), value_of(upper)
    t = ((level - a) / (b - a)).clamp(0, 1)
    position = place[:, 1:].to(sdf) + 0.5 + t[:, None] * axes[axis][:, 1:]
    vertices = lo + position * ((hi - lo) / resolution)

    cut = triangles[code]
    faces = vertex.gather(1, cut.clamp_min(0).flatten(1)).view_as(cut)[cut[..., 0] >= 0]
    edge_rows = torch.stack([lower, upper, axis], -1)
    return vertices, faces.int(), place[:, 0].int(), edge_rows if with_edges else edge_rows[:0]


def marching_cubes_backward(
    grad_vertices: Tensor, sdf: Tensor, edges: Tensor, level: float, voxel_size: float
) -> Tensor:
    """Gradient with respect to sdf: t = (level − a) / (b − a) moves a vertex along its grid edge; fills have none."""
    lower, upper, axis = edges.unbind(-1)
    along = grad_vertices.gather(1, axis[:, None])[:, 0] * voxel_size
    a, b = (torch.where(row < 0, OUTSIDE, sdf[row.clamp_min(0)]) for row in (lower, upper))
    squared = (b - a).square()
    grad = torch.zeros_like(sdf)
    for row, share in ((lower, (level - b) / squared), (upper, (a - level) / squared)):
        grad = grad.index_add(0, row.clamp_min(0), torch.where(row < 0, 0.0, along * share))
    return grad
