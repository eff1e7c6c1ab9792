"""Epipolar attention with the projections around it: no more than one view's maps exist at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit._backend import Backend
from cvctoolkit._library import define_op, once_differentiable
from cvctoolkit.ops.epipolar import geometry, reference, walk, walk_backward
from cvctoolkit.ops.epipolar import op as attention
from cvctoolkit.ops.epipolar.op import AttentionWithLse

_NAME = "projected_epipolar_attention"
_KERNELS = (
    "epipolar_attention_into", "epipolar_scores", "epipolar_context", "epipolar_scores_backward",
    "epipolar_coordinates_backward", "epipolar_reach",
)  # fmt: skip
_ARGUMENTS = (
    "Tensor? query, Tensor? query_weight, Tensor? query_bias, Tensor features, Tensor weight, Tensor bias, "
    "Tensor? out_weight, Tensor? out_bias, Tensor? attended_bias, Tensor depth, Tensor rays, Tensor projection, "
    "Tensor? jitter, float scale, int num_samples, float radius, bool along_ray, bool ortho, bool mask, "
    "int activation, int[] source, int num_heads, int channel_block"
)
_TENSORS = 13


def _unsupported(like: int, operator: Any, name: str) -> Callable[..., Iterable[str]]:
    """The reasons of the attention itself, on tensors of this call's shape."""

    def reasons(*args: Any) -> Iterable[str]:
        call = walk.Call(*args[like:])
        shape = (*call.depth.shape, call.num_heads, call.channels)
        yield from operator.backends[name].unsupported(call.features.new_empty(()).expand(shape))

    return reasons


def _forward_on(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return partial(walk.composed, partial(attention._attention, backend=name))


def _backward_on(name: str) -> Callable[..., tuple[Tensor, ...]]:
    def run(grad_out: Tensor, grad_lse: Tensor | None, lse: Tensor, *args: Any) -> tuple[Tensor, ...]:
        call, needs = walk.Call(*args[: -len(walk_backward.NAMES)]).tidy(), args[-len(walk_backward.NAMES) :]
        upstream, wanted = walk_backward.Upstream(grad_out, grad_lse, lse), dict(zip(walk_backward.NAMES, needs))
        if name == "native":
            grads = walk_backward.native(upstream, call, wanted)
        else:
            run_attention = partial(attention._attention, backend=name)
            run_backward = partial(attention._attention_backward_op, backend=name)
            grads = walk_backward.composed(run_attention, run_backward, upstream, call, wanted)
        return tuple(call.features.new_empty(0) if g is None else g for g in grads)

    return run


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    call = walk.Call(*args)
    return walk.results(call)


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    call, needs = walk.Call(*args[3 : -len(walk_backward.NAMES)]), args[-len(walk_backward.NAMES) :]
    inputs = call[: _TENSORS - 1]
    found = []
    for name, x, need in zip((*walk_backward.NAMES, "cameras"), inputs, (*needs, needs[-1])):
        if x is None or not need:
            found.append(call.features.new_empty(0))
        else:
            found.append(walk_backward.dense_like(x) if name in walk_backward.IMAGES else x.new_empty(x.shape))
    return tuple(found)


_backward_op = define_op(
    f"{_NAME}_backward",
    f"(Tensor grad_out, Tensor? grad_lse, Tensor lse, {_ARGUMENTS}, "
    + ", ".join(f"bool need_{name}" for name in walk_backward.NAMES)
    + f") -> ({', '.join(['Tensor'] * (_TENSORS - 1))})",
    fake=_fake_backward,
    reference=_backward_on("reference"),
    native=Backend(_backward_on("native"), lambda *args: attention._only_float32_64(args[6]), kernels=_KERNELS),
    triton=Backend(
        _backward_on("triton"),
        lambda *args: _unsupported(3, attention._attention, "triton")(*args[: -len(walk_backward.NAMES)]),
    ),
)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.options, ctx.backend = inputs[_TENSORS:-1], inputs[-1]
    ctx.save_for_backward(*inputs[:_TENSORS], output[1])


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, lse = ctx.saved_tensors
    if grad_out is None:
        like = walk.Call(*inputs, *ctx.options)
        grad_out = like.features.new_zeros(*like.depth.shape, like.out_channels)
    tensors = once_differentiable(_NAME, grad_out, grad_lse, lse, *inputs)
    wanted = ctx.needs_input_grad[: _TENSORS - 1]
    needs = (*wanted[:-2], wanted[-2] or wanted[-1])
    grads = _backward_op(*tensors, *ctx.options, *needs, backend=ctx.backend or None)
    return (*(g if want else None for g, want in zip(grads, wanted)), *[None] * (1 + len(ctx.options)))


_projected = define_op(
    _NAME,
    f"({_ARGUMENTS}) -> (Tensor, Tensor)",
    fake=_fake,
    reference=_forward_on("reference"),
    native=Backend(walk.native, lambda *args: attention._only_float32_64(args[3]), kernels=_KERNELS),
    triton=Backend(_forward_on("triton"), _unsupported(0, attention._attention, "triton")),
    setup_context=_context,
    backward=_backward,
)


def projected_epipolar_attention(
    query: Tensor,
    features: Tensor,
    weight: Tensor,
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
    query_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    out_weight: Tensor | None = None,
    out_bias: Tensor | None = None,
    attended_bias: Tensor | None = None,
    channel_block: int | None = None,
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
    """`epipolar_attention` on ``maps[n] = weight[:, n] @ features[neighbour n]``, which it makes and drops on its way.

    It walks over the reference views. The maps that the next view shares with this one stay: with neighbours in
    ascending order all but one. The backward makes them again, so that only arguments and log-sum-exp are kept. With
    ``query_weight`` and ``out_weight`` the projections before and behind join in, and no query or result of theirs
    exists for more than one view either.

    Args:
        query: ``[B, V, heads·Ch, H, W]`` float, as for `epipolar_attention`; ``[B, V, Cq, H, W]`` with
            ``query_weight``. Differentiable.
        features: ``[B, V, C, Hf, Wf]``, dtype of ``query``, of all views, any memory format. Differentiable.
        weight: ``[Ch, N, C]``, dtype of ``query``: the first layer's columns for each slot. Differentiable.
        bias: ``[Ch]`` float, added to the sum of the samples; None: 0. Differentiable.
        depth: As for `epipolar_attention`, of all views. Differentiable.
        Ks: As for `epipolar_attention`. Differentiable.
        viewmats: As for `epipolar_attention`. Differentiable.
        scale: As for `epipolar_attention`.
        width: Of the images that ``Ks`` refer to, pixels.
        height: Of the images that ``Ks`` refer to, pixels.
        num_samples: P, samples per pixel.
        radius: r, half the length of the sampled piece of the ray, world units.
        activation: ``"identity"``, ``"relu"``, ``"gelu"`` (exact) or ``"silu"``.
        num_heads: Heads.
        query_weight: ``[heads·Ch, Cq]``: makes the queries of what ``query`` holds. Differentiable.
        query_bias: ``[heads·Ch]``, only with ``query_weight``. Differentiable.
        out_weight: ``[Co, heads·Ch]``: applied to the contexts. Differentiable.
        out_bias: ``[Co]``, added to every pixel, only with ``out_weight``. Differentiable.
        attended_bias: ``[Co]``, added where a pixel attended to anything, only with ``out_weight``. Differentiable.
        channel_block: Channels of the maps that exist at once: scores first, contexts second, block after block.
            Less memory, most maps made twice. The native CPU kernels have this schedule, the others ignore it. None:
            all channels at once.
        neighbor_index: As for `epipolar_attention`; a tensor is read, which synchronises on CUDA.
        jitter: As for `epipolar_attention`.
        out_of_bounds: ``"zero"`` or ``"mask"``.
        camera_model: ``"pinhole"`` or ``"ortho"``.
        depth_type: ``"z"`` or ``"ray"``.
        near: Where a full line begins, without ``depth``.
        far: Where a full line ends.
        return_lse: Also return the log-sum-exp.
        backend: ``"native"``, ``"triton"``, ``"reference"``; None picks the fastest.

    Returns:
        ``[B, V, heads·Ch or Co, H, W]`` in the dtype of ``query``, channels-last in memory. With ``return_lse`` an
        `AttentionWithLse`. Deterministic wherever `epipolar_attention` is.

    Raises:
        TypeError: Wrong argument types.
        ValueError: As for `epipolar_attention`, or the weights do not fit.

    Source: Depth-guided decoder, Sec. 3.2–3.4, Eq. 1–3.
    """
    op = _NAME
    _checks.tensor(op, "query", query, "B V Cq H W", _checks.FLOATING)
    dtype, device = (query.dtype,), query.device
    _checks.tensor(op, "features", features, "B V C Hf Wf", dtype, device=device)
    _checks.tensor(op, "weight", weight, "Ch N C", dtype, device=device)
    heads = _checks.integer(op, "num_heads", num_heads, at_least=1)
    channels = weight.shape[0]
    if channels < 1:
        raise ValueError(f"{op}: weight must have shape [Ch >= 1, N, C], got {list(weight.shape)}")
    wide = heads * channels
    _around(op, "query", query_weight, (wide, query.shape[2]), {"query_bias": query_bias}, wide, query)
    if out_weight is not None:
        _checks.tensor(op, "out_weight", out_weight, "Co N", dtype, device=device)
    out_channels = wide if out_weight is None else out_weight.shape[0]
    behind = {"out_bias": out_bias, "attended_bias": attended_bias}
    _around(op, "out", out_weight, (out_channels, wide), behind, out_channels, query)
    if query_weight is None and query.shape[2] != wide:
        raise ValueError(f"{op}: query must have num_heads * Ch = {wide} channels, got {query.shape[2]}")
    scale, return_lse = _checks.number(op, "scale", scale), _checks.flag(op, "return_lse", return_lse)
    kind = reference.ACTIVATIONS.index(_checks.choice(op, "activation", activation, reference.ACTIVATIONS))
    mask = _checks.choice(op, "out_of_bounds", out_of_bounds, ("zero", "mask")) == "mask"
    block = 0 if channel_block is None else _checks.integer(op, "channel_block", channel_block, at_least=1)
    source = _slots(op, neighbor_index, features.shape[1])
    s = geometry.prepare(
        op, depth, Ks, viewmats,
        like=query, grid=(query.shape[3], query.shape[4]), map_size=(features.shape[3], features.shape[4]),
        width=width, height=height, num_samples=num_samples, radius=radius, near=near, far=far, jitter=jitter,
        camera_model=camera_model, depth_type=depth_type, reference_index=None, neighbor_index=source,
    )  # fmt: skip
    for name, value in (("query", query), ("features", features)):
        if value.shape[:2] != s.rays.shape[:2]:
            raise ValueError(f"{op}: {name} must hold {list(s.rays.shape[:2])} views like Ks, got {list(value.shape)}")
    if tuple(weight.shape[1:]) != (s.source.shape[1], features.shape[2]):
        expected = [channels, s.source.shape[1], features.shape[2]]
        raise ValueError(f"{op}: weight must have shape {expected}, got {list(weight.shape)}")
    if bias is not None:
        _checks.tensor(op, "bias", bias, "Ch", _checks.FLOATING, device=device)
        _checks.same_shape(op, "bias", bias, (channels,))
    shift = s.rays.new_zeros(channels) if bias is None else bias.to(s.rays.dtype)
    # One tensor in both places has one gradient, made in one place.
    own = None if query is features else query.permute(0, 1, 3, 4, 2)
    out, lse = _projected(
        own, query_weight, query_bias, features.permute(0, 1, 3, 4, 2), weight, shift,
        out_weight, out_bias, attended_bias, *s[:4], scale, *s[4:-1], mask, kind,
        [v for row in source for v in row], heads, block, backend=backend,
    )  # fmt: skip
    out = out.permute(0, 1, 4, 2, 3)
    return AttentionWithLse(out, lse.permute(0, 1, 4, 2, 3)) if return_lse else out


def _around(
    op: str,
    name: str,
    weight: Tensor | None,
    shape: tuple[int, int],
    biases: dict[str, Tensor | None],
    size: int,
    like: Tensor,
) -> None:
    """A projection before or behind the attention."""
    if weight is not None:
        _checks.tensor(op, f"{name}_weight", weight, "a b", (like.dtype,), device=like.device)
        _checks.same_shape(op, f"{name}_weight", weight, shape)
    for label, bias in biases.items():
        if bias is None:
            continue
        if weight is None:
            raise ValueError(f"{op}: {label} belongs to {name}_weight: give both")
        _checks.tensor(op, label, bias, "c", (like.dtype,), device=like.device)
        _checks.same_shape(op, label, bias, (size,))


def _slots(op: str, value: Any, views: int) -> list[list[int]]:
    """The views behind every slot, as numbers: the walk is laid out by them."""
    if value is None:
        if views < 2:
            raise ValueError(f"{op}: needs at least 2 views (or neighbor_index), got {views}")
        return [[v for v in range(views) if v != q] for q in range(views)]
    if isinstance(value, Tensor):
        _checks.tensor(op, "neighbor_index", value, "V N", _checks.INTEGRAL)
        return value.tolist()
    return value
