"""Flow steps: how often they launch, what they refuse, and what they say then."""

import importlib
from pathlib import Path

import pytest
import torch

from cvctoolkit.ops import FlowSampler, cfg_combine, flow_step, masked_flow_step
from tests.flow_tools import BACKENDS, draw, drift, sparse

# --- launches ---------------------------------------------------------------------------------------------------------


def test_a_call_is_one_launch_and_three_with_rescale(monkeypatch):
    pytest.importorskip("triton")
    kernels = importlib.import_module("cvctoolkit.ops.flow.triton")
    launches = []

    class Counted:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append(self.name)

    for name in ("_moments_kernel", "_factor_kernel", "_step_kernel"):
        monkeypatch.setattr(kernels, name, Counted(name))
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: torch.no_grad())
    x, cond, uncond, _, target, index = sparse(0, dtype=torch.float32)
    kernels.cfg_combine(cond, uncond, 2.0, False, 0.0, None, 0)
    assert launches == ["_step_kernel"]
    launches.clear()
    batch = torch.zeros(len(x), dtype=torch.int64)
    rest = (None, None, 0.8, 0.5, 3.0, False, 0.7, False, 0.5, "x0", 1)
    kernels.flow_step(x, cond, uncond, target, index, None, batch, *rest)
    assert launches == ["_moments_kernel", "_factor_kernel", "_step_kernel"]


# --- bad input --------------------------------------------------------------------------------------------------------


def call(**changes):
    x, cond, uncond, _, target, index = sparse(0, dtype=torch.float32)
    arguments = dict(
        x=x, v_cond=cond, v_uncond=uncond, sigma=0.8, sigma_next=0.5, target=target, index_map_or_mask=index,
        strength=0.5, guidance_scale=3.0,
    )  # fmt: skip
    return masked_flow_step(**{**arguments, **changes})


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(v_uncond=None), "v_uncond must be a tensor when guidance_scale is not 1"),
        (dict(v_uncond=None, guidance_scale=1.0, cfg_formulation="original"), "when guidance_scale is not 0"),
        (dict(cfg_formulation="sd"), "cfg_formulation must be one of"),
        (dict(guidance_scale=float("nan")), "guidance_scale must be finite"),
        (dict(guidance_rescale=1.5), r"guidance_rescale must be in \[0, 1\]"),
        (dict(guidance_rescale=0.7), "guidance_rescale of a two-dimensional tensor needs batch_index"),
        (dict(v_cond=torch.zeros(13, 4)), "v_cond must have shape"),
        (dict(v_uncond=torch.zeros(13, 3, dtype=torch.int32)), "v_uncond must have dtype"),
        (dict(x=torch.zeros(13)), r"x must have shape \[B, ...\] or \[N, C\]"),
        (dict(target=torch.zeros(6, 4)), "target must have shape"),
        (dict(index_map_or_mask=torch.zeros(12, dtype=torch.int32)), "index_map_or_mask must have shape"),
        (dict(index_map_or_mask=torch.zeros(13)), "index_map_or_mask must have dtype"),
        (dict(index_map_or_mask=torch.zeros(13, dtype=torch.bool)), "target must have shape"),
        (
            dict(target=torch.zeros(13, 3), index_map_or_mask=torch.zeros(5, 3, dtype=torch.bool)),
            "a mask must be broadcastable",
        ),
        (dict(sigma=1.2), r"sigma must be in \[0, 1\]"),
        (dict(sigma_next=-0.1), "sigma_next must be >= 0"),
        (dict(sigma=float("nan")), "sigma must be finite"),
        (dict(sigma=torch.rand(13, 1)), r"sigma must be a number or have shape \[\] or \[B\]"),
        (dict(sigma=torch.rand(2)), "sigma must be a number or hold one value per sample"),
        (dict(sigma=torch.rand(1, requires_grad=True)), "sigma must not require a gradient"),
        (dict(sigma=torch.tensor(1)), "sigma must have dtype"),
        (dict(strength=-0.1), "strength must be >= 0"),
        (dict(strength=float("inf")), "strength must be finite"),
        (dict(strength=1.1, mode="velocity"), r"strength must be in \[0, 1\] for mode 'velocity'"),
        (dict(strength=1.1, mode="x0"), "for mode 'x0'"),
        (dict(strength=1.1, mode="replace"), "for mode 'replace'"),
        (dict(mode="repaint"), "mode must be one of"),
        (dict(mode="replace"), "mode 'replace' needs noise unless sigma_next is 0"),
        (dict(noise=torch.zeros(13, 3)), "noise is used by mode 'replace' only"),
        (dict(mode="replace", noise=torch.zeros(3)), "noise must have shape"),
        (dict(mode="x0", sigma=0.0, sigma_next=0.0), "mode 'x0' needs sigma > 0"),
        (dict(batch_index=torch.zeros(12, dtype=torch.int64)), "batch_index must have shape"),
        (dict(batch_size=0), "batch_size must be >= 1"),
        (dict(velocity="v"), "velocity must be one of"),
        (dict(backend="cuda"), "no backend 'cuda'"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=r"flow_step: .*" + message):
        call(**changes)


@pytest.mark.parametrize(
    "changes",
    [dict(x=[0.0]), dict(v_cond=None), dict(sigma="0.5"), dict(strength=None), dict(index_map_or_mask=[0]),
     dict(guidance_scale=True), dict(batch_size=1.0)],
)  # fmt: skip
def test_bad_types_are_type_errors(changes):
    with pytest.raises(TypeError, match="masked_flow_step"):
        call(**changes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [6, -2, 2**31 - 1])
def test_an_index_out_of_range_raises_on_the_cpu(backend, bad):
    index = torch.full((13,), -1, dtype=torch.int32)
    index[7] = bad
    with pytest.raises(ValueError, match=rf"masked_flow_step: index_map must be in \[-1, 5\], got {bad}"):
        call(index_map_or_mask=index, backend=backend)
    with pytest.raises(ValueError, match="index_map must be in"):
        call(index_map_or_mask=index.long(), validate=True, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_an_index_out_of_range_is_free_on_cuda_unless_validated(backend):
    x, cond, uncond, _, target, index = (t.cuda() for t in sparse(0, dtype=torch.float32))
    index[7] = 99
    out = masked_flow_step(x, cond, uncond, 0.8, 0.5, target, index, 0.5, guidance_scale=3.0, backend=backend)
    plain = flow_step(x, cond, uncond, 0.8, 0.5, guidance_scale=3.0, backend=backend)
    assert torch.equal(out[7], plain[7])
    with pytest.raises(ValueError, match="index_map must be in"):
        masked_flow_step(x, cond, uncond, 0.8, 0.5, target, index, 0.5, guidance_scale=3.0, validate=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [3, -1])
def test_a_batch_index_out_of_range_raises_on_the_cpu(backend, bad):
    batch = torch.zeros(13, dtype=torch.int64)
    batch[4] = bad
    with pytest.raises(ValueError, match="batch_index must be in"):
        call(guidance_rescale=0.5, batch_index=batch, batch_size=3, backend=backend)
    with pytest.raises(ValueError, match="cfg_combine: batch_index must be in"):
        cfg_combine(*draw(0, 13, 3, count=2), 2.0, rescale=0.5, batch_index=batch, batch_size=3, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_where_it_is(backend):
    x, cond, uncond, _, target, index = sparse(0, dtype=torch.float32)
    cond[2, 1] = float("nan")
    out = masked_flow_step(x, cond, uncond, 0.8, 0.5, target, index, 0.5, guidance_scale=3.0, backend=backend)
    assert out.isnan().nonzero().tolist() == [[2, 1]]
    batch = (torch.arange(13) > 5).long()
    out = flow_step(
        x, cond, uncond, 0.8, 0.5, guidance_scale=3.0, guidance_rescale=0.5, batch_index=batch, backend=backend
    )
    assert out[batch == 0].isnan().all() and out[batch == 1].isfinite().all()


@pytest.mark.parametrize("changes", [dict(sigmas=[]), dict(sigmas=[1.2]), dict(sigmas=[-1.0]), dict(velocity="v")])
def test_the_sampler_refuses_nonsense(changes):
    (x,) = draw(0, 3, 2, count=1)
    with pytest.raises(ValueError):
        FlowSampler(**{"sigmas": [1.0, 0.0], **changes})(drift, x)


def test_the_sampler_needs_what_guidance_needs():
    (x,) = draw(0, 3, 2, count=1)
    with pytest.raises(ValueError, match="v_uncond must be a tensor"):
        FlowSampler([1.0, 0.0], guidance_scale=3.0)(drift, x)
    with pytest.raises(TypeError, match="model must be callable"):
        FlowSampler([1.0, 0.0])(None, x)
    assert torch.equal(FlowSampler([1.0])(drift, x), x)


def test_no_kernel_reads_shapes_from_data():
    """Nothing on the way to a launch synchronises: no .item(), no .cpu(), no comparison of tensor values."""
    source = Path(importlib.import_module("cvctoolkit.ops.flow").__file__).with_name("triton.py").read_text()
    assert ".item(" not in source and ".cpu(" not in source and source.count("int(") == 1  # batch_size left open
