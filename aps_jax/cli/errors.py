"""Expected failures end as one line on stderr and an exit code, in every program here."""

from __future__ import annotations

import io
import os
import re
import sys
import warnings
from collections.abc import Callable


class UsageError(ValueError):
    """The command line cannot be understood."""


def guarded(
    work: Callable[[], int | None],
    program: str,
    *,
    after_interrupt: str = "nothing was written",
    memory_cure: str = "restore a smaller image (--size) or fewer --num-samples",
) -> int:
    """The exit code of `work`, where expected failures become one line on stderr.

    Args:
      work: returns an exit code, or None for success.
      program: what the line begins with.
      after_interrupt: what Ctrl-C leaves, where the KeyboardInterrupt does not say it.
      memory_cure: what to do when memory runs out.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # Names that it cannot show end nothing.
            stream.reconfigure(errors="backslashreplace")
    try:
        return work() or 0
    except KeyboardInterrupt as stop:
        _complain(program, f"interrupted; {str(stop) or after_interrupt}")
        return 130
    except BrokenPipeError:  # The reader of our output, such as `head`, is gone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        trouble = trouble_of(error, memory_cure)
        if trouble is None:
            raise  # A bug: its traceback is wanted.
        _complain(program, f"error: {trouble}")
        return 2


def trouble_of(error: Exception, memory_cure: str = "restore a smaller image") -> str | None:
    """Cause and cure of an expected failure as one line, None for a bug."""
    trouble: str | None = None
    if isinstance(error, OSError):
        trouble = _file_trouble(error)
    elif isinstance(error, ValueError | ArithmeticError):
        trouble = str(error)
    elif is_out_of_memory(error):
        trouble = f"out of memory; {memory_cure}"
    elif (trouble := _platform_trouble()) is None:
        from aps_jax.scores.lpips import PerceptualUnavailable

        trouble = str(error) if isinstance(error, PerceptualUnavailable) else None
    return None if trouble is None else " ".join(trouble.split())


def message_of(box: str) -> str:
    """The message inside the box that tyro draws, as one line.

    Rules separate the box into its title, the message and hints; they are of "─", or of "-" where
    the terminal is not known to take that.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    parts = re.split(r"(?m)^.*[─-]{5,}.*$", text.replace("│", " "))
    parts = [" ".join(part.split()) for part in parts]
    message, rest = parts[min(1, len(parts) - 1)].rstrip("."), parts[2:]
    wrong = re.match(r"Error parsing (\S+): .*?(?:: |from \[)'(.*?)'", message)
    if wrong:
        return f"{wrong[1]} cannot be {wrong[2]!r}"
    close = re.search(r"Perhaps you meant:\s+(--[\w-]+)", " ".join(rest))
    if close:
        message += f", did you mean {close[1]}?"
    return message or "cannot understand these arguments"


def _complain(program: str, message: str) -> None:
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)


def _file_trouble(error: OSError) -> str:
    """Cause and cure of a failed read or write; our own messages have both already."""
    if error.errno is None or error.strerror is None:
        return str(error)
    name = error.filename if error.filename2 is None else error.filename2
    where = f" {name}" if name else ""
    return f"cannot use{where}: {error.strerror}; free some space or choose another place"


def _platform_trouble() -> str | None:
    """Cause and cure if JAX has no device of the platform that it was told to use, else None."""
    import jax

    try:
        jax.devices()
    except Exception as error:  # Which one, and with which words, depends on the platform.
        wanted = os.environ.get("JAX_PLATFORMS") or getattr(jax.config, "jax_platforms", None)
        reason = (str(error).splitlines() or ["it is not installed"])[0].rstrip(".")
        return (
            f"JAX cannot use the platform it was told to (JAX_PLATFORMS is {wanted or 'unset'}): "
            f"{reason}; set JAX_PLATFORMS=cpu, or install JAX for that platform, such as "
            "jax[cuda12], on a machine that has it"
        )
    return None


def is_out_of_memory(error: Exception) -> bool:
    """True if `error` says that memory ran out, on the host or on a device."""
    text = str(error)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
