"""Cameras: unproject, project, rays. One convention, stated in this family's README."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit.ops.cameras import reference

CAMERA_MODELS = ("pinhole", "ortho")
DEPTH_TYPES = ("z", "ray")
_FLOATS = _checks.FLOAT32_64
_RIGID = 1e-3  # what |RᵀR − I| may be: rotations printed to four digits pass, scaled or sheared ones do not


class Projection(NamedTuple):
    """Where points fall in an image.

    Attributes:
        uv: ``[..., 2]``, pixels; the centre of pixel (i, j) is (j + 0.5, i + 0.5).
        depth: ``[...]``, z in the camera frame; not positive behind a pinhole camera.
    """

    uv: Tensor
    depth: Tensor


class Rays(NamedTuple):
    """One ray per pixel, in the world frame.

    Attributes:
        origins: ``[..., H, W, 3]``.
        directions: ``[..., H, W, 3]``, unit.
    """

    origins: Tensor
    directions: Tensor


class EpipolarPoints(NamedTuple):
    """Points along the rays of reference views, and where the neighbouring views see them.

    Attributes:
        points: ``[..., Vq, H, W, P, 3]``, world.
        uv: ``[..., Vq, H, W, P, Nv, 2]``, pixels of each neighbour, in the size that the intrinsics refer to.
        depth: ``[..., Vq, H, W, P, Nv]``, z in the neighbour's frame; not positive behind a pinhole camera.
    """

    points: Tensor
    uv: Tensor
    depth: Tensor


def _cameras(op: str, Ks: Tensor, viewmats: Tensor | None, camera_model: str, device: torch.device | None) -> bool:
    """Checks a set of cameras; returns whether they are orthographic."""
    _checks.tensor(op, "Ks", Ks, "... 3 3", _FLOATS, device=device)
    if viewmats is not None:
        _checks.tensor(op, "viewmats", viewmats, "... 4 4", _FLOATS, device=Ks.device)
        if viewmats.dtype != Ks.dtype:
            raise ValueError(f"{op}: viewmats must have dtype {Ks.dtype} like Ks, got {viewmats.dtype}")
        _broadcastable(op, "viewmats", viewmats.shape[:-2], Ks.shape[:-2])
    return _checks.choice(op, "camera_model", camera_model, CAMERA_MODELS) == "ortho"


def _broadcastable(op: str, name: str, a: torch.Size, b: torch.Size) -> None:
    # Not torch.broadcast_shapes: its first call imports SymPy, half a second of the caller's time.
    if any(x != y and x != 1 and y != 1 for x, y in zip(reversed(a), reversed(b))):
        raise ValueError(f"{op}: {name} has batch dimensions {list(a)} that do not broadcast with {list(b)}")


def _size(op: str, width: int, height: int, cameras: Tensor) -> None:
    _checks.integer(op, "width", width, at_least=0)
    _checks.integer(op, "height", height, at_least=0)
    # Six numbers per pixel, of all cameras: what no memory holds is refused before it is asked for.
    size = math.prod(cameras.shape[:-2]) * max(width, 1) * max(height, 1) * 6 * cameras.element_size()
    _checks.fits_memory(op, "a map of rays", size, cameras.device)


def unproject_depth(
    depth: Tensor,
    Ks: Tensor,
    viewmats: Tensor | None = None,
    *,
    camera_model: str = "pinhole",
    depth_type: str = "z",
) -> Tensor:
    """Turns depth maps into point maps.

    Args:
        depth: ``[..., H, W]`` float32/64, in world units. NaN gives NaN points. Differentiable.
        Ks: ``[..., 3, 3]``, intrinsics in pixels of this depth map. Differentiable.
        viewmats: ``[..., 4, 4]`` world → camera (OpenCV axes, rigid); None gives camera-frame points. Differentiable.
        camera_model: ``"pinhole"`` or ``"ortho"`` (u = fx·x + cx, no division).
        depth_type: ``"z"`` (along the optical axis) or ``"ray"`` (along the pixel's ray; the same for ``"ortho"``).

    Returns:
        ``[..., H, W, 3]`` points.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: Shapes, dtypes, devices or names do not fit.
    """
    op = "unproject_depth"
    _checks.tensor(op, "depth", depth, "... H W", _FLOATS)
    ortho = _cameras(op, Ks, viewmats, camera_model, depth.device)
    _same_dtype(op, "Ks", Ks, depth)
    _broadcastable(op, "Ks", Ks.shape[:-2], depth.shape[:-2])
    ray_depth = _checks.choice(op, "depth_type", depth_type, DEPTH_TYPES) == "ray"
    return reference.unproject_depth(depth, Ks, viewmats, ortho, ray_depth)


def _same_dtype(op: str, name: str, value: Tensor, like: Tensor) -> None:
    if value.dtype != like.dtype:
        raise ValueError(f"{op}: {name} must have dtype {like.dtype} like the first argument, got {value.dtype}")


def project_points(
    points: Tensor, Ks: Tensor, viewmats: Tensor | None = None, *, camera_model: str = "pinhole"
) -> Projection:
    """Projects points into images.

    Args:
        points: ``[*batch, *any, 3]`` float32/64, world (camera frame without ``viewmats``). Differentiable.
        Ks: ``[*batch, 3, 3]``: its batch dimensions are the leading ones of ``points``. Differentiable.
        viewmats: ``[*batch, 4, 4]`` world → camera. Differentiable.
        camera_model: ``"pinhole"`` or ``"ortho"``.

    Returns:
        (uv, depth). Behind a pinhole camera (depth ≤ 0) uv is finite but means nothing: select by depth.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: Shapes, dtypes, devices or names do not fit.
    """
    op = "project_points"
    _checks.tensor(op, "points", points, "... 3", _FLOATS)
    ortho = _cameras(op, Ks, viewmats, camera_model, points.device)
    _same_dtype(op, "Ks", Ks, points)
    batch = Ks.dim() - 2
    if points.dim() - 1 < batch or (viewmats is not None and viewmats.dim() != Ks.dim()):
        shapes = f"points {list(points.shape)}, Ks {list(Ks.shape)}"
        shapes += "" if viewmats is None else f", viewmats {list(viewmats.shape)}"
        raise ValueError(f"{op}: Ks and viewmats must have the leading dimensions of points, got {shapes}")
    _broadcastable(op, "Ks", Ks.shape[:-2], points.shape[:batch])
    return Projection(*reference.project_points(points, Ks, viewmats, ortho))


def camera_rays(Ks: Tensor, viewmats: Tensor, width: int, height: int, *, camera_model: str = "pinhole") -> Rays:
    """The world-frame ray through the centre of every pixel.

    Args:
        Ks: ``[..., 3, 3]`` float32/64, in pixels of ``width`` × ``height``. Differentiable.
        viewmats: ``[..., 4, 4]`` world → camera. Differentiable.
        width: Pixels.
        height: Pixels.
        camera_model: ``"pinhole"`` (origins at the camera centre) or ``"ortho"`` (origins on the camera's z = 0
            plane).

    Returns:
        (origins, directions), directions unit.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or names do not fit, or the rays would not fit into memory.
    """
    op = "camera_rays"
    _checks.tensor(op, "viewmats", viewmats, "... 4 4", _FLOATS)
    ortho = _cameras(op, Ks, viewmats, camera_model, None)
    _size(op, width, height, viewmats)
    return Rays(*reference.camera_rays(Ks, viewmats, width, height, ortho))


def plucker_rays(Ks: Tensor, viewmats: Tensor, width: int, height: int, *, camera_model: str = "pinhole") -> Tensor:
    """Plücker coordinates (d, o × d) of the ray through the centre of every pixel.

    Args:
        Ks: ``[..., 3, 3]`` float32/64, in pixels of ``width`` × ``height``. Differentiable.
        viewmats: ``[..., 4, 4]`` world → camera. Differentiable.
        width: Pixels.
        height: Pixels.
        camera_model: ``"pinhole"`` or ``"ortho"``.

    Returns:
        ``[..., H, W, 6]``: unit direction d and moment o × d, world frame.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or names do not fit, or the rays would not fit into memory.

    Source: SPAD; depth-guided decoder, Sec. 3.4.
    """
    op = "plucker_rays"
    _checks.tensor(op, "viewmats", viewmats, "... 4 4", _FLOATS)
    ortho = _cameras(op, Ks, viewmats, camera_model, None)
    _size(op, width, height, viewmats)
    return reference.plucker_rays(Ks, viewmats, width, height, ortho)


def check_cameras(op: str, Ks: Tensor, viewmats: Tensor) -> None:
    """Data-dependent: refuses zero focal lengths, NaN, and matrices that are not rigid, on a CPU in eager mode.

    On CUDA it would synchronise, under ``torch.compile`` break the graph: there it does nothing.
    """
    if Ks.device.type != "cpu" or torch.compiler.is_compiling() or type(Ks.data) is not Tensor:
        return
    Ks, viewmats = Ks.detach(), viewmats.detach()
    focal = Ks[..., (0, 1), (0, 1)]
    if not (Ks.isfinite().all() and (focal != 0).all()):
        raise ValueError(f"{op}: Ks must be finite, with focal lengths other than 0, got {Ks.flatten()[:9].tolist()}")
    rotation = viewmats[..., :3, :3].double()
    error = (rotation @ rotation.mT - torch.eye(3, dtype=torch.float64)).abs()
    last = viewmats[..., 3, :] - viewmats.new_tensor([0.0, 0.0, 0.0, 1.0])
    proper = (error < _RIGID).all() and (torch.linalg.det(rotation) > 0).all()
    if not (proper and (last.abs() < _RIGID).all() and viewmats.isfinite().all()):
        raise ValueError(
            f"{op}: viewmats must be rigid world to camera matrices, got {viewmats.flatten()[:16].tolist()}"
        )


def view_index(
    op: str, name: str, value: Any, shape: str, num_views: int, device: torch.device, lowest: int = 0
) -> Tensor | None:
    """Checks an index of views; as int64 on ``device``. Its range is checked on a CPU in eager mode."""
    if value is None:
        return None
    if not isinstance(value, (Tensor, list, tuple)):
        raise TypeError(f"{op}: {name} must be a torch.Tensor or a sequence of integers, got {type(value).__name__}")
    try:
        index = value if isinstance(value, Tensor) else torch.tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{op}: {name} must have shape [{', '.join(shape.split())}], got {value!r}") from None
    index = index if index.numel() else index.long()  # an empty list makes floats
    _checks.tensor(op, name, index, shape, _checks.INTEGRAL, device=device)
    if device.type == "cpu" and index.numel() and not torch.compiler.is_compiling() and type(index) is Tensor:
        low, high = (int(x) for x in torch.aminmax(index))
        if low < lowest or high >= num_views:
            bad = low if low < lowest else high
            raise ValueError(f"{op}: {name} must index views 0 to {num_views - 1}, got {bad}")
    return index.long()


def epipolar_points(
    depth: Tensor,
    Ks: Tensor,
    viewmats: Tensor,
    *,
    width: int,
    height: int,
    num_samples: int,
    radius: float,
    jitter: Tensor | None = None,
    camera_model: str = "pinhole",
    depth_type: str = "z",
    reference_index: Tensor | Sequence[int] | None = None,
    neighbor_index: Tensor | Sequence[Sequence[int]] | None = None,
) -> EpipolarPoints:
    """Depth-truncated epipolar samples: points around the surface along each pixel's ray, seen by the other views.

    The P points of a pixel are s + δ_k d, s its unprojected point, d its *unit* ray in the world frame and
    δ_k = −radius + (k + jitter)·2·radius/P. The whole epipolar line between ``near`` and ``far`` is the same thing with
    ray-depth (near + far)/2 and radius (far − near)/2.

    Args:
        depth: ``[..., Vq, H, W]`` float32/64, of the reference views, in world units; H × W need not be the size that
            the intrinsics refer to. Depth that is not finite gives points that are not. Differentiable.
        Ks: ``[..., V, 3, 3]``, in pixels of ``width`` × ``height``. Differentiable.
        viewmats: ``[..., V, 4, 4]`` world → camera, rigid. Differentiable.
        width: Pixels of the images that ``Ks`` refer to.
        height: Pixels of the images that ``Ks`` refer to.
        num_samples: P, points per pixel.
        radius: Half the length of the segment, world units.
        jitter: Broadcasts to ``[..., Vq, H, W, P]``, float in [0, 1): the place in each stratum; None is its centre.
            Differentiable.
        camera_model: ``"pinhole"`` or ``"ortho"``.
        depth_type: ``"z"`` or ``"ray"``.
        reference_index: ``[Vq]`` integers: which of the V views the depth maps belong to; None: all, in order.
        neighbor_index: ``[V, Nv]`` integers: the views that look at each view's points, −1 for an absent one (NaN in
            uv and depth); None: all others, ascending.

    Returns:
        (points, uv, depth) in world, in neighbours' pixels, in neighbours' frames. Behind a pinhole camera (depth ≤ 0)
        uv means nothing: select by depth.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices, names or view counts do not fit; V = 1 without ``neighbor_index``; on a CPU
            in eager mode also zero focal lengths, matrices that are not rigid, indices out of range.

    Source: depth-guided decoder, Sec. 3.2.
    """
    op = "epipolar_points"
    _checks.tensor(op, "depth", depth, "... Vq H W", _FLOATS)
    _checks.tensor(op, "Ks", Ks, "... V 3 3", _FLOATS)
    _checks.tensor(op, "viewmats", viewmats, "... V 4 4", _FLOATS)
    ortho = _cameras(op, Ks, viewmats, camera_model, depth.device)
    _same_dtype(op, "Ks", Ks, depth)
    num_views, num_references = Ks.shape[-3], depth.shape[-3]
    if viewmats.shape[-3] != num_views:
        raise ValueError(f"{op}: viewmats must hold {num_views} views like Ks, got {viewmats.shape[-3]}")
    _broadcastable(op, "Ks", Ks.shape[:-3], depth.shape[:-3])
    _broadcastable(op, "viewmats", viewmats.shape[:-3], depth.shape[:-3])
    check_cameras(op, Ks, viewmats)
    width, height = (_checks.integer(op, n, v, at_least=1) for n, v in (("width", width), ("height", height)))
    num_samples = _checks.integer(op, "num_samples", num_samples, at_least=1)
    radius = _checks.number(op, "radius", radius, at_least=0)
    if jitter is not None:
        _checks.tensor(op, "jitter", jitter, "... P", _FLOATS, device=depth.device)
        _same_dtype(op, "jitter", jitter, depth)
        wanted = torch.Size([*depth.shape, num_samples])
        if jitter.dim() > len(wanted) or any(a not in (1, b) for a, b in zip(reversed(jitter.shape), reversed(wanted))):
            raise ValueError(f"{op}: jitter must broadcast to {list(wanted)}, got {list(jitter.shape)}")
    references = view_index(op, "reference_index", reference_index, "Vq", num_views, depth.device)
    if references is None:
        references = torch.arange(num_views, device=depth.device)
    if len(references) != num_references:
        raise ValueError(f"{op}: depth must hold {len(references)} reference views, got {list(depth.shape)}")
    neighbors = view_index(op, "neighbor_index", neighbor_index, "V Nv", num_views, depth.device, lowest=-1)
    if neighbors is None:
        if num_views < 2:
            raise ValueError(f"{op}: Ks must hold at least 2 views, or give neighbor_index; got {num_views}")
        neighbors = reference.neighbors(references, num_views)
    elif len(neighbors) != num_views:
        raise ValueError(f"{op}: neighbor_index must have {num_views} rows, one per view, got {list(neighbors.shape)}")
    else:
        neighbors = neighbors[references]
    ray_depth = _checks.choice(op, "depth_type", depth_type, DEPTH_TYPES) == "ray"
    return EpipolarPoints(
        *reference.epipolar_points(
            depth, Ks, viewmats, width, height, num_samples, radius, jitter, ortho, ray_depth, references, neighbors
        )
    )
