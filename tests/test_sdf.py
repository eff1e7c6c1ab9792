"""The narrow band and the thin SDF: exactness, invariants, traps seen elsewhere, independent oracles, bad input."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import example as explicitly
from hypothesis import given, settings

from cvctoolkit.ops import (
    grid_to_world,
    narrow_band_udf,
)
from cvctoolkit.ops.mesh import reference as mesh_reference
from cvctoolkit.ops.mesh.samples import cube, height_field, soup
from cvctoolkit.ops.sdf.narrow_band_samples import ROUNDING, assert_same_band, band_names
from cvctoolkit.ops.sdf.reference import voxel_centers
from cvctoolkit.testing import assert_gradients_close
from tests.native import native_module
from tests.oracles import oracle

BACKENDS = ["native", "reference"]
ISAS = ["baseline", "avx2", "avx512"]


def generator(seed):
    return torch.Generator().manual_seed(seed)


any_width = pytest.mark.filterwarnings("ignore:narrow_band_udf. a band:UserWarning")


def brute_force(vertices, faces, resolution, band, bounds=(-1.0, 1.0)):
    """Every voxel against every face, in float64."""
    axes = [torch.zeros(1).long(), *[torch.arange(resolution)] * 3]
    coords = torch.cartesian_prod(*axes).int()
    points = voxel_centers(coords, resolution, *bounds)
    udf, face, _ = mesh_reference.closest_point_on_mesh(points, vertices.double(), faces)
    near = udf < band * (bounds[1] - bounds[0]) / resolution
    return coords[near], udf[near], face[near]


def scattered(seed, faces, log_size, spread):
    """Triangles of sizes from a point's to many times the grid's, in places from its middle to far outside."""
    g = generator(seed)
    at = torch.randn(faces, 1, 3, generator=g, dtype=torch.float64) * spread
    size = 10 ** (log_size + torch.rand(faces, 1, 1, generator=g, dtype=torch.float64) * 2 - 1)
    corners = at + size * torch.randn(faces, 3, 3, generator=g, dtype=torch.float64)
    if faces > 2:
        corners[0, 1] = corners[0, 0]
        corners[1, 2] = (corners[1, 0] + corners[1, 1]) / 2
        corners[2] = corners[-1]
    return dict(vertices=corners.reshape(-1, 3), faces=torch.arange(3 * faces).reshape(faces, 3))


soups = st.builds(
    scattered,
    st.integers(0, 2**16),
    st.integers(1, 12),
    st.sampled_from([-6, -2, -1, 0, 1, 3]),
    st.sampled_from([0.3, 1.0, 3.0]),
)


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

TRIANGLE = dict(vertices=torch.eye(3), faces=torch.tensor([[0, 1, 2]]), resolution=8, band=2.0)


@pytest.mark.parametrize(
    "changes,error,message",
    [
        (dict(vertices=np.eye(3)), TypeError, "vertices must be a torch.Tensor"),
        (dict(vertices=torch.eye(4)), ValueError, r"vertices must have shape \[Nv, 3\]"),
        (dict(vertices=torch.eye(3).half()), ValueError, "vertices must have dtype"),
        (dict(vertices=torch.eye(3).int()), ValueError, "vertices must have dtype"),
        (dict(vertices=torch.eye(3) * float("nan")), ValueError, "vertices must be finite"),
        (dict(vertices=torch.eye(3) / 0), ValueError, "vertices must be finite"),
        (dict(vertices=torch.eye(3) * 1e30), ValueError, "vertices must be within"),
        (dict(faces=torch.tensor([[0, 1, 3]])), ValueError, "faces must index vertices 0 to 2, got 3"),
        (dict(faces=torch.tensor([[0, -1, 2]])), ValueError, "faces must index vertices 0 to 2, got -1"),
        (dict(faces=torch.tensor([[0, 1, 2]]).float()), ValueError, "faces must have dtype"),
        (dict(faces=torch.tensor([0, 1, 2])), ValueError, "faces must have shape"),
        (dict(faces=torch.zeros(1, 3).int().to("meta")), ValueError, "faces must be on cpu"),
        (dict(resolution=0), ValueError, "resolution must be >= 1"),
        (dict(resolution=65537), ValueError, "resolution must be <= 65536"),
        (dict(resolution=8.0), TypeError, "resolution must be an integer"),
        (dict(band=0), ValueError, "band must be > 0"),
        (dict(band=-1.0), ValueError, "band must be > 0"),
        (dict(band=float("nan")), ValueError, "band must be finite"),
        (dict(band=1e9), ValueError, "band must be <= 65536"),
        (dict(band="4"), TypeError, "band must be a number"),
        (dict(bounds=(1.0, -1.0)), ValueError, "bounds must have low < high"),
        (dict(bounds=2.0), TypeError, "bounds must be a pair"),
        (dict(bounds=(-1.7e308, 1.7e308)), ValueError, "bounds must lie within"),
        (dict(vertices=torch.eye(3).to_sparse()), ValueError, "vertices must be a dense tensor"),
        (dict(face_batch=torch.zeros(2).int()), ValueError, "face_batch must have shape"),
        (dict(face_batch=torch.zeros(1)), ValueError, "face_batch must have dtype"),
        (dict(face_batch=torch.tensor([-1])), ValueError, r"face_batch must be in \[0, 32768\), got -1"),
        (dict(face_batch=torch.tensor([1 << 40])), ValueError, r"face_batch must be in \[0, 32768\)"),
        (dict(backend="triton"), ValueError, "narrow_band_udf"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message) as caught:
        narrow_band_udf(**{**TRIANGLE, **changes})
    assert "narrow_band_udf" in str(caught.value)


def test_a_band_that_cannot_fit_is_refused_before_it_is_made():
    square = torch.tensor([[-1.0, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3]])
    with pytest.raises(ValueError, match="does not fit into memory"):
        narrow_band_udf(square, faces, 65536, 64.0)


def test_a_band_wider_than_the_grid_is_the_whole_grid():
    coords, udf, _ = narrow_band_udf(**{**TRIANGLE, "band": 300.0})
    assert len(coords) == 8**3 and udf.max() < 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_gives_nothing(backend):
    for vertices, faces in ((0, 0), (5, 0)):
        mesh = torch.zeros(vertices, 3), torch.zeros(faces, 3).long()
        coords, udf, face = narrow_band_udf(*mesh, 8, 2.0, backend=backend)
        assert coords.shape == (0, 4) and udf.shape == (0,) and face.shape == (0,)


def test_unused_vertices_may_be_anywhere_but_not_nan():
    vertices = torch.cat([torch.eye(3), torch.full((1, 3), 1e30)])
    assert len(narrow_band_udf(**{**TRIANGLE, "vertices": vertices}).coords) > 0


@any_width
@settings(max_examples=150)
@given(
    seed=st.integers(0, 2**16),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e6, 1e20, float("inf"), float("nan")]),
    resolution=st.sampled_from([-1, 0, 1, 2, 7, 64, 65536, 1 << 20]),
    band=st.sampled_from([-1.0, 0.0, 1e-9, 0.5, 2.0, 70.0, 1e5, float("inf")]),
    bounds=st.sampled_from([(-1.0, 1.0), (0.0, 0.0), (-1e-30, 1e-30), (-1e30, 1e30), (5.0, 6.0)]),
    backend=st.sampled_from([None, "native"]),
)
def test_anything_gives_a_band_or_a_clear_error(seed, size, resolution, band, bounds, backend):
    mesh = soup(generator(seed), 5, 4)
    if resolution == 65536 and size == 1.0:
        size = 1e-3
    try:
        coords, udf, face = narrow_band_udf(
            mesh["vertices"] * size, mesh["faces"], resolution, band, bounds=bounds, backend=backend
        )
    except (ValueError, TypeError) as error:
        assert "narrow_band_udf" in str(error)
        return
    assert (coords[:, 1:] >= 0).all() and (coords[:, 1:] < resolution).all()
    assert udf.isfinite().all() and (udf >= 0).all() and ((face >= 0) & (face < 4)).all()


def test_shapes_of_a_cube_with_ties():
    """Twelve triangles, every voxel of a diagonal tied: distances are those of the box."""
    mesh = cube()
    coords, udf, _ = narrow_band_udf(mesh["vertices"].double() * 0.5, mesh["faces"], 32, 4.0)
    p = voxel_centers(coords, 32, -1, 1).abs() - 0.5
    outside, inside = p.clamp_min(0).norm(dim=-1), -p.amax(-1).clamp_max(0)
    assert (udf - (outside + inside)).abs().max() < 1e-14


# --- the device pipeline, on the host ---------------------------------------------------------------------------------


def pipeline(vertices, faces, resolution, band, face_batch=None, bounds=(-1.0, 1.0), status=0, **limits):
    batch = torch.zeros(0).long() if face_batch is None else face_batch.long()
    module = native_module()
    *out, found = module.narrow_band_pipeline(
        vertices.numpy(), faces.long().numpy(), batch.numpy(), resolution, band, *bounds, **limits
    )
    assert found == status
    return tuple(torch.from_numpy(t) for t in out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=30)
@given(mesh=soups, resolution=st.integers(1, 12), band=st.floats(0.1, 9), low=st.sampled_from([-1.0, -0.3, 5.0]))
def test_device_pipeline_is_the_reference_bit_for_bit(dtype, mesh, resolution, band, low):
    mesh = {**mesh, "vertices": mesh["vertices"].to(dtype), "resolution": resolution, "band": band}
    mesh["bounds"] = (low, low + 1.7)
    coords, udf, _ = pipeline(**mesh)
    exact = brute_force(**{**mesh, "vertices": mesh["vertices"].double()})
    assert_same_band((coords, udf, _), exact, mesh)


def test_device_pipeline_on_volumes_and_large_grids():
    mesh = soup(generator(1), 30, 40)
    kwargs = dict(vertices=mesh["vertices"] * 0.3, faces=mesh["faces"], resolution=40, band=2.3)
    for extra in (dict(), dict(face_batch=torch.arange(40) % 3), dict(bounds=(-9000.0, 9000.0), resolution=65536)):
        got = pipeline(**{**kwargs, **extra})
        same = narrow_band_udf(**{**kwargs, **extra}, backend="reference")
        assert_same_band(got, (same.coords, same.udf), {**kwargs, **extra})
        assert all(torch.equal(a, b) for a, b in zip(got, same))


def test_device_pipeline_leaves_out_what_it_cannot_use():
    vertices = torch.cat([torch.eye(3) * 0.5, torch.tensor([[math.nan] * 3, [math.inf, 0, 0], [1e30, 0, 0]])])
    bad = torch.tensor([[0, 1, 3], [0, 1, 4], [0, 1, 5], [0, 1, 6], [-1, 1, 2], [0, 1, 1 << 40]])
    good = pipeline(vertices, torch.tensor([[0, 1, 2]]), 16, 2.0)
    both = pipeline(vertices, torch.cat([bad, torch.tensor([[0, 1, 2]])]), 16, 2.0)
    assert torch.equal(good[0], both[0]) and torch.equal(good[1], both[1]) and (both[2] == 6).all()
    batch = torch.tensor([-1, 1 << 15, 5])
    chosen = pipeline(vertices, torch.tensor([[0, 1, 2]] * 3), 16, 2.0, face_batch=batch)
    assert torch.equal(good[0][:, 1:], chosen[0][:, 1:]) and (chosen[0][:, 0] == 5).all() and (chosen[2] == 2).all()
    assert len(pipeline(vertices, bad, 16, 2.0)[0]) == len(pipeline(vertices, bad[:0], 16, 2.0)[0]) == 0


@pytest.mark.parametrize("resolution, band, memory", [(64, 4.0, 1 << 18), (64, 60.0, 1 << 12)])
def test_device_pipeline_refuses_what_does_not_fit(resolution, band, memory):
    too_large = 5
    coords, _, _ = pipeline(TRIANGLE["vertices"], TRIANGLE["faces"], resolution, band, status=too_large, memory=memory)
    assert len(coords) == 0
