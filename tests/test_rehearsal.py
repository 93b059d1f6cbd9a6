"""What a loss from outside the package may do wrong, seen on made-up log-probs before a model loads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ds_align import method
from ds_align.config import METHODS
from ds_align.errors import ConfigError
from ds_align.losses import LossOutput, PairedLogps, UnpairedLogps
from ds_align.rehearsal import rehearse

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _methods_of_a_test() -> Iterator[None]:
    methods = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(methods)


def rehearse_paired(judge: Callable[[Tensor], object], **traits: object) -> None:
    """Rehearses a loss that is `judge` of the gap between the log-probs of chosen and rejected."""

    @method(**traits)
    def judged(logps: PairedLogps) -> LossOutput:
        gap = logps.policy_chosen.total - logps.policy_rejected.total
        output = judge(gap)
        return LossOutput(output, gap.detach(), -gap.detach()) if isinstance(output, Tensor) else output

    rehearse(METHODS["judged"], judged.config(), CPU)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_built_in_losses_are_not_called(name: str) -> None:
    rehearse(METHODS[name], METHODS[name].config(), CPU)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"losses of made-up log-probs .* are \[nan, .*expected finite"):
        rehearse_paired(lambda gap: (gap - 100.0).log())


def test_a_sound_loss_sees_what_it_asked_for() -> None:
    seen = []

    @method
    def with_reference(logps: PairedLogps, *, beta: float = 0.1) -> LossOutput:
        seen.append((len(logps.policy_chosen.total), logps.reference_chosen is not None, beta))
        ratio = logps.policy_chosen.total - logps.reference_chosen.total
        return LossOutput(beta * ratio, ratio.detach(), ratio.detach())

    rehearse(METHODS["with_reference"], with_reference.config(beta=0.5), CPU)
    assert seen == [(3, True, 0.5), (0, True, 0.5), (1, True, 0.5), (1, True, 0.5), (1, True, 0.5)]

    @method(needs_reference=False)
    def single(logps: UnpairedLogps) -> LossOutput:
        assert logps.reference is None
        sign = logps.desirable.double() * 2 - 1
        return LossOutput(-sign * (logps.policy.total - logps.kl), rewards=logps.policy.total.detach())

    rehearse(METHODS["single"], single.config(), CPU)


@pytest.mark.parametrize(
    ("judge", "part"),
    [
        (lambda gap: gap.mean(), "losses of 3 preferences has shape (); expected (3,), one value a"),
        (lambda gap: gap[:, None], "losses of 3 preferences has shape (3, 1)"),
        (lambda gap: gap[1:], "losses of 3 preferences has shape (2,)"),
        (lambda gap: gap.detach(), "losses carry no gradient"),
        (lambda gap: (gap, gap), "returned a tuple; expected LossOutput(losses, ...)"),
        (LossOutput, "chosen_rewards of 3 preferences has None"),
        (lambda gap: LossOutput(gap, gap, gap.detach()), "chosen_rewards carries a gradient"),
        (lambda gap: gap + gap.shuffled, "failed on 3 made-up preferences: "),
        (lambda gap: gap / gap.max().detach(), "failed on 0 made-up preferences: "),
        (lambda gap: gap - gap.sum(), "changes with the others beside it"),
        (lambda gap: gap + torch.rand(len(gap)), "(or at random)"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(judge: Callable[[Tensor], object], part: str) -> None:
    with pytest.raises(ConfigError) as error:
        rehearse_paired(judge)
    message = str(error.value)
    assert part in message
    assert "\n" not in message
    assert message.startswith(f"method 'judged' ({__file__}:")


def test_a_loss_that_says_that_it_is_coupled_may_look_at_the_others() -> None:
    rehearse_paired(lambda gap: gap - gap.sum(), coupled=True)
    with pytest.raises(ConfigError, match=r"expected \(3,\)"):
        rehearse_paired(lambda gap: gap.mean(), coupled=True)
