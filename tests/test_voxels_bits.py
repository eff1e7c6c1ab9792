"""Sets of voxels on the CPU: bits, sorts and merges find the same, whatever the box, the order and the threads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from cvctoolkit import ops
from tests.voxel_sets import LARGEST, arranged, rows_of, tensor, words_per_row

# No bits at all, as many as usual, and bits of boxes that are nearly empty.
WORDS = [0, 8, 4096]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_unique(rows: list[tuple[int, ...]]) -> None:
    found, expected = ops.voxel_unique(tensor(rows)), sorted(set(rows))
    assert rows_of(found.coords) == expected
    assert found.inverse.tolist() == [expected.index(r) for r in rows]
    assert found.counts.tolist() == [rows.count(r) for r in expected]
    assert found.first.tolist() == [rows.index(r) for r in expected]


def check_union(a: list[tuple[int, ...]], b: list[tuple[int, ...]]) -> None:
    found, expected = ops.voxel_union(tensor(a), tensor(b)), sorted({*a, *b})
    assert rows_of(found.coords) == expected
    assert found.index_a.tolist() == [expected.index(r) for r in a]
    assert found.index_b.tolist() == [expected.index(r) for r in b]


def check_choices(a: list[tuple[int, ...]], b: list[tuple[int, ...]]) -> None:
    """Intersection and difference; of rows that repeat the lowest counts, or they are refused."""
    x, y = tensor(a), tensor(b)
    repeats_a, repeats_b = len(set(a)) < len(a), len(set(b)) < len(b)
    both, only = sorted({*a} & {*b}), sorted({*a} - {*b})
    for assume_unique in (True, False):
        wrong = not assume_unique and (repeats_a or repeats_b)
        with pytest.raises(ValueError, match=rf"{'a' if repeats_a else 'b'} .*distinct") if wrong else nullcontext():
            found = ops.voxel_intersection(x, y, assume_unique=assume_unique)
            assert rows_of(found.coords) == both
            assert found.index_a.tolist() == [a.index(r) for r in both]
            assert found.index_b.tolist() == [b.index(r) for r in both]
        wrong = not assume_unique and repeats_a
        with pytest.raises(ValueError, match=r"a .*distinct") if wrong else nullcontext():
            found = ops.voxel_difference(x, y, assume_unique=assume_unique)
            assert rows_of(found.coords) == only and found.index_a.tolist() == [a.index(r) for r in only]


# Boxes that are thin in any way, at either end of what there is: a line along z begins at a word of 64 cells.
edges = st.tuples(*[st.sampled_from([1, 2, 3, 63, 64, 65, 129])] * 4)


@st.composite
def boxed(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Rows in a box, some of them repeated, in any order or as one or two sets in order."""
    box, far = draw(edges), draw(st.booleans())
    voxel = st.tuples(*[st.integers(0, edge - 1) for edge in box])
    rows = draw(st.lists(voxel, max_size=40))
    rows += draw(st.lists(st.sampled_from(rows), max_size=20)) if rows else []
    if far:
        rows = [tuple(limit - 1 - c for limit, c in zip(LARGEST, row, strict=True)) for row in rows]
    middle = draw(st.integers(0, len(rows)))
    how = draw(st.sampled_from(["as is", "sorted", "two runs"]))
    return {"as is": rows, "sorted": sorted(rows)}.get(how, sorted(rows[:middle]) + sorted(rows[middle:]))


@given(rows=st.one_of(boxed(), arranged), most=st.sampled_from(WORDS))
def test_unique_is_that_of_python_with_and_without_bits(rows, most):
    with words_per_row(most):
        check_unique(rows)


@given(a=st.one_of(boxed(), arranged), b=st.one_of(boxed(), arranged), most=st.sampled_from(WORDS))
def test_union_is_that_of_python_with_and_without_bits(a, b, most):
    with words_per_row(most):
        check_union(a, b)


@given(a=st.one_of(boxed(), arranged), b=st.one_of(boxed(), arranged), most=st.sampled_from(WORDS))
def test_choices_are_those_of_python_with_and_without_bits(a, b, most):
    with words_per_row(most):
        check_choices(a, b)
        check_choices(list(dict.fromkeys(a)), list(dict.fromkeys(b[::2] + a[::3])))


def same_choices(a: Tensor, b: Tensor) -> None:
    for op in (ops.voxel_intersection, ops.voxel_difference):
        expected = op(a, b, assume_unique=True, backend="reference")
        assert all(map(torch.equal, op(a, b, assume_unique=True), expected)), op


def filled(box: tuple[int, ...], count: int, seed: int) -> Tensor:
    """Rows drawn from a box: of a small one most cells many times."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(np.stack([rng.integers(0, edge, count) for edge in box], 1).astype(np.int32))


def in_runs(coords: Tensor, runs: int) -> Tensor:
    """Rows sorted, or as several sets that are, one after the other."""
    return torch.cat([ops.voxel_sort(part, backend="reference").coords for part in coords.chunk(runs)])


# One cell, one word, one range; lines and planes across every axis; batches; dense, and all but empty.
BOXES = [
    (1, 1, 1, 1), (1, 1, 1, 64), (1, 1, 1, 65536), (1, 1, 65536, 1), (1, 65536, 1, 1), (32768, 1, 1, 1),
    (1, 1, 300, 300), (1, 300, 1, 300), (1, 300, 300, 1), (300, 1, 1, 300), (5, 20, 21, 22), (1, 400, 400, 400),
]  # fmt: skip


@pytest.mark.parametrize("box", BOXES, ids=lambda box: "x".join(map(str, box)))
@pytest.mark.parametrize("runs", [None, 1, 2, 3], ids=lambda runs: f"{runs or 'no'} runs")
def test_many_rows_give_what_the_reference_gives(box, runs):
    """More rows than a chunk of any kind holds."""
    a, b = filled(box, 70_000, 1), filled(box, 33_000, 2)
    b[::50] = torch.minimum(b[::50] + torch.tensor([0, 1, 0, 2]), torch.tensor(LARGEST) - 1).int()  # outside a's box
    if runs:
        a, b = in_runs(a, runs), in_runs(b, runs)
    unique, union = ops.voxel_unique(a, backend="reference"), ops.voxel_union(a, b, backend="reference")
    rows = ops.voxel_lookup(a, b, assume_unique=True, backend="reference")
    both = ops.voxel_intersection(a, b, assume_unique=True, backend="reference")
    only = ops.voxel_difference(a, b, assume_unique=True, backend="reference")
    for most in WORDS:
        for count in (1, 3):
            with words_per_row(most), threads(count):
                assert all(map(torch.equal, ops.voxel_unique(a), unique)), (most, count)
                assert all(map(torch.equal, ops.voxel_union(a, b), union)), (most, count)
                assert torch.equal(ops.voxel_lookup(a, b, assume_unique=True), rows), (most, count)
                assert torch.equal(ops.voxel_isin(b, a), rows >= 0), (most, count)
                assert all(map(torch.equal, ops.voxel_intersection(a, b, assume_unique=True), both)), (most, count)
                assert all(map(torch.equal, ops.voxel_difference(a, b, assume_unique=True), only)), (most, count)


@pytest.mark.parametrize("most", WORDS)
def test_a_set_in_order_goes_with_one_that_is_not(most):
    a, b = filled((2, 90, 91, 92), 50_000, 3), filled((3, 90, 91, 92), 40_000, 4)
    ordered = in_runs(a, 1)
    with words_per_row(most):
        for pair in ((ordered, b), (b, ordered), (ordered, ordered[:1]), (ordered[:1], b), (ordered[:0], b)):
            expected = ops.voxel_union(*pair, backend="reference")
            assert all(map(torch.equal, ops.voxel_union(*pair), expected))
            same_choices(*pair)


# --- kernels per instruction set --------------------------------------------------------------------------------------


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request):
    from cvctoolkit import _native

    with _native.restricted_isa(request.param) as granted:
        if granted != request.param:
            pytest.skip(f"this machine has no {request.param}")
        yield


def steps_of(rows: Sequence[int]) -> list[tuple[int, ...]]:
    """Voxels along a line that turns into the next ones."""
    return [(0, row // 50, row // 10 % 5, row % 10) for row in rows]


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 40, 100])
def test_merges_of_any_two_sets_in_order(isa, size):
    rows = list(range(size))
    near = [
        rows, rows[::2], rows[1::2], rows[::3], rows[: size // 2], rows[size // 2 :], rows[:1], rows[-1:],
        sorted(rows + rows[::5]), sorted(rows[3:4] * 9 + rows), [size] * size, [],
    ]  # fmt: skip
    for a in near:
        for b in near:
            x, y = steps_of(a), steps_of(b)
            check_union(x, y)
            check_unique(x + y)


def test_long_merges_with_and_without_repeats(isa):
    """Of many parts, between which neither voxel nor row may be lost, and with runs of either set alone."""
    voxels = ops.voxel_unique(filled((2, 80, 80, 80), 90_000, 5), backend="reference").coords
    thirds = voxels.chunk(3)
    a, b = torch.cat(thirds[:2])[::2], torch.cat(thirds[1:])[1::3]
    for x, y in ((a, b), (b, a), (a.repeat_interleave(2, 0), b), (a, in_runs(filled((2, 80, 80, 80), 50_000, 6), 1))):
        for count in (1, 3):
            with threads(count):
                assert all(map(torch.equal, ops.voxel_union(x, y), ops.voxel_union(x, y, backend="reference")))
                both = torch.cat([x, y])
                assert all(map(torch.equal, ops.voxel_unique(both), ops.voxel_unique(both, backend="reference")))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 17, 600])
def test_one_row_unlike_the_others_is_seen_wherever_it_is(isa, size):
    """Out of range, repeated, or out of order."""
    coords = tensor(steps_of(range(size)))
    for row in range(size) if size < 20 else (0, 1, 510, 511, 512, 513, 598, 599):
        for column in range(4):
            for bad in (-1, LARGEST[column]):
                outside = coords.clone()
                outside[row, column] = bad
                with pytest.raises(ValueError, match="voxel_unique: coords"):
                    ops.voxel_unique(outside)
        repeated = torch.cat([coords[: row + 1], coords[row:]])
        with pytest.raises(ValueError, match="distinct"):
            ops.voxel_intersection(repeated, coords)
        assert ops.voxel_unique(repeated).counts[row] == 2
        moved = torch.cat([coords[:row], coords[row + 1 :], coords[row : row + 1]])
        check_unique(rows_of(moved))
        check_unique(rows_of(torch.cat([coords[row:], coords[:row]])))


# Below 2^31 cells, at that, and beyond; with one batch and with many.
@pytest.mark.parametrize(
    "box", [(1, 90, 80, 70), (3, 90, 80, 70), (1, 2047, 2048, 512), (1, 2048, 2048, 512), (2, 2048, 1024, 1024)]
)
def test_numbering_cells_on_every_instruction_set(isa, box):
    a, b = filled(box, 40_000, 7), filled(box, 35_001, 8)
    a[::7], a[3::9] = a[1::7][: len(a[::7])], a[5]
    a[0], b[1] = torch.zeros(4), torch.tensor(box) - 1  # the whole box
    with words_per_row(4096):
        for count in (1, 3):
            with threads(count):
                assert all(map(torch.equal, ops.voxel_unique(a), ops.voxel_unique(a, backend="reference")))
                assert all(map(torch.equal, ops.voxel_union(a, b), ops.voxel_union(a, b, backend="reference")))
                same_choices(a, b)


@pytest.mark.parametrize(
    "largest", [(3, 1023, 1023, 1023), (4, 5, 5, 5), (0, 1024, 9, 9), (0, 9, 1024, 9), (1, 9, 9, 1024)]
)
@pytest.mark.parametrize("ordered", [None, "a", "b"])
def test_voxels_as_large_as_short_keys_hold_and_larger(isa, largest, ordered):
    """Unordered sets come with keys of 2 + 3 × 10 bits where these suffice: of each set on its own."""
    far = torch.tensor(largest, dtype=torch.int32)
    a = (far - filled((min(largest[0], 1) + 1, 6, 6, 6), 300, 9)).clamp_min(0)
    b = (far.clamp_max(torch.tensor([3, 1023, 1023, 1023])) - filled((1, 6, 6, 6), 200, 10)).clamp_min(0).int()
    if ordered:
        a, b = (in_runs(s, 1) if ordered == name else s for s, name in ((a, "a"), (b, "b")))
    with words_per_row(1 << 25):
        for x, y in ((a, b), (b, a)):
            assert all(map(torch.equal, ops.voxel_union(x, y), ops.voxel_union(x, y, backend="reference")))
            same_choices(x, y)
            assert all(map(torch.equal, ops.voxel_unique(x), ops.voxel_unique(x, backend="reference")))
