"""Queries over triangle meshes: nearest point, rays, normals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvctoolkit import _checks, _native
from cvctoolkit._backend import Backend
from cvctoolkit._library import define_op, once_differentiable
from cvctoolkit.ops.mesh import reference

_kernels = _native.kernels
_WEIGHTINGS = ("angle", "area", "uniform")


class ClosestPoints(NamedTuple):
    """Nearest points on a mesh.

    Attributes:
        distance: ``[...]``, in the units of the vertices; infinite when the mesh has no faces.
        face_index: ``[...]`` int64, −1 when the mesh has no faces.
        barycentric: ``[..., 3]``, weights of the face's corners: the nearest point is Σ bₖ·vₖ.
    """

    distance: Tensor
    face_index: Tensor
    barycentric: Tensor


class RayHits(NamedTuple):
    """First intersections of rays with a mesh.

    Attributes:
        t: ``[...]``, in units of the direction: the hit is ``origin + t * direction``; infinite on a miss.
        face_index: ``[...]`` int64, −1 on a miss.
        barycentric: ``[..., 3]``, weights of the face's corners; 0 on a miss.
    """

    t: Tensor
    face_index: Tensor
    barycentric: Tensor


# --- operators --------------------------------------------------------------------------------------------------------


def _check_mesh(op: str, vertices: Tensor, faces: Tensor) -> None:
    """Data-dependent checks, inside the operator so that they break no graph; they do nothing on CUDA."""
    _checks.finite(op, "vertices", vertices)
    _checks.faces_in_range(op, faces, len(vertices))


def _check_bvh(op: str, bvh: Tensor | None, vertices: Tensor, faces: Tensor) -> None:
    if bvh is None:
        return
    words = reference.bvh_words(len(faces))
    if len(bvh) != words:
        raise ValueError(f"{op}: bvh must have {words} elements for a mesh of {len(faces)} faces, got {len(bvh)}")
    if bvh.device.type != "cpu":
        return
    if _native.has_kernel("is_bvh_of", "cpu"):
        matches = _kernels.is_bvh_of(bvh, vertices, faces)
    else:
        matches = torch.equal(bvh[:16], reference.build_bvh(vertices, faces)[:16])
    if not matches:
        raise ValueError(f"{op}: bvh is not that of vertices and faces (its checksum differs): build it again")


def _build_bvh_checked(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def checked(vertices: Tensor, faces: Tensor) -> Tensor:
        _check_mesh("build_bvh", vertices, faces)
        return run(vertices, faces)

    return checked


def _native_bvh(bvh: Tensor | None, vertices: Tensor, faces: Tensor) -> Tensor:
    if bvh is None:
        return _kernels.build_bvh(vertices, faces)
    return bvh if bvh.data_ptr() % 8 == 0 else bvh.clone()  # its header has 64-bit fields: a slice may split them


def _closest_point_checked(run: Callable[..., Any]) -> Callable[..., Any]:
    def checked(points: Tensor, vertices: Tensor, faces: Tensor, bvh: Tensor | None) -> Any:
        op = "closest_point_on_mesh"
        _checks.finite(op, "points", points)
        _check_mesh(op, vertices, faces)
        _check_bvh(op, bvh, vertices, faces)
        return run(points, vertices, faces, bvh)

    return checked


def _cast_rays_checked(run: Callable[..., Any]) -> Callable[..., Any]:
    def checked(origins: Tensor, directions: Tensor, vertices: Tensor, faces: Tensor, bvh: Tensor | None) -> Any:
        op = "cast_rays"
        _checks.finite(op, "origins", origins)
        _checks.finite(op, "directions", directions)
        if directions.device.type == "cpu":
            x, y, z = directions.unbind(-1)  # faster than reducing over three
            zero = int(((x == 0) & (y == 0) & (z == 0)).sum())
            if zero:
                raise ValueError(f"{op}: directions must not be zero, got {zero} zero vectors")
        _check_mesh(op, vertices, faces)
        _check_bvh(op, bvh, vertices, faces)
        return run(origins, directions, vertices, faces, bvh)

    return checked


_build_bvh = define_op(
    "build_bvh",
    "(Tensor vertices, Tensor faces) -> Tensor",
    fake=lambda vertices, faces: vertices.new_empty(reference.bvh_words(faces.shape[0]), dtype=torch.int32),
    reference=_build_bvh_checked(reference.build_bvh),
    native=Backend(_build_bvh_checked(_kernels.build_bvh), kernels=("build_bvh",)),
)


def _fake_queries(queries: Tensor, vertices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count = queries.shape[0]
    return (
        vertices.new_empty(count),
        vertices.new_empty(count, dtype=torch.int64),
        vertices.new_empty(count, 3),
    )


def _closest_point_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    points, vertices, faces, *_ = inputs
    ctx.save_for_backward(points, vertices, faces, output[1])


def _closest_point_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    points, vertices, faces, face_index = ctx.saved_tensors
    grad, points, vertices = once_differentiable("closest_point_on_mesh", grad, points, vertices)
    return *reference.closest_point_backward(grad, points, vertices, faces, face_index), None, None


_closest_point_on_mesh = define_op(
    "closest_point_on_mesh",
    "(Tensor points, Tensor vertices, Tensor faces, Tensor? bvh) -> (Tensor, Tensor, Tensor)",
    fake=lambda points, vertices, faces, bvh: _fake_queries(points, vertices),
    reference=_closest_point_checked(reference.closest_point_on_mesh),
    native=Backend(
        _closest_point_checked(lambda p, v, f, bvh: _kernels.closest_point_on_mesh(p, v, f, _native_bvh(bvh, v, f))),
        kernels=("build_bvh", "closest_point_on_mesh"),
    ),
    setup_context=_closest_point_context,
    backward=_closest_point_backward,
)


def _cast_rays_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    origins, directions, vertices, faces, *_ = inputs
    ctx.save_for_backward(origins, directions, vertices, faces, output[1])


def _cast_rays_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    origins, directions, vertices, faces, face_index = ctx.saved_tensors
    grad, origins, directions, vertices = once_differentiable("cast_rays", grad, origins, directions, vertices)
    grads = reference.cast_rays_backward(grad, origins, directions, vertices, faces, face_index)
    return *grads, None, None


_cast_rays = define_op(
    "cast_rays",
    "(Tensor origins, Tensor directions, Tensor vertices, Tensor faces, Tensor? bvh) -> (Tensor, Tensor, Tensor)",
    fake=lambda origins, directions, vertices, faces, bvh: _fake_queries(origins, vertices),
    reference=_cast_rays_checked(reference.cast_rays),
    native=Backend(
        _cast_rays_checked(lambda o, d, v, f, bvh: _kernels.cast_rays(o, d, v, f, _native_bvh(bvh, v, f))),
        kernels=("build_bvh", "cast_rays"),
    ),
    setup_context=_cast_rays_context,
    backward=_cast_rays_backward,
)


# --- public functions -------------------------------------------------------------------------------------------------


def _checked_mesh(op: str, vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
    _checks.tensor(op, "vertices", vertices, "Nv 3", _checks.FLOAT32_64)
    _checks.tensor(op, "faces", faces, "Nf 3", _checks.INTEGRAL, device=vertices.device)
    if faces.shape[0] >= 2**31:
        raise ValueError(f"{op}: faces must be fewer than 2^31, got {faces.shape[0]}")
    return vertices.contiguous(), faces.contiguous()


def _checked_queries(op: str, name: str, queries: Tensor, vertices: Tensor) -> Tensor:
    _checks.tensor(op, name, queries, "... 3", (vertices.dtype,), device=vertices.device)
    if not queries.is_contiguous():  # an expanded tensor may be far larger than its memory
        _checks.fits_memory(op, f"a copy of {name}", queries.numel() * queries.element_size(), queries.device)
    return queries.reshape(-1, 3).contiguous()


def _checked_bvh(op: str, bvh: Tensor | None, vertices: Tensor) -> Tensor | None:
    if bvh is None:
        return None
    return _checks.tensor(op, "bvh", bvh, "W", (torch.int32,), device=vertices.device).contiguous()


def build_bvh(vertices: Tensor, faces: Tensor, *, backend: str | None = None) -> Tensor:
    """Builds the bounding volume hierarchy that `closest_point_on_mesh` and `cast_rays` search.

    Build it once for many calls on the same mesh; without one they build their own. It is a plain tensor, about 44
    bytes per face: save it, move it between devices (``.to``), cache it. It holds a checksum of the mesh, and queries
    refuse one that belongs to another mesh.

    Args:
        vertices: ``[Nv, 3]`` float32 or float64, finite.
        faces: ``[Nf, 3]`` int32 or int64, indices into ``vertices``. Degenerate and duplicate triangles are welcome.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[W]`` int32; W depends on Nf alone. The same bytes whatever the number of threads; backends and devices order
        the triangles differently, which changes speed, never answers.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: Shapes, dtypes, devices or backend do not fit, or (on a CPU) a vertex is not finite or an index is
            out of range. On CUDA such faces count as absent.
    """
    op = "build_bvh"
    vertices, faces = _checked_mesh(op, vertices, faces)
    return _build_bvh(vertices.detach(), faces, backend=backend)


def closest_point_on_mesh(
    points: Tensor, vertices: Tensor, faces: Tensor, bvh: Tensor | None = None, *, backend: str | None = None
) -> ClosestPoints:
    """Finds the nearest point of a triangle mesh to every point: exactly, for any mesh.

    Distances are evaluated in float64 and rounded once. Of faces at the same (rounded) distance the lowest wins, so
    the result depends neither on backend, device or thread count, nor on the tree. A degenerate triangle counts as the
    segment or the point that it is.

    Args:
        points: ``[..., 3]``, in the dtype of the vertices; finite. Order does not matter for speed. Differentiable.
        vertices: ``[Nv, 3]`` float32 or float64, finite. Differentiable.
        faces: ``[Nf, 3]`` int32 or int64, indices into ``vertices``.
        bvh: ``[W]`` int32, from `build_bvh` for the same mesh; None: built here.
        backend: ``"native"``, ``"reference"`` (all pairs); None picks the fastest.

    Returns:
        (distance, face_index, barycentric). Gradients flow through ``distance``: ∂d/∂p = (p − q)/d for the nearest
        point q = Σ bₖ·vₖ, ∂d/∂vₖ = −bₖ·(p − q)/d, and 0 where d = 0. Barycentric coordinates are constants for
        autograd; a second derivative raises. The gradient of the vertices is summed by ``index_add``.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: Shapes, dtypes, devices or backend do not fit, or (on a CPU) a point or vertex is not finite, an
            index is out of range, or the tree is that of another mesh. On CUDA, points that are not finite and all
            points of a query with a foreign tree get distance NaN and face −1, and unusable faces count as absent.
    """
    op = "closest_point_on_mesh"
    vertices, faces = _checked_mesh(op, vertices, faces)
    rows = _checked_queries(op, "points", points, vertices)
    bvh = _checked_bvh(op, bvh, vertices)
    distance, face_index, barycentric = _closest_point_on_mesh(rows, vertices, faces, bvh, backend=backend)
    shape = points.shape[:-1]
    return ClosestPoints(distance.view(shape), face_index.view(shape), barycentric.detach().view(*shape, 3))


def cast_rays(
    origins: Tensor,
    directions: Tensor,
    vertices: Tensor,
    faces: Tensor,
    bvh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> RayHits:
    """Finds the first triangle that every ray meets, from either side, at t ≥ 0.

    Watertight: a ray through an edge or a corner shared by triangles meets at least one of them. Evaluated in float64
    and rounded once; of faces at the same (rounded) t the lowest wins. Triangles seen exactly edge-on are not met
    (their neighbours are), degenerate ones never.

    Args:
        origins: ``[..., 3]``, in the dtype of the vertices; finite. Differentiable.
        directions: Like ``origins``; not zero, of any length. Differentiable.
        vertices: ``[Nv, 3]`` float32 or float64, finite. Differentiable.
        faces: ``[Nf, 3]`` int32 or int64, indices into ``vertices``.
        bvh: ``[W]`` int32, from `build_bvh` for the same mesh; None: built here.
        backend: ``"native"``, ``"reference"`` (all pairs); None picks the fastest.

    Returns:
        (t, face_index, barycentric). Gradients flow through ``t``, for the face that is hit: ∂t/∂o = −n/(n·d),
        ∂t/∂d = −t·n/(n·d), ∂t/∂vₖ = bₖ·n/(n·d) with its normal n; 0 on a miss. Barycentric coordinates are constants
        for autograd; a second derivative raises.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: Shapes, dtypes, devices or backend do not fit, or (on a CPU) a value is not finite, a direction is
            zero, an index is out of range, or the tree is that of another mesh. On CUDA, unusable rays miss, all rays
            of a query with a foreign tree get t NaN and face −1, and unusable faces count as absent.

    Source: Woop, Benthin and Wald, "Watertight Ray/Triangle Intersection", JCGT 2(1), 2013.
    """
    op = "cast_rays"
    vertices, faces = _checked_mesh(op, vertices, faces)
    origin_rows = _checked_queries(op, "origins", origins, vertices)
    direction_rows = _checked_queries(op, "directions", directions, vertices)
    _checks.same_shape(op, "directions", directions, origins.shape)
    bvh = _checked_bvh(op, bvh, vertices)
    t, face_index, barycentric = _cast_rays(origin_rows, direction_rows, vertices, faces, bvh, backend=backend)
    shape = origins.shape[:-1]
    return RayHits(t.view(shape), face_index.view(shape), barycentric.detach().view(*shape, 3))


def vertex_normals(vertices: Tensor, faces: Tensor, *, weighting: str = "angle") -> Tensor:
    """Averages the unit normals of the faces around every vertex.

    Args:
        vertices: ``[Nv, 3]`` float32 or float64. Differentiable.
        faces: ``[Nf, 3]`` int32 or int64, counter-clockwise seen from the side that normals point to.
        weighting: ``"angle"``: by the face's angle at the vertex (independent of how a flat region is triangulated),
            ``"area"``, or ``"uniform"``.

    Returns:
        ``[Nv, 3]`` unit vectors; 0, with gradient 0, for vertices whose faces are all degenerate or cancel, and for
        those without a face. Summed by ``index_add``: on CUDA the last bits vary from run to run unless
        ``torch.use_deterministic_algorithms(True)``.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: Shapes, dtypes, devices or the weighting do not fit, or (on a CPU) an index is out of range.

    Source: Thürmer and Wüthrich, "Computing Vertex Normals from Polygonal Facets", JGT 3(1), 1998 (angle).
    """
    op = "vertex_normals"
    vertices, faces = _checked_mesh(op, vertices, faces)
    _checks.choice(op, "weighting", weighting, _WEIGHTINGS)
    if not torch.compiler.is_compiling():  # reading values would break the graph
        _checks.faces_in_range(op, faces, len(vertices))
    return reference.vertex_normals(vertices, faces, weighting)
