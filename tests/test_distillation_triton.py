"""The Triton kernels of score distillation in the interpreter: layouts, dtypes, every branch; graphs on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cvctoolkit import _backend, ops
from cvctoolkit.ops.distillation.samples import alphas_cumprod

TABLE = alphas_cumprod(1000)

# In a process of its own: the interpreter is chosen when Triton is imported.
_INTERPRETED = """
import itertools, torch
from cvctoolkit import _backend, ops
from cvctoolkit.ops.distillation.samples import alphas_cumprod
vp, sigmas = alphas_cumprod(1000), torch.linspace(0.002, 1, 1000)
checked = 0
def same(a, b, dtype):
    global checked
    checked += 1
    eps = torch.finfo(dtype).eps
    assert a.dtype == b.dtype and a.shape == b.shape
    torch.testing.assert_close(a.float(), b.float(), rtol=8 * max(eps, 1e-6), atol=8 * max(eps, 1e-6))
for dtype, shape in itertools.product((torch.float32, torch.float16), ((3, 5, 70), (3, 1200), (300, 3), (0, 4))):
    g = torch.Generator().manual_seed(0)
    x, noise, x_t, x_t_plus, *p = (torch.randn(shape, generator=g).to(dtype) for _ in range(8))
    for path, kind in (("vp", "v_prediction"), ("edm", "sample"), ("edm", "v_prediction"), ("flow", "flow")):
        table = dict(alphas_cumprod=vp) if path == "vp" else dict(sigmas=sigmas, path=path)
        for batch in {1, shape[0]}:
            t, t_plus = (torch.randint(20, 999, (batch,), generator=g, dtype=torch.int32) for _ in range(2))
            both = [ops.noised_batch(x, noise, t, t_plus, copies=2, dtype=torch.float16, **table, backend=b)
                    for b in ("triton", "reference")]
            same(*both, torch.float16)
            for reduction, normalize in (("batch_sum", False), ("mean", True), ("none", True)):
                both = [ops.score_distillation(
                    x, p, [1.5, -0.5, -1.0, 0.25], "fantasia3d", noise=noise, noise_coefficient=-0.5, t=t,
                    t_plus=t_plus, at_t_plus=[0, 1, 1, 0], prediction_type=kind, x_t=x_t, x_t_plus=x_t_plus,
                    clamp=1.0, reduction=reduction, normalize=normalize, **table, backend=b,
                ) for b in ("triton", "reference")]
                (loss, info), (expected, truth) = both
                same(loss, expected, dtype)
                same(info.grad, truth.grad, dtype)
                same(info.grad_norm, truth.grad_norm, torch.float32)
x, a = torch.randn(2, 3, 700).unbind(0)
bad = a.clone()
bad[0, 5], bad[2, 650] = float("nan"), float("-inf")
for outcome in ("propagate", "zero"):
    _, info = ops.csd_loss(x, bad, a, weight="uniform", nonfinite=outcome, backend="triton")
    _, truth = ops.csd_loss(x, bad, a, weight="uniform", nonfinite=outcome, backend="reference")
    assert int(info.nonfinite) == 2
    torch.testing.assert_close(info.grad, truth.grad, equal_nan=True, rtol=0, atol=0)
_, info = ops.asd_loss(x, a, a.clone(), t=torch.tensor([5]), alphas_cumprod=vp, backend="triton")
assert not info.grad.any() and float(info.grad_norm) == 0
from cvctoolkit.ops.distillation.op import _scaled_gradient
got = _scaled_gradient(a, torch.tensor(1.5), 3.0, backend="triton")
assert torch.equal(got, a * 1.5 / 3)
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
    assert int(run.stdout.split()[-1]) > 300


@pytest.mark.gpu
def test_a_step_is_captured_in_a_cuda_graph():
    """No synchronisation, no allocation outside the graph's pool; the replay sees new predictions."""
    x, noise, cond, uncond, plus = (torch.randn(6, 4, 64, 64, device="cuda") for _ in range(5))
    x.requires_grad_()
    table, t = TABLE.cuda(), torch.randint(20, 900, (6,), device="cuda")
    options = dict(t=t, alphas_cumprod=table, eps_t_uncond=uncond, guidance_scale=7.5, nonfinite="zero")

    def step():
        batch = ops.noised_batch(x.detach(), noise, t, t + 20, alphas_cumprod=table, copies=2, dtype=torch.float16)
        loss, info = ops.asd_loss(x, cond, plus, **options)
        return batch, info, torch.autograd.grad(loss, x)[0]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batch, info, gradient = step()
    cond.copy_(torch.randn_like(cond))
    graph.replay()
    expected = step()
    for a, b in zip((batch, info.grad, info.grad_norm, gradient), (expected[0], *expected[1][:2], expected[2])):
        assert torch.equal(a, b)
