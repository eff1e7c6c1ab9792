"""Sparse convolution against dense PyTorch: scatter, convolve, gather."""

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from cvctoolkit._native import restricted_isa
from cvctoolkit.ops import (
    conv_out_coords,
    neighbor_map,
    sparse_avg_pool3d,
    sparse_conv3d,
    sparse_max_pool3d,
    weight_from_flexgemm,
    weight_from_spconv,
    weight_from_torchsparse,
)
from cvctoolkit.ops.sparse_conv.maps_op import invert
from cvctoolkit.ops.sparse_conv.samples import cells
from tests.native import native_module

F = torch.nn.functional
BACKENDS = ["native", "reference"]
SIZE = 9


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def sparse(count=120, channels=4, *, size=SIZE, batch=3, seed=0):
    g = generator(seed)
    coords = cells(g, count, size=size, batch=batch)
    feats = torch.randn(len(coords), channels, generator=g, dtype=torch.float64, requires_grad=True)
    return coords, feats


def to_grid(coords, feats, extent, batch=3, fill=0.0):
    grid = feats.new_full((batch, *extent, feats.shape[1]), fill)
    return grid.index_put(tuple(coords.long().T), feats).permute(0, 4, 1, 2, 3)


def at(grid, coords):
    return grid.permute(0, 2, 3, 4, 1)[tuple(coords.long().T)]


def same_gradients(ours, dense, leaves):
    weight = torch.randn(ours.shape, generator=generator(7), dtype=ours.dtype)
    expected = torch.autograd.grad((dense * weight).sum(), leaves)
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), leaves), expected):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def extents(size, kernel, stride, dilation, padding):
    return [(size + 2 * p - d * (k - 1) - 1) // s + 1 for k, s, d, p in zip(kernel, stride, dilation, padding)]


# --- dense PyTorch is the oracle --------------------------------------------------------------------------------------

SHAPES = st.tuples(*[st.integers(1, 5)] * 3)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25)
@given(
    kernel=SHAPES,
    stride=st.tuples(*[st.integers(1, 3)] * 3),
    dilation=st.tuples(*[st.integers(1, 2)] * 3),
    groups=st.sampled_from([1, 2, 4]),
    count=st.sampled_from([1, 30, 200]),
    data=st.data(),
)
def test_equals_dense_convolution(backend, kernel, stride, dilation, groups, count, data):
    padding = tuple(data.draw(st.integers(0, d * (k - 1))) for k, d in zip(kernel, dilation))
    extent = extents(SIZE, kernel, stride, dilation, padding)
    if min(extent) < 1:
        return
    coords, feats = sparse(count)
    g = generator(1)
    weight = torch.randn(6 - 6 % groups, 4 // groups, *kernel, generator=g, dtype=torch.float64, requires_grad=True)
    weight = weight if groups != 4 else weight[:4].detach().requires_grad_()
    bias = torch.randn(weight.shape[0], generator=g, dtype=torch.float64, requires_grad=True)
    geometry = dict(stride=stride, dilation=dilation, padding=padding)

    out_coords = conv_out_coords(coords, kernel, **geometry, spatial_shape=extent)
    ones = F.conv3d(
        to_grid(coords, torch.ones(len(coords), 1).double(), [SIZE] * 3), torch.ones(1, 1, *kernel).double(), **geometry
    )
    assert torch.equal(out_coords.long(), (ones[:, 0] > 0.5).nonzero())

    found = neighbor_map(coords, kernel, **geometry, out_coords=out_coords, backend=backend)
    ours = sparse_conv3d(feats, weight, bias, found.map, groups=groups, backend=backend)
    dense = F.conv3d(to_grid(coords, feats, [SIZE] * 3), weight, bias, groups=groups, **geometry)
    assert torch.allclose(ours, at(dense, out_coords), rtol=1e-10, atol=1e-10)
    same_gradients(ours, at(dense, out_coords), (feats, weight, bias))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25)
@given(
    kernel=SHAPES,
    stride=st.tuples(*[st.integers(1, 3)] * 3),
    dilation=st.tuples(*[st.integers(1, 2)] * 3),
    data=st.data(),
)
def test_equals_dense_transposed_convolution(backend, kernel, stride, dilation, data):
    padding = tuple(data.draw(st.integers(0, d * (k - 1) // 2)) for k, d in zip(kernel, dilation))
    geometry = dict(stride=stride, dilation=dilation, padding=padding)
    size = 4
    extent = [(size - 1) * s - 2 * p + d * (k - 1) + 1 for k, s, d, p in zip(kernel, stride, dilation, padding)]
    coords, feats = sparse(25, size=size)
    weight = torch.randn(3, 4, *kernel, generator=generator(1), dtype=torch.float64, requires_grad=True)

    found = neighbor_map(coords, kernel, **geometry, transposed=True, spatial_shape=extent, backend=backend)
    ours = sparse_conv3d(feats, weight, None, found.map, backend=backend)
    dense = F.conv_transpose3d(to_grid(coords, feats, [size] * 3), weight.transpose(0, 1), **geometry)
    assert torch.allclose(ours, at(dense, found.out_coords), rtol=1e-10, atol=1e-10)
    assert math.isclose(ours.abs().sum().item(), dense.abs().sum().item(), rel_tol=1e-9)  # nothing outside
    same_gradients(ours, at(dense, found.out_coords), (feats, weight))


@pytest.mark.parametrize("kernel,dilation", [(1, 1), (3, 1), (3, 2), (5, 1), ((1, 3, 5), 1), (4, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_submanifold_keeps_the_voxels(backend, kernel, dilation):
    coords, feats = sparse(300)
    found = neighbor_map(coords, kernel, dilation=dilation, backend=backend)
    assert torch.equal(found.out_coords, coords)
    shape = (kernel,) * 3 if isinstance(kernel, int) else kernel
    weight = torch.randn(5, 4, *shape, generator=generator(1), dtype=torch.float64, requires_grad=True)
    padding = [dilation * (k - 1) // 2 for k in shape]
    grid = F.pad(to_grid(coords, feats, [SIZE] * 3), [x for k in reversed(shape) for x in (0, dilation * (k - 1))])
    dense = F.conv3d(F.pad(grid, [x for p in reversed(padding) for x in (p, 0)]), weight, dilation=dilation)
    ours = sparse_conv3d(feats, weight, None, found.map, backend=backend)
    assert torch.allclose(ours, at(dense, coords), rtol=1e-10, atol=1e-10)
    same_gradients(ours, at(dense, coords), (feats, weight))


def test_an_inverse_convolution_returns_to_the_voxels_it_came_from():
    coords, _ = sparse()
    coarse = conv_out_coords(coords, 2, 2)
    there = neighbor_map(coords, 2, 2, out_coords=coarse)
    back = neighbor_map(coarse, 2, 2, transposed=True, out_coords=coords)
    assert torch.equal(invert(there.map, len(coords)), back.map)
    assert ((back.map >= 0).sum(1) == 1).all()


@pytest.mark.parametrize("kernel,stride,padding", [(2, 2, 0), (3, 2, 1), (3, 1, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_pooling_equals_dense_pooling(backend, kernel, stride, padding):
    coords, feats = sparse(200, size=8)
    extent = extents(8, *([v] * 3 for v in (kernel, stride, 1, padding)))
    found = neighbor_map(
        coords,
        kernel,
        stride,
        padding=padding,
        out_coords=conv_out_coords(coords, kernel, stride, padding=padding, spatial_shape=extent),
    )
    window = dict(kernel_size=kernel, stride=stride, padding=padding)
    lowest = to_grid(coords, feats, [8] * 3, fill=-1e9)
    dense = at(F.max_pool3d(lowest, **window), found.out_coords)
    ours = sparse_max_pool3d(feats, found.map, backend=backend)
    assert torch.equal(ours, dense)
    same_gradients(ours, dense, (feats,))

    ones = F.avg_pool3d(to_grid(coords, torch.ones_like(feats.detach()), [8] * 3), **window, divisor_override=1)
    for count_absent, divisor in ((False, at(ones, found.out_coords)), (True, kernel**3)):
        total = F.avg_pool3d(to_grid(coords, feats, [8] * 3), **window, divisor_override=1)
        dense = at(total, found.out_coords) / divisor
        ours = sparse_avg_pool3d(feats, found.map, count_absent=count_absent, backend=backend)
        assert torch.allclose(ours, dense, rtol=1e-12, atol=1e-12)
        same_gradients(ours, dense, (feats,))


# --- maps -------------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    kernel=SHAPES,
    stride=st.tuples(*[st.integers(1, 3)] * 3),
    dilation=st.tuples(*[st.integers(1, 3)] * 3),
    transposed=st.booleans(),
    count=st.sampled_from([0, 1, 40, 200]),
    border=st.booleans(),
    seed=st.integers(0, 99),
)
def test_native_maps_equal_the_reference(kernel, stride, dilation, transposed, count, border, seed):
    g = generator(seed)
    coords = cells(g, count)
    if border:  # the far corner of the largest grid
        coords[:, 1:] = 65535 - coords[:, 1:]
        coords[:, 0] = 32767 - coords[:, 0]
    coords = coords[torch.randperm(len(coords), generator=g)]
    reached = [conv_out_coords(coords, kernel, stride, dilation, transposed=transposed, backend=b) for b in BACKENDS]
    assert torch.equal(*reached)
    out = reached[0]
    out = out[torch.randperm(len(out), generator=g)] if seed % 2 else out
    geometry = dict(stride=stride, dilation=dilation, transposed=transposed, out_coords=out)
    native, exact = (neighbor_map(coords, kernel, **geometry, backend=b).map for b in BACKENDS)
    assert torch.equal(native, exact)
    sizes = kernel, stride, dilation, [d * (k - 1) // 2 for k, d in zip(kernel, dilation)], transposed
    on_device = native_module().neighbor_map_pipeline(coords.numpy(), out.numpy(), *sizes)  # run on the host
    assert torch.equal(torch.from_numpy(on_device), exact)
    assert torch.equal(invert(native, len(coords), backend="native"), invert(native, len(coords), backend="reference"))


@pytest.mark.parametrize("kernel,stride,padding", [(3, 2, 1), (2, 2, 0), (5, 3, 2)])
def test_one_isolated_voxel(kernel, stride, padding):
    """Engines that size their tables by the input hang here."""
    for corner in itertools.product((0, 1, 2), repeat=3):
        coords = torch.tensor([[0, *corner]], dtype=torch.int32)
        out = conv_out_coords(coords, kernel, stride, padding=padding)
        axes = [[o for o in range(4) if 0 <= c - (o * stride - padding) < kernel] for c in corner]
        assert out[:, 1:].tolist() == [list(o) for o in itertools.product(*axes)]


def test_all_voxels_at_one_parity():
    coords = torch.cartesian_prod(torch.tensor([0]), *[torch.arange(1, 16, 2)] * 3).int()
    found = neighbor_map(coords, 3, 2, padding=1)
    assert len(found.out_coords) == 9**3 and (found.map >= 0).sum() == 8 * len(coords)


@settings(max_examples=30)
@given(
    kernel=st.sampled_from([1, 2, 3, 5, (1, 2, 70)]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    transposed=st.booleans(),
    extent=st.tuples(*[st.sampled_from([1, 3, 9, 70])] * 3),
    seed=st.integers(0, 99),
)
def test_native_voxels_within_a_grid_equal_the_reference(kernel, stride, dilation, transposed, extent, seed):
    g = generator(seed)
    coords = cells(g, 50, size=80)
    coords = coords[torch.randint(len(coords), (60,), generator=g)]  # in any order, some twice
    options = dict(padding=1, transposed=transposed, spatial_shape=extent)
    native, exact = (conv_out_coords(coords, kernel, stride, dilation, **options, backend=b) for b in BACKENDS)
    assert torch.equal(native, exact)
    assert (native[:, 1:] < torch.tensor(extent)).all()


@settings(max_examples=25)
@given(st.integers(0, 99), st.sampled_from([0, 1, 2]))
def test_batches_do_not_mix_and_order_does_not_matter(seed, alone):
    coords, feats = sparse(150, seed=seed)
    weight = torch.randn(3, 4, 3, 3, 3, generator=generator(seed), dtype=torch.float64)
    whole = sparse_conv3d(feats, weight, None, neighbor_map(coords, 3).map)
    rows = (coords[:, 0] == alone).nonzero().squeeze(1)
    part = sparse_conv3d(feats[rows], weight, None, neighbor_map(coords[rows], 3).map)
    assert torch.allclose(part, whole[rows], atol=1e-12)

    order = torch.randperm(len(coords), generator=generator(seed))
    shuffled = sparse_conv3d(feats[order], weight, None, neighbor_map(coords[order], 3).map)
    assert torch.allclose(shuffled, whole[order], atol=1e-12)

    moved = coords + torch.tensor([0, 3, 1, 40], dtype=torch.int32)
    assert torch.allclose(sparse_conv3d(feats, weight, None, neighbor_map(moved, 3).map), whole, atol=1e-12)


@given(st.integers(0, 99), st.floats(-3, 3))
@settings(max_examples=20)
def test_linear_in_features_and_weights(seed, factor):
    coords, feats = sparse(60, seed=seed)
    g = generator(seed)
    other = torch.randn(feats.shape, generator=g, dtype=torch.float64)
    a, b = (torch.randn(3, 4, 3, 3, 3, generator=g, dtype=torch.float64) for _ in range(2))
    index = neighbor_map(coords, 3).map
    conv = lambda x, w: sparse_conv3d(x, w, None, index)  # noqa: E731
    assert torch.allclose(conv(feats + factor * other, a), conv(feats, a) + factor * conv(other, a), atol=1e-10)
    assert torch.allclose(conv(feats, a + factor * b), conv(feats, a) + factor * conv(feats, b), atol=1e-10)


def test_second_derivatives():
    coords, _ = sparse(12, 2, size=4)
    g = generator(3)
    feats = torch.randn(len(coords), 2, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 3, 1, 1, generator=g, dtype=torch.float64, requires_grad=True)
    index = neighbor_map(coords, (3, 1, 1)).map
    assert torch.autograd.gradgradcheck(lambda x, w: sparse_conv3d(x, w, None, index), (feats, weight))
    halves = neighbor_map(coords, 2, 2).map
    assert torch.autograd.gradgradcheck(lambda x: sparse_max_pool3d(x, halves), (feats,))
    assert torch.autograd.gradgradcheck(lambda x: sparse_avg_pool3d(x, halves), (feats,))


# --- precision, determinism, layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("channels", [(1, 1, 1), (3, 7, 1), (16, 16, 1), (30, 33, 3), (17, 17, 17), (70, 130, 1)])
def test_every_instruction_set(isa, channels):
    inputs, outputs, groups = channels
    coords, feats = sparse(700, inputs, size=12)
    feats = feats.detach().float()
    weight = torch.randn(outputs, inputs // groups, 3, 3, 3, generator=generator(1))
    index = neighbor_map(coords, 3).map
    grad = torch.randn(len(coords), outputs, generator=generator(2))
    with restricted_isa(isa) as granted:
        if granted != isa:
            pytest.skip(f"this machine has no {isa}")
        for dtype, tolerance in ((torch.float32, 2e-5), (torch.float64, 1e-12)):
            x, w = (t.to(dtype).requires_grad_() for t in (feats, weight))
            ours = sparse_conv3d(x, w, None, index, groups=groups, backend="native")
            found = torch.autograd.grad(ours, (x, w), grad.to(dtype))
            x, w = (t.double().requires_grad_() for t in (feats, weight))
            exact = sparse_conv3d(x, w, None, index, groups=groups, backend="reference")
            expected = torch.autograd.grad(exact, (x, w), grad.double())
            for a, b in zip((ours, *found), (exact, *expected)):
                assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


def test_independent_of_the_number_of_threads():
    coords, feats = sparse(3000, 24, size=20)
    weight = torch.randn(40, 24, 3, 3, 3, generator=generator(1), dtype=torch.float64, requires_grad=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            index = neighbor_map(coords, 3).map
            out = sparse_conv3d(feats, weight, None, index)
            results.append((index, out, *torch.autograd.grad(out.square().sum(), (feats, weight))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype):
    coords, feats = sparse(200)
    feats, weight = feats.detach().to(dtype), torch.randn(5, 4, 3, 3, 3, generator=generator(1)).to(dtype)
    index = neighbor_map(coords, 3).map
    exact = sparse_conv3d(feats.double(), weight.double(), None, index)
    for backend in BACKENDS:
        found = sparse_conv3d(feats, weight, None, index, backend=backend)
        assert found.dtype == dtype
        assert torch.allclose(found.double(), exact, rtol=torch.finfo(dtype).eps)
    weight.requires_grad_()
    grads = [torch.autograd.grad(sparse_conv3d(feats, weight, None, index, backend=b).sum(), weight) for b in BACKENDS]
    assert torch.allclose(grads[0][0].double(), grads[1][0].double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    pooled = [sparse_max_pool3d(feats, index, backend=b) for b in BACKENDS]
    assert pooled[0].dtype == dtype and torch.equal(*pooled)


def test_weights_of_other_engines():
    weight = torch.randn(3, 2, 3, 3, 5, generator=generator())
    assert torch.equal(weight_from_spconv(weight.permute(0, 2, 3, 4, 1)), weight)
    assert torch.equal(weight_from_flexgemm(weight.permute(0, 2, 3, 4, 1)), weight)
    # torchsparse lists its offsets x first where the volume is odd, z first where it is even.
    for kernel in ((3, 3, 5), (3, 2, 1)):
        weight = torch.randn(3, 2, *kernel, generator=generator())
        odd = math.prod(kernel) % 2
        offsets = [
            (x, y, z) if odd else (z, y, x)
            for z, y, x in itertools.product(*map(range, reversed(kernel) if odd else kernel))
        ]
        listed = torch.stack([weight[:, :, x, y, z].T for x, y, z in offsets])
        assert torch.equal(weight_from_torchsparse(listed, kernel), weight)
    assert weight_from_torchsparse(torch.zeros(2, 3), 1).shape == (3, 2, 1, 1, 1)
    with pytest.raises(ValueError, match="27 offsets"):
        weight_from_torchsparse(torch.zeros(27, 2, 3), 2)
