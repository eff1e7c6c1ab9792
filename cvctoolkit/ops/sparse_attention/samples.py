"""Inputs for the contract tests and the benchmarks of sparse attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cvctoolkit.ops.sparse_attention import op, rope_op, spatial_op, windows_op
from cvctoolkit.testing import Sample, maker


def cells(g: torch.Generator, count: int, *, size: int = 6, batch: int = 2, shuffled: bool = True) -> Tensor:
    """At most ``count`` distinct voxels, in random order."""
    voxels = torch.randint(size, (count, 4), generator=g)
    voxels[:, 0] %= batch
    voxels = torch.unique(voxels, dim=0).to(torch.int32)
    return voxels[torch.randperm(len(voxels), generator=g)] if shuffled else voxels


def heads(g: torch.Generator, rows: int, *, q: int = 2, k: int = 1, dim: int = 3, rows_k: int | None = None,
          value_dim: int | None = None) -> dict[str, Tensor]:  # fmt: skip
    """q, k and v with random values."""
    rows_k = rows if rows_k is None else rows_k
    shapes = {"q": (rows, q, dim), "k": (rows_k, k, dim), "v": (rows_k, k, value_dim or dim)}
    return {name: torch.randn(s, generator=g, dtype=torch.float64) for name, s in shapes.items()}


def offsets(*lengths: int) -> Tensor:
    """Where sequences of these lengths begin, and the end."""
    return torch.nn.functional.pad(torch.tensor(lengths, dtype=torch.int64).cumsum(0), (1, 0))


LEAVES = ("q", "k", "v")


def _varlen(name: str, *lengths: int, lengths_k: tuple[int, ...] | None = None, permuted: bool = False, **how: Any):
    def build(g: torch.Generator) -> dict[str, Any]:
        rows, rows_k = sum(lengths), None if lengths_k is None else sum(lengths_k)
        options = {k: v for k, v in how.items() if k in ("q", "k", "dim", "value_dim")}
        arguments: dict[str, Any] = heads(g, rows, rows_k=rows_k, **options)
        arguments |= {"cu_seqlens": offsets(*lengths), **{k: v for k, v in how.items() if k not in options}}
        if lengths_k is not None:
            arguments["cu_seqlens_k"] = offsets(*lengths_k)
        if permuted:
            arguments["permutation"] = torch.randperm(rows, generator=g)
            if lengths_k is not None:
                arguments["permutation_k"] = torch.randperm(arguments["k"].shape[0], generator=g)
        return arguments

    return Sample(op.varlen_attention, name, maker(build), LEAVES)


def _blocks(name: str, lengths: tuple[int, ...], lengths_k: tuple[int, ...], topk: int, **how: Any) -> Sample:
    def build(g: torch.Generator) -> dict[str, Any]:
        arguments: dict[str, Any] = heads(g, sum(lengths), rows_k=sum(lengths_k), q=4, k=2, dim=2)
        shape = (len(lengths), 2, max(len(lengths_k), 1))
        chosen = torch.rand(shape, generator=g).argsort(-1)[..., :topk]
        missing = torch.rand(chosen.shape, generator=g) < 0.2
        return arguments | {
            "cu_blocks_q": offsets(*lengths),
            "cu_blocks_k": offsets(*lengths_k),
            "block_indices": torch.where(missing, -1, chosen) if lengths_k else chosen[..., :0],
            **{k: v(g, arguments) for k, v in how.items()},
        }

    return Sample(op.block_sparse_attention, name, maker(build), LEAVES)


def _within(function: Callable[..., Any], name: str, count: int, *args: Any, **options: Any) -> Sample:
    names = ("window_size", "shift") if function is windows_op.window_attention else ("window_size", "order", "shift")

    def build(g: torch.Generator) -> dict[str, Any]:
        coords = cells(g, count)
        return {**heads(g, len(coords)), "coords": coords, **dict(zip(names, args)), **options}

    return Sample(function, name, maker(build), LEAVES)


def _partition(function: Callable[..., Any], name: str, count: int, **options: Any) -> Sample:
    return Sample(function, name, maker(lambda g: {"coords": cells(g, count), **options}))


def _spatial(name: str, count: int, *, per_head: bool = False, given: bool = False, **options: Any) -> Sample:
    def build(g: torch.Generator) -> dict[str, Any]:
        coords = cells(g, count)
        sizes = {"compression_block": 2, "selection_block": 4, "window_size": 3, "shift": 1, "topk": 1}
        arguments: dict[str, Any] = {**heads(g, len(coords), q=4, k=2, dim=2), "coords": coords, **sizes, **options}
        shape = (len(coords), 4, 3) if per_head else (len(coords), 3)
        arguments["gates"] = torch.rand(shape, generator=g, dtype=torch.float64)
        if given:
            blocks = spatial_op.spatial_blocks(coords, 2, arguments["selection_block"], backend="reference")
            rows = heads(g, len(blocks.compressed_coords), q=4, k=2, dim=2)
            arguments |= {"compressed_k": rows["k"], "compressed_v": rows["v"]}
        return arguments

    leaves = (*LEAVES, "gates", *(("compressed_k", "compressed_v") if given else ()))
    return Sample(spatial_op.spatial_sparse_attention, name, maker(build), leaves)


def _select(name: str, count: int, **options: Any) -> Sample:
    def build(g: torch.Generator) -> dict[str, Any]:
        coords = cells(g, count, shuffled=False)
        blocks = spatial_op.spatial_blocks(coords, 1, 2, backend="reference")
        rows = heads(g, len(coords), q=2, k=1, rows_k=len(blocks.compressed_coords))
        groups = {"cu_groups": blocks.selection.cu_seqlens} if options.get("grouped") else {}
        return {
            "q": rows["q"], "compressed_k": rows["k"], "cu_seqlens": blocks.batch,
            "cu_seqlens_k": blocks.compressed_batch, "parent": blocks.parent, "topk": 3,
            "permutation": blocks.selection.permutation, **groups,
        }  # fmt: skip

    return Sample(spatial_op.select_blocks, name, maker(build))


def _rope(name: str, count: int, dim: int, **options: Any) -> Sample:
    def build(g: torch.Generator) -> dict[str, Any]:
        return {**{"x": heads(g, count, dim=dim)["q"]}, "coords": torch.randint(9, (count, 4), generator=g), **options}

    return Sample(rope_op.rope_3d, name, maker(build), ("x",))


def _apply(name: str, count: int, **options: Any) -> Sample:
    def build(g: torch.Generator) -> dict[str, Any]:
        phases = rope_op.rope_3d_phases(torch.randint(9, (count, 3), generator=g), 8, dtype=torch.float64)
        return {"x": heads(g, count, dim=8)["q"], "phases": phases, **options}

    return Sample(rope_op.apply_rope, name, maker(build), ("x",))


def samples() -> list[Sample]:
    """Input sets of every operator of the family."""

    def phases(name: str, count: int, **options: Any) -> Sample:
        make = maker(lambda g: {"coords": torch.randint(9, (count, 4), generator=g), "head_dim": 14, **options})
        return Sample(rope_op.rope_3d_phases, name, make)

    def lengths(name: str, count: int) -> Sample:
        make = maker(lambda g: {"coords": cells(g, count, shuffled=False), "batch_size": 3})
        return Sample(windows_op.batch_cu_seqlens, name, make)

    permuted = {"permutation": lambda g, a: torch.randperm(len(a["q"]), generator=g),
                "permutation_k": lambda g, a: torch.randperm(len(a["k"]), generator=g)}  # fmt: skip
    return [
        _varlen("ragged", 3, 0, 7, 1),
        _varlen("shared", 5, 4, q=4, k=2, dim=5, value_dim=3, permuted=True),
        _varlen("cross", 3, 2, 0, 4, lengths_k=(5, 0, 3, 1), permuted=True),
        _varlen("lse", 4, 3, return_lse=True, scale=0.7),
        _varlen("empty", 0, 0),
        _varlen("empty_keys", 2, 3, lengths_k=(0, 0)),
        _blocks("chosen", (2, 0, 3, 1), (3, 2, 0, 4), 2),
        _blocks("permuted", (1, 1, 2), (2, 1, 3), 2, **permuted),
        _blocks("empty", (), (), 2),
        _within(windows_op.window_attention, "shifted", 24, (2, 3, 4), (1, 0, 2)),
        _within(windows_op.window_attention, "whole", 8, 9),
        _within(windows_op.window_attention, "empty", 0, 4),
        _within(windows_op.serialized_attention, "hilbert", 16, 5, "hilbert", 2),
        _within(windows_op.serialized_attention, "empty", 0, 4),
        _partition(windows_op.window_partition, "shifted", 60, window_size=(2, 3, 4), shift=(1, 0, 2)),
        _partition(windows_op.window_partition, "large", 20, window_size=65536),
        _partition(windows_op.window_partition, "empty", 0, window_size=4),
        _partition(windows_op.serialized_partition, "hilbert", 60, window_size=7, shift=3),
        _partition(windows_op.serialized_partition, "morton", 60, window_size=4, order="morton"),
        _partition(windows_op.serialized_partition, "empty", 0, window_size=4),
        _partition(spatial_op.spatial_blocks, "shifted", 60, compression_block=2, selection_block=4, shift=3),
        _partition(spatial_op.spatial_blocks, "empty", 0),
        lengths("three", 20),
        lengths("empty", 0),
        _select("each", 30),
        _select("grouped", 30, grouped=True),
        _select("empty", 0),
        _spatial("each", 12),
        _spatial("shared", 12, share_selection=True, per_head=True, topk=2),
        _spatial("given", 10, given=True, topk=9),
        _spatial("empty", 0),
        _rope("interleaved", 4, 14),
        _rope("halves", 4, 6, interleaved=False, scale=0.5),
        _rope("empty", 0, 6),
        _apply("inverse", 4, inverse=True),
        _apply("empty", 0),
        phases("random", 4),
        phases("empty", 0, base=100.0),
    ]
