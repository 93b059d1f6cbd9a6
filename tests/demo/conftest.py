"""The demonstration, built once for all tests of this folder."""

from __future__ import annotations

import pytest

from ds_align.demo import build


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    return build(tmp_path_factory.mktemp("demonstration") / "demo")
