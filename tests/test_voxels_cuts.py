"""Dilation and cuts: SciPy, NumPy and a slow ray test as oracles, bad input."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from cvctoolkit.ops import (
    cast_rays,
    crop_box,
    cut_half_space,
    front_cut,
    front_cut_pointmap,
    occupancy_to_coords,
    pointmap_to_mesh,
    unproject_depth,
    voxel_difference,
    voxel_dilate,
    voxel_isin,
)
from cvctoolkit.ops.voxels.dense_samples import distinct
from tests.oracles import oracle

BACKENDS = ["native", "reference"]
seeds = st.integers(0, 2**16)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def some_voxels(seed, share, ordered=True, shape=(2, 9, 8, 7)):
    return distinct(generator(seed), int(share * np.prod(shape)), shape, ordered=ordered)


class TestDilate:
    @pytest.mark.parametrize("backend", BACKENDS)
    @given(seeds, st.sampled_from([0.0, 0.02, 0.3]), st.tuples(*[st.sampled_from([1, 3, 5])] * 3), st.booleans())
    @settings(max_examples=25)
    def test_scipy_agrees(self, backend, seed, share, sizes, ordered):
        ndimage = oracle("scipy.ndimage")
        kernel = torch.rand(sizes, generator=generator(seed)) < 0.5
        coords = some_voxels(seed, share, ordered)
        dense = np.zeros((2, 9, 8, 7), bool)
        dense[tuple(coords.numpy().T)] = True
        grown = np.stack([ndimage.binary_dilation(d, kernel.numpy()) if kernel.any() else d & False for d in dense])
        found = voxel_dilate(coords, kernel, spatial_shape=(9, 8, 7), backend=backend)
        assert torch.equal(found, occupancy_to_coords(torch.from_numpy(grown)))

    @pytest.mark.parametrize("backend", BACKENDS)
    @given(seeds, st.sampled_from([1, 3, 5]))
    @settings(max_examples=10)
    def test_a_cube_is_that_many_neighbours_and_extensive(self, backend, seed, size):
        coords = some_voxels(seed, 0.1)
        grown = voxel_dilate(coords, size, backend=backend)
        radius = size // 2
        expected = {
            (b, x + i, y + j, z + k)
            for b, x, y, z in coords.tolist()
            for i, j, k in itertools.product(range(-radius, radius + 1), repeat=3)
            if min(x + i, y + j, z + k) >= 0
        }
        assert [tuple(c) for c in grown.tolist()] == sorted(expected)
        assert voxel_isin(coords, grown).all()

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_at_the_ends_of_the_largest_grid(self, backend):
        coords = torch.tensor([[0, 0, 0, 0], [32767, 65535, 65535, 65535]])
        grown = voxel_dilate(coords, 3, backend=backend)
        assert len(grown) == 16 and grown.min() == 0 and grown[:, 1:].max() == 65535

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_repeated_rows_and_long_lines(self, backend):
        line = torch.tensor([[0, 3, 4, z] for z in range(0, 400, 3)])
        grown = voxel_dilate(line.repeat(2, 1), torch.ones(1, 1, 3, dtype=torch.bool), backend=backend)
        assert torch.equal(grown[:, 3], torch.arange(401, dtype=torch.int32)[: len(grown)])


class TestPlaneAndBox:
    @pytest.mark.parametrize("backend", BACKENDS)
    @given(seeds, st.tuples(*[st.integers(-2, 10)] * 3), st.tuples(*[st.integers(-2, 10)] * 3), st.booleans())
    @settings(max_examples=20)
    def test_box(self, backend, seed, low, high, ordered):
        coords = some_voxels(seed, 0.3, ordered)
        xyz = coords[:, 1:].numpy()
        expected = np.flatnonzero(((xyz >= low) & (xyz < high)).all(1))
        cut = crop_box(coords, low, high, backend=backend)
        assert np.array_equal(cut.rows.numpy(), expected) and torch.equal(cut.coords, coords[cut.rows])

    @pytest.mark.parametrize("backend", BACKENDS)
    @given(seeds, st.floats(-2, 2), st.sampled_from([(-1.0, 1.0), (0.0, 5.0)]), st.booleans())
    @settings(max_examples=20)
    def test_plane(self, backend, seed, tolerance, bounds, ordered):
        coords = some_voxels(seed, 0.3, ordered)
        plane = torch.randn(2, 4, generator=generator(seed), dtype=torch.float64)
        h = (bounds[1] - bounds[0]) / 9
        centers = (coords[:, 1:].double() + 0.5) * h + bounds[0]
        n, d = plane[coords[:, 0].long(), :3], plane[coords[:, 0].long(), 3]
        signed = ((n * centers).sum(1) + d) / n.norm(dim=1) + tolerance * h
        cut = cut_half_space(coords, 9, plane, tolerance=tolerance, bounds=bounds, backend=backend)
        kept = torch.zeros(len(coords), dtype=torch.bool)
        kept[cut.rows] = True
        clear = signed.abs() > 1e-12
        assert torch.equal(kept[clear], signed[clear] > 0) and torch.equal(cut.coords, coords[cut.rows])

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_plane_through_centres_keeps_them(self, backend):
        coords = occupancy_to_coords(torch.ones(2, 4, 4, 4))
        cut = cut_half_space(coords, 4, torch.tensor([2.0, 0, 0, 0.5]), backend=backend)  # x = −0.25, centres of x = 1
        assert torch.equal(cut.coords, coords[coords[:, 1] >= 1])

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_batch_element_without_a_plane_is_not_kept(self, backend):
        coords = torch.tensor([[0, 1, 1, 1], [2, 1, 1, 1], [1, 1, 1, 1]])
        planes = torch.tensor([[1.0, 0, 0, 9], [0, 1, 0, 9]])
        assert cut_half_space(coords, 4, planes, backend=backend).rows.tolist() == [0, 2]


def scene(seed, ortho, height=9, width=11):
    """A bumpy map with holes before a camera that looks at the cube from outside, and the cube's voxels."""
    g = generator(seed)
    depth = (1.8 + 0.8 * torch.rand(height, width, generator=g)).double()
    mask = torch.rand(height, width, generator=g) > 0.08
    depth[1, 2], depth[5, 5] = float("nan"), -1.0
    angle = 0.6 * float(torch.rand((), generator=g))
    viewmat = torch.eye(4, dtype=torch.float64)
    viewmat[0, 0] = viewmat[2, 2] = math.cos(angle)
    viewmat[0, 2], viewmat[2, 0] = math.sin(angle), -math.sin(angle)
    viewmat[:3, 3] = torch.tensor([0.05, -0.1, 2.2])
    K = torch.tensor([[10.0, 0.3, 5.4], [0, 9.0, 4.6], [0, 0, 1]], dtype=torch.float64)
    if ortho:
        K[0, 0], K[1, 1] = 5.0, 4.5
    return depth, mask, K, viewmat


def slow_front_side(centers, points, valid, origins, directions, tolerance, corners):
    """Walks every ray through every triangle: (kept, met, how clear the decision is)."""
    mesh = pointmap_to_mesh(points.nan_to_num(0), valid, corner_triangles=corners)
    t = cast_rays(origins, directions, mesh.vertices, mesh.faces, backend="reference").t
    depth_of_center = (centers - origins).norm(dim=-1)
    behind = depth_of_center - t - tolerance
    return behind <= 0, t.isfinite(), behind.abs()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ortho", [False, True])
@given(seeds, st.sampled_from([0.0, 0.5, -0.7]), st.booleans(), st.sampled_from(["keep", "drop"]))
@settings(max_examples=6)
def test_front_cut_against_a_slow_ray_test(backend, ortho, seed, tolerance, corners, invalid):
    depth, mask, K, viewmat = scene(seed, ortho)
    resolution = 10
    coords = some_voxels(seed, 0.6, shape=(1, 10, 10, 10))
    model = "ortho" if ortho else "pinhole"
    cut = front_cut(
        coords,
        resolution,
        depth,
        K,
        viewmat,
        mask=mask,
        tolerance=tolerance,
        invalid=invalid,
        camera_model=model,
        corner_triangles=corners,
        backend=backend,
    )
    kept = torch.zeros(len(coords), dtype=torch.bool)
    kept[cut.rows] = True

    valid = mask & depth.isfinite() & (ortho | (depth > 0))
    points = unproject_depth(depth, K, viewmat, camera_model=model)
    centers = (coords[:, 1:].double() + 0.5) * 0.2 - 1
    rotation, shift = viewmat[:3, :3], viewmat[:3, 3]
    if ortho:
        directions = rotation[2].expand_as(centers)
        in_camera = centers @ rotation.T + shift
        origins = (torch.cat([in_camera[:, :2], torch.full_like(in_camera[:, :1], -9.0)], 1) - shift) @ rotation
    else:
        origins = (-shift @ rotation).expand_as(centers)
        directions = centers - origins
        directions = directions / directions.norm(dim=-1, keepdim=True)
    front, met, clear = slow_front_side(
        centers, points, valid, origins.contiguous(), directions.contiguous(), tolerance * 0.2, corners
    )
    expected = torch.where(met, front, invalid == "keep")
    sure = ~met | (clear > 1e-9)
    assert sure.float().mean() > 0.99
    assert torch.equal(kept[sure], expected[sure])
    assert torch.equal(cut.coords, coords[cut.rows])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("connectivity,steps", [(6, 1), (18, 2), (26, 3)])
def test_the_seam_touches_what_was_cut(backend, connectivity, steps):
    depth, mask, K, viewmat = scene(4, False)
    coords = some_voxels(4, 0.5, ordered=False, shape=(1, 10, 10, 10))
    cut = front_cut(coords, 10, depth, K, viewmat, mask=mask, connectivity=connectivity, backend=backend)
    removed = voxel_difference(coords, cut.coords).coords
    assert len(removed) and len(cut.coords)
    distance = (cut.coords[:, None, 1:] - removed[None, :, 1:]).abs()
    expected = ((distance.amax(-1) == 1) & (distance.sum(-1) <= steps)).any(1)
    assert torch.equal(cut.seam, expected) and 0 < expected.sum() < len(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wall_before_the_camera(backend):
    """Known by hand: a plane at z = 0 seen from z = −3 keeps z < 0, and half a voxel of tolerance the next layer."""
    coords = occupancy_to_coords(torch.ones(1, 4, 4, 5))
    K = torch.tensor([[20.0, 0, 8], [0, 20, 8], [0, 0, 1]])
    viewmat = torch.eye(4)
    viewmat[2, 3] = 3.0
    depth = torch.full((16, 16), 3.0)
    for tolerance, layers in ((0.0, 3), (-0.01, 2), (0.5, 3), (1.5, 4)):
        cut = front_cut(coords, 5, depth, K, viewmat, tolerance=tolerance, backend=backend)
        ahead = cut.coords[(cut.coords[:, 1:3] > 0).all(1) & (cut.coords[:, 1:3] < 4).all(1)]
        kept = torch.unique(ahead[:, 3])
        assert len(kept) in (layers, layers + (tolerance in (0.5, 1.5))), (tolerance, kept)
        assert torch.equal(cut.coords[cut.seam][:, 3].unique(), kept[-1:])
    nothing = front_cut(coords, 5, depth.fill_(float("nan")), K, viewmat, invalid="drop", backend=backend)
    assert len(nothing.rows) == 0
    everything = front_cut(coords, 5, depth, K, viewmat, backend=backend)
    assert len(everything.rows) == len(coords) and not everything.seam.any()


def test_by_point_map_and_by_camera_agree():
    depth, mask, K, viewmat = scene(9, False)
    coords = some_voxels(9, 0.8, shape=(1, 10, 10, 10))
    points = unproject_depth(depth.clamp_min(0.1), K, viewmat)
    mask = mask & depth.isfinite() & (depth > 0)
    eye = -viewmat[:3, 3] @ viewmat[:3, :3]
    for invalid in ("keep", "drop"):
        options = dict(mask=mask, tolerance=0.3, invalid=invalid, corner_triangles=True)
        by_camera = front_cut(coords, 10, depth, K, viewmat, **options)
        by_points = front_cut_pointmap(coords, 10, points, eye, **options)
        for a, b in zip(by_camera, by_points):
            assert torch.equal(a, b)


COORDS = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3]], dtype=torch.int32)
PLANE = torch.tensor([1.0, 0, 0, 0])
CAMERA = dict(coords=COORDS, resolution=4, depth=torch.ones(4, 4), Ks=torch.eye(3), viewmats=torch.eye(4))
MAP = dict(coords=COORDS, resolution=4, points=torch.zeros(4, 4, 3), eye=torch.zeros(3))
BAD = [
    (voxel_dilate, dict(coords=-COORDS), ValueError, "a row outside"),
    (voxel_dilate, dict(coords=COORDS, kernel=2), ValueError, "odd sizes"),
    (voxel_dilate, dict(coords=COORDS, kernel=65), ValueError, "kernel must be <= 63"),
    (voxel_dilate, dict(coords=COORDS, kernel=3.0), TypeError, "kernel must be an integer"),
    (voxel_dilate, dict(coords=COORDS, kernel=torch.ones(3, 3, 3)), ValueError, "kernel must have dtype bool"),
    (voxel_dilate, dict(coords=COORDS, kernel=torch.ones(3, 0, 3).bool()), ValueError, "odd sizes"),
    (voxel_dilate, dict(coords=COORDS, spatial_shape=(4, 4)), TypeError, "three integers"),
    (crop_box, dict(coords=COORDS, low=(0, 0), high=4), ValueError, "low must be an integer or three"),
    (crop_box, dict(coords=COORDS, low=0.5, high=4), TypeError, "low must be an integer"),
    (crop_box, dict(coords=[[0, 0, 0, 0]], low=0, high=4), TypeError, "coords must be a torch.Tensor"),
    (cut_half_space, dict(coords=COORDS, resolution=4, plane=PLANE[:3]), ValueError, "plane must have shape"),
    (cut_half_space, dict(coords=COORDS, resolution=4, plane=0 * PLANE), ValueError, "with n not 0"),
    (cut_half_space, dict(coords=COORDS, resolution=4, plane=PLANE / 0), ValueError, "plane must be finite"),
    (cut_half_space, dict(coords=COORDS, resolution=4, plane=PLANE, bounds=(1.0, 1.0)), ValueError, "low < high"),
    (front_cut, dict(CAMERA, depth=torch.ones(2, 4, 4)), ValueError, r"Ks must have shape \[2, 3, 3\]"),
    (front_cut, dict(CAMERA, mask=torch.ones(4, 4)), ValueError, "mask must have dtype bool"),
    (front_cut, dict(CAMERA, mask=torch.ones(4, 5).bool()), ValueError, "mask must have shape"),
    (front_cut, dict(CAMERA, invalid="guess"), ValueError, "invalid must be one of"),
    (front_cut, dict(CAMERA, connectivity=8), ValueError, "connectivity must be 6, 18 or 26"),
    (front_cut, dict(CAMERA, camera_model="fisheye"), ValueError, "camera_model must be one of"),
    (front_cut, dict(CAMERA, tolerance=float("inf")), ValueError, "tolerance must be finite"),
    (front_cut, dict(CAMERA, Ks=torch.eye(3, device="meta")), ValueError, "Ks must be on cpu"),
    (front_cut_pointmap, dict(MAP, eye=torch.zeros(2, 3)), ValueError, r"eye must have shape \[1, 3\]"),
    (front_cut_pointmap, dict(MAP, eye=torch.full((3,), float("nan"))), ValueError, "eye must be finite"),
    (front_cut_pointmap, dict(MAP, points=torch.zeros(4, 4)), ValueError, "points must have shape"),
]


@pytest.mark.parametrize("function,kwargs,error,message", BAD, ids=[f"{f.__name__}-{m[:20]}" for f, _, _, m in BAD])
def test_bad_input(function, kwargs, error, message):
    with pytest.raises(error, match=message) as caught:
        function(**kwargs)
    assert function.__name__ in str(caught.value)
