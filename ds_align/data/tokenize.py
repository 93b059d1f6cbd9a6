"""Preferences to token ids: one BOS, one EOS, and a boundary between prompt and completion that cannot shift.

Text forms, as in TRL: strings are tokenized as they are, without a chat template; message lists go through
the chat template (the config's, else the tokenizer's, else BUILTIN_CHAT_TEMPLATE, which is counted).

The boundary. Prompt and completion are tokenized apart, so no merge can cross it: the prompt's tokens are
those that the model sees when it is asked to answer, and the completion's tokens depend on the completion
alone (KTO pairs completions with other prompts). A completion is tokenized behind a guard token whose ids are
taken off again: tokenizers that put a space before the first word of a text would otherwise add one inside
the sequence.

BOS: exactly one where the tokenizer adds one by itself, from the template or from here; an empty prompt is
given the BOS where there is one. EOS: exactly one at the end of every completion; what a template writes
after it is left out, and a template that closes a turn with another token gets the EOS behind that token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ds_align.data.contents import Content, Message
from ds_align.data.ranked import Comparisons
from ds_align.data.readers import BadRow
from ds_align.data.schemas import Preference
from ds_align.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
_PROBE = "ds-align-probe-of-the-template"
# A guard for tokenizers that put a space behind special tokens and take line breaks for spaces.
_RARE_SIGN = "\u2042"
# How tokenizers write a space that stands before a word.
_WORD_SPACES = ("\u2581", "\u0120", " ")


@dataclass(frozen=True, slots=True)
class EncodedPreference:
    """Token ids of one record, uncut; each int32 [num_tokens], completions with their EOS.

    comparisons: as in Preference.
    """

    origin: str
    prompt_ids: np.ndarray
    completion_ids: tuple[np.ndarray, ...]
    desirable: bool | None = None
    kl_ids: np.ndarray | None = None
    comparisons: Comparisons = ((0, 1),)


@dataclass(frozen=True, slots=True)
class _Rendered:
    """Texts of one preference, as the tokenizer is to see them; completions end before the EOS."""

    prompt: str
    completions: tuple[str, ...]
    kl_completion: str | None


class _RenderError(ValueError):
    """Why a chat template cannot render one row."""


class PreferenceTokenizer:
    """Turns preferences into token ids under the rules above; `counts` says what was decided."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        """Store the tokenizer and find its guard. Raises DataError where it has no EOS token."""
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no eos_token, so "
                "no completion can end; set one, as in tokenizer.eos_token = ..., and save the tokenizer"
            )
        self.tokenizer = tokenizer
        self.chat_template = chat_template or tokenizer.chat_template or BUILTIN_CHAT_TEMPLATE
        self.uses_builtin_template = self.chat_template is BUILTIN_CHAT_TEMPLATE
        self.counts: Counter[str] = Counter()
        self._bos_id = tokenizer.bos_token_id
        self._eos_id = tokenizer.eos_token_id
        self._adds_bos = self._bos_id is not None and tokenizer("a")["input_ids"][:1] == [self._bos_id]
        self._turn_ends: dict[tuple[frozenset[str], bool], str] = {}
        self._guard = self._find_guard()
        self._guard_ids = self._encode_texts([self._guard])[0]

    @classmethod
    def from_config(
        cls, tokenizer: PreTrainedTokenizerBase, chat_template: str | None
    ) -> PreferenceTokenizer:
        """Build from a file's path or Jinja text; raises ConfigError where it is neither."""
        return cls(tokenizer, read_chat_template(chat_template))

    def encode(self, preferences: Sequence[Preference]) -> list[EncodedPreference | BadRow]:
        """Token ids of each preference, in order; a row that the template refuses becomes a BadRow."""
        # What a turn ends with is asked of its first conversation here: were it remembered from call to call,
        # ids would depend on which rows this process has seen.
        self._turn_ends.clear()
        results: dict[int, EncodedPreference | BadRow] = {}
        texts: dict[int, _Rendered] = {}
        for index, preference in enumerate(preferences):
            try:
                texts[index] = self._render(preference)
            except _RenderError as error:
                results[index] = BadRow(preference.origin, str(error))
        prompts = iter(self._encode_prompts([text.prompt for text in texts.values()]))
        completions = iter(
            self._encode_completions([part for text in texts.values() for part in _answers(text)])
        )
        for index, text in texts.items():
            prompt_ids = next(prompts)
            answers = [next(completions) for _ in _answers(text)]
            num_completions = len(text.completions)
            preference = preferences[index]
            if not prompt_ids.size:
                results[index] = BadRow(preference.origin, _EMPTY_PROMPT)
                continue
            results[index] = EncodedPreference(
                preference.origin,
                prompt_ids,
                tuple(answers[:num_completions]),
                preference.desirable,
                answers[-1] if len(answers) > num_completions else None,
                preference.comparisons,
            )
        return [results[index] for index in range(len(preferences))]

    def encode_prompt(self, prompt: str | list[Message]) -> np.ndarray:
        """Token ids of a prompt, int32 [num_tokens], as training sees it: what generation starts from."""
        try:
            text = (
                prompt if isinstance(prompt, str) else self._apply_template(prompt, None, opens_answer=True)
            )
        except _RenderError as error:
            raise DataError(str(error)) from error
        ids = self._encode_prompts([text])[0]
        if not ids.size:
            raise DataError(_EMPTY_PROMPT)
        return ids

    def _render(self, preference: Preference) -> _Rendered:
        prompt, kl = preference.prompt, preference.kl_completion
        if isinstance(prompt, str):
            return _Rendered(prompt, preference.completions, kl)
        self.counts["builtin_template_rows"] += self.uses_builtin_template
        header = self._apply_template(prompt, preference.tools, opens_answer=True)
        answers = (*preference.completions, *([] if kl is None else [kl]))
        parts = [self._split_conversation(prompt, answer, preference.tools, header) for answer in answers]
        if any(part[0] != parts[0][0] for part in parts):
            raise _RenderError(
                "the chat template writes another prompt for each completion; give a template that does not"
            )
        self.counts["prompts_not_prefix"] += parts[0][0] != header
        texts = [part[1] for part in parts]
        num_completions = len(preference.completions)
        return _Rendered(parts[0][0], tuple(texts[:num_completions]), texts[-1] if kl is not None else None)

    def _split_conversation(
        self, prompt: list[Message], answer: list[Message], tools: list[Any] | None, header: str
    ) -> tuple[str, str]:
        """(prompt text with the assistant header, completion text before its EOS)."""
        full = self._apply_template([*prompt, *answer], tools, opens_answer=False)
        start = len(header)
        if not full.startswith(header):
            # Reasoning templates open a thought in the generation prompt that a finished turn does not show:
            # the header then is whatever the finished conversation has before the answer.
            probe = self._apply_template(
                [*prompt, {**answer[0], "content": _PROBE}, *answer[1:]], tools, opens_answer=False
            )
            start = probe.find(_PROBE)
            if start < 0 or full[:start] != probe[:start]:
                raise _RenderError(
                    "the chat template's prompt is not how the whole conversation begins, so the answer "
                    "cannot be told from the prompt; give another --chat_template"
                )
        text, tail = full[start:], self._turn_end(prompt, answer, tools)
        if not text.endswith(tail):
            return full[:start], text.rstrip()
        closed = tail.find(self.tokenizer.eos_token)
        return full[:start], text.removesuffix(tail) + (tail[:closed] if closed >= 0 else tail.rstrip())

    def _turn_end(self, prompt: list[Message], answer: list[Message], tools: list[Any] | None) -> str:
        """What the template writes behind the content of a last message of this shape."""
        shape = (frozenset(answer[-1]), bool(tools))
        if shape not in self._turn_ends:
            # A search for the content itself would find a short answer inside the template's own words.
            probe = self._apply_template(
                [*prompt, *answer[:-1], {**answer[-1], "content": _PROBE}], tools, opens_answer=False
            )
            self._turn_ends[shape] = probe.rpartition(_PROBE)[2]
        return self._turn_ends[shape]

    def _apply_template(self, messages: list[Message], tools: list[Any] | None, *, opens_answer: bool) -> str:
        from jinja2 import TemplateError

        is_own = self.chat_template is self.tokenizer.chat_template
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=None if is_own else self.chat_template,
                add_generation_prompt=opens_answer,
                tokenize=False,
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise _RenderError(
                f"the chat template refuses the conversation ({error}); mend the row or give another "
                "--chat_template"
            ) from error

    def _encode_texts(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def _encode_prompts(self, texts: list[str]) -> list[np.ndarray]:
        return [np.asarray(self._with_one_bos(ids), dtype=np.int32) for ids in self._encode_texts(texts)]

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        bos = self._bos_id
        if bos is None:
            return ids
        start = next((index for index, token in enumerate(ids) if token != bos), len(ids))
        # A BOS that opens the text is the text's own; more than one in a row is never meant.
        wants_bos = start > 0 or self._adds_bos or not ids
        return [bos, *ids[start:]] if wants_bos else ids

    def _encode_completions(self, texts: list[str]) -> list[np.ndarray]:
        width, eos = len(self._guard_ids), self._eos_id
        encoded = []
        for text, ids in zip(texts, self._encode_texts([self._guard + text for text in texts]), strict=True):
            # A guard that merged with the text guards nothing: the text is then taken alone.
            own = ids[width:] if ids[:width] == self._guard_ids else self._encode_texts([text])[0]
            end = len(own)
            while end and own[end - 1] == eos:
                end -= 1
            encoded.append(np.asarray([*own[:end], eos], dtype=np.int32))
        return encoded

    def _find_guard(self) -> str:
        """The first text behind which a word neither gains nor loses a space; the EOS, as a rule."""
        for guard in (self.tokenizer.eos_token, "\n", _RARE_SIGN):
            guard_ids, bare, spaced = self._encode_texts([guard, guard + "a", guard + " a"])
            width = len(guard_ids)
            # An unknown sign takes the unknown signs behind it into its own token.
            if bare[:width] != guard_ids or bare == spaced or self.tokenizer.unk_token_id in guard_ids:
                continue
            # A normaliser that makes a space of the guard would join it to the word.
            last, *first = self.tokenizer.convert_ids_to_tokens(bare[max(0, width - 1) : width + 1])
            if first and not first[0].startswith(_WORD_SPACES) and last not in _WORD_SPACES:
                return guard
        return self.tokenizer.eos_token


_EMPTY_PROMPT = (
    "the prompt has no token and the tokenizer has no BOS to stand for it, so the first token of the "
    "completion could not be scored; give a prompt with at least one character"
)


def _answers(text: _Rendered) -> Iterable[str]:
    return (*text.completions, *([] if text.kl_completion is None else [text.kl_completion]))


def take_token_ids(preference: Preference, vocabulary_size: int | None) -> EncodedPreference | BadRow:
    """A preference given as ids, as it is (no template, BOS or EOS); ids outside the vocabulary are bad."""
    answers = (
        *preference.completions,
        *([] if preference.kl_completion is None else [preference.kl_completion]),
    )
    highest = max(int(ids.max()) for ids in (preference.prompt, *answers))
    if vocabulary_size is not None and highest >= vocabulary_size:
        return BadRow(
            preference.origin,
            f"token id {highest} is outside the tokenizer's vocabulary of {vocabulary_size}; tokenize with "
            "this model's tokenizer",
        )
    return EncodedPreference(
        preference.origin,
        preference.prompt,
        preference.completions,
        preference.desirable,
        preference.kl_completion,
        preference.comparisons,
    )


def read_chat_template(value: str | None) -> str | None:
    """The template given as Jinja text or as a file's path; raises ConfigError where it is neither."""
    if not value:
        return None
    if "{%" in value or "{{" in value:
        return value
    try:
        return Path(value).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"chat_template={value!r}: neither Jinja text nor a file that can be read ({error}); give one "
            "of the two"
        ) from error


def needs_tokenizer(content: Content) -> bool:
    """Whether a content is text: token ids are taken as they are."""
    return not isinstance(content, np.ndarray)
