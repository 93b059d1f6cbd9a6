"""Examines a run before it trains: fifteen checks of tokens, preferences, settings, models and machine.

A check is a function of facts; registry.py lists them. The start of training runs those that take a moment,
launch/doctor.py all of them.
"""

from __future__ import annotations

from ds_align.doctor.facts import Facts, FirstScores, MachineFacts, TextFacts
from ds_align.doctor.finding import Finding, error_of, messages
from ds_align.doctor.registry import CHECKS, OF_MODELS, Skipped, as_warnings_where_legal, examine, unsaid
from ds_align.doctor.watch import Watch

__all__ = [
    "CHECKS",
    "OF_MODELS",
    "Facts",
    "Finding",
    "FirstScores",
    "MachineFacts",
    "Skipped",
    "TextFacts",
    "Watch",
    "as_warnings_where_legal",
    "error_of",
    "examine",
    "messages",
    "unsaid",
]
