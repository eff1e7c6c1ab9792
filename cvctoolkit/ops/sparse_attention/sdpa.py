"""Ragged attention through kernels of torch and xformers.

Groups are sorted by the number of their keys and queries and padded in batches of nearly equal lengths, so that padding
stays bounded; a batch goes through `scaled_dot_product_attention`, with a mask only where keys are padded. Query heads
that share a head of the keys become further queries: no key is repeated. Lengths are read on the host: on CUDA this
synchronises.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: Rows of a batch are padded to at most this many times their number, plus a few.
_PADDING, _FEW = 1.25, 8
#: Elements of a batch's q, k and v.
_BATCH = 1 << 25
#: Scores that exist at a time where torch's fused kernels do not serve, in elements.
_SCORES = 1 << 23


class Batch(NamedTuple):
    """Groups of similar lengths: everything about them that an attention over padded rows needs.

    Attributes:
        queries: ``[b, Lq]`` rows of q, padding repeats the last one.
        keys: ``[b, Lk]`` rows of k, likewise.
        heads: ``[b]`` heads of the keys; None: each group has all of them.
        real_queries: ``[b, Lq]`` bool.
        real_keys: ``[b, Lk]`` bool; None where there is no padding.
    """

    queries: Tensor
    keys: Tensor
    heads: Tensor | None
    real_queries: Tensor
    real_keys: Tensor | None


def _similar(lengths_q: np.ndarray, lengths_k: np.ndarray, elements: int) -> Iterator[np.ndarray]:
    """Splits what has queries and keys into batches of similar lengths and bounded size."""
    alive = np.flatnonzero((lengths_q > 0) & (lengths_k > 0))
    order = alive[np.lexsort((lengths_q[alive], lengths_k[alive]))]
    begin = 0
    while begin < len(order):
        least = lengths_k[order[begin]]
        end = begin + int(np.searchsorted(lengths_k[order[begin:]], least * _PADDING + _FEW, side="right"))
        same = order[begin:end]
        same = same[np.argsort(lengths_q[same], kind="stable")]
        at = 0
        while at < len(same):
            few = lengths_q[same[at]]
            upto = at + int(np.searchsorted(lengths_q[same[at:]], few * _PADDING + _FEW, side="right"))
            widest = int(lengths_q[same[upto - 1]] + 2 * lengths_k[same[at:upto]].max()) * elements
            upto = min(upto, at + max(_BATCH // max(widest, 1), 1))
            yield np.sort(same[at:upto])
            at = upto
        begin = end


def _places(starts: Tensor, lengths: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows ``[b, L]`` from position ``starts`` on, the last one repeated, and which of them are real."""
    within = torch.arange(int(lengths.max()), device=starts.device)
    at = starts[:, None] + torch.minimum(within, lengths[:, None] - 1)
    return at if rows is None else rows[at], within < lengths[:, None]


def _listed(blocks: Tensor, offsets_k: Tensor, rows_k: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows ``[b, L]`` of the listed blocks ``[b, T]`` one after the other, −1 skipped, and which of them are real."""
    ones = blocks >= 0
    lengths = torch.where(ones, torch.diff(offsets_k)[blocks.clamp_min(0)], 0)
    ends = lengths.cumsum(1)
    within = torch.arange(int(ends[:, -1].max()), device=blocks.device).expand(len(blocks), -1).contiguous()
    slot = torch.searchsorted(ends, within, right=True).clamp_max(blocks.shape[1] - 1)
    real = within < ends[:, -1:]
    at = offsets_k[blocks.clamp_min(0)].gather(1, slot) + within - (ends - lengths).gather(1, slot)
    at = torch.where(real, at, at[:, :1])  # the first key is real: groups without keys are no part of a batch
    return at if rows_k is None else rows_k[at], real


def batches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows_q: Tensor | None,
    rows_k: Tensor | None,
    offsets_q: Tensor,
    offsets_k: Tensor,
    table: Tensor | None,
) -> Iterator[Batch]:
    """The groups in padded batches; those without keys are left out."""
    device, kv_heads = q.device, k.shape[1]
    lengths_q = torch.diff(offsets_q)
    lengths_k = torch.diff(offsets_k)
    if table is None:
        elements = q.shape[1] * q.shape[2] + kv_heads * (k.shape[2] + v.shape[2])
    else:
        # One item per group and head of the keys.
        lengths_q = lengths_q.repeat_interleave(kv_heads)
        lengths_k = torch.where(table >= 0, lengths_k[table.clamp_min(0).long()], 0).sum(-1).flatten()
        elements = q.shape[1] // kv_heads * q.shape[2] + k.shape[2] + v.shape[2]
    for chosen in _similar(lengths_q.cpu().numpy(), lengths_k.cpu().numpy(), elements):
        item = torch.from_numpy(chosen).to(device)
        group = item if table is None else item // kv_heads
        queries, real_queries = _places(offsets_q[group], lengths_q[item], rows_q)
        if table is None:
            keys, real_keys = _places(offsets_k[group], lengths_k[item], rows_k)
            heads = None
        else:
            keys, real_keys = _listed(table.flatten(0, 1)[item].long(), offsets_k, rows_k)
            heads = item % kv_heads
        padded = lengths_k[item].min() < keys.shape[1]
        yield Batch(queries, keys, heads, real_queries, real_keys if bool(padded) else None)


def _take_queries(q: Tensor, batch: Batch, kv_heads: int) -> Tensor:
    """``[b, heads, Lq · s, D]``: the s query heads that share one of the keys' are further queries."""
    share = q.shape[1] // kv_heads
    if batch.heads is None:
        x = q[batch.queries].unflatten(2, (kv_heads, share)).transpose(1, 2)  # b, Hkv, Lq, s, D
    else:
        x = q.unflatten(1, (kv_heads, share))[batch.queries, batch.heads[:, None]].unsqueeze(1)
    return x.flatten(2, 3)


def _take_keys(x: Tensor, batch: Batch) -> Tensor:
    """``[b, heads, Lk, D]``."""
    if batch.heads is None:
        return x[batch.keys].transpose(1, 2)
    return x[batch.keys, batch.heads[:, None]].unsqueeze(1)


def _put_queries(to: Tensor, found: Tensor, batch: Batch, kv_heads: int) -> None:
    """Writes ``[b, heads, Lq · s, D]`` to the rows and heads that it belongs to."""
    share = to.shape[1] // kv_heads
    real = batch.real_queries
    found = found.unflatten(2, (real.shape[1], share)).transpose(1, 2)  # b, Lq, heads, s, D
    if batch.heads is None:
        to[batch.queries[real]] = found.flatten(2, 3)[real]
    else:
        heads = batch.heads[:, None].expand_as(real)
        to.unflatten(1, (kv_heads, share))[batch.queries[real], heads[real]] = found[:, :, 0][real]


def _attend(q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float) -> Tensor:
    mask = None if batch.real_keys is None else batch.real_keys[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _scores(q: Tensor, k: Tensor, batch: Batch, scale: float) -> Tensor:
    scores = scale * q @ k.transpose(-1, -2)
    if batch.real_keys is None:
        return scores
    return scores.masked_fill_(~batch.real_keys[:, None, None, :], float("-inf"))


def _lse(q: Tensor, k: Tensor, batch: Batch, scale: float) -> Tensor:
    step = max(_SCORES // max(q.shape[0] * q.shape[1] * k.shape[2], 1), 1)
    return torch.cat([_scores(x, k, batch, scale).logsumexp(-1, keepdim=True) for x in q.split(step, 2)], 2)


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows_q: Tensor | None,
    rows_k: Tensor | None,
    offsets_q: Tensor,
    offsets_k: Tensor,
    table: Tensor | None,
    scale: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """As the reference, a padded batch at a time."""
    kv_heads = k.shape[1]
    inner = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    # The backward pass does not use it: where nobody asked for it, it is not worth another product of q and k.
    lse = q.new_full(q.shape[:2], float("-inf" if need_lse else "inf"), dtype=inner)
    for batch in batches(q, k, v, rows_q, rows_k, offsets_q, offsets_k, table):
        x, key = _take_queries(q, batch, kv_heads), _take_keys(k, batch)
        _put_queries(out, _attend(x, key, _take_keys(v, batch), batch, scale), batch, kv_heads)
        if need_lse:
            found = lse.unsqueeze(-1)
            _put_queries(found, _lse(x.to(inner), key.to(inner), batch, scale), batch, kv_heads)
    return out, lse


def ragged_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows_q: Tensor | None,
    rows_k: Tensor | None,
    offsets_q: Tensor,
    offsets_k: Tensor,
    table: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """By products over padded batches. torch's own backward is out of reach here: operators run below autograd."""
    kv_heads = k.shape[1]
    inner = torch.float64 if q.dtype == torch.float64 else torch.float32
    grad_q = torch.zeros_like(q)
    # A key may be in several batches (through `table`): sums in at least float32.
    grad_k, grad_v = (torch.zeros_like(x, dtype=inner) for x in (k, v))
    delta = (grad_out.to(inner) * out.to(inner)).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta - grad_lse.unsqueeze(-1)
    for batch in batches(q, k, v, rows_q, rows_k, offsets_q, offsets_k, table):
        real = batch.real_queries[:, None, :, None].repeat_interleave(q.shape[1] // kv_heads, 2)
        x, grad, minus = (_take_queries(t, batch, kv_heads).to(inner) for t in (q, grad_out, delta))
        grad, minus = torch.where(real, grad, 0), torch.where(real, minus, 0)
        key, value = (_take_keys(t, batch).to(inner) for t in (k, v))
        of_query, of_key, of_value = torch.empty_like(x), torch.zeros_like(key), torch.zeros_like(value)
        step = max(_SCORES // max(x.shape[0] * x.shape[1] * key.shape[2], 1), 1)
        for at in range(0, x.shape[2], step):
            few = slice(at, at + step)
            weight = _scores(x[:, :, few], key, batch, scale).softmax(-1)
            score = weight * (grad[:, :, few] @ value.transpose(-1, -2) - minus[:, :, few]) * scale
            of_query[:, :, few] = score @ key
            of_key += score.transpose(-1, -2) @ x[:, :, few]
            of_value += weight.transpose(-1, -2) @ grad[:, :, few]
        _put_queries(grad_q, of_query.to(q.dtype), batch, kv_heads)
        _add_keys(grad_k, of_key, batch)
        _add_keys(grad_v, of_value, batch)
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def _add_keys(to: Tensor, grad: Tensor, batch: Batch) -> None:
    """Adds ``[b, heads, Lk, D]`` to the rows and heads that it belongs to; padding carries zeros."""
    if batch.real_keys is not None:
        grad = torch.where(batch.real_keys[:, None, :, None], grad, 0)
    if batch.heads is None:
        to.index_add_(0, batch.keys.flatten(), grad.transpose(1, 2).flatten(0, 1))
    else:
        flat = batch.keys * to.shape[1] + batch.heads[:, None]
        to.flatten(0, 1).index_add_(0, flat.flatten(), grad.flatten(0, 2))


# --- xformers ---------------------------------------------------------------------------------------------------------


def xformers_reasons(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> Iterable[str]:
    """Why xformers' block-diagonal attention cannot serve a call."""
    table = args[4]
    if find_spec("xformers") is None:
        yield "xformers is not installed"
    if q.device.type != "cuda":
        yield f"xformers needs CUDA tensors, these are on {q.device.type}"
    if table is not None:
        yield "a block diagonal has one block of keys per group of queries"
    if q.shape[1] != k.shape[1]:
        yield "needs as many heads of the keys as of the queries"
    if q.dtype == torch.float64:
        yield "needs float16, bfloat16 or float32, got float64"
    if args[-1] is True:
        yield "returns no log-sum-exp"


def xformers_backward_reasons(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> Any:
    """As `xformers_reasons`, for the backward pass."""
    yield from xformers_reasons(*args)
    if grad_lse is not None:
        yield "has no gradient of the log-sum-exp"


def _block_diagonal(offsets_q: Tensor, offsets_k: Tensor) -> Any:
    from xformers.ops import fmha

    lengths = [torch.diff(o).tolist() for o in (offsets_q, offsets_k)]
    return fmha.attn_bias.BlockDiagonalMask.from_seqlens(*lengths, device=offsets_q.device)


def _without_empty(offsets_q: Tensor, offsets_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of queries that have keys, and the offsets without groups that lack either."""
    lengths_q, lengths_k = torch.diff(offsets_q), torch.diff(offsets_k)
    alive = (lengths_q > 0) & (lengths_k > 0)
    positions = torch.repeat_interleave(alive, lengths_q).nonzero().squeeze(1)
    keys = torch.repeat_interleave(alive, lengths_k).nonzero().squeeze(1)
    return positions, keys, alive


def _xformers_inputs(
    rows_q: Tensor | None, rows_k: Tensor | None, offsets_q: Tensor, offsets_k: Tensor
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(rows of q, rows of k, offsets) without the groups that lack queries or keys."""
    positions, keys, alive = _without_empty(offsets_q, offsets_k)
    offsets = [F.pad(torch.diff(o)[alive].cumsum(0), (1, 0)) for o in (offsets_q, offsets_k)]
    return (
        positions if rows_q is None else rows_q[positions],
        keys if rows_k is None else rows_k[keys],
        offsets,
    )


def xformers_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows_q: Tensor | None,
    rows_k: Tensor | None,
    offsets_q: Tensor,
    offsets_k: Tensor,
    table: Tensor | None,
    scale: float,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """As the reference, through a `BlockDiagonalMask`."""
    queries, keys, offsets = _xformers_inputs(rows_q, rows_k, offsets_q, offsets_k)
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    if len(queries):
        from xformers.ops import memory_efficient_attention_forward

        packed = (x[rows][None] for x, rows in ((q, queries), (k, keys), (v, keys)))
        out[queries] = memory_efficient_attention_forward(*packed, attn_bias=_block_diagonal(*offsets), scale=scale)[0]
    return out, q.new_full(q.shape[:2], float("inf"), dtype=torch.float32)


def xformers_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows_q: Tensor | None,
    rows_k: Tensor | None,
    offsets_q: Tensor,
    offsets_k: Tensor,
    table: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the reference, through a `BlockDiagonalMask`."""
    queries, keys, offsets = _xformers_inputs(rows_q, rows_k, offsets_q, offsets_k)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    if len(queries):
        from xformers.ops import memory_efficient_attention_backward, memory_efficient_attention_forward_requires_grad

        # Their log-sum-exp is laid out as their kernel likes: it is made again rather than kept.
        packed = [x[rows][None] for x, rows in ((q, queries), (k, keys), (v, keys))]
        how: dict[str, Any] = {"attn_bias": _block_diagonal(*offsets), "scale": scale}
        again, theirs = memory_efficient_attention_forward_requires_grad(*packed, **how)
        found = memory_efficient_attention_backward(grad_out[queries][None], again, theirs, *packed, **how)
        for to, rows, grad in zip(grads, (queries, keys, keys), found):
            to[rows] = grad[0]
    return grads[0], grads[1], grads[2]
