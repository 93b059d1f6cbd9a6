from __future__ import annotations

import logging

import numpy as np
import pytest

from ds_align.data import BUILTIN_CHAT_TEMPLATE, PreferenceTokenizer
from ds_align.data.readers import BadRow
from ds_align.data.schemas import Preference
from ds_align.data.tokenize import EncodedPreference, read_chat_template, take_token_ids
from ds_align.errors import ConfigError, DataError

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# In the manner of reasoning models: the generation prompt opens a thought, a finished turn none.
THINKING = CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>' }}{% endif")
# In the manner of Gemma: turns end with a token that is not the EOS.
OTHER_END = CHATML.replace("<|im_end|>", "<|endoftext|>")
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ARABIC = "مي\u200cخواهم كـــتاب مُحَمَّدٌ ﷺ لا\u200dنعم أإآا ١٢٣ ﻻ"


def user(text):
    return [{"role": "user", "content": text}]


def answer(*texts):
    return [{"role": "assistant", "content": text} for text in texts]


def encode(tokenizer, prompt, *completions, template=None, kl=None):
    rows = PreferenceTokenizer(tokenizer, template).encode([Preference("f:1", prompt, completions, None, kl)])
    assert isinstance(rows[0], EncodedPreference), rows[0]
    return rows[0]


def test_strings_get_one_eos_and_no_template(bpe):
    tokenizer = bpe(CHATML)
    row = encode(tokenizer, "the cat", " sat", " sat<|im_end|>", " sat<|im_end|><|im_end|>")
    assert tokenizer.decode(row.prompt_ids) == "the cat"
    assert {tokenizer.decode(ids) for ids in row.completion_ids} == {" sat<|im_end|>"}
    assert {ids.tolist().count(tokenizer.eos_token_id) for ids in row.completion_ids} == {1}
    assert row.prompt_ids.dtype == row.completion_ids[0].dtype == np.int32


def test_a_merge_across_the_boundary_does_not_shift_the_mask(bpe):
    tokenizer = bpe()
    joined = tokenizer("hello" + "world")["input_ids"]
    prompt = tokenizer("hello")["input_ids"]
    assert joined[: len(prompt)] != prompt, (
        "the tokenizer must merge across the boundary for this test to say anything"
    )
    row = encode(tokenizer, "hello", "world")
    assert row.prompt_ids.tolist() == prompt
    assert tokenizer.decode(row.completion_ids[0]) == "world<|im_end|>"


def test_chat_header_is_the_prompts_and_nothing_follows_the_eos(bpe):
    tokenizer = bpe(CHATML)
    row = encode(tokenizer, user("hello"), answer("world"), answer("the cat "))
    assert tokenizer.decode(row.prompt_ids) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(ids) for ids in row.completion_ids] == ["world<|im_end|>", "the cat <|im_end|>"]
    assert row.completion_ids[0].tolist()[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("text", ["d", "im_end", "<|im_end|>", "\n", "assistant", "m\n\n", "<|im_end|>\n"])
def test_answers_that_look_like_the_template_keep_one_eos(bpe, text):
    for template in (CHATML, THINKING, OTHER_END, BUILTIN_CHAT_TEMPLATE):
        tokenizer = bpe(template)
        ids = encode(tokenizer, user("hello"), answer(text)).completion_ids[0].tolist()
        assert ids[-1] == tokenizer.eos_token_id
        assert ids[-2:].count(tokenizer.eos_token_id) == 1
        end = "<|endoftext|><|im_end|>" if template is OTHER_END else "<|im_end|>"
        expected = text.removesuffix("<|im_end|>") if template is not OTHER_END else text
        assert tokenizer.decode(ids) == expected + end


def test_several_turns_in_one_completion_end_each_with_the_eos(bpe):
    tokenizer = bpe(CHATML)
    row = encode(tokenizer, user("a"), answer("b", "c"))
    assert tokenizer.decode(row.completion_ids[0]) == "b<|im_end|>\n<|im_start|>assistant\nc<|im_end|>"


def test_a_prompt_that_is_no_prefix_is_taken_from_the_whole_conversation(bpe):
    tokenizer = bpe(THINKING)
    encoder = PreferenceTokenizer(tokenizer)
    row = encoder.encode([Preference("f:1", user("hello"), (answer("a"), answer("b")))])[0]
    assert tokenizer.decode(row.prompt_ids) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(ids) for ids in row.completion_ids] == ["a<|im_end|>", "b<|im_end|>"]
    assert encoder.counts["prompts_not_prefix"] == 1


def test_a_turn_that_closes_with_another_token_gets_the_eos_behind_it(bpe):
    tokenizer = bpe(OTHER_END)
    assert (
        tokenizer.decode(encode(tokenizer, user("a"), answer("b")).completion_ids[0])
        == "b<|endoftext|><|im_end|>"
    )


def test_conversations_without_a_template_use_the_builtin_one_and_count_it(bpe):
    tokenizer = bpe()
    encoder = PreferenceTokenizer(tokenizer)
    system = [{"role": "system", "content": "brief"}]
    row = encoder.encode([Preference("f:1", system + user("hello"), (answer("world"),))])[0]
    assert tokenizer.decode(row.prompt_ids) == "System:\nbrief\n\nUser:\nhello\n\nAssistant:\n"
    assert tokenizer.decode(row.completion_ids[0]) == "world<|im_end|>"
    assert encoder.counts["builtin_template_rows"] == 1
    encoder.encode([Preference("f:2", "text", ("text",))])
    assert encoder.counts["builtin_template_rows"] == 1


def test_a_given_template_goes_before_the_tokenizers(bpe, tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{% for m in messages %}{{ '#' + m['content'] }}{% endfor %}")
    for value in (str(path), path.read_text()):
        encoder = PreferenceTokenizer.from_config(bpe(CHATML), value)
        assert encoder.tokenizer.decode(encoder.encode_prompt(user("hello"))) == "#hello"
    assert read_chat_template(None) is None
    with pytest.raises(ConfigError, match="neither Jinja text nor a file"):
        read_chat_template(str(tmp_path / "absent.jinja"))


def test_a_row_that_the_template_refuses_is_bad_and_the_others_are_not(bpe):
    template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    )
    rows = PreferenceTokenizer(bpe(template)).encode(
        [
            Preference("f:1", user("a"), (answer("b"),)),
            Preference("f:2", [{"role": "system", "content": "s"}, *user("a")], (answer("b"),)),
            Preference("f:3", user("c"), (answer("d"),)),
        ]
    )
    assert [type(row) for row in rows] == [EncodedPreference, BadRow, EncodedPreference]
    assert "refuses the conversation (no system role)" in rows[1].reason
    assert [row.origin for row in rows] == ["f:1", "f:2", "f:3"]


def test_kl_completions_are_encoded_like_completions(bpe):
    tokenizer = bpe(CHATML)
    assert tokenizer.decode(encode(tokenizer, "a", "b", kl="the dog").kl_ids) == "the dog<|im_end|>"
    assert (
        tokenizer.decode(encode(tokenizer, user("a"), answer("b"), kl=answer("dog")).kl_ids)
        == "dog<|im_end|>"
    )


def test_one_bos_where_the_tokenizer_adds_it(metaspace):
    bos = metaspace.bos_token_id
    for prompt in ("the cat", "<s>the cat", "<s><s>the cat"):
        ids = encode(metaspace, prompt, "answer").prompt_ids.tolist()
        assert ids[0] == bos
        assert ids.count(bos) == 1
    assert encode(metaspace, "", "answer").prompt_ids.tolist() == [bos]


@pytest.mark.parametrize("template", [LLAMA, LLAMA.replace("{{ bos_token }}", "")])
def test_one_bos_whether_or_not_the_template_writes_it(metaspace, template):
    row = encode(metaspace, user("the cat"), answer("answer"), template=template)
    ids = row.prompt_ids.tolist()
    assert (ids[0], ids.count(metaspace.bos_token_id)) == (metaspace.bos_token_id, 1)
    assert row.completion_ids[0].tolist().count(metaspace.bos_token_id) == 0
    assert metaspace.decode(row.completion_ids[0].tolist()[-1:]) == "</s>"


def test_no_space_is_put_before_or_taken_from_a_completion(metaspace):
    row = encode(metaspace, "the", "answer", " answer", "\nanswer", "  answer")
    texts = [metaspace.convert_ids_to_tokens(ids.tolist()) for ids in row.completion_ids]
    assert texts[0] == ["answer", "</s>"]
    assert texts[1] == ["▁answer", "</s>"]
    assert texts[2] == ["<0x0A>", "answer", "</s>"]
    assert "".join(texts[3]) == "▁▁answer</s>"


def test_a_completion_has_the_same_ids_behind_every_prompt(bpe):
    tokenizer = bpe()
    first = encode(tokenizer, "hello", "world").completion_ids[0]
    assert first.tolist() == encode(tokenizer, "the cat ", "world").completion_ids[0].tolist()


def test_an_empty_prompt_needs_a_bos(bpe):
    row = PreferenceTokenizer(bpe()).encode([Preference("f:1", "", ("b",))])[0]
    assert isinstance(row, BadRow)
    assert "no BOS to stand for it" in row.reason
    with pytest.raises(DataError, match="no BOS"):
        PreferenceTokenizer(bpe()).encode_prompt("")
    with_bos = bpe(bos_token="<|endoftext|>")
    assert encode(with_bos, "", "b").prompt_ids.tolist() == [with_bos.bos_token_id]
    assert encode(with_bos, "the", "b").prompt_ids.tolist() == with_bos("the")["input_ids"]


def test_a_tokenizer_without_eos_is_refused(bpe):
    with pytest.raises(DataError, match=r"has no eos_token.*set one"):
        PreferenceTokenizer(bpe(eos_token=None))


@pytest.mark.parametrize("template", [None, CHATML])
def test_arabic_survives_byte_for_byte(bpe, template):
    tokenizer = bpe(template)
    text = encode(tokenizer, ARABIC, ARABIC)
    assert tokenizer.decode(text.prompt_ids).encode() == ARABIC.encode()
    assert tokenizer.decode(text.completion_ids[0]).encode() == (ARABIC + "<|im_end|>").encode()
    chat = encode(tokenizer, user(ARABIC), answer(ARABIC))
    assert ARABIC.encode() in tokenizer.decode(chat.prompt_ids).encode()
    assert tokenizer.decode(chat.completion_ids[0]).encode() == (ARABIC + "<|im_end|>").encode()


def test_arabic_survives_byte_fallback(metaspace):
    ids = encode(metaspace, "the", ARABIC).completion_ids[0]
    assert metaspace.decode(ids).encode() == (ARABIC + "</s>").encode()


def test_generation_starts_from_the_prompt_of_training(bpe):
    tokenizer = bpe(CHATML)
    encoder = PreferenceTokenizer(tokenizer)
    for prompt, completion in ((user("hello"), answer("x")), ("hello", "x")):
        trained = encoder.encode([Preference("f:1", prompt, (completion,))])[0].prompt_ids
        assert encoder.encode_prompt(prompt).tolist() == trained.tolist()


def test_long_rows_do_not_make_transformers_warn(bpe, caplog):
    tokenizer = bpe()
    tokenizer.model_max_length = 4
    with caplog.at_level(logging.WARNING):
        encode(tokenizer, "the cat sat on the mat " * 5, "the dog barked " * 5)
    assert not caplog.records


def test_token_ids_are_left_as_they_are_and_checked_against_the_vocabulary():
    ids = [np.asarray(values, dtype=np.int32) for values in ([5], [6, 7], [8])]
    row = take_token_ids(Preference("f:1", ids[0], (ids[1], ids[2])), 9)
    assert row.prompt_ids is ids[0]
    assert row.completion_ids == (ids[1], ids[2])
    bad = take_token_ids(Preference("f:1", ids[0], (ids[1], ids[2])), 8)
    assert "token id 8 is outside the tokenizer's vocabulary of 8" in bad.reason
