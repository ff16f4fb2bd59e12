"""The kernel distance of samples to pictures."""

import numpy as np
import pytest

from experiments.train.prior_distance import Arguments, kernel_distance


def test_kernel_distance_is_that_of_the_moments():
    # Of numbers, the cubic kernel compares the first three moments: squared differences, 3, 3, 1.
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], (128 * 32, 1))  # moments 0, 1, 0
    bits = rng.choice([0.0, 1.0], (128 * 32, 1))  # moments 1/2, 1/2, 1/2
    distance, interval = kernel_distance(signs, bits)
    assert interval < 0.2
    assert abs(distance - (3 * 0.25 + 3 * 0.25 + 0.25)) < 2 * interval
    distance, interval = kernel_distance(signs, rng.permutation(signs))
    assert abs(distance) < 2 * interval < 0.2


def test_counts_that_make_no_blocks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="multiple of 32"):
        Arguments(model="face64", train=(tmp_path,), data=tmp_path, out=tmp_path, count=48)


def test_the_interval_is_that_of_student():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 4 * 32, 3))
    pieces = [
        kernel_distance(np.tile(a, (2, 1)), np.tile(b, (2, 1))).mean
        for a, b in zip(np.split(x, 4), np.split(y, 4), strict=True)
    ]
    found = kernel_distance(x, y)
    assert found.mean == pytest.approx(np.mean(pieces))
    assert found.half_width == pytest.approx(3.1824 * np.std(pieces, ddof=1) / 2, rel=1e-4)
