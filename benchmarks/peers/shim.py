"""C++ of ours, compiled on first use with the machine's own instructions."""

import ctypes
import hashlib
import os
import pathlib
import subprocess
from collections.abc import Sequence

CACHE = pathlib.Path(__file__).parents[1] / "data"


def compiled(source: pathlib.Path, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The shared library of one file; kept until the file or the flags change."""
    digest = hashlib.sha1(source.read_bytes() + " ".join(flags).encode()).hexdigest()[:8]
    path = CACHE / f"lib{source.stem}_{digest}.so"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        common = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-shared"]
        subprocess.run(["g++", *common, str(source), "-o", str(partial), *flags], check=True)
        partial.rename(path)
    return ctypes.CDLL(str(path))
