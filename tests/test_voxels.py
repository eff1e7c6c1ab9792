"""Sets of voxels: algebra against Python sets and NumPy, look-ups, bad input."""

from contextlib import nullcontext

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from cvctoolkit import ops
from tests.native import native_module
from tests.voxel_sets import (
    BACKENDS,
    GOOD,
    KINDS,
    LARGEST,
    ORDERS,
    OUTSIDE,
    arranged,
    big,
    rows_of,
    sets,
    tensor,
    words_per_row,
)  # fmt: skip

TWO_SETS = [ops.voxel_union, ops.voxel_intersection, ops.voxel_difference, ops.voxel_isin, ops.voxel_lookup]

# --- set algebra against Python ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=arranged)
def test_unique_is_that_of_python(backend, rows):
    found = ops.voxel_unique(tensor(rows), backend=backend)
    expected = sorted(set(rows))
    assert rows_of(found.coords) == expected
    assert found.inverse.tolist() == [expected.index(r) for r in rows]
    assert found.counts.tolist() == [rows.count(r) for r in expected]
    assert found.first.tolist() == [rows.index(r) for r in expected]


@pytest.mark.parametrize("backend", BACKENDS)
@given(a=arranged, b=arranged)
def test_union_and_membership_are_those_of_python(backend, a, b):
    found = ops.voxel_union(tensor(a), tensor(b), backend=backend)
    expected = sorted(set(a) | set(b))
    assert rows_of(found.coords) == expected
    assert found.index_a.tolist() == [expected.index(r) for r in a]
    assert found.index_b.tolist() == [expected.index(r) for r in b]
    assert ops.voxel_isin(tensor(a), tensor(b), backend=backend).tolist() == [r in set(b) for r in a]


@pytest.mark.parametrize("backend", BACKENDS)
@given(a=sets, b=sets, query=arranged)
def test_intersection_difference_and_lookup_are_those_of_python(backend, a, b, query):
    both = ops.voxel_intersection(tensor(a), tensor(b), backend=backend)
    assert rows_of(both.coords) == sorted(set(a) & set(b))
    assert [a[i] for i in both.index_a] == [b[i] for i in both.index_b] == rows_of(both.coords)
    only = ops.voxel_difference(tensor(a), tensor(b), backend=backend)
    assert rows_of(only.coords) == sorted(set(a) - set(b)) == [a[i] for i in only.index_a]
    place = ops.voxel_lookup(tensor(a), tensor(query), backend=backend)
    assert place.tolist() == [a.index(q) if q in a else -1 for q in query]


@given(a=sets, b=sets, c=sets)
def test_set_laws(a, b, c):
    a, b, c = tensor(a), tensor(b), tensor(c)

    def union(x, y):
        return ops.voxel_union(x, y).coords

    def both(x, y):
        return ops.voxel_intersection(x, y).coords

    def minus(x, y):
        return ops.voxel_difference(x, y).coords

    sort = ops.voxel_sort(a).coords
    assert torch.equal(union(a, b), union(b, a)) and torch.equal(both(a, b), both(b, a))
    assert torch.equal(union(union(a, b), c), union(a, union(b, c)))
    assert torch.equal(both(both(a, b), c), both(a, both(b, c)))
    assert torch.equal(both(a, union(b, c)), union(both(a, b), both(a, c)))
    assert torch.equal(minus(a, union(b, c)), both(minus(a, b), minus(a, c)))
    assert torch.equal(union(minus(a, b), both(a, b)), sort)
    assert torch.equal(union(a, a), sort) and torch.equal(both(a, a), sort) and len(minus(a, a)) == 0
    assert torch.equal(union(a, a[:0]), sort) and len(both(a, a[:0])) == 0


@given(rows=arranged)
def test_a_repeated_row_counts_as_its_lowest_when_asked_to(rows):
    a = tensor(rows)
    for backend in BACKENDS:
        assert ops.voxel_lookup(a, a, assume_unique=True, backend=backend).tolist() == [rows.index(r) for r in rows]
        both = ops.voxel_intersection(a, a, assume_unique=True, backend=backend)
        first = [rows.index(r) for r in sorted(set(rows))]
        assert both.index_a.tolist() == both.index_b.tolist() == first
        only = ops.voxel_difference(a, a[:0], assume_unique=True, backend=backend)
        assert only.index_a.tolist() == first


# Queries need not be voxels, and those out of range may come in order too.
queries = st.builds(
    lambda rows, ordered: sorted(rows) if ordered else rows,
    st.lists(st.tuples(*[st.one_of(st.integers(-1, 4), st.sampled_from([-(2**31), 2**31 - 1, *LARGEST]))] * 4)),
    st.booleans(),
)


@given(table=arranged, query=st.one_of(arranged, queries), most=st.sampled_from([0, 8, 4096]))
def test_look_ups_are_those_of_python_with_and_without_bits(table, query, most):
    with words_per_row(most):
        found = ops.voxel_lookup(tensor(table), tensor(query), assume_unique=True, backend="native")
        inside = ops.voxel_isin(tensor(query), tensor(table), backend="native")
        repeated = len(set(table)) < len(table)
        with pytest.raises(ValueError, match="distinct") if repeated else nullcontext():
            ops.voxel_lookup(tensor(table), tensor(query), backend="native")
    assert found.tolist() == [table.index(q) if q in table else -1 for q in query]
    assert inside.tolist() == [q in table for q in query]


# --- large sets against NumPy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_large_sets_are_those_of_numpy(kind):
    # Outliers leave one bucket large enough to be split again.
    a, b = big(kind, 200_000 if kind == "outliers" else 60_000, 1), big(kind, 20_000, 2)
    b = torch.cat([b, a[1000:20_000]])
    a_keys, b_keys = ops.voxel_keys(a).numpy(), ops.voxel_keys(b).numpy()
    keys, first, inverse, counts = np.unique(a_keys, return_index=True, return_inverse=True, return_counts=True)
    unique = ops.voxel_unique(a)
    assert np.array_equal(ops.voxel_keys(unique.coords).numpy(), keys)
    assert np.array_equal(unique.inverse.numpy(), inverse) and np.array_equal(unique.counts.numpy(), counts)
    assert np.array_equal(unique.first.numpy(), first)

    union = ops.voxel_union(a, b)
    assert np.array_equal(ops.voxel_keys(union.coords).numpy(), np.union1d(a_keys, b_keys))
    assert torch.equal(union.coords[union.index_a], a) and torch.equal(union.coords[union.index_b], b)
    assert np.array_equal(ops.voxel_isin(b, a).numpy(), np.isin(b_keys, a_keys))
    place = np.searchsorted(keys, b_keys).clip(max=len(keys) - 1)
    expected = np.where(keys[place] == b_keys, first[place], -1)
    assert np.array_equal(ops.voxel_lookup(a, b, assume_unique=True).numpy(), expected)
    both = ops.voxel_intersection(a, b, assume_unique=True)
    assert np.array_equal(ops.voxel_keys(both.coords).numpy(), np.intersect1d(a_keys, b_keys))
    assert torch.equal(a[both.index_a], both.coords) and torch.equal(b[both.index_b], both.coords)
    only = ops.voxel_difference(b, a, assume_unique=True)
    assert np.array_equal(ops.voxel_keys(only.coords).numpy(), np.setdiff1d(b_keys, a_keys))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ordered", [True, False])
def test_large_look_ups_are_those_of_the_reference_with_and_without_bits(kind, ordered):
    table = big(kind, 150_000 if kind == "outliers" else 40_000, 6)
    query = torch.cat([table[::3], table[::2] + torch.tensor([0, 0, -1, 1], dtype=torch.int32), big(kind, 9000, 7)])
    if ordered:
        table = ops.voxel_sort(table).coords
        query = query[torch.from_numpy(np.lexsort(query.numpy().T[::-1]))]
    distinct = ops.voxel_unique(table)
    distinct = distinct.coords if ordered else table[distinct.first.sort().values]
    threads = torch.get_num_threads()
    for coords in (table, distinct):
        rows = ops.voxel_lookup(coords, query, assume_unique=True, backend="reference")
        try:
            for most in (0, 8, 4096):
                for count in (1, 3):
                    torch.set_num_threads(count)
                    with words_per_row(most):
                        assert torch.equal(ops.voxel_lookup(coords, query, assume_unique=True), rows), (most, count)
                        assert torch.equal(ops.voxel_isin(query, coords), rows >= 0), (most, count)
                        if coords is distinct:
                            assert torch.equal(ops.voxel_lookup(coords, query), rows), (most, count)
        finally:
            torch.set_num_threads(threads)


def test_few_queries_in_many_voxels_and_many_in_few():
    many, few = big("sorted", 120_000, 4).unique(dim=0), big("everywhere", 500, 5)
    few[::2] = many[:: len(many) // 250][: len(few[::2])]
    few = few.unique(dim=0)
    for a, b in ((few, many), (many, few), (few.flip(0), many), (many, few.flip(0))):
        for op in TWO_SETS:
            found, expected = op(a, b), op(a, b, backend="reference")
            found, expected = ((found,), (expected,)) if isinstance(found, torch.Tensor) else (found, expected)
            assert all(torch.equal(x, y) for x, y in zip(found, expected)), op.__name__


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", OUTSIDE)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_that_are_no_voxels_are_refused_or_absent(backend, row, dtype):
    bad = torch.cat([GOOD, tensor([row])]).to(dtype)
    kwargs = dict(backend=backend)
    for op in (ops.voxel_keys, ops.voxel_sort, ops.voxel_unique):
        with pytest.raises(ValueError, match=f"{op.__name__}: coords must be .batch, x, y, z."):
            op(bad, **kwargs)
    for op in (ops.voxel_union, ops.voxel_intersection, ops.voxel_difference):
        for name, pair in (("a", (bad, GOOD)), ("b", (GOOD, bad))):
            with pytest.raises(ValueError, match=f"{op.__name__}: {name} must be .batch, x, y, z."):
                op(*pair, **kwargs)
    with pytest.raises(ValueError, match="voxel_isin: b must be"):
        ops.voxel_isin(GOOD, bad, **kwargs)
    with pytest.raises(ValueError, match="voxel_lookup: coords must be"):
        ops.voxel_lookup(bad, GOOD, **kwargs)
    assert ops.voxel_isin(bad, GOOD, **kwargs).tolist() == [True, True, True, False]
    assert ops.voxel_lookup(GOOD, bad, **kwargs).tolist() == [0, 1, 2, -1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_int64_beyond_int32_does_not_wrap_around(backend):
    wrapped = GOOD.long() + 2**32
    assert ops.voxel_lookup(GOOD, wrapped, backend=backend).tolist() == [-1, -1, -1]
    with pytest.raises(ValueError, match="coords must be"):
        ops.voxel_keys(wrapped, backend=backend)
    with pytest.raises(ValueError, match="must lie in"):
        ops.morton_encode(wrapped[:, 1:], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ordered", [True, False])
def test_repeated_rows_are_refused_where_they_matter(backend, ordered):
    twice = torch.cat([GOOD, GOOD[1:2]])
    twice = ops.voxel_sort(twice).coords if ordered else twice
    for op, pair, name in (
        (ops.voxel_intersection, (twice, GOOD), "a"),
        (ops.voxel_intersection, (GOOD, twice), "b"),
        (ops.voxel_difference, (twice, GOOD), "a"),
        (ops.voxel_lookup, (twice, GOOD), "coords"),
    ):
        with pytest.raises(ValueError, match=f"{op.__name__}: {name} must hold distinct voxels"):
            op(*pair, backend=backend)
        op(*pair, assume_unique=True, backend=backend)
    assert len(ops.voxel_difference(GOOD, twice, backend=backend).coords) == 0


@pytest.mark.parametrize("op", [ops.voxel_keys, ops.voxel_sort, ops.voxel_unique, *TWO_SETS])
def test_wrong_types_shapes_dtypes_and_devices_are_refused(op):
    more = (GOOD,) if op in TWO_SETS else ()
    for bad, error in (
        (GOOD.tolist(), TypeError), (GOOD.float(), ValueError), (GOOD.short(), ValueError), (GOOD[:, :3], ValueError),
        (GOOD[None], ValueError), (GOOD[0], ValueError),
    ):  # fmt: skip
        with pytest.raises(error, match=op.__name__):
            op(bad, *more)
        if more:
            with pytest.raises(error, match=op.__name__):
                op(GOOD, bad)
    if more:
        with pytest.raises(ValueError, match="must be on cpu like the other tensors"):
            op(GOOD, GOOD.to("meta"))


@pytest.mark.parametrize("parity", range(8))
def test_voxels_of_one_parity(parity):
    offset = torch.tensor([0, parity >> 2 & 1, parity >> 1 & 1, parity & 1])
    even = torch.cartesian_prod(torch.arange(2), *[torch.arange(0, 12, 2)] * 3) + offset
    shuffled = even[torch.randperm(len(even), generator=torch.Generator().manual_seed(parity))]
    assert torch.equal(ops.voxel_unique(shuffled).coords.long(), even)
    neighbours = shuffled + torch.tensor([0, 1, 0, 0])
    assert (ops.voxel_lookup(shuffled, neighbours) == -1).all()


def test_batches_are_kept_apart():
    other = GOOD + torch.tensor([5, 0, 0, 0], dtype=torch.int32)
    assert not ops.voxel_isin(GOOD, other).any()
    assert len(ops.voxel_union(GOOD, other).coords) == 6 and len(ops.voxel_intersection(GOOD, other).coords) == 0


# --- the device pipelines, run on the host ----------------------------------------------------------------------------


@given(a=arranged, b=arranged, distinct=st.booleans())
@settings(max_examples=40)
def test_device_pipelines_give_what_the_reference_gives(a, b, distinct):
    module = native_module()
    if distinct:
        a, b = list(dict.fromkeys(a)), list(dict.fromkeys(b))
    a, b = tensor(a), tensor(b)

    def same(found, expected):
        for x, y in zip(found, expected, strict=True):
            assert np.array_equal(x, y.numpy())

    same(module.voxel_unique_pipeline(a.numpy())[:4], ops.voxel_unique(a, backend="reference"))
    same(module.voxel_union_pipeline(a.numpy(), b.numpy())[:3], ops.voxel_union(a, b, backend="reference"))
    repeated = [len(set(rows_of(x))) < len(x) for x in (a, b)]
    for assume in (False, True):
        *found, faults = module.voxel_intersection_pipeline(a.numpy(), b.numpy(), assume)
        assert faults == (0 if assume else 4 * repeated[0] + 8 * repeated[1])
        if faults == 0:
            same(found, ops.voxel_intersection(a, b, assume_unique=assume, backend="reference"))
        *found, faults = module.voxel_difference_pipeline(a.numpy(), b.numpy(), assume)
        assert faults == (0 if assume else 4 * repeated[0])
        if faults == 0:
            same(found, ops.voxel_difference(a, b, assume_unique=assume, backend="reference"))
    same([module.voxel_isin_pipeline(a.numpy(), b.numpy())], [ops.voxel_isin(a, b, backend="reference")])
    expected = ops.voxel_lookup(a, b, assume_unique=True, backend="reference")
    same([module.voxel_lookup_pipeline(a.numpy(), b.numpy())], [expected])
    same([module.voxel_keys_pipeline(a.numpy())], [ops.voxel_keys(a)])
    for k, (order, size) in enumerate(ORDERS):
        found = module.voxel_sort_pipeline(a.numpy(), min(k, 3), size or 1)
        same(found, ops.voxel_sort(a, order, block_size=size, backend="reference"))


def test_device_pipelines_report_rows_that_are_no_voxels_or_let_them_match_nothing():
    module = native_module()
    for row in OUTSIDE:
        bad, good = torch.cat([tensor([row]), GOOD]).numpy(), GOOD.numpy()
        assert module.voxel_unique_pipeline(bad)[-1] == 1
        assert module.voxel_union_pipeline(bad, good)[-1] == 1 and module.voxel_union_pipeline(good, bad)[-1] == 2
        assert module.voxel_intersection_pipeline(bad, good, False)[-1] == 1
        assert module.voxel_difference_pipeline(good, bad, False)[-1] == 2
        assert module.voxel_isin_pipeline(bad, bad).tolist() == [False, True, True, True]
        assert module.voxel_lookup_pipeline(bad, bad).tolist() == [-1, 1, 2, 3]
        assert module.voxel_keys_pipeline(bad)[0] == -1
        assert module.voxel_sort_pipeline(bad, 0, 1)[1].tolist() == [3, 1, 2, 0]
