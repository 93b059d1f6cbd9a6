"""The head alone: log-probs with labels, the model's ordinary logits without."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ds_align.models.attention import PACKABLE_MODEL_TYPES
from ds_align.models.head import LogprobHead, head_arguments


@pytest.mark.parametrize("with_bias", [False, True])
def test_an_adopted_head(with_bias: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(4, 11, bias=with_bias)
    hidden, labels = torch.randn(5, 4), torch.tensor([0, 10, 3, 3, 7])
    plain = head(hidden).detach()
    weight = head.weight
    LogprobHead.adopt(head, softcap=2.0, scale=0.5)
    assert head.weight is weight
    assert torch.equal(head(hidden), plain)
    token_logps, mean_logits = head(hidden, labels)
    capped = 2.0 * torch.tanh(0.5 * plain / 2.0)
    expected = torch.log_softmax(capped, dim=-1)[torch.arange(5), labels]
    torch.testing.assert_close(token_logps, expected, rtol=0, atol=1e-6)
    # The model's own logits, with scale and cap.
    torch.testing.assert_close(mean_logits, capped.mean(dim=-1), rtol=0, atol=1e-6)
    assert token_logps.requires_grad and not mean_logits.requires_grad


def test_scale_and_cap_come_from_the_models_config() -> None:
    assert head_arguments(SimpleNamespace()) == {"softcap": None, "scale": None}
    assert head_arguments(SimpleNamespace(logits_scaling=4.0)) == {"softcap": None, "scale": 0.25}
    config = SimpleNamespace(final_logit_softcapping=30.0, logit_scale=0.5)
    assert head_arguments(config) == {"softcap": 30.0, "scale": 0.5}


@pytest.mark.parametrize("model_type", sorted(PACKABLE_MODEL_TYPES))
def test_every_familys_head_gives_the_log_softmax_of_the_models_own_logits(bench, model_type: str) -> None:
    model = bench.model(model_type)
    row = torch.tensor([[3, 14, 15, 9, 26, 53, 58, 9]])
    with torch.no_grad():
        logits = model(input_ids=row).logits[0, :-1]
    arguments = head_arguments(model.config)
    LogprobHead.adopt(model.lm_head, **arguments)
    hidden = model.model(input_ids=row).last_hidden_state[0, :-1]
    token_logps, mean_logits, collision = model.lm_head(hidden, row[0, 1:], with_collision=True)
    logps = torch.log_softmax(logits, dim=-1)
    expected = logps[torch.arange(7), row[0, 1:]]
    torch.testing.assert_close(token_logps, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(collision, torch.logsumexp(2 * logps, dim=-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(mean_logits, logits.mean(dim=-1), rtol=0, atol=1e-5)


def test_the_families_with_a_scale_or_a_cap(bench) -> None:
    found = {name: head_arguments(bench.model(name).config) for name in sorted(PACKABLE_MODEL_TYPES)}
    assert {name: each for name, each in found.items() if each != {"softcap": None, "scale": None}} == {
        "cohere": {"softcap": None, "scale": 0.3},
        "cohere2": {"softcap": None, "scale": 0.3},
        "gemma2": {"softcap": 2.5, "scale": None},
        "gemma3_text": {"softcap": 2.5, "scale": None},
        "granite": {"softcap": None, "scale": pytest.approx(1 / 3)},
    }
