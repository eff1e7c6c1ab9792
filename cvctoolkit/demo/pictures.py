"""The contact sheet: photograph, depth, mask, and ray-cast pictures of the meshes."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cvctoolkit import ops
from cvctoolkit.demo.chain import Checks, Result
from cvctoolkit.demo.inputs import View

PICTURE_WIDTH = 400  # about what a panel has on the sheet
SUPERSAMPLING = 2
INK, PAPER = "#1d2530", "#ffffff"


class Camera(NamedTuple):
    """A pinhole camera in the normalised cube, of a picture's size."""

    intrinsics: Tensor
    viewmat: Tensor
    width: int
    height: int

    def rays(self) -> tuple[Tensor, Tensor]:
        """Origins and unit directions ``[h * w, 3]`` of the supersampled picture."""
        intrinsics = ops.rescale_intrinsics(self.intrinsics, float(SUPERSAMPLING))
        size = self.width * SUPERSAMPLING, self.height * SUPERSAMPLING
        origins, directions = ops.camera_rays(intrinsics, self.viewmat, *size)
        return origins.reshape(-1, 3).contiguous(), directions.reshape(-1, 3).contiguous()


def photo_camera(view: View, result: Result) -> Camera:
    """The camera that took the depth map; for point maps one that looks along +z at all of them."""
    if view.depth is None or view.intrinsics is None:
        return orbit_camera(result.mesh.vertices, PICTURE_WIDTH, PICTURE_WIDTH * 3 // 4, 0, 0)
    height, width = view.depth.shape
    scale = PICTURE_WIDTH / width
    intrinsics = ops.rescale_intrinsics(view.intrinsics, scale)
    viewmat = torch.eye(4)
    viewmat[:3, 3] = (result.center / result.scale).cpu()  # camera space over the scale: directions stay
    device = result.points.device
    return Camera(intrinsics.to(device), viewmat.to(device), PICTURE_WIDTH, max(1, round(height * scale)))


def orbit_camera(vertices: Tensor, width: int, height: int, yaw: float, pitch: float) -> Camera:
    """A camera turned round the cube's centre by degrees, zoomed so that the vertices fill the picture."""
    y, x = math.radians(yaw), math.radians(pitch)
    turn_y = torch.tensor([[math.cos(y), 0, -math.sin(y)], [0, 1, 0], [math.sin(y), 0, math.cos(y)]])
    turn_x = torch.tensor([[1, 0, 0], [0, math.cos(x), -math.sin(x)], [0, math.sin(x), math.cos(x)]])
    viewmat = torch.eye(4)
    viewmat[:3, :3] = turn_x @ turn_y
    viewmat[2, 3] = 4.6
    viewmat = viewmat.to(vertices)
    seen = ops.project_points(vertices, torch.eye(3).to(vertices), viewmat).uv
    low, high = seen.amin(0), seen.amax(0)
    size = torch.tensor([width, height]).to(vertices)
    focal = float((0.92 * size / (high - low)).amin())
    centre = size / 2 - focal * (low + high) / 2
    intrinsics = torch.tensor([[focal, 0, float(centre[0])], [0, focal, float(centre[1])], [0, 0, 1]])
    return Camera(intrinsics.to(vertices), viewmat, width, height)


class Renderer:
    """Casts rays at one mesh."""

    def __init__(self, vertices: Tensor, faces: Tensor) -> None:
        self.vertices, self.faces = vertices, faces
        self.normals = ops.vertex_normals(vertices, faces)
        self.bvh = ops.build_bvh(vertices, faces)

    def _cast(self, camera: Camera) -> tuple[Tensor, Tensor, Tensor]:
        """Hit mask, its faces' corners ``[n, 3]`` and its barycentrics."""
        _, face, weights = ops.cast_rays(*camera.rays(), self.vertices, self.faces, self.bvh)
        hit = face >= 0
        return hit, self.faces[face[hit].long()].long(), weights[hit]

    def normal_picture(self, camera: Camera) -> np.ndarray:
        """Camera-space normals as colours (x right, y up, z towards the viewer), white where nothing is hit."""
        hit, corners, weights = self._cast(camera)
        normals = (self.normals[corners] * weights[..., None]).sum(1) @ camera.viewmat[:3, :3].T
        normals = torch.nn.functional.normalize(normals * normals.new_tensor([1, -1, -1]), dim=-1)
        return self._picture(camera, hit, normals * 0.5 + 0.5)

    def color_picture(self, camera: Camera, colors: Tensor) -> np.ndarray:
        """Vertex colours ``[Nv, 3]`` uint8 under a little light from the camera."""
        hit, corners, weights = self._cast(camera)
        color = (colors[corners].float() / 255 * weights[..., None]).sum(1)
        normals = (self.normals[corners] * weights[..., None]).sum(1) @ camera.viewmat[:3, :3].T
        facing = torch.nn.functional.normalize(normals, dim=-1)[:, 2:].abs()
        return self._picture(camera, hit, color * (0.55 + 0.45 * facing))

    @staticmethod
    def _picture(camera: Camera, hit: Tensor, color: Tensor) -> np.ndarray:
        s = SUPERSAMPLING
        pixels = torch.ones(len(hit), 3, device=hit.device)
        pixels[hit] = color.float()
        pixels = pixels.view(camera.height, s, camera.width, s, 3).mean((1, 3))
        return (pixels * 255).round().to(torch.uint8).cpu().numpy()


def contact_sheet(view: View, result: Result, checks: Checks, colors: Tensor | None, path: Path) -> None:
    """Writes the eight pictures of a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    camera = photo_camera(view, result)
    shell = Renderer(result.shell.vertices, result.shell.faces)
    shape = camera.height / camera.width
    orbit = partial(orbit_camera, result.mesh.vertices, camera.width, camera.height)
    figure, axes = plt.subplots(2, 4, figsize=(16, 7.8 * shape + 1.4), facecolor=PAPER, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.06, wspace=0, hspace=0)

    photo, depth, mask = _first_maps(view, result)
    panels = [
        ("photograph" if view.image is not None else "no photograph given", photo),
        ("depth" if view.depth is not None else "distance to the first camera", depth),
        (f"valid pixels ({100 * float(result.mask.float().mean()):.0f} %)", mask),
        (
            f"point-map mesh, {_short(len(result.mesh.faces))} triangles",
            Renderer(result.mesh.vertices, result.mesh.faces).normal_picture(camera),
        ),
        (f"thin shell, front, {_short(len(result.shell.faces))} triangles", shell.normal_picture(camera)),
        ("thin shell, back", shell.normal_picture(orbit(180 - 30, 14))),
    ]
    oblique = orbit(-30, 14)
    if colors is None:
        panels.append(("thin shell, from the side", shell.normal_picture(oblique)))
    else:
        panels.append(("thin shell, photograph's colours", shell.color_picture(oblique, colors)))
    for axis, (title, picture) in zip(axes.flat, panels, strict=False):
        axis.imshow(picture, interpolation="antialiased")
        decorate(axis, title)
    _section(axes.flat[7], result, shape)

    closed = "watertight" if checks.watertight else "not watertight"
    figure.suptitle(
        f"{view.name} → thin shell at {result.resolution}³, band ±{result.band:g} voxels: {closed}, "
        f"Euler number {checks.euler:,}".replace("-", "−"),
        fontsize=17,
        color=INK,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def decorate(axis, title: str) -> None:
    """Title, no ticks, a light frame."""
    axis.set_title(title, fontsize=13, color=INK, pad=6)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color="#c9d1da", linewidth=0.8)


def _short(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count / 1e3:.0f} k" if count >= 1e4 else f"{count:,}"


def _first_maps(view: View, result: Result) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photograph, coloured depth and mask; several maps next to each other."""
    import matplotlib as mpl

    def row(maps: Tensor) -> np.ndarray:
        return np.concatenate(list(maps.cpu().numpy()), axis=1)

    mask = result.mask
    depth = view.depth[None] if view.depth is not None else view.points.double().norm(dim=-1)  # type: ignore[union-attr]
    depth = row(torch.where(mask.cpu() | depth.isfinite(), depth, torch.nan))
    low, high = np.nanpercentile(np.where(row(mask), depth, np.nan), [1, 99])
    colored = mpl.colormaps["Spectral"](mpl.colors.Normalize(low, high)(depth))[..., :3]
    colored[~np.isfinite(depth)] = 1
    if view.image is None:
        photo = np.full((*depth.shape, 3), 240, np.uint8)
    else:
        photo = row(view.image)
    black_and_white = np.where(row(mask)[..., None], np.array([42, 127, 98]), np.array([236, 239, 242])).astype(
        np.uint8
    )
    return photo, colored, black_and_white


def _section(axis, result: Result, shape: float) -> None:
    """A slice through the thin SDF with its zero level, where the surface is crossed most often along z."""
    window_x = min(64, result.resolution)
    window_z = max(8, round(window_x * shape))
    x, y, z = result.coords[:, 1:].cpu().numpy().T
    sdf = result.sdf.cpu().numpy()
    crossing = (np.diff(z) == 1) & (np.diff(x) == 0) & (np.diff(y) == 0) & ((sdf[1:] < 0) != (sdf[:-1] < 0))
    windows = np.stack([y, x // window_x, z // window_z])[:, 1:][:, crossing]
    windows, counts = np.unique(windows, axis=1, return_counts=True)
    j, i, k = windows[:, counts.argmax()] if counts.size else (0, 0, 0)
    here = (y == j) & (x // window_x == i) & (z // window_z == k)
    picture = np.full((window_z, window_x), np.nan)
    picture[z[here] % window_z, x[here] % window_x] = sdf[here]
    axis.imshow(picture, cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest", aspect="auto", origin="lower")
    axis.contour(np.nan_to_num(picture, nan=1), levels=[0], colors=INK, linewidths=1.6)
    axis.set_box_aspect(shape)
    decorate(axis, f"thin SDF, a slice of {window_x} voxels (red: inside)")
