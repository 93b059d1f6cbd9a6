"""What is legal but unwise: messages for the user, whose values are never changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_align.config.base import BaseConfig

# Above the first, full fine-tuning on preferences is outside the range that the papers and their
# authors' recipes use (5e-7 to 5e-6); from the second on it usually destroys the model.
HIGH_LEARNING_RATE = 5e-6
DESTRUCTIVE_LEARNING_RATE = 1e-5
# Adapters start at zero and have few weights: they take, and need, larger steps.
HIGH_ADAPTER_LEARNING_RATE = 1e-4


def unwise_settings(config: BaseConfig) -> list[str]:
    """A message for each value outside of its usual range, and for each that cannot have an effect."""
    messages = unwise_learning_rate(config) + unwise_beta(config)
    for name, form in (("robust", "sigmoid"), ("exo_pair", "exo_pair with 0.001")):
        if name in getattr(config, "loss_types", ()) and not config.label_smoothing:
            messages.append(
                f"loss_type={name} with label_smoothing=0 is {form}; give the assumed share of swapped labels"
            )
    if config.max_steps is not None and config.warmup_steps > config.max_steps:
        messages.append(
            f"warmup_steps={config.warmup_steps} is more than max_steps={config.max_steps}: "
            "the learning rate never reaches its peak"
        )
    for name in ("max_prompt_length", "max_completion_length"):
        limit = getattr(config, name)
        if limit is not None and limit >= config.max_length:
            messages.append(f"{name}={limit} never applies: max_length={config.max_length} cuts first")
    return messages


def unwise_beta(config: BaseConfig) -> list[str]:
    """A message for a beta, or a target margin over it, outside of what the method is used with."""
    messages = []
    low, high = config.usual_beta
    beta = getattr(config, "beta", low)
    if not low <= beta <= high:
        messages.append(f"beta={beta:g} is outside the usual range of {config.method}, {low:g} to {high:g}")
    ratio = getattr(config, "gamma_beta_ratio", 0.0)
    if ratio > 1.0:
        messages.append(
            f"gamma_beta_ratio={ratio:g} asks for a margin of more than one nat a token; the usual range is "
            "0 to 1"
        )
    return messages


def unwise_learning_rate(config: BaseConfig) -> list[str]:
    """A message for a learning rate above the usual range, unless the user says that it is meant."""
    rate = config.learning_rate
    if config.learning_rate_override:
        return []
    if config.trains_adapters:
        if rate <= HIGH_ADAPTER_LEARNING_RATE:
            return []
        usual = "the usual range is 5e-6 to 1e-4; learning_rate_override says that it is meant"
        return [f"learning_rate={rate:g} is high for LoRA; {usual}"]
    usual = "the usual range is 5e-7 to 5e-6; learning_rate_override says that it is meant"
    if rate >= DESTRUCTIVE_LEARNING_RATE:
        return [f"learning_rate={rate:g} usually destroys the model in full fine-tuning; {usual}"]
    if rate > HIGH_LEARNING_RATE:
        return [f"learning_rate={rate:g} is high for full fine-tuning; {usual}"]
    return []
