"""Point map → thin SDF in one call."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit.ops.pointmap import face_batch_index, normalize_points, pointmap_edge_mask, pointmap_to_mesh
from cvctoolkit.ops.sdf.op import band_of_mesh, checked_band, udf_to_thin_sdf


class ThinSDF(NamedTuple):
    """The thin signed distance around the mesh of a point map, on the sparse grid over [−1, 1]³.

    Attributes:
        coords: ``[N, 4]`` int32, (map, x, y, z), sorted lexicographically.
        sdf: ``[N]`` in [−1, 1], negative within half a band of the mesh.
        face_index: ``[N]`` int64, a nearest face.
        vertices: ``[Nv, 3]``, normalised.
        faces: ``[F, 3]`` int32.
        pixel_index: ``[Nv]`` int64, the pixel (b·H + i)·W + j of each vertex.
        center: ``[..., 3]``, one per map, in the units of the points: world = normalised · scale + center.
        scale: ``[...]``, one per map.
    """

    coords: Tensor
    sdf: Tensor
    face_index: Tensor
    vertices: Tensor
    faces: Tensor
    pixel_index: Tensor
    center: Tensor
    scale: Tensor


def thin_sdf_from_pointmap(
    points: Tensor,
    mask: Tensor | None,
    resolution: int,
    band: float,
    *,
    edge_rtol: float | None = None,
    edge_atol: float | None = None,
    corner_triangles: bool = False,
    margin: float | None = None,
) -> ThinSDF:
    """Chains `pointmap_edge_mask`, `normalize_points`, `pointmap_to_mesh`, `narrow_band_udf` and `udf_to_thin_sdf`.

    Every map is normalised by itself and gives a volume of its own. `marching_cubes` with the same resolution turns
    the result into a watertight shell.

    Args:
        points: ``[H, W, 3]`` or ``[..., H, W, 3]`` float32 or float64; pixels that are not finite are invalid.
            Differentiable, with the normalisation held fixed.
        mask: ``[..., H, W]`` bool, True where the point is valid; None: wherever it is finite.
        resolution: Voxels along an axis, at most 65536.
        band: τ in voxels; 3 or more gives a clean shell, below 2 it is perforated and this warns.
        edge_rtol: Cut the map where neighbouring points are farther apart than this fraction of their distance to the
            origin; None: no such cut.
        edge_atol: The same, in units of the points.
        corner_triangles: See `pointmap_faces`.
        margin: Free border around the mesh, in normalised units in [0, 1); None: the band and one voxel.

    Returns:
        (coords, sdf, face_index, vertices, faces, pixel_index, center, scale). The sizes depend on the data: on CUDA
        this synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes or devices do not fit, or a number is out of range.

    Source: Consistent3DGen, Sec. 3.2, Alg. 1.
    """
    op = "thin_sdf_from_pointmap"
    _checks.tensor(op, "points", points, "... H W 3", _checks.FLOAT32_64)
    resolution = _checks.resolution(op, resolution)
    band = checked_band(op, band)
    free = 2 * (band + 1) / resolution if margin is None else _checks.number(op, "margin", margin, at_least=0)
    if not free < 1:
        raise ValueError(f"{op}: a border of {free:g} leaves no room: raise resolution, or lower band or margin")
    for name, limit in (("edge_rtol", edge_rtol), ("edge_atol", edge_atol)):
        if limit is not None:
            _checks.number(op, name, limit, at_least=0)
    corner_triangles = _checks.flag(op, "corner_triangles", corner_triangles)

    valid = points.isfinite().all(-1)
    if mask is not None:
        _checks.tensor(op, "mask", mask, "... H W", (torch.bool,), device=points.device)
        _checks.same_shape(op, "mask", mask, points.shape[:-1])
        valid = valid & mask
    if edge_rtol is not None or edge_atol is not None:
        valid = valid & ~pointmap_edge_mask(points, valid, rtol=edge_rtol, atol=edge_atol)

    volumes = math.prod(points.shape[:-3])
    maps, valids = points.reshape(volumes, *points.shape[-3:]), valid.reshape(volumes, *valid.shape[-2:])
    boxes = [normalize_points(p.detach(), v, margin=free) for p, v in zip(maps, valids)]
    center = torch.stack([b.center for b in boxes]) if boxes else points.new_zeros(0, 3)
    scale = torch.stack([b.scale for b in boxes]) if boxes else points.new_ones(0)
    normalized = (maps - center[:, None, None]) / scale[:, None, None, None]

    mesh = pointmap_to_mesh(normalized, valids, corner_triangles=corner_triangles)
    height, width = valid.shape[-2:]
    volume = face_batch_index(mesh, max(height, 1), max(width, 1)) if len(maps) > 1 else None
    coords, udf, face_index = band_of_mesh(mesh.vertices, mesh.faces, resolution, band, face_batch=volume)
    sdf = udf_to_thin_sdf(udf, 2 * band / resolution)
    batch = points.shape[:-3]
    return ThinSDF(coords, sdf, face_index, *mesh, center.reshape(*batch, 3), scale.reshape(batch))
