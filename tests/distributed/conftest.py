"""Tiny models, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed import tiny


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `policy`, `reference` (other weights), `untied` (a Llama with its own head), `moe`."""
    directory = tmp_path_factory.mktemp("models")
    tiny.write_model(directory / "policy", seed=0)
    tiny.write_model(directory / "reference", seed=1)
    tiny.write_model(directory / "untied", kind="llama", tied=False, seed=2)
    tiny.write_model(directory / "moe", kind="qwen3_moe", tied=False, seed=3)
    tiny.write_model(directory / "moe_reference", kind="qwen3_moe", tied=False, seed=4)
    return directory
