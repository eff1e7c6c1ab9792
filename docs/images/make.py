"""Draws the pictures of README and docs: ``python docs/images/make.py [name …]`` (all without names).

Everything is computed by cvctoolkit.ops from the motorcycle pair; ``demo.png`` is the demo's own contact sheet.
"""

from __future__ import annotations

import math
import runpy
import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image

from cvctoolkit import demo, ops
from cvctoolkit.demo import chain, inputs, pictures

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
INK = pictures.INK
EDGE = 0.03
WIDTH = 1280  # pixels


def save(figure, name: str) -> None:
    """Writes a figure as ``name``.png."""
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        figure.savefig(file.name, dpi=100)
        plt.close(figure)
        shrink(Path(file.name), HERE / f"{name}.png")


def shrink(source: Path, target: Path) -> None:
    """A PNG of at most 300 kB: no wider than a page, of 256 dithered colours if it must be."""
    image = Image.open(source).convert("RGB")
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    image.save(target, optimize=True)
    if target.stat().st_size > 300_000:
        palette = image.quantize(256, method=Image.Quantize.FASTOCTREE)
        image.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(target, optimize=True)
    print(f"{target.name}: {target.stat().st_size / 1000:.0f} kB")


def panels(count: int, shape: float, titles: list[str]):
    """A row of pictures of height/width ``shape``, with titles."""
    width = 14 / count
    figure, axes = plt.subplots(1, count, figsize=(14, width * shape + 0.42), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.03, wspace=0, hspace=0)
    for axis, title in zip(axes, titles, strict=True):
        pictures.decorate(axis, title)
    return figure, axes


def run_chain(view: inputs.View, resolution: int, band: float) -> chain.Result:
    """The demo's chain on a view."""
    options = {"edge": EDGE, "percentile": 0.0, "device": torch.device("cpu"), "stages": chain.Stages()}
    return chain.run(view, resolution, band, **options)


def draw_demo() -> None:
    """The contact sheet of ``cvctoolkit demo``."""
    with tempfile.TemporaryDirectory() as folder:
        if demo.main(["--out", folder]):
            raise SystemExit("the demo failed")
        shrink(Path(folder) / "motorcycle_sheet.png", HERE / "demo.png")


def draw_cameras() -> None:
    """Unprojected points and Plücker coordinates, xyz as red, green, blue."""
    view = inputs.motorcycle()
    height, width = view.depth.shape
    points = ops.unproject_depth(view.depth, view.intrinsics)
    turn = math.radians(35)
    viewmat = torch.eye(4)
    viewmat[:3, :3] = torch.tensor(
        [[math.cos(turn), 0, math.sin(turn)], [0, 1, 0], [-math.sin(turn), 0, math.cos(turn)]]
    )
    viewmat[:3, 3] = torch.tensor([-0.4, 0.3, 2.0])
    rays = ops.plucker_rays(view.intrinsics, viewmat, width, height)
    titles = ["z-depth", "unproject_depth: x, y, z", "plucker_rays: direction d", "plucker_rays: moment o × d"]
    figure, axes = panels(4, height / width, titles)
    axes[0].imshow(view.depth, cmap="Spectral")
    for axis, values in zip(axes[1:], (points, rays[..., :3], rays[..., 3:]), strict=True):
        flat = values[values.isfinite().all(-1)]
        low, high = flat.quantile(0.01, 0), flat.quantile(0.99, 0)
        colors = ((values - low) / (high - low)).clamp(0, 1).nan_to_num(1.0)
        axis.imshow(colors)
    save(figure, "cameras")


def draw_pointmap() -> None:
    """A detail of the photograph, its depth edges, and the triangles over it."""
    view = inputs.motorcycle()
    rows, columns = slice(88, 142), slice(424, 505)
    height, width = rows.stop - rows.start, columns.stop - columns.start
    unknown = ~view.depth.isfinite()
    edges = ops.depth_edge_mask(view.depth, rtol=EDGE)
    mask = (~unknown & ~edges)[rows, columns].contiguous()
    photo = view.image[0, rows, columns].numpy()
    faces = ops.pointmap_faces(mask).numpy()
    titles = ["photograph (detail)", "depth edges (red), no depth (grey)", "two triangles per valid quad"]
    figure, axes = panels(3, height / width, titles)
    axes[0].imshow(photo)
    axes[1].imshow(photo // 3 + 160)
    marks = np.zeros((height, width, 4))
    marks[edges[rows, columns].numpy()] = (0.83, 0.18, 0.16, 1)
    marks[unknown[rows, columns].numpy()] = (0.55, 0.6, 0.66, 1)
    axes[1].imshow(marks)
    i, j = np.divmod(np.arange(height * width), width)
    depth = view.depth[rows, columns].reshape(-1).numpy()
    colors = depth[faces].mean(1)
    axes[2].tripcolor(j, i, faces, facecolors=colors, cmap="Spectral", edgecolors="white", linewidth=0.25)
    axes[2].set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes[2].set_aspect("equal")
    save(figure, "pointmap")


def draw_mesh() -> None:
    """Rays, closest points and normals of the motorcycle's point-map mesh."""
    view = inputs.motorcycle()
    result = run_chain(view, 128, 4)
    mesh = result.mesh
    renderer = pictures.Renderer(mesh.vertices, mesh.faces)
    camera = pictures.photo_camera(view, result)
    height, width = camera.height, camera.width
    titles = ["cast_rays: t", "vertex_normals at the hits", "closest_point_on_mesh, a level slice"]
    figure, axes = panels(3, height / width, titles)
    origins, directions = (x.reshape(-1, 3) for x in ops.camera_rays(camera.intrinsics, camera.viewmat, width, height))
    t = ops.cast_rays(origins.contiguous(), directions.contiguous(), mesh.vertices, mesh.faces, renderer.bvh)[0]
    axes[0].imshow(t.masked_fill(t.isinf(), torch.nan).view(height, width), cmap="viridis_r")
    axes[1].imshow(renderer.normal_picture(camera))
    x, z = torch.meshgrid(torch.linspace(-0.75, 0.75, 2 * width), torch.linspace(-1, 0, 2 * height), indexing="xy")
    level = float(mesh.vertices[:, 1].quantile(0.45))
    queries = torch.stack([x, torch.full_like(x, level), z], -1).reshape(-1, 3)
    distance = ops.closest_point_on_mesh(queries, mesh.vertices, mesh.faces, renderer.bvh)[0].view(x.shape)
    axes[2].imshow(distance, cmap="magma_r", vmax=0.25)
    axes[2].contour(distance, levels=np.linspace(0.01, 0.25, 9), colors="#ffffff66", linewidths=0.6)
    save(figure, "mesh")


def wavy_view(size: int = 400) -> inputs.View:
    """A smooth surface without holes: its shell should have Euler number 2."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, size)] * 2, indexing="ij")
    z = 0.25 * torch.sin(4 * x) * torch.cos(3 * y)
    return inputs.View("wave", points=torch.stack([x, y, z], -1)[None])


def draw_sdf() -> None:
    """Thin shells of one surface by band, and the thin SDF in a slice."""
    resolution, view = 72, wavy_view()
    titles, images = [], []
    for band, ambiguous in ((1, "separate"), (1, "join"), (3, "join")):
        result = run_chain(view, resolution, band)
        shell = ops.marching_cubes(result.coords, result.sdf, resolution, ambiguous=ambiguous)
        camera = pictures.orbit_camera(result.mesh.vertices, 400, 300, -35, 30)
        images.append(pictures.Renderer(shell.vertices, shell.faces).normal_picture(camera))
        euler = len(shell.vertices) - len(shell.faces) // 2  # V − E + F with E = 3 F / 2
        kind = ", classical cells" if ambiguous == "separate" else ""
        titles.append(f"band ±{band:g}{kind}: Euler {euler:,}".replace("-", "−"))
    figure, axes = panels(4, 0.75, [*titles, "thin SDF at ±3 and its zero level"])
    for axis, image in zip(axes[:3], images, strict=True):
        axis.imshow(image)
    window = slice(0, 40), slice(resolution // 2 - 15, resolution // 2 + 15)  # x, z
    grid = torch.full((resolution, resolution), torch.nan)
    here = result.coords[:, 2] == resolution // 2
    grid[result.coords[here, 1].long(), result.coords[here, 3].long()] = result.sdf[here]
    section = grid[window].T
    axes[3].imshow(section, cmap="RdBu", vmin=-1, vmax=1)
    axes[3].contour(section.nan_to_num(1), levels=[0], colors=INK, linewidths=1.6)
    save(figure, "sdf")


def draw_epipolar() -> None:
    """Both pictures of examples/epipolar_motorcycle.py."""
    example = runpy.run_path(str(HERE.parents[1] / "examples" / "epipolar_motorcycle.py"))
    with tempfile.TemporaryDirectory() as folder:
        example["main"](["--out", folder])
        for name in ("epipolar", "epipolar_samples"):
            shrink(Path(folder) / f"{name}.png", HERE / f"{name}.png")


def draw_distillation() -> None:
    """The picture of examples/distillation_toy.py."""
    example = runpy.run_path(str(HERE.parents[1] / "examples" / "distillation_toy.py"))
    with tempfile.TemporaryDirectory() as folder:
        example["main"](["--out", folder])
        shrink(Path(folder) / "distillation.png", HERE / "distillation.png")


def draw_voxel_orders() -> None:
    """The path that each order of voxels takes through a slice, coloured from first to last."""
    size = 8
    coords = torch.nn.functional.pad(torch.cartesian_prod(*[torch.arange(size)] * 2), (1, 1))
    orders = [("lexicographic", {}), ("morton", {}), ("hilbert", {}), ("block", {"block_size": 4})]
    titles = [f"{name}{', block_size=4' if options else ''}" for name, options in orders]
    figure, axes = panels(4, 1.0, titles)
    for axis, (name, options) in zip(axes, orders, strict=True):
        path = ops.voxel_sort(coords, name, **options).coords[:, 1:3]
        axis.plot(path[:, 0], path[:, 1], color=INK, linewidth=1, zorder=1)
        axis.scatter(path[:, 0], path[:, 1], c=range(size * size), cmap="viridis", s=30, zorder=2)
        axis.set_aspect("equal")
    save(figure, "voxel_orders")


def draw_flow() -> None:
    """The picture of examples/masked_flow.py."""
    example = runpy.run_path(str(HERE.parents[1] / "examples" / "masked_flow.py"))
    with tempfile.TemporaryDirectory() as folder:
        example["main"](["--out", folder])
        shrink(Path(folder) / "flow.png", HERE / "flow.png")


def draw_sparse_vae() -> None:
    """The picture of examples/sparse_vae.py."""
    example = runpy.run_path(str(HERE.parents[1] / "examples" / "sparse_vae.py"))
    with tempfile.TemporaryDirectory() as folder:
        example["main"](["--out", folder])
        shrink(Path(folder) / "sparse_vae.png", HERE / "sparse_vae.png")


def draw_matching() -> None:
    """Two views of one surface with their best matches, and the score as the views drift apart."""
    points = wavy_view(72).points[0]
    g = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(torch.randn(1, 3, 6, 6, generator=g), (72, 72), mode="bicubic")[0]
    wave, scales = smooth.movedim(0, -1), torch.linspace(0, 0.12, 13)
    # As confident as a stereo model would be that knows how far its second view is off.
    confidence = 1 + 4 * torch.exp(-(wave.norm(dim=-1) ** 2))
    titles = ["view i", "view j in the frame of i, 60 best matches", "score as the views drift apart (cube: ±1)"]
    figure, axes = panels(3, 0.8, titles)
    moved = points + 0.04 * wave
    found = ops.reciprocal_matches(points, moved, max_distance=0.03)
    best = confidence.flatten()[found.index_a].topk(60).indices
    ends = [p.reshape(-1, 3)[i[best]] for p, i in ((points, found.index_a), (moved, found.index_b))]
    for axis, view, marks in zip(axes[:2], (points, moved), ends, strict=True):
        axis.scatter(*view.reshape(-1, 3)[:, :2].T, c=view[..., 2].flatten(), s=2.2, cmap="Spectral", linewidths=0)
        axis.scatter(*marks[:, :2].T, c=range(60), s=26, cmap="hsv", edgecolors=INK, linewidths=0.6)
        axis.set_aspect("equal")
    for kind in ("min", "mean", "geometric"):
        scores = [
            ops.cvc_score(
                torch.stack([points, points + s * wave])[None], torch.stack([confidence, confidence])[None],
                max_distance=0.01, match_confidence=kind, too_few="pad_with_zeros",
            ).score
            for s in scales
        ]  # fmt: skip
        axes[2].plot(scales, scores, label=kind)
    axes[2].axis("on")
    axes[2].set(xlabel="drift", ylabel="cvc_score", xticks=scales[::4].tolist(), yticks=range(0, 6))
    axes[2].legend(frameon=False)
    save(figure, "matching")


DRAWINGS = {
    "demo": draw_demo,
    "cameras": draw_cameras,
    "pointmap": draw_pointmap,
    "mesh": draw_mesh,
    "sdf": draw_sdf,
    "epipolar": draw_epipolar,
    "distillation": draw_distillation,
    "voxel_orders": draw_voxel_orders,
    "flow": draw_flow,
    "sparse_vae": draw_sparse_vae,
    "matching": draw_matching,
}

if __name__ == "__main__":
    for chosen in sys.argv[1:] or DRAWINGS:
        DRAWINGS[chosen]()
