"""Inputs for the contract tests and the benchmarks of the point-map operators."""

from __future__ import annotations

import torch

from cvctoolkit.ops.pointmap.op import (
    confidence_mask,
    denormalize_points,
    depth_edge_mask,
    face_batch_index,
    gather_pixels,
    normalize_points,
    pointmap_edge_mask,
    pointmap_faces,
    pointmap_to_mesh,
)
from cvctoolkit.testing import Sample, maker


def _depth(g: torch.Generator, *shape: int) -> torch.Tensor:
    # Multiples of 1/64, so that float32 and float64 agree on which side of a threshold a jump lies.
    depth = torch.randint(64, 80, shape, generator=g).float() / 64
    depth.view(-1)[:: max(depth.numel() // 7, 1)] = float("nan")
    return depth


def _mask(g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=g) > 0.2


def samples() -> list[Sample]:
    edges = [
        ("relative", lambda g: dict(depth=_depth(g, 2, 9, 13), rtol=0.13)),
        ("absolute-5x5", lambda g: dict(depth=_depth(g, 17, 8), atol=0.21, kernel_size=5)),
        ("window-over-map", lambda g: dict(depth=_depth(g, 1, 3), rtol=0.1, atol=0.1, kernel_size=9)),
        ("empty", lambda g: dict(depth=_depth(g, 0, 5), rtol=0.1)),
    ]
    masks = [
        ("random", lambda g: dict(mask=_mask(g, 11, 17))),
        ("batch-paper", lambda g: dict(mask=_mask(g, 2, 3, 7, 5), winding="paper")),
        ("corners", lambda g: dict(mask=_mask(g, 2, 12, 9), corner_triangles=True)),
        ("one-row", lambda g: dict(mask=torch.ones(1, 6, dtype=torch.bool))),
        ("empty", lambda g: dict(mask=torch.zeros(3, 0, 4, dtype=torch.bool))),
    ]

    def holes(g: torch.Generator) -> torch.Tensor:
        points = torch.randn(2, 9, 8, 3, generator=g)
        points[0, 2, 3, 1], points[1, 4, 4, 0] = float("nan"), float("inf")
        return points

    meshes = [
        ("masked", lambda g: dict(points=torch.randn(10, 12, 3, generator=g), mask=_mask(g, 10, 12)), ("points",)),
        ("holes", lambda g: dict(points=holes(g), corner_triangles=True), ()),
        ("all-invalid", lambda g: dict(points=torch.randn(5, 6, 3), mask=torch.zeros(5, 6, dtype=torch.bool)), ()),
        ("empty", lambda g: dict(points=torch.zeros(0, 4, 5, 3)), ()),
    ]

    def back(g: torch.Generator, n: int) -> dict[str, torch.Tensor]:
        return dict(points=torch.randn(n, 3, generator=g), center=torch.randn(3, generator=g), scale=torch.tensor(2.5))

    grid = torch.arange(5 * 6 * 3).reshape(5, 6, 3) % 16 / 4.0
    return [
        *(Sample(depth_edge_mask, name, maker(build)) for name, build in edges),
        *(Sample(pointmap_faces, name, maker(build)) for name, build in masks),
        *(Sample(pointmap_to_mesh, name, maker(build), grads) for name, build, grads in meshes),
        Sample(pointmap_edge_mask, "jumps", maker(lambda g: dict(points=grid, atol=3.1, rtol=0.9))),
        Sample(pointmap_edge_mask, "empty", maker(lambda g: dict(points=grid[:0], atol=1.0))),
        Sample(confidence_mask, "percentile", maker(lambda g: dict(confidence=grid[..., 0], percentile=40.0))),
        Sample(confidence_mask, "empty", maker(lambda g: dict(confidence=grid[:0, :, 0], percentile=40.0))),
        Sample(
            normalize_points,
            "masked",
            maker(lambda g: dict(points=torch.randn(6, 7, 3, generator=g), mask=_mask(g, 6, 7))),
            ("points",),
        ),
        Sample(normalize_points, "empty", maker(lambda g: dict(points=torch.zeros(0, 3)))),
        Sample(denormalize_points, "one-box", maker(lambda g: back(g, 7)), ("points", "center", "scale")),
        Sample(denormalize_points, "empty", maker(lambda g: back(g, 0))),
        Sample(
            gather_pixels,
            "colours",
            maker(lambda g: dict(values=torch.randn(4, 5, 2, generator=g), pixel_index=torch.tensor([3, 0, 19]))),
            ("values",),
        ),
        Sample(
            gather_pixels,
            "empty",
            maker(lambda g: dict(values=torch.randn(4, 5, 2), pixel_index=torch.zeros(0, dtype=torch.int64))),
        ),
        Sample(
            face_batch_index,
            "batch",
            lambda dtype, device: dict(
                mesh=pointmap_to_mesh(torch.zeros(3, 4, 5, 3, dtype=dtype, device=device)), height=4, width=5
            ),
        ),
        Sample(
            face_batch_index,
            "empty",
            lambda dtype, device: dict(
                mesh=pointmap_to_mesh(torch.zeros(0, 4, 5, 3, dtype=dtype, device=device)), height=4, width=5
            ),
        ),
    ]
