"""Mesh queries: brute force, independent oracles, invariants, degenerate and bad input."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from cvctoolkit.ops import build_bvh, cast_rays, closest_point_on_mesh, vertex_normals
from cvctoolkit.ops.mesh.samples import cube, height_field, soup
from tests.meshes import assert_same, generator, meshes, queries
from tests.oracles import oracle

# --- against brute force ----------------------------------------------------------------------------------------------


@given(meshes, st.integers(0, 2**16))
def test_the_tree_finds_what_brute_force_finds(mesh, seed):
    points = queries(mesh, seed)
    fast, slow = (closest_point_on_mesh(points, *mesh, backend=b) for b in ("native", "reference"))
    assert_same(fast, slow)


@given(meshes, st.integers(0, 2**16))
def test_rays_hit_what_brute_force_hits(mesh, seed):
    origins = queries(mesh, seed)
    targets = queries(mesh, seed + 1)
    directions = (targets - origins) * 2.0 ** torch.randint(-9, 9, (len(origins), 1), generator=generator(seed))
    usable = directions.ne(0).any(1) & directions.isfinite().all(1)
    origins, directions = origins[usable], directions[usable]
    fast, slow = (cast_rays(origins, directions, *mesh, backend=b) for b in ("native", "reference"))
    assert_same(fast, slow)


@given(st.integers(0, 2**16))
def test_float64_is_answered_in_float64(seed):
    vertices, faces = (v.double() if v.is_floating_point() else v for v in soup(generator(seed), 40, 90).values())
    vertices += 1e-10 * torch.randn(vertices.shape, generator=generator(seed), dtype=torch.float64)
    points = torch.cat([vertices[:20] + 1e-12, torch.randn(60, 3, generator=generator(seed), dtype=torch.float64)])
    fast, slow = (closest_point_on_mesh(points, vertices, faces, backend=b) for b in ("native", "reference"))
    torch.testing.assert_close(fast.distance, slow.distance, rtol=1e-15, atol=0)  # torch's sqrt may be off by one ulp
    directions = torch.randn(80, 3, generator=generator(seed), dtype=torch.float64)
    assert_same(*(cast_rays(points, directions, vertices, faces, backend=b) for b in ("native", "reference")))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same(isa):
    g = generator(3)
    mesh, points = height_field(g, 40), torch.randn(3000, 3, generator=g)
    directions = torch.randn(3000, 3, generator=g)
    calls = [lambda: closest_point_on_mesh(points, **mesh), lambda: cast_rays(points, directions, **mesh)]
    expected = [call() for call in calls]
    try:
        if torch.ops.cvctoolkit_native.isa(isa) != isa:
            pytest.skip(f"this machine has no {isa}")
        for call, result in zip(calls, expected, strict=True):
            assert_same(call(), result)
    finally:
        torch.ops.cvctoolkit_native.isa("")


def test_a_deep_tree_with_a_leaf_half_full():
    g = generator(0)
    mesh = height_field(g, 300)  # 178 802 faces, six levels
    points = torch.rand(20_000, 3, generator=g) * 2.4 - 1.2
    result = closest_point_on_mesh(points, **mesh)
    some = torch.arange(0, len(points), 997)
    assert_same([r[some] for r in result], closest_point_on_mesh(points[some], **mesh, backend="reference"))


# --- oracles that nobody here wrote -----------------------------------------------------------------------------------


TOLERANCE = 4e-6  # 2e-6 of the bounds' width, 2


def surface_and_points(n=20_000):
    g = generator(5)
    mesh = height_field(g, 60)
    near = mesh["vertices"][mesh["faces"][torch.randint(len(mesh["faces"]), (n,), generator=g)]].mean(1)
    return mesh, near + torch.randn(n, 3, generator=g) * torch.tensor([0.01, 0.1, 1.0])[torch.arange(n) % 3, None]


def open3d_scene(vertices, faces):
    open3d = pytest.importorskip("open3d")
    scene = open3d.t.geometry.RaycastingScene()
    scene.add_triangles(open3d.core.Tensor(vertices.numpy()), open3d.core.Tensor(faces.numpy().astype(np.uint32)))
    return scene, lambda x: open3d.core.Tensor(x.numpy())


def test_distances_agree_with_open3d():
    mesh, points = surface_and_points()
    scene, tensor = open3d_scene(**mesh)
    expected = scene.compute_distance(tensor(points)).numpy()
    assert np.abs(closest_point_on_mesh(points, **mesh).distance.numpy() - expected).max() < TOLERANCE


def test_distances_agree_with_libigl():
    igl = oracle("igl")
    mesh, points = surface_and_points()
    v, f, p = mesh["vertices"].double().numpy(), mesh["faces"].numpy(), points.double().numpy()
    squared, face_index, nearest = igl.point_mesh_squared_distance(p, v, f)[:3]
    result = closest_point_on_mesh(points, **mesh)
    assert np.abs(result.distance.numpy() - np.sqrt(squared)).max() < 1e-6
    ours = (mesh["vertices"][mesh["faces"][result.face_index]] * result.barycentric[..., None]).sum(1)
    same = result.face_index.numpy() == face_index
    assert same.mean() > 0.7  # the rest are nearest to an edge or a corner, which belongs to several faces
    assert np.abs(ours.numpy() - nearest)[same].max() < 1e-5


def test_distances_agree_with_fcpw():
    fcpw = oracle("fcpw")
    mesh, points = surface_and_points()
    hits = fcpw.interaction_3D_list()
    by_columns = np.asfortranarray(points.numpy())
    fcpw_scene(**mesh).find_closest_points(by_columns, np.full(len(points), np.inf, np.float32), hits, False)
    expected = np.array([hit.d for hit in hits])
    assert np.abs(closest_point_on_mesh(points, **mesh).distance.numpy() - expected).max() < TOLERANCE


def fcpw_scene(vertices, faces):
    fcpw = oracle("fcpw")
    scene = fcpw.scene_3D()
    scene.set_object_count(1)
    scene.set_object_vertices(vertices.numpy(), 0)
    scene.set_object_triangles(faces.int().numpy(), 0)
    scene.build(fcpw.aggregate_type.bvh_surface_area, True, False, False)
    return scene


def rays(n=20_000):
    mesh, points = surface_and_points(n)
    directions = torch.nn.functional.normalize(torch.randn(points.shape, generator=generator(1)), dim=1)
    return mesh, points, directions, cast_rays(points, directions, **mesh)


def assert_same_hits(result, t, face_index):
    """Distances within the tolerance, and the same faces but where two of them are that near each other."""
    hit = np.isfinite(t)
    assert np.array_equal(result.t.isfinite().numpy(), hit) and 0.2 < hit.mean() < 0.9
    assert np.abs(result.t.numpy() - t)[hit].max() < TOLERANCE
    assert (result.face_index.numpy()[hit] == face_index[hit]).mean() > 0.999


def test_rays_agree_with_open3d():
    mesh, points, directions, result = rays()
    scene, tensor = open3d_scene(**mesh)
    expected = scene.cast_rays(tensor(torch.cat([points, directions], 1)))
    assert_same_hits(result, expected["t_hit"].numpy(), expected["primitive_ids"].numpy().astype(np.int64))


def test_rays_agree_with_fcpw():
    fcpw = oracle("fcpw")
    mesh, points, directions, result = rays()
    found = fcpw.interaction_3D_list()
    origins, towards = (np.asfortranarray(x.numpy()) for x in (points, directions))
    fcpw_scene(**mesh).intersect(origins, towards, np.full(len(points), np.inf, np.float32), found, False)
    face_index = np.array([hit.primitive_index for hit in found])
    hit = (face_index >= 0) & (face_index < len(mesh["faces"]))
    assert_same_hits(result, np.where(hit, [hit.d for hit in found], np.inf), face_index)


def test_rays_agree_with_libigl():
    """Every triangle against every ray, in float64."""
    igl = oracle("igl")
    mesh, points, directions, result = rays(2000)
    v, f = mesh["vertices"].double().numpy(), mesh["faces"].long().numpy()
    t, face_index = np.full(len(points), np.inf), np.full(len(points), -1)
    for k, ray in enumerate(zip(points.double().numpy(), directions.double().numpy())):
        for face, distance, *_ in igl.ray_mesh_intersect(*ray, v, f) or ():
            if 0 <= distance < t[k]:
                t[k], face_index[k] = distance, face
    assert_same_hits(result, t, face_index)


def test_normals_agree_with_trimesh():
    trimesh = oracle("trimesh")
    sphere = trimesh.creation.icosphere(subdivisions=2)
    vertices, faces = torch.tensor(sphere.vertices), torch.tensor(sphere.faces)
    rough = vertices * (1 + 0.1 * torch.rand(len(vertices), 1, generator=generator(0), dtype=torch.float64))
    expected = trimesh.Trimesh(rough.numpy(), sphere.faces, process=False).vertex_normals
    np.testing.assert_allclose(vertex_normals(rough, faces).numpy(), expected, atol=1e-9)
    for weighting in ("angle", "area", "uniform"):
        assert ((vertex_normals(vertices, faces, weighting=weighting) * vertices).sum(-1) > 0.99).all()


# --- invariants -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**16))
def test_what_does_not_change_the_distance(seed):
    g = generator(seed)
    vertices, faces = soup(g, 50, 120).values()
    points = torch.randn(80, 3, generator=g)
    distance, face_index, _ = closest_point_on_mesh(points, vertices, faces)

    renamed = torch.randperm(len(vertices), generator=g)
    moved = torch.empty_like(vertices).index_copy_(0, renamed, vertices)
    assert_same(closest_point_on_mesh(points, moved, renamed[faces.long()])[:2], (distance, face_index))

    order = torch.randperm(len(faces), generator=g)
    shuffled = closest_point_on_mesh(points, vertices, faces[order])
    assert torch.equal(shuffled.distance, distance)
    assert torch.equal(closest_point_on_mesh(points, vertices, faces.flip(1)).distance, distance)
    assert torch.equal(closest_point_on_mesh(points, vertices, faces.roll(1, 1)).distance, distance)
    assert torch.equal(closest_point_on_mesh(points * 1024, vertices * 1024, faces).distance, distance * 1024)

    q, _ = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=torch.float64))
    turned = [(x.double() @ q.T + 2).float() for x in (points, vertices)]
    torch.testing.assert_close(closest_point_on_mesh(*turned, faces).distance, distance, rtol=0, atol=4e-6)


@given(st.integers(0, 2**16))
def test_what_does_not_change_a_hit(seed):
    g = generator(seed)
    vertices, faces = soup(g, 50, 120).values()
    origins, directions = torch.randn(2, 80, 3, generator=g).unbind()
    t, face_index, _ = cast_rays(origins, directions, vertices, faces)
    assert torch.equal(cast_rays(origins, directions, vertices, faces.flip(1)).t, t)
    order = torch.randperm(len(faces), generator=g)
    assert torch.equal(cast_rays(origins, directions, vertices, faces[order]).t, t)
    longer = cast_rays(origins, 8 * directions, vertices, faces)
    assert torch.equal(longer.t, t / 8) and torch.equal(longer.face_index, face_index)
    hit = t.isfinite()
    corners = vertices[faces[face_index[hit]].long()]
    at = (corners * cast_rays(origins, directions, vertices, faces).barycentric[hit][..., None]).sum(1)
    torch.testing.assert_close(origins[hit] + t[hit, None] * directions[hit], at, atol=1e-4, rtol=1e-4)


def test_no_ray_leaks_through_a_closed_surface():
    trimesh = oracle("trimesh")
    sphere = trimesh.creation.icosphere(subdivisions=3)
    vertices, faces = torch.tensor(sphere.vertices).float(), torch.tensor(sphere.faces)
    edges = vertices[torch.tensor(sphere.edges_unique)]
    for origin in torch.tensor([[0.0, 0, 0], [0.1, -0.2, 0.3], [0.5, 0.25, -0.125]]):
        targets = torch.cat([vertices, edges.mean(1), 0.25 * edges[:, 0] + 0.75 * edges[:, 1]])
        hits = cast_rays(origin.expand_as(targets), targets - origin, vertices, faces)
        assert hits.t.isfinite().all()
        torch.testing.assert_close(hits.t, torch.ones_like(hits.t), atol=2e-3, rtol=0)
    lattice = torch.cartesian_prod(*[torch.arange(-2.0, 2)] * 3)
    axes = torch.eye(3)[torch.arange(len(lattice)) % 3]
    box = {k: v * 2 if k == "vertices" else v for k, v in cube().items()}
    assert cast_rays(lattice, axes, **box).t.isfinite().all()  # along faces, edges and diagonals of the cube


def test_ties_go_to_the_lowest_face():
    mesh = cube()
    centre = closest_point_on_mesh(torch.zeros(1, 3), **mesh)
    assert centre.face_index.item() == 0 and centre.distance.item() == 1
    twice = torch.cat([mesh["faces"], mesh["faces"]])
    points = torch.randn(300, 3, generator=generator(0))
    assert (closest_point_on_mesh(points, mesh["vertices"], twice).face_index < 12).all()
    vertex = closest_point_on_mesh(2 * mesh["vertices"], **mesh)
    first = torch.stack([(mesh["faces"] == v).any(1).nonzero()[0, 0] for v in range(8)])
    assert torch.equal(vertex.face_index, first)


def test_degenerate_triangles_are_segments_and_points():
    vertices = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [5, 5, 5]])
    faces = torch.tensor([[0, 2, 1], [3, 3, 3], [1, 1, 2]])
    points = torch.tensor([[0.5, 3, 0], [1.5, 0, -2], [3, 0, 0], [5, 5, 7]])
    result = closest_point_on_mesh(points, vertices, faces)
    assert result.distance.tolist() == [3, 2, 1, 2]
    assert result.face_index.tolist() == [0, 0, 0, 1]
    assert cast_rays(points, -points + vertices[1], vertices, faces).t.isinf().all()


# --- gradients --------------------------------------------------------------------------------------------------------


def test_gradient_is_zero_on_the_surface():
    mesh = cube()
    points = torch.tensor([[1.0, 0.25, 0.5], [1, 1, 1], [0, 0, -1]], requires_grad=True)
    vertices = mesh["vertices"].requires_grad_()
    closest_point_on_mesh(points, vertices, mesh["faces"]).distance.sum().backward()
    assert not points.grad.any() and not vertices.grad.any()


def test_gradient_of_the_distance_is_a_unit_vector():
    mesh = height_field(generator(0), 12)
    points = torch.randn(200, 3, generator=generator(1), requires_grad=True)
    closest_point_on_mesh(points, **mesh).distance.sum().backward()
    torch.testing.assert_close(points.grad.norm(dim=1), torch.ones(200))


def test_moving_everything_together_changes_nothing():
    mesh = height_field(generator(0), 12)
    vertices = mesh["vertices"].double().requires_grad_()
    points = torch.randn(50, 3, generator=generator(1), dtype=torch.float64, requires_grad=True)
    closest_point_on_mesh(points, vertices, mesh["faces"]).distance.sum().backward()
    torch.testing.assert_close(points.grad.sum(0), -vertices.grad.sum(0))


def test_second_derivatives_raise():
    mesh = cube()
    points = torch.tensor([[3.0, 0.25, 0.5]], requires_grad=True)
    distance = closest_point_on_mesh(points, **mesh).distance
    (grad,) = torch.autograd.grad(distance.sum(), points, create_graph=True)
    with pytest.raises(RuntimeError, match="closest_point_on_mesh: double backward"):
        grad.sum().backward()
    t = cast_rays(points, -points.detach(), **mesh).t
    (grad,) = torch.autograd.grad(t.sum(), points, create_graph=True)
    with pytest.raises(RuntimeError, match="cast_rays: double backward"):
        grad.sum().backward()


def test_gradients_of_missing_rays_and_empty_meshes_are_zero():
    mesh = cube()
    origins = torch.tensor([[3.0, 9, 9]], requires_grad=True)
    cast_rays(origins, torch.ones(1, 3), **mesh).t.nan_to_num(posinf=0).sum().backward()
    assert not origins.grad.any()
    points = torch.ones(2, 3, requires_grad=True)
    closest_point_on_mesh(points, torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long)).distance.sum().backward()
    assert not points.grad.any()


# --- normals ----------------------------------------------------------------------------------------------------------


def test_angle_weighted_normals_do_not_see_the_triangulation():
    mesh = cube()
    torch.testing.assert_close(vertex_normals(**mesh), mesh["vertices"] / 3**0.5)
    flipped = torch.cat([mesh["faces"][:, [0, 2, 1]]])
    torch.testing.assert_close(vertex_normals(mesh["vertices"], flipped), -mesh["vertices"] / 3**0.5)


@pytest.mark.parametrize("weighting", ["angle", "area", "uniform"])
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e15])
def test_normals_at_any_scale_with_degenerate_faces(weighting, scale):
    mesh = cube()
    vertices = torch.cat([mesh["vertices"] * scale, torch.zeros(1, 3)]).requires_grad_()
    faces = torch.cat([mesh["faces"], torch.tensor([[0, 0, 1], [2, 2, 2]])])
    normals = vertex_normals(vertices, faces, weighting=weighting)
    torch.testing.assert_close(normals[:8].norm(dim=1), torch.ones(8))
    assert not normals[8].any()
    normals.sum().backward()
    assert vertices.grad.isfinite().all()


# --- the tree as a value ----------------------------------------------------------------------------------------------


def test_tree_can_be_saved_and_is_refused_for_another_mesh(tmp_path):
    vertices, faces = height_field(generator(0), 20).values()
    points = torch.randn(100, 3, generator=generator(1))
    torch.save(build_bvh(vertices, faces), tmp_path / "bvh.pt")
    bvh = torch.load(tmp_path / "bvh.pt")
    result = closest_point_on_mesh(points, vertices, faces)
    assert_same(closest_point_on_mesh(points, vertices, faces, bvh), result)
    slice_of_words = torch.cat([bvh[:1], bvh])[1:]  # its 64-bit fields straddle eight-byte borders
    assert_same(closest_point_on_mesh(points, vertices, faces, slice_of_words), result)
    edited = vertices.clone()
    edited[7, 1] += 1e-6
    for other in [(edited, faces), (vertices, faces.flip(0)), (vertices, faces[:-1]), (vertices[:, [1, 0, 2]], faces)]:
        for call in (lambda m: closest_point_on_mesh(points, *m, bvh), lambda m: cast_rays(points, points, *m, bvh)):
            with pytest.raises(ValueError, match="bvh"):
                call(other)
    assert_same(
        closest_point_on_mesh(points, vertices, faces.long(), bvh), closest_point_on_mesh(points, vertices, faces)
    )


def test_tree_size_is_known_beforehand():
    for n in (0, 1, 8, 9, 64, 65, 513):
        faces = torch.zeros(n, 3, dtype=torch.int32)
        sizes = {len(build_bvh(torch.zeros(1, 3), faces, backend=b)) for b in ("native", "reference")}
        assert len(sizes) == 1
    assert build_bvh(**height_field(generator(0), 100)).numel() * 4 / 19_602 < 50  # bytes per face


# --- bad input --------------------------------------------------------------------------------------------------------

V, F, P = torch.rand(5, 3), torch.tensor([[0, 1, 2], [2, 3, 4]]), torch.rand(4, 3)
NAN = torch.full((4, 3), math.nan)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: closest_point_on_mesh(P.numpy(), V, F), TypeError, "points must be a torch.Tensor"),
        (lambda: closest_point_on_mesh(P[:, :2], V, F), ValueError, "points must have shape"),
        (lambda: closest_point_on_mesh(P.double(), V, F), ValueError, "points must have dtype float32"),
        (lambda: closest_point_on_mesh(P.half(), V.half(), F), ValueError, "vertices must have dtype"),
        (lambda: closest_point_on_mesh(NAN, V, F), ValueError, "points must be finite, got 12"),
        (lambda: closest_point_on_mesh(P, NAN, F), ValueError, "vertices must be finite"),
        (lambda: closest_point_on_mesh(P, V, F - 1), ValueError, "faces must index vertices 0 to 4, got -1"),
        (lambda: closest_point_on_mesh(P, V, F + 1), ValueError, "faces must index vertices 0 to 4, got 5"),
        (lambda: closest_point_on_mesh(P, V[:0], F), ValueError, "faces must index"),
        (lambda: closest_point_on_mesh(P, V, F.float()), ValueError, "faces must have dtype"),
        (lambda: closest_point_on_mesh(P, V, F[:, :2]), ValueError, "faces must have shape"),
        (lambda: closest_point_on_mesh(P, V, F, torch.zeros(16)), ValueError, "bvh must have dtype int32"),
        (lambda: closest_point_on_mesh(P, V, F, torch.zeros(16, dtype=torch.int32)), ValueError, "bvh must have"),
        (lambda: closest_point_on_mesh(P, V, F, "bvh"), TypeError, "bvh must be a torch.Tensor"),
        (lambda: closest_point_on_mesh(P, V, F.to("meta")), ValueError, "faces must be on cpu"),
        (lambda: closest_point_on_mesh(P, V, F, backend="triton"), ValueError, "no backend 'triton'"),
        (lambda: build_bvh(V, F + 1), ValueError, "faces must index"),
        (lambda: build_bvh(V / 0, F), ValueError, "vertices must be finite"),
        (lambda: build_bvh([0, 1, 2], F), TypeError, "vertices must be"),
        (lambda: closest_point_on_mesh(P[:1].expand(2**40, 3), V, F), ValueError, "a copy of points .* does not fit"),
        (lambda: cast_rays(P, torch.zeros(4, 3), V, F), ValueError, "directions must not be zero, got 4"),
        (lambda: cast_rays(P, P[:3], V, F), ValueError, "directions must have shape"),
        (lambda: cast_rays(P, NAN, V, F), ValueError, "directions must be finite"),
        (lambda: cast_rays(NAN, P, V, F), ValueError, "origins must be finite"),
        (lambda: vertex_normals(V, F, weighting="mean"), ValueError, "weighting must be one of"),
        (lambda: vertex_normals(V, F + 1), ValueError, "faces must index"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@given(st.data())
def test_any_arguments_give_an_answer_or_a_clear_error(data):
    def pick(*values):
        return data.draw(st.sampled_from(values))

    v = pick(V, V[:0], V.double(), V * 1e38, V * 1e-44, V.half(), NAN, V[None])
    f = pick(F, F[:0], F.int(), F.short(), F - 3, F + 2**40, F[0])
    p = pick(P, P[:0], P.double(), P * 3e38, P * 1e-44, NAN, P[None, :, None], P[0], P[..., :1])
    d = pick(P, P[:0], P.double(), 0 * P, P * 3e38, P * 1e-44, -P, P[0])
    bvh = pick(None, None, build_bvh(V, F), torch.zeros(3), torch.zeros(0, dtype=torch.int32))
    backend = pick(None, "native", "reference")
    for op, arguments in ((closest_point_on_mesh, (p,)), (cast_rays, (p, d))):
        try:
            value, face_index, barycentric = op(*arguments, v, f, bvh, backend=backend)
        except (ValueError, TypeError) as error:
            assert str(error).startswith(op.__name__)
            continue
        assert value.shape == face_index.shape == p.shape[:-1] and barycentric.shape == p.shape
        assert not value.isnan().any() and (value >= 0).all()
        assert ((face_index >= -1) & (face_index < len(f))).all()
