"""Converters from other camera conventions to ours (OpenCV axes, world → camera, intrinsics in pixels)."""

from __future__ import annotations

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._library import names_itself
from cvctoolkit.ops.cameras.reference import matmul

_FLOATS = _checks.FLOAT32_64


def rescale_intrinsics(Ks: Tensor, scale: float | tuple[float, float]) -> Tensor:
    """Intrinsics of a resized image: with pixel centres at +0.5 this is one multiplication.

    Args:
        Ks: ``[..., 3, 3]`` float.
        scale: New size over old size, one number or (x, y).

    Returns:
        ``[..., 3, 3]``.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Wrong shape, or a scale that is not positive.
    """
    op = "rescale_intrinsics"
    _checks.tensor(op, "Ks", Ks, "... 3 3", _FLOATS)
    x, y = scale if isinstance(scale, (tuple, list)) and len(scale) == 2 else (scale, scale)
    rows = [_checks.number(op, "scale", x, above=0), _checks.number(op, "scale", y, above=0), 1.0]
    return Ks * Ks.new_tensor(rows)[:, None]


@names_itself
def intrinsics_from_normalized(Ks: Tensor, width: int, height: int) -> Tensor:
    """Pixel intrinsics from ones normalised by the image size (pixelSplat, MVSplat: x and y in [0, 1]).

    Args:
        Ks: ``[..., 3, 3]`` float.
        width: Pixels.
        height: Pixels.

    Returns:
        ``[..., 3, 3]``.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Wrong shape or size.
    """
    op = "intrinsics_from_normalized"
    width, height = (_checks.integer(op, n, v, at_least=1) for n, v in (("width", width), ("height", height)))
    return rescale_intrinsics(Ks, (float(width), float(height)))


def intrinsics_from_fov(fov: Tensor, width: int, height: int) -> Tensor:
    """Pinhole intrinsics of a horizontal field of view, principal point at the image centre.

    Args:
        fov: ``[...]`` float, radians in (0, π).
        width: Pixels.
        height: Pixels.

    Returns:
        ``[..., 3, 3]``.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Wrong dtype or size.
    """
    op = "intrinsics_from_fov"
    _checks.tensor(op, "fov", fov, "...", _FLOATS)
    width, height = (_checks.integer(op, n, v, at_least=1) for n, v in (("width", width), ("height", height)))
    return _centred(0.5 * width / torch.tan(fov / 2), width, height)


def intrinsics_from_extent(extent: Tensor, width: int, height: int) -> Tensor:
    """Orthographic intrinsics of a camera that sees ``extent`` world units across, square pixels, axis at the centre.

    Wonder3D's six views see [−1, 1]: extent 2.

    Args:
        extent: ``[...]`` float, world units across the width of the image, positive.
        width: Pixels.
        height: Pixels.

    Returns:
        ``[..., 3, 3]`` for ``camera_model="ortho"``.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Wrong dtype or size.
    """
    op = "intrinsics_from_extent"
    _checks.tensor(op, "extent", extent, "...", _FLOATS)
    width, height = (_checks.integer(op, n, v, at_least=1) for n, v in (("width", width), ("height", height)))
    return _centred(width / extent, width, height)


def _centred(focal: Tensor, width: int, height: int) -> Tensor:
    zero, one = torch.zeros_like(focal), torch.ones_like(focal)
    rows = [focal, zero, one * (width / 2), zero, focal, one * (height / 2), zero, zero, one]
    return torch.stack(rows, -1).reshape(*focal.shape, 3, 3)


def viewmats_from_c2w(c2w: Tensor) -> Tensor:
    """World → camera from camera → world with OpenCV axes.

    Args:
        c2w: ``[..., 4, 4]`` float32/64, rigid.

    Returns:
        ``[..., 4, 4]``.

    Raises:
        TypeError: Not a tensor.
        ValueError: Wrong shape or dtype.
    """
    _checks.tensor("viewmats_from_c2w", "c2w", c2w, "... 4 4", _FLOATS)
    rotation = c2w[..., :3, :3].mT
    translation = -matmul(rotation, c2w[..., :3, 3:])
    return torch.cat([torch.cat([rotation, translation], -1), c2w[..., 3:, :]], -2)


def viewmats_from_opengl(c2w: Tensor) -> Tensor:
    """World → camera from camera → world with OpenGL/Blender axes (+x right, +y up, −z forward).

    Args:
        c2w: ``[..., 4, 4]`` float32/64, rigid.

    Returns:
        ``[..., 4, 4]``.

    Raises:
        TypeError: Not a tensor.
        ValueError: Wrong shape or dtype.
    """
    _checks.tensor("viewmats_from_opengl", "c2w", c2w, "... 4 4", _FLOATS)
    return viewmats_from_c2w(c2w * c2w.new_tensor([1.0, -1.0, -1.0, 1.0]))


def cameras_from_pytorch3d(
    R: Tensor, T: Tensor, focal_length: Tensor, principal_point: Tensor, width: int, height: int
) -> tuple[Tensor, Tensor]:
    """(Ks, viewmats) from PyTorch3D cameras in NDC (+x left, +y up, +z forward; row vectors X R + T).

    Args:
        R: ``[..., 3, 3]`` float32/64.
        T: ``[..., 3]``.
        focal_length: ``[..., 2]``, NDC: one unit is half the shorter image side.
        principal_point: ``[..., 2]``, NDC.
        width: Pixels.
        height: Pixels.

    Returns:
        Ks ``[..., 3, 3]`` in pixels and viewmats ``[..., 4, 4]``.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes or sizes do not fit.
    """
    op = "cameras_from_pytorch3d"
    _checks.tensor(op, "R", R, "... 3 3", _FLOATS)
    for name, value, size in (("T", T, 3), ("focal_length", focal_length, 2), ("principal_point", principal_point, 2)):
        _checks.tensor(op, name, value, f"... {size}", _FLOATS, device=R.device)
        _checks.same_shape(op, name, value, (*R.shape[:-2], size))
    width, height = (_checks.integer(op, n, v, at_least=1) for n, v in (("width", width), ("height", height)))
    flip = R.new_tensor([-1.0, -1.0, 1.0])
    rotation, translation = flip[:, None] * R.mT, flip * T
    last = R.new_tensor([0.0, 0.0, 0.0, 1.0]).expand(*R.shape[:-2], 1, 4)
    viewmats = torch.cat([torch.cat([rotation, translation[..., None]], -1), last], -2)

    half = min(width, height) / 2
    focal, center = focal_length * half, R.new_tensor([width / 2, height / 2]) - principal_point * half
    zero, one = torch.zeros_like(focal[..., 0]), torch.ones_like(focal[..., 0])
    rows = [focal[..., 0], zero, center[..., 0], zero, focal[..., 1], center[..., 1], zero, zero, one]
    return torch.stack(rows, -1).reshape(*R.shape[:-2], 3, 3), viewmats
