"""Resampling and trilinear sampling: dense pooling and grid_sample as oracles, round trips, bad input."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from cvctoolkit.ops import (
    channel_to_spatial,
    downsample,
    from_dense,
    gather_features,
    sample_trilinear,
    spatial_to_channel,
    subdivide,
    to_dense,
    upsample,
    voxel_lookup,
    voxel_sort,
    voxel_unique,
)
from cvctoolkit.ops.voxels.dense_samples import distinct
from tests.voxel_sets import words_per_row

BACKENDS = ["native", "reference"]
seeds = st.integers(0, 2**16)
SHAPE = (2, 8, 8, 8)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def some_voxels(seed, share, ordered=True, shape=SHAPE):
    return distinct(generator(seed), int(share * np.prod(shape)), shape, ordered=ordered)


def normal(seed, *shape):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seeds, st.sampled_from([0.02, 0.3, 1.0]), st.booleans())
@settings(max_examples=12)
def test_sums_are_dense_pooling(backend, seed, share, ordered):
    coords = some_voxels(seed, share, ordered)
    feats = normal(seed, len(coords), 3).requires_grad_()
    down = downsample(coords, feats, 2, reduce="sum", backend=backend)
    dense = to_dense(coords, feats, SHAPE[1:], SHAPE[0])
    pooled = 8 * F.avg_pool3d(dense, 2)
    assert torch.allclose(to_dense(down.coords, down.feats, (4, 4, 4), 2), pooled)
    weight = normal(seed + 1, *down.feats.shape)
    (found,) = torch.autograd.grad((down.feats * weight).sum(), feats, retain_graph=True)
    (expected,) = torch.autograd.grad((from_dense(pooled, down.coords) * weight).sum(), feats)
    assert torch.allclose(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seeds, st.sampled_from([0.1, 0.5]))
@settings(max_examples=12)
def test_maxima_are_dense_pooling(backend, seed, share):
    coords = some_voxels(seed, share)
    feats = normal(seed, len(coords), 2).requires_grad_()
    down = downsample(coords, feats, 2, reduce="max", backend=backend)
    pooled = F.max_pool3d(to_dense(coords, feats, SHAPE[1:], 2, fill_value=float("-inf")), 2)
    assert torch.equal(down.feats, from_dense(pooled, down.coords))
    weight = normal(seed + 1, *down.feats.shape)
    (found,) = torch.autograd.grad((down.feats * weight).sum(), feats, retain_graph=True)
    (expected,) = torch.autograd.grad((from_dense(pooled, down.coords) * weight).sum(), feats)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_mean_and_the_quirk_that_released_weights_need(backend):
    coords = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1], [0, 2, 0, 0]], dtype=torch.int32)
    feats = torch.tensor([[1.0], [2.0], [5.0]])
    exact = downsample(coords, feats, 2, backend=backend)
    assert exact.feats.tolist() == [[1.5], [5.0]] and exact.counts.tolist() == [2, 1]
    quirk = downsample(coords, feats, 2, include_self=True, backend=backend)
    # What Direct3D-S2 and TRELLIS write: scatter_reduce into zeros, include_self left at its default.
    code, inverse = torch.unique(coords[:, 1] // 2, return_inverse=True)
    expected = torch.zeros(len(code), 1).scatter_reduce(0, inverse[:, None], feats, "mean")
    assert torch.equal(quirk.feats, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seeds, st.sampled_from([0.05, 0.4, 1.0]), st.booleans(), st.tuples(*[st.integers(1, 5)] * 3))
@settings(max_examples=20)
def test_coarse_coordinates_are_a_unique_division(backend, seed, share, ordered, factor):
    coords = some_voxels(seed, share, ordered)
    down = downsample(coords, factor=factor, backend=backend)
    unique = voxel_unique(coords // torch.tensor([1, *factor], dtype=torch.int32))
    for a, b in zip((down.coords, down.inverse, down.counts), (unique.coords, unique.inverse, unique.counts)):
        assert torch.equal(a, b)
    assert down.feats is None


@pytest.mark.parametrize("backend", BACKENDS)
@given(seeds, st.sampled_from([0.0, 0.05, 0.5]), st.booleans())
@settings(max_examples=15)
def test_downsample_of_subdivide_is_the_identity(backend, seed, share, ordered):
    coords = some_voxels(seed, share, ordered)
    feats = normal(seed, len(coords), 2)
    fine = subdivide(coords, feats, backend=backend)
    assert torch.equal(fine.feats, feats[fine.parent])
    assert torch.equal(fine.coords // torch.tensor([1, 2, 2, 2]), coords[fine.parent])
    assert torch.equal(fine.coords, voxel_unique(fine.coords).coords), "out of order, or twice"
    assert len(fine.coords) == 8 * len(coords)
    order = voxel_sort(coords).permutation
    for reduce in ("mean", "max"):
        back = downsample(fine.coords, fine.feats, 2, reduce=reduce, backend=backend)
        assert torch.equal(back.coords, coords[order])
        assert torch.allclose(back.feats, feats[order], rtol=1e-15 if reduce == "mean" else 0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seeds, st.sampled_from([0.05, 0.5]), st.booleans(), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=15)
def test_upsample_takes_the_named_children(backend, seed, share, ordered, keep):
    coords = some_voxels(seed, share, ordered)
    mask = torch.rand(len(coords), 8, generator=generator(seed)) < keep
    feats = normal(seed, len(coords), 2)
    fine = upsample(coords, feats, mask, backend=backend)
    expected = {}
    for row, (b, x, y, z) in enumerate(coords.tolist()):
        for child, (i, j, k) in enumerate(itertools.product((0, 1), repeat=3)):
            if mask[row, child]:
                expected[b, 2 * x + i, 2 * y + j, 2 * z + k] = row
    assert [tuple(c) for c in fine.coords.tolist()] == sorted(expected)
    assert fine.parent.tolist() == [expected[k] for k in sorted(expected)]
    assert torch.equal(fine.feats, feats[fine.parent])


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_voxels_have_repeated_children(backend):
    coords = torch.tensor([[0, 3, 1, 2], [0, 1, 1, 1], [0, 3, 1, 2]])
    fine = subdivide(coords, backend=backend)
    assert fine.parent[:8].eq(1).all() and fine.parent[8:].tolist() == [0, 2] * 8
    assert torch.equal(fine.coords[8::2], fine.coords[9::2])


@pytest.mark.parametrize("backend", BACKENDS)
@given(seeds, st.sampled_from([0.05, 0.6]), st.booleans())
@settings(max_examples=12)
def test_space_to_channels_and_back(backend, seed, share, ordered):
    coords = some_voxels(seed, share, ordered)
    feats = normal(seed, len(coords), 3)
    coarse = spatial_to_channel(coords, feats, backend=backend)
    dense = to_dense(coords, feats, SHAPE[1:], 2).view(2, 3, 4, 2, 4, 2, 4, 2)
    stacked = dense.permute(0, 3, 5, 7, 1, 2, 4, 6).reshape(2, 24, 4, 4, 4)
    assert torch.equal(coarse.feats, from_dense(stacked, coarse.coords))
    children = subdivide(coarse.coords)
    mask = torch.zeros(len(coarse.coords), 8, dtype=torch.bool)
    x, y, z = (children.coords[:, 1:] % 2).unbind(-1)
    mask[children.parent, (4 * x + 2 * y + z).long()] = voxel_lookup(coords, children.coords) >= 0
    back = channel_to_spatial(coarse.coords, coarse.feats, mask, backend=backend)
    order = voxel_sort(coords).permutation
    assert torch.equal(back.coords, coords[order]) and torch.equal(back.feats, feats[order])


class TestTrilinear:
    @staticmethod
    def dense_sample(dense, points, low, high):
        """grid_sample with the voxel-centre convention is align_corners=False over the bounds; its x is our z."""
        grid = (2 * (points - low) / (high - low) - 1).flip(-1)
        return F.grid_sample(dense, grid[None, None, None], align_corners=False)[0, :, 0, 0].T

    @pytest.mark.parametrize("backend", BACKENDS)
    @given(
        seeds,
        st.sampled_from([0.0, 0.2, 1.0]),
        st.sampled_from([(-1.0, 1.0), (-0.5, 2.0)]),
        st.booleans(),
        st.sampled_from([1, 3, 8, 21]),  # less than a vector, whole ones, several and a rest
    )
    @settings(max_examples=20)
    def test_values_and_gradients_are_grid_sample(self, backend, seed, share, bounds, ordered, channels):
        low, high = bounds
        coords = some_voxels(seed, share, ordered, (1, 8, 8, 8))
        feats = normal(seed, len(coords), channels).requires_grad_()
        points = (torch.rand(60, 3, generator=generator(seed), dtype=torch.float64) * 1.3 - 0.15) * (high - low) + low
        points.requires_grad_()
        found = sample_trilinear(coords, feats, points, 8, bounds=bounds, backend=backend)
        expected = self.dense_sample(to_dense(coords, feats, (8, 8, 8), 1), points, low, high)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
        weight = normal(seed + 1, *found.shape)
        got = torch.autograd.grad((found * weight).sum(), (feats, points))
        want = torch.autograd.grad((expected * weight).sum(), (feats, points))
        for a, b in zip(got, want):
            assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("backend", BACKENDS)
    @given(seeds, st.sampled_from([0.1, 0.5]))
    @settings(max_examples=12)
    def test_renormalised_is_a_quotient_of_two_samples(self, backend, seed, share):
        coords = some_voxels(seed, share, shape=(1, 8, 8, 8))
        feats = normal(seed, len(coords), 2).requires_grad_()
        points = (2.2 * torch.rand(50, 3, generator=generator(seed), dtype=torch.float64) - 1.1).requires_grad_()
        found = sample_trilinear(coords, feats, points, 8, outside="renormalize", backend=backend)
        dense = to_dense(coords, torch.cat([feats, torch.ones_like(feats[:, :1])], 1), (8, 8, 8), 1)
        sums = self.dense_sample(dense, points, -1.0, 1.0)
        known = sums[:, 2:] > 0
        expected = torch.where(known, sums[:, :2] / torch.where(known, sums[:, 2:], 1.0), 0.0)
        assert torch.allclose(found, expected, rtol=1e-8, atol=1e-10)
        weight = normal(seed + 1, *found.shape) * (sums[:, 2:].detach() > 1e-3)  # near 0 the quotient has no digits
        got = torch.autograd.grad((found * weight).sum(), (feats, points))
        want = torch.autograd.grad((expected * weight).sum(), (feats, points))
        for a, b in zip(got, want):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_constant_stays_constant_and_centres_are_exact(self, backend):
        coords = some_voxels(3, 0.4)
        feats = normal(4, len(coords), 2)
        centers = (coords[:, 1:].double() + 0.5) * (2 / 8) - 1
        batch = coords[:, 0]
        for outside in ("zero", "renormalize"):
            options = dict(batch_index=batch, outside=outside, backend=backend)
            assert torch.allclose(sample_trilinear(coords, feats, centers, 8, **options), feats)
        moved = centers + 0.11
        constant = sample_trilinear(coords, torch.ones_like(feats), moved, 8, batch_index=batch, outside="renormalize")
        assert torch.allclose(constant, torch.ones_like(constant))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_far_points_and_those_that_are_not_finite(self, backend):
        coords = some_voxels(3, 1.0)
        feats = torch.ones(len(coords), 2, requires_grad=True)
        points = torch.tensor([[float("nan"), 0, 0], [0, float("inf"), 0], [1e30, 0, 0], [0, 0, -3e38], [3.0, 0, 0]])
        points.requires_grad_()
        for outside in ("zero", "renormalize"):
            found = sample_trilinear(coords, feats, points, 8, outside=outside, backend=backend)
            assert (found == 0).all()
            for grad in torch.autograd.grad(found.sum(), (feats, points)):
                assert (grad == 0).all()

    def test_twice_differentiable(self):
        coords = some_voxels(3, 0.5, shape=(1, 4, 4, 4))
        feats, points = normal(1, len(coords), 2).requires_grad_(), normal(2, 6, 3).mul(0.4).requires_grad_()
        for outside in ("zero", "renormalize"):
            assert torch.autograd.gradgradcheck(
                lambda f, p, o=outside: sample_trilinear(coords, f, p, 4, outside=o), (feats, points)
            )

    @given(seeds, st.sampled_from([0.01, 0.3, 1.0]), st.booleans(), st.integers(1, 130))
    @settings(max_examples=25)
    def test_bits_and_searches_find_the_same(self, seed, share, ordered, depth):
        coords = some_voxels(seed, share, ordered, (2, 5, 4, depth))
        coords[:, 3] += 7  # words of bits begin at the box, not at 0
        feats = torch.arange(1.0, len(coords) + 1)[:, None]
        points = torch.rand(200, 3, generator=generator(seed)) * torch.tensor([6.0, 5.0, depth + 9.0]) * (2 / 256) - 1
        batch = torch.randint(3, (200,), generator=generator(seed))
        found = sample_trilinear(coords, feats, points, 256, batch_index=batch)
        with words_per_row(0):
            assert torch.equal(found, sample_trilinear(coords, feats, points, 256, batch_index=batch))
        expected = sample_trilinear(coords, feats, points, 256, batch_index=batch, backend="reference")
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("channels", [3, 24])
    def test_the_thread_count_does_not_change_anything(self, channels):
        # Several ranges of points, of voxels, and of rows that sums are dealt to.
        coords = some_voxels(3, 0.5, shape=(1, 40, 40, 40))
        feats = torch.randn(len(coords), channels, generator=generator(1)).requires_grad_()
        points = (2 * torch.rand(40000, 3, generator=generator(2)) - 1).requires_grad_()
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            values = sample_trilinear(coords, feats, points, 40)
            results.append([values, *torch.autograd.grad(values.sum(), (feats, points))])
        torch.set_num_threads(1)
        for others in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], others))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("coords", [torch.zeros(1, 4), torch.tensor([[0, 7, 7, 7]]), 2 * torch.ones(1, 4)])
def test_one_voxel(coords, backend):
    coords = coords.to(torch.int32)
    assert torch.equal(downsample(coords, backend=backend).coords, coords // torch.tensor([1, 2, 2, 2]))
    assert len(subdivide(coords, backend=backend).coords) == 8


def test_all_voxels_at_one_parity():
    coords = some_voxels(1, 0.5) * torch.tensor([1, 2, 2, 2]) + torch.tensor([0, 1, 1, 1])
    down = downsample(coords)
    assert torch.equal(down.coords * torch.tensor([1, 2, 2, 2]) + torch.tensor([0, 1, 1, 1]), coords)
    assert (down.counts == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_grid(backend):
    coords = torch.tensor([[32767, 65535, 65535, 65535], [0, 0, 65535, 0], [0, 0, 0, 65535]])
    down = downsample(coords, backend=backend)
    assert down.coords.tolist() == [[0, 0, 0, 32767], [0, 0, 32767, 0], [32767, 32767, 32767, 32767]]
    fine = subdivide(down.coords, backend=backend)
    assert (voxel_lookup(fine.coords, coords) >= 0).all()
    feats = torch.tensor([[1.0], [2.0], [4.0]])
    centers = (coords[:, 1:].double() + 0.5) / 32768 - 1
    found = sample_trilinear(coords, feats.double(), centers, 65536, batch_index=coords[:, 0], backend=backend)
    assert torch.allclose(found, feats.double())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [2, 3, 7, 65536])
def test_slabs_do_not_run_over_into_the_next_batch(backend, factor):
    ends = torch.tensor([0, 1, 2, 3, 65533, 65534, 65535])
    coords = torch.cartesian_prod(torch.tensor([0, 1, 2, 32767]), ends, ends[-2:], ends[:3])
    down = downsample(coords, factor=factor, backend=backend)
    unique = voxel_unique(coords // torch.tensor([1, factor, factor, factor]))
    assert torch.equal(down.coords, unique.coords) and torch.equal(down.inverse, unique.inverse)


def test_half_precision():
    coords = some_voxels(2, 0.5)
    feats = normal(1, len(coords), 4).half()
    down = downsample(coords, feats)
    assert down.feats.dtype == torch.float16
    assert torch.allclose(down.feats.float(), downsample(coords, feats.float()).feats, atol=2e-3)
    assert torch.equal(gather_features(down.feats, down.inverse), down.feats[down.inverse])
    points = torch.rand(9, 3, generator=generator(1))
    sampled = sample_trilinear(coords, feats, points, 8)
    assert sampled.dtype == torch.float16
    assert torch.allclose(sampled.float(), sample_trilinear(coords, feats.float(), points, 8), atol=2e-3)


COORDS = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3]], dtype=torch.int32)
FEATS = torch.ones(2, 3)
POINTS = torch.zeros(5, 3)
BAD = [
    (downsample, dict(coords=-COORDS), ValueError, "a row outside"),
    (downsample, dict(coords=COORDS.float()), ValueError, "coords must have dtype"),
    (downsample, dict(coords=COORDS, factor=0), ValueError, "factor must be >= 1"),
    (downsample, dict(coords=COORDS, factor=(2, 2)), ValueError, "factor must be an integer or three"),
    (downsample, dict(coords=COORDS, factor=2.0), TypeError, "factor must be an integer"),
    (downsample, dict(coords=COORDS, feats=FEATS, reduce="min"), ValueError, "reduce must be one of"),
    (downsample, dict(coords=COORDS, feats=FEATS[:1]), ValueError, "one row per voxel"),
    (subdivide, dict(coords=COORDS + torch.tensor([0, 32768, 0, 0])), ValueError, "a row outside"),
    (subdivide, dict(coords=-COORDS), ValueError, "a row outside"),
    (upsample, dict(coords=COORDS, feats=FEATS, child_mask=torch.ones(2, 8)), ValueError, "child_mask must have dtype"),
    (
        upsample,
        dict(coords=COORDS, feats=FEATS, child_mask=torch.ones(3, 8, dtype=torch.bool)),
        ValueError,
        r"child_mask must have shape \[2, 8\]",
    ),
    (channel_to_spatial, dict(coords=COORDS, feats=FEATS), ValueError, "a multiple of 8 channels"),
    (spatial_to_channel, dict(coords=COORDS[[0, 0]], feats=FEATS), ValueError, "one twice"),
    (spatial_to_channel, dict(coords=COORDS, feats=FEATS, factor=65536), ValueError, "does not fit"),
    (sample_trilinear, dict(coords=COORDS, feats=FEATS, points=POINTS, resolution=0), ValueError, "resolution"),
    (sample_trilinear, dict(coords=COORDS, feats=FEATS, points=POINTS[:, :2], resolution=4), ValueError, "points must"),
    (sample_trilinear, dict(coords=COORDS, feats=FEATS, points=POINTS.half(), resolution=4), ValueError, "points must"),
    (sample_trilinear, dict(coords=COORDS[[0, 0]], feats=FEATS, points=POINTS, resolution=4), ValueError, "one twice"),
    (sample_trilinear, dict(coords=COORDS - 1, feats=FEATS, points=POINTS, resolution=4), ValueError, "a row outside"),
    (
        sample_trilinear,
        dict(coords=COORDS, feats=FEATS, points=POINTS, resolution=4, outside="border"),
        ValueError,
        "outside must be one of",
    ),
    (
        sample_trilinear,
        dict(coords=COORDS, feats=FEATS, points=POINTS, resolution=4, batch_index=torch.zeros(4).long()),
        ValueError,
        "batch_index must have shape",
    ),
    (
        sample_trilinear,
        dict(coords=COORDS, feats=FEATS, points=POINTS.to("meta"), resolution=4),
        ValueError,
        "points must be on cpu",
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function,kwargs,error,message", BAD, ids=[f"{f.__name__}-{m[:20]}" for f, _, _, m in BAD])
def test_bad_input(function, kwargs, error, message, backend):
    with pytest.raises(error, match=message) as caught:
        function(**kwargs, backend=backend)
    assert function.__name__ in str(caught.value)
