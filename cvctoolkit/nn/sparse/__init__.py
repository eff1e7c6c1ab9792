"""Sparse tensors and their modules, with the names and arguments of TRELLIS and Direct3D-S2.

``from cvctoolkit.nn import sparse as sp`` stands in for their ``modules.sparse``.
"""

from cvctoolkit.nn.sparse.attention import SparseMultiHeadRMSNorm, SparseWindowAttention, SpatialSparseAttention
from cvctoolkit.nn.sparse.conv import SparseConv3d, SparseInverseConv3d
from cvctoolkit.nn.sparse.layers import (
    SparseActivation,
    SparseGELU,
    SparseGroupNorm,
    SparseGroupNorm32,
    SparseLayerNorm,
    SparseLayerNorm32,
    SparseLinear,
    SparseReLU,
    SparseSiLU,
)
from cvctoolkit.nn.sparse.spatial import SparseDownsample, SparseSubdivide, SparseUpsample
from cvctoolkit.nn.sparse.tensor import (
    SparseTensor,
    sparse_batch_broadcast,
    sparse_batch_op,
    sparse_cat,
    sparse_unbind,
)

__all__ = [
    "SparseActivation",
    "SparseConv3d",
    "SparseDownsample",
    "SparseGELU",
    "SparseGroupNorm",
    "SparseGroupNorm32",
    "SparseInverseConv3d",
    "SparseLayerNorm",
    "SparseLayerNorm32",
    "SparseLinear",
    "SparseMultiHeadRMSNorm",
    "SparseReLU",
    "SparseSiLU",
    "SparseSubdivide",
    "SparseTensor",
    "SparseUpsample",
    "SparseWindowAttention",
    "SpatialSparseAttention",
    "sparse_batch_broadcast",
    "sparse_batch_op",
    "sparse_cat",
    "sparse_unbind",
]
