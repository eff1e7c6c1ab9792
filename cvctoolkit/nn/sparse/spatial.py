"""Modules between resolutions."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from torch import Tensor, nn

from cvctoolkit import ops
from cvctoolkit.nn.sparse.tensor import SparseTensor


def _factors(factor: int | Sequence[int]) -> tuple[int, ...]:
    return (factor,) * 3 if isinstance(factor, int) else tuple(factor)


class SparseDownsample(nn.Module):
    """Pools the voxels of a coarser grid's voxel into their mean; `SparseUpsample` takes it back."""

    def __init__(self, factor: int | Sequence[int], *, include_self: bool = True) -> None:
        """Sets the factor.

        Args:
            factor: Voxels per coarse voxel, along all axes or along (x, y, z).
            include_self: A voxel of zeros takes part: the mean is sum / (n + 1), as the released weights of Direct3D-S2
                and TRELLIS need. False: sum / n.
        """
        super().__init__()
        self.factor, self.include_self = _factors(factor), include_self

    def forward(self, input: SparseTensor) -> SparseTensor:
        """Pools features ``[N, ...]``."""
        coarse = input.derived(("downsample", self.factor), lambda c: ops.downsample(c, factor=self.factor))
        feats = ops.reduce_features(
            input.feats.flatten(1), coarse.inverse, coarse.coords.shape[0], include_self=self.include_self
        ).unflatten(1, input.feats.shape[1:])
        out = input.on(feats, coarse.coords, None, [Fraction(1, f) for f in self.factor])
        out.register_spatial_cache(f"upsample_{self.factor}_coords", input.coords)
        out.register_spatial_cache(f"upsample_{self.factor}_layout", input.layout)
        out.register_spatial_cache(f"upsample_{self.factor}_idx", coarse.inverse)
        out.remember(("upsample", self.factor), True)
        return out


class SparseUpsample(nn.Module):
    """Copies features to finer voxels: those that a `SparseDownsample` came from, or those that are named."""

    def __init__(self, factor: int | Sequence[int]) -> None:
        """Sets the factor.

        Args:
            factor: That of the `SparseDownsample`.
        """
        super().__init__()
        self.factor = _factors(factor)

    def forward(self, input: SparseTensor, subdivision: Tensor | None = None) -> SparseTensor:
        """Copies features ``[N, ...]``.

        Args:
            input: What to copy.
            subdivision: ``[N, 8]`` bool, the children to make, for the factor 2: child 4·i + 2·j + k of (x, y, z) is
                (2x + i, 2y + j, 2z + k). None: the voxels that were downsampled.

        Raises:
            ValueError: These voxels were not downsampled by this factor.
        """
        if subdivision is not None:
            if self.factor != (2, 2, 2):
                raise ValueError(f"SparseUpsample: subdivision needs the factor 2, got {self.factor}")
            return _children(input, subdivision)
        coords, layout, inverse = (
            input.get_spatial_cache(f"upsample_{self.factor}_{name}") for name in ("coords", "layout", "idx")
        )
        if coords is None or inverse is None or input.recall(("upsample", self.factor)) is None:
            raise ValueError(f"SparseUpsample: these voxels do not come from a SparseDownsample by {self.factor}")
        feats = ops.gather_features(input.feats.flatten(1), inverse).unflatten(1, input.feats.shape[1:])
        return input.on(feats, coords, layout, self.factor)


class SparseSubdivide(nn.Module):
    """Splits every voxel into its eight children, which copy its features."""

    def forward(self, input: SparseTensor) -> SparseTensor:
        """Copies features ``[N, ...]``; children are in lexicographic order."""
        return _children(input, None)


def _children(input: SparseTensor, mask: Tensor | None) -> SparseTensor:
    if mask is None:
        fine = input.derived("subdivide", ops.subdivide)
    else:
        fine = ops.upsample(input.coords, None, mask)
    feats = ops.gather_features(input.feats.flatten(1), fine.parent).unflatten(1, input.feats.shape[1:])
    return input.on(feats, fine.coords, None, (2, 2, 2))
