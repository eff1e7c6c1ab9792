"""Rotary position embedding of voxels: pairs of features turned by angles that are linear in the coordinates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._library import define_op, names_itself


class RopePhases(NamedTuple):
    """The angles of a set of voxels: build them once, rotate q and k of every layer by them.

    Attributes:
        cos: ``[N, P]``, P the pairs of features.
        sin: ``[N, P]``.
    """

    cos: Tensor
    sin: Tensor


# --- operators --------------------------------------------------------------------------------------------------------


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """(a, b) → (a cos − b sin, a sin + b cos) for every pair; inverse: with −sin."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    cos, sin = (t.to(dtype).unsqueeze(1) for t in (cos, sin))
    sin = -sin if inverse else sin
    a, b = (t.to(dtype) for t in (x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, -1)))
    pair = a * cos - b * sin, a * sin + b * cos
    return (torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)).to(x.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.inverse, _ = inputs
    ctx.save_for_backward(cos, sin)


# A rotation's transpose is its inverse: closed under differentiation.
_apply_rope = define_op(
    "apply_rope",
    "(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
    reference=_rotate,
    setup_context=_setup,
    backward=lambda ctx, grad: (
        _apply_rope(grad, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), None, None, None, None,
    ),
)  # fmt: skip


# --- public functions -------------------------------------------------------------------------------------------------


def rope_3d_phases(
    coords: Tensor, head_dim: int, *, base: float = 10000.0, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> RopePhases:
    """The angles of `rope_3d`: scale · coordinate · base^(−i/F) for i < F = head_dim // 6, the axes x, y, z in turn.

    Args:
        coords: ``[N, 4]`` int32 or int64, (batch, x, y, z), or ``[N, 3]`` of any real dtype, (x, y, z).
        head_dim: D, even. Pairs beyond 3·F are not turned.
        base: Of the geometric series of frequencies, > 0.
        scale: Radians per voxel of the highest frequency.
        dtype: Of the result, float32 or float64. Angles are formed in float64: in float32 a coordinate of 65535 would
            be off by 4e-3 radians.

    Returns:
        (cos, sin), ``[N, head_dim / 2]`` each.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes or numbers do not fit.

    Source: Su et al., "RoFormer", Eq. 34, along three axes as in TRELLIS.2.
    """
    op = "rope_3d_phases"
    _checks.tensor(op, "coords", coords, "N A")
    if coords.shape[1] not in (3, 4):
        raise ValueError(f"{op}: coords must have shape [N, 3] or [N, 4], got {list(coords.shape)}")
    if coords.shape[1] == 4 and coords.dtype not in _checks.INTEGRAL:
        raise ValueError(f"{op}: coords must have dtype int32, int64 for (batch, x, y, z), got {coords.dtype}")
    if coords.dtype.is_complex or coords.dtype == torch.bool:
        raise ValueError(f"{op}: coords must have a real dtype, got {coords.dtype}")
    _checks.integer(op, "head_dim", head_dim, at_least=2)
    if head_dim % 2:
        raise ValueError(f"{op}: head_dim must be even, got {head_dim}")
    base = _checks.number(op, "base", base, above=0)
    scale = _checks.number(op, "scale", scale)
    if dtype not in _checks.FLOAT32_64:
        raise ValueError(f"{op}: dtype must be float32 or float64, got {dtype}")
    count = head_dim // 6
    exponent = torch.arange(count, dtype=torch.float64, device=coords.device) / max(count, 1)
    angles = (coords[:, -3:, None].double() * (scale * base**-exponent)).flatten(1)
    angles = torch.nn.functional.pad(angles, (0, head_dim // 2 - 3 * count))
    return RopePhases(angles.cos().to(dtype), angles.sin().to(dtype))


def apply_rope(
    x: Tensor, phases: RopePhases, *, interleaved: bool = True, inverse: bool = False, backend: str | None = None
) -> Tensor:
    """Turns pairs of features by given angles.

    Args:
        x: ``[N, H, D]`` float16, bfloat16, float32 or float64. Differentiable, any number of times.
        phases: From `rope_3d_phases` for the same voxels; constants, without a gradient.
        interleaved: Pairs are features (2i, 2i + 1), as complex numbers (TRELLIS.2); False: (i, i + D/2), as in
            GPT-NeoX.
        inverse: Turns back.
        backend: ``"reference"``; None picks the fastest.

    Returns:
        ``[N, H, D]``, computed in float32 at least. Deterministic.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit.

    Source: Su et al., "RoFormer", Eq. 34.
    """
    op = "apply_rope"
    _checks.tensor(op, "x", x, "N H D", _checks.FLOATING)
    if not isinstance(phases, (tuple, list)) or len(phases) != 2:
        raise TypeError(f"{op}: phases must be RopePhases, got {type(phases).__name__}")
    for name, t in zip(("phases.cos", "phases.sin"), phases):
        _checks.tensor(op, name, t, "N P", _checks.FLOAT32_64, device=x.device)
        if 2 * t.shape[1] != x.shape[2] or t.shape[0] != x.shape[0]:
            raise ValueError(f"{op}: {name} must have shape [{x.shape[0]}, {x.shape[2]} / 2], got {list(t.shape)}")
        if t.requires_grad:
            raise ValueError(f"{op}: {name} must not require a gradient: angles are constants")
    interleaved = _checks.flag(op, "interleaved", interleaved)
    inverse = _checks.flag(op, "inverse", inverse)
    return _apply_rope(x, phases[0], phases[1], interleaved, inverse, backend=backend)


@names_itself
def rope_3d(
    x: Tensor,
    coords: Tensor,
    *,
    base: float = 10000.0,
    scale: float = 1.0,
    interleaved: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Rotary position embedding of voxels: scores of rotated q and k depend on the offset between their voxels only.

    Args:
        x: ``[N, H, D]`` float16, bfloat16, float32 or float64, D even. Differentiable, any number of times.
        coords: ``[N, 4]`` int32 or int64, (batch, x, y, z), or ``[N, 3]`` of any real dtype, (x, y, z).
        base: See `rope_3d_phases`.
        scale: See `rope_3d_phases`.
        interleaved: See `apply_rope`.
        backend: ``"reference"``; None picks the fastest.

    Returns:
        ``[N, H, D]``. Deterministic.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or backend do not fit.

    Source: Su et al., "RoFormer", Eq. 34, along three axes as in TRELLIS.2.
    """
    op = "rope_3d"
    _checks.tensor(op, "x", x, "N H D", _checks.FLOATING)
    _checks.tensor(op, "coords", coords, "N A", device=x.device)
    if coords.shape[0] != x.shape[0]:
        raise ValueError(f"{op}: coords must have {x.shape[0]} rows as x has, got {coords.shape[0]}")
    if x.shape[2] < 2 or x.shape[2] % 2:
        raise ValueError(f"{op}: x must have an even number of features, got {x.shape[2]}")
    inner = torch.float64 if x.dtype == torch.float64 else torch.float32
    phases = rope_3d_phases(coords, x.shape[2], base=base, scale=scale, dtype=inner)
    return apply_rope(x, phases, interleaved=interleaved, backend=backend)
