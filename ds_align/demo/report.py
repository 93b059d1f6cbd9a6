"""What a run on the demonstration has learned: figures, curves and answers before and after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_align.demo.build import DemoPaths
from ds_align.demo.data import PreferenceRow
from ds_align.errors import DataError

RESULT_FILE = "result.json"
CURVES_FILE = "curves.png"
_ANSWER_TOKENS = 40

MetricsRow = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """Held-out figures of the first and the last evaluation.

    accuracy is policy_accuracy, margin the mean reward margin, loss the held-out loss in nats; seconds is
    the wall-clock time of the run.
    """

    accuracy_before: float
    accuracy_after: float
    margin_before: float
    margin_after: float
    loss_before: float
    loss_after: float
    world_size: int
    zero_stage: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Answers:
    """One held-out row with the greedy answers of the starting model and of the trained one."""

    row: PreferenceRow
    before: str
    after: str


def read_metrics(output_dir: Path) -> list[MetricsRow]:
    """Return the rows of metrics.jsonl; DataError where there is none or a line is not JSON."""
    path = output_dir / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{path}: no such file; expected the metrics of a finished run; train first")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: {error.msg}; expected one JSON object a line; train again"
            ) from None
    return rows


def read_result(output_dir: Path, *, seconds: float) -> Result:
    """Return the figures of a completed run; DataError where it is not complete or not evaluated."""
    summary_path = output_dir / "run_summary.json"
    if not summary_path.is_file():
        raise DataError(f"{summary_path}: no such file; expected the summary of a finished run; train first")
    summary = json.loads(summary_path.read_text(encoding="utf-8"))
    if summary.get("status") != "completed":
        raise DataError(
            f"{summary_path}: status {summary.get('status')!r}, expected 'completed'; train again"
        )
    evaluations = [row for row in read_metrics(output_dir) if "eval_policy_accuracy" in row]
    if len(evaluations) < 2:
        raise DataError(
            f"{output_dir / 'metrics.jsonl'}: {len(evaluations)} evaluation(s), expected one before and "
            "one after training; train with --eval_on_start"
        )
    before, after = evaluations[0], evaluations[-1]
    return Result(
        accuracy_before=before["eval_policy_accuracy"],
        accuracy_after=after["eval_policy_accuracy"],
        margin_before=before["eval_margin"],
        margin_after=after["eval_margin"],
        loss_before=before["eval_loss"],
        loss_after=after["eval_loss"],
        world_size=summary["world_size"],
        zero_stage=summary["zero_stage"],
        seconds=round(seconds, 1),
    )


def result_table(result: Result) -> str:
    """Return the before/after table as text."""
    rows = [
        ("accuracy", result.accuracy_before, result.accuracy_after),
        ("margin", result.margin_before, result.margin_after),
        ("loss", result.loss_before, result.loss_after),
    ]
    lines = [f"{'held-out':<12}{'before':>10}{'after':>10}", "-" * 32]
    lines += [f"{name:<12}{before:>10.4f}{after:>10.4f}" for name, before, after in rows]
    lines.append(f"\n{result.world_size} process(es), ZeRO stage {result.zero_stage}, {result.seconds:.0f} s")
    return "\n".join(lines)


def save_curves(metrics: Sequence[MetricsRow], path: Path) -> None:
    """Save a PNG of the loss, the held-out accuracy and the margin over the optimizer steps."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = (
        ("loss (nats)", (("loss", "training"), ("eval_loss", "held-out"))),
        (
            "accuracy",
            (("rewards/accuracies", "training, by reward"), ("eval_policy_accuracy", "held-out, by policy")),
        ),
        ("reward margin", (("rewards/margins", "training"), ("eval_margin", "held-out"))),
    )
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 4), layout="constrained")
    for axis, (title, curves) in zip(axes, panels, strict=True):
        for key, label in curves:
            points = [(row["step"], row[key]) for row in metrics if key in row]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label) if points else None
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[1].set_ylim(-0.02, 1.02)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def example_rows(paths: DemoPaths, count: int) -> list[PreferenceRow]:
    """Return `count` held-out rows, English and Arabic questions in turn."""
    rows = [json.loads(line) for line in paths.heldout.read_text(encoding="utf-8").splitlines()]
    english = [row for row in rows if row["prompt"].isascii()]
    arabic = [row for row in rows if not row["prompt"].isascii()]
    return [row for pair in zip(english, arabic, strict=False) for row in pair][:count]


def answer_rows(paths: DemoPaths, trained: Path, rows: Sequence[PreferenceRow]) -> list[Answers]:
    """Answer each row's question greedily with the starting model and with the one in `trained`."""
    prompts = [row["prompt"] for row in rows]
    before, after = _generate(paths.model, prompts), _generate(trained, prompts)
    return [Answers(row, *texts) for row, *texts in zip(rows, before, after, strict=True)]


def write_report(output_dir: Path, paths: DemoPaths, *, seconds: float, num_answers: int = 6) -> Result:
    """Print the table and some answers; write result.json and curves.png into `output_dir`.

    Raises DataError where the run is not complete; result.json is written first and whole.
    """
    result = read_result(output_dir, seconds=seconds)
    scratch = output_dir / f".{RESULT_FILE}"
    scratch.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    scratch.replace(output_dir / RESULT_FILE)
    save_curves(read_metrics(output_dir), output_dir / CURVES_FILE)
    print(result_table(result))
    print("\nanswers to held-out questions (entities and sentence patterns that training never saw)")
    for answers in answer_rows(paths, output_dir, example_rows(paths, num_answers)):
        print(f"\n  question  {answers.row['prompt'].strip()}")
        print(f"  before    {answers.before}\n  after     {answers.after}")
    print(f"\nwritten: {output_dir / RESULT_FILE}, {output_dir / CURVES_FILE}")
    return result


def _generate(directory: Path, prompts: Sequence[str]) -> list[str]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
        with torch.no_grad():
            generated = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=_ANSWER_TOKENS,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        text = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
        answers.append(" ".join(text.split()))
    return answers
