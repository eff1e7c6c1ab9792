"""Spatial sparse attention: compressed blocks, the blocks chosen by their scores, and a window, gated and added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._library import define_op, names_itself
from cvctoolkit.ops.sparse_attention import reference
from cvctoolkit.ops.sparse_attention.op import (
    block_sparse_attention,
    check_offsets,
    checked_heads,
    checked_offsets,
    checked_rows,
    checked_scale,
    varlen_attention,
)
from cvctoolkit.ops.sparse_attention.windows_op import Partition, _for, window_partition
from cvctoolkit.ops.voxels.conventions import MAX_COORD, checked_coords
from cvctoolkit.ops.voxels.features_op import reduce_features
from cvctoolkit.ops.voxels.resample_op import downsample


class SpatialBlocks(NamedTuple):
    """The geometry of `spatial_sparse_attention`: build it once, use it for every layer that shares it.

    Attributes:
        compressed_coords: ``[C, 4]`` int32, (batch, x, y, z) of the compression blocks, lexicographic.
        compressed_row: ``[N]`` int64, the compression block of every voxel.
        parent: ``[C]`` int64, the selection block of every compression block.
        selection: The voxels in selection blocks, lexicographic.
        batch: ``[S + 1]`` int64, positions (of ``selection``) of the batch items that have voxels.
        compressed_batch: ``[S + 1]`` int64, their compression blocks.
        window: The voxels in windows.
    """

    compressed_coords: Tensor
    compressed_row: Tensor
    parent: Tensor
    selection: Partition
    batch: Tensor
    compressed_batch: Tensor
    window: Partition


# --- operators --------------------------------------------------------------------------------------------------------


def _checked(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def checked(
        q: Tensor, compressed_k: Tensor, rows_q: Tensor | None, offsets_q: Tensor, offsets_k: Tensor, parent: Tensor,
        groups: Tensor | None, *args: Any,
    ) -> Tensor:  # fmt: skip
        op = "select_blocks"
        _checks.same_shape(op, "parent", parent, compressed_k.shape[:1])
        _checks.same_shape(op, "cu_seqlens_k", offsets_k, offsets_q.shape)
        if q.device.type == "cpu":
            pairs = [("cu_seqlens", offsets_q, len(q)), ("cu_seqlens_k", offsets_k, len(compressed_k))]
            for name, offsets, total in pairs + ([("cu_groups", groups, len(q))] if groups is not None else []):
                check_offsets(op, name, offsets, total)
            if groups is not None and not bool(torch.isin(offsets_q, groups).all()):
                raise ValueError(f"{op}: cu_groups must not cross the sequences of cu_seqlens")
            if rows_q is not None and len(rows_q) and not bool(((rows_q >= 0) & (rows_q < len(q))).all()):
                raise ValueError(f"{op}: permutation must hold rows 0 to {len(q) - 1}")
            if len(parent) and (int(parent.min()) < 0 or int(parent.max()) >= 1 << 31):
                raise ValueError(f"{op}: parent must hold blocks from 0 on, below 2^31")
        return run(q, compressed_k, rows_q, offsets_q, offsets_k, parent, groups, *args)

    return checked


def _fake(q: Tensor, compressed_k: Tensor, *args: Any) -> Tensor:
    groups, topk = args[4:6]
    count = q.shape[0] if groups is None else groups.shape[0] - 1
    return q.new_empty(count, compressed_k.shape[1], topk, dtype=torch.int32)


_select_blocks = define_op(
    "select_blocks",
    "(Tensor q, Tensor compressed_k, Tensor? rows_q, Tensor offsets_q, Tensor offsets_k, Tensor parent, Tensor? groups,"
    " SymInt topk, float scale) -> Tensor",
    fake=_fake,
    reference=_checked(reference.select_blocks),
)


# --- public functions -------------------------------------------------------------------------------------------------


def select_blocks(
    q: Tensor,
    compressed_k: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    parent: Tensor,
    topk: int,
    *,
    permutation: Tensor | None = None,
    cu_groups: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The blocks that queries should attend to, by their attention to compressed keys.

    A block's score is the softmax over the sequence's compressed keys, summed over those of the block, over the query
    heads that share a head of the keys, and over the queries of a group. Queries are taken a few at a time: there is
    no ``[heads, queries, blocks]`` buffer of scores. The softmax is shifted by its maximum: no score overflows.

    Args:
        q: ``[N, H, D]`` float16, bfloat16, float32 or float64.
        compressed_k: ``[C, Hkv, D]``, dtype of q.
        cu_seqlens: ``[S + 1]`` int32 or int64, ascending from 0 to N.
        cu_seqlens_k: ``[S + 1]`` int32 or int64, ascending from 0 to C.
        parent: ``[C]`` int32 or int64, the block that every compressed key belongs to, ≥ 0; blocks of a sequence should
            be near each other in number.
        topk: T, blocks to choose.
        permutation: ``[N]`` int32 or int64, the row of q at every position; None: position p is row p.
        cu_groups: ``[G + 1]`` int32 or int64, ascending from 0 to N: queries that choose together, none across
            sequences; None: each for itself.
        scale: Factor of the scores; None: 1 / √D.
        backend: ``"reference"``; None picks the fastest.

    Returns:
        ``[N or G, Hkv, T]`` int32, ascending, −1 last where a sequence has fewer blocks; of equal scores the first.
        Carries no gradient. Deterministic. On CUDA this synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; offsets are none (on a CPU).

    Source: Wu et al., "Direct3D-S2", 2025, Sec. 3.3 (after Yuan et al., "Native Sparse Attention", Eq. 8-10).
    """
    op = "select_blocks"
    checked_heads(op, q, compressed_k, compressed_k)
    offsets_q = checked_offsets(op, "cu_seqlens", cu_seqlens, q)
    offsets_k = checked_offsets(op, "cu_seqlens_k", cu_seqlens_k, q)
    _checks.tensor(op, "parent", parent, "C", _checks.INTEGRAL, device=q.device)
    _checks.integer(op, "topk", topk, at_least=1)
    rows = checked_rows(op, "permutation", permutation, q)
    groups = None if cu_groups is None else checked_offsets(op, "cu_groups", cu_groups, q)
    factor = checked_scale(op, scale, q)
    return _select_blocks(
        q.detach(), compressed_k.detach(), rows, offsets_q, offsets_k, parent.long(), groups, topk, factor,
        backend=backend,
    )  # fmt: skip


@names_itself
def spatial_blocks(
    coords: Tensor,
    compression_block: int = 4,
    selection_block: int = 8,
    window_size: int | Sequence[int] = 8,
    shift: int | Sequence[int] = 0,
    *,
    backend: str | None = None,
) -> SpatialBlocks:
    """The blocks and windows of `spatial_sparse_attention`.

    Args:
        coords: ``[N, 4]`` int32 or int64, (batch, x, y, z), in any order.
        compression_block: Voxels along the edge of a compression block.
        selection_block: Voxels along the edge of a selection block, a multiple of ``compression_block``.
        window_size: See `window_partition`.
        shift: See `window_partition`.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        See `SpatialBlocks`. The sizes depend on the data: on CUDA this synchronises.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shape, dtype or backend do not fit, a number is out of range, a row is no voxel (on a CPU).
    """
    op = "spatial_blocks"
    coords = checked_coords(op, "coords", coords)
    small = _checks.integer(op, "compression_block", compression_block, at_least=1, at_most=MAX_COORD)
    large = _checks.integer(op, "selection_block", selection_block, at_least=1, at_most=MAX_COORD)
    if large % small:
        raise ValueError(f"{op}: selection_block must be a multiple of compression_block, got {large} and {small}")
    compressed = downsample(coords, None, small, backend=backend)
    parents = downsample(compressed.coords, None, large // small, backend=backend)
    selection = window_partition(coords, large, backend=backend)
    # Every partition sorts by batch first: its items have the same positions in all of them.
    batch = window_partition(coords, MAX_COORD, backend=backend).cu_seqlens
    starts = coords[selection.permutation[batch[:-1]], 0]
    firsts = torch.searchsorted(compressed.coords[:, 0].contiguous(), starts)
    end = torch.full_like(batch[-1:], compressed.coords.shape[0])
    return SpatialBlocks(
        compressed.coords,
        compressed.inverse,
        parents.inverse,
        selection,
        batch,
        torch.cat([firsts, end]),
        window_partition(coords, window_size, shift, backend=backend),
    )


@names_itself
def spatial_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coords: Tensor,
    gates: Tensor,
    *,
    topk: int,
    compressed_k: Tensor | None = None,
    compressed_v: Tensor | None = None,
    compression_block: int = 4,
    selection_block: int = 8,
    window_size: int | Sequence[int] = 8,
    shift: int | Sequence[int] = 0,
    share_selection: bool = False,
    blocks: SpatialBlocks | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of every voxel to all compression blocks, to the voxels of a few selected blocks, and to its window.

    out = g₀ · Attn(q, k̃, ṽ) + g₁ · Attn(q, k, v over the selected blocks) + g₂ · Attn(q, k, v over the window)

    Args:
        q: ``[N, H, D]`` float, as in `varlen_attention`. Differentiable, once.
        k: ``[N, Hkv, D]``, dtype of q. Differentiable, once.
        v: ``[N, Hkv, Dv]``, dtype of q. Differentiable, once.
        coords: ``[N, 4]`` int32 or int64, (batch, x, y, z), in any order; any number of batch items.
        gates: ``[N, 3]`` or ``[N, H, 3]``, dtype of q: the factors of compression, selection and window, usually
            sigmoids. Differentiable.
        topk: Selected blocks of every voxel and head of the keys.
        compressed_k: ``[C, Hkv, D]``, k̃ of the compression blocks in lexicographic order, as `spatial_blocks` lists
            them; None: the mean of k. Differentiable, once.
        compressed_v: ``[C, Hkv, Dv]``, likewise.
        compression_block: See `spatial_blocks`.
        selection_block: See `spatial_blocks`.
        window_size: See `spatial_blocks`.
        shift: See `spatial_blocks`.
        share_selection: The voxels of a selection block choose together, by the sum of their scores: products of whole
            blocks, several times as fast; False: each for itself, as published.
        blocks: What `spatial_blocks` returned for these; None: it is made here.
        scale: Factor of the scores; None: 1 / √D.
        backend: ``"native"``, ``"sdpa"``, ``"reference"``; None picks the fastest, each step its own.

    Returns:
        ``[N, H, Dv]``, rows as in q. Deterministic on a CPU; the choice of blocks carries no gradient.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit, a number is out of range; see `spatial_blocks`.

    Source: Wu et al., "Direct3D-S2: Gigascale 3D Generation Made Easy with Spatial Sparse Attention", 2025, Sec. 3.3.
    """
    op = "spatial_sparse_attention"
    checked_heads(op, q, k, v)
    _checks.same_shape(op, "k", k, (q.shape[0], *k.shape[1:]))
    coords = checked_coords(op, "coords", coords, device=q.device)
    _checks.same_shape(op, "coords", coords, (q.shape[0], 4))
    per_head = isinstance(gates, Tensor) and gates.dim() == 3
    _checks.tensor(op, "gates", gates, "N H 3" if per_head else "N 3", (q.dtype,), device=q.device)
    _checks.same_shape(op, "gates", gates, (*q.shape[: 2 if per_head else 1], 3))
    if blocks is None:
        blocks = spatial_blocks(coords, compression_block, selection_block, window_size, shift, backend=_for(backend))
    elif not isinstance(blocks, SpatialBlocks):
        raise TypeError(f"{op}: blocks must be SpatialBlocks or None, got {type(blocks).__name__}")
    count = blocks.compressed_coords.shape[0]
    means = [_block_mean(x, blocks, count) if given is None else given for x, given in
             ((k, compressed_k), (v, compressed_v))]  # fmt: skip
    for name, x, like in zip(("compressed_k", "compressed_v"), means, (k, v)):
        _checks.tensor(op, name, x, "C Hkv D", (q.dtype,), device=q.device)
        _checks.same_shape(op, name, x[:0], (0, *like.shape[1:]))
        if not torch.compiler.is_compiling():  # the number of blocks depends on the data
            _checks.same_shape(op, name, x, (count, *like.shape[1:]))
    order, groups = blocks.selection.permutation, blocks.selection.cu_seqlens
    factor, share_selection = checked_scale(op, scale, q), _checks.flag(op, "share_selection", share_selection)
    compressed = varlen_attention(
        q, means[0], means[1], blocks.batch, blocks.compressed_batch, permutation=order, scale=factor, backend=backend
    )
    chosen = select_blocks(
        q, means[0], blocks.batch, blocks.compressed_batch, blocks.parent, topk, permutation=order,
        cu_groups=groups if share_selection else None, scale=factor,
    )  # fmt: skip
    edges = groups if share_selection else torch.arange(q.shape[0] + 1, device=q.device)
    selected = block_sparse_attention(
        q, k, v, edges, groups, chosen, permutation=order, permutation_k=order, scale=factor, backend=backend
    )
    near = varlen_attention(
        q, k, v, blocks.window.cu_seqlens, permutation=blocks.window.permutation, scale=factor, backend=backend
    )
    assert isinstance(compressed, Tensor) and isinstance(selected, Tensor) and isinstance(near, Tensor)
    first, second, third = (gates if per_head else gates.unsqueeze(1)).unsqueeze(-1).unbind(-2)
    return first * compressed + second * selected + third * near


def _block_mean(x: Tensor, blocks: SpatialBlocks, count: int) -> Tensor:
    return reduce_features(x.flatten(1), blocks.compressed_row, count, reduce="mean").view(count, *x.shape[1:])
