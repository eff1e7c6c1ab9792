"""Features on the voxels of a batch of grids, as TRELLIS and Direct3D-S2 pass them between modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from cvctoolkit import _checks, ops

T = TypeVar("T")
Operand: TypeAlias = "SparseTensor | Tensor | float"


class SparseTensor:
    """Features ``[N, ...]`` on voxels ``[N, 4]``, the rows of each batch item together and in order.

    What is derived from the voxels (neighbour maps, windows, the way back up) is kept in a *spatial cache* that all
    tensors of a network share, one part per resolution. The modules here use an entry of theirs only for the very
    voxels that it was made for; what is registered by hand is returned as it is.
    """

    def __init__(
        self,
        feats: Tensor,
        coords: Tensor,
        shape: Sequence[int] | None = None,
        layout: list[slice] | None = None,
        *,
        scale: Sequence[Any] = (1, 1, 1),
        spatial_cache: dict[str, dict[Any, Any]] | None = None,
    ) -> None:
        """Holds features and voxels.

        Args:
            feats: ``[N, ...]``, a row per voxel.
            coords: ``[N, 4]`` int32 or int64, (batch, x, y, z), batches ascending.
            shape: Its first number is the batch size; None: as many as ``coords`` name.
            layout: The rows of every batch item. Where this or the batch size has to be found, CUDA synchronises.
            scale: The resolution along (x, y, z), relative to that of the network's input.
            spatial_cache: That of the tensor which this one comes from.

        Raises:
            TypeError: Wrong argument types.
            ValueError: Shapes, dtypes or devices do not fit.
        """
        self._layout, self._scale = layout, tuple(scale)
        self._batch_size = None if shape is None else int(shape[0])
        self._spatial_cache = {} if spatial_cache is None else spatial_cache
        _checks.tensor("SparseTensor", "coords", coords, "N 4", _checks.INTEGRAL)
        self._coords = coords.to(torch.int32)
        self.feats = feats

    # --- what it holds ------------------------------------------------------------------------------------------------

    @property
    def feats(self) -> Tensor:
        """``[N, ...]``."""
        return self._feats

    @feats.setter
    def feats(self, value: Tensor) -> None:
        _checks.tensor("SparseTensor", "feats", value, "... C", device=self._coords.device)
        if value.shape[0] != self._coords.shape[0]:
            raise ValueError(
                f"SparseTensor: feats must have shape [{self._coords.shape[0]}, ...] like coords,"
                f" got {list(value.shape)}"
            )
        self._feats = value

    @property
    def coords(self) -> Tensor:
        """``[N, 4]`` int32, (batch, x, y, z)."""
        return self._coords

    @coords.setter
    def coords(self, value: Tensor) -> None:
        _checks.tensor("SparseTensor", "coords", value, "N 4", _checks.INTEGRAL, device=self._feats.device)
        _checks.same_shape("SparseTensor", "coords", value, self._coords.shape)
        self._coords = value.to(torch.int32)

    @property
    def shape(self) -> torch.Size:
        """[batch size, ...]: not the number of voxels."""
        return torch.Size([len(self.layout), *self._feats.shape[1:]])

    @property
    def layout(self) -> list[slice]:
        """The rows of every batch item."""
        if self._layout is None:
            self._layout = self.derived("layout", lambda coords: _layout(coords[:, 0], self._batch_size))
        return self._layout

    @property
    def dtype(self) -> torch.dtype:
        """Of the features."""
        return self._feats.dtype

    @property
    def device(self) -> torch.device:
        """Of features and voxels."""
        return self._feats.device

    def dim(self) -> int:
        """The number of entries of ``shape``."""
        return self._feats.dim()

    def __repr__(self) -> str:
        feats = f"{list(self._feats.shape)} {str(self.dtype).removeprefix('torch.')}"
        return f"SparseTensor(feats={feats}, batch={len(self.layout)}, scale={self._scale}, device={self.device})"

    # --- the same voxels with other features --------------------------------------------------------------------------

    def replace(self, feats: Tensor, coords: Tensor | None = None) -> SparseTensor:
        """Other features, and other voxels if given, with the same layout and spatial cache."""
        voxels = self._coords if coords is None else coords
        layout = self.layout if voxels.shape[0] == self._coords.shape[0] else None
        return SparseTensor(feats, voxels, self.shape, layout, scale=self._scale, spatial_cache=self._spatial_cache)

    def to(self, *args: Any, **kwargs: Any) -> SparseTensor:
        """As ``Tensor.to``; the dtype is that of the features. Another device has a spatial cache of its own."""
        feats = self._feats.to(*args, **kwargs)
        moved = self.replace(feats, self._coords.to(feats.device))
        if feats.device != self.device:
            moved._spatial_cache = {}
        return moved

    def type(self, dtype: torch.dtype) -> SparseTensor:
        """With features of another dtype."""
        return self.to(dtype)

    def half(self) -> SparseTensor:
        """With float16 features."""
        return self.to(torch.float16)

    def float(self) -> SparseTensor:
        """With float32 features."""
        return self.to(torch.float32)

    def cpu(self) -> SparseTensor:
        """On the CPU."""
        return self.to("cpu")

    def cuda(self) -> SparseTensor:
        """On the current CUDA device."""
        return self.to("cuda")

    def detach(self) -> SparseTensor:
        """Without the features' history."""
        return self.replace(self._feats.detach())

    def reshape(self, *shape: int) -> SparseTensor:
        """With features ``[N, *shape]``."""
        return self.replace(self._feats.reshape(self._feats.shape[0], *shape))

    def unbind(self, dim: int) -> list[SparseTensor]:
        """The batch items (``dim=0``), or the slices of the features along another dimension."""
        return sparse_unbind(self, dim)

    def dense(self, spatial_shape: Sequence[int] | None = None) -> Tensor:
        """``[B, ..., X, Y, Z]``, 0 where no voxel is; None: up to the largest coordinates."""
        if spatial_shape is None:
            sizes = self._coords[:, 1:].amax(0) + 1 if self._coords.shape[0] else torch.ones(3)
            spatial_shape = [int(size) for size in sizes]
        grid = ops.to_dense(self._coords, self._feats.flatten(1), spatial_shape, self.shape[0])
        return grid.unflatten(1, self._feats.shape[1:])

    @staticmethod
    def full(
        aabb: Sequence[int],
        dim: Sequence[int],
        value: Any,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> SparseTensor:
        """Every voxel of a box, all with the same features.

        Args:
            aabb: (x, y, z) of the first voxel and of the last.
            dim: (batch size, channels).
            value: A number, of the features.
            dtype: Of the features.
            device: Of the result.
        """
        axes = [torch.arange(low, high + 1) for low, high in zip(aabb[:3], aabb[3:])]
        coords = torch.cartesian_prod(torch.arange(dim[0]), *axes).to(device, torch.int32)
        return SparseTensor(torch.full((len(coords), dim[1]), value, dtype=dtype, device=device), coords, dim)

    def __getitem__(self, index: int | slice | Tensor | Sequence[int]) -> SparseTensor:
        """The named batch items, numbered from 0 in the order named."""
        rows = [self.layout[item] for item in _items(index, len(self.layout))]
        coords = torch.cat([self._coords[:0], *(self._coords[r] for r in rows)])
        layout = _slices([r.stop - r.start for r in rows])
        for k, part in enumerate(layout):
            coords[part, 0] = k
        feats = torch.cat([self._feats[:0], *(self._feats[r] for r in rows)])
        return SparseTensor(feats, coords, [len(rows)], layout)

    # --- arithmetic ---------------------------------------------------------------------------------------------------

    def _combined(self, other: Operand, op: Callable[..., Tensor]) -> SparseTensor:
        if isinstance(other, SparseTensor):
            out = self.replace(op(self._feats, other.feats))
            cache = {key: dict(value) for key, value in self._spatial_cache.items()}
            for key, value in other._spatial_cache.items():
                cache.setdefault(key, {}).update(value)
            out._spatial_cache = self._spatial_cache if other._spatial_cache is self._spatial_cache else cache
            return out
        if isinstance(other, Tensor) and _broadcasts(other, self.shape):
            other = sparse_batch_broadcast(self, torch.broadcast_to(other, self.shape))
        return self.replace(op(self._feats, other))

    def __neg__(self) -> SparseTensor:
        return self.replace(-self._feats)

    def __add__(self, other: Operand) -> SparseTensor:
        return self._combined(other, torch.add)

    __radd__ = __add__

    def __sub__(self, other: Operand) -> SparseTensor:
        return self._combined(other, torch.sub)

    def __rsub__(self, other: Operand) -> SparseTensor:
        return self._combined(other, lambda a, b: b - a)

    def __mul__(self, other: Operand) -> SparseTensor:
        return self._combined(other, torch.mul)

    __rmul__ = __mul__

    def __truediv__(self, other: Operand) -> SparseTensor:
        return self._combined(other, torch.div)

    def __rtruediv__(self, other: Operand) -> SparseTensor:
        return self._combined(other, lambda a, b: b / a)

    # --- spatial cache ------------------------------------------------------------------------------------------------

    def register_spatial_cache(self, key: Any, value: Any) -> None:
        """Keeps anything for all tensors of this resolution.

        Args:
            key: Hashable.
            value: Anything.
        """
        self._spatial_cache.setdefault(str(self._scale), {})[key] = value

    def get_spatial_cache(self, key: Any = None) -> Any:
        """What was registered for this resolution: under a key (None if nothing), or all of it.

        Args:
            key: As registered; None: the whole dictionary.
        """
        found = self._spatial_cache.get(str(self._scale), {})
        return found if key is None else found.get(key)

    def remember(self, key: Any, value: T) -> T:
        """Keeps what belongs to these very voxels; returns it."""
        self.register_spatial_cache(key, (self._coords, value))
        return value

    def recall(self, key: Any) -> Any:
        """What `remember` kept for these very voxels, or None."""
        coords, value = self.get_spatial_cache(key) or (None, None)
        return value if coords is self._coords else None

    def derived(self, key: Any, make: Callable[[Tensor], T]) -> T:
        """What ``make`` makes of the voxels, made once."""
        found = self.recall(key)
        return self.remember(key, make(self._coords)) if found is None else found

    def on(self, feats: Tensor, coords: Tensor, layout: list[slice] | None, factor: Sequence[Any]) -> SparseTensor:
        """Features on voxels of a grid that is ``factor`` times as fine, with this tensor's cache."""
        scale = [Fraction(s) * f for s, f in zip(self._scale, factor)]
        scale = [int(s) if s.denominator == 1 else s for s in scale]
        shape = [self.shape[0]]
        return SparseTensor(feats, coords, shape, layout, scale=scale, spatial_cache=self._spatial_cache)


def _slices(lengths: Sequence[int]) -> list[slice]:
    return [slice(a, b) for a, b in pairwise(accumulate(lengths, initial=0))]


def _items(index: Any, count: int) -> Sequence[int]:
    if isinstance(index, slice):
        return range(count)[index]
    if isinstance(index, Tensor):
        index = index.nonzero().squeeze(1) if index.dtype == torch.bool else index
        return index.reshape(index.numel()).tolist()
    return [index] if isinstance(index, int) else list(index)


def _layout(batch: Tensor, batch_size: int | None) -> list[slice]:
    """The rows of every batch item; synchronises once on CUDA."""
    op = "SparseTensor"
    if batch.shape[0] == 0:
        return [slice(0, 0)] * (batch_size or 0)
    faults = torch.stack([batch.min().clamp_max(0), (batch[1:] < batch[:-1]).any()])
    lowest, descends, *lengths = torch.cat([faults, batch.clamp_min(0).bincount(minlength=batch_size or 0)]).tolist()
    if lowest < 0 or descends:
        raise ValueError(f"{op}: coords must have ascending batch indices from 0 on, so that batch items are together")
    if batch_size is not None and len(lengths) > batch_size:
        raise ValueError(f"{op}: coords must have batch indices below {batch_size}, got {len(lengths) - 1}")
    return _slices(lengths)


def _broadcasts(tensor: Tensor, shape: torch.Size) -> bool:
    return tensor.dim() <= len(shape) and all(a in (1, b) for a, b in zip(tensor.shape[::-1], shape[::-1]))


def sparse_batch_broadcast(input: SparseTensor, other: Tensor) -> Tensor:
    """Gives every voxel its batch item's values.

    Args:
        input: B batch items with N voxels.
        other: ``[B, ...]``.

    Returns:
        ``[N, ...]``, like ``input.feats``.
    """
    rows = other.index_select(0, input.coords[:, 0]).to(input.dtype)
    return rows.expand_as(input.feats) if rows.dim() == input.feats.dim() else rows


def sparse_batch_op(input: SparseTensor, other: Tensor, op: Callable[..., Tensor] = torch.add) -> SparseTensor:
    """Combines every voxel's features with its batch item's values.

    Args:
        input: B batch items.
        other: ``[B, ...]``.
        op: Of two tensors.
    """
    return input.replace(op(input.feats, sparse_batch_broadcast(input, other)))


def sparse_cat(inputs: Sequence[SparseTensor], dim: int = 0) -> SparseTensor:
    """Joins batches (``dim=0``), or features on the same voxels along another dimension.

    Args:
        inputs: At least one.
        dim: Of ``feats``.
    """
    if dim != 0:
        return inputs[0].replace(torch.cat([t.feats for t in inputs], dim))
    coords, lengths = [], []
    for t in inputs:
        shift = torch.tensor([len(lengths), 0, 0, 0], dtype=torch.int32).to(t.device)
        coords.append(t.coords + shift)
        lengths += [rows.stop - rows.start for rows in t.layout]
    return SparseTensor(torch.cat([t.feats for t in inputs]), torch.cat(coords), [len(lengths)], _slices(lengths))


def sparse_unbind(input: SparseTensor, dim: int) -> list[SparseTensor]:
    """The batch items (``dim=0``), or the slices of the features along another dimension.

    Args:
        input: To take apart.
        dim: Of ``feats``.
    """
    if dim == 0:
        return [input[k] for k in range(input.shape[0])]
    return [input.replace(feats) for feats in input.feats.unbind(dim)]
