"""A loss from outside the package on made-up log-probs, so that its mistakes show before a model loads."""

from __future__ import annotations

import traceback
from dataclasses import replace

import torch

from ds_align.config import BaseConfig, MethodSpec
from ds_align.errors import ConfigError
from ds_align.losses import Logps, LossOutput, PairedLogps, UnpairedLogps

_NUM = 3


def rehearse(spec: MethodSpec, config: BaseConfig, device: torch.device) -> None:
    """Calls the loss with 3, 0 and single preferences and checks what it returns. Built-in losses pass.

    Raises ConfigError where it raises, does not return a LossOutput of one value a preference, leaves the
    policy's graph, is not finite, returns rewards that are attached to it, or couples the preferences without
    saying so.
    """
    if isinstance(spec.loss, str):
        return
    whole = _call(spec, config, slice(0, _NUM), device)
    # A rank with fewer packs than another runs empty ones.
    _call(spec, config, slice(0, 0), device)
    if spec.coupled(config):
        return
    alone = torch.cat([_call(spec, config, slice(row, row + 1), device).losses for row in range(_NUM)])
    if not torch.allclose(whole.losses, alone, rtol=1e-6, atol=1e-9, equal_nan=True):
        raise ConfigError(
            f"{_where(spec)}: the loss of a preference changes with the others beside it (or at random), and "
            "would change with the number of ranks; look at each alone, or declare @method(coupled=True)"
        )


def _call(spec: MethodSpec, config: BaseConfig, rows: slice, device: torch.device) -> LossOutput:
    logps = _made_up(spec, config, rows, device)
    try:
        output = spec.loss(logps, **spec.arguments(config))
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(
            f"{_where(spec)} failed on {rows.stop - rows.start} made-up preferences: "
            f"{line.filename}:{line.lineno}: {message}"
        ) from error
    _check(spec, output, rows.stop - rows.start)
    return output


def _made_up(
    spec: MethodSpec, config: BaseConfig, rows: slice, device: torch.device
) -> PairedLogps | UnpairedLogps:
    """Log-probs as the objective gives them: float64, the policy's with gradient, the reference's without."""
    lengths = torch.tensor([4, 9, 2], device=device)[rows]

    def logps(*values: float) -> Logps:
        return Logps(torch.tensor(values, dtype=torch.float64, device=device)[rows], lengths)

    def with_gradient(values: Logps) -> Logps:
        return replace(values, total=values.total.requires_grad_())

    first, second = (with_gradient(values) for values in (logps(-6.0, -21.0, -3.5), logps(-7.5, -18.0, -4.0)))
    references = (logps(-6.5, -20.0, -3.0), logps(-7.0, -19.0, -4.5)) if spec.needs_reference(config) else ()
    if spec.inputs == "pairs":
        return PairedLogps(first, second, *references)
    return UnpairedLogps(
        policy=first,
        reference=references[0] if references else None,
        desirable=torch.tensor([True, False, True], device=device)[rows],
        kl=torch.tensor(0.25, dtype=torch.float64, device=device),
    )


def _check(spec: MethodSpec, output: object, count: int) -> None:
    where = _where(spec)
    if not isinstance(output, LossOutput):
        raise ConfigError(
            f"{where} returned a {type(output).__name__}; expected LossOutput(losses, ...) of ds_align.losses"
        )
    names = ("chosen_rewards", "rejected_rewards") if spec.inputs == "pairs" else ("rewards",)
    for name in ("losses", *names):
        values = getattr(output, name)
        if not isinstance(values, torch.Tensor) or values.shape != (count,):
            found = f"shape {tuple(values.shape)}" if isinstance(values, torch.Tensor) else repr(values)
            raise ConfigError(
                f"{where}: {name} of {count} preferences has {found}; expected ({count},), one value a "
                "preference, without any mean or sum over them"
            )
        if name != "losses" and values.requires_grad:
            raise ConfigError(f"{where}: {name} carries a gradient; give {name}.detach()")
    if not output.losses.isfinite().all():
        raise ConfigError(
            f"{where}: losses of made-up log-probs (around -10 nats) are {output.losses.tolist()}; "
            "expected finite numbers"
        )
    if not output.losses.requires_grad:
        raise ConfigError(f"{where}: losses carry no gradient; compute them from the policy's log-probs")


def _where(spec: MethodSpec) -> str:
    return f"method {spec.name!r} ({spec.loss.__code__.co_filename}:{spec.loss.__code__.co_firstlineno})"
