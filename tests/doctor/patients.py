"""Runs to be examined: a tokenizer of single characters, and the facts of some rows under some settings."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ds_align.config import METHODS
from ds_align.data import load_preferences
from ds_align.doctor import Facts, Finding, examine

EOS, BOS = 0, 1
FIRST_LETTER = 3
CHATML = (
    "{% for m in messages %}<im>{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<im>assistant\n{% endif %}"
)


def make_tokenizer(*, bos: bool = False, merges: bool = False, template: str | None = None):
    """One token a character; with merges " y" is one token, too."""
    letters = {chr(code): number for number, code in enumerate(range(33, 127), FIRST_LETTER)}
    vocabulary = {"<eos>": EOS, "<bos>": BOS, "Ġ": 2, **letters, "Ċ": 97}
    if merges:
        vocabulary["Ġy"] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "y")] if merges else []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = {"bos_token": "<bos>"} if bos else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<eos>", chat_template=template, **special
    )


def facts_of(rows: list[dict], *, method: str = "dpo", tokenizer=None, num_steps: int = 100, **settings):
    """Facts of rows in memory; `also` holds facts that replace others."""
    also = settings.pop("also", {})
    config = METHODS[method].config(**settings)
    tokenizer = tokenizer or make_tokenizer()
    inputs = METHODS[method].inputs
    data = load_preferences(rows, tokenizer=tokenizer, inputs=inputs, config=config)
    return Facts(config, num_steps=num_steps, train=data, tokenizer=tokenizer, **also)


def check(number: int, facts: Facts) -> Finding:
    """The finding of one check, which must have been run."""
    findings, skipped = examine(facts, [number])
    assert not skipped, skipped
    return findings[0]


def ids(prompt: list[int], chosen: list[int], rejected: list[int]) -> dict:
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def texts(num: int, **changes) -> list[dict]:
    """Pairs with different prompts and answers of equal length."""
    return [{"prompt": f"{number}?", "chosen": "yes", "rejected": "nay"} | changes for number in range(num)]


def labelled(num_good: int, num_bad: int) -> list[dict]:
    """Unpaired rows, every prompt another, answers of equal length."""
    rows = [{"prompt": f"{number}?", "completion": "good", "label": True} for number in range(num_good)]
    return rows + [
        {"prompt": f"-{number}?", "completion": "evil", "label": False} for number in range(num_bad)
    ]
