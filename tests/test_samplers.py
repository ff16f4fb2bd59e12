"""Options, budgets and starts of the samplers, and the laws of `contract` for their variants."""

import dataclasses
import re
from typing import ClassVar

import contract
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax import samplers
from aps_jax.codec.magvit2 import encode_tokens
from aps_jax.samplers import SAMPLERS, budget
from aps_jax.samplers.config import DecodingConfig
from aps_jax.sampling.smooth import smooth_estimate

#: Options that change the course of a sampler's loop; `test_contract` has its least ones.
CASES = {
    "aps": [{"warm_start": True, "encoder_start": 0.5, "sensitivity_floor": 0.3}],
    "maskgit": [{"reveal": "remdm-conf", "remask_strength": 1.0, "guidance_scale": 1.0}],
    "best_of_n": [{"reveal": "ancestral"}],
    "straight_through": [{"variables": "tokens", "measurement_term": "l1"}],
    "svdd_pm": [{"selection": "standardized", "guidance_scale": 0.5}],
    "g2d2": [{"transition": "markov", "measurement_term": "l1", "perceptual_weight": 0.1}],
    "sgdd": [
        {"proposal": "bit", "num_likelihood_steps": 3},
        {"method": "gibbs", "coupling": "code", "guidance_scale": 1.0, "num_denoise_steps": 3},
    ],
    "smc": [{"weights": "absolute"}, {"fill": "mode", "output": "best"}],
    "aps-smc": [
        {"order": "anchored", "prior_share": 0.0, "encoder_start": 0.5, "num_refinements": 1},
        {"num_inner_steps": 0, "prior_share": 1.0, "guidance_scale": 1.0, "ramp": "constant"},
    ],
    "entrgi": [{"order": "anchor", "mixing": "hard"}],
    "redge": [{"estimator": "gumbel", "guidance_scale": 1.0}, {"estimator": "straight_through"}],
}

sample = jax.jit(samplers.sample, static_argnames="config")


def test_every_default_has_a_source():
    for sampler in SAMPLERS.values():
        assert sampler.config.__doc__
        assert re.search(r"arXiv:\d{4}\.\d{4,5}|no paper", sampler.paper)
        options = [option for group in sampler.defaults.values() for option in group]
        assert sorted(options) == sorted(f.name for f in dataclasses.fields(sampler.config))


def test_a_sampler_is_declared_by_its_own_class():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(DecodingConfig):
        NAME: ClassVar = "own"
        SUMMARY: ClassVar = "a sampler"
        PAPER: ClassVar = "no paper"
        SOURCES: ClassVar = {"a study": ("strength", "reveal")}

        strength: float = 1.0
        reveal: str = "random"

    entry = samplers._entry(Own)
    assert (entry.config, entry.summary, entry.paper) == (Own, "a sampler", "no paper")
    assert sorted(entry.defaults["a study"]) == ["reveal", "strength"]
    # The others are as the base classes tell, without the one that has another source now.
    assert entry.defaults["code of MaskGIT"] == ("schedule", "gumbel_temperature")
    assert "sigma" in entry.defaults["paper of APS"]

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Silent(Own):
        weight: float = 1.0

    with pytest.raises(TypeError, match=r"options of Silent differ: \['weight'\]"):
        samplers._entry(Silent)


@pytest.mark.parametrize(
    "name", [*sorted(set(contract.TOKENS) - {"maskgit", "mmada"}), "psld", "latent_daps"]
)
@pytest.mark.parametrize("evaluations", [16, 40, 120, 1000])
def test_budgets_are_used_up_and_never_exceeded(name, evaluations):
    start = SAMPLERS[name].config()
    config = budget.with_budget(start, evaluations, fixed=())
    cost = budget.decoder_evaluations(config)
    knob = config.KNOB
    assert evaluations / 2 <= cost <= evaluations
    # One more would be too many.
    more = dataclasses.replace(config, **{knob.name: getattr(config, knob.name) + 1})
    assert budget.decoder_evaluations(more) > evaluations
    changed = {knob.name, "num_steps"} if knob.scales_steps else {knob.name}
    for field in dataclasses.fields(config):
        if field.name not in changed:
            assert getattr(config, field.name) == getattr(start, field.name)
    if knob.scales_steps:
        fixed = budget.with_budget(
            dataclasses.replace(start, num_steps=2), evaluations, fixed=["num_steps"]
        )
        assert fixed.num_steps == 2
        assert budget.decoder_evaluations(fixed) <= evaluations


def test_impossible_budgets():
    with pytest.raises(ValueError, match="of 14 decoder evaluations is too small.*needs 15"):
        budget.with_budget(SAMPLERS["aps"].config(), 14)
    with pytest.raises(ValueError, match="too small for SMCConfig"):
        budget.with_budget(SAMPLERS["smc"].config(), 7)
    with pytest.raises(ValueError, match="decides num_candidates"):
        budget.with_budget(SAMPLERS["svdd_pm"].config(), 99, fixed=["num_candidates"])
    with pytest.raises(ValueError, match="it has no budget"):
        budget.with_budget(SAMPLERS["maskgit"].config(), 99)
    with pytest.raises(ValueError, match="it has no budget"):
        budget.with_budget(SAMPLERS["dps"].config(), 99)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param(name, options, id=f"{name}-{'-'.join(map(str, options.values()))}")
        for name, cases in CASES.items()
        for options in cases
    ],
)
def test_variants_keep_the_contract(name, options):
    contract.check(contract.smallest(name, **options))


@pytest.mark.parametrize("name", SAMPLERS)
def test_options_and_shapes_are_checked(name):
    config_class = SAMPLERS[name].config
    with pytest.raises(ValueError, match="sigma must be positive, got 0"):
        config_class(sigma=0)
    with pytest.raises(ValueError, match="num_samples must be an integer of at least 1"):
        config_class(num_samples=0)
    config = config_class(image_shape=[20, 16])
    assert config == config_class(image_shape=(20, 16)) and hash(config)
    with pytest.raises(ValueError, match=r"y has shape \(2, 4, 4, 3\).*\(2, 5, 4, 3\)"):
        samplers.sample(
            contract.params_of(name), jnp.zeros((2, 4, 4, 3)), jax.random.key(0), config=config
        )


BAD_OPTIONS = [
    ("maskgit", {"reveal": "best"}, "reveal is 'best'; choose from"),
    ("maskgit", {"remask_strength": 1.5}, r"remask_strength must be in \[0, 1\]"),
    ("maskgit", {"schedule": "cos"}, "schedule is 'cos'; choose from"),
    ("maskgit", {"prior_temperature": 0.0}, "prior_temperature must be positive"),
    ("best_of_n", {"num_candidates": 0}, "num_candidates must be an integer of at least 1"),
    ("straight_through", {"variables": "codes"}, "variables is 'codes'; choose from"),
    ("straight_through", {"measurement_term": "l2"}, "measurement_term is 'l2'; choose from"),
    ("straight_through", {"learning_rate": -1.0}, "learning_rate must be positive"),
    ("svdd_pm", {"selection": "best"}, "selection is 'best'; choose from"),
    ("svdd_pm", {"selection_temperature": 0.0}, "selection_temperature must be positive"),
    ("g2d2", {"transition": "stars"}, "transition is 'stars'; choose from"),
    ("g2d2", {"forget": 1.2}, r"forget must be in \[0, 1\]"),
    ("sgdd", {"method": "exact"}, "method is 'exact'; choose from"),
    ("sgdd", {"last_noise": 0.0}, "last_noise must be positive"),
    ("sgdd", {"first_noise": 1.5}, r"first_noise must be in \[0, 1\]"),
    ("sgdd", {"num_likelihood_steps": -1}, "num_likelihood_steps must be an integer of at least 0"),
    ("smc", {"weights": "even"}, "weights is 'even'; choose from"),
    ("smc", {"num_particles": 0}, "num_particles must be an integer of at least 1"),
    ("aps-smc", {"order": "any"}, "order is 'any'; choose from"),
    ("aps-smc", {"prior_share": 1.5}, r"prior_share must be in \[0, 1\]"),
    ("aps-smc", {"num_refinements": 16}, "num_refinements=16 is above num_steps=15"),
    ("entrgi", {"mixing": "both"}, "mixing is 'both'; choose from"),
    ("entrgi", {"temperature": 0.0}, "temperature must be positive"),
    ("redge", {"estimator": "st"}, "estimator is 'st'; choose from"),
    ("redge", {"num_diffusion_steps": 2}, "num_diffusion_steps must be an integer of at least 3"),
    ("g2d2", {"top_p": 0.0}, "top_p must be positive"),
    ("dps", {"measurement_term": "l1"}, "measurement_term is 'l1'; choose from"),
    (
        "dps",
        {"decode_scale": 2},
        "decode_scale is an option of samplers over tokens, and 'dps' is none",
    ),
    ("daps", {"learning_rate": 0.0}, "learning_rate must be positive"),
    ("daps", {"num_ode_steps": 0}, "num_ode_steps must be an integer of at least 1"),
    ("ddrm", {"eta_b": 1.5}, r"eta_b must be in \[0, 1\]"),
    ("diffpir", {"zeta": 1.5}, r"zeta must be in \[0, 1\]"),
]


@pytest.mark.parametrize(("name", "options", "message"), BAD_OPTIONS)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        SAMPLERS[name].config(**options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("straight_through", {"init_noise": 1e-6}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("aps", {"num_steps": 1, "draw": "categorical"}),
                ("g2d2", {"num_steps": 1}),
                ("redge", {"num_steps": 1}),
                ("entrgi", {"num_steps": 1, "num_trajectories": 1}),
                ("straight_through", {"init_noise": 1e-6, "variables": "tokens"}),
            ]
        ),
    ],
)
def test_every_gradient_sampler_can_start_from_the_encoder(name, options):
    """With a strong start and no learning, all samples are the codes of the smooth estimate."""
    params, side = contract.make_params(), contract.SIDE
    y = params.operator(contract.random_images())
    options = options | {"num_inner_steps": 1, "learning_rate": 1e-6, "num_samples": 2}
    config = SAMPLERS[name].config(**options, encoder_start=40.0)
    result = sample(params, y, jax.random.key(0), config=config)
    x = smooth_estimate(params.operator, y, image_shape=(side, side), sigma=config.sigma)
    np.testing.assert_array_equal(result.tokens, encode_tokens(params.codec, x).reshape(len(y), -1))
    np.testing.assert_allclose(result.samples[:, 0], result.samples[:, 1], atol=1e-6)
    plain = dataclasses.replace(config, encoder_start=0.0)
    other = sample(params, y, jax.random.key(0), config=plain)
    assert np.mean(np.asarray(other.tokens) == np.asarray(result.tokens)) < 0.6
