"""One suite for both sets of row kernels."""

from __future__ import annotations

import pytest

from ds_align.kernels import native


@pytest.fixture(params=["torch", "native"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What impl="auto" takes in the test."""
    if request.param == "native" and not native.HAS_KERNELS["cpu"]:
        pytest.skip(f"no compiled extension: {native.WHY_ABSENT}")
    monkeypatch.setenv(native.ENVIRONMENT_VARIABLE, request.param)
    return request.param
