"""Argument checks shared by the operators: every message names the operator, the argument, what was expected and what
came. Wrong types raise ``TypeError``, everything else ``ValueError``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FLOAT32_64 = (torch.float32, torch.float64)
INTEGRAL = (torch.int32, torch.int64)
_INFINITE = (float("inf"), float("-inf"))
_FARTHEST = 1e37  # positions and distances in a cube of this size are finite in float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor(
    op: str,
    name: str,
    value: Any,
    shape: str,
    dtypes: Sequence[torch.dtype] | None = None,
    *,
    device: torch.device | None = None,
) -> Tensor:
    """Checks type, shape, dtype and device of a tensor argument.

    Args:
        op: The public function's name.
        name: The argument's name.
        value: What came.
        shape: E.g. ``"N 3"`` or ``"... H W"``: integers must match, names are free, a leading ``...`` stands for any
            number of dimensions.
        dtypes: The dtypes accepted; None accepts all.
        device: The device of the operator's other tensors.

    Returns:
        The value.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise ValueError(f"{op}: {name} must be a dense tensor, got layout {value.layout}")
    if shape != "...":
        _fits(op, name, value, shape.split())
    if dtypes is not None and value.dtype not in dtypes:
        wanted = ", ".join(map(_name, dtypes))
        raise ValueError(f"{op}: {name} must have dtype {wanted}, got {_name(value.dtype)}")
    if device is not None and value.device != device:
        raise ValueError(f"{op}: {name} must be on {device} like the other tensors, got {value.device}")
    return value


def _fits(op: str, name: str, value: Tensor, sizes: list[str]) -> None:
    open_ended = sizes[:1] == ["..."]
    tail = sizes[1:] if open_ended else sizes
    fits = value.dim() >= len(tail) if open_ended else value.dim() == len(tail)
    if fits and tail:
        fits = all(not s.isdigit() or int(s) == n for s, n in zip(tail, value.shape[value.dim() - len(tail) :]))
    if not fits:
        raise ValueError(f"{op}: {name} must have shape [{', '.join(sizes)}], got {list(value.shape)}")


def same_shape(op: str, name: str, value: Tensor, shape: Sequence[int]) -> None:
    """Checks that a tensor has exactly the given shape."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{op}: {name} must have shape {list(shape)}, got {list(value.shape)}")


def choice(op: str, name: str, value: Any, choices: Sequence[str]) -> str:
    """Checks that a string argument is one of those known."""
    if not isinstance(value, str):
        raise TypeError(f"{op}: {name} must be a string, got {type(value).__name__}")
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def flag(op: str, name: str, value: Any) -> bool:
    """Checks a boolean: anything else that Python could take for one is a mistake."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")
    return bool(value)


def number(
    op: str, name: str, value: Any, *, above: float | None = None, at_least: float | None = None, finite: bool = True
) -> float:
    """Checks a real number and its range."""
    if type(value) is not float and (
        isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating))
    ):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if value != value or (finite and value in _INFINITE):
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    if above is not None and not value > above:
        raise ValueError(f"{op}: {name} must be > {above}, got {value}")
    if at_least is not None and not value >= at_least:
        raise ValueError(f"{op}: {name} must be >= {at_least}, got {value}")
    return float(value)


def integer(op: str, name: str, value: Any, *, at_least: int | None = None, at_most: int | None = None) -> int:
    """Checks an integer and its range."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{op}: {name} must be >= {at_least}, got {value}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{op}: {name} must be <= {at_most}, got {value}")
    return int(value) if isinstance(value, np.integer) else value


def bounds(op: str, value: Any) -> tuple[float, float]:
    """Checks a pair (low, high) of finite numbers, low < high: the cube that a grid fills, not too large to measure."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{op}: bounds must be a pair (low, high), got {value!r}")
    low, high = (number(op, f"bounds[{i}]", v) for i, v in enumerate(value))
    if not low < high:
        raise ValueError(f"{op}: bounds must have low < high, got {value!r}")
    if max(-low, high) > _FARTHEST:
        raise ValueError(f"{op}: bounds must lie within ±{_FARTHEST:g}, got {value!r}")
    return low, high


def resolution(op: str, value: Any) -> int:
    """Checks the number of voxels along an axis: 1 to 65536, so that a coordinate fits 16 bits of a voxel key."""
    return integer(op, "resolution", value, at_least=1, at_most=1 << 16)


def finite(op: str, name: str, value: Tensor) -> None:
    """Data-dependent: refuses NaN and infinity in a CPU tensor; on CUDA it would synchronise and does nothing."""
    if value.device.type != "cpu" or not value.numel():
        return
    # One pass without temporaries: NaN propagates into both extremes.
    if not torch.stack(torch.aminmax(value.detach())).isfinite().all():
        count = int((~torch.isfinite(value)).sum())
        raise ValueError(f"{op}: {name} must be finite, got {count} NaN or infinite values")


def fits_memory(op: str, what: str, size: int, device: torch.device) -> None:
    """Refuses what no memory of the device can hold, before anything is allocated; under a compiler nothing."""
    if torch.compiler.is_compiling():
        return
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise ValueError(f"{op}: {what} of {size / 2**30:.1f} GiB does not fit: {memory / 2**30:.1f} GiB in all")


def faces_in_range(op: str, faces: Tensor, num_vertices: int) -> None:
    """Data-dependent: refuses vertex indices outside [0, num_vertices) in a CPU tensor."""
    if faces.device.type == "cpu" and faces.numel():
        low, high = (int(x) for x in torch.aminmax(faces))
        if low < 0 or high >= num_vertices:
            bad = low if low < 0 else high
            raise ValueError(f"{op}: faces must index vertices 0 to {num_vertices - 1}, got {bad}")
