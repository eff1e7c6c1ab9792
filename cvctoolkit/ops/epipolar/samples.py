"""Inputs for the contract tests and the benchmarks of the epipolar operators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cvctoolkit.ops.epipolar.op import epipolar_attention, epipolar_sample
from cvctoolkit.ops.epipolar.projected import projected_epipolar_attention
from cvctoolkit.testing import Sample, maker


def ring(batch: int, views: int, width: int, height: int, *, ortho: bool = False) -> dict[str, Tensor]:
    """Cameras on a ring around the unit ball, looking at it: float64 ``Ks`` and ``viewmats``."""
    viewmats, Ks = torch.zeros(batch, views, 4, 4, dtype=torch.float64), torch.zeros(batch, views, 3, 3).double()
    for b in range(batch):
        for v in range(views):
            angle = 2 * math.pi * v / max(views, 3) + 0.3 * b + 0.1
            eye = torch.tensor([2.5 * math.sin(angle), 0.4 * v - 0.3, -2.5 * math.cos(angle)], dtype=torch.float64)
            forward = -eye / eye.norm()
            right = torch.linalg.cross(torch.tensor([0.0, 1.0, 0.0]).double(), forward)
            right = right / right.norm()
            rotation = torch.stack([right, torch.linalg.cross(forward, right), forward])
            viewmats[b, v, :3, :3], viewmats[b, v, :3, 3], viewmats[b, v, 3, 3] = rotation, -rotation @ eye, 1
            focal = (0.42 if ortho else 1.0) + 0.03 * v
            Ks[b, v] = torch.tensor(
                [[focal * width, 0.01 * width, 0.52 * width], [0, focal * height, 0.47 * height], [0, 0, 1]]
            )
    return dict(Ks=Ks, viewmats=viewmats)


def surface(g: torch.Generator, batch: int, views: int, height: int, width: int) -> Tensor:
    """Bumpy depth of the ring's cameras, with holes."""
    depth = 2 + 0.8 * torch.rand(batch, views, height, width, generator=g, dtype=torch.float64)
    for hole, value in ((1, float("nan")), (4, -1.0), (6, float("inf"))):
        depth.view(-1)[hole :: max(depth.numel() // 3, 7)] = value
    return depth


def solid(g: torch.Generator, batch: int, views: int, height: int, width: int) -> Tensor:
    return 2 + 0.8 * torch.rand(batch, views, height, width, generator=g, dtype=torch.float64)


def attention_inputs(
    g: torch.Generator,
    *,
    batch: int = 1,
    views: int = 3,
    queries: int | None = None,
    slots: int | None = None,
    channels: int = 3,
    heads: int = 1,
    grid: tuple[int, int] = (2, 3),
    maps: tuple[int, int] = (4, 3),
    ortho: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Random arguments of `epipolar_attention` over a ring of cameras; ``options`` are passed on."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    queries = views if queries is None else queries
    slots = views - 1 if slots is None else slots
    return dict(
        query=normal(batch, queries, heads * channels, *grid),
        maps=normal(batch, queries, slots, channels, *maps),
        bias=normal(channels) / 2,
        depth=None if "near" in options else solid(g, batch, queries, *grid),
        **ring(batch, views, 80, 60, ortho=ortho),
        width=80,
        height=60,
        scale=1 / math.sqrt(channels),
        num_heads=heads,
        camera_model="ortho" if ortho else "pinhole",
        **{"num_samples": 3, **({} if "near" in options else {"radius": 0.3}), **options},
    )


def sample_inputs(
    g: torch.Generator,
    *,
    batch: int = 1,
    views: int = 3,
    queries: int | None = None,
    channels: int = 2,
    grid: tuple[int, int] = (3, 2),
    maps: tuple[int, int] = (3, 4),
    ortho: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Random arguments of `epipolar_sample` over a ring of cameras; ``options`` are passed on."""
    queries = views if queries is None else queries
    return dict(
        features=torch.randn(batch, views, channels, *maps, generator=g, dtype=torch.float64),
        depth=None if "near" in options else solid(g, batch, queries, *grid),
        **ring(batch, views, 80, 60, ortho=ortho),
        width=80,
        height=60,
        camera_model="ortho" if ortho else "pinhole",
        **{"num_samples": 3, **({} if "near" in options else {"radius": 0.3}), **options},
    )


def projected_inputs(
    g: torch.Generator,
    *,
    views: int = 3,
    channels: int = 5,
    heads: int = 1,
    projections: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Random arguments of `projected_epipolar_attention`; with ``projections`` those before and behind it."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    inputs = attention_inputs(g, views=views, channels=channels, heads=heads, **options)
    maps, size = inputs.pop("maps"), 4
    slots = len(options["neighbor_index"][0]) if "neighbor_index" in options else views - 1
    inputs["features"] = normal(maps.shape[0], views, size, *maps.shape[-2:])
    inputs["weight"] = normal(channels, slots, size) / 2
    if projections:
        inputs["query"] = normal(maps.shape[0], views, size, *inputs["query"].shape[-2:])
        inputs["query_weight"], inputs["query_bias"] = normal(heads * channels, size), normal(heads * channels)
        inputs["out_weight"], inputs["out_bias"] = normal(6, heads * channels), normal(6)
        inputs["attended_bias"] = normal(6)
    return inputs


def _jitter(g: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=g, dtype=torch.float64)


_ALL = ("query", "maps", "bias", "depth", "Ks", "viewmats")
_NO_CAMERAS = _ALL[:4]


def _with_holes(inputs: dict[str, Any], g: torch.Generator) -> dict[str, Any]:
    return {**inputs, "depth": surface(g, *inputs["depth"].shape)}


def samples() -> list[Sample]:
    attention = [
        ("pinhole-relu", lambda g: attention_inputs(g, channels=6, grid=(3, 4), num_samples=2), _NO_CAMERAS),
        ("cameras-silu", lambda g: attention_inputs(g, activation="silu"), _ALL),
        (
            "ortho-mask-heads",
            lambda g: attention_inputs(g, views=2, ortho=True, heads=2, out_of_bounds="mask", activation="gelu"),
            _ALL,
        ),
        (
            "walk",
            lambda g: attention_inputs(
                g, batch=2, views=4, queries=2, slots=2, reference_index=[2, 0], activation="gelu", channels=17,
                jitter=_jitter(g, 2, 2, 3, 3), neighbor_index=[[1, 2], [0, 0], [3, -1], [2, 1]],
            ),
            _NO_CAMERAS,
        ),
        (
            "full-line",
            lambda g: attention_inputs(
                g, views=2, near=0.5, far=4.0, num_samples=5, out_of_bounds="mask", return_lse=True
            ),
            ("query", "maps", "bias", "Ks", "viewmats"),
        ),
        (
            "ray-depth-lse",
            lambda g: attention_inputs(g, depth_type="ray", num_samples=1, activation="identity", return_lse=True),
            _ALL,
        ),
        ("wide", lambda g: attention_inputs(g, views=2, channels=70, heads=3, grid=(3, 3), num_samples=2), _NO_CAMERAS),
        ("empty-batch", lambda g: attention_inputs(g, batch=0), _NO_CAMERAS),
        ("empty-maps", lambda g: attention_inputs(g, maps=(0, 4)), ("maps", "bias", "depth")),
        ("empty-grid", lambda g: attention_inputs(g, grid=(3, 0)), _ALL),
    ]  # fmt: skip
    everything = ("features", "depth", "Ks", "viewmats")
    sampling = [
        ("pinhole", lambda g: sample_inputs(g, batch=2, views=2, grid=(3, 4), maps=(4, 5)), everything),
        ("ortho-mask", lambda g: sample_inputs(g, views=2, ortho=True, out_of_bounds="mask"), everything),
        (
            "walk-jitter",
            lambda g: sample_inputs(
                g, views=4, queries=2, reference_index=[3, 1], neighbor_index=[[1], [-1], [0], [2]],
                jitter=_jitter(g, 1, 1, 1, 3),
            ),
            everything,
        ),
        ("empty-batch", lambda g: sample_inputs(g, batch=0), everything),
        ("empty-maps", lambda g: sample_inputs(g, maps=(5, 0)), ("features", "depth")),
    ]  # fmt: skip
    around = ("query_weight", "query_bias", "out_weight", "out_bias", "attended_bias")
    projected = [
        ("plain", lambda g: projected_inputs(g, activation="gelu"), ("query", "features", "weight", "bias", "depth")),
        (
            "around-mask",
            lambda g: projected_inputs(
                g, projections=True, out_of_bounds="mask", activation="silu", channels=3, grid=(2, 2), maps=(2, 3)
            ),
            ("query", "features", "weight", "bias", "depth", "Ks", *around),
        ),
        (
            "blocks",
            lambda g: projected_inputs(
                g, views=4, channels=7, heads=2, channel_block=3, neighbor_index=[[1, 2], [0, 0], [3, 1], [2, -1]],
                return_lse=True,
            ),
            ("query", "features", "weight", "bias", "depth"),
        ),
        ("empty-batch", lambda g: projected_inputs(g, batch=0), ("query", "features", "weight", "depth")),
        ("empty-maps", lambda g: projected_inputs(g, maps=(0, 4), projections=True), ("features", "bias", *around)),
    ]  # fmt: skip
    families = (
        (epipolar_attention, attention), (epipolar_sample, sampling), (projected_epipolar_attention, projected),
    )  # fmt: skip
    # Finite differences take a second or more per sample: those that cover every formula between them.
    checked = ("around-mask", "cameras-silu", "ortho-mask-heads", "ortho-mask", "walk-jitter")
    return [
        *(Sample(f, name, maker(build), grads, gradcheck=name in checked)
          for f, cases in families
          for name, build, grads in cases),
        Sample(epipolar_attention, "holes", maker(lambda g: _with_holes(attention_inputs(g, out_of_bounds="mask"), g))),
        Sample(epipolar_sample, "holes", maker(lambda g: _with_holes(sample_inputs(g), g))),
    ]  # fmt: skip
