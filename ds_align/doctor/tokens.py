"""Checks of the token ids: 1 repeated BOS and EOS, 2 missing EOS, 3 the prompt's boundary, 4 cuts."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ds_align.data import PreferenceDataset, TokenTable
from ds_align.data.tables import JoinedTable
from ds_align.data.tokenize import read_chat_template
from ds_align.doctor.facts import Facts
from ds_align.doctor.finding import Outcome, Parts

SHIFTED_SHARE = 0.01
CUT_SHARE = 0.05
MAX_EXAMPLES = 3
Table = TokenTable | JoinedTable
_SHOWN_TOKENS = 8


def repeated_specials(facts: Facts) -> Outcome:
    """More than one BOS in a row, or more than one EOS in the scored tokens.

    An EOS that closes an earlier turn of a scored conversation is fine where the template writes it so.
    """
    data, parts = facts.train, Parts()
    bos, eos = facts.tokenizer.bos_token_id, facts.tokenizer.eos_token_id
    double_bos = _rows_with_double_bos(data, bos, eos)
    parts.value["rows_with_double_bos"] = len(double_bos)
    if len(double_bos):
        parts.add(
            "error",
            f"{len(double_bos)} of {len(data)} rows have more than one BOS in a row",
            "leave the BOS out of the texts and the template, the pipeline adds it",
            _examples(facts, double_bos, -1),
        )
    index = data.completion_index
    counts = _count(data.tables.completions, eos)[index]
    doubled = _with_pairs(data.tables.completions, eos)[index]
    # Strings and token ids did not go through the template.
    allowed = facts.template_closes_turns & bool(data.counts.get("rows_as_messages", 0)) & ~doubled
    wrong = (counts > 1) & ~allowed
    parts.value |= {
        "completions_with_several_eos": int(wrong.sum()),
        "completions_of_several_turns": int(((counts > 1) & allowed).sum()),
    }
    if wrong.any():
        row, column = (int(part) for part in np.argwhere(wrong)[0])
        # Ids may be a conversation that went through the template elsewhere.
        are_turns = facts.template_closes_turns and data.counts.get("rows_of_token_ids", 0)
        parts.add(
            "warning" if are_turns and not (wrong & doubled).any() else "error",
            f"{int(wrong.sum())} of {wrong.size} completions hold more than one EOS",
            "take the EOS out of the texts, one is added at the end of each completion",
            _examples(facts, [row], column),
        )
    inside = int(data.counts.get("rows_with_eos_inside", 0))
    parts.value["rows_with_eos_inside"] = inside
    if inside:
        parts.add(
            "warning",
            f"{inside} rows hold the text of the EOS inside of a prompt or an answer",
            "take it out, or write the turns as messages",
        )
    return parts.outcome("one BOS and one EOS, where they belong")


def missing_eos(facts: Facts) -> Outcome:
    """Completions that were not cut and do not end with the EOS; a model trained on them does not stop."""
    data = facts.train
    open_ends = ~_ends_with(data, facts.tokenizer.eos_token_id) & ~_at_limit(facts)
    number = int(open_ends.sum())
    value = {"completions_without_eos": number, "completions": open_ends.size}
    if not number:
        return Outcome("ok", value, "every completion that was not cut ends with the EOS")
    row, column = (int(part) for part in np.argwhere(open_ends)[0])
    return Outcome(
        "error",
        value,
        f"{number} of {open_ends.size} completions do not end with the EOS though they were not cut",
        f"append the id {facts.tokenizer.eos_token_id} to the ids of each completion, or give texts",
        _examples(facts, [row], column),
    )


def uses_eos(facts: Facts) -> bool:
    """Whether the rows follow the usual convention: half of the completions or more end with the EOS.

    Token ids are taken as they are; where hardly any ends with an EOS, none was meant.
    """
    ends = _ends_with(facts.train, facts.tokenizer.eos_token_id)
    return bool((ends | _at_limit(facts)).mean() >= 0.5 and ends.any())


def shifted_boundary(facts: Facts) -> Outcome:
    """Rows whose prompt's tokens are not how the tokens of prompt and completion together begin.

    A sample of rows is decoded and tokenized again as one text; a row that does not come back is left out.
    """
    data, tokenizer = facts.train, facts.tokenizer
    rows = spread(len(data), facts.sample_rows)
    prompts = [data[row].prompt_ids for row in rows]
    answers = [data.tables.completions[data.completion_index[row, 0]] for row in rows]
    texts = [_decode(tokenizer, ids) for ids in prompts]
    # Decoded as one: the space between two words is nobody's where the tokenizer splits at white space.
    joined = (np.concatenate(pair) for pair in zip(prompts, answers, strict=True))
    wholes = [_decode(tokenizer, ids) for ids in joined]
    again, joint = _encode(tokenizer, texts), _encode(tokenizer, wholes)
    judged, shifted = 0, []
    for row, ids, alone, whole in zip(rows, prompts, again, joint, strict=True):
        if alone == ids.tolist():
            judged += 1
            if whole[: len(ids)] != alone:
                shifted.append((row, _first_difference(tokenizer, alone, whole)))
    from_template = int(data.counts.get("prompts_not_prefix", 0))
    share = max(len(shifted) / max(1, judged), from_template / max(1, data.counts.get("rows_read", 1)))
    value = {
        "rows_sampled": len(rows),
        "rows_judged": judged,
        "rows_shifted": len(shifted),
        "rows_shifted_by_the_template": from_template,
    }
    words = f"{len(shifted)} of {judged} sampled rows"
    if from_template:
        words += f", and in the template's own texts of {from_template} rows,"
    if share <= SHIFTED_SHARE:
        return Outcome("ok", value, f"{words} shift; elsewhere prompt and completion part where tokens do")
    return Outcome(
        "warning",
        value,
        f"in {words} the prompt's tokens are not how prompt and completion together begin",
        "end prompts without a space and begin completions with it, or mend the template",
        tuple(f"row {row + 1}: {found}" for row, found in shifted[:1]),
    )


def cut_rows(facts: Facts) -> Outcome:
    """Rows that were cut to length, and completions of which a single token was left."""
    data, config, parts = facts.train, facts.config, Parts()
    counts = data.counts
    room = min(config.max_prompt_length or config.max_length, config.max_length - 1)
    prompt_cut = (data.prompt_lengths >= room) & bool(counts["prompts_cut"])
    ends = _ends_with(data, facts.tokenizer.eos_token_id)
    completion_cut = _at_limit(facts) & ~ends & bool(counts["completions_cut"])
    rows = prompt_cut | completion_cut.any(axis=1)
    # A row that ends exactly at the limit is not a cut one: there are no more of these than were counted.
    number = min(int(rows.sum()), counts["prompts_cut"] + counts["completions_cut"])
    share = number / len(data)
    nothing = (completion_cut & (data.completion_lengths == 1)).any(axis=1)
    parts.value |= {
        "rows_cut": number,
        "share": share,
        "prompts_cut": int(counts["prompts_cut"]),
        "completions_cut": int(counts["completions_cut"]),
        "rows_cut_to_nothing": int(nothing.sum()),
    }
    remedy = f"raise max_length={config.max_length}, or lower max_prompt_length"
    if nothing.any():
        parts.add(
            "error",
            f"{int(nothing.sum())} rows keep one token of a completion that is longer",
            remedy,
            _examples(facts, np.flatnonzero(nothing), 0),
        )
    if share > CUT_SHARE:
        parts.add("warning", f"{number} of {len(data)} rows are cut ({share:.1%})", remedy)
    return parts.outcome(f"{number} of {len(data)} rows are cut")


def spread(num_rows: int, wanted: int) -> list[int]:
    """At most `wanted` row numbers, evenly over all."""
    return np.unique(np.linspace(0, num_rows - 1, min(wanted, num_rows)).round().astype(int)).tolist()


def _ends_with(data: PreferenceDataset, token: int) -> np.ndarray:
    return (_lasts(data.tables.completions) == token)[data.completion_index]


def _at_limit(facts: Facts) -> np.ndarray:
    """Completions as long as their limit lets them be; bool like completion_lengths."""
    config, data = facts.config, facts.train
    limit = config.max_length - data.prompt_lengths
    if config.max_completion_length is not None:
        limit = np.minimum(limit, config.max_completion_length)
    return data.completion_lengths >= limit[:, None]


def _count(table: Table, token: int) -> np.ndarray:
    """How often the token stands in each sequence."""
    return np.concatenate(
        [
            np.add.reduceat((piece.values == token).astype(np.int32), piece.offsets[:-1])
            for piece in table.pieces
        ]
    )


def _firsts(table: Table) -> np.ndarray:
    """The first token of each sequence."""
    return np.concatenate([piece.values[piece.offsets[:-1]] for piece in table.pieces])


def _lasts(table: Table) -> np.ndarray:
    """The last token of each sequence."""
    return np.concatenate([piece.values[piece.offsets[1:] - 1] for piece in table.pieces])


def _with_pairs(table: Table, token: int) -> np.ndarray:
    """Which sequences hold the token twice in a row; bool [num]."""
    return np.concatenate([_piece_with_pairs(piece, token) for piece in table.pieces])


def _piece_with_pairs(piece: TokenTable, token: int) -> np.ndarray:
    places = np.flatnonzero((piece.values[:-1] == token) & (piece.values[1:] == token))
    first, second = (np.searchsorted(piece.offsets, places + step, side="right") - 1 for step in (0, 1))
    found = np.zeros(len(piece), dtype=bool)
    found[first[first == second]] = True
    return found


def _rows_with_double_bos(data: PreferenceDataset, bos: int | None, eos: int) -> np.ndarray:
    if bos is None:
        return np.zeros(0, dtype=np.int64)
    tables = data.tables
    found = _with_pairs(tables.prompts, bos)[data.prompt_keys]
    if bos != eos:
        index, completions = data.completion_index, tables.completions
        last = _lasts(tables.prompts)[data.prompt_keys]
        first = _firsts(completions)[index]
        found = found | _with_pairs(completions, bos)[index].any(axis=1)
        found = found | ((last == bos) & (first == bos).any(axis=1))
    return np.flatnonzero(found)


def _decode(tokenizer: object, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _encode(tokenizer: object, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _first_difference(tokenizer: object, alone: list[int], whole: list[int]) -> str:
    place = next((i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b), len(whole))
    shown = [tokenizer.convert_ids_to_tokens(ids[max(0, place - 1) : place + 2]) for ids in (alone, whole)]
    return f"token {place + 1} of the prompt: alone {shown[0]}, with its completion {shown[1]}"


def _examples(facts: Facts, rows: Iterable[int], column: int) -> tuple[str, ...]:
    """The beginning of a prompt (column -1) or the end of a completion, of the first of these rows."""
    data, shown = facts.train, []
    for row in list(rows)[:MAX_EXAMPLES]:
        if column < 0:
            text = _decode(facts.tokenizer, data[int(row)].prompt_ids[:_SHOWN_TOKENS]) + " ..."
        else:
            ids = data.tables.completions[data.completion_index[row, column]]
            text = "... " + _decode(facts.tokenizer, ids[-_SHOWN_TOKENS:])
        shown.append(f"row {int(row) + 1}: {text!r}")
    return tuple(shown)


def template_closes_turns(tokenizer: object, chat_template: str | None) -> bool:
    """Whether the chat template writes the EOS behind every assistant turn, as ChatML does."""
    from jinja2 import TemplateError

    template = read_chat_template(chat_template) or tokenizer.chat_template
    if template is None:
        return False
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
    try:
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False)
    except (TemplateError, TypeError, KeyError, ValueError):
        return False
    return tokenizer.eos_token in text
