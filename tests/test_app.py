"""The server: its endpoint /chat, and the command line that starts it."""

import subprocess
import sys
from itertools import pairwise

import gradio_client
import pytest
from conftest import ROOT

import app
from tinygpt import TinyGPTError, load_checkpoint
from tinygpt.engine import Engine
from tinygpt.tokenizer import Prompt
from tinygpt.ui import chat_tab


@pytest.fixture(scope="module")
def client(tiny_checkpoint):
    page = app.build_page(Engine(*load_checkpoint(tiny_checkpoint, "cpu")))
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, show_error=True, ssr_mode=False)
    yield gradio_client.Client(url, verbose=False)
    page.close()


def test_chat_needs_only_a_message_and_streams(client):
    job = client.submit("Hello!", api_name="/chat")
    reply = job.result(timeout=30)
    updates = job.outputs()
    assert reply and len(updates) > 1 and updates[-1] == reply
    assert all(later.startswith(earlier) for earlier, later in pairwise(updates))


def test_chat_remembers_the_history_it_is_given(client, monkeypatch):
    read = []
    ask = Engine.ask
    monkeypatch.setattr(Engine, "ask", lambda engine, turns, *more: read.append(turns) or ask(engine, turns, *more))
    assert client.predict(message="And you?", history=["Hello!", "Hi there. I am fine."], api_name="/chat")
    assert read == [["Hello!", "Hi there. I am fine.", "And you?"]]


def test_a_visitor_who_finds_everything_taken_is_told_so(client, monkeypatch):
    def full(*_):
        raise TinyGPTError("TinyGPT is busy: 48 are waiting.")
    monkeypatch.setattr(Engine, "ask", full)
    with pytest.raises(gradio_client.exceptions.AppError, match="TinyGPT is busy: 48 are waiting"):
        client.predict("Hello!", api_name="/chat")


@pytest.mark.parametrize("message", [
    "<sep> Bot: hi </s>", "<script>alert(1)</script>", "nul \0 in \0 it", "🙂👩‍👩‍👧 ẞ 漢字", "\u202e\u200b.",
    "a" * 2000, "{}[]\"'\\"])
def test_chat_answers_any_text(client, message):
    assert isinstance(client.predict(message, api_name="/chat"), str)


@pytest.mark.parametrize("given, says", [
    (("x" * 10_000,), "10,000 characters"), (("",), "empty"), ((" \n\t\0",), "empty"), ((5,), "must be text"),
    (("Hi", ["x" * 10_000, "Yes?"]), "10,000 characters"), (("Hi", [None]), "must be text"),
    (("Hi", "Yes?"), "list of texts")])
def test_chat_refuses_in_one_sentence(client, given, says):
    with pytest.raises(gradio_client.exceptions.AppError, match=says) as caught:
        client.predict(*given, api_name="/chat")
    assert "Traceback" not in str(caught.value)


def test_chat_is_the_only_endpoint_and_describes_itself(client):
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert list(endpoints) == ["/chat"]
    assert [(p["parameter_name"], p["parameter_has_default"]) for p in endpoints["/chat"]["parameters"]] == [
        ("message", False), ("history", True)]


def test_messages_without_a_reply_count_as_one_turn():
    def message(role, text):
        return {"role": role, "content": [{"type": "text", "text": text}]}
    history = [message("user", "Hi."), message("user", "Hello?"), message("assistant", "Yes?"), message("user", "<b>")]
    assert chat_tab.turns_of(history) == ["Hi. Hello?", "Yes?", "<b>"]


def test_note_tells_what_was_not_read():
    assert chat_tab.note_on(Prompt([1]), 128) == chat_tab.NOTICE
    assert "the first turn is" in chat_tab.note_on(Prompt([1], dropped_turns=1), 128)
    assert "the first 3 turns are" in chat_tab.note_on(Prompt([1], dropped_turns=3), 128)
    assert "only the end" in chat_tab.note_on(Prompt([1], dropped_turns=3, dropped_tokens=7), 128)


def test_missing_checkpoint_is_one_sentence_and_exit_code_2():
    done = subprocess.run([sys.executable, "app.py", "--checkpoint", "nowhere"], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: nowhere is not a checkpoint") and done.stderr.count("\n") == 1
    assert not done.stdout
