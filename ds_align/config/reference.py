"""The settings of the reference; like those of fields.py, each has one owner."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from ds_align.config.places import cache_root
from ds_align.config.schema import Count, Number, PathText, Schema, changed, rule


class ReferenceFields(Schema):
    """Where the reference's log-probs come from, and whether the reference follows the policy."""

    group: ClassVar[str] = "Reference"

    ref_logps: Literal["live", "cache"] = Field(
        "live",
        description="live: a reference model scores each step; cache: log-probs are kept on disk by their "
        "content, what is missing is scored before training, and no reference is loaded where nothing is.",
    )
    ref_cache_dir: PathText | None = Field(
        None,
        description="Directory of the reference's log-probs, shared by runs and nodes; none: `reference` in "
        "$DS_ALIGN_CACHE or ~/.cache/ds_align.",
    )

    ref_load_in_8bit: bool = Field(
        False,
        description="Hold the reference's linear layers in 8 bits each weight; the first loss then says what "
        "that costs.",
    )
    ref_load_in_4bit: bool = Field(False, description="The same in 4 bits.")
    sync_ref_model: bool = Field(
        False,
        description="Move the reference towards the policy every ref_model_sync_steps steps "
        "(TR-DPO, arXiv:2404.09656).",
    )
    ref_model_sync_steps: Count = Field(64, description="Optimizer steps between two moves.")
    ref_model_mixup_alpha: Annotated[Number, Field(gt=0, le=1)] = Field(
        0.9, description="The new reference is this times the policy plus the rest of the old reference."
    )

    @property
    def resolved_ref_cache_dir(self) -> str:
        """ref_cache_dir, or the place under the cache of the user."""
        return self.ref_cache_dir or str(cache_root() / "reference")

    @rule("ref_logps", "ref_cache_dir")
    def _a_directory_needs_the_cache(self) -> str | None:
        if self.ref_cache_dir is not None and self.ref_logps == "live":
            return "ref_cache_dir without effect: ref_logps is live; set ref_logps=cache or leave it out"
        return None

    @property
    def ref_bits(self) -> int | None:
        """Bits of a weight of the reference's linear layers; None: as the model's dtype."""
        return 8 if self.ref_load_in_8bit else 4 if self.ref_load_in_4bit else None

    @rule("ref_load_in_8bit", "ref_load_in_4bit", "sync_ref_model")
    def _one_width_that_does_not_move(self) -> str | None:
        if self.ref_load_in_8bit and self.ref_load_in_4bit:
            return "ref_load_in_8bit and ref_load_in_4bit: a weight has one width; give one of the two"
        if self.ref_bits and self.sync_ref_model:
            return "sync_ref_model: a reference in few bits cannot be mixed with the policy; leave one out"
        return None

    @rule("ref_logps", "sync_ref_model")
    def _a_moving_reference_is_not_kept(self) -> str | None:
        if self.ref_logps == "cache" and self.sync_ref_model:
            return "ref_logps=cache and sync_ref_model: log-probs of a reference that moves cannot be kept"
        return None

    @rule("sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha")
    def _sync_values_need_sync(self) -> str | None:
        names = changed(self, "ref_model_sync_steps", "ref_model_mixup_alpha")
        if names and not self.sync_ref_model:
            return f"{', '.join(names)} without effect: sync_ref_model is false; set it or leave them out"
        return None
