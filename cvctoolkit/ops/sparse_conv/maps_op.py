"""Neighbour maps: which input voxel each output voxel of a convolution sees through each offset of the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._backend import Backend
from cvctoolkit._library import define_op, dynamic_sizes, names_itself
from cvctoolkit._native import kernels as _native
from cvctoolkit.ops.sparse_conv import reference
from cvctoolkit.ops.voxels.conventions import DUPLICATE, MAX_COORD, OUT_OF_RANGE, checked_coords, raise_faults
from cvctoolkit.ops.voxels.order_reference import in_range, voxel_keys

MAX_KERNEL = 255


class NeighborMap(NamedTuple):
    """The geometry of a sparse convolution: build it once, use it for every layer that shares it.

    Attributes:
        map: ``[N_out, K]`` int32, the row of the input voxel under every offset, −1 where there is none. K runs over
            (Kx, Ky, Kz), the last fastest.
        out_coords: ``[N_out, 4]`` int32, (batch, x, y, z) of the output voxels.
    """

    map: Tensor
    out_coords: Tensor


# --- operators --------------------------------------------------------------------------------------------------------


def _faults(coords: Tensor, out_coords: Tensor | None) -> int:
    sets = [coords] if out_coords is None else [coords, out_coords]
    faults = sum(OUT_OF_RANGE[k] for k, c in enumerate(sets) if not bool(in_range(c).all()))
    if not faults and out_coords is not None and len(torch.unique(voxel_keys(coords))) < len(coords):
        faults |= DUPLICATE[0]
    return faults


def _reference_map(coords: Tensor, out_coords: Tensor, *geometry: Any) -> Tensor:
    if coords.device.type == "cpu":  # on CUDA the check would be the only synchronisation
        raise_faults("neighbor_map", _faults(coords, out_coords), "coords", "out_coords")
    return reference.neighbor_map(coords, out_coords, *geometry)


def _native_map(*args: Any) -> Tensor:
    found, faults = _native.neighbor_map(*args)
    raise_faults("neighbor_map", faults, "coords", "out_coords")
    return found


def _reference_coords(coords: Tensor, *geometry: Any) -> Tensor:
    raise_faults("conv_out_coords", _faults(coords, None), "coords")
    return reference.conv_out_coords(coords, *geometry)


def _native_coords(*args: Any) -> Tensor:
    found, faults = _native.conv_out_coords(*args)
    raise_faults("conv_out_coords", faults, "coords")
    return found


def _native_inverse(map: Tensor, rows_in: int) -> Tensor:
    found, faulty = _native.invert_neighbor_map(map, rows_in)
    if faulty:
        raise ValueError("neighbor_map: an input row is out of range, or appears twice under one offset")
    return found


def _triton_inverse(map: Tensor, rows_in: int) -> Tensor:
    from cvctoolkit.ops.sparse_conv.triton import invert_neighbor_map

    return invert_neighbor_map(map.contiguous(), rows_in)


_conv_out_coords = define_op(
    "conv_out_coords",
    "(Tensor coords, int[3] kernel_size, int[3] stride, int[3] dilation, int[3] padding, bool transposed,"
    " int[3] extent) -> Tensor",
    fake=lambda coords, *_: coords.new_empty(*dynamic_sizes(1), 4),
    reference=_reference_coords,
    native=Backend(_native_coords, kernels=("conv_out_coords",)),
)

_neighbor_map = define_op(
    "neighbor_map",
    "(Tensor coords, Tensor out_coords, int[3] kernel_size, int[3] stride, int[3] dilation, int[3] padding,"
    " bool transposed) -> Tensor",
    fake=lambda coords, out_coords, kernel_size, *_: coords.new_empty(
        out_coords.shape[0], kernel_size[0] * kernel_size[1] * kernel_size[2]
    ),
    reference=_reference_map,
    native=Backend(_native_map, kernels=("neighbor_map",)),
)

invert = define_op(
    "invert_neighbor_map",
    "(Tensor map, SymInt rows_in) -> Tensor",
    fake=lambda map, rows_in: map.new_empty(rows_in, map.shape[1]),
    reference=reference.invert_neighbor_map,
    native=Backend(_native_inverse, kernels=("invert_neighbor_map",)),
    triton=Backend(_triton_inverse),
)


# --- public functions -------------------------------------------------------------------------------------------------


def triple(op: str, name: str, value: Any, *, at_least: int, at_most: int = MAX_COORD) -> list[int]:
    """Checks an integer or three of them, for (x, y, z)."""
    if isinstance(value, (tuple, list)):
        if len(value) != 3:
            raise ValueError(f"{op}: {name} must be an integer or three, got {value!r}")
        return [_checks.integer(op, f"{name}[{i}]", v, at_least=at_least, at_most=at_most) for i, v in enumerate(value)]
    return [_checks.integer(op, name, value, at_least=at_least, at_most=at_most)] * 3


def _geometry(
    op: str, kernel_size: Any, stride: Any, dilation: Any, padding: Any
) -> tuple[list[int], list[int], list[int], list[int]]:
    kernel = triple(op, "kernel_size", kernel_size, at_least=1, at_most=MAX_KERNEL)
    steps = triple(op, "stride", stride, at_least=1)
    spread = triple(op, "dilation", dilation, at_least=1)
    if padding is None:
        pads = [d * (k - 1) // 2 for k, d in zip(kernel, spread)]
    else:
        pads = triple(op, "padding", padding, at_least=0)
    return kernel, steps, spread, pads


def conv_out_coords(
    coords: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    *,
    padding: int | Sequence[int] | None = None,
    transposed: bool = False,
    spatial_shape: Sequence[int] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Every voxel that a convolution of a sparse grid reaches: where the dense convolution of ones is not zero.

    With stride 1 the set grows by the kernel (a "generative" convolution), with a larger one it is what strided sparse
    convolutions produce.

    Args:
        coords: ``[N, 4]`` int32 or int64, (batch, x, y, z): batch in [0, 32768), coordinates in [0, 65536).
        kernel_size: Voxels along every axis, or three of them, at most 255.
        stride: Steps between output voxels.
        dilation: Steps between the kernel's taps.
        padding: As in ``torch.nn.Conv3d``; None: ``dilation·(kernel_size − 1) // 2``, which keeps centres in place.
        transposed: Whether the convolution is the transposed one, from coarse to fine.
        spatial_shape: ``(X, Y, Z)`` of the *output* grid, beyond which nothing is produced; None: only negative
            coordinates are left out.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[M, 4]`` int32 in lexicographic order. The size depends on the data: on CUDA this synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shape, dtype or backend do not fit, a number is out of range, a row is no voxel.
    """
    op = "conv_out_coords"
    geometry = _geometry(op, kernel_size, stride, dilation, padding)
    extent = [MAX_COORD] * 3 if spatial_shape is None else triple(op, "spatial_shape", tuple(spatial_shape), at_least=1)
    transposed = _checks.flag(op, "transposed", transposed)
    return _conv_out_coords(checked_coords(op, "coords", coords), *geometry, transposed, extent, backend=backend)


@names_itself
def neighbor_map(
    coords: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    *,
    padding: int | Sequence[int] | None = None,
    transposed: bool = False,
    out_coords: Tensor | None = None,
    spatial_shape: Sequence[int] | None = None,
    backend: str | None = None,
) -> NeighborMap:
    """Which input voxel every output voxel sees through every offset of a kernel.

    ``out = Σ_k weight[k] · in[out·stride − padding + k·dilation]``, cross-correlation as in torch; transposed, with in
    and out exchanged. Which output voxels there are:

    - stride 1, not transposed: those of the input (a *submanifold* convolution);
    - else all that are reached, `conv_out_coords`;
    - or ``out_coords``: the fine voxels of an earlier layer with ``transposed=True`` for an *inverse* convolution,
      `conv_out_coords` with stride 1 for a *generative* one, any other set.

    Args:
        coords: ``[N, 4]`` int32 or int64, distinct (batch, x, y, z): batch in [0, 32768), coordinates in [0, 65536),
            N < 2³¹. Rows in lexicographic order are not sorted again.
        kernel_size: Voxels along every axis, or three of them, at most 255.
        stride: Steps between output voxels.
        dilation: Steps between the kernel's taps.
        padding: As in ``torch.nn.Conv3d``; None: ``dilation·(kernel_size − 1) // 2``, which keeps centres in place.
        transposed: From coarse to fine.
        out_coords: ``[N_out, 4]`` int32 or int64, distinct voxels in any order.
        spatial_shape: ``(X, Y, Z)`` of the output grid where ``out_coords`` are found here: see `conv_out_coords`.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        (map, out_coords). The same on every backend. Fixed-size, without synchronisation, unless the output voxels have
        to be found.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; a number is out of range; a row is no voxel, or a
            voxel is repeated (on a CPU).
    """
    op = "neighbor_map"
    geometry = _geometry(op, kernel_size, stride, dilation, padding)
    coords = checked_coords(op, "coords", coords)
    if out_coords is not None:
        out_coords = checked_coords(op, "out_coords", out_coords, device=coords.device)
    elif not transposed and max(geometry[1]) == 1:
        out_coords = coords
    else:
        extent = spatial_shape if spatial_shape is None else tuple(spatial_shape)
        kernel, steps, spread, pads = geometry
        out_coords = conv_out_coords(
            coords,
            kernel,
            steps,
            spread,
            padding=pads,
            transposed=transposed,
            spatial_shape=extent,
            backend=None if backend == "native" else backend,  # on CUDA there is no native one
        )
    transposed = _checks.flag(op, "transposed", transposed)
    found = _neighbor_map(coords, out_coords, *geometry, transposed, backend=backend)
    return NeighborMap(found, out_coords)
