import os

import pytest
import torch
from hypothesis import settings

from cvctoolkit import _native

# No deadline: shared CI machines stall. CI draws the same examples every time; locally new ones are tried.
settings.register_profile("local", deadline=None, max_examples=60)
settings.register_profile("ci", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised memory is NaN (or the largest integer, or -1), in Python and in native allocations alike."""
    if _native.unavailable("cpu") is None:
        _native.kernels.poison_scratch(True)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
