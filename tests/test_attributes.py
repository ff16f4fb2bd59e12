"""The network of face attributes: what it says, what it refuses, and what its training does."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aps_jax
from aps_jax import images
from aps_jax.io import checkpoint
from aps_jax.text import tokenizer
from experiments.train import attributes as training


@pytest.fixture(scope="module")
def net():
    return aps_jax.load_attributes()


def test_it_sees_the_smile_and_its_gradient_leads_to_less_of_it(net):
    """One compilation; larger pictures of the face give the logits of the face itself."""
    face = jnp.asarray(images.sample_photo("face"))[None]
    place = net.index("smiling")

    @jax.jit
    def smile(net, x):
        larger = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return net(x), jax.grad(lambda x: jnp.sum(net(x)[:, place]))(x), net(larger)

    logits, gradient, of_larger = smile(net, face)
    assert logits.shape == (1, len(net.names)) and logits.dtype == jnp.float32
    assert logits[0, place] > 1 and logits[0, net.index("eyeglasses")] < -1
    step = 2 * gradient / jnp.linalg.norm(gradient)
    assert smile(net, face - step)[0][0, place] < logits[0, place] - 1
    # The smile is at the mouth: what changes it is rather below the eyes than above them.
    strength = jnp.sum(gradient**2, axis=(0, 2, 3))
    assert jnp.sum(strength[32:]) > 2 * jnp.sum(strength[:24])
    np.testing.assert_allclose(of_larger, logits, atol=0.5)


def test_every_attribute_has_its_words_in_the_prompts(net):
    pytest.importorskip("tokenizers")
    words = tokenizer.load_tokenizer(aps_jax.pretrained.model_folder("face64"))
    for name in net.names:
        words.encode(name.replace("_", " "))


def test_what_cannot_be_asked_is_said_in_one_line(net, tmp_path):
    with pytest.raises(ValueError, match="unknown attribute 'smile', did you mean 'smiling'"):
        net.index("smile")
    with pytest.raises(ValueError, match=r"square faces.*\(1, 64, 48, 3\)"):
        net(jnp.zeros((1, 64, 48, 3)))
    with pytest.raises(checkpoint.CheckpointError, match="no card.json"):
        aps_jax.load_attributes(tmp_path)
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(checkpoint.CheckpointError, match="AttributesConfig"):
        aps_jax.load_attributes(tmp_path)


def test_scores_are_those_of_their_definitions():
    logits = np.array([[3.0], [1.0], [-1.0], [2.0]])
    labels = np.array([[True], [True], [False], [False]])
    found = training.scores_of(logits, labels)
    assert found["accuracy"] == [0.75] and found["balanced_accuracy"] == [0.75]
    assert found["auc"] == [0.75]  # Of four pairs one, 1 against 2, is the wrong way round.
    assert training.area_under_curve(np.zeros(4), labels[:, 0]) == 0.5
    rare = np.repeat([True, False], [1, 9])[:, None]
    np.testing.assert_allclose(training.positive_weights(rare), 3, rtol=1e-5)


def test_labels_are_read_by_name_and_sign(tmp_path):
    columns = [column.removeprefix("-") for column in training.ATTRIBUTES.values()]
    path = tmp_path / "attributes.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", *columns])
        writer.writerow(["b.jpg", *(int(name == "Smiling") for name in columns)])
        writer.writerow(["a.jpg", *(int(name == "No_Beard") for name in columns)])
    labels = training.read_labels(path, ["a.jpg", "b.jpg"])
    names = np.array(list(training.ATTRIBUTES))
    assert list(names[labels[0]]) == [] and list(names[labels[1]]) == ["smiling", "beard"]
    with pytest.raises(ValueError, match="no row for c.jpg"):
        training.read_labels(path, ["c.jpg"])


@pytest.mark.slow
def test_a_training_leaves_a_network_that_loads(tmp_path):
    faces = tmp_path / "faces"
    faces.mkdir()
    rng = np.random.default_rng(0)
    columns = [column.removeprefix("-") for column in training.ATTRIBUTES.values()]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", *columns])
        for number in range(8):
            images.save_image(faces / f"{number}.png", rng.uniform(-1, 1, (64, 64, 3)))
            writer.writerow([f"{number}.png", *rng.integers(0, 2, len(columns))])

    def config(out, steps):
        return training.Config(
            data=(faces,), eval_data=faces, attributes=tmp_path / "a.csv", out=tmp_path / out,
            first=1, last=8, steps=steps, batch_size=4, eval_every=2,
            save_every=1, num_eval=8, warmup=1, eval_shrink=1,
        )  # fmt: skip

    training.train(config("whole", 4))
    whole = (tmp_path / "whole/model/attributes.safetensors").read_bytes()
    training.train(config("whole", 4))  # Nothing is left to do.
    assert (tmp_path / "whole/model/attributes.safetensors").read_bytes() == whole
    net = aps_jax.load_attributes(tmp_path / "whole/model")
    assert net.names == tuple(training.ATTRIBUTES)
