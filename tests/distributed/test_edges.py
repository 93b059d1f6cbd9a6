"""Two ranks give what one gives when a rank has one class only, or no row at all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.distributed.launching import launch
from tests.distributed.programs.edges import CASES

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def results(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    folder = tmp_path_factory.mktemp("edges")
    for ranks in (1, 2):
        launch("edges.py", models, folder / f"{ranks}.pt", num_ranks=ranks, timeout=200).check()
    return torch.load(folder / "1.pt"), torch.load(folder / "2.pt")


@pytest.mark.parametrize("name", [name for name in CASES if name != "kto_one_row"])
def test_two_ranks_equal_one(results, name):
    one, two = results[0][name], results[1][name]
    assert all(math.isfinite(loss) for loss in one["losses"])
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert len(one["losses"]) == math.ceil(len(CASES[name][1]) / 2)
    if CASES[name][0] == "kto":
        assert two["kl"] == pytest.approx(one["kl"], rel=1e-5, abs=1e-6)
    for weight, expected in one["weights"].items():
        torch.testing.assert_close(two["weights"][weight], expected, rtol=1e-5, atol=1e-6)


def test_a_single_row_has_no_mismatched_completion(results):
    # No other prompt in the data set: z0 is 0, and the first loss is 1 - sigmoid(beta * rho).
    assert results[0]["kto_one_row"]["kl"] == [0.0]
    assert all(kl is not None and kl < 0 for kl in results[0]["kto_no_reference"]["kl"])
    assert results[0]["apo_zero_unpaired"]["kl"] == [0.0, 0.0]
