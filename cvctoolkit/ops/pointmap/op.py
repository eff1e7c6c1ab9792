"""Point map → triangle mesh: depth edges, face construction, compaction, normalisation."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._backend import Backend
from cvctoolkit._library import define_op, dynamic_sizes
from cvctoolkit._native import kernels as _native
from cvctoolkit.ops.pointmap import reference

_WINDINGS = ("consistent", "paper")
_NEVER = float("inf")


class PointmapMesh(NamedTuple):
    """A triangle mesh over the valid pixels of point maps.

    Attributes:
        vertices: ``[Nv, 3]``, the points of the used pixels in ascending pixel order.
        faces: ``[F, 3]`` int32, indices into ``vertices``.
        pixel_index: ``[Nv]`` int64, the pixel (b·H + i)·W + j that each vertex came from.
    """

    vertices: Tensor
    faces: Tensor
    pixel_index: Tensor


class NormalizedPoints(NamedTuple):
    """Points in the normalised cube and the way back: ``points * scale + center``.

    Attributes:
        points: As given, same shape; the valid ones in [-1 + margin, 1 - margin].
        center: ``[3]``, in the units of the input.
        scale: ``[]``, units of the input per normalised unit.
    """

    points: Tensor
    center: Tensor
    scale: Tensor


# --- operators --------------------------------------------------------------------------------------------------------


def _only_float32_64(value: Tensor, *_: Any) -> Iterable[str]:
    if value.dtype not in _checks.FLOAT32_64:
        yield f"needs float32 or float64, got {value.dtype}"


def _triton_depth_edge_mask(*args: Any) -> Tensor:
    return importlib.import_module("cvctoolkit.ops.pointmap.triton").depth_edge_mask(*args)


def _only_float32(value: Tensor, *_: Any) -> Iterable[str]:
    if value.dtype != torch.float32:
        yield f"needs float32, got {value.dtype}"


_depth_edge_mask = define_op(
    "depth_edge_mask",
    "(Tensor depth, float rtol, float atol, int kernel_size) -> Tensor",
    fake=lambda depth, rtol, atol, kernel_size: torch.empty_like(
        depth, dtype=torch.bool, memory_format=torch.contiguous_format
    ),
    reference=reference.depth_edge_mask,
    native=Backend(_native.depth_edge_mask, _only_float32_64, kernels=("depth_edge_mask",)),
    triton=Backend(_triton_depth_edge_mask, _only_float32),
)


def _fake_faces(mask: Tensor, *_: Any) -> Tensor:
    (count,) = dynamic_sizes(1)
    return mask.new_empty(count, 3, dtype=torch.int32 if mask.numel() < 2**31 else torch.int64)


_pointmap_faces = define_op(
    "pointmap_faces",
    "(Tensor mask, bool paper, bool corner_triangles) -> Tensor",
    fake=_fake_faces,
    reference=reference.pointmap_faces,
    native=Backend(_native.pointmap_faces, kernels=("pointmap_faces",)),
)


def _fake_mesh(points: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    num_vertices, num_faces = dynamic_sizes(2)
    return (
        points.new_empty(num_vertices, 3),
        points.new_empty(num_faces, 3, dtype=torch.int32),
        points.new_empty(num_vertices, dtype=torch.int64),
    )


def _mesh_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.shape = inputs[0].shape
    ctx.save_for_backward(output[2])


def _mesh_backward(ctx: Any, grad_vertices: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    (pixel_index,) = ctx.saved_tensors
    flat = grad_vertices.new_zeros(ctx.shape).reshape(-1, 3)
    return flat.index_copy(0, pixel_index, grad_vertices).reshape(ctx.shape), None, None, None


_pointmap_mesh = define_op(
    "pointmap_to_mesh",
    "(Tensor points, Tensor? mask, bool paper, bool corner_triangles) -> (Tensor, Tensor, Tensor)",
    fake=_fake_mesh,
    reference=reference.pointmap_mesh,
    native=Backend(_native.pointmap_mesh, _only_float32_64, kernels=("pointmap_mesh",)),
    setup_context=_mesh_context,
    backward=_mesh_backward,
)


# --- public functions -------------------------------------------------------------------------------------------------


def _tolerance(op: str, name: str, value: float | None) -> float:
    return _NEVER if value is None else _checks.number(op, name, value, at_least=0)


def _odd_window(op: str, value: int) -> int:
    size = _checks.integer(op, "kernel_size", value, at_least=1, at_most=255)
    if size % 2 == 0:
        raise ValueError(f"{op}: kernel_size must be odd, got {value}")
    return size


def _batched(value: Tensor, trailing: int) -> Tensor:
    """Any leading dimensions as one, contiguous."""
    tail = value.shape[value.dim() - trailing :]
    return value.reshape(math.prod(value.shape[: value.dim() - trailing]), *tail).contiguous()


def _checked_mask(op: str, mask: Tensor, points: Tensor) -> Tensor:
    _checks.tensor(op, "mask", mask, "... H W", (torch.bool,), device=points.device)
    _checks.same_shape(op, "mask", mask, points.shape[:-1])
    return _batched(mask, 2)


def depth_edge_mask(
    depth: Tensor,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    kernel_size: int = 3,
    backend: str | None = None,
) -> Tensor:
    """Marks the pixels at a depth discontinuity, as MoGe and utils3d do.

    A pixel is on an edge when the range (maximum − minimum) of the depths in the window around it exceeds
    ``rtol * |depth|`` or ``atol``. NaN and infinite depths are holes: never edges, and ignored in their neighbours'
    windows. Windows are cut at the image border.

    Args:
        depth: ``[..., H, W]`` float, z-depth.
        rtol: Largest range allowed, as a fraction of the depth; None: no relative test.
        atol: Largest range allowed, in units of depth; None: no absolute test.
        kernel_size: Odd window size in pixels.
        backend: ``"native"``, ``"triton"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[..., H, W]`` bool, True on an edge. Every backend gives the same mask, bit for bit.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Both tolerances are None, one is negative or not finite, the window is even, or shape, dtype or
            backend do not fit.
    """
    op = "depth_edge_mask"
    _checks.tensor(op, "depth", depth, "... H W", _checks.FLOATING)
    if rtol is None and atol is None:
        raise ValueError(f"{op}: give rtol, atol or both")
    limits = _tolerance(op, "rtol", rtol), _tolerance(op, "atol", atol)
    edge = _depth_edge_mask(_batched(depth.detach(), 2), *limits, _odd_window(op, kernel_size), backend=backend)
    return edge.view(depth.shape)


def pointmap_edge_mask(
    points: Tensor,
    mask: Tensor | None = None,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    kernel_size: int = 3,
) -> Tensor:
    """Marks the pixels where the coordinates of a point map change suddenly.

    A pixel is on an edge when a valid point in the window around it is farther from its own point than
    ``rtol * |point|`` (the distance to the origin: the camera, in a camera-frame map) or ``atol``.

    Args:
        points: ``[..., H, W, 3]`` float. Points with NaN or infinity are invalid.
        mask: ``[..., H, W]`` bool, True where the point is valid; None: wherever it is finite.
        rtol: Largest distance allowed, as a fraction of the point's distance to the origin; None: no relative test.
        atol: Largest distance allowed, in units of the points; None: no absolute test.
        kernel_size: Odd window size in pixels.

    Returns:
        ``[..., H, W]`` bool, True on an edge. Invalid pixels are False.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes or tolerances do not fit.

    Source: Consistent3DGen, Sec. 3.2.1 ("sudden change of coordinates").
    """
    op = "pointmap_edge_mask"
    _checks.tensor(op, "points", points, "... H W 3", _checks.FLOATING)
    if rtol is None and atol is None:
        raise ValueError(f"{op}: give rtol, atol or both")
    limits = _tolerance(op, "rtol", rtol), _tolerance(op, "atol", atol)
    shape = points.shape[:-1]
    valid = torch.ones_like(points[..., 0], dtype=torch.bool) if mask is None else mask
    valid = _checked_mask(op, valid, points)
    points = _batched(points.detach(), 3)
    return reference.pointmap_edge_mask(points, valid, *limits, _odd_window(op, kernel_size)).view(shape)


def pointmap_faces(
    mask: Tensor, *, winding: str = "consistent", corner_triangles: bool = False, backend: str | None = None
) -> Tensor:
    """Triangulates the valid pixels of a map: two triangles for every 2×2 quad of valid pixels.

    With p1, p2 the quad's upper and p3, p4 its lower pixels, ``winding="consistent"`` gives [p1, p3, p2] and
    [p2, p3, p4], both counter-clockwise seen from the camera. ``winding="paper"`` gives [p1, p2, p3] and
    [p2, p3, p4] as the paper lists them: wound against each other.

    Args:
        mask: ``[H, W]`` or ``[..., H, W]`` bool, True where the pixel is valid.
        winding: ``"consistent"`` or ``"paper"``.
        corner_triangles: Also give one triangle (counter-clockwise) where three pixels of a quad are valid.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[F, 3]`` pixel indices (b·H + i)·W + j, int32 (int64 when the maps hold more than 2³¹ − 1 pixels), in
        row-major order of their quads. The same on every backend. The size depends on the data: on CUDA this
        synchronises once.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shape, dtype, winding or backend do not fit, or ``corner_triangles`` with the paper's winding.

    Source: Consistent3DGen, Alg. 1.
    """
    op = "pointmap_faces"
    _checks.tensor(op, "mask", mask, "... H W", (torch.bool,))
    return _pointmap_faces(_batched(mask, 2), *_which_faces(op, winding, corner_triangles), backend=backend)


def _which_faces(op: str, winding: str, corner_triangles: bool) -> tuple[bool, bool]:
    paper = _checks.choice(op, "winding", winding, _WINDINGS) == "paper"
    corner_triangles = _checks.flag(op, "corner_triangles", corner_triangles)
    if paper and corner_triangles:
        raise ValueError(f"{op}: corner_triangles needs winding='consistent' (the paper's listing has none)")
    return paper, corner_triangles


def pointmap_to_mesh(
    points: Tensor,
    mask: Tensor | None = None,
    *,
    winding: str = "consistent",
    corner_triangles: bool = False,
    backend: str | None = None,
) -> PointmapMesh:
    """Builds the mesh of a point map: faces as `pointmap_faces`, vertices only where a face uses them.

    Args:
        points: ``[H, W, 3]`` or ``[..., H, W, 3]`` float. Pixels whose point is NaN or infinite count as invalid.
            Differentiable.
        mask: ``[..., H, W]`` bool, True where the point is valid; None: wherever it is finite. See `confidence_mask`
            and `depth_edge_mask`.
        winding: See `pointmap_faces`.
        corner_triangles: See `pointmap_faces`.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        (vertices, faces, pixel_index), in ascending pixel order. Carry attributes along with `gather_pixels`, get the
        map of every face with `face_batch_index`. The sizes depend on the data: on CUDA this synchronises twice.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices, winding or backend do not fit, or the maps hold more than 2³¹ − 1 pixels.

    Source: Consistent3DGen, Alg. 1.
    """
    op = "pointmap_to_mesh"
    _checks.tensor(op, "points", points, "... H W 3", _checks.FLOATING)
    if math.prod(points.shape[:-1]) >= 2**31:
        raise ValueError(f"{op}: points must hold fewer than 2^31 pixels, got {list(points.shape)}: split the batch")
    if mask is not None:
        mask = _checked_mask(op, mask, points)
    which = _which_faces(op, winding, corner_triangles)
    return PointmapMesh(*_pointmap_mesh(_batched(points, 3), mask, *which, backend=backend))


def confidence_mask(confidence: Tensor, *, threshold: float | None = None, percentile: float | None = None) -> Tensor:
    """Turns a confidence map into a validity mask.

    Args:
        confidence: ``[..., H, W]`` float; NaN counts as no confidence.
        threshold: Keep what is at least this confident.
        percentile: Keep, of each map, what is at least as confident as its percentile, in [0, 100] (VGGT's viewers
            drop the lower 50).

    Returns:
        ``[..., H, W]`` bool.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Neither or both limits are given, or the percentile is outside [0, 100].
    """
    op = "confidence_mask"
    _checks.tensor(op, "confidence", confidence, "... H W", _checks.FLOATING)
    if (threshold is None) == (percentile is None):
        raise ValueError(f"{op}: give either threshold or percentile")
    if threshold is not None:
        return confidence >= _checks.number(op, "threshold", threshold)
    if _checks.number(op, "percentile", percentile, at_least=0) > 100:
        raise ValueError(f"{op}: percentile must be in [0, 100], got {percentile}")
    known = confidence.masked_fill(confidence.isnan(), float("-inf")).flatten(-2)
    known = known if known.dtype == torch.float64 else known.float()  # no rounding: the limit is one of the values
    if known.shape[-1] == 0:
        return torch.zeros_like(confidence, dtype=torch.bool)
    rank = max(1, -(-known.shape[-1] * percentile // 100))  # nearest rank; torch.quantile stops at 2^24 values
    limit = known.kthvalue(int(rank), dim=-1).values[..., None, None]
    return (confidence >= limit) & ~confidence.isnan()


def gather_pixels(values: Tensor, pixel_index: Tensor) -> Tensor:
    """Carries a per-pixel attribute (colour, normal, feature) over to the vertices of `pointmap_to_mesh`.

    Args:
        values: ``[..., H, W, C]``, any dtype. Differentiable.
        pixel_index: ``[Nv]`` int32 or int64, pixels (b·H + i)·W + j.

    Returns:
        ``[Nv, C]``, in the dtype of the values.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: Shapes, dtypes or devices do not fit, or (on a CPU in eager mode) an index is out of range.
    """
    op = "gather_pixels"
    _checks.tensor(op, "values", values, "... H W C")
    _checks.tensor(op, "pixel_index", pixel_index, "Nv", _checks.INTEGRAL, device=values.device)
    pixels = math.prod(values.shape[:-1])
    if pixel_index.device.type == "cpu" and not torch.compiler.is_compiling() and type(pixel_index) is Tensor:
        low, high = (int(x) for x in torch.aminmax(pixel_index)) if len(pixel_index) else (0, -1)
        if low < 0 or high >= pixels:
            bad = low if low < 0 else high
            raise ValueError(f"{op}: pixel_index must index pixels 0 to {pixels - 1}, got {bad}")
    return values.reshape(pixels, values.shape[-1]).index_select(0, pixel_index)


def face_batch_index(mesh: PointmapMesh, height: int, width: int) -> Tensor:
    """The map, counted over the batch, that every face of `pointmap_to_mesh` came from.

    Args:
        mesh: The mesh of maps ``[..., H, W, 3]``.
        height: H, pixels, at least 1.
        width: W, pixels, at least 1.

    Returns:
        ``[F]`` int64, ascending.

    Raises:
        TypeError: Wrong argument types.
        ValueError: A size is not positive, or more than a mesh can have.
    """
    op = "face_batch_index"
    if not isinstance(mesh, PointmapMesh):
        raise TypeError(f"{op}: mesh must be the result of pointmap_to_mesh, got {type(mesh).__name__}")
    height, width = (
        _checks.integer(op, name, size, at_least=1, at_most=2**31 - 1)
        for name, size in (("height", height), ("width", width))
    )
    return mesh.pixel_index[mesh.faces[:, 0].long()].div(height * width, rounding_mode="floor")


def normalize_points(points: Tensor, mask: Tensor | None = None, *, margin: float = 0.05) -> NormalizedPoints:
    """Centres points and scales them, uniformly, to fill the cube [−1 + margin, 1 − margin]³ by their longest side.

    Leave a margin of at least the band (band · 2 / resolution) where a narrow band follows.

    Args:
        points: ``[N, 3]`` or ``[..., H, W, 3]`` float; all of them are normalised by one box. Differentiable.
        mask: bool, shape of ``points`` without its last dimension: the points that define the box; None: all finite
            ones. Points that are not finite never do.
        margin: Free border, in normalised units, in [0, 1).

    Returns:
        (points, center, scale); the inverse is `denormalize_points`. Without any valid point, centre 0 and scale 1;
        a box without extent has scale 1.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes or the margin do not fit.
    """
    op = "normalize_points"
    _checks.tensor(op, "points", points, "... 3", _checks.FLOATING)
    if not 0 <= _checks.number(op, "margin", margin) < 1:
        raise ValueError(f"{op}: margin must be in [0, 1), got {margin}")
    valid = points.isfinite().all(-1)
    if mask is not None:
        _checks.tensor(op, "mask", mask, "...", (torch.bool,), device=points.device)
        _checks.same_shape(op, "mask", mask, points.shape[:-1])
        valid = valid & mask
    inf = float("inf")
    rows, keep = points.reshape(-1, 3), valid.reshape(-1, 1)
    # One row of +-inf stands for "no valid point", so that nothing depends on the data in Python.
    low = torch.cat([rows.masked_fill(~keep, inf), rows.new_full((1, 3), inf)]).amin(0)
    high = torch.cat([rows.masked_fill(~keep, -inf), rows.new_full((1, 3), -inf)]).amax(0)
    empty = low > high
    # Halved first: the extent of a map may be more than its dtype holds.
    center = (low / 2 + high / 2).masked_fill(empty, 0)
    half = (high / 2 - low / 2).masked_fill(empty, 0).amax()
    scale = torch.where(half > 0, half / (1 - margin), torch.ones_like(half))
    return NormalizedPoints((points - center) / scale, center, scale)


def denormalize_points(points: Tensor, center: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `normalize_points`, for any points: ``points * scale + center``.

    Args:
        points: ``[..., 3]`` float, normalised: those given, or the vertices of a shell. Differentiable.
        center: ``[3]``, or one per point, broadcasting to ``[..., 3]``. Differentiable.
        scale: ``[]``, or one per point, broadcasting to ``[...]``. Differentiable.

    Returns:
        ``[..., 3]``, in the units of the input of `normalize_points`.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: Shapes, dtypes or devices do not fit.
    """
    op = "denormalize_points"
    _checks.tensor(op, "points", points, "... 3", _checks.FLOATING)
    _checks.tensor(op, "center", center, "... 3", _checks.FLOATING, device=points.device)
    _checks.tensor(op, "scale", scale, "...", _checks.FLOATING, device=points.device)
    shape = points.shape[:-1]
    for name, batch in (("center", center.shape[:-1]), ("scale", scale.shape)):
        if len(batch) > len(shape) or any(a not in (1, b) for a, b in zip(reversed(batch), reversed(shape))):
            raise ValueError(f"{op}: {name} must be one, or one per point {list(shape)}, got {list(batch)} of them")
    return points * scale[..., None] + center
