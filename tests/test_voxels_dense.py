"""Dense ↔ sparse and features between sets of voxels: round trips, dense oracles, bad input."""

import math
from contextlib import contextmanager
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from cvctoolkit import _native
from cvctoolkit.ops import (
    from_dense,
    gather_features,
    occupancy_to_coords,
    reduce_features,
    scatter_features,
    to_dense,
    voxel_difference,
    voxel_lookup,
    voxel_union,
)
from cvctoolkit.ops.voxels.dense_samples import distinct

BACKENDS = ["native", "reference"]
shapes = st.tuples(st.integers(1, 3), *[st.integers(1, 9)] * 3)
seeds = st.integers(0, 2**16)


def available_memory():
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return 0
    return 1024 * int(text.split("MemAvailable:")[1].split()[0])


def generator(seed):
    return torch.Generator().manual_seed(seed)


def some_voxels(seed, shape, share, ordered=True):
    count = int(share * np.prod(shape))
    return distinct(generator(seed), count, shape, ordered=ordered)


@pytest.mark.parametrize("backend", BACKENDS)
@given(shapes, seeds, st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.booleans(), st.integers(0, 5))
@settings(max_examples=25)
def test_dense_and_back_is_the_identity(backend, shape, seed, share, ordered, channels):
    coords = some_voxels(seed, shape, share, ordered)
    feats = torch.randn(len(coords), channels, generator=generator(seed))
    dense = to_dense(coords, feats, shape[1:], shape[0], fill_value=float("nan"), backend=backend)
    assert dense.shape == (shape[0], channels, *shape[1:]) and dense.is_contiguous()
    assert torch.equal(from_dense(dense, coords, backend=backend), feats)
    if channels:
        known = (~dense.isnan()).all(1)
        assert torch.equal(occupancy_to_coords(known, backend=backend), coords[coords_order(coords)])


def coords_order(coords):
    return torch.from_numpy(np.lexsort(coords.numpy().T[::-1]).copy())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8])
@given(shapes, seeds, st.sampled_from([0.0, 0.2, 0.5, 250.0]))
@settings(max_examples=10)
def test_occupancy_is_numpys_nonzero(backend, dtype, shape, seed, threshold):
    values = torch.randint(0, 9, shape, generator=generator(seed)) / 8
    occupancy = values.to(dtype) if dtype.is_floating_point else (values * 255).to(dtype)
    found = occupancy_to_coords(occupancy, threshold, backend=backend)
    expected = np.argwhere((occupancy > threshold).numpy())
    assert found.dtype == torch.int32 and np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_occupancy_of_lines_longer_than_a_word(backend):
    occupancy = torch.rand(2, 3, 5, 201, generator=generator(0))
    occupancy[0, 1] = 1.0
    occupancy[1, :, 2] = float("nan")
    expected = (occupancy > 0.7).nonzero()
    assert torch.equal(occupancy_to_coords(occupancy, 0.7, backend=backend).long(), expected)
    assert torch.equal(occupancy_to_coords(occupancy[:, None], 0.7, backend=backend).long(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_moves_unchanged(backend, dtype):
    shape = (2, 5, 6, 7)
    coords = some_voxels(3, shape, 0.4)
    feats = torch.randn(len(coords), 3, generator=generator(1)).to(dtype)
    expected = torch.full((*shape, 3), 0.25, dtype=dtype)
    expected[tuple(coords.long().T)] = feats
    dense = to_dense(coords, feats, shape[1:], 2, fill_value=0.25, backend=backend)
    assert torch.equal(dense, expected.movedim(-1, 1))
    assert torch.equal(from_dense(dense, coords, backend=backend), feats)
    index = torch.tensor([5, -1, 0, 5])
    rows = gather_features(feats, index, fill_value=2.0, backend=backend)
    assert torch.equal(rows[[0, 2, 3]], feats[[5, 0, 5]]) and (rows[1] == 2).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_indexing(backend):
    shape = (2, 4, 5, 3)
    coords = some_voxels(5, shape, 0.5)
    place = tuple(coords.long().T)
    feats = torch.randn(len(coords), 2, generator=generator(5), requires_grad=True)
    weight = torch.randn(2, 2, 4, 5, 3, generator=generator(6))
    (found,) = torch.autograd.grad((to_dense(coords, feats, shape[1:], 2, backend=backend) * weight).sum(), feats)
    assert torch.equal(found, weight.movedim(1, -1)[place])
    dense = torch.randn(2, 2, 4, 5, 3, generator=generator(7), requires_grad=True)
    rows = torch.randn(len(coords), 2, generator=generator(8))
    (found,) = torch.autograd.grad((from_dense(dense, coords, backend=backend) * rows).sum(), dense)
    expected = torch.zeros(*shape, 2)
    expected[place] = rows
    assert torch.equal(found, expected.movedim(-1, 1))


def test_twice_differentiable():
    coords = some_voxels(5, (1, 3, 3, 3), 0.5)
    feats = torch.randn(len(coords), 2, dtype=torch.float64, generator=generator(5), requires_grad=True)
    index = torch.tensor([0, 3, -1, 3, 2])
    checks = [
        lambda f: to_dense(coords, f, (3, 3, 3), 1).pow(3),
        lambda f: gather_features(f, index).pow(3),
        lambda f: scatter_features(f[:5], torch.tensor([4, -1, 0, 2, 7]), 9).pow(3),
        *(
            lambda f, r=r: reduce_features(f[:5], torch.tensor([1, 1, 0, 1, -1]), 3, reduce=r).pow(3)
            for r in ("sum", "mean", "max")
        ),
    ]
    for check in checks:
        assert torch.autograd.gradgradcheck(check, (feats,))


@given(seeds, st.booleans())
@settings(max_examples=20)
def test_a_part_in_its_superset(seed, ordered):
    """The masked-guidance map: a part's features over the union, and back."""
    a, b = some_voxels(seed, (2, 5, 5, 5), 0.3, ordered), some_voxels(seed + 1, (2, 5, 5, 5), 0.2, ordered)
    feats = torch.randn(len(a), 3, generator=generator(seed))
    union = voxel_union(a, b)
    rows = voxel_lookup(a, union.coords)
    spread = gather_features(feats, rows, fill_value=-9.0)
    assert torch.equal(scatter_features(feats, union.index_a, len(union.coords), fill_value=-9.0), spread)
    assert torch.equal(gather_features(spread, union.index_a), feats)
    only_b = voxel_difference(b, a).coords
    assert torch.equal(spread[voxel_lookup(union.coords, only_b)], torch.full((len(only_b), 3), -9.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduce,torch_name", [("sum", "sum"), ("mean", "mean"), ("max", "amax")])
@pytest.mark.parametrize("include_self", [False, True])
@given(seeds, st.integers(0, 60), st.integers(1, 9), st.booleans())
@settings(max_examples=12)
def test_reductions_are_scatter_reduce(backend, reduce, torch_name, include_self, seed, count, rows, ordered):
    index = torch.randint(rows, (count,), generator=generator(seed))
    index = index.sort().values if ordered else index
    feats = torch.randn(count, 3, generator=generator(seed + 1), dtype=torch.float64)
    found = reduce_features(feats, index, rows, reduce=reduce, include_self=include_self, backend=backend)
    zeros = torch.zeros(rows, 3, dtype=torch.float64)
    expected = zeros.scatter_reduce(0, index[:, None].expand(-1, 3), feats, torch_name, include_self=include_self)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_propagates_through_reductions(backend):
    feats = torch.tensor([[1.0], [float("nan")], [3.0]])
    for reduce in ("sum", "mean", "max"):
        found = reduce_features(feats, torch.tensor([0, 0, 1]), 2, reduce=reduce, backend=backend)
        assert found[0].isnan() and found[1] == 3


def test_the_thread_count_does_not_change_sums():
    feats = torch.randn(20000, 5, generator=generator(1))
    for index in (torch.randint(300, (20000,), generator=generator(2)), torch.arange(20000) // 7):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([reduce_features(feats, index, 3000, reduce=r) for r in ("sum", "mean", "max")])
        torch.set_num_threads(1)
        for others in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], others))


@contextmanager
def on(isa, threads):
    before = torch.get_num_threads()
    with _native.restricted_isa(isa) as granted:
        if granted != isa:
            pytest.skip(f"this machine has no {isa}")
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("channels", [1, 2, 5, 8, 11, 16])
def test_many_voxels_of_volumes_that_begin_within_a_cache_line(isa, dtype, ordered, channels):
    """Groups of channels, whole and in part; blocks of voxels, whole vectors of them and what is left."""
    shape = (3, 31, 29, 37)
    coords = some_voxels(5, shape, 0.6, ordered)
    dense = torch.randn(shape[0], channels, *shape[1:], generator=generator(6)).to(dtype)
    b, x, y, z = coords.long().unbind(1)
    expected = dense[b, :, x, y, z]
    for threads in (1, 3):
        with on(isa, threads):
            for count in (len(coords), 700, 513, 129, 128, 127, 72, 8, 7, 3, 1, 0):
                assert torch.equal(from_dense(dense, coords[:count], assume_unique=True), expected[:count])


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("channels", [8, 16, 24, 32, 64])
def test_rows_written_past_the_caches(isa, channels):
    """More than 4 MiB of whole groups, from memory that begins anywhere; rows of whole cache lines, and others."""
    shape = (2, 70, 50, 41)
    coords = some_voxels(7, shape, 0.6)
    for dtype in (torch.float64, torch.float32, torch.float16):
        dense = torch.randn(2, channels, *shape[1:], generator=generator(6)).to(dtype)
        with on(isa, 2):
            assert torch.equal(from_dense(dense, coords), from_dense(dense, coords, backend="reference"))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("lines", range(1, 12))
def test_blocks_of_few_lines(isa, lines):
    """Fewer lines of the cache than channels, which are fetched one line behind each other."""
    dense = torch.randn(1, 9, 1, 16, 16, generator=generator(8))
    coords = torch.cartesian_prod(*[torch.arange(n, dtype=torch.int32) for n in (1, 1, lines, 16)])
    with on(isa, 1):
        assert torch.equal(from_dense(dense, coords), from_dense(dense, coords, backend="reference"))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("count", [1, 8, 63, 64, 65, 200])
def test_a_voxel_outside_or_twice_is_seen_wherever_it_is(isa, count):
    shape = (2, 5, 7, 9)
    coords = some_voxels(3, shape, 1.0)[-count:]
    dense = torch.randn(2, 3, *shape[1:], generator=generator(4))
    rows = sorted({*range(min(count, 18)), *range(max(count - 18, 0), count)})
    with on(isa, 1):
        for row in rows:
            for column in range(4):
                for bad in (-1, shape[column], -(2**31), 2**31 - 1):
                    outside = coords.clone()
                    outside[row, column] = bad
                    with pytest.raises(ValueError, match=r"from_dense: .* a row outside"):
                        from_dense(dense, outside)
            for other in {0, row // 2, max(row - 1, 0), count - 1} - {row}:
                twice = coords.clone()
                twice[row] = coords[other]
                with pytest.raises(ValueError, match=r"from_dense: .* one twice"):
                    from_dense(dense, twice)
                again = from_dense(dense, twice, assume_unique=True)
                assert torch.equal(again, from_dense(dense, twice, assume_unique=True, backend="reference"))
            turned = coords.roll(row, 0)
            assert torch.equal(from_dense(dense, turned), from_dense(dense, turned, backend="reference"))


def test_voxels_twice_where_one_task_ends_and_the_next_begins():
    coords, dense = some_voxels(3, (1, 40, 40, 40), 0.7), torch.zeros(1, 1, 40, 40, 40)
    tasks = len(coords) // 2**12
    size, rest = divmod(len(coords), tasks)
    assert tasks > 2 and not rest
    for row in [end + step for end in (size, tasks // 2 * size) for step in (-1, 0, 1)]:
        twice = torch.cat([coords[:row], coords[row - 1 : -1]])
        for threads in (1, 3):
            with on("baseline", threads), pytest.raises(ValueError, match="one twice"):
                from_dense(dense, twice)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize(
    "shape", [(1, 65536, 1, 3), (1, 1, 65536, 3), (1, 2, 1, 65536), (32768, 1, 2, 1), (3, 65536, 2, 1)]
)
def test_voxels_of_the_longest_volumes(isa, shape):
    """Their cells' numbers are products of the largest factors that there are."""
    far = torch.tensor(shape, dtype=torch.int32) - 1
    steps = torch.cartesian_prod(*[torch.arange(min(n, 3), dtype=torch.int32) for n in shape])
    coords = torch.unique(torch.cat([steps, far - steps]), dim=0)
    dense = torch.arange(2 * math.prod(shape), dtype=torch.float32).view(shape[0], 2, *shape[1:])
    with on(isa, 1):
        assert torch.equal(from_dense(dense, coords), from_dense(dense, coords, backend="reference"))


def test_half_precision_accumulates_in_float32():
    feats = torch.full((5000, 1), 0.1, dtype=torch.float16)
    found = reduce_features(feats, torch.zeros(5000, dtype=torch.int64), 1, reduce="sum")
    assert abs(float(found) - 5000 * float(feats[0])) < 0.5


COORDS = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3]], dtype=torch.int32)
FEATS = torch.ones(2, 3)
SHAPE = (4, 4, 4)
TWICE, TWICE_IN_ORDER = COORDS[[0, 1, 0]], COORDS[[0, 0, 1]]
FAR = COORDS.long() + 2**40
ONES = torch.ones(3, 1)
BAD = [
    (occupancy_to_coords, dict(occupancy=[1.0]), TypeError, "occupancy must be a torch.Tensor"),
    (occupancy_to_coords, dict(occupancy=torch.ones(4, 4, 4)), ValueError, "occupancy must have shape"),
    (occupancy_to_coords, dict(occupancy=torch.ones(1, 2, 4, 4, 4)), ValueError, "occupancy must have shape"),
    (occupancy_to_coords, dict(occupancy=torch.ones(1, 4, 4, 4).long()), ValueError, "occupancy must have dtype"),
    (occupancy_to_coords, dict(occupancy=torch.ones(1, 1, 1, 1).expand(1, 1, 1, 65537)), ValueError, "at most"),
    (occupancy_to_coords, dict(occupancy=torch.ones(1, 4, 4, 4), threshold="0.5"), TypeError, "threshold"),
    (occupancy_to_coords, dict(occupancy=torch.ones(1, 4, 4, 4), threshold=float("nan")), ValueError, "finite"),
    (to_dense, dict(coords=COORDS.float(), feats=FEATS, spatial_shape=SHAPE, batch_size=1), ValueError, "coords"),
    (to_dense, dict(coords=COORDS, feats=FEATS[:1], spatial_shape=SHAPE, batch_size=1), ValueError, "one row per"),
    (to_dense, dict(coords=COORDS, feats=FEATS.long(), spatial_shape=SHAPE, batch_size=1), ValueError, "dtype"),
    (to_dense, dict(coords=COORDS, feats=FEATS, spatial_shape=4, batch_size=1), TypeError, "three integers"),
    (to_dense, dict(coords=COORDS, feats=FEATS, spatial_shape=(4, 4, 3), batch_size=1), ValueError, "a row outside"),
    (to_dense, dict(coords=-COORDS, feats=FEATS, spatial_shape=SHAPE, batch_size=1), ValueError, "a row outside"),
    (
        to_dense,
        dict(coords=COORDS.long() + 2**40, feats=FEATS, spatial_shape=SHAPE, batch_size=1),
        ValueError,
        "outside",
    ),
    (to_dense, dict(coords=COORDS, feats=FEATS, spatial_shape=SHAPE, batch_size=0), ValueError, "a row outside"),
    (to_dense, dict(coords=TWICE, feats=ONES, spatial_shape=SHAPE, batch_size=1), ValueError, "one twice"),
    (
        to_dense,
        dict(coords=TWICE_IN_ORDER, feats=ONES, spatial_shape=SHAPE, batch_size=1),
        ValueError,
        "one twice",
    ),
    (to_dense, dict(coords=COORDS, feats=FEATS, spatial_shape=[65536] * 3, batch_size=1), ValueError, "does not fit"),
    (from_dense, dict(dense=torch.ones(1, 2, 4, 4), coords=COORDS), ValueError, "dense must have shape"),
    (from_dense, dict(dense=torch.ones(1, 2, 1, 4, 4), coords=COORDS), ValueError, "a row outside"),
    (from_dense, dict(dense=torch.ones(1, 2, *SHAPE), coords=TWICE), ValueError, "one twice"),
    (from_dense, dict(dense=torch.ones(1, 2, *SHAPE), coords=COORDS.to("meta")), ValueError, "coords must be on cpu"),
    (gather_features, dict(feats=FEATS, index=torch.tensor([2])), ValueError, r"in \[0, 2\), got 2"),
    (gather_features, dict(feats=FEATS, index=torch.tensor([-2])), ValueError, "got -2"),
    (gather_features, dict(feats=FEATS, index=torch.tensor([0.0])), ValueError, "index must have dtype"),
    (scatter_features, dict(feats=FEATS, index=torch.tensor([1, 1]), num_rows=3), ValueError, "one twice"),
    (scatter_features, dict(feats=FEATS, index=torch.tensor([1, 3]), num_rows=3), ValueError, "got 3"),
    (scatter_features, dict(feats=FEATS, index=torch.tensor([1]), num_rows=3), ValueError, "index must have shape"),
    (scatter_features, dict(feats=FEATS, index=torch.tensor([1, 0]), num_rows=-1), ValueError, "num_rows must be"),
    (reduce_features, dict(feats=FEATS, index=torch.tensor([1, 5]), num_rows=3), ValueError, "got 5"),
    (reduce_features, dict(feats=FEATS, index=torch.tensor([1, 0]), num_rows=3, reduce="min"), ValueError, "reduce"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function,kwargs,error,message", BAD, ids=[f"{f.__name__}-{m[:20]}" for f, _, _, m in BAD])
def test_bad_input(function, kwargs, error, message, backend):
    with pytest.raises(error, match=message) as caught:
        function(**kwargs, backend=backend)
    assert function.__name__ in str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_assume_unique_takes_the_lowest_row(backend):
    feats = torch.tensor([[1.0], [2.0], [3.0]])
    for coords in (TWICE, TWICE_IN_ORDER):
        options = dict(spatial_shape=SHAPE, batch_size=1, assume_unique=True, backend=backend)
        dense = to_dense(coords, feats, **options)
        assert dense[0, 0, 0, 0, 0] == 1 and dense[0, 0, 1, 2, 3] == feats[coords[:, 1] == 1][0]


@pytest.mark.slow
@pytest.mark.skipif(available_memory() < 10 << 30, reason="needs 10 GiB of free memory")
def test_volumes_of_more_than_2_to_the_31_cells():
    shape = (1, 2, 32769, 32768)
    coords = torch.tensor([[0, 0, 0, 0], [0, 0, 32768, 32767], [0, 1, 0, 1], [0, 1, 32768, 32767]], dtype=torch.int32)
    occupancy = torch.zeros(shape, dtype=torch.uint8)
    occupancy[tuple(coords.long().T)] = 1
    assert torch.equal(occupancy_to_coords(occupancy), coords)
    del occupancy
    feats = torch.arange(1.0, 5.0, dtype=torch.float16)[:, None]
    volume = to_dense(coords, feats, shape[1:], 1)
    assert volume.numel() > 2**31
    order = [3, 1, 0, 2]
    assert torch.equal(from_dense(volume, coords[order]), feats[order])
