"""Sequences of voxels to attend within: batch items, windows of space, runs along a curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._backend import Backend
from cvctoolkit._library import define_op, dynamic_sizes, names_itself
from cvctoolkit._native import kernels as _native
from cvctoolkit.ops.sparse_attention import windows_reference as reference
from cvctoolkit.ops.sparse_attention.op import checked_heads, varlen_attention
from cvctoolkit.ops.voxels import order_reference
from cvctoolkit.ops.voxels.conventions import MAX_BATCH, MAX_COORD, checked_coords, raise_faults


class Partition(NamedTuple):
    """Voxels in sequences: build it once, use it for every layer that shares it.

    Attributes:
        permutation: ``[N]`` int64, the row at every position.
        cu_seqlens: ``[S + 1]`` int64, the positions at which sequences begin, and N. No sequence is empty.
        inverse: ``[N]`` int64, the position of every row.
    """

    permutation: Tensor
    cu_seqlens: Tensor
    inverse: Tensor


# --- operators --------------------------------------------------------------------------------------------------------


def _sorting(op: str, native: bool) -> reference.Sort:
    def sort(coords: Tensor, order: int) -> tuple[Tensor, Tensor, Tensor]:
        if native:
            *found, faults = _native.voxel_sort(coords, order, 1)
            raise_faults(op, faults, "coords")
            return tuple(found)
        if coords.device.type == "cpu" and not bool(order_reference.in_range(coords).all()):
            raise_faults(op, 1, "coords")
        return order_reference.voxel_sort(coords, order, 1)

    return sort


def _fake(coords: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows = coords.new_empty(coords.shape[0], dtype=torch.int64)
    return rows, coords.new_empty(*dynamic_sizes(1), dtype=torch.int64), torch.empty_like(rows)


def _define(op: str, schema: str) -> Any:
    def run(native: bool) -> Any:
        return lambda *args: getattr(reference, op)(*args, _sorting(op, native))

    return define_op(
        op,
        f"(Tensor coords, {schema}) -> (Tensor, Tensor, Tensor)",
        fake=_fake,
        reference=run(False),
        native=Backend(run(True), kernels=("voxel_sort",)),
    )


_window_partition = _define("window_partition", "int[3] window_size, int[3] shift")
_serialized_partition = _define("serialized_partition", "int window_size, int order, int shift")


# --- public functions -------------------------------------------------------------------------------------------------


def batch_cu_seqlens(coords: Tensor, batch_size: int) -> Tensor:
    """One sequence per batch item, of rows in canonical order: what `varlen_attention` needs to attend to all of it.

    Args:
        coords: ``[N, 4]`` int32 or int64, (batch, x, y, z), batch ascending and in [0, batch_size).
        batch_size: Number of batch items.

    Returns:
        ``[batch_size + 1]`` int64. On CUDA nothing is checked and nothing synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shape or dtype do not fit, a number is out of range, the batch does not ascend (on a CPU).
    """
    op = "batch_cu_seqlens"
    _checks.tensor(op, "coords", coords, "N 4", _checks.INTEGRAL)
    _checks.integer(op, "batch_size", batch_size, at_least=1, at_most=MAX_BATCH)
    batch = coords[:, 0].contiguous()
    if coords.device.type == "cpu" and not torch.compiler.is_compiling() and len(batch):
        if int(batch[0]) < 0 or int(batch[-1]) >= batch_size or not bool((batch[1:] >= batch[:-1]).all()):
            raise ValueError(f"{op}: coords must be sorted by batch, in [0, {batch_size}); voxel_sort sorts them")
    return torch.searchsorted(batch, torch.arange(batch_size + 1, dtype=batch.dtype, device=batch.device))


def _triple(op: str, name: str, value: Any, at_least: int, at_most: int) -> list[int]:
    if isinstance(value, (tuple, list)):
        if len(value) != 3:
            raise ValueError(f"{op}: {name} must be an integer or three, got {value!r}")
        return [_checks.integer(op, f"{name}[{i}]", v, at_least=at_least, at_most=at_most) for i, v in enumerate(value)]
    return [_checks.integer(op, name, value, at_least=at_least, at_most=at_most)] * 3


def window_partition(
    coords: Tensor, window_size: int | Sequence[int], shift: int | Sequence[int] = 0, *, backend: str | None = None
) -> Partition:
    """Sorts voxels into the windows (x + shift) // window_size of their batch item.

    Args:
        coords: ``[N, 4]`` int32 or int64, (batch, x, y, z): batch in [0, 32768), coordinates in [0, 65536), in any
            order; rows may repeat.
        window_size: Voxels along every axis, or three of them, 1 to 65536. One larger than the grid gives one window
            per batch item.
        shift: Added to the coordinates before windows are cut, 0 to ``window_size − 1``; one number, or three of them.
            Windows at the low border are smaller then, as with a (n + shift) grid in TRELLIS and Direct3D-S2.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        (permutation, cu_seqlens, inverse): windows in lexicographic order of (batch, x, y, z), the rows of a window in
        the order given. The same on every backend. The number of windows depends on the data: on CUDA this
        synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shape, dtype or backend do not fit, a number is out of range, a row is no voxel (on a CPU).
    """
    op = "window_partition"
    size = _triple(op, "window_size", window_size, 1, MAX_COORD)
    offset = _triple(op, "shift", shift, 0, MAX_COORD - 1)
    if any(a >= b for a, b in zip(offset, size)):
        raise ValueError(f"{op}: shift must be less than window_size, got {shift!r} and {window_size!r}")
    return Partition(*_window_partition(checked_coords(op, "coords", coords), size, offset, backend=backend))


def serialized_partition(
    coords: Tensor, window_size: int, order: str = "hilbert", shift: int = 0, *, backend: str | None = None
) -> Partition:
    """Cuts a space-filling curve through the voxels of a batch item into runs of equal numbers of voxels.

    Args:
        coords: ``[N, 4]`` int32 or int64, (batch, x, y, z): batch in [0, 32768), coordinates in [0, 65536), in any
            order; rows may repeat.
        window_size: Voxels of a run.
        order: ``"hilbert"`` or ``"morton"``.
        shift: 0 to ``window_size − 1``: the first run of each batch item is shorter by so many.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        (permutation, cu_seqlens, inverse): runs in the order of (batch, curve). The last run of a batch item has what
        is left. The same on every backend. On CUDA this synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shape, dtype, order or backend do not fit, a number is out of range, a row is no voxel (on a CPU).
    """
    op = "serialized_partition"
    size = _checks.integer(op, "window_size", window_size, at_least=1)
    offset = _checks.integer(op, "shift", shift, at_least=0)
    if offset >= size:
        raise ValueError(f"{op}: shift must be less than window_size, got {shift} and {window_size}")
    which = reference.ORDERS[_checks.choice(op, "order", order, tuple(reference.ORDERS))]
    return Partition(*_serialized_partition(checked_coords(op, "coords", coords), size, which, offset, backend=backend))


def _attend(
    op: str, q: Tensor, k: Tensor, v: Tensor, coords: Tensor, partition: Partition, scale: float | None,
    backend: str | None,
) -> Tensor:  # fmt: skip
    checked_heads(op, q, k, v)
    _checks.same_shape(op, "k", k, (q.shape[0], *k.shape[1:]))
    _checks.same_shape(op, "coords", coords, (q.shape[0], 4))
    if not isinstance(partition, Partition):
        raise TypeError(f"{op}: partition must be a Partition or None, got {type(partition).__name__}")
    out = varlen_attention(
        q, k, v, partition.cu_seqlens, permutation=partition.permutation, scale=scale, backend=backend
    )
    assert isinstance(out, Tensor)
    return out


def _for(backend: str | None) -> str | None:
    """Of the attention's backends those that a partition has, too."""
    return backend if backend in ("native", "reference") else None


@names_itself
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coords: Tensor,
    window_size: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    *,
    partition: Partition | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of every voxel over the voxels of its (shifted) window.

    Args:
        q: ``[N, H, D]`` float, as in `varlen_attention`. Differentiable, once.
        k: ``[N, Hkv, D]``, dtype of q. Differentiable, once.
        v: ``[N, Hkv, Dv]``, dtype of q. Differentiable, once.
        coords: ``[N, 4]`` int32 or int64, (batch, x, y, z), in any order.
        window_size: See `window_partition`.
        shift: See `window_partition`.
        partition: What `window_partition` returned for these; None: it is made here.
        scale: Factor of the scores; None: 1 / √D.
        backend: ``"native"``, ``"xformers"``, ``"sdpa"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[N, H, Dv]``, rows as in q. Deterministic on a CPU.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; see `window_partition`.

    Source: Liu et al., "Swin Transformer", 2021; sparse windows as in TRELLIS (Xiang et al., 2024).
    """
    if partition is None:
        partition = window_partition(coords, window_size, shift, backend=_for(backend))
    return _attend("window_attention", q, k, v, coords, partition, scale, backend)


@names_itself
def serialized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coords: Tensor,
    window_size: int,
    order: str = "hilbert",
    shift: int = 0,
    *,
    partition: Partition | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention of every voxel over the voxels of its run along a space-filling curve.

    Args:
        q: ``[N, H, D]`` float, as in `varlen_attention`. Differentiable, once.
        k: ``[N, Hkv, D]``, dtype of q. Differentiable, once.
        v: ``[N, Hkv, Dv]``, dtype of q. Differentiable, once.
        coords: ``[N, 4]`` int32 or int64, (batch, x, y, z), in any order.
        window_size: See `serialized_partition`.
        order: See `serialized_partition`.
        shift: See `serialized_partition`.
        partition: What `serialized_partition` returned for these; None: it is made here.
        scale: Factor of the scores; None: 1 / √D.
        backend: ``"native"``, ``"xformers"``, ``"sdpa"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[N, H, Dv]``, rows as in q. Deterministic on a CPU.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; see `serialized_partition`.

    Source: Wu et al., "Point Transformer V3", 2024, Sec. 4.
    """
    if partition is None:
        partition = serialized_partition(coords, window_size, order, shift, backend=_for(backend))
    return _attend("serialized_attention", q, k, v, coords, partition, scale, backend)
