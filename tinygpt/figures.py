"""Plotly pictures of plain values."""

import html
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"  # told apart by colour-blind eyes too


def training_curves(lines: Sequence[Mapping]) -> go.Figure:
    """The lines of a log.jsonl, over the tokens learned: losses, the perplexity of validation, the learning rate."""
    figure = make_subplots(rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.5, 0.3, 0.2],
                           subplot_titles=("Loss (nats a token)", "Validation perplexity", "Learning rate"))
    for row, name, label, colour in (
            (1, "train_loss", "training, with dropout", GREY), (1, "validation_loss", "validation", BLUE),
            (1, "ema_validation_loss", "validation of the average", ORANGE),
            (2, "validation_perplexity", "perplexity", BLUE), (3, "lr", "learning rate", GREEN)):
        points = [(line["tokens"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            tokens, values = zip(*points, strict=True)
            mode = "lines+markers" if "validation" in name else "lines"
            figure.add_scatter(x=tokens, y=values, name=label, mode=mode, line_color=colour, row=row, col=1,
                               showlegend=row == 1)
    figure.update_xaxes(title_text="tokens learned", row=3, col=1)
    figure.update_layout(template="plotly_white", height=850, hovermode="x unified",
                         margin={"t": 40, "l": 60, "r": 10}, legend={"y": 1, "x": 1, "xanchor": "right"})
    return figure


def training_page(lines: Sequence[Mapping], title: str) -> str:
    """`training_curves` and the last sample replies as one HTML page that needs nothing else; it reloads itself every
    minute.
    """
    replies = next((line["replies"] for line in reversed(lines) if "replies" in line), {})
    rows = "".join(f"<tr><td>{html.escape(prompt)}</td><td>{html.escape(reply)}</td></tr>"
                   for prompt, reply in replies.items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="60">
<meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 1rem auto; padding: 0 1rem }}
td {{ vertical-align: top; padding: 0.2rem 1rem 0.2rem 0 }} h1, h2 {{ font-weight: 600 }}</style></head>
<body><h1>{html.escape(title)}</h1>
{training_curves(lines).to_html(full_html=False, include_plotlyjs=True)}
<h2>What it says now</h2><table>{rows}</table></body></html>
"""


def stage_bars(tokens: Sequence[str], stages: Mapping[str, Sequence[float]], notes: Sequence[str],
               drawn: int | None = None) -> go.Figure:
    """The probability of each of `tokens` after each stage, a column of bars a stage with its note above. A token that
    a stage cut shows in grey what it had before; the `drawn` one (its position) is orange.
    """
    tokens = [html.escape(token) for token in tokens]  # plotly takes "</s>" for a tag
    places = list(range(len(tokens)))  # not the texts, which may be alike
    figure = make_subplots(rows=1, cols=len(stages), shared_yaxes=True, horizontal_spacing=0.012,
                           subplot_titles=[f"{name}<br><sub>{note}</sub>" for name, note
                                           in zip(stages, notes, strict=True)])
    before, most = [0.0] * len(tokens), max((max(column) for column in stages.values()), default=1.0)
    for number, (name, odds) in enumerate(stages.items(), 1):
        shown = [now if now > 0 else was for now, was in zip(odds, before, strict=True)]
        colours = ["#c8ccd2" if now == 0 else ORANGE if place == drawn else BLUE
                   for place, now in enumerate(odds)]
        hover = [f"{token}<br>{name}: {now:.2%}" if now else
                 f"{token}<br>cut here, {was:.2%} before" if was else f"{token}<br>cut earlier"
                 for token, now, was in zip(tokens, odds, before, strict=True)]
        figure.add_bar(x=shown, y=places, orientation="h", marker_color=colours, hovertext=hover, hoverinfo="text",
                       showlegend=False, row=1, col=number)
        before = [now if now > 0 else 0.0 for now in odds]
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_yaxes(tickvals=places, ticktext=[f"<b>{token}</b>" if place == drawn else token
                                                   for place, token in enumerate(tokens)], row=1, col=1)
    figure.update_xaxes(range=[0, most * 1.05], tickvals=[0, most / 2], tickformat=".0%", zeroline=False,
                        gridcolor="rgba(128,128,128,0.25)")
    figure.update_layout(height=90 + 24 * len(tokens), margin={"t": 60, "l": 10, "r": 10, "b": 20}, bargap=0.25,
                         paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", font_color="#7a828e")
    return figure
