"""What the settings of a cached reference do; flags_table.py takes these entries over."""

from __future__ import annotations

from tests.flags_entries import ALIKE, NO_REFERENCE, Effect, Refused

CACHE = {"ref_logps": "cache", "ref_cache_dir": "WORK/references"}


def uses_no_reference_model(run: dict) -> bool:
    return run["reference"] == "cache" and not any(run["reference_packs"]) and run["num_cached"] > 0


CACHED = {
    "ref_logps": [
        Effect(
            CACHE,
            "reference reference_ds",
            f"micro_batches weights_dtype {ALIKE}",
            holds=uses_no_reference_model,
        ),
        Effect(CACHE, "reference", f"order {ALIKE}", base={"use_lora": True, **NO_REFERENCE}),
        Effect(CACHE, "reference", f"order {ALIKE}", method="kto", holds=uses_no_reference_model),
        Refused(CACHE | {"sync_ref_model": True}, "log-probs of a reference that moves cannot be kept"),
        Refused(CACHE, "this simpo run has no reference model", method="simpo"),
    ],
    "ref_load_in_8bit": [
        Effect({"ref_load_in_8bit": True}, "losses", "order step_tokens reference"),
        Refused({"ref_load_in_8bit": True, "ref_load_in_4bit": True}, "give one of the two"),
        Refused(
            {"ref_load_in_8bit": True, "sync_ref_model": True}, "a reference in few bits cannot be mixed"
        ),
        Refused(
            {"ref_load_in_8bit": True, "use_lora": True, **NO_REFERENCE}, "ref_load_in_8bit without effect"
        ),
        Refused({"ref_load_in_8bit": True}, "this cpo run has no reference model", method="cpo"),
    ],
    "ref_load_in_4bit": [
        Effect({"ref_load_in_4bit": True}, "losses", "order step_tokens reference"),
        Effect({"ref_load_in_4bit": True}, "losses", base={"ref_load_in_8bit": False} | CACHE),
    ],
    "ref_cache_dir": [
        Effect(
            {"ref_cache_dir": "WORK/moved_references"},
            "cache_directory",
            "losses weights num_cached",
            base=CACHE,
        ),
        Refused({"ref_cache_dir": "WORK/references"}, "ref_cache_dir without effect: ref_logps is live"),
    ],
}
