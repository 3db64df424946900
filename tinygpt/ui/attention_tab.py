"""What the heads attend to, what each layer would say, and what changes without a head, for a text or a chat reply."""

import html
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from urllib.parse import urlencode

import gradio as gr
import torch
from torch import Tensor

from tinygpt import attention as look
from tinygpt.config import Config, TinyGPTError
from tinygpt.engine import Engine
from tinygpt.figures import attention_tile, head_map, importance_map, lens_map, score_lines
from tinygpt.generate import Decoder, Reply
from tinygpt.model import TinyGPT
from tinygpt.sampling import Sampling
from tinygpt.tokenizer import SEP, Prompt, normalize
from tinygpt.ui.visitor import (
    SAVE,
    SAVE_PAGE,
    TRIGGER,
    Drawn,
    chosen_in,
    html_table,
    link_to_csv,
    shaded,
    too_long,
    ways_to_save,
    whole_page,
)

EXAMPLES = {
    "a name that returns": "My friend Maria is ill. I want to visit Maria tomorrow. What should I bring",
    "a list": "I like apples, bananas, apples, bananas, apples,",
    "a question": "Where did you buy the shoes that you are wearing today?",
}
ORDERS = {"layer": "layer by layer", "previous_token": "the token before", "first_token": "the first token",
          "separator": "markers", "induction": "induction", "entropy": "entropy", "distance": "distance"}
VIEWS = ["one head", "mean of the layer", "rollout"]
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
2022](https://arxiv.org/abs/2209.11895)). *Rollout* multiplies the layers' mean maps, to guess how much of each token
has reached a place by then ([Abnar & Zuidema 2020](https://arxiv.org/abs/2005.00928))."""
ABOUT_LENS = """What the model would say next at each token if it stopped after that layer: the **logit lens**
([nostalgebraist 2020](https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens)). The top row
is what it really says. Early layers mostly guess from the token alone."""
ABOUT_WITHOUT = """Choose heads to remove (their output becomes zero, or its mean over this text) and compare the next
token and the reply, always the likeliest one. *Measure every head* removes each in turn: a large number is a head that
this choice depends on; most depend on few ([Michel et al. 2019](https://arxiv.org/abs/1905.10650))."""
CSS = """
#attention { max-width: 1400px; margin: 0 auto; }
#heads .grid { display: grid; gap: 6px; align-items: start;
               grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); }
#heads button { border: 1px solid var(--border-color-primary); border-radius: 6px; padding: 4px; text-align: left;
                font-size: 11px; font-weight: 400; line-height: 1.3; background: none; cursor: pointer;
                color: var(--body-text-color); }
#heads button[aria-pressed=true] { outline: 3px solid var(--color-accent); }
#heads img { width: 100%; image-rendering: pixelated; display: block; background: #fff; margin: 0 0 3px; }
#lens, .wide { overflow-x: auto; }
.saving { font-size: 13px; color: var(--body-text-color-subdued); }
.saving :is(button, a) { color: var(--link-text-color); text-decoration: underline; margin: 0 4px; padding: 2px;
                         font: inherit; background: none; border: none; }
"""
MARK = """(layer, head) => document.querySelectorAll('#heads button').forEach(button => button.setAttribute(
  'aria-pressed', Number(button.dataset.number) === layer * %d + head));"""
ZOOM = """(...given) => {
  const {xaxis, yaxis} = document.querySelector('#%shead-map .js-plotly-plot')?._fullLayout ?? {};
  return [...given.slice(0, -1), xaxis && !xaxis.autorange ? [xaxis.range, yaxis.range] : null];
}"""  # Gradio draws each picture anew; this takes the zoom along


class HeadPanel:
    """One head's picture, and the text as it looks from one token."""

    def __init__(self, config: Config, name: str = "", head: int = 0):
        with gr.Row():
            self.layer = gr.Slider(0, config.num_layers - 1, 0, step=1, label="Layer", min_width=130,
                                   elem_id=f"{name}layer")
            self.head = gr.Slider(0, config.num_heads - 1, min(head, config.num_heads - 1), step=1, label="Head",
                                  min_width=130, elem_id=f"{name}head")
        self.picture = gr.Plot(label="One head's weights", show_label=False, elem_id=f"{name}head-map")
        self.saving = gr.HTML(js_on_load=SAVE, elem_id=f"{name}head-saving")
        self.summary = gr.Markdown(elem_id=f"{name}head-summary")
        self.sentence = gr.HTML(elem_id=f"{name}sentence", elem_classes="sentence", js_on_load=TRIGGER)
        self.zoom = gr.JSON(None, visible=False)
        self.chosen = [self.layer, self.head]
        self.shown = [self.picture, self.saving, self.summary, self.sentence]


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
        self.opened = gr.State("Heads")
        self.page = gr.Textbox(visible="hidden")
        with gr.Column(elem_id="attention"):
            gr.Markdown(ABOUT.format(heads=self.layers * self.heads))
            with gr.Row():
                self.text = gr.Textbox(next(iter(EXAMPLES.values())), label="Text", max_lines=4, submit_btn=True,
                                       scale=4, min_width=300, elem_id="attention-text")
                self.example = gr.Dropdown(list(EXAMPLES), value=None, label="Examples", scale=1, min_width=150,
                                           elem_id="attention-example")
                self.source = gr.Radio([("this text", "text"), ("the chat's reply", "reply")], value="text", scale=2,
                                       label="Look at", min_width=250, elem_id="attention-source")
            self.note = gr.Markdown(elem_id="attention-note")
            with gr.Tab("Heads") as heads:
                self.draw_heads(config)
            with gr.Tab("Layers") as layers:
                gr.Markdown(ABOUT_LENS)
                self.lens = gr.Plot(label="What each layer would say", show_label=False, elem_id="lens")
                self.lens_saving = gr.HTML(js_on_load=SAVE, elem_id="lens-saving")
            with gr.Tab("Removal") as removal:
                self.draw_removal()
            with gr.Tab("Training") as training:
                self.course_note = gr.Markdown()
                self.score = gr.Dropdown([(label, name) for name, label in ORDERS.items() if name != "layer"],
                                         value="induction", label="Score", elem_id="score")
                self.course = gr.Plot(label="The score over training", show_label=False, elem_id="course")
                self.course_saving = gr.HTML(js_on_load=SAVE)
        self.tabs = {"Heads": heads, "Layers": layers, "Removal": removal, "Training": training}

    def draw_heads(self, config: Config) -> None:
        """All heads, one of them, and another beside it."""
        with gr.Row():
            self.order = gr.Dropdown([(label, name) for name, label in ORDERS.items()], value="layer", min_width=160,
                                     label="Order the heads by", elem_id="order")
            self.view = gr.Radio(VIEWS, value=VIEWS[0], label="Show", scale=2, min_width=300, elem_id="view")
            self.scale = gr.Radio(SCALES, value=SCALES[0], label="Scale", scale=2, min_width=300, elem_id="scale")
        with gr.Row():
            self.compare = gr.Checkbox(False, label="Compare with another head or text", elem_id="compare")
            self.other_text = gr.Textbox("", label="Another text (left empty: the same)", max_lines=2, visible=False,
                                         submit_btn=True, elem_id="other-text")
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                self.overview = gr.HTML(elem_id="heads", js_on_load=TRIGGER)
            with gr.Column(scale=5, min_width=320):
                self.panel = HeadPanel(config)
            with gr.Column(scale=5, min_width=320, visible=False) as self.beside:
                self.other = HeadPanel(config, "other-", head=1)
        gr.Markdown(ABOUT_HEAD)

    def draw_removal(self) -> None:
        gr.Markdown(ABOUT_WITHOUT)
        with gr.Row():
            self.removed = gr.Dropdown([f"{n}.{h}" for n in range(self.layers) for h in range(self.heads)],
                                       multiselect=True, value=[], label="Heads to remove (layer.head)",
                                       elem_id="removed", scale=3)
            self.how = gr.Radio(["zero", "mean"], value="zero", label="Replace their output by")
            self.measure = gr.Button("Measure every head", elem_id="measure")
        self.without = gr.HTML(elem_id="without")
        with gr.Column():
            self.importance = gr.Plot(label="What each head matters", show_label=False, elem_id="importance")
            self.importance_saving = gr.HTML(js_on_load=SAVE, elem_id="importance-saving")

    def wire(self, tab: gr.Tab, tabs: gr.Tabs, page: gr.Blocks) -> None:
        """Every event to its handler, within its `tab` of the page's `tabs`. Only the view that is open is drawn."""
        quiet = {"show_progress": "hidden", "api_visibility": "private", "concurrency_id": "look",
                 "concurrency_limit": 2}
        text, chosen = [self.source, self.text, self.spoken], [self.view, self.scale, self.query]
        overview = self.show_overview, [*text, self.order], [self.overview]
        one = self.show_head, [*text, *self.panel.chosen, *chosen], self.panel.shown
        other = (self.show_other, [self.compare, self.other_text, *text, *self.other.chosen, *chosen],
                 self.other.shown)
        lens = self.show_lens, text, [self.lens, self.lens_saving]
        without = self.show_without, [*text, self.removed, self.how], [self.without]
        course = self.show_course, [self.score, *self.panel.chosen], [self.course, self.course_saving,
                                                                          self.course_note]
        importance = self.show_importance, text, [self.importance, self.importance_saving]
        views = {"Heads": [one, overview, other], "Layers": [lens], "Removal": [without], "Training": [course]}

        self.example.input(lambda name: (EXAMPLES.get(name, ""), "text"), self.example, [self.text, self.source],
                           **quiet)
        changed = gr.on([tab.select, self.source.input, self.text.submit, self.example.input], self.read_note, text,
                        [self.note, self.query], **quiet)
        for name, shows in views.items():
            opened = self.tabs[name].select(partial(str, name), None, self.opened, **quiet)
            for show, given, shown in shows:
                opened.then(show, given, shown, **quiet)
                changed.then(partial(self.if_open, name, show, len(shown)), [self.opened, *given], shown, **quiet)
        self.source.change(lambda source: gr.Textbox(visible=source == "text"), self.source, self.text, **quiet)
        self.order.change(*overview, **quiet)
        mark = {"inputs": [self.panel.layer, self.panel.head], "js": MARK % self.heads, "fn": None}
        self.overview.change(**mark)
        for name, panel, (show, given, shown) in (("", self.panel, one), ("other-", self.other, other)):
            gr.on([moved.change for moved in (panel.layer, panel.head, self.view, self.scale)], show,
                  [*given, panel.zoom], shown, js=ZOOM % name, trigger_mode="always_last", **quiet)
            panel.sentence.click(self.choose_query, None, self.query, **quiet).then(*one, **quiet).then(*other, **quiet)
        gr.on([self.panel.layer.change, self.panel.head.change], **mark)
        self.other_text.submit(*other, **quiet)
        self.compare.change(lambda compare: [gr.update(visible=compare)] * 2, self.compare,
                            [self.beside, self.other_text], **quiet).then(*other, **quiet).then(
            None, js="() => window.dispatchEvent(new Event('resize'))")  # the first picture has less room, or more
        self.overview.click(self.choose_head, None, self.panel.chosen, queue=False, **quiet)
        gr.on([self.removed.change, self.how.change], *without, trigger_mode="always_last", **quiet)
        self.measure.click(*importance, **{**quiet, "show_progress": "full"})
        self.score.change(*course, **quiet)
        for saving, (show, given, _) in ((self.panel.saving, one), (self.other.saving, other), (self.lens_saving, lens),
                                         (self.importance_saving, importance), (self.course_saving, course)):
            saving.click(partial(self.save_page, show), given, self.page, **quiet).success(
                None, self.page, None, js=SAVE_PAGE)
        page.load(self.follow_link, None, [tabs, self.source, self.text, self.spoken, *self.panel.chosen], **quiet)

    @staticmethod
    def if_open(name: str, show: Callable, count: int, opened: str, *given: object) -> object:
        """What `show` shows of `count` components, if the view of that name is open."""
        if opened == name:
            return show(*given)
        return [gr.skip()] * count if count > 1 else gr.skip()

    @staticmethod
    def save_page(show: Callable, *given: object) -> str:
        """The picture that `show` shows, as a web page of its own. Raises gr.Error if there is none."""
        figure = show(*given)[0]
        if not hasattr(figure, "to_html"):
            raise gr.Error("There is no picture to save yet.", print_exception=False)
        return whole_page(figure)

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
        if problem := too_long(text or ""):
            raise TinyGPTError(problem)
        prompt = self.tokenizer.encode_prompt([text or ""], longest)
        cut = prompt.dropped_tokens
        return prompt.ids, f"The model sees {longest} tokens: the first {cut} of the text are left out." if cut else ""

    def read_note(self, *text: object) -> tuple[str, int]:
        """What is wrong with the text or left out of it; and no query is chosen in it yet."""
        try:
            return self.read(*text)[1], -1
        except TinyGPTError as error:
            return str(error), -1

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.tokenizer.piece(id).replace("\u2581", "\u2423") for id in ids]

    def link(self, source: str, text: str, spoken: Drawn | None, layer: int, head: int) -> str:
        """A link that opens the page with the same text, layer and head."""
        where = {"text": normalize(text or ""), "layer": layer, "head": head}
        if source == "reply":
            turns, reply = [[]], self.tokenizer.decode(spoken.reply)
            for id in spoken.prompt:
                turns = [*turns, []] if id == SEP else [*turns[:-1], [*turns[-1], id]]
            said = [turn for turn in map(self.tokenizer.decode, turns) if turn]
            where |= {"text": "\n".join(said), "reply": reply}
        return f'<a href="?{html.escape(urlencode(where))}" target="_blank" rel="noopener">Link to this view</a>'

    def follow_link(self, request: gr.Request) -> tuple:
        """What `link` made: the tab, the source, the text, the reply, the layer and the head; nothing for a page opened
        without one.
        """
        asked = dict(request.query_params)
        nothing = (gr.skip(),) * 6
        if "text" not in asked:
            return nothing
        try:
            layer, head = (int(asked.get(name, 0)) for name in ("layer", "head"))
            look.head_mask(self.model, [(layer, head)])
            for text in (asked["text"], asked.get("reply", "none")):
                self.read("text", text, None)
        except ValueError:
            gr.Warning("The link's layer and head must be whole numbers.")
            return nothing
        except TinyGPTError as error:
            gr.Warning(f"The link cannot be followed. {error}")
            return nothing
        if "reply" not in asked:
            return gr.Tabs(selected="attention"), "text", asked["text"], gr.skip(), layer, head
        prompt = self.tokenizer.encode_prompt(asked["text"].split("\n"), self.model.config.seq_len).ids
        spoken = Drawn(prompt, [*self.tokenizer.encode(asked["reply"]), SEP])
        return gr.Tabs(selected="attention"), "reply", gr.skip(), spoken, layer, head

    # ------------------------------------------------------------------------------------------------- the heads

    def show_overview(self, source: str, text: str, spoken: Drawn | None, order: str) -> str:
        """All heads as small pictures, in HTML."""
        try:
            ids = torch.tensor(self.read(source, text, spoken)[0])
        except TinyGPTError:
            return ""
        maps = look.attention_maps(self.model, ids).cpu()
        scores = {**look.map_scores(maps, ids), "induction": self.induction().cpu()}
        kinds = look.kinds(scores)
        numbers = list(range(self.layers * self.heads))
        if order in scores:
            numbers.sort(key=lambda number: -float(scores[order].flatten()[number]))
        tiles = []
        for number in numbers:
            layer, head = divmod(number, self.heads)
            kind, sure = kinds[layer][head]
            value = f" · {float(scores[order][layer, head]):.2f}" if order in scores else ""
            picture = attention_tile(maps[layer, head].numpy())
            tiles.append(f'<button data-number="{number}"><img alt="" src="{picture}">'
                         f"<b>{layer}.{head}</b>{value}<br>{kind} {sure:.0%}</button>")
        return (f'<div class="grid" style="--columns: {max(6, self.heads)}" role="group" '
                f'aria-label="Heads, layer.head">{"".join(tiles)}</div>')

    def choose_head(self, event: gr.EventData) -> tuple[int, int]:
        """The layer and head of the small picture that was clicked."""
        number = chosen_in(event)
        return divmod(number, self.heads) if 0 <= number < self.layers * self.heads else (gr.skip(), gr.skip())

    def choose_query(self, event: gr.EventData) -> int:
        return chosen_in(event)

    def show_head(self, source: str, text: str, spoken: Drawn | None, layer: int, head: int, view: str, scale: str,
                  query: int, zoom: object = None) -> tuple:
        """One head's map, ways to save it, a sentence on it, and the text with the chosen query's weights. `zoom`: the
        part shown, [[left, right], [bottom, top]], None for all.
        """
        try:
            ids = torch.tensor(self.read(source, text, spoken)[0])
            look.head_mask(self.model, [(layer, head)])
        except TinyGPTError as error:
            return gr.Plot(None), "", str(error), ""
        weights, named = seen_as(look.attention_maps(self.model, ids), layer, head, view)  # (T, T)
        names = self.tokens(ids)
        query = query if 0 <= query < len(ids) else len(ids) - 1
        most = int(weights[query].argmax())
        summary = (f"{named}: from `{names[query]}` ({query}) it looks most at `{names[most]}` ({most}), with "
                   f"{float(weights[query, most]):.1%}. Choose another token to look from:")
        rows = [[f"{place} {name}", *(round(float(w), 6) for w in row)]
                for place, (name, row) in enumerate(zip(names, weights, strict=True))]
        header = ["query \\ key", *(f"{place} {name}" for place, name in enumerate(names))]
        saving = ways_to_save(header, rows, named.lower().replace(", ", "-").replace(" ", "-"),
                              self.link(source, text, spoken, layer, head))
        figure = head_map(names, weights.numpy(), scale)
        if is_zoom(zoom):
            figure.update_layout(xaxis_range=zoom[0], yaxis_range=zoom[1], yaxis_autorange=False)
        return figure, saving, summary, shaded(names, weights[query].tolist(), query)

    def show_other(self, compare: bool, other: str, source: str, text: str, *given: object) -> tuple:
        """The same beside it, where two are compared: of the `other` text if there is one."""
        if not compare:
            return (gr.skip(),) * 4
        return self.show_head(*(("text", other) if other else (source, text)), *given)

    # ------------------------------------------------------------------------------------------------- what it does

    def show_lens(self, source: str, text: str, spoken: Drawn | None) -> tuple:
        """What each layer would say at the last tokens, and the same as a table and to save."""
        try:
            ids, _ = self.read(source, text, spoken)
        except TinyGPTError:
            return gr.Plot(None), ""
        seen = look.inspect(self.model, ids)
        said, odds = look.logit_lens(self.model, seen.residual[:, -LENS:])  # (L + 1, LENS, 1) each
        names, said = self.tokens(ids)[-LENS:], [self.tokens(layer) for layer in said[..., 0].tolist()]
        odds = odds[..., 0].cpu()
        rows = [["embeddings" if not layer else f"layer {layer - 1}",
                 *(f"{token} {float(p):.4f}" for token, p in zip(tokens, row, strict=True))]
                for layer, (tokens, row) in enumerate(zip(said, odds, strict=True))]
        header = ["after", *names]
        return lens_map(names, said, odds.numpy()), ways_to_save(header, rows, "layers") + folded(header, rows)

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

    def show_importance(self, source: str, text: str, spoken: Drawn | None) -> tuple:
        """What each head's removal changes in the distribution of the reply's first token, and the same as a table and
        to save.
        """
        try:
            ids, _ = self.read(source, text, spoken, reply=False)
        except TinyGPTError as error:
            raise gr.Error(str(error), print_exception=False) from None
        nats = look.head_importance(self.model, look.inspect(self.model, ids)).cpu()  # (L, H)
        rows = [[f"layer {layer}", *(f"{float(change):.4f}" for change in row)] for layer, row in enumerate(nats)]
        header = ["KL in nats", *(f"head {head}" for head in range(self.heads))]
        return importance_map(nats.numpy()), ways_to_save(header, rows, "importance") + folded(header, rows)

    def show_course(self, score: str, layer: int, head: int) -> tuple:
        """How a score of every head came about, from the training log; ways to save it; and a note."""
        lines = [line for line in self.log if score in line.get("heads", {})]
        if not lines:
            return (gr.Plot(None), "",
                    "This model's log.jsonl has no head scores; train.py writes them at every validation.")
        header = ["tokens", *(f"{layer}.{head}" for layer in range(self.layers) for head in range(self.heads))]
        rows = [[line["tokens"], *(score for layer in line["heads"][score] for score in layer)] for line in lines]
        return (score_lines(lines, score, layer, head), ways_to_save(header, rows, score),
                "The head chosen under *Heads* is orange.")


def seen_as(maps: Tensor, layer: int, head: int, view: str) -> tuple[Tensor, str]:
    """What a view shows of maps (L, H, T, T): (T, T) on the CPU, and its name."""
    if view == "rollout":
        return look.rollout(maps)[layer].cpu(), f"Rollout up to layer {layer}"
    if view == "mean of the layer":
        return maps[layer].mean(0).cpu(), f"Layer {layer}, mean of its heads"
    return maps[layer, head].cpu(), f"Layer {layer}, head {head}"


def folded(header: list[str], rows: list[list[str]]) -> str:
    return ("<details><summary>The same as a table</summary>"
            f"<div class='wide'>{html_table(header, rows)}</div></details>")


def is_zoom(value: object) -> bool:
    """Whether a script of the page sent two pairs of numbers."""
    if not isinstance(value, list) or [len(pair) if isinstance(pair, list) else 0 for pair in value] != [2, 2]:
        return False
    return all(type(number) in (int, float) and math.isfinite(number) for pair in value for number in pair)


def heads_of(names: Sequence[str]) -> list[look.Head]:
    """The heads of "layer.head" texts. Raises TinyGPTError for other texts."""
    try:
        return [(int(layer), int(head)) for layer, head in (name.split(".") for name in names)]
    except (ValueError, AttributeError, TypeError):
        raise TinyGPTError("Heads are written layer.head, for example 0.3; choose them from the list.") from None
