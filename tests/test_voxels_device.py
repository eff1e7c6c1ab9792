"""The device pipelines of resampling, cuts and features, run on the host and compared with the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvctoolkit.ops.voxels import (
    dense_reference,
    morphology_reference,
    resample_reference,
    trilinear_reference,
)
from tests.native import native_module

SHAPE = (5, 6, 7)
voxel = st.tuples(st.integers(0, 1), *(st.integers(0, size - 1) for size in SHAPE))
voxels = st.lists(voxel, max_size=40)
seeds = st.integers(0, 2**31)


def coords_of(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32).reshape(len(rows), 4)


def assert_same(found, expected) -> None:
    for x, y in zip(found, expected, strict=True):
        assert x.shape == tuple(y.shape)
        assert np.array_equal(x, y.numpy(), equal_nan=True)


@given(seed=seeds, depth=st.integers(1, 130), threshold=st.sampled_from([0.2, 0.5, 0.99]))
@settings(max_examples=30)
def test_occupied_cells(seed, depth, threshold):
    occupancy = torch.rand(2, 3, 2, depth, generator=torch.Generator().manual_seed(seed))
    occupancy[0, 0, 0, 0] = float("nan")
    found = native_module().occupancy_to_coords_pipeline(occupancy.numpy(), threshold)
    # The pipeline compares with a float32, as torch does with a float32 volume.
    assert_same([found], [dense_reference.occupancy_to_coords(occupancy, float(np.float32(threshold)))])


@given(rows=voxels, factor=st.tuples(*[st.integers(1, 4)] * 3))
@settings(max_examples=40)
def test_coarsen(rows, factor):
    coords = coords_of(rows)
    *found, faults = native_module().voxel_coarsen_pipeline(coords.numpy(), factor)
    assert faults == 0
    assert_same(found, resample_reference.coarsen(coords, list(factor)))


@given(rows=voxels, seed=seeds, masked=st.booleans())
@settings(max_examples=40)
def test_children(rows, seed, masked):
    coords = coords_of(rows)
    mask = torch.rand(len(rows), 8, generator=torch.Generator().manual_seed(seed)) < 0.5 if masked else None
    *found, fault = native_module().voxel_children_pipeline(coords.numpy(), None if mask is None else mask.numpy())
    assert not fault
    assert_same(found, resample_reference.children(coords, mask))


@given(rows=voxels, seed=seeds, size=st.tuples(*[st.integers(1, 4)] * 3))
@settings(max_examples=40)
def test_dilate(rows, seed, size):
    coords = coords_of(rows)
    kernel = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.6
    found, faults = native_module().voxel_dilate_pipeline(coords.numpy(), kernel.numpy(), SHAPE)
    assert faults == 0
    assert_same([found], [morphology_reference.voxel_dilate(coords, kernel, list(SHAPE))])


@pytest.mark.parametrize("bad", [(-1, 0, 0, 0), (0, 1 << 16, 0, 0), (1 << 15, 0, 0, 0), (0, 0, 0, -5)])
def test_rows_that_are_no_voxels_are_reported(bad):
    module, coords = native_module(), coords_of([(0, 1, 1, 1), bad]).numpy()
    assert module.voxel_coarsen_pipeline(coords, (2, 2, 2))[-1] == 1
    assert module.voxel_dilate_pipeline(coords, np.ones((3, 3, 3), bool), SHAPE)[-1] == 1
    assert module.voxel_children_pipeline(coords, np.ones((2, 8), bool))[-1]
    fine, parent, fault = module.voxel_children_pipeline(coords, None)  # nothing is checked: the others are right
    assert not fault and len(fine) == 16
    assert sorted(parent.tolist()) == [0] * 8 + [1] * 8 and fine[parent == 0, 1:].min() == 2


def test_children_beyond_the_largest_coordinate_are_reported():
    coords = coords_of([(0, 1 << 15, 0, 0)]).numpy()
    assert native_module().voxel_children_pipeline(coords, np.ones((1, 8), bool))[-1]


@given(rows=voxels, seed=seeds)
@settings(max_examples=40)
def test_cuts(rows, seed):
    module, coords = native_module(), coords_of(rows)
    g = torch.Generator().manual_seed(seed)
    low, high = [1, 0, 2], [4, 5, 6]
    assert_same(module.crop_box_pipeline(coords.numpy(), low, high), morphology_reference.crop_box(coords, low, high))
    for count in (1, 2):
        planes = torch.randn(count, 4, generator=g, dtype=torch.float64)
        numbers = (7, -1.0, 1.0, 0.01)
        found = module.cut_half_space_pipeline(coords.numpy(), planes.numpy(), *numbers)
        assert_same(found, morphology_reference.cut_half_space(coords, planes, *numbers))
    keep = torch.rand(len(rows), generator=g) < 0.5
    for steps in (1, 2, 3):
        found = module.cut_with_seam_pipeline(coords.numpy(), keep.numpy(), steps)
        assert_same(found, morphology_reference.cut(coords, keep, steps))


@given(rows=voxels, seed=seeds, channels=st.integers(0, 3), shrink=st.booleans())
@settings(max_examples=40)
def test_dense_volumes(rows, seed, channels, shrink):
    module, coords = native_module(), coords_of(rows)
    g = torch.Generator().manual_seed(seed)
    shape = [3, 4, 5] if shrink else list(SHAPE)  # rows outside are left out, of equal rows the lowest counts
    feats = torch.randn(len(rows), channels, generator=g)
    found = module.to_dense_pipeline(coords.numpy(), feats.numpy(), 2, shape, -1.5)
    assert_same([found], [dense_reference.to_dense(feats, coords, 2, shape, -1.5)])
    dense = torch.randn(2, channels, *shape, generator=g)
    assert_same(
        [module.from_dense_pipeline(dense.numpy(), coords.numpy())], [dense_reference.from_dense(dense, coords)]
    )


@given(seed=seeds, n=st.integers(0, 30), m=st.integers(0, 9), channels=st.integers(1, 5))
@settings(max_examples=40)
def test_gather_and_reduce(seed, n, m, channels):
    module, g = native_module(), torch.Generator().manual_seed(seed)
    feats = torch.randint(-8, 8, (m, channels), generator=g).float()
    index = torch.randint(-2, m + 2, (n,), generator=g)
    found = module.gather_features_pipeline(feats.numpy(), index.numpy(), 0.25)
    assert_same([found], [dense_reference.gather_features(feats, index, 0.25)])
    feats = torch.randint(-8, 8, (n, channels), generator=g).double()  # whole numbers: sums are exact
    for reduction in range(3):
        for include_self in (False, True):
            found = module.reduce_features_pipeline(feats.numpy(), index.numpy(), m, reduction, include_self)
            expected = dense_reference.reduce_features(feats, index, m, reduction, include_self)
            np.testing.assert_allclose(found, expected.numpy(), rtol=1e-15)


def test_the_maximum_of_nan_is_nan():
    feats = np.array([[1.0], [np.nan], [3.0]])
    assert np.isnan(native_module().reduce_features_pipeline(feats, np.zeros(3, np.int64), 1, 2, False)[0, 0])


@given(rows=voxels, seed=seeds, batched=st.booleans(), renormalize=st.booleans())
@settings(max_examples=40)
def test_trilinear(rows, seed, batched, renormalize):
    module = native_module()
    coords = coords_of(sorted(set(rows)))
    g = torch.Generator().manual_seed(seed)
    numbers = (7, -1.0, 1.0)
    points = 2.6 * torch.rand(25, 3, generator=g, dtype=torch.float64) - 1.3
    points[0] = float("nan")
    points[1] = 1e30
    batch = torch.randint(-1, 3, (25,), generator=g) if batched else None
    corners = trilinear_reference.corner_rows(points, batch, coords, *numbers)
    found = module.trilinear_corners_pipeline(
        points.numpy(), None if batch is None else batch.numpy(), coords.numpy(), *numbers
    )
    assert_same([found], [corners])
    feats = torch.randn(len(coords), 3, generator=g, dtype=torch.float64)
    arrays = feats.numpy(), points.numpy(), corners.numpy()
    expected = trilinear_reference.interpolate(feats, points, corners, *numbers, renormalize)
    np.testing.assert_allclose(
        module.trilinear_interpolate_pipeline(*arrays, *numbers, renormalize), expected.numpy(), rtol=1e-12, atol=1e-14
    )
    grad = torch.randn(25, 3, generator=g, dtype=torch.float64)
    expected = trilinear_reference.interpolate_backward(grad, feats, points, corners, *numbers, renormalize)
    found = module.trilinear_interpolate_backward_pipeline(grad.numpy(), *arrays, *numbers, renormalize)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y.numpy(), rtol=1e-10, atol=1e-12)
