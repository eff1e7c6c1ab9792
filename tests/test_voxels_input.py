"""Hard input of dense ↔ sparse, cuts, resampling: one voxel, one parity, layouts, batches, devices, streams, sizes."""

import pytest
import torch

from cvctoolkit import ops
from tests.test_voxels_dense import available_memory

BACKENDS = ["native", "reference"]
COORDS = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 3], [1, 1, 0, 2]], dtype=torch.int32)
FEATS = torch.arange(24.0).view(3, 8)
PLANE = torch.tensor([1.0, 0, 0, 0])
POINTS = torch.tensor([[-0.9, -0.8, -0.7], [0.1, 0.2, 0.3]])
EYE = torch.eye(4)


def calls(coords, feats, **options):
    """Every operator on some voxels: name → what it returns."""
    rows = torch.arange(len(coords), device=coords.device)
    mask = (torch.arange(8, device=coords.device) % 3 == 0).expand(len(coords), 8)
    depth = torch.ones(4, 4, device=coords.device)
    K, view = EYE[:3, :3].to(coords.device), EYE.to(coords.device)
    points = POINTS.to(coords)
    return {
        "to_dense": lambda: ops.to_dense(coords, feats, (4, 4, 4), 2, fill_value=-1.0, **options),
        "from_dense": lambda: ops.from_dense(feats.new_ones(2, 3, 4, 4, 4).cumsum(2), coords, **options),
        "gather": lambda: ops.gather_features(feats, rows.flip(0), **options),
        "scatter": lambda: ops.scatter_features(feats, 2 * rows, 2 * len(rows) + 1, fill_value=7.0, **options),
        "reduce": lambda: ops.reduce_features(feats, rows // 2, len(rows) // 2 + 2, reduce="max", **options),
        "downsample": lambda: ops.downsample(coords, feats, include_self=True, **options),
        "subdivide": lambda: ops.subdivide(coords, feats, **options),
        "upsample": lambda: ops.upsample(coords, feats, mask, **options),
        "space to channels": lambda: ops.spatial_to_channel(coords, feats, (1, 2, 3), **options),
        "channels to space": lambda: ops.channel_to_spatial(coords, feats, mask, **options),
        "trilinear": lambda: ops.sample_trilinear(coords, feats, points.to(feats), 4, **options),
        "dilate": lambda: ops.voxel_dilate(coords, 3, **options),
        "crop": lambda: ops.crop_box(coords, 1, 4, **options),
        "half-space": lambda: ops.cut_half_space(coords, 4, PLANE.to(coords.device), **options),
        "front cut": lambda: ops.front_cut(coords, 4, depth, K, view, **options),
    }


NAMES = list(calls(COORDS, FEATS))


def flat(result):
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]


def assert_same(found, expected):
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(a, b) or torch.allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [0, 1])
def test_no_voxel_and_one(name, count):
    for row in range(3):
        coords, feats = COORDS[row : row + count], FEATS[row : row + count]
        found = calls(coords, feats, backend="native")[name]()
        assert_same(found, calls(coords, feats, backend="reference")[name]())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parity", [0, 1])
def test_voxels_of_one_parity_only(name, parity):
    coords = torch.cartesian_prod(*[torch.arange(2)] * 4).int()
    coords[:, 1:] = 2 * coords[:, 1:] + parity
    feats = torch.arange(16 * 8.0).view(16, 8)
    found = calls(coords, feats, backend="native")[name]()
    assert_same(found, calls(coords, feats, backend="reference")[name]())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_memory_of_any_layout(name, backend):
    coords, feats = COORDS.repeat_interleave(2, 1)[:, ::2], FEATS.T.contiguous().T
    assert not coords.is_contiguous() and not feats.is_contiguous()
    assert_same(calls(coords, feats, backend=backend)[name](), calls(COORDS, FEATS, backend=backend)[name]())


def test_batches_that_do_not_match():
    with pytest.raises(ValueError, match="batch in \\[0, 1\\)"):
        ops.to_dense(COORDS, FEATS, (4, 4, 4), 1)
    with pytest.raises(ValueError, match="batch in \\[0, 1\\)"):
        ops.from_dense(torch.ones(1, 2, 4, 4, 4), COORDS)
    # Voxels without a plane of their own are cut away, and points of another batch element find no voxel.
    planes, far = torch.tensor([[1.0, 0, 0, 9]]).repeat(2, 1), COORDS + torch.tensor([1, 0, 0, 0], dtype=torch.int32)
    for backend in BACKENDS:
        assert ops.cut_half_space(COORDS, 4, planes, backend=backend).rows.tolist() == [0, 1, 2]
        assert ops.cut_half_space(far, 4, planes, backend=backend).rows.tolist() == [0, 1]
    assert (ops.sample_trilinear(COORDS, FEATS, POINTS, 4, batch_index=torch.tensor([5, 7])) == 0).all()


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda away: ops.to_dense(COORDS, FEATS.to(away), (4, 4, 4), 2), "feats must be on cpu"),
        (lambda away: ops.from_dense(torch.ones(2, 3, 4, 4, 4), COORDS.to(away)), "coords must be on cpu"),
        (lambda away: ops.gather_features(FEATS, torch.arange(3).to(away)), "index must be on cpu"),
        (lambda away: ops.scatter_features(FEATS, torch.arange(3).to(away), 4), "index must be on cpu"),
        (lambda away: ops.reduce_features(FEATS, torch.arange(3).to(away), 4), "index must be on cpu"),
        (lambda away: ops.downsample(COORDS, FEATS.to(away)), "feats must be on cpu"),
        (lambda away: ops.subdivide(COORDS, FEATS.to(away)), "feats must be on cpu"),
        (lambda away: ops.upsample(COORDS, FEATS, torch.ones(3, 8, device=away).bool()), "child_mask must be on cpu"),
        (lambda away: ops.spatial_to_channel(COORDS, FEATS.to(away)), "feats must be on cpu"),
        (lambda away: ops.channel_to_spatial(COORDS, FEATS.to(away)), "feats must be on cpu"),
        (lambda away: ops.sample_trilinear(COORDS, FEATS, POINTS.to(away), 4), "points must be on cpu"),
        (lambda away: ops.cut_half_space(COORDS, 4, PLANE.to(away)), "plane must be on cpu"),
        (lambda away: ops.front_cut(COORDS, 4, torch.ones(4, 4), EYE[:3, :3], EYE.to(away)), "viewmats must be on cpu"),
    ],
)
def test_tensors_on_another_device(call, message):
    with pytest.raises(ValueError, match=message):
        call("meta")


@pytest.mark.slow
@pytest.mark.skipif(available_memory() < 10 << 30, reason="needs 10 GiB of free memory")
def test_rows_of_more_than_2_to_the_31_elements():
    channels, count = 70001, 31000
    feats = torch.arange(3.0, dtype=torch.float16)[:, None].expand(3, channels).contiguous()
    index = torch.arange(count) % 4 - 1
    found = ops.gather_features(feats, index, fill_value=9.0)
    assert found.numel() > 2**31
    expected = torch.tensor([9.0, 0, 1, 2], dtype=torch.float16)[index + 1]
    assert torch.equal(found[:, 0], expected) and torch.equal(found[:, -1], expected)
    assert torch.equal(found[-1], expected[-1].expand(channels))


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_runs_on_the_current_stream(name):
    coords, feats = COORDS.cuda(), FEATS.cuda()
    expected = calls(coords, feats)[name]()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        found = calls(coords.clone(), feats.clone())[name]()
    side.synchronize()
    assert_same(found, expected)
