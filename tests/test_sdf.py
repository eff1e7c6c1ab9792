"""The narrow band: exactness, invariants, traps seen elsewhere, independent oracles, gradients."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example as explicitly
from hypothesis import given, settings

from cvctoolkit.ops import grid_to_world, narrow_band_udf
from cvctoolkit.ops.mesh import reference as mesh_reference
from cvctoolkit.ops.mesh.samples import cube, height_field, soup
from cvctoolkit.ops.sdf.narrow_band_samples import ROUNDING, assert_same_band, band_names
from cvctoolkit.ops.sdf.reference import voxel_centers
from cvctoolkit.testing import assert_gradients_close
from tests.bands import BACKENDS, ISAS, any_width, brute_force, generator, scattered, soups
from tests.native import native_module
from tests.oracles import oracle

# --- exactness --------------------------------------------------------------------------------------------------------


@any_width
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30)
@given(mesh=soups, resolution=st.integers(1, 12), band=st.floats(0.1, 9), low=st.sampled_from([-1.0, -0.3, 5.0]))
@explicitly(mesh=scattered(1, 12, -6, 3.0), resolution=1, band=1.0, low=-0.3)  # a needle by the rounding of its corners
def test_equals_brute_force(backend, dtype, mesh, resolution, band, low):
    mesh = {**mesh, "vertices": mesh["vertices"].to(dtype)}
    kwargs = dict(**mesh, resolution=resolution, band=band, bounds=(low, low + 1.7))
    assert_same_band(narrow_band_udf(**kwargs, backend=backend), brute_force(**kwargs), kwargs)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set_is_exact(isa, dtype):
    choose = torch.ops.cvctoolkit_native.isa
    try:
        if choose(isa) != isa:
            pytest.skip(f"this machine has no {isa}")
        for seed, resolution, band in ((0, 41, 2.0), (1, 27, 5.3), (2, 17, 9.0)):
            mesh = height_field(generator(seed), 12)
            kwargs = dict(vertices=mesh["vertices"].to(dtype), faces=mesh["faces"], resolution=resolution, band=band)
            exact = narrow_band_udf(mesh["vertices"].double(), mesh["faces"], resolution, band, backend="reference")
            assert_same_band(narrow_band_udf(**kwargs, backend="native"), exact, kwargs)
    finally:
        choose("")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=30)
@given(mesh=soups, resolution=st.integers(1, 12), band=st.floats(0.1, 9))
def test_sixteen_lanes_are_exact(dtype, mesh, resolution, band):
    """The AVX-512 kernel's shape, in code that runs on any machine."""
    kwargs = dict(vertices=mesh["vertices"].to(dtype), faces=mesh["faces"], resolution=resolution, band=band)
    args = kwargs["vertices"].numpy(), kwargs["faces"].numpy(), resolution, band, -1.0, 1.0
    *out, status = native_module().narrow_band_wide(*args)
    assert status == 0
    assert_same_band(tuple(map(torch.from_numpy, out)), brute_force(**kwargs), kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_more_triangles_than_voxels(dtype):
    """Long lists of candidates are refined once more before they are measured."""
    mesh = height_field(generator(0), 48)
    kwargs = dict(vertices=mesh["vertices"].to(dtype), faces=mesh["faces"], resolution=9, band=2.5)
    exact = brute_force(**kwargs)
    choose = torch.ops.cvctoolkit_native.isa
    try:
        for isa in ISAS:
            if choose(isa) == isa:
                assert_same_band(narrow_band_udf(**kwargs, backend="native"), exact, kwargs)
    finally:
        choose("")
    *wide, _ = native_module().narrow_band_wide(kwargs["vertices"].numpy(), kwargs["faces"].numpy(), 9, 2.5, -1.0, 1.0)
    assert_same_band(tuple(map(torch.from_numpy, wide)), exact, kwargs)


def test_float64_is_exact_in_float64():
    mesh = {**soup(generator(0), 20, 30), "resolution": 25, "band": 3.0}
    mesh["vertices"] = mesh["vertices"].double() * 0.4
    native, exact = (narrow_band_udf(**mesh, backend=b) for b in BACKENDS)
    assert torch.equal(native.coords, exact.coords)
    assert (native.udf - exact.udf).abs().max() < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_point_has_a_ball(backend):
    """Threshold and positions use the same grid: an off-by-one in either shows in a ball's border."""
    at = torch.tensor([[0.111, -0.222, 0.333]], dtype=torch.float64)
    for resolution in (31, 32, 33):
        coords, udf, face = narrow_band_udf(
            at.repeat(3, 1), torch.tensor([[0, 1, 2]]), resolution, 5.5, backend=backend
        )
        d = (grid_to_world(torch.cartesian_prod(*[torch.arange(resolution)] * 3).double(), resolution) - at).norm(
            dim=-1
        )
        near = d < 5.5 * 2 / resolution
        assert len(coords) == near.sum() and (face == 0).all()
        assert (udf - d[near]).abs().max() < 1e-14


# --- invariants -------------------------------------------------------------------------------------------------------


def example(seed, resolution=40):
    """A rough surface in the middle half of the grid, on coordinates that small motions keep exact."""
    mesh = height_field(generator(seed), 9)
    voxel = 2 / resolution
    return ((mesh["vertices"].double() * 0.5 / voxel * 64).round() / 64 * voxel), mesh["faces"]


def assert_same_voxels(a, b):
    """Equal bands but for rounding at the rim."""
    na, nb = band_names(a.coords), band_names(b.coords)
    fa, fb = torch.isin(na, nb), torch.isin(nb, na)
    assert (~fa).sum() + (~fb).sum() <= 2 and fa.sum() > 100
    assert (a.udf[fa] - b.udf[fb]).abs().max() < 1e-12


@given(st.integers(0, 99), st.tuples(*[st.integers(-5, 5)] * 3))
def test_moving_by_whole_voxels_moves_the_band(seed, shift):
    vertices, faces = example(seed)
    moved = narrow_band_udf(vertices + torch.tensor(shift).double() * (2 / 40), faces, 40, 2.97)
    moved.coords[:, 1:] -= torch.tensor(shift, dtype=torch.int32)
    assert_same_voxels(moved, narrow_band_udf(vertices, faces, 40, 2.97))


@given(st.integers(0, 99), st.permutations([0, 1, 2]), st.tuples(*[st.booleans()] * 3))
def test_turning_and_mirroring_the_mesh_turns_the_band(seed, axes, flips):
    vertices, faces = example(seed)
    sign = 1 - 2 * torch.tensor(flips).double()
    turned = narrow_band_udf(vertices[:, axes] * sign, faces, 40, 2.97)
    plain = narrow_band_udf(vertices, faces, 40, 2.97)
    coords = plain.coords[:, 1:][:, axes]
    coords = torch.where(torch.tensor(flips), 39 - coords, coords)
    coords = torch.cat([plain.coords[:, :1], coords], 1)
    order = band_names(coords).argsort()
    assert_same_voxels(turned, type(plain)(coords[order], plain.udf[order], plain.face_index[order]))


@given(st.integers(0, 99), st.sampled_from([2.0**-20, 0.25, 8.0, 2.0**30]))
def test_scale(seed, scale):
    vertices, faces = example(seed)
    plain = narrow_band_udf(vertices, faces, 40, 2.5)
    scaled = narrow_band_udf(vertices * scale, faces, 40, 2.5, bounds=(-scale, scale))
    assert torch.equal(plain.coords, scaled.coords) and torch.equal(plain.udf * scale, scaled.udf)


@given(st.integers(0, 99))
def test_order_and_orientation_of_the_mesh_do_not_matter(seed):
    vertices, faces = example(seed)
    g = generator(seed)
    order, rows = torch.randperm(len(vertices), generator=g), torch.randperm(len(faces), generator=g)
    renamed = order.argsort()[faces[rows]]
    corner = torch.randint(3, (len(faces), 1), generator=g)
    turned = renamed.gather(1, (corner + torch.arange(3)) % 3)
    flipped = torch.where(torch.rand(len(faces), 1, generator=g) < 0.5, turned.flip(1), turned)
    a, b = narrow_band_udf(vertices[order], flipped, 40, 2.97), narrow_band_udf(vertices, faces, 40, 2.97)
    assert torch.equal(a.coords, b.coords) and (a.udf - b.udf).abs().max() < 1e-13


def test_volumes_are_independent():
    parts = [soup(generator(k), 12, 10) for k in range(4)]
    volume = torch.tensor([7, 0, 32767, 300])
    vertices = torch.cat([p["vertices"] * 0.4 for p in parts])
    faces = torch.cat([p["faces"] + 12 * k for k, p in enumerate(parts)])
    together = narrow_band_udf(vertices, faces, 21, 2.0, face_batch=volume.repeat_interleave(10).int())
    for k in range(4):
        alone = narrow_band_udf(vertices, faces[10 * k : 10 * k + 10], 21, 2.0)
        rows = together.coords[:, 0] == volume[k]
        assert torch.equal(together.coords[rows, 1:], alone.coords[:, 1:])
        assert torch.equal(together.udf[rows], alone.udf)
        assert torch.equal(together.face_index[rows], alone.face_index + 10 * k)
    assert (together.coords[:, 0].diff() >= 0).all()


def test_the_number_of_threads_does_not_matter():
    mesh = height_field(generator(0), 120)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(narrow_band_udf(**mesh, resolution=100, band=3.0))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


# --- traps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1.0, 40.0])
def test_one_large_triangle_is_its_plane(size):
    """Nearest-vertex candidates, and parts of long triangles that are lost, show here."""
    corners = torch.tensor([[-size, -size, 0.02], [3 * size, -size, 0.02], [-size, 3 * size, 0.02]])
    coords, udf, _ = narrow_band_udf(corners, torch.tensor([[0, 1, 2]]), 96, 3.0)
    z = (coords[:, 3] + 0.5) * (2 / 96) - 1
    assert len(coords) == 96 * 96 * 6
    assert (udf - (z - 0.02).abs()).abs().max() < ROUNDING * 2 / 96


def test_tiny_triangles_are_not_dropped():
    """A plane of 0.4 million triangles a thousandth of a voxel across, with edges of 1e-5."""
    n, voxel = 450, 2 / 200
    axis = torch.linspace(0, 1, n, dtype=torch.float64) * 0.5 * voxel
    x, y = torch.meshgrid(axis, axis, indexing="ij")
    field = height_field(generator(0), n)
    vertices = torch.stack([x, y, torch.zeros_like(x)], -1).reshape(-1, 3).float()
    coords, udf, _ = narrow_band_udf(vertices, field["faces"], 200, 2.5)
    points = voxel_centers(coords, 200, -1, 1)
    nearest = torch.cat([points[:, :2].clamp(0, 0.5 * voxel), torch.zeros(len(points), 1)], 1)
    assert len(coords) > 50
    assert (udf - (points - nearest).norm(dim=-1)).abs().max() < ROUNDING * voxel


@pytest.mark.parametrize("resolution", [1291, 2048, 65536])
@pytest.mark.parametrize("backend", BACKENDS)
def test_beyond_2_to_the_31_voxels(backend, resolution):
    """int32 voxel numbers overflow above 1290³."""
    voxel = 2 / resolution
    mesh = height_field(generator(0), 4)
    corner = 1 - 12 * voxel
    vertices = mesh["vertices"].double() * 9 * voxel + corner
    kwargs = dict(vertices=vertices, faces=mesh["faces"], resolution=resolution, band=2.0)
    coords, udf, _ = narrow_band_udf(**kwargs, backend=backend)
    distance, _, _ = mesh_reference.closest_point_on_mesh(
        voxel_centers(coords, resolution, -1, 1), vertices, mesh["faces"]
    )
    assert coords.min(0).values[1:].min() > resolution - 30 and len(coords) > 500
    assert (udf - distance).abs().max() < 1e-9 * voxel
    moved = narrow_band_udf(vertices - corner, mesh["faces"], 64, 2.0, bounds=(-32 * voxel, 32 * voxel))
    assert abs(len(moved.coords) - len(coords)) <= 2


def test_meshes_outside_give_the_voxels_inside():
    mesh = height_field(generator(3), 8)
    whole = narrow_band_udf(mesh["vertices"].double(), mesh["faces"], 80, 3.0, bounds=(-2, 2))
    middle = narrow_band_udf(mesh["vertices"].double(), mesh["faces"], 20, 3.0, bounds=(-0.5, 0.5))
    inside = ((whole.coords[:, 1:] >= 30) & (whole.coords[:, 1:] < 50)).all(-1)
    assert torch.equal(whole.coords[inside, 1:] - 30, middle.coords[:, 1:])
    assert (whole.udf[inside] - middle.udf).abs().max() < 1e-13


def test_oracles():
    """libigl in float64 and Open3D: the distances of the band, and that just outside it nothing is nearer."""
    igl = oracle("igl")
    mesh = height_field(generator(5), 60)
    vertices, faces, resolution, band = mesh["vertices"], mesh["faces"].int(), 120, 3.0
    coords, udf, _ = narrow_band_udf(vertices, faces, resolution, band)
    everywhere = torch.cartesian_prod(torch.zeros(1).long(), *[torch.arange(resolution)] * 3)
    points = voxel_centers(everywhere, resolution, -1, 1)
    slab = points[:, 2].abs() < 1.0
    points, everywhere = points[slab], everywhere[slab]
    squared = igl.point_mesh_squared_distance(points.numpy(), vertices.double().numpy(), faces.numpy())[0]
    distance = torch.from_numpy(np.sqrt(squared))
    near = distance < band * 2 / resolution
    kwargs = dict(vertices=vertices, faces=faces, resolution=resolution, band=band)
    exact = everywhere[near].int(), distance[near]
    assert_same_band((coords, udf, _), exact, kwargs)
    try:
        import open3d
    except (ImportError, OSError):
        return
    scene = open3d.t.geometry.RaycastingScene()
    scene.add_triangles(open3d.core.Tensor(vertices.numpy()), open3d.core.Tensor(faces.numpy().astype(np.uint32)))
    centers = voxel_centers(coords, resolution, -1, 1).float().numpy()
    other = torch.from_numpy(scene.compute_distance(open3d.core.Tensor(centers)).numpy())
    assert (udf - other).abs().max() <= 4e-6


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradient_is_zero_at_distance_zero():
    vertices = torch.tensor([[0.25, 0.25, 0.25], [0.75, 0.25, 0.25], [0.25, 0.75, 0.25]]).double().requires_grad_()
    _, udf, _ = narrow_band_udf(vertices, torch.tensor([[0, 1, 2]]), 4, 2.0, bounds=(0, 2))
    assert (udf == 0).sum() == 3
    (grad,) = torch.autograd.grad(udf[udf == 0].sum(), vertices)
    assert (grad == 0).all()


def test_gradient_moves_the_band_with_the_mesh():
    """Summed over the vertices the gradient is minus the unit vectors towards the voxels: translation."""
    mesh = height_field(generator(0), 20)
    vertices = mesh["vertices"].double().requires_grad_()
    coords, udf, face = narrow_band_udf(vertices, mesh["faces"], 50, 3.0)
    (grad,) = torch.autograd.grad(udf.sum(), vertices)
    points = voxel_centers(coords, 50, -1, 1)
    corners = vertices.detach()[mesh["faces"][face]]
    _, weights = mesh_reference.closest_point_on_triangle(points, *corners.unbind(1))
    away = torch.nn.functional.normalize(points - (weights[..., None] * corners).sum(1), dim=-1)
    assert_gradients_close(grad.sum(0), -away.sum(0))


def test_double_backward_raises():
    mesh = height_field(generator(0), 4)
    vertices = mesh["vertices"].requires_grad_()
    _, udf, _ = narrow_band_udf(vertices, mesh["faces"], 10, 2.0)
    (grad,) = torch.autograd.grad(udf.square().sum(), vertices, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


# --- bad input --------------------------------------------------------------------------------------------------------


def test_shapes_of_a_cube_with_ties():
    """Twelve triangles, every voxel of a diagonal tied: distances are those of the box."""
    mesh = cube()
    coords, udf, _ = narrow_band_udf(mesh["vertices"].double() * 0.5, mesh["faces"], 32, 4.0)
    p = voxel_centers(coords, 32, -1, 1).abs() - 0.5
    outside, inside = p.clamp_min(0).norm(dim=-1), -p.amax(-1).clamp_max(0)
    assert (udf - (outside + inside)).abs().max() < 1e-14
