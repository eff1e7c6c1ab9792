"""Choice of backend: one place for the order, the reasons and the error text.

A backend either serves a call or says why not, in words. Those words are what ``backend=None`` skips over, what an
explicit choice is refused with, what tests skip with and what ``cvctoolkit info`` prints.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from cvctoolkit import _native

#: Fastest first. The reference serves every device and is always there; "xformers" and "sdpa" are compositions of other
#: people's kernels that serve where their own reasons allow it.
ORDER = ("native", "triton", "xformers", "sdpa", "reference")


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Attributes:
        run: Called with the operator's arguments (without ``backend``).
        unsupported: Called with the same arguments, yields the reasons why this backend cannot serve the call.
        kernels: For ``native``: the ``cvctoolkit_native`` operators that it needs.
    """

    run: Callable[..., Any]
    unsupported: Callable[..., Iterable[str]] = field(default=lambda *args: ())
    kernels: tuple[str, ...] = ()


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def interpreter_fault() -> str | None:
    """Why Triton's interpreter cannot run a loop with the installed NumPy; None when it can."""
    import numpy
    import triton

    if _release(triton.__version__) < (3, 7) and _release(numpy.__version__) >= (2, 4):
        versions = f"Triton {triton.__version__} does not run with NumPy {numpy.__version__}"
        return f"the interpreter of {versions}: install Triton 3.7, or numpy<2.4"
    return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])


def device_reasons(name: str, backend: Backend, device_type: str) -> list[str]:
    """Why a backend cannot serve a device type at all, whatever the arguments."""
    if name not in ("native", "triton"):
        return []
    if name == "triton":
        if device_type != "cuda" and not triton_interpreted():
            return [f"Triton kernels need CUDA tensors, these are on {device_type}"]
        try:
            import triton  # noqa: F401
        except ImportError as error:
            return [f"Triton is not installed ({error})"]
        fault = interpreter_fault() if triton_interpreted() else None
        return [fault] if fault else []
    reason = _native.unavailable(device_type)
    if reason is not None:
        return [reason]
    missing = [k for k in backend.kernels if not _native.has_kernel(k, device_type)]
    return [f"no native {device_type} kernel for {', '.join(missing)}"] if missing else []


def device_of(args: Iterable[Any]) -> torch.device:
    """The device of the first tensor argument."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.device
    return torch.device("cpu")


def reasons(name: str, backend: Backend, args: tuple[Any, ...], device_type: str | None = None) -> list[str]:
    """Why a backend cannot serve this call; empty when it can."""
    return device_reasons(name, backend, device_type or device_of(args).type) or list(backend.unsupported(*args))


def select(
    op: str, backends: dict[str, Backend], wish: str, args: tuple[Any, ...], device_type: str | None = None
) -> Backend:
    """The backend to run: the wished one or an error with its reasons, else the first of ``ORDER`` without any.

    Raises:
        ValueError: The wished backend does not exist for this operator or cannot serve this call.
    """
    if wish:
        if wish not in backends:
            raise ValueError(f"{op}: no backend {wish!r}; there are {', '.join(backends)}")
        why_not = reasons(wish, backends[wish], args, device_type)
        if why_not:
            raise ValueError(f"{op}: backend {wish!r} cannot serve this call: {'; '.join(why_not)}")
        return backends[wish]
    for name in ORDER:
        # The interpreter makes Triton eligible on CPU tensors for tests that ask for it, never by itself.
        if name == "triton" and triton_interpreted():
            continue
        if name in backends and not reasons(name, backends[name], args, device_type):
            return backends[name]
    raise ValueError(f"{op}: no backend serves this call")
