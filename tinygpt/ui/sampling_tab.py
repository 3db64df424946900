"""The sampling settings of the chat, and what they do: to the model's next choice, stage by stage; to a reply drawn
token by token; to many replies drawn at once.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial

import gradio as gr
import torch

from tinygpt.config import TinyGPTError
from tinygpt.engine import Engine
from tinygpt.figures import stage_bars
from tinygpt.generate import Decoder, Reply, candidates, fit_prompt, sayable
from tinygpt.model import Cache
from tinygpt.sampling import Sampling, idle, stages
from tinygpt.tokenizer import EOS, MARKERS, SEP, Prompt
from tinygpt.ui.visitor import TRIGGER, Drawn, chosen_in, html_table, link_to_csv, read_settings, shaded, too_long

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
WORDS = "<p>Each token as dark as it was likely. Choose one to see what else could have come:</p>"
VARIETY = """### Many replies
The same dice for both columns; ★ is the reply that sample-and-rank would give: the one whose tokens the model itself
finds likeliest, of those that came to an end."""
CSS = """
#sampling { max-width: 1240px; margin: 0 auto; }
#sampling .block { padding: 8px 12px; }
#stages { overflow-x: auto; }
#stages .js-plotly-plot { min-width: 720px; }
#idle { min-height: 22px; }
#steps, #variety { align-items: end; }
"""


ENDS = (SEP, EOS)


@dataclass(frozen=True)
class Choice:
    """A choice of the model: what it had read, what it had said, what was drawn if that is known, and the settings."""

    prompt: list[int]
    said: list[int]
    drawn: int | None
    sampling: Sampling


class SamplingTab:
    """Draws the settings and the picture into the Blocks around it. `settings` are the components whose values, in the
    order of `Sampling`'s fields, the chat reads; `spoken` holds the chat's reply to look at, a `Drawn`.
    """

    def __init__(self, engine: Engine, spoken: gr.State):
        self.engine, self.spoken = engine, spoken
        self.said = gr.State([], time_to_live=3600)  # the tokens drawn step by step
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
                self.draw_choice()
                self.draw_variety()
        self.wire()

    def draw_choice(self) -> None:
        """One choice of the model, and the reply drawn step by step."""
        gr.Markdown(ABOUT.format(vocabulary=self.engine.model.config.vocab_size))
        self.source = gr.Radio([("this message", "message"), ("the chat's reply", "reply")], value="message",
                               label="The next token after", elem_id="source")
        self.message = gr.Textbox("Where should we eat tonight?", label="Message", max_lines=3, elem_id="looked-at")
        self.words = gr.HTML(visible=False, elem_id="words", elem_classes="sentence", js_on_load=TRIGGER)
        self.position = gr.State(1)
        self.picture = gr.Plot(show_label=False, elem_id="stages")
        self.summary = gr.Markdown(elem_id="summary")
        with gr.Accordion("The same as a table", open=False):
            self.table = gr.Dataframe(interactive=False, label="Probability after each stage")
            self.saving = gr.HTML(elem_id="saving")
        self.written = gr.Textbox(label="The reply so far", interactive=False, max_lines=4, elem_id="written")
        with gr.Row(elem_id="steps"):
            self.draw_one = gr.Button("Draw a token", variant="primary", size="sm")
            self.draw_rest = gr.Button("Draw the rest", size="sm")
            self.take_back = gr.Button("Take one back", size="sm")
            self.rival = gr.Dropdown([], value=None, label="Or choose the token yourself", elem_id="rival", scale=2)

    def draw_variety(self) -> None:
        """Many replies to the same, with the settings as they are and with a preset."""
        gr.Markdown(VARIETY)
        with gr.Row(elem_id="variety"):
            self.count = gr.Slider(1, 8, 4, step=1, label="Replies", elem_id="count")
            self.beside = gr.Dropdown(["none", *PRESETS], value="none", label="Beside them, the preset",
                                      elem_id="beside")
            self.draw_many = gr.Button("Draw replies", elem_id="draw-many")
        self.many = gr.HTML(elem_id="many")

    def wire(self) -> None:
        quiet = {"show_progress": "hidden", "api_visibility": "private", "concurrency_id": "look",
                 "concurrency_limit": 2}
        sliders = [setting for setting in self.settings if isinstance(setting, gr.Slider)]
        place = [self.source, self.message, self.position, self.spoken, self.said]
        looked_at = [*place, *self.settings]
        shown = [self.picture, self.summary, self.table, self.saving, self.written, self.rival, self.preset, self.idle]
        self.preset.input(lambda name: [getattr(PRESETS[name], field.name) for field in fields(Sampling)
                                        if field.name in SLIDERS], self.preset, sliders, **quiet)
        gr.on([setting.change for setting in self.settings], self.look, looked_at, shown,
              trigger_mode="always_last", **quiet)  # by mouse or keyboard, and not oftener than it can be shown
        choosing = (self.choose_source, [self.source, self.spoken],
                    [self.message, self.words, self.position, self.said])
        self.source.input(*choosing, **quiet).then(self.look, looked_at, shown, **quiet)
        self.message.submit(lambda: [], None, self.said, **quiet).then(self.look, looked_at, shown, **quiet)
        self.words.click(self.choose_position, self.spoken, [self.words, self.position, self.said], **quiet).then(
            self.look, looked_at, shown, **quiet)
        for event, step, given in (
                (self.draw_one.click, partial(self.draw_tokens, most=1), looked_at),
                (self.draw_rest.click, partial(self.draw_tokens, most=self.engine.model.config.seq_len), looked_at),
                (self.take_back.click, lambda said: said[:-1], self.said),
                (self.rival.input, self.choose, [self.rival, *looked_at])):
            event(step, given, self.said, **quiet).then(self.look, looked_at, shown, **quiet)
        self.draw_many.click(self.draw_replies, [self.count, self.beside, *looked_at], self.many,
                             **{**quiet, "show_progress": "full"})
        self.show = lambda tab: tab.select(*choosing, **quiet).then(self.look, looked_at, shown, **quiet)

    def choose_source(self, source: str, spoken: Drawn | None) -> tuple:
        """Shows the message box, or the reply's tokens, of which the first is looked at."""
        words = self.show_words(spoken, 1) if spoken else ""
        return gr.Textbox(visible=source == "message"), gr.HTML(words, visible=source == "reply"), 1, []

    def choose_position(self, spoken: Drawn | None, event: gr.EventData) -> tuple:
        """Another token of the reply, where nothing else has been drawn yet."""
        position = chosen_in(event) + 1
        return self.show_words(spoken, position) if spoken else "", position, []

    @torch.inference_mode()
    def show_words(self, spoken: Drawn, position: int) -> str:
        """The reply's tokens, each as dark as it was likely in the model's own eyes: HTML."""
        ids = torch.tensor([*spoken.prompt, *spoken.reply], device=self.engine.decoder.device)
        hidden = self.engine.model.hidden(ids[None, :-1])[0, len(spoken.prompt) - 1:]  # (T, C)
        odds = self.engine.model.logits(hidden).softmax(-1).gather(-1, ids[len(spoken.prompt):, None])[:, 0]  # (T,)
        return WORDS + shaded([self.name(id) for id in spoken.reply], odds.tolist(), position - 1)

    # ------------------------------------------------------------------------------------------------- one choice

    def read(self, source: str, message: str, position: int, spoken: Drawn | None, said: list[int],
             *settings: float) -> Choice:
        """What is to be looked at. Raises TinyGPTError for what cannot be."""
        sampling, drawn = read_settings(settings), None
        if source == "reply":
            if not spoken:
                raise TinyGPTError("There is no reply yet: say something in the chat first.")
            place = min(max(1, int(position)), len(spoken.reply)) - 1
            prompt, drawn = spoken.prompt, None if said else spoken.reply[place]
            said = [*spoken.reply[:place], *said]
        else:
            if problem := too_long(message):
                raise TinyGPTError(problem)
            prompt = fit_prompt(self.engine.model, self.engine.tokenizer, [message], sampling).ids
        if said and said[-1] in ENDS:  # the choice to look at is the last one
            said, drawn = said[:-1], said[-1]
        return Choice(prompt, said, drawn, sampling)

    def look(self, *looked_at: object) -> tuple:
        """The picture, its words, the table, the CSV, the reply so far, the tokens to choose from, the preset that the
        settings are, and the notes.
        """
        try:
            choice = self.read(*looked_at)
        except TinyGPTError as error:
            return gr.Plot(None), str(error), None, "", "", gr.Dropdown(choices=[], value=None), None, ""
        settings = replace(choice.sampling, seed=-1)
        preset = next((name for name, each in PRESETS.items() if each == settings), None)
        return *self.show_choice(choice), preset, "\n\n".join(idle(choice.sampling))

    def show_choice(self, choice: Choice) -> tuple:
        """What `look` shows of the choice itself."""
        odds = self.odds(choice)
        model, left, drawn = odds["model"], odds["min-p"], choice.drawn
        strongest = (model + left).topk(min(ROWS, len(model))).indices.tolist()
        if drawn is not None and drawn not in strongest:
            strongest[-1] = drawn
        strongest.sort(key=lambda id: -float(model[id]))
        names = [self.name(id) for id in strongest]
        columns = {name: stage[strongest].tolist() for name, stage in odds.items()}
        figure = stage_bars(names, columns, told(odds), strongest.index(drawn) if drawn is not None else None)
        rows = [[name, *(round(columns[stage][place], 6) for stage in columns)] for place, name in enumerate(names)]
        header = ["token", *columns]
        summary = (f"{int((left > 0).sum()):,} of {len(left):,} tokens may be drawn; the likeliest is "
                   f"`{self.name(int(left.argmax()))}` with {float(left.max()):.1%}.")
        if drawn is not None:
            summary += (f" Drawn was `{self.name(drawn)}`, which has {float(left[drawn]):.1%} with the settings as "
                        f"they are now{', and ended the reply' if drawn in ENDS else ''}.")
        elif self.full(choice):
            summary += " The model's window is full, so the reply ends here."
        elif len(choice.said) >= choice.sampling.max_new_tokens:
            summary += f" In the chat the reply would end here, after {len(choice.said)} tokens."
        rivals = [(f"{self.name(id)} · {float(model[id]):.1%}", id) for id in strongest if odds["repetition"][id] > 0]
        return (figure, summary, gr.Dataframe(rows, headers=header), link_to_csv(header, rows, "choice"),
                self.engine.tokenizer.decode(choice.said), gr.Dropdown(choices=rivals, value=None))

    @torch.inference_mode()
    def odds(self, choice: Choice) -> dict[str, torch.Tensor]:
        """The probability of every token after each stage, (V,) a stage: what is cut, and nothing else, has 0."""
        model, device = self.engine.model, self.engine.decoder.device
        read = torch.tensor([[*choice.prompt, *choice.said]], device=device)  # (1, T)
        cache = Cache(model.config, 1, device)  # the last token alone, as when a reply is drawn
        model.hidden(read[:, :-1], cache)
        logits = model.logits(model.hidden(read[:, -1:], cache)[:, -1])  # (1, V)
        after = {**stages(sayable(logits, [not choice.said]), read, choice.sampling), "model": logits}
        return {name: stage[0].softmax(-1).clamp_min(1e-30).where(stage[0] > -torch.inf, 0.0).cpu()
                for name, stage in after.items()}

    def full(self, choice: Choice) -> bool:
        return len(choice.prompt) + len(choice.said) >= self.engine.model.config.seq_len

    def name(self, id: int) -> str:
        return self.engine.tokenizer.piece(id).replace("▁", "␣")

    # ------------------------------------------------------------------------------------------------- replies

    def draw_tokens(self, *looked_at: object, most: int) -> list[int]:
        """The tokens said since the choice looked at and up to `most` more: those that the chat would draw with the
        same seed.
        """
        choice, said = self.next_choice(*looked_at)
        if choice is None:
            return said
        reply = Reply(Prompt(choice.prompt), choice.sampling, begun=choice.said)
        decoder = Decoder(self.engine.model, self.engine.tokenizer)
        decoder.join(reply)
        while decoder.replies and len(reply.steps) < most:
            decoder.step()
        return [*said, *(step.id for step in reply.steps)]

    def choose(self, token: int | None, *looked_at: object) -> list[int]:
        """The tokens said since the choice looked at and this one, if the Bot may say it."""
        choice, said = self.next_choice(*looked_at)
        if choice is None or not isinstance(token, int) or not 0 <= token < self.engine.model.config.vocab_size:
            return said
        sayable = token >= len(MARKERS) or (token in ENDS and choice.said)
        return [*said, token] if sayable else said

    def next_choice(self, source: str, message: str, position: int, spoken: Drawn | None, said: list[int],
                    *settings: float) -> tuple[Choice | None, list[int]]:
        """The choice to go on from, None if the reply has ended or `look` says what is wrong; and `said`."""
        try:
            choice = self.read(source, message, position, spoken, said, *settings)
        except TinyGPTError:
            return None, said
        ended = self.full(choice) or (said and said[-1] in ENDS)
        return None if ended else choice, said

    def draw_replies(self, count: int, beside: str, *looked_at: object) -> str:
        """Replies that go on from the choice looked at, as an HTML table with a link to its CSV."""
        try:
            choice = self.read(*looked_at)
        except TinyGPTError as error:
            raise gr.Error(str(error), print_exception=False) from None
        seed = choice.sampling.seed if choice.sampling.seed >= 0 else random.getrandbits(31)
        settings = {"with these settings": choice.sampling}
        if beside in PRESETS:
            settings[beside] = replace(PRESETS[beside], max_new_tokens=choice.sampling.max_new_tokens)
        header, columns = [], []
        for name, sampling in settings.items():
            sampling = replace(sampling, seed=seed, num_candidates=min(max(1, int(count)), 8))
            replies = candidates(Prompt(choice.prompt), sampling, choice.said)
            decoder = Decoder(self.engine.model, self.engine.tokenizer, len(replies))
            decoder.join(*replies)
            while decoder.replies:
                decoder.step()
            header += [name, "per token"]
            columns += [[reply.text for reply in replies], judged(replies)]
        rows = [list(row) for row in zip(*columns, strict=True)]
        return html_table(header, rows) + link_to_csv(header, rows, "replies")


def judged(replies: Sequence[Reply]) -> list[str]:
    """Of each reply, the mean (geometric) probability of a token in the model's own eyes; a star for the likeliest."""
    best = max(replies, key=lambda reply: reply.likelihood)
    return [("cut off" if reply.steps[-1].reason not in ("stop", "end") else f"{math.exp(reply.likelihood):.0%}")
            + (" ★" if reply is best else "") for reply in replies]


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


def title(name: str) -> str:
    return name.replace("_", " ").replace("ngram", "n-gram").capitalize()
