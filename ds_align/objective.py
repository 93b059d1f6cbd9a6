"""Token log-probs to one loss a preference: sums by completion, the method's loss, the NLL term.

Nothing here communicates or reduces over preferences. The counts that belong to the global batch travel with
it, so that sum(losses) over all ranks, divided by the number of preferences, is the loss of the step.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ds_align.batch import CoupledTerms, GlobalBatch, PackedBatch, TokenScores
from ds_align.config import BaseConfig, MethodSpec
from ds_align.coupling import LogpsTable, RunningMean, couple
from ds_align.losses import Logps, LossOutput, PairedLogps, UnpairedLogps


@dataclass(frozen=True)
class ForwardOutput(LossOutput):
    """A LossOutput with what it was made from.

    losses: [num_preferences], the NLL term included. logps: what the loss saw. totals: float64
    [num_completions], summed log-probs of each completion, detached. mean_logits: float64 [num_completions],
    the mean logit over scored tokens and vocabulary. parts: by logged name, [num_preferences] each, detached:
    the NLL and load-balancing terms before their weights, WPO's weight, BCO's delta.
    """

    logps: PairedLogps | UnpairedLogps | None = None
    totals: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    parts: dict[str, torch.Tensor] | None = None


def load_loss(loss: str | Callable[..., LossOutput]) -> Callable[..., LossOutput]:
    """The function behind 'package.module:function', or the function itself."""
    if callable(loss):
        return loss
    module, _, name = loss.partition(":")
    return getattr(importlib.import_module(module), name)


def sum_by_completion(token_values: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """Sums token values [num_scored] over each completion: float64 [num_completions].

    float64, because a sequential float32 sum over a long completion loses digits that the losses need.
    """
    totals = torch.zeros(batch.num_completions, dtype=torch.float64, device=token_values.device)
    return totals.index_add(0, batch.completion_index, token_values.double())


def sum_first_tokens(
    token_values: torch.Tensor, batch: PackedBatch, members: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Sums the first counts[i] token values of completion members[i]: float64, the shape of members."""
    running = torch.nn.functional.pad(token_values.double().cumsum(0), (1, 0))
    starts = (batch.completion_lengths.cumsum(0) - batch.completion_lengths)[members]
    return running[starts + counts] - running[starts]


def token_places(batch: PackedBatch, unit_lengths: torch.Tensor) -> torch.Tensor:
    """Where each scored token stands among the tokens of all units, one after the other: [num_scored]."""
    first_of_unit = unit_lengths.cumsum(0) - unit_lengths
    first_here = batch.completion_lengths.cumsum(0) - batch.completion_lengths
    shift = first_of_unit[batch.units] - first_here
    return torch.arange(len(batch.labels), device=shift.device) + shift[batch.completion_index]


def sum_by_unit(token_values: torch.Tensor, unit_lengths: torch.Tensor) -> torch.Tensor:
    """Sums token values of unit after unit [sum of unit_lengths] over each unit: float64 [num_units]."""
    numbers = torch.arange(len(unit_lengths), device=token_values.device)
    # With its size given, the device need not be asked for it.
    owners = numbers.repeat_interleave(unit_lengths, output_size=len(token_values))
    totals = torch.zeros(len(unit_lengths), dtype=torch.float64, device=token_values.device)
    return totals.index_add(0, owners, token_values.double())


class Objective:
    """A method on log-probs: the loss function, its parameters, and what it remembers between steps."""

    def __init__(self, spec: MethodSpec, config: BaseConfig) -> None:
        self.spec = spec
        self.needs_reference = spec.needs_reference(config)
        self.coupled = spec.coupled(config)
        self.needs_collision = getattr(config, "use_weighting", False)
        self.parameters = spec.arguments(config)
        self.nll_weight = config.nll_weight
        self.nll_normalization = getattr(config, "nll_normalization", "token")
        self.ld_alpha = getattr(config, "ld_alpha", None)
        self.router_weight = config.router_aux_loss_coef
        self.looks_ahead = self.coupled or self.router_weight > 0
        self.running_delta = RunningMean() if config.needs_running_delta else None
        self._loss = load_loss(spec.loss)

    def __call__(self, batch: PackedBatch, scores: TokenScores, owner: GlobalBatch) -> ForwardOutput:
        """Losses of one micro-batch.

        scores: of the policy, with gradient. owner: the prepared global batch, for the reference's log-probs,
        z0, coupled terms and the global counts.
        """
        totals = sum_by_completion(scores.logps, batch)
        logps = self._logps(batch, scores.logps, totals, owner)
        if self.coupled:
            output = self._coupled_output(batch, logps, owner)
        else:
            output = self._loss(logps, **self.parameters)
        losses, parts = output.losses, {}
        if self.needs_collision:
            parts["wpo_weight"] = self._sequence_weights(batch, scores)
            losses = losses * parts["wpo_weight"]
        if self.spec.inputs == "pairs":
            parts["nll_loss"] = self._nll(batch, totals, owner)
            if self.nll_weight:
                losses = losses + self.nll_weight * parts["nll_loss"]
        if self.router_weight:
            parts["aux_loss"] = self._router_balance(batch, scores, owner)
            losses = losses + self.router_weight * parts["aux_loss"]
        if self.running_delta is not None:
            parts["bco_delta"] = torch.as_tensor(self.running_delta.mean, device=losses.device).expand(
                len(losses)
            )
        means = None
        if scores.mean_logits is not None:
            means = sum_by_completion(scores.mean_logits, batch) / batch.completion_lengths
        return ForwardOutput(
            losses=losses,
            chosen_rewards=output.chosen_rewards,
            rejected_rewards=output.rejected_rewards,
            rewards=output.rewards,
            logps=logps,
            totals=totals.detach(),
            parts={name: values.detach() for name, values in parts.items()},
            mean_logits=means,
        )

    def _logps(
        self, batch: PackedBatch, token_logps: torch.Tensor, totals: torch.Tensor, owner: GlobalBatch
    ) -> PairedLogps | UnpairedLogps:
        """What the loss looks at: summed log-probs of a micro-batch's preferences, and the reference's."""
        reference = None
        if self.needs_reference:
            assert owner.reference_logps is not None, "the global batch was not prepared"
            places = token_places(batch, owner.unit_lengths.to(batch.units.device))
            kept = owner.reference_logps[places]
            reference = self._member_logps(batch, kept, sum_by_completion(kept, batch))
        policy = self._member_logps(batch, token_logps, totals)
        if self.spec.inputs == "pairs":
            return PairedLogps(*policy, *(reference or ()))
        assert owner.kl is not None, "the global batch was not prepared"
        return UnpairedLogps(
            policy=policy[0],
            reference=None if reference is None else reference[0],
            desirable=batch.desirable,
            kl=owner.kl,
        )

    def _member_logps(self, batch: PackedBatch, token_logps: torch.Tensor, sums: torch.Tensor) -> list[Logps]:
        """Logps of the first, second, ... completion of each preference; sums: [num_completions]."""
        totals = sums[batch.members]
        lengths = batch.completion_lengths[batch.members]
        if self.ld_alpha is not None and self.ld_alpha != 1.0:
            # LD-DPO (arXiv:2409.06411): what one completion has beyond the other's length counts less.
            shared = lengths.amin(dim=1, keepdim=True).expand_as(lengths)
            first = sum_first_tokens(token_logps, batch, batch.members, shared)
            totals = first + self.ld_alpha * (totals - first)
        return [
            Logps(total, length) for total, length in zip(totals.unbind(1), lengths.unbind(1), strict=True)
        ]

    def _nll(self, batch: PackedBatch, totals: torch.Tensor, owner: GlobalBatch) -> torch.Tensor:
        """NLL of the chosen completions, one entry a pair; its mean over the global batch is the term."""
        chosen = batch.members[:, 0]
        if self.nll_normalization == "sum":
            return -totals[chosen]
        if self.nll_normalization == "sequence":
            return -totals[chosen] / batch.completion_lengths[chosen]
        # A mean per token of the global batch; the engine divides by preferences, hence the factor.
        return -totals[chosen] * (owner.num_preferences / max(1, owner.num_chosen_tokens))

    def _router_balance(self, batch: PackedBatch, scores: TokenScores, owner: GlobalBatch) -> torch.Tensor:
        """A micro-batch's part of E sum_e f_e p_e over the global batch, spread over its preferences.

        See models.router; as f_e has no gradient, that of the sum over micro-batches is exact.
        """
        assert owner.router_load is not None, "the global batch was not prepared"
        counts, weight = owner.router_load[:-1], owner.router_load[-1]
        part = len(counts) * (counts * scores.router_probabilities).sum() / weight.square()
        # The engine divides by the preferences of the global batch, hence the factor.
        count = batch.num_preferences
        return (part * owner.num_preferences / max(1, count)).expand(count)

    def _sequence_weights(self, batch: PackedBatch, scores: TokenScores) -> torch.Tensor:
        """WPO's w(x, y_c) w(x, y_r) [num_preferences], detached (arXiv:2406.11827, eq. 2).

        w is the geometric mean over tokens of p(token) / sum_v p(v)^2, so that a completion as likely as the
        policy's own samples weighs about 1.
        """
        assert scores.log_collision is not None, "the policy was not asked for log_collision"
        gaps = sum_by_completion(scores.logps.detach() - scores.log_collision, batch)
        return (gaps / batch.completion_lengths)[batch.members].sum(dim=1).exp()

    def table(self, batch: PackedBatch, scores: TokenScores, owner: GlobalBatch) -> torch.Tensor:
        """The detached log-probs of a micro-batch as numbers [num_preferences, columns], for couple()."""
        token_logps = scores.logps.detach()
        return LogpsTable.flatten(
            self._logps(batch, token_logps, sum_by_completion(token_logps, batch), owner)
        )

    @property
    def num_columns(self) -> int:
        """Columns of table()."""
        return LogpsTable.num_columns(self.spec.inputs, has_reference=self.needs_reference)

    def couple(self, table: torch.Tensor, *, kl: torch.Tensor | None, training: bool) -> CoupledTerms:
        """The loss over all preferences of a global batch, taken apart by preference.

        table: float64 [n, num_columns], the rows of all ranks. training: a running mean moves on.
        """
        logps = LogpsTable.restore(table, self.spec.inputs, has_reference=self.needs_reference, kl=kl)
        parameters = dict(self.parameters)
        if self.running_delta is not None:
            if training:
                self.running_delta.add(LogpsTable.mean_reward(logps, parameters["beta"]))
            parameters["bco_delta"] = self.running_delta.mean
        return couple(self._loss, logps, parameters)

    def _coupled_output(
        self, batch: PackedBatch, logps: PairedLogps | UnpairedLogps, owner: GlobalBatch
    ) -> LossOutput:
        """The coupled loss of each preference as a linear function of its own log-probs.

        Value and gradient are those of the loss over the whole global batch (GradCache, arXiv:2101.06983).
        """
        assert owner.coupled is not None, "the global batch was not prepared"
        terms = owner.coupled.part(batch.positions)
        policy = (
            (logps.policy_chosen, logps.policy_rejected)
            if isinstance(logps, PairedLogps)
            else (logps.policy,)
        )
        totals = torch.stack([member.total for member in policy], dim=1)
        losses = terms.losses + (terms.slopes * (totals - totals.detach())).sum(dim=1)
        if isinstance(logps, PairedLogps):
            return LossOutput(losses, *terms.rewards.unbind(1))
        return LossOutput(losses, rewards=terms.rewards[:, 0])

    def state_dict(self) -> dict[str, float]:
        """What the loss remembers between steps, as plain numbers; empty for most losses."""
        return {} if self.running_delta is None else self.running_delta.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Takes over what state_dict() gave."""
        if self.running_delta is not None:
            self.running_delta.load_state_dict(state)
