"""What the settings of adapters do; flags_table.py takes these entries over."""

from __future__ import annotations

import math

from tests.flags_entries import NO_REFERENCE, Effect, Refused

LORA = {"use_lora": True, **NO_REFERENCE}


def has_trained_adapters_alone(run: dict) -> bool:
    """The first loss is ln 2, as always where policy and reference are one."""
    return (
        run["reference"] == "adapters_off"
        and abs(run["first_loss"] - math.log(2)) < 1e-6
        and "adapter_model.safetensors" in run["files"]
        and "model.safetensors" not in run["files"]
    )


def of_new_adapters(name: str, value: object) -> list[Effect | Refused]:
    """At the first step B is 0, so that nothing but the size of the update can depend on the setting."""
    return [
        Effect({name: value}, "weights losses", "first_loss tokens order", base=LORA),
        Refused({name: value}, f"{name} without effect: use_lora is false"),
    ]


ADAPTERS = {
    "use_lora": [
        Effect(
            LORA,
            "weights files reference reference_ds first_loss",
            "tokens order layout",
            holds=has_trained_adapters_alone,
        ),
        # A named reference stays a model of its own.
        Effect({"use_lora": True}, "weights files", "reference reference_ds first_loss"),
        Refused({"use_lora": True, "ref_model_name": None}, "ref_ds_config without effect"),
    ],
    "lora_r": of_new_adapters("lora_r", 4),
    "lora_alpha": of_new_adapters("lora_alpha", 8),
    "lora_dropout": of_new_adapters("lora_dropout", 0.5),
    "lora_target_modules": [
        *of_new_adapters("lora_target_modules", ["q_proj", "v_proj"]),
        Effect({"lora_target_modules": ["all-linear"]}, same="weights losses", base=LORA),
        Refused(LORA | {"lora_target_modules": ["nothing"]}, "'nothing' names no linear layer"),
    ],
}
