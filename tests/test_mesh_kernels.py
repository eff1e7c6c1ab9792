"""The mesh kernels' parts: single triangles, the float32 tests, and the device pipelines run on the host."""

import itertools
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from cvctoolkit.ops import build_bvh, cast_rays, closest_point_on_mesh
from cvctoolkit.ops.mesh.samples import height_field
from tests.meshes import assert_same, generator, meshes, queries
from tests.native import native_module
from tests.oracles import oracle

# --- single triangles -------------------------------------------------------------------------------------------------

unit = st.floats(-1, 1, width=32)
corner = st.tuples(unit, unit, unit)
tiny = st.sampled_from([0.0, 1.0, 1e-3, 1e-7, 1e-12])


@st.composite
def triangles(draw):
    """Any triangle in [-1, 1]³ of float32 coordinates: fat, sliver, needle, crumb, segment, point."""
    a, b, c = (np.array(draw(corner)) for _ in range(3))
    b = a + draw(tiny) * (b - a) / 2
    c = a + draw(st.sampled_from([0.0, 0.5, 1.0])) * (b - a) + draw(tiny) * (c - a) / 2
    return np.array([a, b, c]).astype(np.float32)


@settings(max_examples=300)
@given(triangles(), corner, tiny, corner)
def test_closest_point_is_on_the_triangle_and_nearest(triangle, offset, step, weights):
    point = (triangle.mean(0) + step * np.array(offset)).astype(np.float32)
    distance, barycentric = native_module().closest_point_on_triangle(point, triangle)
    size = np.abs(triangle).max() + np.abs(point).max()
    assert barycentric.min() >= 0 and abs(barycentric.sum() - 1) < 1e-12
    assert abs(np.linalg.norm(barycentric @ triangle.astype(float) - point) - distance) <= 1e-12 * size
    # The tree relies on this: no triangle is nearer than its box, but for what the search allows (1e-14).
    outside = np.maximum(triangle.min(0).astype(float) - point, point - triangle.max(0).astype(float)).clip(0)
    assert distance >= np.linalg.norm(outside) * (1 - 1e-9) - 5e-15 * size
    weights = np.abs(weights) + 1e-9
    other = (weights / weights.sum()) @ triangle.astype(float)
    for candidate in (other, *triangle.astype(float)):
        assert distance <= np.linalg.norm(candidate - point) + 1e-12 * size


@settings(max_examples=500)
@given(triangles(), corner, st.sampled_from([0.0, 1e-12, 1e-7, 1e-3, 1.0, 1e4, 1e9]))
def test_the_float32_test_never_rejects_the_answer(triangle, offset, step):
    point = (triangle.mean(0) + step * np.array(offset)).astype(np.float32)
    distance, _ = native_module().closest_point_on_triangle(point, triangle)
    assert native_module().triangle_passes(point, triangle, distance)


def test_a_needle_is_not_nearer_than_its_box():
    """Its far corner is 1e13 times farther than the answer: a height over the plane taken from there is noise."""
    far, a, b = [-0.3183382, 0.6781223, 0.32845595], [1.6023874e-6, 4.9638875e-6, 1.1025228e-6], [-6e-6, -2e-6, 3e-6]
    needle = np.array([far, a, b], np.float32)
    for corner in (1, 2):
        for towards in itertools.product([-np.inf, np.inf], repeat=3):
            point = np.nextafter(needle[corner], np.array(towards, np.float32))
            distance, _ = native_module().closest_point_on_triangle(point, needle)
            outside = np.maximum(needle.min(0) - point.astype(float), point - needle.max(0).astype(float)).clip(0)
            assert np.linalg.norm(outside) * (1 - 1e-6) <= distance
            assert distance <= np.linalg.norm(point.astype(float) - needle[corner]) * (1 + 1e-6)


def test_hilbert_curve_visits_neighbours():
    key = native_module().hilbert_key
    cells = [(x, y, z) for x in range(8) for y in range(8) for z in range(8)]
    walk = np.array(sorted(cells, key=lambda c: key(*c)))
    assert len({key(*c) for c in cells}) == 512
    assert (np.abs(np.diff(walk, axis=0)).sum(1) == 1).all()


def test_triangle_agrees_with_trimesh():
    trimesh = oracle("trimesh")
    rng = np.random.default_rng(0)
    triangles, points = rng.normal(size=(500, 3, 3)), rng.normal(size=(500, 3)) * 2
    nearest = trimesh.triangles.closest_point(triangles, points)
    for triangle, point, expected in zip(triangles, points, nearest, strict=True):
        distance, barycentric = native_module().closest_point_on_triangle(point, triangle)
        np.testing.assert_allclose(barycentric @ triangle, expected, atol=1e-12)
        np.testing.assert_allclose(distance, np.linalg.norm(expected - point), atol=1e-12)


# --- the device pipelines, on the host --------------------------------------------------------------------------------


@settings(max_examples=30)
@given(meshes, st.integers(0, 2**16))
def test_device_pipelines_give_the_same(mesh, seed):
    host = native_module().HostMesh(*(t.numpy() for t in mesh))
    points = queries(mesh, seed)
    result = closest_point_on_mesh(points, *mesh)
    assert_same(map(torch.from_numpy, host.closest(points.numpy())), result)
    directions = torch.randn(len(points), 3, generator=generator(seed))
    rays = cast_rays(points, directions, *mesh)
    assert_same(map(torch.from_numpy, host.cast(points.numpy(), directions.numpy())), rays)
    # Trees may be exchanged: only the order of their triangles differs.
    assert_same(closest_point_on_mesh(points, *mesh, torch.from_numpy(host.bvh)), result)
    assert_same(cast_rays(points, directions, *mesh, build_bvh(*mesh, backend="reference")), rays)


def test_device_pipelines_mask_what_a_cpu_refuses():
    mesh = height_field(generator(0), 6)
    vertices, faces = mesh["vertices"].clone(), mesh["faces"].clone()
    vertices[3] = math.nan
    faces[10, 1], faces[11, 2] = -1, len(vertices)
    usable = ((faces >= 0) & (faces < len(vertices))).all(1) & (faces != 3).all(1)
    host = native_module().HostMesh(vertices.numpy(), faces.numpy())
    points = torch.randn(50, 3, generator=generator(1))
    distance, face_index, _ = map(torch.from_numpy, host.closest(points.numpy()))
    expected = closest_point_on_mesh(points, mesh["vertices"], faces[usable])
    assert torch.equal(distance, expected.distance)
    assert torch.equal(face_index, usable.nonzero()[:, 0][expected.face_index])
    points[:3, 1] = torch.tensor([math.nan, math.inf, -math.inf])
    distance, face_index, _ = map(torch.from_numpy, host.closest(points.numpy()))
    assert distance[:3].isnan().all() and (face_index[:3] == -1).all() and distance[3:].isfinite().all()
    t, face_index, _ = map(torch.from_numpy, host.cast(points.numpy(), torch.zeros(50, 3).numpy()))
    assert t.isinf().all() and (face_index == -1).all()


def test_device_pipelines_answer_nan_for_a_foreign_tree():
    vertices, faces = height_field(generator(0), 6).values()
    host = native_module().HostMesh(vertices.numpy(), faces.numpy())
    host.replace_vertices((vertices + 1).numpy())
    points = torch.randn(20, 3, generator=generator(1)).numpy()
    for values, face_index, _ in (host.closest(points), host.cast(points, points)):
        assert np.isnan(values).all() and (face_index == -1).all()


@pytest.mark.gpu
def test_cuda_gives_the_bits_of_the_cpu():
    g = generator(0)
    mesh = height_field(g, 100)
    points, directions = torch.randn(2, 50_000, 3, generator=g).unbind()
    there = {name: value.cuda() for name, value in mesh.items()}
    for bvh in (None, build_bvh(**mesh).cuda(), build_bvh(**there)):
        result = closest_point_on_mesh(points.cuda(), **there, bvh=bvh)
        assert_same([r.cpu() for r in result], closest_point_on_mesh(points, **mesh))
        rays = cast_rays(points.cuda(), directions.cuda(), **there, bvh=bvh)
        assert_same([r.cpu() for r in rays], cast_rays(points, directions, **mesh, bvh=build_bvh(**there).cpu()))
    foreign = build_bvh(there["vertices"] + 1, there["faces"])
    assert closest_point_on_mesh(points.cuda(), **there, bvh=foreign).distance.isnan().all()
