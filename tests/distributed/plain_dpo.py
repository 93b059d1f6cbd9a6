"""DPO in plain PyTorch for any two models, one sequence at a time, with the gradient of every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.distributed.plain_loop import token_logps

FIELDS = ("chosen_ids", "rejected_ids")


@dataclass(frozen=True)
class Step:
    """What a step saw before its update; token_logps by completion, gradients by parameter."""

    loss: float
    token_logps: dict[tuple[int, ...], Tensor]
    gradients: dict[str, Tensor]


def dpo_steps(
    policy: nn.Module, reference: nn.Module, batches: Sequence[Sequence[dict]], *, learning_rate: float
) -> list[Step]:
    """A step of plain SGD on each batch: mean of -log sigmoid(0.1 (chosen log-ratio - rejected log-ratio)).

    The policy keeps its last weights; those without requires_grad stay.
    """
    trained = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=learning_rate)
    steps = []
    for rows in batches:
        seen: dict[tuple[int, ...], Tensor] = {}
        margins = []
        for row in rows:
            ratios = []
            for field in FIELDS:
                logps = token_logps(policy, row["prompt_ids"], row[field])
                with torch.no_grad():
                    kept = token_logps(reference, row["prompt_ids"], row[field])
                seen[tuple(row[field])] = logps.detach()
                ratios.append(logps.sum() - kept.sum())
            margins.append(ratios[0] - ratios[1])
        loss = -F.logsigmoid(0.1 * torch.stack(margins)).mean()
        optimizer.zero_grad()
        loss.backward()
        steps.append(Step(loss.item(), seen, {name: weight.grad.clone() for name, weight in trained.items()}))
        optimizer.step()
    return steps
