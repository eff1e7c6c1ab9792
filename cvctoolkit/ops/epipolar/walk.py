"""The schedules behind `projected_epipolar_attention`: which maps exist when.

Channels come last. With neighbours in ascending order a view sits in one slot for the references before it and in the
one after for those behind it, so the step from a reference view to the next changes a single slot: N live maps, and
2V − 2 projections instead of V·(V − 1).

The native kernels take strips of rows, so that no query or context of a whole view exists. Where a strip's samples fall
into a band of every neighbour's rows (cameras on a ring do that), maps exist for that band alone: strip by strip, the
walk goes over all views. Elsewhere the bands are as high as the maps, and the strips of a view follow one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvctoolkit._native import kernels as _native

#: Of the queries of one strip, for each thread in the forward.
STRIP_BYTES = 1 << 20
#: How many times the rows of all maps may be projected for the sake of bands.
MOST_ROWS = 1.15
TILE_ROWS = 8  # of the kernels: strips are whole tiles


class Part(NamedTuple):
    """Rows of a reference view, and those of every slot's map that they may read."""

    b: int
    q: int
    rows: slice
    band: Sequence[int] = ()  # begin, end of slot after slot; empty: all

    @property
    def one(self) -> tuple[slice, slice, slice]:
        """The index of these rows that keeps all dimensions."""
        return slice(self.b, self.b + 1), slice(self.q, self.q + 1), self.rows

    @property
    def here(self) -> tuple[int, int, slice]:
        """The index of these rows."""
        return self.b, self.q, self.rows


class Call(NamedTuple):
    """The operator's arguments."""

    query: Tensor | None  # None: the features
    query_weight: Tensor | None
    query_bias: Tensor | None
    features: Tensor
    weight: Tensor
    bias: Tensor
    out_weight: Tensor | None
    out_bias: Tensor | None
    attended_bias: Tensor | None
    depth: Tensor
    rays: Tensor
    projection: Tensor
    jitter: Tensor | None
    scale: float
    num_samples: int
    radius: float
    along_ray: bool
    ortho: bool
    mask: bool
    activation: int
    source: Sequence[int]
    num_heads: int
    channel_block: int

    def tidy(self) -> Call:
        """The same with contiguous weights, which are small."""
        names = ("query_weight", "weight", "out_weight")
        return self._replace(**{n: w.contiguous() for n in names if (w := getattr(self, n)) is not None})

    @property
    def own(self) -> Tensor:
        """What the queries are made of."""
        return self.features if self.query is None else self.query

    @property
    def slots(self) -> int:
        """N."""
        return self.projection.shape[2]

    @property
    def channels(self) -> int:
        """Ch."""
        return self.weight.shape[0]

    @property
    def grid(self) -> torch.Size:
        """(H, W)."""
        return self.depth.shape[2:]

    @property
    def map_size(self) -> torch.Size:
        """(Hf, Wf)."""
        return self.features.shape[2:4]

    @property
    def out_channels(self) -> int:
        """Channels of the result."""
        return self.num_heads * self.channels if self.out_weight is None else self.out_weight.shape[0]

    def cameras(self, part: Part) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Depth, rays, projection and jitter of a part."""
        view = part.one[:2]
        jitter = None if self.jitter is None else self.jitter[part.one]
        return self.depth[part.one], self.rays[view], self.projection[view], jitter

    def window(self, part: Part) -> tuple[Any, ...]:
        """The same and where they lie: as the native kernels want it."""
        return *self.cameras(part), part.rows.start, part.band, self.map_size[0]

    @property
    def segment(self) -> tuple[Any, ...]:
        """The arguments that place the samples."""
        return self.num_samples, self.radius, self.along_ray, self.ortho

    def blocks(self) -> list[slice]:
        """The channels, as many at once as may exist."""
        size = self.channel_block or self.channels
        return [slice(c, min(c + size, self.channels)) for c in range(0, self.channels, size)]

    def views(self) -> Iterator[tuple[int, int]]:
        """The order of the walk."""
        return ((b, q) for b in range(self.depth.shape[0]) for q in range(self.depth.shape[1]))

    def wholes(self) -> Iterator[Part]:
        """View after view."""
        return (Part(b, q, slice(0, self.grid[0])) for b, q in self.views())

    # Matrices [pixels, channels], and their projections.

    def feature_rows(self, b: int, view: int, begin: int, end: int) -> Tensor:
        """``[(end - begin)·Wf, C]`` of a view."""
        return _operand(self.features[b, view, begin:end].flatten(0, 1))

    def query_rows(self, part: Part) -> Tensor:
        """``[h·W, Cq]`` of a part."""
        return _operand(self.own[part.here].flatten(0, 1))

    def by_head(self, matrix: Tensor, block: slice) -> Tensor:
        """Rows [heads·Ch, ...] of a block of channels: [heads·block, ...]."""
        if block.stop - block.start == self.channels:
            return matrix
        return matrix.unflatten(0, (self.num_heads, self.channels))[:, block].flatten(0, 1)

    def queries(self, part: Part, block: slice, out: Tensor | None = None) -> Tensor:
        """``[1, 1, h, W, heads, block]``; made in ``out``, if there is anything to make."""
        rows = self.query_rows(part)
        if self.query_weight is None:
            chosen = self.by_head(rows.t(), block).t()
        else:
            weight = self.by_head(self.query_weight, block).t()
            bias = None if self.query_bias is None else self.by_head(self.query_bias, block)
            into = None if out is None else out[: len(rows)]
            chosen = torch.mm(rows, weight, out=into) if bias is None else torch.addmm(bias, rows, weight, out=into)
        return self.as_rows(chosen, block)

    def as_rows(self, rows: Tensor, block: slice) -> Tensor:
        """``[1, 1, h, W, heads, block]`` of a matrix."""
        return rows.unflatten(-1, (self.num_heads, block.stop - block.start)).unflatten(0, (-1, self.grid[1]))[
            None, None
        ]


def _operand(rows: Tensor) -> Tensor:
    """The matrix as BLAS can read it, in the order that it has: results do not depend on gaps between elements."""
    if 1 in rows.stride():
        return rows
    return rows.t().contiguous().t() if rows.stride(0) < rows.stride(1) else rows.contiguous()


class Stage(NamedTuple):
    """Strips that follow one another for each view, on the same bands of the maps."""

    strips: list[slice]
    bands: dict[tuple[int, int, int], tuple[int, int]] | None  # rows by (b, slot, view); None: all rows of all maps


def stages(call: Call, bytes_per_strip: int) -> list[Stage]:
    """The strips of the native kernels."""
    height, width = call.grid
    per_row = width * call.num_heads * call.channels * call.features.element_size()
    tiles = -(-bytes_per_strip // max(per_row * TILE_ROWS, 1))
    step = tiles * TILE_ROWS
    strips = [slice(r, min(r + step, height)) for r in range(0, height, step)]
    if len(strips) > 1 and call.features.numel():
        reach = _native.epipolar_reach(
            call.depth, call.rays, call.projection, call.jitter, *call.segment, *call.map_size, step
        ).tolist()
        together = 1
        while together < len(strips):
            groups = [range(s, min(s + together, len(strips))) for s in range(0, len(strips), together)]
            bands = [_bands(call, reach, group) for group in groups]
            made = sum(end - begin for band in bands for begin, end in band.values())
            if made <= MOST_ROWS * len(bands[0]) * call.map_size[0]:
                return [Stage([strips[s] for s in group], band) for group, band in zip(groups, bands)]
            together *= 2
    return [Stage(strips, None)]


def _bands(call: Call, reach: list, strips: range) -> dict[tuple[int, int, int], tuple[int, int]]:
    found: dict[tuple[int, int, int], tuple[int, int]] = {}
    for b, q in call.views():
        for slot in range(call.slots):
            if (view := call.source[q * call.slots + slot]) < 0:
                continue
            ranges = [reach[b][q][s][slot] for s in strips]
            begin, end = found.get((b, slot, view), (call.map_size[0], 0))
            found[b, slot, view] = min(begin, *(r[0] for r in ranges)), max(end, *(r[1] for r in ranges))
    return {key: (min(begin, end), end) for key, (begin, end) in found.items()}


class LiveMaps:
    """The projected maps of the current reference view: a block of channels, the rows of a stage."""

    def __init__(self, call: Call, stages: Sequence[Stage]) -> None:
        self.call = call
        height, width = call.map_size
        if stages[0].bands is not None:
            height = max((end - begin for s in stages for begin, end in (s.bands or {}).values()), default=0)
        size = min(call.channel_block or call.channels, call.channels)
        # Rows of whole KiB a little apart, lest neighbouring pixels fall on the same few sets of the cache.
        whole = size * call.features.element_size() % 1024 == 0
        pitch = size + 64 // call.features.element_size() if whole else size
        self.held = call.features.new_empty(1, 1, call.slots, height, width, pitch)
        self.inside: list[tuple[int, int] | None] = [None] * call.slots
        self.block, self.stage = slice(0, size), stages[0]

    def begin(self, block: slice, stage: Stage) -> None:
        """Another block of channels or another stage: what is here is of no use to it."""
        self.block, self.stage = block, stage
        self.inside = [None] * self.call.slots

    @property
    def maps(self) -> Tensor:
        """``[1, 1, N, rows, Wf, block]``."""
        return self.held[..., : self.block.stop - self.block.start]

    def rows(self, b: int, slot: int, view: int) -> tuple[int, int]:
        """Of a view's map: what exists of it in a slot."""
        return (0, self.call.map_size[0]) if self.stage.bands is None else self.stage.bands[b, slot, view]

    def parts(self, b: int, q: int) -> Iterator[Part]:
        """Of a reference view in this stage."""
        band: list[int] = []
        for slot in range(self.call.slots if self.stage.bands is not None else 0):
            view = self.call.source[q * self.call.slots + slot]
            band += self.rows(b, slot, view) if view >= 0 else (0, 0)
        return (Part(b, q, rows, band) for rows in self.stage.strips)

    def move_to(self, b: int, q: int, leave: Callable[[int, tuple[int, int]], None] | None = None) -> Tensor:
        """Projects what is missing; ``leave(slot, (b, view))`` hears of what is replaced."""
        call, maps = self.call, self.maps
        for slot in range(call.slots):
            view = call.source[q * call.slots + slot]
            if view < 0 or self.inside[slot] == (b, view):
                continue
            self.retire(slot, leave)
            begin, end = self.rows(b, slot, view)
            if call.features.numel() and end > begin:
                torch.mm(
                    call.feature_rows(b, view, begin, end),
                    call.weight[self.block, slot].t(),
                    out=maps[0, 0, slot, : end - begin].flatten(0, 1),
                )
            self.inside[slot] = b, view
        return maps

    def retire(self, slot: int, leave: Callable[[int, tuple[int, int]], None] | None) -> None:
        """Empties a slot."""
        inside, self.inside[slot] = self.inside[slot], None
        if inside is not None and leave is not None:
            leave(slot, inside)


class Workspace:
    """Memory for the queries and the contexts of one strip, used again and again."""

    def __init__(self, call: Call, stages: Sequence[Stage]) -> None:
        pixels = max((s.stop - s.start for stage in stages for s in stage.strips), default=0) * call.grid[1]
        channels = call.num_heads * min(call.channel_block or call.channels, call.channels)
        self._query, self._context = (
            call.features.new_empty(pixels * channels) if needed else None
            for needed in (call.query_weight is not None, call.out_weight is not None or call.channel_block)
        )
        self.call = call

    def _matrix(self, memory: Tensor | None, part: Part, block: slice) -> Tensor | None:
        if memory is None:
            return None
        channels = self.call.num_heads * (block.stop - block.start)
        pixels = (part.rows.stop - part.rows.start) * self.call.grid[1]
        return memory[: pixels * channels].view(pixels, channels)

    def queries(self, part: Part, block: slice) -> Tensor:
        """Of a part, as `Call.queries`."""
        return self.call.queries(part, block, self._matrix(self._query, part, block))

    def context(self, part: Part, block: slice) -> Tensor | None:
        """``[h·W, heads·block]``, uninitialised; None where contexts are written where they belong."""
        return self._matrix(self._context, part, block)


def _finish(call: Call, out: Tensor, lse: Tensor, context: Tensor, block: slice) -> None:
    """Adds what a block of channels contributes to a part's result ``[h·W, Co]``."""
    if call.out_weight is None:
        out.unflatten(-1, (call.num_heads, call.channels))[..., block] = context.unflatten(-1, (call.num_heads, -1))
        return
    weight = call.by_head(call.out_weight.t(), block)
    if block.start == 0:
        bias = out.new_zeros(out.shape[-1]) if call.out_bias is None else call.out_bias
        if call.attended_bias is not None:
            torch.addcmul(bias, ~lse[..., :1].isneginf().flatten(0, -2), call.attended_bias, out=out)
            out.addmm_(context, weight)
        elif call.out_bias is not None:
            torch.addmm(bias, context, weight, out=out)
        else:
            torch.mm(context, weight, out=out)
    else:
        out.addmm_(context, weight)


def results(call: Call) -> tuple[Tensor, Tensor]:
    """Memory for the result and the log-sum-exp."""
    out = call.features.new_empty(*call.depth.shape, call.out_channels)
    return out, call.bias.new_empty(*call.depth.shape, call.num_heads)


def composed(attention: Callable[..., Any], *args: Any) -> tuple[Tensor, Tensor]:
    """View after view through ``attention``, the operator on some backend."""
    call = Call(*args).tidy()
    out, lse = results(call)
    whole = slice(0, call.channels)
    live = LiveMaps(call._replace(channel_block=0), [Stage([], None)])
    for part in call.wholes():
        maps = live.move_to(part.b, part.q)
        context, lse_here = attention(
            call.queries(part, whole), maps, call.bias, *call.cameras(part), call.scale, *call.segment, call.mask,
            call.activation,
        )  # fmt: skip
        lse[part.here] = lse_here[0, 0]
        _finish(call, out[part.here].flatten(0, 1), lse[part.here], context[0, 0].flatten(-2).flatten(0, -2), whole)
    return out, lse


def native(*args: Any) -> tuple[Tensor, Tensor]:
    """Strip after strip through the native kernels."""
    call = Call(*args).tidy()
    out, lse = results(call)
    plan = stages(call, STRIP_BYTES * torch.get_num_threads())
    live, work = LiveMaps(call, plan), Workspace(call, plan)
    if len(call.blocks()) > 1:
        _by_blocks(call, plan, live, work, out, lse)
        return out, lse
    whole = slice(0, call.channels)
    for stage in plan:
        live.begin(whole, stage)
        for view in call.views():
            maps = live.move_to(*view)
            for part in live.parts(*view):
                context = work.context(part, whole)
                _native.epipolar_attention_into(
                    work.queries(part, whole), maps, call.bias, *call.window(part), call.scale, *call.segment,
                    call.mask, call.activation, out[part.one] if context is None else context, lse[part.one],
                )  # fmt: skip
                if context is not None:
                    _finish(call, out[part.here].flatten(0, 1), lse[part.here], context, whole)
    return out, lse


def scores(
    call: Call,
    plan: Sequence[Stage],
    live: LiveMaps,
    work: Workspace,
    grad_out: Callable[[Part, slice], Tensor] | None,
) -> tuple[Tensor, Tensor | None]:
    """⟨query, h⟩ and ⟨grad_out, h⟩ of all views ``[B, Q, H, W, heads, P]``, block after block of the channels."""
    score = call.bias.new_zeros(*call.depth.shape, call.num_heads, call.num_samples)
    grad_weight = None if grad_out is None else torch.zeros_like(score)
    for block in call.blocks():
        for stage in plan:
            live.begin(block, stage)
            for view in call.views():
                maps = live.move_to(*view)
                for part in live.parts(*view):
                    _native.epipolar_scores(
                        work.queries(part, block), None if grad_out is None else grad_out(part, block), maps,
                        call.bias[block], *call.window(part), *call.segment, call.mask, call.activation,
                        score[part.one], None if grad_weight is None else grad_weight[part.one],
                    )  # fmt: skip
    return score, grad_weight


def _by_blocks(call: Call, plan: Sequence[Stage], live: LiveMaps, work: Workspace, out: Tensor, lse: Tensor) -> None:
    """Scores first, contexts second: no more than a block of channels of the maps exists at once."""
    weight, _ = scores(call, plan, live, work, None)
    for part in call.wholes():  # the softmax in place
        here, total = weight[part.here].mul_(call.scale), lse[part.here]
        torch.logsumexp(here, -1, out=total)
        here.sub_(total[..., None]).exp_().masked_fill_(total.isneginf()[..., None], 0)
    for block in call.blocks():
        for stage in plan:
            live.begin(block, stage)
            for view in call.views():
                maps = live.move_to(*view)
                for part in live.parts(*view):
                    context = work.context(part, block)
                    assert context is not None
                    _native.epipolar_context(
                        weight[part.one], maps, call.bias[block], *call.window(part), *call.segment, call.mask,
                        call.activation, context,
                    )  # fmt: skip
                    _finish(call, out[part.here].flatten(0, 1), lse[part.here], context, block)
