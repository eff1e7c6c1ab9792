"""Attention modules against torch's attention under explicit masks, and against the operators that they call."""

import pytest
import torch
import torch.nn.functional as F

from cvctoolkit import ops
from cvctoolkit._library import record_calls
from cvctoolkit.nn import sparse as sp
from cvctoolkit.ops.sparse_attention.samples import cells

SIZE = 8


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def inputs(kind, channels=12, count=120, dtype=torch.float64):
    coords = cells(generator(), count, size=SIZE, batch=2, shuffled=False)
    feats = torch.randn(len(coords), channels, generator=generator(1), dtype=dtype, requires_grad=True)
    return sp.SparseTensor(feats, coords) if kind is sp.SparseTensor else kind(coords, feats, (SIZE,) * 3, 2)


def drawn(module, seed=3, dtype=torch.float64):
    for parameter in module.to(dtype).parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator(seed), dtype=dtype) * 0.3
    return module


def same_gradients(ours, exact, leaves):
    tolerance = 1e-9 if ours.dtype == torch.float64 else 1e-4
    assert torch.allclose(ours, exact, atol=tolerance)
    weight = torch.randn(ours.shape, generator=generator(7), dtype=ours.dtype)
    expected = torch.autograd.grad(exact, leaves, weight)
    for a, b in zip(torch.autograd.grad(ours, leaves, weight), expected):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [sp.SparseTensor, ops.SparseVoxels])
@pytest.mark.parametrize(
    "window,shift,rope,norm", [(3, 1, False, False), ((2, 3, 4), (1, 0, 2), True, True), (None, 0, True, False)]
)
def test_window_attention_equals_masked_attention(kind, window, shift, rope, norm):
    x = inputs(kind)
    module = drawn(sp.SparseWindowAttention(12, 2, window, shift, use_rope=rope, qk_rms_norm=norm))
    q, k, v = F.linear(x.feats, module.to_qkv.weight, module.to_qkv.bias).view(-1, 3, 2, 6).unbind(1)
    if norm:
        q, k = (
            t / t.norm(dim=-1, keepdim=True) * 6**0.5 * m.gamma
            for t, m in ((q, module.q_rms_norm), (k, module.k_rms_norm))
        )
    if rope:
        q, k = ops.rope_3d(q, x.coords), ops.rope_3d(k, x.coords)
    windows = x.coords[:, :1]
    if window is not None:
        cell = (x.coords[:, 1:] + torch.tensor(shift)) // torch.tensor(window)
        windows = torch.cat([windows, cell], 1)
    mask = (windows[:, None] == windows).all(-1)
    out = F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), attn_mask=mask)[0]
    exact = F.linear(out.transpose(0, 1).flatten(1), module.to_out.weight, module.to_out.bias)
    ours = module(x)
    assert type(ours) is kind and ours.coords is x.coords
    same_gradients(ours.feats, exact, (x.feats, *module.parameters()))


@pytest.mark.parametrize("kind", [sp.SparseTensor, ops.SparseVoxels])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_spatial_sparse_attention_is_its_operator_on_compressed_keys(kind, version):
    dtype = torch.float64 if version == "v1" else torch.float32  # which v2's norms compute in
    x = inputs(kind, dtype=dtype)
    module = drawn(sp.SpatialSparseAttention(12, 4, 2, 4, 2, 4, 2, 4, 1, compression_version=version), dtype=dtype)
    tensor = sp.SparseTensor(x.feats, x.coords, (2,))
    q, k, v = (F.linear(x.feats, p.weight) for p in (module.proj_q, module.proj_k, module.proj_v))
    at = (x.coords[:, 1:] % 2).long()
    placed = k + module.intra_block_pe[at[:, 0], at[:, 1], at[:, 2]]
    compressed = []
    for feats, block in ((placed, module.compression_key), (v, module.compression_value)):
        sums = lambda t: ops.downsample(x.coords, t, 2, include_self=True).feats  # noqa: E731
        h = block.act_layers(tensor.replace(feats)).feats
        if version == "v1":
            compressed.append(sums(h))
        else:
            coarse = sp.SparseTensor(sums(h), ops.downsample(x.coords, None, 2).coords, (2,))
            compressed.append(block.out_layers(coarse).feats + sums(feats))
    heads = [t.unflatten(1, (-1, 4)) for t in (q, k, v, *compressed)]
    gates = torch.sigmoid(F.linear(x.feats, module.gate[0].weight))
    out = ops.spatial_sparse_attention(
        *heads[:3], x.coords, gates, topk=2, compressed_k=heads[3], compressed_v=heads[4], compression_block=2,
        selection_block=4, window_size=4, shift=1, backend="reference",
    )  # fmt: skip
    ours = module(x)
    assert type(ours) is kind and ours.coords is x.coords
    same_gradients(ours.feats, F.linear(out.flatten(1), module.proj_o.weight), (x.feats, *module.parameters()))


def test_geometry_is_made_once():
    x = inputs(sp.SparseTensor, dtype=torch.float32)
    window, spatial = sp.SparseWindowAttention(12, 2, 4), sp.SpatialSparseAttention(12, 2, 1, 4, 2, 4, 1, 4)
    spatial(window(x))
    with record_calls() as calls:
        spatial(window(x))
    names = {operator.name for operator, _ in calls}
    assert "ragged_attention" in names and not names & {"window_partition", "voxel_coarsen", "neighbor_map"}


def test_parameters_have_the_names_of_trellis_and_direct3d_s2():
    module = sp.SparseWindowAttention(8, 2, 4, qk_rms_norm=True)
    assert set(module.state_dict()) == {
        "to_qkv.weight", "to_qkv.bias", "to_out.weight", "to_out.bias", "q_rms_norm.gamma", "k_rms_norm.gamma",
    }  # fmt: skip
    names = set(sp.SpatialSparseAttention(8, 2, 1, 4, 2, 4, 1, 4, resolution=64).state_dict())
    assert {"proj_q.weight", "proj_o.weight", "intra_block_pe", "gate.0.weight"} <= names
    assert {f"compression_key.out_layers.{i}.{w}" for i in (0, 1, 3) for w in ("weight", "bias")} <= names


@pytest.mark.parametrize("kind", [sp.SparseTensor, ops.SparseVoxels])
def test_no_voxels(kind):
    coords = torch.zeros(0, 4, dtype=torch.int32)
    feats = torch.zeros(0, 8)
    x = sp.SparseTensor(feats, coords, (1,)) if kind is sp.SparseTensor else kind(coords, feats, (SIZE,) * 3)
    for module in (sp.SparseWindowAttention(8, 2, 4, use_rope=True), sp.SpatialSparseAttention(8, 2, 1, 4, 2, 4, 1, 4)):
        assert module(x).feats.shape == (0, 8)


@pytest.mark.parametrize(
    "make,match",
    [
        (lambda: sp.SparseWindowAttention(9, 2, 4), "multiple of num_heads"),
        (lambda: sp.SparseWindowAttention(6, 2, 4, use_rope=True), "even head dimension"),
        (lambda: sp.SparseWindowAttention(8, 2, 4, 4), "shift must be less"),
        (lambda: sp.SpatialSparseAttention(8, 3, 2, 4, 2, 4, 1, 4), "multiple of num_kv_heads"),
        (lambda: sp.SpatialSparseAttention(8, 2, 2, 4, 4, 6, 1, 4), "multiple of compression_block"),
        (lambda: sp.SpatialSparseAttention(8, 2, 2, 4, 2, 4, 0, 4), "topk must be >= 1"),
        (lambda: sp.SpatialSparseAttention(8, 2, 2, 4, 2, 4, 1, 4, compression_version="v3"), "compression_version"),
    ],
)
def test_refuses_what_does_not_fit(make, match):
    with pytest.raises(ValueError, match=match):
        make()
