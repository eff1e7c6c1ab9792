"""Triton kernels of sparse convolution and pooling.

Convolution is a masked implicit GEMM: output rows are sorted by which offsets they have neighbours under, so that a
block of rows agrees on most of them; a first kernel lists the offsets of every block, and the second walks through that
list and reads its input rows in place. The gradient in the features is the same kernel over the inverse map; that in
the weights sums parts of fixed size in a fixed order. No atomics, nothing synchronises. Storage in float16, bfloat16
or float32, sums in float32; products of float32 in TF32 where torch's switch for matrix products allows it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 256  # of the kernels without products
_MASK_BITS = 63


@triton.jit
def _present(source, rows_in):
    return (source >= 0) & (source < rows_in)


# --- maps -------------------------------------------------------------------------------------------------------------


@triton.jit
def _invert_kernel(map_ptr, inverse_ptr, count, rows_in, k_total, BLOCK: tl.constexpr):
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(map_ptr + e, mask=e < count, other=-1)
    here = _present(source, rows_in)
    tl.store(inverse_ptr + source.to(tl.int64) * k_total + e % k_total, (e // k_total).to(tl.int32), mask=here)


@triton.jit
def _mask_kernel(map_ptr, mask_ptr, n, rows_in, k_total, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The offsets under which a row has neighbours, as bits; of more than fit, several share one."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = tl.zeros([BLOCK], tl.int64)
    for k in range(k_total):
        source = tl.load(map_ptr + row * k_total + k, mask=row < n, other=-1)
        bit = k % BITS
        mask |= _present(source, rows_in).to(tl.int64) << bit
    tl.store(mask_ptr + row, mask, mask=row < n)


@triton.jit
def _plan_kernel(map_ptr, order_ptr, offsets_ptr, counts_ptr, n, rows_in, k_total, BLOCK: tl.constexpr):
    """The offsets under which any row of a block has a neighbour."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(order_ptr + at, mask=at < n, other=0).to(tl.int64)
    count = tl.zeros([], tl.int32)
    for k in range(k_total):
        source = tl.load(map_ptr + row * k_total + k, mask=at < n, other=-1)
        # An offset without neighbours is overwritten by the next one.
        tl.store(offsets_ptr + block * k_total + count, k)
        count += tl.max(_present(source, rows_in).to(tl.int32), 0)
    tl.store(counts_ptr + block, count)


# --- convolution ------------------------------------------------------------------------------------------------------


@triton.jit
def _conv_kernel(
    feats_ptr, weight_ptr, bias_ptr, map_ptr, order_ptr, offsets_ptr, counts_ptr, out_ptr,
    n, rows_in, k_total, groups, in_channels, out_channels,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(out_channels, COLUMNS)
    group = (tl.program_id(1) // tiles).to(tl.int64)
    at = block * ROWS + tl.arange(0, ROWS)
    row = tl.load(order_ptr + at, mask=at < n, other=0).to(tl.int64)
    column = tl.program_id(1) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    chunks = tl.cdiv(in_channels, DEPTH)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    # One flat loop over (offset, chunk of input channels): that is what Triton can pipeline.
    for step in range(tl.load(counts_ptr + block) * chunks):
        k = tl.load(offsets_ptr + block * k_total + step // chunks).to(tl.int64)
        channel = step % chunks * DEPTH + tl.arange(0, DEPTH)
        source = tl.load(map_ptr + row * k_total + k, mask=at < n, other=-1)
        a = tl.load(
            feats_ptr + (source.to(tl.int64) * groups + group)[:, None] * in_channels + channel[None, :],
            mask=_present(source, rows_in)[:, None] & (channel < in_channels)[None, :], other=0,
        )  # fmt: skip
        b = tl.load(
            weight_ptr + ((k * groups + group) * in_channels + channel)[:, None] * out_channels + column[None, :],
            mask=(channel < in_channels)[:, None] & (column < out_channels)[None, :], other=0,
        )  # fmt: skip
        total = tl.dot(a, b, total, input_precision=PRECISION)
    if BIAS:
        bias = tl.load(bias_ptr + group * out_channels + column, mask=column < out_channels, other=0)
        total += bias.to(tl.float32)[None, :]
    tl.store(
        out_ptr + (row * groups + group)[:, None] * out_channels + column[None, :], total.to(out_ptr.dtype.element_ty),
        mask=(at < n)[:, None] & (column < out_channels)[None, :],
    )  # fmt: skip


@triton.jit
def _weight_kernel(
    feats_ptr, grad_ptr, map_ptr, order_ptr, parts_ptr,
    n, per_part, rows_in, k_total, groups, in_channels, out_channels,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    k = (tl.program_id(0) // groups).to(tl.int64)
    group = (tl.program_id(0) % groups).to(tl.int64)
    tiles = tl.cdiv(out_channels, OUT)
    channel = tl.program_id(1) // tiles * IN + tl.arange(0, IN)
    column = tl.program_id(1) % tiles * OUT + tl.arange(0, OUT)
    part = tl.program_id(2).to(tl.int64)
    total = tl.zeros([IN, OUT], tl.float32)
    for first in range(part * per_part, tl.minimum((part + 1) * per_part, n), ROWS):
        at = first + tl.arange(0, ROWS)
        row = tl.load(order_ptr + at, mask=at < n, other=0).to(tl.int64)
        source = tl.load(map_ptr + row * k_total + k, mask=at < n, other=-1)
        here = _present(source, rows_in)
        if tl.max(here.to(tl.int32), 0) > 0:
            a = tl.load(
                feats_ptr + (source.to(tl.int64) * groups + group)[:, None] * in_channels + channel[None, :],
                mask=here[:, None] & (channel < in_channels)[None, :], other=0,
            )  # fmt: skip
            b = tl.load(
                grad_ptr + (row * groups + group)[:, None] * out_channels + column[None, :],
                mask=here[:, None] & (column < out_channels)[None, :], other=0,
            )  # fmt: skip
            total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    to = ((part * k_total + k) * groups + group) * in_channels
    tl.store(
        parts_ptr + (to + channel)[:, None] * out_channels + column[None, :], total,
        mask=(channel < in_channels)[:, None] & (column < out_channels)[None, :],
    )  # fmt: skip


# --- pooling ----------------------------------------------------------------------------------------------------------


@triton.jit
def _pool_kernel(
    feats_ptr, map_ptr, out_ptr, offset_ptr, n, rows_in, k_total, channels,
    MAX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    value = tl.zeros([ROWS, COLUMNS], tl.float32)
    offset = tl.full([ROWS, COLUMNS], -1, tl.int32)
    for k in range(k_total):
        source = tl.load(map_ptr + row * k_total + k, mask=row < n, other=-1)
        here = _present(source, rows_in)[:, None] & inside[None, :]
        x = tl.load(feats_ptr + source.to(tl.int64)[:, None] * channels + column[None, :], mask=here, other=0)
        x = x.to(tl.float32)
        if MAX:
            better = here & ((offset < 0) | (x > value) | ((x != x) & (value == value)))
            value = tl.where(better, x, value)
            offset = tl.where(better, k, offset)
        else:
            value += x
    here = (row < n)[:, None] & inside[None, :]
    to = row[:, None] * channels + column[None, :]
    tl.store(out_ptr + to, value.to(out_ptr.dtype.element_ty), mask=here)
    if MAX:
        tl.store(offset_ptr + to, offset, mask=here)


@triton.jit
def _max_grad_kernel(
    grad_ptr, offset_ptr, inverse_ptr, out_ptr, n, rows_out, k_total, channels,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Every input row collects from the outputs that chose it."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < channels
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(k_total):
        seen_by = tl.load(inverse_ptr + row * k_total + k, mask=row < n, other=-1)
        here = _present(seen_by, rows_out)[:, None] & inside[None, :]
        at = seen_by.to(tl.int64)[:, None] * channels + column[None, :]
        chosen = here & (tl.load(offset_ptr + at, mask=here, other=-1) == k)
        total += tl.load(grad_ptr + at, mask=chosen, other=0).to(tl.float32)
    here = (row < n)[:, None] & inside[None, :]
    tl.store(out_ptr + row[:, None] * channels + column[None, :], total.to(out_ptr.dtype.element_ty), mask=here)


# --- launchers --------------------------------------------------------------------------------------------------------


def _power(value: int, low: int, high: int) -> int:
    return min(max(triton.next_power_of_2(value), low), high)


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _depth(feats: Tensor) -> int:
    return 32 if feats.dtype == torch.float32 else 64


def _order(map: Tensor, rows_in: int) -> Tensor:
    """The rows, those with neighbours under the same offsets next to each other."""
    n, k_total = map.shape
    masks = torch.empty(n, dtype=torch.int64, device=map.device)
    _mask_kernel[(triton.cdiv(n, _ROWS),)](map, masks, n, rows_in, k_total, BITS=_MASK_BITS, BLOCK=_ROWS)
    return torch.sort(masks, stable=True).indices.to(torch.int32)


def invert_neighbor_map(map: Tensor, rows_in: int) -> Tensor:
    """inverse[i, k] = the o with map[o, k] = i."""
    inverse = map.new_full((rows_in, map.shape[1]), -1)
    if map.numel() and rows_in:
        with torch.cuda.device_of(map):  # Triton launches on the current device
            grid = (triton.cdiv(map.numel(), 1024),)
            _invert_kernel[grid](map, inverse, map.numel(), rows_in, map.shape[1], BLOCK=1024)
    return inverse


def sparse_conv3d(feats: Tensor, weight: Tensor, bias: Tensor | None, map: Tensor, groups: int) -> Tensor:
    """out[o] = bias + Σ_k weight[:, :, k] · feats[map[o, k]]."""
    (n, k_total), (_, in_channels, _) = map.shape, weight.shape
    out_channels = weight.shape[0] // groups
    out = feats.new_empty(n, weight.shape[0])
    if not out.numel():
        return out
    columns, depth = _power(out_channels, 16, 128), _power(in_channels, 16, _depth(feats))
    rows = 128 if n > 1 << 13 else 64
    with torch.cuda.device_of(feats):
        order = _order(map, feats.shape[0])
        blocks = triton.cdiv(n, rows)
        offsets = torch.empty(blocks, k_total, dtype=torch.int32, device=feats.device)
        counts = torch.empty(blocks, dtype=torch.int32, device=feats.device)
        _plan_kernel[(blocks,)](map, order, offsets, counts, n, feats.shape[0], k_total, BLOCK=rows)
        packed = weight.unflatten(0, (groups, out_channels)).permute(3, 0, 2, 1).contiguous()
        _conv_kernel[(blocks, groups * triton.cdiv(out_channels, columns))](
            feats, packed, bias, map, order, offsets, counts, out, n, feats.shape[0], k_total, groups, in_channels,
            out_channels, BIAS=bias is not None, PRECISION=_precision(), ROWS=rows, COLUMNS=columns, DEPTH=depth,
            num_warps=8 if rows * columns > 8192 else 4, num_stages=3,
        )  # fmt: skip
    return out


def sparse_conv3d_weight_grad(feats: Tensor, grad_out: Tensor, map: Tensor, groups: int) -> Tensor:
    """grad[:, :, k] = Σ_o grad_out[o] ⊗ feats[map[o, k]]; the parts depend on the sizes alone."""
    n, k_total = map.shape
    in_channels, out_channels = feats.shape[1] // groups, grad_out.shape[1] // groups
    shape = k_total, groups, in_channels, out_channels
    if not (n and feats.numel() and grad_out.numel() and k_total):
        return feats.new_zeros(groups * out_channels, in_channels, k_total)
    tile_in, tile_out, rows = _power(in_channels, 16, 64), _power(out_channels, 16, 64), _depth(feats)
    tiles = triton.cdiv(in_channels, tile_in) * triton.cdiv(out_channels, tile_out)
    wanted = min(triton.cdiv(2048, tiles * k_total * groups), triton.cdiv(n, 2048))
    per_part = triton.cdiv(triton.cdiv(n, wanted), rows) * rows
    parts = triton.cdiv(n, per_part)
    with torch.cuda.device_of(feats):
        sums = torch.empty(parts, *shape, dtype=torch.float32, device=feats.device)
        _weight_kernel[(k_total * groups, tiles, parts)](
            feats, grad_out, map, _order(map, feats.shape[0]), sums, n, per_part, feats.shape[0], k_total, groups,
            in_channels, out_channels, PRECISION=_precision(), ROWS=rows, IN=tile_in, OUT=tile_out, num_warps=4,
        )  # fmt: skip
        return sums.sum(0).permute(1, 3, 2, 0).reshape(groups * out_channels, in_channels, k_total).to(feats.dtype)


def _pool(feats: Tensor, map: Tensor, largest: bool) -> tuple[Tensor, Tensor | None]:
    (n, k_total), channels = map.shape, feats.shape[1]
    out = feats.new_empty(n, channels)
    offset = torch.empty_like(out, dtype=torch.int32) if largest else None
    if out.numel():
        columns = _power(channels, 16, 64)
        with torch.cuda.device_of(feats):
            _pool_kernel[(triton.cdiv(n, 32), triton.cdiv(channels, columns))](
                feats, map, out, offset, n, feats.shape[0], k_total, channels, MAX=largest, ROWS=32, COLUMNS=columns
            )
    return out, offset


def sparse_sum_pool3d(feats: Tensor, map: Tensor) -> Tensor:
    """out[o] = Σ_k feats[map[o, k]]."""
    return _pool(feats, map, False)[0]


def sparse_max_pool3d(feats: Tensor, map: Tensor) -> tuple[Tensor, Tensor | None]:
    """The largest neighbour and its offset."""
    return _pool(feats, map, True)


def sparse_max_pool3d_grad(grad_out: Tensor, offset: Tensor, map: Tensor, rows_in: int) -> Tensor:
    """grad[i, c] = Σ grad_out[o, c] over the (o, k) with map[o, k] = i and offset[o, c] = k."""
    grad = grad_out.new_empty(rows_in, grad_out.shape[1])
    if grad.numel():
        columns = _power(grad.shape[1], 16, 64)
        inverse = invert_neighbor_map(map, rows_in)
        with torch.cuda.device_of(grad_out):
            _max_grad_kernel[(triton.cdiv(rows_in, 32), triton.cdiv(grad.shape[1], columns))](
                grad_out, offset, inverse, grad, rows_in, grad_out.shape[0], map.shape[1], grad.shape[1],
                ROWS=32, COLUMNS=columns,
            )  # fmt: skip
    return grad


def _compile_cases() -> list[Any]:
    """What the compile tests build without a GPU: kernel, argument types, constants."""

    def types(pointers: dict[str, str], *integers: str) -> dict[str, str]:
        return {f"{name}_ptr": kind for name, kind in pointers.items()} | dict.fromkeys(integers, "i32")

    sizes = ("n", "rows_in", "k_total")
    invert = types({"map": "*i32", "inverse": "*i32"}, "rows_in", "k_total") | {"count": "i64"}
    cases = [
        (_invert_kernel, invert, {"BLOCK": 1024}),
        (_mask_kernel, types({"map": "*i32", "mask": "*i64"}, *sizes), {"BITS": _MASK_BITS, "BLOCK": _ROWS}),
        (_plan_kernel, types(dict.fromkeys(("map", "order", "offsets", "counts"), "*i32"), *sizes), {"BLOCK": 128}),
    ]  # fmt: skip
    plan = dict.fromkeys(("map", "order", "offsets", "counts"), "*i32")
    for kind, precision, depth in (("*fp32", "ieee", 32), ("*fp16", "tf32", 64), ("*bf16", "tf32", 16)):
        conv = types(
            plan | dict.fromkeys(("feats", "weight", "bias", "out"), kind), *sizes, "groups", "in_channels",
            "out_channels",
        )  # fmt: skip
        tile = {"ROWS": 128, "COLUMNS": 128 if depth > 16 else 16, "DEPTH": depth}
        cases.append((_conv_kernel, conv, {"BIAS": depth > 16, "PRECISION": precision} | tile))
    for kind, rows, tile_out in (("*fp32", 32, 64), ("*bf16", 64, 16)):
        weight = types(
            {"feats": kind, "grad": kind, "map": "*i32", "order": "*i32", "parts": "*fp32"}, *sizes, "per_part",
            "groups", "in_channels", "out_channels",
        )  # fmt: skip
        cases.append((_weight_kernel, weight, {"PRECISION": "tf32", "ROWS": rows, "IN": 64, "OUT": tile_out}))
    for kind, largest in (("*fp32", True), ("*bf16", False)):
        pool = types({"feats": kind, "map": "*i32", "out": kind, "offset": "*i32"}, *sizes, "channels")
        cases.append((_pool_kernel, pool, {"MAX": largest, "ROWS": 32, "COLUMNS": 64}))
        grad = types(
            {"grad": kind, "offset": "*i32", "inverse": "*i32", "out": kind}, "n", "rows_out", "k_total", "channels"
        )
        cases.append((_max_grad_kernel, grad, {"ROWS": 32, "COLUMNS": 64}))
    return cases


COMPILE_CASES = _compile_cases()
