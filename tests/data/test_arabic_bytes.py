"""Arabic text comes out of the tokens byte for byte as it lay in the file."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from ds_align.config import DPOConfig, KTOConfig
from ds_align.data import load_preferences

LETTERS = "ابتثجحخدذرزسشصضطظعغفقكلمنهويءأإآؤئةىٱپچڤگی"
SIGNS = "\u064b\u064c\u064d\u064e\u064f\u0650\u0651\u0652\u0653\u0654\u0655\u0670\u06d6\u06e1"
JOINERS = "\u200c\u200d\u0640\u00ad\u2060\ufeff"
DIRECTIONS = "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
FORMS = "\ufe8d\ufe8e\ufefb\ufefc\ufdf2\ufdfa\ufb50\ufe70\ufee1"
OTHERS = "aZé e\u0301 0٣۴،؛؟!\t\n\r\u2028\u0085\u00a0 😀\U0001f468\u200d\U0001f469"
EXAMPLES = (
    "مي\u200cخواهم كـــتاب مُحَمَّدٌ \ufdfa لا\u200dنعم ﻻ",
    "\u202bقال: \u2067Hello\u2069\u202c \u200fثم 12\u200e/٣",
    "\ufeffشَدَّةٌ\u0670 e\u0301 é \u0623 \u0627\u0654",
    " \u0640 ",
)
arabic = st.text(
    alphabet=st.one_of(*map(st.sampled_from, (LETTERS, SIGNS, JOINERS, DIRECTIONS, FORMS, OTHERS))),
    min_size=1,
    max_size=40,
)
PROPERTY = settings(
    max_examples=60, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(form: str, rows: list[dict], directory) -> object:
    """A source of the form that holds the rows."""
    if form == "list":
        return rows
    if form == "dataset":
        from datasets import Dataset

        return Dataset.from_list(rows)
    path = directory / f"rows.{form.removesuffix('-ascii')}"
    is_ascii = form.endswith("-ascii")
    texts = [json.dumps(row, ensure_ascii=is_ascii) for row in rows]
    text = "".join(f"{line}\n" for line in texts) if "jsonl" in form else f"[{', '.join(texts)}]"
    path.write_bytes(text.encode("utf-8"))
    return path


@pytest.mark.parametrize("form", ["list", "dataset", "jsonl", "json", "jsonl-ascii", "json-ascii"])
@given(prompt=arabic, chosen=arabic, rejected=arabic)
@example(prompt=EXAMPLES[0], chosen=EXAMPLES[1], rejected=EXAMPLES[2])
@example(prompt=EXAMPLES[3], chosen=EXAMPLES[2], rejected=EXAMPLES[0])
@PROPERTY
def test_pairs_keep_every_byte(form, prompt, chosen, rejected, bpe, tmp_path) -> None:
    assume(chosen != rejected and all(text.strip() for text in (chosen, rejected)))
    tokenizer = bpe()
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected}]
    config = DPOConfig(max_length=4096, dataset_cache_dir=None)
    (row,) = load_preferences(write(form, rows, tmp_path), tokenizer=tokenizer, inputs="pairs", config=config)
    end = tokenizer.eos_token

    def text_of(*parts) -> bytes:
        ids = [token for part in parts for token in part.tolist()]
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode()

    assert text_of(row.prompt_ids) == prompt.encode()
    assert text_of(row.chosen_ids) == (chosen + end).encode()
    assert text_of(row.rejected_ids) == (rejected + end).encode()
    assert text_of(row.prompt_ids, row.chosen_ids) == (prompt + chosen + end).encode()


@pytest.mark.parametrize("form", ["list", "jsonl", "json"])
@given(asked=arabic, answered=arabic)
@example(asked=EXAMPLES[0], answered=EXAMPLES[1])
@example(asked=EXAMPLES[3], answered=EXAMPLES[2])
@PROPERTY
def test_conversations_keep_every_byte(form, asked, answered, bpe, tmp_path) -> None:
    """Through a chat template that adds marks of its own around the texts and nothing else."""
    assume(answered.strip())
    tokenizer = bpe("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    rows = [
        {
            "prompt": [{"role": "user", "content": asked}],
            "completion": [{"role": "assistant", "content": answered}],
            "label": True,
        }
    ]
    config = KTOConfig(max_length=4096, dataset_cache_dir=None)
    (row,) = load_preferences(
        write(form, rows, tmp_path), tokenizer=tokenizer, inputs="unpaired", config=config
    )
    whole = tokenizer.decode([*row.prompt_ids.tolist(), *row.completion_ids.tolist()])
    assert whole.encode() == f"<|im_start|>{asked}<|im_end|><|im_start|>{answered}<|im_end|>".encode()
