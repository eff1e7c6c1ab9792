"""The front cut: of a thick shell, keep what lies on the viewer's side of the surface."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._backend import Backend
from cvctoolkit._library import define_op, dynamic_sizes, names_itself
from cvctoolkit._native import kernels as _native
from cvctoolkit.ops.cameras.op import CAMERA_MODELS
from cvctoolkit.ops.mesh import build_bvh, cast_rays
from cvctoolkit.ops.pointmap import pointmap_to_mesh
from cvctoolkit.ops.voxels import front_cut_reference as reference
from cvctoolkit.ops.voxels import morphology_reference
from cvctoolkit.ops.voxels.conventions import checked_coords

_INVALID = ("keep", "drop")
_CONNECTIVITY = {6: 1, 18: 2, 26: 3}


class FrontCut(NamedTuple):
    """The part of a set of voxels on the viewer's side of a surface.

    Attributes:
        coords: ``[M, 4]`` int32, the kept voxels in the given order: ``coords == given[rows]``.
        rows: ``[M]`` int64, ascending.
        seam: ``[M]`` bool, True where a neighbour of the kept voxel was cut away: where the rest must join.
    """

    coords: Tensor
    rows: Tensor
    seam: Tensor


# --- operators --------------------------------------------------------------------------------------------------------

_front_side = define_op(
    "front_side",
    "(Tensor coords, Tensor depth, Tensor valid, Tensor Ks, Tensor viewmats, int resolution, float lo, float hi,"
    " float slack, bool ortho, bool corner_triangles) -> Tensor",
    fake=lambda coords, *_: coords.new_empty(coords.shape[0], dtype=torch.uint8),
    reference=reference.front_side,
    native=Backend(_native.front_side, kernels=("front_side",)),
)


def _fake_cut(coords: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    (m,) = dynamic_sizes(1)
    return coords.new_empty(m, 4), coords.new_empty(m, dtype=torch.int64), coords.new_empty(m, dtype=torch.bool)


_cut_with_seam = define_op(
    "cut_with_seam",
    "(Tensor coords, Tensor keep, int steps) -> (Tensor, Tensor, Tensor)",
    fake=_fake_cut,
    reference=morphology_reference.cut,
    native=Backend(_native.cut_with_seam, kernels=("cut_with_seam",)),
)


# --- public functions -------------------------------------------------------------------------------------------------


def _options(op: str, tolerance: float, invalid: str, connectivity: int) -> tuple[float, bool, int]:
    if _checks.integer(op, "connectivity", connectivity) not in _CONNECTIVITY:
        raise ValueError(f"{op}: connectivity must be 6, 18 or 26, got {connectivity!r}")
    keep_invalid = _checks.choice(op, "invalid", invalid, _INVALID) == "keep"
    return _checks.number(op, "tolerance", tolerance), keep_invalid, _CONNECTIVITY[connectivity]


def _cut(coords: Tensor, side: Tensor, keep_invalid: bool, steps: int, backend: str | None) -> FrontCut:
    keep = side != reference.BEHIND if keep_invalid else side == reference.FRONT
    return FrontCut(*_cut_with_seam(coords, keep, steps, backend=backend))


def _maps(value: Tensor, trailing: int) -> Tensor:
    """One map as a batch of one."""
    return value[None] if value.dim() == trailing else value


@names_itself
def front_cut(
    coords: Tensor,
    resolution: int,
    depth: Tensor,
    Ks: Tensor,
    viewmats: Tensor,
    *,
    mask: Tensor | None = None,
    tolerance: float = 0.5,
    invalid: str = "keep",
    camera_model: str = "pinhole",
    corner_triangles: bool = False,
    connectivity: int = 6,
    bounds: tuple[float, float] = (-1.0, 1.0),
    backend: str | None = None,
) -> FrontCut:
    """Cuts off what lies behind the surface of a depth map, as its camera sees it.

    A voxel is behind when its centre is farther from the camera than the surface on its ray, by more than ``tolerance``
    voxels, measured along the ray (along the optical axis for ``"ortho"``). The surface is the mesh of the map
    (`pointmap_to_mesh`): two triangles between every 2×2 valid pixels, met exactly and in constant time. Mask depth
    edges out (`depth_edge_mask`), or the triangles across them cut, too.

    Args:
        coords: ``[N, 4]`` int32 or int64, (batch, x, y, z), in any order.
        resolution: Voxels along an axis of ``bounds``, at most 65536; the size of a voxel, or of a coarse cell, is
            (high − low) / resolution.
        depth: ``[B, H, W]`` float z-depth in world units, one map per batch element, or ``[H, W]``. Not finite, or not
            positive for ``"pinhole"``, is invalid.
        Ks: ``[B, 3, 3]`` or ``[3, 3]`` float, in pixels of the depth map, pixel centres at + 0.5.
        viewmats: ``[B, 4, 4]`` or ``[4, 4]`` float, world → camera (OpenCV axes, rigid).
        mask: ``[B, H, W]`` or ``[H, W]`` bool, True where the depth is valid; None: wherever it can be.
        tolerance: How far behind the surface a centre may lie, in voxels. Half a voxel keeps the cells through which
            the surface passes; 0 cuts at the surface; negative values cut before it.
        invalid: What becomes of voxels whose ray meets no surface, because a pixel there has no valid point or because
            they lie outside the image or behind the camera: ``"keep"`` or ``"drop"``.
        camera_model: ``"pinhole"`` or ``"ortho"`` (u = fx·x + cx, no division).
        corner_triangles: See `pointmap_faces`.
        connectivity: Neighbours that make a seam: 6 (faces), 18 (and edges) or 26 (and corners).
        bounds: World coordinates (low, high) of the cube that the grid fills.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        (coords, rows, seam), in the given order. Decided in float64; the same on every CPU backend. The size depends on
        the data: on CUDA this synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices, numbers, names or backend do not fit.

    Source: Consistent3DGen, Sec. 3.2.2–3.2.3 ("cut off the back half").
    """
    op = "front_cut"
    coords = checked_coords(op, "coords", coords)
    resolution = _checks.resolution(op, resolution)
    lo, hi = _checks.bounds(op, bounds)
    tolerance, keep_invalid, steps = _options(op, tolerance, invalid, connectivity)
    ortho = _checks.choice(op, "camera_model", camera_model, CAMERA_MODELS) == "ortho"
    for name, value, trailing in (("depth", depth, "H W"), ("Ks", Ks, "3 3"), ("viewmats", viewmats, "4 4")):
        _checks.tensor(op, name, value, f"... {trailing}", _checks.FLOATING, device=coords.device)
        if value.dim() > 3:
            raise ValueError(
                f"{op}: {name} must have shape [B, {trailing.replace(' ', ', ')}], got {list(value.shape)}"
            )
    depth, Ks, viewmats = (_maps(v.detach(), 2).double() for v in (depth, Ks, viewmats))
    for name, value in (("Ks", Ks), ("viewmats", viewmats)):
        _checks.same_shape(op, name, value, (depth.shape[0], *value.shape[1:]))
    valid = depth.isfinite() if ortho else (depth > 0) & depth.isfinite()
    if mask is not None:
        _checks.tensor(op, "mask", mask, "... H W", (torch.bool,), device=coords.device)
        _checks.same_shape(op, "mask", _maps(mask, 2), depth.shape)
        valid = valid & _maps(mask, 2)
    slack = tolerance * (hi - lo) / resolution
    tensors = (coords, depth.contiguous(), valid.contiguous(), Ks.contiguous(), viewmats.contiguous())
    corner_triangles = _checks.flag(op, "corner_triangles", corner_triangles)
    side = _front_side(*tensors, resolution, lo, hi, slack, ortho, corner_triangles, backend=backend)
    return _cut(coords, side, keep_invalid, steps, backend)


@names_itself
def front_cut_pointmap(
    coords: Tensor,
    resolution: int,
    points: Tensor,
    eye: Tensor,
    *,
    mask: Tensor | None = None,
    tolerance: float = 0.5,
    invalid: str = "keep",
    corner_triangles: bool = False,
    connectivity: int = 6,
    bounds: tuple[float, float] = (-1.0, 1.0),
) -> FrontCut:
    """Cuts off what lies behind the surface of a point map, for a viewer whose intrinsics are unknown.

    As `front_cut`, but the surface on a voxel's ray is found by casting that ray from the viewer at the mesh of the
    map: predicted point maps that fit no camera exactly are welcome, and it costs a search per voxel.

    Args:
        coords: ``[N, 4]`` int32 or int64, (batch, x, y, z), in any order.
        resolution: Voxels along an axis of ``bounds``, at most 65536.
        points: ``[B, H, W, 3]`` float32 or float64 in world units, one map per batch element, or ``[H, W, 3]``. Points
            that are not finite are invalid. Mask depth edges out (`pointmap_edge_mask`).
        eye: ``[B, 3]`` or ``[3]``, in the dtype of the points: where the viewer is, in world units. For a camera-frame
            map normalised by `normalize_points` that is −center / scale.
        mask: ``[B, H, W]`` or ``[H, W]`` bool, True where the point is valid; None: wherever it is finite.
        tolerance: How far behind the surface a centre may lie, in voxels, along the ray.
        invalid: ``"keep"`` or ``"drop"`` voxels whose ray meets no surface.
        corner_triangles: See `pointmap_faces`.
        connectivity: Neighbours that make a seam: 6 (faces), 18 (and edges) or 26 (and corners).
        bounds: World coordinates (low, high) of the cube that the grid fills.

    Returns:
        (coords, rows, seam), in the given order. Of several surfaces on a ray the one nearest to the viewer counts. The
        size depends on the data: on CUDA this synchronises, once per batch element and more.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices, numbers or names do not fit; the eye is not finite (on a CPU).

    Source: Consistent3DGen, Sec. 3.2.2–3.2.3 ("cut off the back half").
    """
    op = "front_cut_pointmap"
    coords = checked_coords(op, "coords", coords)
    resolution = _checks.resolution(op, resolution)
    lo, hi = _checks.bounds(op, bounds)
    tolerance, keep_invalid, steps = _options(op, tolerance, invalid, connectivity)
    _checks.tensor(op, "points", points, "... H W 3", _checks.FLOAT32_64, device=coords.device)
    _checks.tensor(op, "eye", eye, "... 3", (points.dtype,), device=coords.device)
    if points.dim() > 4 or eye.dim() > 2:
        raise ValueError(f"{op}: points must have shape [B, H, W, 3] and eye [B, 3], got {list(points.shape)}")
    points, eye = _maps(points.detach(), 3), _maps(eye.detach(), 1)
    _checks.same_shape(op, "eye", eye, (points.shape[0], 3))
    _checks.finite(op, "eye", eye)
    if mask is not None:
        _checks.tensor(op, "mask", mask, "... H W", (torch.bool,), device=coords.device)
        mask = _maps(mask, 2)
        _checks.same_shape(op, "mask", mask, points.shape[:-1])

    centers = torch.stack(morphology_reference.centers(coords, resolution, lo, hi), -1).to(points.dtype)
    slack = tolerance * (hi - lo) / resolution
    side = torch.full_like(coords[:, 0], reference.NO_SURFACE, dtype=torch.uint8)
    for b in range(points.shape[0]):
        mesh = pointmap_to_mesh(points[b], None if mask is None else mask[b], corner_triangles=corner_triangles)
        bvh = build_bvh(mesh.vertices, mesh.faces)
        rows = (coords[:, 0] == b).nonzero()[:, 0]
        along = centers[rows] - eye[b]
        distance = along.norm(dim=-1)
        along[distance == 0] = 1.0  # the viewer's own voxel: any ray will do
        t = cast_rays(eye[b].expand_as(along), along, mesh.vertices, mesh.faces, bvh).t
        behind = torch.where(distance - t * distance > slack, reference.BEHIND, reference.FRONT)
        side[rows] = torch.where(t.isfinite(), behind, reference.NO_SURFACE).to(torch.uint8)
    return _cut(coords, side, keep_invalid, steps, None)
