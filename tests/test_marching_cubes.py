"""The surface of a sparse grid: topology for every pattern, order, size, bad input."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvctoolkit.ops import marching_cubes
from cvctoolkit.ops.sdf import marching_cubes_table as cube
from tests.native import native_module
from tests.oracles import oracle
from tests.surfaces import assert_closed_manifold, dense_coords, euler_numbers, random_voxels, signed_volume

RULES = ["join", "separate"]
BACKENDS = ["native", "reference"]
seeds = st.integers(0, 2**32 - 1)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


# --- the cases --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("join", [True, False])
def test_compiled_table_is_the_specified_one(join):
    native = native_module()
    for case in range(256):
        expected = cube.table(join)[case]
        assert native.marching_cubes_triangles(case, join) == [e for triangle in expected for e in triangle]
        assert native.marching_cubes_crossed(case, join) == sum(1 << e for e in cube.segments(case, join))


@pytest.mark.parametrize("join", [True, False])
def test_segments_depend_on_their_face_alone(join):
    """So the cubes on both sides of a face draw the same segments, in opposite directions."""
    for axis in range(3):
        bit = 4 >> axis
        drawn: dict[tuple[int, ...], set] = {}
        for side in (0, bit):
            on_face = {e for e, (c, a) in enumerate(cube.EDGES) if a != axis and c & bit == side}
            for case in range(256):
                # Corners and edges of the face, named alike from either side.
                pattern = tuple(case >> c & 1 for c in range(8) if c & bit == side)
                segments = set()
                for start, end in cube.segments(case, join).items():
                    if {start, end} <= on_face:
                        names = tuple((cube.EDGES[e][0] & ~bit, cube.EDGES[e][1]) for e in (start, end))
                        segments.add(names if side == 0 else names[::-1])
                assert drawn.setdefault(pattern, segments) == segments
        assert len(drawn) == 16


@pytest.mark.parametrize("join", [True, False])
def test_no_diagonal_lies_in_a_face_of_the_cube(join):
    for case in range(256):
        segments = {frozenset(s) for s in cube.segments(case, join).items()}
        for triangle in cube.table(join)[case]:
            for k in range(3):
                edge = frozenset((triangle[k], triangle[k - 1]))
                assert edge in segments or not cube.share_face(*edge)


def has_ambiguous_face(case):
    return any([case >> c & 1 for c in ring] in ([0, 1, 0, 1], [1, 0, 1, 0]) for ring in cube.FACES)


def test_rules_differ_on_ambiguous_faces_only():
    for case in range(256):
        assert (cube.segments(case, True) != cube.segments(case, False)) == has_ambiguous_face(case)


@pytest.mark.parametrize("join", [True, False])
def test_unambiguous_cases_have_the_triangles_of_scikit_image(join):
    """Where two loops leave the inside of the cell ambiguous (eight cases), Lewiner may join them by a tunnel."""
    measure = oracle("skimage.measure")
    compared = 0
    for case in range(1, 255):
        if has_ambiguous_face(case) or len(cube.loops(case, join)) > 1:
            continue
        values = np.array([-1.0 if case >> c & 1 else 1.0 for c in range(8)]).reshape(2, 2, 2)
        vertices, faces, _, _ = measure.marching_cubes(values, 0.0, method="lewiner")  # on the edges' midpoints
        midpoints = [np.add(cube.CORNERS[c], np.eye(3)[axis] / 2).tolist() for c, axis in cube.EDGES]
        edges = np.array([midpoints.index(v.tolist()) for v in vertices])
        assert {frozenset(t) for t in cube.table(join)[case]} == {frozenset(t) for t in edges[faces]}, case
        compared += 1
    assert compared == 126


def patterns(*shape):
    """Every sign pattern of a small block, one per batch element; outside voxels are stored or absent by turns."""
    block = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"), -1).reshape(-1, 3)
    n = len(block)
    codes = torch.arange(2**n)
    inside = (codes[:, None] >> torch.arange(n) & 1).bool()
    stored = inside | ((codes[:, None] + torch.arange(n)) % 3 > 0)
    batch, voxel = torch.nonzero(stored, as_tuple=True)
    coords = torch.cat([batch[:, None], block[voxel]], 1).int()
    sdf = torch.where(inside[stored], -1.0, 1.0) * torch.linspace(0.25, 0.75, len(coords))
    return coords, sdf


@pytest.mark.parametrize("ambiguous", RULES)
@pytest.mark.parametrize("shape", [(2, 2, 2), (3, 2, 2), (2, 3, 2), (2, 2, 3)])
def test_every_pattern_of_two_cubes_is_a_closed_manifold(shape, ambiguous):
    mesh = marching_cubes(*patterns(*shape), 3, ambiguous=ambiguous)
    assert_closed_manifold(mesh)
    # An inside voxel in every non-empty pattern, so a component with positive volume.
    assert mesh.batch_index.unique().tolist() == list(range(1, 2 ** math.prod(shape)))
    assert (signed_volume(mesh, per_batch=True) > 0)[1:].all()


@pytest.mark.parametrize("ambiguous", RULES)
@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_random_patterns_of_27_voxels(ambiguous, seed):
    rng = np.random.default_rng(seed)
    coords = dense_coords(3, 400)
    sdf = torch.from_numpy(rng.uniform(-1, 1, len(coords))).float()
    stored = torch.from_numpy(rng.random(len(coords)) < rng.uniform(0.3, 1.2))
    assert_closed_manifold(marching_cubes(coords[stored], sdf[stored], 3, ambiguous=ambiguous))


@settings(max_examples=40, deadline=None)
@given(seed=seeds, resolution=st.integers(1, 9), keep=st.floats(0, 1), shift=st.sampled_from([0, 1, 57, 60, 63, 120]))
def test_any_voxels_give_a_closed_manifold_equal_to_the_reference(seed, resolution, keep, shift):
    coords, sdf = random_voxels(seed, resolution, keep, batch=2, shift=shift)
    if seed % 2:
        sdf = (sdf * 4).round() / 4  # many values at the level itself
    mesh = marching_cubes(coords, sdf, 200)
    expected = marching_cubes(coords, sdf, 200, backend="reference")
    assert_closed_manifold(mesh)
    assert torch.equal(mesh.faces, expected.faces) and torch.equal(mesh.batch_index, expected.batch_index)
    assert torch.allclose(mesh.vertices, expected.vertices, atol=1e-6)
    assert all(number % 2 == 0 for number in euler_numbers(mesh))


# --- order and symmetry -----------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_device_pipeline_on_the_host_equals_the_cpu_kernel(seed):
    coords, sdf = random_voxels(seed, 9, 0.7, batch=3, shift=58)
    if seed % 2:
        order = torch.from_numpy(np.lexsort(coords.numpy().T[::-1]))
        coords, sdf = coords[order], sdf[order]
    for join in (True, False):
        expected = torch.ops.cvctoolkit_native.marching_cubes(coords, sdf, 99, 0.25, -1.0, 3.0, join, True)
        got = native_module().marching_cubes_pipeline(coords.numpy(), sdf.numpy(), 99, 0.25, -1.0, 3.0, join)
        assert got[4] == expected[4] == 0
        assert all(np.array_equal(a, b.numpy()) for a, b in zip(got[:4], expected[:4]))


@pytest.mark.parametrize(
    "change,fault",
    [
        (lambda c, s: c[3].copy_(c[5]), 4),
        (lambda c, s: c[0].copy_(c[99]), 4),
        (lambda c, s: c[7, 2].fill_(99), 1),
        (lambda c, s: c[7, 0].fill_(-1), 1),
        (lambda c, s: s[4].fill_(math.inf), 2),
    ],
)
@pytest.mark.parametrize("ordered", [False, True])
def test_device_pipeline_finds_the_same_faults(change, fault, ordered):
    coords, sdf = random_voxels(0, 6, 0.8)
    change(coords, sdf)
    if ordered:
        order = torch.from_numpy(np.lexsort(coords.numpy().T[::-1]))
        coords, sdf = coords[order], sdf[order]
    *_, expected = torch.ops.cvctoolkit_native.marching_cubes(coords, sdf, 6, 0.0, -1.0, 1.0, True, False)
    *_, got = native_module().marching_cubes_pipeline(coords.numpy(), sdf.numpy(), 6, 0.0, -1.0, 1.0, True)
    assert got & fault and expected & fault


@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_order_is_as_documented_and_independent_of_the_input_order(seed):
    coords, sdf = random_voxels(seed, 6, 0.8, batch=2)
    sdf = torch.where(sdf < 0, sdf.clamp_max(-0.1), sdf.clamp_min(0.1))
    mesh = marching_cubes(coords, sdf, 8, bounds=(-0.5, 7.5))  # vertex positions in voxels
    shuffle = torch.from_numpy(np.random.default_rng(seed).permutation(len(coords)))
    assert same(mesh, marching_cubes(coords[shuffle], sdf[shuffle], 8, bounds=(-0.5, 7.5)))

    # 0.1 ≤ t ≤ 0.9: the fractional coordinate is the axis, the floor the edge's lower end, -1 beyond the border.
    low = (mesh.vertices + 1e-3).floor().int()
    axis = (mesh.vertices - low).argmax(1, keepdim=True).int()
    names = torch.cat([mesh.batch_index[:, None], low, axis], 1).tolist()
    assert names == sorted(names) and len(set(map(tuple, names))) == len(names)
    corner = mesh.vertices[mesh.faces.long()].mean(1).floor().int()
    cells = torch.cat([mesh.batch_index[mesh.faces[:, :1].long()], corner], 1).tolist()
    assert cells == sorted(cells)


def test_many_tasks_and_threads_agree_with_the_reference():
    coords, sdf = random_voxels(1, 45, 0.5, batch=2)
    expected = marching_cubes(coords, sdf, 45, backend="reference")
    order = torch.from_numpy(np.lexsort(coords.numpy().T[::-1]))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            mesh = marching_cubes(coords, sdf, 45)
            assert torch.equal(mesh.faces, expected.faces)
            assert torch.allclose(mesh.vertices, expected.vertices, atol=1e-6)
            assert same(mesh, marching_cubes(coords[order], sdf[order], 45))
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, shift=st.tuples(*[st.integers(0, 300)] * 3))
def test_translation(seed, shift):
    coords, sdf = random_voxels(seed, 5, 0.8)
    moved = coords + torch.tensor([0, *shift], dtype=torch.int32)
    a, b = (marching_cubes(c, sdf, 512, bounds=(0, 512)) for c in (coords, moved))
    assert torch.equal(a.faces, b.faces)
    assert torch.allclose(a.vertices + torch.tensor(shift), b.vertices, atol=1e-4)


@pytest.mark.parametrize("permutation", [(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("ambiguous", RULES)
def test_permutation_of_the_axes(permutation, ambiguous):
    coords, sdf = random_voxels(5, 7, 0.8)
    permuted = torch.cat([coords[:, :1], coords[:, 1:][:, permutation]], 1)
    a = marching_cubes(coords, sdf, 8, ambiguous=ambiguous)
    b = marching_cubes(permuted, sdf, 8, ambiguous=ambiguous)
    key = lambda v: sorted(map(tuple, (v * 2**20).round().tolist()))  # noqa: E731
    assert key(a.vertices[:, permutation]) == key(b.vertices)
    assert len(a.faces) == len(b.faces) and euler_numbers(a) == euler_numbers(b)


def test_batch_elements_are_independent():
    parts = [random_voxels(seed, 6, 0.2 * seed) for seed in range(5)]
    coords = torch.cat([c + torch.tensor([7 * i, 0, 0, 0], dtype=torch.int32) for i, (c, _) in enumerate(parts)])
    mesh = marching_cubes(coords, torch.cat([s for _, s in parts]), 6)
    first_vertex = first_face = 0
    for i, (c, s) in enumerate(parts):
        alone = marching_cubes(c, s, 6)
        vertices = slice(first_vertex, first_vertex + len(alone.vertices))
        faces = slice(first_face, first_face + len(alone.faces))
        assert torch.equal(mesh.vertices[vertices], alone.vertices)
        assert torch.equal(mesh.faces[faces] - first_vertex, alone.faces)
        assert (mesh.batch_index[vertices] == 7 * i).all()
        first_vertex, first_face = vertices.stop, faces.stop
    assert first_vertex == len(mesh.vertices) and first_face == len(mesh.faces)


# --- size -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_corner_of_the_largest_grid(backend):
    """Voxel numbers beyond 64 bits, cells beyond 16, the last batch index."""
    last = 65535
    coords = torch.tensor([[b, x, y, z] for b in (0, 32767) for x in (0, last) for y in (0, last) for z in (0, last)])
    mesh = marching_cubes(coords.int(), torch.full((16,), -1.0), 65536, bounds=(-0.5, 65535.5), backend=backend)
    assert len(mesh.vertices) == 16 * 6 and len(mesh.faces) == 16 * 8
    assert_closed_manifold(mesh)
    centre = mesh.vertices[mesh.faces.long()].mean(1)
    assert (centre.abs().minimum((centre - last).abs()) < 1).all()
    assert mesh.batch_index.unique().tolist() == [0, 32767]


def test_grid_of_more_than_2_to_the_31_voxels():
    coords = dense_coords(12) + torch.tensor([3, 1480, 1485, 1400], dtype=torch.int32)
    sdf = (coords[:, 1:].double() - torch.tensor([1485.5, 1490.5, 1405.5])).norm(dim=-1).float() - 4
    mesh = marching_cubes(coords, sdf, 1500, bounds=(-0.5, 1499.5))
    assert_closed_manifold(mesh)
    assert euler_numbers(mesh) == [2]
    radius = (mesh.vertices - torch.tensor([1485.5, 1490.5, 1405.5])).norm(dim=-1)
    assert (radius - 4).abs().max() < 0.05


def test_more_vertices_than_float32_can_number():
    """2.9 M voxels apart from each other: 17 M vertices, each of an octahedron."""
    side = 143
    axis = torch.arange(side, dtype=torch.int32) * 2
    coords = torch.stack(torch.meshgrid(torch.zeros(1, dtype=torch.int32), axis, axis, axis, indexing="ij"), -1)
    mesh = marching_cubes(coords.reshape(-1, 4), torch.full((side**3,), -0.5), 2 * side, ambiguous="separate")
    assert len(mesh.vertices) == 6 * side**3 > 2**24
    assert (torch.bincount(mesh.faces.flatten(), minlength=len(mesh.vertices)) == 4).all()
    some = mesh.vertices[mesh.faces[-100_000:].long()]
    assert (some[:, 0] - some[:, 1]).abs().max() < 2 / side


# --- bad input --------------------------------------------------------------------------------------------------------


def good(**changes):
    coords, sdf = random_voxels(0, 4, 0.9)
    return {"coords": coords, "sdf": sdf, "resolution": 4, **changes}


@pytest.mark.parametrize(
    "changes,error,message",
    [
        ({"coords": [[0, 0, 0, 0]]}, TypeError, "coords"),
        ({"sdf": None}, TypeError, "sdf"),
        ({"resolution": 4.0}, TypeError, "resolution"),
        ({"level": "0"}, TypeError, "level"),
        ({"bounds": 1.0}, TypeError, "bounds"),
        ({"coords": torch.zeros(58, 3, dtype=torch.int32)}, ValueError, "coords must have shape"),
        ({"coords": torch.zeros(58, 4)}, ValueError, "coords must have dtype"),
        ({"sdf": torch.zeros(57)}, ValueError, "sdf must have shape"),
        ({"sdf": torch.zeros(58, dtype=torch.int32)}, ValueError, "sdf must have dtype"),
        ({"sdf": torch.zeros(58, device="meta")}, ValueError, "sdf must be on cpu"),
        ({"resolution": 0}, ValueError, "resolution"),
        ({"resolution": 65537}, ValueError, "resolution"),
        ({"resolution": 3}, ValueError, "in \\[0, resolution\\)"),
        ({"level": 1.0}, ValueError, "level must be < 1"),
        ({"level": math.nan}, ValueError, "level"),
        ({"bounds": (1.0, 1.0)}, ValueError, "bounds"),
        ({"bounds": (-1.7e308, 1.7e308)}, ValueError, "bounds must lie within"),
        ({"ambiguous": "maybe"}, ValueError, "ambiguous"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=f"marching_cubes: .*{message}"):
        marching_cubes(**good(**changes))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("what", ["nan", "inf", "twice", "negative", "batch"])
def test_bad_values(what, ordered, backend):
    kwargs = good()
    coords, sdf = kwargs["coords"], kwargs["sdf"]
    if what in ("nan", "inf"):
        sdf[17] = float(what)
    elif what == "twice":
        coords[20] = coords[3]
    elif what == "negative":
        coords[20, 3] = -1
    else:
        coords[20, 0] = 32768
    if ordered:
        order = torch.from_numpy(np.lexsort(coords.numpy().T[::-1]))
        kwargs.update(coords=coords[order], sdf=sdf[order])
    with pytest.raises(ValueError, match=r"marching_cubes: (coords|sdf) must be"):
        marching_cubes(**kwargs, backend=backend)


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    size=st.integers(0, 30),
    low=st.integers(-2, 2),
    high=st.integers(0, 70_000),
    resolution=st.sampled_from([1, 2, 7, 64, 65, 4096, 65536]),
    level=st.floats(-2, 1.1),
    special=st.sampled_from([0.0, math.nan, math.inf, -1e38, 1e-40]),
)
def test_anything_gives_a_mesh_or_a_value_error(seed, size, low, high, resolution, level, special):
    rng = np.random.default_rng(seed)
    coords = torch.from_numpy(rng.integers(low, max(high, low + 1), (size, 4)).astype(np.int32))
    sdf = torch.from_numpy(rng.uniform(-2, 2, size).astype(np.float32))
    if size:
        sdf[0] = special
    try:
        mesh = marching_cubes(coords, sdf, resolution, level=level)
    except ValueError:
        return
    assert_closed_manifold(mesh)
    assert mesh.vertices.isfinite().all()


def test_nothing_inside_gives_nothing():
    for coords, sdf in (random_voxels(0, 4, 0), (dense_coords(4), torch.ones(64))):
        mesh = marching_cubes(coords, sdf, 4)
        assert [list(t.shape) for t in mesh] == [[0, 3], [0, 3], [0]]
        assert [t.dtype for t in mesh] == [torch.float32, torch.int32, torch.int32]
