"""Packages that nobody here wrote, to compare with."""

import importlib
import os

import pytest


def oracle(name):
    """A module of a package that the ``dev`` extra installs: missing, it fails in CI and skips elsewhere."""
    return importlib.import_module(name) if os.environ.get("CI") else pytest.importorskip(name)
