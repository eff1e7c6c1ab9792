"""Trilinear sampling of sparse voxels at points."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._backend import Backend
from cvctoolkit._library import define_op, names_itself
from cvctoolkit._native import kernels as _native
from cvctoolkit.ops.voxels import trilinear_reference as reference
from cvctoolkit.ops.voxels.conventions import checked_coords, raise_faults
from cvctoolkit.ops.voxels.dense_op import checked_feats
from cvctoolkit.ops.voxels.order_reference import in_range, voxel_keys

_OP = "sample_trilinear"
_OUTSIDE = ("zero", "renormalize")

# --- operators --------------------------------------------------------------------------------------------------------


def _corners_native(
    points: Tensor, batch: Tensor | None, coords: Tensor, resolution: int, lo: float, hi: float, assume_unique: bool
) -> Tensor:
    rows, faults = _native.trilinear_corners(points, batch, coords, resolution, lo, hi, assume_unique)
    raise_faults(_OP, faults, "coords")
    return rows


def _corners_reference(
    points: Tensor, batch: Tensor | None, coords: Tensor, resolution: int, lo: float, hi: float, assume_unique: bool
) -> Tensor:
    if coords.device.type == "cpu":
        if not bool(in_range(coords).all()):
            raise_faults(_OP, 1, "coords")
        if not assume_unique and len(torch.unique(voxel_keys(coords))) < len(coords):
            raise_faults(_OP, 4, "coords")
    return reference.corner_rows(points, batch, coords, resolution, lo, hi)


_corners = define_op(
    "trilinear_corners",
    "(Tensor points, Tensor? batch, Tensor coords, int resolution, float lo, float hi, bool assume_unique) -> Tensor",
    fake=lambda points, *_: points.new_empty(points.shape[0], 8, dtype=torch.int64),
    reference=_corners_reference,
    native=Backend(_corners_native, kernels=("trilinear_corners",)),
)


def _only_alike(feats: Tensor, points: Tensor, *_: Any) -> Iterable[str]:
    if feats.dtype not in _checks.FLOAT32_64 or points.dtype != feats.dtype:
        yield f"needs features and points of one dtype, float32 or float64, got {feats.dtype} and {points.dtype}"


def _twice(ctx: Any, *_: Any) -> None:
    raise RuntimeError(f"{_OP}: double backward through the fused gradient is not implemented")


_interpolate_backward = define_op(
    "trilinear_interpolate_backward",
    "(Tensor grad, Tensor feats, Tensor points, Tensor rows, int resolution, float lo, float hi, bool renormalize)"
    " -> (Tensor, Tensor)",
    fake=lambda grad, feats, points, *_: (torch.empty_like(feats), torch.empty_like(points)),
    reference=reference.interpolate_backward,
    native=Backend(
        _native.trilinear_interpolate_backward,
        lambda grad, *args: _only_alike(*args),
        kernels=("trilinear_interpolate_backward",),
    ),
    setup_context=lambda ctx, inputs, output: None,
    backward=_twice,
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    feats, points, rows, *ctx.about, _ = inputs
    ctx.save_for_backward(feats, points, rows)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    feats, points, rows = ctx.saved_tensors
    # To differentiate again (for an eikonal loss, say) takes the formula in differentiable operators.
    formula = reference.interpolate_backward if torch.is_grad_enabled() else _interpolate_backward
    found = formula(grad.contiguous(), feats, points, rows, *ctx.about)
    return *found, None, None, None, None, None


_interpolate = define_op(
    "trilinear_interpolate",
    "(Tensor feats, Tensor points, Tensor rows, int resolution, float lo, float hi, bool renormalize) -> Tensor",
    fake=lambda feats, points, *_: feats.new_empty(points.shape[0], feats.shape[1]),
    reference=reference.interpolate,
    native=Backend(_native.trilinear_interpolate, _only_alike, kernels=("trilinear_interpolate",)),
    setup_context=_context,
    backward=_backward,
)


# --- public function --------------------------------------------------------------------------------------------------


@names_itself
def sample_trilinear(
    coords: Tensor,
    feats: Tensor,
    points: Tensor,
    resolution: int,
    *,
    batch_index: Tensor | None = None,
    outside: str = "zero",
    bounds: tuple[float, float] = (-1.0, 1.0),
    assume_unique: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Interpolates the features of sparse voxels at points, trilinearly between voxel centres.

    Args:
        coords: ``[N, 4]`` int32 or int64, distinct (batch, x, y, z): batch in [0, 32768), coordinates in [0, 65536).
            Lexicographic order is the fast one.
        feats: ``[N, C]`` float. Differentiable, any number of times.
        points: ``[Q, 3]`` float32 or float64, world units. Differentiable, any number of times.
        resolution: Voxels along an axis of ``bounds``, at most 65536: voxel i has its centre at (i + 0.5)·h + low,
            h = (high − low) / resolution.
        batch_index: ``[Q]`` int32 or int64, the batch element of every point; None: 0 for all.
        outside: ``"zero"``: absent voxels count as 0. ``"renormalize"``: the weights of those present are scaled to a
            sum of 1. Without any of the eight (or for a point that is not finite) the result and its gradient are 0.
        bounds: World coordinates (low, high) of the cube that the grid fills.
        assume_unique: Do not refuse equal rows; the lowest of them counts.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[Q, C]``, in the dtype of ``feats``. The gradient of the features is summed in the order of the points,
        whatever the number of threads. On CUDA nothing is checked and nothing synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices, names or backend do not fit; a row is no voxel, or a voxel is repeated (on
            a CPU).
    """
    op = _OP
    coords = checked_coords(op, "coords", coords)
    feats = checked_feats(op, feats, coords)
    _checks.tensor(op, "points", points, "Q 3", _checks.FLOAT32_64, device=coords.device)
    resolution = _checks.resolution(op, resolution)
    lo, hi = _checks.bounds(op, bounds)
    renormalize = _checks.choice(op, "outside", outside, _OUTSIDE) == "renormalize"
    if batch_index is not None:
        _checks.tensor(op, "batch_index", batch_index, "Q", _checks.INTEGRAL, device=coords.device)
        _checks.same_shape(op, "batch_index", batch_index, points.shape[:1])
        batch_index = batch_index.long().contiguous()
    points = points.contiguous()
    assume_unique = _checks.flag(op, "assume_unique", assume_unique)
    rows = _corners(points.detach(), batch_index, coords, resolution, lo, hi, assume_unique, backend=backend)
    return _interpolate(feats, points, rows, resolution, lo, hi, renormalize, backend=backend)
