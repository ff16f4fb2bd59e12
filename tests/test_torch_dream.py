"""A converted Dream model against PyTorch: same logits, moved to the position they are about."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub import random_state, save_config
from test_convert_dream import CONFIG, run, tensor_shapes

from aps_jax import pretrained

torch = pytest.importorskip("torch", reason="needs pip install 'aps_jax[torch]'")
import torch_dream  # noqa: E402 (needs torch)

MASK = CONFIG["mask_token_id"]


def error(got, expected):
    """Largest difference relative to the largest value; the mask, no text, is left out."""
    got, expected = (np.delete(x, MASK, axis=-1) for x in (got, expected))
    assert got.shape == expected.shape and expected.std() > 0.05 * np.abs(expected).max()
    return np.abs(got - expected).max() / np.abs(expected).max()


def test_text_prior(tmp_path):
    oracle = torch_dream.Dream(CONFIG).eval()
    state = random_state(tensor_shapes(), seed=4)
    oracle.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    torch.save(oracle.state_dict(), tmp_path / "model.bin")
    save_config(tmp_path, CONFIG)
    assert run(tmp_path, tmp_path / "model", "--dtype", "float32", "--verify") == 0
    prior = pretrained.load_prior(tmp_path / "model", prompt_ids=[3, 4, 9])

    text = np.array([[[7, 50, 50, 21, 50]], [[50, 50, 8, 50, 30]]])
    ids = np.where(text == 50, MASK, text)[:, 0]
    got = jax.jit(prior.apply)(prior.params, jnp.asarray(text))[:, 0]
    with torch.no_grad():
        rows = np.concatenate([np.tile([3, 4, 9], (2, 1)), ids], axis=1)
        full = oracle(torch.tensor(rows)).numpy()
        alone = oracle(torch.tensor(ids)).numpy()
    assert error(got, full[:, 2:-1]) < 2e-5
    assert error(got, full[:, 3:]) > 0.1  # not shifted

    bare = pretrained.load_prior(tmp_path / "model")
    got = jax.jit(bare.apply)(bare.params, jnp.asarray(text))[:, 0]
    shifted = np.concatenate([alone[:, :1], alone[:, :-1]], axis=1)  # the first keeps its own
    assert error(got, shifted) < 2e-5
