"""Flow steps and guidance: the papers' equations to the letter, diffusers' scheduler, invariants, bad input."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from cvctoolkit import _native
from cvctoolkit.ops import FlowSampler, cfg_combine, flow_sigmas, flow_step, masked_flow_step
from cvctoolkit.ops.flow.op import MODES
from tests.flow_tools import BACKENDS, backends, draw, drift, levels, modes, seeds, sparse
from tests.oracles import oracle

# --- the equations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strength", [0.0, 0.1, 1.0, 2.5])
def test_literal_is_equations_8_and_9_to_the_letter(backend, strength):
    x_t, cond, uncond, _, x_fg, index = sparse(0)
    sigma, sigma_next, scale = 0.7, 0.55, 7.5
    got = masked_flow_step(
        x_t, cond, uncond, sigma, sigma_next, x_fg, index, strength, guidance_scale=scale, backend=backend
    )
    # Δ_t = x_t ⊙ M − x_fg, and x_{t−1} = x_t − (ε + λ·Δ_t), voxel by voxel; ε is the step that the scheduler takes.
    expected = x_t.clone()
    for voxel in range(len(x_t)):
        for channel in range(x_t.shape[1]):
            v = uncond[voxel, channel] + scale * (cond[voxel, channel] - uncond[voxel, channel])
            eps = (sigma - sigma_next) * v
            known = int(index[voxel])
            delta = x_t[voxel, channel] - x_fg[known, channel] if known >= 0 else 0.0
            expected[voxel, channel] = x_t[voxel, channel] - (eps + strength * delta)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
def test_the_modes_are_their_formulas(backend, mode):
    x, v, _, noise, target, index = sparse(3)
    s, s_next, strength = 0.6, 0.45, 0.3
    got = masked_flow_step(
        x, v, None, s, s_next, target, index, strength, mode=mode, noise=noise if mode == "replace" else None,
        backend=backend,
    )  # fmt: skip
    known = index >= 0
    goal = torch.zeros_like(x)
    goal[known] = target[index[known].long()]
    mask = known[:, None].double()
    dt = s - s_next
    if mode == "literal":
        expected = x - (dt * v + strength * mask * (x - goal))
    elif mode == "velocity":
        expected = x - dt * (v + strength * mask * (x - goal))
    elif mode == "x0":
        expected = x - dt * (v + strength / s * mask * ((x - s * v) - goal))
    else:
        step = x - dt * v
        expected = step + mask * strength * ((1 - s_next) * goal + s_next * noise - step)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def toy(mode, strength, num_steps=30):
    """All data is at 0, so v = x/σ; the target of the whole (known) set is 1. Where does the trajectory end?"""
    (x,) = draw(0, 4, 2, count=1)
    target, mask = torch.ones_like(x), torch.ones(4, dtype=torch.bool)
    sigmas = flow_sigmas(num_steps)
    start = x
    for s, s_next in zip(sigmas.tolist(), sigmas[1:].tolist()):
        noise = start if mode == "replace" else None
        x = masked_flow_step(x, x / s, None, s, s_next, target, mask, strength, mode=mode, noise=noise)
    return x


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [5, 30])
def test_the_x0_form_ends_at_its_strength_in_the_delta_toy(strength, num_steps):
    torch.testing.assert_close(toy("x0", strength, num_steps), torch.full((4, 2), strength).double())
    torch.testing.assert_close(toy("replace", strength, num_steps), torch.full((4, 2), strength).double())


def test_the_literal_and_velocity_forms_end_short_of_their_strength_in_the_delta_toy():
    ends = {mode: [toy(mode, s).mean().item() for s in (0.1, 0.5, 1.0)] for mode in ("literal", "velocity")}
    assert ends["literal"] == pytest.approx([0.0775, 0.25, 0.3679], abs=1e-3)
    assert ends["velocity"] == pytest.approx([0.0033, 0.0158, 0.0299], abs=1e-3)
    assert toy("velocity", 1.0, 60).mean() < 0.02  # the pull vanishes with the step
    assert toy("literal", 2.5).abs().max() > 1e6  # |1 − λ| > 1 diverges


@pytest.mark.parametrize("formulation,scale", [("diffusers", 7.5), ("original", 3.0), ("diffusers", 1.0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cfg_combine_is_both_published_forms(formulation, scale, backend):
    cond, uncond = draw(1, 2, 3, 4, 4, count=2)
    got = cfg_combine(cond, uncond, scale, formulation=formulation, backend=backend)
    expected = uncond + scale * (cond - uncond) if formulation == "diffusers" else (1 + scale) * cond - scale * uncond
    torch.testing.assert_close(got, expected)
    if formulation == "diffusers":
        same = cfg_combine(cond, uncond, scale - 1, formulation="original", backend=backend)
        torch.testing.assert_close(got, same)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rescale_is_that_of_diffusers(backend):
    module = oracle("diffusers.guiders.guider_utils")
    cond, uncond = draw(2, 3, 4, 8, 8, count=2, dtype=torch.float32)
    guided = uncond + 7.5 * (cond - uncond)
    expected = module.rescale_noise_cfg(guided, cond, guidance_rescale=0.7)
    got = cfg_combine(cond, uncond, 7.5, rescale=0.7, backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_segmented_rescale_is_that_of_every_sample_alone(backend):
    cond, uncond = draw(5, 4000, 3, count=2)
    batch = torch.randint(0, 3, (4000,), generator=torch.Generator().manual_seed(0))
    got = cfg_combine(cond, uncond, 6.0, rescale=0.6, batch_index=batch, batch_size=5, backend=backend)
    for b in range(3):
        c, u = cond[batch == b], uncond[batch == b]
        guided = u + 6.0 * (c - u)
        expected = guided * (0.6 * c.std() / guided.std() + 0.4)
        torch.testing.assert_close(got[batch == b], expected)
    unknown_size = cfg_combine(cond, uncond, 6.0, rescale=0.6, batch_index=batch.int(), backend=backend)
    assert torch.equal(got, unknown_size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_prediction_is_not_rescaled(backend):
    cond, uncond = torch.full((2, 8), 0.3), torch.full((2, 8), 0.1)
    index = torch.arange(2)
    got = cfg_combine(cond, uncond, 2.0, rescale=1.0, batch_index=index, backend=backend)
    torch.testing.assert_close(got, torch.full((2, 8), 0.5))


# --- diffusers' scheduler as the oracle -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shift,num_steps", [(1.0, 10), (3.0, 30)])
def test_the_sampler_is_diffusers_scheduler_step_for_step(shift, num_steps, dtype):
    diffusers = oracle("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    sigmas = flow_sigmas(num_steps, shift=shift)
    torch.testing.assert_close(sigmas, scheduler.sigmas.double(), rtol=1e-6, atol=1e-7)
    (x,) = draw(0, 2, 4, 5, 5, count=1, dtype=dtype)
    expected, theirs, scale = [], x, 4.5
    for t in scheduler.timesteps:
        cond, uncond = drift(theirs, t.item()).to(dtype), drift(theirs, t.item(), -0.5).to(dtype)
        velocity = uncond.float() + scale * (cond.float() - uncond.float())
        # The scheduler is given the guided velocity in float32, as ours computes it; the state keeps its dtype.
        theirs = scheduler.step(velocity, t, theirs, return_dict=False)[0].to(dtype)
        expected.append(theirs)
    sampler = FlowSampler(sigmas, guidance_scale=scale)
    found = []
    ours = sampler(
        lambda x, t: drift(x, t).to(dtype), x, model_uncond=lambda x, t: drift(x, t, -0.5).to(dtype),
        callback=lambda step, sigma, x: found.append(x),
    )  # fmt: skip
    assert ours.dtype == dtype and len(found) == num_steps
    torch.testing.assert_close(torch.tensor(sampler.timesteps), scheduler.timesteps, rtol=1e-6, atol=1e-4)
    # Errors of one unit in the last place grow along a trajectory of a nonlinear field.
    tolerance = 200 * torch.finfo(dtype).eps
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_one_step_is_diffusers_step_and_stochastic_sampling_is_feedback():
    diffusers = oracle("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(12)
    x, v = draw(7, 3, 4, 6, 6, count=2, dtype=torch.float32)
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(v, t, x, return_dict=False)[0]
        sigma, sigma_next = scheduler.sigmas[i], scheduler.sigmas[i + 1]
        for a, b in ((sigma, sigma_next), (sigma.item(), sigma_next.item())):
            torch.testing.assert_close(flow_step(x, v, None, a, b), expected, rtol=1e-6, atol=1e-6)


def test_trellis_convention_is_the_same_step_with_its_names():
    # x ← x − (t − t′)·v with t = r·t / (1 + (r − 1)·t) and guidance (1 + s)·c − s·u within the interval, else c.
    x, _ = draw(8, 6, 3, count=2)
    r, steps, s, (low, high) = 3.0, 12, 5.0, (0.5, 0.95)
    expected = x
    times = [r * (1 - i / steps) / (1 + (r - 1) * (1 - i / steps)) for i in range(steps + 1)]
    calls = 0
    for t, t_next in itertools.pairwise(times):
        c, u = drift(expected, 1000 * t), drift(expected, 1000 * t, -0.5)
        v = (1 + s) * c - s * u if low <= t <= high else c
        calls += low <= t <= high
        expected = expected - (t - t_next) * v
    asked = []

    def uncond(x, t):
        asked.append(t)
        return drift(x, t, -0.5)

    sampler = FlowSampler(
        flow_sigmas(steps, rescale_t=r), guidance_scale=s, cfg_formulation="original", guidance_interval=(low, high)
    )
    torch.testing.assert_close(sampler(drift, x, model_uncond=uncond), expected)
    assert len(asked) == calls > 0


def test_a_rectified_flow_model_is_stepped_with_its_sign():
    x, v = draw(9, 5, 3, count=2)
    torch.testing.assert_close(
        flow_step(x, -v, None, 0.7, 0.5, velocity="data_minus_noise"), flow_step(x, v, None, 0.7, 0.5)
    )
    sampler = FlowSampler(flow_sigmas(9), velocity="data_minus_noise")
    torch.testing.assert_close(sampler(lambda x, t: -drift(x, t), x), FlowSampler(flow_sigmas(9))(drift, x))


def test_the_sampler_completes_and_lets_the_callback_change_the_state():
    x, *_, target, index = sparse(11)
    pair = lambda x, t: (drift(x, t), drift(x, t, -0.5))  # noqa: E731
    sampler = FlowSampler(flow_sigmas(8), guidance_scale=3.0, guidance_rescale=0.5)
    batch = torch.zeros(len(x), dtype=torch.int64)
    out = sampler(pair, x, known=(target, index), strength=1.0, batch_index=batch, batch_size=1)
    known = index >= 0
    torch.testing.assert_close(out[known], target[index[known].long()])
    out = sampler(pair, x, known=(target, index), mode="replace", noise=x, batch_index=batch)
    torch.testing.assert_close(out[known], target[index[known].long()])
    out = sampler(
        pair, x, batch_index=batch, callback=lambda step, sigma, x: torch.zeros_like(x) if sigma == 0 else None
    )
    assert torch.equal(out, torch.zeros_like(x))


# --- invariants -------------------------------------------------------------------------------------------------------


@given(seeds, modes, backends, levels, st.floats(0, 1))
def test_free_cells_are_not_affected(seed, mode, backend, sigmas, strength):
    x, cond, uncond, noise, target, index = sparse(seed, dtype=torch.float32)
    options = dict(guidance_scale=3.0, backend=backend)
    target[-1, 0] = float("nan")
    index[index == len(target) - 1] = -1
    out = masked_flow_step(
        x, cond, uncond, *sigmas, target, index, strength, mode=mode,
        noise=noise if mode == "replace" else None, **options,
    )  # fmt: skip
    plain = flow_step(x, cond, uncond, *sigmas, **options)
    assert torch.equal(out[index < 0], plain[index < 0])
    assert out.isfinite().all()
    if strength == 0:
        torch.testing.assert_close(out, plain)


@given(seeds, st.sampled_from(["x0", "replace"]), st.integers(1, 12), backends)
def test_known_cells_converge_to_the_target_whatever_the_field(seed, mode, steps, backend):
    x, *_, target, index = sparse(seed)
    sampler = FlowSampler(flow_sigmas(steps), backend=backend)
    out = sampler(drift, x, known=(target, index), strength=1.0, mode=mode, noise=x)
    known = index >= 0
    torch.testing.assert_close(out[known], target[index[known].long()])


@given(seeds, modes, backends, st.sampled_from([0.0, 0.7]))
def test_voxels_may_come_in_any_order(seed, mode, backend, rescale):
    x, cond, uncond, noise, target, index = sparse(seed)
    batch = torch.randint(0, 3, (len(x),), generator=torch.Generator().manual_seed(seed))
    sigma = torch.tensor([0.9, 0.5, 0.3], dtype=torch.float64)

    def run(order, targets):
        place = torch.cat([targets.argsort(), torch.tensor([-1])])  # −1 stays −1
        return masked_flow_step(
            x[order], cond[order], uncond[order], sigma, 0.2, target[targets], place[index[order].long()], 0.4,
            mode=mode, noise=noise[order] if mode == "replace" else None, guidance_scale=4.0, guidance_rescale=rescale,
            batch_index=batch[order], batch_size=3, backend=backend,
        )  # fmt: skip

    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    targets = torch.randperm(len(target), generator=torch.Generator().manual_seed(seed))
    identity = torch.arange(len(x)), torch.arange(len(target))
    torch.testing.assert_close(run(order, targets), run(*identity)[order], rtol=1e-12, atol=1e-12)


@given(seeds, modes, backends, st.integers(1, 3), st.integers(0, 5), st.integers(1, 5))
def test_dense_and_sparse_forms_agree(seed, mode, backend, batch, channels, size):
    channels += 1
    x, cond, uncond, noise, target = draw(seed, batch, channels, size, size, count=5)
    mask = torch.rand(batch, 1, size, size, generator=torch.Generator().manual_seed(seed)) < 0.5
    more = dict(guidance_scale=3.0, mode=mode, backend=backend)
    dense = masked_flow_step(
        x, cond, uncond, 0.8, 0.5, target, mask, 0.6, noise=noise if mode == "replace" else None, **more
    )

    def rows(t):
        return t.movedim(1, -1).reshape(-1, channels)

    known = rows(mask.expand_as(x))[:, 0]
    index = torch.where(known, known.cumsum(0) - 1, -1)
    sparse_out = masked_flow_step(
        rows(x), rows(cond), rows(uncond), 0.8, 0.5, rows(target)[known], index, 0.6,
        noise=rows(noise) if mode == "replace" else None, **more,
    )  # fmt: skip
    torch.testing.assert_close(sparse_out, rows(dense), rtol=1e-12, atol=1e-12)
    full = masked_flow_step(
        x, cond, uncond, 0.8, 0.5, target, mask.expand_as(x), 0.6, noise=noise if mode == "replace" else None, **more
    )
    torch.testing.assert_close(full, dense, rtol=1e-12, atol=1e-12)


@given(seeds, modes, backends, levels, st.floats(-3, 3))
def test_a_step_is_linear(seed, mode, backend, sigmas, weight):
    a, b = sparse(seed), sparse(seed + 7)

    def run(x, cond, uncond, noise, target):
        return masked_flow_step(
            x, cond, uncond, *sigmas, target, a[-1], 0.3, mode=mode, noise=noise if mode == "replace" else None,
            guidance_scale=2.5, backend=backend,
        )  # fmt: skip

    mixed = run(*(p + weight * q for p, q in zip(a[:5], b[:5])))
    torch.testing.assert_close(mixed, run(*a[:5]) + weight * run(*b[:5]), rtol=1e-10, atol=1e-10)


@given(seeds, levels, backends)
def test_a_step_to_zero_gives_the_prediction_and_steps_compose_under_a_constant_field(seed, sigmas, backend):
    x, v = draw(seed, 5, 3, count=2)
    s, s_next = sigmas
    torch.testing.assert_close(flow_step(x, v, None, s, 0.0, backend=backend), x - s * v)
    there = flow_step(flow_step(x, v, None, s, s_next, backend=backend), v, None, s_next, s, backend=backend)
    torch.testing.assert_close(there, x)


# --- dtypes and instruction sets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("v_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_any_mix_of_dtypes_rounds_once(dtype, v_dtype, isa):
    x, cond, uncond, _, target, index = sparse(1, rows=411, targets=160, channels=7, dtype=dtype)
    cond, uncond = cond.to(v_dtype), uncond.to(v_dtype)
    arguments = (0.8, 0.6, target.half(), index, 0.5)
    with _native.restricted_isa(isa) as granted:
        if granted != isa:
            pytest.skip(f"no {isa} here")
        got = masked_flow_step(x, cond, uncond, *arguments, mode="x0", guidance_scale=3.0, backend="native")
    exact = masked_flow_step(x.double(), cond, uncond, *arguments, mode="x0", guidance_scale=3.0, backend="reference")
    assert got.dtype == dtype
    # Half a unit in the last place of the result, plus that of the largest intermediate in float32.
    error = (got.double() - exact).abs()
    allowed = 0.502 * torch.finfo(dtype).eps * 2 ** exact.abs().log2().floor() + 2e-6
    assert (error <= allowed).all(), (error / allowed).max()


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_survives(dtype, isa):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype).reshape(256, 256)
    with _native.restricted_isa(isa) as granted:
        if granted != isa:
            pytest.skip(f"no {isa} here")
        zero = torch.zeros_like(every)
        same = flow_step(every, zero, None, 0.5, 0.5, backend="native")
        assert torch.equal(same.isnan(), every.isnan())
        assert torch.equal(same[~every.isnan()], every[~every.isnan()])
        # Rounding from float32: halfway cases, overflow, subnormals, as torch rounds them.
        wide = torch.cat([every.float() * f for f in (1 / 3, 1.0009765625, 1.00390625, 2.0**-9)])
        wide = wide[~wide.isnan()][: 2**17].reshape(-1, 64)
        rounded = flow_step(torch.zeros_like(wide, dtype=dtype), -wide, None, 1.0, 0.0, backend="native")
        assert torch.equal(rounded, wide.to(dtype))
