"""Tables of `experiments.tokenizers`, from its rows alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from aps_jax.io.rows import Row
from experiments.bench import summary
from experiments.studies.tokenizer_models import Plan
from experiments.studies.tokenizer_rows import ESTIMATORS, NO_PRIOR, WITH_PRIOR
from experiments.tables import markdown

_DIGITS = {"psnr": 2, "lpips": 3, "residual": 3, "bits_per_pixel": 3}


class _Found:
    """Scores by cell, indexed by face."""

    def __init__(self, rows: Sequence[Row]) -> None:
        frame = pd.DataFrame(rows)
        keys = ["tokenizer", "task", "method"]
        self._cells = {cell: part.set_index("image") for cell, part in frame.groupby(keys)}

    def of(self, *cell: str) -> pd.DataFrame | None:
        return self._cells.get(cell)

    def mean(self, metric: str, *cell: str) -> str | None:
        """Mean over faces and the half-width of its interval."""
        own = self.of(*cell)
        if own is None or metric not in own or own[metric].isna().all():
            return None
        found = summary.interval(own[metric].dropna())
        digits = _DIGITS[metric]
        return found and f"{found.mean:.{digits}f} ± {found.half_width:.{digits}f}"

    def gain(self, metric: str, cell: tuple[str, ...], over: tuple[str, ...]) -> str | None:
        """Paired difference to another cell."""
        own, other = self.of(*cell), self.of(*over)
        if own is None or other is None or metric not in own:
            return None
        found = summary.gain(own, other, metric)
        return found and found.shown(_DIGITS[metric])

    def gains(self, cell: tuple[str, ...], over: tuple[str, ...]) -> str | None:
        """Paired differences in PSNR and LPIPS; None for a cell and itself."""
        if cell == over:
            return None
        psnr, lpips = (self.gain(metric, cell, over) for metric in ("psnr", "lpips"))
        return psnr and f"{psnr}; {lpips or '–'}"


def tables(plan: Plan, rows: Sequence[Row]) -> str:
    """Markdown: the models, every task, and the estimators."""
    found = _Found(rows)
    labels = [label for label in plan.tokenizers if found.of(label, "training", "card") is not None]
    parts = [_section("Models", [_model(found, plan, label) for label in labels])]
    first = next(iter(plan.tokenizers))
    for task in plan.tasks:
        lines = [_line(found, label, task, first) for label in labels]
        lines = [line for line in lines if line["APS: PSNR, dB"] is not None]
        if lines:
            smooth = found.mean("psnr", "none", task, "smooth estimate")
            lpips = found.mean("lpips", "none", task, "smooth estimate")
            note = f"The smooth estimate, without any model: {smooth} dB, LPIPS {lpips}."
            parts.append(_section(task, lines) + f"\n{note}\n")
    for task in plan.estimators_on:
        lines = [_estimators(found, label, task) for label in labels]
        lines = [line for line in lines if any(list(line.values())[1:])]
        if lines:
            parts.append(_section(f"{task}: gain of the quantized expectation over", lines))
    head = (
        f"{plan.faces} held-out faces of {plan.size}x{plan.size} pixels, sigma {plan.sigma:g}, "
        f"seed {plan.seed}; ± is the half-width of a 95 % interval over faces, gains are paired.\n"
    )
    return "\n".join([head, *parts])


def _section(title: str, lines: list[dict[str, str | None]]) -> str:
    return f"### {title}\n\n{markdown(pd.DataFrame(lines))}\n"


def _model(found: _Found, plan: Plan, label: str) -> dict[str, str | None]:
    card = found.of(label, "training", "card")
    assert card is not None  # `tables` has looked.
    facts = card.iloc[0]
    tokens = (plan.size / 4) ** 2 * plan.sizes["num_bits"] / (facts["uniform_ce"] / math.log(2))
    unigram = facts["unigram_ce"] / math.log(2) * tokens / plan.size**2
    bits = found.of(label, "bits", "prior")
    first = next(iter(plan.tokenizers))
    own, other = (label, "reconstruction", "codec"), (first, "reconstruction", "codec")
    return {
        "codebook": label,
        "reconstruction: PSNR, dB": found.mean("psnr", *own),
        "LPIPS": found.mean("lpips", *own),
        f"over {first}: dB; LPIPS": found.gains(own, other),
        f"codes used of {2 ** plan.sizes['num_bits']}": f"{facts['codes_used']:.0f}",
        "bits per pixel by frequency": f"{unigram:.3f}",
        f"by the prior ({0 if bits is None else len(bits)} faces)": found.mean(
            "bits_per_pixel", label, "bits", "prior"
        ),
        "seconds of training: codec, prior": (
            f"{facts['codec_seconds']:.0f}, {facts['prior_seconds']:.0f}"
        ),
    }


def _line(found: _Found, label: str, task: str, first: str) -> dict[str, str | None]:
    aps, alone = (label, task, WITH_PRIOR), (label, task, NO_PRIOR)
    return {
        "codebook": label,
        "APS: PSNR, dB": found.mean("psnr", *aps),
        "APS: LPIPS": found.mean("lpips", *aps),
        f"over {first}: dB; LPIPS": found.gains(aps, (first, task, WITH_PRIOR)),
        "gain of the prior: dB; LPIPS": found.gains(aps, alone),
        "no prior: PSNR, dB": found.mean("psnr", *alone),
        "residual": found.mean("residual", *aps),
    }


def _estimators(found: _Found, label: str, task: str) -> dict[str, str | None]:
    aps = (label, task, WITH_PRIOR)
    line: dict[str, str | None] = {"codebook": label}
    for name in ESTIMATORS:
        line[f"the {name}: dB; LPIPS"] = found.gains(aps, (label, task, name))
    return line
