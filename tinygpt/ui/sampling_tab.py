"""The sampling settings of the chat, and what each does to the model's next choice, stage by stage."""

import csv
import io
from dataclasses import fields
from urllib.parse import quote

import gradio as gr
import torch

from tinygpt.config import TinyGPTError
from tinygpt.engine import Engine
from tinygpt.figures import stage_bars
from tinygpt.generate import fit_prompt, sayable
from tinygpt.model import Cache
from tinygpt.sampling import Sampling, idle, stages
from tinygpt.ui.visitor import Drawn, read_settings, too_long

PRESETS = {
    "balanced": Sampling(),
    "greedy": Sampling(temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0),
    "focused": Sampling(temperature=0.5, top_k=20, top_p=0.8),
    "creative": Sampling(temperature=1.0, top_k=0, top_p=0.95, min_p=0.02, repetition_penalty=1.2),
    "neutral": Sampling(temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0),
}
SLIDERS = {  # name: lowest, highest, step, and what it does
    "temperature": (0, 2, 0.05, "Below 1 likely words gain, above 1 unlikely ones; 0 always takes the likeliest."),
    "top_k": (0, 200, 1, "Only the k likeliest tokens may be drawn; 0 allows all."),
    "top_p": (0.05, 1, 0.01, "Only the likeliest tokens that together reach this probability; 1 allows all."),
    "min_p": (0, 1, 0.01, "Only tokens at least this share as likely as the likeliest; 0 allows all."),
    "repetition_penalty": (1, 2, 0.05, "Makes tokens that were said before less likely; 1 does nothing."),
    "no_repeat_ngram_size": (0, 6, 1, "No run of this many tokens is said twice; 0 allows it."),
    "max_new_tokens": (1, 100, 1, "The longest reply, in tokens (a word has one or two)."),
    "num_candidates": (1, 8, 1, "Draws this many replies and gives the one the model finds likeliest."),
}
ROWS = 14  # tokens in the picture
ABOUT = """The model gives each of its {vocabulary:,} tokens a probability. Each stage, from left to right, changes
them, and the next token is drawn from the last one. **Grey** was cut at that stage; **orange** is the token that was
really drawn. Above each stage: how many tokens are left, how much of the probability before it they had, and the
entropy (bits: how many yes-or-no questions the choice is worth). With the repetitions go the markers that the Bot never
says, and the end of a reply that has not begun."""
CSS = """
#sampling { max-width: 1240px; margin: 0 auto; }
#sampling .block { padding: 8px 12px; }
#stages { overflow-x: auto; }
#stages .js-plotly-plot { min-width: 720px; }
#idle { min-height: 22px; }
"""


class SamplingTab:
    """Draws the settings and the picture into the Blocks around it. `settings` are the components whose values, in the
    order of `Sampling`'s fields, the chat reads; `last` holds the chat's last reply, a `Drawn`.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.last = gr.State(None, time_to_live=3600)
        with gr.Row(elem_id="sampling"):
            with gr.Column(scale=1, min_width=300):
                self.preset = gr.Radio(list(PRESETS), value="balanced", label="Preset", elem_id="preset")
                made = {name: gr.Slider(low, high, getattr(Sampling(), name), step=step, label=title(name), info=info)
                        for name, (low, high, step, info) in SLIDERS.items()}
                made["seed"] = gr.Number(-1, label="Seed", precision=0,
                                         info="The same seed gives the same reply; -1 draws anew each time.")
                self.settings = [made[field.name] for field in fields(Sampling)]
                self.idle = gr.Markdown(elem_id="idle")
            with gr.Column(scale=3, min_width=320):
                gr.Markdown(ABOUT.format(vocabulary=engine.model.config.vocab_size))
                self.source = gr.Radio([("this message", "message"), ("the chat's last reply", "reply")],
                                       value="message", label="The next token after", elem_id="source")
                self.message = gr.Textbox("Where should we eat tonight?", label="Message", max_lines=3,
                                          elem_id="looked-at")
                self.position = gr.Slider(1, 40, 1, step=1, label="Token of the reply", visible=False,
                                          elem_id="position")
                self.picture = gr.Plot(show_label=False, elem_id="stages")
                self.summary = gr.Markdown(elem_id="summary")
                with gr.Accordion("The same as a table", open=False):
                    self.table = gr.Dataframe(interactive=False, label="Probability after each stage")
                    self.saving = gr.HTML(elem_id="saving")
        self.wire()

    def wire(self) -> None:
        quiet = {"show_progress": "hidden", "api_visibility": "private", "concurrency_id": "look",
                 "concurrency_limit": 2}
        chosen = [name for name in SLIDERS if name not in ("max_new_tokens", "num_candidates")]
        stage_settings = [setting for field, setting in zip(fields(Sampling), self.settings, strict=True)
                          if field.name in chosen]
        looked_at = [self.source, self.message, self.position, self.last, *self.settings]
        shown = [self.picture, self.summary, self.table, self.saving, self.idle]
        self.preset.input(lambda name: [getattr(PRESETS[name], field.name) for field in fields(Sampling)
                                        if field.name in chosen], self.preset, stage_settings, **quiet).then(
            self.look, looked_at, shown, **quiet)
        for setting in stage_settings:  # moved by hand, the settings are no preset any more
            setting.release(lambda: None, None, self.preset, queue=False, show_progress="hidden",
                            api_visibility="private")
        for setting in self.settings:  # a slider's change would fire many times on its way
            event = setting.release if isinstance(setting, gr.Slider) else setting.submit
            event(self.look, looked_at, shown, trigger_mode="always_last", **quiet)
        choosing = self.choose_source, [self.source, self.last, self.position], [self.message, self.position]
        self.source.input(*choosing, **quiet).then(self.look, looked_at, shown, **quiet)
        self.message.submit(self.look, looked_at, shown, **quiet)
        self.position.release(self.look, looked_at, shown, trigger_mode="always_last", **quiet)
        self.show = lambda tab: tab.select(*choosing, **quiet).then(self.look, looked_at, shown, **quiet)

    def choose_source(self, source: str, last: Drawn | None, position: int) -> tuple:
        """Shows the message box, or the slider over the tokens of the last reply."""
        tokens = max(2, len(last.reply) if last else 1)
        return gr.Textbox(visible=source == "message"), gr.Slider(visible=source == "reply", maximum=tokens,
                                                                  value=position if position <= tokens else 1)

    def look(self, source: str, message: str, position: int, last: Drawn | None, *settings: float) -> tuple:
        """The picture, its words, the table, the CSV and the notes, for one choice of the model."""
        try:
            sampling = read_settings(settings)
            if source == "reply":
                if not last:
                    raise TinyGPTError("There is no reply yet: say something in the chat first.")
                place = min(max(1, int(position)), len(last.reply)) - 1
                ids, drawn = last.prompt + last.reply[:place], last.reply[place]
            else:
                if problem := too_long(message):
                    raise TinyGPTError(problem)
                place, drawn = 0, None
                ids = fit_prompt(self.engine.model, self.engine.tokenizer, [message], sampling).ids
        except TinyGPTError as error:
            return gr.Plot(None), str(error), None, "", ""
        table = self.choice(ids, place == 0, sampling, drawn)
        return (*table, "\n\n".join(idle(sampling)))

    @torch.inference_mode()
    def choice(self, ids: list[int], first: bool, sampling: Sampling, drawn: int | None) -> tuple:
        """The figure, its summary, the table and the link to a CSV for the token after `ids`."""
        model, piece = self.engine.model, self.engine.tokenizer.piece
        read = torch.tensor([ids], device=self.engine.decoder.device)  # (1, T)
        cache = Cache(model.config, 1, read.device)  # the last token alone, as when a reply is drawn
        model.hidden(read[:, :-1], cache)
        logits = model.logits(model.hidden(read[:, -1:], cache)[:, -1])  # (1, V)
        after = stages(sayable(logits, first), read, sampling)
        odds = {}
        for name, stage in {**after, "model": logits}.items():  # what is cut, and nothing else, has none at all
            odds[name] = stage[0].softmax(-1).clamp_min(1e-30).where(stage[0] > -torch.inf, 0.0).cpu()  # (V,)
        strongest = (odds["model"] + odds["min-p"]).topk(min(ROWS, logits.size(-1))).indices.tolist()
        if drawn is not None and drawn not in strongest:
            strongest[-1] = drawn
        strongest.sort(key=lambda id: -float(odds["model"][id]))
        names = [piece(id).replace("▁", "␣") for id in strongest]
        columns = {name: stage[strongest].tolist() for name, stage in odds.items()}
        figure = stage_bars(names, columns, told(odds), strongest.index(drawn) if drawn is not None else None)
        rows = [[name, *(round(columns[stage][place], 6) for stage in columns)] for place, name in enumerate(names)]
        header = ["token", *columns]
        left = odds["min-p"]
        summary = (f"{int((left > 0).sum()):,} of {len(left):,} tokens may be drawn; the likeliest is "
                   f"`{piece(int(left.argmax())).replace('▁', '␣')}` with {float(left.max()):.1%}.")
        if drawn is not None:
            summary += (f" Drawn was `{piece(drawn).replace('▁', '␣')}`, which has {float(left[drawn]):.1%} with the "
                        "settings as they are now.")
        return figure, summary, gr.Dataframe(rows, headers=header), link_to_csv(header, rows)


def told(odds: dict[str, torch.Tensor]) -> list[str]:
    """For each stage: tokens left, share of the probability before it that they had, and entropy."""
    notes, before = [], None
    for stage in odds.values():
        left = stage > 0
        kept = 1.0 if before is None else float(before[left].sum())
        bits = float(torch.special.entr(stage).sum()) / 0.6931471805599453
        notes.append(f"{int(left.sum()):,} · {kept:.0%} · {bits:.1f} bits")
        before = stage
    return notes


def link_to_csv(header: list[str], rows: list[list]) -> str:
    """A link that saves the table, made in the page itself: no file is kept on the server."""
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return f'<a download="choice.csv" href="data:text/csv;charset=utf-8,{quote(text.getvalue())}">Save as CSV</a>'


def title(name: str) -> str:
    return name.replace("_", " ").replace("ngram", "n-gram").capitalize()
