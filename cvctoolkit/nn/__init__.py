"""Modules on top of the operators: ``from cvctoolkit.nn import DepthTruncatedEpipolarAttention``."""

from cvctoolkit.nn.decoder import DecoderGuide, EpipolarUpBlock, add_epipolar_attention
from cvctoolkit.nn.distillation import AsynchronousScoreDistillation
from cvctoolkit.nn.epipolar import DepthTruncatedEpipolarAttention
from cvctoolkit.nn.sparse import (
    SparseConv3d,
    SparseDownsample,
    SparseGroupNorm,
    SparseInverseConv3d,
    SparseLayerNorm,
    SparseLinear,
    SparseSubdivide,
    SparseTensor,
    SparseUpsample,
)

__all__ = [
    "AsynchronousScoreDistillation",
    "DecoderGuide",
    "DepthTruncatedEpipolarAttention",
    "EpipolarUpBlock",
    "SparseConv3d",
    "SparseDownsample",
    "SparseGroupNorm",
    "SparseInverseConv3d",
    "SparseLayerNorm",
    "SparseLinear",
    "SparseSubdivide",
    "SparseTensor",
    "SparseUpsample",
    "add_epipolar_attention",
]
