"""The Triton kernels of sparse convolution in the interpreter: shapes, groups, tails, dtypes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cvctoolkit import _backend, ops

# In a process of its own: the interpreter is chosen when Triton is imported.
_INTERPRETED = """
import itertools, torch
from cvctoolkit.ops.sparse_conv import maps_op, op
checked = 0
def same(got, expected, dtype):
    global checked
    checked += 1
    assert got.dtype == expected.dtype and got.shape == expected.shape
    scale = expected.double().abs().max().item() if expected.numel() else 0
    assert torch.allclose(got.double(), expected.double(), rtol=0, atol=4 * max(torch.finfo(dtype).eps, 1e-6) * scale)
def both(operator, *args):
    a, b = (operator(*args, backend=backend) for backend in ("triton", "reference"))
    return list(zip(a, b)) if isinstance(a, tuple) else [(a, b)]
g = torch.Generator().manual_seed(0)
def case(rows_in, rows_out, offsets, inputs, outputs, groups, dtype):
    map = torch.randint(-1, 1, (rows_out, offsets), generator=g, dtype=torch.int32)
    for k in range(offsets):  # an input row at most once under an offset
        there = torch.randperm(max(rows_in, rows_out), generator=g)[:rows_out].to(torch.int32)
        map[:, k] = torch.where((map[:, k] < 0) | (there >= rows_in), -1, there)
    if offsets > 2:
        map[:, 1] = -1  # an offset that no one has
    if rows_out > 3:
        map[2] = -1  # a row without neighbours
    feats, grad, weight, bias = (
        torch.randn(shape, generator=g).to(dtype)
        for shape in ((rows_in, inputs), (rows_out, outputs), (outputs, inputs // groups, offsets), (outputs,))
    )
    for b in (bias, None):
        for got, expected in both(op._sparse_conv3d, feats, weight, b, map, groups):
            same(got, expected, dtype)
    (got, expected), = both(op._weight_grad, feats, grad, map, groups)
    same(got, expected, dtype)
    (inverse, expected), = both(maps_op.invert, map, rows_in)
    assert torch.equal(inverse, expected)
    transposed = op._transposed(weight, groups)  # the gradient in the features
    (got, expected), = both(op._sparse_conv3d, grad, transposed, None, inverse, groups)
    same(got, expected, dtype)
    (got, expected), = both(op._sum_pool, feats, map)
    same(got, expected, dtype)
    (best, expected), (offset, truth) = both(op._max_pool, feats, map)
    assert torch.equal(best, expected) and torch.equal(offset, truth)
    back = torch.randn(best.shape, generator=g).to(dtype)
    (got, expected), = both(op._max_pool_grad, back, offset, map, rows_in)
    same(got, expected, dtype)
case(40, 70, 5, 5, 3, 1, torch.float32)  # two blocks of rows
case(20, 30, 9, 17, 33, 1, torch.float16)
case(12, 12, 4, 6, 4, 2, torch.float32)  # groups
case(9, 9, 2, 5, 5, 5, torch.float16)  # depthwise
case(10, 10, 1, 70, 130, 1, torch.float32)  # several chunks and tiles
case(12, 9, 66, 2, 2, 1, torch.float32)  # more offsets than bits of a mask
case(2100, 2060, 1, 3, 4, 1, torch.float32)  # several parts of a weight gradient
for empty in ((0, 5, 3, 2, 2), (5, 0, 3, 2, 2), (5, 5, 3, 2, 0), (5, 5, 3, 0, 2)):
    case(*empty, 1, torch.float32)
feats = torch.tensor([[1.0], [float("nan")], [3.0]])
(a, b), _ = both(op._max_pool, feats, torch.tensor([[0, 1, 2], [2, 0, -1], [-1, -1, -1]], dtype=torch.int32))
assert torch.equal(a.nan_to_num(9), b.nan_to_num(9)) and a.nan_to_num(9).flatten().tolist() == [9, 3, 0]
print("checked", checked)
"""


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    if fault := _backend.interpreter_fault():
        pytest.skip(fault)
    run = subprocess.run(
        [sys.executable, "-c", _INTERPRETED], capture_output=True, text=True, cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    assert int(run.stdout.split()[-1]) > 50


@pytest.mark.gpu
def test_a_training_step_is_captured_in_a_cuda_graph():
    """Nothing synchronises once the map is there."""
    coords = torch.unique(torch.randint(20, (3000, 4), generator=torch.Generator().manual_seed(0)) % 19, dim=0).int()
    index = ops.neighbor_map(coords.cuda(), 3).map
    feats = torch.randn(len(coords), 24, device="cuda", requires_grad=True)
    weight = torch.randn(40, 24, 3, 3, 3, device="cuda", requires_grad=True)

    def step():
        out = ops.sparse_max_pool3d(ops.sparse_conv3d(feats, weight, None, index), index)
        return out, *torch.autograd.grad(out.square().mean(), (feats, weight))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for a, b in zip(captured, step()):
        assert torch.equal(a, b)
