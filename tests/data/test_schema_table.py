"""Every schema with every method: the texts that are trained on, written by hand, or the error."""

from __future__ import annotations

import pytest

from ds_align.config import METHODS
from ds_align.errors import DataError
from ds_align.splits import load

CHATML = (
    "{% if tools %}{{ '<|im_start|>tools\\n' + tools[0]['name'] + '<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
END = "<|im_end|>"
SYSTEM = {"role": "system", "content": "be brief"}
USER = {"role": "user", "content": "the cat"}
SAT = {"role": "assistant", "content": "sat"}
RAN = {"role": "assistant", "content": "ran"}
# What the conversations above read as; each of the answers ends with the EOS, which closes the turn.
ASKED = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
BRIEF = "<|im_start|>system\nbe brief<|im_end|>\n" + ASKED
TOLD = "<|im_start|>tools\nsearch<|im_end|>\n" + BRIEF
TWICE = (
    "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nsat<|im_end|>\n"
    "<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n"
)
DOG = {"role": "user", "content": "the dog"}
TOOLS = [{"name": "search"}]
HUMAN = {"from": "human", "value": "the cat"}
GPT_SAT = {"from": "gpt", "value": "sat"}
GPT_RAN = {"from": "gpt", "value": "ran"}
NO_PAIRS = "the rows are unpaired .* train with method kto, or give paired data"
IDS = {"prompt_ids": [65, 66], "chosen_ids": [67], "rejected_ids": [68, 69]}


def pair(prompt: str, chosen: str = "sat", rejected: str = "ran") -> dict:
    """Expected of a pair: one preference, or one desirable and one undesirable answer."""
    good, bad = chosen + END, rejected + END
    return {"pairs": [(prompt, good, bad)], "unpaired": [(prompt, good, True), (prompt, bad, False)]}


def single(prompt: str, answer: str = "sat", *, label: bool = True) -> dict:
    """Expected of a labelled answer, which no method of pairs can use."""
    return {"pairs": NO_PAIRS, "unpaired": [(prompt, answer + END, label)]}


def ranked(best_worst: list, every: list, labels: list, settings: dict | None = None) -> dict:
    """Expected of a ranked list; with ranked_pairs=all where `settings` says so."""
    return {"pairs": every if settings else best_worst, "unpaired": labels, "settings": settings or {}}


# Scores 2, 9, 5: "ran" is best, "sat" is worst, "lay" lies between.
THREE = {"prompt": "the cat", "completions": [" sat", " ran", " lay"], "scores": [2, 9, 5]}
RAN_SAT = ("the cat", " ran" + END, " sat" + END)
BEST_WORST = [RAN_SAT]
# In the order of the list: (sat, ran), (sat, lay), (ran, lay), each with the better answer first.
EVERY = [
    RAN_SAT,
    ("the cat", " lay" + END, " sat" + END),
    ("the cat", " ran" + END, " lay" + END),
]
LABELS = [("the cat", " sat" + END, False), ("the cat", " ran" + END, True)]
OBJECTS = [
    {"model": "a", "response": " sat", "overall_score": 2.0},
    {"model": "b", "response": " ran", "overall_score": 9.0},
    {"model": "c", "response": " lay", "overall_score": 5.0},
]
NECTAR = [
    {"answer": " sat", "model": "a", "rank": 3.0},
    {"answer": " ran", "model": "b", "rank": 1.0},
    {"answer": " lay", "model": "c", "rank": 2.0},
]

TABLE = {
    "pairs": ({"prompt": "the cat", "chosen": " sat", "rejected": " ran"}, pair("the cat", " sat", " ran")),
    "pairs, token ids": (IDS, None),
    "pairs, messages": ({"prompt": [SYSTEM, USER], "chosen": [SAT], "rejected": [RAN]}, pair(BRIEF)),
    "pairs, several turns": (
        {"prompt": [USER, SAT, DOG], "chosen": [SAT], "rejected": [RAN]},
        pair(TWICE),
    ),
    "pairs, implicit prompt": ({"chosen": [USER, SAT], "rejected": [USER, RAN]}, pair(ASKED)),
    "pairs, implicit prompt of several turns": (
        {"chosen": [USER, SAT, DOG, SAT], "rejected": [USER, SAT, DOG, RAN]},
        pair(TWICE),
    ),
    "pairs, tools": (
        {"prompt": [SYSTEM, USER], "chosen": [SAT], "rejected": [RAN], "tools": TOOLS},
        pair(TOLD),
    ),
    "sharegpt ranking": ({"conversations": [HUMAN], "chosen": GPT_SAT, "rejected": GPT_RAN}, pair(ASKED)),
    "sharegpt ranking, system and tools": (
        {
            "conversations": [HUMAN],
            "chosen": GPT_SAT,
            "rejected": GPT_RAN,
            "system": "be brief",
            "tools": '[{"name": "search"}]',
        },
        pair(TOLD),
    ),
    "unpaired": ({"prompt": "the cat", "completion": " sat", "label": True}, single("the cat", " sat")),
    "unpaired, messages": (
        {"prompt": [SYSTEM, USER], "completion": [RAN], "label": 0},
        single(BRIEF, "ran", label=False),
    ),
    "unpaired, implicit prompt": ({"completion": [USER, SAT], "label": True}, single(ASKED)),
    "messages and label": ({"messages": [USER, SAT, DOG, RAN], "label": True}, single(TWICE, "ran")),
    "sharegpt kto": ({"conversations": [HUMAN, GPT_SAT], "label": True}, single(ASKED)),
    "sharegpt kto_tag": (
        {"conversations": [HUMAN, GPT_RAN], "system": "be brief", "kto_tag": False},
        single(BRIEF, "ran", label=False),
    ),
    "ranked, scores": (THREE, ranked(BEST_WORST, EVERY, LABELS)),
    # "lay" wins once and loses once, so it has no label.
    "ranked, scores, all": (THREE, ranked(BEST_WORST, EVERY, LABELS, {"ranked_pairs": "all"})),
    "ranked, ranks": (
        {"prompt": "the cat", "completions": [" sat", " ran", " lay"], "ranks": [3, 1, 2]},
        ranked(BEST_WORST, EVERY, LABELS),
    ),
    "ranked, objects of UltraFeedback": (
        {"instruction": "the cat", "completions": OBJECTS},
        ranked(BEST_WORST, EVERY, LABELS),
    ),
    "ranked, objects of Nectar": (
        {"prompt": "the cat", "answers": NECTAR},
        ranked(BEST_WORST, EVERY, LABELS),
    ),
    "ranked, generations and ratings": (
        {"prompt": "the cat", "generations": [" sat", " ran"], "ratings": [1, 2]},
        ranked(BEST_WORST, EVERY, LABELS),
    ),
    "ranked, messages": (
        {"prompt": [SYSTEM, USER], "completions": [[SAT], [RAN]], "scores": [2, 1]},
        pair(BRIEF),
    ),
    "ranked, implicit prompt": (
        {"responses": [[USER, SAT], [USER, RAN]], "scores": [0.75, 0.5]},
        pair(ASKED),
    ),
}


@pytest.mark.parametrize("method", ["dpo", "ipo", "kto", "cpo", "simpo"])
@pytest.mark.parametrize("schema", TABLE)
def test_what_a_schema_becomes(bpe, schema, method):
    row, expected = TABLE[schema]
    spec, tokenizer = METHODS[method], bpe(CHATML)
    if expected is None:
        expected = {"pairs": [("ab", "c", "de")], "unpaired": [("ab", "c", True), ("ab", "de", False)]}
        tokenizer = None
    settings = {"model_name_or_path": "none", "dataset_path": "none", **expected.get("settings", {})}
    config = spec.config(**settings)
    if isinstance(expected[spec.inputs], str):
        with pytest.raises(DataError, match=expected[spec.inputs]):
            load(config, tokenizer, [row])
        return
    dataset = load(config, tokenizer, [row])

    def text(ids) -> str:
        # The ids 65 and so on stand for the letters a and so on.
        return "".join(chr(id_ + 32) for id_ in ids) if tokenizer is None else tokenizer.decode(ids)

    if spec.inputs == "pairs":
        found = [(text(row.prompt_ids), text(row.chosen_ids), text(row.rejected_ids)) for row in dataset]
    else:
        found = [(text(row.prompt_ids), text(row.completion_ids), row.desirable) for row in dataset]
    assert found == expected[spec.inputs]
    assert (dataset.counts["rows_read"], dataset.counts["bad_rows"]) == (1, 0)
