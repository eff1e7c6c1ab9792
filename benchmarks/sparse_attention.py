"""Attention of sparse voxels, against torch's over single windows, padded windows and explicit masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Contestant, Prepared, Settings, Workload, ours
from benchmarks.sparse_conv import sphere
from cvctoolkit import ops

HEADS, DIM = 8, 64


def _close(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> str:
    for name, a, b in zip(("out", "grad q", "grad k", "grad v"), found, truth):
        error = ((a.double() - b.double()).norm() / b.double().norm()).item()
        if not error < 1e-5:
            return f"{name}: relative error {error:.1e}"
    return ""


def _inputs(rows: int, settings: Settings, backward: bool, kv_heads: int = HEADS) -> tuple[list[Tensor], Callable]:
    """q, k, v, and what a step does with an attention's result."""
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(rows, h, DIM, generator=g).to(settings.device) for h in (HEADS, kv_heads, kv_heads)]
    weight = torch.randn(rows, HEADS, DIM, generator=g).to(settings.device)
    for x in tensors:
        x.requires_grad_(backward)

    def step(out: Tensor) -> tuple[Tensor, ...]:
        return (out, *torch.autograd.grad(out, tensors, weight)) if backward else (out,)

    return tensors, step


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch's, of [..., L, H, D]."""
    share = q.shape[-2] // k.shape[-2]
    k, v = (x.repeat_interleave(share, -2) if share > 1 else x for x in (k, v))
    return F.scaled_dot_product_attention(*(x.transpose(-2, -3) for x in (q, k, v)), attn_mask=mask).transpose(-2, -3)


def _one_by_one(tensors: list[Tensor], parts: list[Tensor]) -> Tensor:
    """A call per sequence of rows, cut from tensors put in order once: a gather each costs a full gradient each."""
    order, lengths = torch.cat(parts), [len(rows) for rows in parts]
    pieces = zip(*(x[order].split(lengths) for x in tensors))
    return torch.cat([_sdpa(*(x[None] for x in piece))[0] for piece in pieces])[torch.argsort(order)]


def _padded(tensors: list[Tensor], parts: list[Tensor]) -> Tensor:
    """One call, every sequence padded to the longest."""
    rows = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    lengths = torch.tensor([len(p) for p in parts], device=rows.device)
    real = torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
    out = _sdpa(*(x[rows] for x in tensors), mask=real[:, None, None])
    return out[real][torch.argsort(rows[real])]


def _floor(tensors: list[Tensor], backward: bool) -> int:
    """q, k, v read, the result written; backward: these and its gradient again, three gradients written."""
    size = tensors[0].numel() * 4
    inputs = sum(x.numel() * 4 for x in tensors)
    return (inputs + size) + (2 * inputs + 2 * size if backward else 0)


def _windows(voxels: int, size: int, *, backward: bool):
    def prepare(settings: Settings) -> Prepared:
        coords = sphere(voxels, settings.device)
        partition = ops.window_partition(coords, size)
        parts = list(partition.permutation.split(partition.cu_seqlens.diff().tolist()))
        tensors, step = _inputs(len(coords), settings, backward)

        def attend(backend: str | None = None) -> tuple[Tensor, ...]:
            return step(ops.window_attention(*tensors, coords, size, partition=partition, backend=backend))

        return Prepared(
            [
                Contestant(
                    "torch SDPA per window", lambda: step(_one_by_one(tensors, parts)), package="torch", truth=True
                ),
                Contestant("torch SDPA, padded", lambda: step(_padded(tensors, parts)), package="torch"),
                Contestant("torch SDPA, buckets", lambda: attend("sdpa"), package="torch"),
                *ours(lambda device: attend, settings, on_cpu_too=False),
            ],
            _close,
            floor_bytes=_floor(tensors, backward),
            items=lambda truth: len(coords),
        )

    return prepare


def _sequences(lengths: tuple[int, ...], *, backward: bool):
    def prepare(settings: Settings) -> Prepared:
        offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(settings.device)
        parts = list(torch.arange(sum(lengths), device=settings.device).split(list(lengths)))
        which = torch.repeat_interleave(torch.tensor(lengths)).to(settings.device)
        tensors, step = _inputs(sum(lengths), settings, backward)

        def masked() -> tuple[Tensor, ...]:
            return step(_sdpa(*(x[None] for x in tensors), mask=which[:, None] == which)[0])

        run = lambda device: lambda: step(ops.varlen_attention(*tensors, offsets))  # noqa: E731
        return Prepared(
            [
                Contestant(
                    "torch SDPA per sequence", lambda: step(_one_by_one(tensors, parts)), package="torch", truth=True
                ),
                Contestant("torch SDPA, padded", lambda: step(_padded(tensors, parts)), package="torch"),
                Contestant("torch SDPA, one mask", masked, package="torch"),
                *ours(run, settings, on_cpu_too=False),
            ],
            _close,
            floor_bytes=_floor(tensors, backward),
            items=lambda truth: sum(lengths),
        )

    return prepare


def _dense_spatial(tensors: list[Tensor], coords: Tensor, gates: Tensor, topk: int, resolution: int) -> Tensor:
    """Direct3D-S2's equations over dense blocks and masks: scores [Hkv, N, (res / 8)³], a mask [H, N, N]."""
    q, k, v = tensors
    share, xyz, grid = q.shape[1] // k.shape[1], coords[:, 1:].long(), resolution // 8
    flat = lambda c, n: (c[:, 0] * n + c[:, 1]) * n + c[:, 2]  # noqa: E731
    small, row = torch.unique(flat(xyz // 4, 2 * grid), return_inverse=True)
    count = torch.bincount(row)[:, None, None]
    ck, cv = (torch.zeros(len(small), *x.shape[1:], device=x.device).index_add(0, row, x) / count for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q, ck.repeat_interleave(share, 1)) / DIM**0.5
    at = torch.stack([small // (2 * grid) ** 2, small // (2 * grid) % (2 * grid), small % (2 * grid)], 1) // 2
    weight = scores.detach().softmax(-1).unflatten(0, (-1, share)).sum(1)
    blocks = torch.zeros(*weight.shape[:2], grid**3, device=q.device).index_add_(2, flat(at, grid), weight)
    best = blocks.topk(topk, -1).indices
    chosen = torch.zeros_like(blocks, dtype=torch.bool).scatter_(2, best, True)
    block = flat(xyz // 8, grid)
    mask = chosen[..., block].repeat_interleave(share, 0)
    branches = (
        torch.einsum("hnm,mhd->nhd", scores.softmax(-1), cv.repeat_interleave(share, 1)),
        _sdpa(q[None], k[None], v[None], mask=mask[None])[0],
        _sdpa(q[None], k[None], v[None], mask=block[:, None] == block)[0],
    )
    return sum(gates[:, i, None, None] * x for i, x in enumerate(branches))


def _spatial(resolution: int, *, backward: bool, dense: bool):
    def prepare(settings: Settings) -> Prepared:
        axis = torch.arange(resolution) + 0.5 - resolution / 2
        distance = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt() - 0.42 * resolution
        cells = (distance.abs() < 0.8).nonzero().to(torch.int32)
        coords = torch.cat([torch.zeros_like(cells[:, :1]), cells], 1).to(settings.device)
        tensors, step = _inputs(len(coords), settings, backward, kv_heads=2)
        gates = torch.rand(len(coords), 3, generator=torch.Generator().manual_seed(1)).to(settings.device)
        blocks = ops.spatial_blocks(coords)
        attend = lambda **options: step(  # noqa: E731
            ops.spatial_sparse_attention(*tensors, coords, gates, topk=8, blocks=blocks, **options)
        )
        gathered = Contestant("torch SDPA, gathered blocks", lambda: attend(backend="sdpa"), package="torch")
        masked: Callable[[], Any] = lambda: step(_dense_spatial(tensors, coords, gates, 8, resolution))  # noqa: E731
        by_mask = [Contestant("torch, dense scores and masks", masked, package="torch", truth=True)] if dense else []
        contestants = [*by_mask, *ours(lambda device: attend, settings, on_cpu_too=False)]
        if not dense:
            contestants.append(Contestant(gathered.name, gathered.run, package="torch", truth=True))
        return Prepared(contestants, _close, floor_bytes=_floor(tensors, backward), items=lambda truth: len(coords))

    return prepare


LENGTHS = (4096, 2500, 700, 0, 60)

WORKLOADS = [
    Workload("sparse_attention", "windows of 8³, 8 × 64, 100 k, forward", _windows(100_000, 8, backward=False)),
    Workload(
        "sparse_attention", "windows of 8³, 8 × 64, 100 k, forward + backward", _windows(100_000, 8, backward=True)
    ),
    Workload("sparse_attention", "sequences of 4096, 2500, 700, 60, forward", _sequences(LENGTHS, backward=False)),
    Workload(
        "sparse_attention", "sequences of 4096, 2500, 700, 60, forward + backward", _sequences(LENGTHS, backward=True)
    ),
    Workload("sparse_attention", "spatial sparse, 32³ shell, forward", _spatial(32, backward=False, dense=True)),
    Workload(
        "sparse_attention", "spatial sparse, 32³ shell, forward + backward", _spatial(32, backward=True, dense=True)
    ),
    Workload("sparse_attention", "spatial sparse, 64³ shell, forward", _spatial(64, backward=False, dense=False)),
]
