from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from ds_align.data.truncate import Limits, cut_completion, cut_prompt
from ds_align.errors import ConfigError

IDS = np.arange(10, dtype=np.int32)  # 0 serves as the BOS where one is named


@pytest.mark.parametrize(
    ("limits", "bos_id", "expected"),
    [
        (Limits(), None, range(10)),
        (Limits(max_prompt_length=4), None, [6, 7, 8, 9]),
        (Limits(max_prompt_length=4), 0, [0, 7, 8, 9]),
        (Limits(max_prompt_length=1), 0, [9]),
        (Limits(max_prompt_length=4, truncation_side="right"), 0, [0, 1, 2, 3]),
        (Limits(max_length=6), None, [5, 6, 7, 8, 9]),  # max_length - 1 = 5 tokens at most
        (Limits(max_length=6, max_prompt_length=3), None, [7, 8, 9]),
        (Limits(max_length=11), None, range(10)),  # 10 tokens leave one of 11 for the completion
        (Limits(max_length=2), None, [9]),
    ],
)
def test_prompts_are_cut_on_their_side(limits, bos_id, expected):
    assert cut_prompt(IDS, limits, bos_id).tolist() == list(expected)


@pytest.mark.parametrize(
    ("limits", "prompt_length", "expected"),
    [
        (Limits(), 5, 10),
        (Limits(max_completion_length=3), 5, 3),
        (Limits(max_length=12), 5, 7),  # 12 - 5
        (Limits(max_length=12, max_completion_length=8), 5, 7),
        (Limits(max_length=6), 5, 1),
    ],
)
def test_completions_are_cut_at_their_end(limits, prompt_length, expected):
    assert cut_completion(IDS, prompt_length, limits).tolist() == list(range(expected))


@pytest.mark.parametrize("max_length", [2, 3, 7, 19, 20, 21])
@pytest.mark.parametrize("max_prompt_length", [None, 1, 4])
@pytest.mark.parametrize("max_completion_length", [None, 1, 5])
def test_no_part_is_emptied_and_no_limit_is_passed(max_length, max_prompt_length, max_completion_length):
    limits = Limits(max_length, max_prompt_length, max_completion_length)
    prompt = cut_prompt(IDS, limits, 0)
    completion = cut_completion(IDS, len(prompt), limits)
    assert 1 <= len(prompt) <= (max_prompt_length or 10)
    assert 1 <= len(completion) <= (max_completion_length or 10)
    assert len(prompt) + len(completion) <= max_length


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_length", 1),
        ("max_prompt_length", 0),
        ("max_completion_length", 0),
        ("truncation_side", "middle"),
    ],
)
def test_limits_without_room_are_refused(name, value):
    fields = {"max_length": 8, "max_prompt_length": 2, "max_completion_length": 2, "truncation_side": "left"}
    assert Limits.from_config(SimpleNamespace(**fields)) == Limits(8, 2, 2, "left")
    with pytest.raises(ConfigError, match=f"{name}="):
        Limits.from_config(SimpleNamespace(**{**fields, name: value}))
