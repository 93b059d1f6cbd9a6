"""The routers' load of a pack, against transformers' own load-balancing loss on single rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from ds_align.batch import Layout, Pair
from ds_align.models import PolicyModel, num_experts
from ds_align.models.router import router_sums
from ds_align.packing import PreferenceTable, build_batch, plan_step

TYPES = ["mixtral", "qwen2_moe", "qwen3_moe"]


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


# Two pairs share a prompt and a rejected completion.
PAIRS = [
    Pair(ids(5, 6, 7), ids(8, 9), ids(10, 11, 12)),
    Pair(ids(5, 6, 7), ids(13), ids(10, 11, 12)),
    Pair(ids(20), ids(21, 22, 23, 24), ids(25)),
]


def plain_balance(model: torch.nn.Module) -> torch.Tensor:
    """Every pair's two rows, each alone; over the tokens of all of them."""
    rows = [
        np.concatenate([pair.prompt_ids, answer])
        for pair in PAIRS
        for answer in (pair.chosen_ids, pair.rejected_ids)
    ]
    runs = [model.model(torch.tensor(row[None].astype(np.int64)), output_router_logits=True) for row in rows]
    layers = tuple(torch.cat(layer) for layer in zip(*(run.router_logits for run in runs), strict=True))
    return load_balancing_loss_func(layers, 4, 2)


def test_by_hand() -> None:
    # One layer, two tokens of weight 2 and 1, two experts, top 1. Probabilities (3/4, 1/4) and (1/2, 1/2).
    logits = torch.tensor([[np.log(3.0), 0.0], [1.0, 1.0]], dtype=torch.float32)
    probabilities, load = router_sums([logits, logits], torch.tensor([[2.0, 1.0]]), 1)
    # Twice (two layers) 2 * 3/4 + 1/2 = 2 and 2 * 1/4 + 1/2 = 1.
    assert probabilities.tolist() == pytest.approx([4.0, 2.0])
    assert load[-1].item() == 6.0 and load[:-1].sum().item() == 6.0 and load[0].item() >= 4.0


@pytest.mark.parametrize("pack_tokens", [1000, 8])
@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("model_type", TYPES)
def test_packs_give_the_load_balancing_loss_of_single_rows(bench, model_type, layout, pack_tokens) -> None:
    model = bench.model(model_type)
    model.zero_grad()
    expected = plain_balance(model)
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    policy = PolicyModel(model, layout)
    table = PreferenceTable.from_preferences(PAIRS)
    plan = plan_step(
        table,
        world_size=2,
        layout=layout,
        pack_tokens=pack_tokens,
        reference_tokens=1000,
        needs_reference=False,
    )
    packs = [build_batch(table, pack, range(3), layout) for rank in plan.train for pack in rank]
    assert len(packs) > (2 if pack_tokens == 8 else 1)
    sums = [policy(pack, with_router=True)[-2:] for pack in packs]
    load = torch.stack([load for _, load in sums]).sum(0)
    probabilities = torch.stack([probabilities for probabilities, _ in sums]).sum(0)
    found = 4 * (load[:-1] * probabilities).sum() / load[-1] ** 2
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    found.backward()
    for name, gradient in gradients.items():
        error = (model.get_parameter(name).grad - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 1e-5, name


def test_number_of_experts() -> None:
    assert num_experts(AutoConfig.for_model("mixtral", num_local_experts=6)) == 6
    assert num_experts(AutoConfig.for_model("qwen3_moe", num_experts=5)) == 5
    assert num_experts(AutoConfig.for_model("llama")) == 0
