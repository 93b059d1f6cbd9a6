"""The head alone: log-probs with labels, the model's ordinary logits without."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

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
    # The mean is taken before the cap.
    torch.testing.assert_close(mean_logits, 0.5 * plain.mean(dim=-1), rtol=0, atol=1e-6)
    assert token_logps.requires_grad and not mean_logits.requires_grad


def test_scale_and_cap_come_from_the_models_config() -> None:
    assert head_arguments(SimpleNamespace()) == {"softcap": None, "scale": None}
    assert head_arguments(SimpleNamespace(logits_scaling=4.0)) == {"softcap": None, "scale": 0.25}
    config = SimpleNamespace(final_logit_softcapping=30.0, logit_scale=0.5)
    assert head_arguments(config) == {"softcap": 30.0, "scale": 0.5}
