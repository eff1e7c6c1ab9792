"""The pybind11 test module, where the build made one."""

import importlib
import os

import pytest


def native_module():
    """The module; without one a skip that says how to get it, in CI an error. One that does not load is an error."""
    try:
        return importlib.import_module("tests.cvctoolkit_testing")
    except ModuleNotFoundError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the test module is not built (`make build`): {error}")
