from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from ds_align.batch import Pair, Unpaired
from ds_align.data import load_preferences
from ds_align.data.tables import mismatched_rows
from ds_align.errors import ConfigError, DataError

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def id_pair(prompt, chosen, rejected):
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def id_row(prompt, completion, label, **more):
    return {"prompt_ids": prompt, "completion_ids": completion, "label": label, **more}


def load_ids(rows, config, inputs="pairs"):
    return load_preferences(rows, tokenizer=None, inputs=inputs, config=config)


def test_pairs_from_a_file(bpe, settings, write_jsonl):
    tokenizer = bpe()
    path = write_jsonl([pair("the cat", " sat", " barked"), pair("عاصمة مصر", " القاهرة", " المعادي")])
    dataset = load_preferences(path, tokenizer=tokenizer, inputs="pairs", config=settings())
    assert (dataset.name, dataset.inputs, len(dataset)) == (str(path), "pairs", 2)
    assert isinstance(dataset[1], Pair)
    assert tokenizer.decode(dataset[1].prompt_ids) == "عاصمة مصر"
    assert tokenizer.decode(dataset[-1].chosen_ids) == " القاهرة<|im_end|>"
    assert tokenizer.decode(dataset[0].rejected_ids) == " barked<|im_end|>"
    assert [len(row.prompt_ids) for row in dataset] == dataset.prompt_lengths.tolist()
    assert dataset.notes == ()
    with pytest.raises(IndexError):
        dataset[2]


def test_lengths_and_keys_are_those_of_the_rows(settings):
    dataset = load_ids(
        [id_pair([1, 2], [3], [4, 5]), id_pair([9], [3, 3, 3], [4]), id_pair([1, 2], [6], [7])], settings()
    )
    assert dataset.prompt_lengths.tolist() == [2, 1, 2]
    assert dataset.completion_lengths.tolist() == [[1, 2], [3, 1], [1, 1]]
    assert dataset.prompt_keys.tolist() == [0, 1, 0]
    assert {
        array.dtype for array in (dataset.prompt_lengths, dataset.completion_lengths, dataset.prompt_keys)
    } == {np.dtype(np.int64)}
    assert [row.chosen_ids.tolist() for row in dataset[1:]] == [[3, 3, 3], [6]]
    assert dataset[0].prompt_ids.dtype == np.int32


def test_rows_are_views_and_a_dataset_can_be_sent_to_a_worker(settings):
    dataset = load_ids([id_pair([1, 2], [3], [4, 5])], settings())
    assert np.shares_memory(dataset[0].prompt_ids, dataset[0].prompt_ids)
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy[0].rejected_ids.tolist() == [4, 5]


@pytest.mark.parametrize("template", [None, CHATML])
def test_sharegpt_ranking_rows_read_as_they_are(bpe, settings, tmp_path, template):
    tokenizer = bpe(template)
    turns = [("system", "brief"), ("human", "hello"), ("gpt", "world"), ("human", "the cat")]
    row = {
        "conversations": [{"from": role, "value": text} for role, text in turns],
        "chosen": {"from": "gpt", "value": "sat 😊"},
        "rejected": {"from": "gpt", "value": "barked"},
    }
    path = tmp_path / "ranking.json"
    path.write_text(json.dumps([row, {**row, "conversations": row["conversations"][1:2]}], indent=2))
    dataset = load_preferences(path, tokenizer=tokenizer, inputs="pairs", config=settings())
    if template is None:
        prompt = (
            "System:\nbrief\n\nUser:\nhello\n\nAssistant:\nworld<|im_end|>\n\nUser:\nthe cat\n\nAssistant:\n"
        )
    else:
        roles = ("system", "user", "assistant", "user")
        written = (
            f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, (_, text) in zip(roles, turns, strict=True)
        )
        prompt = "".join(written) + "<|im_start|>assistant\n"
    assert tokenizer.decode(dataset[0].prompt_ids) == prompt
    assert tokenizer.decode(dataset[0].chosen_ids) == "sat 😊<|im_end|>"
    assert dataset.counts["builtin_template_rows"] == (2 if template is None else 0)
    assert len(dataset.notes) == (template is None)


def test_unpaired_rows_and_their_mismatched_completions(settings):
    rows = [
        id_row([1], [10], True),
        id_row([1], [11], False),
        id_row([2], [12], True),
        id_row([3], [13], False, kl_completion_ids=[99, 98]),
    ]
    dataset = load_ids(rows, settings(), "unpaired")
    assert all(isinstance(row, Unpaired) for row in dataset)
    assert [row.desirable for row in dataset] == [True, False, True, False]
    # Rows 0 and 1 share a prompt, so both take row 2; row 2 takes row 3; row 3 brings its own.
    assert [row.kl_ids.tolist() for row in dataset] == [[12], [12], [13], [99, 98]]
    assert dataset.kl_lengths.tolist() == [1, 1, 1, 2]
    assert dataset.completion_lengths.tolist() == [[1], [1], [1], [1]]


def test_the_search_for_a_mismatch_goes_round():
    assert mismatched_rows(np.array([0, 1, 0])).tolist() == [1, 2, 1]  # row 2 meets row 0 (equal), then row 1
    assert mismatched_rows(np.array([4, 4])).tolist() == [-1, -1]
    assert mismatched_rows(np.array([4])).tolist() == [-1]


def test_the_mismatch_is_the_next_other_prompt_in_file_order():
    generator = np.random.default_rng(0)
    for _ in range(200):
        keys = generator.integers(0, 3, size=generator.integers(1, 12))
        expected = [
            next((j % len(keys) for j in range(i + 1, i + len(keys)) if keys[j % len(keys)] != keys[i]), -1)
            for i in range(len(keys))
        ]
        assert mismatched_rows(keys).tolist() == expected


def test_a_single_prompt_has_no_mismatched_completion(settings):
    dataset = load_ids([id_row([1], [10], True), id_row([1], [11], False)], settings(), "unpaired")
    assert [row.kl_ids for row in dataset] == [None, None]
    assert dataset.kl_lengths.tolist() == [0, 0]
    assert dataset.counts["rows_without_kl_completion"] == 2


def test_a_mismatched_completion_fits_behind_the_prompt_that_it_meets(settings):
    rows = [id_row([1, 2, 3, 4], [10], True), id_row([5], [11, 12, 13, 14], True)]
    dataset = load_ids(rows, settings(max_length=6), "unpaired")
    assert dataset[1].completion_ids.tolist() == [11, 12, 13, 14]
    assert dataset[0].kl_ids.tolist() == [11, 12]  # 6 - 4 prompt tokens
    assert dataset.kl_lengths.tolist() == [2, 1]


def test_pairs_serve_an_unpaired_method_two_examples_each(settings):
    dataset = load_ids([id_pair([1], [10], [11]), id_pair([2], [12], [13])], settings(), "unpaired")
    assert [(row.completion_ids.tolist(), row.desirable) for row in dataset] == [
        ([10], True),
        ([11], False),
        ([12], True),
        ([13], False),
    ]
    assert [row.kl_ids.tolist() for row in dataset] == [[12], [12], [10], [10]]
    assert dataset.prompt_keys.tolist() == [0, 0, 1, 1]


def test_unpaired_rows_do_not_serve_a_pair_method(settings):
    with pytest.raises(DataError, match="this method compares two answers.*train with method kto"):
        load_ids([id_row([1], [10], True)], settings())


def test_cuts_are_counted_and_the_prompt_is_cut_once(settings):
    dataset = load_ids(
        [id_pair(list(range(10)), [20, 21, 22], [23]), id_pair([1], [2], [3])],
        settings(max_length=6, max_prompt_length=4),
    )
    assert dataset[0].prompt_ids.tolist() == [6, 7, 8, 9]
    assert dataset[0].chosen_ids.tolist() == [20, 21]
    assert dataset[0].rejected_ids.tolist() == [23]
    assert (dataset.counts["prompts_cut"], dataset.counts["completions_cut"]) == (1, 1)


def test_a_left_cut_keeps_the_bos(metaspace, settings):
    rows = [pair("the cat the cat the cat", "answer", "a")]
    dataset = load_preferences(
        rows, tokenizer=metaspace, inputs="pairs", config=settings(max_prompt_length=3)
    )
    assert len(dataset[0].prompt_ids) == 3
    assert dataset[0].prompt_ids[0] == metaspace.bos_token_id
    assert metaspace.decode(dataset[0].prompt_ids).endswith("at")


def test_a_prompt_of_twice_the_limit_leaves_a_token_for_each_completion(settings):
    dataset = load_ids([id_pair(list(range(16)), [20, 21], [22, 23])], settings(max_length=8))
    assert dataset[0].prompt_ids.tolist() == list(range(9, 16))
    assert dataset.completion_lengths.tolist() == [[1, 1]]


def test_equal_pairs_are_dropped_repeats_and_contradictions_are_counted(settings):
    rows = [
        id_pair([1], [2], [3]),
        id_pair([1], [4], [4]),
        id_pair([1], [2], [3]),
        id_pair([1], [3], [2]),
    ]
    for inputs, num_rows in (("pairs", 3), ("unpaired", 6)):
        dataset = load_ids(rows, settings(), inputs)
        assert len(dataset) == dataset.counts["rows"] == num_rows
        assert dataset.counts["rows_read"] == 4
        assert dataset.counts["dropped_equal_pairs"] == 1
        assert dataset.counts["duplicate_rows"] == 1
        assert dataset.counts["contradictory_rows"] == 1
    with pytest.raises(DataError, match=r"no preference is left of 1 rows \(0 bad, 1 with the same tokens"):
        load_ids(rows[1:2], settings())


def test_pairs_that_differ_only_in_what_was_cut_are_named(settings):
    dataset = load_ids([id_pair([1], [2, 3], [2, 4])], settings(max_completion_length=1))
    assert dataset.counts["pairs_equal_after_cut"] == 1
    assert "differ only in what was cut off" in dataset.notes[0]


def test_several_bad_rows_are_reported_at_once(bpe, settings, write_jsonl):
    good = pair("a", "b", "c")
    rows = [
        good,
        {"prompt": "a", "chosne": "b", "rejected": "c"},
        '{"prompt": ',
        *([pair("a", " ", "c")] * 6),
    ]
    path = write_jsonl(rows)
    with pytest.raises(DataError) as caught:
        load_preferences(path, tokenizer=bpe(), inputs="pairs", config=settings())
    message = str(caught.value)
    assert "8 of 9 rows cannot be used" in message
    assert f"{path}:2: column 'chosen' is missing" in message
    assert f"{path}:3:12: malformed JSON" in message
    # A reason is told once, and so is what is expected.
    assert f"{path}:4, 5, 6: column 'chosen' is empty" in message
    assert message.count("and 3 more; pairs need {prompt, chosen, rejected}") == 1
    assert message.count("pairs need") == 1
    assert "\n" not in message
    assert caught.value.exit_code == 3


def test_bad_rows_are_skipped_up_to_the_cap(bpe, settings, write_jsonl):
    rows = [pair(f"p{index}", "b", "c") for index in range(99)] + ["{"]
    path = write_jsonl(rows)
    skip = settings(on_bad_rows="skip", max_bad_fraction=0.01)
    dataset = load_preferences(path, tokenizer=bpe(), inputs="pairs", config=skip)
    assert (len(dataset), dataset.counts["bad_rows"]) == (99, 1)
    assert "1 of 100 rows were left out" in dataset.notes[0]
    rows[0] = "{"
    with pytest.raises(
        DataError, match="2 of 100 rows cannot be used, more than max_bad_fraction=0.01 allows"
    ):
        load_preferences(write_jsonl(rows), tokenizer=bpe(), inputs="pairs", config=skip)


def test_rows_keep_file_order_across_chunks(settings):
    rows = [id_pair([index], [index, 1], [index, 2, 3]) for index in range(2500)]
    dataset = load_ids(rows, settings())
    assert [int(row.prompt_ids[0]) for row in dataset] == list(range(2500))
    assert dataset.prompt_keys.tolist() == list(range(2500))
    assert [int(row.rejected_ids[0]) for row in dataset[::500]] == [0, 500, 1000, 1500, 2000]


def test_text_and_ids_may_stand_in_one_set_and_keep_their_order(bpe, settings):
    tokenizer = bpe()
    rows = [pair("a", "b", "c"), id_pair([65], [66], [67]), pair("d", "e", "f")]
    dataset = load_preferences(rows, tokenizer=tokenizer, inputs="pairs", config=settings())
    assert dataset[1].chosen_ids.tolist() == [66]
    assert [tokenizer.decode(dataset[index].prompt_ids) for index in (0, 2)] == ["a", "d"]


def test_splits_and_what_cannot_be_used(bpe, settings):
    rows = [pair(f"p{index}", "b", "c") for index in range(10)]
    held_out = load_preferences(rows, tokenizer=bpe(), inputs="pairs", config=settings(), split="train[90%:]")
    assert (len(held_out), held_out.name) == (1, "records (train[90%:])")
    with pytest.raises(DataError, match="the row is text and no tokenizer was given"):
        load_preferences(rows, tokenizer=None, inputs="pairs", config=settings())
    with pytest.raises(DataError, match="has no eos_token"):
        load_preferences(rows, tokenizer=bpe(eos_token=None), inputs="pairs", config=settings())
    with pytest.raises(ConfigError, match="max_length=1 leaves no room"):
        load_preferences(rows, tokenizer=bpe(), inputs="pairs", config=settings(max_length=1))
    with pytest.raises(DataError, match="outside the tokenizer's vocabulary"):
        load_preferences([id_pair([10**6], [1], [2])], tokenizer=bpe(), inputs="pairs", config=settings())


def test_arrays_become_tensors_without_a_warning(settings):
    torch = pytest.importorskip("torch")
    dataset = load_ids([id_pair([1, 2], [3], [4, 5])], settings())
    assert torch.from_numpy(dataset[0].rejected_ids).tolist() == [4, 5]


def test_rows_that_a_lost_quote_took_along_count(bpe, settings, tmp_path):
    lines = ["prompt,chosen,rejected", *(f"q{n},good {n},bad {n}" for n in range(600))]
    lines[201] = 'q200,"good 200,bad 200'
    path = tmp_path / "big.csv"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="400 of 600 rows cannot be used, more than max_bad_fraction=0.01"):
        load_preferences(path, tokenizer=bpe(), inputs="pairs", config=settings(on_bad_rows="skip"))
    kept = load_preferences(
        path,
        tokenizer=bpe(),
        inputs="pairs",
        config=settings(on_bad_rows="skip", max_bad_fraction=0.7),
    )
    assert (len(kept), kept.counts["bad_rows"], kept.counts["rows_read"]) == (200, 400, 600)
    assert any("400 of 600 rows were left out" in note for note in kept.notes)
