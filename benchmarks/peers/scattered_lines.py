"""What reading voxels out of a dense volume must move, and nothing else: a floor, compiled on first use."""

import ctypes
import functools
import pathlib
import platform
import shutil

from torch import Tensor

from benchmarks.peers import shim

SOURCE = pathlib.Path(__file__).with_suffix(".cpp")


def available() -> bool:
    """Whether it is built or can be built."""
    return platform.machine() in ("x86_64", "AMD64") and shutil.which("g++") is not None


@functools.cache
def _library() -> ctypes.CDLL:
    library = shim.compiled(SOURCE, ["-fopenmp"])
    library.touch_lines.restype = ctypes.c_float
    return library


def touch(dense: Tensor, lines: Tensor, coords: Tensor, threads: int) -> Tensor:
    """Reads a number of every line and all coordinates; returns rows of as many numbers as ``dense`` has channels.

    Args:
        dense: ``[1, C, X, Y, Z]`` float32, contiguous.
        lines: ``[L]`` int64, the first cell of every line of the cache that holds a voxel, ascending.
        coords: ``[N, 4]`` int32, contiguous.
        threads: How many.
    """
    channels, cells = dense.shape[1], dense[0, 0].numel()
    rows = dense.new_empty(len(coords), channels)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (dense, lines, coords, rows)]
    sizes = [ctypes.c_int64(n) for n in (channels, cells, len(lines), len(coords))]
    _library().touch_lines(
        pointers[0],
        sizes[0],
        sizes[1],
        pointers[1],
        sizes[2],
        pointers[2],
        pointers[3],
        sizes[3],
        ctypes.c_int(threads),
    )
    return rows
