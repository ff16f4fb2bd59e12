"""Rules of which tokens are fixed when, and the tables of the study that compares them."""

import jax.numpy as jnp
import numpy as np
import pytest

from aps_jax import schedules
from aps_jax.io import rows
from aps_jax.sampling import remasking
from experiments.studies import schedule_report, schedule_rules
from experiments.studies import schedules as study
from experiments.studies.schedule_rules import Rule, Shadow, changes, numbers, select

SCORES = jnp.log(jnp.asarray([[0.95, 0.2, 0.7, 0.6, 0.4]]))
IS_MASKED = jnp.asarray([[True, True, True, True, False]])
INFORMED = jnp.asarray([[0.0, 1.0, 0.0, 1.0, 1.0]])


def chosen(rule, step):
    found = select(numbers(rule, 4, 5), SCORES, IS_MASKED, jnp.int32(step), INFORMED)
    return np.flatnonzero(found[0]).tolist()


@pytest.mark.parametrize("step", range(4))
def test_counts_and_thresholds_are_those_of_the_sampler(step):
    count = remasking.select_by_count(
        SCORES, IS_MASKED, int(schedules.masked_counts("cosine", 4, 5)[step])
    )
    assert chosen(Rule(kind="count"), step) == np.flatnonzero(count[0]).tolist()
    limit = 0.65 * float(schedules.cosine_thresholds(4)[step])
    above = remasking.select_by_threshold(SCORES, IS_MASKED, limit)
    assert chosen(Rule(kind="threshold", threshold=0.65), step) == np.flatnonzero(above[0]).tolist()


def test_fixed_thresholds_end_with_everything():
    rule = Rule(kind="threshold", schedule="fixed", threshold=0.65)
    assert [chosen(rule, step) for step in range(4)] == [[0, 2]] * 3 + [[0, 1, 2, 3]]


def test_measured_tokens_come_first_or_last():
    assert chosen(Rule(kind="count", schedule="linear", bonus=1000), 1) == [1, 3]
    assert chosen(Rule(kind="count", schedule="linear", bonus=-1000), 1) == [0, 2]


def test_shares_of_what_is_measured():
    """A third is held by what is clean; tokens without any come free of cost."""

    def kept(share):
        found = schedule_rules.select_by_information(SCORES, IS_MASKED, INFORMED, share)
        return np.flatnonzero(found[0]).tolist()

    assert [kept(share) for share in (0.0, 0.4, 0.7, 1.0)] == [[0], [0, 2], [0, 2, 3], [0, 1, 2, 3]]


def test_changes_count_tokens_whose_last_proposal_differs():
    proposals = np.array([[[1, 2, 3]], [[1, 5, 3]], [[1, 5, 4]]])
    anchors = np.array([[[True, True, False]], [[False, False, True]], [[False] * 3]])
    found = changes(Shadow(proposals, np.ones_like(anchors), anchors, ~anchors))
    np.testing.assert_allclose(found["anchors"], [[0.5, 1.0, np.nan]])
    np.testing.assert_allclose(found["all open"], [[2 / 3, 1 / 3, 0.0]])


def test_tables_choose_a_rule_by_task():
    plan = study.load(study.CONFIG)
    made = [
        {"split": split, "task": task, "rule": rule, "image": str(image),
         "psnr": 20.0 + image + 0.1 * (rule == "linear counts"), "lpips": 0.2}
        for split in ("test", "tuning") for task in plan.tasks for rule in plan.rules
        for image in range(3)
    ]  # fmt: skip
    made += [
        {"split": "shadow", "task": "box 32x32", "rule": "anchors", "image": str(image),
         "anchors": [0.1, 0.0], "standard": [0.2, 0.0], "all open": [0.3, float("nan")]}
        for image in range(3)
    ]  # fmt: skip
    text = schedule_report.tables(plan, made)
    assert "| linear counts | +0.10 | +0.10 ± 0.00; +0.000 ± 0.000 |" in text
    assert "10 ± 0" in text and "30 ± 0" in text


def test_the_committed_table_is_that_of_the_committed_rows():
    folder = study.CONFIG.parents[1] / "results" / "schedules"
    found = rows.read(folder / "rows.jsonl", study.NEEDED)
    assert (
        schedule_report.tables(study.load(study.CONFIG), found) == (folder / "table.md").read_text()
    )
