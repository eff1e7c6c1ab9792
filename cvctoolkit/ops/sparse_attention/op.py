"""Attention within ragged groups: sequences of any lengths, and lists of blocks that groups of queries have chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._backend import Backend
from cvctoolkit._library import define_op, names_itself
from cvctoolkit._native import kernels as _native
from cvctoolkit.ops.sparse_attention import reference, sdpa


class VarlenOutput(NamedTuple):
    """The result of an attention and what is needed to merge it with further keys.

    Attributes:
        out: ``[N, H, Dv]``.
        lse: ``[N, H]``, float32 (float64 for float64): the logarithm of the softmax's denominator; −inf where a query
            has no keys.
    """

    out: Tensor
    lse: Tensor


# --- operators --------------------------------------------------------------------------------------------------------
#
# One operator serves all: queries come in groups (ranges of positions; `rows_q` says which row is at a position), keys
# in blocks. Without a table group g attends to block g; with one, to the blocks that it lists for the head of the keys.

_RAGGED = (
    "Tensor q, Tensor k, Tensor v, Tensor? rows_q, Tensor? rows_k, Tensor offsets_q, Tensor offsets_k, Tensor? table,"
    " float scale"
)


def check_offsets(op: str, name: str, offsets: Tensor, total: int) -> None:
    """Data-dependent: refuses offsets that do not ascend from 0 to the number of rows."""
    good = len(offsets) > 0 and int(offsets[0]) == 0 and int(offsets[-1]) == total
    if not good or not bool((offsets[1:] >= offsets[:-1]).all()):
        few = offsets.tolist() if len(offsets) < 8 else [*offsets[:3].tolist(), "…", int(offsets[-1])]
        raise ValueError(f"{op}: {name} must ascend from 0 to {total}, the number of rows, got {few}")


def _check_permutation(op: str, name: str, rows: Tensor, total: int) -> None:
    inside = bool(((rows >= 0) & (rows < total)).all())
    if not inside or int(torch.bincount(rows, minlength=total).max()) != 1:
        raise ValueError(f"{op}: {name} must hold every row 0 to {total - 1} once")


def _checked(run: Callable[..., Any], q_at: int = 0) -> Callable[..., Any]:
    """Checks what depends on the data where that costs no synchronisation, and makes strides what kernels take."""

    def checked(*args: Any) -> Any:
        q, k, _, rows_q, rows_k, offsets_q, offsets_k, table = args[q_at : q_at + 8]
        op = "varlen_attention" if table is None else "block_sparse_attention"
        names = ("cu_seqlens", "cu_seqlens_k") if table is None else ("cu_blocks_q", "cu_blocks_k")
        # Sizes that may depend on the data are compared here: in Python that would break a graph.
        if table is None:
            _checks.same_shape(op, names[1], offsets_k, offsets_q.shape)
        else:
            _checks.same_shape(op, "block_indices", table, (len(offsets_q) - 1, *table.shape[1:]))
        if q.device.type == "cpu":
            for name, offsets, x in zip(names, (offsets_q, offsets_k), (q, k)):
                check_offsets(op, name, offsets, len(x))
            for name, rows, x in zip(("permutation", "permutation_k"), (rows_q, rows_k), (q, k)):
                if rows is not None and len(x):
                    _check_permutation(op, name, rows, len(x))
            if table is not None and table.numel():
                low, high = (int(x) for x in torch.aminmax(table))
                if low < -1 or high >= len(offsets_k) - 1:
                    bad = low if low < -1 else high
                    raise ValueError(f"{op}: block_indices must be −1 or blocks 0 to {len(offsets_k) - 2}, got {bad}")
        return run(*(_unit_stride(a) if isinstance(a, Tensor) else a for a in args))

    return checked


def _unit_stride(x: Tensor) -> Tensor:
    """Features adjacent in memory, as kernels need them; rows and heads may have any stride (packed projections do)."""
    return x if x.dim() == 0 or x.stride(-1) == 1 else x.contiguous()


def _only_float32_64(q: Tensor, *_: Any) -> Iterable[str]:
    if q.dtype not in _checks.FLOAT32_64:
        yield f"needs float32 or float64, got {q.dtype}"


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _native_backward(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> Any:
    return _native.ragged_attention_backward(grad_out, _contiguous(grad_lse), out, lse.contiguous(), *args)


def _once(*_: Any) -> Any:
    raise RuntimeError("ragged_attention: double backward is not implemented")


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    inner = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=inner)


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in args[4:7])


_backward_op = define_op(
    "ragged_attention_backward",
    f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_RAGGED}) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    reference=_checked(reference.ragged_attention_backward, 4),
    native=Backend(_checked(_native_backward, 4), _only_float32_64, kernels=("ragged_attention_backward",)),
    sdpa=Backend(_checked(sdpa.ragged_attention_backward, 4)),
    xformers=Backend(_checked(sdpa.xformers_attention_backward, 4), sdpa.xformers_backward_reasons),
    backward=_once,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, _, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 10
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grads = _backward_op(grad_out, grad_lse, out, lse, *tensors, ctx.scale, backend=ctx.backend or None)
    return (*(g if n else None for g, n in zip(grads, ctx.needs_input_grad)), *[None] * 7)


_ragged = define_op(
    "ragged_attention",
    f"({_RAGGED}, bool need_lse) -> (Tensor, Tensor)",
    fake=_fake,
    reference=_checked(reference.ragged_attention),
    native=Backend(
        _checked(lambda *args: _native.ragged_attention(*args[:-1])), _only_float32_64, kernels=("ragged_attention",)
    ),
    sdpa=Backend(_checked(sdpa.ragged_attention)),
    xformers=Backend(_checked(sdpa.xformers_attention), sdpa.xformers_reasons),
    setup_context=_setup,
    backward=_backward,
)


# --- public functions -------------------------------------------------------------------------------------------------


def checked_heads(op: str, q: Any, k: Any, v: Any) -> None:
    """Checks ``[N, H, D]``, ``[M, Hkv, D]``, ``[M, Hkv, Dv]`` of one float dtype, H a multiple of Hkv."""
    _checks.tensor(op, "q", q, "N H D", _checks.FLOATING)
    _checks.tensor(op, "k", k, "M Hkv D", (q.dtype,), device=q.device)
    _checks.tensor(op, "v", v, "M Hkv Dv", (q.dtype,), device=q.device)
    _checks.same_shape(op, "v", v, (*k.shape[:2], v.shape[2]))
    _checks.same_shape(op, "k", k, (*k.shape[:2], q.shape[2]))
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: q must have a multiple of the heads of k, got {q.shape[1]} and {k.shape[1]}")
    if q.shape[2] == 0:
        raise ValueError(f"{op}: q must have features, got head dimension 0")


def checked_offsets(op: str, name: str, value: Any, like: Tensor) -> Tensor:
    """Checks ``[S + 1]`` integers; as contiguous int64."""
    return _checks.tensor(op, name, value, "S", _checks.INTEGRAL, device=like.device).long().contiguous()


def checked_rows(op: str, name: str, value: Any, like: Tensor) -> Tensor | None:
    """Checks ``[N]`` integers or None; as contiguous int64."""
    if value is None:
        return None
    _checks.tensor(op, name, value, "N", _checks.INTEGRAL, device=like.device)
    _checks.same_shape(op, name, value, like.shape[:1])
    return value.long().contiguous()


def checked_scale(op: str, scale: float | None, q: Tensor) -> float:
    """The factor of the scores; None: 1 / √D."""
    return 1 / math.sqrt(q.shape[2]) if scale is None else _checks.number(op, "scale", scale)


@names_itself
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    permutation: Tensor | None = None,
    permutation_k: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | VarlenOutput:
    """Softmax attention within each of many sequences, packed one after the other; nothing is padded in memory.

    Args:
        q: ``[N, H, D]`` float16, bfloat16, float32 or float64; rows and heads of any stride, so the halves of a packed
            projection need no copy. Differentiable, once.
        k: ``[M, Hkv, D]``, dtype of q; H is a multiple of Hkv, and query heads share one of the keys' in turn (head h
            reads h // (H / Hkv)). Differentiable, once.
        v: ``[M, Hkv, Dv]``, likewise.
        cu_seqlens: ``[S + 1]`` int32 or int64, ascending from 0 to N: sequence s has the positions from
            ``cu_seqlens[s]`` on. Sequences may be empty.
        cu_seqlens_k: The same for the keys, 0 to M; None: ``cu_seqlens``, and ``permutation`` holds for the keys too.
        permutation: ``[N]`` int32 or int64, the row at every position, each once; None: position p is row p.
            `window_partition` makes one: no permuted copy of the features is needed, and the result is in the order of
            q's rows.
        permutation_k: ``[M]``, the same for the keys; only with ``cu_seqlens_k``.
        scale: Factor of the scores; None: 1 / √D.
        return_lse: Whether to return the log-sum-exp of the scores, too; differentiable as well.
        backend: ``"native"``, ``"xformers"``, ``"sdpa"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[N, H, Dv]``, or (out, lse); 0 (and −inf) for queries without keys. Summed in float32 at least. Deterministic
        on a CPU. On CUDA nothing is checked; "sdpa" and "xformers" read the lengths, which synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; offsets or permutations are none (on a CPU).

    Source: Vaswani et al., "Attention is all you need", Eq. 1; variable lengths as in FlashAttention-2.
    """
    op = "varlen_attention"
    checked_heads(op, q, k, v)
    offsets_q, rows_q = (
        checked_offsets(op, "cu_seqlens", cu_seqlens, q),
        checked_rows(op, "permutation", permutation, q),
    )
    if cu_seqlens_k is None:
        if permutation_k is not None:
            raise ValueError(f"{op}: permutation_k goes with cu_seqlens_k")
        _checks.same_shape(op, "k", k, (q.shape[0], *k.shape[1:]))
        offsets_k, rows_k = offsets_q, rows_q
    else:
        offsets_k = checked_offsets(op, "cu_seqlens_k", cu_seqlens_k, q)
        rows_k = checked_rows(op, "permutation_k", permutation_k, k)
    factor = checked_scale(op, scale, q)
    return_lse = _checks.flag(op, "return_lse", return_lse)
    out, lse = _ragged(q, k, v, rows_q, rows_k, offsets_q, offsets_k, None, factor, return_lse, backend=backend)
    return VarlenOutput(out, lse) if return_lse else out


@names_itself
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_blocks_q: Tensor,
    cu_blocks_k: Tensor,
    block_indices: Tensor,
    *,
    permutation: Tensor | None = None,
    permutation_k: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | VarlenOutput:
    """Softmax attention of groups of queries over blocks of keys that each group lists.

    Args:
        q: ``[N, H, D]`` float16, bfloat16, float32 or float64. Differentiable, once.
        k: ``[M, Hkv, D]``, dtype of q; H is a multiple of Hkv. Differentiable, once.
        v: ``[M, Hkv, Dv]``, likewise.
        cu_blocks_q: ``[G + 1]`` int32 or int64, ascending from 0 to N: positions of the groups of queries.
        cu_blocks_k: ``[B + 1]`` int32 or int64, ascending from 0 to M: positions of the blocks of keys.
        block_indices: ``[G, Hkv, T]`` int32 or int64, the blocks of every group and head of the keys in any order, −1
            for none. A block listed twice counts twice.
        permutation: ``[N]`` int32 or int64, the row of q at every position, each once; None: position p is row p.
        permutation_k: ``[M]``, the same for the keys.
        scale: Factor of the scores; None: 1 / √D.
        return_lse: Whether to return the log-sum-exp of the scores, too.
        backend: ``"native"``, ``"sdpa"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[N, H, Dv]``, or (out, lse); 0 (and −inf) for queries without keys. Summed in float32 at least. Deterministic
        on a CPU. On CUDA nothing is checked; "sdpa" reads the lengths, which synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; offsets, permutations or blocks are none (on a CPU).

    Source: selection branch of Yuan et al., "Native Sparse Attention", 2025, Eq. 11-12.
    """
    op = "block_sparse_attention"
    checked_heads(op, q, k, v)
    offsets_q = checked_offsets(op, "cu_blocks_q", cu_blocks_q, q)
    offsets_k = checked_offsets(op, "cu_blocks_k", cu_blocks_k, q)
    _checks.tensor(op, "block_indices", block_indices, "G Hkv T", _checks.INTEGRAL, device=q.device)
    if block_indices.shape[1] != k.shape[1]:
        raise ValueError(f"{op}: block_indices must have the {k.shape[1]} heads of k, got {list(block_indices.shape)}")
    rows_q, rows_k = (
        checked_rows(op, "permutation", permutation, q),
        checked_rows(op, "permutation_k", permutation_k, k),
    )
    return_lse = _checks.flag(op, "return_lse", return_lse)
    out, lse = _ragged(
        q, k, v, rows_q, rows_k, offsets_q, offsets_k, block_indices.int().contiguous(), checked_scale(op, scale, q),
        return_lse, backend=backend,
    )  # fmt: skip
    return VarlenOutput(out, lse) if return_lse else out
