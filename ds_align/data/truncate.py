"""Cuts to length: the prompt first, then each completion at its end; a completion always keeps a token.

The prompt is cut to max_prompt_length and in any case to max_length - 1 tokens, on `truncation_side`: "left"
(the default) keeps its end, "right" its beginning. A left cut keeps the BOS in its first place when two or
more tokens remain, since models attend to it throughout. A pair's prompt is cut once, so both completions
follow the same one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from ds_align.errors import ConfigError


class LengthFields(Protocol):
    """The length settings of a config, in tokens; None is no limit."""

    max_length: int | None
    max_prompt_length: int | None
    max_completion_length: int | None
    truncation_side: Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Lengths in tokens; None is no limit. Completions count their EOS, prompts their BOS."""

    max_length: int | None = None
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_side: Literal["left", "right"] = "left"

    @classmethod
    def from_config(cls, config: LengthFields) -> Limits:
        """Take the limits from a config; raises ConfigError where they leave no room for a token."""
        limits = cls(
            config.max_length, config.max_prompt_length, config.max_completion_length, config.truncation_side
        )
        floors = (("max_length", 2), ("max_prompt_length", 1), ("max_completion_length", 1))
        for name, floor in floors:
            value = getattr(limits, name)
            if value is not None and value < floor:
                raise ConfigError(
                    f"{name}={value} leaves no room; expected {floor} tokens or more, or none for no limit"
                )
        if limits.truncation_side not in ("left", "right"):
            raise ConfigError(
                f"truncation_side={limits.truncation_side!r}; expected left (keep the end) or right"
            )
        return limits


def cut_prompt(ids: np.ndarray, limits: Limits, bos_id: int | None = None) -> np.ndarray:
    """The part of a prompt that is kept, int32 [num_tokens], at least one token."""
    room = len(ids)
    if limits.max_prompt_length is not None:
        room = min(room, limits.max_prompt_length)
    if limits.max_length is not None:
        room = min(room, limits.max_length - 1)
    if room == len(ids):
        return ids
    if limits.truncation_side == "right":
        return ids[:room]
    if room > 1 and bos_id is not None and ids[0] == bos_id:
        return np.concatenate([ids[:1], ids[len(ids) - room + 1 :]])
    return ids[len(ids) - room :]


def cut_completion(ids: np.ndarray, prompt_length: int, limits: Limits) -> np.ndarray:
    """The part of a completion that is kept behind a prompt of `prompt_length` tokens (after its own cut)."""
    room = len(ids)
    if limits.max_completion_length is not None:
        room = min(room, limits.max_completion_length)
    if limits.max_length is not None:
        room = min(room, limits.max_length - prompt_length)
    assert room >= 1, "the prompt's cut leaves at least one token of max_length"
    return ids[:room]
