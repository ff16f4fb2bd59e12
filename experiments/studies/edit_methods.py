"""The edits that are compared: what they should show, where, and by which methods."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from aps_jax.presets import make_config
from aps_jax.samplers import BestOfNConfig, MaskGITConfig, SMCConfig
from aps_jax.samplers.budget import with_budget

#: Runs of the decoder that the reward may cost, with or without gradient.
BUDGET = 16
STEPS = 4
GUIDANCE = 2.0
#: Of the reward's -log p beside the prior and the kept pixels.
REWARD_WEIGHT = 10.0


class Case(NamedTuple):
    """An edit: what the box should show, and where it is, all on cells of 4x4 pixels."""

    attribute: str
    value: float
    prompt: str
    rows: tuple[int, int]
    columns: tuple[int, int]
    negative: str | None = None

    def is_fulfilled(self, logits: Any) -> Any:
        """Whether logits of the attribute say what is wished for."""
        return (logits > 0) == (self.value > 0)


_EYES, _MOUTH = ((20, 36), (12, 52)), ((40, 56), (16, 48))
CASES = {
    "eyeglasses": Case("eyeglasses", 1.0, "eyeglasses", *_EYES),
    # There is no word for their absence, but guidance can lead away from one.
    "no eyeglasses": Case("eyeglasses", 0.0, "young", *_EYES, negative="eyeglasses"),
    "smiling": Case("smiling", 1.0, "smiling", *_MOUTH),
    "unsmiling": Case("smiling", 0.0, "unsmiling", *_MOUTH),
}


class Method(NamedTuple):
    """Who draws, what it is told, and whether the reward counts."""

    sampler: str
    is_prompted: bool
    guidance_scale: float
    is_rewarded: bool


METHODS = {
    "prior alone": Method("maskgit", False, 0.0, False),
    "prompt": Method("maskgit", True, 0.0, False),
    "prompt, guidance": Method("maskgit", True, GUIDANCE, False),
    "reward (APS)": Method("aps", False, 0.0, True),
    "prompt, guidance and reward (APS)": Method("aps", True, GUIDANCE, True),
    "the same, best of n": Method("best_of_n", True, GUIDANCE, True),
    "the same, SMC": Method("smc", True, GUIDANCE, True),
}
#: Pictures that nobody edited, for the same columns.
UNTOUCHED = ("original", "codec")


def config_of(method: Method, budget: int = BUDGET) -> Any:
    """Options of the sampler of a method, as large as the budget allows."""
    if method.sampler == "maskgit":
        return MaskGITConfig(num_steps=2 * STEPS)
    if method.sampler == "best_of_n":
        return with_budget(BestOfNConfig(num_steps=STEPS), budget)
    if method.sampler == "smc":
        # One fill per particle and step, so that there are steps and particles enough.
        config = SMCConfig(num_steps=STEPS, num_particles=2, fill="mode", output="best")
        return with_budget(config, budget, fixed=("num_steps",))
    # The kept pixels say nothing of what is inside the box, so nothing is started or slowed by
    # them there.
    return make_config(
        preset="draft", num_steps=STEPS, num_inner_steps=budget // STEPS, encoder_start=0.0,
        sensitivity_floor=0.0, draw="categorical", data_consistency=0.0,
    )  # fmt: skip


def kept(case: Case, size: int = 64) -> np.ndarray:
    """Mask [size, size], 0 inside the box."""
    mask = np.ones((size, size), np.float32)
    mask[slice(*case.rows), slice(*case.columns)] = 0
    return mask
