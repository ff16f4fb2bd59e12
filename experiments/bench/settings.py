"""Configurations as pydantic models, and their errors as one line."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator

from aps_jax.io.names import suggestion

FORBID = ConfigDict(extra="forbid", frozen=True)


def _as_written(value: Any, check: Callable[[Any], Any]) -> Any:
    """Checks a number and keeps it as it is: 0 and 0.0 have different fingerprints."""
    check(value)
    return value


Count = Annotated[int, Field(strict=True, ge=1)]
Index = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Sigma = Annotated[Number, Field(ge=0), WrapValidator(_as_written)]


class Settings(BaseModel):
    """A part of a configuration, in which nothing unknown may stand."""

    model_config = FORBID

    def changed(self, **values: Any) -> Self:
        """The same with some values replaced.

        Raises:
          TypeError: for a name that it has not.
        """
        unknown = values.keys() - type(self).model_fields.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__} has no {sorted(unknown)}")
        return self.model_copy(update=values)


class Part(Settings):
    """A task, method or budget, by its label in rows and tables.

    Attributes:
      label: its name.
      count: the first so many photos only.
    """

    label: str
    count: Count | None = None


def require_known(names: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuses a name that is not known; `what` begins the message."""
    for name in names:
        if name not in known:
            hint = suggestion(name, known) or f"; there are {', '.join(known)}"
            raise ValueError(f"{what} {name!r}{hint}")


def in_one_line(error: ValidationError, keys: Iterable[str]) -> str:
    """The first thing that pydantic found wrong: where, what, and which of the keys was meant."""
    first = error.errors(include_url=False)[0]
    place, message = list(first["loc"]), first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        name = place.pop()
        message = f"unknown key {name!r}{suggestion(name, keys) or '; remove it'}"
    elif first["type"] == "missing":
        message = f"lacks {place.pop()!r}; add it"
    elif first["type"] != "value_error":
        message = f"{message[0].lower()}{message[1:]}, got {reprlib.repr(first['input'])}"
    where = ".".join(map(str, place))
    return f"{where}: {message}" if where else message
