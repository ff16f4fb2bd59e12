"""Judges of sentences, and the study that asks them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from aps_jax.io import rows
from aps_jax.samplers.budget import decoder_evaluations
from aps_jax.writing import load_writer
from experiments.studies import text_judges, text_methods, text_report, text_rewards

RESULTS = Path(text_rewards.__file__).parents[1] / "results" / "text_rewards"
TEXTS = ["good food .", "good food here .", "bad food .", "bad service .", "the food is good ."] * 2


def test_trigrams_are_a_law_and_follow_the_formula():
    model = text_judges.KneserNey(TEXTS)
    words = ["good", "food", "here", ".", "bad", "service", "the", "is", "<unk>", "</s>"]
    for before in (("good", "food"), ("never", "seen"), ("<s>", "<s>"), ("is", "good")):
        total = sum(model.probability((*before, word)) for word in words)
        assert total == pytest.approx(1)
    # By hand: after "<s> bad" come "food" and "service", twice each.
    lower = model.probability(("bad", "food"))
    expected = (2 - 0.75) / 4 + 0.75 * 2 / 4 * lower
    assert model.probability(("<s>", "bad", "food")) == pytest.approx(expected)
    # Below the highest order a word counts for the kinds of words before it.
    kinds = {(a, b) for text in TEXTS for a, b in _pairs(text)}
    share = sum(b == "food" for _, b in kinds) / len(kinds)
    lost = 0.75 * len({b for _, b in kinds}) / len(kinds)
    by_hand = share - 0.75 / len(kinds) + lost / (len(words))
    assert model.probability(("food",)) == pytest.approx(by_hand)
    nats, count = model.nats("good food .")
    assert count == 4 and model.perplexity(["good food ."]) == pytest.approx(math.exp(nats / 4))
    assert model.perplexity(["food good . the"]) > model.perplexity(["good food ."])


def _pairs(text):
    words = ["<s>", *text.split(), "</s>"]
    return zip(words, words[1:], strict=False)


def test_distinct_counts_kinds_of_pairs():
    assert text_judges.distinct(["a b c", "a b"]) == pytest.approx(2 / 3)
    assert text_judges.distinct(["a"]) == 0


def test_the_sentiment_judge_tells_labels_apart():
    texts = [f"{word} {thing} ." for word in ("good", "bad") for thing in ("food", "place")] * 3
    judge = text_judges.sentiment_judge(texts, [int("good" in text) for text in texts])
    chance = text_judges.positive_share(judge, ["good service .", "bad service ."])
    assert chance[0] > 0.5 > chance[1]


def test_the_surest_setting_that_is_not_too_surprising_is_taken():
    def row(method, setting, perplexity, reward, split="tuning"):
        return {"method": method, "setting": setting, "split": split}, {
            "perplexity": perplexity, "reward": reward,
        }  # fmt: skip

    found, scores = zip(
        row("no reward", {}, 100, -1.0),
        row("APS", {"learning_rate": 0.1}, 90, -0.8),
        row("APS", {"learning_rate": 0.3}, 119, -0.5),
        row("APS", {"learning_rate": 1.0}, 121, -0.1),
        row("SMC", {"weight": 1.0}, 130, -0.3),
        row("SMC", {"weight": 3.0}, 140, -0.1),
        row("APS", {"learning_rate": 9.0}, 90, -0.1, split="test"),
        strict=True,
    )
    assert text_rewards.chosen(found, scores, "APS") == {"learning_rate": 0.3}
    assert text_rewards.chosen(found, scores, "SMC") == {"weight": 1.0}


def test_every_method_has_the_same_number_of_reward_evaluations():
    for method, (_, _, settings) in text_methods.METHODS.items():
        for setting in settings:
            config = text_methods.config_of(method, setting)
            cost = decoder_evaluations(config)
            if method == text_methods.FEW_CALLS:
                assert config.evaluations().denoiser == 32 and cost < text_methods.BUDGET
                continue
            assert cost - text_methods.BUDGET in (0, 1) if config.KNOB else cost == 0, method


def test_intervals_are_those_of_means_over_beginnings(rng):
    """Lines of one beginning are alike here, so that their number brings nothing."""
    values = rng.normal(size=(24, 1)) * np.ones((24, 8))
    expected = 1.96 * values[:, 0].std() / 24**0.5
    assert text_report.half_width((values.ravel(),), 8) == pytest.approx(expected, rel=0.1)
    words = np.full(24 * 8, 7.0)
    found = text_report.half_width((7 * values.ravel(), words), 8, lambda a, b: np.exp(a / b))
    assert found == pytest.approx(np.exp(values.mean()) * expected, rel=0.15)


def test_the_committed_rows_are_those_of_the_embedded_model():
    arguments = text_rewards.Arguments(data=(), out=RESULTS)
    found = rows.read(arguments.out / "rows.jsonl", text_rewards.NEEDED)
    settings = {"tuning": sum(len(settings) for *_, settings in text_methods.METHODS.values())}
    for split in text_methods.SPLITS:
        own = [row for row in found if row["split"] == split]
        assert len(own) == settings.get(split, len(text_methods.METHODS)), split
        for row in own:
            row_of = (row["method"], row["setting"], split, arguments)
            assert row["fingerprint"] == text_rewards.fingerprint(*row_of), row_of
            assert len(row["lines"]) == len(text_methods.SPLITS[split]) * arguments.num_lines


@pytest.mark.slow
def test_a_smoke_run_writes_rows_a_table_and_a_plot(tmp_path):
    texts = {0: "the food was bad .", 1: "the food was good ."}
    for label, text in texts.items():
        (tmp_path / f"text.{label}").write_text(f"{text}\n" * 1000)
    out = tmp_path / "out"
    arguments = text_rewards.Arguments(data=(tmp_path,), out=out, smoke=True)
    assert text_rewards.main(arguments) == 0
    found = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert {row["split"] for row in found} == set(text_methods.SPLITS) and len(found) == 6
    writer = load_writer("lines32")
    for row in found:
        assert len(row["lines"]) == 4 and set(row["wanted"]) == {0, 1}
        ids = np.stack([writer.ids(line)[: arguments.length] for line in row["lines"]])
        assert ids.shape == (4, arguments.length)
    before = (out / "rows.jsonl").read_bytes()
    assert text_rewards.main(arguments) == 0
    assert (out / "rows.jsonl").read_bytes() == before
    assert (out / "frontier.png").stat().st_size and "perplexity" in (out / "table.md").read_text()
