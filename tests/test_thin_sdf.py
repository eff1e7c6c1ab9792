"""From point maps to thin SDFs, and where grids keep their samples."""

import math
import warnings

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from cvctoolkit.ops import (
    corner_grid_bounds,
    denormalize_points,
    grid_to_world,
    marching_cubes,
    narrow_band_udf,
    pointmap_to_mesh,
    thin_sdf_from_pointmap,
    udf_to_thin_sdf,
    world_to_grid,
)
from cvctoolkit.ops.mesh import reference as mesh_reference
from cvctoolkit.ops.mesh.samples import height_field
from cvctoolkit.ops.sdf.reference import voxel_centers
from tests.oracles import oracle


def test_thin_sdf_formula():
    udf = torch.tensor([0.0, 0.25, 0.5, 1.0, 3.0])
    assert torch.equal(udf_to_thin_sdf(udf, 1.0), torch.tensor([-1.0, -0.5, 0.0, 1.0, 1.0]))
    assert torch.equal(udf_to_thin_sdf(torch.tensor([-1.0, math.inf]), 1.0), torch.tensor([-1.0, 1.0]))
    assert udf_to_thin_sdf(torch.tensor([math.nan]), 1.0).isnan().all()
    assert torch.equal(udf_to_thin_sdf(torch.zeros(2, dtype=torch.float64), 1e-300), -torch.ones(2).double())


def test_bands_below_two_voxels_warn():
    mesh = height_field(torch.Generator(), 3)
    with pytest.warns(UserWarning, match="too thin"):
        narrow_band_udf(**mesh, resolution=8, band=1.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        narrow_band_udf(**mesh, resolution=8, band=2.0)


@given(st.integers(2, 65536), st.sampled_from([(-1.0, 1.0), (0.0, 3.0)]))
def test_corner_grids(resolution, bounds):
    index = torch.tensor([[0.0, 1.0, resolution - 1.0]], dtype=torch.float64)
    corner = grid_to_world(index, resolution, bounds=bounds, samples="corner")
    assert corner[0, 0] == bounds[0] and math.isclose(corner[0, 2], bounds[1])
    center = grid_to_world(index, resolution, bounds=corner_grid_bounds(resolution, bounds))
    assert torch.allclose(center, corner, atol=1e-12)
    back = world_to_grid(corner, resolution, bounds=bounds, samples="corner")
    assert torch.allclose(back, index, atol=1e-6)


def test_dense_marching_cubes_of_a_corner_grid_agrees():
    """scikit-image on linspace(-1, 1, R) and ours on the same samples: the same sphere."""
    measure = oracle("skimage.measure")
    resolution = 24
    index = torch.cartesian_prod(*[torch.arange(resolution)] * 3)
    sdf = grid_to_world(index.double(), resolution, samples="corner").norm(dim=-1) - 0.7
    dense, *_ = measure.marching_cubes(sdf.reshape([resolution] * 3).numpy(), 0)
    dense = grid_to_world(torch.from_numpy(dense.copy()), resolution, samples="corner")
    coords = torch.cat([torch.zeros(len(index), 1), index], 1).int()
    ours = marching_cubes(coords, sdf, resolution, bounds=corner_grid_bounds(resolution)).vertices
    assert len(ours) == len(dense)
    assert torch.cdist(ours, dense.double()).amin(1).max() < 1e-6


def bump(height, width):
    """A point map in front of a camera at the origin, with a step in depth, a hole and an invalid point."""
    v, u = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    depth = 4 + 0.4 * torch.cos(3 * u) * torch.cos(2 * v) + 2.0 * (u > 0.3)
    points = torch.stack([u, v, torch.ones_like(u)], -1) * depth[..., None]
    mask = (u + 0.5).square() + v.square() > 0.01
    points[0, 0] = float("nan")
    return points, mask


def test_chain_lies_on_the_points():
    points, mask = bump(40, 50)
    out = thin_sdf_from_pointmap(points, mask, 128, 3.0, edge_rtol=0.1)
    voxel = 2 / 128
    assert out.vertices.abs().max() <= 1 - 4 * voxel + 1e-6
    assert out.coords[:, 1:].min() >= 0 and out.coords[:, 1:].max() < 128
    assert torch.allclose(
        denormalize_points(out.vertices, out.center, out.scale), points.reshape(-1, 3)[out.pixel_index], atol=1e-5
    )
    surface = marching_cubes(out.coords, out.sdf, 128)
    distance, _, _ = mesh_reference.closest_point_on_mesh(surface.vertices[::7], out.vertices, out.faces)
    assert (distance - 1.5 * voxel).abs().max() < 0.5 * voxel  # the zero level is half a band away
    whole = pointmap_to_mesh(points, mask)
    assert len(out.faces) < len(whole.faces), "the step in depth is not cut"


def test_chain_of_a_batch_is_that_of_its_maps():
    points, mask = bump(16, 20)
    points = torch.stack([points, 0.1 * points + 3]).unsqueeze(0)
    both = thin_sdf_from_pointmap(points, mask.expand(1, 2, 16, 20), 48, 2.0)
    assert both.center.shape == (1, 2, 3) and both.scale.shape == (1, 2)
    for k in range(2):
        one = thin_sdf_from_pointmap(points[0, k], mask, 48, 2.0)
        rows = both.coords[:, 0] == k
        assert torch.equal(one.coords[:, 1:], both.coords[rows, 1:])
        assert torch.allclose(one.sdf, both.sdf[rows], atol=1e-6)
        assert torch.equal(one.center, both.center[0, k]) and torch.equal(one.scale, both.scale[0, k])


def test_chain_is_differentiable():
    points, mask = bump(8, 9)
    points = points.double().requires_grad_()
    out = thin_sdf_from_pointmap(points, mask, 32, 2.0)
    (grad,) = torch.autograd.grad(out.sdf.sum(), points)
    assert grad.isfinite().all() and grad.abs().sum() > 0 and (grad[~mask] == 0).all()

    def sdf(p):  # the same steps, the normalisation held fixed, for the faces and voxels that there are
        normalized = (p - out.center) / out.scale
        corners = normalized.reshape(-1, 3)[out.pixel_index][out.faces[out.face_index].long()]
        centers = voxel_centers(out.coords, 32, -1, 1)
        distance, _ = mesh_reference.closest_point_on_triangle(centers, *corners.unbind(1))
        return 2 * distance / (2 * 2 / 32) - 1

    torch.testing.assert_close(sdf(points), out.sdf, rtol=0, atol=1e-12)
    direction = torch.randn(points.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inner = points.detach().nan_to_num(0)
    moved = [float(sdf(torch.where(points.isnan(), points, inner + step * direction)).sum()) for step in (1e-6, -1e-6)]
    slope = float((grad * direction).nan_to_num(0).sum())
    assert abs((moved[0] - moved[1]) / 2e-6 - slope) < 1e-4 * abs(slope)


@pytest.mark.parametrize(
    "call,error",
    [
        (lambda: udf_to_thin_sdf([0.0], 1.0), TypeError),
        (lambda: udf_to_thin_sdf(torch.zeros(2), 0.0), ValueError),
        (lambda: udf_to_thin_sdf(torch.zeros(2).int(), 1.0), ValueError),
        (lambda: udf_to_thin_sdf(torch.zeros(2), 1e-40), ValueError),
        (lambda: udf_to_thin_sdf(torch.zeros(2).half(), 1e-300), ValueError),
        (lambda: grid_to_world(torch.zeros(3), 8, bounds=(-1.7e308, 1.7e308)), ValueError),
        (lambda: grid_to_world(torch.zeros(3), 8, samples=["center"]), TypeError),
        (lambda: thin_sdf_from_pointmap(torch.zeros(4, 4, 3), torch.ones(4, 5).bool(), 8, 2.0), ValueError),
        (lambda: thin_sdf_from_pointmap(torch.zeros(4, 4, 3), None, 8, 4.0), ValueError),
        (lambda: thin_sdf_from_pointmap(torch.zeros(4, 4), None, 8, 2.0), ValueError),
        (lambda: thin_sdf_from_pointmap(torch.zeros(4, 4, 3), None, 8, 2.0, margin=1.0), ValueError),
        (lambda: grid_to_world(torch.zeros(3), 8, samples="edge"), ValueError),
        (lambda: grid_to_world(torch.zeros(3), 1, samples="corner"), ValueError),
        (lambda: world_to_grid(torch.zeros(2), 8), ValueError),
        (lambda: corner_grid_bounds(1), ValueError),
    ],
)
def test_bad_arguments_of_the_small_functions(call, error):
    with pytest.raises(error):
        call()


@pytest.mark.parametrize("shape", [(0, 6, 3), (6, 0, 3), (0, 0, 3), (0, 4, 4, 3), (2, 0, 4, 3), (2, 0, 3, 4, 3)])
def test_empty_maps_have_an_empty_volume(shape):
    result = thin_sdf_from_pointmap(torch.zeros(shape), None, 12, 3)
    assert result.coords.shape == (0, 4) and result.faces.shape == (0, 3)
    assert result.center.shape == (*shape[:-3], 3) and result.scale.shape == shape[:-3]


def test_a_thin_band_warns_once_and_names_the_caller():
    with pytest.warns(UserWarning, match=r"thin_sdf_from_pointmap: a band of 1\.5 voxels") as caught:
        thin_sdf_from_pointmap(torch.zeros(0, 6, 3), None, 8, 1.5)
    assert [warning.filename for warning in caught] == [__file__]
