"""Sparse attention against torch's under explicit masks, and against a dense transcription of its equations."""

import math
from importlib.util import find_spec

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings

from cvctoolkit._native import restricted_isa
from cvctoolkit.ops import (
    apply_rope,
    batch_cu_seqlens,
    block_sparse_attention,
    rope_3d,
    rope_3d_phases,
    select_blocks,
    serialized_attention,
    serialized_partition,
    spatial_blocks,
    spatial_sparse_attention,
    varlen_attention,
    voxel_sort,
    window_attention,
    window_partition,
)
from cvctoolkit.ops.sparse_attention import samples
from cvctoolkit.ops.sparse_attention.samples import cells, heads, offsets
from tests import test_contract as contract

BACKENDS = ["native", "sdpa", "reference"]
LENGTHS = st.lists(st.integers(0, 9), min_size=0, max_size=6)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def voxels(count=60, *, size=7, batch=3, seed=0, q=2, k=1, dim=4):
    g = generator(seed)
    coords = cells(g, count, size=size, batch=batch)
    return coords, *(x.requires_grad_() for x in heads(g, len(coords), q=q, k=k, dim=dim).values())


def dense(q, k, v, allowed, scale=None):
    """The oracle: torch's attention under an explicit mask ``[N, M]`` or ``[N, H, M]``; 0 where nothing is allowed."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    mask = allowed[None] if allowed.dim() == 2 else allowed.transpose(0, 1)
    some = mask.any(-1, keepdim=True)
    x, y, z = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(x, y, z, attn_mask=(mask | ~some)[None], scale=scale)[0]
    return torch.where(some, out, 0).transpose(0, 1)


def assert_same(ours, exact, leaves=(), tolerance=1e-10):
    assert torch.allclose(ours, exact, rtol=tolerance, atol=tolerance)
    if leaves:
        weight = torch.randn(ours.shape, generator=generator(7), dtype=ours.dtype)
        expected = torch.autograd.grad(exact, leaves, weight)
        for a, b in zip(torch.autograd.grad(ours, leaves, weight), expected):
            assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def sequence_of(lengths, rows=None):
    """The sequence of every row."""
    which = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    return which if rows is None else torch.empty_like(which).scatter_(0, rows, which)


# --- sequences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40)
@given(pairs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), max_size=6), share=st.sampled_from([1, 3]),
       cross=st.booleans(), seed=st.integers(0, 99))  # fmt: skip
def test_equals_dense_attention(backend, pairs, share, cross, seed):
    g = generator(seed)
    lengths_q, lengths_k = [a for a, _ in pairs], [b if cross else a for a, b in pairs]
    q, k, v = (
        x.requires_grad_()
        for x in heads(g, sum(lengths_q), q=2 * share, k=2, dim=5, value_dim=7, rows_k=sum(lengths_k)).values()
    )
    rows_q = torch.randperm(len(q), generator=g)
    rows_k = torch.randperm(len(k), generator=g) if cross else rows_q
    of_keys = {"cu_seqlens_k": offsets(*lengths_k).int(), "permutation_k": rows_k} if cross else {}
    ours = varlen_attention(
        q, k, v, offsets(*lengths_q), **of_keys, permutation=rows_q, scale=0.8, return_lse=True, backend=backend
    )
    allowed = sequence_of(lengths_q, rows_q)[:, None] == sequence_of(lengths_k, rows_k)
    assert_same(ours.out, dense(q, k, v, allowed, 0.8), (q, k, v))
    scores = 0.8 * torch.einsum("nhd,mhd->nhm", q, k.repeat_interleave(share, 1))
    assert_same(ours.lse, scores.masked_fill(~allowed[:, None], -math.inf).logsumexp(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_log_sum_exp(backend):
    g = generator(3)
    q, k, v = (x.requires_grad_() for x in heads(g, 9, q=4, k=2).values())
    allowed = sequence_of([4, 5])[:, None] == sequence_of([4, 5])

    def exact_lse():
        scores = torch.einsum("nhd,mhd->nhm", q, k.repeat_interleave(2, 1)) / math.sqrt(3)
        return scores.masked_fill(~allowed[:, None], -math.inf).logsumexp(-1)

    exact = exact_lse()
    ours = varlen_attention(q, k, v, offsets(4, 5), return_lse=True, backend=backend)
    assert_same(ours.lse, exact)
    whole = (ours.out.square().sum() + ours.lse.sin().sum(), dense(q, k, v, allowed).square().sum() + exact.sin().sum())
    assert_same(*whole, (q, k, v))
    alone = varlen_attention(q, k, v, offsets(4, 5), return_lse=True, backend=backend).lse
    assert_same(alone, exact_lse(), (q, k))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30)
@example([2], [3], 0, 0)
@given(lengths_q=LENGTHS, lengths_k=LENGTHS, topk=st.integers(0, 4), seed=st.integers(0, 99))
def test_lists_of_blocks_equal_dense_attention(backend, lengths_q, lengths_k, topk, seed):
    g = generator(seed)
    q, k, v = (x.requires_grad_() for x in heads(g, sum(lengths_q), q=6, k=2, dim=4, rows_k=sum(lengths_k)).values())
    rows_q, rows_k = torch.randperm(len(q), generator=g), torch.randperm(len(k), generator=g)
    order = torch.rand(len(lengths_q), 2, len(lengths_k), generator=g).argsort(-1)[..., :topk]
    chosen = torch.where(torch.rand(order.shape, generator=g) < 0.2, -1, order)
    ours = block_sparse_attention(
        q, k, v, offsets(*lengths_q), offsets(*lengths_k), chosen, permutation=rows_q, permutation_k=rows_k,
        backend=backend,
    )  # fmt: skip
    listed = (chosen[..., None] == torch.arange(len(lengths_k))).any(2)  # group, head, block
    allowed = listed[sequence_of(lengths_q, rows_q)][:, :, sequence_of(lengths_k, rows_k)].repeat_interleave(3, 1)
    assert_same(ours, dense(q, k, v, allowed), (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_long_sequences(backend):
    """Longer than any tile, with lengths around its borders."""
    lengths = [1, 15, 16, 17, 33, 257, 700]
    q, k, v = (x.requires_grad_() for x in heads(generator(1), sum(lengths), q=2, k=1, dim=20, value_dim=33).values())
    which = sequence_of(lengths)
    ours = varlen_attention(q, k, v, offsets(*lengths), backend=backend)
    assert_same(ours, dense(q, k, v, which[:, None] == which), (q, k, v))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("share,dim,value_dim", [(1, 1, 1), (1, 16, 32), (3, 20, 33), (8, 64, 64)])
def test_every_instruction_set(isa, share, dim, value_dim):
    g = generator(1)
    lengths_q, lengths_k = [1, 40, 17, 0, 5], [130, 12, 300, 7, 0]
    tensors = heads(g, sum(lengths_q), q=2 * share, k=2, dim=dim, value_dim=value_dim, rows_k=sum(lengths_k)).values()
    chosen = torch.tensor(
        [[[0, 2, -1], [1, 3, 0]], [[4, 1, 2], [2, 0, -1]], [[-1, -1, -1], [4, -1, 3]]] + [[[1, 0, 2]] * 2] * 2
    )
    groups, blocks = offsets(*lengths_q), offsets(*lengths_k)

    def run(dtype, backend):
        q, k, v = (x.to(dtype).requires_grad_() for x in tensors)
        varied = varlen_attention(q, k, v, groups, blocks, backend=backend)
        listed = block_sparse_attention(q, k, v, groups, blocks, chosen, backend=backend)
        weight = torch.randn(varied.shape, generator=generator(2), dtype=torch.float64).to(dtype)
        grads = (torch.autograd.grad(out, (q, k, v), weight) for out in (varied, listed))
        return [varied, listed, *(x for grad in grads for x in grad)]

    with restricted_isa(isa) as granted:
        if granted != isa:
            pytest.skip(f"this machine has no {isa}")
        exact = run(torch.float64, "reference")
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
            for a, b in zip(run(dtype, "native"), exact):
                assert (a.double() - b).abs().max() <= tolerance * max(b.abs().max(), 1)


@pytest.mark.parametrize("long", [False, True])
def test_independent_of_the_number_of_threads(long):
    lengths = [700] if long else [5, 60, 3, 200] * 20
    q, k, v = (x.float().requires_grad_() for x in heads(generator(), sum(lengths), q=4, k=2, dim=9).values())
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out = varlen_attention(q, k, v, offsets(*lengths), backend="native")
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend):
    q, k, v = (x.float() for x in heads(generator(), 12, dim=8).values())
    which = sequence_of([5, 7])
    ours = varlen_attention(300 * q, 300 * k, v, offsets(5, 7), return_lse=True, backend=backend)
    exact = dense(300 * q.double(), 300 * k.double(), v.double(), which[:, None] == which)
    assert (ours.out.double() - exact).abs().max() < 1e-2 and ours.lse.isfinite().all()


def test_packed_projections_need_no_copy():
    packed = torch.randn(20, 3, 2, 4, generator=generator())
    q, k, v = packed.unbind(1)
    ours = varlen_attention(q, k, v, offsets(8, 12))
    assert torch.equal(ours, varlen_attention(*(x.contiguous() for x in (q, k, v)), offsets(8, 12)))


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend, dtype):
    q, k, v = (x.to(dtype) for x in heads(generator(), 40, q=4, k=2, dim=16).values())
    ours = varlen_attention(q, k, v, offsets(30, 10), backend=backend)
    exact = varlen_attention(q.double(), k.double(), v.double(), offsets(30, 10))
    assert ours.dtype == dtype and (ours.double() - exact).abs().max() < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "sample", [s for s in samples.samples() if s.op in (varlen_attention, block_sparse_attention)], ids=str
)
def test_scaled_dot_product_attention_serves_every_sample(sample):
    # A refusal fails here; the contract tests, which compare values and gradients, would skip.
    served, expected = (contract.run(sample, sample.make(torch.float32, "cpu"), b) for b in ("sdpa", "reference"))
    torch.testing.assert_close(contract.tensors(served), contract.tensors(expected), rtol=1e-4, atol=1e-5)
    contract.test_values(sample, "sdpa", "cpu")
    if sample.differentiable:
        contract.test_gradients(sample, "sdpa", "cpu")
    contract.test_noncontiguous_and_repeatable(sample, "sdpa", "cpu")


def test_xformers_mask_is_ours():
    if find_spec("xformers") is None:
        pytest.skip("xformers is not installed")
    from cvctoolkit.ops.sparse_attention.sdpa import _block_diagonal, _xformers_inputs

    g = generator()
    lengths_q, lengths_k = [3, 0, 2, 4], [2, 5, 0, 1]
    rows = torch.randperm(9, generator=g)
    queries, keys, alive = _xformers_inputs(rows, None, offsets(*lengths_q), offsets(*lengths_k))
    mask = _block_diagonal(*alive).materialize((len(queries), len(keys)))
    allowed = sequence_of(lengths_q, rows)[queries][:, None] == sequence_of(lengths_k)[keys]
    assert torch.equal(mask == 0, allowed) and len(queries) == 7 and len(keys) == 3
    with pytest.raises(ValueError, match="xformers needs CUDA tensors"):
        varlen_attention(*heads(g, 4).values(), offsets(4), backend="xformers")


# --- windows ----------------------------------------------------------------------------------------------------------


def pairs_in_windows(coords, size, shift):
    size, shift = torch.tensor(size).expand(3), torch.tensor(shift).expand(3)
    windows = torch.cat([coords[:, :1], (coords[:, 1:] + shift) // size], 1)
    return (windows[:, None] == windows).all(-1)


@settings(max_examples=40)
@given(size=st.tuples(*[st.integers(1, 9)] * 3), shift=st.tuples(*[st.integers(0, 8)] * 3),
       count=st.sampled_from([0, 1, 30, 90]), seed=st.integers(0, 99))  # fmt: skip
def test_windows_equal_dense_attention(size, shift, count, seed):
    shift = tuple(a % b for a, b in zip(shift, size))
    coords, q, k, v = voxels(count, seed=seed)
    exact = dense(q, k, v, pairs_in_windows(coords, size, shift))
    partition = window_partition(coords, size, shift)
    assert torch.equal(partition.permutation[partition.inverse], torch.arange(len(coords)))
    assert_same(window_attention(q, k, v, coords, size, shift), exact, (q, k, v))
    assert_same(window_attention(q, k, v, coords, size, shift, partition=partition), exact)
    assert (torch.diff(partition.cu_seqlens) > 0).all()


def test_windows_larger_than_the_grid_are_batch_items():
    coords, q, k, v = voxels(80)
    whole = (coords[:, :1] == coords[:, 0]).expand(-1, -1)
    assert_same(window_attention(q, k, v, coords, 65536), dense(q, k, v, whole))
    order = voxel_sort(coords).permutation
    canonical = batch_cu_seqlens(coords[order], 3)
    assert_same(varlen_attention(q, k, v, canonical, permutation=order), dense(q, k, v, whole))
    assert batch_cu_seqlens(coords[order][coords[order, 0] != 1], 4).diff()[[1, 3]].tolist() == [0, 0]


@pytest.mark.parametrize("order", ["hilbert", "morton"])
@pytest.mark.parametrize("size,shift", [(7, 0), (7, 3), (1, 0), (1000, 999)])
def test_runs_along_a_curve(order, size, shift):
    coords, q, k, v = voxels(90)
    run = torch.empty(len(coords), dtype=torch.int64)
    permutation = voxel_sort(coords, order).permutation
    for b in range(3):
        rows = permutation[coords[permutation, 0] == b]
        run[rows] = (torch.arange(len(rows)) + shift) // size + 10_000 * b
    assert_same(
        serialized_attention(q, k, v, coords, size, order, shift), dense(q, k, v, run[:, None] == run), (q, k, v)
    )
    lengths = serialized_partition(coords, size, order, shift).cu_seqlens.diff()
    assert lengths.max() <= size and lengths.sum() == len(coords)


@settings(max_examples=25)
@given(seed=st.integers(0, 99), steps=st.tuples(*[st.integers(0, 3)] * 3), alone=st.integers(0, 2))
def test_windows_keep_what_symmetry_promises(seed, steps, alone):
    coords, q, k, v = (x.detach() for x in voxels(70, seed=seed))
    attend = lambda rows, at: window_attention(q[rows], k[rows], v[rows], at, 3, 1)  # noqa: E731
    everything = torch.arange(len(coords))
    whole = attend(everything, coords)
    order = torch.randperm(len(coords), generator=generator(seed))
    assert torch.allclose(attend(order, coords[order]), whole[order], atol=1e-12)
    rows = (coords[:, 0] == alone).nonzero().squeeze(1)
    assert torch.allclose(attend(rows, coords[rows]), whole[rows], atol=1e-12)
    moved = coords + torch.tensor([0, *(3 * s for s in steps)], dtype=torch.int32)
    assert torch.allclose(attend(everything, moved), whole, atol=1e-12)


# --- spatial sparse attention -----------------------------------------------------------------------------------------


def transcription(q, k, v, coords, gates, ck, cv, m_cmp, m_slc, window, shift, topk, resolution):
    """Direct3D-S2, Sec. 3.3, one batch item, head and voxel at a time over dense grids of blocks."""
    out = torch.zeros_like(q)
    share, scale = q.shape[1] // k.shape[1], 1 / math.sqrt(q.shape[2])
    small, large = resolution // m_cmp, resolution // m_slc
    compressed = torch.unique(torch.cat([coords[:, :1], coords[:, 1:] // m_cmp], 1), dim=0)
    near = pairs_in_windows(coords, window, shift)
    for n in range(len(q)):
        mine = compressed[:, 0] == coords[n, 0]
        own = coords[:, 0] == coords[n, 0]
        for kv in range(k.shape[1]):
            grid = q.new_zeros(large, large, large)
            occupied = torch.zeros(large, large, large, dtype=torch.bool)
            occupied[tuple((coords[own, 1:] // m_slc).long().T)] = True
            queries = range(kv * share, (kv + 1) * share)
            for h in queries:
                p = torch.softmax(scale * ck[mine, kv] @ q[n, h], 0)
                out[n, h] += gates[n, 0] * (p @ cv[mine, kv])
                full = q.new_zeros(small, small, small).index_put(tuple(compressed[mine, 1:].long().T), p.detach())
                fold = full.unflatten(2, (large, -1)).unflatten(1, (large, -1)).unflatten(0, (large, -1))
                grid = grid + fold.sum((1, 3, 5))
            best = grid.masked_fill(~occupied, -1).flatten().topk(min(topk, int(occupied.sum()))).indices
            block = (coords[:, 1:] // m_slc).long()
            block = (block[:, 0] * large + block[:, 1]) * large + block[:, 2]
            seen = own & torch.isin(block, best)
            for h in queries:
                for gate, rows in ((1, seen), (2, near[n])):
                    p = torch.softmax(scale * k[rows, kv] @ q[n, h], 0)
                    out[n, h] += gates[n, gate] * (p @ v[rows, kv])
    return out


@pytest.mark.parametrize("backend", ["native", "sdpa", "reference", None])
@pytest.mark.parametrize(
    "m_cmp,m_slc,topk,means", [(2, 4, 2, True), (1, 2, 3, False), (2, 2, 50, True), (4, 8, 1, False)]
)
def test_spatial_sparse_attention_equals_its_transcription(backend, m_cmp, m_slc, topk, means):
    coords, q, k, v = voxels(40, size=8, batch=2, q=4, k=2, dim=3)
    g = generator(5)
    gates = torch.rand(len(q), 3, generator=g, dtype=torch.float64, requires_grad=True)
    blocks = spatial_blocks(coords, m_cmp, m_slc, 3, (1, 0, 2))
    rows = blocks.compressed_row
    assert torch.equal(blocks.compressed_coords[rows], torch.cat([coords[:, :1], coords[:, 1:] // m_cmp], 1))
    count = torch.bincount(rows)[:, None, None]
    if means:
        ck, cv = (torch.zeros(len(count), *x.shape[1:]).double().index_add(0, rows, x) / count for x in (k, v))
        given_keys = {}
    else:
        ck, cv = (torch.randn(len(count), 2, 3, generator=g).double().requires_grad_() for _ in range(2))
        given_keys = {"compressed_k": ck, "compressed_v": cv}
    exact = transcription(q, k, v, coords, gates, ck, cv, m_cmp, m_slc, 3, (1, 0, 2), topk, 8)
    ours = spatial_sparse_attention(
        q, k, v, coords, gates, topk=topk, **given_keys, compression_block=m_cmp, selection_block=m_slc, window_size=3,
        shift=(1, 0, 2), backend=backend,
    )  # fmt: skip
    assert_same(ours, exact, (q, k, v, gates, *given_keys.values()))


def spatial(coords, q, k, v, gates, **options):
    how = {"topk": 2, "compression_block": 2, "selection_block": 4, "window_size": 4, **options}
    return spatial_sparse_attention(q, k, v, coords, gates, **how)


@settings(max_examples=20)
@given(seed=st.integers(0, 99), steps=st.tuples(*[st.integers(0, 3)] * 3), alone=st.integers(0, 2), share=st.booleans())
def test_spatial_sparse_attention_keeps_what_symmetry_promises(seed, steps, alone, share):
    coords, q, k, v = (x.detach() for x in voxels(70, seed=seed, q=4, k=2))
    gates = torch.rand(len(q), 4, 3, generator=generator(seed), dtype=torch.float64)
    whole = spatial(coords, q, k, v, gates, share_selection=share)
    order = torch.randperm(len(coords), generator=generator(seed))
    again = spatial(*(x[order] for x in (coords, q, k, v, gates)), share_selection=share)
    assert torch.allclose(again, whole[order], atol=1e-12)
    rows = (coords[:, 0] == alone).nonzero().squeeze(1)
    part = spatial(*(x[rows] for x in (coords, q, k, v, gates)), share_selection=share)
    assert torch.allclose(part, whole[rows], atol=1e-12)
    moved = coords + torch.tensor([0, *(4 * s for s in steps)], dtype=torch.int32)
    assert torch.allclose(spatial(moved, q, k, v, gates, share_selection=share), whole, atol=1e-12)


def test_all_blocks_selected_is_full_attention():
    coords, q, k, v = voxels(60, q=4, k=2)
    gates = torch.tensor([0.0, 1.0, 0.0]).double().expand(len(q), 3)
    whole = (coords[:, :1] == coords[:, 0]).expand(-1, -1)
    for share in (False, True):
        assert_same(spatial(coords, q, k, v, gates, topk=64, share_selection=share), dense(q, k, v, whole))


def test_selection_by_large_scores():
    """Where log-sum-exp in base 2 overflows elsewhere: the block with the largest score wins, with no NaN."""
    q = torch.full((1, 1, 1), 2000.0)
    keys = torch.tensor([1.0, 3.0, 2.0, -5.0]).view(4, 1, 1)
    parent, lengths = torch.tensor([0, 1, 1, 2]), offsets(4)
    assert select_blocks(q, keys, offsets(1), lengths, parent, 1, scale=1.0).tolist() == [[[1]]]
    assert select_blocks(q, keys, offsets(1), lengths, parent, 2, scale=0.0).tolist() == [[[0, 1]]]  # equal: the first
    assert select_blocks(q, keys, offsets(1), lengths, parent, 5, scale=1.0).tolist() == [[[0, 1, 2, -1, -1]]]


@pytest.mark.parametrize("grouped", [False, True])
def test_scores_are_formed_a_few_queries_at_a_time(monkeypatch, grouped):
    from cvctoolkit.ops.sparse_attention import reference

    coords, q, *_ = voxels(90, q=4, k=2)
    blocks = spatial_blocks(coords, 1, 2)
    keys = torch.randn(len(blocks.parent), 2, 4, generator=generator(2), dtype=torch.float64)
    order, groups = blocks.selection.permutation, blocks.selection.cu_seqlens if grouped else None
    arguments = (q, keys, blocks.batch, blocks.compressed_batch, blocks.parent, 3)
    whole = select_blocks(*arguments, permutation=order, cu_groups=groups)
    sizes, original = [], reference._block_scores
    monkeypatch.setattr(reference, "_SCORES", 1000)
    monkeypatch.setattr(reference, "_block_scores", lambda x, *a: sizes.append(len(x)) or original(x, *a))
    assert torch.equal(select_blocks(*arguments, permutation=order, cu_groups=groups), whole) and len(sizes) > 3


# --- rotary embedding -------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(dim=st.sampled_from([2, 6, 8, 18, 64]), interleaved=st.booleans(), step=st.tuples(*[st.integers(-9, 99)] * 3))
def test_scores_depend_on_offsets_only(dim, interleaved, step):
    g = generator(dim)
    q, k = (torch.randn(12, 2, dim, generator=g, dtype=torch.float64) for _ in range(2))
    coords = torch.randint(50, (12, 3), generator=g)
    turn = lambda x, at: rope_3d(x, at, interleaved=interleaved, base=100.0)  # noqa: E731
    scores = lambda at: torch.einsum("nhd,mhd->hnm", turn(q, at), turn(k, at))  # noqa: E731
    assert torch.allclose(scores(coords), scores(coords + torch.tensor(step)), atol=1e-9)
    assert torch.allclose(turn(q, coords).norm(dim=-1), q.norm(dim=-1))
    phases = rope_3d_phases(coords, dim, base=100.0, dtype=torch.float64)
    there = apply_rope(q, phases, interleaved=interleaved)
    assert torch.equal(there, turn(q, coords))
    assert torch.allclose(apply_rope(there, phases, interleaved=interleaved, inverse=True), q, atol=1e-12)


def test_rotations_are_complex_products():
    g = generator()
    x, coords = torch.randn(5, 2, 20, generator=g, dtype=torch.float64), torch.randint(9, (5, 4), generator=g)
    frequencies = 10000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    angles = torch.cat([(coords[:, 1:, None] * frequencies).flatten(1), torch.zeros(5, 1)], 1)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)[:, None]
    assert torch.allclose(rope_3d(x, coords), torch.view_as_real(turned).flatten(-2), atol=1e-12)
    halves = torch.cat([x[..., 0::2], x[..., 1::2]], -1)
    turned = torch.cat([turned.real, turned.imag], -1)
    assert torch.allclose(rope_3d(halves, coords, interleaved=False), turned, atol=1e-12)


def test_rotations_are_differentiable_twice_and_precise_far_out():
    x = torch.randn(3, 1, 6, dtype=torch.float64, requires_grad=True)
    coords = torch.randint(9, (3, 3))
    assert torch.autograd.gradgradcheck(lambda x: rope_3d(x, coords).square(), (x,))
    far = torch.full((1, 3), 65535)
    cos, _ = rope_3d_phases(far, 12)
    assert torch.equal(cos, rope_3d_phases(far, 12, dtype=torch.float64).cos.float())
