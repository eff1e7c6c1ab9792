"""Downsampling in one go (slabs of bits, sums that stay in cache) against the specification and against sorting."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from cvctoolkit import _native
from cvctoolkit.ops import downsample, voxel_unique
from cvctoolkit.ops.voxels.dense_samples import distinct
from tests.voxel_sets import words_per_row

REDUCTIONS = [(name, own) for name in ("mean", "sum", "max") for own in (False, True)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def shell(size, origin=0):
    """A sphere's surface, a few voxels thick: short runs along z, as in a narrow band."""
    axis = torch.arange(size)
    distance = sum((axis - size / 2).square().view([-1 if k == d else 1 for k in range(3)]) for d in range(3)).sqrt()
    coords = ((distance - 0.4 * size).abs() < 2).nonzero() + origin
    return torch.cat([torch.zeros_like(coords[:, :1]), coords], 1).int()


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)) if a.is_floating_point() else torch.equal(a, b)


def assert_specified(coords, feats, **options):
    """Indices of the specification, features within rounding of it, and the bits that sorting finds."""
    found = downsample(coords, feats, **options)
    with words_per_row(0):
        assert_same(found, downsample(coords, feats, **options))
    expected = downsample(coords, feats.double(), backend="reference", **options)
    assert_same([found.coords, found.inverse, found.counts], [expected.coords, expected.inverse, expected.counts])
    assert found.feats.dtype == feats.dtype
    bound = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-6, torch.float64: 1e-14}[feats.dtype]
    addends = int(expected.counts.max()) if len(coords) else 0  # rounding grows with them
    torch.testing.assert_close(found.feats.double(), expected.feats, rtol=bound, atol=(4 + addends) * bound)


@given(
    st.integers(0, 2**16),
    st.sampled_from([(1, 1, 1), (2, 9, 7, 5), (3, 1, 30, 131), (1, 17, 2, 64), (2, 40, 1, 3)]),
    st.sampled_from([0.02, 0.4, 1.0]),
    st.sampled_from([1, 2, 3, 4, 7, (1, 2, 3), (5, 1, 1), (3, 4, 1), 65536]),
    st.sampled_from(REDUCTIONS),
    st.sampled_from([0, 1, 3, 16, 37]),
    st.sampled_from(["in order", "in order, repeated", "any order"]),
)
@settings(max_examples=60)
def test_values_and_indices(seed, shape, share, factor, reduction, channels, order):
    shape = shape if len(shape) == 4 else (1, *shape)
    count = int(share * torch.tensor(shape).prod())
    coords = distinct(generator(seed), count, shape, ordered=order != "any order")
    if order == "in order, repeated":
        coords = coords.repeat_interleave(torch.randint(1, 4, (count,), generator=generator(seed)), 0)
    feats = normal(seed, len(coords), channels)
    assert_specified(coords, feats, factor=factor, reduce=reduction[0], include_self=reduction[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("reduce", "include_self"), REDUCTIONS)
def test_every_dtype_over_many_slabs(dtype, reduce, include_self):
    coords = shell(48, origin=1)  # a box that begins within a parent
    feats = normal(1, len(coords), 5, dtype=dtype)
    assert_specified(coords, feats, reduce=reduce, include_self=include_self)


@pytest.mark.parametrize("factor", [2, 3, (2, 1, 4)])
def test_many_parents_on_a_line(factor):
    """More parents on a line than sums are kept at once, and more rows of a plane than are joined at once."""
    coords = torch.cartesian_prod(torch.tensor([0]), torch.arange(4), torch.arange(3), torch.arange(1200)).int()
    assert_specified(coords, normal(2, len(coords), 150), factor=factor)


def test_a_result_that_no_cache_keeps():
    coords = torch.cartesian_prod(torch.tensor([0, 3]), torch.arange(40), torch.arange(60), torch.arange(64)).int()
    coords = coords[torch.rand(len(coords), generator=generator(5)) < 0.7]
    feats = normal(3, len(coords), 64)
    assert downsample(coords, feats, (1, 1, 2)).feats.nbytes > 8 << 20
    for part in (feats, feats[:, :60].contiguous()):  # rows of whole cache lines, and others
        found = downsample(coords, part, (1, 1, 2))
        with words_per_row(0):
            assert_same(found, downsample(coords, part, (1, 1, 2)))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("channels", [1, 7, 32])
@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_neither_threads_nor_instruction_sets_change_a_bit(isa, channels, reduce):
    coords, results = shell(80), []
    feats = normal(4, len(coords), channels)
    with words_per_row(0):
        results.append(downsample(coords, feats, reduce=reduce))
    with _native.restricted_isa(isa):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(downsample(coords, feats, reduce=reduce))
    torch.set_num_threads(1)
    for others in results[1:]:
        assert_same(others, results[0])


def every_family():
    """Parents with every set of children, along z, along y, and one to a slab; each twice, next to its like or not."""
    families = torch.arange(1, 256)
    child = torch.arange(8)
    there = (families[:, None] >> child & 1).bool()
    octant = torch.stack([child >> 2, child >> 1 & 1, child & 1], -1)
    parents = []
    for step in ((0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 2), (0, 3, 70), (1, 2, 0)):
        corner = 2 * torch.tensor(step) * families[:, None]
        parents.append((corner[:, None] + octant)[there] + 2 * torch.tensor([len(parents) * 300, 5, 7]))
    coords = torch.cat(parents)
    return voxel_unique(torch.cat([torch.zeros_like(coords[:, :1]), coords], 1).int()).coords


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("factor", [2, (1, 2, 2), (2, 1, 2), (2, 2, 1), (1, 1, 2), 1])
def test_every_set_of_children(isa, factor):
    coords = every_family()
    with _native.restricted_isa(isa):
        assert_specified(coords, normal(10, len(coords), 3), factor=factor)
        assert_specified(coords, normal(10, len(coords), 0), factor=factor)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("channels", [1, 2, 5, 16, 31, 48, 120, 264])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_width_of_features(isa, channels, dtype):
    coords = shell(14)
    feats = normal(11, len(coords), channels, dtype=dtype)
    with _native.restricted_isa(isa):
        for reduce, include_self in REDUCTIONS:
            assert_specified(coords, feats, reduce=reduce, include_self=include_self)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_few_rows_long_lines_and_borders(isa):
    def along(axis, places):
        coords = torch.zeros(len(places), 4, dtype=torch.int32)
        coords[:, axis] = places
        return coords

    places = torch.arange(0, 3000)
    gaps = places[torch.rand(3000, generator=generator(12)) < 0.6]
    edge = torch.arange(65536 - 40, 65536)
    sparse = torch.arange(0, 65536, 97)
    given = [along(axis, p) for axis in (1, 2, 3) for p in (places, gaps, edge, sparse)]
    given += [along(3, places[:n]) for n in (1, 2, 15, 16, 17, 33)]
    given += [torch.tensor([[32767, 65535, 65535, 65535]], dtype=torch.int32)]
    # Slabs with one plane, which is even, odd; whose first, last lines have one row.
    block = torch.cartesian_prod(torch.arange(1), torch.arange(2), torch.arange(2), torch.arange(40)).int()
    given += [block[block[:, 1] == x] for x in (0, 1)] + [block[1:-1], block[40:], block[:-40], block[1:80]]
    with _native.restricted_isa(isa):
        for coords in given:
            for factor in (2, (1, 2, 1), (2, 1, 2)):
                assert_specified(coords, normal(12, len(coords), 2), factor=factor)
                assert_same(
                    downsample(coords, None, factor)[::2], downsample(coords, None, factor, backend="reference")[::2]
                )


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_slabs_unlike_the_one_before(isa):
    """Far off, tall, wide and small ones in turns, on both sides of what is taken modulo a power of two."""
    boxes = [(2, 3), (1, 3000), (500, 2), (5, 130), (70, 70), (1, 1), (3, 64), (64, 65), (200, 300), (2, 20000), (2, 2)]
    corners = [(1000, 5000), (0, 0), (65000, 65530), (127, 127), (63, 191), (65535, 65535), (40, 130), (4095, 60)]
    slabs = []
    for k, (lines, width) in enumerate(boxes + boxes[::-1]):
        y, z = corners[k % len(corners)]
        y, z = min(y, 65536 - lines), min(z, 65536 - width)
        box = torch.cartesian_prod(
            torch.tensor([0]), torch.tensor([k]), torch.arange(lines) + y, torch.arange(width) + z
        )
        kept = torch.rand(len(box), generator=generator(k)) < 0.8
        kept[0] = True
        slabs.append(box[kept])
    coords = torch.cat(slabs).int()
    with _native.restricted_isa(isa):
        for factor in (2, (1, 2, 2), (2, 2, 1), (1, 1, 2)):
            assert_specified(coords, normal(13, len(coords), 1), factor=factor)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_disorder_anywhere_is_seen(isa):
    coords = shell(24)
    feats = normal(14, len(coords), 2)
    with _native.restricted_isa(isa):
        for row in [*range(1, 40), *range(900, 935), len(coords) - 1]:
            swapped = coords.clone()
            swapped[[row - 1, row]] = coords[[row, row - 1]]
            repeated = coords.clone()
            repeated[row] = coords[row - 1]
            for given_coords in (swapped, repeated):
                found = downsample(given_coords, feats)
                expected = downsample(given_coords, feats.double(), backend="reference")
                assert_same(
                    [found.coords, found.inverse, found.counts], [expected.coords, expected.inverse, expected.counts]
                )
                torch.testing.assert_close(found.feats.double(), expected.feats, rtol=1e-5, atol=1e-5)
            for column in range(4):
                wrong = coords.clone()
                wrong[row, column] += 65536
                with pytest.raises(ValueError, match=r"downsample: coords"):
                    downsample(wrong, feats)


def test_maxima_of_nan_infinity_and_equals():
    coords = torch.tensor([[0, 0, 0, z] for z in range(8)], dtype=torch.int32)
    nan, inf = float("nan"), float("inf")
    feats = torch.tensor([[nan, 1.0, -inf, 2.0, 2.0, 2.0, -1.0, nan], [1.0, nan, -inf, -inf, -3.0, -3.0, inf, -inf]]).T
    found = downsample(coords, feats.contiguous(), reduce="max").feats
    assert_same([found], [torch.tensor([[nan, nan], [2.0, -inf], [2.0, -3.0], [nan, inf]])])
    found = downsample(coords, feats.contiguous(), reduce="max", include_self=True).feats
    assert_same([found], [torch.tensor([[nan, nan], [2.0, 0.0], [2.0, 0.0], [nan, inf]])])


def test_one_parity():
    coords = shell(40) * torch.tensor([1, 2, 2, 2], dtype=torch.int32)
    feats = normal(5, len(coords), 3)
    found = downsample(coords + torch.tensor([0, 1, 0, 1], dtype=torch.int32), feats)
    assert torch.equal(found.feats, feats) and torch.equal(found.inverse, torch.arange(len(coords)))


def test_disorder_far_behind_the_first_rows():
    coords = shell(64)
    feats = normal(6, len(coords), 4)
    for swap in ([5000, 5001], [len(coords) - 1, 0], [3, len(coords) // 2]):
        mixed = coords.clone()
        mixed[swap] = coords[swap[::-1]]
        assert_specified(mixed, feats)
        assert_specified(mixed, feats, factor=65536)
    for row in ([0, 70000, 0, 0], [0, 0, -1, 0], [-1, 0, 0, 0], [40000, 0, 0, 0]):
        wrong = coords.clone()
        wrong[9000] = torch.tensor(row)
        for given_feats in (None, feats):
            with pytest.raises(ValueError, match=r"downsample: coords"):
                downsample(wrong, given_feats)


def test_far_apart():
    """Boxes that are nearly empty: bits would take more memory than the voxels."""
    coords = torch.randint(0, 65536, (20000, 4), generator=generator(7)) * torch.tensor([0, 1, 1, 1])
    coords = voxel_unique(coords.int()).coords
    assert_specified(coords, normal(7, len(coords), 2), factor=2)
    assert_specified(coords, normal(7, len(coords), 2), factor=(4096, 4096, 16))
    # Dense in one slab, far apart in another.
    both = torch.cat([shell(40), coords + torch.tensor([1, 0, 0, 0], dtype=torch.int32)])
    assert_specified(both, normal(8, len(both), 2))


def test_slabs_of_many_planes():
    coords = torch.cat([shell(64), shell(64, origin=300) + torch.tensor([1, 0, 0, 0], dtype=torch.int32)])
    for factor in ((64, 1, 1), (65536, 3, 1), (1, 65536, 65536)):
        assert_specified(coords, normal(9, len(coords), 6), factor=factor)
