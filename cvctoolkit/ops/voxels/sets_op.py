"""Sets of voxels: unique, union, intersection, difference, membership, lookup, with the maps that go with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._backend import Backend
from cvctoolkit._library import Operator, define_op, dynamic_sizes
from cvctoolkit._native import kernels as _native
from cvctoolkit.ops.voxels import sets_reference as reference
from cvctoolkit.ops.voxels.conventions import DUPLICATE, OUT_OF_RANGE, checked_coords, raise_faults
from cvctoolkit.ops.voxels.order_reference import in_range


class UniqueVoxels(NamedTuple):
    """Distinct voxels in lexicographic order.

    Attributes:
        coords: ``[M, 4]`` int32.
        inverse: ``[N]`` int64, where every given row is: ``given == coords[inverse]``.
        counts: ``[M]`` int64, how many given rows each stands for.
        first: ``[M]`` int64, the first of these: ``coords == given[first]``.
    """

    coords: Tensor
    inverse: Tensor
    counts: Tensor
    first: Tensor


class VoxelUnion(NamedTuple):
    """The voxels of either set, in lexicographic order.

    Attributes:
        coords: ``[M, 4]`` int32.
        index_a: ``[Na]`` int64, the row in ``coords`` of every row of a.
        index_b: ``[Nb]`` int64, the row in ``coords`` of every row of b.
    """

    coords: Tensor
    index_a: Tensor
    index_b: Tensor


class VoxelIntersection(NamedTuple):
    """The voxels of both sets, in lexicographic order.

    Attributes:
        coords: ``[M, 4]`` int32.
        index_a: ``[M]`` int64, their rows in a.
        index_b: ``[M]`` int64, their rows in b.
    """

    coords: Tensor
    index_a: Tensor
    index_b: Tensor


class VoxelDifference(NamedTuple):
    """The voxels of a that are not in b, in lexicographic order.

    Attributes:
        coords: ``[M, 4]`` int32.
        index_a: ``[M]`` int64, their rows in a.
    """

    coords: Tensor
    index_a: Tensor


# --- operators --------------------------------------------------------------------------------------------------------


def _faults(sets: Sequence[Tensor], voxels: Sequence[bool], distinct: Sequence[bool]) -> int:
    """What the native kernels find on their way: rows that must be voxels and are not, rows that must be distinct."""
    faults = 0
    for k, coords in enumerate(sets):
        outside = voxels[k] and not bool(in_range(coords).all())
        faults |= OUT_OF_RANGE[k] * outside
        if distinct[k] and not outside and len(torch.unique(reference.voxel_keys(coords))) < len(coords):
            faults |= DUPLICATE[k]
    return faults


def _define(
    op: str,
    schema: str,
    fake: Callable[..., Any],
    names: Sequence[str],
    voxels: Sequence[bool],
    distinct: Sequence[bool] = (False, False),
    *,
    fixed_size: bool = False,
) -> Operator:
    """Defines a set operator: its sets first, then whether they may be assumed distinct (where that matters)."""

    def native(*args: Any) -> Any:
        *found, faults = getattr(_native, op)(*args)
        raise_faults(op, faults, *names)
        return tuple(found) if len(found) > 1 else found[0]

    def run_reference(*args: Any) -> Any:
        sets, assume_unique = args[: len(names)], args[len(names) :]
        # With sizes known beforehand a check would be the only synchronisation on CUDA.
        if not fixed_size or sets[0].device.type == "cpu":
            required = [d and not any(assume_unique) for d in distinct]
            raise_faults(op, _faults(sets, voxels, required), *names)
        return getattr(reference, op)(*sets)

    return define_op(op, schema, fake=fake, reference=run_reference, native=Backend(native, kernels=(op,)))


def _rows(like: Tensor, count: Any) -> Tensor:
    return like.new_empty(count, dtype=torch.int64)


def _fake_unique(coords: Tensor) -> tuple[Tensor, ...]:
    (m,) = dynamic_sizes(1)
    return coords.new_empty(m, 4), _rows(coords, coords.shape[0]), _rows(coords, m), _rows(coords, m)


def _fake_union(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    (m,) = dynamic_sizes(1)
    return a.new_empty(m, 4), _rows(a, a.shape[0]), _rows(a, b.shape[0])


def _fake_intersection(a: Tensor, *_: Any) -> tuple[Tensor, ...]:
    (m,) = dynamic_sizes(1)
    return a.new_empty(m, 4), _rows(a, m), _rows(a, m)


def _fake_difference(a: Tensor, *_: Any) -> tuple[Tensor, ...]:
    (m,) = dynamic_sizes(1)
    return a.new_empty(m, 4), _rows(a, m)


_voxel_unique = _define(
    "voxel_unique", "(Tensor coords) -> (Tensor, Tensor, Tensor, Tensor)", _fake_unique, ["coords"], [True]
)
_voxel_union = _define(
    "voxel_union", "(Tensor a, Tensor b) -> (Tensor, Tensor, Tensor)", _fake_union, ["a", "b"], [True, True]
)
_voxel_intersection = _define(
    "voxel_intersection",
    "(Tensor a, Tensor b, bool assume_unique) -> (Tensor, Tensor, Tensor)",
    _fake_intersection,
    ["a", "b"],
    [True, True],
    [True, True],
)
_voxel_difference = _define(
    "voxel_difference",
    "(Tensor a, Tensor b, bool assume_unique) -> (Tensor, Tensor)",
    _fake_difference,
    ["a", "b"],
    [True, True],
    [True, False],
)
_voxel_isin = _define(
    "voxel_isin",
    "(Tensor a, Tensor b) -> Tensor",
    lambda a, b: a.new_empty(a.shape[0], dtype=torch.bool),
    ["a", "b"],
    [False, True],
    fixed_size=True,
)
_voxel_lookup = _define(
    "voxel_lookup",
    "(Tensor coords, Tensor query, bool assume_unique) -> Tensor",
    lambda coords, query, assume_unique: _rows(query, query.shape[0]),
    ["coords", "query"],
    [True, False],
    [True, False],
    fixed_size=True,
)


# --- public functions -------------------------------------------------------------------------------------------------


def _pair(op: str, a: Tensor, b: Tensor, names: tuple[str, str] = ("a", "b")) -> tuple[Tensor, Tensor]:
    first = checked_coords(op, names[0], a)
    return first, checked_coords(op, names[1], b, device=a.device)


def voxel_unique(coords: Tensor, *, backend: str | None = None) -> UniqueVoxels:
    """The distinct voxels, sorted, with the maps there and back.

    Args:
        coords: ``[N, 4]`` int32 or int64, (batch, x, y, z): batch in [0, 32768), coordinates in [0, 65536). Rows in
            lexicographic order are not sorted again.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        (coords, inverse, counts, first), with ``coords[inverse]`` the given rows and ``coords`` the given rows
        ``first``, each the lowest of its kind. The same on every backend. The size depends on the data: on CUDA this
        synchronises once.

    Raises:
        TypeError: ``coords`` is no tensor.
        ValueError: Shape, dtype or backend do not fit; a row is no voxel.
    """
    return UniqueVoxels(*_voxel_unique(checked_coords("voxel_unique", "coords", coords), backend=backend))


def voxel_union(a: Tensor, b: Tensor, *, backend: str | None = None) -> VoxelUnion:
    """The voxels of either set, sorted, and where the rows of both are among them.

    To carry features over: ``feats.new_zeros(len(coords), C).index_copy(0, index_a, feats)``.

    Args:
        a: ``[Na, 4]`` int32 or int64, (batch, x, y, z): batch in [0, 32768), coordinates in [0, 65536). Equal rows
            share a row of the union. Sets in lexicographic order are merged, not sorted again.
        b: ``[Nb, 4]``, as ``a``.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        (coords, index_a, index_b), with ``coords[index_a] == a`` and ``coords[index_b] == b``. The same on every
        backend. The size depends on the data: on CUDA this synchronises once.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: Shapes, dtypes, devices or backend do not fit; a row is no voxel.
    """
    return VoxelUnion(*_voxel_union(*_pair("voxel_union", a, b), backend=backend))


def voxel_intersection(
    a: Tensor, b: Tensor, *, assume_unique: bool = False, backend: str | None = None
) -> VoxelIntersection:
    """The voxels of both sets, sorted, and their rows in either.

    Args:
        a: ``[Na, 4]`` int32 or int64, distinct (batch, x, y, z): batch in [0, 32768), coordinates in [0, 65536). Sets
            in lexicographic order are merged, not sorted again.
        b: ``[Nb, 4]``, as ``a``.
        assume_unique: Do not refuse equal rows within a set; the lowest of them counts.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        (coords, index_a, index_b), with ``coords == a[index_a] == b[index_b]``. The same on every backend. The size
        depends on the data: on CUDA this synchronises once.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; a row is no voxel; a voxel is repeated.
    """
    op = "voxel_intersection"
    assume_unique = _checks.flag(op, "assume_unique", assume_unique)
    return VoxelIntersection(*_voxel_intersection(*_pair(op, a, b), assume_unique, backend=backend))


def voxel_difference(
    a: Tensor, b: Tensor, *, assume_unique: bool = False, backend: str | None = None
) -> VoxelDifference:
    """The voxels of a that are not in b, sorted, and their rows in a.

    Args:
        a: ``[Na, 4]`` int32 or int64, distinct (batch, x, y, z): batch in [0, 32768), coordinates in [0, 65536). Sets
            in lexicographic order are merged, not sorted again.
        b: ``[Nb, 4]``, as ``a``, but rows may repeat.
        assume_unique: Do not refuse equal rows within ``a``; the lowest of them counts.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        (coords, index_a), with ``coords == a[index_a]``. The same on every backend. The size depends on the data: on
        CUDA this synchronises once.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; a row is no voxel; a voxel of ``a`` is repeated.
    """
    op = "voxel_difference"
    assume_unique = _checks.flag(op, "assume_unique", assume_unique)
    return VoxelDifference(*_voxel_difference(*_pair(op, a, b), assume_unique, backend=backend))


def voxel_isin(a: Tensor, b: Tensor, *, backend: str | None = None) -> Tensor:
    """Which rows of a are in b.

    Args:
        a: ``[Na, 4]`` int32 or int64, (batch, x, y, z), in any order; rows may repeat, and a row that is no voxel
            (beyond the border of a grid, say) is in no set.
        b: ``[Nb, 4]`` int32 or int64, batch in [0, 32768), coordinates in [0, 65536); rows may repeat. In
            lexicographic order they are not sorted again.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[Na]`` bool. The same on every backend. On CUDA nothing is checked and nothing synchronises: a row of ``b``
        that is no voxel matches nothing.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: Shapes, dtypes, devices or backend do not fit; a row of ``b`` is no voxel (on a CPU).
    """
    return _voxel_isin(*_pair("voxel_isin", a, b), backend=backend)


def voxel_lookup(coords: Tensor, query: Tensor, *, assume_unique: bool = False, backend: str | None = None) -> Tensor:
    """The row of every queried voxel, −1 where it is absent.

    ``voxel_lookup(part, whole)`` is the map that masked guidance needs: per voxel of the whole, its row in the part.

    Args:
        coords: ``[N, 4]`` int32 or int64, distinct (batch, x, y, z): batch in [0, 32768), coordinates in [0, 65536).
            In lexicographic order they are not sorted again.
        query: ``[M, 4]`` int32 or int64, in any order; rows may repeat, and a row that is no voxel (beyond the border
            of a grid, say) is absent.
        assume_unique: Do not refuse equal rows in ``coords``; the lowest of them counts.
        backend: ``"native"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[M]`` int64. The same on every backend. On CUDA nothing is checked and nothing synchronises: of equal rows in
        ``coords`` the lowest counts, and one that is no voxel matches nothing.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit; a row of ``coords`` is no voxel, or a voxel is
            repeated (on a CPU).
    """
    op = "voxel_lookup"
    assume_unique = _checks.flag(op, "assume_unique", assume_unique)
    pair = _pair(op, coords, query, ("coords", "query"))
    return _voxel_lookup(*pair, assume_unique, backend=backend)
