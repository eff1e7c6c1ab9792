"""Attention between voxels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvctoolkit import _checks, ops
from cvctoolkit.nn.sparse.conv import SparseConv3d
from cvctoolkit.nn.sparse.layers import SparseGroupNorm32, SparseSiLU
from cvctoolkit.nn.sparse.spatial import SparseDownsample
from cvctoolkit.nn.sparse.tensor import SparseTensor

Voxels = TypeVar("Voxels", SparseTensor, ops.SparseVoxels)


def _key(value: int | Sequence[int]) -> int | tuple[int, ...]:
    return value if isinstance(value, int) else tuple(value)


class SparseMultiHeadRMSNorm(nn.Module):
    """Scales every head's features ``[N, H, D]`` to a root mean square of γ."""

    def __init__(self, dim: int, heads: int) -> None:
        """Makes γ.

        Args:
            dim: D.
            heads: H.
        """
        super().__init__()
        self.scale = math.sqrt(dim)
        self.gamma = nn.Parameter(torch.ones(heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``[N, H, D]``, in float32 at least."""
        inner = x.dtype if x.dtype == torch.float64 else torch.float32
        return (F.normalize(x.to(inner), dim=-1) * self.gamma * self.scale).to(x.dtype)


class SparseWindowAttention(nn.Module):
    """Multi-head self-attention within (shifted) windows of space, or within whole batch items.

    Parameters have the names of TRELLIS's ``SparseMultiHeadAttention``. The partition into windows is made once for
    every set of voxels.

    Source: Xiang et al., "Structured 3D Latents" (TRELLIS), 2024; Liu et al., "Swin Transformer", 2021.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window_size: int | Sequence[int] | None,
        shift_window: int | Sequence[int] = 0,
        *,
        qkv_bias: bool = True,
        use_rope: bool = False,
        qk_rms_norm: bool = False,
    ) -> None:
        """Makes the layers.

        Args:
            channels: C.
            num_heads: Divides ``channels``.
            window_size: Voxels along every axis, or three of them; None: all voxels of a batch item.
            shift_window: Added to the coordinates before windows are cut, less than ``window_size``.
            qkv_bias: Whether the projection to q, k and v has a bias.
            use_rope: Whether q and k are turned by `rope_3d`.
            qk_rms_norm: Whether q and k are normalised by `SparseMultiHeadRMSNorm`.

        Raises:
            TypeError: Wrong argument types.
            ValueError: ``channels`` is not a multiple of ``num_heads``; a number is out of range.
        """
        super().__init__()
        op = type(self).__name__
        self.channels = _checks.integer(op, "channels", channels, at_least=1)
        self.num_heads = _checks.integer(op, "num_heads", num_heads, at_least=1)
        if channels % num_heads:
            raise ValueError(f"{op}: channels must be a multiple of num_heads, got {channels} and {num_heads}")
        if use_rope and channels // num_heads % 2:
            raise ValueError(f"{op}: rotary embedding needs an even head dimension, got {channels // num_heads}")
        # Refuses sizes and shifts that do not fit now, not at the first call.
        self.window_size = None if window_size is None else _key(window_size)
        self.shift_window = _key(shift_window)
        if self.window_size is not None:
            ops.window_partition(torch.zeros(0, 4, dtype=torch.int32), self.window_size, self.shift_window)
        self.use_rope = use_rope
        self.to_qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        self.q_rms_norm = SparseMultiHeadRMSNorm(channels // num_heads, num_heads) if qk_rms_norm else None
        self.k_rms_norm = SparseMultiHeadRMSNorm(channels // num_heads, num_heads) if qk_rms_norm else None
        self.to_out = nn.Linear(channels, channels)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.channels}, num_heads={self.num_heads}, window_size={self.window_size}, shift={self.shift_window}"

    def forward(self, x: Voxels) -> Voxels:
        """Attends.

        Args:
            x: Features ``[N, C]``, a `SparseTensor` or `SparseVoxels`.

        Returns:
            The same voxels with features ``[N, C]``.
        """
        q, k, v = self.to_qkv(x.feats).unflatten(-1, (3, self.num_heads, -1)).unbind(1)
        if self.q_rms_norm is not None and self.k_rms_norm is not None:
            q, k = self.q_rms_norm(q), self.k_rms_norm(k)
        if self.use_rope:
            inner = torch.float64 if q.dtype == torch.float64 else torch.float32
            dim = q.shape[-1]
            phases = x.derived(("rope_3d", dim, inner), lambda c: ops.rope_3d_phases(c, dim, dtype=inner))
            q, k = ops.apply_rope(q, phases), ops.apply_rope(k, phases)
        size, shift = self.window_size, self.shift_window
        if size is None:  # a window larger than any grid
            size, shift = 1 << 16, 0
        windows = x.derived(("window_partition", size, shift), lambda c: ops.window_partition(c, size, shift))
        out = ops.window_attention(q, k, v, x.coords, size, shift, partition=windows)
        return x.replace(self.to_out(out.flatten(1)))


class _Compression(nn.Module):
    """Voxels of a block to one: a linear map and an activation (v1), or a residual block (v2), around a mean."""

    def __init__(self, channels: int, factor: int, version: str, include_self: bool) -> None:
        super().__init__()
        self.down = SparseDownsample(factor, include_self=include_self)
        if version == "v1":
            self.act_layers = nn.Sequential(SparseConv3d(channels, channels, 1, padding=0), SparseSiLU())
            self.out_layers = None
            return
        groups = math.gcd(32, channels)
        self.act_layers = nn.Sequential(SparseGroupNorm32(groups, channels), SparseSiLU())
        self.out_layers = nn.Sequential(
            SparseConv3d(channels, channels, 3, padding=1),
            SparseGroupNorm32(groups, channels),
            SparseSiLU(),
            SparseConv3d(channels, channels, 3, padding=1),
        )

    def forward(self, x: SparseTensor) -> SparseTensor:
        h = self.down(self.act_layers(x))
        if self.out_layers is None:
            return h
        h = self.out_layers(h)
        return h.replace(h.feats + self.down(x).feats)


class SpatialSparseAttention(nn.Module):
    """Self-attention over compressed blocks, selected blocks and a window, as in Direct3D-S2.

    Parameters have the names of Direct3D-S2's module. Blocks and windows are made once for every set of voxels; there
    is no grid of blocks, so no resolution has to be known; any number of batch items.

    Source: Wu et al., "Direct3D-S2", 2025, Sec. 3.3.
    """

    def __init__(
        self,
        hidden_size: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        compression_block_size: int,
        selection_block_size: int,
        topk: int,
        window_size: int | Sequence[int],
        shift_window: int | Sequence[int] = 0,
        resolution: int | None = None,
        compression_version: str = "v2",
        *,
        include_self: bool = True,
        share_selection: bool = False,
    ) -> None:
        """Makes the layers.

        Args:
            hidden_size: C.
            num_q_heads: H, a multiple of ``num_kv_heads``.
            num_kv_heads: Heads of keys and values; the query heads that share one choose their blocks together.
            head_dim: D.
            compression_block_size: Voxels along the edge of a compression block.
            selection_block_size: A multiple of it.
            topk: Selected blocks.
            window_size: Voxels along every axis of a window, or three of them.
            shift_window: Added to the coordinates before windows are cut, less than ``window_size``.
            resolution: Not used: for calls written for Direct3D-S2.
            compression_version: ``"v1"`` or ``"v2"``, as there.
            include_self: Of `SparseDownsample` in the compression; released weights need True.
            share_selection: See `spatial_sparse_attention`.

        Raises:
            TypeError: Wrong argument types.
            ValueError: Sizes do not divide each other, a number is out of range, or the version is unknown.
        """
        super().__init__()
        op = type(self).__name__
        sizes = {
            "hidden_size": hidden_size, "num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim,
            "topk": topk,
        }  # fmt: skip
        for name, value in sizes.items():
            _checks.integer(op, name, value, at_least=1)
        if num_q_heads % num_kv_heads:
            raise ValueError(
                f"{op}: num_q_heads must be a multiple of num_kv_heads, got {num_q_heads} and {num_kv_heads}"
            )
        _checks.choice(op, "compression_version", compression_version, ("v1", "v2"))
        self.num_q_heads, self.num_kv_heads, self.head_dim = num_q_heads, num_kv_heads, head_dim
        self.topk, self.share_selection = topk, share_selection
        self.geometry = (compression_block_size, selection_block_size, _key(window_size), _key(shift_window))
        ops.spatial_blocks(torch.zeros(0, 4, dtype=torch.int32), *self.geometry)  # refuses what does not fit
        keys = num_kv_heads * head_dim
        self.proj_q = nn.Linear(hidden_size, num_q_heads * head_dim, bias=False)
        self.proj_k = nn.Linear(hidden_size, keys, bias=False)
        self.proj_v = nn.Linear(hidden_size, keys, bias=False)
        self.proj_o = nn.Linear(num_q_heads * head_dim, hidden_size, bias=False)
        self.compression_key = _Compression(keys, compression_block_size, compression_version, include_self)
        self.compression_value = _Compression(keys, compression_block_size, compression_version, include_self)
        self.intra_block_pe = nn.Parameter(torch.zeros(*[compression_block_size] * 3, keys))
        self.gate = nn.Sequential(nn.Linear(hidden_size, 3, bias=False), nn.Sigmoid())

    def extra_repr(self) -> str:
        """The sizes."""
        return f"heads={self.num_q_heads}/{self.num_kv_heads}×{self.head_dim}, topk={self.topk}, blocks={self.geometry}"

    def forward(self, x: Voxels) -> Voxels:
        """Attends.

        Args:
            x: Features ``[N, C]``, a `SparseTensor`, or `SparseVoxels` with batches ascending.

        Returns:
            The same voxels with features ``[N, C]``.
        """
        geometry = self.geometry
        blocks = x.derived(("spatial_blocks", geometry), lambda c: ops.spatial_blocks(c, *geometry))
        q, k, v = (p(x.feats) for p in (self.proj_q, self.proj_k, self.proj_v))
        if isinstance(x, SparseTensor):
            holder = x
        else:
            holder = x.derived("sparse_tensor", lambda c: SparseTensor(c[:, :0].float(), c, (x.batch_size,)))
        inside = (x.coords[:, 1:] % geometry[0]).long().unbind(1)
        compressed_k = self.compression_key(holder.replace(k + self.intra_block_pe[inside].to(k.dtype)))
        compressed_v = self.compression_value(holder.replace(v))
        q, k, v, ck, cv = (
            t.unflatten(1, (-1, self.head_dim)) for t in (q, k, v, compressed_k.feats, compressed_v.feats)
        )
        out = ops.spatial_sparse_attention(
            q, k, v, x.coords, self.gate(x.feats), topk=self.topk, compressed_k=ck, compressed_v=cv,
            share_selection=self.share_selection, blocks=blocks,
        )  # fmt: skip
        return x.replace(self.proj_o(out.flatten(1)))
