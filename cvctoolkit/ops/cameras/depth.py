"""Depth maps: disparity, z- and ray-depth, pooling to a feature map's size, the noise of the depth-guided decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cvctoolkit import _checks
from cvctoolkit.ops.cameras import reference
from cvctoolkit.ops.cameras.op import _FLOATS, _broadcastable, _same_dtype


def disparity_to_depth(disparity: Tensor, focal: float, baseline: float, offset: float = 0.0) -> Tensor:
    """Depth from the disparity of a rectified stereo pair: focal · baseline / (disparity + offset).

    Args:
        disparity: ``[..., H, W]`` float, pixels.
        focal: Focal length in pixels.
        baseline: Distance of the cameras; its unit is that of the result.
        offset: Difference of the principal points, pixels (Middlebury's ``doffs``).

    Returns:
        z-depth, same shape; NaN where the disparity is not finite or disparity + offset is not positive.

    Raises:
        TypeError: Wrong argument types.
        ValueError: ``disparity`` is not a float map, or focal or baseline are not positive.
    """
    op = "disparity_to_depth"
    _checks.tensor(op, "disparity", disparity, "... H W", _checks.FLOATING)
    scale = _checks.number(op, "focal", focal, above=0) * _checks.number(op, "baseline", baseline, above=0)
    shifted = disparity + _checks.number(op, "offset", offset)
    known = disparity.isfinite() & (shifted > 0)
    return torch.where(known, scale / torch.where(known, shifted, torch.ones_like(shifted)), float("nan"))


def z_to_ray_depth(depth: Tensor, Ks: Tensor) -> Tensor:
    """Distance along the pixel's unit ray from distance along the optical axis, of pinhole cameras.

    Args:
        depth: ``[..., H, W]`` float32/64 z-depth. Differentiable.
        Ks: ``[..., 3, 3]`` in pixels of this depth map. Differentiable.

    Returns:
        Ray-depth, same shape.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: Shapes, dtypes or devices do not fit.
    """
    return depth * _ray_length("z_to_ray_depth", depth, Ks)


def ray_to_z_depth(depth: Tensor, Ks: Tensor) -> Tensor:
    """Distance along the optical axis from distance along the pixel's unit ray, of pinhole cameras.

    Args:
        depth: ``[..., H, W]`` float32/64 ray-depth (pixelSplat's). Differentiable.
        Ks: ``[..., 3, 3]`` in pixels of this depth map. Differentiable.

    Returns:
        z-depth, same shape.

    Raises:
        TypeError: An argument is no tensor.
        ValueError: Shapes, dtypes or devices do not fit.
    """
    return depth / _ray_length("ray_to_z_depth", depth, Ks)


def _ray_length(op: str, depth: Tensor, Ks: Tensor) -> Tensor:
    _checks.tensor(op, "depth", depth, "... H W", _FLOATS)
    _checks.tensor(op, "Ks", Ks, "... 3 3", _FLOATS, device=depth.device)
    _same_dtype(op, "Ks", Ks, depth)
    _broadcastable(op, "Ks", Ks.shape[:-2], depth.shape[:-2])
    return reference.ray_length(*reference.image_plane(Ks, *depth.shape[-2:]))


def pool_depth(depth: Tensor, height: int, width: int, *, mask: Tensor | None = None) -> Tensor:
    """Averages a depth map down to ``height`` × ``width`` over its valid pixels alone.

    Plain average pooling mixes holes and background into the surface and puts points where nothing is.

    Args:
        depth: ``[..., H, W]`` float32/64. Values that are not finite are holes. Differentiable.
        height: Rows of the result; its windows are those of ``torch.nn.AdaptiveAvgPool2d``.
        width: Columns of the result.
        mask: ``[..., H, W]`` bool, True where the depth is valid (``depth > 0`` where zero means unknown); None:
            wherever it is finite.

    Returns:
        ``[..., height, width]``; NaN where a window holds no valid pixel.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or sizes do not fit.

    Source: depth-guided decoder, Sec. 3.2 (depth at each resolution of the decoder).
    """
    op = "pool_depth"
    _checks.tensor(op, "depth", depth, "... H W", _FLOATS)
    if 0 in depth.shape[-2:]:
        raise ValueError(f"{op}: depth must have at least one pixel, got {list(depth.shape)}")
    height, width = (_checks.integer(op, n, v, at_least=1) for n, v in (("height", height), ("width", width)))
    return reference.pool_depth(depth, _valid(op, depth, mask), height, width)


def _valid(op: str, depth: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return depth.isfinite()
    _checks.tensor(op, "mask", mask, "... H W", (torch.bool,), device=depth.device)
    _checks.same_shape(op, "mask", mask, depth.shape)
    return mask & depth.isfinite()


def structured_depth_noise(
    depth: Tensor,
    sizes: Sequence[int] = (3, 64, 128),
    scales: Sequence[float] = (0.1, 0.1 / 3, 0.1 / 9),
    *,
    generator: torch.Generator | None = None,
    noise: Sequence[Tensor] | None = None,
    shared: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Perturbs depth as estimates err: D + Σ_r upsample(U(−s_r, s_r)^(r×r)), smooth at several scales at once.

    Upsampling is bilinear with ``align_corners=False``.

    Args:
        depth: ``[..., H, W]`` float32/64, world units; holes stay holes. Differentiable.
        sizes: r, the side of each coarse grid.
        scales: s_r, the largest value on each grid, world units.
        generator: Draws the grids, in float32 on its own device; None: torch's default generator of ``depth``'s device.
            Under ``torch.compile`` give None or ``noise``.
        noise: The grids themselves instead, in units of ``scales``: per size ``[..., r, r]``, leading dimensions that
            broadcast with those of ``depth``. Differentiable.
        shared: One draw for all views: the last dimension before H, W.
        mask: ``[..., H, W]`` bool, True where noise is added; None: everywhere.

    Returns:
        Same shape. A given generator state gives the same noise on every device, up to rounding.

    Raises:
        TypeError: Wrong argument types.
        ValueError: Shapes, dtypes, devices or counts do not fit, or both ``noise`` and ``generator`` are given.

    Source: depth-guided decoder, Sec. 3.3. Its text names a fourth scale without a grid for it.
    """
    op = "structured_depth_noise"
    _checks.tensor(op, "depth", depth, "... H W", _FLOATS)
    sizes = [_checks.integer(op, f"sizes[{i}]", r, at_least=1) for i, r in enumerate(_sequence(op, "sizes", sizes))]
    scales = [_checks.number(op, f"scales[{i}]", s, at_least=0) for i, s in enumerate(_sequence(op, "scales", scales))]
    if len(sizes) != len(scales):
        raise ValueError(f"{op}: sizes and scales must be equally many, got {len(sizes)} and {len(scales)}")
    if noise is None:
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"{op}: generator must be a torch.Generator, got {type(generator).__name__}")
        batch = depth.shape[:-2]
        batch = (*batch[:-1], 1) if shared and batch else batch
        device = depth.device if generator is None else generator.device
        noise = [torch.rand(*batch, r, r, generator=generator, device=device).to(depth) * 2 - 1 for r in sizes]
    elif generator is not None:
        raise ValueError(f"{op}: give noise or generator, not both")
    elif len(_sequence(op, "noise", noise)) != len(sizes):
        raise ValueError(f"{op}: noise must hold {len(sizes)} grids, one per size, got {len(noise)}")
    for i, (grid, r) in enumerate(zip(noise, sizes)):
        _checks.tensor(op, f"noise[{i}]", grid, f"... {r} {r}", _FLOATS, device=depth.device)
        _same_dtype(op, f"noise[{i}]", grid, depth)
        _broadcastable(op, f"noise[{i}]", grid.shape[:-2], depth.shape[:-2])
        if grid.dim() > depth.dim():
            raise ValueError(f"{op}: noise[{i}] must have no more dimensions than depth, got {list(grid.shape)}")
        if torch.broadcast_shapes(grid.shape[:-2], depth.shape[:-2]) != depth.shape[:-2]:
            expected = [*depth.shape[:-2], r, r]
            raise ValueError(f"{op}: noise[{i}] must broadcast to shape {expected}, got {list(grid.shape)}")
    if not sizes:
        return depth.clone()
    noisy = reference.structured_depth_noise(depth, noise, scales)
    if mask is None:
        return noisy
    _checks.tensor(op, "mask", mask, "... H W", (torch.bool,), device=depth.device)
    _checks.same_shape(op, "mask", mask, depth.shape)
    return torch.where(mask, noisy, depth)


def _sequence(op: str, name: str, value: Sequence) -> Sequence:
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{op}: {name} must be a sequence, got {type(value).__name__}")
    return value
