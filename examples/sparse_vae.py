"""A sparse variational autoencoder overfits a handful of thin shells: ``python examples/sparse_vae.py --out folder``.

The data are thin signed distances on a sparse 48³ grid, made by the toolkit's own operators: of closed surfaces
(`marching_cubes` of a formula, then `narrow_band_udf` and `udf_to_thin_sdf`) and of a point map that sees one side
(`thin_sdf_from_pointmap`). The encoder convolves and pools twice and attends within windows; the decoder starts from a
few latent numbers per voxel of the 12³ grid, decides which children every voxel has, and ends with a distance for each.
When it reconstructs, voxels and distances are its own. Prints the loss and the intersection over union of what is
inside, and draws the shells and the loss.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvctoolkit import ops
from cvctoolkit.nn import sparse as sp

BAND = 3.0  # voxels
NAMES = ("torus", "trefoil", "gyroid", "point map")
CHANNELS, LATENT = (16, 32, 64), 4


# --- data -------------------------------------------------------------------------------------------------------------


def closed_surface(name: str, samples: int = 64) -> tuple[Tensor, Tensor]:
    """Vertices and faces of the zero level of a formula."""
    axis = (torch.arange(samples) + 0.5) * 2 / samples - 1
    p = torch.cartesian_prod(axis, axis, axis)
    x, y, z = p.T
    if name == "torus":
        value = torch.hypot(torch.hypot(x, y) - 0.55, z) - 0.22
    elif name == "trefoil":
        t = torch.arange(200) * (2 * torch.pi / 200)
        curve = [torch.sin(t) + 2 * torch.sin(2 * t), torch.cos(t) - 2 * torch.cos(2 * t), -torch.sin(3 * t)]
        value = torch.cdist(p, torch.stack(curve, 1) * 0.25).amin(1) - 0.12
    else:
        k = 1.6 * torch.pi
        waves = (
            torch.sin(k * x) * torch.cos(k * y)
            + torch.sin(k * y) * torch.cos(k * z)
            + torch.sin(k * z) * torch.cos(k * x)
        )
        value = torch.maximum(p.norm(dim=1) - 0.85, waves.abs() / k - 0.08)
    cells = torch.cartesian_prod(torch.arange(1), *[torch.arange(samples)] * 3).int()
    mesh = ops.marching_cubes(cells, value.clamp(-1, 1), samples)
    return mesh.vertices, mesh.faces


def relief(pixels: int = 96) -> Tensor:
    """``[H, W, 3]``: a wavy dome, as a camera sees it."""
    axis = (torch.arange(pixels) + 0.5) * 2 / pixels - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    height = (1 - x**2 - y**2).clamp_min(0).sqrt() + 0.12 * torch.cos(9 * x) * torch.cos(7 * y)
    return torch.stack([x, y, height], -1)


def thin_shells(resolution: int, names: tuple[str, ...] = NAMES) -> sp.SparseTensor:
    """A batch of thin signed distances, feats ``[N, 1]`` in [−1, 1], negative inside."""
    shells = []
    for name in names:
        if name == "point map":
            points = relief()
            shell = ops.thin_sdf_from_pointmap(points, points[..., :2].norm(dim=-1) < 0.95, resolution, BAND)
            shells.append(sp.SparseTensor(shell.sdf[:, None], shell.coords, [1]))
            continue
        coords, udf, _ = ops.narrow_band_udf(*closed_surface(name), resolution, BAND)
        shells.append(sp.SparseTensor(ops.udf_to_thin_sdf(udf, BAND * 2 / resolution)[:, None], coords, [1]))
    return sp.sparse_cat(shells)


# --- model ------------------------------------------------------------------------------------------------------------


class ResBlock(nn.Module):
    """Two convolutions around what stays."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            sp.SparseGroupNorm(4, channels), sp.SparseSiLU(), sp.SparseConv3d(channels, out_channels, 3),
            sp.SparseGroupNorm(4, out_channels), sp.SparseSiLU(), sp.SparseConv3d(out_channels, out_channels, 3),
        )  # fmt: skip
        self.skip = nn.Identity() if channels == out_channels else sp.SparseLinear(channels, out_channels)

    def forward(self, x: sp.SparseTensor) -> sp.SparseTensor:
        """The sum of both."""
        return self.layers(x) + self.skip(x)


class Attention(nn.Module):
    """Attention within windows of 4³ voxels around what stays."""

    def __init__(self, channels: int, shift: int) -> None:
        super().__init__()
        self.norm = sp.SparseLayerNorm(channels)
        self.attention = sp.SparseWindowAttention(channels, 4, window_size=4, shift_window=shift)

    def forward(self, x: sp.SparseTensor) -> sp.SparseTensor:
        """The sum of both."""
        return x + self.attention(self.norm(x))


class Encoder(nn.Module):
    """Distances → mean and logarithmic variance on the coarse grid."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = CHANNELS
        self.levels = nn.ModuleList([
            nn.Sequential(sp.SparseLinear(1, a), ResBlock(a, a)),
            nn.Sequential(sp.SparseDownsample(2, include_self=False), ResBlock(a, b)),
            nn.Sequential(sp.SparseDownsample(2, include_self=False), ResBlock(b, c), Attention(c, 0)),
        ])  # fmt: skip
        self.head = nn.Sequential(sp.SparseGroupNorm(4, c), sp.SparseSiLU(), sp.SparseLinear(c, 2 * LATENT))

    def forward(self, x: sp.SparseTensor) -> tuple[sp.SparseTensor, list[Tensor]]:
        """Returns the moments and the voxels of all levels, coarse to fine."""
        voxels = []
        for level in self.levels:
            x = level(x)
            voxels.insert(0, x.coords)
        return self.head(x), voxels


class Decoder(nn.Module):
    """Latents → which children there are, twice → distances."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c = CHANNELS
        self.start = nn.Sequential(sp.SparseLinear(LATENT, c), Attention(c, 2), ResBlock(c, c))
        self.splits = nn.ModuleList([sp.SparseLinear(c, 8), sp.SparseLinear(b, 8)])
        self.blocks = nn.ModuleList([ResBlock(c, b), ResBlock(b, a)])
        self.head = nn.Sequential(sp.SparseGroupNorm(4, a), sp.SparseSiLU(), sp.SparseLinear(a, 1))
        self.upsample = sp.SparseUpsample(2)

    def forward(self, z: sp.SparseTensor, voxels: list[Tensor] | None = None) -> tuple[sp.SparseTensor, Tensor]:
        """Decodes onto its own voxels, or onto the given ones.

        Returns:
            Distances ``[N, 1]``, and how badly the children were guessed.
        """
        h, loss = self.start(z), z.feats.new_zeros(())
        for level, (split, block) in enumerate(zip(self.splits, self.blocks)):
            logits = split(h).feats
            children = logits > 0 if voxels is None else children_in(h.coords, voxels[level + 1])
            loss = loss + F.binary_cross_entropy_with_logits(logits, children.to(logits))
            h = block(self.upsample(h, children))
        return self.head(h), loss


def children_in(coords: Tensor, fine: Tensor) -> Tensor:
    """``[N, 8]`` bool, which children of voxels are among the fine ones."""
    corner = torch.cartesian_prod(*[torch.arange(2, dtype=torch.int32)] * 3)
    corner = F.pad(corner, (1, 0)).to(coords.device)
    children = coords[:, None] * coords.new_tensor([1, 2, 2, 2]) + corner
    return ops.voxel_isin(children.flatten(0, 1), fine).view(-1, 8)


class Losses(NamedTuple):
    """Of one step: mean distance error (1 is half a band), of the children, of the latents' distribution."""

    distance: Tensor
    children: Tensor
    kl: Tensor


class SparseVAE(nn.Module):
    """Encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def losses(self, x: sp.SparseTensor, generator: torch.Generator) -> Losses:
        """Of a batch, on its own voxels."""
        moments, voxels = self.encoder(x)
        mean, log_variance = moments.feats.chunk(2, 1)
        noise = torch.randn(mean.shape, generator=generator)
        out, children = self.decoder(moments.replace(mean + (0.5 * log_variance).exp() * noise), voxels)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        return Losses((out.feats - x.feats).abs().mean(), children, kl)

    @torch.no_grad()
    def reconstruct(self, x: sp.SparseTensor) -> sp.SparseTensor:
        """Through the latents and back, with nothing else known."""
        moments, _ = self.encoder(x)
        return self.decoder(moments.replace(moments.feats.chunk(2, 1)[0]))[0]


def train(model: SparseVAE, shells: sp.SparseTensor, steps: int, seed: int = 0) -> list[float]:
    """Two shells a step; returns the sum of the losses of every step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.1)
    items, history, start = shells.unbind(0), [], time.perf_counter()
    pairs = [items] if len(items) <= 2 else [[a, b] for k, a in enumerate(items) for b in items[:k]]
    batches = [sp.sparse_cat(pair) for pair in pairs]  # kept, with all that is derived from their voxels
    for step in range(steps):
        losses = model.losses(batches[int(torch.randint(len(batches), (), generator=generator))], generator)
        loss = losses.distance + losses.children + 1e-4 * losses.kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        history.append(loss.item())
        if step % max(steps // 10, 1) == 0 or step == steps - 1:
            seconds = time.perf_counter() - start
            print(f"step {step}: distance {losses.distance:.4f}, children {losses.children:.4f}, {seconds:.0f} s")
    return history


def inside_iou(a: sp.SparseTensor, b: sp.SparseTensor) -> float:
    """Intersection over union of the voxels whose distance is negative."""
    first, second = (t.coords[t.feats[:, 0] < 0] for t in (a, b))
    return len(ops.voxel_intersection(first, second).coords) / max(len(ops.voxel_union(first, second).coords), 1)


# --- picture ----------------------------------------------------------------------------------------------------------


def draw(
    shells: sp.SparseTensor,
    found: sp.SparseTensor,
    ious: list[float],
    history: list[float],
    resolution: int,
    path: Path,
) -> None:
    """What went in, what came out, and the loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from cvctoolkit.demo import pictures

    count = len(ious)
    figure = plt.figure(figsize=(2.6 * count + 3.6, 5.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(2.6 * count, 3.6))
    axes = left.subplots(2, count, squeeze=False)
    for k in range(count):
        for row, shell in enumerate((shells[k], found[k])):
            mesh = ops.marching_cubes(shell.coords, shell.feats[:, 0].clamp(-1, 1), resolution)
            camera = pictures.orbit_camera(mesh.vertices, 260, 260, 35, 30)
            axes[row, k].imshow(pictures.Renderer(mesh.vertices, mesh.faces).normal_picture(camera))
            given = f"{len(shell.coords) / 1e3:.1f} k voxels"
            pictures.decorate(axes[row, k], given if row == 0 else f"IoU {100 * ious[k]:.1f} %")
    curve = right.subplots()
    curve.semilogy(history, color="#3d7ea6", linewidth=0.8)
    curve.set(xlabel="step", title="loss")
    curve.grid(alpha=0.3)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(argv: list[str] | None = None) -> list[float]:
    """Trains, reconstructs, draws; returns the intersections over unions."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for the picture")
    parser.add_argument("--resolution", type=int, default=48, help="voxels along an axis, a multiple of 4")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--shapes", type=int, default=len(NAMES), help="how many")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    shells, model = thin_shells(args.resolution, NAMES[: args.shapes]), SparseVAE()
    history = train(model, shells, args.steps)
    found = model.reconstruct(shells)
    ious = [inside_iou(a, b) for a, b in zip(shells.unbind(0), found.unbind(0))]
    latents = LATENT * len(ops.downsample(shells.coords, factor=4).coords)
    print(f"{len(shells.coords)} voxels from {latents} latent numbers")
    print("IoU: " + ", ".join(f"{name} {iou:.3f}" for name, iou in zip(NAMES, ious)))
    draw(shells, found, ious, history, args.resolution, args.out / "sparse_vae.png")
    return ious


if __name__ == "__main__":
    main()
