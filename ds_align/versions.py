"""Versions of what decides the numbers of a run."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

_PACKAGES = ("ds_align", "torch", "deepspeed", "transformers", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """Versions of python and of the packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
