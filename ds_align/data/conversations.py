"""Conversations in their two parts: the prompt that all answers share, and what each answer adds."""

from __future__ import annotations

from ds_align.data.contents import Content, Message, RowError, as_turns


def with_system(prompt: list[Message], system: str | None, column: str) -> list[Message]:
    """The prompt behind the system message of a column of its own. Raises RowError."""
    if system is None:
        return prompt
    if prompt[0]["role"] != "system":
        return [{"role": "system", "content": system}, *prompt]
    if prompt[0]["content"] != system:
        raise RowError(
            f"column {column!r} and the conversation give two different system messages; keep one, or set "
            "dataset_system_field to another name"
        )
    return prompt


def split_conversation(
    prompt: Content | None, completions: list[list[Message]]
) -> tuple[list[Message], list[list[Message]]]:
    """Part a conversation into its prompt and what each completion adds. Raises RowError.

    A completion may repeat the prompt; without a prompt column the prompt is the common beginning of chosen
    and rejected, or everything before the last message of a single completion.
    """
    repeats = all(turns[0]["role"] not in ("assistant", "tool") for turns in completions)
    if prompt is None or (isinstance(prompt, str) and repeats):
        num_prompt = _num_common_turns(completions)
        beginning = completions[0][:num_prompt]
        if prompt is not None and not any(turn["content"] == prompt for turn in beginning):
            raise RowError(
                "the conversations do not begin with the text of the prompt column; drop the column or "
                "mend it"
            )
    else:
        beginning = as_turns(prompt, "user")
        if all(turns[: len(beginning)] == beginning for turns in completions):
            num_prompt = len(beginning)
        else:
            num_prompt = 0
    answers = [turns[num_prompt:] for turns in completions]
    if not beginning:
        raise RowError("the conversations have no common beginning to serve as the prompt")
    last = next((turns[-1]["role"] for turns in answers if turns), "assistant")
    if last != "assistant":
        raise RowError(f"a conversation ends with a {last} message, expected the assistant's answer last")
    if beginning[-1]["role"] == "assistant":
        raise RowError(
            "the prompt ends with an assistant message, expected a user, system or tool message last"
        )
    for turns in answers:
        roles = [turn["role"] for turn in turns]
        if not roles or roles[-1] != "assistant" or not {"assistant", "tool"}.issuperset(roles):
            raise RowError(
                f"a completion has the roles {roles}, expected assistant messages after a shared prompt"
            )
    return list(beginning), answers


def _num_common_turns(completions: list[list[Message]]) -> int:
    """Leading messages that all completions share, always leaving the last message of each."""
    limit = min(map(len, completions)) - 1
    first = completions[0]
    shared = (all(turns[index] == first[index] for turns in completions) for index in range(limit))
    return next((index for index, same in enumerate(shared) if not same), limit)
