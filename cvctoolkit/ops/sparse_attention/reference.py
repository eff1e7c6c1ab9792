"""The specification of ragged attention and block selection: plain PyTorch, one group of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor


def _precise(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _taken(rows: Tensor | None, begin: int, end: int, device: torch.device) -> Tensor:
    """The rows at the positions [begin, end)."""
    return torch.arange(begin, end, device=device) if rows is None else rows[begin:end]


def items(
    num_kv_heads: int,
    rows_q: Tensor | None,
    rows_k: Tensor | None,
    offsets_q: Tensor,
    offsets_k: Tensor,
    table: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Per group of queries and head of the keys: (rows of q, rows of k, head)."""
    device = offsets_q.device
    edges_q, edges_k = offsets_q.tolist(), offsets_k.tolist()
    chosen = None if table is None else table.tolist()
    for group, (begin, end) in enumerate(pairwise(edges_q)):
        queries = _taken(rows_q, begin, end, device)
        for head in range(num_kv_heads):
            blocks = [group] if chosen is None else [b for b in chosen[group][head] if b >= 0]
            keys = [_taken(rows_k, edges_k[b], edges_k[b + 1], device) for b in blocks]
            yield queries, torch.cat([*keys, queries[:0]]), head


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
    """Softmax(scale · q kᵀ) v within every group; 0 and −inf where a group has no keys."""
    dtype, kv_heads = _precise(q), k.shape[1]
    share = q.shape[1] // kv_heads
    out = q.new_zeros(*q.shape[:2], v.shape[2], dtype=dtype)
    lse = q.new_full(q.shape[:2], float("-inf"), dtype=dtype)
    for queries, keys, head in items(kv_heads, rows_q, rows_k, offsets_q, offsets_k, table):
        if len(queries) == 0 or len(keys) == 0:
            continue
        heads = slice(head * share, (head + 1) * share)
        scores = scale * torch.einsum("nsd,md->nsm", q[queries, heads].to(dtype), k[keys, head].to(dtype))
        out[queries, heads] = torch.einsum("nsm,md->nsd", scores.softmax(-1), v[keys, head].to(dtype))
        lse[queries, heads] = scores.logsumexp(-1)
    return out.to(q.dtype), lse


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
    """With P = exp(scores − lse) and D = grad_out · out − grad_lse: dV = Pᵀ dO, dS = P ∘ (dO Vᵀ − D), dQ = dS K, dK = dSᵀ Q."""  # noqa: E501
    dtype, kv_heads = _precise(q), k.shape[1]
    share = q.shape[1] // kv_heads
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
    for queries, keys, head in items(kv_heads, rows_q, rows_k, offsets_q, offsets_k, table):
        if len(queries) == 0 or len(keys) == 0:
            continue
        heads = slice(head * share, (head + 1) * share)
        x, grad = q[queries, heads].to(dtype), grad_out[queries, heads].to(dtype)
        key, value = k[keys, head].to(dtype), v[keys, head].to(dtype)
        weight = (scale * torch.einsum("nsd,md->nsm", x, key) - lse[queries, heads, None]).exp()
        inner = (grad * out[queries, heads].to(dtype)).sum(-1, keepdim=True)
        if grad_lse is not None:
            inner = inner - grad_lse[queries, heads, None]
        score = scale * weight * (torch.einsum("nsd,md->nsm", grad, value) - inner)
        grad_q[queries, heads] += torch.einsum("nsm,md->nsd", score, key)
        grad_k[:, head].index_add_(0, keys, torch.einsum("nsm,nsd->md", score, x))
        grad_v[:, head].index_add_(0, keys, torch.einsum("nsm,nsd->md", weight, grad))
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


# --- block selection --------------------------------------------------------------------------------------------------

#: Scores that exist at a time, in elements.
_SCORES = 1 << 22


def select_blocks(
    q: Tensor,
    compressed_k: Tensor,
    rows_q: Tensor | None,
    offsets_q: Tensor,
    offsets_k: Tensor,
    parent: Tensor,
    groups: Tensor | None,
    topk: int,
    scale: float,
) -> Tensor:
    """Per group and head of the keys the blocks with the largest sum of softmax(scale · q compressed_kᵀ)."""
    dtype, kv_heads = _precise(q), compressed_k.shape[1]
    count = len(q) if groups is None else len(groups) - 1
    table = torch.full((count, kv_heads, topk), -1, dtype=torch.int32, device=q.device)
    edges = torch.arange(len(q) + 1, device=q.device) if groups is None else groups
    for b, (begin, end) in enumerate(pairwise(offsets_q.tolist())):
        first, last = offsets_k[b].item(), offsets_k[b + 1].item()
        if begin == end or first == last:
            continue
        # The groups of this sequence; those of length zero at a border are left without blocks.
        low, high = torch.searchsorted(edges, torch.tensor([begin, end], device=q.device)).tolist()
        keys, owner = compressed_k[first:last].to(dtype), parent[first:last]
        lowest = int(owner.min())
        blocks = int(owner.max()) + 1 - lowest
        # Queries are taken a few at a time, whole groups of them: nothing of size [queries, compressed keys] exists.
        step = max(_SCORES // max(q.shape[1] * (last - first), 1), 1)
        while low < high:
            upto = max(int(torch.searchsorted(edges, edges[low] + step, right=True)) - 1, low + 1)
            upto = min(upto, high)
            rows = _taken(rows_q, int(edges[low]), int(edges[upto]), q.device)
            score = _block_scores(q[rows].to(dtype), keys, owner - lowest, blocks, scale)
            if groups is not None:
                which = torch.repeat_interleave(torch.diff(edges[low : upto + 1]))
                score = score.new_zeros(upto - low, kv_heads, blocks).index_add_(0, which, score)
            table[low:upto, :, : min(topk, blocks)] = _largest(score, min(topk, blocks)) + lowest
            low = upto
    if groups is not None:  # groups without queries choose nothing
        table = torch.where((torch.diff(groups) > 0)[:, None, None], table, -1)
    return table


def _block_scores(q: Tensor, keys: Tensor, owner: Tensor, blocks: int, scale: float) -> Tensor:
    """``[n, Hkv, blocks]``: softmax over the compressed keys, summed over each block and the heads that share it."""
    shared = q.unflatten(1, (keys.shape[1], -1))  # n, Hkv, s, D
    weight = (scale * torch.einsum("nhsd,mhd->nhsm", shared, keys)).softmax(-1).sum(2)
    return weight.new_zeros(*weight.shape[:2], blocks).index_add_(2, owner, weight)


def _largest(score: Tensor, count: int) -> Tensor:
    """The places of the largest, ascending; of equal ones the first. NaN counts as largest."""
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(-1).values.to(torch.int32)
