"""What `experiments.studies.text_rewards` compares: prompts, samplers and their settings."""

from __future__ import annotations

from typing import Any

from aps_jax.samplers.budget import decoder_evaluations
from aps_jax.writing import text_config

TUNING = ("the staff", "i ordered", "this place", "my wife")
TEST = (
    "the food", "the service", "we", "i", "our waitress", "the prices", "it", "they", "the room",
    "when i", "after", "you",
)  # fmt: skip
#: Beginnings that say the contrary of what is wanted, by label.
CONTRARY = {
    "negative": (
        "i was happy", "the food was delicious", "the waiter was kind", "we loved",
        "the place is clean", "great prices", "they are friendly", "i recommend",
    ),
    "positive": (
        "i was disappointed", "the food was cold", "the waiter was rude", "we hated",
        "the place is dirty", "high prices", "they are unfriendly", "i complained",
    ),
}  # fmt: skip
LABELS = ("negative", "positive")
#: Wanted label and beginning of every line, by split.
SPLITS: dict[str, list[tuple[str, str]]] = {
    "tuning": [(label, prompt) for label in LABELS for prompt in TUNING],
    "test": [(label, prompt) for label in LABELS for prompt in TEST],
    "contrary": [(label, prompt) for label in LABELS for prompt in CONTRARY[label]],
}
#: Reward evaluations of a line, with or without gradient. One more is free: EntRGi also weighs the
#: line that it has finished.
BUDGET = 32
#: Best of n calls the prior for every candidate; here as often as SMC and SVDD-PM do.
FEW_CALLS = "best of n, 32 prior calls"
#: Most perplexity of a setting that is chosen, as a multiple of that of lines without a reward.
LIMIT = 1.2
_DECODING = {"reveal": "random", "schedule": "linear"}
_STEPS = {"num_steps": 8, "num_inner_steps": 4}
_MORE_STEPS = {"num_steps": 16, "num_inner_steps": 2}
_ENTRGI = _STEPS | {"num_trajectories": 1, "measurement_term": "gaussian"}
_APS = _STEPS | {"draw": "categorical", "schedule": "linear", "remasking": "anchored"}
_RATES = [
    {"learning_rate": 0.3}, {"learning_rate": 1.0}, {"learning_rate": 3.0},
    _MORE_STEPS | {"learning_rate": 1.0},
]  # fmt: skip
_WEIGHTS = [{"weight": 1.0}, {"weight": 3.0}, {"weight": 10.0}]
#: The prior term favours its mode, so it takes more to outweigh it.
_MORE_WEIGHTS = [{"weight": 3.0}, {"weight": 10.0}, {"weight": 30.0}]
#: Sampler, options, and options of which one is chosen each; "weight" is that of the reward.
METHODS: dict[str, tuple[str, dict[str, Any], list[dict[str, Any]]]] = {
    "no reward": ("maskgit", _DECODING, [{"num_steps": 16}]),
    "best of n": (
        "best_of_n", _DECODING | {"num_candidates": 32}, [{"num_steps": 8}, {"num_steps": 16}],
    ),
    FEW_CALLS: (
        "best_of_n", _DECODING, [{"num_candidates": 4, "num_steps": 8},
                                 {"num_candidates": 2, "num_steps": 16}],
    ),
    "SMC": (
        "smc", _DECODING | {"num_steps": 8, "num_particles": 4, "num_fills": 1,
                            "weights": "absolute"},
        [*_WEIGHTS, {"num_steps": 16, "num_particles": 2, "weight": 10.0}],
    ),
    "SVDD-PM": (
        "svdd_pm", _DECODING | {"num_steps": 8, "num_candidates": 4, "selection": "sample",
                                "selection_temperature": 1.0},
        [*_WEIGHTS, {"num_steps": 16, "num_candidates": 2, "weight": 10.0}],
    ),
    "soft relaxation": ("entrgi", _ENTRGI | {"mixing": "soft"}, _RATES),
    "EntRGi": ("entrgi", _ENTRGI, _RATES),
    "APS": ("aps", _APS | {"prior_weight": 0.0}, _RATES),
    "APS with prior term": (
        "aps", _APS | {"prior_weight": 1.0, "learning_rate": 1.0},
        [*_MORE_WEIGHTS, _MORE_STEPS | {"weight": 30.0}],
    ),
    "APS, random remasking": (
        "aps", _APS | {"prior_weight": 1.0, "learning_rate": 1.0, "remasking": "random"},
        [*_MORE_WEIGHTS, _MORE_STEPS | {"weight": 30.0}],
    ),
}  # fmt: skip


def config_of(method: str, setting: dict[str, Any]) -> Any:
    """Options of the sampler; ValueError if they cost more than `BUDGET`."""
    sampler, fixed, _ = METHODS[method]
    options = {name: value for name, value in setting.items() if name != "weight"}
    config = text_config(sampler, **(fixed | options))
    if config.KNOB is not None and decoder_evaluations(config) > BUDGET + 1:
        raise ValueError(f"{method} has {decoder_evaluations(config)} evaluations, not {BUDGET}")
    return config
