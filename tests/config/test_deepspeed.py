"""DeepSpeed's JSON: files, "auto", disagreement, and what the real DeepSpeed makes of the result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ds_align.config import (
    CPOConfig,
    DPOConfig,
    derive_reference_config,
    find_ds_config,
    read_ds_config,
    resolve_policy_config,
    resolved_precision,
    zero_stage,
)
from ds_align.errors import ConfigError

POLICY_FILES = ["zero0", "zero1", "zero2", "zero3", "zero3_offload"]
STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero3_offload": 3}


def resolve(device: str = "cpu", world_size: int = 2, **values: Any) -> dict[str, Any]:
    return resolve_policy_config(DPOConfig(**values), world_size=world_size, hidden_size=64, device=device)


def refusal(device: str = "cpu", **values: Any) -> str:
    with pytest.raises(ConfigError) as error:
        resolve(device, **values)
    return str(error.value)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", POLICY_FILES)
def test_shipped_policy_files_resolve(name: str, device: str) -> None:
    values = resolve(device, ds_config=name, gradient_accumulation_steps=3, max_grad_norm=0.0)
    assert '"auto"' not in json.dumps(values)
    assert zero_stage(values) == STAGES[name]
    # 8 preferences * 3 accumulation steps * 2 ranks = 48
    assert values["train_batch_size"] == 48
    assert values["train_micro_batch_size_per_gpu"] == 8
    assert values["gradient_clipping"] == 0.0
    assert values["managed_gradient_accumulation"] is False
    assert resolved_precision(values) == ("float32" if device == "cpu" else "bfloat16")
    assert "scheduler" not in values
    assert values["optimizer"] == {
        "type": "AdamW",
        "params": {
            "lr": 5e-7,
            "betas": [0.9, 0.999],
            "eps": 1e-8,
            "weight_decay": 0.0,
            "torch_adam": True,
        },
    }
    grad_accum = values.get("data_types", {}).get("grad_accum_dtype")
    assert grad_accum == ("fp32" if device == "cuda" and name != "zero0" else None)


def test_sizes_follow_the_hidden_size() -> None:
    zero = resolve(ds_config="zero3")["zero_optimization"]
    assert zero["reduce_bucket_size"] == 4096  # 64 * 64
    assert zero["stage3_prefetch_bucket_size"] == 3686  # 0.9 * 4096 = 3686.4
    assert zero["stage3_param_persistence_threshold"] == 640  # 10 * 64


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", POLICY_FILES)
def test_the_reference_is_offloaded_and_has_no_optimizer(name: str, device: str) -> None:
    policy = resolve(device, ds_config=name)
    values = derive_reference_config(DPOConfig(), policy, hidden_size=128, device=device)
    assert '"auto"' not in json.dumps(values)
    assert zero_stage(values) == 3
    assert not {"optimizer", "gradient_clipping", "scheduler"} & set(values)
    assert values["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": device == "cuda"}
    assert values["zero_optimization"]["stage3_param_persistence_threshold"] == 0
    assert values["zero_optimization"]["stage3_prefetch_bucket_size"] == 14745  # 0.9 * 128 * 128 = 14745.6
    assert values["train_micro_batch_size_per_gpu"] == 8
    assert resolved_precision(values) == resolved_precision(policy)


def test_the_nvme_reference_resolves_where_its_directory_exists(tmp_path: Path) -> None:
    _, given = read_ds_config("zero_inference_nvme")
    given["zero_optimization"]["offload_param"]["nvme_path"] = str(tmp_path)
    config = DPOConfig(ref_ds_config=given)
    values = derive_reference_config(
        config, resolve(), hidden_size=64, device="cpu", largest_partition=lambda: 8192
    )
    assert '"auto"' not in json.dumps(values)
    assert values["zero_optimization"]["offload_param"]["buffer_size"] == 8192
    given["zero_optimization"]["offload_param"]["nvme_path"] = str(tmp_path / "absent")
    with pytest.raises(ConfigError, match="absent' is no directory that can be written"):
        derive_reference_config(DPOConfig(ref_ds_config=given), resolve(), hidden_size=64, device="cpu")


@pytest.mark.parametrize(
    ("extra", "part"),
    [
        ({"optimizer": {"type": "AdamW"}}, "optimizer: the reference is never trained"),
        ({"bf16": {"enabled": True}}, "bf16.enabled=true is not the policy's precision"),
        ({"zero_optimization": {"stage": 2}}, "the reference needs stage 3"),
        (
            {"weight_quantization": {"quantized_initialization": {"num_bits": 8, "group_size": 64}}},
            "leave it out, and give --ref_load_in_8bit or --ref_load_in_4bit",
        ),
        ({"aio": {"blocksize": 1}}, "unknown key aio.blocksize; did you mean block_size?"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, "has no optimizer"),
    ],
)
def test_reference_settings_that_cannot_be(extra: dict[str, Any], part: str) -> None:
    config = DPOConfig(ref_ds_config={"zero_optimization": {"stage": 3}, **extra})
    with pytest.raises(ConfigError) as error:
        derive_reference_config(config, resolve(), hidden_size=64, device="cpu")
    assert part in str(error.value)


def test_files_are_found_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("zero3", "zero3.json", "ds_configs/zero3.json", "ds_configs/zero3")
    assert {find_ds_config(name).name for name in names} == {"zero3.json"}
    own = tmp_path / "zero3.json"
    own.write_text("{}")
    assert find_ds_config("zero3.json").resolve() == own
    with pytest.raises(ConfigError, match="no such file.*did you mean zero3"):
        find_ds_config("zer3")
    with pytest.raises(ConfigError, match="no such file"):
        find_ds_config("elsewhere/zero3.json")


def test_json_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{\n "train_batch_size": 4,\n "zero_optimization": {"stage": 1, "stage": 2}\n}')
    assert refusal(ds_config=path) == f"{path}: given twice: stage; keep one of each"
    path.write_text('{\n "train_batch_size": 4,,\n}')
    assert refusal(ds_config=path).startswith(f"{path}:2: not valid JSON")
    path.write_text("[]")
    assert "expected a JSON object, found list" in refusal(ds_config=path)
    path.write_text('{"gradient_cliping": 1.0, "zero_optimization": {"stag": 3}, "bf16": true}')
    lines = refusal(ds_config=path).splitlines()
    assert lines[0] == "3 errors:"
    assert lines[1].startswith(
        f"  {path}: unknown key 'gradient_cliping', which DeepSpeed would ignore; did you"
    )
    assert lines[2] == f"  {path}: unknown key zero_optimization.stag; did you mean stage?"
    assert lines[3] == f"  {path}: bf16=true; expected an object"


def test_every_disagreement_is_listed() -> None:
    given = {
        "train_batch_size": 250,
        "train_micro_batch_size_per_gpu": 5,
        "gradient_accumulation_steps": 9,
        "gradient_clipping": 3,
        "bf16": {"enabled": True},
        "optimizer": {"type": "Lamb", "params": {"lr": 0.1, "betas": "auto", "bias": 1}},
        "managed_gradient_accumulation": True,
        "zero_optimization": {"stage": 1, "overlap_comm": True, "sub_group_size": "auto"},
    }
    message = refusal(ds_config=given, dtype="float32", per_device_train_batch_size=4)
    for part in (
        "train_batch_size=250 is not 4 * 1 * 2 = 8",
        "train_micro_batch_size_per_gpu=5 is not per_device_train_batch_size=4",
        "gradient_accumulation_steps=9 is not gradient_accumulation_steps=1 of the run",
        "gradient_clipping=3 is not max_grad_norm=1",
        "bf16.enabled=true is not what dtype=float32 asks for",
        'optimizer.type="Lamb" is not "AdamW"',
        "optimizer.params.lr=0.1 is not the run's 5e-07",
        "optimizer.params.bias",
        "managed_gradient_accumulation=true",
        "overlap_comm=true needs stage 2 or 3",
        'zero_optimization.sub_group_size="auto" cannot be derived',
    ):
        assert part in message, part
    assert message.startswith("11 errors:")


def test_values_that_agree_are_kept() -> None:
    given = {
        "train_batch_size": 16,
        "gradient_clipping": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 5e-7, "weight_decay": "auto"}},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 123},
        "wall_clock_breakdown": True,
        "flops_profiler": {"enabled": False},
    }
    values = resolve(ds_config=given)
    assert values["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 123}
    assert values["wall_clock_breakdown"] is True
    assert values["flops_profiler"] == {"enabled": False}
    assert values["optimizer"]["params"]["weight_decay"] == 0.0
    assert given["optimizer"]["params"]["weight_decay"] == "auto", "the caller's dict must stay as it was"


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "own the learning rate"),
        ({"torch_autocast": {"enabled": True}}, "dtype owns the precision"),
        ({"amp": {"enabled": True}}, "removed from DeepSpeed 0.19"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
        ({"zero_optimization": {"stage": 4}}, "expected 0, 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "offload_param needs stage 3",
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "needs stage 1, 2 or 3",
        ),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "turn one off"),
    ],
)
def test_settings_that_cannot_work_are_refused(given: dict[str, Any], part: str) -> None:
    assert part in refusal(ds_config=given)


def test_precision_comes_from_the_run_then_the_file_then_the_device() -> None:
    on, off = {"bf16": {"enabled": True}}, {"bf16": {"enabled": False}}
    assert resolved_precision(resolve("cpu", ds_config=on)) == "bfloat16"
    assert resolved_precision(resolve("cuda", ds_config=off)) == "float32"
    assert resolved_precision(resolve("cuda", ds_config={})) == "bfloat16"
    half = resolve("cuda", ds_config={"fp16": {"enabled": "auto", "loss_scale": 128}}, dtype="float16")
    assert half["fp16"] == {"enabled": True, "loss_scale": 128}
    assert half["bf16"] == {"enabled": False}


def test_each_optimizer_has_its_section() -> None:
    fused = resolve(ds_config="zero3", optim="adamw_torch_fused", adam_beta2=0.95)["optimizer"]["params"]
    assert (fused["fused"], fused["torch_adam"], fused["betas"]) == (True, True, [0.9, 0.95])
    cpu = resolve(ds_config="zero3_offload", optim="deepspeed_cpu_adam")["optimizer"]["params"]
    assert "torch_adam" not in cpu
    assert "needs zero_optimization.offload_optimizer" in refusal(
        ds_config="zero3", optim="deepspeed_cpu_adam"
    )
    sgd = resolve(ds_config="zero3", optim="sgd")
    assert "optimizer" not in sgd
    assert sgd["zero_allow_untested_optimizer"] is True
    assert resolve(ds_config="zero3_offload", optim="sgd")["zero_force_ds_cpu_optimizer"] is False
    assert "optim=sgd" in refusal(ds_config={"optimizer": {"type": "SGD"}}, optim="sgd")


def test_deepspeed_itself_reads_every_resolved_file_and_knows_every_listed_key() -> None:
    """One process imports the real DeepSpeed, parses each result and compares the lists of keys."""
    config = CPOConfig(per_device_train_batch_size=4)
    resolved = [
        resolve_policy_config(
            config.model_copy(update={"ds_config": name}), world_size=1, hidden_size=64, device=device
        )
        for name in POLICY_FILES
        for device in ("cpu", "cuda")
    ]
    dpo = DPOConfig(per_device_train_batch_size=4)
    resolved += [derive_reference_config(dpo, one, hidden_size=64, device="cpu") for one in resolved]
    program = """
import json, sys
from deepspeed.runtime.config import DeepSpeedConfig, _REMOVED_TOP_LEVEL_CONFIG_KEYS
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig as OffloadOptimizer
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadParamConfig as OffloadParam
from ds_align.config.deepspeed_keys import REFUSED_KEYS, SECTION_KEYS
for values in json.loads(sys.stdin.read()):
    parsed = DeepSpeedConfig(values)
    assert parsed.gradient_clipping == values.get("gradient_clipping", 1.0)
    assert parsed.bfloat16_config.enabled == values["bf16"]["enabled"]
    assert int(parsed.zero_optimization_stage) == values["zero_optimization"]["stage"]
    assert parsed.managed_gradient_accumulation == values.get("managed_gradient_accumulation", True)
assert set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) <= set(REFUSED_KEYS)
for section, model in {
    ("zero_optimization",): DeepSpeedZeroConfig,
    ("zero_optimization", "offload_param"): OffloadParam,
    ("zero_optimization", "offload_optimizer"): OffloadOptimizer,
    ("bf16",): DeepSpeedBF16Config,
    ("fp16",): DeepSpeedFP16Config,
}.items():
    known = {info.alias or name for name, info in model.model_fields.items()}
    assert SECTION_KEYS[section] <= known, SECTION_KEYS[section] - known
print("READ")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(resolved),
        capture_output=True,
        text=True,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "READ"
