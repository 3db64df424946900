"""The chat: a conversation that streams, with stop, retry, undo, edit, clear and copy, and the endpoint /chat.

The conversation lives in the page alone: each event brings it along and nothing of it stays on the server.
"""

import re
from collections.abc import Iterator, Sequence

import gradio as gr

from tinygpt.config import TinyGPTError
from tinygpt.engine import Engine, Ticket
from tinygpt.model import TinyGPT
from tinygpt.sampling import Sampling
from tinygpt.tokenizer import Prompt, normalize
from tinygpt.ui.visitor import Drawn, read_settings, sent, too_long

EXAMPLES = (
    "Hi! How are you today?",
    "I can't find my keys anywhere.",
    "What should I cook for dinner?",
    "Do you have any plans for the weekend?",
    "My boss gave me too much work again.",
    "I want to read my sister's diary.",
)
NOTICE = "TinyGPT makes things up and is not an assistant. Nothing you write is saved."
RUNS_THE_MODEL = {"concurrency_id": "model", "concurrency_limit": 40}  # more than the engine takes, which says so
CSS = """
#chat { height: calc(100dvh - 172px); min-height: 400px; max-width: 820px; margin: 0 auto; gap: 10px;
        flex-wrap: nowrap; }
#conversation { flex: 1 1 0; min-height: 0; }
#conversation .placeholder { max-width: 34em; margin: auto; padding: 0 16px; text-align: center; }
#conversation .placeholder h2 { font-size: 19px; }
#conversation .examples { grid-template-columns: repeat(auto-fit, minmax(min(180px, 45%), 1fr));
                          max-width: min(640px, 100%); }
#conversation .example { padding: 10px 14px; }
#conversation .message { overflow-wrap: anywhere; }
#chat:has([data-testid="stop-button"]) [aria-label="Clear"] { visibility: hidden; }
#conversation .message-buttons .icon-button-wrapper { background: none; border: none; box-shadow: none; }
#conversation .message-buttons button { background: none; }
#message { flex: none; }
#message textarea { padding: 11px 4px 11px 16px; font-size: 16px; }
#message button { margin: 0 7px 7px 0; }
#chat .html-container { padding: 0; }
#chat [data-testid="status-tracker"] { display: none; }
#inspect { display: none; }
#conversation .message-buttons .inspect { font-size: 12px; padding: 2px 6px; color: var(--body-text-color-subdued); }
#conversation .message-buttons .inspect:hover { color: var(--body-text-color); text-decoration: underline; }
#note { flex: none; min-height: 36px; text-align: center; font-size: 13px; }
#note * { font-size: inherit; color: var(--body-text-color-subdued); }
"""
INSPECT = """const chat = element.closest('#chat');
const label = () => chat.querySelectorAll('#conversation .message-buttons-left').forEach((panel, reply) => {
  if (panel.querySelector('.inspect')) return;
  for (const [tab, text] of [['sampling', 'Why these words?'], ['attention', 'Inspect attention']]) {
    const button = document.createElement('button');
    button.className = 'inspect';
    button.textContent = text;
    button.onclick = () => trigger('click', {reply, tab});
    panel.firstElementChild.append(button);
  }
});
new MutationObserver(label).observe(chat, {childList: true, subtree: true});"""  # Gradio's buttons are all its own


class ChatTab:
    """Draws the chat into the Blocks around it; `wire` makes it answer, with the settings of the sampling tab.

    `drawn` holds how each reply of the conversation was drawn, a list of `Drawn`, and `spoken` the one that the other
    tabs look at: the last, or the one that was chosen.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        with gr.Column(elem_id="chat"):
            self.conversation = gr.Chatbot(
                elem_id="conversation", label="Conversation", show_label=False, height="100%", layout="bubble",
                editable="user", buttons=["copy"], render_markdown=False, latex_delimiters=[], allow_tags=False,
                group_consecutive_messages=False, placeholder=introduction(engine.model),
                examples=[{"text": text} for text in EXAMPLES])
            self.message = gr.Textbox(
                elem_id="message", label="Your message", show_label=False, container=False, autofocus=True, max_lines=4,
                placeholder="Say something", submit_btn=True)
            self.note = gr.HTML(NOTICE, elem_id="note")
            self.inspect = gr.HTML(elem_id="inspect", js_on_load=INSPECT)
        self.drawn = gr.State([], time_to_live=3600)
        self.spoken = gr.State(None, time_to_live=3600)

    def wire(self, settings: list[gr.components.Component], tabs: gr.Tabs, sources: list[gr.Radio]) -> None:
        """Every event to its handler. Only one reply streams at a time: meanwhile the Chatbot locks its retry, undo and
        edit buttons, the style sheet hides clear (words on their way would refill the chat), and Enter does nothing.
        `settings` are read at each reply; in the other `tabs`, `sources` choose between it and another text.
        """
        drawn = {"outputs": [self.message, self.conversation, self.note], "show_progress": "hidden",
                 "api_visibility": "private"}
        replying = {**drawn, "outputs": [*drawn["outputs"], self.drawn, self.spoken], **RUNS_THE_MODEL}
        talk = [self.conversation, self.drawn, *settings]
        replies = [
            self.message.submit(self.send, [self.message, *talk], **replying),
            self.conversation.retry(self.retry, talk, **replying),
            self.conversation.edit(self.edit, talk, **replying),
            self.conversation.example_select(self.begin, settings, **replying)]
        for reply in replies:  # an event of its own: a message sent in the last moment of a reply would be ignored
            reply.success(ready, None, self.message, queue=False, show_progress="hidden", api_visibility="private")
        self.message.stop(lambda: (ready(), gr.skip(), gr.skip()), None, cancels=replies, queue=False, **drawn)
        drawn["outputs"] = replying["outputs"]
        self.conversation.undo(self.undo, [self.conversation, self.drawn], queue=False, **drawn)
        self.conversation.clear(lambda: shown(ready(), [], NOTICE, []), None, queue=False, **drawn)
        self.inspect.click(self.choose, [self.drawn, self.spoken], [self.spoken, tabs, *sources], queue=False,
                           show_progress="hidden", api_visibility="private")
        gr.api(self.chat, api_name="chat", **RUNS_THE_MODEL)

    def send(self, message: str, history: list[dict], drawn: list[Drawn], *settings: float) -> Iterator[tuple]:
        """A new message from the text box, which keeps one that cannot be answered."""
        if acceptable(message):
            yield from self.reply([*history, said("user", message.strip())], drawn, settings, typing=True)
        else:
            yield shown()

    def retry(self, history: list[dict], drawn: list[Drawn], clicked: gr.RetryData,
              *settings: float) -> Iterator[tuple]:
        """Another reply to the same message."""
        yield from self.reply(history[:clicked.index + 1], drawn, settings)

    def edit(self, history: list[dict], drawn: list[Drawn], edited: gr.EditData, *settings: float) -> Iterator[tuple]:
        """An earlier message reworded: the conversation goes on from there."""
        if acceptable(plain(edited.value)):
            yield from self.reply([*history[:edited.index], said("user", edited.value.strip())], drawn, settings)
        else:
            before = said("user", edited.previous_value)
            yield shown(history=[*history[:edited.index], before, *history[edited.index + 1:]])

    def begin(self, clicked: gr.SelectData, *settings: float) -> Iterator[tuple]:
        """An example as the first message."""
        if acceptable(clicked.value["text"]):
            yield from self.reply([said("user", clicked.value["text"])], [], settings)
        else:
            yield shown()

    def undo(self, history: list[dict], drawn: list[Drawn], clicked: gr.UndoData) -> tuple:
        """Takes back the last message and its reply; the message returns to the text box."""
        kept = history[:clicked.index]
        return shown(ready(value=plain(text_of(history[clicked.index]))), kept, NOTICE, drawn[:replies_in(kept)])

    def choose(self, drawn: list[Drawn], spoken: Drawn | None, clicked: gr.EventData) -> tuple:
        """The reply that the other tabs are to look at, and the tab to open."""
        number, tab = (sent(clicked, name) for name in ("reply", "tab"))
        if type(number) is int and 0 <= number < len(drawn):
            spoken = drawn[number]
        return spoken, gr.Tabs(selected=tab) if tab in ("sampling", "attention") else gr.skip(), "reply", "reply"

    def reply(self, history: list[dict], drawn: list[Drawn], settings: Sequence[float],
              typing: bool = False) -> Iterator[tuple]:
        """The Bot's answer to `history`, growing token by token, added to the replies of it that were `drawn`. Who is
        `typing` may go on doing so: Gradio ignores Enter while the event it began is under way, but not while another
        is.
        """
        ticket = self.ask(turns_of(history), settings)
        try:
            note = note_on(ticket.prompt, self.engine.model.config.seq_len)
            emptied = {"value": ""} if typing else {}
            yield shown(gr.Textbox(submit_btn=False, stop_btn=True, interactive=typing, **emptied), history, note)
            drawn, text, ids = drawn[:replies_in(history)], "", []
            for burst in ticket.bursts(patience=0.2):  # Gradio can stop this only where it yields
                if not burst:
                    place = ticket.place
                    yield shown(note=f"TinyGPT is busy: you are number {place} in line." if place else note)
                    continue
                begins = not ids
                text += "".join(step.text for step in burst)
                ids += [step.id for step in burst]
                yield shown(history=[*history, said("assistant", text)], note=note if begins else None,
                            drawn=[*drawn, Drawn(ticket.prompt.ids, list(ids))])
        except TinyGPTError as error:
            gr.Warning(str(error))  # no gr.Error: the box would keep its stop button
        finally:
            ticket.close()

    def ask(self, turns: list[str], settings: Sequence[float] = ()) -> Ticket:
        """The engine's ticket for a reply; what cannot be done is told to the visitor in so many words."""
        try:
            return self.engine.ask(turns, read_settings(settings) if settings else Sampling())
        except TinyGPTError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def chat(self, message: str, history: list[str] | None = None) -> Iterator[str]:
        """TinyGPT's reply to a message, streamed: each update holds the reply so far.

        Args:
            message: What you say, at most 2,000 characters.
            history: The turns before it, oldest first, the last one TinyGPT's. Left out, a conversation begins.
        """
        turns = [*history, message] if isinstance(history, list) else [message]
        if not isinstance(history, list | None) or not all(isinstance(turn, str) for turn in turns):
            problem = "The message must be text, and the history a list of texts."
        else:
            problem = too_long(max(turns, key=len)) or (not normalize(message) and "The message is empty.")
        if problem:
            raise gr.Error(problem, print_exception=False)
        text = ""
        try:
            for burst in self.ask(turns).bursts(patience=0.2):
                text += "".join(step.text for step in burst)
                yield text
        except TinyGPTError as error:
            raise gr.Error(str(error), print_exception=False) from None


def shown(message=None, history=None, note=None, drawn=None) -> tuple:
    """What an event changes on the page; the rest stays as it is."""
    changes = tuple(gr.skip() if value is None else value for value in (message, history, note, drawn))
    return *changes, gr.skip() if drawn is None else drawn[-1] if drawn else None


def ready(**changes) -> gr.Textbox:
    """The text box as it waits for a message."""
    return gr.Textbox(submit_btn=True, stop_btn=False, interactive=True, **changes)


def said(role: str, text: str) -> dict:
    """A message for the Chatbot, which shows HTML even where Markdown is off: a zero-width space, which the tokenizer
    ignores, makes each "<" and "&" a mere character.
    """
    return {"role": role, "content": re.sub("[<&]", "\\g<0>\u200b", plain(text))}


def plain(text: str) -> str:
    """Undoes what `said` put in, and what cannot be sent: half a surrogate pair."""
    return text.replace("\u200b", "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def text_of(message: dict) -> str:
    """What a message of the Chatbot says."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def replies_in(history: Sequence[dict]) -> int:
    return sum(message["role"] == "assistant" for message in history)


def turns_of(history: Sequence[dict]) -> list[str]:
    """The turns of a conversation, the speakers alternating: messages left without a reply count as one turn."""
    turns, speaker = [], None
    for message in history:
        if message["role"] == speaker:
            turns[-1] += " " + text_of(message)
        else:
            turns.append(text_of(message))
            speaker = message["role"]
    return turns


def acceptable(message: str) -> bool:
    """Whether a message from the page can be answered; one that is too long is refused in so many words."""
    if problem := too_long(message):
        gr.Warning(problem)
    return not problem and bool(normalize(message))


def note_on(read: Prompt, seq_len: int) -> str:
    """What a visitor should know about the reply: mostly nothing new, at times what the model could not read."""
    if read.dropped_tokens:
        return "That is more than TinyGPT can remember: it read only the end of your message."
    if read.dropped_turns:
        forgotten = "first turn is" if read.dropped_turns == 1 else f"first {read.dropped_turns} turns are"
        return f"TinyGPT sees {seq_len} tokens, its reply included: the {forgotten} forgotten."
    return NOTICE


def introduction(model: TinyGPT) -> str:
    """What an empty chat says about the model, as HTML."""
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return (f"<h2>Say something to a very small GPT</h2><p>{millions:.1f} million parameters, trained from scratch on "
            "dialogues. It chats rather than helps, and remembers only the last few turns "
            f"({model.config.seq_len} tokens, its reply included).</p>")
