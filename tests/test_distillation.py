"""Score distillation: the published formulas from their equations, diffusers' schedulers, invariants, bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvctoolkit import ops
from tests.distillation_tools import BACKENDS, DTYPES, TABLE, gradient, randn, times, views
from tests.oracles import oracle

# --- the published formulas, from their equations ---------------------------------------------------------------------


class TestFormulas:
    """In float64, every intermediate written out; nothing of the package takes part in the expectation."""

    x, cond, uncond, other, noise = randn(3, 4, 5, 6, count=5, dtype=torch.float64)
    t = torch.tensor([20, 500, 979])
    alpha_bar = TABLE[t].double()
    options = dict(t=t, alphas_cumprod=TABLE)

    def check(self, make, g, batch=3):
        x = self.x.clone().requires_grad_()
        for backend in BACKENDS:
            for reduction, over in (("batch_sum", batch), ("mean", self.x.numel())):
                loss, info = make(x, backend=backend, reduction=reduction)
                torch.testing.assert_close(info.grad, g, rtol=1e-6, atol=1e-9)
                torch.testing.assert_close(loss, 0.5 * (info.grad**2).sum() / over, rtol=1e-12, atol=0)
                torch.testing.assert_close(info.grad_norm, g.pow(2).sum().sqrt(), rtol=1e-6, atol=0)
                torch.testing.assert_close(gradient(loss, x, 3.0), 3 * info.grad / over, rtol=1e-14, atol=0)
            loss, info = make(x, backend=backend, reduction="none")
            upstream = randn(*self.x.shape, seed=5, dtype=torch.float64)
            assert torch.equal(gradient((loss * upstream).sum(), x), info.grad * upstream)
            torch.testing.assert_close(loss, 0.5 * info.grad**2, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("formulation,effective", [("diffusers", 100.0), ("original", 101.0)])
    def test_sds(self, formulation, effective):
        """DreamFusion, Eq. 3 with classifier-free guidance; threestudio's SDS is guided one step further."""
        guided = self.uncond + effective * (self.cond - self.uncond)
        g = views(1 - self.alpha_bar, self.x) * (guided - self.noise)
        options = dict(self.options, eps_uncond=self.uncond, guidance_scale=100.0, cfg_formulation=formulation)
        self.check(lambda x, **o: ops.sds_loss(x, self.cond, self.noise, **options, **o), g)

    def test_csd(self):
        """AlignCVC, Eq. 6; and as released, divided by the norm of the whole batch."""
        g = views(1 - self.alpha_bar, self.x) * (self.cond - self.uncond)
        self.check(lambda x, **o: ops.csd_loss(x, self.cond, self.uncond, **self.options, **o), g)
        for backend in BACKENDS:
            x = self.x.clone().requires_grad_()
            loss, info = ops.csd_loss(x, self.cond, self.uncond, **self.options, normalize=True, backend=backend)
            torch.testing.assert_close(info.grad, g / (g.norm() + 1e-8), rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(info.grad_norm, g.norm(), rtol=1e-6, atol=0)
            torch.testing.assert_close(gradient(loss, x), info.grad / 3, rtol=1e-14, atol=0)
            assert float(loss) == pytest.approx(0.5 / 3)

    def test_vsd(self):
        """ProlificDreamer, Eq. 9: both terms guided, w = √ᾱ·(1 − ᾱ)."""
        lora_cond, lora_uncond = randn(3, 4, 5, 6, seed=9, count=2, dtype=torch.float64)
        teacher = self.uncond + 7.5 * (self.cond - self.uncond)
        lora = lora_uncond + 1.5 * (lora_cond - lora_uncond)
        g = views(self.alpha_bar.sqrt() * (1 - self.alpha_bar), self.x) * (teacher - lora)
        options = dict(self.options, weight="fantasia3d", eps_uncond=self.uncond, guidance_scale=7.5)
        options |= dict(eps_lora_uncond=lora_uncond, guidance_scale_lora=1.5)
        self.check(lambda x, **o: ops.vsd_loss(x, self.cond, lora_cond, **options, **o), g)

    def test_asd(self):
        """ScaleDreamer, Eq. 8 as released: guidance on the first term only."""
        g = views(1 - self.alpha_bar, self.x) * (self.uncond + 7.5 * (self.cond - self.uncond) - self.other)
        options = dict(self.options, eps_t_uncond=self.uncond, guidance_scale=7.5)
        self.check(lambda x, **o: ops.asd_loss(x, self.cond, self.other, **options, **o), g)

    def test_asd_without_guidance(self):
        """AlignCVC, Eq. 1."""
        weight = torch.tensor([0.5, 2.0, 0.25], dtype=torch.float64)
        g = views(weight, self.x) * (self.cond - self.other)
        self.check(lambda x, **o: ops.asd_loss(x, self.cond, self.other, weight=weight, **o), g)

    def test_algorithm_1_goes_through_the_teacher(self):
        """AlignCVC, Algorithm 1: MSE(ε_t, ε_t+), no weight, gradients 2/N into both predictions."""
        first, second = self.cond.clone().requires_grad_(), self.other.clone().requires_grad_()
        loss, info = ops.asd_loss(self.x, first, second, mode="mse_through")
        expected = torch.nn.functional.mse_loss(self.cond, self.other)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        grads = torch.autograd.grad(loss, [first, second])
        difference = 2 / self.x.numel() * (self.cond - self.other)
        torch.testing.assert_close(grads, (difference, -difference), rtol=1e-12, atol=0)
        assert torch.equal(info.grad, self.cond - self.other) and not info.grad.requires_grad
        summed, _ = ops.asd_loss(self.x, first, second, mode="mse_through", reduction="batch_sum")
        assert float(summed) == pytest.approx(float(expected) * self.x.numel() / 3)
        whole, _ = ops.asd_loss(self.x, first, second, mode="mse_through", reduction="none")
        torch.testing.assert_close(whole.mean(), expected)

    def test_perpendicular_negatives_fit_in_the_linear_form(self):
        """ScaleDreamer's perp-neg: −0.5 on the first term only; eight predictions at once."""
        many = randn(3, 4, 5, 6, seed=3, count=8, dtype=torch.float64)
        coefficients = [7.5, -6.5, -0.5, -0.5, -0.5, 0.0, 2.0, -1.0]
        g = 0.3 * sum(c * p for c, p in zip(coefficients, many)) + 0.3 * 0.7 * self.noise
        form = lambda x, **o: ops.score_distillation(  # noqa: E731
            x, many, coefficients, 0.3, noise=self.noise, noise_coefficient=0.7, **o
        )
        self.check(form, g)

    def test_clamping_is_elementwise_and_comes_before_the_norm(self):
        g = (self.cond - self.uncond).clamp(-0.1, 0.1)
        self.check(
            lambda x, **o: ops.csd_loss(x, self.cond, self.uncond, weight="uniform", clamp=0.1, **o), g
        )  # fmt: skip

    @pytest.mark.parametrize("random", [False, True])
    def test_asd_timesteps(self, random):
        """ScaleDreamer: plus_ratio·(t − min_step), clamped to [0, T − 1 − t], times U(0, 1), truncated."""
        t = torch.arange(1000)
        u = torch.rand(1000, generator=torch.Generator().manual_seed(7)).tolist()
        found = ops.asd_timesteps(t, min_step=20, random=random, generator=torch.Generator().manual_seed(7))
        for time in range(1000):
            d = min(max(0.1 * (time - 20), 0.0), 999 - time) * (u[time] if random else 1.0)
            assert abs(int(found[time]) - min(max(time + int(d), 1), 999)) <= (abs(d - round(d)) < 1e-4)
        if not random:
            assert int((found - t).max()) == 89 and int((found - t)[1:].min()) == 0


# --- schedulers that nobody here wrote --------------------------------------------------------------------------------


def scheduler(name, **options):
    return getattr(oracle("diffusers"), name)(**options)


class TestDiffusers:
    x, noise, prediction = randn(4, 3, 5, 7, count=3)
    t = torch.tensor([0, 10, 400, 999])

    def test_add_noise(self):
        s = scheduler("DDPMScheduler", beta_schedule="scaled_linear")
        a, b = ops.add_noise_pair(self.x, self.noise, self.t, self.t.flip(0), alphas_cumprod=s.alphas_cumprod)
        torch.testing.assert_close(a, s.add_noise(self.x, self.noise, self.t))
        torch.testing.assert_close(b, s.add_noise(self.x, self.noise, self.t.flip(0)))

    def test_scale_noise_on_the_flow_path(self):
        s = scheduler("FlowMatchEulerDiscreteScheduler", shift=3.0)
        index = torch.tensor([0, 10, 400, 999])
        found = ops.noised_batch(self.x, self.noise, index, sigmas=s.sigmas, path="flow")[0]
        torch.testing.assert_close(found, s.scale_noise(self.x, s.timesteps[index], self.noise))
        sigma = s.sigmas[index]  # noise levels themselves, no table
        continuous = ops.noised_batch(self.x, self.noise, sigma, path="flow")[0]
        torch.testing.assert_close(continuous, found)

    def test_add_noise_on_the_edm_path(self):
        s = scheduler("EulerDiscreteScheduler")
        index = torch.tensor([0, 10, 400, 999])
        found = ops.noised_batch(self.x, self.noise, index, sigmas=s.sigmas, path="edm")[0]
        torch.testing.assert_close(found, s.add_noise(self.x, self.noise, s.timesteps[index]))

    def true_noise(self, prediction, kind, t, **options):
        """info.grad = ε(prediction) − noise: zero where the prediction is the truth."""
        return ops.sds_loss(
            self.x, prediction, self.noise, t=t, weight="uniform", prediction_type=kind, reduction="none", **options
        )[1].grad

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
    def test_variance_preserving_predictions(self, kind):
        s = scheduler("DDIMScheduler", prediction_type=kind, clip_sample=False, set_alpha_to_one=True)
        s.set_timesteps(1000)
        table = s.alphas_cumprod
        t = self.t[1:]
        x, noise, prediction = self.x[1:], self.noise[1:], self.prediction[1:]
        x_t = s.add_noise(x, noise, t)
        options = dict(weight="uniform", t=t, alphas_cumprod=table, prediction_type=kind, x_t=x_t)
        truth = {"epsilon": noise, "v_prediction": s.get_velocity(x, noise, t), "sample": x}[kind]
        zero = ops.sds_loss(x, truth, noise, **options)[1].grad
        assert zero.abs().max() < 2e-4  # σ = 0.09 at t = 10: rounding of x_t over it
        # The ε of any prediction is the one that the scheduler's own step implies: x_t = √ᾱ·x̂₀ + σ·ε.
        found = ops.score_distillation(x, [prediction], [1.0], **options)[1].grad
        for i, time in enumerate(t.tolist()):
            x0 = s.step(prediction[i], time, x_t[i]).pred_original_sample
            implied = (x_t[i] - table[time].sqrt() * x0) / (1 - table[time]).sqrt()
            torch.testing.assert_close(found[i], implied, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
    def test_edm_predictions(self, kind):
        s = scheduler("EulerDiscreteScheduler", prediction_type=kind)
        s.set_timesteps(20)
        for index in (0, 7, 18):
            sigma = s.sigmas[index]
            x_t = self.x + sigma * self.noise
            s._step_index = index
            x0 = s.step(self.prediction, s.timesteps[index], x_t).pred_original_sample
            found = ops.score_distillation(
                self.x, [self.prediction], [1.0], "uniform", t=torch.tensor([index]), sigmas=s.sigmas, path="edm",
                prediction_type=kind, x_t=x_t,
            )[1].grad  # fmt: skip
            torch.testing.assert_close(found, (x_t - x0) / sigma, rtol=2e-4, atol=2e-4)

    def test_flow_predictions(self):
        s = scheduler("FlowMatchEulerDiscreteScheduler")
        sigmas = s.sigmas.flip(0)
        t = torch.tensor([0, 10, 400, 998])
        sigma = sigmas[t].view(-1, 1, 1, 1)
        x_t = (1 - sigma) * self.x + sigma * self.noise
        options = dict(weight="uniform", t=t, sigmas=sigmas, prediction_type="flow", x_t=x_t)
        zero = ops.sds_loss(self.x, self.noise - self.x, self.noise, **options)[1].grad
        assert zero.abs().max() < 1e-5
        # Guidance in ε is guidance in v, times 1 − σ.
        cond, uncond = self.prediction, randn(4, 3, 5, 7, seed=8)
        found = ops.sds_loss(self.x, cond, self.noise, eps_uncond=uncond, guidance_scale=4.0, **options)[1].grad
        v = uncond + 4.0 * (cond - uncond)
        torch.testing.assert_close(found, (1 - sigma) * (v - (self.noise - self.x)), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("formulation", ["diffusers", "original"])
    def test_guidance_is_cfg_combine(self, formulation):
        cond, uncond = randn(4, 3, 5, 7, seed=8, count=2)
        guided = ops.cfg_combine(cond, uncond, 3.0, formulation=formulation)
        found = ops.sds_loss(
            self.x, cond, self.noise, weight="uniform", eps_uncond=uncond, guidance_scale=3.0,
            cfg_formulation=formulation,
        )[1].grad  # fmt: skip
        torch.testing.assert_close(found, guided - self.noise, rtol=1e-5, atol=1e-5)


# --- invariants -------------------------------------------------------------------------------------------------------

shapes = st.lists(st.integers(1, 9), min_size=2, max_size=5).filter(lambda s: math.prod(s) < 2000)
seeds = st.integers(0, 2**20)


@given(shapes, seeds, st.sampled_from(BACKENDS), st.sampled_from(["sds", "fantasia3d", "uniform"]))
def test_linear_in_the_predictions(shape, seed, backend, weight):
    x, a, b, c, d = randn(*shape, seed=seed, count=5, dtype=torch.float64)
    options = dict(t=times(shape[0], seed), alphas_cumprod=TABLE, weight=weight, backend=backend)

    def grad(first, second, s=3.0):
        return ops.score_distillation(x, [first, second], [s, -0.5], **options)[1].grad

    combined = grad(2 * a - 3 * b, 2 * c - 3 * d)
    torch.testing.assert_close(combined, 2 * grad(a, c) - 3 * grad(b, d), rtol=1e-9, atol=1e-9)


@given(shapes, seeds, st.sampled_from(BACKENDS), st.sampled_from(["epsilon", "v_prediction", "sample"]))
def test_no_time_between_gives_exactly_zero(shape, seed, backend, kind):
    x, x_t, prediction = randn(*shape, seed=seed, count=3)
    t = times(shape[0], seed)
    same = dict(t=t, t_plus=t.clone(), x_t=x_t, x_t_plus=x_t.clone(), alphas_cumprod=TABLE, prediction_type=kind)
    loss, info = ops.asd_loss(x, prediction, prediction.clone(), **same, backend=backend)
    assert float(loss) == 0 and not info.grad.any() and float(info.grad_norm) == 0


@given(shapes, seeds, st.sampled_from(BACKENDS))
def test_a_common_prediction_cancels(shape, seed, backend):
    x, a, b, shift = randn(*shape, seed=seed, count=4, dtype=torch.float64)
    options = dict(t=times(shape[0], seed), alphas_cumprod=TABLE, backend=backend)
    for loss in (ops.asd_loss, ops.csd_loss, ops.vsd_loss):
        plain, shifted = (loss(x, a + s, b + s, **options)[1].grad for s in (0, shift))
        torch.testing.assert_close(plain, shifted, rtol=1e-9, atol=1e-9)


@given(shapes, seeds, st.sampled_from(BACKENDS), st.sampled_from(DTYPES))
def test_batch_sum_and_mean_differ_by_the_size_of_a_sample(shape, seed, backend, dtype):
    x, a, b = randn(*shape, seed=seed, count=3, dtype=dtype)
    x.requires_grad_()
    options = dict(t=times(shape[0], seed), alphas_cumprod=TABLE, backend=backend)
    whole, of_whole = ops.asd_loss(x, a, b, reduction="batch_sum", **options)
    mean, of_mean = ops.asd_loss(x, a, b, reduction="mean", **options)
    assert torch.equal(of_whole.grad, of_mean.grad)
    assert float(whole) == pytest.approx(float(mean) * math.prod(shape[1:]), rel=1e-5, abs=1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@given(shape=shapes, seed=seeds, upstream=st.floats(-4, 4, width=16))
def test_the_gradient_is_exact(dtype, backend, shape, seed, upstream):
    """g/B, g/numel or g times the upstream gradient, rounded once: nothing is lost to a target x − g."""
    x, a, b = randn(*shape, seed=seed, count=3, dtype=dtype)
    x = (1000 * x).requires_grad_()  # a target would swallow g
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    for reduction, over in (("batch_sum", shape[0]), ("mean", math.prod(shape))):
        loss, info = ops.csd_loss(x, 0.01 * a, 0.01 * b, weight="uniform", reduction=reduction, backend=backend)
        expected = info.grad.to(inner) * torch.tensor(upstream, dtype=inner) / over
        assert torch.equal(gradient(loss, x, upstream), expected.to(dtype))
    rounded = (0.01 * a).to(inner) - (0.01 * b).to(inner)
    assert torch.equal(info.grad, rounded.to(dtype))


@given(shapes, seeds, st.sampled_from(DTYPES), st.sampled_from(["vp", "edm", "flow"]))
def test_noise_is_added_as_written(shape, seed, dtype, path):
    x, noise = randn(*shape, seed=seed, count=2, dtype=dtype)
    t, t_plus = times(shape[0], seed), times(shape[0], seed + 1)
    table = TABLE if path == "vp" else torch.linspace(0.001, 1, 1000)
    given_table = dict(alphas_cumprod=table) if path == "vp" else dict(sigmas=table, path=path)
    pair = ops.add_noise_pair(x, noise, t, t_plus, **given_table)
    for found, time in zip(pair, (t, t_plus)):
        level = views(table[time], x)
        factors = {"vp": (level.sqrt(), (1 - level).sqrt()), "edm": (1, level), "flow": (1 - level, level)}[path]
        exact = factors[0] * x.double() + factors[1] * noise.double()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.double(), exact, rtol=2 * eps, atol=max(2 * eps, 1e-15) * 4)
    batch = ops.noised_batch(x, noise, t, t_plus, copies=2, dtype=torch.float16, **given_table)
    assert batch.dtype == torch.float16 and batch.shape == (3, *shape)
    assert torch.equal(batch[0], batch[1])
    assert torch.equal(batch[2], pair[1].half()) or dtype == torch.bfloat16 or dtype == torch.float64


# --- dtypes, compilers, what is not finite ----------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_teacher_may_have_another_dtype(dtype, teacher):
    x, x_t, x_t_plus = randn(3, 700, count=3, dtype=dtype)
    a, b = randn(3, 700, seed=1, count=2, dtype=teacher)
    options = dict(t=times(3), t_plus=times(3, 1), alphas_cumprod=TABLE, prediction_type="v_prediction")
    options |= dict(x_t=x_t, x_t_plus=x_t_plus)
    native, reference = (ops.asd_loss(x, a, b, **options, backend=name) for name in BACKENDS)
    assert native[1].grad.dtype == dtype and native[0].dtype == reference[0].dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(native[1].grad, reference[1].grad, rtol=2 * eps, atol=1e-5 if eps < 1e-4 else eps)


def test_large_half_precision_batches_do_not_overflow():
    x = torch.zeros(2, 100_000, dtype=torch.float16)
    loss, info = ops.csd_loss(x, x + 60.0, x, weight="uniform")
    assert float(loss) == pytest.approx(0.5 * 60.0**2 * 100_000)
    assert float(info.grad_norm) == pytest.approx(60 * math.sqrt(200_000))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 3), (3, 4000)])
def test_what_is_not_finite_is_counted(backend, shape):
    x, a, b = randn(*shape, count=3)
    a[0, 0], a[1, 1], b[1, 2] = math.nan, math.inf, -math.inf
    options = dict(weight="uniform", backend=backend)
    loss, info = ops.csd_loss(x, a, b, **options)
    assert int(info.nonfinite) == 3 and not math.isfinite(float(loss))
    assert torch.equal(info.grad, a - b) or info.grad.isnan().sum() == 1
    x.requires_grad_()
    loss, info = ops.csd_loss(x, a, b, nonfinite="zero", **options)
    clean = torch.where((a - b).isfinite(), a - b, 0)
    assert int(info.nonfinite) == 3 and torch.equal(info.grad, clean)
    assert torch.equal(gradient(loss, x), clean / shape[0])
    with pytest.raises(ValueError, match="must be finite, got 3 NaN or infinite elements"):
        ops.csd_loss(x, a, b, nonfinite="raise", **options)
    ops.csd_loss(x, clean, clean, nonfinite="raise", **options)
    noise_level_zero = ops.score_distillation(
        x, [clean], [1.0], "uniform", t=torch.zeros(shape[0], dtype=torch.int64), sigmas=torch.zeros(1), path="edm",
        prediction_type="sample", x_t=clean + 1, backend=backend,
    )[1]  # fmt: skip
    assert int(noise_level_zero.nonfinite) == x.numel()


def test_it_compiles_with_its_gradient():
    x, a, b, u = randn(3, 4, 5, count=4)
    x.requires_grad_()
    options = dict(t=times(3), alphas_cumprod=TABLE, eps_t_uncond=u, guidance_scale=7.5, clamp=1.0)

    def step(x):
        loss, info = ops.asd_loss(x, a, b, **options)
        return loss, info.grad, info.nonfinite

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, fast = step(x), compiled(x)
    assert all(torch.equal(p, q) for p, q in zip(eager, fast))
    assert torch.equal(gradient(eager[0], x), gradient(fast[0], x))


def test_a_second_derivative_raises():
    x, a, b = randn(3, 4, count=3)
    x.requires_grad_()
    loss, _ = ops.csd_loss(x, a, b, weight="uniform")
    (first,) = torch.autograd.grad(loss.square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        torch.autograd.grad(first.sum(), x)


def test_nothing_but_x_is_differentiable():
    x, a, b = (v.requires_grad_() for v in randn(3, 4, count=3))
    loss, info = ops.csd_loss(x, a, b, weight="uniform")
    loss.backward()
    assert x.grad is not None and a.grad is None and b.grad is None
    assert not (info.grad.requires_grad or info.grad_norm.requires_grad)
    assert not ops.csd_loss(x.detach(), a, b, weight="uniform")[0].requires_grad


def test_a_prediction_of_weight_zero_is_not_read():
    x, a, b = randn(3, 4, count=3)
    nan = torch.full_like(x, math.nan)
    _, info = ops.score_distillation(x, [a, nan, b], [1.0, 0.0, -1.0], "uniform")
    assert torch.equal(info.grad, a - b)
    _, info = ops.asd_loss(x, a, b, weight="uniform", eps_t_uncond=nan, guidance_scale=1.0)
    assert torch.equal(info.grad, a - b)
