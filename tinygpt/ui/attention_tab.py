"""What the heads attend to, what each layer would say, and what changes without a head, for a text or a chat reply."""

import html
from collections.abc import Mapping, Sequence
from functools import lru_cache

import gradio as gr
import torch

from tinygpt import attention as look
from tinygpt.config import TinyGPTError
from tinygpt.engine import Engine
from tinygpt.figures import attention_tile, head_map, importance_map, lens_map, score_lines
from tinygpt.generate import Decoder, Reply
from tinygpt.model import TinyGPT
from tinygpt.sampling import Sampling
from tinygpt.tokenizer import Prompt
from tinygpt.ui.visitor import Drawn, html_table, link_to_csv, sent, too_long

EXAMPLES = {
    "a name that returns": "My friend Maria is ill. I want to visit Maria tomorrow. What should I bring",
    "a list": "I like apples, bananas, apples, bananas, apples,",
    "a question": "Where did you buy the shoes that you are wearing today?",
}
ORDERS = {"layer": "layer by layer", "previous_token": "the token before", "first_token": "the first token",
          "separator": "markers", "induction": "induction", "entropy": "entropy", "distance": "distance"}
SCALES = ["linear", "logarithmic", "without first token"]
LENS = 24  # tokens in the picture of the layers
ABOUT = """Each of the model's {heads} heads looks from every token (a **query**) back at the tokens before it and
itself (the **keys**) and copies something of what it finds; its weights on them sum to 1. Here you see where every
head looked. Attention shows where a head reads, not why the model answers as it does ([Jain & Wallace
2019](https://arxiv.org/abs/1902.10186)): to learn that, remove the head below and watch what changes."""
ABOUT_HEAD = """Each row sums to 1; the upper triangle is blank, for no token sees what comes after it. A stripe beside
the diagonal is a head that looks one token back; a dark first column is one that rests: `<s>` is always there, and a
head that finds nothing to do puts its weight on it ([Xiao et al. 2023](https://arxiv.org/abs/2309.17453)). Heads that
look at what followed the same token last time are called induction heads ([Olsson et al.
2022](https://arxiv.org/abs/2209.11895))."""
ABOUT_LENS = """What the model would say next at each token if it stopped after that layer: the **logit lens**
([nostalgebraist 2020](https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens)). The top row
is what it really says. Early layers mostly guess from the token alone."""
ABOUT_WITHOUT = """Choose heads to remove (their output becomes zero, or its mean over this text) and compare the next
token and the reply, always the likeliest one. *Measure every head* removes each in turn: a large number is a head that
this choice depends on; most depend on few ([Michel et al. 2019](https://arxiv.org/abs/1905.10650))."""
CSS = """
#attention { max-width: 1240px; margin: 0 auto; }
#heads .grid { display: grid; gap: 6px; grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)); }
@media (max-width: 800px) { #heads .grid { grid-template-columns: repeat(auto-fill, minmax(50px, 1fr)); } }
#heads button { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: 4px; text-align: left;
                font-size: 11px; font-weight: 400; line-height: 1.3; background: none; cursor: pointer;
                color: var(--body-text-color); }
#heads button[aria-pressed=true] { outline: 3px solid var(--color-accent); }
#heads img { width: 100%; image-rendering: pixelated; display: block; background: #fff; margin: 0 0 3px; }
#sentence { line-height: 2; }
#sentence button { border: none; border-radius: 4px; padding: 2px 3px; margin: 0 1px; cursor: pointer; color: inherit;
                   font: inherit; }
#sentence button[aria-pressed=true] { outline: 2px solid #D55E00; }
#head-map, #lens { overflow-x: auto; }
"""
TRIGGER = """element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (button) trigger('click', {chosen: Number(button.dataset.number)});
});"""


class AttentionTab:
    """Draws the views into the Blocks around it. `spoken` holds the chat's reply to look at, a `Drawn`; `log` the lines
    of the model's log.jsonl.
    """

    def __init__(self, engine: Engine, spoken: gr.State, log: Sequence[Mapping] = ()):
        self.model, self.tokenizer, self.spoken, self.log = engine.model, engine.tokenizer, spoken, log
        config = engine.model.config
        self.layers, self.heads = config.num_layers, config.num_heads
        self.induction = lru_cache(1)(lambda: look.induction_scores(self.model))
        self.query = gr.State(-1)
        with gr.Column(elem_id="attention"):
            gr.Markdown(ABOUT.format(heads=self.layers * self.heads))
            with gr.Row():
                self.source = gr.Radio([("this text", "text"), ("the chat's reply", "reply")], value="text",
                                       label="Look at", elem_id="attention-source")
                self.example = gr.Dropdown(list(EXAMPLES), value=None, label="Examples", elem_id="attention-example")
            self.text = gr.Textbox(next(iter(EXAMPLES.values())), label="Text", max_lines=4, elem_id="attention-text")
            self.note = gr.Markdown(elem_id="attention-note")
            with gr.Tab("Heads"):
                self.order = gr.Dropdown([(label, name) for name, label in ORDERS.items()], value="layer",
                                         label="Order the heads by", elem_id="order")
                self.overview = gr.HTML(elem_id="heads", js_on_load=TRIGGER)
                gr.Markdown(ABOUT_HEAD)
                with gr.Row():
                    self.layer = gr.Slider(0, self.layers - 1, 0, step=1, label="Layer", elem_id="layer")
                    self.head = gr.Slider(0, self.heads - 1, 0, step=1, label="Head", elem_id="head")
                    self.scale = gr.Radio(SCALES, value="linear", label="Scale", elem_id="scale")
                self.picture = gr.Plot(show_label=False, elem_id="head-map")
                self.summary = gr.Markdown(elem_id="head-summary")
                self.sentence = gr.HTML(elem_id="sentence", js_on_load=TRIGGER)
                self.saving = gr.HTML(elem_id="head-saving")
            with gr.Tab("Layers") as self.lens_tab:
                gr.Markdown(ABOUT_LENS)
                self.lens = gr.Plot(show_label=False, elem_id="lens")
                self.lens_saving = gr.HTML()
            with gr.Tab("Removal"):
                gr.Markdown(ABOUT_WITHOUT)
                with gr.Row():
                    self.removed = gr.Dropdown([f"{n}.{h}" for n in range(self.layers) for h in range(self.heads)],
                                               multiselect=True, value=[], label="Heads to remove (layer.head)",
                                               elem_id="removed", scale=3)
                    self.how = gr.Radio(["zero", "mean"], value="zero", label="Replace their output by")
                    self.measure = gr.Button("Measure every head", elem_id="measure")
                self.without = gr.HTML(elem_id="without")
                self.importance = gr.Plot(show_label=False, elem_id="importance")
            with gr.Tab("Training") as self.course_tab:
                self.course_note = gr.Markdown()
                self.score = gr.Dropdown([(label, name) for name, label in ORDERS.items() if name != "layer"],
                                         value="induction", label="Score", elem_id="score")
                self.course = gr.Plot(show_label=False, elem_id="course")
        self.wire()

    def wire(self) -> None:
        quiet = {"show_progress": "hidden", "api_visibility": "private", "concurrency_id": "look",
                 "concurrency_limit": 2}
        text = [self.source, self.text, self.spoken]
        overview = self.show_overview, [*text, self.order, self.layer, self.head], [self.overview, self.note]
        head = (self.show_head, [*text, self.layer, self.head, self.scale, self.query],
                [self.picture, self.summary, self.sentence, self.saving])
        lens = self.show_lens, text, [self.lens, self.lens_saving]
        without = self.show_without, [*text, self.removed, self.how], self.without
        course = self.show_course, [self.score, self.layer, self.head], [self.course, self.course_note]
        self.example.input(lambda name: (EXAMPLES[name], "text"), self.example, [self.text, self.source], **quiet)
        self.show = lambda tab: gr.on(
            [tab.select, self.source.input, self.text.submit, self.example.input], lambda: -1, None, self.query,
            **quiet).then(*overview, **quiet).then(*head, **quiet).then(*lens, **quiet).then(*without, **quiet)
        self.order.change(*overview, **quiet)
        gr.on([self.layer.change, self.head.change], *head, trigger_mode="always_last", **quiet).then(
            *overview, **quiet)
        self.scale.change(*head, **quiet)
        self.overview.click(self.choose_head, None, [self.layer, self.head], **quiet)
        self.sentence.click(self.choose_query, None, self.query, **quiet).then(*head, **quiet)
        gr.on([self.removed.change, self.how.change], *without, trigger_mode="always_last", **quiet)
        self.measure.click(self.show_importance, text, self.importance, **{**quiet, "show_progress": "full"})
        gr.on([self.course_tab.select, self.score.change], *course, **quiet)

    # ------------------------------------------------------------------------------------------------- the text

    def read(self, source: str, text: str, spoken: Drawn | None, reply: bool = True) -> tuple[list[int], str]:
        """The tokens to look at, with the chat's `reply` or up to where it begins, and what had to be left out.
        Raises TinyGPTError if there are none.
        """
        longest = self.model.config.seq_len
        if source == "reply":
            if not spoken:
                raise TinyGPTError("There is no reply yet: say something in the chat first.")
            ids = [*spoken.prompt, *spoken.reply] if reply else spoken.prompt
            cut = max(0, len(ids) - longest)
            return ids[cut:], f"The first {cut} tokens are left out: the model sees {longest}." if cut else ""
        if problem := too_long(text):
            raise TinyGPTError(problem)
        prompt = self.tokenizer.encode_prompt([text], longest)
        cut = prompt.dropped_tokens
        return prompt.ids, f"The model sees {longest} tokens: the first {cut} of the text are left out." if cut else ""

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.tokenizer.piece(id).replace("\u2581", "\u2423") for id in ids]

    # ------------------------------------------------------------------------------------------------- the heads

    def show_overview(self, source: str, text: str, spoken: Drawn | None, order: str, layer: int,
                      head: int) -> tuple[str, str]:
        """All heads as small pictures, and a note on the text."""
        try:
            ids, note = self.read(source, text, spoken)
        except TinyGPTError as error:
            return "", str(error)
        ids = torch.tensor(ids)
        maps = look.attention_maps(self.model, ids).cpu()
        scores = {**look.map_scores(maps, ids), "induction": self.induction().cpu()}
        kinds = look.kinds(scores)
        numbers = list(range(self.layers * self.heads))
        if order in scores:
            numbers.sort(key=lambda number: -float(scores[order].flatten()[number]))
        tiles = []
        for number in numbers:
            at, which = divmod(number, self.heads)
            kind, sure = kinds[at][which]
            chosen = "true" if (at, which) == (layer, head) else "false"
            value = f" · {float(scores[order][at, which]):.2f}" if order in scores else ""
            tiles.append(f'<button data-number="{number}" aria-pressed="{chosen}">'
                         f'<img alt="" src="{attention_tile(maps[at, which].numpy())}">'
                         f"<b>{at}.{which}</b>{value}<br>{kind} {sure:.0%}</button>")
        return f'<div class="grid" role="group" aria-label="Heads, layer.head">{"".join(tiles)}</div>', note

    def choose_head(self, event: gr.EventData) -> tuple[int, int]:
        """The layer and head of the small picture that was clicked."""
        number = chosen_in(event)
        return divmod(number, self.heads) if 0 <= number < self.layers * self.heads else (gr.skip(), gr.skip())

    def choose_query(self, event: gr.EventData) -> int:
        return chosen_in(event)

    def show_head(self, source: str, text: str, spoken: Drawn | None, layer: int, head: int, scale: str,
                  query: int) -> tuple:
        """One head's map, a sentence on it, the text with the chosen query's weights, and the link to a CSV."""
        try:
            ids, _ = self.read(source, text, spoken)
            look.head_mask(self.model, [(layer, head)])
        except TinyGPTError as error:
            return gr.Plot(None), str(error), "", ""
        weights = look.attention_maps(self.model, torch.tensor(ids))[layer, head].cpu()  # (T, T)
        names = self.tokens(ids)
        query = query if 0 <= query < len(ids) else len(ids) - 1
        most = int(weights[query].argmax())
        summary = (f"Layer {layer}, head {head}: from `{names[query]}` ({query}) it looks most at `{names[most]}` "
                   f"({most}), with {float(weights[query, most]):.1%}. Choose another token to look from:")
        buttons = "".join(
            f'<button data-number="{place}" aria-pressed="{str(place == query).lower()}" '
            f'title="{float(weight):.4f}" style="background: rgba(0,114,178,{float(weight) ** 0.5 * 0.7:.3f})">'
            f"{html.escape(name)}</button>"
            for place, (name, weight) in enumerate(zip(names, weights[query], strict=True)))
        rows = [[f"{place} {name}", *(round(float(w), 6) for w in row)]
                for place, (name, row) in enumerate(zip(names, weights, strict=True))]
        header = ["query \\ key", *(f"{place} {name}" for place, name in enumerate(names))]
        return (head_map(names, weights.numpy(), scale), summary, buttons,
                link_to_csv(header, rows, f"layer-{layer}-head-{head}"))

    # ------------------------------------------------------------------------------------------------- what it does

    def show_lens(self, source: str, text: str, spoken: Drawn | None) -> tuple:
        """What each layer would say at the last tokens, and the link to a CSV."""
        try:
            ids, _ = self.read(source, text, spoken)
        except TinyGPTError:
            return gr.Plot(None), ""
        seen = look.inspect(self.model, ids)
        said, odds = look.logit_lens(self.model, seen.residual[:, -LENS:])  # (L + 1, LENS, 1) each
        names, said = self.tokens(ids)[-LENS:], [self.tokens(layer) for layer in said[..., 0].tolist()]
        odds = odds[..., 0].cpu()
        rows = [[layer, *(f"{token} {float(p):.4f}" for token, p in zip(tokens, row, strict=True))]
                for layer, (tokens, row) in enumerate(zip(said, odds, strict=True))]
        return lens_map(names, said, odds.numpy()), link_to_csv(["layer", *names], rows, "layers")

    def show_without(self, source: str, text: str, spoken: Drawn | None, removed: list[str], how: str) -> str:
        """The next token and the likeliest reply with all heads and without some, as HTML."""
        try:
            ids, _ = self.read(source, text, spoken, reply=False)
            seen = look.inspect(self.model, ids)
            lesion = look.without(self.model, seen, heads_of(removed), how)
        except TinyGPTError as error:
            return html.escape(str(error))
        before, after = (look.next_log_probs(model, seen.ids) for model in (self.model, lesion))
        strongest = (before.exp() + after.exp()).topk(10).indices.tolist()
        rows = [[name, f"{float(before[id].exp()):.2%}", f"{float(after[id].exp()):.2%}"]
                for id, name in zip(strongest, self.tokens(strongest), strict=True)]
        rows.append(["the likeliest reply", *(self.likeliest_reply(model, ids) for model in (self.model, lesion))])
        told = (f"Without {html.escape(', '.join(removed))}, the distribution of the reply's first token changes by "
                f"{float(look.change(before, after)):.4f} nats (KL)." if removed else "No head is removed yet.")
        header = ["the reply's first token", "with all heads", "without"]
        return f"<p>{told}</p>{html_table(header, rows)}{link_to_csv(header, rows, 'without-heads')}"

    def likeliest_reply(self, model: TinyGPT, ids: list[int]) -> str:
        reply = Reply(Prompt(ids), Sampling(temperature=0, max_new_tokens=30, no_repeat_ngram_size=3))
        decoder = Decoder(model, self.tokenizer)
        decoder.join(reply)
        while decoder.replies:
            decoder.step()
        return reply.text

    def show_importance(self, source: str, text: str, spoken: Drawn | None) -> object:
        """What each head's removal changes in the distribution of the reply's first token."""
        try:
            ids, _ = self.read(source, text, spoken, reply=False)
        except TinyGPTError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return importance_map(look.head_importance(self.model, look.inspect(self.model, ids)).cpu().numpy())

    def show_course(self, score: str, layer: int, head: int) -> tuple:
        """How a score of every head came about, from the training log."""
        if not any("heads" in line for line in self.log):
            return gr.Plot(None), "This model's log.jsonl has no head scores; train.py writes them at every validation."
        return score_lines(self.log, score, layer, head), "The chosen head is orange."


def chosen_in(event: gr.EventData) -> int:
    """The number of the button that was clicked; -1 for anything else that was sent."""
    chosen = sent(event, "chosen")
    return chosen if type(chosen) is int else -1


def heads_of(names: Sequence[str]) -> list[look.Head]:
    """The heads of "layer.head" texts. Raises TinyGPTError for other texts."""
    try:
        return [(int(layer), int(head)) for layer, head in (name.split(".") for name in names)]
    except (ValueError, AttributeError, TypeError):
        raise TinyGPTError("Heads are written layer.head, for example 0.3; choose them from the list.") from None
