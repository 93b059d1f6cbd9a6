"""Checks of the models' scores before the first step: 9 policy against reference, 12 distance of the data."""

from __future__ import annotations

import math

from ds_align.doctor.facts import Facts
from ds_align.doctor.finding import Outcome, Parts

FLOAT32_DIFFERENCE = 1e-3
HALF_DIFFERENCE = 0.05
FAR_LOGP = -3.0


def start_agreement(facts: Facts) -> Outcome:
    """Policy and reference from the same weights say the same of every token; DPO's first loss is ln 2."""
    scores, parts = facts.scores, Parts()
    if scores.mean_difference is None:
        return Outcome("ok", {}, "no reference to compare with")
    parts.value |= {
        "mean_difference": scores.mean_difference,
        "max_difference": scores.max_difference,
        "tokens": scores.num_tokens,
        "precision": scores.precision,
        "first_loss": scores.loss,
    }
    seen = (
        f"per token policy and reference differ by {scores.mean_difference:.2g} nats in the mean, "
        f"{scores.max_difference:.2g} at most"
    )
    if not scores.same_weights:
        return Outcome("info", parts.value, f"{seen}: the reference has other weights")
    exact = scores.precision == "float32"
    # In half precision a single token may be further off by rounding alone, in packs of another shape.
    difference = scores.max_difference if exact else scores.mean_difference
    limit = FLOAT32_DIFFERENCE if exact else HALF_DIFFERENCE
    # Written so that a NaN, too, is an error.
    if not difference <= limit:
        parts.add(
            "error",
            f"{seen}, though both have the same weights",
            "clear ref_cache_dir, check that model_name_or_path is whole, and report it if it stays",
        )
    if scores.loss is not None and not abs(scores.loss - math.log(2.0)) <= limit:
        parts.add("error", f"DPO's first loss is {scores.loss:.6f}, expected ln 2 = 0.693147", "see above")
    return parts.outcome(seen)


def distance_of_data(facts: Facts) -> Outcome:
    """Mean log-prob of a chosen token under the starting model; far below 0, preferences teach little."""
    scores = facts.scores
    if scores.chosen_logp is None:
        return Outcome("ok", {}, "no chosen completion was scored")
    value = {"chosen_logp_per_token": scores.chosen_logp, "preferences": scores.num_preferences}
    words = f"chosen completions have {scores.chosen_logp:.2f} nats a token before training"
    if scores.chosen_logp >= FAR_LOGP:
        return Outcome("ok", value, words)
    return Outcome("warning", value, f"{words}: data far from the policy", "fine-tune on the chosen first")
