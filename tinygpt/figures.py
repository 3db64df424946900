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
