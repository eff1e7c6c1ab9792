"""Point map → mesh: Algorithm 1, invariants, independent oracles, bad input."""

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from cvctoolkit.ops import (
    confidence_mask,
    denormalize_points,
    depth_edge_mask,
    face_batch_index,
    gather_pixels,
    normalize_points,
    pointmap_edge_mask,
    pointmap_faces,
    pointmap_to_mesh,
    unproject_depth,
)
from tests.native import native_module
from tests.oracles import oracle

masks = st.builds(
    lambda h, w, seed, keep: torch.rand(h, w, generator=torch.Generator().manual_seed(seed)) < keep,
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(0, 2**16),
    st.sampled_from([0.0, 0.5, 0.8, 0.95, 1.0]),
)


def algorithm_1(mask):
    """The paper's listing, pixel by pixel."""
    height, width = mask.shape
    faces = []
    for i in range(height - 1):
        for j in range(width - 1):
            p1, p2, p3, p4 = (i, j), (i, j + 1), (i + 1, j), (i + 1, j + 1)
            if mask[p1] and mask[p2] and mask[p3] and mask[p4]:
                faces += [[p1, p2, p3], [p2, p3, p4]]
    return [[i * width + j for i, j in face] for face in faces]


@given(masks)
def test_paper_winding_is_algorithm_1_to_the_letter(mask):
    assert pointmap_faces(mask, winding="paper").tolist() == algorithm_1(mask)


@given(masks)
def test_both_windings_hold_the_same_triangles(mask):
    a, b = (pointmap_faces(mask, winding=w).sort(dim=1).values for w in ("paper", "consistent"))
    assert torch.equal(a, b)


@given(masks, st.booleans())
def test_consistent_winding_is_consistent_and_faces_the_camera(mask, corners):
    height, width = mask.shape
    if not mask.numel():
        return
    points = unproject_depth(torch.ones(height, width), torch.eye(3))
    faces = pointmap_faces(mask, corner_triangles=corners).long()
    a, b, c = points.view(-1, 3)[faces].unbind(1)
    assert (torch.linalg.cross(b - a, c - a)[:, 2] < 0).all(), "a face looks away from the camera"
    # In a consistently wound surface no directed edge occurs twice.
    edges = [tuple(e) for f in faces.tolist() for e in ((f[0], f[1]), (f[1], f[2]), (f[2], f[0]))]
    assert len(edges) == len(set(edges))


@given(masks)
def test_corner_triangles_fill_quads_with_three_valid_pixels(mask):
    without, with_corners = pointmap_faces(mask), pointmap_faces(mask, corner_triangles=True)
    quads = [
        mask[i : mask.shape[0] - 1 + i, j : mask.shape[1] - 1 + j].int() for i, j in itertools.product((0, 1), (0, 1))
    ]
    three = int((sum(quads) == 3).sum()) if mask.numel() and min(mask.shape) > 1 else 0
    assert len(with_corners) == len(without) + three
    assert mask.flatten()[with_corners.long()].all()


@given(masks, st.booleans(), st.booleans())
def test_mesh_is_the_faces_compacted(mask, corners, paper):
    winding = "paper" if paper and not corners else "consistent"
    points = torch.randn(*mask.shape, 3, generator=torch.Generator().manual_seed(1))
    vertices, faces, pixel_index = pointmap_to_mesh(points, mask, winding=winding, corner_triangles=corners)
    expected = pointmap_faces(mask, winding=winding, corner_triangles=corners)
    assert torch.equal(pixel_index[faces.long()], expected.long()), "indices and order"
    assert torch.equal(pixel_index, torch.unique(expected).long()), "vertices without a face, or out of order"
    assert torch.equal(vertices, points.view(-1, 3)[pixel_index])


@given(masks, st.integers(1, 3))
def test_a_batch_is_its_maps_one_after_the_other(mask, batch):
    maps = torch.stack([mask.roll(k, -1) for k in range(batch)])
    faces = [pointmap_faces(m) + k * mask.numel() for k, m in enumerate(maps)]
    assert torch.equal(pointmap_faces(maps), torch.cat(faces))
    if mask.numel():
        mesh = pointmap_to_mesh(torch.zeros(*maps.shape, 3), maps)
        expected = torch.cat([torch.full((len(f),), k) for k, f in enumerate(faces)])
        assert torch.equal(face_batch_index(mesh, *mask.shape), expected)


@given(masks, st.booleans(), st.booleans())
def test_device_pipeline_on_the_host(mask, corners, paper):
    """The CUDA pipeline, run by the host executor, gives what the CPU kernel gives."""
    native = native_module()
    paper = paper and not corners
    winding = "paper" if paper else "consistent"
    maps = torch.stack([mask, ~mask])
    points = torch.randn(*maps.shape, 3, generator=torch.Generator().manual_seed(1))
    points[points > 2] = float("nan")
    faces = native.pointmap_faces_pipeline(maps.numpy(), paper, corners)
    assert np.array_equal(faces, pointmap_faces(maps, winding=winding, corner_triangles=corners))
    mesh = native.pointmap_mesh_pipeline(points.numpy(), maps.numpy(), paper, corners)
    for got, expected in zip(mesh, pointmap_to_mesh(points, maps, winding=winding, corner_triangles=corners)):
        assert np.array_equal(got, expected)


def test_trimesh_agrees_on_a_sphere_patch():
    trimesh = oracle("trimesh")
    v, u = torch.meshgrid(torch.linspace(-0.5, 0.5, 30), torch.linspace(-0.5, 0.5, 40), indexing="ij")
    points = torch.stack([u, v, 2 - (1 - u * u - v * v).sqrt()], -1)
    mesh = pointmap_to_mesh(points)
    t = trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False)
    assert t.is_winding_consistent and t.euler_number == 1 and t.body_count == 1
    # Normals point out of the sphere around (0, 0, 2), towards the camera at the origin.
    outward = (t.triangles_center - [0, 0, 2]) * t.face_normals
    assert (outward.sum(1) > 0.9).all()


def test_points_that_are_not_finite_are_invalid():
    points = torch.rand(4, 5, 3)
    points[1, 1, 2], points[2, 3, 0] = float("nan"), float("-inf")
    valid = points.isfinite().all(-1)
    for a, b in zip(pointmap_to_mesh(points), pointmap_to_mesh(points.nan_to_num(0), valid)):
        assert torch.equal(a, b)


def test_gathering_nothing_and_nowhere():
    assert gather_pixels(torch.zeros(4, 5, 0), torch.tensor([3, 7])).shape == (2, 0)
    assert gather_pixels(torch.zeros(0, 5, 2), torch.zeros(0).long()).shape == (0, 2)
    for index in (20, -1, 2**40):
        with pytest.raises(ValueError, match=f"gather_pixels: pixel_index must index pixels 0 to 19, got {index}"):
            gather_pixels(torch.zeros(4, 5, 2), torch.tensor([0, index]))


def test_gradients_reach_exactly_the_used_pixels():
    points = torch.rand(4, 5, 3, requires_grad=True)
    mask = torch.ones(4, 5, dtype=torch.bool)
    mask[0, 0] = False
    mesh = pointmap_to_mesh(points, mask)
    weight = torch.rand_like(mesh.vertices)
    (mesh.vertices * weight).sum().backward()
    expected = torch.zeros(20, 3).index_copy(0, mesh.pixel_index, weight).view(4, 5, 3)
    assert torch.equal(points.grad, expected)
    colours = torch.rand(4, 5, 2)
    assert torch.equal(gather_pixels(colours, mesh.pixel_index), colours.view(-1, 2)[mesh.pixel_index])


class TestEdges:
    @given(
        st.integers(1, 8), st.integers(1, 8), st.sampled_from([1, 3, 5, 11]), st.integers(0, 2**16), st.floats(0, 0.5)
    )
    @settings(deadline=None)
    def test_against_a_window_by_window_search(self, height, width, kernel, seed, rtol):
        generator = torch.Generator().manual_seed(seed)
        depth = torch.rand(height, width, generator=generator) + 0.5
        depth[torch.rand(height, width, generator=generator) < 0.2] = float("nan")
        expected = torch.zeros(height, width, dtype=torch.bool)
        r = kernel // 2
        for i, j in itertools.product(range(height), range(width)):
            window = depth[max(i - r, 0) : i + r + 1, max(j - r, 0) : j + r + 1]
            window = window[window.isfinite()]
            if depth[i, j].isfinite():
                expected[i, j] = window.max() - window.min() > torch.tensor(rtol) * depth[i, j]
        assert torch.equal(depth_edge_mask(depth, rtol=rtol, kernel_size=kernel), expected)

    def test_a_step_is_marked_on_both_sides_and_nowhere_else(self):
        depth = torch.ones(6, 8)
        depth[:, 4:] = 2
        expected = torch.zeros(6, 8, dtype=torch.bool)
        expected[:, 3:5] = True
        assert torch.equal(depth_edge_mask(depth, rtol=0.4), expected)
        assert torch.equal(depth_edge_mask(depth, atol=0.9), expected)
        assert not depth_edge_mask(depth, atol=1.0).any(), "a jump equal to the tolerance is allowed"
        assert depth_edge_mask(depth, atol=0.9, kernel_size=5).sum() == 6 * 4

    def test_the_formula_that_moge_and_utils3d_use(self):
        depth = torch.rand(1, 1, 40, 50, generator=torch.Generator().manual_seed(3)) + 1
        pool = torch.nn.functional.max_pool2d
        difference = pool(depth, 3, 1, 1) + pool(-depth, 3, 1, 1)
        assert torch.equal(depth_edge_mask(depth, rtol=0.5), difference / depth > 0.5)

    def test_sudden_changes_of_coordinates(self):
        points = torch.stack([torch.arange(5.0).expand(4, 5), torch.zeros(4, 5), torch.ones(4, 5)], -1)
        assert not pointmap_edge_mask(points, atol=1.5).any()
        points[2, 2, 1] = 10
        edge = pointmap_edge_mask(points, atol=1.5)
        assert edge[1:4, 1:4].all() and edge.sum() == 9
        mask = torch.ones(4, 5, dtype=torch.bool)
        mask[2, 2] = False
        assert not pointmap_edge_mask(points, mask, atol=1.5).any(), "an invalid pixel makes no edge"


class TestNormalize:
    @given(st.floats(1e-3, 1e3), st.floats(0, 0.9), st.integers(0, 2**16))
    def test_fills_the_cube_and_inverts(self, scale, margin, seed):
        points = torch.randn(20, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
        out = normalize_points(points, margin=margin)
        low, high = out.points.amin(0), out.points.amax(0)
        assert torch.isclose((high - low).max(), torch.tensor(2 * (1 - margin), dtype=torch.float64))
        assert torch.allclose(low, -high)
        assert torch.allclose(denormalize_points(*out), points)

    def test_only_valid_points_define_the_box(self):
        points = torch.rand(3, 4, 3)
        points[0, 0], points[1, 1, 0] = 1e6, float("nan")
        mask = torch.ones(3, 4, dtype=torch.bool)
        mask[0, 0] = False
        out = normalize_points(points, mask, margin=0.0)
        inside = out.points[mask & points.isfinite().all(-1)]
        assert torch.isclose(inside.abs().max(), torch.tensor(1.0))

    @pytest.mark.parametrize("dtype,far", [(torch.float16, 6e4), (torch.float32, 3e38), (torch.float64, 1.7e308)])
    def test_extents_beyond_the_largest_number(self, dtype, far):
        points = torch.tensor([[-far, 0, far / 2], [far, far / 4, -far / 2]], dtype=dtype)
        out = normalize_points(points, margin=0.0)
        expected = torch.tensor([[-1.0, -0.125, 0.5], [1.0, 0.125, -0.5]], dtype=dtype)
        torch.testing.assert_close(out.points, expected, rtol=0, atol=1e-3 if dtype == torch.float16 else 1e-6)

    def test_one_box_or_one_per_point_goes_back(self):
        points = torch.randn(2, 4, 5, 3)
        boxes = [normalize_points(p) for p in points]
        center, scale = (torch.stack([getattr(b, n) for b in boxes]) for n in ("center", "scale"))
        flat = torch.stack([b.points for b in boxes]).reshape(-1, 3)
        batch = torch.arange(2).repeat_interleave(20)
        torch.testing.assert_close(denormalize_points(flat, center[batch], scale[batch]), points.reshape(-1, 3))

    @pytest.mark.parametrize("points", [torch.zeros(0, 3), torch.full((2, 3), float("nan")), torch.ones(5, 3)])
    def test_without_extent(self, points):
        out = normalize_points(points)
        assert out.scale == 1 and out.center.isfinite().all()


def test_confidence():
    confidence = torch.arange(12.0).view(1, 3, 4)
    confidence[0, 0, 0] = float("nan")
    assert confidence_mask(confidence, threshold=5.0).sum() == 7
    assert confidence_mask(confidence, percentile=50.0).sum() == 7
    assert confidence_mask(confidence, percentile=0.0).sum() == 11
    both = torch.stack([confidence[0], confidence[0] * 100])
    assert (confidence_mask(both, percentile=50.0).sum((1, 2)) == 7).all(), "percentiles are per map"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_percentile_is_not_rounded_away(dtype):
    assert confidence_mask(torch.full((4, 5), 0.1, dtype=dtype), percentile=50.0).all()
    values = torch.rand(40, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    limit = values.flatten().sort().values[len(values.flatten()) * 3 // 10 - 1]
    assert torch.equal(confidence_mask(values, percentile=30.0), values >= limit)


BAD = [
    (pointmap_faces, dict(mask=torch.ones(4, 4)), ValueError, "mask must have dtype bool"),
    (pointmap_faces, dict(mask=torch.ones(4, dtype=torch.bool)), ValueError, "mask must have shape"),
    (pointmap_faces, dict(mask=[[True]]), TypeError, "mask must be a torch.Tensor"),
    (pointmap_faces, dict(mask=torch.ones(2, 2, dtype=torch.bool), winding="cw"), ValueError, "winding must be one of"),
    (
        pointmap_faces,
        dict(mask=torch.ones(2, 2, dtype=torch.bool), winding="paper", corner_triangles=True),
        ValueError,
        "corner_triangles needs",
    ),
    (pointmap_to_mesh, dict(points=torch.ones(4, 4)), ValueError, "points must have shape"),
    (pointmap_to_mesh, dict(points=torch.ones(4, 4, 3, dtype=torch.int32)), ValueError, "points must have dtype"),
    (
        pointmap_to_mesh,
        dict(points=torch.ones(4, 4, 3), mask=torch.ones(4, 5, dtype=torch.bool)),
        ValueError,
        r"mask must have shape \[4, 4\]",
    ),
    (
        pointmap_to_mesh,
        dict(points=torch.ones(4, 4, 3), mask=torch.ones(4, 4, dtype=torch.bool, device="meta")),
        ValueError,
        "mask must be on cpu",
    ),
    (pointmap_to_mesh, dict(points=torch.ones(1, 1, 1).expand(2**16, 2**15, 3)), ValueError, "fewer than 2"),
    (depth_edge_mask, dict(depth=torch.ones(4, 4)), ValueError, "give rtol, atol or both"),
    (depth_edge_mask, dict(depth=torch.ones(4, 4), rtol=-1.0), ValueError, "rtol must be >= 0"),
    (depth_edge_mask, dict(depth=torch.ones(4, 4), rtol=float("nan")), ValueError, "rtol must be finite"),
    (depth_edge_mask, dict(depth=torch.ones(4, 4), rtol=0.1, kernel_size=4), ValueError, "kernel_size must be odd"),
    (depth_edge_mask, dict(depth=torch.ones(4, 4), rtol=0.1, kernel_size=3.0), TypeError, "must be an integer"),
    (pointmap_faces, dict(mask=torch.ones(2, 2, dtype=torch.bool), winding=np.array(["paper"])), TypeError, "winding"),
    (
        pointmap_faces,
        dict(mask=torch.ones(2, 2, dtype=torch.bool), corner_triangles=torch.ones(2)),
        TypeError,
        "corner_triangles must be a bool",
    ),
    (depth_edge_mask, dict(depth=torch.ones(4, 4).to_sparse(), rtol=0.1), ValueError, "depth must be a dense tensor"),
    (gather_pixels, dict(values=torch.ones(4, 5), pixel_index=torch.zeros(1).long()), ValueError, "values must have"),
    (gather_pixels, dict(values=torch.ones(4, 5, 1), pixel_index=torch.zeros(1)), ValueError, "pixel_index must"),
    (face_batch_index, dict(mesh=torch.ones(4, 3), height=2, width=2), TypeError, "mesh must be the result of"),
    (face_batch_index, dict(mesh=pointmap_to_mesh(torch.rand(2, 2, 3)), height=0, width=2), ValueError, "height must"),
    (denormalize_points, dict(points=[1.0], center=torch.zeros(3), scale=torch.ones(())), TypeError, "points must be"),
    (
        denormalize_points,
        dict(points=torch.ones(4, 3), center=torch.zeros(2, 3), scale=torch.ones(())),
        ValueError,
        r"center must be one, or one per point \[4\], got \[2\]",
    ),
    (
        denormalize_points,
        dict(points=torch.ones(4, 3), center=torch.zeros(3), scale=torch.ones(3)),
        ValueError,
        r"scale must be one, or one per point \[4\], got \[3\]",
    ),
    (normalize_points, dict(points=torch.ones(4, 3), margin=1.0), ValueError, r"margin must be in \[0, 1\)"),
    (confidence_mask, dict(confidence=torch.ones(4, 4)), ValueError, "either threshold or percentile"),
    (confidence_mask, dict(confidence=torch.ones(4, 4), percentile=101.0), ValueError, "percentile must be in"),
]


@pytest.mark.parametrize("function,kwargs,error,message", BAD, ids=[f"{f.__name__}-{m[:24]}" for f, _, _, m in BAD])
def test_bad_input(function, kwargs, error, message):
    with pytest.raises(error, match=message) as caught:
        function(**kwargs)
    assert function.__name__ in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1), (0, 0), (2, 0, 3)])
def test_maps_without_a_quad_give_nothing(shape):
    assert pointmap_faces(torch.ones(shape, dtype=torch.bool)).shape == (0, 3)
    mesh = pointmap_to_mesh(torch.ones(*shape, 3))
    assert mesh.vertices.shape == mesh.faces.shape == (0, 3) and mesh.pixel_index.shape == (0,)


def test_graphs_hold_for_every_size_of_map():
    class Module(torch.nn.Module):
        def forward(self, points):
            mesh = pointmap_to_mesh(points, ~depth_edge_mask(points[..., 2], rtol=0.5))
            return mesh.vertices, mesh.faces

    any_size = torch.export.Dim.DYNAMIC  # refuses a graph that fits one size only
    example = torch.rand(2, 5, 6, 3)
    program = torch.export.export(Module(), (example,), dynamic_shapes=({0: any_size, 1: any_size, 2: any_size},))
    other = torch.rand(3, 4, 9, 3)
    for a, b in zip(program.module()(other), Module()(other), strict=True):
        assert torch.equal(a, b)
