"""The sampling tab: its settings are the chat's, and its picture is what the stages really do."""

import csv
import io
import re
from dataclasses import astuple, fields
from urllib.parse import unquote

import gradio
import pytest
import torch
from conftest import open_browser, served

from tinygpt import Sampling, generate, load_checkpoint, stream
from tinygpt.engine import Engine
from tinygpt.figures import stage_bars
from tinygpt.sampling import idle, stages
from tinygpt.tokenizer import BOS, BOT, SEP, USER
from tinygpt.ui.sampling_tab import PRESETS, SLIDERS, SamplingTab
from tinygpt.ui.visitor import Drawn, read_settings


@pytest.fixture(scope="module")
def tab(tiny_checkpoint):
    import gradio as gr

    with gr.Blocks():
        return SamplingTab(Engine(*load_checkpoint(tiny_checkpoint, "cpu")), gradio.State(None))


def place(source="message", message="Hello!", position=1, last=None, said=(), **settings):
    return source, message, position, last, list(said), *astuple(Sampling(**settings))


def look(tab, *args, **given):
    return tab.look(*place(*args, **given))


def csv_of(shown):
    link = re.search(r'href="data:text/csv;charset=utf-8,([^"]+)"', shown)
    return list(csv.reader(io.StringIO(unquote(link[1]))))


def table(shown):
    return {row[0]: [float(x) for x in row[1:]] for row in csv_of(shown[3])[1:]}


def test_the_words_of_a_reply_are_as_dark_as_they_were_likely(tab):
    model, tokenizer = tab.engine.model, tab.engine.tokenizer
    steps = list(stream(model, tokenizer, ["Hello!"], Sampling(seed=3, max_new_tokens=9)))
    spoken = Drawn(tokenizer.encode_prompt(["Hello!"], 119).ids, [step.id for step in steps])
    shown = tab.show_words(spoken, 1)
    assert [float(p) for p in re.findall(r'title="([\d.]+)"', shown)] == pytest.approx(
        [step.probability for step in steps], abs=6e-5)
    assert re.findall(r'data-number="(\d+)" aria-pressed="true"', shown) == ["0"]


def test_every_setting_has_a_control_that_starts_at_its_default(tab):
    assert [component.value for component in tab.settings] == list(astuple(Sampling()))
    assert {field.name for field in fields(Sampling)} == {*SLIDERS, "seed"}
    for name, (low, high, _, info) in SLIDERS.items():
        assert read_settings(astuple(Sampling(**{name: low}))) and read_settings(astuple(Sampling(**{name: high})))
        assert info.endswith(".")


def test_settings_from_the_page_are_the_chats():
    assert read_settings((0.5, 20.0, 0.8, 0.1, 1.0, 3.0, 40.0, -1.0, 2.0)) == Sampling(
        0.5, 20, 0.8, 0.1, 1.0, 3, 40, -1, 2)
    assert all(read_settings(astuple(preset)) == preset for preset in PRESETS.values())


def test_the_picture_shows_the_probabilities_after_each_stage(tab):
    model, tokenizer = tab.engine.model, tab.engine.tokenizer
    shown = look(tab, temperature=1.5, top_k=6, top_p=0.9, min_p=0.1)
    ids = [BOS, USER, *tokenizer.encode("Hello!"), SEP, BOT]
    logits = model(torch.tensor([ids]))[:, -1]
    sampling = Sampling(temperature=1.5, top_k=6, top_p=0.9, min_p=0.1)
    logits_said = logits.clone()
    logits_said[:, :7] = -torch.inf  # a reply begins with text
    expected = stages(logits_said, torch.tensor([ids]), sampling)
    expected = [logits.softmax(-1), *(stage.softmax(-1) for name, stage in expected.items() if name != "model")]
    rows = table(shown)
    assert len(rows) >= 6
    for id in range(tokenizer.vocab_size):
        name = tokenizer.piece(id).replace("▁", "␣")
        if name in rows:
            assert rows[name] == pytest.approx([float(stage[0, id]) for stage in expected], abs=2e-6)
    bars = shown[0].data
    assert [round(x, 6) for x in bars[0].x] == [row[0] for row in rows.values()]
    assert f"{int((expected[-1] > 0).sum())} of {tokenizer.vocab_size} tokens may be drawn" in shown[1]


def test_a_token_that_is_cut_is_grey_and_keeps_the_length_it_had():
    figure = stage_bars(["a", "b"], {"one": [0.7, 0.3], "two": [1.0, 0.0]}, ["", ""], drawn=0)
    assert list(figure.data[1].x) == [1.0, 0.3]
    assert figure.data[1].marker.color[1] == "#c8ccd2" != figure.data[0].marker.color[1]
    assert "&lt;/s&gt;" in str(stage_bars(["</s>"], {"one": [1.0]}, [""]).layout.yaxis.ticktext)


def test_a_token_of_the_last_reply_is_looked_at_where_it_was_drawn(tab):
    tokenizer = tab.engine.tokenizer
    ids = [BOS, USER, *tokenizer.encode("Hello!"), SEP, BOT]
    reply = [*tokenizer.encode("I like it."), SEP]
    shown = look(tab, "reply", position=3, last=Drawn(ids, reply))
    odds = tab.engine.model(torch.tensor([ids + reply[:2]]))[0, -1].softmax(-1)
    name = tokenizer.piece(reply[2]).replace("▁", "␣")
    assert f"Drawn was `{name}`" in shown[1]
    assert table(shown)[name][0] == pytest.approx(float(odds[reply[2]]), abs=2e-6)


@pytest.mark.parametrize("given, says", [
    ({"message": " "}, "no message to answer"), ({"message": "x" * 10_000}, "10,000 characters"),
    ({"source": "reply"}, "There is no reply yet")])
def test_nothing_to_look_at_is_said(tab, given, says):
    shown = look(tab, **given)
    assert says in shown[1] and shown[2] is None


@pytest.mark.parametrize("values", [(None,) * 9, (0.7, 40, 0.9, 0, 1.15, 0, 0, -1, 1), ("x", 1, 1, 1, 1, 1, 1, 1, 1)])
def test_values_that_cannot_be_are_told(tab, values):
    assert re.search(r"is .*; give", tab.look("message", "Hello!", 1, None, [], *values)[1])


@pytest.mark.parametrize("seed", range(3))
def test_drawn_token_by_token_a_reply_is_the_chats(tab, seed):
    model, tokenizer = tab.engine.model, tab.engine.tokenizer
    settings = {"temperature": 1.3, "seed": seed, "max_new_tokens": 30}
    expected = [step.id for step in stream(model, tokenizer, ["Hello!"], Sampling(**settings))]
    said = []
    for _ in expected:
        assert look(tab, said=said, **settings)[4] == tokenizer.decode(said)
        said = tab.draw_tokens(*place(said=said, **settings), most=1)
    assert said == expected
    half = len(expected) // 2
    assert tab.draw_tokens(*place(said=expected[:half], **settings), most=128) == expected
    given = Drawn(tokenizer.encode_prompt(["Hello!"], 100).ids, expected)
    rest = tab.draw_tokens(*place("reply", position=half + 1, last=given, **settings), most=128)
    assert expected[:half] + rest == expected  # also from within the chat's reply


def test_a_rival_may_be_chosen_and_the_reply_goes_on_from_it(tab):
    tokenizer = tab.engine.tokenizer
    rivals = look(tab)[5].choices
    assert len(rivals) >= 6 and all(id >= 7 for _, id in rivals)  # no reply begins with its end
    said = tab.choose(rivals[3][1], *place())
    assert said == [rivals[3][1]]
    said = tab.draw_tokens(*place(said=said, seed=1), most=1)
    assert len(said) == 2 and look(tab, said=said)[4] == tokenizer.decode(said)
    ended = tab.choose(SEP, *place(said=said))
    assert ended == [*said, SEP] and "ended the reply" in look(tab, said=ended)[1]
    assert tab.draw_tokens(*place(said=ended), most=5) == tab.choose(rivals[0][1], *place(said=ended)) == ended
    for never in (None, -1, 10**6, 0, BOT, "x"):
        assert tab.choose(never, *place()) == []
    assert tab.choose(SEP, *place()) == []


def test_a_full_window_ends_the_reply(tab):
    read = len(tab.engine.tokenizer.encode_prompt(["Hello!"], 100).ids)
    said = [tab.engine.tokenizer.encode("a")[0]] * (tab.engine.model.config.seq_len - read)
    assert "window is full" in look(tab, said=said)[1]
    assert tab.draw_tokens(*place(said=said), most=1) == tab.choose(9, *place(said=said)) == said
    assert len(tab.draw_tokens(*place(said=said[1:], seed=0), most=9)) <= len(said)


def test_many_replies_are_those_that_sample_and_rank_chooses_from(tab):
    model, tokenizer = tab.engine.model, tab.engine.tokenizer
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 5}
    header, *rows = csv_of(tab.draw_replies(4, "greedy", *place(**settings)))
    assert header == ["with these settings", "per token", "greedy", "per token"]
    assert len({row[0] for row in rows}) > 1 and len({row[2] for row in rows}) == 1
    best = generate(model, tokenizer, ["Hello!"], Sampling(**settings, num_candidates=4))
    assert [row[0] for row in rows if "★" in row[1]] == [best]
    alone = csv_of(tab.draw_replies(1, "none", *place(**settings)))
    assert alone[1][0] == generate(model, tokenizer, ["Hello!"], Sampling(**settings))
    with pytest.raises(gradio.Error, match="no message"):
        tab.draw_replies(4, "none", *place(message=" "))


def test_settings_without_effect_are_named():
    assert idle(Sampling()) == []
    assert "Temperature 0" in idle(Sampling(temperature=0))[0]
    assert len(idle(Sampling(temperature=0, num_candidates=3))) == 2
    assert "Top-k 1" in idle(Sampling(top_k=1))[0] and "Min-p 1" in idle(Sampling(min_p=1))[0]


def test_in_the_browser_a_setting_reaches_the_chat_and_its_reply_the_picture(tiny_checkpoint):
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    expect = playwright.expect
    with playwright.sync_playwright() as driver:
        try:
            browser = open_browser(driver)
        except playwright.Error:
            pytest.skip("no Chromium is installed")
        with served(tiny_checkpoint) as url:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            foreign, errors = [], []
            page.on("request", lambda r: r.url.startswith((url, "data:", "blob:")) or foreign.append(r.url))
            page.on("console", lambda m: m.type == "error" and errors.append(m.text))
            page.goto(url)
            page.get_by_role("tab", name="Sampling").click()
            expect(page.locator("#stages .js-plotly-plot")).to_be_visible(timeout=20_000)
            page.locator("#sampling input[type=range]").first.focus()
            before = page.locator("#summary").inner_text()
            page.keyboard.press("End")
            expect(page.locator("#summary")).not_to_have_text(before)
            expect(page.get_by_label("balanced")).not_to_be_checked()
            page.get_by_label("greedy").click()
            expect(page.locator("#idle")).to_contain_text("Temperature 0 always takes the likeliest")
            expect(page.locator("#summary")).to_contain_text("1 of ")
            replies = []
            page.get_by_role("tab", name="Chat").click()
            for again in (True, False):
                page.locator("#message textarea").fill("Hello!")
                page.locator("#message textarea").press("Enter")
                expect(page.locator("#conversation [data-testid=bot]")).to_have_count(1)
                expect(page.locator("#message [data-testid=submit-button]")).to_be_visible(timeout=20_000)
                replies.append(page.locator("#conversation [data-testid=bot]").inner_text())
                if again:
                    page.get_by_label("Clear").click()
            assert replies[0] == replies[1]  # greedy, from the other tab
            page.get_by_role("tab", name="Sampling").click()
            page.get_by_label("the chat's reply").click()
            expect(page.locator("#summary")).to_contain_text("Drawn was")
            words = page.locator("#words button")
            words.last.focus()
            page.keyboard.press("Enter")
            expect(words.last).to_have_attribute("aria-pressed", "true")
            expect(page.locator("#summary")).to_contain_text(f"Drawn was {words.last.inner_text()}")
            page.get_by_label("this message").click()
            written = page.locator("#written textarea")
            expect(written).to_have_value("")
            page.get_by_role("button", name="Draw a token").focus()
            page.keyboard.press("Enter")
            expect(written).not_to_have_value("")
            page.get_by_role("button", name="Draw the rest").click()
            expect(page.locator("#summary")).to_contain_text("end", timeout=20_000)  # "ended", or "would end here"
            page.get_by_role("button", name="Take one back").click()
            page.get_by_label("Or choose the token yourself").focus()
            page.keyboard.press("ArrowDown")
            page.keyboard.press("Enter")
            page.get_by_label("Beside them, the preset").click()
            page.get_by_role("option", name="creative").click()
            page.get_by_role("button", name="Draw replies").click()
            expect(page.locator("#many tbody tr")).to_have_count(4, timeout=20_000)
            expect(page.locator("#many")).to_contain_text("★")
            assert not foreign and not errors
        browser.close()
