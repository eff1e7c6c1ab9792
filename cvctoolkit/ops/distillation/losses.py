"""The named score-distillation losses: coefficients of the one linear form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._library import names_itself
from cvctoolkit.ops.distillation import arguments, reference
from cvctoolkit.ops.distillation.op import DistillationInfo, score_distillation

FORMULATIONS = ("diffusers", "original")
_MODES = ("stop_grad", "mse_through")


def _guided(
    op: str, cond: Any, uncond: Any, guidance_scale: Any, formulation: str, names: tuple[str, str]
) -> tuple[list[Any], list[float]]:
    """Predictions and coefficients of classifier-free guidance; what has no weight is left out."""
    scale = _checks.number(op, names[1], guidance_scale)
    _checks.choice(op, "cfg_formulation", formulation, FORMULATIONS)
    of_cond = scale if formulation == "diffusers" else 1 + scale
    if of_cond == 1:
        return [cond], [1.0]
    if uncond is None:
        raise ValueError(f"{op}: {names[0]} is needed with {names[1]}={guidance_scale}")
    return [cond, uncond], [of_cond, 1 - of_cond]


@names_itself
def asd_loss(
    x: Tensor,
    eps_t: Tensor,
    eps_t_plus: Tensor,
    *,
    t: Tensor | None = None,
    alphas_cumprod: Tensor | None = None,
    sigmas: Tensor | None = None,
    path: str | None = None,
    weight: str | float | Tensor | None = None,
    eps_t_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    cfg_formulation: str = "diffusers",
    prediction_type: str = "epsilon",
    x_t: Tensor | None = None,
    x_t_plus: Tensor | None = None,
    t_plus: Tensor | None = None,
    mode: str = "stop_grad",
    reduction: str | None = None,
    **options: Any,
) -> tuple[Tensor, DistillationInfo]:
    """Asynchronous score distillation: g = w(t)·(CFG(ε(x_t; t)) − ε(x_{t⁺}; t⁺)), the same noise in x_t and x_{t⁺}.

    ``mode="stop_grad"`` is Eq. 1 of AlignCVC and ScaleDreamer: g is the gradient with respect to x. Guidance applies to
    the prediction at t alone. ``mode="mse_through"`` is AlignCVC's Algorithm 1: the mean squared difference of the two
    predictions, differentiable in the predictions, so that the gradient goes through the teacher.

    Args:
        x: ``[B, ...]`` float, what is optimised; see `score_distillation`.
        eps_t: Shape of x, the teacher's conditional prediction at t.
        eps_t_plus: Shape of x, its conditional prediction at t⁺.
        t: ``[B]`` or ``[1]``; see `noised_batch`.
        alphas_cumprod: ``[T]``; see `noised_batch`.
        sigmas: ``[T]``; see `noised_batch`.
        path: See `score_distillation`.
        weight: w(t); see `score_distillation`. None: ``"sds"``, and ``"uniform"`` through the teacher (Algorithm 1 has
            no weight).
        eps_t_uncond: Shape of x, the unconditional prediction at t.
        guidance_scale: s of classifier-free guidance.
        cfg_formulation: ``"diffusers"``: ε_u + s·(ε_c − ε_u); ``"original"``: ε_c + s·(ε_c − ε_u).
        prediction_type: What the predictions are; see `score_distillation`.
        x_t: Shape of x, what the teacher saw at t; for predictions other than ``"epsilon"``.
        x_t_plus: Shape of x, what it saw at t⁺.
        t_plus: As t; for predictions other than ``"epsilon"``.
        mode: ``"stop_grad"`` or ``"mse_through"``.
        reduction: See `score_distillation`. None: ``"batch_sum"``, and ``"mean"`` through the teacher.
        **options: ``clamp``, ``normalize``, ``nonfinite``, ``validate`` and ``backend`` of `score_distillation`;
            through the teacher only ``validate``.

    Returns:
        (loss, info); see `score_distillation`. Through the teacher, the loss is the sum of g² over the divisor of the
        reduction, and ``info.grad`` is g.

    Raises:
        TypeError: Wrong argument types.
        ValueError: As `score_distillation`; or ``eps_t_uncond`` is missing.

    Source: ScaleDreamer, Eq. 8; AlignCVC, Eq. 1, Eq. 5 and Algorithm 1.
    """
    op = "asd_loss"
    through = _checks.choice(op, "mode", mode, _MODES) == "mse_through"
    guided, coefficients = _guided(
        op, eps_t, eps_t_uncond, guidance_scale, cfg_formulation, ("eps_t_uncond", "guidance_scale")
    )
    predictions, coefficients = [*guided, eps_t_plus], [*coefficients, -1.0]
    weight = ("uniform" if through else "sds") if weight is None else weight
    reduction = ("mean" if through else "batch_sum") if reduction is None else reduction
    common: dict[str, Any] = dict(
        t=t, t_plus=t_plus, at_t_plus=[*[False] * len(guided), True], alphas_cumprod=alphas_cumprod, sigmas=sigmas,
        path=path, prediction_type=prediction_type, x_t=x_t, x_t_plus=x_t_plus,
    )  # fmt: skip
    if not through:
        return score_distillation(x, predictions, coefficients, weight, reduction=reduction, **common, **options)
    validate = options.pop("validate", False)
    if options:
        raise ValueError(f"{op}: {', '.join(options)} cannot be given with mode='mse_through'")
    return _mse_through(op, x, predictions, coefficients, weight, reduction, common, validate)


def _mse_through(
    op: str, x: Tensor, predictions: list[Tensor], coefficients: list[float], weight: Any, reduction: str,
    common: dict[str, Any], validate: bool,
) -> tuple[Tensor, DistillationInfo]:  # fmt: skip
    """The squared difference of predictions, by torch operators that autograd differentiates."""
    _checks.choice(op, "reduction", reduction, reference.REDUCTIONS)
    given = arguments.combined(
        op, x, predictions, coefficients, weight, noise=None, noise_coefficient=0.0, validate=validate, **common
    )
    x, used, noise, x_t, x_t_plus, t, t_plus, table, tensor_weight, *numbers = given
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        for name, time in (("t", t), ("t_plus", t_plus)):
            arguments.check_times(op, name, time, table, reference.PATHS[numbers[-1]])
    difference = reference.combination(
        x, used, noise, x_t, x_t_plus, t, t_plus, table, tensor_weight, *numbers
    )  # fmt: skip
    squares = difference.square()
    if reduction == "none":
        loss = squares.to(x.dtype)
    else:
        loss = squares.sum() / max(x.shape[0] if reduction == "batch_sum" else x.numel(), 1)
    fixed = difference.detach()
    return loss, DistillationInfo(fixed.to(x.dtype), fixed.square().sum().sqrt(), (~fixed.isfinite()).sum())


@names_itself
def sds_loss(
    x: Tensor,
    eps: Tensor,
    noise: Tensor,
    *,
    t: Tensor | None = None,
    weight: str | float | Tensor = "sds",
    eps_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    cfg_formulation: str = "diffusers",
    **options: Any,
) -> tuple[Tensor, DistillationInfo]:
    """Score distillation sampling: g = w(t)·(CFG(ε(x_t; t)) − noise).

    Args:
        x: ``[B, ...]`` float, what is optimised; see `score_distillation`.
        eps: Shape of x, the teacher's conditional prediction at t.
        noise: Shape of x, the noise in x_t.
        t: ``[B]`` or ``[1]``; see `noised_batch`.
        weight: w(t); see `score_distillation`.
        eps_uncond: Shape of x, the unconditional prediction.
        guidance_scale: s of classifier-free guidance.
        cfg_formulation: ``"diffusers"``: ε_u + s·(ε_c − ε_u); ``"original"``: ε_c + s·(ε_c − ε_u), as threestudio's
            SDS.
        **options: The other keyword arguments of `score_distillation`: tables, path, prediction_type, x_t, clamp,
            normalize, nonfinite, reduction, validate, backend.

    Returns:
        (loss, info); see `score_distillation`.

    Raises:
        TypeError: Wrong argument types.
        ValueError: As `score_distillation`; or ``eps_uncond`` is missing.

    Source: DreamFusion (Poole et al., 2022), Eq. 3.
    """
    predictions, coefficients = _guided(
        "sds_loss", eps, eps_uncond, guidance_scale, cfg_formulation, ("eps_uncond", "guidance_scale")
    )
    return score_distillation(
        x, predictions, coefficients, weight, noise=noise, noise_coefficient=-1.0, t=t, **options
    )  # fmt: skip


@names_itself
def csd_loss(
    x: Tensor,
    eps_cond: Tensor,
    eps_uncond: Tensor,
    *,
    t: Tensor | None = None,
    weight: str | float | Tensor = "sds",
    **options: Any,
) -> tuple[Tensor, DistillationInfo]:
    """Classifier score distillation: g = w(t)·(ε(x_t; t, y) − ε(x_t; t)). The released code sets ``normalize=True``.

    Args:
        x: ``[B, ...]`` float, what is optimised; see `score_distillation`.
        eps_cond: Shape of x, the teacher's conditional prediction at t.
        eps_uncond: Shape of x, its unconditional prediction.
        t: ``[B]`` or ``[1]``; see `noised_batch`.
        weight: w(t); see `score_distillation`.
        **options: As `sds_loss`.

    Returns:
        (loss, info); see `score_distillation`.

    Raises:
        TypeError: Wrong argument types.
        ValueError: As `score_distillation`.

    Source: Text-to-3D with Classifier Score Distillation (Yu et al., 2023); AlignCVC, Eq. 6.
    """
    return score_distillation(x, [eps_cond, eps_uncond], [1.0, -1.0], weight, t=t, **options)


@names_itself
def vsd_loss(
    x: Tensor,
    eps: Tensor,
    eps_lora: Tensor,
    *,
    t: Tensor | None = None,
    weight: str | float | Tensor = "sds",
    eps_uncond: Tensor | None = None,
    eps_lora_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    guidance_scale_lora: float = 1.0,
    cfg_formulation: str = "diffusers",
    prediction_type: str = "epsilon",
    prediction_type_lora: str | None = None,
    **options: Any,
) -> tuple[Tensor, DistillationInfo]:
    """Variational score distillation: g = w(t)·(CFG(ε(x_t; t)) − CFG(ε_lora(x_t; t))).

    Args:
        x: ``[B, ...]`` float, what is optimised; see `score_distillation`.
        eps: Shape of x, the pretrained teacher's conditional prediction at t.
        eps_lora: Shape of x, the prediction of the model that follows x (trained on its own, on x detached).
        t: ``[B]`` or ``[1]``; see `noised_batch`.
        weight: w(t); see `score_distillation`.
        eps_uncond: Shape of x, the teacher's unconditional prediction.
        eps_lora_uncond: Shape of x, the other model's unconditional prediction.
        guidance_scale: s of the teacher's guidance.
        guidance_scale_lora: s of the other model's guidance.
        cfg_formulation: As `sds_loss`.
        prediction_type: What the teacher predicts; see `score_distillation`.
        prediction_type_lora: What the other model predicts; None: the same.
        **options: As `sds_loss`.

    Returns:
        (loss, info); see `score_distillation`.

    Raises:
        TypeError: Wrong argument types.
        ValueError: As `score_distillation`; or an unconditional prediction is missing.

    Source: ProlificDreamer (Wang et al., 2023), Eq. 9.
    """
    op = "vsd_loss"
    teacher, plus = _guided(
        op, eps, eps_uncond, guidance_scale, cfg_formulation, ("eps_uncond", "guidance_scale")
    )  # fmt: skip
    other, minus = _guided(
        op, eps_lora, eps_lora_uncond, guidance_scale_lora, cfg_formulation, ("eps_lora_uncond", "guidance_scale_lora")
    )
    kinds = [prediction_type] * len(teacher) + [prediction_type_lora or prediction_type] * len(other)
    return score_distillation(
        x, [*teacher, *other], [*plus, *(-c for c in minus)], weight, t=t, prediction_type=kinds, **options
    )
