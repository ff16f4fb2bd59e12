"""The study of what the quantized expectation leaves of a posterior, on its own small problems."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from experiments.studies import approximation, toy_priors


def test_problems_differ_in_their_fold_only_and_have_the_posterior_of_bayes():
    arguments = approximation.Arguments(num_measurements=2)
    linear, folded = (approximation.make_problem(4, fold, 1, arguments) for fold in (0.0, 1.0))
    np.testing.assert_array_equal(linear.marginals, folded.marginals)
    codes = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1.0]])[toy_priors.fields(4, 2)]
    x = np.tanh(codes.reshape(16, 4) @ np.float64(linear.params.codec.params))
    y = x @ np.float64(linear.params.operator.params["matrix"])
    for problem, predicted in ((linear, y), (folded, np.abs(y))):
        density = stats.norm.pdf(problem.y[:, None], predicted, 0.5).prod(axis=-1)
        law = density * np.outer(*problem.marginals).ravel()
        law /= law.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(problem.posterior, law, atol=1e-5)


def test_distances_add_up(rng):
    """KL of a product: that of the tokens, and the mutual information, which no product has."""
    exact = rng.dirichlet(np.ones(9), size=2)
    law = rng.dirichlet(np.ones(3), size=(2, 2))
    found = approximation.distances(exact, np.log(law))
    for n in range(2):
        own = [exact[n].reshape(3, 3).sum(axis=1), exact[n].reshape(3, 3).sum(axis=0)]
        tokens = [stats.entropy(own[at], law[n, at]) for at in range(2)]
        information = stats.entropy(exact[n], np.outer(*own).ravel())
        assert found["kl_token"][n] == pytest.approx(np.mean(tokens))
        assert found["kl_joint"][n] == pytest.approx(sum(tokens) + information)
        far = [np.abs(own[at] - law[n, at]).sum() / 2 for at in range(2)]
        assert found["tv_token"][n] == pytest.approx(np.mean(far))


@pytest.mark.slow
def test_the_mean_field_has_the_least_exact_bound(tmp_path):
    """Of E_q energy + KL(q || prior) by enumeration, which is what APS's objective stands for."""
    arguments = approximation.Arguments(out=tmp_path)
    problem = approximation.make_problem(8, 0.0, 0, arguments)
    prior = np.outer(*problem.marginals).ravel()
    best = -np.log((prior * np.exp(-problem.energies)).sum(axis=1))  # No law is below that.
    laws = approximation.fitted(problem, arguments)

    def bound(log_law):
        q = np.exp(np.float64(log_law[:, 0, :, None] + log_law[:, 1, None, :])).reshape(4, -1)
        return [
            row @ e + stats.entropy(row, prior) for row, e in zip(q, problem.energies, strict=True)
        ]

    least = bound(laws["mean energy, KL to the prior (mean field)"])
    assert np.all(least > best - 1e-3)
    for law in laws.values():
        assert np.mean(least) <= np.mean(bound(law)) + 0.02
    assert approximation.main(approximation.Arguments(out=tmp_path, smoke=True)) == 0
    assert "linear, 2 codes" in (tmp_path / "table.md").read_text()


def test_the_committed_rows_give_the_committed_table(tmp_path, monkeypatch):
    monkeypatch.setattr(approximation, "plot", lambda *args: None)
    committed = Path(approximation.__file__).parents[1] / "results/approximation"
    shutil.copy(committed / "rows.jsonl", tmp_path)
    assert approximation.main(approximation.Arguments(out=tmp_path, table=True)) == 0
    assert (tmp_path / "table.md").read_text() == (committed / "table.md").read_text()
    assert approximation.main(approximation.Arguments(out=tmp_path / "none", table=True)) == 2
