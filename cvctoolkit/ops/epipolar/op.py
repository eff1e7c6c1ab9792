"""Depth-truncated epipolar attention and epipolar sampling."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._backend import Backend
from cvctoolkit._library import define_op
from cvctoolkit._native import kernels as _native
from cvctoolkit.ops.epipolar import geometry, reference

_OUT_OF_BOUNDS = ("zero", "mask")


class EpipolarSamples(NamedTuple):
    """Samples along the rays of every pixel, with their visibility.

    Attributes:
        features: ``[B, Q, H, W, P, N, C]``.
        visible: ``[B, Q, H, W, P, N]`` bool: the neighbour's image contains the sample.
    """

    features: Tensor
    visible: Tensor


class AttentionWithLse(NamedTuple):
    """The result of `epipolar_attention` and what is needed to merge it with further keys.

    Attributes:
        out: ``[B, Q, heads·C, H, W]``.
        lse: ``[B, Q, heads, H, W]``, float32 (float64 for float64): the logarithm of the softmax's denominator; −inf
            where no sample took part.
    """

    out: Tensor
    lse: Tensor


# --- operators --------------------------------------------------------------------------------------------------------


def _only_float32_64(value: Tensor, *_: Any) -> Iterable[str]:
    if value.dtype not in _checks.FLOAT32_64:
        yield f"needs float32 or float64, got {value.dtype}"


# A Triton program holds one pixel's heads and channels in registers.
_MOST_CHANNELS = 16384


def _triton(name: str, features: int) -> Backend:
    """The Triton backend of an operator whose argument number ``features`` ends with (heads and) channels."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module("cvctoolkit.ops.epipolar.triton"), name)(*args)

    def unsupported(*args: Any) -> Iterable[str]:
        value = args[features]
        if value.dtype not in _checks.FLOATING[:3]:
            yield f"needs float16, bfloat16 or float32, got {value.dtype}"
        sizes = value.shape[-2:] if name.startswith("epipolar_attention") else value.shape[-1:]
        padded = math.prod(1 << (n - 1).bit_length() for n in sizes)
        if padded > _MOST_CHANNELS:
            yield f"heads and channels, rounded up to powers of two, make {padded}: more than {_MOST_CHANNELS}"

    return Backend(run, unsupported)


def _once(name: str) -> Callable[..., Any]:
    """The formula of a backward operator: there is none, and silence would be wrong."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{name}: double backward is not implemented")

    return backward


def _new(like: Tensor, shape: Sequence[Any], needed: bool = True) -> Tensor:
    return like.new_empty(tuple(shape) if needed else (0,))


def _fake_attention(query: Tensor, maps: Tensor, bias: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _new(query, query.shape), _new(bias, query.shape[:-1])


def _fake_attention_backward(*args: Any) -> tuple[Tensor, ...]:
    (query, maps, bias, depth, rays, projection), need = args[4:10], args[-5:]
    needs = (*need, need[-1])
    return tuple(_new(x, x.shape, n) for x, n in zip((query, maps, bias, depth, rays, projection), needs))


_GEOMETRY = "Tensor depth, Tensor rays, Tensor projection, Tensor? jitter"
_SEGMENT = "int num_samples, float radius, bool along_ray, bool ortho"
_ATTENTION = f"Tensor query, Tensor maps, Tensor bias, {_GEOMETRY}, float scale, {_SEGMENT}, bool mask, int activation"

_attention_backward_op = define_op(
    "epipolar_attention_backward",
    f"(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, {_ATTENTION}, bool need_query, bool need_maps, "
    "bool need_bias, bool need_depth, bool need_cameras) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_attention_backward,
    reference=reference.epipolar_attention_backward,
    native=Backend(_native.epipolar_attention_backward, _only_float32_64, kernels=("epipolar_attention_backward",)),
    triton=_triton("epipolar_attention_backward", 4),
    backward=_once("epipolar_attention"),
)


def _attention_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    *tensors, scale, num_samples, radius, along_ray, ortho, mask, activation, backend = inputs
    ctx.options = scale, num_samples, radius, along_ray, ortho, mask, activation
    ctx.backend = backend
    ctx.save_for_backward(*tensors, *output)


def _attention_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, out, lse = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    query, maps, bias, depth, rays, projection = ctx.needs_input_grad[:6]
    needs = query, maps, bias, depth, rays or projection
    grads = _attention_backward_op(
        grad_out, grad_lse, out, lse, *inputs, *ctx.options, *needs, backend=ctx.backend or None
    )
    wanted = (query, maps, bias, depth, rays, projection)
    return (*(g if want else None for g, want in zip(grads, wanted)), *[None] * 8)


_attention = define_op(
    "epipolar_attention",
    f"({_ATTENTION}) -> (Tensor, Tensor)",
    fake=_fake_attention,
    reference=reference.epipolar_attention,
    native=Backend(_native.epipolar_attention, _only_float32_64, kernels=("epipolar_attention",)),
    triton=_triton("epipolar_attention", 0),
    setup_context=_attention_context,
    backward=_attention_backward,
)


def _fake_sample(features: Tensor, source: Tensor, depth: Tensor, *args: Any) -> Tensor:
    num_samples = args[3]
    return _new(features, (*depth.shape, num_samples, source.shape[1], features.shape[-1]))


def _fake_sample_backward(*args: Any) -> tuple[Tensor, ...]:
    features, _, depth, rays, projection = args[1:6]
    need_features, need_depth, need_cameras = args[-3:]
    return (
        _new(features, features.shape, need_features),
        _new(depth, depth.shape, need_depth),
        _new(rays, rays.shape, need_cameras),
        _new(projection, projection.shape, need_cameras),
    )


_SAMPLE = f"Tensor features, Tensor source, {_GEOMETRY}, {_SEGMENT}"

_sample_backward_op = define_op(
    "epipolar_sample_backward",
    f"(Tensor grad_samples, {_SAMPLE}, bool need_features, bool need_depth, bool need_cameras) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_sample_backward,
    reference=reference.epipolar_sample_backward,
    native=Backend(_native.epipolar_sample_backward, _only_float32_64, kernels=("epipolar_sample_backward",)),
    triton=_triton("epipolar_sample_backward", 1),
    backward=_once("epipolar_sample"),
)


def _sample_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, num_samples, radius, along_ray, ortho, backend = inputs
    ctx.options = num_samples, radius, along_ray, ortho
    ctx.backend = backend
    ctx.save_for_backward(*tensors)


def _sample_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    features, _, depth, rays, projection = ctx.needs_input_grad[:5]
    needs = features, depth, rays or projection
    grads = _sample_backward_op(grad, *ctx.saved_tensors, *ctx.options, *needs, backend=ctx.backend or None)
    of_features, *others = (g if n else None for g, n in zip(grads, (features, depth, rays, projection)))
    return (of_features, None, *others, *[None] * 5)


_sample = define_op(
    "epipolar_sample",
    f"({_SAMPLE}) -> Tensor",
    fake=_fake_sample,
    reference=reference.epipolar_sample,
    native=Backend(_native.epipolar_sample, _only_float32_64, kernels=("epipolar_sample",)),
    triton=_triton("epipolar_sample", 0),
    setup_context=_sample_context,
    backward=_sample_backward,
)


# --- public functions -------------------------------------------------------------------------------------------------


def epipolar_sample(
    features: Tensor,
    depth: Tensor | None,
    Ks: Tensor,
    viewmats: Tensor,
    *,
    width: int,
    height: int,
    num_samples: int,
    radius: float | None = None,
    jitter: Tensor | None = None,
    camera_model: str = "pinhole",
    neighbor_index: Tensor | Sequence[Sequence[int]] | None = None,
    out_of_bounds: str = "zero",
    reference_index: Tensor | Sequence[int] | None = None,
    depth_type: str = "z",
    near: float | None = None,
    far: float | None = None,
    backend: str | None = None,
) -> Tensor | EpipolarSamples:
    """Samples the other views' features along a short piece of every pixel's ray around its surface point.

    The samples of a pixel sit at s + δₖ·d̂ with s its unprojected point, d̂ its unit ray and
    δₖ = −r + (k + jitter)·2r/P. Each is projected into the neighbours and read bilinearly (pixel centres at +0.5, zeros
    around the map). Without ``depth`` they run in equal steps from ``near`` to ``far`` instead.

    Args:
        features: ``[B, V, C, Hf, Wf]`` float, any memory format; channels-last is read without a copy. Differentiable.
        depth: ``[B, Q, H, W]`` float, world units, at any resolution: one result per pixel of it. Void (its samples are
            0) where not finite, or not positive for a pinhole camera. Differentiable. None: full lines from ``near``
            to ``far``, one for every pixel of the features.
        Ks: ``[B, V, 3, 3]`` float32/64, pixels of ``width`` × ``height``. Differentiable.
        viewmats: ``[B, V, 4, 4]`` float32/64, world → camera, OpenCV axes, rigid. Differentiable.
        width: Of the images that ``Ks`` refer to, pixels.
        height: Of the images that ``Ks`` refer to, pixels.
        num_samples: P, samples per pixel.
        radius: r, half the length of the piece, world units.
        jitter: Broadcastable to ``[B, Q, H, W, P]``, in [0, 1): place of each sample in its stratum; None: the middle.
        camera_model: ``"pinhole"`` or ``"ortho"``, of all views.
        neighbor_index: ``[V, N]`` int64/int32 or nested sequence: the views that the slots of each view read, −1 for an
            absent one (its samples are 0); None: the others in ascending order, N = V − 1.
        out_of_bounds: ``"zero"``, or ``"mask"`` to get the samples' visibility too.
        reference_index: ``[Q]`` int64/int32 or sequence: the views to sample for; None: all, Q = V.
        depth_type: ``"z"`` (along the optical axis) or ``"ray"`` (along the pixel's ray), of ``depth``, ``near`` and
            ``far``.
        near: Where a full line begins.
        far: Where a full line ends.
        backend: ``"native"``, ``"triton"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[B, Q, H, W, P, N, C]`` in the dtype of the features; with ``out_of_bounds="mask"`` an `EpipolarSamples`.
        A sample behind either pinhole camera, or farther than a pixel outside the map, is 0; NaN and infinite features
        come through where they are touched.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices, names, index or backend do not fit, or there is no neighbour; on a CPU also
            cameras with a zero focal length or a matrix that is not rigid.

    Source: Depth-guided decoder, Sec. 3.2.
    """
    op = "epipolar_sample"
    _checks.tensor(op, "features", features, "B V C Hf Wf", _checks.FLOATING)
    with_mask = _checks.choice(op, "out_of_bounds", out_of_bounds, _OUT_OF_BOUNDS) == "mask"
    if depth is not None:
        _checks.tensor(op, "depth", depth, "B Q H W", _checks.FLOATING, device=features.device)
    map_size = (features.shape[-2], features.shape[-1])
    s = geometry.prepare(
        op, depth, Ks, viewmats,
        like=features, grid=map_size if depth is None else (depth.shape[-2], depth.shape[-1]), map_size=map_size,
        width=width, height=height, num_samples=num_samples, radius=radius, near=near, far=far, jitter=jitter,
        camera_model=camera_model, depth_type=depth_type, reference_index=reference_index,
        neighbor_index=neighbor_index,
    )  # fmt: skip
    if features.shape[1] != Ks.shape[1]:
        raise ValueError(f"{op}: features must have {Ks.shape[1]} views like Ks, got {list(features.shape)}")
    last = features.permute(0, 1, 3, 4, 2)
    out = _sample(last, s.source, *s[:-1], backend=backend)
    if not with_mask:
        return out
    return EpipolarSamples(out, geometry.visibility(s, map_size))


def epipolar_attention(
    query: Tensor,
    maps: Tensor,
    bias: Tensor | None,
    depth: Tensor | None,
    Ks: Tensor,
    viewmats: Tensor,
    *,
    scale: float,
    width: int,
    height: int,
    num_samples: int,
    radius: float | None = None,
    activation: str = "relu",
    num_heads: int = 1,
    reference_index: Tensor | Sequence[int] | None = None,
    neighbor_index: Tensor | Sequence[Sequence[int]] | None = None,
    jitter: Tensor | None = None,
    out_of_bounds: str = "zero",
    camera_model: str = "pinhole",
    depth_type: str = "z",
    near: float | None = None,
    far: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | AttentionWithLse:
    """Attends from every pixel to samples of the other views around its surface point, in one pass.

    With the samples of `epipolar_sample` on ``maps``, hₖ = act(bias + Σₙ sampleₖₙ) and, per head, the result is
    Σₖ softmaxₖ(scale·⟨query, hₖ⟩) hₖ. The kernels keep no sample, forward or backward; the reference writes them all.

    The paper's F^mv = MLP(concat_n f_n) with keys and values linear in it fits in: bilinear sampling commutes with the
    MLP's first layer, so ``maps[n] = W₁ₙ features[n]`` and ``bias = b₁``; its second layer and W_K go into the query,
    W_V follows the result: ``query = (W_K W₂)ᵀ q``, ``out ↦ W_V (W₂ out + b₂)``.

    Args:
        query: ``[B, Q, heads·C, H, W]`` float, any memory format, of the reference views, heads outermost.
            Differentiable.
        maps: ``[B, Q, N, C, Hf, Wf]``, dtype of ``query``: the projected features of every reference view's
            neighbours, channels-last in memory for speed (no copy is made then). Differentiable.
        bias: ``[C]`` float; None: 0. Differentiable.
        depth: ``[B, Q, H, W]`` float, world units, of the reference views. Void (the result is 0) where not finite, or
            not positive for a pinhole camera. Differentiable. None: full lines from ``near`` to ``far``.
        Ks: ``[B, V, 3, 3]`` float32/64, pixels of ``width`` × ``height``. Differentiable.
        viewmats: ``[B, V, 4, 4]`` float32/64, world → camera, OpenCV axes, rigid. Differentiable.
        scale: Of the scores: 1/√(dimension of a head before W_K W₂ was absorbed into the query).
        width: Of the images that ``Ks`` refer to, pixels.
        height: Of the images that ``Ks`` refer to, pixels.
        num_samples: P, samples per pixel.
        radius: r, half the length of the sampled piece of the ray, world units.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` (exact) or ``"silu"``.
        num_heads: Heads; all attend to the same hₖ.
        reference_index: ``[Q]`` int64/int32 or sequence: the views that ``query`` holds; None: all, Q = V. Walk over
            the views to hold the maps of few at a time.
        neighbor_index: ``[V, N]`` int64/int32 or nested sequence: the view behind each slot of ``maps``, −1 for an
            absent one; None: the others in ascending order, N = V − 1.
        jitter: Broadcastable to ``[B, Q, H, W, P]``, in [0, 1): place of each sample in its stratum; None: the middle.
        out_of_bounds: ``"zero"`` lets samples that a view does not see count as zero features; ``"mask"`` drops those
            that no neighbour sees from the softmax.
        camera_model: ``"pinhole"`` or ``"ortho"``, of all views.
        depth_type: ``"z"`` (along the optical axis) or ``"ray"`` (along the pixel's ray), of ``depth``, ``near`` and
            ``far``.
        near: Where a full line begins (the "full epipolar" attention of the paper's ablation).
        far: Where a full line ends.
        return_lse: Also return the softmax's log-sum-exp, to merge with other keys. Differentiable.
        backend: ``"native"``, ``"triton"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[B, Q, heads·C, H, W]`` in the dtype of ``query``, channels-last in memory; 0 with zero gradients where the
        pixel is void or every sample is masked. With ``return_lse`` an `AttentionWithLse`. NaN and infinite features
        come through where they are touched.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices, names, index or backend do not fit, or there is no neighbour; on a CPU also
            cameras with a zero focal length or a matrix that is not rigid.

    Source: Depth-guided decoder, Sec. 3.2–3.4, Eq. 1–3.
    """
    op = "epipolar_attention"
    _checks.tensor(op, "query", query, "B Q heads*C H W", _checks.FLOATING)
    _checks.tensor(op, "maps", maps, "B Q N C Hf Wf", (query.dtype,), device=query.device)
    heads = _checks.integer(op, "num_heads", num_heads, at_least=1)
    channels = maps.shape[3]
    if channels < 1 or query.shape[2] != heads * channels:
        raise ValueError(
            f"{op}: query must have num_heads * C = {heads} * {channels} channels, C >= 1, got {query.shape[2]}"
        )
    scale, return_lse = _checks.number(op, "scale", scale), _checks.flag(op, "return_lse", return_lse)
    kind = reference.ACTIVATIONS.index(_checks.choice(op, "activation", activation, reference.ACTIVATIONS))
    mask = _checks.choice(op, "out_of_bounds", out_of_bounds, _OUT_OF_BOUNDS) == "mask"
    grid, map_size = (query.shape[3], query.shape[4]), (maps.shape[4], maps.shape[5])
    s = geometry.prepare(
        op, depth, Ks, viewmats,
        like=query, grid=grid, map_size=map_size, width=width, height=height, num_samples=num_samples, radius=radius,
        near=near, far=far, jitter=jitter, camera_model=camera_model, depth_type=depth_type,
        reference_index=reference_index, neighbor_index=neighbor_index,
    )  # fmt: skip
    if query.shape[1] != s.source.shape[0]:
        raise ValueError(f"{op}: query must hold {s.source.shape[0]} reference views, got {list(query.shape)}")
    if tuple(maps.shape[:3]) != (*query.shape[:2], s.source.shape[1]):
        raise ValueError(
            f"{op}: maps must have shape [B, Q, N, C, Hf, Wf] with [B, Q, N] = "
            f"{[*query.shape[:2], s.source.shape[1]]}, got {list(maps.shape)}"
        )
    if bias is not None:
        _checks.tensor(op, "bias", bias, "C", _checks.FLOATING, device=query.device)
        _checks.same_shape(op, "bias", bias, (channels,))
    shift = s.rays.new_zeros(channels) if bias is None else bias.to(s.rays.dtype)
    out, lse = _attention(
        query.permute(0, 1, 3, 4, 2).unflatten(-1, (heads, channels)), maps.permute(0, 1, 2, 4, 5, 3),
        shift, *s[:4], scale, *s[4:-1], mask, kind, backend=backend,
    )  # fmt: skip
    out = out.flatten(-2).permute(0, 1, 4, 2, 3)
    return AttentionWithLse(out, lse.permute(0, 1, 4, 2, 3)) if return_lse else out
