"""Opens the page: python app.py [--checkpoint FOLDER]"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import gradio as gr
import torch
import tyro

from tinygpt.checkpoint import load_checkpoint
from tinygpt.config import run_command
from tinygpt.engine import Engine
from tinygpt.quantize import int8
from tinygpt.ui import attention_tab, chat_tab, sampling_tab

CHATS = 16  # replies that grow side by side; more visitors wait in line
THEME = gr.themes.Default(primary_hue="teal", neutral_hue="slate", radius_size="lg",
                          font=("system-ui", "-apple-system", "Segoe UI", "sans-serif"),
                          font_mono=("ui-monospace", "Consolas", "monospace")).set(
    body_text_color_subdued="*neutral_500", body_text_color_subdued_dark="*neutral_400",
    color_accent_soft_dark="*primary_950", border_color_accent_subdued_dark="*primary_800",
    input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400")
CSS = """
#title .html-container { padding: 0; text-align: center; }
#title h1 { font-size: 20px; font-weight: 650; margin: 0; }
footer .divider { display: none !important; }
table.plain { width: 100%; border-collapse: collapse; margin-bottom: 10px; }
table.plain :is(th, td) { text-align: left; vertical-align: top; padding: 6px 10px 6px 0;
                          border: 0 solid var(--border-color-primary); border-bottom-width: 1px; }
.sentence { line-height: 2; }
.sentence button { border: none; border-radius: 4px; padding: 2px 3px; margin: 0 1px; cursor: pointer; color: inherit;
                   font: inherit; }
.sentence button[aria-pressed=true] { outline: 2px solid #D55E00; }
.fillable { padding: 16px clamp(12px, 2.5vw, 32px) 8px !important; }
"""


def build_page(engine: Engine, log: Sequence[Mapping] = ()) -> gr.Blocks:
    """The page, ready to be launched. `log`: the lines of the model's log.jsonl, if there are any."""
    with gr.Blocks(title="TinyGPT", analytics_enabled=False) as page:
        gr.HTML("<h1>TinyGPT</h1>", elem_id="title")
        with gr.Tabs() as tabs:
            with gr.Tab("Chat"):
                chat = chat_tab.ChatTab(engine)
            with gr.Tab("Sampling", id="sampling") as sampling_page:
                sampling = sampling_tab.SamplingTab(engine, chat.spoken)
            with gr.Tab("Attention", id="attention") as attention_page:
                attention = attention_tab.AttentionTab(engine, chat.spoken, log)
        chat.wire(sampling.settings, tabs, [sampling.source, attention.source])
        sampling.show(sampling_page)
        attention.wire(attention_page, tabs, page)
    return page.queue(max_size=64)


def open_page(checkpoint: Path = Path("checkpoints/tinygpt-chat")) -> None:
    """Open the page where you chat with TinyGPT. Gradio's own variables, such as GRADIO_SERVER_PORT, are obeyed.

    Args:
        checkpoint: Checkpoint folder, as train.py writes it.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    cores = torch.get_num_threads()
    torch.set_num_threads(1)  # the engine wants them for itself
    model, tokenizer = load_checkpoint(checkpoint)
    engine = Engine(int8(model), tokenizer, capacity=CHATS, cores=cores)
    next(iter(engine.ask(["Hello!"])))  # the first token is slow: better now than for the first visitor
    css = CSS + chat_tab.CSS + sampling_tab.CSS + attention_tab.CSS
    page = build_page(engine, read_log(checkpoint))
    page.launch(theme=THEME, css=css, show_error=True, run_history=False, footer_links=["api"], ssr_mode=False,
                max_threads=80)


def read_log(checkpoint: Path) -> list[dict]:
    """The lines of the checkpoint's log.jsonl; none if it has no such file."""
    path = checkpoint / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def main() -> None:
    run_command(lambda: tyro.cli(open_page, prog="app.py"))


if __name__ == "__main__":
    main()
