"""Dense volumes ↔ sparse voxels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._backend import Backend
from cvctoolkit._library import define_op, dynamic_sizes, names_itself
from cvctoolkit._native import kernels as _native
from cvctoolkit.ops.voxels import dense_reference as reference
from cvctoolkit.ops.voxels.conventions import DUPLICATE, MAX_BATCH, MAX_COORD, OUT_OF_RANGE, checked_coords
from cvctoolkit.ops.voxels.order_reference import voxel_keys

_OCCUPANCY_DTYPES = (*_checks.FLOATING, torch.bool, torch.uint8)

# --- operators --------------------------------------------------------------------------------------------------------


def _fake_coords(occupancy: Tensor, threshold: float) -> Tensor:
    (count,) = dynamic_sizes(1)
    return occupancy.new_empty(count, 4, dtype=torch.int32)


_occupancy_to_coords = define_op(
    "occupancy_to_coords",
    "(Tensor occupancy, float threshold) -> Tensor",
    fake=_fake_coords,
    reference=reference.occupancy_to_coords,
    native=Backend(_native.occupancy_to_coords, kernels=("occupancy_to_coords",)),
)


def _raise_faults(op: str, faults: int, batch_size: int, shape: Sequence[int]) -> None:
    if faults & OUT_OF_RANGE[0]:
        x, y, z = shape
        raise ValueError(
            f"{op}: coords must be (batch, x, y, z) with batch in [0, {batch_size}), x in [0, {x}), y in [0, {y}), z in"
            f" [0, {z}), got a row outside"
        )
    if faults & DUPLICATE[0]:
        raise ValueError(
            f"{op}: coords must hold distinct voxels, got one twice (voxel_unique removes duplicates;"
            " assume_unique=True skips this check, and the lowest row counts)"
        )


def _check_values(op: str, coords: Tensor, batch_size: int, shape: Sequence[int], assume_unique: bool) -> None:
    """Data-dependent checks; on CUDA they would synchronise."""
    if coords.device.type != "cpu":
        return
    cells = reference.cells(coords, batch_size, list(shape))
    faults = OUT_OF_RANGE[0] * bool((cells == batch_size * math.prod(shape)).any())
    if not faults and not assume_unique and len(torch.unique(voxel_keys(coords))) < len(coords):
        faults = DUPLICATE[0]
    _raise_faults(op, faults, batch_size, shape)


def _must_fit(op: str, like: Tensor, count: int) -> None:
    _checks.fits_memory(op, "a volume", count * like.element_size(), like.device)


def _to_dense_native(
    feats: Tensor, coords: Tensor, batch_size: int, shape: list[int], fill: float, assume_unique: bool
) -> Tensor:
    _must_fit("to_dense", feats, batch_size * math.prod(shape) * feats.shape[1])
    dense, faults = _native.voxels_to_dense(feats, coords, batch_size, *shape, fill, assume_unique)
    _raise_faults("to_dense", faults, batch_size, shape)
    return dense


def _to_dense_reference(
    feats: Tensor, coords: Tensor, batch_size: int, shape: list[int], fill: float, assume_unique: bool
) -> Tensor:
    _must_fit("to_dense", feats, batch_size * math.prod(shape) * feats.shape[1])
    _check_values("to_dense", coords, batch_size, shape, assume_unique)
    return reference.to_dense(feats, coords, batch_size, shape, fill)


def _to_dense_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.assume_unique = inputs[5]


def _to_dense_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (coords,) = ctx.saved_tensors
    return _from_dense(grad.contiguous(), coords, True), None, None, None, None, None


_to_dense = define_op(
    "voxels_to_dense",
    "(Tensor feats, Tensor coords, SymInt batch_size, SymInt[] shape, float fill, bool assume_unique) -> Tensor",
    fake=lambda feats, coords, batch_size, shape, *_: feats.new_empty(batch_size, feats.shape[1], *shape),
    reference=_to_dense_reference,
    native=Backend(_to_dense_native, kernels=("voxels_to_dense",)),
    setup_context=_to_dense_context,
    backward=_to_dense_backward,
)


def _from_dense_native(dense: Tensor, coords: Tensor, assume_unique: bool) -> Tensor:
    feats, faults = _native.voxels_from_dense(dense, coords, assume_unique)
    _raise_faults("from_dense", faults, dense.shape[0], dense.shape[2:])
    return feats


def _from_dense_reference(dense: Tensor, coords: Tensor, assume_unique: bool) -> Tensor:
    _check_values("from_dense", coords, dense.shape[0], dense.shape[2:], assume_unique)
    return reference.from_dense(dense, coords)


def _from_dense_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.shape = inputs[0].shape
    ctx.save_for_backward(inputs[1])


def _from_dense_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (coords,) = ctx.saved_tensors
    return _to_dense(grad.contiguous(), coords, ctx.shape[0], list(ctx.shape[2:]), 0.0, True), None, None


_from_dense = define_op(
    "voxels_from_dense",
    "(Tensor dense, Tensor coords, bool assume_unique) -> Tensor",
    fake=lambda dense, coords, assume_unique: dense.new_empty(coords.shape[0], dense.shape[1]),
    reference=_from_dense_reference,
    native=Backend(_from_dense_native, kernels=("voxels_from_dense",)),
    setup_context=_from_dense_context,
    backward=_from_dense_backward,
)


# --- public functions -------------------------------------------------------------------------------------------------


def checked_shape(op: str, value: Sequence[int]) -> list[int]:
    """Checks three numbers of voxels, each at most 65536."""
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise TypeError(f"{op}: spatial_shape must be three integers (X, Y, Z), got {value!r}")
    return [_checks.integer(op, f"spatial_shape[{k}]", v, at_least=0, at_most=MAX_COORD) for k, v in enumerate(value)]


def checked_feats(op: str, feats: Tensor, coords: Tensor | None = None) -> Tensor:
    """Checks features, one row per voxel."""
    _checks.tensor(op, "feats", feats, "N C", _checks.FLOATING, device=None if coords is None else coords.device)
    if coords is not None and feats.shape[0] != coords.shape[0]:
        raise ValueError(f"{op}: feats must have one row per voxel, {coords.shape[0]}, got {feats.shape[0]}")
    return feats.contiguous()


def occupancy_to_coords(occupancy: Tensor, threshold: float = 0.5, *, backend: str | None = None) -> Tensor:
    """The voxels whose occupancy exceeds a threshold.

    Args:
        occupancy: ``[B, X, Y, Z]`` or ``[B, 1, X, Y, Z]``, float, bool or uint8; NaN is not occupied. Each axis at most
            65536, B at most 32768.
        threshold: Voxels above it are taken, those equal to it are not. Rounded to the dtype of a float occupancy.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[N, 4]`` int32, (batch, x, y, z), in lexicographic order; the same on every backend. The size depends on the
        data: on CUDA this synchronises once.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shape, dtype or backend do not fit, or an axis is too long for a voxel key.

    Source: Consistent3DGen, Sec. 3.3 (occupied cells of the coarse stage).
    """
    op = "occupancy_to_coords"
    if isinstance(occupancy, Tensor) and occupancy.dim() == 5:
        _checks.tensor(op, "occupancy", occupancy, "B 1 X Y Z", _OCCUPANCY_DTYPES)
        occupancy = occupancy[:, 0]
    _checks.tensor(op, "occupancy", occupancy, "B X Y Z", _OCCUPANCY_DTYPES)
    limits = (MAX_BATCH, MAX_COORD, MAX_COORD, MAX_COORD)
    if any(size > limit for size, limit in zip(occupancy.shape, limits)):
        raise ValueError(f"{op}: occupancy must be at most {list(limits)} voxels, got {list(occupancy.shape)}")
    threshold = _checks.number(op, "threshold", threshold)
    return _occupancy_to_coords(occupancy.detach().contiguous(), threshold, backend=backend)


@names_itself
def to_dense(
    coords: Tensor,
    feats: Tensor,
    spatial_shape: Sequence[int],
    batch_size: int,
    *,
    fill_value: float = 0.0,
    assume_unique: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Writes the features of voxels into a dense volume. The inverse is `from_dense`.

    Args:
        coords: ``[N, 4]`` int32 or int64, distinct (batch, x, y, z) within the volume. Lexicographic order is the fast
            one.
        feats: ``[N, C]`` float. Differentiable, any number of times.
        spatial_shape: (X, Y, Z), each at most 65536.
        batch_size: B.
        fill_value: What absent voxels hold.
        assume_unique: Do not refuse equal rows; the lowest of them counts in the result, and each gets the gradient.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[B, C, X, Y, Z]``, in the dtype of ``feats``, contiguous; the same on every backend. On CUDA nothing
        synchronises: rows outside the volume are left out, and of equal rows the lowest counts.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; the volume cannot fit into memory; a row lies outside
            the volume or is repeated (on a CPU).
    """
    op = "to_dense"
    coords = checked_coords(op, "coords", coords)
    feats = checked_feats(op, feats, coords)
    shape = checked_shape(op, spatial_shape)
    batch_size = _checks.integer(op, "batch_size", batch_size, at_least=0, at_most=MAX_BATCH)
    is_nan = isinstance(fill_value, (float, np.floating)) and fill_value != fill_value
    fill = math.nan if is_nan else _checks.number(op, "fill_value", fill_value, finite=False)
    assume_unique = _checks.flag(op, "assume_unique", assume_unique)
    return _to_dense(feats, coords, batch_size, shape, fill, assume_unique, backend=backend)


@names_itself
def from_dense(dense: Tensor, coords: Tensor, *, assume_unique: bool = False, backend: str | None = None) -> Tensor:
    """Reads the features of voxels from a dense volume. The inverse is `to_dense`.

    Args:
        dense: ``[B, C, X, Y, Z]`` float. Differentiable, any number of times.
        coords: ``[N, 4]`` int32 or int64, distinct (batch, x, y, z) within the volume: those of `occupancy_to_coords`,
            say. Lexicographic order is the fast one.
        assume_unique: Do not refuse equal rows; the gradient then is that of the lowest of them.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[N, C]``, in the dtype of ``dense``; the same on every backend. On CUDA nothing synchronises: rows outside the
        volume read 0.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; a row lies outside the volume or is repeated (on a
            CPU).
    """
    op = "from_dense"
    _checks.tensor(op, "dense", dense, "B C X Y Z", _checks.FLOATING)
    if dense.shape[0] > MAX_BATCH or any(size > MAX_COORD for size in dense.shape[2:]):
        raise ValueError(f"{op}: dense must be at most {MAX_BATCH} volumes of {MAX_COORD}³, got {list(dense.shape)}")
    coords = checked_coords(op, "coords", coords, device=dense.device)
    assume_unique = _checks.flag(op, "assume_unique", assume_unique)
    return _from_dense(dense.contiguous(), coords, assume_unique, backend=backend)
