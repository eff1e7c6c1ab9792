"""The backward of `projected_epipolar_attention`: the same walk, maps made again, their gradients as short-lived."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvctoolkit._native import kernels as _native
from cvctoolkit.ops.epipolar.walk import Call, LiveMaps, Part, Stage, Workspace, scores, stages

#: Of the queries of one strip: the same for any number of threads, as strips are summed one by one.
STRIP_BYTES = 2 << 20
IMAGES = ("query", "features")

#: Which gradients the operator can be asked for, in its order.
NAMES: tuple[str, ...] = (
    "query", "query_weight", "query_bias", "features", "weight", "bias", "out_weight", "out_bias", "attended_bias",
    "depth", "cameras",
)  # fmt: skip


class Upstream(NamedTuple):
    """What arrives from behind the operator, and what its forward kept."""

    grad_out: Tensor
    grad_lse: Tensor | None
    lse: Tensor


def dense_like(x: Tensor) -> Tensor:
    """Memory for the gradient of features: in their order, if their pixels are rows of a matrix in it."""
    like = torch.empty_like(x)
    return like if like.stride(2) == like.stride(3) * like.shape[3] else x.new_empty(x.shape)


class Gradients:
    """Sums over the walk; None where a gradient is not wanted."""

    def __init__(self, call: Call, needs: dict[str, bool]) -> None:
        def zeros(name: str, like: Tensor | None) -> Tensor | None:
            if not needs[name] or like is None:
                return None
            return dense_like(like).zero_() if name in IMAGES else like.new_zeros(like.shape)

        self.query = zeros("query", call.query)
        self.query_weight = zeros("query_weight", call.query_weight)
        self.query_bias = zeros("query_bias", call.query_bias)
        self.features = zeros("features", call.features)
        self.own = self.features if call.query is None else self.query  # of what the queries are made of
        self.weight = zeros("weight", call.weight)
        self.bias = zeros("bias", call.bias)
        self.out_weight = zeros("out_weight", call.out_weight)
        self.out_bias = zeros("out_bias", call.out_bias)
        self.attended_bias = zeros("attended_bias", call.attended_bias)
        self.depth = zeros("depth", call.depth)
        self.rays, self.projection = zeros("cameras", call.rays), zeros("cameras", call.projection)
        self.maps = needs["features"] or needs["weight"]
        self.places = needs["depth"] or needs["cameras"]

    def of_query(self, call: Call, part: Part, block: slice, grad: Tensor) -> None:
        """From the gradient ``[1, 1, h, W, heads, block]`` of the absorbed query on."""
        rows = grad.flatten(-2).flatten(0, -2)
        if call.query_weight is None:
            if self.own is not None:
                self.own[part.here].unflatten(-1, (call.num_heads, call.channels))[..., block] += grad[0, 0]
            return
        if self.own is not None:
            _rows(self.own[part.here]).addmm_(rows, call.by_head(call.query_weight, block))
        for total, other in ((self.query_weight, call.query_rows(part)), (self.query_bias, None)):
            if total is not None:
                grad_here = rows.sum(0) if other is None else rows.t() @ other
                share = total.unflatten(0, (call.num_heads, call.channels))[:, block]
                share += grad_here.view(share.shape)

    def of_out(self, upstream: Upstream, part: Part) -> None:
        """Of the biases behind the attention."""
        rows = upstream.grad_out[part.here].flatten(0, 1)
        if self.out_bias is not None:
            self.out_bias += rows.sum(0)
        if self.attended_bias is not None:
            attended = ~upstream.lse[part.here][..., :1].isneginf().flatten(0, 1)
            self.attended_bias += (rows * attended).sum(0)

    def of_out_weight(self, call: Call, grad_out: Tensor, context: Tensor, block: slice) -> None:
        """From the context of a block."""
        assert self.out_weight is not None
        share = self.out_weight.unflatten(1, (call.num_heads, call.channels))[..., block]
        share += (grad_out.t() @ context).view(share.shape)

    def of_geometry(self, part: Part, depth: Tensor, rays: Tensor, projection: Tensor) -> None:
        """Of the rows of one view."""
        for total, rows, grad in (
            (self.depth, part.rows, depth),
            (self.rays, slice(None), rays),
            (self.projection, slice(None), projection),
        ):
            if total is not None:
                total[part.b, part.q, rows] += grad[0, 0]

    def results(self) -> tuple[Tensor | None, ...]:
        """In the order of the operator."""
        return (
            self.query, self.query_weight, self.query_bias, self.features, self.weight, self.bias, self.out_weight,
            self.out_bias, self.attended_bias, self.depth, self.rays, self.projection,
        )  # fmt: skip


def _rows(x: Tensor) -> Tensor:
    """``[h·w, c]`` of ``x [h, w, c]``, to write to: raises where that would be a copy."""
    return x.view(x.shape[0] * x.shape[1], x.shape[2])


class LiveGradients(LiveMaps):
    """Live maps with their gradients, which move on to features and weight when a map is replaced."""

    def __init__(self, call: Call, plan: Sequence[Stage], grads: Gradients) -> None:
        super().__init__(call, plan)
        self.grads = grads
        self._grads_held = torch.zeros_like(self.held) if grads.maps else None

    @property
    def grad_maps(self) -> Tensor | None:
        """As the maps."""
        return None if self._grads_held is None else self._grads_held[..., : self.block.stop - self.block.start]

    def step(self, b: int, q: int) -> Tensor:
        """The maps of the next view."""
        return self.move_to(b, q, self._leave)

    def finish(self) -> None:
        """After the last view."""
        for slot in range(self.call.slots):
            self.retire(slot, self._leave)

    def _leave(self, slot: int, inside: tuple[int, int]) -> None:
        begin, end = self.rows(inside[0], slot, inside[1])
        if self.grad_maps is None or not self.call.features.numel() or begin == end:
            return
        here, call = self.grad_maps[0, 0, slot, : end - begin], self.call
        rows = here.flatten(0, 1)
        if self.grads.features is not None:
            _rows(self.grads.features[inside][begin:end]).addmm_(rows, call.weight[self.block, slot])
        if self.grads.weight is not None:
            self.grads.weight[self.block, slot] += rows.t() @ call.feature_rows(*inside, begin, end)
        here.zero_()


def _grad_context(call: Call, upstream: Upstream) -> Callable[[Part, slice], Tensor]:
    """The gradient of a part's context ``[1, 1, h, W, heads, block]``."""

    def of(part: Part, block: slice) -> Tensor:
        rows = upstream.grad_out[part.here].flatten(0, 1)
        chosen = (
            call.by_head(rows.t(), block).t()
            if call.out_weight is None
            else rows @ call.by_head(call.out_weight.t(), block).t()
        )
        return call.as_rows(chosen, block)

    return of


def _softmax(call: Call, upstream: Upstream, part: Part, score: Tensor, grad_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The attention and the gradient of ⟨query, h⟩ of a part, from the products with query and gradient."""
    lse = upstream.lse[part.one]
    none = lse.isneginf()[..., None]
    weight = (call.scale * score - lse[..., None]).exp_().masked_fill_(none | score.isneginf(), 0)
    mean = (weight * grad_weight).sum(-1, keepdim=True)
    if upstream.grad_lse is not None:
        mean -= upstream.grad_lse[part.one][..., None]
    return weight, (weight * (grad_weight - mean) * call.scale).masked_fill_(none | score.isneginf(), 0)


def native(upstream: Upstream, call: Call, needs: dict[str, bool]) -> tuple[Tensor | None, ...]:
    """Through the native kernels, strip after strip, block after block of the channels."""
    grads, grad_context = Gradients(call, needs), _grad_context(call, upstream)
    plan = stages(call, STRIP_BYTES)
    live, work = LiveGradients(call, plan, grads), Workspace(call, plan)
    score = grad_weight = None
    if len(call.blocks()) > 1:  # the scores need every block
        score, grad_weight = scores(call, plan, live, work, grad_context)
        for part in call.wholes():
            assert grad_weight is not None
            softmax = _softmax(call, upstream, part, score[part.one], grad_weight[part.one])
            score[part.one], grad_weight[part.one] = softmax
    places: dict[tuple[int, int, int], Tensor] = {}
    for block in call.blocks():
        for stage in plan:
            live.begin(block, stage)
            for view in call.views():
                maps = live.step(*view)
                for part in live.parts(*view):
                    query, above = work.queries(part, block), grad_context(part, block)
                    where = (maps, call.bias[block], *call.window(part), *call.segment, call.mask, call.activation)
                    if score is None or grad_weight is None:
                        weight = call.bias.new_zeros(*above.shape[:-1], call.num_samples)
                        slope = torch.zeros_like(weight)
                        _native.epipolar_scores(query, above, *where, weight, slope)
                        weight, slope = _softmax(call, upstream, part, weight, slope)
                    else:
                        weight, slope = score[part.one], grad_weight[part.one]
                    if grads.out_weight is not None:
                        context = work.context(part, block)
                        assert context is not None
                        _native.epipolar_context(weight, *where, context)
                        grads.of_out_weight(call, upstream.grad_out[part.here].flatten(0, 1), context, block)
                    of_query, of_bias, of_place = _native.epipolar_scores_backward(
                        above, query, weight, slope, *where, live.grad_maps, grads.places
                    )
                    grads.of_query(call, part, block, of_query)
                    if grads.bias is not None:
                        grads.bias[block] += of_bias
                    if block.start == 0:
                        grads.of_out(upstream, part)
                    if grads.places:
                        _of_places(call, part, block, of_place, places, grads)
            live.finish()
    return grads.results()


def _of_places(
    call: Call, part: Part, block: slice, grad: Tensor, places: dict[tuple[int, int, int], Tensor], grads: Gradients
) -> None:
    """Sums gradients by the samples' places over the blocks, and hands the sum on to depth and cameras."""
    key = part.b, part.q, part.rows.start
    places[key] = grad if block.start == 0 else places[key].add_(grad)
    if block.stop < call.channels:
        return
    depth, rays, projection, jitter = call.cameras(part)
    parts = _native.epipolar_coordinates_backward(
        places.pop(key), depth, rays, projection, jitter, part.rows.start, *call.segment, *call.map_size
    )
    grads.of_geometry(part, *parts)


def composed(
    attention: Callable[..., Any], backward: Callable[..., Any], upstream: Upstream, call: Call, needs: dict[str, bool]
) -> tuple[Tensor | None, ...]:
    """View after view through ``attention`` and ``backward``, the operators on some backend."""
    grads, grad_context, whole = Gradients(call, needs), _grad_context(call, upstream), slice(0, call.channels)
    live = LiveGradients(call._replace(channel_block=0), [Stage([], None)], grads)
    wanted = True, grads.maps, grads.bias is not None, needs["depth"], needs["cameras"]
    for part in call.wholes():
        maps, query = live.step(part.b, part.q), call.queries(part, whole)
        where = (query, maps, call.bias, *call.cameras(part), call.scale, *call.segment, call.mask, call.activation)
        context, lse = attention(*where)
        above = grad_context(part, whole)
        grad_lse = None if upstream.grad_lse is None else upstream.grad_lse[part.one]
        of_query, of_maps, of_bias, *of_geometry = backward(above, grad_lse, context, lse, *where, *wanted)
        grads.of_query(call, part, whole, of_query)
        if (grad_maps := live.grad_maps) is not None:
            grad_maps += of_maps
        if grads.bias is not None:
            grads.bias += of_bias
        if grads.out_weight is not None:
            grads.of_out_weight(
                call, upstream.grad_out[part.here].flatten(0, 1), context.flatten(-2).flatten(0, -2), whole
            )
        grads.of_out(upstream, part)
        for total, grad in zip((grads.depth, grads.rays, grads.projection), of_geometry):
            if total is not None:
                total[part.b, part.q] = grad[0, 0]
    live.finish()
    return grads.results()
