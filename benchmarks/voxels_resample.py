"""Dense ↔ sparse, dilation, cuts, resampling and trilinear sampling, against plain torch, SciPy and NumPy.

The voxels are the narrow band of the scene's mesh. Peers that need a dense volume get it for nothing: only what they do
with it is timed. Most of this work is movement, so every workload states the bytes that it must read (inputs, once) and
write (outputs, once), and a copy of as many bytes takes part.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import workload
from benchmarks.harness import Contestant, Prepared, Settings, Workload, copy_of, ours
from benchmarks.peers import scattered_lines
from cvctoolkit import ops

BAND = 2
COORD, ROW = 16, 8  # bytes of a voxel's coordinates, of a row index


@functools.cache
def _band(resolution: int) -> Tensor:
    """``[N, 4]`` the voxels within two of the surface, in lexicographic order."""
    data = workload.load(518)
    vertices, faces = torch.from_numpy(data.vertices), torch.from_numpy(data.faces)
    return ops.narrow_band_udf(vertices, faces, resolution, BAND).coords


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _arrays(result: Any) -> list[np.ndarray]:
    result = (result,) if isinstance(result, (Tensor, np.ndarray)) else result
    return [r.detach().cpu().numpy() if isinstance(r, Tensor) else r for r in result if r is not None]


def _compare(tolerance: float) -> Callable[[Any, Any], str]:
    """Integers bit for bit, floats within a tolerance of the largest value."""

    def check(found: list[np.ndarray], truth: list[np.ndarray]) -> str:
        for a, b in zip(found, truth, strict=True):
            if a.shape != b.shape:
                return f"shape {list(a.shape)} instead of {list(b.shape)}"
            limit = tolerance * float(np.abs(b).max(initial=0)) if b.dtype.kind == "f" else 0
            if different := int((np.abs(a.astype(np.float64) - b) > limit).sum()):
                return f"{different} of {a.size} values differ"
        return ""

    return check


Peers = list[tuple[str, str, Callable[[], Any]]]


def _prepared(
    run: Callable[..., Any],
    peers: Peers,
    settings: Settings,
    reads: int,
    writes: int,
    *,
    tolerance: float = 0.0,
    reference: bool = True,
    read: Callable[[Any], Any] = _arrays,
) -> Prepared:
    """The first peer is the truth; our native kernels, our reference and a copy of the same bytes follow."""
    found = [
        Contestant(name, peer, read=read, package=package, truth=k == 0)
        for k, (name, package, peer) in enumerate(peers)
    ]
    found += ours(lambda device: run, settings, by_isa=False, on_cpu_too=False, read=read)
    if reference:
        found.append(Contestant("cvctoolkit (reference)", lambda: run(backend="reference"), read=read))
    found.append(copy_of(reads, writes, settings.device))
    return Prepared(found, _compare(tolerance), floor_bytes=reads + writes, items=lambda truth: len(truth[0]))


def _keys(coords: Tensor) -> Tensor:
    b, x, y, z = coords.long().unbind(-1)
    return b << 48 | x << 32 | y << 16 | z


def _coords(keys: Tensor) -> Tensor:
    return torch.stack([keys >> 48, keys >> 32 & 65535, keys >> 16 & 65535, keys & 65535], -1).int()


def _cells(coords: Tensor, resolution: int) -> Tensor:
    """``[N]`` the place of every voxel in the dense volume of batch 0."""
    _, x, y, z = coords.long().unbind(-1)
    return (x * resolution + y) * resolution + z


# --- dense ↔ sparse ---------------------------------------------------------------------------------------------------


def _occupancy(resolution: int):
    def prepare(settings: Settings) -> Prepared:
        coords = _band(resolution)
        dense = ops.to_dense(coords, torch.ones(len(coords), 1), (resolution,) * 3, 1)[:, 0]
        volume, array = dense.to(settings.device), dense.numpy()
        peers: Peers = [
            ("torch nonzero", "torch", lambda: (volume > 0.5).nonzero().int()),
            ("NumPy argwhere", "numpy", lambda: np.argwhere(array > 0.5).astype(np.int32)),
        ]
        return _prepared(
            lambda **backend: ops.occupancy_to_coords(volume, 0.5, **backend),
            peers,
            settings,
            reads=4 * volume.numel(),
            writes=COORD * len(coords),
            reference=False,
        )

    return prepare


def _to_dense(resolution: int, channels: int):
    def prepare(settings: Settings) -> Prepared:
        coords = _band(resolution).to(settings.device)
        feats = _normal(len(coords), channels).to(settings.device)

        def torch_index() -> Tensor:
            dense = feats.new_zeros(1, resolution, resolution, resolution, channels)
            dense[tuple(coords.long().unbind(-1))] = feats
            return dense.movedim(-1, 1).contiguous()

        def torch_channels_first() -> Tensor:
            dense = feats.new_zeros(channels, resolution**3)
            dense[:, _cells(coords, resolution)] = feats.T
            return dense.view(1, channels, resolution, resolution, resolution)

        return _prepared(
            lambda **backend: ops.to_dense(coords, feats, (resolution,) * 3, 1, **backend),
            [("torch index_put", "torch", torch_index), ("torch per channel", "torch", torch_channels_first)],
            settings,
            reads=(COORD + 4 * channels) * len(coords),
            writes=4 * channels * resolution**3,
        )

    return prepare


def _from_dense(resolution: int, channels: int, *, from_ours: bool = False):
    """Out of a volume that torch made, in small pages of memory, or `to_dense`, in huge ones where the system has them.

    What must move is counted in lines of the cache, the least that can be read.

    Of the voxels alone, 4 bytes a cell: 7.8 MB of the band at 256³ with 8 channels; in the distinct lines of 64 bytes
    that these cells lie in, plane by plane: 26.3 MB. The copy reads as many bytes one after the other. How long these
    very lines take, and the coordinates and rows, is the other yardstick's time.
    """

    def prepare(settings: Settings) -> Prepared:
        coords = _band(resolution).to(settings.device)
        if from_ours:
            feats = _normal(len(coords), channels).to(settings.device)
            dense = ops.to_dense(coords, feats, (resolution,) * 3, 1)
        else:
            dense = _normal(1, channels, *(resolution,) * 3).to(settings.device)

        def torch_index() -> Tensor:
            return dense.view(channels, -1)[:, _cells(coords, resolution)].T.contiguous()

        # A cell cannot be read without its line of the cache, 16 cells; these lie far apart.
        lines = torch.unique(_cells(coords, resolution) // 16)
        prepared = _prepared(
            lambda **backend: ops.from_dense(dense, coords, **backend),
            [("torch indexing", "torch", torch_index)],
            settings,
            reads=COORD * len(coords) + 64 * channels * len(lines),
            writes=4 * channels * len(coords),
            reference=False,
        )
        if settings.device != "cpu" or not scattered_lines.available():
            return prepared
        first = 16 * lines
        moved = Contestant(
            "the same lines, coordinates and rows alone (C++)",
            lambda: scattered_lines.touch(dense, first, coords, settings.threads),
            yardstick=True,
        )
        return replace(prepared, contestants=[*prepared.contestants, moved])

    return prepare


# --- resampling -------------------------------------------------------------------------------------------------------


def _downsample(resolution: int, channels: int):
    def prepare(settings: Settings) -> Prepared:
        coords = _band(resolution).to(settings.device)
        feats = _normal(len(coords), channels).to(settings.device)
        half = torch.tensor([1, 2, 2, 2], device=settings.device)

        def pooled(inverse: Tensor, counts: Tensor) -> Tensor:
            return feats.new_zeros(len(counts), channels).index_add_(0, inverse, feats) / counts[:, None]

        def torch_keys() -> tuple[Tensor, ...]:
            keys, inverse, counts = torch.unique(_keys(coords // half), return_inverse=True, return_counts=True)
            return _coords(keys), pooled(inverse, counts), inverse, counts

        def torch_rows() -> tuple[Tensor, ...]:
            coarse, inverse, counts = torch.unique(coords // half, dim=0, return_inverse=True, return_counts=True)
            return coarse.int(), pooled(inverse, counts), inverse, counts

        coarse = len(ops.downsample(coords).coords)
        reads = (COORD + 4 * channels) * len(coords)
        writes = ROW * len(coords) + (COORD + ROW + 4 * channels) * coarse
        peers: Peers = [
            ("torch unique, packed keys", "torch", torch_keys),
            ("torch unique(dim=0)", "torch", torch_rows),
        ]
        run = lambda **backend: ops.downsample(coords, feats, **backend)  # noqa: E731
        return _prepared(run, peers, settings, reads, writes, tolerance=1e-6)

    return prepare


def _subdivide(resolution: int, channels: int):
    def prepare(settings: Settings) -> Prepared:
        coords = ops.downsample(_band(resolution)).coords.to(settings.device)
        feats = _normal(len(coords), channels).to(settings.device)
        octants = torch.cartesian_prod(*[torch.arange(2)] * 3).to(settings.device)

        def torch_sort() -> tuple[Tensor, ...]:
            fine = torch.cat([coords[:, None, :1].expand(-1, 8, 1), 2 * coords[:, None, 1:] + octants], -1).flatten(
                0, 1
            )
            order = torch.argsort(_keys(fine))
            parent = order // 8
            return fine[order].int(), feats[parent], parent

        reads = (COORD + 4 * channels) * len(coords)
        writes = 8 * (COORD + ROW + 4 * channels) * len(coords)
        run = lambda **backend: ops.subdivide(coords, feats, **backend)  # noqa: E731
        return _prepared(run, [("torch argsort, packed keys", "torch", torch_sort)], settings, reads, writes)

    return prepare


def _family(resolution: int) -> tuple[Tensor, Tensor, Tensor]:
    """The band, its coarser voxels, and which of their children are in the band."""
    coords = _band(resolution)
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
    order = torch.argsort(_keys(fine))
    return fine[order].int(), parent[order]


def _upsample(resolution: int, channels: int):
    def prepare(settings: Settings) -> Prepared:
        fine, coords, mask = (t.to(settings.device) for t in _family(resolution))
        feats = _normal(len(coords), channels).to(settings.device)

        def torch_sort() -> tuple[Tensor, ...]:
            children, parent = _torch_children(coords, mask)
            return children, feats[parent], parent

        reads, writes = (COORD + 4 * channels + 8) * len(coords), (COORD + ROW + 4 * channels) * len(fine)
        run = lambda **backend: ops.upsample(coords, feats, mask, **backend)  # noqa: E731
        return _prepared(run, [("torch argsort, packed keys", "torch", torch_sort)], settings, reads, writes)

    return prepare


def _space_to_channels(resolution: int, channels: int):
    def prepare(settings: Settings) -> Prepared:
        coords, coarse, _ = (t.to(settings.device) for t in _family(resolution))
        feats = _normal(len(coords), channels).to(settings.device)
        half = torch.tensor([1, 2, 2, 2], device=settings.device)

        def torch_keys() -> tuple[Tensor, ...]:
            keys, inverse, counts = torch.unique(_keys(coords // half), return_inverse=True, return_counts=True)
            stacked = feats.new_zeros(8 * len(keys), channels)
            stacked[8 * inverse + _child(coords)] = feats
            return _coords(keys), stacked.view(len(keys), 8 * channels), inverse, counts

        reads = (COORD + 4 * channels) * len(coords)
        writes = ROW * len(coords) + (COORD + ROW + 32 * channels) * len(coarse)
        run = lambda **backend: ops.spatial_to_channel(coords, feats, **backend)  # noqa: E731
        return _prepared(run, [("torch unique, packed keys", "torch", torch_keys)], settings, reads, writes)

    return prepare


def _channels_to_space(resolution: int, channels: int):
    def prepare(settings: Settings) -> Prepared:
        fine, coords, mask = (t.to(settings.device) for t in _family(resolution))
        feats = _normal(len(coords), 8 * channels).to(settings.device)

        def torch_sort() -> tuple[Tensor, ...]:
            children, parent = _torch_children(coords, mask)
            return children, feats.view(-1, channels)[8 * parent + _child(children)], parent

        # Of the features, only the channels of children that are there.
        reads = (COORD + 8) * len(coords) + 4 * channels * len(fine)
        writes = (COORD + ROW + 4 * channels) * len(fine)
        run = lambda **backend: ops.channel_to_spatial(coords, feats, mask, **backend)  # noqa: E731
        return _prepared(run, [("torch argsort, packed keys", "torch", torch_sort)], settings, reads, writes)

    return prepare


def _gather(resolution: int, channels: int):
    def prepare(settings: Settings) -> Prepared:
        coords = _band(resolution)
        part = coords[coords[:, 1] % 2 == 0]
        index = ops.voxel_lookup(part, coords).to(settings.device)
        feats = _normal(len(part), channels).to(settings.device)

        def torch_where() -> Tensor:
            return torch.where((index >= 0)[:, None], feats[index.clamp_min(0)], 0.0)

        def torch_put() -> Tensor:
            out = feats.new_zeros(len(index), channels)
            known = index >= 0
            out[known] = feats[index[known]]
            return out

        reads, writes = ROW * len(index) + 4 * channels * len(part), 4 * channels * len(index)
        peers: Peers = [("torch where", "torch", torch_where), ("torch masked put", "torch", torch_put)]
        run = lambda **backend: ops.gather_features(feats, index, **backend)  # noqa: E731
        return _prepared(run, peers, settings, reads, writes)

    return prepare


# --- dilation and cuts ------------------------------------------------------------------------------------------------


def _dilate(resolution: int):
    def prepare(settings: Settings) -> Prepared:
        coords = _band(resolution).to(settings.device)
        offsets = torch.cartesian_prod(*[torch.arange(-1, 2)] * 3).to(settings.device)
        dense = ops.to_dense(coords, torch.ones(len(coords), 1), (resolution,) * 3, 1)[0, 0].numpy() > 0

        def torch_unique() -> Tensor:
            steps = _keys(torch.cat([torch.zeros_like(offsets[:, :1]), offsets + 1], -1)) - _keys(
                torch.tensor([[0, 1, 1, 1]], device=coords.device)
            )
            return _coords(torch.unique((_keys(coords)[:, None] + steps).flatten()))

        peers: Peers = [("torch unique of 27 copies", "torch", torch_unique)]
        if find_spec("scipy"):
            from scipy import ndimage

            def scipy_dense() -> np.ndarray:
                found = np.argwhere(ndimage.binary_dilation(dense, np.ones((3, 3, 3), bool))).astype(np.int32)
                return np.concatenate([np.zeros_like(found[:, :1]), found], 1)

            peers.append(("SciPy on the dense grid", "scipy", scipy_dense))
        return _prepared(
            lambda **backend: ops.voxel_dilate(coords, 3, spatial_shape=(resolution,) * 3, **backend),
            peers,
            settings,
            reads=COORD * len(coords),
            writes=COORD * len(ops.voxel_dilate(coords)),
            reference=False,
        )

    return prepare


def _plane(resolution: int):
    def prepare(settings: Settings) -> Prepared:
        coords = _band(resolution).to(settings.device)
        plane = torch.tensor([0.6, -0.3, 0.7, 0.1], dtype=torch.float64, device=settings.device)
        plane = plane / plane[:3].norm()

        def torch_mask() -> tuple[Tensor, Tensor]:
            centers = (coords[:, 1:].double() + 0.5) * (2 / resolution) - 1
            a, b, c = centers.unbind(-1)
            rows = (plane[0] * a + plane[1] * b + plane[2] * c + plane[3] >= 0).nonzero()[:, 0]
            return coords[rows], rows

        writes = (COORD + ROW) * len(ops.cut_half_space(coords, resolution, plane).rows)
        run = lambda **backend: ops.cut_half_space(coords, resolution, plane, **backend)  # noqa: E731
        peers: Peers = [("torch mask", "torch", torch_mask)]
        return _prepared(run, peers, settings, COORD * len(coords), writes, reference=False)

    return prepare


def _front(resolution: int):
    def prepare(settings: Settings) -> Prepared:
        coords = _band(resolution).to(settings.device)
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
        reads = COORD * len(coords) + 9 * depth.numel()  # depth in float64, and whether it is valid
        writes = (COORD + ROW + 1) * len(run().rows)
        peers: Peers = [("ray casting through a BVH", "cvctoolkit", by_rays)]
        return _prepared(run, peers, settings, reads, writes, reference=False)

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
        coords = _band(resolution).to(settings.device)
        feats = _normal(len(coords), channels).to(settings.device).requires_grad_(gradients)
        data = workload.load(518)
        queries = workload.band_queries(data.vertices, data.faces, 500_000, 3 / resolution)
        points = torch.from_numpy(queries).to(settings.device).requires_grad_(gradients)
        dense = ops.to_dense(coords, feats.detach(), (resolution,) * 3, 1).requires_grad_(gradients)
        weight = _normal(len(points), channels).to(settings.device)

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
        reads, writes = 12 * len(points) + COORD * len(coords) + rows, samples
        if gradients:  # the samples' gradient and the inputs again; the inputs' gradients
            reads, writes = reads + samples + 12 * len(points) + rows, writes + 12 * len(points) + rows
        peers: Peers = [("torch grid_sample, dense", "torch", grid_sample)]
        prepared = _prepared(run, peers, settings, reads, writes, tolerance=1e-4)
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
    Workload("voxels_resample", "occupancy to coordinates, 256³", _occupancy(256)),
    Workload("voxels_resample", "to dense, 256³ × 8 channels", _to_dense(256, 8)),
    Workload("voxels_resample", "to dense, 128³ × 32 channels", _to_dense(128, 32)),
    Workload("voxels_resample", "from dense, 256³ × 8 channels", _from_dense(256, 8)),
    Workload("voxels_resample", "from dense of to_dense, 256³ × 8 channels", _from_dense(256, 8, from_ours=True)),
    Workload("voxels_resample", "from dense, 256³ × 32 channels", _from_dense(256, 32), quick=False),
    Workload(
        "voxels_resample",
        "from dense of to_dense, 256³ × 32 channels",
        _from_dense(256, 32, from_ours=True),
        quick=False,
    ),
    Workload("voxels_resample", "from dense, 512³ × 1 channel", _from_dense(512, 1)),
    Workload("voxels_resample", "downsample mean, 512³ band × 32 channels", _downsample(512, 32)),
    Workload("voxels_resample", "downsample mean, 256³ band × 128 channels", _downsample(256, 128)),
    Workload("voxels_resample", "subdivide, 256³ × 32 channels", _subdivide(512, 32)),
    Workload("voxels_resample", "upsample by child mask, 512³ band × 32 channels", _upsample(512, 32)),
    Workload("voxels_resample", "space to channels, 512³ band × 16 channels", _space_to_channels(512, 16)),
    Workload("voxels_resample", "channels to space, 512³ band × 16 channels", _channels_to_space(512, 16)),
    Workload("voxels_resample", "part in its superset, 512³ band × 32 channels", _gather(512, 32)),
    Workload("voxels_resample", "dilation 3³, 512³ band", _dilate(512), quick=False),
    Workload("voxels_resample", "half-space cut, 512³ band", _plane(512)),
    Workload("voxels_resample", "front cut with seam, 512³ band", _front(512)),
    Workload("voxels_resample", "trilinear, 256³ band × 16 channels", _trilinear(256, 16)),
    Workload(
        "voxels_resample", "trilinear with gradients, 256³ band × 16 channels", _trilinear(256, 16, gradients=True)
    ),
]
