"""What comes from a visitor, checked before any work is done, and what is remembered of the last reply."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from tinygpt.sampling import Sampling

LONGEST_MESSAGE = 2_000  # characters; several times what the model can read


@dataclass(frozen=True)
class Drawn:
    """A reply as it was really drawn: what the model read, and the tokens it said."""

    prompt: list[int]
    reply: list[int]


def too_long(message: str) -> str | None:
    """The kind sentence for a message beyond the bound."""
    if len(message) > LONGEST_MESSAGE:
        return (f"That is {len(message):,} characters, more than TinyGPT can follow. Please keep it to "
                f"{LONGEST_MESSAGE:,}.")


def read_settings(values: Sequence[float]) -> Sampling:
    """The components' values, in the order of the fields, as a `Sampling`. Raises TinyGPTError for one that is
    missing or out of range.
    """
    given = {}
    for field, value in zip(fields(Sampling), values, strict=True):
        whole = isinstance(field.default, int)
        given[field.name] = int(value) if whole and isinstance(value, float) and value.is_integer() else value
    return Sampling(**given)
