"""The native libraries keep to the libtorch stable ABI, and AVX code stays where it belongs."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import cvctoolkit

PACKAGE = Path(cvctoolkit.__file__).parent
LIBRARIES = [p for p in (PACKAGE / "_C_cpu.so", PACKAGE / "_C_cuda.so") if p.exists()]
ROOT = PACKAGE.parent
CAN_READ = shutil.which("nm") and shutil.which("objdump")
pytestmark = pytest.mark.skipif(
    not ((CAN_READ and LIBRARIES) or os.environ.get("CI")), reason="needs binutils and a built library"
)


def symbols(path, *flags):
    return subprocess.run(["nm", "-C", *flags, str(path)], capture_output=True, text=True, check=True).stdout


def unstable(library):
    """C++ symbols of torch, which change between its releases, and those of the Python C API, that a library needs."""
    undefined = symbols(library, "-D", "--undefined-only").splitlines()
    return [line for line in undefined if re.search(r"\b(at|c10|torch|caffe2)::|\b_?Py[A-Z]", line)]


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_no_unstable_symbol(library):
    undefined = symbols(library, "-D", "--undefined-only")
    assert "torch_" in undefined, "the library does not use libtorch at all: is this the right file?"
    assert not unstable(library), f"{library.name} needs {unstable(library)[:5]}"


@pytest.mark.parametrize(
    "code",
    [
        "namespace at { void f(); } void g() { at::f(); }",
        "namespace c10 { struct Error { Error(); virtual ~Error(); }; } void g() { throw c10::Error(); }",
        "namespace at { struct Tensor; } void h(std::vector<at::Tensor>*); void g() { h(nullptr); }",
        "namespace torch { extern int flag; } int g() { return torch::flag; }",
        'extern "C" void PyErr_Clear(); void g() { PyErr_Clear(); }',
    ],
)
def test_an_unstable_symbol_would_be_seen(code, tmp_path):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a compiler")
    (tmp_path / "a.cpp").write_text("#include <vector>\n" + code)
    library = tmp_path / "a.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "a.cpp"], check=True)
    assert unstable(library)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_exports_nothing(library):
    defined = symbols(library, "-D", "--defined-only")
    # Weak C++ runtime templates (std::vector<…>) are visible but harmless; nothing of ours may be.
    ours = [line for line in defined.splitlines() if "cvc::" in line]
    assert not ours, f"{library.name} exports {ours[:5]}"


def isa_objects(isa):
    return sorted(ROOT.glob(f"build/cmake-dev-*/CMakeFiles/isa_{isa}.dir/csrc/*/isa_*.o"))


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_kernel_objects_have_internal_linkage(isa):
    objects = isa_objects(isa)
    if not objects:
        pytest.skip("no build directory: the library came from a wheel")
    for path in objects:
        lines = [line.split(maxsplit=2) for line in symbols(path, "--defined-only").splitlines() if line[:1].isalnum()]
        visible = [(kind, name) for _, kind, name in lines if kind.isupper() or kind in "uvw"]
        entries = [name for kind, name in visible if kind == "T"]
        if isa == "avx512" and not entries:  # a kernel may stop at AVX2, then nothing else is in here either
            assert not visible, f"{path.name}: {visible}"
            continue
        assert len(entries) == 1 and isa in entries[0], f"{path.name}: exactly one entry point, got {entries}"
        shared = [name for kind, name in visible if kind in "VWuvw"]
        assert not shared, f"{path.name}: {shared} would be merged by the linker with a baseline twin"


def instructions_by_function(path):
    text = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(path)], capture_output=True, text=True, check=True
    ).stdout
    return re.findall(r"^[0-9a-f]+ <(.+)>:\n((?:.+\n)*)", text, re.M)


def test_wide_registers_appear_only_in_their_kernels():
    library = PACKAGE / "_C_cpu.so"
    if not isa_objects("avx2"):
        pytest.skip("no build directory: the library came from a wheel")
    # The names of functions with internal linkage that each kernel object holds.
    own = {
        isa: {
            re.sub(r"\(.*", "", line.split(maxsplit=2)[2])
            for path in isa_objects(isa)
            for line in symbols(path, "--defined-only").splitlines()
            if line[:1].isalnum()
        }
        for isa in ("avx2", "avx512")
    }
    for function, body in instructions_by_function(library):
        name = re.sub(r"\(.*", "", function)
        if "%zmm" in body:
            assert name in own["avx512"], f"{function} uses AVX-512 outside the avx512 kernels"
        if "%ymm" in body:
            assert name in own["avx2"] | own["avx512"], f"{function} uses AVX outside the avx2 and avx512 kernels"
