"""The ``cvctoolkit`` command: ``info``, ``demo``, ``bench``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from cvctoolkit import __version__, _backend, _native
from cvctoolkit._library import OPERATORS

_PACKAGES = ("triton", "numpy", "einops", "xformers", "diffusers", "trimesh")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [
        {"device": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    ]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "device": f"cuda:{i}",
                "name": p.name,
                "capability": f"{p.major}.{p.minor}",
                "memory_gib": round(p.total_memory / 2**30, 1),
            }
        )
    return devices


def _cuda_build() -> str:
    version, capabilities = _native.kernels.cuda_build()
    return f"loaded, built with CUDA {version // 1000}.{version % 1000 // 10} for compute capabilities {capabilities}"


_ABSENT = "not implemented"


def collect_info() -> dict[str, Any]:
    """Versions, devices, and for every operator and device type which backend serves it and why the others do not."""
    import cvctoolkit.ops  # noqa: F401  (registers the operators)

    operators = {}
    for name, operator in sorted(OPERATORS.items()):
        operators[name] = {}
        for device_type in ("cpu", "cuda"):
            reasons = {
                b: _backend.device_reasons(b, operator.backends[b], device_type)
                if b in operator.backends
                else [_ABSENT]
                for b in _backend.ORDER
            }
            if device_type == "cuda" and not torch.cuda.is_available():
                reasons = {b: [*why, "no CUDA device"] for b, why in reasons.items()}
            operators[name][device_type] = {
                "serves": next((b for b in _backend.ORDER if not reasons[b]), None),
                "not": {b: why for b, why in reasons.items() if why},
            }
    return {
        "cvctoolkit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "packages": {p: _version(p) for p in _PACKAGES},
        "devices": _devices(),
        "native": {
            "cpu": _native.unavailable("cpu") or f"loaded, instruction set {_native.isa()}",
            "cuda": _native.unavailable("cuda") or _cuda_build(),
        },
        "operators": operators,
    }


def _print_info(info: dict[str, Any]) -> None:
    print(
        f"cvctoolkit {info['cvctoolkit']}  (Python {info['python']}, torch {info['torch']}, CUDA {info['torch_cuda']})"
    )
    print("packages   " + ", ".join(f"{k} {v or 'absent'}" for k, v in info["packages"].items()))
    for d in info["devices"]:
        extra = ", ".join(f"{k} {v}" for k, v in d.items() if k not in ("device", "name"))
        print(f"{d['device']:10} {d['name']} ({extra})")
    for kind, state in info["native"].items():
        print(f"native {kind:4} {state}")
    print("\nA backend that is not named beside an operator has no implementation of it.")
    width = max(map(len, info["operators"]), default=0)
    for device in ("cpu", "cuda"):
        if device == "cuda" and not torch.cuda.is_available():
            print("\non cuda: no CUDA device here")
            continue
        print(f"\non {device}:")
        for name, by_device in info["operators"].items():
            row = by_device[device]
            why = "; ".join(f"not {b}: {', '.join(r)}" for b, r in row["not"].items() if _ABSENT not in r)
            print(f"  {name:{width}}  {row['serves'] or '-':9}  {why}".rstrip())


def _info(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="cvctoolkit info", description=collect_info.__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    info = collect_info()
    if parser.parse_args(argv).json:
        print(json.dumps(info, indent=2))
    else:
        _print_info(info)
    return 0


def _demo(argv: list[str]) -> int:
    from cvctoolkit import demo

    return demo.main(argv) or 0


def _bench(argv: list[str]) -> int:
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "harness.py").exists():
        root = Path(os.getcwd())
    if not (root / "benchmarks" / "harness.py").exists():
        print("cvctoolkit bench: the benchmarks are in the source tree: run this in a checkout", file=sys.stderr)
        return 2
    sys.path.insert(0, str(root))
    from benchmarks import harness  # type: ignore[import-not-found]

    return harness.main(argv) or 0


_COMMANDS = {
    "info": (_info, "versions, devices, and which backend serves which operator here"),
    "demo": (_demo, "a stereo photograph becomes a watertight thin-shell mesh, with pictures"),
    "bench": (_bench, "measure our backends against every installed peer (in a checkout)"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--version"]:
        print(__version__)
        return 0
    if not argv or argv[0] not in _COMMANDS:
        lines = "\n".join(f"  {name:6} {text}" for name, (_, text) in _COMMANDS.items())
        help_asked = argv[:1] in (["-h"], ["--help"])
        print(
            f"usage: cvctoolkit COMMAND [options]\n\n{lines}\n\ncvctoolkit COMMAND --help tells the options",
            file=sys.stdout if help_asked else sys.stderr,
        )
        return 0 if help_asked else 2
    return _COMMANDS[argv[0]][0](argv[1:])


if __name__ == "__main__":
    sys.exit(main())
