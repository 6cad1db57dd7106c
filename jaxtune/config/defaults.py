"""Tables that go by optimiser or schedule: defaults, options, names elsewhere.

`config` reads them, so that a default is decided and announced in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Method(NamedTuple):
    """An optimiser's learning rates (of all parameters, of adapters) and its other defaults.

    `first_moment` says if it keeps one, which alone may be stored in bfloat16.
    """

    full: float
    lora: float
    defaults: Mapping[str, Any]
    first_moment: bool


# adamw: TRL's SFTConfig; adapters take ten times that ("LoRA Without Regret": 9.8).
# adafactor and muon: a step's root mean square is at most, or near, AdamW's, so its rates serve.
# lion: 3 to 10 times less than AdamW (arXiv:2302.06675), here 5; its betas are its own.
# sgd: a clipped gradient has norm 1, spread over all parameters; the rate of LOMO's recipe for 7B
#   (arXiv:2306.09782, config/args_lomo.yaml). It depends on the model: try others.
# schedule_free: AdamW's or up to ten times more (its authors' README); no falling schedule.
METHODS: Mapping[str, Method] = {
    "adamw": Method(2e-5, 2e-4, {}, True),
    "adafactor": Method(2e-5, 2e-4, {}, False),
    "lion": Method(4e-6, 4e-5, {"adam_beta2": 0.99}, True),
    "sgd": Method(0.03, 0.03, {"momentum": 0.0}, True),
    "muon": Method(2e-5, 2e-4, {"momentum": 0.95, "muon_adjust_lr": "match_rms_adamw"}, True),
    "schedule_free": Method(2e-5, 2e-4, {"lr_scheduler_type": "constant_with_warmup"}, False),
}
ONLY_OF = {"momentum": ("sgd", "muon"), "muon_adjust_lr": ("muon",)}


def defaults(method: str, *, lora: bool) -> dict[str, Any]:
    """Return the default of each field that depends on the method."""
    chosen = METHODS.get(method, METHODS["adamw"])
    return {"learning_rate": chosen.lora if lora else chosen.full, **chosen.defaults}


# Names of transformers' trainer for the same mathematics; fusing, paging and the like are nothing
# that a compiled step would have to be told.
SAME = {
    **dict.fromkeys(
        (
            "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused",
            "adamw_apex_fused", "adamw_hf", "paged_adamw", "paged_adamw_32bit", "adamw_32bit",
        ),
        "adamw",
    ),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "paged_lion"), "lion"),
    **dict.fromkeys(("schedule_free_adamw", "schedulefree", "schedule-free"), "schedule_free"),
}  # fmt: skip


def advice(name: str) -> str | None:
    """Explain why an optimiser known elsewhere is not here; None if unknown."""
    few_bits = "moments of 8 or 4 bits are not built. Nearest: "
    if name.endswith(("_8bit", "_4bit")) or name == "adamw_bnb_8bit":
        if "lion" in name:
            return f"{few_bits}lion with optim_state_dtype bfloat16 (2 bytes a trained parameter)"
        return (
            f"{few_bits}adamw with optim_state_dtype bfloat16 (6 bytes a trained parameter), lion "
            "with it (2), or adafactor (near 0)"
        )
    if name.startswith(("galore", "apollo", "lomo", "adalomo")):
        return "not built. Nearest in memory: adafactor, or adamw with lora.r"
    if name in ("schedule_free_sgd", "schedule_free_radam"):
        return "schedule_free is the one of AdamW; a warmup stands for RAdam's"
    return None


# The options each schedule has; `config.SchedulerConfig` says what they mean.
SCHEDULES: Mapping[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles"),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": (
        "num_decay_steps", "num_stable_steps", "decay_type", "warmup_type", "min_lr_ratio",
        "num_cycles",
    ),
    "constant": (),
    "constant_with_warmup": (),
}  # fmt: skip
STEADY = ("constant", "constant_with_warmup")  # what schedule_free can be combined with
