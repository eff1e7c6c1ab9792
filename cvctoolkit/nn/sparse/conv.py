"""Sparse convolutions whose neighbour maps are made once for every set of voxels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from cvctoolkit import ops
from cvctoolkit.nn.sparse.tensor import SparseTensor


def _triple(value: int | Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (value,) * 3 if isinstance(value, int) else value
    return x, y, z


class _Conv(nn.Module):
    """Weights in torch's layout, whichever engine they were saved by."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any, stride: Any, dilation: Any, bias: bool, groups: int
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = _triple(kernel_size), _triple(stride), _triple(dilation)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights and bias as ``torch.nn.Conv3d`` does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(max(self.weight[0].numel(), 1))
            nn.init.uniform_(self.bias, -bound, bound)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # TRELLIS wraps spconv's module as `conv`, Direct3D-S2 torchsparse's.
        for name in ("weight", "kernel"):
            saved = state_dict.pop(f"{prefix}conv.{name}", None)
            if saved is None:
                continue
            state_dict[prefix + "weight"] = (
                ops.weight_from_spconv(saved)
                if name == "weight"
                else ops.weight_from_torchsparse(saved, self.kernel_size)
            )
        if f"{prefix}conv.bias" in state_dict:
            state_dict[prefix + "bias"] = state_dict.pop(f"{prefix}conv.bias")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _convolved(self, feats: Tensor, map: Tensor) -> Tensor:
        device = feats.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else feats.dtype
        bias = self.bias if self.bias is None else self.bias.to(dtype)
        return ops.sparse_conv3d(feats.to(dtype), self.weight.to(dtype), bias, map, groups=self.groups)


class SparseConv3d(_Conv):
    """Sparse convolution: submanifold with stride 1, else onto all voxels that are reached.

    ``load_state_dict`` also takes what TRELLIS (spconv) and Direct3D-S2 (torchsparse) saved for this module.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        padding: int | Sequence[int] | None = None,
        bias: bool = True,
        indice_key: str | None = None,
        *,
        groups: int = 1,
    ) -> None:
        """Makes the weights.

        Args:
            in_channels: C_in.
            out_channels: C_out.
            kernel_size: Voxels along every axis, or three of them.
            stride: Steps between output voxels.
            dilation: Steps between the kernel's taps.
            padding: As in ``torch.nn.Conv3d``; None: with stride 1 the centred one, else 0.
            bias: Whether there is one.
            indice_key: Not needed: maps are shared by all layers with the same geometry.
            groups: Groups of channels that do not mix.

        Raises:
            ValueError: With stride 1 the padding is not the centred one: the voxels would not stay where they are.
        """
        super().__init__(in_channels, out_channels, kernel_size, stride, dilation, bias, groups)
        self.submanifold = self.stride == (1, 1, 1)
        centred = tuple(d * (k - 1) // 2 for k, d in zip(self.kernel_size, self.dilation))
        self.padding = (centred if self.submanifold else (0, 0, 0)) if padding is None else _triple(padding)
        if self.submanifold and self.padding != centred:
            raise ValueError(
                f"SparseConv3d: padding must be None or {centred} with stride 1, which keeps the voxels, got {padding}"
            )

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Convolves features ``[N, C_in]``."""
        key, padding = (self.kernel_size, self.stride, self.dilation), self.padding
        found = x.derived(("neighbor_map", *key, padding), lambda c: ops.neighbor_map(c, *key, padding=padding))
        feats = self._convolved(x.feats, found.map)
        if self.submanifold:
            return x.replace(feats)
        out = x.on(feats, found.out_coords, None, [Fraction(1, s) for s in self.stride])
        # The way back, for an inverse convolution.
        out.remember(("conv_source", *key), (x.coords, x.layout, padding))
        return out


class SparseInverseConv3d(_Conv):
    """Takes a strided `SparseConv3d` back: from the voxels that it made to those that it saw.

    ``load_state_dict`` also takes what TRELLIS (spconv) and Direct3D-S2 (torchsparse) saved for this module.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        indice_key: str | None = None,
        *,
        groups: int = 1,
    ) -> None:
        """Makes the weights.

        Args:
            in_channels: C_in.
            out_channels: C_out.
            kernel_size: That of the convolution that is taken back.
            stride: That of the convolution that is taken back.
            dilation: That of the convolution that is taken back.
            bias: Whether there is one.
            indice_key: Not needed: the convolution is found by its geometry.
            groups: Groups of channels that do not mix.
        """
        super().__init__(in_channels, out_channels, kernel_size, stride, dilation, bias, groups)

    def forward(self, x: SparseTensor) -> SparseTensor:
        """Convolves features ``[N, C_in]``.

        Raises:
            ValueError: With a stride, no such convolution made these voxels.
        """
        key = (self.kernel_size, self.stride, self.dilation)
        if self.stride == (1, 1, 1):
            source = x.coords, x.layout, tuple(d * (k - 1) // 2 for k, d in zip(self.kernel_size, self.dilation))
        else:
            source = x.recall(("conv_source", *key))
        if source is None:
            raise ValueError(
                f"SparseInverseConv3d: no SparseConv3d with kernel_size {self.kernel_size}, stride {self.stride} and"
                f" dilation {self.dilation} made these voxels"
            )
        coords, layout, padding = source

        def transposed(coarse: Tensor) -> ops.NeighborMap:
            return ops.neighbor_map(coarse, *key, padding=padding, transposed=True, out_coords=coords)

        found = x.derived(("inverse_map", *key, padding), transposed)
        feats = self._convolved(x.feats, found.map)
        return x.on(feats, coords, layout, self.stride)
