"""The samplers whose distance to known posteriors is measured, with their options."""

from __future__ import annotations

from typing import Any

#: One token at a time in random order, which is exact for a perfect prior.
_IN_ORDER = {"reveal": "random", "schedule": "linear", "num_steps": "L"}
#: The forms of APS that have a likelihood and a prior term.
_APS = {
    "num_steps": "L", "measurement_term": "gaussian", "prior_weight": 1.0, "draw": "categorical",
}  # fmt: skip
#: The rate, the inner steps and the share are the best of a few, tried on these very problems.
_TWISTED = {"num_steps": "L", "schedule": "linear", "learning_rate": 0.5, "prior_share": 0.5}
#: Sampler and options by name; "L" stands for the number of tokens. None is a record: this version
#: no longer has its options, and its rows are only shown.
METHODS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "prior": ("maskgit", _IN_ORDER),
    "aps, published objective": ("aps", {"num_steps": "L"}),
    "aps": ("aps", _APS),
    "aps, KL prior term": None,
    "aps, ELBO weights": ("aps", _APS | {"prior_weighting": "elbo"}),
    "aps, standard remasking": ("aps", _APS | {"remasking": "standard"}),
    "aps, random remasking": ("aps", _APS | {"remasking": "random"}),
    "aps, warm start": ("aps", _APS | {"warm_start": True}),
    "aps, ReMDM rescale 0.5": None,
    "best_of_n": ("best_of_n", _IN_ORDER),
    "straight_through": ("straight_through", {}),
    "svdd_pm": ("svdd_pm", _IN_ORDER | {"selection": "sample", "selection_temperature": 1.0}),
    "g2d2": (
        "g2d2",
        {"measurement_term": "gaussian", "kl_exact": True, "kl_weight": 1.0, "kl_span": 0.0,
         "learning_rate": 0.5, "learning_rate_span": 0.0, "top_p": 1.0, "num_steps": "L"},
    ),
    "sgdd": (
        "sgdd",
        {"method": "gibbs", "num_denoise_steps": "L", "first_noise": 0.9, "last_noise": 0.1},
    ),
    "smc": (
        "smc",
        _IN_ORDER | {"weights": "absolute", "num_fills": 1, "ess_threshold": 1.0},
    ),
    "aps-smc": ("aps-smc", _TWISTED | {"num_inner_steps": 2}),
    "aps-smc, phi refined at every step": (
        "aps-smc", _TWISTED | {"num_inner_steps": 1, "num_refinements": "L"},
    ),
    "aps-smc, prior in place of phi": (
        "aps-smc", _TWISTED | {"num_inner_steps": 0, "prior_share": 1.0},
    ),
    "entrgi": ("entrgi", {"num_steps": "L", "num_trajectories": 1}),
    "redge": ("redge", {"num_steps": "L"}),
}  # fmt: skip
