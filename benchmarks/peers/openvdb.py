"""OpenVDB 10 through a small C++ shim, compiled on first use when the headers (Debian: libopenvdb-dev) are there."""

import ctypes
import functools
import pathlib
import re
import shutil

import numpy as np

from benchmarks.peers import shim

SOURCE = pathlib.Path(__file__).with_name("openvdb_peer.cpp")
HEADER = pathlib.Path("/usr/include/openvdb/version.h")


def available() -> bool:
    """Whether the shim is built or can be built."""
    return HEADER.exists() and shutil.which("g++") is not None


def version() -> str:
    """OpenVDB's version, from its header."""
    defines = dict(re.findall(r"#define OPENVDB_LIBRARY_(\w+)_VERSION_NUMBER (\d+)", HEADER.read_text()))
    return ".".join(defines[part] for part in ("MAJOR", "MINOR", "PATCH"))


@functools.cache
def library(threads: int) -> ctypes.CDLL:
    """The compiled shim with OpenVDB limited to ``threads`` threads."""
    lib = shim.compiled(SOURCE, ["-lopenvdb", "-ltbb", "-lImath"])
    for name in ("vdb_mesh_to_volume", "vdb_from_band", "vdb_volume_to_mesh"):
        getattr(lib, name).restype = ctypes.c_void_p
    lib.vdb_active_count.restype = ctypes.c_int64
    lib.vdb_init(threads)
    return lib


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


class Grid:
    """A FloatGrid in voxel units: sample (i, j, k) is the centre of voxel (i, j, k)."""

    def __init__(self, lib: ctypes.CDLL, handle: int):
        self._lib, self._handle = lib, ctypes.c_void_p(handle)

    def __del__(self):
        self._lib.vdb_free_grid(self._handle)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Active voxels: coords [N, 4] int32 (batch 0) and values [N] float32, in OpenVDB's order."""
        count = self._lib.vdb_active_count(self._handle)
        coords, values = np.empty((count, 4), np.int32), np.empty(count, np.float32)
        self._lib.vdb_read(self._handle, _pointer(coords), _pointer(values))
        return coords, values

    def surface(self, level: float) -> "Surface":
        """``tools::volumeToMesh`` without simplification."""
        counts = (ctypes.c_int64 * 3)()
        handle = self._lib.vdb_volume_to_mesh(self._handle, ctypes.c_double(level), counts)
        return Surface(self._lib, handle, tuple(counts))


class Surface:
    """Points, triangles and quads as OpenVDB leaves them."""

    def __init__(self, lib: ctypes.CDLL, handle: int, counts: tuple[int, int, int]):
        self._lib, self._handle, self.counts = lib, ctypes.c_void_p(handle), counts

    def __del__(self):
        self._lib.vdb_free_mesh(self._handle)

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Vertices [Nv, 3] in voxel units and triangles [Nf, 3], quads split in two."""
        points = np.empty((self.counts[0], 3), np.float32)
        triangles, quads = np.empty((self.counts[1], 3), np.int32), np.empty((self.counts[2], 4), np.int32)
        self._lib.vdb_read_mesh(self._handle, _pointer(points), _pointer(triangles), _pointer(quads))
        return points, np.concatenate([triangles, quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])


def mesh_to_volume(vertices: np.ndarray, faces: np.ndarray, resolution: int, band: float, threads: int) -> Grid:
    """``tools::meshToVolume(UNSIGNED_DISTANCE_FIELD)`` over [-1, 1]³, band half-width in voxels."""
    lib = library(threads)
    in_voxels = np.ascontiguousarray((vertices + 1) * (resolution / 2) - 0.5, np.float32)
    faces = np.ascontiguousarray(faces, np.int32)
    handle = lib.vdb_mesh_to_volume(
        _pointer(in_voxels), ctypes.c_int64(len(in_voxels)), _pointer(faces), ctypes.c_int64(len(faces)),
        ctypes.c_float(band),
    )  # fmt: skip
    return Grid(lib, handle)


def grid_from_band(coords: np.ndarray, values: np.ndarray, background: float, threads: int) -> Grid:
    """A grid that holds exactly these voxels; every other one is ``background``."""
    lib = library(threads)
    coords, values = np.ascontiguousarray(coords, np.int32), np.ascontiguousarray(values, np.float32)
    handle = lib.vdb_from_band(
        _pointer(coords), _pointer(values), ctypes.c_int64(len(values)), ctypes.c_float(background)
    )
    return Grid(lib, handle)
