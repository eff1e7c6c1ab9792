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
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.touch_lines.argtypes = [pointer, size, size, pointer, size, pointer, pointer, size, ctypes.c_int]
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
    rows = dense.new_empty(len(coords), dense.shape[1])
    d, k, c, r = (t.data_ptr() for t in (dense, lines, coords, rows))
    _library().touch_lines(d, dense.shape[1], dense[0, 0].numel(), k, len(lines), c, r, len(coords), threads)
    return rows
