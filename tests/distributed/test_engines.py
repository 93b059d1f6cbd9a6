"""Policy and reference as real engines on two ranks: where the weights are, what trains, what stays."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.distributed.launching import launch

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What programs/engines.py saw on each of two ranks."""
    out = tmp_path_factory.mktemp("engines")
    launch("engines.py", models, out, num_ranks=2).check()
    found = json.loads((out / "engines.json").read_text(encoding="utf-8"))
    assert len(found) == 2
    return found


def test_step_zero_losses(ranks):
    """Policy = reference: every log-ratio is 0, and with it z0."""
    expected = {
        "dpo 0.1": math.log(2),  # -log sigmoid(0)
        "ipo 0.1": 25.0,  # (0 - 1/(2 * 0.1))^2 = 5^2
        "ipo 0.5": 1.0,  # (0 - 1/(2 * 0.5))^2 = 1^2
        "kto 0.1": 0.5,  # 1 - sigmoid(0)
    }
    for facts in ranks:
        assert facts["step_zero"] == pytest.approx(expected, abs=1e-6, rel=1e-6)


def test_the_reference_is_zero_inference_with_its_partitions_on_the_cpu(ranks):
    for facts in (rank["reference_facts"] for rank in ranks):
        assert facts["stage"] == 3
        assert facts["offload"].endswith("cpu")
        assert facts["devices"] == ["cpu"]
        assert facts["status"] == ["NOT_AVAILABLE"]
        assert facts["visible_elements"] == 0
        # Half of the weights on each of two ranks, but for the padding of each to an even number.
        assert facts["partition_elements"] == pytest.approx(facts["whole_elements"] / 2, rel=0.01)
        assert facts["whole_elements"] > 10_000


def test_the_reference_is_frozen(ranks):
    for facts in (rank["reference_facts"] for rank in ranks):
        assert not facts["requires_grad"]
        assert not facts["has_grad"]
        assert not facts["training"]
        assert facts["unchanged"]
        assert facts["policy_changed"]


def test_the_policy_is_whole_inside_forward_only(ranks):
    for facts in (rank["reference_facts"] for rank in ranks):
        assert facts["policy_stage"] == 3
        assert facts["policy_visible"] == 0
        assert facts["policy_inside_forward"] == facts["policy_layer_whole"]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_loop_of_the_readme_equals_the_trainer_bit_for_bit(ranks, method):
    facts = ranks[0]["loop_and_trainer"][method]
    assert facts["equal"]
    assert facts["moved"] > 1e-4


def test_nothing_is_left_behind_after_training(ranks):
    whole = ranks[0]["reference_facts"]["whole_elements"]
    for facts in (rank["after_training"] for rank in ranks):
        assert facts["plain_elements"] == whole
        assert not facts["plain_is_partitioned"]
        assert facts["second_steps"] == 2
    assert ranks[0]["after_training"]["saved_equals_trained"]
