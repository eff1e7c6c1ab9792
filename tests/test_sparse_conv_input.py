"""Sparse convolution: what is refused, and the smallest and largest inputs."""

import numpy as np
import pytest
import torch

from cvctoolkit.ops import (
    conv_out_coords,
    neighbor_map,
    sparse_avg_pool3d,
    sparse_conv3d,
    sparse_max_pool3d,
)
from cvctoolkit.ops.sparse_conv.samples import cells

BACKENDS = ["native", "reference"]


def sparse(count=120, channels=4):
    g = torch.Generator().manual_seed(0)
    coords = cells(g, count, size=9, batch=3)
    return coords, torch.randn(len(coords), channels, generator=g, dtype=torch.float64, requires_grad=True)


def test_refuses_what_is_no_map():
    coords, feats = sparse()
    weight = torch.zeros(3, 4, 3, 3, 3, dtype=torch.float64)
    index = neighbor_map(coords, 3).map
    for bad in (-2, len(coords)):
        broken = index.clone()
        broken[3, 5] = bad
        with pytest.raises(ValueError, match=f"rows 0 to {len(coords) - 1} of feats, got {bad}"):
            sparse_conv3d(feats, weight, None, broken)
    twice = torch.zeros_like(index)
    with pytest.raises(ValueError, match="appears twice"):
        sparse_conv3d(feats, weight, None, twice).sum().backward()


@pytest.mark.parametrize(
    "change,match",
    [
        (dict(weight=torch.zeros(3, 5, 3, 3, 3).double()), "divisible by groups"),
        (dict(groups=3), "divisible by groups"),
        (dict(groups=0), "groups must be >= 1"),
        (dict(weight=torch.zeros(3, 4, 3, 3, 1).double()), "27 offsets, weight 9"),
        (dict(weight=torch.zeros(3, 4, 3, 3, 3)), "weight must have dtype float64"),
        (dict(bias=torch.zeros(4).double()), r"bias must have shape \[3\]"),
        (dict(feats=torch.zeros(3)), "feats must have shape"),
        (dict(neighbor_map=torch.zeros(4, 27)), "neighbor_map must have dtype"),
        (dict(backend="triton"), "backend"),
    ],
)
def test_refuses_what_does_not_fit(change, match):
    coords, feats = sparse()
    weight = torch.zeros(3, 4, 3, 3, 3, dtype=torch.float64)
    arguments = dict(feats=feats, weight=weight, bias=None, neighbor_map=neighbor_map(coords, 3).map)
    with pytest.raises(ValueError, match=match):
        sparse_conv3d(**{**arguments, **change})


@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_what_are_no_voxels(backend):
    good = torch.tensor([[0, 1, 2, 3], [0, 4, 5, 6]], dtype=torch.int32)
    with pytest.raises(ValueError, match="distinct voxels"):
        neighbor_map(good[[0, 1, 0]], 3, backend=backend)
    for bad in ([0, -1, 0, 0], [0, 0, 65536, 0], [32768, 0, 0, 0], [-1, 0, 0, 0]):
        broken = torch.tensor([*good.tolist(), bad], dtype=torch.int32)
        with pytest.raises(ValueError, match="coords must be"):
            neighbor_map(broken, 3, backend=backend)
        with pytest.raises(ValueError, match="out_coords must be"):
            neighbor_map(good, 3, out_coords=broken, backend=backend)
        with pytest.raises(ValueError, match="coords must be"):
            conv_out_coords(broken, 3)
    for kwargs in (dict(kernel_size=0), dict(kernel_size=256), dict(kernel_size=(3, 3)), dict(kernel_size=3, stride=0)):
        with pytest.raises(ValueError, match="neighbor_map"):
            neighbor_map(good, **kwargs)
    with pytest.raises(TypeError, match="kernel_size"):
        neighbor_map(good, 2.5)


def test_nan_features_stay_where_they_are_seen():
    coords = torch.tensor([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 9]], dtype=torch.int32)
    feats = torch.tensor([[float("nan")], [1.0], [2.0]])
    out = sparse_conv3d(feats, torch.ones(1, 1, 3, 3, 3), None, neighbor_map(coords, 3).map)
    assert out[:2].isnan().all() and out[2] == 2
    pooled = sparse_max_pool3d(feats, neighbor_map(coords, 3).map)
    assert pooled[:2].isnan().all() and pooled[2] == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("geometry", [dict(), dict(stride=2, padding=1), dict(stride=2, transposed=True)], ids=str)
def test_no_voxel_and_one(backend, count, geometry):
    coords = torch.full((count, 4), 3, dtype=torch.int32)
    found = neighbor_map(coords, 3, **geometry, backend=backend)
    feats = torch.ones(count, 5, requires_grad=True)
    weight = torch.ones(7, 5, 3, 3, 3, requires_grad=True)
    out = sparse_conv3d(feats, weight, None, found.map, backend=backend)
    assert out.shape == (len(found.out_coords), 7)
    assert (out == 5).all()  # every output sees the one voxel once
    pools = [pool(feats, found.map, backend=backend) for pool in (sparse_max_pool3d, sparse_avg_pool3d)]
    assert all((p == 1).all() for p in pools)
    (out.sum() + sum(p.sum() for p in pools)).backward()
    assert (feats.grad == len(out) * 9).all() and weight.grad.sum() == 35 * len(out)


def test_no_channels():
    coords, _ = sparse()
    index = neighbor_map(coords, 3).map
    out = sparse_conv3d(torch.zeros(len(coords), 0), torch.zeros(3, 0, 3, 3, 3), torch.ones(3), index)
    assert (out == 1).all() and out.shape == (len(coords), 3)
    weight = torch.zeros(0, 2, 3, 3, 3, requires_grad=True)
    out = sparse_conv3d(torch.zeros(len(coords), 2), weight, None, index)
    assert out.shape == (len(coords), 0)
    assert torch.autograd.grad(out.sum(), weight)[0].shape == weight.shape


def test_more_elements_than_an_int32_counts():
    """The memory of rows that no one reads is never touched: this needs some megabytes."""
    channels, rows = 1 << 16, (1 << 15) + 8  # the last rows begin beyond 2³¹ elements
    feats = torch.from_numpy(np.zeros((rows, channels), dtype=np.float32))
    feats[-1, -3:] = torch.tensor([1.0, 2.0, 3.0])
    feats[-8, 0] = 4.0
    weight = torch.zeros(2, channels, 2, 1, 1)
    weight[0, -3:] = 1.0
    weight[1, 0, 1] = 10.0
    index = torch.tensor([[rows - 1, -1], [rows - 8, rows - 1], [-1, rows - 8], [0, -1]], dtype=torch.int64)
    assert feats[:-8].numel() == 1 << 31
    weight.requires_grad_()
    out = sparse_conv3d(feats, weight, None, index)
    assert out.tolist() == [[6, 0], [6, 0], [0, 40], [0, 0]]
    (grad,) = torch.autograd.grad(out[0, 0], weight)
    assert grad[0, -3:, 0].flatten().tolist() == [1, 2, 3] and grad.sum() == 6
    pooled = sparse_max_pool3d(feats, index)
    assert pooled[:, 0].tolist() == [0, 4, 4, 0] and pooled[:2, -1].tolist() == [3, 3]
    assert sparse_avg_pool3d(feats, index)[1, -1] == 1.5


def test_refuses_tensors_on_several_devices():
    coords, feats = sparse()
    index = neighbor_map(coords, 3).map
    weight = torch.zeros(3, 4, 3, 3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="weight must be on cpu"):
        sparse_conv3d(feats, weight.to("meta"), None, index)
    with pytest.raises(ValueError, match="bias must be on cpu"):
        sparse_conv3d(feats, weight, weight[:, 0, 0, 0, 0].to("meta"), index)
    for op in (sparse_max_pool3d, sparse_avg_pool3d, lambda x, m: sparse_conv3d(x, weight, None, m)):
        with pytest.raises(ValueError, match="neighbor_map must be on cpu"):
            op(feats, index.to("meta"))
    with pytest.raises(ValueError, match="out_coords must be on cpu"):
        neighbor_map(coords, 3, out_coords=coords.to("meta"))
    for bad in (None, [1], coords.numpy()):
        with pytest.raises(TypeError, match=r"must be a torch\.Tensor"):
            neighbor_map(bad, 3)
        with pytest.raises(TypeError, match=r"must be a torch\.Tensor"):
            sparse_conv3d(feats, weight, None, bad)
        with pytest.raises(TypeError, match=r"must be a torch\.Tensor"):
            sparse_max_pool3d(bad, index)


@pytest.mark.gpu
def test_runs_on_the_current_stream():
    coords, feats = (t.detach().cuda() for t in sparse(400))
    weight = torch.randn(3, 4, 3, 3, 3, dtype=torch.float64, device="cuda")
    expected = sparse_conv3d(feats, weight, None, neighbor_map(coords, 3).map)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        late = coords.clone()
        out = sparse_conv3d(feats.clone(), weight, None, neighbor_map(late, 3).map)
    side.synchronize()
    assert torch.equal(out, expected)
