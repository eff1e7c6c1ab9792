"""Mesh → exact narrow band of unsigned distances → thin signed distance, on sparse grids."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._backend import Backend
from cvctoolkit._library import define_op, dynamic_sizes
from cvctoolkit.ops.sdf import reference

_native = torch.ops.cvctoolkit_native
_OP = "narrow_band_udf"


class NarrowBand(NamedTuple):
    """The voxels near a mesh.

    Attributes:
        coords: ``[N, 4]`` int32, (batch, x, y, z), sorted lexicographically.
        udf: ``[N]``, distance of the voxel's centre to the mesh, in world units.
        face_index: ``[N]`` int64, a nearest face.
    """

    coords: Tensor
    udf: Tensor
    face_index: Tensor


# --- operator ---------------------------------------------------------------------------------------------------------

_FAULTS = {
    1: "faces must index the vertices",
    2: "vertices must be finite",
    3: "vertices must be within 2^31 voxels of bounds",
    4: f"face_batch must be in [0, {reference.MAX_BATCH})",
    5: "the band does not fit into memory: lower the resolution or the band",
}


def _check_values(vertices: Tensor, faces: Tensor, face_batch: Tensor | None) -> None:
    """Data-dependent checks, inside the operator so that they break no graph; they do nothing on CUDA."""
    _checks.faces_in_range(_OP, faces, len(vertices))
    if faces.device.type == "cpu":
        _checks.finite(_OP, "vertices", vertices[faces.long()])
        if face_batch is not None and len(face_batch):
            low, high = (int(x) for x in torch.aminmax(face_batch))
            if low < 0 or high >= reference.MAX_BATCH:
                raise ValueError(f"{_OP}: {_FAULTS[4]}, got {low if low < 0 else high}")


def _run_native(vertices: Tensor, faces: Tensor, face_batch: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    *band, status = _native.narrow_band_udf(vertices, faces, face_batch, *args)
    if status:
        _check_values(vertices, faces, face_batch)  # to say which value
        raise ValueError(f"{_OP}: {_FAULTS[status]}")
    return tuple(band)


def _run_reference(vertices: Tensor, faces: Tensor, face_batch: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
    _check_values(vertices, faces, face_batch)
    return reference.narrow_band_udf(vertices, faces, face_batch, *args)


def _fake(vertices: Tensor, faces: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    (count,) = dynamic_sizes(1)
    return (
        vertices.new_empty(count),
        vertices.new_empty(count, 4, dtype=torch.int32),
        vertices.new_empty(count, dtype=torch.int64),
    )


def _twice(ctx: Any, *_: Any) -> None:
    raise RuntimeError(f"{_OP}: double backward is not implemented")


# An operator of its own because it walks through the band in pieces, whose number no graph can know.
_narrow_band_udf_backward = define_op(
    "narrow_band_udf_backward",
    "(Tensor grad, Tensor vertices, Tensor faces, Tensor coords, Tensor face_index, int resolution, float lo, float hi)"
    " -> Tensor",
    fake=lambda grad, vertices, *_: torch.empty_like(vertices),
    reference=reference.narrow_band_udf_backward,
    setup_context=lambda ctx, inputs, output: None,
    backward=_twice,
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    vertices, faces, _, resolution, _, lo, hi, _ = inputs
    ctx.grid = resolution, lo, hi
    ctx.save_for_backward(vertices, faces, output[1], output[2])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return _narrow_band_udf_backward(grad, *ctx.saved_tensors, *ctx.grid), None, None, None, None, None, None


def _only_float32_64(vertices: Tensor, *_: Any) -> Iterable[str]:
    if vertices.dtype not in _checks.FLOAT32_64:
        yield f"needs float32 or float64 vertices, got {vertices.dtype}"


_narrow_band_udf = define_op(
    _OP,
    "(Tensor vertices, Tensor faces, Tensor? face_batch, int resolution, float band, float lo, float hi)"
    " -> (Tensor, Tensor, Tensor)",  # udf, coords, face_index: opcheck wants a float first
    fake=_fake,
    reference=_run_reference,
    native=Backend(_run_native, _only_float32_64, kernels=(_OP,)),
    setup_context=_context,
    backward=_backward,
)


# --- public functions -------------------------------------------------------------------------------------------------


def narrow_band_udf(
    vertices: Tensor,
    faces: Tensor,
    resolution: int,
    band: float,
    *,
    face_batch: Tensor | None = None,
    bounds: tuple[float, float] = (-1.0, 1.0),
    backend: str | None = None,
) -> NarrowBand:
    """Finds all and only the voxels whose centre is nearer than ``band`` voxels to a mesh, with exact distances.

    Voxel (i, j, k) has its centre at ``(i + 0.5) * h + bounds[0]``, ``h = (bounds[1] - bounds[0]) / resolution``, and
    belongs to the band when its distance is less than ``band * h``, up to rounding. No dense grid is ever allocated.

    Args:
        vertices: ``[Nv, 3]`` float32 or float64, world units, anywhere within 2³¹ voxels: outside ``bounds`` they
            contribute the voxels inside. Differentiable; at distance 0 the gradient is 0.
        faces: ``[F, 3]`` int32 or int64, any orientation, in any order; points, segments and duplicates are welcome.
        resolution: Voxels along an axis, at most 65536.
        band: Half-width in voxels, at most 65536. Below 2 a thin shell is perforated, and this warns.
        face_batch: ``[F]`` int32 or int64 in [0, 32768): the volume that each face belongs to; None: all to volume 0.
        bounds: World coordinates (low, high) of the cube that the grid fills.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        (coords, udf, face_index). Distances have the dtype of the vertices and err by less than 1e-5 voxel (float32).
        Where several faces are equally near, up to rounding, it is one of them. The result does not depend on the
        number of threads. The size depends on the data: on CUDA this synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; a number is out of range; on a CPU, faces with
            indices out of range or vertices that are not finite or too far away, or a band that cannot fit into
            memory (for the reference: too much work). On CUDA such faces are left out.

    Source: Consistent3DGen, Sec. 3.2.3.
    """
    band = checked_band(_OP, band)
    return band_of_mesh(vertices, faces, resolution, band, face_batch=face_batch, bounds=bounds, backend=backend)


def band_of_mesh(
    vertices: Tensor,
    faces: Tensor,
    resolution: int,
    band: float,
    *,
    face_batch: Tensor | None = None,
    bounds: tuple[float, float] = (-1.0, 1.0),
    backend: str | None = None,
) -> NarrowBand:
    """`narrow_band_udf` after `checked_band`."""
    _checks.tensor(_OP, "vertices", vertices, "Nv 3", _checks.FLOAT32_64)
    _checks.tensor(_OP, "faces", faces, "F 3", _checks.INTEGRAL, device=vertices.device)
    resolution = _checks.resolution(_OP, resolution)
    lo, hi = _checks.bounds(_OP, bounds)
    if face_batch is not None:
        _checks.tensor(_OP, "face_batch", face_batch, "F", _checks.INTEGRAL, device=vertices.device)
        _checks.same_shape(_OP, "face_batch", face_batch, faces.shape[:1])
        face_batch = face_batch.long().contiguous()
    args = (vertices.contiguous(), faces.contiguous(), face_batch, resolution, band, lo, hi)
    udf, coords, face_index = _narrow_band_udf(*args, backend=backend)
    return NarrowBand(coords, udf, face_index)


def checked_band(op: str, band: float) -> float:
    """A half-width in voxels; warns the caller of the public function ``op`` when it is thin."""
    band = _checks.number(op, "band", band, above=0)
    if band > 1 << 16:
        raise ValueError(f"{op}: band must be <= 65536 voxels, got {band}")
    if band < 2:
        warnings.warn(
            f"{op}: a band of {band:g} voxels is too thin for a closed shell: take 3 or more (2 at least)",
            UserWarning,
            stacklevel=3,
        )
    return band


def udf_to_thin_sdf(udf: Tensor, threshold: float) -> Tensor:
    """Turns unsigned distances into the signed distance of a thin shell: ``2 * udf / threshold - 1``.

    The zero level lies half the threshold away from the mesh, on both sides.

    Args:
        udf: ``[...]`` float, distances >= 0 in world units. Differentiable, any number of times.
        threshold: τ > 0, the band's half-width in world units: ``band * (bounds[1] - bounds[0]) / resolution``.

    Returns:
        ``[...]`` in [−1, 1], in the dtype of ``udf``, negative within τ/2 of the mesh; 1 at and beyond τ, where the
        gradient is 0. NaN stays NaN.

    Raises:
        TypeError: Wrong argument types.
        ValueError: The dtype does not fit, or the threshold is not positive, or too small for the dtype.

    Source: Consistent3DGen, Sec. 3.2.3, Fig. 3.
    """
    op = "udf_to_thin_sdf"
    _checks.tensor(op, "udf", udf, "...", _checks.FLOATING)
    threshold = _checks.number(op, "threshold", threshold, above=0)
    smallest = 2 / torch.finfo(torch.float64 if udf.dtype == torch.float64 else torch.float32).max
    if threshold < smallest:  # the factor would be infinite, and 0 · ∞ is NaN
        raise ValueError(f"{op}: threshold must be >= {smallest:g} for {udf.dtype}, got {threshold}")
    return (udf * (2 / threshold) - 1).clamp(-1, 1)
