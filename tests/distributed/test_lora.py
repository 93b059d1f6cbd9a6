"""LoRA under ZeRO-0 to 3: equal to a plain loop with peft, on a frozen base, without a second model."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed import tiny
from tests.distributed.launching import TRAIN, launch
from tests.distributed.programs.lora import GLOBAL_BATCH, NUM_STEPS, ONE_RANK, TWO_RANKS

pytestmark = pytest.mark.distributed

CASES = {**ONE_RANK, **TWO_RANKS}
NEW = [f"{method} zero{stage}" for method in ("dpo", "kto") for stage in range(4)]
TRAINED = ["dpo trained zero0", "dpo trained zero3", "kto trained zero3"]
EXACT = [*NEW, "dpo zero2 two ranks", "dpo checkpointing", *TRAINED]
BETA = 0.1
LEARNING_RATE = 0.5


@pytest.fixture(scope="module")
def adapter(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on some layers of `policy` that changes its log-probs a lot, as peft writes it."""
    directory = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(models / "policy", dtype=torch.float32)
    settings = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, settings)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


@pytest.fixture(scope="module")
def results(models: Path, adapter: Path, out: Path) -> dict:
    for num_ranks in (1, 2):
        launch("lora.py", models, adapter, out, num_ranks=num_ranks).check()
    return {**torch.load(out / "lora-1.pt"), **torch.load(out / "lora-2.pt")}


@pytest.fixture(scope="module")
def expected(results: dict, models: Path, adapter: Path) -> dict:
    """(method, start) -> losses and adapter weights of the plain loop."""
    return {
        ("dpo", "new"): plain_loop("dpo", new_policy(models, results["dpo zero0"]), load(models)),
        ("kto", "new"): plain_loop("kto", new_policy(models, results["dpo zero0"]), load(models)),
        ("dpo", "trained"): plain_loop("dpo", on_top(models, adapter), on_top(models, adapter)),
        ("kto", "trained"): plain_loop("kto", on_top(models, adapter), on_top(models, adapter)),
        ("dpo", "trained, bare base"): plain_loop("dpo", on_top(models, adapter), load(models)),
    }


def load(models: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(models / "policy", dtype=torch.float32)


def on_top(models: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(load(models), adapter, is_trainable=True)


def new_policy(models: Path, found: dict) -> PeftModel:
    """A peft model with the starting adapters of a run."""
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load(models), settings)
    weights = {f"base_model.model.{name}": start for name, (start, _) in found["adapters"].items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(weights), "every linear layer but the head has an adapter"
    model.load_state_dict(weights, strict=False)
    return model


def completion_logp(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """log p(completion | prompt), summed; the sequence stands alone in its row."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum()


def ratio(policy: torch.nn.Module, reference: torch.nn.Module, row: dict, field: str) -> torch.Tensor:
    with torch.no_grad():
        kept = completion_logp(reference, row["prompt_ids"], row[field])
    return completion_logp(policy, row["prompt_ids"], row[field]) - kept


def dpo_step(policy, reference, rows: list[dict], numbers: range) -> torch.Tensor:
    """mean of -log sigmoid(beta (chosen ratio - rejected ratio))."""
    gaps = [
        ratio(policy, reference, rows[n], "chosen_ids") - ratio(policy, reference, rows[n], "rejected_ids")
        for n in numbers
    ]
    return -F.logsigmoid(BETA * torch.stack(gaps)).mean()


def kto_step(policy, reference, rows: list[dict], numbers: range) -> torch.Tensor:
    """mean of 1 - sigmoid(+-beta (ratio - z0)); y' of z0 is the next completion of another prompt."""
    with torch.no_grad():
        gaps = []
        for n in numbers:
            others = [rows[(n + shift) % len(rows)] for shift in range(1, len(rows))]
            other = next(row for row in others if row["prompt_ids"] != rows[n]["prompt_ids"])
            mismatched = {"prompt_ids": rows[n]["prompt_ids"], "completion_ids": other["completion_ids"]}
            gaps.append(ratio(policy, reference, mismatched, "completion_ids"))
        z0 = torch.stack(gaps).mean().clamp(min=0)
    losses = []
    for n in numbers:
        gap = ratio(policy, reference, rows[n], "completion_ids") - z0
        losses.append(1 - torch.sigmoid(BETA * (gap if rows[n]["label"] else -gap)))
    return torch.stack(losses).mean()


def plain_loop(method: str, policy: PeftModel, reference: torch.nn.Module) -> dict:
    policy.eval()
    parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=LEARNING_RATE)
    rows = tiny.unpaired() if method == "kto" else tiny.pairs()
    step_loss = {"dpo": dpo_step, "kto": kto_step}[method]
    losses = []
    for step in range(NUM_STEPS):
        numbers = range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
        loss = step_loss(policy, reference, rows, numbers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    end = {name.removeprefix("base_model.model."): p.detach() for name, p in parameters.items()}
    return {"losses": losses, "end": end}


def plain_of(name: str, expected: dict) -> dict:
    return expected[CASES[name][0], "trained" if name in TRAINED else "new"]


@pytest.mark.parametrize("name", EXACT)
def test_losses_equal_the_plain_loop(results, expected, name):
    assert results[name]["losses"] == pytest.approx(plain_of(name, expected)["losses"], abs=1e-6)


@pytest.mark.parametrize("name", EXACT)
def test_adapters_equal_the_plain_loop(results, expected, name):
    """The way that the adapters went, 1e-5 relative."""
    end = plain_of(name, expected)["end"]
    ways = {n: pair for n, pair in results[name]["adapters"].items() if n in results[name]["trained"]}
    assert set(ways) == set(end)
    wrong = torch.cat([(after - end[n]).flatten() for n, (_, after) in ways.items()]).norm()
    way = torch.cat([(after - before).flatten() for before, after in ways.values()]).norm()
    assert way > 1e-2
    assert (wrong / way).item() < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_at_the_first_step_policy_and_reference_are_one(results, name):
    """Every log-ratio is 0, and with it z0: DPO ln 2, KTO 1 - sigmoid(0) = 1/2; dropout meets B = 0."""
    exact = math.log(2) if CASES[name][0] == "dpo" else 0.5
    assert results[name]["losses"][0] == pytest.approx(exact, abs=1e-2 if "bfloat16" in name else 1e-6)
    assert max(abs(loss - exact) for loss in results[name]["losses"][1:]) > 2e-4


def test_the_reference_of_a_trained_adapter_is_not_the_bare_base(results, expected):
    assert abs(expected["dpo", "trained, bare base"]["losses"][0] - math.log(2)) > 0.02
    kept = results["dpo trained zero3"]["adapters"]
    frozen = [name for name in kept if ".reference." in name]
    assert len(frozen) == len(kept) / 2
    for name in frozen:
        before, after = kept[name]
        assert torch.equal(before, after)
        assert torch.equal(before, kept[name.replace(".reference.", ".default.")][0])


@pytest.mark.parametrize("name", CASES)
def test_only_adapters_change(results, name):
    found = results[name]
    assert found["base_unchanged"]
    assert all(found["base_unchanged"])
    assert found["requires_grad_unchanged"]
    assert found["reference_unchanged"], "scores with the adapters off are equal bit for bit"
    assert found["kind"] == "adapters_off"
    assert found["trained"]
    assert all(".lora_" in n and ".default." in n for n in found["trained"])
    for other in found["others"]:
        assert other["requires_grad_unchanged"]
        assert other["reference_unchanged"]
        assert other["losses"] == found["losses"]


@pytest.mark.parametrize("name", CASES)
def test_the_head_stays_fused_unless_it_has_an_adapter(results, name):
    assert results[name]["fused_head"] is (name != "dpo head")
    told = [message for message in results[name]["messages"] if "LM head has an adapter" in message]
    assert len(told) == (name == "dpo head")


def test_the_optimizer_holds_the_adapters_alone(results):
    """r (in + out) for q, k, v, o (32-32, 32-16, 32-16, 32-32), gate, up and down (32-48) of two layers.

    2 * 4 * (64 + 48 + 48 + 64 + 3 * 80) = 3712, of which each of two ranks of ZeRO-2 holds a half.
    """
    assert results["dpo zero0"]["optimizer_elements"] == 3712
    assert results["dpo zero2 two ranks"]["optimizer_elements"] == 3712 / 2


def test_new_adapters_are_the_same_everywhere(results):
    first = results["dpo zero0"]["adapters"]
    for name in [*NEW, "dpo zero2 two ranks", "dpo checkpointing", "dpo dropout"]:
        for weight, (start, _) in results[name]["adapters"].items():
            assert torch.equal(start, first[weight][0]), (name, weight)
    for weight, (start, _) in first.items():
        if ".lora_B." in weight:
            assert not start.any()
        else:
            bound = start.shape[1] ** -0.5  # uniform within 1 / sqrt(in_features)
            assert 0.9 * bound < start.abs().max() <= bound
            assert start.std() == pytest.approx(bound / 3**0.5, rel=0.2)
    drawn = [start for weight, (start, _) in first.items() if ".lora_A." in weight]
    assert not torch.equal(drawn[0], drawn[1])


def test_dropout_acts_in_training_alone(results):
    found = results["dpo dropout"]
    assert found["scoring_repeats"]
    assert not found["training_repeats"]
    assert results["dpo zero1"]["training_repeats"]
    assert found["losses"][2] != results["dpo zero1"]["losses"][2]


@pytest.mark.parametrize("stage", [1, 3])
def test_bfloat16_trains(results, stage):
    found = results[f"dpo bfloat16 zero{stage}"]
    ends = [after for _, after in found["adapters"].values()]
    assert {weight.dtype for weight in ends} == {torch.bfloat16}
    assert all(torch.isfinite(weight).all() for weight in ends)
    assert found["losses"] == pytest.approx(results["dpo zero3"]["losses"], abs=0.05)


@pytest.mark.parametrize("name", [n for n in CASES if "bfloat16" not in n])
def test_exported_adapter_gives_the_policys_log_probs(results, out, models, name):
    method, model, *_ = CASES[name]
    directory = out / name.replace(" ", "-")
    assert {path.name for path in directory.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    base = models / ("policy" if model == "ADAPTER" else model)
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(whole, directory).eval()
    rows = tiny.unpaired() if method == "kto" else tiny.pairs()
    field = "completion_ids" if method == "kto" else "chosen_ids"
    logps = results[name]["logps"]
    assert sorted(logps) == list(range(GLOBAL_BATCH))
    for number, total in logps.items():
        with torch.no_grad():
            again = completion_logp(loaded, rows[number]["prompt_ids"], rows[number][field]).item()
        assert again == pytest.approx(total, abs=1e-5, rel=1e-6)


def test_exported_settings_name_the_base_and_say_what_it_is(out, models):
    directory = out / "dpo-zero3"
    written = json.loads((directory / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(models / "policy")
    assert (written["r"], written["lora_alpha"], written["peft_type"]) == (4, 8, "LORA")
    assert written["target_modules"] == sorted(written["target_modules"])
    model = AutoPeftModelForCausalLM.from_pretrained(directory)
    assert any(bool(p.any()) for name, p in model.named_parameters() if ".lora_B." in name)
    names = torch.load(out / "lora-1.pt")["dpo zero0"]["adapters"]
    assert len(names) == 2 * 7 * 2, "A and B for 7 linear layers in each of 2 layers"


def test_command_line(models: Path, tmp_path: Path) -> None:
    """Two ranks train an adapter; one rank then trains on top of it, with the tokenizer beside it."""
    data = tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.text_pairs())
    first, second = tmp_path / "first", tmp_path / "second"
    common = ["--method", "dpo", "--dataset_path", data, "--max_steps", 2, "--learning_rate", 1e-4]
    common += ["--per_device_train_batch_size", 2]
    launch(
        TRAIN, *common, "--model_name_or_path", models / "policy", "--use_lora", "--output_dir", first
    ).check()
    summary = json.loads((first / "run_summary.json").read_text())
    assert (summary["reference"], summary["status"]) == ("adapters_off", "completed")
    assert not list(first.glob("model*.safetensors"))
    launch(TRAIN, *common, "--model_name_or_path", first, "--output_dir", second, num_ranks=1).check()
    loaded = AutoPeftModelForCausalLM.from_pretrained(second)
    text = AutoTokenizer.from_pretrained(second)("say 1 ", return_tensors="pt")
    assert (
        loaded.generate(**text, max_new_tokens=2, do_sample=False).shape[1] == text["input_ids"].shape[1] + 2
    )
    assert json.loads((second / "adapter_config.json").read_text())["r"] == 16
    assert json.loads((second / "run_summary.json").read_text())["reference"] == "adapters_off"
