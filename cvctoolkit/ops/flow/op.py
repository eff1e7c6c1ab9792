"""Flow matching: Euler steps with classifier-free guidance and with masked (partial) guidance."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._backend import Backend
from cvctoolkit._library import define_op, names_itself
from cvctoolkit._native import kernels as _native
from cvctoolkit.ops.flow import arguments, reference
from cvctoolkit.ops.flow import backward as _gradients

VELOCITIES = ("noise_minus_data", "data_minus_noise")
MODES = ("literal", "velocity", "x0", "replace")
_MODE_CODES = {name: code for code, name in enumerate(("plain", *MODES))}

guidance_weights = _gradients.guidance_weights


# --- operators --------------------------------------------------------------------------------------------------------


def _check_batch(op: str, batch_index: Tensor | None, batch_size: int) -> None:
    arguments.check_rows(op, "batch_index", batch_index, 0, batch_size or arguments.MOST_SAMPLES)


def _check_step(op: str, known: Tensor | None, target: Tensor | None, batch_index: Tensor | None, size: int) -> None:
    if known is not None and target is not None:
        arguments.check_rows(op, "index_map", known, -1, target.shape[0])
    _check_batch(op, batch_index, size)


def _step_op_name(target: Tensor | None) -> str:
    return "flow_step" if target is None else "masked_flow_step"


def _native_step(x: Tensor, v_cond: Tensor, v_uncond: Any, target: Any, known: Any, *rest: Any) -> Tensor:
    *middle, mode, batch_size = rest
    out, fault = _native.flow_step(x, v_cond, v_uncond, target, known, *middle, _MODE_CODES[mode], batch_size)
    if fault:
        _check_step(_step_op_name(target), known, target, rest[1], batch_size)
    return out


def _reference_step(x: Tensor, v_cond: Tensor, v_uncond: Any, target: Any, known: Any, *rest: Any) -> Tensor:
    _check_step(_step_op_name(target), known, target, rest[1], rest[-1])
    return reference.flow_step(x, v_cond, v_uncond, target, known, *rest)


def _native_cfg(cond: Tensor, uncond: Tensor, *rest: Any) -> Tensor:
    out, fault = _native.cfg_combine(cond, uncond, *rest)
    if fault:
        _check_batch("cfg_combine", rest[-2], rest[-1])
    return out


def _reference_cfg(cond: Tensor, uncond: Tensor, *rest: Any) -> Tensor:
    _check_batch("cfg_combine", rest[-2], rest[-1])
    return reference.cfg_combine(cond, uncond, *rest)


def _triton(name: str) -> Any:
    return lambda *args: getattr(importlib.import_module("cvctoolkit.ops.flow.triton"), name)(*args)


def _no_float64(*args: Any) -> Any:
    if any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in args):
        yield "computes in float32, got float64"


def _fake(like: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _cfg_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    cond, uncond, scale, original, rescale, batch_index, batch_size, _ = inputs
    ctx.numbers = scale, original, rescale
    ctx.batch_size = batch_size
    ctx.save_for_backward(cond, uncond, batch_index)


def _cfg_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cond, uncond, batch_index = ctx.saved_tensors
    wide = grad if grad.dtype == torch.float64 else grad.float()
    scale, original, rescale = ctx.numbers
    found = _gradients.cfg_gradients(wide, cond, uncond, scale, original, rescale, batch_index, ctx.batch_size)
    return *found, None, None, None, None, None


_cfg_combine = define_op(
    "cfg_combine",
    "(Tensor cond, Tensor uncond, float guidance_scale, bool original, float rescale, Tensor? batch_index,"
    " int batch_size) -> Tensor",
    fake=_fake,
    reference=_reference_cfg,
    native=Backend(_native_cfg, kernels=("cfg_combine",)),
    triton=Backend(_triton("cfg_combine"), _no_float64),
    setup_context=_cfg_context,
    backward=_cfg_backward,
)


def _step_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.numbers = inputs[9:-1]
    ctx.save_for_backward(*inputs[:9])


def _step_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    d_x, d_cond, d_uncond, d_target, d_noise = _gradients.step_gradients(grad, *ctx.saved_tensors, *ctx.numbers)
    return d_x, d_cond, d_uncond, d_target, None, d_noise, *[None] * 12


_flow_step = define_op(
    "flow_step",
    "(Tensor x, Tensor v_cond, Tensor? v_uncond, Tensor? target, Tensor? known, Tensor? noise, Tensor? batch_index,"
    " Tensor? sigma_table, Tensor? sigma_next_table, float sigma, float sigma_next, float guidance_scale,"
    " bool original, float rescale, bool towards_data, float strength, str mode, int batch_size) -> Tensor",
    fake=_fake,
    reference=_reference_step,
    native=Backend(_native_step, kernels=("flow_step",)),
    triton=Backend(_triton("flow_step"), _no_float64),
    setup_context=_step_context,
    backward=_step_backward,
)


# --- public functions -------------------------------------------------------------------------------------------------


def cfg_combine(
    cond: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    *,
    formulation: str = "diffusers",
    rescale: float = 0.0,
    batch_index: Tensor | None = None,
    batch_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Classifier-free guidance of two predictions, with guidance rescale.

    ``"diffusers"``: u + s·(c − u), no guidance at s = 1. ``"original"`` (the formula of the paper, TRELLIS, and
    diffusers' ``use_original_formulation``): c + s·(c − u), no guidance at s = 0. So s_diffusers = 1 + s_original.

    Args:
        cond: ``[B, ...]`` or ``[N, C]`` float, the conditional prediction c. Differentiable.
        uncond: The unconditional prediction u, same shape, any float dtype; None only without guidance, and then
            ``cond`` itself is returned. Differentiable.
        guidance_scale: s.
        formulation: ``"diffusers"`` or ``"original"``.
        rescale: φ in [0, 1]: the result is multiplied by φ·std(c)/std(result) + 1 − φ, per sample: an index of dim 0,
            or a value of ``batch_index``. A sample whose result is constant is left alone.
        batch_index: ``[N]`` int32 or int64, the sample of every row of a sparse set ``[N, C]``; needed for ``rescale``
            of any two-dimensional tensor. On CUDA values out of range are clamped.
        batch_size: The number of samples in ``batch_index``; None: its largest value + 1, which on CUDA synchronises.
        backend: ``"native"``, ``"triton"``, ``"reference"``; None picks the fastest.

    Returns:
        Shape and dtype of ``cond``; computed in float32 (float64 if any input is). NaNs propagate, with ``rescale`` to
        their whole sample. Deterministic.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or ``backend`` do not fit, a number is out of its range, ``uncond`` is
            missing, or (on a CPU) ``batch_index`` is out of range.

    Source: Ho & Salimans, Classifier-Free Diffusion Guidance, Eq. 6; Lin et al., Common Diffusion Noise Schedules and
    Sample Steps Are Flawed, Sec. 3.4.
    """
    op = "cfg_combine"
    cond = arguments.state(op, "cond", cond)
    names = "uncond", "formulation", "rescale"
    uncond, scale, original, rescale = arguments.guidance(op, uncond, cond, guidance_scale, formulation, rescale, names)
    batch_index, size = arguments.samples(op, cond, batch_index, batch_size, rescale, "rescale", False)
    if uncond is None:
        return cond
    return _cfg_combine(cond, uncond, scale, original, rescale, batch_index if rescale else None, size, backend=backend)


def _step(
    op: str,
    x: Any,
    v_cond: Any,
    v_uncond: Any,
    sigma: Any,
    sigma_next: Any,
    guidance: tuple[Any, Any, Any, Any],
    samples: tuple[Any, Any],
    masked: tuple[Any, ...] | None,
    backend: str | None,
) -> Tensor:
    x = arguments.state(op, "x", x)
    v_cond = arguments.alike(op, "v_cond", v_cond, x)
    scale, formulation, rescale, velocity = guidance
    names = "v_uncond", "cfg_formulation", "guidance_rescale"
    v_uncond, scale, original, rescale = arguments.guidance(op, v_uncond, x, scale, formulation, rescale, names)
    towards_data = _checks.choice(op, "velocity", velocity, VELOCITIES) == "data_minus_noise"
    target = known = noise = None
    strength, mode, validate = 0.0, "plain", False
    if masked is not None:
        target, known, noise, strength, mode, validate = masked
        target, known = arguments.known(op, known, target, x, validate)
        _checks.choice(op, "mode", mode, MODES)
        strength = _checks.number(op, "strength", strength, at_least=0)
        if mode != "literal" and strength > 1:
            raise ValueError(f"{op}: strength must be in [0, 1] for mode {mode!r}, got {strength}")
    batch_index, size = arguments.samples(op, x, *samples, rescale, "guidance_rescale", validate)
    table, table_next, number, number_next, size = arguments.levels(op, sigma, sigma_next, x, batch_index, size)
    if mode == "replace":
        if noise is not None:
            noise = arguments.alike(op, "noise", noise, x)
        elif table_next is not None or number_next > 0:
            raise ValueError(f"{op}: mode 'replace' needs noise unless sigma_next is 0, got None")
    elif noise is not None:
        raise ValueError(f"{op}: noise is used by mode 'replace' only, got mode {mode!r}")
    if mode == "x0" and table is None and number == 0:
        raise ValueError(f"{op}: mode 'x0' needs sigma > 0, got 0")
    per_sample = rescale > 0 or any(t is not None and t.numel() > 1 for t in (table, table_next))
    return _flow_step(
        x, v_cond, v_uncond, target, known, noise, batch_index if per_sample else None, table, table_next,
        number, number_next, scale, original, rescale, towards_data, strength, mode, size, backend=backend,
    )  # fmt: skip


def flow_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    *,
    guidance_scale: float = 1.0,
    cfg_formulation: str = "diffusers",
    guidance_rescale: float = 0.0,
    velocity: str = "noise_minus_data",
    batch_index: Tensor | None = None,
    batch_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """One Euler step of a flow-matching model, guidance included: x + (σ′ − σ)·v.

    The noise level σ is 1 for noise and 0 for data, x_σ = (1 − σ)·x₀ + σ·noise, whichever way the model counts. This
    is the step of diffusers' ``FlowMatchEulerDiscreteScheduler``, x + (σ′ − σ)·v, and of TRELLIS' sampler,
    x − (t − t′)·v with t = σ; for a model that predicts data − noise (rectified flow, t = 1 − σ) say so in
    ``velocity``. A step to σ′ = 0 gives the predicted data x̂₀, a step to σ′ = 1 the predicted noise.

    Args:
        x: ``[B, ...]`` or ``[N, C]`` float, the state at σ. Differentiable.
        v_cond: The velocity predicted with the condition, same shape, any float dtype. Differentiable.
        v_uncond: That without, or None without guidance. Differentiable.
        sigma: σ in [0, 1]: a number, or a float32/float64 tensor [] or ``[B]`` (one per sample; on x's device, or one
            value on the CPU). Not differentiable.
        sigma_next: σ′, likewise; it may exceed σ (inversion).
        guidance_scale: See `cfg_combine`.
        cfg_formulation: ``formulation`` of `cfg_combine`.
        guidance_rescale: ``rescale`` of `cfg_combine`.
        velocity: ``"noise_minus_data"`` or ``"data_minus_noise"``: what the model predicts.
        batch_index: See `cfg_combine`; also for σ per sample.
        batch_size: See `cfg_combine`.
        backend: ``"native"``, ``"triton"``, ``"reference"``; None picks the fastest.

    Returns:
        The state at σ′, shape and dtype of ``x``; computed in float32 (float64 if any input is). NaNs propagate.
        Deterministic.

    Raises:
        TypeError: Wrong argument types.
        ValueError: As `cfg_combine`, or σ does not fit.

    Source: Lipman et al., Flow Matching for Generative Modeling; Liu et al., Flow Straight and Fast.
    """
    guidance = guidance_scale, cfg_formulation, guidance_rescale, velocity
    samples = batch_index, batch_size
    return _step("flow_step", x, v_cond, v_uncond, sigma, sigma_next, guidance, samples, None, backend)


@names_itself
def masked_flow_step(
    x: Tensor,
    v_cond: Tensor,
    v_uncond: Tensor | None,
    sigma: float | Tensor,
    sigma_next: float | Tensor,
    target: Tensor,
    index_map_or_mask: Tensor,
    strength: float,
    *,
    mode: str = "literal",
    noise: Tensor | None = None,
    guidance_scale: float = 1.0,
    cfg_formulation: str = "diffusers",
    guidance_rescale: float = 0.0,
    velocity: str = "noise_minus_data",
    batch_index: Tensor | None = None,
    batch_size: int | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """A flow step that pulls the known cells M towards a given target: completion of a partial shape.

    With v the guided velocity, Δ = M ⊙ (x − target) and λ the strength:

    - ``"literal"``: x − ((σ − σ′)·v + λΔ), Eq. 9 to the letter, ε being the scheduler's step. λΔ is not scaled by the
      step: its sum grows with the number of steps, it pulls a noisy state towards clean data, and λ > 2 diverges.
    - ``"velocity"``: x − (σ − σ′)·(v + λΔ): scaled by the step, and weak.
    - ``"x0"``: x̂₀ = x − σ·v is moved by λ towards the target, and the step taken towards that: the velocity becomes
      v + (λ/σ)·M ⊙ (x̂₀ − target). Consistent with the path at every σ, whatever the number of steps.
    - ``"replace"``: after the step the state is blended by λ with the noised target (1 − σ′)·target + σ′·noise
      (RePaint at λ = 1).

    Free cells take the plain `flow_step`, whatever the target holds there.

    Args:
        x: ``[B, ...]`` or ``[N, C]`` float, the state at σ. Differentiable.
        v_cond: See `flow_step`.
        v_uncond: See `flow_step`.
        sigma: See `flow_step`; for ``"x0"`` above 0 (a zero in a tensor gives the plain step).
        sigma_next: See `flow_step`.
        target: The clean data of the known cells, in the model's normalised latents, any float dtype: ``[M, C]`` rows
            with an index map, or the shape of x with a mask. Differentiable.
        index_map_or_mask: ``[N]`` int32 or int64, the target's row of every row of x, -1 where it is free; or a bool
            mask, True where known, that broadcasts to x (``[N]`` counts rows, ``[B, 1, ...]`` serves all channels).
        strength: λ: finite and ≥ 0 in ``"literal"``, in [0, 1] in the other modes.
        mode: ``"literal"``, ``"velocity"``, ``"x0"`` or ``"replace"``.
        noise: For ``"replace"``: the trajectory's noise, shape of x; may be None for σ′ = 0. Differentiable.
        guidance_scale: See `cfg_combine`.
        cfg_formulation: See `flow_step`.
        guidance_rescale: See `flow_step`.
        velocity: See `flow_step`.
        batch_index: See `flow_step`.
        batch_size: See `cfg_combine`.
        validate: Check index map and batch index on CUDA too, which synchronises; else an index out of range counts
            there as -1.
        backend: ``"native"``, ``"triton"``, ``"reference"``; None picks the fastest.

    Returns:
        The state at σ′, shape and dtype of ``x``; computed in float32 (float64 if any input is). NaNs propagate, those
        of the target at known cells only. Deterministic.

    Raises:
        TypeError: Wrong argument types.
        ValueError: As `flow_step`; λ out of the mode's range, ``noise`` missing or not used; on a CPU, or with
            ``validate``, an index out of range.

    Source: Consistent3DGen, Eq. 4, 8 and 9.
    """
    guidance = guidance_scale, cfg_formulation, guidance_rescale, velocity
    masked = target, index_map_or_mask, noise, strength, mode, validate
    samples = batch_index, batch_size
    return _step("masked_flow_step", x, v_cond, v_uncond, sigma, sigma_next, guidance, samples, masked, backend)
