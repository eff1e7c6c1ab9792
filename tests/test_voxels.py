"""Sets and orders of voxels: algebra against Python sets and NumPy, order laws, curves, bad input."""

from contextlib import contextmanager, nullcontext

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from cvctoolkit import ops
from cvctoolkit.ops.voxels.conventions import MAX_BATCH, MAX_COORD
from tests.native import native_module

BACKENDS = ["native", "reference"]
ORDERS = [("lexicographic", None), ("morton", None), ("hilbert", None), ("block", 1), ("block", 3), ("block", 16384)]
TWO_SETS = [ops.voxel_union, ops.voxel_intersection, ops.voxel_difference, ops.voxel_isin, ops.voxel_lookup]
LARGEST = (MAX_BATCH, MAX_COORD, MAX_COORD, MAX_COORD)


def tensor(rows):
    return torch.tensor(sorted(rows) if isinstance(rows, set) else rows, dtype=torch.int32).reshape(-1, 4)


def rows_of(coords):
    return [tuple(row) for row in coords.tolist()]


# Small grids collide often; the largest has the longest keys; a far corner shifts all of it; borders come up often.
small = st.tuples(st.integers(0, 2), *[st.integers(0, 3)] * 3)
borders = st.tuples(*[st.sampled_from([0, 1, limit // 2, limit - 2, limit - 1]) for limit in LARGEST])
anywhere = st.tuples(*[st.integers(0, limit - 1) for limit in LARGEST])
lists = st.one_of(*[st.lists(voxel, max_size=60) for voxel in (small, borders, anywhere)])
# Given as they are, in order, or as two sets in order one after the other: each takes its own path.
arranged = st.builds(
    lambda rows, how: {"as is": rows, "sorted": sorted(rows)}.get(how, sorted(rows[::2]) + sorted(rows[1::2])),
    lists,
    st.sampled_from(["as is", "sorted", "two runs"]),
)
sets = st.builds(lambda rows, ordered: sorted(set(rows)) if ordered else list(set(rows)), lists, st.booleans())


# --- set algebra against Python --------------------------------------------------------------------------------------


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


@contextmanager
def words_per_row(most):
    """How many words of bits the native look-ups may spend on a row: none makes them sort."""
    limit = torch.ops.cvctoolkit_native.voxel_words_per_row
    before = limit(most)
    try:
        yield
    finally:
        limit(before)


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


# --- large sets against NumPy ----------------------------------------------------------------------------------------


def big(kind, count, seed):
    """More rows than one bucket, chunk or digit holds, from the arrangements that steer the kernels."""
    rng = np.random.default_rng(seed)
    limits = {
        "one column": (1, 1, 1, MAX_COORD), "cube": (2, 64, 64, 64), "grid": (1, 512, 512, 512), "everywhere": LARGEST
    }.get(kind, (1, 300, 300, 300))  # fmt: skip
    coords = np.stack([rng.integers(0, limit, count) for limit in limits], 1)
    if kind == "outliers":  # the leading bits of all but a few are the same
        coords[:: count // 7] = rng.integers(0, LARGEST, (len(coords[:: count // 7]), 4))
    if kind == "far corner":
        coords = np.array(LARGEST) - 1 - coords
    if kind == "equal":
        coords[:] = coords[0]
    if kind in ("sorted", "cube"):
        coords = coords[np.lexsort(coords.T[::-1])]
    return torch.from_numpy(coords.astype(np.int32))


KINDS = ["one column", "cube", "grid", "everywhere", "outliers", "far corner", "equal", "sorted"]


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
def test_large_sorts_are_those_of_the_reference_for_any_thread_count(kind):
    coords = big(kind, 150_000 if kind == "outliers" else 50_000, 3)
    threads = torch.get_num_threads()
    for order, size in ORDERS:
        expected = ops.voxel_sort(coords, order, block_size=size, backend="reference")
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                found = ops.voxel_sort(coords, order, block_size=size)
                assert all(torch.equal(x, y) for x, y in zip(found, expected)), f"{order}, {count} threads"
        finally:
            torch.set_num_threads(threads)


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


# --- keys, orders, curves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=lists)
def test_keys_compare_like_rows(backend, rows):
    keys = ops.voxel_keys(tensor(rows), backend=backend).tolist()
    assert [r for _, r in sorted(zip(keys, rows))] == sorted(rows)
    assert all(k == ((b * 2**16 + x) * 2**16 + y) * 2**16 + z for k, (b, x, y, z) in zip(keys, rows))


@pytest.mark.parametrize("backend", BACKENDS)
@given(rows=arranged, order=st.sampled_from(ORDERS))
def test_orders_are_stable_permutations(backend, rows, order):
    name, size = order
    found = ops.voxel_sort(tensor(rows), name, block_size=size, backend=backend)

    def key(row):
        b, *xyz = row
        if name == "lexicographic":
            return row
        if name == "block":
            return (b, *(c // size for c in xyz), *(c % size for c in xyz))
        return b, getattr(ops, f"{name}_encode")(torch.tensor(xyz), backend="reference").item()

    expected = sorted(range(len(rows)), key=lambda i: key(rows[i]))
    assert found.permutation.tolist() == expected
    assert found.inverse[found.permutation].tolist() == list(range(len(rows)))
    assert rows_of(found.coords) == [rows[i] for i in expected]


cells = st.lists(
    st.tuples(*[st.one_of(st.integers(0, 2**21 - 1), st.sampled_from([0, 1, 2**21 - 1]))] * 3), max_size=40
)


@pytest.mark.parametrize("curve", ["morton", "hilbert"])
@given(xyz=cells, codes=st.lists(st.integers(0, 2**63 - 1), max_size=40))
def test_curves_go_there_and_back(curve, xyz, codes):
    encode, decode = getattr(ops, f"{curve}_encode"), getattr(ops, f"{curve}_decode")
    xyz, codes = torch.tensor(xyz, dtype=torch.int64).reshape(-1, 3), torch.tensor(codes, dtype=torch.int64)
    for there in BACKENDS:
        for back in BACKENDS:
            assert torch.equal(decode(encode(xyz, backend=there), backend=back).long(), xyz)
            assert torch.equal(encode(decode(codes, backend=back), backend=there), codes)


@given(xyz=cells)
def test_morton_interleaves_bits_with_x_first(xyz):
    def code(x, y, z):
        return int("".join(a + b + c for a, b, c in zip(*(format(v, "021b") for v in (x, y, z)))), 2)

    found = ops.morton_encode(torch.tensor(xyz, dtype=torch.int64).reshape(-1, 3))
    assert found.tolist() == [code(*c) for c in xyz]


@pytest.mark.parametrize("backend", BACKENDS)
@given(start=st.one_of(st.integers(0, 2**63 - 70), st.sampled_from([8**k - 32 for k in range(2, 21)])))
def test_hilbert_takes_unit_steps(backend, start):
    xyz = ops.hilbert_decode(torch.arange(64) + start, backend=backend)
    assert (xyz.diff(dim=0).abs().sum(1) == 1).all()


def test_hilbert_fills_every_cube_before_it_leaves_it():
    for k in range(6):
        xyz = ops.hilbert_decode(torch.arange(8**k))
        assert xyz.min() == 0 and xyz.max() == 2**k - 1
        assert len(torch.unique(ops.morton_encode(xyz))) == 8**k


def test_curves_agree_on_every_instruction_set():
    from cvctoolkit import _native

    xyz = torch.randint(2**21, (1000, 3), generator=torch.Generator().manual_seed(0))
    for wish in ("baseline", "avx2", "avx512"):
        with _native.restricted_isa(wish):
            for curve in ("morton", "hilbert"):
                encode, decode = getattr(ops, f"{curve}_encode"), getattr(ops, f"{curve}_decode")
                codes = encode(xyz)
                assert torch.equal(codes, encode(xyz, backend="reference"))
                assert torch.equal(decode(codes).long(), xyz)


# --- bad input -------------------------------------------------------------------------------------------------------

GOOD = tensor([(0, 1, 2, 3), (1, 0, 0, 5), (0, 0, 9, 9)])
OUTSIDE = [(0, -1, 0, 0), (-1, 0, 0, 0), (MAX_BATCH, 0, 0, 0), (0, 0, MAX_COORD, 0), (0, 0, 0, 2**31 - 1)]


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


def test_bad_orders_blocks_and_codes_are_refused():
    with pytest.raises(ValueError, match="order must be one of"):
        ops.voxel_sort(GOOD, "z")
    for options in (dict(order="block"), dict(block_size=4), dict(order="hilbert", block_size=4)):
        with pytest.raises(ValueError, match="block_size goes with"):
            ops.voxel_sort(GOOD, **options)
    for size in (0, -1, 16385):
        with pytest.raises(ValueError, match="block_size must be"):
            ops.voxel_sort(GOOD, "block", block_size=size)
    with pytest.raises(TypeError, match="block_size must be an integer"):
        ops.voxel_sort(GOOD, "block", block_size=2.0)
    for curve in ("morton", "hilbert"):
        encode, decode = getattr(ops, f"{curve}_encode"), getattr(ops, f"{curve}_decode")
        for backend in BACKENDS:
            for bad in (-1, 2**21):
                with pytest.raises(ValueError, match="must lie in"):
                    encode(torch.tensor([[0, bad, 0]]), backend=backend)
            with pytest.raises(ValueError, match="got a negative one"):
                decode(torch.tensor([3, -1]), backend=backend)
        with pytest.raises(ValueError, match="dtype int64"):
            decode(torch.tensor([3], dtype=torch.int32))


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


# --- the device pipelines, run on the host ---------------------------------------------------------------------------


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


@given(xyz=cells)
@settings(max_examples=30)
def test_device_curves_give_what_the_reference_gives(xyz):
    module = native_module()
    xyz = torch.tensor([*xyz, (0, -1, 0), (0, 0, 2**21)], dtype=torch.int32)
    for curve, hilbert in (("morton", False), ("hilbert", True)):
        codes = module.curve_encode_pipeline(xyz.numpy(), hilbert)
        assert codes[:-2].tolist() == getattr(ops, f"{curve}_encode")(xyz[:-2]).tolist()
        assert codes[-2:].tolist() == [-1, -1]
        back = module.curve_decode_pipeline(codes, hilbert)
        assert back[:-2].tolist() == xyz[:-2].tolist() and (back[-2:] == -1).all()
