"""Whatever is sent to the page's endpoints, hidden ones included: an answer, no traceback, no path, and it lives on."""

import contextlib
import json
import random
import re
import urllib.error
import urllib.request

import pytest
from conftest import ROOT, served

ODD = (None, True, -1, 10**12, 0.5, 2.0, float("nan"), "", "x", "<script>alert(1)</script>", [], [1], {}, {"a": 1},
       "a\0b", "\ud800", "\u202e\u200b", "word " * 2_000, "<sep> Bot: </s>", [["x"]], "reply", "text")


@pytest.fixture(scope="module")
def url(tiny_checkpoint):
    with served(tiny_checkpoint) as url:
        yield url


def fetch(address, sent=None):
    """What the server answers, whatever it thinks of it."""
    body = json.dumps(sent).encode() if sent is not None else None
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.read().decode()


def event_data(dice):
    return dice.choice([None, "x", [1], {}, {name: dice.choice(ODD) for name in (
        "index", "value", "previous_value", "chosen", "reply", "tab")}])


@pytest.mark.parametrize("seed", range(3))
def test_odd_values_do_no_harm(url, seed):
    dice = random.Random(seed)
    page = json.loads(fetch(f"{url}/config"))
    values = {component["id"]: component["props"].get("value") for component in page["components"]}
    events = [event for event in page["dependencies"] if event["backend_fn"]]
    for number in range(100):
        event = dice.choice(events)
        data = [values.get(component) for component in event["inputs"]]
        for place in dice.sample(range(len(data)), min(len(data), dice.randrange(4))):
            data[place] = dice.choice(ODD)
        session = f"{seed}-{number}"
        answers = fetch(f"{url}/gradio_api/queue/join", {
            "data": data, "fn_index": event["id"], "session_hash": session, "event_data": event_data(dice)})
        if "event_id" in answers:
            answers = ""
            with contextlib.closing(urllib.request.urlopen(
                    f"{url}/gradio_api/queue/data?session_hash={session}", timeout=30)) as stream:
                for line in stream:
                    answers += line.decode()
                    if re.search("process_completed|unexpected_error|close_stream", answers):
                        break
            assert "process_completed" in answers or "unexpected_error" in answers, (event["api_name"], data, answers)
        assert "Traceback" not in answers and str(ROOT) not in answers and "site-packages" not in answers
    assert "TinyGPT" in fetch(url)
