"""Dilation of sets of voxels, and cuts by a box and by a plane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._backend import Backend
from cvctoolkit._library import define_op, dynamic_sizes
from cvctoolkit._native import kernels as _native
from cvctoolkit.ops.voxels import morphology_reference as reference
from cvctoolkit.ops.voxels.conventions import MAX_COORD, checked_coords, raise_faults
from cvctoolkit.ops.voxels.dense_op import checked_shape
from cvctoolkit.ops.voxels.order_reference import in_range

#: A kernel's extent along an axis.
MAX_KERNEL = 63


class VoxelCut(NamedTuple):
    """What a cut keeps.

    Attributes:
        coords: ``[M, 4]`` int32, the kept voxels in the given order: ``coords == given[rows]``.
        rows: ``[M]`` int64, ascending.
    """

    coords: Tensor
    rows: Tensor


# --- operators --------------------------------------------------------------------------------------------------------


def _dilate_native(coords: Tensor, kernel: Tensor, shape: list[int]) -> Tensor:
    out, faults = _native.voxel_dilate(coords, kernel.to(coords.device), *shape)
    raise_faults("voxel_dilate", faults, "coords")
    return out


def _dilate_reference(coords: Tensor, kernel: Tensor, shape: list[int]) -> Tensor:
    if not bool(in_range(coords).all()):
        raise_faults("voxel_dilate", 1, "coords")
    return reference.voxel_dilate(coords, kernel, shape)


def _fake_dilate(coords: Tensor, *_: Any) -> Tensor:
    return coords.new_empty(next(dynamic_sizes(1)), 4)


_voxel_dilate = define_op(
    "voxel_dilate",
    "(Tensor coords, Tensor kernel, int[] shape) -> Tensor",
    fake=_fake_dilate,
    reference=_dilate_reference,
    native=Backend(_dilate_native, kernels=("voxel_dilate",)),
)


def _fake_cut(coords: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    count = next(dynamic_sizes(1))
    return coords.new_empty(count, 4), coords.new_empty(count, dtype=torch.int64)


_crop_box = define_op(
    "crop_box",
    "(Tensor coords, int[] low, int[] high) -> (Tensor, Tensor)",
    fake=_fake_cut,
    reference=reference.crop_box,
    native=Backend(_native.crop_box, kernels=("crop_box",)),
)


def _check_planes(run: Callable[..., Any]) -> Callable[..., Any]:
    """Data-dependent, inside the operator so that it breaks no graph; on CUDA it would synchronise."""

    def checked(coords: Tensor, planes: Tensor, *args: Any) -> Any:
        if planes.device.type == "cpu" and not bool(planes.isfinite().all()):
            raise ValueError("cut_half_space: plane must be finite, with n not 0")
        return run(coords, planes, *args)

    return checked


_cut_half_space = define_op(
    "cut_half_space",
    "(Tensor coords, Tensor planes, int resolution, float lo, float hi, float slack) -> (Tensor, Tensor)",
    fake=_fake_cut,
    reference=_check_planes(reference.cut_half_space),
    native=Backend(_check_planes(_native.cut_half_space), kernels=("cut_half_space",)),
)


# --- public functions -------------------------------------------------------------------------------------------------


def voxel_dilate(
    coords: Tensor,
    kernel: int | Tensor = 3,
    *,
    spatial_shape: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Grows a set of voxels by a kernel: the voxels p + k of every voxel p and every offset k of the kernel.

    Args:
        coords: ``[N, 4]`` int32 or int64, (batch, x, y, z): batch in [0, 32768), coordinates in [0, 65536); rows may
            repeat. Lexicographic order is the fast one.
        kernel: The edge of a cube in voxels, odd; or ``[Kx, Ky, Kz]`` bool, odd sizes, True at the offsets from its
            middle, as in ``scipy.ndimage.binary_dilation``. At most 63 along an axis. Without its middle the voxels
            themselves may be lost.
        spatial_shape: (X, Y, Z): what would grow beyond it is dropped; None: 65536 along every axis.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[M, 4]`` int32, distinct, in lexicographic order; the same on every backend. ``voxel_lookup`` in it gives the
        rows of the given voxels. The size depends on the data: on CUDA this synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, sizes or backend do not fit; a row is no voxel.
    """
    op = "voxel_dilate"
    coords = checked_coords(op, "coords", coords)
    if isinstance(kernel, Tensor):
        structure = _checks.tensor(op, "kernel", kernel, "Kx Ky Kz", (torch.bool,)).cpu().contiguous()
    else:
        structure = torch.ones([_checks.integer(op, "kernel", kernel, at_least=1, at_most=MAX_KERNEL)] * 3).bool()
    if any(size % 2 == 0 or size > MAX_KERNEL for size in structure.shape):
        raise ValueError(f"{op}: kernel must have odd sizes of at most {MAX_KERNEL}, got {list(structure.shape)}")
    shape = [MAX_COORD] * 3 if spatial_shape is None else checked_shape(op, spatial_shape)
    return _voxel_dilate(coords, structure, shape, backend=backend)


def _corner(op: str, name: str, value: int | Sequence[int]) -> list[int]:
    values = list(value) if isinstance(value, (tuple, list)) else [value] * 3
    if len(values) != 3:
        raise ValueError(f"{op}: {name} must be an integer or three, got {value!r}")
    limit = 1 << 31
    return [_checks.integer(op, name, v, at_least=-limit, at_most=limit) for v in values]


def crop_box(
    coords: Tensor, low: int | Sequence[int], high: int | Sequence[int], *, backend: str | None = None
) -> VoxelCut:
    """Keeps the voxels in an axis-aligned box: low ≤ (x, y, z) < high, in every batch element.

    Args:
        coords: ``[N, 4]`` int32 or int64, (batch, x, y, z), in any order; rows may repeat.
        low: First coordinate kept, for all axes or for (x, y, z).
        high: First coordinate not kept, for all axes or for (x, y, z).
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        (coords, rows), in the given order; the same on every backend. The size depends on the data: on CUDA this
        synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shape, dtype or backend do not fit, or a corner has not one or three numbers.
    """
    op = "crop_box"
    coords = checked_coords(op, "coords", coords)
    return VoxelCut(*_crop_box(coords, _corner(op, "low", low), _corner(op, "high", high), backend=backend))


def cut_half_space(
    coords: Tensor,
    resolution: int,
    plane: Tensor,
    *,
    tolerance: float = 0.0,
    bounds: tuple[float, float] = (-1.0, 1.0),
    backend: str | None = None,
) -> VoxelCut:
    """Keeps the voxels on the positive side of a plane: those whose centre has n·c + d ≥ −tolerance · h · ‖n‖.

    Args:
        coords: ``[N, 4]`` int32 or int64, (batch, x, y, z), in any order; rows may repeat.
        resolution: Voxels along an axis of ``bounds``, at most 65536: h = (high − low) / resolution.
        plane: ``[4]`` float (n, d), world units, n not zero, of any length; or ``[B, 4]``, one per batch element.
        tolerance: How far behind the plane a centre may lie, in voxels; negative: how far before it it must.
        bounds: World coordinates (low, high) of the cube that the grid fills.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        (coords, rows), in the given order. Decided in float64; the same on every backend. Voxels of batch elements
        without a plane are not kept. The size depends on the data: on CUDA this synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices, numbers or backend do not fit; a plane is not finite or n is 0 (on a CPU).
    """
    op = "cut_half_space"
    coords = checked_coords(op, "coords", coords)
    resolution = _checks.resolution(op, resolution)
    lo, hi = _checks.bounds(op, bounds)
    _checks.tensor(op, "plane", plane, "... 4", _checks.FLOATING, device=coords.device)
    if plane.dim() > 2:
        raise ValueError(f"{op}: plane must have shape [4] or [B, 4], got {list(plane.shape)}")
    slack = _checks.number(op, "tolerance", tolerance) * (hi - lo) / resolution
    planes = plane.detach().reshape(-1, 4).double()
    planes = planes / planes[:, :3].norm(dim=-1, keepdim=True)
    return VoxelCut(*_cut_half_space(coords, planes, resolution, lo, hi, slack, backend=backend))
