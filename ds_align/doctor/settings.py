"""Checks of the settings against the data: 7 beta, 8 learning rate, 10 IPO's margin, 11 KTO, 13 size."""

from __future__ import annotations

import math

import numpy as np

from ds_align.config.advice import DESTRUCTIVE_LEARNING_RATE, unwise_beta, unwise_learning_rate
from ds_align.doctor.facts import Facts
from ds_align.doctor.finding import Outcome, Parts

MIN_STEPS = 50
WARMUP_SHARE = 0.3
MEMORY_SHARE = 0.9
# Of w_d n_d / (w_u n_u), arXiv:2402.01306, section 4.
KTO_BALANCE = (1.0, 4.0 / 3.0)


def beta_range(facts: Facts) -> Outcome:
    """beta, and SimPO's margin over it, against what the method is used with."""
    config = facts.config
    low, high = config.usual_beta
    value = {"beta": getattr(config, "beta", None), "usual": [low, high]}
    if hasattr(config, "gamma_beta_ratio"):
        value["gamma_beta_ratio"] = config.gamma_beta_ratio
    if not math.isfinite(high):
        value["usual"] = None
    messages = unwise_beta(config)
    if messages:
        return Outcome("warning", value, "; ".join(messages), "set it into the range, or mean it")
    return Outcome("ok", value, f"beta={value['beta']:g}" if value["beta"] is not None else "no beta")


def learning_rate_range(facts: Facts) -> Outcome:
    """The peak learning rate against the usual range, of adapters or of all weights."""
    config = facts.config
    value = {
        "learning_rate": config.learning_rate,
        "adapters": config.trains_adapters,
        "destructive": not config.trains_adapters and config.learning_rate >= DESTRUCTIVE_LEARNING_RATE,
    }
    messages = unwise_learning_rate(config)
    if messages:
        return Outcome("warning", value, "; ".join(messages))
    meant = " (learning_rate_override: meant so)" if config.learning_rate_override else ""
    return Outcome("ok", value, f"learning_rate={config.learning_rate:g}{meant}")


def ipo_margin(facts: Facts) -> Outcome:
    """What gap IPO pulls the log-ratios to: 1 / (2 beta), per token or summed."""
    config = facts.config
    kinds = getattr(config, "loss_types", [getattr(config, "loss_type", None)])
    if config.method != "ipo" and "ipo" not in kinds:
        return Outcome("ok", {}, "not IPO")
    per_token = getattr(config, "length_normalize", True)
    unit = "nats a token" if per_token else "nats, summed over the completion"
    margin = 1.0 / (2.0 * config.beta)
    what = "log-probs" if config.method == "cpo" else "log-ratios"
    return Outcome(
        "info",
        {"margin": margin, "unit": unit},
        f"{what} of chosen and rejected are pulled {margin:g} {unit} apart: 1 / (2 beta)",
    )


def kto_balance(facts: Facts) -> Outcome:
    """KTO's y' must be of another prompt, and the two labels must weigh about the same."""
    data, config, parts = facts.train, facts.config, Parts()
    if facts.reads_pairs:
        return Outcome("ok", {}, "not KTO")
    if getattr(config, "needs_reference_point", False):
        _note_matched(facts, parts)
    desirable = data.tables.desirable[data.completion_index[:, 0]]
    num_good, num_bad = int(desirable.sum()), int((~desirable).sum())
    good = getattr(config, "desirable_weight", 1.0) * num_good
    bad = getattr(config, "undesirable_weight", 1.0) * num_bad
    parts.value |= {"desirable": num_good, "undesirable": num_bad}
    if not good or not bad:
        parts.add("warning", "one of the two labels has no row or no weight", "give both")
        return parts.outcome("")
    ratio = parts.value["ratio"] = good / bad
    low, high = KTO_BALANCE
    # The bounds themselves are fine, whatever the division makes of them.
    if not low - 1e-9 <= ratio <= high + 1e-9:
        wanted = [bound * bad / num_good for bound in KTO_BALANCE]
        parts.value["desirable_weight_to_use"] = wanted
        parts.add(
            "warning",
            f"{num_good} desirable rows weigh {ratio:.2f} x the {num_bad} undesirable ones",
            f"set desirable_weight from {wanted[0]:.3g} to {wanted[1]:.3g}",
        )
    return parts.outcome(f"desirable rows weigh {ratio:.2f} x the undesirable ones")


def _note_matched(facts: Facts, parts: Parts) -> None:
    """A derived y' has another prompt; one that the data give must at least be another completion."""
    data = facts.train
    index, own = data.kl_index, data.completion_index[:, 0]
    tables = data.tables
    num_rows = len(tables.prompt_index)
    has = index >= 0
    derived = has & (index < num_rows)
    matched = derived & (tables.prompt_index[np.where(derived, index, 0)] == data.prompt_keys)
    given = np.flatnonzero(has & (index >= num_rows))
    completions = tables.completions
    for row in given[completions.lengths[index[given]] == completions.lengths[own[given]]]:
        matched[row] = np.array_equal(completions[index[row]], completions[own[row]])
    number = int(matched.sum())
    parts.value |= {"rows_with_kl": int(has.sum()), "matched": number}
    if number:
        parts.add(
            "error" if number == int(has.sum()) else "warning",
            f"{number} of {int(has.sum())} rows have their own answer as the y' of KTO's z0",
            "give kl_completion the answer to another prompt, or leave the column out",
            tuple(f"row {row + 1}" for row in np.flatnonzero(matched)[:3]),
        )


def size_of_run(facts: Facts) -> Outcome:
    """Steps, warm-up, and the memory of what a rank certainly holds against what its device has."""
    machine, parts = facts.machine, Parts()
    if facts.num_steps is not None:
        _note_steps(facts, facts.num_steps, parts)
    if machine.state_bytes is not None and machine.device_bytes:
        share = machine.state_bytes / machine.device_bytes
        parts.value |= {
            "state_bytes": machine.state_bytes,
            "device_bytes": machine.device_bytes,
            "memory_share": share,
        }
        if share > MEMORY_SHARE:
            parts.add(
                "error" if share > 1.0 else "warning",
                f"weights, gradients, optimizer and reference take {machine.state_bytes / 1e9:.2f} GB of the "
                f"{machine.device_bytes / 1e9:.2f} GB of a device, activations not counted",
                "use more ranks, ds_config=zero3_offload, use_lora or a smaller model",
            )
    steps = "steps are not known" if facts.num_steps is None else f"{facts.num_steps} steps"
    return parts.outcome(f"{steps}; memory suffices as far as it is known")


def _note_steps(facts: Facts, num_steps: int, parts: Parts) -> None:
    config = facts.config
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * num_steps)
    parts.value |= {"num_steps": num_steps, "warmup_steps": warmup}
    if num_steps < MIN_STEPS:
        parts.add(
            "warning",
            f"{num_steps} optimizer steps",
            "train longer, or take a smaller global batch: below 50 steps little is learned",
        )
    # Where max_steps is given and warmup_steps is more, the settings say so themselves.
    told = config.max_steps is not None and config.warmup_steps > config.max_steps
    if warmup > WARMUP_SHARE * num_steps and not told:
        parts.add(
            "warning",
            f"the warm-up takes {warmup} of {num_steps} steps",
            "lower warmup_steps or warmup_ratio; 0.1 is usual",
        )
