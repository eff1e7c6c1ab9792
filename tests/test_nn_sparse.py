"""Sparse modules against dense PyTorch; a network written for TRELLIS or Direct3D-S2 runs on them as it is."""

import pytest
import torch
from torch import nn

from cvctoolkit import ops
from cvctoolkit._library import record_calls
from cvctoolkit.nn import sparse as sp
from cvctoolkit.ops.sparse_conv.samples import cells

F = torch.nn.functional
BATCH, SIZE = 3, 8


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def tensor(channels=4, count=150, seed=0, dtype=torch.float64):
    coords = cells(generator(seed), count, size=SIZE, batch=BATCH)
    feats = torch.randn(len(coords), channels, generator=generator(seed), dtype=dtype, requires_grad=True)
    return sp.SparseTensor(feats, coords)


def at(grid, coords):
    return grid.permute(0, 2, 3, 4, 1)[tuple(coords.long().T)]


def assert_same(ours, dense, leaves, atol=1e-10):
    assert torch.allclose(ours, dense, atol=atol)
    weight = torch.randn(ours.shape, generator=generator(7), dtype=ours.dtype)
    expected = torch.autograd.grad((dense * weight).sum(), leaves, retain_graph=True)
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), leaves, retain_graph=True), expected):
        assert torch.allclose(a, b, atol=atol)


# --- the modules, against dense PyTorch -------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel,dilation,groups", [(3, 1, 1), (3, 2, 2), (1, 1, 1), ((1, 3, 5), 1, 4)])
def test_submanifold_convolution(kernel, dilation, groups):
    x = tensor()
    conv = sp.SparseConv3d(4, 8, kernel, dilation=dilation, groups=groups).double()
    out = conv(x)
    assert out.coords is x.coords and out.shape == (BATCH, 8)
    padding = [dilation * (k - 1) // 2 for k in conv.kernel_size]
    dense = F.conv3d(x.dense([SIZE] * 3), conv.weight, conv.bias, 1, padding, dilation, groups)
    assert_same(out.feats, at(dense, x.coords), (x.feats, conv.weight, conv.bias))


@pytest.mark.parametrize("kernel,stride,padding", [(2, 2, None), (3, 2, 1), (4, 3, 2)])
def test_strided_convolution_and_back(kernel, stride, padding):
    x = tensor()
    down = sp.SparseConv3d(4, 6, kernel, stride, padding=padding).double()
    up = sp.SparseInverseConv3d(6, 3, kernel, stride, bias=False).double()
    coarse = down(x)
    pad = padding or 0
    wide = F.pad(x.dense([SIZE] * 3), [0, kernel] * 3)  # sparse grids have no upper border
    dense = F.conv3d(wide, down.weight, down.bias, stride, pad)
    assert_same(coarse.feats, at(dense, coarse.coords), (x.feats, down.weight))
    reached = F.conv3d(
        (wide != 0).any(1, keepdim=True).double(), torch.ones(1, 1, *down.kernel_size).double(), None, stride, pad
    )
    assert torch.equal(coarse.coords.long(), (reached[:, 0] > 0.5).nonzero())
    assert coarse._scale != x._scale and coarse.shape == (BATCH, 6)

    back = up(coarse)
    assert back.coords is x.coords and back._scale == x._scale and back.layout == x.layout
    grid = coarse.dense(dense.shape[2:])
    dense = F.conv_transpose3d(grid, up.weight.transpose(0, 1), None, stride, pad)
    assert_same(back.feats, at(F.pad(dense, [0, SIZE] * 3), x.coords), (x.feats, down.weight, up.weight))


def test_an_inverse_convolution_needs_what_it_inverts():
    x = tensor()
    coarse = sp.SparseConv3d(4, 4, 2, 2).double()(x)
    other = sp.SparseInverseConv3d(4, 4, 3, 2).double()
    with pytest.raises(ValueError, match="no SparseConv3d with kernel_size"):
        other(coarse)
    with pytest.raises(ValueError, match="no SparseConv3d with kernel_size"):
        sp.SparseInverseConv3d(4, 4, 2, 2).double()(coarse.replace(coarse.feats, coarse.coords.clone()))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_group_norm(groups):
    x = tensor()
    norm = sp.SparseGroupNorm(groups, 4).double()
    nn.init.normal_(norm.weight)
    dense = torch.cat([F.group_norm(x.feats[r].T[None], groups, norm.weight, norm.bias)[0].T for r in x.layout])
    assert_same(norm(x).feats, dense, (x.feats, norm.weight, norm.bias))


def test_layers_that_keep_voxels():
    x = tensor()
    linear, norm = sp.SparseLinear(4, 7).double(), sp.SparseLayerNorm(4).double()
    assert torch.equal(linear(x).feats, F.linear(x.feats, linear.weight, linear.bias))
    assert torch.equal(norm(x).feats, F.layer_norm(x.feats, [4]))
    for module, function in ((sp.SparseReLU(), F.relu), (sp.SparseSiLU(), F.silu), (sp.SparseGELU(), F.gelu)):
        assert torch.equal(module(x).feats, function(x.feats))
    assert torch.equal(sp.SparseActivation(nn.Tanh())(x).feats, x.feats.tanh())
    half = x.half()
    for module in (sp.SparseGroupNorm32(2, 4), sp.SparseLayerNorm32(4)):
        assert module(half).dtype == torch.float16
        expected = module(half.float()).feats.half()
        for dtype in (torch.float32, torch.float64, torch.float16):  # of the parameters: 0 and 1, exact in all
            assert torch.equal(module.to(dtype)(half).feats, expected)


@pytest.mark.parametrize("include_self", [True, False])
def test_downsampling_and_back(include_self):
    x = tensor()
    down, up = sp.SparseDownsample(2, include_self=include_self), sp.SparseUpsample(2)
    coarse = down(x)
    total = F.avg_pool3d(x.dense([SIZE] * 3), 2, divisor_override=1)
    count = F.avg_pool3d(x.replace(torch.ones_like(x.feats)).dense([SIZE] * 3), 2, divisor_override=1)
    assert_same(coarse.feats, at(total, coarse.coords) / (at(count, coarse.coords) + include_self), (x.feats,))
    fine = up(coarse)
    assert fine.coords is x.coords and fine.layout == x.layout and fine._scale == x._scale
    dense = at(F.interpolate(coarse.dense([SIZE // 2] * 3), scale_factor=2), x.coords)
    assert_same(fine.feats, dense, (x.feats,))
    with pytest.raises(ValueError, match="do not come from a SparseDownsample by"):
        up(x)
    with pytest.raises(ValueError, match="do not come from a SparseDownsample by"):
        up(coarse.replace(coarse.feats, coarse.coords.clone()))


def test_subdividing():
    x = tensor()
    fine = sp.SparseSubdivide()(x)
    dense = F.interpolate(x.dense([SIZE] * 3), scale_factor=2)
    assert_same(fine.feats, at(dense, fine.coords), (x.feats,))
    assert len(fine.coords) == 8 * len(x.coords) and fine.shape == x.shape
    mask = torch.rand(len(x.coords), 8, generator=generator()) < 0.4
    some = sp.SparseUpsample(2)(x, mask)
    assert_same(some.feats, at(dense, some.coords), (x.feats,))
    assert len(some.coords) == mask.sum()
    with pytest.raises(ValueError, match="factor 2"):
        sp.SparseUpsample(3)(x, mask)


# --- the holder -------------------------------------------------------------------------------------------------------


def test_batch_items():
    x = tensor()
    assert x.shape == (BATCH, 4) and x.dim() == 2 and x.layout[0].start == 0 and x.layout[-1].stop == len(x.coords)
    for k, item in enumerate(x.unbind(0)):
        rows = x.coords[:, 0] == k
        assert item.shape == (1, 4) and torch.equal(item.feats, x.feats[rows]) and (item.coords[:, 0] == 0).all()
        assert torch.equal(item.coords[:, 1:], x.coords[rows][:, 1:])
    joined = sp.sparse_cat(x.unbind(0))
    assert torch.equal(joined.coords, x.coords) and torch.equal(joined.feats, x.feats) and joined.layout == x.layout
    picked = x[torch.tensor([2, 0])]
    assert torch.equal(picked[1].feats, x[0].feats) and torch.equal(picked.feats, x[[2, 0]].feats)
    assert torch.equal(x[torch.tensor([False, True, True])].coords, x[1:].coords)
    assert x[-1].feats.shape == x[2].feats.shape and x[:0].shape == (0, 4)
    halves = x.reshape(2, 2).unbind(2)
    assert torch.equal(halves[1].feats, x.feats.view(-1, 2, 2)[:, :, 1])
    assert torch.equal(sp.sparse_cat([x, x], 1).feats, torch.cat([x.feats, x.feats], 1))
    assert "batch=3" in repr(x)


def test_batch_items_without_voxels():
    coords = torch.tensor([[1, 0, 0, 0], [1, 2, 0, 1], [3, 1, 1, 1]])
    x = sp.SparseTensor(torch.randn(3, 4), coords, [6, 4])
    assert x.layout == [slice(0, 0), slice(0, 2), slice(2, 2), slice(2, 3), slice(3, 3), slice(3, 3)]
    block = nn.Sequential(
        sp.SparseGroupNorm(2, 4), sp.SparseConv3d(4, 4, 3), sp.SparseDownsample(2), sp.SparseSubdivide()
    )
    assert block(x).shape == (6, 4) and block(x).layout[2] == slice(16, 16)
    assert x[0].feats.shape == (0, 4) and x.dense().shape == (6, 4, 3, 2, 2)
    nothing = sp.SparseTensor(torch.zeros(0, 4), coords[:0])
    assert nothing.shape == (0, 4) and block(nothing).feats.shape == (0, 4) and nothing.dense().shape == (0, 4, 1, 1, 1)


def test_arithmetic():
    x, y = tensor(), tensor()
    y = y.replace(torch.rand(y.feats.shape, generator=generator(1)).double() + 1, x.coords)
    per_item = torch.arange(BATCH).double()[:, None] + 1
    rows = per_item[x.coords[:, 0].long()]
    for ours, expected in (
        (x + y, x.feats + y.feats),
        (x * y, x.feats * y.feats),
        (x - y, x.feats - y.feats),
        (x / y, x.feats / y.feats),
        (-x, -x.feats),
        (2 - x, 2 - x.feats),
        (1 / y, 1 / y.feats),
        (3 * x + 1, 3 * x.feats + 1),
        (x * per_item, x.feats * rows),
        (x + y.feats, x.feats + y.feats),
        (sp.sparse_batch_op(x, per_item, torch.mul), x.feats * rows),
    ):
        assert torch.equal(ours.feats, expected) and ours.coords is x.coords
    y._spatial_cache = {}
    y.register_spatial_cache("name", 5)
    assert (x + y).get_spatial_cache("name") == 5 and x.get_spatial_cache("name") is None


def test_full_and_casts():
    box = sp.SparseTensor.full([1, 2, 3, 2, 2, 4], (2, 3), 0.5)
    assert box.shape == (2, 3) and len(box.coords) == 8 and box.coords[-1].tolist() == [1, 2, 2, 4]
    x = tensor(dtype=torch.float32)
    assert x.half().dtype == x.type(torch.float16).dtype == torch.float16 and x.half().float().dtype == torch.float32
    assert x.to(dtype=torch.float64).dtype == torch.float64 and x.cpu().device.type == "cpu"
    assert not x.detach().feats.requires_grad and x.to("meta")._spatial_cache is not x._spatial_cache


# --- caches -----------------------------------------------------------------------------------------------------------


def names(module, x):
    with record_calls() as calls:
        out = module(x)
    return out, [operator.name for operator, _ in calls]


def test_maps_are_made_once_for_every_set_of_voxels():
    def layers():
        return [sp.SparseConv3d(4, 4, 3), sp.SparseGroupNorm(2, 4), sp.SparseConv3d(4, 4, 3)]

    unet = nn.Sequential(
        *layers(), sp.SparseDownsample(2), *layers(), sp.SparseDownsample(2), *layers(),
        sp.SparseUpsample(2), *layers(), sp.SparseUpsample(2), *layers(),
    )  # fmt: skip
    x = tensor(dtype=torch.float32)
    out, calls = names(unet, x)
    assert out.coords is x.coords and out._scale == (1, 1, 1)
    assert calls.count("neighbor_map") == 3 and calls.count("voxel_coarsen") == 2
    _, calls = names(unet, x)
    assert not {"neighbor_map", "voxel_coarsen", "conv_out_coords"} & set(calls)


def test_a_cache_never_serves_other_voxels():
    x = tensor()
    conv = sp.SparseConv3d(4, 4, 3).double()
    conv(x)
    moved = x.coords.clone()
    moved[:, 1:] = moved[:, 1:].flip(1)
    y = x.replace(x.feats, moved)
    assert torch.equal(conv(y).feats, conv(sp.SparseTensor(x.feats, moved)).feats)
    x.register_spatial_cache("mine", [1])
    assert y.get_spatial_cache("mine") == [1] and "mine" in y.get_spatial_cache()
    assert sp.SparseDownsample(2)(x).get_spatial_cache("mine") is None


# --- other people's code ----------------------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """In the manner of those packages: `sp` is all that it knows."""

    def __init__(self, channels, out_channels=None, resample=None):
        super().__init__()
        out_channels = out_channels or channels
        self.norm1 = sp.SparseGroupNorm32(2, channels)
        self.conv1 = sp.SparseConv3d(channels, out_channels, 3, indice_key="res")
        self.norm2 = sp.SparseGroupNorm32(2, out_channels)
        self.conv2 = sp.SparseConv3d(out_channels, out_channels, 3, padding=1)
        self.skip = sp.SparseLinear(channels, out_channels) if channels != out_channels else nn.Identity()
        self.resample = {"down": sp.SparseDownsample(2), "up": sp.SparseUpsample(2), None: nn.Identity()}[resample]

    def forward(self, x: sp.SparseTensor) -> sp.SparseTensor:
        x = self.resample(x)
        h = self.norm1(x)
        h = h.replace(F.silu(h.feats))
        h = self.conv1(h)
        h = self.norm2(h)
        h = h.replace(F.silu(h.feats))
        h = self.conv2(h)
        return h + self.skip(x)


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layer = sp.SparseLinear(3, 4)
        self.down = ResidualBlock(4, 6, "down")
        self.up = ResidualBlock(6, 4, "up")
        self.out_layer = sp.SparseLinear(8, 2)

    def forward(self, x, modulation):
        h = self.input_layer(x)
        skip = h
        h = self.down(h)
        h = h * (1 + modulation)
        h = self.up(h)
        h = sp.sparse_cat([h, skip], dim=1)
        assert h.shape[0] == x.shape[0] and h.layout == x.layout
        return self.out_layer(h)


class DenseBlock:
    """The same weights on dense grids, with a mask of where the voxels are."""

    def __init__(self, block):
        self.block = block

    def norm(self, module, h, mask):
        out = torch.zeros_like(h)
        for k in range(len(h)):
            inside = h[k][:, mask[k, 0]]
            out[k][:, mask[k, 0]] = F.group_norm(inside[None], module.num_groups, module.weight, module.bias)[0]
        return out

    def conv(self, module, h, mask):
        return F.conv3d(h, module.weight, module.bias, padding=1) * mask

    def __call__(self, x, mask):
        b = self.block
        h = self.conv(b.conv1, F.silu(self.norm(b.norm1, x, mask)), mask)
        h = self.conv(b.conv2, F.silu(self.norm(b.norm2, h, mask)), mask)
        return h + linear(b.skip, x, mask)


def linear(module, x, mask):
    if isinstance(module, nn.Identity):
        return x
    return F.conv3d(x, module.weight[..., None, None, None], module.bias) * mask


def test_a_network_in_their_manner_equals_the_dense_one():
    x = tensor(3, dtype=torch.float32)
    net = UNet()
    modulation = torch.randn(BATCH, 6, generator=generator(5))
    out = net(x, modulation)

    mask = x.replace(torch.ones_like(x.feats[:, :1])).dense([SIZE] * 3)
    h = skip = linear(net.input_layer, x.dense([SIZE] * 3), mask)
    total, count = (F.avg_pool3d(t, 2, divisor_override=1) for t in (h, mask))
    h = DenseBlock(net.down)(total / (count + 1), count > 0)
    h = h * (1 + modulation[..., None, None, None])
    h = DenseBlock(net.up)(F.interpolate(h, scale_factor=2) * mask, mask > 0)
    dense = linear(net.out_layer, torch.cat([h, skip], 1), mask)
    assert_same(out.feats, at(dense, x.coords), (x.feats, *net.parameters()), atol=2e-4)


def test_their_checkpoints_load():
    conv, weight = sp.SparseConv3d(2, 3, (3, 3, 1)), torch.randn(3, 2, 3, 3, 1)
    net, bias = nn.ModuleDict({"a": conv}), torch.randn(3)
    net.load_state_dict({"a.conv.weight": weight.permute(0, 2, 3, 4, 1), "a.conv.bias": bias})
    assert torch.equal(conv.weight, weight) and torch.equal(conv.bias, bias)
    nn.init.zeros_(conv.weight)
    kernel = weight.permute(4, 3, 2, 1, 0).flatten(0, 2)  # x fastest: an odd volume
    assert torch.equal(ops.weight_from_torchsparse(kernel, (3, 3, 1)), weight)
    saved = {"a.conv.kernel": kernel, "a.conv.bias": bias}
    net.load_state_dict(saved)
    assert torch.equal(conv.weight, weight) and "a.conv.kernel" in saved
    net.load_state_dict(net.state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict({})


def test_autocast_and_half():
    x, conv = tensor(dtype=torch.float32), sp.SparseConv3d(4, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out = conv(x)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.feats.float(), conv(x).feats, atol=0.05)
    assert conv.half()(x.half()).dtype == torch.float16


# --- bad input --------------------------------------------------------------------------------------------------------


def test_refuses_what_does_not_fit():
    feats, coords = torch.zeros(3, 4), torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]])
    with pytest.raises(ValueError, match=r"feats must have shape \[3, \.\.\.\]"):
        sp.SparseTensor(feats[:2], coords)
    with pytest.raises(ValueError, match="coords must have dtype"):
        sp.SparseTensor(feats, coords.float())
    with pytest.raises(ValueError, match="coords must have shape"):
        sp.SparseTensor(feats, coords[:, 1:])
    with pytest.raises(TypeError, match="coords must be a"):
        sp.SparseTensor(feats, coords.tolist())
    with pytest.raises(ValueError, match="must be on cpu"):
        sp.SparseTensor(feats.to("meta"), coords)
    with pytest.raises(ValueError, match="batch items are together"):
        sp.SparseTensor(feats, coords.flip(0)).unbind(0)
    with pytest.raises(ValueError, match="batch items are together"):
        sp.SparseTensor(feats, coords - 1).unbind(0)
    with pytest.raises(ValueError, match="below 1, got 1"):
        sp.SparseTensor(feats, coords, [1]).unbind(0)
    with pytest.raises(ValueError, match="padding must be None or"):
        sp.SparseConv3d(4, 4, 3, padding=0)
    with pytest.raises(ValueError, match="divisible by groups"):
        sp.SparseConv3d(6, 4, 3, groups=3)(sp.SparseTensor(torch.zeros(3, 6), coords))
    with pytest.raises(ValueError, match="distinct voxels"):
        sp.SparseConv3d(4, 4, 3)(sp.SparseTensor(feats, torch.zeros(3, 4, dtype=torch.int32)))
    x = sp.SparseTensor(feats, coords)
    with pytest.raises(ValueError, match="feats must have shape"):
        x.feats = feats[:1]
    with pytest.raises(ValueError, match="coords must have shape"):
        x.coords = coords[:1]
