"""The specification of the narrow band: plain PyTorch, every voxel of every face's dilated box, in float64.

Distances are rounded to the dtype of the vertices *before* faces are compared and before the band is cut: the face is
the lowest among those that give the returned distance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cvctoolkit.ops.mesh import reference as mesh

#: Voxel-face pairs evaluated at a time: bounds the memory.
PAIRS = 1 << 18

#: Voxel-face pairs in all: more would take hours.
MOST_PAIRS = 1 << 34

#: Batch indices fit 15 bits of a voxel key.
MAX_BATCH = 1 << 15


def voxel_centers(coords: Tensor, resolution: int, lo: float, hi: float) -> Tensor:
    """Positions ``[N, 3]`` of voxels (batch, x, y, z), in float64."""
    return lo + (coords[:, 1:].double() + 0.5) * ((hi - lo) / resolution)


def _pairs(low: Tensor, size: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Pairs first..last of (box, cell), counted through all boxes: box numbers and integer cells ``[P, 3]``."""
    ends = size.prod(-1).cumsum(0)
    pair = torch.arange(first, last, device=low.device)
    box = torch.searchsorted(ends, pair, right=True)
    rest = pair - (ends - size.prod(-1))[box]
    depth, width = size[box, 2], size[box, 1]
    return box, low[box] + torch.stack([rest // (depth * width), rest // depth % width, rest % depth], -1)


def narrow_band_udf(
    vertices: Tensor, faces: Tensor, face_batch: Tensor | None, resolution: int, band: float, lo: float, hi: float
) -> tuple[Tensor, Tensor, Tensor]:
    voxel = (hi - lo) / resolution
    corners, present = mesh._triangles(vertices, faces)
    batch = faces.new_zeros(len(faces)).long() if face_batch is None else face_batch.long()
    present = present & (batch >= 0) & (batch < MAX_BATCH)

    # The voxels of each face's box, dilated by a little more than the band.
    reach = (band + 1) * voxel
    low = ((corners.nan_to_num().amin(1) - reach - lo) / voxel).floor().clamp(0, resolution).long()
    high = ((corners.nan_to_num().amax(1) + reach - lo) / voxel).ceil().clamp(0, resolution).long()
    size = (high - low).clamp_min(0) * present[:, None]

    key, distance, face = (vertices.new_empty(0, dtype=t) for t in (torch.int64, vertices.dtype, torch.int64))
    work = float(size.double().prod(-1).sum())
    if work > MOST_PAIRS:
        raise ValueError(
            f"narrow_band_udf: {work:.2g} pairs of triangles and voxels are too many for the reference, which looks at "
            f"every one: take another backend, or lower the resolution or the band"
        )
    total = int(size.prod(-1).sum())
    for first in range(0, total, PAIRS):
        index, cell = _pairs(low, size, first, min(first + PAIRS, total))
        points = voxel_centers(torch.cat([batch[index, None], cell], 1), resolution, lo, hi)
        d = mesh.closest_point_on_triangle(points, *corners[index].unbind(1))[0].to(vertices.dtype)
        near = d < band * voxel
        names = ((batch[index] * resolution + cell[:, 0]) * resolution + cell[:, 1]) * resolution + cell[:, 2]
        key, distance, face = (torch.cat([a, b[near]]) for a, b in ((key, names), (distance, d), (face, index)))
        # Of equal voxels keep the least distance, then the lowest face: stable sorts by face, distance and voxel.
        order = torch.arange(len(key), device=key.device)
        for values in (face, distance, key):
            order = order[values[order].sort(stable=True).indices]
        first_of_voxel = torch.ones_like(key, dtype=torch.bool)
        first_of_voxel[1:] = key[order][1:] != key[order][:-1]
        kept = order[first_of_voxel]
        key, distance, face = key[kept], distance[kept], face[kept]

    z, y, x = key % resolution, key // resolution % resolution, key // resolution**2 % resolution
    return distance, torch.stack([key // resolution**3, x, y, z], -1).int(), face


def narrow_band_udf_backward(
    grad: Tensor,
    vertices: Tensor,
    faces: Tensor,
    coords: Tensor,
    face_index: Tensor,
    resolution: int,
    lo: float,
    hi: float,
) -> Tensor:
    """Gradient with respect to the vertices: the nearest point stays at its barycentric coordinates; 0 where d = 0."""
    total = torch.zeros_like(vertices)
    for g, c, f in zip(grad.split(PAIRS), coords.split(PAIRS), face_index.split(PAIRS)):
        total += mesh.closest_point_backward(g, voxel_centers(c, resolution, lo, hi), vertices, faces, f)[1]
    return total
