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
import plotly.graph_objects as go

from tinygpt.sampling import Sampling

TRIGGER = """element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (button) trigger('click', {chosen: Number(button.dataset.number)});
});"""  # for a gr.HTML of numbered buttons
SAVE = """element.addEventListener('click', event => {
  const kind = event.target.dataset.as, name = event.target.closest('[data-name]')?.dataset.name;
  const graph = element.closest('.column').querySelector('.js-plotly-plot');
  if (kind === 'page') trigger('click');
  else if (kind) Plotly.downloadImage(
    {data: graph.data, layout: {...graph.layout, paper_bgcolor: 'white', font: {color: '#444'}}},
    {format: kind, filename: name, width: graph.clientWidth, height: graph.clientHeight, scale: 2});
});"""  # for the gr.HTML that shows ways_to_save, in one column with its picture
SAVE_PAGE = """page => {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([page], {type: 'text/html'}));
  link.download = 'tinygpt.html';
  link.click();
}"""
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


def chosen_in(event: gr.EventData) -> int:
    """The number of the button that was clicked; -1 for anything else that was sent."""
    chosen = sent(event, "chosen")
    return chosen if type(chosen) is int else -1


def shaded(tokens: Sequence[str], shares: Sequence[float], chosen: int) -> str:
    """Tokens as numbered buttons (with `TRIGGER`), each as dark as its share (0 to 1): HTML of the class sentence."""
    return "".join(
        f'<button data-number="{place}" aria-pressed="{str(place == chosen).lower()}" title="{share:.4f}" '
        f'style="background: rgba(0,114,178,{share ** 0.5 * 0.7:.3f})">{html.escape(token)}</button>'
        for place, (token, share) in enumerate(zip(tokens, shares, strict=True)))


def html_table(header: list[str], rows: list[list[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table class='plain'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def link_to_csv(header: list[str], rows: list[list], name: str, label: str = "Save as CSV") -> str:
    """A link that saves the table, made in the page itself: no file is kept on the server."""
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return f'<a download="{name}.csv" href="data:text/csv;charset=utf-8,{quote(text.getvalue())}">{label}</a>'


def ways_to_save(header: list[str], rows: list[list], name: str, link: str = "") -> str:
    """A row of them, for the picture just above (with `SAVE`) and its table, and a link to come back."""
    return (f'<p class="saving" data-name="{name}">Save as <button data-as="png">PNG</button> '
            f'<button data-as="svg">SVG</button> {link_to_csv(header, rows, name, "CSV")} '
            f'<button data-as="page">web page</button> {link}</p>')


def whole_page(figure: go.Figure) -> str:
    """A picture as a web page of its own, which needs no network (4.7 MB, nearly all of it plotly's script)."""
    return figure.update_layout(paper_bgcolor="white").to_html(include_plotlyjs=True)
