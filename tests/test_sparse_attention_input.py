"""What sparse attention refuses, and what it does with values that are no numbers."""

import math
import mmap

import pytest
import torch

from cvctoolkit.ops import (
    apply_rope,
    batch_cu_seqlens,
    block_sparse_attention,
    rope_3d,
    rope_3d_phases,
    select_blocks,
    serialized_partition,
    spatial_sparse_attention,
    varlen_attention,
    window_attention,
    window_partition,
)
from cvctoolkit.ops.sparse_attention.samples import cells, heads, offsets

BACKENDS = ["native", "sdpa", "reference"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


GOOD = heads(generator(), 6, q=2, k=1)
COORDS = cells(generator(), 6)[:6]


@pytest.mark.parametrize(
    "change,match",
    [
        (dict(q=torch.zeros(6, 2, 3)), "k must have dtype float32"),
        (dict(q=torch.zeros(6, 2, 4).double()), r"k must have shape \[6, 1, 4\]"),
        (dict(q=torch.zeros(6, 2).double()), "q must have shape"),
        (dict(k=torch.zeros(6, 3, 3).double(), v=torch.zeros(6, 3, 3).double()), "multiple of the heads"),
        (dict(k=torch.zeros(6, 0, 3).double(), v=torch.zeros(6, 0, 3).double()), "multiple of the heads"),
        (dict(v=torch.zeros(5, 1, 3).double()), "v must have shape"),
        (dict(cu_seqlens=torch.tensor([0, 4])), "cu_seqlens must ascend from 0 to 6"),
        (dict(cu_seqlens=torch.tensor([0, 7, 6])), "cu_seqlens must ascend"),
        (dict(cu_seqlens=torch.tensor([1, 6])), "cu_seqlens must ascend"),
        (dict(cu_seqlens=torch.zeros(0, dtype=torch.int64)), "cu_seqlens must ascend"),
        (dict(cu_seqlens=torch.tensor([0.0, 6.0])), "cu_seqlens must have dtype"),
        (dict(cu_seqlens_k=torch.tensor([0, 2, 6])), r"cu_seqlens_k must have shape \[2\]"),
        (dict(cu_seqlens_k=torch.tensor([0, 5])), "cu_seqlens_k must ascend from 0 to 6"),
        (dict(permutation=torch.tensor([0, 1, 2, 3, 4, 4])), "permutation must hold every row"),
        (dict(permutation=torch.tensor([0, 1, 2, 3, 4, 6])), "permutation must hold every row"),
        (dict(permutation=torch.tensor([0, 1, 2, 3, 4, -1])), "permutation must hold every row"),
        (dict(permutation=torch.arange(5)), r"permutation must have shape \[6\]"),
        (dict(permutation_k=torch.arange(6)), "permutation_k goes with cu_seqlens_k"),
        (dict(scale=math.nan), "scale must be finite"),
        (dict(backend="cuda"), "no backend 'cuda'"),
        (dict(q=torch.zeros(6, 2, 3, device="meta").double()), "must be on meta"),
    ],
)
def test_refuses_what_does_not_fit(change, match):
    with pytest.raises(ValueError, match=match):
        varlen_attention(**{**GOOD, "cu_seqlens": torch.tensor([0, 6]), **change})


def test_refuses_blocks_windows_and_gates_that_do_not_fit():
    edges = torch.tensor([0, 2, 6])
    for chosen, match in (([2], "blocks 0 to 1, got 2"), ([-2], "blocks 0 to 1, got -2")):
        with pytest.raises(ValueError, match=match):
            block_sparse_attention(
                **GOOD, cu_blocks_q=edges, cu_blocks_k=edges, block_indices=torch.tensor([[chosen]] * 2)
            )
    for shape in ((1, 1, 1), (2, 2, 1), (2, 1)):
        with pytest.raises(ValueError, match="block_indices must"):
            chosen = torch.zeros(shape, dtype=torch.int32)
            block_sparse_attention(**GOOD, cu_blocks_q=edges, cu_blocks_k=edges, block_indices=chosen)
    for size, shift in ((0, 0), (4, 4), (4, -1), ((4, 4), 0), (65537, 0)):
        with pytest.raises(ValueError, match="window_partition: "):
            window_partition(COORDS, size, shift)
    for options in (dict(window_size=0), dict(window_size=4, shift=4), dict(window_size=4, order="peano")):
        with pytest.raises(ValueError, match="serialized_partition: "):
            serialized_partition(COORDS, **options)
    with pytest.raises(ValueError, match="sorted by batch"):
        batch_cu_seqlens(torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]]), 2)
    with pytest.raises(ValueError, match="sorted by batch"):
        batch_cu_seqlens(torch.tensor([[2, 0, 0, 0]]), 2)
    rows = len(COORDS)
    arguments = dict(**heads(generator(), rows), coords=COORDS, gates=torch.ones(rows, 3).double(), topk=1)
    for change, match in (
        (dict(gates=torch.ones(rows, 2).double()), "gates must have shape"),
        (dict(gates=torch.ones(rows, 3)), "gates must have dtype"),
        (dict(topk=0), "topk must be >= 1"),
        (dict(selection_block=6), "multiple of compression_block"),
        (dict(coords=COORDS[1:]), "coords must have shape"),
        (dict(compressed_k=torch.zeros(1, 1, 3).double()), "compressed_k must have shape"),
    ):
        with pytest.raises(ValueError, match=match):
            spatial_sparse_attention(**{**arguments, **change})
    with pytest.raises(TypeError, match="gates must be a"):
        spatial_sparse_attention(**{**arguments, "gates": None})
    with pytest.raises(TypeError, match="partition must be"):
        window_attention(**heads(generator(), rows), coords=COORDS, window_size=4, partition=(1, 2, 3))


@pytest.mark.parametrize(
    "change,match",
    [
        (dict(cu_seqlens=torch.tensor([0, 5])), "cu_seqlens must ascend from 0 to 6"),
        (dict(cu_seqlens_k=torch.tensor([0, 1, 4])), "cu_seqlens_k must have shape"),
        (dict(cu_groups=torch.tensor([0, 2, 5])), "cu_groups must ascend from 0 to 6"),
        (dict(cu_seqlens=torch.tensor([0, 3, 6]), cu_seqlens_k=torch.tensor([0, 2, 4]), cu_groups=torch.tensor([0, 6])),
         "must not cross"),
        (dict(permutation=torch.full((6,), 6)), "permutation must hold rows"),
        (dict(parent=torch.tensor([0, 0, 1, -1])), "parent must hold blocks"),
        (dict(parent=torch.zeros(3, dtype=torch.int64)), "parent must have shape"),
    ],
)  # fmt: skip
def test_selection_refuses_what_does_not_fit(change, match):
    good = dict(q=GOOD["q"], compressed_k=GOOD["k"][:4], cu_seqlens=torch.tensor([0, 6]),
                cu_seqlens_k=torch.tensor([0, 4]), parent=torch.tensor([0, 0, 1, 1]), topk=1)  # fmt: skip
    with pytest.raises(ValueError, match=f"select_blocks: .*{match}"):
        select_blocks(**{**good, **change})


def test_rope_refuses_what_does_not_fit():
    x, coords = torch.zeros(3, 1, 6), torch.zeros(3, 3)
    for change, match in (
        (dict(x=torch.zeros(3, 1, 5)), "even number"),
        (dict(coords=torch.zeros(2, 3)), "coords must have 3 rows"),
        (dict(coords=torch.zeros(3, 2)), r"\[N, 3\] or \[N, 4\]"),
        (dict(coords=torch.zeros(3, 4)), "dtype int32, int64"),
        (dict(base=0.0), "base must be > 0"),
        (dict(x=torch.zeros(3, 6)), "x must have shape"),
    ):
        with pytest.raises(ValueError, match=match):
            rope_3d(**{"x": x, "coords": coords, **change})
    phases = rope_3d_phases(coords, 6)
    with pytest.raises(ValueError, match="angles are constants"):
        apply_rope(x, phases._replace(cos=phases.cos.requires_grad_()))
    with pytest.raises(ValueError, match=r"phases\.cos must have shape"):
        apply_rope(torch.zeros(3, 1, 8), rope_3d_phases(coords, 6))
    with pytest.raises(TypeError, match="phases"):
        apply_rope(x, None)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("bad", [[0, -1, 0, 0], [0, 0, 65536, 0], [32768, 0, 0, 0], [-1, 0, 0, 0]])
def test_refuses_what_are_no_voxels(backend, bad):
    broken = torch.cat([COORDS, torch.tensor([bad], dtype=torch.int32)])
    with pytest.raises(ValueError, match="window_partition: coords must be"):
        window_partition(broken, 4, 1, backend=backend)
    with pytest.raises(ValueError, match="serialized_partition: coords must be"):
        serialized_partition(broken, 4, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_sequence(backend):
    q, k, v = (x.clone() for x in GOOD.values())
    k[1] = math.nan
    out = varlen_attention(q, k, v, torch.tensor([0, 3, 6]), backend=backend)
    assert out[:3].isnan().all() and out[3:].isfinite().all()


def test_second_derivatives_are_refused():
    q, k, v = (x.clone().requires_grad_() for x in GOOD.values())
    (grad,) = torch.autograd.grad(varlen_attention(q, k, v, torch.tensor([0, 6])).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_more_than_two_billion_elements_through_strides():
    """Rows of a matrix of which the pages between are never touched."""
    rows, stride = 3, 2**30
    try:
        pages = mmap.mmap(-1, 4 * ((rows - 1) * stride + 8))
    except OSError:
        pytest.skip("not enough address space")
    q = torch.frombuffer(pages, dtype=torch.float32).as_strided((rows, 2, 4), (stride, 4, 1))
    q.copy_(torch.randn(rows, 2, 4, generator=generator()))
    exact = varlen_attention(*(q.clone(),) * 3, offsets(3), backend="reference")
    for backend in BACKENDS:
        assert torch.allclose(varlen_attention(q, q, q, offsets(3), backend=backend), exact, atol=1e-6)
