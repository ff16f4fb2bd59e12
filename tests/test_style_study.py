"""The study of styles: equal gradients, how its table pairs, and a whole run on toy networks."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mixing_prior, patch_codec

import aps_jax
from aps_jax import energies, images, pretrained
from aps_jax.cli import wishes
from aps_jax.io import rows
from aps_jax.sampling.edits import whole_target
from aps_jax.types import Features, Perceptual, bind
from experiments.studies import style_methods, style_report, styles


def test_the_study_paints_as_the_command_does():
    ours, painted = style_methods.config_of(), wishes.Stylize(image=Path("x"), style="swirls")
    assert ours == wishes.config_of(painted)
    codes = [method for method in style_methods.METHODS.values() if method.moves == "codes"]
    assert [method.rates for method in codes] == [(ours.learning_rate,)] * 2


def powers(params, x):
    return (x * params, x**2, jnp.tanh(x), x**3, x)


def test_pixels_descend_to_what_the_energy_wants(rng):
    """With the content of another picture alone, the pixels become that picture."""
    features = Features(params=jnp.float32(1), apply=bind(powers))
    x, other = (jnp.asarray(rng.uniform(-0.5, 0.5, (2, 16, 16, 3)), jnp.float32) for _ in "ab")
    content = energies.content(features, other)
    target = whole_target(mixing_prior(window=4), patch_codec(), x, content)
    found = style_methods.descended(target, x, jnp.float32(0.05), num_gradients=80)
    assert jnp.max(jnp.abs(found - other)) < 0.1 < jnp.max(jnp.abs(x - other))


def row_of(method, image, style, strength, **values):
    return {
        "split": "test", "method": method, "rate": 0.1, "style": style, "strength": strength,
        "image": image, "style distance": 0.2, "content": 0.3, "LPIPS": 0.4, "seconds": 1.0,
    } | values  # fmt: skip


def test_the_table_pairs_photos_over_styles():
    first, *_, last = style_methods.METHODS
    found = [row_of(first, f"{n}", style, 1.0) for n in range(3) for style in ("a", "b")]
    found += [
        row_of(last, f"{n}", style, 1.0, LPIPS=0.4 + 0.1 * n + (0.2 if style == "a" else 0))
        for n in range(3)
        for style in ("a", "b")
    ]
    found.append(row_of(first, "0", "a", 0.2, split="tuning"))
    lines = style_report.table(found).splitlines()
    assert lines[0] == "### strength 1" and len(lines) == 6
    cells = [cell.strip() for cell in lines[5].strip("|").split("|")]
    assert cells[:3] == [last, "3", "2"]
    # Means over the styles are 0.5, 0.6 and 0.7: 4.303 * 0.1 / sqrt(3).
    assert cells[5] == "0.600 ± 0.248" and cells[8] == "+0.200 ± 0.248"


def test_rates_are_those_of_the_least_energy():
    name = list(style_methods.METHODS)[-1]
    low, *_, high = style_methods.METHODS[name].rates
    found = [
        row_of(name, "0", "a", 1.0, split="tuning", rate=low, content=1.0),
        row_of(name, "0", "a", 1.0, split="tuning", rate=high, content=0.9),
        row_of(name, "0", "a", 1.0, rate=low, content=0.0),
    ]
    assert styles.chosen_rate(name, found) == high


@pytest.mark.slow
def test_a_tiny_run_leaves_rows_table_and_pictures(tmp_path, monkeypatch, rng):
    data, out = tmp_path / "photos", tmp_path / "out"
    for n in range(4):
        images.save_image(data / f"{n}.png", rng.uniform(-1, 1, (32, 32, 3)))
    toy = pretrained.Model(mixing_prior(window=4), patch_codec(), {})
    monkeypatch.setattr(aps_jax, "load_pretrained", lambda name: toy)
    features = Features(params=jnp.float32(1), apply=bind(powers))
    monkeypatch.setattr(styles, "vgg_features", lambda perceptual: features)
    distance = bind(lambda params, a, b: jnp.mean((a - b) ** 2, axis=(1, 2, 3)))
    perceptual = Perceptual(params=jnp.float32(1), apply=distance)
    monkeypatch.setattr(aps_jax, "load_lpips", lambda: perceptual)
    arguments = styles.Arguments(out=out, data=data, size=16, smoke=True)
    assert styles.main(arguments) == 0
    log = (out / "rows.jsonl").read_bytes()
    found = rows.read(out / "rows.jsonl", styles.NEEDED)
    tried = sum(len(m.rates) for m in style_methods.METHODS.values() if len(m.rates) > 1)
    test = [row for row in found if row["split"] == "test"]
    assert len(found) == tried + len(style_methods.METHODS) + len(style_report.UNTOUCHED)
    photo = next(row for row in test if row["method"] == "photo")
    assert photo["content"] == photo["LPIPS"] == 0
    assert {row["image"] for row in test}.isdisjoint(
        row["image"] for row in found if row["split"] == "tuning"
    )
    for name in ("table.md", "frontier.png", "grid.png"):
        assert (out / name).stat().st_size > 100
    assert styles.main(arguments) == 0
    assert (out / "rows.jsonl").read_bytes() == log
    assert styles.main(styles.Arguments(out=tmp_path / "new", table=True)) == 2
    assert np.isfinite([row["seconds"] for row in found]).all()
