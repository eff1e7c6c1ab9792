"""Coarser and finer sets of voxels: downsample, subdivide, upsample, space ↔ channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._backend import Backend
from cvctoolkit._library import define_op, dynamic_sizes, names_itself
from cvctoolkit._native import kernels as _native
from cvctoolkit.ops.voxels import dense_reference
from cvctoolkit.ops.voxels import resample_reference as reference
from cvctoolkit.ops.voxels.conventions import MAX_COORD, checked_coords, raise_faults
from cvctoolkit.ops.voxels.dense_op import checked_feats
from cvctoolkit.ops.voxels.features_op import (
    gather_features,
    only_float32_64,
    reduce_features,
    reduction_backward,
    save_reduction,
    scatter_rows,
)
from cvctoolkit.ops.voxels.order_reference import in_range


class Downsampled(NamedTuple):
    """Voxels of a coarser grid.

    Attributes:
        coords: ``[M, 4]`` int32, in lexicographic order.
        feats: ``[M, C]``; None without features.
        inverse: ``[N]`` int64, the row of every given voxel's parent: ``gather_features(feats, inverse)`` carries
            features back.
        counts: ``[M]`` int64, how many given voxels each parent has.
    """

    coords: Tensor
    feats: Tensor | None
    inverse: Tensor
    counts: Tensor


class Upsampled(NamedTuple):
    """Voxels of a grid twice as fine.

    Attributes:
        coords: ``[M, 4]`` int32, in lexicographic order.
        feats: ``[M, C]``; None without features.
        parent: ``[M]`` int64, the given row that each is a child of.
    """

    coords: Tensor
    feats: Tensor | None
    parent: Tensor


# --- operators --------------------------------------------------------------------------------------------------------


def _coarsen_native(coords: Tensor, factor: list[int], op: str) -> tuple[Tensor, Tensor, Tensor]:
    *found, faults = _native.voxel_coarsen(coords, *factor)
    raise_faults(op, faults, "coords")
    return tuple(found)


def _coarsen_reference(coords: Tensor, factor: list[int], op: str) -> tuple[Tensor, Tensor, Tensor]:
    if not bool(in_range(coords).all()):
        raise_faults(op, 1, "coords")
    return reference.coarsen(coords, factor)


def _fake_coarsen(coords: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    (m,) = dynamic_sizes(1)
    n = coords.shape[0]
    return coords.new_empty(m, 4), coords.new_empty(n, dtype=torch.int64), coords.new_empty(m, dtype=torch.int64)


_coarsen = define_op(
    "voxel_coarsen",
    "(Tensor coords, int[] factor, str op) -> (Tensor, Tensor, Tensor)",
    fake=_fake_coarsen,
    reference=_coarsen_reference,
    native=Backend(_coarsen_native, kernels=("voxel_coarsen",)),
)


def _downsample_native(
    feats: Tensor, coords: Tensor, factor: list[int], reduction: int, include_self: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if coords.device.type != "cpu":
        coarse, inverse, counts = _coarsen_native(coords, factor, "downsample")
        out, _ = _native.reduce_features(feats, inverse, coarse.shape[0], reduction, include_self)
        return out, coarse, inverse, counts
    coarse, out, inverse, counts, faults = _native.voxel_downsample(coords, feats, *factor, reduction, include_self)
    raise_faults("downsample", faults, "coords")
    return out, coarse, inverse, counts


def _downsample_reference(
    feats: Tensor, coords: Tensor, factor: list[int], reduction: int, include_self: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    coarse, inverse, counts = _coarsen_reference(coords, factor, "downsample")
    out = dense_reference.reduce_features(feats, inverse, coarse.shape[0], reduction, include_self)
    return out, coarse, inverse, counts


def _fake_downsample(feats: Tensor, coords: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    coarse, inverse, counts = _fake_coarsen(coords)
    return feats.new_empty(coarse.shape[0], feats.shape[1]), coarse, inverse, counts


def _downsample_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    feats, _, _, reduction, include_self, _ = inputs
    out, coarse, inverse, counts = output
    ctx.mark_non_differentiable(coarse, inverse, counts)
    save_reduction(ctx, feats, inverse, out, reduction, include_self)


_downsample = define_op(
    "downsample",
    "(Tensor feats, Tensor coords, int[] factor, int reduction, bool include_self) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_downsample,
    reference=_downsample_reference,
    native=Backend(_downsample_native, only_float32_64, kernels=("voxel_coarsen", "reduce_features")),
    setup_context=_downsample_context,
    backward=lambda ctx, grad, *_: (reduction_backward(ctx, grad), None, None, None, None),
)


def _refuse_too_fine(op: str, fault: bool) -> None:
    if fault:
        raise ValueError(
            f"{op}: coords must be (batch, x, y, z) with batch in [0, 32768) and x, y, z in [0, {MAX_COORD // 2}),"
            " got a row outside"
        )


def _children_native(coords: Tensor, mask: Tensor | None, op: str) -> tuple[Tensor, Tensor]:
    fine, parent, fault = _native.voxel_children(coords, mask)
    _refuse_too_fine(op, bool(fault))
    return fine, parent


def _children_reference(coords: Tensor, mask: Tensor | None, op: str) -> tuple[Tensor, Tensor]:
    # Without a mask the size is known: on CUDA the check would be the only synchronisation.
    if mask is not None or coords.device.type == "cpu":
        _refuse_too_fine(op, not bool((in_range(coords) & (coords[:, 1:] < MAX_COORD // 2).all(-1)).all()))
    return reference.children(coords, mask)


def _fake_children(coords: Tensor, mask: Tensor | None, op: str) -> tuple[Tensor, Tensor]:
    count = 8 * coords.shape[0] if mask is None else next(dynamic_sizes(1))
    return coords.new_empty(count, 4), coords.new_empty(count, dtype=torch.int64)


_children = define_op(
    "voxel_children",
    "(Tensor coords, Tensor? mask, str op) -> (Tensor, Tensor)",
    fake=_fake_children,
    reference=_children_reference,
    native=Backend(_children_native, kernels=("voxel_children",)),
)


_child_slots = define_op(
    "voxel_child_slots",
    "(Tensor coords, Tensor coarse_row, int[] factor) -> Tensor",
    fake=lambda coords, coarse_row, factor: torch.empty_like(coarse_row),
    reference=reference.child_slots,
    native=Backend(
        lambda coords, coarse_row, factor: _native.voxel_child_slots(coords, coarse_row, *factor),
        kernels=("voxel_child_slots",),
    ),
)


# --- public functions -------------------------------------------------------------------------------------------------


def _factors(op: str, value: int | Sequence[int]) -> list[int]:
    values = list(value) if isinstance(value, (tuple, list)) else [value] * 3
    if len(values) != 3:
        raise ValueError(f"{op}: factor must be an integer or three, got {value!r}")
    return [_checks.integer(op, "factor", v, at_least=1, at_most=MAX_COORD) for v in values]


@names_itself
def downsample(
    coords: Tensor,
    feats: Tensor | None = None,
    factor: int | Sequence[int] = 2,
    *,
    reduce: str = "mean",
    include_self: bool = False,
    backend: str | None = None,
) -> Downsampled:
    """The voxels of a coarser grid that hold any of the given ones, and what their features come to.

    Args:
        coords: ``[N, 4]`` int32 or int64, (batch, x, y, z): batch in [0, 32768), coordinates in [0, 65536); rows may
            repeat. Lexicographic order is the fast one.
        feats: ``[N, C]`` float; None: coordinates and maps only. Differentiable, any number of times.
        factor: Voxels per coarse voxel, along all axes or along (x, y, z): parent = coordinate // factor.
        reduce: ``"mean"``, ``"max"`` or ``"sum"`` over the voxels that are there.
        include_self: A voxel of zeros takes part: the mean is sum / (n + 1), as the released weights of Direct3D-S2 and
            TRELLIS need; the maximum is at least 0.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        (coords, feats, inverse, counts). Indices are the same on every backend, sums are taken in row order. The size
        depends on the data: on CUDA this synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices, names or backend do not fit; a row is no voxel.
    """
    op = "downsample"
    coords = checked_coords(op, "coords", coords)
    factors = _factors(op, factor)
    _checks.choice(op, "reduce", reduce, ("mean", "max", "sum"))
    include_self = _checks.flag(op, "include_self", include_self)
    if feats is not None:
        feats = checked_feats(op, feats, coords)
    if feats is None:
        coarse, inverse, counts = _coarsen(coords, factors, op, backend=backend)
        return Downsampled(coarse, None, inverse, counts)
    if feats.dtype in _checks.FLOAT32_64:
        reduction = dense_reference.REDUCTIONS.index(reduce)
        feats, *found = _downsample(feats, coords, factors, reduction, include_self, backend=backend)
        return Downsampled(found[0], feats, *found[1:])
    # Half precision has kernels for the coordinates only: a wish for native ones is one for those.
    coarse, inverse, counts = _coarsen(coords, factors, op, backend=backend)
    feats = reduce_features(
        feats,
        inverse,
        coarse.shape[0],
        reduce=reduce,
        include_self=include_self,
        backend=None if backend == "native" else backend,
    )
    return Downsampled(coarse, feats, inverse, counts)


@names_itself
def subdivide(coords: Tensor, feats: Tensor | None = None, *, backend: str | None = None) -> Upsampled:
    """Splits every voxel into its eight children.

    Args:
        coords: ``[N, 4]`` int32 or int64, (batch, x, y, z): batch in [0, 32768), coordinates in [0, 32768); repeated
            rows give repeated children. Lexicographic order is the fast one.
        feats: ``[N, C]`` float, copied to the children; None: coordinates and parents only. Differentiable, any number
            of times.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        (coords, feats, parent), 8·N rows; children (2x + i, 2y + j, 2z + k) in lexicographic order, repeated ones in
        the order of their parents. The same on every backend. On CUDA nothing is checked and nothing synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; a row is no voxel, or its children are none (on a
            CPU).
    """
    return _upsample("subdivide", coords, feats, None, backend)


@names_itself
def upsample(coords: Tensor, feats: Tensor | None, child_mask: Tensor, *, backend: str | None = None) -> Upsampled:
    """Splits every voxel into those of its eight children that a mask names.

    Args:
        coords: ``[N, 4]`` int32 or int64, as for `subdivide`.
        feats: ``[N, C]`` float, copied to the children; None: coordinates and parents only. Differentiable, any number
            of times.
        child_mask: ``[N, 8]`` bool; child 4·i + 2·j + k is the voxel (2x + i, 2y + j, 2z + k).
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        (coords, feats, parent), in lexicographic order; the same on every backend. The size depends on the data: on
        CUDA this synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; a row is no voxel, or its children are none.
    """
    return _upsample("upsample", coords, feats, child_mask, backend)


def _upsample(op: str, coords: Tensor, feats: Tensor | None, mask: Tensor | None, backend: str | None) -> Upsampled:
    coords = checked_coords(op, "coords", coords)
    if feats is not None:
        feats = checked_feats(op, feats, coords)
    if mask is not None:
        _checks.tensor(op, "child_mask", mask, "N 8", (torch.bool,), device=coords.device)
        _checks.same_shape(op, "child_mask", mask, (coords.shape[0], 8))
        mask = mask.contiguous()
    fine, parent = _children(coords, mask, op, backend=backend)
    if feats is not None:
        feats = gather_features(feats, parent, backend=backend)
    return Upsampled(fine, feats, parent)


def _slots_backend(backend: str | None) -> str | None:
    """Slots have a kernel on a CPU only: a wish for native kernels is one where there are any."""
    return None if backend == "native" else backend


@names_itself
def spatial_to_channel(
    coords: Tensor, feats: Tensor, factor: int | Sequence[int] = 2, *, backend: str | None = None
) -> Downsampled:
    """Stacks the features of a coarse voxel's children into its channels. The inverse is `channel_to_spatial`.

    Args:
        coords: ``[N, 4]`` int32 or int64, distinct (batch, x, y, z): batch in [0, 32768), coordinates in [0, 65536).
        feats: ``[N, C]`` float. Differentiable, any number of times.
        factor: Voxels per coarse voxel, along all axes or along (x, y, z).
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        (coords, feats, inverse, counts) with feats ``[M, K·C]``, K the children of a voxel: child (i, j, k), x slowest,
        holds channels ((i·fy + j)·fz + k)·C and on; those of absent children are 0. The size depends on the data: on
        CUDA this synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; a row is no voxel; a voxel is repeated (on a CPU).
    """
    op = "spatial_to_channel"
    coords = checked_coords(op, "coords", coords)
    feats = checked_feats(op, feats, coords)
    factors = _factors(op, factor)
    children = factors[0] * factors[1] * factors[2]
    coarse, inverse, counts = _coarsen(coords, factors, op, backend=backend)
    slot = _child_slots(coords, inverse, factors, backend=_slots_backend(backend))
    stacked = scatter_rows(op, feats, slot, coarse.shape[0] * children, 0.0, backend)
    return Downsampled(coarse, stacked.view(coarse.shape[0], children * feats.shape[1]), inverse, counts)


@names_itself
def channel_to_spatial(
    coords: Tensor, feats: Tensor, child_mask: Tensor | None = None, *, backend: str | None = None
) -> Upsampled:
    """Spreads the channels of voxels over their children. The inverse is `spatial_to_channel`.

    Args:
        coords: ``[N, 4]`` int32 or int64, as for `subdivide`.
        feats: ``[N, 8·C]`` float; child 4·i + 2·j + k of a voxel takes channels (4·i + 2·j + k)·C and on.
            Differentiable, any number of times.
        child_mask: ``[N, 8]`` bool, the children that there are; None: all.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        (coords, feats, parent) with feats ``[M, C]``, in lexicographic order; the same on every backend. With a mask
        the size depends on the data: on CUDA this synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; the channels are no multiple of 8; a row is no voxel,
            or its children are none (without a mask: on a CPU).
    """
    op = "channel_to_spatial"
    coords = checked_coords(op, "coords", coords)
    feats = checked_feats(op, feats, coords)
    if feats.shape[1] % 8:
        raise ValueError(f"{op}: feats must have a multiple of 8 channels, got {feats.shape[1]}")
    fine, _, parent = _upsample(op, coords, None, child_mask, backend)
    slot = _child_slots(fine, parent, [2, 2, 2], backend=_slots_backend(backend))
    channels = feats.shape[1] // 8
    return Upsampled(fine, gather_features(feats.view(feats.shape[0] * 8, channels), slot, backend=backend), parent)
