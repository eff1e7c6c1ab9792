"""Weights of other engines, in torch's layout ``[C_out, C_in / groups, Kx, Ky, Kz]``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit.ops.sparse_conv.maps_op import MAX_KERNEL, triple


def weight_from_spconv(weight: Tensor) -> Tensor:
    """From spconv 2 (as saved by default, "KRSC"), whose indices are this library's coords.

    Args:
        weight: ``[C_out, Kx, Ky, Kz, C_in]`` float.

    Returns:
        ``[C_out, C_in, Kx, Ky, Kz]``, contiguous, in the dtype of ``weight``.

    Raises:
        TypeError: ``weight`` is no tensor.
        ValueError: Shape or dtype do not fit.
    """
    _checks.tensor("weight_from_spconv", "weight", weight, "Co Kx Ky Kz Ci", _checks.FLOATING)
    return weight.permute(0, 4, 1, 2, 3).contiguous()


def weight_from_flexgemm(weight: Tensor) -> Tensor:
    """From FlexGEMM (TRELLIS.2).

    Args:
        weight: ``[C_out, Kx, Ky, Kz, C_in]`` float.

    Returns:
        ``[C_out, C_in, Kx, Ky, Kz]``, contiguous, in the dtype of ``weight``.

    Raises:
        TypeError: ``weight`` is no tensor.
        ValueError: Shape or dtype do not fit.
    """
    _checks.tensor("weight_from_flexgemm", "weight", weight, "Co Kx Ky Kz Ci", _checks.FLOATING)
    return weight.permute(0, 4, 1, 2, 3).contiguous()


def weight_from_torchsparse(weight: Tensor, kernel_size: int | Sequence[int]) -> Tensor:
    """From torchsparse (Direct3D-S2), which ravels x fastest where the kernel's volume is odd, else z fastest.

    Args:
        weight: ``[K, C_in, C_out]`` float, or ``[C_in, C_out]`` for a kernel of one voxel.
        kernel_size: Voxels along every axis, or three of them.

    Returns:
        ``[C_out, C_in, Kx, Ky, Kz]``, contiguous, in the dtype of ``weight``.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shape, dtype or kernel size do not fit, or K is not the volume of the kernel.
    """
    op = "weight_from_torchsparse"
    kx, ky, kz = triple(op, "kernel_size", kernel_size, at_least=1, at_most=MAX_KERNEL)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        weight = weight[None]
    _checks.tensor(op, "weight", weight, "K Ci Co", _checks.FLOATING)
    if weight.shape[0] != kx * ky * kz:
        raise ValueError(f"{op}: weight has {weight.shape[0]} offsets, kernel_size {kx}×{ky}×{kz}")
    if kx * ky * kz % 2 == 1:
        return weight.unflatten(0, (kz, ky, kx)).permute(4, 3, 2, 1, 0).contiguous()
    return weight.unflatten(0, (kx, ky, kz)).permute(4, 3, 0, 1, 2).contiguous()
