"""The built-in demonstration: a small preference data set, a tokenizer and a starting model.

The rule to learn: the preferred answer is in the language of the question (English or Arabic).
`build` makes the files, `demo_overrides` gives the settings that learn the rule in a few minutes on two
CPU cores, and `python -m ds_align.demo report` shows what a run has learned.
"""

from __future__ import annotations

from typing import Any

from ds_align.demo.build import DEFAULT_DIRECTORY, DemoPaths, build

__all__ = ["DEFAULT_DIRECTORY", "DEMO_OVERRIDES", "DemoPaths", "build", "demo_overrides"]

# A model of under a million parameters that was fine-tuned for seconds needs far larger steps than the
# defaults, which are made for pretrained models. Steps are counted, not epochs, so that many GPUs, whose
# global batch is larger, take as many of them as two processes do.
DEMO_OVERRIDES: dict[str, Any] = {
    "learning_rate": 5e-4,
    "learning_rate_override": True,
    "max_steps": 64,
    "warmup_ratio": 0.1,
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "max_length": 256,
    "logging_steps": 4,
    "eval_steps": 16,
    "eval_on_start": True,
}
# The likelihood term of the chosen answers keeps the policy fluent: without it a model this small learns to
# tell the answers apart but answers in broken sentences. It holds the policy back, hence the larger step.
_LIKELIHOOD_WEIGHT = 0.3
_LIKELIHOOD_OVERRIDES: dict[str, Any] = {"learning_rate": 8e-4, "max_steps": 80}
# The fields that weigh the likelihood of the chosen completions, by method.
_LIKELIHOOD_FIELDS = {"dpo": "rpo_alpha", "cpo": "cpo_alpha", "simpo": "sft_weight"}


def demo_overrides(method: str) -> dict[str, Any]:
    """Return the config fields with which `method` learns the demonstration; a user's own values win.

    A method whose objective has a likelihood term uses it, whatever its default is.
    """
    likelihood_weight = _LIKELIHOOD_FIELDS.get(method)
    if likelihood_weight is None:
        return dict(DEMO_OVERRIDES)
    return {**DEMO_OVERRIDES, **_LIKELIHOOD_OVERRIDES, likelihood_weight: _LIKELIHOOD_WEIGHT}
