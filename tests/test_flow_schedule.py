"""Schedules, 3D-aware feedback and partial noising: diffusers' schedulers as the oracle, invariants, bad input."""

import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from cvctoolkit.ops import FlowSampler, feedback, flow_sigmas, flow_step, refine
from tests.oracles import oracle

SHAPE = (2, 3, 4, 4)


def draw(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(count)]


def vp_table(steps=1000):
    return (1 - torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2).cumprod(0)


# --- schedules --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.floats(0.2, 8))
def test_schedules_descend_from_one_to_zero(steps, shift):
    for sigmas in (flow_sigmas(steps, rescale_t=shift), flow_sigmas(steps, shift=shift), flow_sigmas(steps)):
        assert sigmas[0] == 1 and sigmas[-1] == 0 and len(sigmas) == steps + 1
        assert (sigmas.diff() < 0).all()


def test_diffusers_shifts_twice_and_trellis_once():
    assert flow_sigmas(30, shift=3.0)[-2].item() == pytest.approx(0.0089, abs=5e-5)
    assert flow_sigmas(30, rescale_t=3.0)[-2].item() == pytest.approx(0.094, abs=5e-4)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 7.0])
@pytest.mark.parametrize("steps", [1, 2, 15, 50])
def test_sigmas_are_those_of_diffusers(steps, shift):
    diffusers = oracle("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(flow_sigmas(steps, shift=shift).float(), scheduler.sigmas, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(
    "arguments",
    [dict(num_steps=-1), dict(num_steps=3, shift=0.0), dict(num_steps=3, rescale_t=1.0, shift=1.0),
     dict(num_steps=3, num_train_timesteps=0)],
)  # fmt: skip
def test_bad_schedules_are_refused(arguments):
    with pytest.raises(ValueError, match="flow_sigmas"):
        flow_sigmas(**arguments)


# --- feedback ---------------------------------------------------------------------------------------------------------


def test_implied_noise_is_the_ddim_step_of_diffusers():
    diffusers = oracle("diffusers")
    scheduler = diffusers.DDIMScheduler(prediction_type="sample", clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(20)
    table = scheduler.alphas_cumprod
    x, x0 = (t.float() for t in draw(0, 2))
    times = scheduler.timesteps.tolist()
    for t, t_next in itertools.pairwise([*times, None]):
        expected = scheduler.step(x0, t, x, return_dict=False)[0]
        got = feedback(x, x0, mode="implied_eps", alphas_cumprod=table, t=t, t_next=t_next)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_renoise_is_add_noise_of_diffusers():
    diffusers = oracle("diffusers")
    scheduler = diffusers.DDPMScheduler()
    x, x0, noise = (t.float() for t in draw(1, 3))
    times = torch.tensor([7, 912])
    expected = scheduler.add_noise(x0, noise, times)
    got = feedback(x, x0, mode="renoise", alphas_cumprod=scheduler.alphas_cumprod, t_next=times, noise=noise)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_renoise_on_the_flow_path_is_stochastic_sampling_of_diffusers():
    diffusers = oracle("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(9)
    x, v = (t.float() for t in draw(2, 2))
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(v, t, x, generator=torch.Generator().manual_seed(i), return_dict=False)[0]
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(i))
        sigma, sigma_next = scheduler.sigmas[i], scheduler.sigmas[i + 1]
        x0 = flow_step(x, v, None, sigma, 0.0)
        got = feedback(x, x0, mode="renoise", sigma_next=sigma_next, noise=noise)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@given(st.integers(0, 100), st.floats(0.1, 1.0), st.floats(0.0, 1.0), st.sampled_from(["implied_eps", "replace_x0"]))
def test_feeding_the_prediction_back_is_the_plain_step(seed, sigma, sigma_next, mode):
    x, v = draw(seed, 2)
    x0 = flow_step(x, v, None, sigma, 0.0)
    got = feedback(x, x0, mode=mode, sigma=sigma, sigma_next=sigma_next, x0_pred=x0)
    torch.testing.assert_close(got, flow_step(x, v, None, sigma, sigma_next))


@given(st.integers(0, 100), st.integers(1, 999), st.integers(0, 998))
def test_replacing_keeps_the_models_noise(seed, t, t_next):
    x, x0, x0_pred = draw(seed, 3)
    table = vp_table()
    got = feedback(x, x0, mode="replace_x0", alphas_cumprod=table, t=t, t_next=t_next, x0_pred=x0_pred)
    eps = (x - table[t].sqrt() * x0_pred) / (1 - table[t]).sqrt()
    torch.testing.assert_close(got, table[t_next].sqrt() * x0 + (1 - table[t_next]).sqrt() * eps)


@pytest.mark.parametrize("mode", ["renoise", "implied_eps", "replace_x0"])
def test_after_the_last_level_the_prediction_itself_is_returned(mode):
    x, x0 = draw(3, 2)
    flow = feedback(x, x0, mode=mode, sigma=0.3, sigma_next=0.0, x0_pred=x)
    vp = feedback(x, x0, mode=mode, alphas_cumprod=vp_table(), t=30, t_next=None, x0_pred=x)
    assert torch.equal(flow, x0) and torch.equal(vp, x0)


def test_16_bit_states_are_fed_back_in_float32():
    x, x0 = draw(4, 2)
    half = feedback(x.bfloat16(), x0.bfloat16(), mode="implied_eps", alphas_cumprod=vp_table(), t=1, t_next=0)
    exact = feedback(
        x.bfloat16().double(), x0.bfloat16().double(), mode="implied_eps", alphas_cumprod=vp_table(), t=1, t_next=0
    )
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(mode="ddim"), "mode must be one of"),
        (dict(sigma_next=None), "give sigma_next .flow. or alphas_cumprod .VP., got none"),
        (dict(alphas_cumprod=vp_table()), "got both"),
        (dict(sigma=None), "needs sigma, got None"),
        (dict(sigma=0.0), "sigma must be > 0"),
        (dict(sigma=1.5), r"sigma must be in \[0, 1\]"),
        (dict(sigma=torch.rand(3)), "sigma must be a number or have shape"),
        (dict(mode="renoise"), "mode 'renoise' needs noise"),
        (dict(mode="replace_x0"), "mode 'replace_x0' needs x0_pred"),
        (dict(x0=torch.zeros(2, 3)), "x0 must have shape"),
        (dict(sigma_next=None, alphas_cumprod=vp_table(), t=1000, t_next=0), "t must be <= 999"),
        (
            dict(sigma_next=None, alphas_cumprod=vp_table(), t=torch.tensor([3, -1]), t_next=0),
            r"t must be in \[0, 999\]",
        ),
        (dict(sigma_next=None, alphas_cumprod=vp_table(), t=torch.rand(2), t_next=0), "t must have dtype"),
        (dict(sigma_next=None, alphas_cumprod=vp_table()[:0], t=0), "alphas_cumprod must not be empty"),
        (dict(sigma_next=None, alphas_cumprod=vp_table()), "needs t, got None"),
    ],
)
def test_bad_feedback_is_named(changes, message):
    x, x0 = draw(5, 2)
    arguments = {"x_t": x, "x0": x0, "mode": "implied_eps", "sigma": 0.5, "sigma_next": 0.3, **changes}
    with pytest.raises(ValueError, match="feedback: .*" + message):
        feedback(**arguments)


def test_a_float_timestep_is_a_type_error():
    x, x0 = draw(6, 2)
    with pytest.raises(TypeError, match="feedback: t must be an integer"):
        feedback(x, x0, mode="implied_eps", alphas_cumprod=vp_table(), t=3.0, t_next=0)


# --- partial noising --------------------------------------------------------------------------------------------------


@given(st.floats(0, 1), st.integers(1, 40))
def test_exact_refinement_starts_at_its_strength_and_returns_what_exact_velocities_bring_back(strength, steps):
    x, noise = draw(7, 2)
    start, schedule = refine(x, noise, strength, schedule=flow_sigmas(steps))
    torch.testing.assert_close(start, (1 - strength) * x + strength * noise)
    assert schedule[0] == strength or not strength
    back = FlowSampler(schedule)(lambda _, t: noise - x, start)
    torch.testing.assert_close(back, x)


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.95, 1.0])
def test_truncation_is_that_of_diffusers_pipelines(strength):
    diffusers = oracle("diffusers")
    x, noise = (t.float() for t in draw(8, 2))
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(30)
    first = max(30 - min(int(30 * strength), 30), 0)
    start, schedule = refine(
        x, noise, strength, schedule=scheduler.timesteps, alphas_cumprod=scheduler.alphas_cumprod, mode="truncate"
    )
    assert schedule.tolist() == scheduler.timesteps[first:].tolist()
    expected = scheduler.add_noise(x, noise, scheduler.timesteps[first]) if len(schedule) else x
    torch.testing.assert_close(start, expected, rtol=1e-6, atol=1e-6)
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(30)
    start, schedule = refine(x, noise, strength, schedule=flow_sigmas(30, shift=3.0), mode="truncate")
    torch.testing.assert_close(schedule.float(), flow.sigmas[first:], rtol=2e-6, atol=1e-7)
    expected = flow.scale_noise(x, flow.timesteps[first : first + 1], noise) if first < 30 else x
    torch.testing.assert_close(start, expected, rtol=1e-5, atol=1e-5)


def test_exact_refinement_of_a_vp_path_noises_to_the_timestep_itself():
    x, noise = draw(9, 2)
    table, times = vp_table(), torch.arange(981, 0, -20)
    start, schedule = refine(x, noise, 0.95, schedule=times, alphas_cumprod=table)
    torch.testing.assert_close(start, table[950].sqrt() * x + (1 - table[950]).sqrt() * noise)
    assert schedule[:3].tolist() == [950, 941, 921]
    start, schedule = refine(x, noise, 1.0, schedule=times, alphas_cumprod=table)
    assert schedule[0] == 999  # of a VP path even this is not pure noise
    assert not torch.equal(start, noise)
    start, schedule = refine(x, noise, 0.0, schedule=times, alphas_cumprod=table)
    assert torch.equal(start, x) and not len(schedule)


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(strength=1.1), r"strength must be in \[0, 1\]"),
        (dict(strength=-0.1), "strength must be >= 0"),
        (dict(mode="sdedit"), "mode must be one of"),
        (dict(noise=torch.zeros(3)), "noise must have shape"),
        (dict(schedule=torch.tensor([1.5, 0.0])), "schedule must hold noise levels"),
        (dict(schedule=torch.zeros(0)), "schedule must hold noise levels"),
        (dict(schedule=torch.arange(3)), "schedule must have dtype"),
        (dict(alphas_cumprod=vp_table()), "schedule must have dtype"),
        (dict(mode="truncate", schedule=torch.tensor([2000, 1]), alphas_cumprod=vp_table()), "schedule must be <= 999"),
    ],
)
def test_bad_refinements_are_named(changes, message):
    x, noise = draw(10, 2)
    arguments = {"x": x, "noise": noise, "strength": 1.0, "schedule": flow_sigmas(4), **changes}
    with pytest.raises(ValueError, match="refine: .*" + message):
        refine(**arguments)
