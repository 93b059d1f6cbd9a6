"""No test writes into the cache of the user; what takes long waits for --all."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also the combinations that take long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all"):
        return
    for item in items:
        if item.get_closest_marker("long") is not None:
            item.add_marker(pytest.mark.skip(reason="one of the combinations that take long; --all runs it"))


def pytest_configure(config: pytest.Config) -> None:
    directory = tempfile.mkdtemp(prefix="ds-align-cache-")
    before = os.environ.get("DS_ALIGN_CACHE")
    # Commands that tests start inherit it.
    os.environ["DS_ALIGN_CACHE"] = directory

    def restore() -> None:
        shutil.rmtree(directory, ignore_errors=True)
        if before is None:
            os.environ.pop("DS_ALIGN_CACHE", None)
        else:
            os.environ["DS_ALIGN_CACHE"] = before

    config.add_cleanup(restore)
