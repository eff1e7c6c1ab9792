"""The narrow band where triangles are many and much smaller than a voxel: groups, their boxes and their vertices."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from cvctoolkit.ops import closest_point_on_mesh, narrow_band_udf
from cvctoolkit.ops.mesh import reference as mesh_reference
from cvctoolkit.ops.mesh.samples import height_field
from cvctoolkit.ops.sdf.narrow_band_samples import assert_same_band
from cvctoolkit.ops.sdf.reference import voxel_centers
from tests.meshes import generator
from tests.native import native_module

ISAS = ["baseline", "avx2", "avx512"]
MANY = 1200  # triangles in a grid of 8³ voxels: enough for groups

any_width = pytest.mark.filterwarnings("ignore:narrow_band_udf. a band:UserWarning")


def brute_force(vertices, faces, resolution, band, bounds=(-1.0, 1.0)):
    coords = torch.cartesian_prod(torch.zeros(1).long(), *[torch.arange(resolution)] * 3).int()
    points = voxel_centers(coords, resolution, *bounds)
    udf, face, _ = mesh_reference.closest_point_on_mesh(points, vertices.double(), faces)
    near = udf < band * (bounds[1] - bounds[0]) / resolution
    return coords[near], udf[near], face[near]


def crowd(seed, kind, dtype=torch.float32):
    """Many triangles of an awkward kind, in [-1, 1]³ for the most part."""
    g = generator(seed)
    at = torch.rand(MANY, 1, 3, generator=g, dtype=torch.float64) * 1.6 - 0.8
    if kind == "in one place":
        at *= 1e-3
    size = torch.full((MANY, 1, 1), 0.05, dtype=torch.float64)
    corners = torch.randn(MANY, 3, 3, generator=g, dtype=torch.float64)
    if kind == "all sizes":
        size = 10 ** (torch.rand(MANY, 1, 1, generator=g, dtype=torch.float64) * 7 - 6)
    elif kind == "some huge":
        size[::40] = 10 ** (torch.rand(MANY // 40, 1, 1, generator=g, dtype=torch.float64) * 4)
    elif kind == "needles":
        corners[:, 2] = corners[:, 0] + (corners[:, 1] - corners[:, 0]) * torch.rand(MANY, 1, generator=g).double()
        corners[:, 2] += 1e-7 * torch.randn(MANY, 3, generator=g)
    elif kind == "points":
        corners[:, 1:] = corners[:, :1]
    vertices = (at + size * corners).reshape(-1, 3).to(dtype)
    faces = torch.arange(3 * MANY).reshape(MANY, 3)
    if kind == "fans":  # all triangles around one of 24 vertices, each with a neighbour's corner
        faces[:, 0] = faces[:, 1] % 24
        faces[:, 2] = faces[:, 1].roll(1)
    elif kind == "welded":  # few vertices, with any faces between those near one another, corners of one face included
        near = at[:40].repeat_interleave(12, 0) + 0.1 * torch.randn(480, 1, 3, generator=g).double()
        vertices = near.reshape(-1, 3).to(dtype)
        faces = 12 * torch.randint(40, (MANY, 1), generator=g) + torch.randint(12, (MANY, 3), generator=g)
    return dict(vertices=vertices, faces=faces)


KINDS = ["small", "all sizes", "some huge", "needles", "points", "in one place", "fans", "welded"]


@any_width
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4)
@given(
    seed=st.integers(0, 2**16),
    resolution=st.sampled_from([5, 8, 11]),
    band=st.sampled_from([0.7, 2.5, 8.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    isa=st.sampled_from([*ISAS, "wide"]),
)
def test_equals_brute_force(kind, seed, resolution, band, dtype, isa):
    kwargs = dict(**crowd(seed, kind, dtype), resolution=resolution, band=band)
    if isa == "wide":  # the AVX-512 kernel's shape, in code that runs on any machine
        args = kwargs["vertices"].numpy(), kwargs["faces"].numpy(), resolution, band, -1.0, 1.0
        *out, status = native_module().narrow_band_wide(*args)
        assert status == 0
        found = tuple(map(torch.from_numpy, out))
    else:
        choose = torch.ops.cvctoolkit_native.isa
        try:
            choose(isa)
            found = narrow_band_udf(**kwargs, backend="native")
        finally:
            choose("")
    assert_same_band(found, brute_force(**kwargs), kwargs)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("resolution", "band"), [(48, 20.0), (50, 60.0), (40, 3.0)])
@pytest.mark.parametrize("kind", ["surface", *KINDS])
def test_far_from_a_crowd(kind, resolution, band, isa):
    """Wide bands: rounding of squared distances grows with their square, the bounds must leave room for it."""
    if kind == "surface":
        mesh = height_field(generator(2), 100)
        mesh = dict(vertices=mesh["vertices"] * torch.tensor([0.3, 0.3, 0.2]) + 0.21, faces=mesh["faces"])
    else:
        mesh = crowd(3, kind)
        mesh = dict(mesh, vertices=0.1 * mesh["vertices"] - 0.37)
    if band > 30:  # float32 itself is too coarse; culling is the same
        mesh = dict(mesh, vertices=mesh["vertices"].double())
    coords = torch.cartesian_prod(torch.zeros(1).long(), *[torch.arange(resolution)] * 3).int()
    points = voxel_centers(coords, resolution, -1.0, 1.0)
    udf, face, _ = closest_point_on_mesh(points.double(), mesh["vertices"].double(), mesh["faces"], backend="native")
    near = udf < band * 2 / resolution
    choose = torch.ops.cvctoolkit_native.isa
    try:
        choose(isa)
        found = narrow_band_udf(**mesh, resolution=resolution, band=band, backend="native")
    finally:
        choose("")
    assert_same_band(found, (coords[near], udf[near], face[near]), dict(**mesh, resolution=resolution, band=band))


def test_the_order_of_faces_does_not_matter():
    mesh = height_field(generator(0), 150)
    vertices, faces = mesh["vertices"] * torch.tensor([0.3, 0.3, 0.2]), mesh["faces"]
    shuffled = faces[torch.randperm(len(faces), generator=generator(1))]
    a, b = narrow_band_udf(vertices, faces, 40, 3.0), narrow_band_udf(vertices, shuffled, 40, 3.0)
    assert torch.equal(a.coords, b.coords) and (a.udf - b.udf).abs().max() < 1e-6


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**16),
    count=st.integers(1, 16),
    log_size=st.floats(-6, 1),
    thinness=st.sampled_from([0.0, 1e-7, 1e-3, 0.3, 1.0]),
    offset=st.sampled_from([0.0, 4.0, 30.0]),
    distance=st.floats(-3, 2),
)
def test_bounds_are_below_the_distance(seed, count, log_size, thinness, offset, distance):
    """Of triangles by their vertices, and of a group by its box, up to float32 rounding of coordinates and squares."""
    g = generator(seed)
    normal, direction = torch.nn.functional.normalize(torch.randn(2, 3, generator=g).double(), dim=1)
    corners = torch.randn(count, 3, 3, generator=g).double()
    corners -= (1 - thinness) * (corners @ normal)[..., None] * normal
    corners = (10**log_size * corners + offset * torch.randn(3, generator=g)).float()
    x = (corners[0, 0] + 10**distance * direction).float()
    by_vertices, by_box = native_module().narrow_band_bounds(corners.numpy(), x.numpy())
    points = x.double().expand(1, 3)
    faces = torch.arange(3 * count).reshape(count, 3)
    square = [
        mesh_reference.closest_point_on_mesh(points, corners.double().reshape(-1, 3), f[None])[0] ** 2 for f in faces
    ]
    square = torch.cat(square).numpy()
    reach = float(corners.abs().max() + x.abs().max())
    room = 1e-6 * reach**2 + 4e-6 * square
    assert (by_vertices <= square + room).all()
    assert by_box <= (square + room).min() + 1e-4
    # By the vertices they are not below by more than a third of a squared edge, by the box by more than its diagonal.
    edges = (corners - corners.roll(1, 1)).double().square().sum(-1).amax(1).numpy()
    to_vertices = (corners.double() - x.double()).square().sum(-1).amin(1).numpy()
    assert (by_vertices >= to_vertices - edges * (1 / 3 + 1e-5) - room).all()
    diameter = torch.cdist(corners.reshape(-1, 3), corners.reshape(-1, 3)).max().double().numpy()
    assert np.sqrt(by_box) >= np.sqrt(square.min()) - 4 * diameter - 1e-4 - 1e-6 * reach


@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**16),
    log_size=st.floats(-6, 0.3),
    kind=st.sampled_from(["any", "right", "needle", "segment", "point", "isosceles"]),
    offset=st.sampled_from([0.0, 7.9999999, 8.0, 300.0, 65535.0, -40.0]),
)
def test_spheres_hold_their_triangles_and_lie_on_them(seed, log_size, kind, offset):
    """As small as can be, up to the steps they are packed in, whatever the shape, also at the border of a cell."""
    n, band = 200, 50.0
    g = generator(seed)
    t = torch.randn(n, 3, 3, generator=g).double()
    if kind == "right":
        t[:, 2] = t[:, 0] + torch.linalg.cross(t[:, 1] - t[:, 0], torch.randn(n, 3, generator=g).double())
    elif kind == "needle":
        t[:, 2] = t[:, 0] + torch.rand(n, 1, generator=g) * (t[:, 1] - t[:, 0]) + 1e-8 * t[:, 2]
    elif kind == "segment":
        t[:, 2] = t[:, 1]
    elif kind == "point":
        t[:, 1:] = t[:, :1]
    elif kind == "isosceles":
        t[:, 2] = t[:, 0] + (t[:, 1] - t[:, 0]).norm(dim=1, keepdim=True) * torch.nn.functional.normalize(
            t[:, 2], dim=1
        )
    t = 10**log_size * t + offset
    spheres, kinds = (torch.from_numpy(x) for x in native_module().narrow_band_spheres(t.numpy(), 65536, band))
    centre, radius = spheres[:, :3], spheres[:, 3]
    one = kinds == 1
    to_corners = (t - centre[:, None]).norm(dim=2).amax(1)
    assert (to_corners <= radius)[one].all()
    # Which spheres: those around the longest edge or the circumcircle, not wider than what is asked for.
    edges = (t - t.roll(1, 1)).norm(dim=2)
    area = torch.linalg.cross(t[:, 1] - t[:, 0], t[:, 2] - t[:, 0]).norm(dim=1) / 2
    acute = 2 * edges.amax(1) ** 2 < (edges**2).sum(1)
    exact = torch.where(acute, edges.prod(1) / (4 * area.clamp_min(1e-300)), edges.amax(1) / 2)
    step, rounding = 4.5 / 254, 0.8660254 / 32 + 3e-5
    assert (radius <= exact + step + rounding + 1e-5)[one].all()
    assert one[exact < 3.9].all() and (kinds == 2)[exact > 4.1].all()
    to_triangle, _ = mesh_reference.closest_point_on_triangle(centre, *t.unbind(1))
    assert (to_triangle <= rounding)[one].all()


def test_spheres_out_of_reach_far_or_wrong():
    """Left out beyond the band; left to float64 where they are long, far away or not numbers at all."""
    at = torch.tensor([[5.0, 5, 5], [-3.0, 5, 5], [-30.0, 5, 5], [5, 90.0, 5], [3e6, 5, 5], [2e9, 5, 5]]).double()
    t = at[:, None] + 0.1 * torch.eye(3).double()
    wrong = t[:1].repeat(5, 1, 1)
    wrong[0, 0, 0], wrong[1, 1, 1], wrong[2, 2, 2] = torch.nan, torch.nan, torch.inf
    wrong[3, 1], wrong[4, 2, 0] = 20, 3e30
    triangles = torch.cat([t, wrong]).numpy()
    _, kinds = native_module().narrow_band_spheres(triangles, 64, 4.0)
    assert kinds.tolist() == [1, 1, 0, 0, 2, 2, 2, 2, 2, 2, 2]
    for count in range(1, 8):  # vectors that are not full
        assert native_module().narrow_band_spheres(triangles[:count], 64, 4.0)[1].tolist() == kinds[:count].tolist()


def test_faces_of_every_kind_in_one_mesh_on_any_number_of_threads():
    """Long, tiny, flat and distant ones between others, over many runs of faces, in batches, bit for bit."""
    g = generator(5)
    surface = height_field(g, 110)  # 24 k faces: several runs per thread
    vertices = [surface["vertices"] * torch.tensor([0.3, 0.3, 0.2])]
    faces = [surface["faces"]]
    for kind in ("some huge", "needles", "points", "all sizes"):
        other = crowd(6, kind)
        faces.append(other["faces"] + sum(len(v) for v in vertices))
        vertices.append(other["vertices"])
    vertices, faces = torch.cat(vertices), torch.cat(faces)
    faces = faces[torch.randperm(len(faces), generator=g)]
    batch = torch.arange(len(faces)) % 3
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(narrow_band_udf(vertices, faces, 40, 3.0, face_batch=batch, backend="native"))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    for b in range(3):  # each of the batches as if it were alone
        alone = narrow_band_udf(vertices, faces[batch == b], 40, 3.0, backend="native")
        here = found[0].coords[:, 0] == b
        assert torch.equal(alone.coords[:, 1:], found[0].coords[here, 1:])
        assert (alone.udf - found[0].udf[here]).abs().max() < 1e-6
