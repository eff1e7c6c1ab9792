"""``cvctoolkit demo``: a real stereo photograph, or the user's own map, becomes a watertight thin-shell mesh."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

DESCRIPTION = """Turns a depth or point map into a watertight thin-shell mesh: validity mask, triangles, narrow band,
thin SDF, marching cubes. Without files it takes the Middlebury Motorcycle stereo pair that ships in scikit-image."""


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="cvctoolkit demo", description=DESCRIPTION)
    parser.add_argument("--image", type=Path, help="photograph of the map, .png or .jpg, the same size")
    parser.add_argument("--depth", type=Path, help="z-depth: .npy, .npz (key depth, maybe intrinsics) or 16-bit .png")
    parser.add_argument(
        "--points",
        type=Path,
        help=".npy [..., H, W, 3]; .npz of VGGT (world_points, world_points_conf), MoGe (points, mask) or DUSt3R "
        "(pts3d…, conf…); .png canonical coordinate map",
    )
    parser.add_argument("--resolution", type=int, default=512, help="voxels along an axis (default: %(default)s)")
    parser.add_argument("--band", type=float, default=4.0, help="half width in voxels (default: %(default)g)")
    parser.add_argument(
        "--edge", type=float, default=0.03,
        help="jump that cuts the surface: relative for depth, in units of the [-1, 1] cube for points "
        "(default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--percentile", type=float, default=50.0,
        help="percent of the pixels that a confidence map drops (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--fov", type=float, default=60.0, help="horizontal, degrees, for depth without intrinsics")
    parser.add_argument("--depth-scale", type=float, default=1e-3, help="units per integer of a .png depth")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Runs the demo; returns the exit status: 2 for input that cannot be used, said in one line."""
    args = _arguments(argv)
    try:
        _run(args)
    except (ValueError, OSError) as error:  # OSError: the folder for the results cannot be written
        print(f"cvctoolkit demo: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("cvctoolkit"):
            raise
        print(f"cvctoolkit demo: {error.name} is missing: pip install 'cvctoolkit[io]'", file=sys.stderr)
        return 2
    return 0


def _device(name: str):
    import torch

    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device: expected cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu or cuda, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: this torch sees {torch.cuda.device_count()} CUDA devices, got {name!r}")
    return device


def _in_range(option: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{option}: expected {low:g} to {high:g}, got {value:g}")


def _run(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from cvctoolkit.demo import chain, files, inputs, pictures

    console = Console(highlight=False, soft_wrap=True)
    device = _device(args.device)
    _in_range("--resolution", args.resolution, 1, 65536)
    _in_range("--edge", args.edge, 0, float("inf"))
    _in_range("--percentile", args.percentile, 0, 100)
    started = time.perf_counter()
    names = ("read the input", *chain.CHAIN, "colours", "mesh files", "checks", "pictures")
    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(names))
        stages = chain.Stages(
            lambda name, seconds: progress.update(task, description=name, advance=0 if seconds is None else 1)
        )
        with stages.stage("read the input", device):
            view = inputs.load(args.image, args.depth, args.points, fov=args.fov, depth_scale=args.depth_scale)
        stages.made["read the input"] = view.name
        options = {"edge": args.edge, "percentile": args.percentile, "device": device, "stages": stages}
        result = chain.run(view, args.resolution, args.band, **options)
        with stages.stage("colours", device):
            colors = None if view.image is None else chain.shell_colors(result, view.image)
        with stages.stage("mesh files", device):
            mesh, written = files.write_meshes(result, colors, args.out / f"{view.name}_shell")
        with stages.stage("checks", device):
            checks = chain.check(result, mesh)
        with stages.stage("pictures", device):
            sheet = args.out / f"{view.name}_sheet.png"
            pictures.contact_sheet(view, result, checks, colors, sheet)
    stages.made["mesh files"] = ", ".join(path.name for path in written)
    stages.made["pictures"] = sheet.name
    stages.made["checks"] = (
        "watertight" if checks.watertight else "NOT watertight"
    ) + f", Euler number {checks.euler:,}"
    console.print(_table(stages, chain.CHAIN))
    console.print(_distances(checks, result))
    console.print(
        f"{time.perf_counter() - started:.1f} s in all; wrote {args.out}/: {sheet.name}, {stages.made['mesh files']}"
    )


def _table(stages, chain_names: tuple[str, ...]):
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage")
    table.add_column("time", justify="right")
    table.add_column("result")
    for name, seconds in stages.seconds.items():
        style = "bold" if name in chain_names else "dim"
        table.add_row(name, f"{seconds * 1e3:,.0f} ms", stages.made.get(name, ""), style=style)
    total = sum(stages.seconds[name] for name in chain_names)
    table.add_section()
    table.add_row("the chain", f"{total * 1e3:,.0f} ms", "the lines in bold: map → watertight mesh", style="bold green")
    return table


def _distances(checks, result) -> str:
    import numpy as np

    low, median, high, farthest = np.quantile(checks.distance.cpu().numpy(), [0.01, 0.5, 0.99, 1])
    return (
        f"input points → shell: median {median:.3f} voxels, 98 % within {low:.3f} to {high:.3f}, "
        f"farthest {farthest:.3f} (the zero level is at {result.band / 2:g})"
    )
