"""Plotly pictures of plain values."""

import base64
import html
import io
from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
from PIL import Image
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


# ----------------------------------------------------------------------------------------------------- attention

WHITE_TO_BLUE = [[0.0, "#ffffff"], [0.5, "#6ba7d6"], [1.0, "#08306b"]]
PLAIN = {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(128,128,128,0.35)", "font_color": "#7a828e"}


def attention_tile(weights: np.ndarray) -> str:
    """One head's map (T, T) as a small picture: a data: address of a PNG whose blue is as opaque as a weight is large
    (by its square root, so that small ones show), and which is grey where a query cannot look.
    """
    pixels = np.empty((*weights.shape, 4), np.uint8)  # (T, T, RGBA)
    pixels[..., :3] = (0, 90, 180)
    pixels[..., 3] = (255 * np.sqrt(weights.clip(0, 1))).round()
    pixels[np.triu_indices(len(weights), 1)] = (128, 128, 128, 60)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def head_map(tokens: Sequence[str], weights: np.ndarray, scale: str = "linear") -> go.Figure:
    """One head's weights (T, T), queries down and keys across. `scale`: linear (0 to 1), logarithmic (down to 0.001),
    or without the first token (0 to the largest of the other weights).
    """
    size = len(tokens)
    weights = weights.astype(np.float32)
    shown, most, ticks = weights.copy(), 1.0, {}
    if scale == "without first token":
        shown[:, 0] = np.nan
        most = float(np.nanmax(shown[1:, 1:], initial=1e-6)) if size > 1 else 1.0
    elif scale == "logarithmic":
        shown = np.log10(shown.clip(1e-3, 1))
        ticks = {"tickvals": [-3, -2, -1, 0], "ticktext": ["0.001", "0.01", "0.1", "1"]}
    shown[np.triu_indices(size, 1)] = np.nan  # the future
    names = [f"{html.escape(token)} {place}" for place, token in enumerate(tokens)]
    every = max(1, -(-size // 30))
    axis = {"tickvals": list(range(0, size, every)), "ticktext": names[::every], "showgrid": False, "zeroline": False}
    low = -3.0 if scale == "logarithmic" else 0.0
    figure = go.Figure(go.Heatmap(
        z=shown, customdata=weights, zmin=low, zmax=0.0 if low else most, colorscale=WHITE_TO_BLUE, hoverongaps=False,
        colorbar={"thickness": 10, "len": 0.6, "orientation": "h", "y": 1.01, "yanchor": "bottom", **ticks},
        hovertemplate="from %{y}<br>to %{x}<br>weight %{customdata:.4f}<extra></extra>"))
    figure.update_xaxes(title="key: looked at", side="bottom", tickangle=-60, constrain="domain", **axis)
    figure.update_yaxes(title="query: looks", autorange="reversed", scaleanchor="x", constrain="domain",
                        constraintoward="top", **axis)
    figure.update_layout(height=560, margin={"t": 20, "l": 10, "r": 10, "b": 20}, **PLAIN)
    return figure


def lens_map(tokens: Sequence[str], said: Sequence[Sequence[str]], odds: np.ndarray) -> go.Figure:
    """The likeliest next token after each layer and its probability: `said` and odds, layers x tokens, the
    embeddings' row at the bottom.
    """
    layers = ["embeddings", *(f"layer {layer}" for layer in range(len(said) - 1))]
    names = [f"{html.escape(token)} {place}" for place, token in enumerate(tokens)]
    figure = go.Figure(go.Heatmap(
        z=odds.astype(np.float32), zmin=0, zmax=1, colorscale=WHITE_TO_BLUE, colorbar={"thickness": 12},
        text=[[html.escape(token) for token in row] for row in said], texttemplate="%{text}",
        hovertemplate="after %{x}, %{y} says<br>%{text} (%{z:.1%})<extra></extra>"))
    figure.update_xaxes(tickvals=list(range(len(names))), ticktext=names, tickangle=-60)
    figure.update_yaxes(tickvals=list(range(len(layers))), ticktext=layers)
    figure.update_layout(height=90 + 34 * len(layers), width=max(600, 130 + 62 * len(tokens)),
                         margin={"t": 20, "l": 10, "r": 10, "b": 20}, **PLAIN)
    return figure


def importance_map(nats: np.ndarray) -> go.Figure:
    """What each head's removal changes, (layers, heads), the first layer at the bottom."""
    figure = go.Figure(go.Heatmap(
        z=nats.astype(np.float32), zmin=0, colorscale=WHITE_TO_BLUE, colorbar={"thickness": 12, "title": "nats"},
        texttemplate="%{z:.3f}", hovertemplate="layer %{y}, head %{x}: %{z:.4f} nats<extra></extra>"))
    figure.update_xaxes(title="head", dtick=1)
    figure.update_yaxes(title="layer", dtick=1)
    figure.update_layout(height=90 + 34 * len(nats), margin={"t": 20, "l": 10, "r": 10, "b": 20}, **PLAIN)
    return figure


def score_lines(lines: Sequence[Mapping], score: str, layer: int, head: int) -> go.Figure:
    """A score of every head over the tokens learned, from the "heads" of a log.jsonl; one head stands out."""
    lines = [line for line in lines if score in line.get("heads", {})]
    tokens = [line["tokens"] for line in lines]
    course = np.array([line["heads"][score] for line in lines] or np.empty((0, 0, 0)))  # (lines, layers, heads)
    figure = go.Figure()
    for each, number in np.ndindex(course.shape[1:]):
        chosen = (each, number) == (layer, head)
        line = {"color": ORANGE if chosen else "rgba(0,114,178,0.25)", "width": 3 if chosen else 1}
        figure.add_scatter(x=tokens, y=course[:, each, number], name=f"layer {each}, head {number}", mode="lines",
                           showlegend=False, line=line)
    figure.update_xaxes(title="tokens learned")
    figure.update_yaxes(title=score.replace("_", " "))
    figure.update_layout(height=320, margin={"t": 20, "l": 10, "r": 10, "b": 20},
                         **{**PLAIN, "plot_bgcolor": "rgba(0,0,0,0)"})
    return figure
