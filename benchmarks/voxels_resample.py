"""Resampling, dilation, cuts and trilinear sampling, against plain torch, SciPy and NumPy.

The voxels are the narrow band of the scene's mesh. Peers that need a dense volume get it for nothing: only what they do
with it is timed.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import moving, workload
from benchmarks.harness import Contestant, Prepared, Settings, Workload
from cvctoolkit import ops

# --- resampling -------------------------------------------------------------------------------------------------------


def _downsample(resolution: int, channels: int):
    def prepare(settings: Settings) -> Prepared:
        coords = moving.band(resolution).to(settings.device)
        feats = moving.normal(len(coords), channels).to(settings.device)
        half = torch.tensor([1, 2, 2, 2], device=settings.device)

        def pooled(inverse: Tensor, counts: Tensor) -> Tensor:
            return feats.new_zeros(len(counts), channels).index_add_(0, inverse, feats) / counts[:, None]

        def torch_keys() -> tuple[Tensor, ...]:
            keys, inverse, counts = torch.unique(moving.keys(coords // half), return_inverse=True, return_counts=True)
            return moving.coords(keys), pooled(inverse, counts), inverse, counts

        def torch_rows() -> tuple[Tensor, ...]:
            coarse, inverse, counts = torch.unique(coords // half, dim=0, return_inverse=True, return_counts=True)
            return coarse.int(), pooled(inverse, counts), inverse, counts

        coarse = len(ops.downsample(coords).coords)
        reads = (moving.COORD + 4 * channels) * len(coords)
        writes = moving.ROW * len(coords) + (moving.COORD + moving.ROW + 4 * channels) * coarse
        peers: moving.Peers = [
            ("torch unique, packed keys", "torch", torch_keys),
            ("torch unique(dim=0)", "torch", torch_rows),
        ]
        run = lambda **backend: ops.downsample(coords, feats, **backend)  # noqa: E731
        return moving.prepare(run, peers, settings, reads, writes, tolerance=1e-6)

    return prepare


def _subdivide(resolution: int, channels: int):
    def prepare(settings: Settings) -> Prepared:
        coords = ops.downsample(moving.band(resolution)).coords.to(settings.device)
        feats = moving.normal(len(coords), channels).to(settings.device)
        octants = torch.cartesian_prod(*[torch.arange(2)] * 3).to(settings.device)

        def torch_sort() -> tuple[Tensor, ...]:
            fine = torch.cat([coords[:, None, :1].expand(-1, 8, 1), 2 * coords[:, None, 1:] + octants], -1).flatten(
                0, 1
            )
            order = torch.argsort(moving.keys(fine))
            parent = order // 8
            return fine[order].int(), feats[parent], parent

        reads = (moving.COORD + 4 * channels) * len(coords)
        writes = 8 * (moving.COORD + moving.ROW + 4 * channels) * len(coords)
        run = lambda **backend: ops.subdivide(coords, feats, **backend)  # noqa: E731
        return moving.prepare(run, [("torch argsort, packed keys", "torch", torch_sort)], settings, reads, writes)

    return prepare


def _family(resolution: int) -> tuple[Tensor, Tensor, Tensor]:
    """The band, its coarser voxels, and which of their children are in the band."""
    coords = moving.band(resolution)
    coarse, _, inverse, _ = ops.downsample(coords)
    mask = torch.zeros(len(coarse), 8, dtype=torch.bool)
    mask[inverse, _child(coords)] = True
    return coords, coarse, mask


def _child(coords: Tensor) -> Tensor:
    """``[N]`` the place among eight children."""
    return (coords[:, 1:].long() % 2 * torch.tensor([4, 2, 1], device=coords.device)).sum(1)


def _torch_children(coords: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    parent, child = mask.nonzero(as_tuple=True)
    octants = torch.stack([child >> 2, child >> 1 & 1, child & 1], -1)
    fine = torch.cat([coords[parent, :1], 2 * coords[parent, 1:] + octants], -1)
    order = torch.argsort(moving.keys(fine))
    return fine[order].int(), parent[order]


def _upsample(resolution: int, channels: int):
    def prepare(settings: Settings) -> Prepared:
        fine, coords, mask = (t.to(settings.device) for t in _family(resolution))
        feats = moving.normal(len(coords), channels).to(settings.device)

        def torch_sort() -> tuple[Tensor, ...]:
            children, parent = _torch_children(coords, mask)
            return children, feats[parent], parent

        reads, writes = (
            (moving.COORD + 4 * channels + 8) * len(coords),
            (moving.COORD + moving.ROW + 4 * channels) * len(fine),
        )
        run = lambda **backend: ops.upsample(coords, feats, mask, **backend)  # noqa: E731
        return moving.prepare(run, [("torch argsort, packed keys", "torch", torch_sort)], settings, reads, writes)

    return prepare


def _space_to_channels(resolution: int, channels: int):
    def prepare(settings: Settings) -> Prepared:
        coords, coarse, _ = (t.to(settings.device) for t in _family(resolution))
        feats = moving.normal(len(coords), channels).to(settings.device)
        half = torch.tensor([1, 2, 2, 2], device=settings.device)

        def torch_keys() -> tuple[Tensor, ...]:
            keys, inverse, counts = torch.unique(moving.keys(coords // half), return_inverse=True, return_counts=True)
            stacked = feats.new_zeros(8 * len(keys), channels)
            stacked[8 * inverse + _child(coords)] = feats
            return moving.coords(keys), stacked.view(len(keys), 8 * channels), inverse, counts

        reads = (moving.COORD + 4 * channels) * len(coords)
        writes = moving.ROW * len(coords) + (moving.COORD + moving.ROW + 32 * channels) * len(coarse)
        run = lambda **backend: ops.spatial_to_channel(coords, feats, **backend)  # noqa: E731
        return moving.prepare(run, [("torch unique, packed keys", "torch", torch_keys)], settings, reads, writes)

    return prepare


def _channels_to_space(resolution: int, channels: int):
    def prepare(settings: Settings) -> Prepared:
        fine, coords, mask = (t.to(settings.device) for t in _family(resolution))
        feats = moving.normal(len(coords), 8 * channels).to(settings.device)

        def torch_sort() -> tuple[Tensor, ...]:
            children, parent = _torch_children(coords, mask)
            return children, feats.view(-1, channels)[8 * parent + _child(children)], parent

        # Of the features, only the channels of children that are there.
        reads = (moving.COORD + 8) * len(coords) + 4 * channels * len(fine)
        writes = (moving.COORD + moving.ROW + 4 * channels) * len(fine)
        run = lambda **backend: ops.channel_to_spatial(coords, feats, mask, **backend)  # noqa: E731
        return moving.prepare(run, [("torch argsort, packed keys", "torch", torch_sort)], settings, reads, writes)

    return prepare


# --- dilation and cuts ------------------------------------------------------------------------------------------------


def _dilate(resolution: int):
    def prepare(settings: Settings) -> Prepared:
        coords = moving.band(resolution).to(settings.device)
        offsets = torch.cartesian_prod(*[torch.arange(-1, 2)] * 3).to(settings.device)
        dense = ops.to_dense(coords, torch.ones(len(coords), 1), (resolution,) * 3, 1)[0, 0].numpy() > 0

        def torch_unique() -> Tensor:
            steps = moving.keys(torch.cat([torch.zeros_like(offsets[:, :1]), offsets + 1], -1)) - moving.keys(
                torch.tensor([[0, 1, 1, 1]], device=coords.device)
            )
            return moving.coords(torch.unique((moving.keys(coords)[:, None] + steps).flatten()))

        peers: moving.Peers = [("torch unique of 27 copies", "torch", torch_unique)]
        if find_spec("scipy"):
            from scipy import ndimage

            def scipy_dense() -> np.ndarray:
                found = np.argwhere(ndimage.binary_dilation(dense, np.ones((3, 3, 3), bool))).astype(np.int32)
                return np.concatenate([np.zeros_like(found[:, :1]), found], 1)

            peers.append(("SciPy on the dense grid", "scipy", scipy_dense))
        return moving.prepare(
            lambda **backend: ops.voxel_dilate(coords, 3, spatial_shape=(resolution,) * 3, **backend),
            peers,
            settings,
            reads=moving.COORD * len(coords),
            writes=moving.COORD * len(ops.voxel_dilate(coords)),
            reference=False,
        )

    return prepare


def _plane(resolution: int):
    def prepare(settings: Settings) -> Prepared:
        coords = moving.band(resolution).to(settings.device)
        plane = torch.tensor([0.6, -0.3, 0.7, 0.1], dtype=torch.float64, device=settings.device)
        plane = plane / plane[:3].norm()

        def torch_mask() -> tuple[Tensor, Tensor]:
            centers = (coords[:, 1:].double() + 0.5) * (2 / resolution) - 1
            a, b, c = centers.unbind(-1)
            rows = (plane[0] * a + plane[1] * b + plane[2] * c + plane[3] >= 0).nonzero()[:, 0]
            return coords[rows], rows

        writes = (moving.COORD + moving.ROW) * len(ops.cut_half_space(coords, resolution, plane).rows)
        run = lambda **backend: ops.cut_half_space(coords, resolution, plane, **backend)  # noqa: E731
        peers: moving.Peers = [("torch mask", "torch", torch_mask)]
        return moving.prepare(run, peers, settings, moving.COORD * len(coords), writes, reference=False)

    return prepare


def _front(resolution: int):
    def prepare(settings: Settings) -> Prepared:
        coords = moving.band(resolution).to(settings.device)
        pixels = 512
        K = torch.tensor([[1.2 * pixels, 0, pixels / 2], [0, 1.2 * pixels, pixels / 2], [0, 0, 1]], dtype=torch.float64)
        v, u = torch.meshgrid(*[torch.linspace(-1, 1, pixels, dtype=torch.float64)] * 2, indexing="ij")
        depth, viewmat = 3 + 0.2 * torch.sin(5 * u) * torch.cos(4 * v), torch.eye(4, dtype=torch.float64)
        viewmat[2, 3] = 3
        depth, K, viewmat = (t.to(settings.device) for t in (depth, K, viewmat))
        eye, points = viewmat.new_tensor([0, 0, -3.0]), ops.unproject_depth(depth, K, viewmat)

        def by_rays() -> ops.FrontCut:
            return ops.front_cut_pointmap(coords, resolution, points, eye)

        run = lambda **backend: ops.front_cut(coords, resolution, depth, K, viewmat, **backend)  # noqa: E731
        reads = moving.COORD * len(coords) + 9 * depth.numel()  # depth in float64, and whether it is valid
        writes = (moving.COORD + moving.ROW + 1) * len(run().rows)
        peers: moving.Peers = [("ray casting through a BVH", "cvctoolkit", by_rays)]
        return moving.prepare(run, peers, settings, reads, writes, reference=False)

    return prepare


# --- trilinear sampling -----------------------------------------------------------------------------------------------


def _corners(coords: Tensor, points: Tensor, resolution: int) -> tuple[Tensor, Tensor]:
    """``[Q, 8]`` the rows of the voxels around every point, 0 for absent ones, and their weights."""
    position = (points + 1) * (resolution / 2) - 0.5
    low = position.floor()
    octants = torch.cartesian_prod(*[torch.arange(2)] * 3).to(points.device)
    around = low[:, None].int() + octants
    around = torch.cat([torch.zeros_like(around[..., :1]), around], -1)
    rows = ops.voxel_lookup(coords, around.flatten(0, 1).contiguous()).view(-1, 8)
    upper = (position - low)[:, None]
    weights = torch.where(octants > 0, upper, 1 - upper).prod(-1)
    return rows.clamp_min(0), torch.where(rows >= 0, weights, 0.0)


def _trilinear(resolution: int, channels: int, *, gradients: bool = False):
    def prepare(settings: Settings) -> Prepared:
        coords = moving.band(resolution).to(settings.device)
        feats = moving.normal(len(coords), channels).to(settings.device).requires_grad_(gradients)
        data = workload.load(518)
        queries = workload.band_queries(data.vertices, data.faces, 500_000, 3 / resolution)
        points = torch.from_numpy(queries).to(settings.device).requires_grad_(gradients)
        dense = ops.to_dense(coords, feats.detach(), (resolution,) * 3, 1).requires_grad_(gradients)
        weight = moving.normal(len(points), channels).to(settings.device)

        def finish(value: Tensor, inputs: tuple[Tensor, Tensor]) -> Any:
            if not gradients:
                return value
            by_feats, by_points = torch.autograd.grad((value * weight).sum(), inputs)
            return ops.from_dense(by_feats, coords) if by_feats.dim() > 2 else by_feats, by_points

        def grid_sample() -> Any:
            value = F.grid_sample(dense, points.flip(-1)[None, None, None], align_corners=False)[0, :, 0, 0].T
            return finish(value, (dense, points))

        def run(**backend: str) -> Any:
            return finish(ops.sample_trilinear(coords, feats, points, resolution, **backend), (feats, points))

        rows, samples = 4 * channels * len(coords), 4 * channels * len(points)
        reads, writes = 12 * len(points) + moving.COORD * len(coords) + rows, samples
        if gradients:  # the samples' gradient and the inputs again; the inputs' gradients
            reads, writes = reads + samples + 12 * len(points) + rows, writes + 12 * len(points) + rows
        peers: moving.Peers = [("torch grid_sample, dense", "torch", grid_sample)]
        prepared = moving.prepare(run, peers, settings, reads, writes, tolerance=1e-4)
        if gradients:
            return prepared
        # Eight rows from anywhere for every point are what takes the time: as long as torch takes to add them up when
        # it is told which rows and weights.
        corners, weights = _corners(coords, points, resolution)
        gathered = Contestant(
            "torch embedding_bag, rows and weights given",
            lambda: F.embedding_bag(corners, feats, per_sample_weights=weights, mode="sum"),
            yardstick=True,
        )
        return replace(prepared, contestants=[*prepared.contestants, gathered])

    return prepare


WORKLOADS = [
    Workload("voxels_resample", "downsample mean, 512³ band × 32 channels", _downsample(512, 32)),
    Workload("voxels_resample", "downsample mean, 256³ band × 128 channels", _downsample(256, 128)),
    Workload("voxels_resample", "subdivide, 256³ × 32 channels", _subdivide(512, 32)),
    Workload("voxels_resample", "upsample by child mask, 512³ band × 32 channels", _upsample(512, 32)),
    Workload("voxels_resample", "space to channels, 512³ band × 16 channels", _space_to_channels(512, 16)),
    Workload("voxels_resample", "channels to space, 512³ band × 16 channels", _channels_to_space(512, 16)),
    Workload("voxels_resample", "dilation 3³, 512³ band", _dilate(512), quick=False),
    Workload("voxels_resample", "half-space cut, 512³ band", _plane(512)),
    Workload("voxels_resample", "front cut with seam, 512³ band", _front(512)),
    Workload("voxels_resample", "trilinear, 256³ band × 16 channels", _trilinear(256, 16)),
    Workload(
        "voxels_resample", "trilinear with gradients, 256³ band × 16 channels", _trilinear(256, 16, gradients=True)
    ),
]
