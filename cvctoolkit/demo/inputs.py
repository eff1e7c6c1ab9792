"""What the demo starts from: the motorcycle pair, or the user's own photograph, depth or point maps.

Every loader raises ``ValueError`` naming the file, what was expected and what came.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cvctoolkit.ops import disparity_to_depth, intrinsics_from_fov

# Middlebury 2014 "Motorcycle" at a quarter of its size, as scikit-image's docstring gives it.
MOTORCYCLE_FOCAL, MOTORCYCLE_CENTRE, MOTORCYCLE_OFFSET, MOTORCYCLE_BASELINE = (
    994.978,
    (311.193, 254.877),
    31.086,
    0.193001,
)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
ARRAY_SUFFIXES = (".npz", ".npy")


@dataclass
class View:
    """One or more maps of one scene, all of H × W pixels.

    Attributes:
        name: What the pictures are titled with.
        depth: ``[H, W]`` float32 z-depth, NaN where unknown; None when ``points`` are given.
        intrinsics: ``[3, 3]`` of ``depth``.
        points: ``[S, H, W, 3]`` float32; None when ``depth`` is given.
        mask: ``[S, H, W]`` bool, True where valid; None: wherever finite.
        confidence: ``[S, H, W]`` float32.
        image: ``[S, H, W, 3]`` uint8.
    """

    name: str
    depth: Tensor | None = None
    intrinsics: Tensor | None = None
    points: Tensor | None = None
    mask: Tensor | None = None
    confidence: Tensor | None = None
    image: Tensor | None = None


def motorcycle() -> View:
    """The stereo pair with ground-truth disparity that ships in scikit-image's wheel; depth in metres."""
    from skimage import data

    image, _, disparity = data.stereo_motorcycle()
    depth = disparity_to_depth(
        torch.from_numpy(np.ascontiguousarray(disparity, np.float32)),
        MOTORCYCLE_FOCAL,
        MOTORCYCLE_BASELINE,
        MOTORCYCLE_OFFSET,
    )
    intrinsics = torch.tensor(
        [
            [MOTORCYCLE_FOCAL, 0, MOTORCYCLE_CENTRE[0] + 0.5],  # Middlebury's pixel centres are integers
            [0, MOTORCYCLE_FOCAL, MOTORCYCLE_CENTRE[1] + 0.5],
            [0, 0, 1],
        ]
    )
    return View("motorcycle", depth, intrinsics, image=torch.from_numpy(np.array(image))[None])


def load(
    image: Path | None = None,
    depth: Path | None = None,
    points: Path | None = None,
    *,
    fov: float = 60.0,
    depth_scale: float = 1e-3,
) -> View:
    """The user's files, or the motorcycle when there is neither depth nor points.

    Args:
        image: Photograph, .png or .jpg, the size of the map; several maps take theirs from the points' file.
        depth: .npy, .npz (key ``depth``) or .png (integers times ``depth_scale``, 0 unknown) of z-depth.
        points: .npy ``[..., H, W, 3]``, .npz of VGGT, MoGe or DUSt3R, or .png (canonical coordinate map).
        fov: Horizontal field of view in degrees, used when a depth file carries no intrinsics.
        depth_scale: World units per integer of a .png depth.

    Raises:
        ValueError: A file is missing, unreadable, or not what it should be.
    """
    if depth is not None and points is not None:
        raise ValueError("give --depth or --points, not both")
    if depth is not None:
        view = _load_depth(depth, fov, depth_scale)
    elif points is not None:
        view = _load_points(points)
    elif image is not None:
        raise ValueError("--image is the photograph of a map: give --depth or --points with it")
    else:
        return motorcycle()
    if image is not None:
        view.image = torch.from_numpy(_read_image(image, "RGB"))[None]
    shape = (view.depth[None] if view.depth is not None else view.points[..., 0]).shape  # type: ignore[index]
    if view.image is not None and view.image.shape[:-1] != shape:
        raise ValueError(
            f"{image or points}: expected an image for each map, {_times(shape)}, got {_times(view.image.shape[:-1])}"
        )
    return view


def _times(shape: torch.Size | tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _exists(path: Path, suffixes: tuple[str, ...]) -> Path:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path}: expected one of {', '.join(suffixes)}, got {path.suffix or 'no suffix'}")
    return path


def _read_image(path: Path, mode: str | None) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(_exists(path, IMAGE_SUFFIXES)) as image:
            return np.array(image.convert(mode) if mode else image)
    except OSError as error:
        raise ValueError(f"{path}: expected an image, got a file that does not read as one ({error})") from None


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz, or ``{"": array}`` of an .npy; pickled objects are refused."""
    try:
        stored = np.load(path, allow_pickle=False)
        arrays = {"": stored} if isinstance(stored, np.ndarray) else {key: stored[key] for key in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path}: expected NumPy arrays without pickled objects, got: {error}") from None
    return {key: array for key, array in arrays.items() if isinstance(array, np.ndarray)}  # an archive may hold others


def _number_array(path: Path, key: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{path}: expected numbers in {key or 'the array'}, got dtype {array.dtype}")
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite: invalid
        return array.astype(np.float32)


def _load_depth(path: Path, fov: float, scale: float) -> View:
    path = _exists(path, (*ARRAY_SUFFIXES, ".png"))
    if not 0 < fov < 180:
        raise ValueError(f"--fov: expected degrees between 0 and 180, got {fov:g}")
    intrinsics = None
    if path.suffix.lower() == ".png":
        depth = _read_image(path, None)
        if depth.ndim != 2:
            raise ValueError(f"{path}: expected a PNG with one channel of integers, got shape {list(depth.shape)}")
        depth = np.where(depth == 0, np.nan, depth * np.float64(scale)).astype(np.float32)
    else:
        arrays = _read_arrays(path)
        key = "" if "" in arrays else "depth"
        if key not in arrays:
            raise ValueError(f"{path}: expected a key 'depth', got {_keys(arrays)}")
        depth = _number_array(path, key, arrays[key])
        while depth.ndim > 2 and 1 in (depth.shape[0], depth.shape[-1]):
            depth = depth[0] if depth.shape[0] == 1 else depth[..., 0]
        if "intrinsics" in arrays:
            intrinsics = _number_array(path, "intrinsics", arrays["intrinsics"])
            if intrinsics.shape[-2:] != (3, 3) or not intrinsics.size:
                raise ValueError(f"{path}: expected intrinsics [..., 3, 3], got {list(intrinsics.shape)}")
            intrinsics = _pixel_intrinsics(intrinsics, depth.shape)
    if depth.ndim != 2 or 0 in depth.shape:
        raise ValueError(f"{path}: expected a depth map [H, W], got shape {list(depth.shape)}")
    height, width = depth.shape
    if intrinsics is None:
        intrinsics = intrinsics_from_fov(torch.tensor(np.radians(fov), dtype=torch.float32), width, height)
    depth = np.where(depth > 0, depth, np.nan).astype(np.float32)
    return View(path.stem, torch.from_numpy(depth), intrinsics)


def _pixel_intrinsics(intrinsics: np.ndarray, shape: tuple[int, ...]) -> Tensor:
    """Intrinsics in pixels; MoGe's are in units of the image size."""
    found = torch.from_numpy(intrinsics.reshape(-1, 3, 3)[0])
    normalised = bool((found[:2].abs() < 10).all())
    return found * torch.tensor([shape[1], shape[0], 1.0])[:, None] if normalised else found


def _keys(arrays: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{key} {list(value.shape)}" for key, value in sorted(arrays.items())) or "an empty file"


def _load_points(path: Path) -> View:
    path = _exists(path, (*ARRAY_SUFFIXES, ".png"))
    if path.suffix.lower() == ".png":  # a canonical coordinate map: RGB is xyz in [-1, 1], alpha is validity
        rgba = torch.from_numpy(_read_image(path, "RGBA"))[None]
        return View(path.stem, points=rgba[..., :3].float() / 127.5 - 1, mask=rgba[..., 3] > 127, image=rgba[..., :3])
    arrays = _read_arrays(path)
    points, confidence, mask = _named_maps(path, arrays)
    view = View(path.stem, points=_maps(path, points, 3))
    shape = view.points.shape[:-1]  # type: ignore[union-attr]
    if confidence:
        view.confidence = _same_size(path, "confidence", _maps(path, confidence, 0), shape)
    if mask:
        view.mask = _same_size(path, "mask", _maps(path, mask, 0), shape) > 0
    images = arrays.get("images", arrays.get("image"))
    if images is not None:
        view.image = _image_stack(path, images)
    return view


def _named_maps(path: Path, arrays: dict[str, np.ndarray]):
    """The point maps, their confidences and masks, each a list of (key, array), by the names of who wrote them."""

    def named(prefix: str) -> list[tuple[str, np.ndarray]]:
        return [(key, arrays[key]) for key in sorted(arrays) if key.startswith(prefix)]

    if "" in arrays:  # a plain .npy
        return [("", arrays[""])], [], []
    if "world_points" in arrays:  # VGGT
        return [("world_points", arrays["world_points"])], named("world_points_conf"), []
    if "points" in arrays:  # MoGe
        return [("points", arrays["points"])], [], [("mask", arrays["mask"])] if "mask" in arrays else []
    if points := named("pts3d"):  # DUSt3R: pts3d and pts3d_in_other_view, or pts3d_1 and pts3d_2, or stacked
        confidence = named("conf")
        if confidence and len(confidence) != len(points):
            raise ValueError(f"{path}: expected a conf array for each pts3d array, got {_keys(arrays)}")
        return points, confidence, []
    raise ValueError(
        f"{path}: expected VGGT's world_points (and world_points_conf), MoGe's points (and mask) or DUSt3R's pts3d… "
        f"(and conf…), got {_keys(arrays)}"
    )


def _maps(path: Path, named: list[tuple[str, np.ndarray]], channels: int) -> Tensor:
    """Arrays [..., H, W, channels] (no last dimension when 0) as one stack [S, H, W, ...] of float32."""
    stacks = []
    for key, array in named:
        array = array.astype(np.uint8) if array.dtype == bool else array
        array = _number_array(path, key, array)
        if not channels and array.ndim > 2 and array.shape[-1] == 1:
            array = array[..., 0]
        tail = array.ndim - (1 if channels else 0)
        if tail < 2 or 0 in array.shape or (channels and array.shape[-1] != channels):
            expected = f"[..., H, W, {channels}]" if channels else "[..., H, W]"
            raise ValueError(f"{path}: expected {key or 'the array'} of shape {expected}, got {list(array.shape)}")
        stacks.append(torch.from_numpy(array.reshape(-1, *array.shape[tail - 2 :])))
    if len({stack.shape[1:3] for stack in stacks}) > 1:
        sizes = ", ".join(_times(stack.shape[1:3]) for stack in stacks)
        raise ValueError(f"{path}: expected maps of one size, got {sizes}")
    return torch.cat(stacks)


def _same_size(path: Path, what: str, maps: Tensor, shape: torch.Size) -> Tensor:
    if maps.shape != shape:
        raise ValueError(f"{path}: expected {what} {_times(shape)} like the points, got {_times(maps.shape)}")
    return maps


def _image_stack(path: Path, images: np.ndarray) -> Tensor:
    """Images [S, 3, H, W] in [0, 1] (VGGT), [S, H, W, 3] or [H, W, 3], as uint8 [S, H, W, 3]."""
    images = images.reshape(-1, *images.shape[-3:]) if images.ndim > 3 else images[None]
    if images.ndim == 4 and images.shape[-1] != 3 and images.shape[1] == 3:
        images = np.moveaxis(images, 1, -1)
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"{path}: expected images [S, H, W, 3] or [S, 3, H, W], got {list(images.shape)}")
    if images.dtype != np.uint8:
        images = (np.nan_to_num(_number_array(path, "images", images)).clip(0, 1) * 255).round().astype(np.uint8)
    return torch.from_numpy(np.ascontiguousarray(images))
