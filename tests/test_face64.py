"""The embedded face model: what it takes, what prompts and absolute positions do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aps_jax
from aps_jax import cli, pretrained
from aps_jax.io import checkpoint


@pytest.fixture(scope="module")
def model():
    return aps_jax.load_pretrained("face64")


def logits_of(prior):
    return jax.jit(prior.apply)(prior.params, jnp.full((1, 16, 16), prior.num_codes))


def test_it_knows_where_it_is_when_everything_is_masked(model):
    """A prior without absolute positions gives the same distribution everywhere."""
    log_probs = jax.nn.log_softmax(logits_of(model.prior)[0], axis=-1).reshape(256, -1)
    mean = jax.nn.logsumexp(log_probs, axis=0) - np.log(256)
    information = jnp.mean(jnp.sum(jnp.exp(log_probs) * (log_probs - mean), axis=-1))
    assert information > 0.3  # nats that the place of a token says about it


def test_prompts_go_through_the_code_of_the_large_models(model):
    pytest.importorskip("tokenizers")
    prompted = aps_jax.load_pretrained("face64", prompt="Smiling, eyeglasses").prior
    assert prompted.params["prompt"].shape == (2,)
    assert prompted.params["uncond_prompt"].shape == (0,)
    plain = jax.jit(prompted.apply_unconditional)(prompted.params, jnp.full((1, 16, 16), 8192))
    np.testing.assert_allclose(plain, logits_of(model.prior), atol=1e-3)
    assert np.abs(logits_of(prompted) - plain).max() > 0.1


def test_words_that_it_lacks_end_in_one_line_with_those_it_has(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    words = ["restore", "--model", "face64", "--prompt", "grinning man", "--out", str(tmp_path)]
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "'grinning'" in err and "smiling" in err
    assert "unknown" not in err


def test_it_takes_pictures_of_its_own_size_only(model):
    with pytest.raises(ValueError, match="whole pictures of 16x16 tokens.*got 32x32 tokens"):
        model.prior.apply(model.prior.params, jnp.full((1, 32, 32), 8192))


def test_the_embedded_models_stay_small_and_say_under_what_terms():
    folders = [pretrained.model_folder(name) for name in pretrained.EMBEDDED_MODELS]
    assert sum(file.stat().st_size for folder in folders for file in folder.iterdir()) < 40e6
    card = checkpoint.read_card(pretrained.model_folder("face64"))
    assert "non-commercial" in card["licence"] and card["known_failures"]
