"""Precedence, strict YAML, the command line and its help."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_align.config import METHODS, DPOConfig, KTOConfig, SimPOConfig, parse_command_line
from ds_align.config.cli import parse_text
from ds_align.config.schema import describe_type
from ds_align.errors import ConfigError


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as error:
        parse_command_line(argv)
    return str(error.value)


def test_defaults_then_yaml_then_flags(run_yaml: Path) -> None:
    run_yaml.write_text("method: dpo\nbeta: 0.2\nmax_length: 64\n")
    config = parse_command_line(["--config", str(run_yaml), "--beta", "0.3"])
    assert type(config) is DPOConfig
    assert (config.beta, config.max_length, config.seed) == (0.3, 64, 42)


def test_the_method_flag_wins_over_the_file(run_yaml: Path) -> None:
    run_yaml.write_text("method: dpo\n")
    assert type(parse_command_line(["--config", str(run_yaml), "--method", "kto"])) is KTOConfig


def test_a_flag_replaces_the_alias_in_the_file(run_yaml: Path) -> None:
    run_yaml.write_text("method: dpo\nmax_seq_length: 64\nbf16: true\n")
    config = parse_command_line([f"--config={run_yaml}", "--max_length", "32", "--dtype", "float32"])
    assert (config.max_length, config.dtype) == (32, "float32")


def test_all_errors_at_once_each_with_its_origin(run_yaml: Path) -> None:
    run_yaml.write_text("method: dpo\nbetta: 0.2\nmax_steps: soon\nseed: 1\nseed: 2\nwarmup_ratio: 0.1\n")
    message = refusal(
        "--config", str(run_yaml), "--lerning-rate", "1", "--eval_fraction=2", "--warmup_steps", "3", "stray"
    )
    lines = message.splitlines()
    assert lines[0] == "7 errors:"
    expected = [
        f"{run_yaml}:5: 'seed' is given twice (first in line 4); keep one",
        f"{run_yaml}:2: unknown key 'betta'; did you mean beta?",
        f"{run_yaml}:3: max_steps='soon' is not valid; expected an integer >= 1 or none",
        "--lerning_rate: unknown key 'lerning_rate'; did you mean learning_rate or learning_rate_override?",
        "--eval_fraction: eval_fraction=2.0 is not valid; expected a number >= 0 and < 1",
        f"{run_yaml}:6, --warmup_steps: warmup_ratio=0.1 and warmup_steps=3",
        "'stray' belongs to no flag",
    ]
    for part in expected:
        assert sum(line.strip().startswith(part) for line in lines) == 1, part


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-6", 1e-6), ("5E-7", 5e-7), ("2.5e-6", 2.5e-6), ("1", 1.0), (".5", 0.5), ("'1e-6'", 1e-6)],
)
def test_yaml_numbers(run_yaml: Path, text: str, value: float) -> None:
    run_yaml.write_text(f"learning_rate: {text}\n")
    assert DPOConfig.from_yaml(run_yaml).learning_rate == value


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("max_steps: 010", "max_steps=10.0"),
        ("max_steps: 1:30", "max_steps='1:30'"),
        ("max_steps: 5.0", "max_steps=5.0"),
        ("prefix_sharing: yes", "prefix_sharing='yes'"),
        ("beta: .nan", "beta=nan"),
        ("run_name: 3", "run_name=3"),
        ("ds_config: {zero_optimization: {stage: 1, stage: 2}}", "'stage' is given twice"),
        ("beta: [1", "not valid YAML"),
        ("- beta", "expected `key: value` lines, found a sequence"),
        ("method: kto", "method='kto', but DPOConfig is for 'dpo'"),
    ],
)
def test_yaml_is_strict(run_yaml: Path, line: str, part: str) -> None:
    run_yaml.write_text(f"# a comment\n{line}\n")
    with pytest.raises(ConfigError) as error:
        DPOConfig.from_yaml(run_yaml)
    assert part in str(error.value)
    assert f"{run_yaml}:" in str(error.value)


def test_yaml_file_that_is_missing_or_empty(run_yaml: Path) -> None:
    assert "cannot be read (No such file or directory)" in refusal(
        "--method", "dpo", "--config", str(run_yaml)
    )
    run_yaml.write_text("")
    assert DPOConfig.from_yaml(run_yaml) == DPOConfig()


@pytest.mark.parametrize("method", METHODS)
def test_yaml_round_trip(run_yaml: Path, method: str) -> None:
    config = METHODS[method].config(
        model_name="نموذج/m",
        learning_rate=3e-7,
        bf16=True,
        max_steps=7,
        ds_config={"train_batch_size": "auto"},
    )
    config.to_yaml(run_yaml)
    assert METHODS[method].config.from_yaml(run_yaml) == config
    assert parse_command_line(["--config", str(run_yaml)]) == config


def test_from_yaml_with_overrides(run_yaml: Path) -> None:
    run_yaml.write_text("beta: 0.2\nseed: 1\n")
    config = DPOConfig.from_yaml(run_yaml, learning_rate=5e-7, beta=0.4)
    assert (config.beta, config.seed, config.learning_rate) == (0.4, 1, 5e-7)
    with pytest.raises(ConfigError, match="seeed"):
        DPOConfig.from_yaml(run_yaml, seeed=5)


def test_flag_forms() -> None:
    config = parse_command_line(
        [
            "--method=simpo",
            "--max-steps",
            "5",
            "--per_device_train_batch_size=2",
            "--eval-on-start",
            "--prefix_sharing",
            "false",
            "--pack_max_tokens",
            "512",
            "--ref-batch-tokens",
            "auto",
            "--loss_type",
            "simpo",
            "--max_prompt_length",
            "none",
            "--local_rank=1",
            "--beta",
            "1",
            "--beta",
            "3",
        ]
    )
    assert type(config) is SimPOConfig
    assert (config.max_steps, config.per_device_train_batch_size, config.eval_on_start) == (5, 2, True)
    assert (config.prefix_sharing, config.pack_max_tokens, config.ref_batch_tokens) == (False, 512, "auto")
    assert (config.max_prompt_length, config.beta) == (None, 3.0)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (
            ["--method", "dop"],
            "method='dop' is unknown; expected dpo, ipo, kto, cpo, simpo; did you mean dpo",
        ),
        ([], "no method; give --method"),
        (["--bta", "1"], "--bta: unknown flag; did you mean beta"),
        (["--method"], "--method: expected a value"),
        (["--method", "dpo", "--max_steps"], "--max_steps: expected an integer >= 1 or none after it"),
        (["--method", "dpo", "--max_step", "5"], "unknown key 'max_step'; did you mean max_steps"),
        (["--method", "dpo", "--confg", "x"], "did you mean config or ds_config"),
        (["--method", "dpo", "--cpo_alpha", "1"], "'cpo_alpha' is a setting of cpo, simpo, not of dpo"),
        (["--method", "dpo", "--learning_rate", "-1e-6"], "--learning_rate: learning_rate=-1e-06"),
        (["--method", "dpo", "--prefix_sharing", "1"], "--prefix_sharing: prefix_sharing='1'"),
        (["--method", "dpo", "--bf16", "--fp16"], "--bf16, --fp16: bf16=True, fp16=True disagree"),
        (["--method", "dpo", "--local_rank", "x"], "--local_rank=x: expected an integer"),
    ],
)
def test_flag_errors(argv: list[str], part: str) -> None:
    assert part in refusal(*argv)


def test_list_flags_split_at_commas() -> None:
    assert parse_text("a, b,c", list[str]) == ["a", "b", "c"]
    assert parse_text('["a", "b"]', list[str]) == parse_text("[a,b]", list[str]) == ["a", "b"]
    assert parse_text("[1, 2.5]", list[float]) == [1.0, 2.5]
    assert parse_text("1,2.5", list[float] | None) == [1.0, 2.5]


def test_help_says_each_bound_once() -> None:
    for spec in METHODS.values():
        for name, field in spec.config.model_fields.items():
            words = describe_type(field.annotation, field.metadata).split()
            for sides in ((">", ">="), ("<", "<=")):
                assert sum(word in sides for word in words) <= 1, name


def help_text(*argv: str) -> tuple[str, float]:
    program = (
        "import sys\n"
        "from ds_align.config import parse_command_line\n"
        "try:\n"
        "    parse_command_line(sys.argv[1:])\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'deepspeed'} & set(sys.modules)\n"
        "    print('HEAVY', sorted(heavy))\n"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program, *argv], capture_output=True, text=True, check=True)
    return done.stdout, time.perf_counter() - start


def test_help_is_complete_grouped_and_instant() -> None:
    text, seconds = help_text("--help")
    assert "HEAVY []" in text
    assert seconds < 1.0 or help_text("--help")[1] < 1.0
    for spec in METHODS.values():
        assert f"Method: {spec.name}:" in text
        for name in spec.config.model_fields:
            assert f"--{name} " in text or f"--{name}\n" in text, name
    for title in ("Run", "Model", "Data", "Batch", "Optimisation", "Evaluation and output", "System"):
        assert f"\n{title}:\n" in text
    assert "Default: 5e-07 (dpo), 5e-07 (ipo), 1e-06 (kto)" in " ".join(text.split())


def test_help_of_one_method_shows_that_method_alone() -> None:
    text, _ = help_text("--method", "simpo", "--help")
    assert "--gamma_beta_ratio" in text
    assert "--desirable_weight" not in text
    assert "Default: 1e-06." in " ".join(text.split())
