"""Depth-truncated epipolar attention as the paper writes it, in plain torch; one reference view at a time.

All of them take the same parameters and give the attention's result after its output projection, ``[1, V, C, H, W]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Parameters(NamedTuple):
    """Weights ``[out, in]`` and biases: queries, both layers of the MLP, keys, values, output."""

    q: Tensor
    q_bias: Tensor
    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    k: Tensor
    k_bias: Tensor
    v: Tensor
    v_bias: Tensor
    out: Tensor
    out_bias: Tensor

    @classmethod
    def random(cls, channels: int, slots: int) -> Parameters:
        generator = torch.Generator().manual_seed(0)

        def layer(inputs: int) -> tuple[Tensor, Tensor]:
            weight = torch.randn(channels, inputs, generator=generator) / inputs**0.5
            return weight, torch.randn(channels, generator=generator) / 10

        sizes = (channels, slots * channels, channels, channels, channels, channels)
        return cls(*(t for n in sizes for t in layer(n)))


def others(x: Tensor, view: int) -> list[Tensor]:
    """The other views, ``[1, C, H, W]`` each."""
    return [x[:, j] for j in range(x.shape[1]) if j != view]


def concatenated(views: Sequence[Tensor], grids: Tensor) -> Tensor:
    """Samples of the other views side by side, ``[(V-1)·C, H·W·P]``; grids ``[V-1, H·W, P, 2]`` in [-1, 1]."""
    samples = [F.grid_sample(x, g[None], padding_mode="zeros", align_corners=False) for x, g in zip(views, grids)]
    return torch.cat(samples, 1).flatten(2)[0]


def paper(own: Tensor, views: Sequence[Tensor], grids: Tensor, p: Parameters) -> Tensor:
    """Eq. 1–3 for one reference view ``own [C, H·W]``: every sample through the MLP, keys and values.

    Channels come first in all products, so that nothing is transposed.
    """
    channels, (pixels, points) = own.shape[0], grids.shape[1:3]
    hidden = torch.relu(torch.addmm(p.first_bias[:, None], p.first, concatenated(views, grids)))
    mixed = torch.addmm(p.second_bias[:, None], p.second, hidden)
    key = torch.addmm(p.k_bias[:, None], p.k, mixed).view(channels, pixels, points)
    value = torch.addmm(p.v_bias[:, None], p.v, mixed).view(channels, pixels, points)
    query = torch.addmm(p.q_bias[:, None], p.q, own)
    weight = ((query[..., None] * key).sum(0) / channels**0.5).softmax(-1)
    return torch.addmm(p.out_bias[:, None], p.out, (weight * value).sum(-1))


def paper_view(x: Tensor, grids: Tensor, view: int, p: Parameters) -> Tensor:
    """`paper` for reference view ``view``."""
    return paper(x[0, view].flatten(1), others(x, view), grids, p)


def compiled_paper_view() -> Callable[..., Tensor]:
    """`paper_view` compiled: one graph for every reference view."""
    compiled = torch.compile(paper, dynamic=False)
    return lambda x, grids, view, p: compiled(x[0, view].flatten(1), others(x, view), grids, p)


def sdpa_view(x: Tensor, grids: Tensor, view: int, p: Parameters) -> Tensor:
    """The same with channels last and torch's fused attention, one query per pixel over its samples."""
    channels, (pixels, points) = x.shape[2], grids.shape[1:3]
    rows = concatenated(others(x, view), grids).t()
    mixed = F.linear(torch.relu(F.linear(rows, p.first, p.first_bias)), p.second, p.second_bias)
    key, value = (F.linear(mixed, w, b).view(pixels, points, channels) for w, b in ((p.k, p.k_bias), (p.v, p.v_bias)))
    query = F.linear(x[0, view].flatten(1).t(), p.q, p.q_bias)[:, None]
    context = F.scaled_dot_product_attention(query, key, value)[:, 0]
    return F.linear(context, p.out, p.out_bias).t()


def forward(one: Callable[..., Tensor], x: Tensor, grids: Tensor, p: Parameters, views: int | None = None) -> Tensor:
    """``one`` for every reference view, or the first ``views``; grids ``[V, V-1, H·W, P, 2]``."""
    out = torch.empty_like(x)
    for view in range(views or x.shape[1]):
        out[0, view] = one(x, grids[view], view, p).view(x.shape[2:])
    return out


def backward(
    one: Callable[..., Tensor], x: Tensor, grids: Tensor, p: Parameters, grad: Tensor, views: int | None = None
) -> tuple[Tensor, ...]:
    """Gradients for x and all parameters, the graph of one reference view at a time."""
    x, p = x.detach().requires_grad_(), Parameters(*(t.detach().requires_grad_() for t in p))
    for view in range(views or x.shape[1]):
        one(x, grids[view], view, p).backward(grad[0, view].flatten(1))
    return tuple(t.grad for t in (x, *p))  # pyright: ignore[reportReturnType]
