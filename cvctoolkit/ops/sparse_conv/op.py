"""Sparse convolution and pooling over a neighbour map."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._backend import Backend
from cvctoolkit._library import define_op, names_itself
from cvctoolkit._native import kernels as _native
from cvctoolkit.ops.sparse_conv import reference
from cvctoolkit.ops.sparse_conv.maps_op import invert

# --- operators --------------------------------------------------------------------------------------------------------
#
# Three bilinear operators closed under differentiation: the convolution, its gradient in the features (a convolution
# over the inverse map with transposed weights) and its gradient in the weights. All derivatives of any order follow.


def _widened(run: Callable[..., Any]) -> Callable[..., Any]:
    """Half precision through float32 kernels: the copies cost little beside the products."""

    def widened(*args: Any) -> Any:
        dtype = args[0].dtype
        if dtype in _checks.FLOAT32_64:
            return run(*args)
        out = run(*(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))
        return (out[0].to(dtype), *out[1:]) if isinstance(out, tuple) else out.to(dtype)

    return widened


def _contiguous(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: run(*(a.contiguous() if isinstance(a, Tensor) else a for a in args))


def _checked_rows(op: str, run: Callable[..., Any], map_at: int) -> Callable[..., Any]:
    """Contiguous arguments, and on a CPU no map entry that is not a row of the first argument."""

    def checked(*args: Any) -> Any:
        map, rows = args[map_at], args[0].shape[0]
        if map.device.type == "cpu" and map.numel():
            low, high = (int(x) for x in torch.aminmax(map))
            if low < -1 or high >= rows:
                bad = low if low < -1 else high
                raise ValueError(f"{op}: neighbor_map must hold −1 or rows 0 to {rows - 1} of feats, got {bad}")
        return _contiguous(run)(*args)

    return checked


def _triton(op: str) -> Callable[..., Any]:
    return lambda *args: getattr(importlib.import_module("cvctoolkit.ops.sparse_conv.triton"), op)(*args)


def _no_float64(feats: Tensor, *_: Any) -> Iterable[str]:
    if feats.dtype == torch.float64:
        yield "Triton kernels compute in float32: float64 needs the reference"


def _backends(op: str, map_at: int) -> dict[str, Any]:
    return {
        "reference": _checked_rows(op, getattr(reference, op), map_at),
        "native": Backend(_checked_rows(op, _widened(getattr(_native, op)), map_at), kernels=(op,)),
        "triton": Backend(_checked_rows(op, _triton(op), map_at), _no_float64),
    }


def _transposed(weight: Tensor, groups: int) -> Tensor:
    """[g·Co, Ci, K] → [g·Ci, Co, K]."""
    return weight.unflatten(0, (groups, weight.shape[0] // groups)).transpose(1, 2).flatten(0, 1)


def _feats_grad(grad_out: Tensor, weight: Tensor, map: Tensor, groups: int, rows_in: Any) -> Tensor:
    return _sparse_conv3d(grad_out, _transposed(weight, groups), None, invert(map, rows_in), groups)


def _setup_conv(ctx: Any, inputs: Any, output: Any) -> None:
    feats, weight, bias, map, ctx.groups, _ = inputs
    ctx.has_bias, ctx.rows_in = bias is not None, feats.shape[0]
    ctx.save_for_backward(feats, weight, map)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    feats, weight, map = ctx.saved_tensors
    needs_feats, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    return (
        _feats_grad(grad, weight, map, ctx.groups, ctx.rows_in) if needs_feats else None,
        _weight_grad(feats, grad, map, ctx.groups) if needs_weight else None,
        grad.sum(0) if ctx.has_bias and needs_bias else None,
        None,
        None,
    )


_sparse_conv3d = define_op(
    "sparse_conv3d",
    "(Tensor feats, Tensor weight, Tensor? bias, Tensor map, int groups) -> Tensor",
    fake=lambda feats, weight, bias, map, groups: feats.new_empty(map.shape[0], weight.shape[0]),
    **_backends("sparse_conv3d", 3),
    setup_context=_setup_conv,
    backward=_conv_backward,
)


def _setup_weight_grad(ctx: Any, inputs: Any, output: Any) -> None:
    feats, grad_out, map, ctx.groups, _ = inputs
    ctx.rows_in = feats.shape[0]
    ctx.save_for_backward(feats, grad_out, map)


def _weight_grad_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    feats, grad_out, map = ctx.saved_tensors
    needs_feats, needs_grad_out = ctx.needs_input_grad[:2]
    return (
        _feats_grad(grad_out, grad, map, ctx.groups, ctx.rows_in) if needs_feats else None,
        _sparse_conv3d(feats, grad, None, map, ctx.groups) if needs_grad_out else None,
        None,
        None,
    )


_weight_grad = define_op(
    "sparse_conv3d_weight_grad",
    "(Tensor feats, Tensor grad_out, Tensor map, int groups) -> Tensor",
    fake=lambda feats, grad_out, map, groups: feats.new_empty(
        grad_out.shape[1], feats.shape[1] // groups, map.shape[1]
    ),
    **_backends("sparse_conv3d_weight_grad", 2),
    setup_context=_setup_weight_grad,
    backward=_weight_grad_backward,
)


def _setup_pool(ctx: Any, inputs: Any, output: Any) -> None:
    feats, map, _ = inputs
    ctx.rows_in = feats.shape[0]
    ctx.save_for_backward(map)


_sum_pool = define_op(
    "sparse_sum_pool3d",
    "(Tensor feats, Tensor map) -> Tensor",
    fake=lambda feats, map: feats.new_empty(map.shape[0], feats.shape[1]),
    **_backends("sparse_sum_pool3d", 1),
    setup_context=_setup_pool,
    backward=lambda ctx, grad: (_sum_pool(grad, invert(ctx.saved_tensors[0], ctx.rows_in)), None),
)


def _native_max_grad(grad_out: Tensor, offset: Tensor, map: Tensor, rows_in: int) -> Tensor:
    return _native.sparse_max_pool3d_grad(grad_out.contiguous(), offset.contiguous(), invert(map, rows_in))


def _gather_largest(grad: Tensor, offset: Tensor, map: Tensor) -> Tensor:
    """grad[map[o, offset[o, c]], c], 0 where there is none: what the gradient of a maximum is the transpose of."""
    row = map.long().gather(1, offset.long().clamp_min(0))
    return torch.where(offset >= 0, grad.gather(0, row.clamp_min(0)), 0)


def _setup_max_grad(ctx: Any, inputs: Any, output: Any) -> None:
    _, offset, map, *_ = inputs
    ctx.save_for_backward(offset, map)


_max_pool_grad = define_op(
    "sparse_max_pool3d_grad",
    "(Tensor grad_out, Tensor offset, Tensor map, SymInt rows_in) -> Tensor",
    fake=lambda grad_out, offset, map, rows_in: grad_out.new_empty(rows_in, grad_out.shape[1]),
    reference=reference.sparse_max_pool3d_grad,
    native=Backend(_widened(_native_max_grad), kernels=("sparse_max_pool3d_grad",)),
    triton=Backend(_contiguous(_triton("sparse_max_pool3d_grad")), _no_float64),
    setup_context=_setup_max_grad,
    backward=lambda ctx, grad: (_gather_largest(grad, *ctx.saved_tensors), None, None, None),
)


def _setup_max_pool(ctx: Any, inputs: Any, output: Any) -> None:
    feats, map, _ = inputs
    ctx.rows_in = feats.shape[0]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], map)


def _max_pool_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
    return _max_pool_grad(grad, *ctx.saved_tensors, ctx.rows_in), None


_max_pool = define_op(
    "sparse_max_pool3d",
    "(Tensor feats, Tensor map) -> (Tensor, Tensor)",
    fake=lambda feats, map: (
        feats.new_empty(map.shape[0], feats.shape[1]),
        feats.new_empty(map.shape[0], feats.shape[1], dtype=torch.int32),
    ),
    **_backends("sparse_max_pool3d", 1),
    setup_context=_setup_max_pool,
    backward=_max_pool_backward,
)


# --- public functions -------------------------------------------------------------------------------------------------


def _checked(op: str, feats: Any, map: Any) -> tuple[Tensor, Tensor]:
    _checks.tensor(op, "feats", feats, "N C", _checks.FLOATING)
    _checks.tensor(op, "neighbor_map", map, "N_out K", _checks.INTEGRAL, device=feats.device)
    return feats, map.to(torch.int32)


def sparse_conv3d(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    neighbor_map: Tensor,
    *,
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Sparse 3-D convolution over a neighbour map: submanifold, strided, transposed, whatever the map says.

    Args:
        feats: ``[N, C_in]`` float16, bfloat16, float32 or float64. Differentiable.
        weight: ``[C_out, C_in / groups, Kx, Ky, Kz]`` of the same dtype, as in ``torch.nn.Conv3d`` (also for a
            transposed convolution). Differentiable.
        bias: ``[C_out]`` or None. Differentiable.
        neighbor_map: ``[N_out, Kx·Ky·Kz]`` int32 or int64, rows of ``feats`` or −1, from `neighbor_map`. An input row
            appears at most once under every offset (for gradients in ``feats``).
        groups: Groups of channels that do not mix.
        backend: ``"native"``, ``"triton"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[N_out, C_out]``: ``bias + Σ_k weight[:, :, k] · feats[neighbor_map[:, k]]``, summed in float32 at least.
        Deterministic. Derivatives of every order.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; a map entry is out of range (on a CPU; on CUDA it
            counts as absent).
    """
    op = "sparse_conv3d"
    feats, neighbor_map = _checked(op, feats, neighbor_map)
    groups = _checks.integer(op, "groups", groups, at_least=1)
    _checks.tensor(op, "weight", weight, "Co Ci Kx Ky Kz", (feats.dtype,), device=feats.device)
    if weight.shape[0] % groups or weight.shape[1] * groups != feats.shape[1]:
        raise ValueError(
            f"{op}: weight {list(weight.shape)} must be [C_out, {feats.shape[1]} / groups, Kx, Ky, Kz] with C_out"
            f" divisible by groups = {groups}"
        )
    kernel = weight.shape[2] * weight.shape[3] * weight.shape[4]
    if kernel != neighbor_map.shape[1]:
        raise ValueError(f"{op}: neighbor_map has {neighbor_map.shape[1]} offsets, weight {kernel}")
    if bias is not None:
        _checks.tensor(op, "bias", bias, "Co", (feats.dtype,), device=feats.device)
        _checks.same_shape(op, "bias", bias, weight.shape[:1])
    return _sparse_conv3d(feats, weight.flatten(2), bias, neighbor_map, groups, backend=backend)


def sparse_max_pool3d(feats: Tensor, neighbor_map: Tensor, *, backend: str | None = None) -> Tensor:
    """The channel-wise maximum over the neighbours that exist.

    Args:
        feats: ``[N, C]`` float16, bfloat16, float32 or float64. Differentiable; of equal values the first offset's
            receives the gradient. NaN wins.
        neighbor_map: ``[N_out, K]`` int32 or int64, rows of ``feats`` or −1, from `neighbor_map`.
        backend: ``"native"``, ``"triton"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[N_out, C]``; 0 where a voxel has no neighbour. Deterministic.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; a map entry is out of range (on a CPU).
    """
    return _max_pool(*_checked("sparse_max_pool3d", feats, neighbor_map), backend=backend)[0]


@names_itself
def sparse_avg_pool3d(
    feats: Tensor, neighbor_map: Tensor, *, count_absent: bool = False, backend: str | None = None
) -> Tensor:
    """The mean over the neighbours that exist.

    Args:
        feats: ``[N, C]`` float16, bfloat16, float32 or float64. Differentiable.
        neighbor_map: ``[N_out, K]`` int32 or int64, rows of ``feats`` or −1, from `neighbor_map`. An input row appears
            at most once under every offset.
        count_absent: Divide by K, as dense average pooling of a grid with zeros does, not by the number of neighbours.
        backend: ``"native"``, ``"triton"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[N_out, C]``; 0 where a voxel has no neighbour. Deterministic.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; a map entry is out of range (on a CPU).
    """
    op = "sparse_avg_pool3d"
    feats, neighbor_map = _checked(op, feats, neighbor_map)
    count_absent = _checks.flag(op, "count_absent", count_absent)
    total = _sum_pool(feats, neighbor_map, backend=backend)
    if count_absent:
        return total / neighbor_map.shape[1]
    return total / (neighbor_map >= 0).sum(1, keepdim=True).clamp_min(1).to(total.dtype)
