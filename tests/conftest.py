"""No test writes into the cache of the user."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest


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
