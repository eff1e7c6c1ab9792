"""Loads the C++/CUDA libraries and, when one is absent, knows why.

``_C_cpu`` registers the schemas of ``cvctoolkit_native::*`` and their CPU kernels, ``_C_cuda`` adds the CUDA kernels.
Both are built on the libtorch stable ABI, so one build serves every torch >= 2.10.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent
_BUILD_HINT = "build it with `pip install --no-build-isolation .` (or `make build` in a checkout)"


def _load(name: str) -> str | None:
    """Loads one library; returns the reason when that fails."""
    path = _FOLDER / f"{name}.so"
    if not path.exists():
        return f"{name} is not built: {_BUILD_HINT}"
    try:
        torch.ops.load_library(str(path))
    except Exception as error:
        try:  # torch hides the loader's reason, ctypes shows it
            ctypes.CDLL(str(path))
        except OSError as reason:
            return f"{name} does not load: {reason}"
        return f"{name} does not load: {error}"
    return None


@cache
def _cpu_reason() -> str | None:
    return _load("_C_cpu")


@cache
def _cuda_reason() -> str | None:
    if _cpu_reason() is not None:
        return _cpu_reason()
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    reason = _load("_C_cuda")
    if reason is None and not hasattr(torch.ops.cvctoolkit_native, "cuda_build"):
        reason = f"_C_cuda is out of date: {_BUILD_HINT}"
    return reason or _old_driver()


def _old_driver() -> str | None:
    built, _ = kernels.cuda_build()
    served = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(served))  # initialises nothing: safe before a fork
    except OSError:
        return None  # no driver: then there are no CUDA tensors either
    if served.value // 1000 >= built // 1000:
        return None
    built, serves = (f"{v // 1000}.{v % 1000 // 10}" for v in (built, served.value))
    return f"_C_cuda is built with CUDA {built}, this driver serves CUDA {serves}: update it, or build with older nvcc"


@cache
def _old_gpu() -> str | None:
    """Not part of `_cuda_reason`, which runs at import: asking for capabilities initialises CUDA."""
    oldest = min(map(int, kernels.cuda_build()[1].split()))
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        if 10 * major + minor < oldest:
            name = torch.cuda.get_device_name(i)
            return f"_C_cuda is built for compute capability {oldest / 10} and above, {name} has {major}.{minor}"
    return None


def unavailable(device_type: str) -> str | None:
    """Why native kernels cannot serve a device type; None when they can."""
    if device_type == "cpu":
        return _cpu_reason()
    if device_type == "cuda":
        return _cuda_reason() or _old_gpu()
    return f"no native kernels for {device_type} tensors"


def has_kernel(name: str, device_type: str) -> bool:
    """Whether ``cvctoolkit_native::name`` has a kernel for a device type."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and unavailable(device_type) is None and _registered(name, key)


@cache  # asked for at every call; libraries are loaded once, at import
def _registered(name: str, key: str) -> bool:
    return hasattr(  # not in a library that is out of date
        torch.ops.cvctoolkit_native, name
    ) and torch._C._dispatch_has_kernel_for_dispatch_key(f"cvctoolkit_native::{name}", key)


class _Kernels:
    """``cvctoolkit_native::*`` by name; op modules may name kernels that are not built, and learn so when they call."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not hasattr(torch.ops.cvctoolkit_native, name):
            return lambda *args: getattr(torch.ops.cvctoolkit_native, name).default(*args)
        self.__dict__[name] = overload = getattr(torch.ops.cvctoolkit_native, name).default
        return overload


kernels = _Kernels()


def isa() -> str | None:
    """The CPU instruction set in use (``baseline``, ``avx2``, ``avx512``), None without the native library."""
    return None if _cpu_reason() is not None else torch.ops.cvctoolkit_native.isa("?")


@contextmanager
def restricted_isa(name: str) -> Iterator[str | None]:
    """Restricts the CPU kernels to an instruction set, for tests and benchmarks.

    Yields the one in force: a wish beyond this machine is not granted.
    """
    if _cpu_reason() is not None:
        yield None
        return
    before = torch.ops.cvctoolkit_native.isa("?")
    try:
        yield torch.ops.cvctoolkit_native.isa(name)
    finally:
        torch.ops.cvctoolkit_native.isa(before)


_cpu_reason()  # registers the schemas
_cuda_reason()
