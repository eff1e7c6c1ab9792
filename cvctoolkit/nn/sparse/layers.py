"""Layers that leave voxels where they are: norms, activations, linear maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvctoolkit.nn.sparse.tensor import SparseTensor


def _float(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.float()


class SparseGroupNorm(nn.GroupNorm):
    """``torch.nn.GroupNorm`` over the voxels of each batch item."""

    def forward(self, input: SparseTensor) -> SparseTensor:  # type: ignore[override]
        """Normalises features ``[N, C]``."""
        return input.replace(self._normalized(input.feats, input.layout, self.weight, self.bias))

    def _normalized(self, feats: Tensor, layout: list[slice], weight: Tensor | None, bias: Tensor | None) -> Tensor:
        parts = []
        for rows in layout:
            # In memory [n, C] is an image of 1 × n pixels with the channels last: no transposed copies.
            part = feats[rows][None, None].permute(0, 3, 1, 2)
            if part.numel():
                part = torch.group_norm(part, self.num_groups, weight, bias, self.eps)
            parts.append(part.permute(0, 2, 3, 1)[0, 0])
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else feats


class SparseLayerNorm(nn.LayerNorm):
    """``torch.nn.LayerNorm`` of every voxel's features."""

    def forward(self, input: SparseTensor) -> SparseTensor:  # type: ignore[override]
        """Normalises features ``[N, C]``."""
        return input.replace(super().forward(input.feats))


class SparseGroupNorm32(SparseGroupNorm):
    """`SparseGroupNorm` in float32, whatever the dtype of the features."""

    def forward(self, input: SparseTensor) -> SparseTensor:  # type: ignore[override]
        """Normalises features ``[N, C]``."""
        feats = self._normalized(input.feats.float(), input.layout, _float(self.weight), _float(self.bias))
        return input.replace(feats.to(input.dtype))


class SparseLayerNorm32(SparseLayerNorm):
    """`SparseLayerNorm` in float32, whatever the dtype of the features."""

    def forward(self, input: SparseTensor) -> SparseTensor:  # type: ignore[override]
        """Normalises features ``[N, C]``."""
        weight, bias = _float(self.weight), _float(self.bias)
        feats = F.layer_norm(input.feats.float(), self.normalized_shape, weight, bias, self.eps)
        return input.replace(feats.to(input.dtype))


class SparseLinear(nn.Linear):
    """``torch.nn.Linear`` of every voxel's features."""

    def forward(self, input: SparseTensor) -> SparseTensor:  # type: ignore[override]
        """Maps features ``[N, C_in]`` to ``[N, C_out]``."""
        return input.replace(super().forward(input.feats))


class SparseReLU(nn.ReLU):
    """``torch.nn.ReLU`` of the features."""

    def forward(self, input: SparseTensor) -> SparseTensor:  # type: ignore[override]
        """Of features of any shape."""
        return input.replace(super().forward(input.feats))


class SparseSiLU(nn.SiLU):
    """``torch.nn.SiLU`` of the features."""

    def forward(self, input: SparseTensor) -> SparseTensor:  # type: ignore[override]
        """Of features of any shape."""
        return input.replace(super().forward(input.feats))


class SparseGELU(nn.GELU):
    """``torch.nn.GELU`` of the features."""

    def forward(self, input: SparseTensor) -> SparseTensor:  # type: ignore[override]
        """Of features of any shape."""
        return input.replace(super().forward(input.feats))


class SparseActivation(nn.Module):
    """Any elementwise module, of the features."""

    def __init__(self, activation: nn.Module) -> None:
        """Wraps a module of tensors."""
        super().__init__()
        self.activation = activation

    def forward(self, input: SparseTensor) -> SparseTensor:
        """Of features of any shape."""
        return input.replace(self.activation(input.feats))
