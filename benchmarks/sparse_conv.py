"""Neighbour maps and submanifold convolution, against gather–GEMM in torch, numba, spconv and dense convolution."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import product

import numpy as np
import torch

from benchmarks.harness import Contestant, Prepared, Settings, Workload, ours
from cvctoolkit import ops


def sphere(voxels: int, device: str = "cpu") -> torch.Tensor:
    """The shell of a sphere, two voxels thick: some ``voxels`` of them, away from the border, sorted."""
    radius = (voxels / (8 * torch.pi)) ** 0.5
    size = int(2 * radius + 8)
    axis = torch.arange(size) + 0.5 - size / 2
    distance = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt() - radius
    cells = (distance.abs() < 1).nonzero().to(torch.int32)
    return torch.cat([torch.zeros_like(cells[:, :1]), cells], 1).to(device)


def _equal_maps(found, truth) -> str:
    if isinstance(found, tuple):
        from benchmarks.peers import spconv_native

        found = spconv_native.to_map(*found)
    different = int((found != truth).sum())
    return f"{different} of {truth.numel()} entries differ" if different else ""


def _reached(voxels: int):
    def prepare(settings: Settings) -> Prepared:
        coords = sphere(voxels, settings.device)
        keys = ops.voxel_keys(coords)
        shifts = torch.tensor([x * 2**32 + y * 2**16 + z for x, y, z in product((-1, 0, 1), repeat=3)]).to(keys)

        def by_torch() -> torch.Tensor:
            return torch.unique((keys[:, None] + shifts).flatten())

        def by_numpy() -> torch.Tensor:
            return torch.from_numpy(np.unique((keys[:, None] + shifts).flatten().numpy()))

        def compare(found, truth) -> str:
            found = ops.voxel_keys(found) if found.dim() == 2 else found
            return "" if torch.equal(found, truth) else "other voxels"

        contestants = [
            Contestant("torch unique", by_torch, package="torch", truth=True),
            *ours(lambda device: lambda: ops.conv_out_coords(coords, 3), settings, by_isa=False, on_cpu_too=False),
        ]
        if settings.device == "cpu":
            contestants.append(Contestant("numpy unique", by_numpy, package="numpy"))
        return Prepared(contestants, compare, floor_bytes=16 * len(coords), bytes_per_item=16, items=len)

    return prepare


def _close(found, truth) -> str:
    for name, a, b in zip(("out", "grad feats", "grad weight"), found, truth):
        error = ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()
        if not error < (1e-4 if a.dtype == torch.float32 else 2e-2):
            return f"{name}: relative error {error:.1e}"
    return ""


def _maps(voxels: int):
    def prepare(settings: Settings) -> Prepared:
        coords = sphere(voxels, settings.device)
        keys = ops.voxel_keys(coords)
        shifts = torch.tensor([x * 2**32 + y * 2**16 + z for x, y, z in product((-1, 0, 1), repeat=3)])

        def by_torch() -> torch.Tensor:
            query = keys[:, None] + shifts.to(keys.device)
            at = torch.searchsorted(keys, query).clamp_max(len(keys) - 1)
            return torch.where(keys[at] == query, at, -1).to(torch.int32)

        def numpy_merge() -> torch.Tensor:
            array, columns = keys.numpy(), []
            for shift in shifts.tolist():
                at = np.minimum(np.searchsorted(array, array + shift), len(array) - 1)
                columns.append(np.where(array[at] == array + shift, at, -1).astype(np.int32))
            return torch.from_numpy(np.stack(columns, 1))

        contestants = [
            Contestant("torch searchsorted", by_torch, package="torch", truth=True),
            *ours(lambda device: lambda: ops.neighbor_map(coords, 3).map, settings, by_isa=False, on_cpu_too=False),
        ]
        if settings.device == "cpu":
            contestants.append(Contestant("numpy searchsorted", numpy_merge, package="numpy"))
            if find_spec("numba"):
                from benchmarks.peers import numba_neighbors

                run = lambda: torch.from_numpy(numba_neighbors.submanifold_map(keys.numpy(), shifts.numpy()))  # noqa: E731
                run()  # compiles
                contestants.append(Contestant("numba merge, 1 thread", run, package="numba"))
            if find_spec("spconv"):
                from benchmarks.peers import spconv_native

                contestants.append(Contestant("spconv", spconv_native.Pairs(coords).find, package="spconv"))
        return Prepared(contestants, _equal_maps, floor_bytes=(16 + 4 * 27) * len(coords), items=len)

    return prepare


def _conv(voxels: int, channels: int, *, backward: bool, dtype: torch.dtype = torch.float32):
    def prepare(settings: Settings) -> Prepared:
        device = settings.device
        coords = sphere(voxels, device)
        index = ops.neighbor_map(coords, 3).map
        g = torch.Generator().manual_seed(0)
        feats = torch.randn(len(coords), channels, generator=g).to(device, dtype).requires_grad_(backward)
        weight = (torch.randn(channels, channels, 3, 3, 3, generator=g) / (27 * channels) ** 0.5).to(device, dtype)
        weight.requires_grad_(backward)
        grad = torch.randn(len(coords), channels, generator=g).to(device)
        columns = index.long().unbind(1)
        rows = [(c >= 0).nonzero().squeeze(1) for c in columns]
        sources = [c[r] for c, r in zip(columns, rows)]

        def step(out: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (out, *torch.autograd.grad(out, (feats, weight), grad)) if backward else (out,)

        def gather_mm_scatter() -> tuple[torch.Tensor, ...]:
            out = feats.new_zeros(len(coords), channels, dtype=torch.float32)
            for k, (row, source) in enumerate(zip(rows, sources)):
                out = out.index_add(0, row, (feats[source] @ weight.flatten(2)[..., k].T).float())
            return step(out.to(dtype))

        gathered = [feats.detach()[s] for s in sources]
        gathered_grad = [grad[r] for r in rows]
        slices = [w.contiguous() for w in weight.detach().flatten(2).permute(2, 1, 0)]

        def only_products() -> None:
            for x, y, w in zip(gathered, gathered_grad, slices):
                torch.mm(x, w)
                if backward:
                    torch.mm(y, w.T)
                    torch.mm(x.T, y)

        others = []
        if device == "cpu" and not backward and dtype == torch.float32 and find_spec("spconv"):
            from benchmarks.peers import spconv_native

            by_spconv = spconv_native.Pairs(coords).convolution(weight, feats)
            others.append(Contestant("spconv, pairs found before, 1 thread", by_spconv, package="spconv"))

        run = lambda device: lambda: step(ops.sparse_conv3d(feats, weight, None, index))  # noqa: E731
        return Prepared(
            [
                *others,
                Contestant("torch gather, mm, index_add", gather_mm_scatter, package="torch", truth=True),
                Contestant("27 torch.mm alone, rows gathered before", only_products, package="torch"),
                *ours(run, settings, on_cpu_too=False),
            ],
            lambda found, truth: "products only" if found is None else _close(found, truth),
            floor_bytes=(4 * 27 + 2 * dtype.itemsize * channels * (3 if backward else 1)) * len(coords),
            items=lambda truth: int((index >= 0).sum()),
        )

    return prepare


WORKLOADS = [
    Workload("sparse_conv", "neighbour map 3³, 500 k-voxel shell", _maps(500_000)),
    Workload("sparse_conv", "voxels that 3³ reaches, 500 k-voxel shell", _reached(500_000)),
    Workload("sparse_conv", "submanifold 3³, 64 → 64, 100 k, forward", _conv(100_000, 64, backward=False)),
    Workload("sparse_conv", "submanifold 3³, 64 → 64, 100 k, forward + backward", _conv(100_000, 64, backward=True)),
    Workload(
        "sparse_conv",
        "submanifold 3³, 64 → 64, 100 k, bfloat16, forward",
        _conv(100_000, 64, backward=False, dtype=torch.bfloat16),
        quick=False,
    ),
    Workload(
        "sparse_conv",
        "submanifold 3³, 256 → 256, 20 k, forward",
        _conv(20_000, 256, backward=False),
        quick=False,
    ),
]
