"""The folder that a command's result goes to: taken by one process, filled whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aps_jax.io import files, locks
from aps_jax.io.snapshot import Snapshot

STATE_NAME = ".state"
#: The record of a run, which says that it is finished.
RECORD = "result.json"


@dataclasses.dataclass(frozen=True)
class ResultFolder:
    """The folder --out of a command whose runs have one result.

    Attributes:
      path: the folder.
      files: names of the files that a run may leave in it, beside `RECORD`.
      patterns: FOLDER/NAME globs of those that it may leave several of.
      is_resuming: --resume, go on with the interrupted run in the folder.
      is_overwriting: --overwrite, replace what an earlier run has left.
    """

    path: Path
    files: Sequence[str]
    patterns: Sequence[str] = ()
    is_resuming: bool = False
    is_overwriting: bool = False

    def check(self) -> None:
        """ValueError if the options and what is in the folder do not fit together."""
        out = self.path
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out} is a file; choose a folder")
        has_state = (out / STATE_NAME).exists()
        if self.is_resuming and not has_state:
            raise ValueError(f"--out {out} holds no interrupted run; leave out --resume")
        if self.is_resuming or self.is_overwriting:
            return
        if has_state:
            raise ValueError(
                f"--out {out} holds an interrupted run; continue it with --resume or start again "
                "with --overwrite"
            )
        for name in (*self.files, RECORD):
            if (out / name).exists():
                raise ValueError(
                    f"--out {out} already holds {name}; choose another folder or add --overwrite"
                )

    @contextlib.contextmanager
    def taken(self, again: str) -> Iterator[None]:
        """Makes the folder, for this process alone, and removes it if nothing came of it.

        Args:
          again: the command that goes on with an interrupted run.

        Raises:
          ValueError: as `check`, or another process is writing there.
          OSError: the folder cannot be made or written to.
          KeyboardInterrupt: with words that say how to go on, in place of one without.
        """
        out = self.path
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        try:
            try:
                out.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=out).close()
            except OSError as error:
                raise OSError(
                    f"cannot write to --out {out}: {error.strerror}; choose another folder"
                ) from None
            with locks.held(out):
                self.check()  # Another process may have finished in the meantime.
                yield
        except BaseException as error:
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # Only if it is empty.
            if not isinstance(error, KeyboardInterrupt):
                raise
            has_state = (out / STATE_NAME).exists()
            begin = "nothing was written; run the same command again"
            words = f"continue with: {again}" if has_state else begin
            raise KeyboardInterrupt(words) from None

    def snapshot(self, identity: Mapping[str, Any]) -> Snapshot:
        """What an interrupted run leaves; `identity` is all that the result depends on."""
        return Snapshot(self.path / STATE_NAME, identity, self.is_resuming)

    def try_files(self, record: Mapping[str, Any]) -> None:
        """Fails before the first timestep where the result could not be written after the last.

        Args:
          record: what is known of the record by then.

        Raises:
          ValueError: something other than a file has the name of one of the results.
          OSError: the folder takes no files.
          TypeError: the record is no JSON.
        """
        out = self.path
        taken = "is a folder, where a result goes; move or delete it"
        for name in (*self.files, RECORD):
            if (out / name).is_dir():
                raise ValueError(f"{out / name} {taken}")
        for pattern in self.patterns:
            folder = out / Path(pattern).parent
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"{folder} is a file, where a folder goes; move or delete it")
            for path in folder.glob(Path(pattern).name):
                if path.is_dir():
                    raise ValueError(f"{path} {taken}")
            if folder.is_dir():
                tempfile.TemporaryFile(dir=folder).close()
        with tempfile.TemporaryDirectory(dir=out, prefix=".new-") as trial:
            files.write_json(Path(trial) / RECORD, record)

    def publish(
        self, write: Callable[[Path], None], record: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Puts all files into a hidden folder first, then moves each in place, the record last.

        Args:
          write: makes the files in the folder that it is given.
          record: called after `write`; JSON values, to which the names of the files are added.
        """
        out = self.path
        staging = Path(tempfile.mkdtemp(dir=out, prefix=".new-"))
        try:
            write(staging)
            written = [path for path in sorted(staging.rglob("*")) if path.is_file()]
            names = [path.relative_to(staging).as_posix() for path in written] + [RECORD]
            files.write_json(staging / RECORD, {**record(), "files": names})
            self._clear()
            for name in names:
                (out / name).parent.mkdir(exist_ok=True)
                os.replace(staging / name, out / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _clear(self) -> None:
        """Removes an earlier run's files, the record of its success first."""
        for name in (RECORD, *self.files):
            (self.path / name).unlink(missing_ok=True)
        for pattern in self.patterns:
            for path in self.path.glob(pattern):
                path.unlink()
