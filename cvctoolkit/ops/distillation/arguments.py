"""Argument checks of the score-distillation family: what the public functions are asked for → what operators take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit.ops.distillation import reference
from cvctoolkit.ops.distillation.reference import KINDS, PATHS, WEIGHTS

#: The most predictions that one call combines.
MAX_PREDICTIONS = 8


def check_times(op: str, name: str, t: Tensor | None, table: Tensor | None, path: str) -> None:
    """Data-dependent, synchronises on CUDA: refuses times outside the table, or noise levels outside the path."""
    if t is None or not t.numel():
        return
    values = t.tolist() if t.numel() <= 64 else torch.stack(torch.aminmax(t)).tolist()
    values = values if isinstance(values, list) else [values]
    top = math.inf if path == "edm" else 1.0
    top = top if table is None else len(table) - 1
    for value in values:
        if not 0 <= value <= top:
            raise ValueError(f"{op}: {name} must be in [0, {top}], got {value}")


def floating(op: str, name: str, value: Any) -> Tensor:
    """A tensor of a floating dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in _checks.FLOATING or value.layout != torch.strided:
        _checks.tensor(op, name, value, "...", _checks.FLOATING)
    return value


def sample(op: str, value: Any, name: str = "x") -> Tensor:
    """A floating tensor [B, ...] of two dimensions or more."""
    if floating(op, name, value).dim() < 2:
        raise ValueError(f"{op}: {name} must have shape [B, ...] with two dimensions or more, got {list(value.shape)}")
    return value


def _entries(op: str, name: str, value: Any) -> list[Any]:
    try:
        return list(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be a sequence, got {type(value).__name__}") from None


def _flags(op: str, name: str, values: Any) -> list[bool]:
    entries = [bool(v) if isinstance(v, int) else v for v in _entries(op, name, values)]  # 0 and 1 will do
    return [_checks.flag(op, f"{name}[{k}]", v) for k, v in enumerate(entries)]


def like(op: str, name: str, value: Any, x: Tensor) -> Tensor:
    """A floating tensor of the shape and device of x, contiguous."""
    if floating(op, name, value).shape != x.shape:
        raise ValueError(f"{op}: {name} must have the shape of x, {list(x.shape)}, got {list(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device} like x, got {value.device}")
    return value.contiguous()


def per_sample(op: str, name: str, value: Tensor, x: Tensor, dtypes: Sequence[torch.dtype], why: str) -> Tensor:
    """A tensor with one value per sample or one for all, as [B] or [1]."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise ValueError(f"{op}: {name} must have dtype {why}, got {str(value.dtype).removeprefix('torch.')}")
    if value.dim() > 1 or (value.dim() == 1 and len(value) not in (1, x.shape[0])):
        raise ValueError(f"{op}: {name} must have shape [{x.shape[0]}] or [1], got {list(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device} like x, got {value.device}")
    return value.detach().reshape(-1).contiguous()


def noise_table(
    op: str, x: Tensor, alphas_cumprod: Any, sigmas: Any, path: str | None, kind: str = "epsilon"
) -> tuple[Tensor | None, str]:
    """The table that times index (None: times are noise levels) and the path; checked."""
    if path is None:
        path = "vp" if alphas_cumprod is not None else "flow" if kind == "flow" else None
        if path is None and sigmas is None:
            raise ValueError(f"{op}: give alphas_cumprod, or sigmas and path='edm' or 'flow'")
        if path is None:
            raise ValueError(f"{op}: path must be 'edm' or 'flow' with sigmas, got None")
    _checks.choice(op, "path", path, PATHS)
    name, table, other = ("alphas_cumprod", alphas_cumprod, sigmas) if path == "vp" else ("sigmas", sigmas, None)
    if path == "vp" and table is None:
        raise ValueError(f"{op}: path 'vp' needs alphas_cumprod")
    if other is not None or (path != "vp" and alphas_cumprod is not None):
        raise ValueError(f"{op}: path {path!r} takes {name} alone")
    if table is None:
        return None, path
    _checks.tensor(op, name, table, "T", _checks.FLOAT32_64, device=x.device)
    if not len(table):
        raise ValueError(f"{op}: {name} must not be empty")
    return table.detach().contiguous(), path


def time(op: str, name: str, t: Any, x: Tensor, table: Tensor | None, validate: bool, path: str) -> Tensor:
    """Times: integers where there is a table, noise levels where there is none."""
    dtypes, why = (_checks.INTEGRAL, "int32, int64 (it indexes a table)")
    if table is None:
        dtypes, why = (_checks.FLOAT32_64, "float32, float64 (a noise level: no table is given)")
    t = per_sample(op, name, t, x, dtypes, why)
    if validate and x.device.type != "cpu":
        check_times(op, name, t, table, path)
    return t


def combined(
    op: str, x: Any, predictions: Any, coefficients: Any, weight: Any, noise: Any, noise_coefficient: Any, t: Any,
    t_plus: Any, at_t_plus: Any, alphas_cumprod: Any, sigmas: Any, path: Any, prediction_type: Any, x_t: Any,
    x_t_plus: Any, validate: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Checks; returns x, the predictions and what follows them in the operator's arguments up to the path."""
    sample(op, x)
    if isinstance(predictions, Tensor) or not isinstance(predictions, Sequence):
        raise TypeError(f"{op}: predictions must be a sequence of tensors, got {type(predictions).__name__}")
    count = len(predictions)
    if not 1 <= count <= MAX_PREDICTIONS:
        raise ValueError(f"{op}: predictions must be 1 to {MAX_PREDICTIONS} tensors, got {count}")
    factors = [
        _checks.number(op, f"coefficients[{k}]", c) for k, c in enumerate(_entries(op, "coefficients", coefficients))
    ]
    flags = [False] * count if at_t_plus is None else _flags(op, "at_t_plus", at_t_plus)
    one_kind = isinstance(prediction_type, str)
    kinds = [prediction_type] * count if one_kind else _entries(op, "prediction_type", prediction_type)
    for name, values in (("coefficients", factors), ("at_t_plus", flags), ("prediction_type", kinds)):
        if len(values) != count:
            raise ValueError(f"{op}: {name} must have one entry per prediction, {count}, got {len(values)}")
    predictions = [like(op, f"predictions[{k}]", p, x) for k, p in enumerate(predictions)]
    # What does not count is not read, unless nothing would be left.
    kept = [k for k in range(count) if factors[k] != 0] or [0]
    for kind in kinds:
        _checks.choice(op, "prediction_type", kind, KINDS)

    named = isinstance(weight, str)
    if named:
        _checks.choice(op, "weight", weight, WEIGHTS)
    needs = [weight != "uniform" if named else False, False]  # whether the level at t, at t_plus is needed
    for k in kept:
        needs[int(flags[k])] |= kinds[k] != "epsilon"  # Dynamo of torch 2.10 and 2.11 has no bool as an index
    table, path_index = None, 0
    if any(needs) or not (alphas_cumprod is None and sigmas is None):
        table, path = noise_table(op, x, alphas_cumprod, sigmas, path, next((k for k in kinds if k == "flow"), ""))
        path_index = PATHS.index(path)
        for k in kept:
            if (kinds[k] == "flow" and path != "flow") or (kinds[k] == "v_prediction" and path == "flow"):
                raise ValueError(f"{op}: prediction_type {kinds[k]!r} does not exist on path {path!r}")
    times: list[Tensor | None] = [t, t_plus]
    samples: list[Tensor | None] = [x_t, x_t_plus]
    for later, (time_name, sample_name) in enumerate((("t", "x_t"), ("t_plus", "x_t_plus"))):
        time_given, sample_given = times[later], samples[later]
        converts = any(flags[k] == bool(later) and kinds[k] != "epsilon" for k in kept)
        if needs[later] and time_given is None:
            raise ValueError(f"{op}: {time_name} is needed by the weight or the prediction type")
        if converts and sample_given is None:
            raise ValueError(f"{op}: {sample_name} is needed to convert a prediction other than 'epsilon'")
        if time_given is not None and (needs[later] or table is not None):
            times[later] = time(op, time_name, time_given, x, table, validate, PATHS[path_index])
        if sample_given is not None:
            samples[later] = like(op, sample_name, sample_given, x)
        times[later] = times[later] if needs[later] else None
        samples[later] = samples[later] if converts else None
    if noise is not None:
        noise = like(op, "noise", noise, x)
    factor = _checks.number(op, "noise_coefficient", noise_coefficient)
    if factor != 0 and noise is None:
        raise ValueError(f"{op}: noise is needed with a noise_coefficient")
    scale, tensor_weight = 1.0, None
    if isinstance(weight, Tensor):
        tensor_weight = per_sample(op, "weight", weight, x, _checks.FLOATING, "float").to(reference.compute_dtype(x))
    elif not named:
        scale = _checks.number(op, "weight", weight)
    return (
        x, [predictions[k] for k in kept], noise if factor != 0 else None, *samples, *times,
        table if any(needs) else None, tensor_weight, [factors[k] for k in kept], [KINDS.index(kinds[k]) for k in kept],
        [flags[k] for k in kept], factor, scale, WEIGHTS.index(weight) if named else 0, path_index,
    )  # fmt: skip
