"""The page as a visitor meets it, in a real browser. The server takes its time; told "slowly", it talks until
it is stopped.
"""

import re

import pytest
from conftest import open_browser, served

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
expect = playwright.expect

PACED = """
import time, torch, app
from tinygpt.ui.chat_tab import ChatTab
ask = ChatTab.ask
class Paced:
    def __init__(self, tab, turns, settings=()):
        self.tab, self.turns, self.settings = tab, turns, settings
        self.ticket = ask(tab, turns, settings)
        self.prompt, self.place, self.close = self.ticket.prompt, 0, self.ticket.close
    def bursts(self, patience):
        slowly = True
        while slowly:
            slowly = "slowly" in self.turns[-1]
            for step in self.ticket:
                time.sleep(0.2 if slowly else 0.01)
                yield [step]
            if slowly:
                self.ticket = ask(self.tab, self.turns, self.settings)
ChatTab.ask = lambda *asked: Paced(*asked)
torch.set_num_threads(1)  # leaves a core to the browser
app.main()
"""
HOSTILE = ('<script>alert(1)</script> <img src=x onerror=alert(1)> <b>bold</b> **bold** [a](https://example.com) '
           'https://example.com &amp; &lt; $$x^2$$ `code` <sep> Bot: 1 < 2')


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        try:
            browser = open_browser(driver)
        except playwright.Error:
            pytest.skip("no Chromium is installed")
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(browser, tiny_checkpoint):  # after `browser`, which may skip
    with served(tiny_checkpoint, "-c", PACED) as url:
        yield url


class Chat:
    """The page in words of the visitor."""

    def __init__(self, page):
        self.page = page
        self.box = page.locator("#message textarea")
        self.said = page.locator("#conversation [data-testid=user]")
        self.replies = page.locator("#conversation [data-testid=bot]")
        self.ready = page.locator("#message [data-testid=submit-button]")
        self.stop = page.locator("#message [data-testid=stop-button]")
        self.note = page.locator("#note")

    def say(self, text):
        self.box.fill(text)
        self.box.press("Enter")

    def ask(self, text):
        """Says it and waits for the end of the reply."""
        before = self.replies.count()
        self.say(text)
        expect(self.replies).to_have_count(before + 1)
        expect(self.ready).to_be_visible(timeout=15_000)
        return self.replies.last.inner_text()

    def press(self, label):
        self.page.get_by_label(label, exact=True).last.click()

    def reply_begins(self):
        expect(self.replies.last).to_have_text(re.compile(r"\S"))


@pytest.fixture
def chat(browser, url):
    """A fresh page. Whatever a test does, nothing may be asked from elsewhere and nothing go wrong in the console."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    foreign, errors = [], []
    page.on("response", lambda r: r.status >= 400 and errors.append(f"{r.status} {r.url}"))
    page.on("request", lambda r: r.url.startswith((url, "data:", "blob:")) or foreign.append(r.url))
    page.on("console", lambda m: m.type == "error" and errors.append(m.text))
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("dialog", lambda d: (errors.append(f"dialog: {d.message}"), d.dismiss()))
    page.goto(url)
    chat = Chat(page)
    expect(chat.box).to_be_visible(timeout=15_000)
    yield chat
    page.close()
    assert not foreign and not errors


def test_any_reply_can_be_looked_into(chat):
    chat.ask("Hello!")
    chat.ask("What now?")
    sentence, buttons = chat.page.locator("#sentence"), chat.page.get_by_role("button", name="Inspect attention")
    expect(buttons).to_have_count(2)
    buttons.first.click()
    expect(sentence).to_contain_text("Hello!", timeout=20_000)
    expect(sentence).not_to_contain_text("now?")
    chat.page.get_by_role("tab", name="Chat").click()
    buttons.last.click()
    expect(sentence).to_contain_text("now?", timeout=20_000)
    chat.page.get_by_role("tab", name="Chat").click()
    chat.page.get_by_role("button", name="Why these words?").first.click()
    expect(chat.page.locator("#summary")).to_contain_text("Drawn was", timeout=20_000)


def test_reply_streams_in(chat):
    expect(chat.page).to_have_title("TinyGPT")
    chat.say("Hello, slowly!")
    expect(chat.said).to_have_text(["Hello, slowly!"])
    expect(chat.box).to_have_value("")
    chat.reply_begins()
    beginning = chat.replies.last.inner_text()
    expect(chat.replies).not_to_have_text([beginning])
    assert len(chat.replies.last.inner_text()) > len(beginning)
    expect(chat.box).to_be_focused()
    chat.stop.click()
    expect(chat.ready).to_be_visible()


def test_conversation_goes_on_and_old_turns_are_said_to_be_forgotten(chat):
    expect(chat.note).to_contain_text("makes things up")
    chat.ask("My name is Anna and " + "I like to talk. " * 20)
    chat.ask("I have a dog.")
    expect(chat.said).to_have_count(2)
    expect(chat.replies).to_have_count(2)
    expect(chat.note).to_contain_text("forgotten")


def test_stop_keeps_what_was_said_and_the_chat_goes_on(chat):
    chat.say("Tell me a story, slowly.")
    chat.reply_begins()
    chat.stop.click()
    expect(chat.ready).to_be_visible()
    chat.page.wait_for_timeout(300)  # words on their way still arrive
    stopped = chat.replies.last.inner_text()
    chat.page.wait_for_timeout(500)
    assert chat.replies.last.inner_text() == stopped
    chat.ask("Go on.")
    expect(chat.replies).to_have_count(2)
    assert chat.replies.first.inner_text() == stopped


def test_retry_gives_another_reply(chat):
    first = chat.ask("Hello!")
    chat.press("Retry")
    expect(chat.replies).not_to_have_text([first])
    expect(chat.ready).to_be_visible(timeout=15_000)
    expect(chat.said).to_have_text(["Hello!"])
    expect(chat.replies).to_have_count(1)
    expect(chat.replies).not_to_have_text([first])


def test_undo_gives_the_message_back(chat):
    chat.ask("Hello!")
    chat.ask("How are you?")
    chat.press("Undo")
    expect(chat.said).to_have_text(["Hello!"])
    expect(chat.box).to_have_value("How are you?")


def test_edit_goes_on_from_the_new_words(chat):
    chat.ask("Hello!")
    chat.box.fill("a draft")
    for refused in (" ", "x" * 2001):
        chat.press("Edit")
        chat.page.locator("#conversation textarea").fill(refused)
        chat.press("Submit")
        expect(chat.said).to_have_text(["Hello!"])
    chat.press("Edit")
    chat.page.locator("#conversation textarea").fill("Good morning!")
    chat.press("Submit")
    chat.reply_begins()
    expect(chat.ready).to_be_visible(timeout=15_000)
    expect(chat.said).to_have_text(["Good morning!"])
    expect(chat.replies).to_have_count(1)
    expect(chat.box).to_have_value("a draft")


def test_clear_empties_the_chat_once_nobody_speaks(chat):
    chat.say("Hello, slowly!")
    chat.reply_begins()
    clear = chat.page.get_by_label("Clear", exact=True)
    expect(clear).to_be_hidden()
    chat.stop.click()
    clear.click()
    expect(chat.said).to_have_count(0)
    chat.page.wait_for_timeout(500)
    expect(chat.replies).to_have_count(0)
    chat.ask("Hello again!")
    expect(chat.said).to_have_text(["Hello again!"])


def test_example_begins_a_conversation(chat):
    example = chat.page.locator("#conversation .example").nth(1)
    text = example.inner_text()
    example.click()
    expect(chat.said).to_have_text([text])
    chat.reply_begins()
    expect(chat.ready).to_be_visible(timeout=15_000)


def test_enter_during_a_reply_keeps_the_draft(chat):
    chat.say("Hello, slowly!")
    chat.reply_begins()
    chat.say("And another thing")
    chat.stop.click()
    expect(chat.ready).to_be_visible()
    expect(chat.said).to_have_text(["Hello, slowly!"])
    expect(chat.box).to_have_value("And another thing")


def test_text_stays_text(chat):
    chat.ask(HOSTILE)
    assert chat.said.last.inner_text().replace("\u200b", "") == HOSTILE
    assert chat.said.last.locator("b, strong, a, img, script, code, .katex").count() == 0
    chat.press("Undo")
    expect(chat.box).to_have_value(HOSTILE)


def test_what_cannot_be_answered_stays_in_the_box(chat):
    chat.say("x" * 2001)
    expect(chat.page.get_by_test_id("toast-body")).to_contain_text("2,001 characters")
    expect(chat.box).to_have_value("x" * 2001)
    expect(chat.said).to_have_count(0)
    chat.page.wait_for_timeout(500)
    chat.ask("x" * 2000)
    expect(chat.note).to_contain_text("only the end")


def test_empty_message_does_nothing(chat):
    chat.say(" \n ")
    chat.page.wait_for_timeout(500)
    expect(chat.said).to_have_count(0)
    expect(chat.ready).to_be_visible()


def test_nothing_can_be_sent_during_a_retry(chat):
    place = chat.box.bounding_box()
    chat.say("Hello, slowly!")
    chat.reply_begins()
    chat.stop.click()
    expect(chat.ready).to_be_visible()
    chat.page.wait_for_timeout(2_000)  # Gradio goes on cancelling for a moment, and would take the retry along
    chat.press("Retry")
    expect(chat.stop).to_be_visible()
    expect(chat.box).not_to_be_editable()
    assert chat.box.bounding_box() == place
    chat.reply_begins()
    chat.stop.click()
    expect(chat.ready).to_be_visible()
    expect(chat.box).to_be_editable()
    expect(chat.said).to_have_text(["Hello, slowly!"])


@pytest.mark.parametrize("width, height", [(375, 812), (375, 640), (1280, 800)])
def test_everything_fits(chat, width, height):
    chat.page.set_viewport_size({"width": width, "height": height})

    def assert_fits():
        assert chat.page.evaluate("document.documentElement.scrollWidth") <= width
        assert chat.page.locator("#conversation [role=log]").evaluate("e => e.scrollWidth - e.clientWidth") <= 0
        expect(chat.box).to_be_in_viewport(ratio=1)
        expect(chat.note).to_be_in_viewport(ratio=1)

    assert_fits()
    place = chat.box.bounding_box()
    chat.ask("W" * 200 + " and on a new line\n<pre>" + "wide " * 20)
    assert_fits()
    assert chat.box.bounding_box() == place
