"""Edits and styles: what may change, the two commands on toy models, and their errors."""

import json

import flax.struct
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import NUM_CODES, mixing_prior, patch_codec

from aps_jax import cli, images, pretrained
from aps_jax import restore as host_loop
from aps_jax.cli import edit, stylize, wishes
from aps_jax.codec.magvit2 import encode_tokens
from aps_jax.sampling.edits import kept_tokens, part_target, whole_target
from aps_jax.scores.lpips import PerceptualUnavailable
from aps_jax.types import Energy, Features, bind

SIDE = 16


@pytest.fixture
def photo(rng):
    smooth = np.repeat(np.repeat(rng.uniform(-1, 1, (4, 4, 3)), 4, 0), 4, 1)
    return np.float32(images.from_uint8(images.to_uint8(smooth)))


@pytest.fixture
def mask():
    """Rows 5 to 9 and columns 6 to 12 are free: tokens in two rows and three columns."""
    mask = np.ones((SIDE, SIDE), np.float32)
    mask[5:10, 6:13] = 0
    return mask


def is_free():
    free = np.zeros((4, 4), bool)
    free[1:3, 1:4] = True
    return free.ravel()


# What may change.


def test_tokens_are_kept_where_no_pixel_is_free(photo, mask):
    codec = patch_codec()
    own = encode_tokens(codec, jnp.asarray(photo)[None]).reshape(-1)
    found = kept_tokens(codec, jnp.asarray(photo)[None], mask)[0]
    np.testing.assert_array_equal(found, np.where(is_free(), -1, own))


def test_tokens_at_edges_and_of_larger_decodings(photo, mask):
    """13 x 16 pixels twice as large are 7 x 8 tokens; of the last row half is past the edge."""
    found = kept_tokens(
        patch_codec(), jnp.asarray(photo[:13])[None], mask[:13], decode_scale=2
    ).reshape(7, 8)
    expected = np.zeros((7, 8), bool)
    expected[2:5, 3:7] = True
    np.testing.assert_array_equal(found < 0, expected)


def zero(params, data, x):
    return jnp.zeros(x.shape[0])


def test_energies_of_a_part_and_of_the_whole(photo, mask, rng):
    """Only pixels outside the mask are held; the whole is weighed per token."""
    codec, prior = patch_codec(), mixing_prior(window=4)
    x = jnp.asarray(photo)[None]
    other = np.float32(rng.uniform(-1, 1, photo.shape))
    image = jnp.asarray(other)[None]
    reward = Energy(apply=bind(lambda p, d, x: 3 + jnp.mean(x, axis=(1, 2, 3))))
    target = part_target(prior, codec, x, mask, reward=reward, sigma=0.2)
    square = np.sum(np.float64((other - photo) * mask[..., None]) ** 2)
    expected = square / 0.08 + 3 + other.mean()
    np.testing.assert_allclose(target.energy(image), [expected], rtol=1e-5)
    whole = whole_target(prior, codec, x, reward)
    np.testing.assert_allclose(whole.energy(image), [16 * (3 + other.mean())], rtol=1e-5)
    assert np.all(whole.tokens == NUM_CODES)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.ones((SIDE, SIDE)), "must free some"),
        (np.zeros((SIDE, SIDE)), "must free some"),
        (np.eye(8), "has shape"),
    ],
)
def test_masks_that_do_not_fit(photo, mask, words):
    with pytest.raises(ValueError, match=words):
        part_target(mixing_prior(), patch_codec(), jnp.asarray(photo)[None], mask)


# The commands.


@flax.struct.dataclass
class Brightness:
    """A classifier of toy pictures: bright, or red."""

    gain: float = 4.0
    names: tuple[str, ...] = flax.struct.field(pytree_node=False, default=("bright", "red"))

    def __call__(self, x):
        mean = jnp.mean(x, axis=(1, 2))
        return self.gain * jnp.stack([jnp.sum(mean, axis=-1), mean[:, 0]], axis=-1)


def powers(params, x):
    return (x * params, x**2, jnp.tanh(x), x**3, x)


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """The embedded models keep their cards and words, but compile at once."""
    card = {"prior": {"absolute_side": 4}}

    def load_pretrained(name, **options):
        toy = card if name == "face64" else {}
        return pretrained.Model(mixing_prior(window=4), patch_codec(), toy)

    monkeypatch.setattr(pretrained, "load_pretrained", load_pretrained)
    monkeypatch.setattr(edit, "load_attributes", Brightness)
    features = Features(params=jnp.float32(1), apply=bind(powers))
    monkeypatch.setattr(stylize, "_features", lambda: features)


@pytest.fixture
def files(tmp_path, photo, mask):
    images.save_image(tmp_path / "photo.png", photo)
    images.save_image(tmp_path / "large.png", np.repeat(np.repeat(photo, 2, 0), 2, 1))
    images.save_image(tmp_path / "mask.png", 2 * mask[..., None] - 1)
    images.save_image(tmp_path / "small.png", 2 * mask[:12, :12, None] - 1)
    images.save_image(tmp_path / "white.png", np.ones_like(mask)[..., None])
    (tmp_path / "words.png").write_text("no picture")
    return {path.stem: path for path in tmp_path.iterdir()} | {"tmp": tmp_path}


@pytest.fixture
def aps_jax(files, capsys):
    """Runs a command whose words name files in braces; gives exit code, folder and stderr."""

    def run(words, out="out"):
        out = files["tmp"] / out
        capsys.readouterr()
        code = cli.main([*words.format_map(files).split(), "--out", str(out)])
        return code, out, capsys.readouterr().err

    return run


def read(out):
    return json.loads((out / "result.json").read_text())


def test_edit_in_a_mask(aps_jax, photo, mask):
    words = "edit {photo} --mask {mask} --prompt smiling --num-steps 2"
    code, out, err = aps_jax(f"{words} --num-samples 2 --paste-known")
    assert code == 0 and err.startswith("sampling ")
    names = {path.relative_to(out).as_posix() for path in out.rglob("*.*")}
    assert names == {
        "edited.png", "comparison.png", "mask.png", "samples/sample_01.png",
        "samples/sample_02.png", "result.json",
    }  # fmt: skip
    samples = [images.load_image(out / f"samples/sample_0{i}.png") for i in (1, 2)]
    for sample in samples:
        np.testing.assert_allclose(sample[mask > 0], photo[mask > 0], atol=1e-6)
        assert np.abs(sample[mask == 0] - photo[mask == 0]).max() > 0.1
    assert np.any(samples[0] != samples[1])
    found = read(out)
    assert found["sampler"] == "maskgit" and found["config"]["guidance_scale"] > 0
    assert found["figures"]["edited"]["psnr_outside"] is None  # Equal: no decibels.
    assert "--paste-known" in found["command"] and "None" not in found["command"]
    plain = f"{words} --num-samples 2 --option data_consistency=0"
    code, out, _ = aps_jax(plain, "plain")
    drawn = images.load_image(out / "edited.png")
    again = patch_codec()
    tokens = encode_tokens(again, jnp.asarray(photo)[None])
    own = np.asarray(again.decode(again.params, again.quantizer.lookup(tokens)))[0]
    kept = ~is_free().reshape(4, 4).repeat(4, 0).repeat(4, 1)
    np.testing.assert_allclose(drawn[kept], own[kept], atol=1 / 127)
    # What the codec has lost comes back, and what is drawn is another picture than without.
    code, out, _ = aps_jax(f"{words} --num-samples 2", "consistent")
    found, outside = images.load_image(out / "edited.png"), mask > 0
    lost, still = (np.abs(x[outside] - photo[outside]).mean() for x in (drawn, found))
    assert lost > 0.1 and still < 0.5 * lost
    assert np.abs(found - drawn)[mask == 0].max() > 0.02


def test_a_reward_is_followed_and_a_likeness_holds(aps_jax):
    chances, changes = [], []
    for value, likeness in ((1, 0), (0, 0), (1, 1000)):
        words = f"edit {{photo}} --reward bright={value} --likeness {likeness} --guidance-scale 0"
        code, out, err = aps_jax(
            f"{words} --num-steps 2 --num-inner-steps 15 --reward-weight 50", f"out{len(changes)}"
        )
        assert code == 0, err
        row = read(out)["figures"]["edited"]
        chances.append(row[f"bright={value}"])
        changes.append(row["psnr"])
    assert chances[0] > 0.7 and chances[1] > 0.7
    assert changes[2] > changes[0] + 0.5


def test_stylize_follows_the_style_as_far_as_it_is_strong(aps_jax):
    rows = []
    for strength in (0, 20):
        words = f"stylize {{photo}} --style swirls --strength {strength} --num-inner-steps 15"
        code, out, err = aps_jax(f"{words} --num-steps 2", f"out{strength}")
        assert code == 0, err
        rows.append(read(out)["figures"]["stylized"])
    assert (out / "style.png").exists() and (out / "stylized.png").exists()
    assert rows[1]["style distance"] < 0.9 * rows[0]["style distance"]
    assert rows[1]["content distance"] > rows[0]["content distance"]


def test_stylize_can_decode_twice_as_large(aps_jax):
    code, out, err = aps_jax(
        "stylize {photo} --style swirls --preset fine --num-steps 1 --num-inner-steps 1"
    )
    assert code == 0, err
    assert read(out)["config"]["decode_scale"] == 2
    assert images.load_image(out / "stylized.png").shape == (16, 16, 3)


def test_the_temperature_of_the_prior_counts_in_an_edit(aps_jax):
    drawn = []
    for temperature in (1, 50):
        words = (
            f"edit {{photo}} --mask {{mask}} --prompt hat --option prior_temperature={temperature}"
        )
        code, out, err = aps_jax(words, f"out{temperature}")
        assert code == 0, err
        drawn.append(images.load_image(out / "edited.png"))
    assert np.any(drawn[0] != drawn[1])


def test_an_interrupted_edit_goes_on(aps_jax, monkeypatch):
    words = "edit {photo} --mask {mask} --prompt smiling --num-steps 4"
    code, whole, _ = aps_jax(words, "whole")
    advance, steps = host_loop._Loop.advance, []

    def stop(loop):
        if len(steps) == 2:
            raise KeyboardInterrupt
        steps.append(advance(loop))

    with monkeypatch.context() as patch:
        patch.setattr(host_loop._Loop, "advance", stop)
        code, out, err = aps_jax(words)
    assert code == 130 and "continue with: aps-jax edit" in err and "--resume" in err
    code, _, err = aps_jax(words.replace("smiling", "hat") + " --resume")
    assert code == 2 and "another run" in err
    assert aps_jax(words + " --resume")[0] == 0
    assert (out / "edited.png").read_bytes() == (whole / "edited.png").read_bytes()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("edit {photo}", "nothing is wished for"),
        ("edit {photo} --prompt grinning", "'grinning' in a prompt; it knows: bald, bangs"),
        ("edit {photo} --prompt hat --negative cap", "'cap' in a prompt; it knows"),
        ("edit {photo} --mask {white} --prompt hat", "misses no pixel"),
        ("edit {photo} --mask {small} --prompt hat", "12x12 pixels, the picture 16x16"),
        ("edit {large} --prompt hat", "add --size 16"),
        ("edit {photo} --prompt hat --paste-known", "--paste-known needs a --mask"),
        ("edit {photo} --prompt hat --option data_consistency=0.1", "is for edits with a --mask"),
        (
            "stylize {photo} --style swirls --option data_consistency=1",
            "is for edits with a --mask",
        ),
        ("edit {photo} --prompt hat --option sigma=0.3", "--option sigma is of measurements"),
        ("edit {photo} --prompt hat --mask {mask} --sampler aps-l", "pictures of one size only"),
        ("edit {photo} --prompt hat --preset fine", "pictures of one size only"),
        ("edit {photo} --prompt hat --mask {mask} --likeness 1", "--likeness is for edits without"),
        ("edit {photo} --reward dim=1", "unknown attribute 'dim'; choose from bright, red"),
        ("edit {photo} --reward bright", "must be NAME=1"),
        ("edit {photo} --reward bright=1 --reward-weight -1", "--reward-weight must be"),
        ("edit {photo} --prompt hat --reward-weight 2", "--reward-weight is that of a --reward"),
        ("edit {photo} --reward bright=1 --guidance-scale 2", "--guidance-scale is of words"),
        ("edit {photo} --negative hat --guidance-scale 0", "--negative is read by guidance alone"),
        ("edit {large} --size 16 --mask {small} --prompt hat", "12x12 pixels, the picture 32x32"),
        ("edit {photo} --mask {mask} --reward bright=1 --sampler maskgit", "prior alone"),
        ("stylize {photo} --style swirls --sampler maskgit", "so no style, reward or likeness"),
        ("stylize {photo} --style swirls --size 12", "--size must be at least 16 for features"),
        ("edit {photo} --reward bright=1 --sampler apss", "unknown sampler 'apss'"),
        ("stylize {photo} --style {words}", "words.png"),
        ("stylize {photo} --style swirl", "no style 'swirl': neither a file nor one of mosaic"),
        ("stylize {photo} --style swirls --style-size 3", "--style-size must be at least 16"),
        ("stylize {photo} --style swirls --prompt hat", "reads no text; leave out --prompt"),
        ("stylize {photo} --style swirls --size 99", "--size must be from"),
    ],
)
def test_errors_are_one_line(aps_jax, words, parts):
    code, out, err = aps_jax(words)
    assert code == 2 and err.startswith("aps-jax: error: ") and err.count("\n") == 1, err
    assert parts in err and not out.exists()


def load_lpips():
    raise PerceptualUnavailable("no weights; get them")


_features = stylize._features  # Before `toys` replaces it.


def test_blank_words_are_refused():
    with pytest.raises(ValueError, match="--prompt has no words"):
        wishes.check(wishes.Edit(image="x", prompt=" "))


def test_words_count_where_there_are_some():
    def guidance(**options):
        return wishes.guidance_of(wishes.Edit(image="x", **options))

    assert guidance(prompt="hat") == guidance(negative="hat") == wishes.GUIDANCE
    assert guidance(reward=("hat=1",)) is guidance(prompt="hat", guidance_scale=0.0) is None
    assert guidance(prompt="hat", guidance_scale=1.5) == 1.5


def test_styles_need_weights(aps_jax, monkeypatch):
    monkeypatch.setattr(stylize, "_features", _features)
    monkeypatch.setattr(stylize, "load_lpips", load_lpips)
    code, _, err = aps_jax("stylize {photo} --style swirls")
    assert code == 2 and "no weights; get them" in err


def test_styles_of_the_package():
    assert set(stylize.STYLES) == {"swirls", "mosaic", "woodcut"}
    for name in stylize.STYLES:
        path = stylize.style_path(name)
        assert images.load_image(path).std() > 0.2 and path.stat().st_size < 40_000


def test_samplers_are_chosen_by_what_there_is_to_follow():
    def chosen(**options):
        return wishes.sampler_name(wishes.Edit(image="x", **options))

    assert chosen(mask="m", prompt="hat") == "maskgit"
    assert chosen(mask="m", reward=("hat=1",)) == "best_of_n"
    assert chosen(prompt="hat") == chosen(reward=("hat=1",)) == "aps"
    assert chosen(mask="m", sampler="smc") == "smc"
