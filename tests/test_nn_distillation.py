"""The driver of asynchronous score distillation: what the teacher sees, what comes back, with diffusers' own models."""

import pytest
import torch

from cvctoolkit import nn, ops
from cvctoolkit.ops.distillation.samples import alphas_cumprod
from tests.oracles import oracle

TABLE = alphas_cumprod(1000)


class Recorder:
    """A teacher that remembers what it saw; predicts x·w + t/1000 + condition."""

    def __init__(self):
        self.calls = []
        self.w = torch.tensor(0.5, requires_grad=True)

    def __call__(self, x, t, y=None, scale=1.0):
        self.calls.append((x.detach(), t, y))
        bias = 0 if y is None else y.view(-1, *[1] * (x.dim() - 1))
        return self.w * x + scale * t.view(-1, *[1] * (x.dim() - 1)).to(x.dtype) / 1000 + bias


def make(**options):
    teacher = Recorder()
    return teacher, nn.AsynchronousScoreDistillation(teacher, alphas_cumprod=TABLE, **options)


def test_one_call_with_one_noise_at_both_times():
    teacher, asd = make(guidance_scale=7.5)
    x, noise = torch.randn(3, 4, 5).requires_grad_(), torch.randn(3, 4, 5)
    cond, uncond = torch.ones(3), torch.zeros(3)
    loss, info = asd(x, {"y": cond, "scale": 2.0}, {"y": uncond, "scale": 2.0}, noise=noise)
    assert len(teacher.calls) == 1
    seen, time, y = teacher.calls[0]
    first, second = ops.add_noise_pair(x.detach(), noise, info.t, info.t_plus, alphas_cumprod=TABLE)
    assert torch.equal(seen, torch.cat([first, first, second]))
    assert torch.equal(time, torch.cat([info.t, info.t, info.t_plus]))
    assert torch.equal(y, torch.cat([cond, uncond, cond]))

    def epsilon(x_t, t, y):
        return 0.5 * x_t + 2.0 * t.view(-1, 1, 1) / 1000 + y.view(-1, 1, 1)

    guided = epsilon(first, info.t, uncond) + 7.5 * (epsilon(first, info.t, cond) - epsilon(first, info.t, uncond))
    g = (1 - TABLE[info.t]).view(-1, 1, 1) * (guided - epsilon(second, info.t_plus, cond))
    torch.testing.assert_close(info.grad, g)
    loss.backward()
    torch.testing.assert_close(x.grad, g / 3)
    assert teacher.w.grad is None


def test_without_guidance_the_teacher_sees_two_samples():
    teacher, asd = make(teacher_dtype=torch.float16)
    loss, info = asd(torch.zeros(2, 3, requires_grad=True))
    assert teacher.calls[0][0].shape == (4, 3) and teacher.calls[0][0].dtype == torch.float16
    assert info.grad.dtype == torch.float32 and loss.requires_grad
    assert asd.state_dict() == {} and list(asd.parameters()) == []


def test_algorithm_1_sends_the_gradient_through_the_teacher():
    teacher, asd = make(mode="mse_through")
    x, noise = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    t, t_plus = torch.tensor([100, 500]), torch.tensor([110, 550])
    loss, _ = asd(x, noise=noise, t=t, t_plus=t_plus)
    first, second = ops.add_noise_pair(x, noise, t, t_plus, alphas_cumprod=TABLE)
    difference = 0.5 * (first - second) + ((t - t_plus) / 1000).view(-1, 1, 1)
    expected = difference.square().mean()
    torch.testing.assert_close(loss, expected)
    got, wanted = (torch.autograd.grad(v, x, retain_graph=True)[0] for v in (loss, expected))
    torch.testing.assert_close(got, wanted)
    loss.backward()
    assert teacher.w.grad is not None and float(teacher.w.grad) != 0


def test_times_are_drawn_inside_their_range_and_anneal():
    _, asd = make(min_percent=(0.5, 0.02), max_percent=(0.98, 0.5))
    assert asd.time_range(0) == (500, 980) and asd.time_range(1) == (20, 500) and asd.time_range(7) == (20, 500)
    g = torch.Generator().manual_seed(0)
    t, t_plus = asd.draw(4000, torch.device("cpu"), progress=1, generator=g)
    assert int(t.min()) == 20 and int(t.max()) == 500
    assert bool((t_plus >= t).all()) and 0 < int((t_plus - t).max()) <= 48
    again = asd.draw(4000, torch.device("cpu"), progress=1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(t, again[0]) and torch.equal(t_plus, again[1])
    shared, _ = make(shared_time=True)[1].draw(5, torch.device("cpu"))
    assert len(shared) == 5 and len(shared.unique()) == 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_diffusers_unet(kind):
    diffusers = oracle("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=8, attention_head_dim=4,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind)
    asd = nn.AsynchronousScoreDistillation(unet, scheduler, guidance_scale=3.0, weight="uniform")
    assert asd.prediction_type == kind
    x, noise = torch.randn(2, 4, 8, 8, requires_grad=True), torch.randn(2, 4, 8, 8)
    text = torch.randn(2, 5, 8)
    conditions = {"encoder_hidden_states": text}, {"encoder_hidden_states": torch.zeros_like(text)}
    loss, info = asd(x, *conditions, noise=noise, generator=torch.Generator().manual_seed(0))

    def epsilon(t, condition):
        with torch.no_grad():
            x_t = scheduler.add_noise(x.detach(), noise, t)
            out = unet(x_t, t, **condition).sample
            a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
            return out if kind == "epsilon" else a.sqrt() * out + (1 - a).sqrt() * x_t

    guided = epsilon(info.t, conditions[1])
    guided = guided + 3.0 * (epsilon(info.t, conditions[0]) - guided)
    expected = guided - epsilon(info.t_plus, conditions[0])
    torch.testing.assert_close(info.grad, expected, rtol=1e-4, atol=1e-4)
    loss.backward()
    torch.testing.assert_close(x.grad, info.grad / 2)
    assert all(p.grad is None for p in unet.parameters())


def test_a_diffusers_flow_scheduler():
    diffusers = oracle("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    seen = []

    def teacher(x, t):
        seen.append(t)
        return (torch.tanh(x),)  # a transformer called with return_dict=False

    asd = nn.AsynchronousScoreDistillation(teacher, scheduler, weight="uniform")
    x, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    _, info = asd(x, noise=noise, t=torch.tensor([400, 900]), t_plus=torch.tensor([430, 980]))
    sigma = scheduler.sigmas.flip(0)[torch.cat([info.t, info.t_plus])].view(4, 1, 1)
    torch.testing.assert_close(seen[0], sigma.flatten() * 1000)
    x_t = (1 - sigma) * x.repeat(2, 1, 1) + sigma * noise.repeat(2, 1, 1)
    epsilon = x_t + (1 - sigma) * torch.tanh(x_t)
    torch.testing.assert_close(info.grad, epsilon[:2] - epsilon[2:], rtol=1e-4, atol=1e-5)
    scheduler.set_timesteps(20)
    with pytest.raises(ValueError, match="set_timesteps was not called"):
        nn.AsynchronousScoreDistillation(teacher, scheduler)


@pytest.mark.parametrize("options,error,message", [
    (dict(), ValueError, "give one of scheduler, alphas_cumprod and sigmas"),
    (dict(alphas_cumprod=TABLE, sigmas=TABLE), ValueError, "give one of"),
    (dict(scheduler=object()), TypeError, "scheduler must have alphas_cumprod or sigmas, got object"),
    (dict(sigmas=TABLE), ValueError, "sigmas must ascend"),
    (dict(alphas_cumprod=TABLE[:1]), ValueError, "two times or more"),
    (dict(alphas_cumprod=TABLE, min_percent=2), ValueError, r"min_percent must be a number in \[0, 1\]"),
    (dict(alphas_cumprod=TABLE, prediction_type="v"), ValueError, "prediction_type must be one of"),
    (dict(alphas_cumprod=TABLE, mode="mse"), ValueError, "mode must be one of"),
    (dict(alphas_cumprod=TABLE, plus_ratio=-1), ValueError, "plus_ratio must be >= 0"),
])  # fmt: skip
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        nn.AsynchronousScoreDistillation(lambda x, t: x, **options)


def test_bad_calls_are_refused():
    with pytest.raises(TypeError, match="teacher must be callable, got int"):
        nn.AsynchronousScoreDistillation(3, alphas_cumprod=TABLE)
    _, asd = make(guidance_scale=2.0)
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"uncond is needed with guidance_scale=2\.0"):
        asd(x, {"y": torch.zeros(2)})
    with pytest.raises(ValueError, match="give both of t and t_plus, or neither"):
        make()[1](x, t=torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="x must be a"):
        make()[1]([1.0])
    for wrong in (lambda x, t: x[:1], lambda x, t: "no"):
        with pytest.raises(ValueError, match=r"the teacher must return a tensor of shape \[4, 3\], got"):
            nn.AsynchronousScoreDistillation(wrong, alphas_cumprod=TABLE)(x)
