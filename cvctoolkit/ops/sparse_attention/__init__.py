"""Attention over sparse voxels: whole batch items, windows, runs along curves, spatial sparse attention, 3-D RoPE."""

from cvctoolkit.ops.sparse_attention.op import VarlenOutput, block_sparse_attention, varlen_attention
from cvctoolkit.ops.sparse_attention.rope_op import RopePhases, apply_rope, rope_3d, rope_3d_phases
from cvctoolkit.ops.sparse_attention.spatial_op import (
    SpatialBlocks,
    select_blocks,
    spatial_blocks,
    spatial_sparse_attention,
)
from cvctoolkit.ops.sparse_attention.windows_op import (
    Partition,
    batch_cu_seqlens,
    serialized_attention,
    serialized_partition,
    window_attention,
    window_partition,
)

__all__ = [
    "Partition",
    "RopePhases",
    "SpatialBlocks",
    "VarlenOutput",
    "apply_rope",
    "batch_cu_seqlens",
    "block_sparse_attention",
    "rope_3d",
    "rope_3d_phases",
    "select_blocks",
    "serialized_attention",
    "serialized_partition",
    "spatial_blocks",
    "spatial_sparse_attention",
    "varlen_attention",
    "window_attention",
    "window_partition",
]
