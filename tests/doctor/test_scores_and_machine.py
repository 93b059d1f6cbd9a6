"""Checks 9, 12 and 15, the estimates that 13 and 15 use, and what a list of findings amounts to."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ds_align.config import DPOConfig
from ds_align.doctor import Facts, FirstScores, MachineFacts, error_of, examine, messages, unsaid
from ds_align.doctor.machine import device_bytes, disk_bytes, look_at_machine, num_parameters, state_bytes
from ds_align.errors import ConfigError, DataError
from ds_align.models import ModelSource
from tests.distributed import tiny
from tests.doctor.patients import check

AGREED = FirstScores(4, 40, "float32", 1e-7, 1e-6, -2.0, math.log(2.0))
BF16 = {"bf16": {"enabled": True}}


def scored(**changes) -> Facts:
    return Facts(DPOConfig(), scores=replace(AGREED, **changes))


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({}, "ok"),
        ({"max_difference": 1.1e-3}, "error"),
        ({"max_difference": math.nan, "mean_difference": math.nan}, "error"),
        ({"loss": 0.70}, "error"),
        ({"loss": None}, "ok"),
        ({"precision": "bfloat16", "max_difference": 0.2, "mean_difference": 0.01, "loss": 0.70}, "ok"),
        ({"precision": "bfloat16", "max_difference": 0.2, "mean_difference": 0.06}, "error"),
        ({"max_difference": 2.0, "mean_difference": 1.0, "same_weights": False, "loss": None}, "info"),
        ({"max_difference": None, "mean_difference": None}, "ok"),
    ],
)
def test_start_agreement(changes, level):
    assert check(9, scored(**changes)).level == level


def test_distance_of_the_data():
    assert check(12, scored(chosen_logp=-3.0)).level == "ok"
    found = check(12, scored(chosen_logp=-3.01))
    assert (found.level, found.remedy) == ("warning", "fine-tune on the chosen first")
    assert check(12, scored(chosen_logp=None)).level == "ok"


def test_model_checks_need_scores():
    _, skipped = examine(Facts(DPOConfig()), [9, 12])
    assert [(item.id, item.reason) for item in skipped] == [(9, "needs the models"), (12, "needs the models")]


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (MachineFacts(({"torch": "2.1"}, {"torch": "2.2"})), "other versions of torch"),
        (MachineFacts(disk_needed=101, disk_free=100, output_dir="out"), "output_dir='out'"),
        (MachineFacts(faults=("MASTER_PORT=29500 cannot be had",)), "MASTER_PORT=29500"),
    ],
)
def test_machine_faults(machine, words):
    found = check(15, Facts(DPOConfig(), machine=machine))
    assert (found.level, words in found.message) == ("error", True)


def test_a_full_disk_does_not_stop_a_run_that_begins():
    machine = MachineFacts(disk_needed=101, disk_free=100)
    assert check(15, Facts(DPOConfig(), machine=machine, at_start=True)).level == "warning"


def test_a_machine_without_fault():
    machine = MachineFacts(({"torch": "2.1"}, {"torch": "2.1"}), disk_needed=100, disk_free=100)
    assert check(15, Facts(DPOConfig(), machine=machine)).level == "ok"


def test_memory_of_a_rank_by_hand():
    def of(stage: int, ds: dict | None = None, device: str = "cuda", **values) -> int:
        config = DPOConfig(**values)
        zero = {"zero_optimization": {"stage": stage}} | (ds or {})
        trained = 0 if config.use_lora else 1000
        return state_bytes(config, zero, 1000, trained, device)

    # float32: 4 weights + 4 gradients + 8 moments; bfloat16: 2 + 2 + 8 + 4 for the float32 copy.
    assert of(0) == 16_000
    assert of(0, BF16) == 16_000
    assert of(0, optim="sgd") == 8_000
    assert of(3, {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}) == 4_000
    nvme = {"stage": 3, "offload_param": {"device": "nvme"}, "offload_optimizer": {"device": "nvme"}}
    assert of(3, {"zero_optimization": nvme}) == 0
    assert of(3, {"zero_optimization": nvme}, device="cpu") == 4_000  # the reference
    assert of(3, {"zero_optimization": nvme}, device="cpu", ref_ds_config="zero_inference_nvme") == 0
    assert of(0, BF16, use_lora=True) == 2_000
    # On a CPU the reference lies in the same memory.
    assert of(0, device="cpu") == 20_000
    assert of(0, device="cpu", ref_load_in_8bit=True) == 17_000


def test_disk_by_hand():
    # The model 4000, each checkpoint 4000 + 8000; three at most, and no more than are kept or made.
    values = {"save_steps": 10}
    assert disk_bytes(DPOConfig(), {}, 1000, 100) == 4_000
    assert disk_bytes(DPOConfig(**values), {}, 1000, 100) == 40_000
    assert disk_bytes(DPOConfig(**values, save_total_limit=1), {}, 1000, 100) == 16_000
    assert disk_bytes(DPOConfig(**values), {}, 1000, 20) == 28_000
    # Of three that are kept two lie there already; another is written before the oldest goes.
    assert disk_bytes(DPOConfig(**values), {}, 1000, 100, 2) == 16_000
    assert disk_bytes(DPOConfig(**values), {}, 1000, 100, 5) == 16_000


def test_parameters_are_those_of_the_files(tmp_path):
    source = ModelSource.open(str(tiny.write_model(tmp_path / "model", max_shard_size="20KB")))
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    number = sum(math.prod(shape) for shape in source.weight_shapes().values())
    assert num_parameters(source) == number
    config = DPOConfig(model_name_or_path=source.path, output_dir=str(tmp_path / "a" / "b"))
    found = look_at_machine(config, versions=({},), device=torch.device("cpu"), source=source, ds_config={})
    assert found.num_parameters == number
    assert 0 < found.disk_needed < found.disk_free
    assert device_bytes(torch.device("cpu")) > 10**8


def test_what_findings_amount_to():
    faults = MachineFacts(faults=("broken",))
    findings, _ = examine(Facts(DPOConfig(beta=5.0), num_steps=9, machine=faults))
    assert {finding.id for finding in findings if finding.level == "warning"} == {7, 13}
    assert [line.split(" (")[0] for line in messages(unsaid(findings))] == [
        "doctor, check 13",
        "doctor, check 15",
    ]
    assert isinstance(error_of(findings), ConfigError)
    wrong, _ = examine(scored(loss=1.0), [9])
    assert isinstance(error_of([*findings, *wrong]), DataError)
    assert "\n" not in str(error_of([*findings, *wrong]))
    assert error_of([finding.lowered("warning") for finding in findings]) is None
