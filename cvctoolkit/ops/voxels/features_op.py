"""Features between sets of voxels: gather into a superset, scatter, and reduce what shares a row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._backend import Backend
from cvctoolkit._library import define_op, names_itself
from cvctoolkit._native import kernels as _native
from cvctoolkit.ops.voxels import dense_reference as reference
from cvctoolkit.ops.voxels.conventions import DUPLICATE, OUT_OF_RANGE
from cvctoolkit.ops.voxels.dense_op import checked_feats

_REDUCTIONS = reference.REDUCTIONS

# --- operators --------------------------------------------------------------------------------------------------------


def _check_index(op: str, index: Tensor, limit: int) -> None:
    """Data-dependent: refuses rows outside [−1, limit) on a CPU; on CUDA they count as −1."""
    if index.device.type == "cpu" and index.numel():
        low, high = (int(x) for x in torch.aminmax(index))
        if low < -1 or high >= limit:
            bad = low if low < -1 else high
            raise ValueError(f"{op}: index must be −1 (absent) or a row in [0, {limit}), got {bad}")


def _gather_native(feats: Tensor, index: Tensor, fill: float) -> Tensor:
    out, ok = _native.gather_features(feats, index, fill)
    if not ok:
        _check_index("gather_features", index, feats.shape[0])
    return out


def _gather_reference(feats: Tensor, index: Tensor, fill: float) -> Tensor:
    _check_index("gather_features", index, feats.shape[0])
    return reference.gather_features(feats, index, fill)


def _gather_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.num_rows = inputs[0].shape[0]
    ctx.save_for_backward(inputs[1])


def _gather_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    return _reduce(grad.contiguous(), index, ctx.num_rows, _REDUCTIONS.index("sum"), False), None, None


_gather = define_op(
    "gather_features",
    "(Tensor feats, Tensor index, float fill) -> Tensor",
    fake=lambda feats, index, fill: feats.new_empty(index.shape[0], feats.shape[1]),
    reference=_gather_reference,
    native=Backend(_gather_native, kernels=("gather_features",)),
    setup_context=_gather_context,
    backward=_gather_backward,
)


def _reduce_native(feats: Tensor, index: Tensor, num_rows: int, reduction: int, include_self: bool) -> Tensor:
    out, ok = _native.reduce_features(feats, index, num_rows, reduction, include_self)
    if not ok:
        _check_index("reduce_features", index, num_rows)
    return out


def _reduce_reference(feats: Tensor, index: Tensor, num_rows: int, reduction: int, include_self: bool) -> Tensor:
    _check_index("reduce_features", index, num_rows)
    return reference.reduce_features(feats, index, num_rows, reduction, include_self)


def only_float32_64(feats: Tensor, *_: Any) -> Iterable[str]:
    """Half precision is the reference's."""
    if feats.dtype not in _checks.FLOAT32_64:
        yield f"needs float32 or float64 features, got {feats.dtype}"


def save_reduction(ctx: Any, feats: Tensor, index: Tensor, output: Tensor, reduction: int, include_self: bool) -> None:
    """What `reduction_backward` needs."""
    ctx.about = output.shape[0], _REDUCTIONS[reduction], include_self
    ctx.save_for_backward(index, *([feats, output] if ctx.about[1] == "max" else []))


def reduction_backward(ctx: Any, grad: Tensor) -> Tensor:
    """The gradient for the features that were reduced."""
    index, *values = ctx.saved_tensors
    num_rows, name, include_self = ctx.about
    if name == "max":
        feats, out = (v.detach() for v in values)
        return reference.max_backward(grad, feats, index, out, include_self)
    if name == "mean":
        counts = reference.row_counts(index, num_rows) + int(include_self)
        grad = (grad / counts.clamp_min(1)[:, None]).to(grad.dtype)
    return _gather(grad.contiguous(), index, 0.0)


def _reduce_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    feats, index, _, reduction, include_self, _ = inputs
    save_reduction(ctx, feats, index, output, reduction, include_self)


_reduce = define_op(
    "reduce_features",
    "(Tensor feats, Tensor index, SymInt num_rows, int reduction, bool include_self) -> Tensor",
    fake=lambda feats, index, num_rows, *_: feats.new_empty(num_rows, feats.shape[1]),
    reference=_reduce_reference,
    native=Backend(_reduce_native, only_float32_64, kernels=("reduce_features",)),
    setup_context=_reduce_context,
    backward=lambda ctx, grad: (reduction_backward(ctx, grad), None, None, None, None),
)


# --- public functions -------------------------------------------------------------------------------------------------


def _checked_index(op: str, index: Tensor, feats: Tensor, shape: str) -> Tensor:
    _checks.tensor(op, "index", index, shape, _checks.INTEGRAL, device=feats.device)
    return index.long().contiguous()


def gather_features(feats: Tensor, index: Tensor, *, fill_value: float = 0.0, backend: str | None = None) -> Tensor:
    """Takes rows of features, and a constant where there is none: a part's features over the whole set.

    With ``index = voxel_lookup(part, whole)`` the features of the part land on its voxels in the whole, and ``index >=
    0`` is the mask M of masked guidance.

    Args:
        feats: ``[N, C]`` float. Differentiable, any number of times; the gradient is summed in row order.
        index: ``[M]`` int32 or int64, rows of ``feats`` in any order, any number of times; −1 is absent.
        fill_value: What absent rows hold.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[M, C]``, in the dtype of ``feats``; the same on every backend. Nothing synchronises on CUDA, where an index
        out of range is absent.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; an index is out of range (on a CPU).
    """
    op = "gather_features"
    feats = checked_feats(op, feats)
    index = _checked_index(op, index, feats, "M")
    return _gather(feats, index, _checks.number(op, "fill_value", fill_value, finite=False), backend=backend)


@names_itself
def scatter_features(
    feats: Tensor, index: Tensor, num_rows: int, *, fill_value: float = 0.0, backend: str | None = None
) -> Tensor:
    """Puts rows of features into their places in a superset, and a constant everywhere else.

    With ``index = voxel_union(a, b).index_a`` the features of a are spread over the union.

    Args:
        feats: ``[N, C]`` float. Differentiable, any number of times.
        index: ``[N]`` int32 or int64, the row of the result for every row of ``feats``, each at most once; −1 drops the
            row.
        num_rows: M, the rows of the result.
        fill_value: What the other rows hold.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[M, C]``, in the dtype of ``feats``; the same on every backend. Nothing synchronises on CUDA, where an index
        out of range drops its row, and of rows with one place the lowest counts.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; an index is out of range or repeated (on a CPU).
    """
    op = "scatter_features"
    feats = checked_feats(op, feats)
    index = _checked_index(op, index, feats, "N")
    _checks.same_shape(op, "index", index, feats.shape[:1])
    num_rows = _checks.integer(op, "num_rows", num_rows, at_least=0)
    fill = _checks.number(op, "fill_value", fill_value, finite=False)
    return scatter_rows(op, feats, index, num_rows, fill, backend)


def scatter_rows(op: str, feats: Tensor, index: Tensor, num_rows: int, fill: float, backend: str | None) -> Tensor:
    """`scatter_features` of checked arguments, in the name of a public function."""
    inverse = _invert_index(index, num_rows, op, backend="reference" if backend == "reference" else None)
    return _gather(feats, inverse, fill, backend=backend)


def _invert_index_native(index: Tensor, num_rows: int, op: str) -> Tensor:
    _checks.fits_memory(op, "a result", num_rows * index.element_size(), index.device)
    row, faults = _native.invert_index(index, num_rows)
    if faults & OUT_OF_RANGE[0]:
        _check_index(op, index, num_rows)
    if faults & DUPLICATE[0]:
        _refuse_two_sources(op)
    return row


def _refuse_two_sources(op: str) -> None:
    raise ValueError(f"{op}: every row of the result must have one source at most, got one twice")


def _invert_index_reference(index: Tensor, num_rows: int, op: str) -> Tensor:
    _checks.fits_memory(op, "a result", num_rows * index.element_size(), index.device)
    _check_index(op, index, num_rows)
    rows = torch.arange(len(index), device=index.device)
    place = torch.where((index < 0) | (index >= num_rows), num_rows, index)
    row = torch.full((num_rows + 1,), len(index), device=index.device).scatter_reduce(0, place, rows, "amin")[:-1]
    row = torch.where(row < len(index), row, -1)
    if index.device.type == "cpu" and int((row >= 0).sum()) < int((index >= 0).sum()):
        _refuse_two_sources(op)
    return row


_invert_index = define_op(
    "invert_index",
    "(Tensor index, SymInt num_rows, str op) -> Tensor",
    fake=lambda index, num_rows, op: index.new_empty(num_rows),
    reference=_invert_index_reference,
    native=Backend(_invert_index_native, kernels=("invert_index",)),
)


def reduce_features(
    feats: Tensor,
    index: Tensor,
    num_rows: int,
    *,
    reduce: str = "mean",
    include_self: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Joins the rows of features that share an index: the pooling behind `downsample`, for a cached inverse map.

    Args:
        feats: ``[N, C]`` float. Differentiable, any number of times; of equal maxima the lowest row gets the gradient.
        index: ``[N]`` int32 or int64, the row of the result that every row goes into; −1 drops the row.
        num_rows: M, the rows of the result.
        reduce: ``"mean"``, ``"max"`` or ``"sum"``. A row of the result that nothing goes into is 0.
        include_self: An initial row of zeros takes part, as in ``torch.scatter_reduce``: the mean is sum / (n + 1), the
            maximum at least 0.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[M, C]``, in the dtype of ``feats``, summed in row order (in float32 for half precision). Nothing synchronises
        on CUDA, where an index out of range drops its row and sums depend on the order of atomics.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices, names or backend do not fit; an index is out of range (on a CPU).
    """
    op = "reduce_features"
    feats = checked_feats(op, feats)
    index = _checked_index(op, index, feats, "N")
    _checks.same_shape(op, "index", index, feats.shape[:1])
    num_rows = _checks.integer(op, "num_rows", num_rows, at_least=0)
    _checks.choice(op, "reduce", reduce, _REDUCTIONS)
    include_self = _checks.flag(op, "include_self", include_self)
    return _reduce(feats, index, num_rows, _REDUCTIONS.index(reduce), include_self, backend=backend)
