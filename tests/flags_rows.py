"""What the settings of ranked lists and further columns do; flags_table.py takes these entries over."""

from __future__ import annotations

from tests.distributed import tiny
from tests.flags_entries import Effect, Refused

LISTS = {"dataset_path": "WORK/lists.jsonl"}
SCORED = {"dataset_path": "WORK/scored.jsonl"}
MARGIN = {"min_score_margin": 1.0}
EVERYTHING = "tokens losses weights"
SHOWS_ALL = (
    "{% if tools %}{{ tools[0]['name'] }}{% endif %}"
    "{% for m in messages %}<{{ m['role'] + m['content'] }}>{{ eos_token }}{% endfor %}"
)
SPOKEN = {"dataset_path": "WORK/spoken.jsonl", "chat_template": SHOWS_ALL}


def renamed(name: str, base: dict, more: dict | None = None) -> list[Effect | Refused]:
    """With its column named, renamed data give the very run of the original; without, they are refused."""
    data = {"dataset_path": f"WORK/renamed_{name}.jsonl", **(more or {})}
    column = {f"dataset_{name}_field": f"my_{name}"}
    return [Effect(data | column, same=EVERYTHING, base=base), Refused(data, f"{name!r}")]


def has_rows(number: int, *printed: str):
    return lambda run: run["train_rows"] == number and all(text in run["printed"] for text in printed)


ROWS = {
    "ranked_pairs": [
        # Of three answers: 3 pairs of each of the 12 prompts, and one of each.
        Effect(
            {"ranked_pairs": "all"},
            "train_rows tokens order losses weights",
            base=LISTS,
            holds=has_rows(
                36, "12 ranked lists (prompt, completions, scores) -> 36 pairs, every two answers"
            ),
        ),
        Effect({"ranked_pairs": "best_random"}, EVERYTHING, base=LISTS, holds=has_rows(12)),
        Effect(
            {"ranked_pairs": "best_random", "seed": 7}, "tokens", base=LISTS | {"ranked_pairs": "best_random"}
        ),
        Effect(
            {"seed": 7}, "order", "tokens", base=LISTS, holds=has_rows(12, "-> 12 pairs, best against worst")
        ),
        Effect(
            {"ranked_pairs": "all"},
            same=EVERYTHING,
            base=LISTS,
            method="kto",
            # The best and the worst of each list; the third wins once and loses once.
            holds=has_rows(
                24, "-> 24 labelled answers", "12 answers that win as often as they lose left out"
            ),
        ),
        Effect({"ranked_pairs": "all"}, same=EVERYTHING, holds=has_rows(12, "no row is a ranked list")),
    ],
    "ranked_min_gap": [
        # The scores are 3, 1, 2: of each list one pair of three is two apart.
        Effect(
            {"ranked_min_gap": 2.0},
            "train_rows tokens",
            base=LISTS | {"ranked_pairs": "all"},
            holds=has_rows(12, "24 nearer than ranked_min_gap left out"),
        ),
        Refused({"ranked_min_gap": 0, **LISTS}, "ranked_min_gap=0 is not valid"),
        Refused({"ranked_min_gap": 2.5, **LISTS}, "12 nearer than ranked_min_gap"),
    ],
    "min_score_margin": [
        # Scores of 0 to 11 against 5: those from 6 on are 1 above.
        Effect(
            MARGIN, "train_rows tokens", base=SCORED, holds=has_rows(6, "6 below min_score_margin left out")
        ),
        Refused(MARGIN, "min_score_margin=1 needs the columns 'chosen_score' and 'rejected_score'"),
    ],
    "dataset_completions_field": renamed("completions", LISTS),
    "dataset_scores_field": renamed("scores", LISTS),
    "dataset_ranks_field": renamed("ranks", LISTS),
    "dataset_chosen_score_field": [
        *renamed("chosen_score", SCORED | MARGIN, MARGIN),
        Refused({"dataset_chosen_score_field": "x"}, "without effect: min_score_margin is none"),
    ],
    "dataset_rejected_score_field": renamed("rejected_score", SCORED | MARGIN, MARGIN),
    "dataset_system_field": [
        Effect({"dataset_system_field": "my_system"}, "tokens losses", base=SPOKEN),
        Refused({"dataset_system_field": "my_tools", **SPOKEN}, "expected the text of a system message"),
    ],
    "dataset_tools_field": [
        Effect({"dataset_tools_field": "my_tools"}, "tokens losses", base=SPOKEN),
        Refused({"dataset_tools_field": "my_system", **SPOKEN}, "column 'my_system' is not JSON"),
    ],
}


def write_rows(work, pairs: list[dict], chats: list[dict]) -> None:
    """The files that the entries name: ranked lists, scored pairs and conversations with further columns."""

    def write(name: str, rows: list[dict], *renamed: str) -> None:
        tiny.write_jsonl(work / f"{name}.jsonl", rows)
        for field in renamed:
            changed = [
                {f"my_{key}" if key == field else key: value for key, value in row.items()} for row in rows
            ]
            tiny.write_jsonl(work / f"renamed_{field}.jsonl", changed)

    lists = [
        {
            "prompt": row["prompt"],
            "completions": [row["chosen"], row["rejected"], "maybe "],
            "scores": [3, 1, 2],
        }
        for row in pairs
    ]
    write("lists", lists, "completions", "scores")
    write("ranks", [{**row, "scores": None, "ranks": [1, 3, 2]} for row in lists], "ranks")
    scored = [{**row, "chosen_score": number, "rejected_score": 5} for number, row in enumerate(pairs)]
    write("scored", scored, "chosen_score", "rejected_score")
    more = {"my_system": "be brief", "my_tools": [{"name": "search"}]}
    write("spoken", [row | more for row in chats])
