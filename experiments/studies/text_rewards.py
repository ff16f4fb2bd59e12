"""Steering a text model by a reward: every sampler at equal reward evaluations.

    python -m experiments.text_rewards --data TEXTS [--out experiments/results/text_rewards]

Lines begin with given words and are to be positive, or negative. Every setting of every method
(`experiments.studies.text_methods`) is run on prompts of tuning. Of each method the setting whose
lines the reward likes best is run on the prompts of the test, left out what surprises the trigram
model too much. What is reported is said by judges that share nothing with model and reward
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
from experiments.figures import figure, save_figure
from experiments.studies import text_judges
from experiments.studies.text_methods import LABELS, LIMIT, METHODS, TEST, TUNING, config_of

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
    prompts = TUNING if split == "tuning" else TEST
    facts = [arguments.num_lines, arguments.length, arguments.seed, setting.get("weight"), prompts]
    facts += weights
    return digest([said, facts])


def write(
    writer: Writer, method: str, setting: dict[str, Any], split: str, arguments: Arguments
) -> dict[str, Any]:
    """The row of one setting: lines in the order of label, prompt and number."""
    prompts = TUNING if split == "tuning" else TEST
    if arguments.smoke:
        prompts = prompts[:1]
    config = config_of(method, setting)
    target = writer.target(
        [label for label in LABELS for _ in prompts],
        prompt=[*prompts, *prompts],
        num_lines=arguments.num_lines,
        weight=setting.get("weight", 1.0),
        length=arguments.length,
    )
    began = time.perf_counter()
    result = _draw(target, jax.random.key(arguments.seed), config)
    tokens = writer.settled(result.tokens)
    seconds = time.perf_counter() - began
    chances = np.asarray(writer.reward.probabilities(jnp.asarray(tokens)))
    wanted = np.repeat(np.arange(len(LABELS)), len(tokens) // len(LABELS))
    columns = [writer.reward.names.index(label) for label in LABELS]
    own = chances[np.arange(len(tokens)), np.asarray(columns)[wanted]]
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

    def scores(self, row: dict[str, Any]) -> dict[str, float]:
        """Mean log-probability by the reward, and what the judges say of a row's lines."""
        wanted, texts = np.asarray(row["wanted"]), row["lines"]
        positive = text_judges.positive_share(self.sentiment, texts) > 0.5
        success = positive == (wanted == LABELS.index("positive"))
        return {
            "reward": float(np.mean(row["reward"])),
            "judged": float(np.mean(success)),
            "half_width": 1.96 * float(np.std(success) / np.sqrt(len(texts))),
            "perplexity": self.trigrams.perplexity(texts),
            "distinct_2": text_judges.distinct(texts),
            "words": float(np.mean([len(text.split()) for text in texts])),
        }


def make_judges(arguments: Arguments) -> Judges:
    """Judges trained on part "judge" of the data."""
    part = lines.read_lines(arguments.data, "judge")
    texts = [line.text for line in part]
    labels = [line.label for line in part]
    return Judges(
        sentiment=text_judges.sentiment_judge(texts, labels), trigrams=text_judges.KneserNey(texts)
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
    """Computes the missing rows, first those of tuning, then those of the test."""
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
        jobs = [(method, setting, "tuning") for method, (_, _, s) in methods.items()
                for setting in s]  # fmt: skip
        for split in ("tuning", "test"):
            if split == "test":
                scores = [judges.scores(row) for row in rows]
                jobs = [(method, chosen(rows, scores, method), "test") for method in methods]
            missing = [job for job in jobs if not _find(rows, job[0], split, job[1])]
            for method, setting, _ in track(missing, split, disable=not sys.stderr.isatty()):
                row = write(writer, method, setting, split, arguments)
                rows_of.append(log, [row])
                rows.append(row)
                print(method, setting, split, f"{row['seconds']} s", flush=True)


def table(rows: list[dict[str, Any]], scores: list[dict[str, float]], split: str) -> str:
    """Markdown: a line per method and setting of a split."""
    columns = ("method", "setting", "log reward", "judged right", "perplexity", "distinct-2",
               "words", "prior calls", "reward calls (with gradient)", "seconds")  # fmt: skip
    text = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for method in METHODS:
        for row, score in zip(rows, scores, strict=True):
            if (row["method"], row["split"]) != (method, split):
                continue
            calls = row["evaluations"]
            setting = ", ".join(f"{name} {value:g}" for name, value in row["setting"].items())
            cells = (
                method, setting or "-", f"{score['reward']:.2f}",
                f"{100 * score['judged']:.0f} ± {100 * score['half_width']:.0f} %",
                f"{score['perplexity']:.0f}", f"{score['distinct_2']:.2f}",
                f"{score['words']:.1f}", calls["denoiser"],
                f"{calls['decoder'] + calls['decoder_gradient'] - 1} "
                f"({calls['decoder_gradient']})", row["seconds"],
            )  # fmt: skip
            text.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(text) + "\n"


def plot(rows: list[dict[str, Any]], scores: list[dict[str, float]], path: Path) -> None:
    """Judged success against perplexity: settings on the prompts of tuning, and the test."""
    picture, axes = figure(1, 2, (4.6, 3.8))
    for axis, split in zip(axes[0], ("tuning", "test"), strict=True):
        for index, method in enumerate(METHODS):
            points = [
                (score["perplexity"], 100 * score["judged"])
                for row, score in zip(rows, scores, strict=True)
                if (row["method"], row["split"]) == (method, split)
            ]
            if points:
                axis.plot(
                    *zip(*sorted(points), strict=True), marker="o", label=method,
                    color=f"C{index}",
                )  # fmt: skip
        axis.set_title(f"prompts of {split}", fontsize=9)
        axis.set_xscale("log")
        axis.set_xlabel("perplexity under the trigram model")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("judged right (%)")
    axes[0][1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    save_figure(picture, path)


def examples(rows: list[dict[str, Any]], count: int = 2) -> str:
    """Markdown: the first lines of every method on the test, unchosen."""
    text = []
    for method in METHODS:
        for row in _find(rows, method, "test"):
            text.append(f"\n**{method}**\n")
            for number, label in enumerate(LABELS):
                own = [line for line, wanted in zip(row["lines"], row["wanted"], strict=True)
                       if wanted == number]  # fmt: skip
                each = max(1, len(own) // len(TEST))
                text += [f"- {label}: {line}" for line in own[::each][:count]]
    return "\n".join(text) + "\n"


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
    scores = [judges.scores(row) for row in rows]
    held_out = [line.text for line in lines.read_lines(arguments.data, "held_out")]
    yardstick = (
        f"Held-out lines of people: perplexity {judges.trigrams.perplexity(held_out):.0f}, "
        f"distinct-2 of as many as the test has "
        f"{text_judges.distinct(held_out[: 2 * len(TEST) * arguments.num_lines]):.2f}.\n"
    )
    text = (
        f"## Test\n\n{table(rows, scores, 'test')}\n{yardstick}\n## Tuning\n\n"
        f"{table(rows, scores, 'tuning')}\n## The first lines of the test\n{examples(rows)}"
    )
    write_atomically(arguments.out / "table.md", text.encode())
    plot(rows, scores, arguments.out / "frontier.png")
    print(text)
