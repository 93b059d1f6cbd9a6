"""The rules of tokenizing on tokenizers and templates of every kind; texts and counts written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import processors
from transformers import PreTrainedTokenizerBase
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from ds_align.config import DPOConfig
from ds_align.data import PreferenceTokenizer, load_preferences
from ds_align.data.schemas import Preference
from ds_align.errors import ConfigError
from tests.data.conftest import CORPUS

# Qwen's ChatML: the EOS closes every turn and a line break follows it.
QWEN = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# The same with the marks that say which tokens the assistant writes.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Llama 3: the template writes the BOS and takes white space off every message.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n\\n' + m['content'] | trim + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"
)
# Llama 2: the template writes the BOS, a space before the answer and one before the EOS.
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
# A farewell behind the EOS, and a header that merges with the answer's first letters.
WORDY = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] + '\\nhello' }}"
    "{% else %}{{ m['content'] + eos_token + ' the dog barked' }}{% endif %}{% endfor %}"
)
TURNS = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "the dog"},
]


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def encode(tokenizer: PreTrainedTokenizerBase, prompt, *completions, template: str | None = None):
    rows = PreferenceTokenizer(tokenizer, template).encode([Preference("f:1", prompt, completions)])
    return rows[0]


@pytest.fixture(scope="session")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., SentencePieceBackend]:
    """Real SentencePiece models, which put a space before a text and behind a special token, with a BOS."""

    def build(kind: str, normaliser: str) -> SentencePieceBackend:
        stem = tmp_path_factory.getbasetemp() / f"{kind}-{normaliser}"
        if not Path(f"{stem}.model").exists():
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter([*CORPUS, "answer answers the answer"] * 2),
                model_prefix=str(stem),
                vocab_size=400,
                model_type=kind,
                byte_fallback=True,
                hard_vocab_limit=False,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                normalization_rule_name=normaliser,
                remove_extra_whitespaces=False,
                minloglevel=2,
            )
        return SentencePieceBackend(
            vocab_file=f"{stem}.model",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            special_tokens_pattern="bos",
        )

    return build


@pytest.fixture
def begun(bpe) -> PreTrainedTokenizerBase:
    """Byte-level BPE that adds a BOS by itself, in the manner of Llama 3."""
    tokenizer = bpe(bos_token="<|endoftext|>")
    copy = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    copy.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", copy.bos_token_id)]
    )
    yield copy
    copy.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)


QWEN_PROMPT = (
    "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nsat<|im_end|>\n"
    "<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n"
)


@pytest.mark.parametrize("template", [QWEN, MARKED], ids=["qwen", "marked"])
def test_a_template_whose_eos_closes_every_turn(bpe, template):
    tokenizer = bpe(template)
    row = encode(tokenizer, TURNS, answer("barked"), answer(" ran "))
    assert tokenizer.decode(row.prompt_ids) == QWEN_PROMPT
    assert [tokenizer.decode(ids) for ids in row.completion_ids] == ["barked<|im_end|>", " ran <|im_end|>"]
    for ids in row.completion_ids:
        assert ids.tolist().count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("text", ["barked", "the cat sat", "عاصمة مصر", " ran ", "hello\n\nworld\n"])
def test_what_is_scored_is_what_the_marks_of_a_template_say(bpe, text):
    tokenizer = bpe(MARKED)
    row = encode(tokenizer, TURNS[2:], answer(text))
    marked = tokenizer.apply_chat_template(
        [*TURNS[2:], *answer(text)], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = np.array(marked["input_ids"]), np.array(marked["assistant_masks"], dtype=bool)
    assert row.completion_ids[0].tolist() == ids[mask].tolist()
    assert row.prompt_ids.tolist() == ids[: mask.argmax()].tolist()


def test_a_template_that_writes_the_bos_itself(begun):
    tokenizer = begun
    assert tokenizer("the")["input_ids"][0] == tokenizer.bos_token_id
    row = encode(tokenizer, TURNS[:1], answer("sat"), answer(" ran \n"), template=LLAMA3)
    assert tokenizer.decode(row.prompt_ids) == (
        "<|endoftext|><|im_start|>user\n\nthe cat<|im_end|><|im_start|>assistant\n\n"
    )
    # This template takes the white space off an answer.
    assert [tokenizer.decode(ids) for ids in row.completion_ids] == ["sat<|im_end|>", "ran<|im_end|>"]
    whole = tokenizer.apply_chat_template(
        [*TURNS[:1], *answer("sat")], chat_template=LLAMA3, tokenize=True, return_dict=True
    )["input_ids"]
    assert [*row.prompt_ids.tolist(), *row.completion_ids[0].tolist()] == whole


@pytest.mark.parametrize("prompt", ["the cat", "<|endoftext|>the cat", "<|endoftext|><|endoftext|>the cat"])
def test_strings_get_one_bos_and_their_answers_none(begun, prompt):
    row = encode(begun, prompt, " sat", " sat<|im_end|>")
    assert begun.decode(row.prompt_ids) == "<|endoftext|>the cat"
    assert [begun.decode(ids) for ids in row.completion_ids] == [" sat<|im_end|>"] * 2


def test_what_stands_behind_the_eos_is_not_scored_and_a_header_does_not_merge(bpe):
    tokenizer = bpe(WORDY)
    # The tokens of the whole text would not show the boundary: a merge crosses it.
    header = tokenizer("the cat\nhello")["input_ids"]
    assert tokenizer("the cat\nhelloworld")["input_ids"][: len(header)] != header
    row = encode(tokenizer, TURNS[:1], answer("world"), answer("ran"))
    assert row.prompt_ids.tolist() == header
    assert [tokenizer.decode(ids) for ids in row.completion_ids] == ["world<|im_end|>", "ran<|im_end|>"]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize("normaliser", ["identity", "nmt_nfkc"])
def test_sentencepiece_neither_adds_nor_takes_a_space(spoken, kind, normaliser):
    tokenizer = spoken(kind, normaliser)
    # It would add one, to a text alone and behind a special token; nmt_nfkc makes a space of a line break.
    for text in ("answer", "</s>answer"):
        assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])[-1] == "▁answer"
    row = encode(tokenizer, "the cat", "answer", " answer", "  answer", "answer ", "مصر")
    assert row.prompt_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert row.prompt_ids[0] == tokenizer.bos_token_id
    pieces = [tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in row.completion_ids]
    texts = ["answer", "▁answer", "▁▁answer", "answer▁", "مصر"]
    assert ["".join(part) for part in pieces] == [f"{text}</s>" for text in texts]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_sentencepiece_behind_a_template_that_writes_the_bos(spoken, kind):
    tokenizer = spoken(kind, "identity")
    row = encode(tokenizer, TURNS[:1], answer("answer"), answer("مصر"), template=LLAMA2)
    ids = row.prompt_ids.tolist()
    assert (ids[0], ids.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)
    assert tokenizer.convert_ids_to_tokens(row.completion_ids[0].tolist()) == ["▁answer", "▁", "</s>"]
    for number, text in enumerate(("answer", "مصر")):
        # As the tokenizer sees the whole text: no merge crosses this boundary, so nothing may differ.
        whole = tokenizer(f"<s>[INST] the cat [/INST] {text} </s>", add_special_tokens=False)["input_ids"]
        assert [*ids, *row.completion_ids[number].tolist()] == whole
        assert row.completion_ids[number].tolist().count(tokenizer.eos_token_id) == 1


def test_sentencepiece_keeps_every_byte_of_arabic(spoken):
    text = "مي\u200cخواهم كـــتاب مُحَمَّدٌ ﷺ لا\u200dنعم ﻻ"
    tokenizer = spoken("unigram", "identity")
    ids = encode(tokenizer, "the", text).completion_ids[0].tolist()
    assert tokenizer.sp_model.decode(ids[:-1]) == text


# Prompts of 10, 4 and 2 tokens; chosen of 6, 3 and 1; rejected of 2, 8 and 5.
LENGTHS = [(10, 6, 2), (4, 3, 8), (2, 1, 5)]
CUTS = [
    ({}, LENGTHS, 0, 0),
    # Prompts of at most 7; behind them 1, 4 and 6 tokens fit: both answers of the first and one of the second
    # row are cut.
    ({"max_length": 8}, [(7, 1, 1), (4, 3, 4), (2, 1, 5)], 1, 3),
    ({"max_prompt_length": 3}, [(3, 6, 2), (3, 3, 8), (2, 1, 5)], 2, 0),
    ({"max_completion_length": 4}, [(10, 4, 2), (4, 3, 4), (2, 1, 4)], 0, 3),
    # 8 - 3 = 5 and 8 - 2 = 6 tokens fit, of which an answer may have 4.
    (
        {"max_length": 8, "max_prompt_length": 3, "max_completion_length": 4},
        [(3, 4, 2), (3, 3, 4), (2, 1, 4)],
        2,
        3,
    ),
    # The longest prompt leaves one token.
    ({"max_length": 2}, [(1, 1, 1)] * 3, 3, 5),
]


@pytest.mark.parametrize("mode", ["keep_end", "keep_start"])
@pytest.mark.parametrize(("limits", "expected", "prompts_cut", "completions_cut"), CUTS)
def test_every_cut_and_its_count(limits, expected, prompts_cut, completions_cut, mode):
    # Ids 100, 101, ... in the prompt; the answers begin with 1 and 2, so that no two of a row are equal.
    rows = [
        {
            "prompt_ids": list(range(100, 100 + prompt)),
            "chosen_ids": [1, *range(11, 10 + chosen)],
            "rejected_ids": [2, *range(21, 20 + rejected)],
        }
        for prompt, chosen, rejected in LENGTHS
    ]
    config = DPOConfig(model_name_or_path="m", dataset_path="d", truncation_mode=mode, **limits)
    data = load_preferences(rows, tokenizer=None, inputs="pairs", config=config)
    assert [(len(r.prompt_ids), len(r.chosen_ids), len(r.rejected_ids)) for r in data] == expected
    assert data.counts["prompts_cut"] == prompts_cut
    assert data.counts["completions_cut"] == completions_cut
    for row, kept in zip(rows, data, strict=True):
        size = len(kept.prompt_ids)
        whole = row["prompt_ids"]
        assert kept.prompt_ids.tolist() == (whole[-size:] if mode == "keep_end" else whole[:size])
        assert kept.chosen_ids.tolist() == row["chosen_ids"][: len(kept.chosen_ids)]
        assert kept.rejected_ids.tolist() == row["rejected_ids"][: len(kept.rejected_ids)]


def test_a_mode_is_another_name_for_a_side():
    given = {"model_name_or_path": "m", "dataset_path": "d"}
    assert DPOConfig(**given).truncation_side == "left"
    assert DPOConfig(**given, truncation_mode="keep_start").truncation_side == "right"
    assert DPOConfig(**given, truncation_mode="keep_end", truncation_side="left").truncation_side == "left"
    with pytest.raises(ConfigError, match="disagree"):
        DPOConfig(**given, truncation_mode="keep_end", truncation_side="right")
    with pytest.raises(ConfigError, match=r"expected left \(keep_end\) or right \(keep_start\)"):
        DPOConfig(**given, truncation_mode="keep_middle")
