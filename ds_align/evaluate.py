"""Metrics of a whole data set: exact under any packing and any number of ranks."""

from __future__ import annotations

import time

from ds_align.data import PreferenceDataset
from ds_align.engine import AlignEngine
from ds_align.metrics import MetricSums

# What the logged names are called in an evaluation, beside the names themselves.
_ALIASES = {
    "pairs": {
        "preference_accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
    },
    "unpaired": {
        "overall_accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
    },
}


def evaluate(engine: AlignEngine, data: PreferenceDataset, *, prefix: str = "eval") -> dict[str, float]:
    """Mean losses and accuracies of the current policy on a data set, each name with the prefix.

    The NLL term is per chosen token of the whole set, KTO's z0 is that of the whole set, and a loss that
    couples the pairs is taken over the whole set.
    Collective: every rank must call this.
    """
    started = time.perf_counter()
    sums = MetricSums(engine.spec.inputs, engine.device)
    z0 = None
    if engine.spec.inputs == "unpaired":
        z0 = engine.reference_point(engine.evaluation_batches(data))
    ahead = None
    if engine.objective.looks_ahead:
        ahead = engine.look_ahead(engine.evaluation_batches(data), training=False)
    num_chosen_tokens = int(data.completion_lengths[:, 0].sum())
    for number, global_batch in enumerate(engine.evaluation_batches(data)):
        global_batch.num_preferences = len(data)
        global_batch.num_chosen_tokens = num_chosen_tokens
        global_batch.kl = z0
        if ahead is not None:
            ahead.hand_to(global_batch, number)
        for batch in global_batch.micro_batches:
            sums.add(engine.forward(batch, grad=False), batch)
    means, _ = sums.reduce()
    for alias, name in (_ALIASES[engine.spec.inputs] | engine.config.metric_aliases).items():
        if name in means:
            means[alias] = means[name]
    seconds = time.perf_counter() - started
    result = {f"{prefix}_{name}": value for name, value in means.items()}
    result[f"{prefix}_runtime"] = seconds
    result[f"{prefix}_samples"] = len(data)
    result[f"{prefix}_samples_per_second"] = len(data) / seconds
    return result
