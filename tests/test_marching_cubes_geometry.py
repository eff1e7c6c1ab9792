"""The surface of a sparse grid: geometry, thin shells and gradients."""

import functools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from cvctoolkit.ops import (
    closest_point_on_mesh,
    marching_cubes,
    narrow_band_udf,
    pointmap_to_mesh,
    udf_to_thin_sdf,
    voxel_isin,
)
from cvctoolkit.ops.sdf import marching_cubes_table as cube
from tests.oracles import oracle
from tests.surfaces import (
    assert_closed_manifold,
    components,
    dense_coords,
    euler_numbers,
    random_voxels,
    signed_volume,
)

trimesh, ndimage = oracle("trimesh"), oracle("scipy.ndimage")

RULES = ["join", "separate"]
BACKENDS = ["native", "reference"]


def sphere_band(resolution, radius, width, center=(0.0, 0.0, 0.0)):
    """Voxels nearer than `width` voxels to a sphere, and their signed distances."""
    coords = dense_coords(resolution)
    points = (coords[:, 1:].double() + 0.5) * 2 / resolution - 1 - torch.tensor(center, dtype=torch.float64)
    sdf = points.norm(dim=-1) - radius
    near = sdf.abs() < width * 2 / resolution
    return coords[near], sdf[near]


# --- geometry ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sphere(backend, dtype):
    resolution, radius = 48, 0.7
    coords, sdf = sphere_band(resolution, radius, 2)
    # The ball's far interior is absent, hence outside: a second surface within. Store it too.
    grid = dense_coords(resolution)
    deep = ((grid[:, 1:].double() + 0.5) * 2 / resolution - 1).norm(dim=-1) - radius <= -2 * 2 / resolution
    coords = torch.cat([coords, grid[deep]])
    sdf = torch.cat([sdf, sdf.new_full((int(deep.sum()),), -1.0)]).to(dtype)
    mesh = marching_cubes(coords, sdf, resolution, backend=backend)
    assert_closed_manifold(mesh)
    assert euler_numbers(mesh) == [2]
    assert (mesh.vertices.norm(dim=-1) - radius).abs().max() < 0.2 * (2 / resolution) ** 2 / radius
    assert signed_volume(mesh) == pytest.approx(4 / 3 * math.pi * radius**3, rel=3e-3)
    solid = trimesh.Trimesh(mesh.vertices.double().numpy(), mesh.faces.numpy(), process=False)
    assert solid.is_watertight and solid.is_winding_consistent and solid.euler_number == 2 and solid.volume > 0


def hausdorff(a, b, subdivisions=4):
    """Largest distance from points of one surface (corners and points within triangles) to the other."""
    igl = oracle("igl")
    weights = [(i, j, subdivisions - i - j) for i in range(subdivisions + 1) for j in range(subdivisions + 1 - i)]
    worst = 0.0
    for one, other in ((a, b), (b, a)):
        points = (np.array(weights) / subdivisions @ one.triangles).reshape(-1, 3)
        squared = igl.point_mesh_squared_distance(points, np.array(other.vertices), np.array(other.faces, np.int64))[0]
        worst = max(worst, float(np.sqrt(squared.max())))
    return worst


def grid_values(kind, resolution):
    """Voxels and values: with no ambiguous face, with many, or those of the thin shell of an open mesh."""
    coords = dense_coords(resolution)
    if kind == "smooth":
        return coords, (coords[:, 1:].float() / resolution * 5).sin().sum(-1) / 3 + 0.1
    if kind == "random":
        return coords, torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, len(coords))).float()
    coords, udf, _ = narrow_band_udf(*wave(), resolution, 4)
    return coords, udf_to_thin_sdf(udf, 4 * 2 / resolution)


@pytest.mark.parametrize(
    "kind,resolution,apart",
    # The triangles are the same where no face is ambiguous and no cell has two loops.
    [("smooth", 10, 1e-4), ("shell", 48, 1e-4), ("random", 10, 1.0)],
)
def test_agrees_with_scikit_image(kind, resolution, apart):
    measure = oracle("skimage.measure")
    coords, sdf = grid_values(kind, resolution)
    bounds = (-0.5, resolution - 0.5)
    mesh = marching_cubes(coords, sdf, resolution, bounds=bounds)
    dense = np.ones([resolution + 2] * 3, np.float32)
    dense[tuple(coords[:, 1:].numpy().T + 1)] = sdf.numpy()
    vertices, faces, _, _ = measure.marching_cubes(dense, 0.0, method="lewiner")
    ours = trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)
    theirs = trimesh.Trimesh(vertices - 1, faces, process=False)
    assert hausdorff(ours, theirs) < apart
    if kind != "random":
        assert len(ours.vertices) == len(theirs.vertices) and ours.euler_number == theirs.euler_number
        residual = [
            np.abs(ndimage.map_coordinates(dense, (m.triangles.mean(1) + 1).T, order=1)).mean() for m in (ours, theirs)
        ]
        assert residual[0] < 1.1 * residual[1]
    # Outside is where values are larger. Lewiner decides face by face, so his volume lies between those of the rules.
    joined = marching_cubes(coords, sdf, resolution, bounds=bounds, ambiguous="join")
    assert 0 < 0.999 * ours.volume <= abs(theirs.volume) <= 1.001 * signed_volume(joined)


def test_vertices_lie_where_the_linear_interpolant_meets_the_level():
    coords = torch.tensor([[0, 3, 4, 5], [0, 3, 4, 6]], dtype=torch.int32)
    mesh = marching_cubes(coords, torch.tensor([-0.25, 0.75]), 8, bounds=(0, 8), level=0.25)
    # Neighbours: five absent ones with value +1 at t = 0.5 / 1.25, the stored one at t = 0.5.
    centre = torch.tensor([3.5, 4.5, 5.5])
    offset = torch.cat([-0.4 * torch.eye(3), 0.4 * torch.eye(3)])
    offset[5, 2] = 0.5
    got, expected = (x[np.lexsort(x.numpy().T)] for x in (mesh.vertices, centre + offset))
    assert torch.allclose(got, expected)


def test_level_is_outside_and_may_coincide_with_a_vertex():
    coords = dense_coords(3)
    assert len(marching_cubes(coords, torch.zeros(27), 3).faces) == 0
    sdf = torch.zeros(27)
    sdf[13] = -1.0  # the centre: all six vertices at t = 1 or 0, the neighbours' centres
    mesh = marching_cubes(coords, sdf, 3, bounds=(-1.5, 1.5))
    assert_closed_manifold(mesh)
    assert torch.equal(mesh.vertices.abs().sum(-1), torch.ones(6))


def test_large_values_do_not_overflow():
    coords = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.int32)
    mesh = marching_cubes(coords, torch.tensor([-3e38, 3e38]), 2, bounds=(0, 2))
    assert mesh.vertices.isfinite().all() and (mesh.vertices[:, 2] - 1).abs().min() < 1e-6


# --- thin shells ------------------------------------------------------------------------------------------------------


def disc_shell(resolution, band):
    """Thin SDF 2d/τ - 1 of a tilted disc, τ = band voxels: the voxels nearer than τ alone."""
    coords = dense_coords(resolution)
    points = (coords[:, 1:].double() + 0.5) * 2 / resolution - 1
    normal = torch.nn.functional.normalize(torch.tensor([0.42, 0.35, 0.84], dtype=torch.float64), dim=0)
    height = points @ normal
    radial = (points - height[:, None] * normal).norm(dim=-1)
    distance = torch.hypot(height, (radial - 0.7).clamp_min(0))
    threshold = band * 2 / resolution
    near = distance < threshold
    return coords[near], (2 * distance[near] / threshold - 1).float()


@pytest.mark.parametrize("band", [3, 4])
@pytest.mark.parametrize("ambiguous", RULES)
def test_a_disc_has_a_spherical_shell(band, ambiguous):
    mesh = marching_cubes(*disc_shell(64, band), 64, ambiguous=ambiguous)
    assert_closed_manifold(mesh)
    assert euler_numbers(mesh) == [2] and components(mesh) == 1


def test_a_band_of_one_voxel_is_perforated_unless_inside_voxels_are_joined():
    coords, sdf = disc_shell(64, 1)
    separate = marching_cubes(coords, sdf, 64, ambiguous="separate")
    joined = marching_cubes(coords, sdf, 64, ambiguous="join")
    for mesh in (separate, joined):
        assert_closed_manifold(mesh)
    assert euler_numbers(separate)[0] < -100 and components(separate) > 1
    assert euler_numbers(joined) == [2] and components(joined) == 1


def wave():
    """A curved sheet without holes: 2·39² triangles."""
    x, y = torch.meshgrid(*[torch.linspace(-0.8, 0.8, 40)] * 2, indexing="ij")
    points = torch.stack([x, y, 0.25 * (4 * x).sin() * (3 * y).cos()], -1)
    mesh = pointmap_to_mesh(points)
    return mesh.vertices, mesh.faces


@pytest.mark.parametrize("band", [1, 2, 3, 4.5])
@pytest.mark.filterwarnings("ignore:narrow_band_udf")
def test_shell_of_an_open_mesh_is_watertight(band):
    """Perforated at a band of one voxel when inside voxels are separated; from 3 on a doubled disc, a sphere."""
    resolution = 80
    coords, udf, _ = narrow_band_udf(*wave(), resolution, band)
    sdf = udf_to_thin_sdf(udf, band * 2 / resolution)
    joined, separate = (marching_cubes(coords, sdf, resolution, ambiguous=rule) for rule in RULES)
    for mesh in (joined, separate):
        assert_closed_manifold(mesh)
    assert euler_numbers(joined) == [2] and components(joined) == 1
    if band == 1:
        assert euler_numbers(separate)[0] < -200
    elif band >= 3:
        assert euler_numbers(separate) == [2] and components(separate) == 1
    solid = trimesh.Trimesh(separate.vertices.numpy(), separate.faces.numpy(), process=False)
    assert solid.is_watertight and solid.is_winding_consistent
    distance = closest_point_on_mesh(joined.vertices, *wave()).distance
    # The zero level lies at half the band; a fraction of a voxel off where |d| has its ridge or an end is absent.
    assert (distance * resolution / 2 - band / 2).abs().max() < (0.5 if band == 1 else 0.15)


@settings(max_examples=25)
@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 2**16), st.sampled_from([0.5, 0.8, 1.0]), st.floats(0.4, 5))
@pytest.mark.filterwarnings("ignore:narrow_band_udf")
def test_shell_of_any_open_mesh_is_watertight(height, width, seed, keep, band):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.meshgrid(torch.linspace(-0.9, 0.9, height), torch.linspace(-0.9, 0.9, width), indexing="ij")
    points = torch.stack([x, y, 1.2 * torch.rand(height, width, generator=g) - 0.6], -1)
    mesh = pointmap_to_mesh(points, torch.rand(height, width, generator=g) < keep, corner_triangles=bool(seed % 2))
    coords, udf, _ = narrow_band_udf(mesh.vertices, mesh.faces, 24, band)  # shells that leave the grid close as well
    for rule in RULES:
        assert_closed_manifold(marching_cubes(coords, udf_to_thin_sdf(udf, band * 2 / 24), 24, ambiguous=rule))


@functools.cache
def real_mesh(scene):
    """The mesh of a ray-cast point map with jumps in depth: 364 k triangles."""
    workload = pytest.importorskip("benchmarks.workload")
    if scene == "bunny":
        for package in ("open3d", "pymeshlab"):
            pytest.importorskip(package)
    data = workload.load(518) if scene == "bunny" else workload.make(scene, 518)
    return torch.from_numpy(data.vertices), torch.from_numpy(data.faces)


@pytest.mark.parametrize(
    "scene,expected",
    [
        ("bunny", {1: (-41_340, 540), 2: (-20, 4), 3: (2, 4), 4: (2, 4)}),
        ("spheres", {1: (-37_466, 644), 2: (-34, 3), 3: (-2, 3)}),
    ],
)
@pytest.mark.filterwarnings("ignore:narrow_band_udf")
def test_thin_shells_of_a_real_mesh(scene, expected):
    """At 512³: perforated by a band of one voxel, still pierced by two, whole from three on."""
    vertices, faces = real_mesh(scene)
    for band, (euler, parts) in expected.items():
        coords, udf, _ = narrow_band_udf(vertices, faces, 512, band)
        mesh = marching_cubes(coords, udf_to_thin_sdf(udf, band * 2 / 512), 512)
        forth = mesh.faces.long() * len(mesh.vertices) + mesh.faces.roll(-1, 1)
        back = mesh.faces.roll(-1, 1).long() * len(mesh.vertices) + mesh.faces
        assert torch.equal(forth.flatten().sort().values, back.flatten().sort().values), "an edge has no opposite"
        # The ray casting that made the mesh rounds differently elsewhere: a few of the many holes come and go.
        assert abs(euler_numbers(mesh)[0] - euler) <= (40 if band == 1 else 0), band
        assert abs(components(mesh) - parts) <= (10 if band == 1 else 0), band


@pytest.mark.parametrize("scene,absent", [("bunny", {2: 0.336, 3: 0.034}), ("spheres", {2: 0.336})])
def test_corners_outside_the_band_of_a_real_mesh(scene, absent):
    vertices, faces = real_mesh(scene)
    for band, share in absent.items():
        coords, udf, _ = narrow_band_udf(vertices, faces, 512, band)
        threshold, bounds = band * 2 / 512, (-0.5, 511.5)
        mesh = marching_cubes(coords, udf_to_thin_sdf(udf, threshold), 512, bounds=bounds)
        cells = torch.unique_consecutive(mesh.vertices[mesh.faces.long()].mean(1).floor().int(), dim=0)  # in order
        corners = (cells[:, None] + torch.cartesian_prod(*[torch.arange(2, dtype=torch.int32)] * 3)).reshape(-1, 3)
        stored = voxel_isin(torch.cat([torch.zeros_like(corners[:, :1]), corners], 1), coords)
        assert float((~stored.view(-1, 8)).any(1).float().mean()) == pytest.approx(share, abs=0.002)
        # The true values in place of the absent corners' +1 give the very same surface.
        wider, udf, _ = narrow_band_udf(vertices, faces, 512, band + 1)
        true = marching_cubes(wider, 2 * udf / threshold - 1, 512, bounds=bounds)
        assert torch.equal(mesh.faces, true.faces) and (mesh.vertices - true.vertices).abs().max() <= 1e-3


@pytest.mark.filterwarnings("ignore:narrow_band_udf")
def test_absent_corners_move_a_surface_of_a_thinner_band_by_little():
    band, resolution, bounds = 1.5, 80, (-0.5, 79.5)
    coords, udf, _ = narrow_band_udf(*wave(), resolution, band)
    wider, further, _ = narrow_band_udf(*wave(), resolution, 4)
    threshold = band * 2 / resolution
    mesh = marching_cubes(coords, udf_to_thin_sdf(udf, threshold), resolution, bounds=bounds)
    true = marching_cubes(wider, 2 * further / threshold - 1, resolution, bounds=bounds)
    assert torch.equal(mesh.faces, true.faces) and 0 < (mesh.vertices - true.vertices).abs().max() <= 0.02


def test_absent_corners_do_not_tear_the_surface():
    coords, sdf = disc_shell(64, 2)
    mesh = marching_cubes(coords, sdf, 64, bounds=(-0.5, 63.5))
    stored = set(map(tuple, coords[:, 1:].tolist()))
    cells = {tuple(c) for c in mesh.vertices[mesh.faces.long()].mean(1).floor().int().tolist()}
    whole = sum(all(tuple(c + d for c, d in zip(cell, o)) in stored for o in cube.CORNERS) for cell in cells)
    assert whole < 0.8 * len(cells)  # an extractor that needs eight stored corners loses the rest
    assert_closed_manifold(mesh)


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_and_second_derivatives(backend):
    coords, sdf = random_voxels(3, 3, 0.7)
    sdf = torch.where(sdf < 0, sdf.clamp_max(-0.2), sdf.clamp_min(0.2)).double().requires_grad_()
    run = lambda s: marching_cubes(coords, s, 3, level=0.05, backend=backend).vertices  # noqa: E731
    assert torch.autograd.gradcheck(run, (sdf,))
    assert torch.autograd.gradgradcheck(run, (sdf,))


def test_gradient_moves_a_sphere_outwards():
    coords, sdf = sphere_band(32, 0.6, 2)
    sdf = sdf.float().requires_grad_()
    mesh = marching_cubes(coords, sdf, 32)
    outer = mesh.vertices.norm(dim=-1) > 0.55  # the inner shell is where the band ends
    mesh.vertices[outer].norm(dim=-1).sum().backward()
    assert (sdf.grad <= 1e-6).all() and sdf.grad.sum() < -100
