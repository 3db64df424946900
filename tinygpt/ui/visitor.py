"""What comes from a visitor, checked before any work is done; what is remembered of a reply; and tables that
visitors may take away.
"""

import csv
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from urllib.parse import quote

import gradio as gr

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


def sent(event: gr.EventData, name: str) -> object:
    """What a script of the page sent along under that name, of whatever kind; None if nothing."""
    return event._data.get(name) if isinstance(event._data, dict) else None


def html_table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table class='plain'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def link_to_csv(header: list[str], rows: list[list], name: str) -> str:
    """A link that saves the table, made in the page itself: no file is kept on the server."""
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return f'<a download="{name}.csv" href="data:text/csv;charset=utf-8,{quote(text.getvalue())}">Save as CSV</a>'
