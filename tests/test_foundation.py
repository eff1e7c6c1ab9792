"""The foundation itself: checks, backend choice, the comparisons that every other test relies on, the command."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from cvctoolkit import _backend, _checks, _native, ops
from cvctoolkit.__main__ import collect_info, main
from cvctoolkit._backend import Backend, select
from cvctoolkit._library import OPERATORS, once_differentiable
from cvctoolkit.testing import assert_close_with_boundary_band, assert_gradients_close, assert_within_budget


class TestChecks:
    def test_messages_name_operator_argument_expectation_and_value(self):
        with pytest.raises(ValueError, match=r"op: points must have shape \[N, 3\], got \[4, 2\]"):
            _checks.tensor("op", "points", torch.zeros(4, 2), "N 3")
        with pytest.raises(ValueError, match="op: points must have dtype float32, float64, got int64"):
            _checks.tensor("op", "points", torch.zeros(4, 3, dtype=torch.int64), "N 3", _checks.FLOAT32_64)
        with pytest.raises(TypeError, match=r"op: points must be a torch.Tensor, got list"):
            _checks.tensor("op", "points", [1], "N 3")
        with pytest.raises(ValueError, match="must be on meta"):
            _checks.tensor("op", "faces", torch.zeros(1, 3), "N 3", device=torch.device("meta"))

    def test_open_shapes(self):
        for shape in [(3, 4), (2, 3, 4), (0, 3, 4)]:
            _checks.tensor("op", "x", torch.zeros(shape), "... H 4")
        with pytest.raises(ValueError):
            _checks.tensor("op", "x", torch.zeros(4), "... H 4")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
    def test_numbers(self, value):
        with pytest.raises(ValueError):
            _checks.number("op", "x", value, at_least=0)

    @pytest.mark.parametrize("value", ["1", None, True, 1 + 2j, np.bool_(True), np.ones(1), torch.ones(1)])
    def test_not_numbers(self, value):
        with pytest.raises(TypeError):
            _checks.number("op", "x", value)
        with pytest.raises(TypeError):
            _checks.integer("op", "x", value)

    def test_numbers_from_numpy(self):
        assert type(_checks.integer("op", "x", np.int32(3), at_most=4)) is int
        assert type(_checks.number("op", "x", np.float32(3), above=2)) is float
        assert _checks.number("op", "x", np.uint8(3)) == 3
        with pytest.raises(TypeError, match="op: x must be an integer, got float64"):
            _checks.integer("op", "x", np.float64(3))

    def test_data_dependent(self):
        with pytest.raises(ValueError, match="2 NaN or infinite"):
            _checks.finite("op", "x", torch.tensor([1.0, float("nan"), float("inf")]))
        with pytest.raises(ValueError, match="must index vertices 0 to 4, got 5"):
            _checks.faces_in_range("op", torch.tensor([[0, 1, 5]]), 5)
        with pytest.raises(ValueError, match="got -1"):
            _checks.faces_in_range("op", torch.tensor([[0, -1, 2]]), 5)


class TestBackendChoice:
    backends = {
        "native": Backend(lambda x: "native", lambda x: ["too small"] if x.numel() < 2 else []),
        "reference": Backend(lambda x: "reference"),
    }

    def test_the_fastest_that_can(self):
        assert select("op", self.backends, "", (torch.zeros(2),)).run(0) == "native"
        assert select("op", self.backends, "", (torch.zeros(1),)).run(0) == "reference"

    def test_an_explicit_choice_is_obeyed_or_refused(self):
        assert select("op", self.backends, "reference", (torch.zeros(2),)).run(0) == "reference"
        with pytest.raises(ValueError, match="op: backend 'native' cannot serve this call: too small"):
            select("op", self.backends, "native", (torch.zeros(1),))

    def test_native_explains_devices_it_does_not_know(self):
        assert "no native kernels for meta" in (_native.unavailable("meta") or "")

    def test_a_missing_library_says_how_to_build_it(self):
        assert "pip install --no-build-isolation" in (_native._load("_C_absent") or "")

    def test_a_kernel_that_is_not_in_the_library_is_not_there(self):
        assert not _native.has_kernel("no_such_kernel", "cpu")

    @pytest.mark.parametrize("driver,capability,reason", [
        (13010, (9, 0), None),
        (12080, (9, 0), "built with CUDA 13.0, this driver serves CUDA 12.8"),
        (13000, (7, 5), "compute capability 8.0 and above, Tesla T4 has 7.5"),
    ])  # fmt: skip
    def test_old_drivers_and_gpus_are_no_surprise(self, monkeypatch, driver, capability, reason):
        class Driver:
            def cuDriverGetVersion(self, version):
                version._obj.value = driver

        class Kernels:
            def cuda_build(self):
                return 13000, "80 86 90"

        monkeypatch.setattr(_native, "kernels", Kernels())
        monkeypatch.setattr(_native.ctypes, "CDLL", lambda name: Driver())
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "Tesla T4")
        found = _native._old_driver() or _native._old_gpu.__wrapped__()
        assert (found is None) if reason is None else (reason in found)

    def test_restricting_the_instruction_set(self):
        if _native.isa() is None:
            pytest.skip(_native.unavailable("cpu"))
        before = _native.isa()
        with _native.restricted_isa("baseline") as isa:
            assert isa == _native.isa() == "baseline"
        assert _native.isa() == before


_WITHOUT_LIBRARIES = """
import torch
def refuse(path):
    raise OSError("as if it were not there")
torch.ops.load_library = refuse
from cvctoolkit import _native, ops
assert "does not load" in _native.unavailable("cpu") or "not built" in _native.unavailable("cpu")
points = torch.rand(4, 5, 3)
mesh = ops.pointmap_to_mesh(points)
assert ops.closest_point_on_mesh(points, mesh.vertices, mesh.faces).distance.max() < 1e-6
band = ops.narrow_band_udf(mesh.vertices, mesh.faces, 8, 2.0)
assert len(ops.marching_cubes(band.coords, ops.udf_to_thin_sdf(band.udf, 0.5), 8).faces)
try:
    ops.build_bvh(mesh.vertices, mesh.faces, backend="native")
except ValueError as error:
    assert "cannot serve this call: _C_cpu" in str(error), error
else:
    raise AssertionError("a backend that is not there was granted")
"""


@pytest.mark.parametrize(
    "triton_version, numpy_version, runs",
    [("3.6.0", "2.4.6", False), ("3.6.0", "2.3.5", True), ("3.7.1", "2.4.6", True), ("3.10.0", "2.10.0", True)],
)
def test_an_interpreter_that_cannot_loop_says_what_to_install(monkeypatch, triton_version, numpy_version, runs):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", triton_version)
    monkeypatch.setattr(np, "__version__", numpy_version)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    reasons = _backend.device_reasons("triton", Backend(print), "cpu")
    assert not reasons if runs else "install Triton 3.7" in reasons[0]


def test_everything_works_without_the_native_libraries():
    run = subprocess.run([sys.executable, "-c", _WITHOUT_LIBRARIES], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


class TestComparisons:
    exact = torch.linspace(0, 1, 10, dtype=torch.float64)

    def test_the_budget_accepts_rounding_and_refuses_more(self):
        same = self.exact.float()
        assert_within_budget(same, same, self.exact)
        for wrong in (same + 1e-5, same * float("nan"), same[:-1], same.double()):
            with pytest.raises(AssertionError):
                assert_within_budget(wrong, same, self.exact)

    def test_the_budget_compares_integers_and_infinities_exactly(self):
        with pytest.raises(AssertionError):
            assert_within_budget(torch.tensor([1, 2]), torch.tensor([1, 3]), torch.tensor([1, 3]))
        inf = torch.tensor([float("inf")])
        assert_within_budget(inf, inf, inf.double())
        with pytest.raises(AssertionError):
            assert_within_budget(-inf, inf, inf.double())

    def test_gradients_are_refused_for_a_small_common_bias(self):
        assert_gradients_close(self.exact.float(), self.exact)
        with pytest.raises(AssertionError):
            assert_gradients_close(self.exact * 1.001, self.exact)
        with pytest.raises(AssertionError):
            assert_gradients_close(self.exact * float("nan"), self.exact)

    def test_the_boundary_band_excuses_only_its_inside(self):
        distance = torch.ones(10)
        distance[3] = 0
        out = self.exact.clone()
        out[3] += 1
        compare = dict(band=1e-3, atol=1e-9, max_fraction=0.2)
        assert_close_with_boundary_band(out, self.exact, distance, **compare)
        out[4] += 1
        with pytest.raises(AssertionError, match="outside"):
            assert_close_with_boundary_band(out, self.exact, distance, **compare)
        with pytest.raises(AssertionError, match="in the boundary band"):
            assert_close_with_boundary_band(out, self.exact, distance * 0, **compare)


def test_double_backward_of_a_once_differentiable_formula_raises():
    x = torch.tensor(2.0, requires_grad=True)
    (y,) = once_differentiable("op", x * x)
    with pytest.raises(RuntimeError, match="op: double backward is not implemented"):
        torch.autograd.grad(y, x)


def test_forward_mode_differentiation_is_refused_not_silently_zero():
    points, faces = torch.rand(3, 3), torch.tensor([[0, 1, 2]])
    with pytest.raises(RuntimeError, match="closest_point_on_mesh: forward-mode differentiation is not implemented"):
        torch.func.jvp(lambda p: ops.closest_point_on_mesh(p, points, faces).distance, (points,), (points,))


class TestCommand:
    def test_info_tells_who_serves_every_operator(self, capsys):
        assert main(["info", "--json"]) == 0
        info = json.loads(capsys.readouterr().out)
        assert set(info["operators"]) == set(OPERATORS)
        for by_device in info["operators"].values():
            row = by_device["cpu"]
            assert row["serves"] in _backend.ORDER
            assert all(why for why in row["not"].values())
        assert info["torch"] == torch.__version__

    def test_info_as_text(self, capsys):
        assert main(["info"]) == 0
        out = capsys.readouterr().out
        assert all(name in out for name in OPERATORS)

    def test_help_and_unknown_commands(self, capsys):
        assert main(["--help"]) == 0
        assert main(["fly"]) == 2
        assert main(["--version"]) == 0
        assert collect_info()["cvctoolkit"] in capsys.readouterr().out

    def test_as_a_module(self):
        run = subprocess.run([sys.executable, "-m", "cvctoolkit", "--version"], capture_output=True, text=True)
        assert run.returncode == 0 and run.stdout.strip()


def test_kept_scratch_memory_is_given_back_when_asked_for():
    kernels = _native.kernels
    if _native.unavailable("cpu") is not None or sys.platform != "linux":
        pytest.skip("needs the native library on Linux")
    ops.voxel_unique(torch.randint(0, 1 << 12, (1 << 18, 4), dtype=torch.int32))  # needs a few MiB of scratch
    assert 0 < kernels.release_scratch() <= 64 << 20
    assert kernels.release_scratch() == 0
