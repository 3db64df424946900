"""The attention tab shows what the heads really do, and refuses what cannot be shown in one sentence."""

import csv
import io
import re
from base64 import b64decode
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl, unquote, urlsplit

import gradio
import numpy as np
import pytest
import torch
from conftest import open_browser, served
from PIL import Image

from tinygpt import Sampling, TinyGPTError, generate, load_checkpoint
from tinygpt.attention import attention_maps, head_importance, inspect, logit_lens, next_log_probs, without
from tinygpt.engine import Engine
from tinygpt.figures import attention_tile, head_map, score_lines
from tinygpt.tokenizer import BOS, BOT, SEP, USER
from tinygpt.ui.attention_tab import AttentionTab, heads_of
from tinygpt.ui.visitor import Drawn

TEXT = ("text", "Hello! How are you?", None)


@pytest.fixture(scope="module")
def tab(tiny_checkpoint):
    with gradio.Blocks():
        return AttentionTab(Engine(*load_checkpoint(tiny_checkpoint, "cpu")), gradio.State(None))


@pytest.fixture(scope="module")
def seen(tab):
    return inspect(tab.model, [BOS, USER, *tab.tokenizer.encode(TEXT[1]), SEP, BOT])


def csv_of(shown):
    link = re.search(r'href="data:text/csv;charset=utf-8,([^"]+)"', shown)
    return list(csv.reader(io.StringIO(unquote(link[1]))))


def test_the_overview_has_every_head_in_the_order_asked_for(tab, seen):
    shown, note = (tab.show_overview(*TEXT, "layer"), tab.read_note(*TEXT)[0])
    count = tab.layers * tab.heads
    assert re.findall(r'data-number="(\d+)"', shown) == [str(n) for n in range(count)] and note == ""
    ordered = tab.show_overview(*TEXT, "distance")
    values = [float(value) for value in re.findall(r"· (\d+\.\d\d)<br>", ordered)]
    back = torch.arange(len(seen.ids))[:, None] - torch.arange(len(seen.ids))
    expected = (seen.attention * back.clamp_min(0)).sum(-1)[..., 1:].mean(-1).flatten().sort(descending=True).values
    assert values == pytest.approx(expected.tolist(), abs=0.006) and len(values) == count


def test_a_tile_is_the_map_as_a_picture():
    weights = np.array([[1, 0], [0.25, 0.75]], np.float32)
    with Image.open(io.BytesIO(b64decode(attention_tile(weights).split(",")[1]))) as picture:
        opaque = np.asarray(picture)
    assert opaque[0, 0, 3] == 255 and opaque[1, 0, 3] == 128 and opaque[1, 1, 3] == round(255 * 0.75**0.5)
    assert tuple(opaque[0, 1, :3]) == (128, 128, 128)


@pytest.mark.parametrize("scale, shown", [
    ("linear", lambda w: w), ("logarithmic", lambda w: np.log10(w.clip(1e-3))), ("without first token", lambda w: w)])
def test_the_map_of_one_head_is_its_weights(tab, seen, scale, shown):
    figure, saving, summary, sentence = tab.show_head(*TEXT, 1, 1, "one head", scale, 3)
    weights = seen.attention[1, 1].numpy()
    z = np.array(figure.data[0].z, float)
    first = int(scale == "without first token")
    past = np.tril_indices(len(weights))
    assert np.isnan(z[np.triu_indices(len(weights), 1)]).all() and np.isnan(z[:, 0]).all() == bool(first)
    kept = past[1] >= first
    np.testing.assert_allclose(z[past][kept], shown(weights)[past][kept], atol=1e-5)
    most = int(weights[3].argmax())
    assert f"({most}), with {weights[3, most]:.1%}" in summary
    assert [float(w) for w in re.findall(r'title="([\d.]+)"', sentence)] == pytest.approx(weights[3], abs=6e-5)
    rows = csv_of(saving)
    np.testing.assert_allclose([[float(w) for w in row[1:]] for row in rows[1:]], weights, atol=1e-6)


@pytest.mark.parametrize("view", ["mean of the layer", "rollout"])
def test_means_and_rollout_are_those_of_the_maps(tab, seen, view):
    figure = tab.show_head(*TEXT, 1, 0, view, "linear", 0)[0]
    means = seen.attention.mean(1).numpy()
    expected = means[1]
    if view == "rollout":
        first, second = (0.5 * mean + 0.5 * np.eye(len(mean)) for mean in means)
        expected = second @ first
    past = np.tril_indices(len(expected))
    np.testing.assert_allclose(np.array(figure.data[0].z, float)[past], expected[past], atol=1e-5)


def test_two_heads_or_texts_stand_side_by_side(tab):
    alone = tab.show_other(False, "", *TEXT, 1, 1, "one head", "linear", 0)
    same = tab.show_other(True, "", *TEXT, 1, 1, "one head", "linear", 0)
    another = tab.show_other(True, "Bye", *TEXT, 1, 1, "one head", "linear", 0)
    assert not any(isinstance(shown, str) for shown in alone)
    assert same[1:] == tab.show_head(*TEXT, 1, 1, "one head", "linear", 0)[1:]
    assert csv_of(another[1]) == csv_of(tab.show_head("text", "Bye", None, 1, 1, "one head", "linear", 0)[1])


def test_the_zoom_is_kept_and_nonsense_is_no_zoom(tab):
    def zoomed(zoom):
        layout = tab.show_head(*TEXT, 1, 1, "one head", "linear", 0, zoom)[0].layout
        return layout.xaxis.range, layout.yaxis.range
    assert zoomed([[1.5, 4], [4, 1.5]]) == ((1.5, 4), (4, 1.5))
    for nonsense in (None, "x", [], [[1, 2]], [[1, 2], [3, "x"]], [[1, 2], [3, True]], [[1, 2], [3, float("nan")]]):
        assert zoomed(nonsense) == (None, None)


def followed(tab, link):
    query = parse_qsl(urlsplit(unescape(re.search(r'href="(\?[^"]+)"', link)[1])).query)
    return tab.follow_link(SimpleNamespace(query_params=dict(query)))


def test_a_link_opens_the_same_text_layer_and_head(tab):
    text = 'Is 1 < 2 & "so"?'
    _, *opened = followed(tab, tab.link("text", text, None, 1, 0))
    assert opened[:2] == ["text", text] and opened[3:] == [1, 0]
    assert followed(tab, tab.link("text", "half \ud800", None, 0, 0))[2] == "half \ufffd"
    prompt = tab.tokenizer.encode_prompt(["Hi", "Hello!", "Bye"], 128).ids
    spoken = Drawn(prompt, [*tab.tokenizer.encode("See you."), SEP])
    _, source, _, found, layer, head = followed(tab, tab.link("reply", "", spoken, 0, 1))
    assert (source, found, layer, head) == ("reply", spoken, 0, 1)


@pytest.mark.parametrize("query, says", [
    ({"text": "Hi", "layer": "9"}, "There is no head 0 in layer 9"), ({"text": "Hi", "head": "x"}, "whole numbers"),
    ({"text": ""}, "no message"), ({"text": "x" * 9_000}, "9,000 characters"),
    ({"text": "Hi", "reply": "x" * 9_000}, "9,000 characters")])
def test_a_link_that_cannot_be_followed_says_why(tab, query, says, monkeypatch):
    told = []
    monkeypatch.setattr(gradio, "Warning", told.append)
    opened = tab.follow_link(SimpleNamespace(query_params=query))
    assert says in told[0] and opened == tab.follow_link(SimpleNamespace(query_params={}))


def test_tokens_that_look_like_html_stay_text():
    figure = head_map(["<b>", "x"], np.eye(2, dtype=np.float32))
    assert figure.layout.xaxis.ticktext[0] == "&lt;b&gt; 0"


def test_the_layers_are_the_logit_lens(tab, seen):
    figure, saving = tab.show_lens(*TEXT)
    said, odds = logit_lens(tab.model, seen.residual)
    assert np.array(figure.data[0].z) == pytest.approx(odds[..., 0].numpy(), abs=1e-5)
    assert csv_of(saving)[-1][1].rsplit(" ", 1)[0] == tab.tokens([said[-1, 0, 0]])[0]


def test_removing_heads_is_told_beside_the_whole_model(tab, seen):
    assert "No head is removed" in tab.show_without(*TEXT, [], "zero")
    for how in ("zero", "mean"):
        shown = tab.show_without(*TEXT, ["0.1", "1.0"], how)
        lesion = without(tab.model, seen, [(0, 1), (1, 0)], how)
        before, after = seen.log_probs[-1], next_log_probs(lesion, seen.ids)
        nats = torch.nn.functional.kl_div(after, before, reduction="sum", log_target=True)
        assert f"{float(nats):.4f} nats" in shown
        rows = csv_of(shown)
        token = next(id for id in range(tab.tokenizer.vocab_size) if tab.tokens([id])[0] == rows[1][0])
        assert rows[1][1:] == [f"{float(before[token].exp()):.2%}", f"{float(after[token].exp()):.2%}"]
        settings = Sampling(temperature=0, max_new_tokens=30, no_repeat_ngram_size=3, top_k=0, top_p=1)
        assert rows[-1][1] == generate(tab.model, tab.tokenizer, [TEXT[1]], settings)
    importance = tab.show_importance(*TEXT)[0].data[0].z
    assert np.array(importance) == pytest.approx(head_importance(tab.model, seen).numpy(), abs=1e-5)


def test_the_chats_last_reply_is_looked_at_with_its_own_tokens(tab):
    prompt = [BOS, USER, *tab.tokenizer.encode("Hi"), SEP, BOT]
    reply = [*tab.tokenizer.encode("I am here."), SEP]
    rows = csv_of(tab.show_head("reply", "", Drawn(prompt, reply), 0, 0, "one head", "linear", -1)[1])
    assert len(rows) == 1 + len(prompt) + len(reply)
    expected = attention_maps(tab.model, torch.tensor(prompt + reply))[0, 0, -1]
    assert [float(w) for w in rows[-1][1:]] == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("given, says", [
    (("text", " ", None), "no message"), (("text", "x" * 9_000, None), "9,000 characters"),
    (("reply", "", None), "There is no reply yet")])
def test_what_cannot_be_shown_is_said(tab, given, says):
    assert says in tab.read_note(*given)[0] and tab.show_overview(*given, "layer") == ""
    assert says in tab.show_head(*given, 0, 0, "one head", "linear", 0)[2]
    assert says in tab.show_without(*given, [], "zero")
    assert tab.show_lens(*given)[1] == ""
    with pytest.raises(gradio.Error, match=says):
        tab.show_importance(*given)


def test_a_long_text_shows_what_was_kept(tab):
    note = tab.read_note("text", "word " * 300, None)[0]
    assert re.search(r"The model sees 128 tokens: the first \d+ of the text are left out", note)


def test_heads_that_do_not_exist_are_refused(tab):
    assert "There is no head 9 in layer 0" in tab.show_head(*TEXT, 0, 9, "one head", "linear", 0)[2]
    assert "There is no head 0 in layer 7" in tab.show_without(*TEXT, ["7.0"], "zero")
    for names in (["x"], ["1"], [3], ["1.2.3"]):
        with pytest.raises(TinyGPTError, match=r"layer\.head"):
            heads_of(names)
    for chosen in (None, "3", -1, 10**9, True):
        event = SimpleNamespace(_data={"chosen": chosen})
        assert not any(isinstance(value, int) for value in tab.choose_head(event))
    assert tab.choose_head(SimpleNamespace(_data={"chosen": tab.heads + 1})) == (1, 1)


def test_scores_over_training_are_the_logs():
    log = [{"tokens": 10, "train_loss": 1.0}] + [
        {"tokens": n, "heads": {"induction": [[n / 100, 0.2], [0.3, 0.4]]}} for n in (20, 30)]
    figure = score_lines(log, "induction", 0, 0)
    assert len(figure.data) == 4 and list(figure.data[0].x) == [20, 30]
    assert list(figure.data[0].y) == [0.2, 0.3] and figure.data[0].line.color != figure.data[1].line.color
    assert not score_lines([], "induction", 0, 0).data


def test_a_student_finds_their_way(tiny_checkpoint):
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
            page.get_by_role("tab", name="Attention").click()
            expect(page.locator("#heads button")).to_have_count(4, timeout=20_000)
            page.locator("#heads button").nth(3).focus()
            page.keyboard.press("Enter")
            expect(page.locator("#head-summary")).to_contain_text("Layer 1, head 1", timeout=20_000)
            expect(page.locator("#heads button").nth(3)).to_have_attribute("aria-pressed", "true")
            expect(page.locator("#head-map .js-plotly-plot")).to_be_visible(timeout=20_000)
            page.locator("#sentence button").nth(2).click()
            expect(page.locator("#head-summary")).to_contain_text("(2) it looks most at")
            for kind, mark in (("PNG", b"\x89PNG"), ("SVG", b"<svg"), ("CSV", b"query"), ("web page", b"<!doctype")):
                with page.expect_download() as download:
                    page.locator("#head-saving").get_by_text(kind, exact=True).click()
                assert Path(download.value.path()).read_bytes().lstrip().startswith(mark)
            page.get_by_label("Compare with another").check()
            page.get_by_label("Another text").fill("Bye now")
            page.get_by_label("Another text").press("Enter")
            expect(page.locator("#other-sentence")).to_contain_text("now", timeout=20_000)
            expect(page.locator("#other-head-map .js-plotly-plot")).to_be_visible()
            with page.expect_popup() as popup:
                page.locator("#head-saving").get_by_text("Link to this view").click()
            expect(popup.value.locator("#head-summary")).to_contain_text("Layer 1, head 1", timeout=20_000)
            page.get_by_role("tab", name="Layers").click()
            expect(page.locator("#lens .js-plotly-plot")).to_be_visible(timeout=20_000)
            page.get_by_role("tab", name="Removal").click()
            page.get_by_label("Heads to remove").click()
            page.get_by_role("option", name="0.1", exact=True).click()
            expect(page.locator("#without")).to_contain_text("Without 0.1", timeout=20_000)
            page.keyboard.press("Escape")
            page.get_by_role("button", name="Measure every head").click()
            expect(page.locator("#importance .js-plotly-plot")).to_be_visible(timeout=20_000)
            page.get_by_label("the chat's reply").last.click()
            expect(page.locator("#attention-note")).to_contain_text("There is no reply yet")
            assert not foreign and not errors
        browser.close()
