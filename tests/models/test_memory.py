"""Neither forward nor backward makes a tensor of scored tokens times vocabulary, whatever the method."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ds_align.batch import GlobalBatch, Layout, PackedBatch, Pair, TokenScores, Unpaired
from ds_align.config import METHODS
from ds_align.kernels import reference
from ds_align.models import PolicyModel
from ds_align.objective import Objective
from ds_align.packing import PreferenceTable
from tests.kernels.largest_tensor import LargestTensor

VOCABULARY = 9000
LENGTH = 250
NUM_SCORED = 6 * LENGTH


def batch_of(bench, inputs: str, layout: Layout) -> PackedBatch:
    generator = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return generator.integers(0, VOCABULARY, length, dtype=np.int32)

    rows = [Pair(ids(10), ids(LENGTH), ids(LENGTH)) for _ in range(3)]
    if inputs == "unpaired":
        rows = [
            Unpaired(row.prompt_ids, completion, number == 0)
            for row in rows
            for number, completion in enumerate((row.chosen_ids, row.rejected_ids))
        ]
    return bench.one_pack(PreferenceTable.from_preferences(rows), layout)


def largest(policy: PolicyModel, objective: Objective, batch: PackedBatch) -> int:
    owner = GlobalBatch(
        step=1,
        epoch=0.0,
        micro_batches=[batch],
        reference_batches=[],
        kl_batches=[],
        kl_units=torch.zeros(0, dtype=torch.long),
        num_preferences=batch.num_preferences,
        num_chosen_tokens=3 * LENGTH,
        num_kl=0,
        unit_lengths=torch.full((6,), LENGTH),
        reference_logps=torch.full((6 * LENGTH,), -7.0),
        kl=torch.tensor(0.5),
    )
    with LargestTensor() as watch:
        output = objective(batch, TokenScores(*policy(batch, with_collision=True)), owner)
        forward = watch.num_elements
        output.losses.sum().backward()
    assert forward > 0
    assert policy.model.lm_head.weight.grad.any()
    return watch.num_elements


def policy_of(bench, layout: Layout) -> PolicyModel:
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = bench.model("llama", **shape, vocab_size=VOCABULARY, max_position_embeddings=512)
    return PolicyModel(model, layout)


RUNS = {
    "dpo": {"rpo_alpha": 0.5, "use_weighting": True, "ld_alpha": 0.5},
    "ipo": {},
    "kto": {},
    "cpo": {"cpo_alpha": 0.5},
    "simpo": {"sft_weight": 0.5},
}


@pytest.mark.parametrize("layout", [Layout.SHARED, Layout.PADDED])
@pytest.mark.parametrize("method", sorted(RUNS))
def test_nothing_larger_than_one_tile_exists(bench, method: str, layout: Layout) -> None:
    spec = METHODS[method]
    batch = batch_of(bench, spec.inputs, layout)
    assert batch.labels.numel() == NUM_SCORED
    tile = reference.CPU_TILE.tokens * reference.CPU_TILE.vocabulary
    assert 6 * tile < NUM_SCORED * VOCABULARY
    found = largest(policy_of(bench, layout), Objective(spec, spec.config(**RUNS[method])), batch)
    assert found <= tile


def test_the_models_own_logits_are_that_large(bench) -> None:
    spec = METHODS["dpo"]
    policy = policy_of(bench, Layout.SHARED)
    policy.fused_head = False
    batch = batch_of(bench, "pairs", Layout.SHARED)
    assert largest(policy, Objective(spec, spec.config()), batch) >= NUM_SCORED * VOCABULARY
