"""Score distillation in one linear form, and the noised samples that its teacher sees."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._backend import Backend
from cvctoolkit._library import define_op, names_itself, once_differentiable
from cvctoolkit._native import kernels as _native
from cvctoolkit.ops.distillation import arguments, reference
from cvctoolkit.ops.distillation.arguments import MAX_PREDICTIONS
from cvctoolkit.ops.distillation.reference import NONFINITE, PATHS, REDUCTIONS, TINY

_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class DistillationInfo(NamedTuple):
    """What a distillation loss knows besides its value; tensors on the device of x, none of them differentiable.

    Attributes:
        grad: The gradient g, shape and dtype of x, before the reduction's factor and the upstream gradient.
        grad_norm: ``[]`` float32 (float64 for float64), ‖g‖₂ over the whole batch, before it is normalised.
        nonfinite: ``[]`` int64, how many elements of g were NaN or infinite.
        t: ``[B]``, the times drawn; None where they were given.
        t_plus: ``[B]``, the later times drawn; None where they were given.
    """

    grad: Tensor
    grad_norm: Tensor
    nonfinite: Tensor
    t: Tensor | None = None
    t_plus: Tensor | None = None


# --- operators --------------------------------------------------------------------------------------------------------


def _checked(op: str, run: Any, t_at: int, table_at: int, path_at: int) -> Any:
    """Checks times where that costs nothing: on a CPU, inside the operator so that it breaks no graph."""

    def body(*args: Any) -> Any:
        if args[0].device.type == "cpu":
            for name, at in (("t", t_at), ("t_plus", t_at + 1)):
                arguments.check_times(op, name, args[at], args[table_at], PATHS[args[path_at]])
        return run(*args)

    return body


def _triton(name: str) -> Any:
    return lambda *args: getattr(importlib.import_module("cvctoolkit.ops.distillation.triton"), name)(*args)


def _no_float64(x: Tensor, *_: Any) -> Sequence[str]:
    return ["computes in float32, got float64"] if x.dtype == torch.float64 else ()


def _noised_batch_native(*args: Any) -> Tensor:
    return _native.noised_batch(*args[:-1], _TYPES.index(args[-1]))


def _noised_batch_fake(x: Tensor, noise: Tensor, t: Tensor, t_plus: Tensor | None, *rest: Any) -> Tensor:
    _, _, copies, dtype = rest
    return x.new_empty((copies + (t_plus is not None), *x.shape), dtype=dtype)


def _noised_batch_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, noise, t, t_plus, table, path, copies, _, _ = inputs
    ctx.path, ctx.copies, ctx.dtypes = path, copies, (x.dtype, noise.dtype)
    ctx.inner = reference.compute_dtype(x)
    ctx.save_for_backward(t, t_plus, table)


def _noised_batch_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    t, t_plus, table = ctx.saved_tensors
    groups = [(t, grad[: ctx.copies].to(ctx.inner).sum(0))]
    if t_plus is not None:
        groups.append((t_plus, grad[ctx.copies].to(ctx.inner)))
    out: list[Tensor | None] = []
    for which, dtype in enumerate(ctx.dtypes):
        total = None
        for time, g in groups:
            factor = reference.noise_level(time, table, PATHS[ctx.path], ctx.inner)[which]
            part = factor.reshape(-1, *[1] * (g.dim() - 1)) * g
            total = part if total is None else total + part
        out.append(total.to(dtype) if ctx.needs_input_grad[which] and total is not None else None)
    return (*out, *[None] * 6)


_noised_batch = define_op(
    "noised_batch",
    "(Tensor x, Tensor noise, Tensor t, Tensor? t_plus, Tensor? table, int path, int copies, ScalarType dtype)"
    " -> Tensor",
    fake=_noised_batch_fake,
    reference=_checked("noised_batch", reference.noised_batch, 2, 4, 5),
    native=Backend(_checked("noised_batch", _noised_batch_native, 2, 4, 5), kernels=("noised_batch",)),
    triton=Backend(_triton("noised_batch"), _no_float64),
    setup_context=_noised_batch_context,
    backward=_noised_batch_backward,
)


_scaled_gradient = define_op(
    "scaled_gradient",
    "(Tensor gradient, Tensor upstream, float divisor) -> Tensor",
    fake=lambda gradient, upstream, divisor: torch.empty_like(gradient, memory_format=torch.contiguous_format),
    reference=reference.scaled_gradient,
    native=Backend(_native.scaled_gradient, kernels=("scaled_gradient",)),
    triton=Backend(_triton("scaled_gradient"), _no_float64),
)


def _score_distillation_native(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *rest, clamp, nonfinite, normalize, reduction = args
    predictions = [p for p in rest[:MAX_PREDICTIONS] if p is not None]
    tiny = TINY if normalize else 0.0
    return _native.score_distillation(
        x, predictions, *rest[MAX_PREDICTIONS:], clamp, NONFINITE[nonfinite] == "zero", tiny, reduction
    )


def _raising(run: Any) -> Any:
    """Raises on what is not finite if asked: the one case that synchronises on CUDA."""

    def body(*args: Any) -> Any:
        out = run(*args)
        if NONFINITE[args[-3]] == "raise" and int(out[3]):
            raise ValueError(
                f"score_distillation: the gradient must be finite, got {int(out[3])} NaN or infinite elements"
            )
        return out

    return body


def _score_distillation_fake(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inner = reference.compute_dtype(x)
    loss = x.new_empty(x.shape) if REDUCTIONS[args[-1]] == "none" else x.new_empty((), dtype=inner)
    return loss, x.new_empty(x.shape), x.new_empty((), dtype=inner), x.new_empty((), dtype=torch.int64)


class _Surrogate(torch.autograd.Function):
    """The loss, with a gradient given for x that is not its derivative.

    A function of its own rather than the operator's formula: for a schema as long, torch.library's autograd spends
    half a millisecond per call on looking for defaults.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, gradient: Tensor, divisor: float) -> Tensor:
        ctx.divisor = divisor
        ctx.save_for_backward(gradient)
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is held fixed
            (upstream,) = once_differentiable("score_distillation", upstream)
            grad = reference.scaled_gradient(gradient, upstream, ctx.divisor)
        elif upstream.dim():
            grad = gradient * upstream
        else:
            grad = _scaled_gradient(gradient, upstream, ctx.divisor)
        return grad, None, None, None


_PREDICTIONS = ", ".join(f"Tensor? prediction{k}" for k in range(MAX_PREDICTIONS))
_TABLE_AT = 1 + MAX_PREDICTIONS + 5
_times_checked = {"t_at": _TABLE_AT - 2, "table_at": _TABLE_AT, "path_at": _TABLE_AT + 8}

# Not differentiable: see `_Surrogate`.
_score_distillation = define_op(
    "score_distillation",
    f"(Tensor x, {_PREDICTIONS}, Tensor? noise, Tensor? x_t, Tensor? x_t_plus, Tensor? t, Tensor? t_plus, "
    "Tensor? table, Tensor? weight, float[] coefficients, int[] kinds, bool[] later, float noise_coefficient, "
    "float weight_scale, int weight_kind, int path, float clamp, int nonfinite, bool normalize, int reduction)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_score_distillation_fake,
    reference=_raising(_checked("score_distillation", reference.score_distillation, **_times_checked)),
    native=Backend(
        _raising(_checked("score_distillation", _score_distillation_native, **_times_checked)),
        kernels=("score_distillation",),
    ),
    triton=Backend(_raising(_triton("score_distillation")), lambda *args: _triton_reasons(*args)),
)


def _triton_reasons(x: Tensor, *args: Any) -> Sequence[str]:
    if x.dtype == torch.float64:
        return _no_float64(x)
    if any(p is not None for p in args[4:MAX_PREDICTIONS]):
        return ["takes up to four predictions"]
    return ()


# --- public functions -------------------------------------------------------------------------------------------------


def noised_batch(
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    t_plus: Tensor | None = None,
    *,
    alphas_cumprod: Tensor | None = None,
    sigmas: Tensor | None = None,
    path: str | None = None,
    copies: int = 1,
    dtype: torch.dtype | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The batch that a teacher sees: x noised to t, ``copies`` times over, and with the same noise to t⁺; in one pass.

    With ``copies=2`` (conditional and unconditional) and ``dtype=torch.float16`` it reads x and the noise once and
    writes the teacher's input, with nothing in between.

    Args:
        x: ``[B, ...]`` float, clean samples, of any rank from two on. Differentiable.
        noise: Shape of x, float. Differentiable.
        t: ``[B]`` or ``[1]``, int32/int64 indices into the table; without ``sigmas``, on the paths ``"edm"`` and
            ``"flow"``, float32/float64 noise levels σ themselves.
        t_plus: Later times, as t; None: none.
        alphas_cumprod: ``[T]`` float32/float64 in [0, 1], ᾱ; for the path ``"vp"``.
        sigmas: ``[T]`` float32/float64 ≥ 0 (``"flow"``: in [0, 1]).
        path: ``"vp"``: √ᾱ·x + √(1−ᾱ)·noise; ``"edm"``: x + σ·noise; ``"flow"``: (1−σ)·x + σ·noise. None: ``"vp"``
            with ``alphas_cumprod``.
        copies: How often the sample at t is repeated.
        dtype: Of the result; None: that of x.
        validate: On CUDA, check the times, which synchronises; otherwise those outside the table are clamped. On a CPU
            they are always checked.
        backend: ``"native"``, ``"triton"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[copies, B, ...]``, with t_plus ``[copies + 1, B, ...]``. Computed in float32 (float64 for float64), whatever
        the dtypes. Deterministic.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices, tables, path or times do not fit.
    """
    op = "noised_batch"
    x = arguments.sample(op, x).contiguous()
    noise = arguments.like(op, "noise", noise, x)
    table, path = arguments.noise_table(op, x, alphas_cumprod, sigmas, path)
    t = arguments.time(op, "t", t, x, table, validate, path)
    if t_plus is not None:
        t_plus = arguments.time(op, "t_plus", t_plus, x, table, validate, path)
    copies = _checks.integer(op, "copies", copies, at_least=1)
    dtype = x.dtype if dtype is None else dtype
    if dtype not in _checks.FLOATING:
        raise ValueError(f"{op}: dtype must be a floating dtype of 16 bits or more, got {dtype}")
    return _noised_batch(x, noise, t, t_plus, table, PATHS.index(path), copies, dtype, backend=backend)


@names_itself
def add_noise_pair(
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    t_plus: Tensor,
    *,
    alphas_cumprod: Tensor | None = None,
    sigmas: Tensor | None = None,
    path: str | None = None,
    dtype: torch.dtype | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds the same noise at two times, reading x and the noise once.

    Args:
        x: ``[B, ...]`` float, clean samples, of any rank from two on. Differentiable.
        noise: Shape of x, float. Differentiable.
        t: See `noised_batch`.
        t_plus: As t.
        alphas_cumprod: See `noised_batch`.
        sigmas: See `noised_batch`.
        path: See `noised_batch`.
        dtype: Of the result; None: that of x.
        validate: See `noised_batch`.
        backend: ``"native"``, ``"triton"``, ``"reference"``; None picks the fastest.

    Returns:
        (x_t, x_t_plus), shape of x: halves of one buffer.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices, tables, path or times do not fit.

    Source: AlignCVC, Eq. 1 (the same noise at t and t + Δt).
    """
    if t_plus is None:
        raise TypeError("add_noise_pair: t_plus must be a torch.Tensor, got NoneType")
    pair = noised_batch(
        x, noise, t, t_plus, alphas_cumprod=alphas_cumprod, sigmas=sigmas, path=path, dtype=dtype, validate=validate,
        backend=backend,
    )  # fmt: skip
    return pair[0], pair[1]


def asd_timesteps(
    t: Tensor,
    *,
    min_step: int,
    plus_ratio: float = 0.1,
    num_train_timesteps: int = 1000,
    random: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The later times of asynchronous score distillation: t⁺ = t + ⌊u·plus_ratio·(t − min_step)⌋, inside the table.

    Args:
        t: ``[...]`` int32/int64, in [0, num_train_timesteps).
        min_step: The earliest time that is drawn.
        plus_ratio: Δt as a fraction of t − min_step, ≥ 0.
        num_train_timesteps: Length T of the table; Δt is clamped to [0, T − 1 − t] and t⁺ to [1, T − 1].
        random: Whether u is uniform in [0, 1) for each sample (as the published configurations ask for); else u = 1.
        generator: For u; None: the global one of the device.

    Returns:
        ``[...]``, dtype of t.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Dtype or numbers do not fit.

    Source: ScaleDreamer (Ma et al., 2024), Sec. 3.3 and its released code.
    """
    op = "asd_timesteps"
    _checks.tensor(op, "t", t, "...", _checks.INTEGRAL)
    ratio = _checks.number(op, "plus_ratio", plus_ratio, at_least=0)
    last = _checks.integer(op, "num_train_timesteps", num_train_timesteps, at_least=2) - 1
    first = _checks.integer(op, "min_step", min_step, at_least=0, at_most=last)
    delta = torch.minimum((ratio * (t - first)).clamp_min(0), (last - t).clamp_min(0))
    if random:
        delta = delta * torch.rand(t.shape, generator=generator, device=t.device)
    return (t + delta.to(t.dtype)).clamp(1, last)


def score_distillation(
    x: Tensor,
    predictions: Sequence[Tensor],
    coefficients: Sequence[float],
    weight: str | float | Tensor,
    *,
    noise: Tensor | None = None,
    noise_coefficient: float = 0.0,
    t: Tensor | None = None,
    t_plus: Tensor | None = None,
    at_t_plus: Sequence[bool] | None = None,
    alphas_cumprod: Tensor | None = None,
    sigmas: Tensor | None = None,
    path: str | None = None,
    prediction_type: str | Sequence[str] = "epsilon",
    x_t: Tensor | None = None,
    x_t_plus: Tensor | None = None,
    clamp: float | None = None,
    normalize: bool = False,
    nonfinite: str = "propagate",
    reduction: str = "batch_sum",
    validate: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, DistillationInfo]:
    """The linear form behind every score distillation: a loss whose gradient is g = w(t)·(Σₖ aₖ·εₖ + b·noise).

    The gradient with respect to x is g/B (``"batch_sum"``), g/numel (``"mean"``) or g (``"none"``), times the upstream
    gradient, to the last bit that x's dtype holds: there is no target x − g to lose it in. The value is ½‖g‖² over the
    same divisor (½g² per element for ``"none"``), what the published codes report. Nothing else is differentiable.

    Args:
        x: ``[B, ...]`` float, what is optimised, of any rank from two on (views are part of B). Only its gradient
            matters, its values are not read.
        predictions: One to eight tensors of the shape of x, any float dtype. Not differentiable, and not read where
            their coefficient is 0.
        coefficients: A number aₖ per prediction.
        weight: w(t): ``"uniform"`` 1, ``"sds"`` 1 − ᾱ, ``"fantasia3d"`` √ᾱ·(1 − ᾱ) (on other paths, ᾱ is that of the
            variance-preserving process with the same signal-to-noise ratio), a number, or a float tensor ``[B]`` or
            ``[1]``.
        noise: Shape of x, the noise in x_t.
        noise_coefficient: b.
        t: ``[B]`` or ``[1]``, see `noised_batch`; for named weights and for predictions other than ``"epsilon"``.
        t_plus: As t, the time of the predictions that ``at_t_plus`` marks.
        at_t_plus: A flag per prediction: made at t_plus from x_t_plus instead of at t from x_t. None: none is.
        alphas_cumprod: See `noised_batch`.
        sigmas: See `noised_batch`.
        path: See `noised_batch`; None: ``"vp"`` with ``alphas_cumprod``, ``"flow"`` with flow predictions.
        prediction_type: ``"epsilon"``, ``"v_prediction"`` (VP: v = √ᾱ·ε − √(1−ᾱ)·x₀; EDM: its F), ``"sample"`` (x₀),
            ``"flow"`` (noise − x₀, on the flow path); one for all or one per prediction.
        x_t: Shape of x, what the teacher saw at t; for predictions other than ``"epsilon"``.
        x_t_plus: Shape of x, what the teacher saw at t_plus.
        clamp: Elements of g are clamped to ± this; None: they are not.
        normalize: Divide g by ‖g‖₂ + 1e-8 over the whole batch.
        nonfinite: NaN and infinite elements of g are counted, and ``"propagate"``, count as ``"zero"``, or ``"raise"``,
            which synchronises on CUDA. They are treated before clamping.
        reduction: ``"batch_sum"``, ``"mean"`` or ``"none"``.
        validate: See `noised_batch`.
        backend: ``"native"``, ``"triton"`` (up to four predictions), ``"reference"``; None picks the fastest.

    Returns:
        (loss, info): ``[]`` float32 (float64 for float64), or with ``"none"`` shape and dtype of x; `DistillationInfo`.
        Computed in float32 (float64 for float64), whatever the dtypes. Deterministic; never synchronises unless asked.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices, tables, times or choices do not fit; something that a weight or a
            prediction type needs is missing; or g is not finite and ``nonfinite="raise"``.

    Source: DreamFusion, Eq. 3; ProlificDreamer, Eq. 9; CSD, Eq. 7; ScaleDreamer, Eq. 8; AlignCVC, Eq. 1 and 5.
    """
    op = "score_distillation"
    given = arguments.combined(
        op, x, predictions, coefficients, weight, noise, noise_coefficient, t, t_plus, at_t_plus, alphas_cumprod,
        sigmas, path, prediction_type, x_t, x_t_plus, validate,
    )  # fmt: skip
    x, used, *rest = given
    limit = math.inf if clamp is None else _checks.number(op, "clamp", clamp, at_least=0)
    outcome = NONFINITE.index(_checks.choice(op, "nonfinite", nonfinite, NONFINITE))
    reduced = REDUCTIONS.index(_checks.choice(op, "reduction", reduction, REDUCTIONS))
    used = [*used, *[None] * (MAX_PREDICTIONS - len(used))]
    with torch.no_grad():
        normalize = _checks.flag(op, "normalize", normalize)
        loss, grad, norm, count = _score_distillation(
            x.detach(), *used, *rest, limit, outcome, normalize, reduced, backend=backend
        )
    if x.requires_grad and torch.is_grad_enabled():
        divisor = {"batch_sum": x.shape[0], "mean": x.numel(), "none": 1}[reduction]
        loss = _Surrogate.apply(x, loss, grad, float(divisor))
    return loss, DistillationInfo(grad, norm, count)
