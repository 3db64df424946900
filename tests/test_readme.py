"""What the README says is so: its links, its numbers, its snippets, and the bundled model that it speaks of."""

import re
from pathlib import Path

import pytest
import torch

from tinygpt import Sampling, TinyGPT, generate, load_checkpoint
from tinygpt.config import PRESETS
from tinygpt.model import count_parameters

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BUNDLED = ROOT / "checkpoints" / "tinygpt-chat"


def test_every_local_link_leads_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_nothing_is_left_to_be_filled_in():
    assert re.findall(r"\{[A-Z_]+\}|TODO|TBD", README + (BUNDLED / "README.md").read_text("utf-8")) == []


def test_the_parameters_are_those_of_the_model():
    with torch.device("meta"):
        counted = count_parameters(TinyGPT(PRESETS["reference"]))
    told = dict(re.findall(r"^\| \**([a-z -]+?)\** \| \**([\d,]+)\** \|$", README, re.MULTILINE))
    assert {name: int(number.replace(",", "")) for name, number in told.items()} == counted


@pytest.mark.parametrize("number", [0, 1])
def test_the_python_snippets_run(number, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    snippet = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
    exec(snippet, {})
    assert len(capsys.readouterr().out.split()) > 2


def test_the_space_has_what_hugging_face_asks_for():
    front = dict(re.findall(r"^(\w+): (.+)$", README.split("---")[1], re.MULTILINE))
    assert front["sdk"] == "gradio" and f"gradio=={front['sdk_version']}" in (ROOT / "requirements.txt").read_text()
    assert (ROOT / front["app_file"]).is_file() and len(front["short_description"]) <= 60
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {front["colorFrom"], front["colorTo"]} <= colors


@pytest.fixture(scope="module")
def bundled():
    return load_checkpoint(BUNDLED, "cpu")


def test_the_bundled_model_is_small_enough_for_git():
    assert (BUNDLED / "model.safetensors").stat().st_size < 100e6


@pytest.mark.parametrize("opener", ["Hello!", "How are you today?", "What do you like to eat?", "I lost my keys.",
                                    "Do you have plans for the weekend?"])
def test_the_bundled_model_answers_in_words(bundled, opener):
    replies = {generate(*bundled, [opener], Sampling(seed=seed)) for seed in range(4)}
    assert len(replies) > 1 and all(re.search(r"[A-Za-z]{2}", reply) for reply in replies)
    assert not any(marker in reply for reply in replies for marker in ("<s>", "<sep>", "User:", "Bot:", "\ufffd"))
