"""Options of `aps-jax write`, checked before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated

import tyro

from aps_jax.cli.common import Flag, check_run, named, optional


@dataclasses.dataclass(frozen=True, kw_only=True)
class Write:
    """Writes lines of text that a reward likes, by a masked language model.

    The lines are printed and go to the file --out, with the record result.json beside it.

    Attributes:
      prompt: first words of every line, which stay; in lower case, punctuation apart, as in the
        reviews that lines32 has read.
      reward: what the lines are to be; of lines32, positive or negative.
      model: lines32, or a model folder.
      reward_model: folder of another reward on the same vocabulary.
      sampler: aps or another that reads a reward; `aps-jax samplers` lists them.
      num_samples: lines.
      weight: how much the reward counts against the language model.
      temperature: of the language model: below 1 it writes what is likelier.
      length: most tokens of a line, its end included; fewer take less time. The model's own if left
        out.
      num_steps: timesteps, instead of the sampler's own for text.
      num_inner_steps: optimiser steps per timestep, likewise.
      option: any other option of the sampler as NAME=VALUE; may be repeated.
      seed: of sampling.
      out: file for the lines; its folder is made if needed.
      resume: continue the interrupted run beside the file.
      overwrite: replace an earlier result.
    """

    reward: Annotated[str, named("NAME")]
    prompt: Annotated[str, named("TEXT")] = ""
    model: Annotated[str, named("lines32|DIR")] = "lines32"
    reward_model: Annotated[Path | None, optional("DIR")] = None
    sampler: Annotated[str, named("NAME")] = "aps"
    num_samples: Annotated[int, named("N")] = 8
    weight: Annotated[float, named("W")] = 10.0
    temperature: Annotated[float, named("T")] = 1.0
    length: Annotated[int | None, optional("L")] = None
    num_steps: Annotated[int | None, optional("N")] = None
    num_inner_steps: Annotated[int | None, optional("M")] = None
    option: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], named("NAME=VALUE")] = ()
    seed: int = 0
    out: Annotated[Path, named("FILE")] = Path("written/lines.txt")
    resume: Flag = False
    overwrite: Flag = False


def check(options: Write) -> None:
    """Finds what is wrong with the options alone, before anything is loaded."""
    check_run(options, not_negative=("weight",))
    if options.num_samples < 1:
        raise ValueError(f"--num-samples must be at least 1, got {options.num_samples}")
    if not 0 < options.temperature < math.inf:
        raise ValueError(f"--temperature must be a number > 0, got {options.temperature}")
    if options.out.name in ("", "..", "result.json"):
        raise ValueError(f"--out {options.out} must be a file for the lines, such as lines.txt")
    if options.out.is_dir():
        raise ValueError(f"--out {options.out} is a folder; name a file in it, such as lines.txt")
