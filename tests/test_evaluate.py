"""Figures are what their definitions say, computed another way."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinygpt import Config, Sampling, TinyGPT, generate, load_checkpoint, save_checkpoint
from tinygpt.data import leaks, read_json_lines
from tinygpt.evaluate import nearest_neighbour_replies, score_replies, score_text, windows, words
from tinygpt.generate import generate_many
from tinygpt.tokenizer import BOS, BOT, EOS, SEP, USER

ROOT = Path(__file__).parent.parent
DIALOGUES = read_json_lines(ROOT / "tests" / "data" / "validation.jsonl")
LONG = [f"This is turn number {n}, and it goes on for quite a while before it ends." for n in range(24)]


@pytest.fixture(scope="module")
def chat(tiny_checkpoint):
    return load_checkpoint(tiny_checkpoint, "cpu")


@pytest.mark.parametrize("replies_only", [False, True])
def test_text_scores_are_the_sum_over_tokens(chat, replies_only):
    model, tokenizer = chat
    nats, tokens = 0.0, 0
    for dialogue in DIALOGUES:  # all of them fit the window whole
        ids = tokenizer.encode_dialogue(dialogue)
        log_probabilities = model(torch.tensor([ids]))[0].log_softmax(-1)
        speaker = None
        for position, token in enumerate(ids):
            if token in (USER, BOT):
                speaker = token
            elif token != BOS and (speaker == BOT or not replies_only):
                nats -= log_probabilities[position - 1, token].item()
                tokens += 1
    text = "".join(turn for d in DIALOGUES for turn in (d[1::2] if replies_only else d))
    rates = score_text(model, tokenizer, DIALOGUES, replies_only=replies_only).rates
    assert rates["tokens"] == tokens
    assert rates["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-5)
    assert rates["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)
    assert rates["perplexity_per_piece"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_text_scores_do_not_change_with_the_batch_size(chat):
    one, many = (score_text(*chat, [*DIALOGUES, LONG], batch_size=size) for size in (1, 16))
    assert one.nats == pytest.approx(many.nats, rel=1e-5) and one.tokens == many.tokens


def test_every_turn_is_scored_once_after_as_many_turns_as_fit(chat):
    _, tokenizer = chat
    turns = tokenizer.encode_turns(LONG)
    scored = []
    for ids, numbers, wanted in windows(LONG, tokenizer, 128):
        assert ids[0] == BOS and len(ids) == len(numbers) <= 129
        first = numbers[1]
        assert ids[1:] == [i for turn in turns[first:max(wanted) + 1] for i in turn]
        assert first == 0 or 1 + sum(map(len, turns[first - 1:wanted[0] + 1])) > 129  # one more would not fit
        scored += wanted
    assert scored == list(range(len(LONG))) and turns[-1][-1] == EOS and turns[0][-1] == SEP


def test_a_small_window_scores_every_word_of_a_long_turn(chat):
    """A model that finds every token alike says how many were scored: the same at any window."""
    _, tokenizer = chat
    long = [" ".join(LONG[:12]), "Yes. " + " ".join(LONG[12:])]
    for replies_only in (False, True):
        tokens = set()
        for seq_len in (32, 512):
            model = TinyGPT(Config(vocab_size=tokenizer.vocab_size, seq_len=seq_len, embed_dim=16, num_heads=1,
                                   num_layers=1, head="tied")).eval()
            torch.nn.init.zeros_(model.token_embedding.weight)
            rates = score_text(model, tokenizer, [long], replies_only=replies_only).rates
            tokens.add((rates["tokens"], round(rates["bits_per_byte"], 4)))
        turns = tokenizer.encode_turns(long)[1 if replies_only else 0:]
        assert len(tokens) == 1 and tokens.pop()[0] == sum(len(turn) - 1 for turn in turns)


def test_reply_scores():
    perfect = score_replies(["I like green tea.", "So do I, my friend."], ["I like green tea.", "So do I, my friend."])
    assert all(perfect[f"bleu_{n}"] == pytest.approx(100) for n in range(1, 5)) and perfect["repeating"] == 0
    # 2 of 4 words and 1 of 3 pairs are in the reference, and lengths are equal: no brevity penalty
    half = score_replies(["the cat sat down"], ["the cat ran off"])
    assert half["bleu_1"] == pytest.approx(50) and half["bleu_2"] == pytest.approx(100 * math.sqrt(0.5 * 1 / 3))
    again = score_replies(["no no no", "no way"], ["yes", "yes"])
    assert again["distinct_1"] == pytest.approx(2 / 5) and again["distinct_2"] == pytest.approx(2 / 3)
    assert score_replies(["I see, I see, I see."], ["Yes."])["repeating"] == 1
    assert again["words_per_reply"] == 2.5 and again["replies"] == 2


def test_the_nearest_neighbour_answers_the_most_similar_message():
    train = [["Do you like cats?", "Cats are lovely."], ["Where is the station?", "Over there."], ["Hello!", "Hi!"]]
    found = nearest_neighbour_replies([["Hello!"], ["Hm.", "Ah.", "Is the station far?"], ["I like cats."]], train)
    assert found == ["Hi!", "Over there.", "Cats are lovely."]


def test_what_also_stands_in_train_is_named_on_both_sides():
    shared = ["A sentence with more than six words in it.", "Indeed."]
    assert leaks([["x", "y"], shared], [["Hello!", "Hi!"], [shared[0].upper(), "Really?"]]) == ({1}, {1})


@pytest.mark.parametrize("sampling", [Sampling(seed=3, max_new_tokens=12), Sampling(temperature=0, max_new_tokens=12)])
def test_many_replies_at_once_are_those_given_alone(chat, sampling):
    prompts = [dialogue[:-1] or dialogue for dialogue in DIALOGUES[:8]] + [["Hello!"]] * 3
    assert generate_many(*chat, prompts, sampling, batch_size=4) == [generate(*chat, p, sampling) for p in prompts]


def evaluate(*arguments):
    return subprocess.run([sys.executable, "-m", "tinygpt.evaluate", *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True)


def test_bleu_is_that_of_sacrebleu():
    sacrebleu = pytest.importorskip("sacrebleu")
    replies = [turn for dialogue in DIALOGUES for turn in dialogue[1::2]]
    references = [*replies[3:], *replies[:3]]  # other people's replies: few runs of three or four words in common
    ours = score_replies(replies, references)
    said, wanted = ([" ".join(words(text)) for text in texts] for texts in (replies, references))
    for n in range(1, 5):
        metric = sacrebleu.BLEU(max_ngram_order=n, tokenize="none", smooth_method="floor", smooth_value=0.1, force=True)
        assert ours[f"bleu_{n}"] == pytest.approx(metric.corpus_score(said, [wanted]).score, rel=1e-6), n
    assert 0 < ours["bleu_4"] < ours["bleu_1"] < 100


def test_the_command_prints_tables_and_writes_metrics(tiny_checkpoint, tmp_path):
    model, tokenizer = load_checkpoint(tiny_checkpoint, "cpu")
    torch.manual_seed(1)
    another = TinyGPT(model.config).eval()
    save_checkpoint(tmp_path / "other", another, tokenizer)
    few = ["--max-replies", 5, "--max-new-tokens", 5]
    done = evaluate(tiny_checkpoint, "--compare", tmp_path / "other", "--data", "tests/data",
                    "tests/data/validation.jsonl", "--split", "validation", *few)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tiny_checkpoint / "metrics.json").read_text())
    result = metrics["results"]["data validation, official"]
    for folder, measured in ((tiny_checkpoint, model), (tmp_path / "other", another)):
        rate = score_text(measured, tokenizer, DIALOGUES).rates["bits_per_byte"]
        assert f"| data validation, official, all turns: {folder} | {rate:.3f} |" in done.stdout
    assert result["text"] == pytest.approx(score_text(model, tokenizer, DIALOGUES).rates)
    assert not (tmp_path / "other" / "metrics.json").exists()
    assert done.stdout.count("| data validation, official: nearest neighbour |") == 1
    assert result["dialogues"] == 24 and metrics["settings"]["sampling"]["seed"] == 0
    alone = metrics["results"]["data (2) whole, official"]
    assert alone["text"] == result["text"] and alone["sha256"] == result["sha256"]  # the same dialogues
    assert "nearest neighbour" in result["replies"] and "nearest neighbour" not in alone["replies"]


def test_a_split_that_is_missing_is_named(tiny_checkpoint):
    refused = evaluate(tiny_checkpoint, "--data", "tests/data")
    assert refused.returncode == 2 and "has no test split" in refused.stderr and "Traceback" not in refused.stderr
