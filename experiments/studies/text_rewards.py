"""Steering a text model by a reward: every sampler at equal reward evaluations.

    python -m experiments.text_rewards --data TEXTS [--out experiments/results/text_rewards]

Lines begin with given words and are to be positive, or negative. Every setting of every method
(`experiments.studies.text_methods`) is run on prompts of tuning. Of each method the setting whose
lines the reward likes best is run on the prompts of the test, left out what surprises the trigram
model too much; and on beginnings that say the contrary of what is wanted, which a sample of the
prior seldom makes good. What is reported is said by judges that share nothing with model and reward
(`experiments.studies.text_judges`); the choice of a setting has seen only that limit. A run may be
killed; the same command goes on.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

import aps_jax
from aps_jax.io import rows as rows_of
from aps_jax.io.checkpoint import fingerprint as file_digest
from aps_jax.io.files import write_atomically
from aps_jax.pretrained import model_folder
from aps_jax.samplers import sample_target
from aps_jax.writing import Writer, load_writer
from experiments import lines
from experiments.bench.identity import described, digest
from experiments.command import command
from experiments.studies import text_judges
from experiments.studies.text_methods import LABELS, LIMIT, METHODS, SPLITS, config_of
from experiments.studies.text_report import Looks, differences, examples, means, plot, table

#: Prompts that are drawn together.
PIECE = 8
#: What a row must have.
NEEDED = ("method", "setting", "split", "lines", "fingerprint", "version")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Command line.

    Attributes:
      data: files or folders of lines whose part "judge" the judges are made of.
      model: language model and reward.
      out: folder of the rows, the tables and the plot.
      num_lines: lines per prompt and label.
      length: tokens of a line, its end included.
      seed: of the samples.
      table: only rewrite tables and plot from existing rows.
      smoke: a tiny run of two methods that proves that everything works.
    """

    data: tuple[Path, ...]
    model: str = "lines32"
    out: Path = Path("experiments/results/text_rewards")
    num_lines: int = 8
    length: int = 16
    seed: int = 0
    table: bool = False
    smoke: bool = False


def fingerprint(method: str, setting: dict[str, Any], split: str, arguments: Arguments) -> str:
    """Names what decides a row."""
    said = described(METHODS[method][0], config_of(method, setting))
    folder = model_folder(arguments.model)
    weights = [file_digest(folder / f"{name}.safetensors") for name in ("prior", "classifier")]
    facts = [arguments.num_lines, arguments.length, arguments.seed, setting.get("weight")]
    return digest([said, [*facts, SPLITS[split], *weights]])


def write(
    writer: Writer, method: str, setting: dict[str, Any], split: str, arguments: Arguments
) -> dict[str, Any]:
    """The row of one setting: lines in the order of label, prompt and number."""
    pairs = SPLITS[split]
    if arguments.smoke:
        pairs = [pairs[0], pairs[-1]]
    config, seconds, drawn = config_of(method, setting), 0.0, []
    # Pieces of one size share a compilation; the time of the last one has none, if it is not alone.
    for number, first in enumerate(range(0, len(pairs), PIECE)):
        labels, prompts = zip(*pairs[first : first + PIECE], strict=True)
        target = writer.target(
            labels, prompt=prompts, num_lines=arguments.num_lines,
            weight=setting.get("weight", 1.0), length=arguments.length,
        )  # fmt: skip
        key = jax.random.fold_in(jax.random.key(arguments.seed), number)
        began = time.perf_counter()
        drawn.append(writer.settled(_draw(target, key, config).tokens))
        seconds = time.perf_counter() - began
    tokens = np.concatenate(drawn)
    wanted = np.repeat([LABELS.index(label) for label, _ in pairs], arguments.num_lines)
    chances = np.asarray(writer.reward.probabilities(jnp.asarray(tokens)))
    columns = np.asarray([writer.reward.names.index(label) for label in LABELS])
    own = chances[np.arange(len(tokens)), columns[wanted]]
    return {
        "method": method,
        "setting": setting,
        "split": split,
        "fingerprint": fingerprint(method, setting, split, arguments),
        "version": aps_jax.__version__,
        "evaluations": config.evaluations()._asdict(),
        "seconds": round(seconds, 2),
        "reward": [round(float(np.log(chance)), 4) for chance in own],
        "wanted": wanted.tolist(),
        "lines": writer.lines(tokens),
    }


_draw = jax.jit(lambda target, key, config: sample_target(target, key, config=config))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judges:
    """What looks at finished lines: a classifier of positive lines, and a trigram model."""

    sentiment: Any
    trigrams: text_judges.KneserNey

    def looks(self, row: dict[str, Any]) -> Looks:
        """What reward and judges say of every line of a row."""
        wanted, texts = np.asarray(row["wanted"]), row["lines"]
        positive = text_judges.positive_share(self.sentiment, texts) > 0.5
        nats, words = zip(*(self.trigrams.nats(text) for text in texts), strict=True)
        return Looks(
            reward=np.asarray(row["reward"]),
            judged=(positive == (wanted == LABELS.index("positive"))).astype(float),
            nats=np.asarray(nats),
            words=np.asarray(words, float),
            texts=texts,
        )


def make_judges(arguments: Arguments) -> Judges:
    """Judges trained on part "judge" of the data."""
    part = lines.read_lines(arguments.data, "judge")
    texts = [line.text for line in part]
    labels = [line.label for line in part]
    return Judges(
        sentiment=text_judges.sentiment_judge(texts, labels), trigrams=text_judges.KneserNey(texts)
    )


def yardstick(judges: Judges, arguments: Arguments) -> str:
    """What the judges say of lines of people that nothing here was trained on."""
    held_out = lines.read_lines(arguments.data, "held_out")
    texts = [line.text for line in held_out]
    positive = text_judges.positive_share(judges.sentiment, texts) > 0.5
    right = np.mean(positive == np.asarray([line.label == 1 for line in held_out]))
    some = np.random.default_rng(0).permutation(len(texts))
    some = [texts[index] for index in some[: len(SPLITS["test"]) * arguments.num_lines]]
    return (
        f"{len(texts)} held-out lines of people: judged right {100 * right:.1f} %, perplexity "
        f"{judges.trigrams.perplexity(texts):.0f}, distinct-2 of as many as the test has "
        f"{text_judges.distinct(some):.2f}.\n"
    )


def _same(row: dict[str, Any], arguments: Arguments) -> bool:
    if row["method"] not in METHODS:
        return False
    own = fingerprint(row["method"], row["setting"], row["split"], arguments)
    return (row["fingerprint"], row["version"]) == (own, aps_jax.__version__)


def _find(
    rows: list[dict[str, Any]], method: str, split: str, setting: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    return [
        row for row in rows
        if (row["method"], row["split"]) == (method, split)
        and (setting is None or row["setting"] == setting)
    ]  # fmt: skip


def chosen(
    rows: list[dict[str, Any]], scores: list[dict[str, float]], method: str
) -> dict[str, Any]:
    """The setting of a method for the test, by its lines on the prompts of `TUNING`."""
    plain = next(s for row, s in zip(rows, scores, strict=True)
                 if (row["method"], row["split"]) == ("no reward", "tuning"))  # fmt: skip
    limit = LIMIT * plain["perplexity"]
    tuned = [
        (score, row["setting"])
        for row, score in zip(rows, scores, strict=True)
        if (row["method"], row["split"]) == (method, "tuning")
    ]
    fitting = [pair for pair in tuned if pair[0]["perplexity"] <= limit]
    if not fitting:
        return min(tuned, key=lambda pair: pair[0]["perplexity"])[1]
    return max(fitting, key=lambda pair: pair[0]["reward"])[1]


def run(arguments: Arguments, judges: Judges) -> None:
    """Computes the missing rows, first those of tuning, then those of the settings chosen."""
    log = arguments.out / "rows.jsonl"
    with rows_of.alone(log):
        rows = rows_of.read(log, NEEDED)
        if not all(_same(row, arguments) for row in rows):
            raise ValueError(
                f"{log} holds rows of other settings or another version; choose another --out"
            )
        writer = load_writer(arguments.model)
        methods = METHODS
        if arguments.smoke:
            methods = {name: (*parts, settings[:1])
                       for name, (*parts, settings) in list(METHODS.items())[:2]}  # fmt: skip
        jobs = [(method, setting) for method, (_, _, s) in methods.items() for setting in s]
        for split in SPLITS:
            if split == "test":
                scores = [means(judges.looks(row)) for row in rows]
                jobs = [(method, chosen(rows, scores, method)) for method in methods]
            missing = [job for job in jobs if not _find(rows, job[0], split, job[1])]
            for method, setting in track(missing, split, disable=not sys.stderr.isatty()):
                row = write(writer, method, setting, split, arguments)
                rows_of.append(log, [row])
                rows.append(row)
                print(method, setting, split, f"{row['seconds']} s", flush=True)


@command(
    "text_rewards",
    after_interrupt="finished rows are kept, run the same command to go on",
    memory_cure="lower --num-lines",
)
def main(arguments: Arguments) -> None:
    """Computes what is missing, then writes tables, examples and the plot."""
    if arguments.smoke:
        arguments = dataclasses.replace(arguments, num_lines=2)
    judges = make_judges(arguments)
    if not arguments.table:
        run(arguments, judges)
    rows = rows_of.read(arguments.out / "rows.jsonl", NEEDED)
    if not rows:
        raise ValueError(f"{arguments.out} has no rows; leave out --table")
    looks = [judges.looks(row) for row in rows]
    each = arguments.num_lines
    text = f"{yardstick(judges, arguments)}\n## Beginnings that leave it open\n\n"
    text += table(rows, looks, "test", each) + "\n" + differences(rows, looks, "test", each)
    text += "\n## Beginnings that say the contrary\n\n" + table(rows, looks, "contrary", each)
    text += "\n" + differences(rows, looks, "contrary", each)
    text += "\n## Tuning\n\n" + table(rows, looks, "tuning", each)
    text += "\n## The first lines of the test\n" + examples(rows, each)
    write_atomically(arguments.out / "table.md", text.encode())
    plot(rows, looks, arguments.out / "frontier.png", each)
    print(text)
