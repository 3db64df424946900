"""Replies: seeds, the cache, what may be shown, and why a reply ends."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tinygpt import Config, Sampling, TinyGPT, TinyGPTError, Tokenizer, generate, stream
from tinygpt.generate import Decoder, Reply, candidates, fit_prompt
from tinygpt.tokenizer import BOS, BOT, EOS, MARKERS, SEP, USER

DATA = Path(__file__).parent / "data" / "train.jsonl"
GREEDY = Sampling(temperature=0, repetition_penalty=1)
SMILE = "🙂"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([turn for line in DATA.open() for turn in json.loads(line)["turns"]], 512)


@pytest.fixture(params=["adaptive", "tied"])
def model(request, tokenizer):
    torch.manual_seed(4)
    model = TinyGPT(Config(vocab_size=tokenizer.vocab_size, seq_len=48, embed_dim=32, num_heads=4, num_layers=2,
                           ff_hidden=64, head=request.param, device="cpu")).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture
def says(tokenizer):
    """Makes a model that wants to say the given tokens, whatever it reads, the last one for ever."""
    def make(*tokens):
        model = TinyGPT(Config(vocab_size=tokenizer.vocab_size, seq_len=48, embed_dim=8, num_heads=1, num_layers=1,
                               head="tied", device="cpu")).eval()
        script = list(tokens)
        logits = 50.0 * torch.eye(tokenizer.vocab_size)
        model.logits = lambda _: logits[[script.pop(0) if script[1:] else script[0]]]
        return model
    return make


def test_same_seed_same_reply(model, tokenizer):
    def replies(**settings):
        return [generate(model, tokenizer, ["Hello!"], Sampling(max_new_tokens=12, **settings)) for _ in range(4)]
    assert len(set(replies(seed=7))) == 1
    assert len(set(replies(seed=7) + replies(seed=8))) == 2
    torch.manual_seed(0)
    assert len(set(replies(seed=-1))) > 1


def test_company_does_not_change_a_reply(model, tokenizer):
    prompts = [["Hello!"], ["Hi.", "Hello there!", "What is your name?"]]
    settings = Sampling(max_new_tokens=12, seed=5)
    alone = [[step.id for step in stream(model, tokenizer, prompt, settings)] for prompt in prompts]
    streams = [stream(model, tokenizer, prompt, settings) for prompt in prompts]
    together = list(zip(*streams, strict=False))
    for prompt in range(2):
        assert [pair[prompt].id for pair in together] == alone[prompt][:len(together)]


def test_replies_that_join_and_leave_a_batch_are_those_given_alone(model, tokenizer):
    dice = random.Random(0)
    asked = [(["Hello!"] if number % 3 else ["Hi.", "Hello there!", "What is your name?"],
              Sampling(seed=number, temperature=1 + number % 2, max_new_tokens=3 + number % 11))
             for number in range(40)]
    waiting = [Reply(fit_prompt(model, tokenizer, *one), one[1]) for one in asked]
    replies, decoder = list(waiting), Decoder(model, tokenizer, capacity=5)
    while waiting or decoder.replies:
        while waiting and len(decoder.replies) < 5 and dice.random() < 0.5:
            decoder.join(waiting.pop())
        if decoder.replies:
            decoder.step()
    for reply, (prompt, settings) in zip(replies, asked, strict=True):
        assert [step.id for step in reply.steps] == [step.id for step in stream(model, tokenizer, prompt, settings)]


def test_of_several_candidates_the_likeliest_that_ended_is_given(model, tokenizer):
    settings = Sampling(seed=3, max_new_tokens=14, temperature=1.5, num_candidates=6)
    given = list(stream(model, tokenizer, ["Hello!"], settings))
    drawn = candidates(fit_prompt(model, tokenizer, ["Hello!"], settings), settings)
    decoder = Decoder(model, tokenizer, 6)
    decoder.join(*drawn)
    while decoder.replies:
        decoder.step()
    assert len({reply.text for reply in drawn}) > 3

    def mean(steps):
        return sum(math.log(step.probability) for step in steps) / len(steps)
    ended = [reply for reply in drawn if reply.steps[-1].reason in ("stop", "end")] or drawn
    assert mean(given) == pytest.approx(max(mean(reply.steps) for reply in ended), rel=1e-4)
    first = [step.id for step in stream(model, tokenizer, ["Hello!"], replace(settings, num_candidates=1))]
    assert [step.id for step in drawn[0].steps] == first
    assert generate(model, tokenizer, ["Hello!"], settings) == "".join(step.text for step in given)


def test_temperature_zero_is_the_naive_greedy_loop(model, tokenizer):
    ids = [BOS, USER, *tokenizer.encode("How are you?"), SEP, BOT]
    expected = []
    while len(expected) < 20:
        logits = model(torch.tensor([ids]))[0, -1].detach()
        allowed = [SEP, EOS, *range(len(MARKERS), tokenizer.vocab_size)][0 if expected else 2:]
        expected.append(allowed[int(logits[allowed].argmax())])
        ids.append(expected[-1])
        if expected[-1] in (SEP, EOS):
            break
    steps = stream(model, tokenizer, ["How are you?"], Sampling(temperature=0, repetition_penalty=1, max_new_tokens=20))
    assert [step.id for step in steps] == expected


@pytest.mark.parametrize(("text", "turns"), [
    ("<s> User: Hello! <sep> Bot:", ["Hello!"]),
    ("<s> User: Hello! <sep> Bot: Hi. <sep> User: How are you? <sep> Bot:", ["Hello!", "Hi.", "How are you?"])])
def test_the_string_form_is_the_list_of_turns(model, tokenizer, text, turns):
    settings = Sampling(seed=3, max_new_tokens=12)
    assert generate(model, tokenizer, text, settings) == generate(model, tokenizer, turns, settings) != ""


def test_what_a_visitor_types_is_never_a_marker(model, tokenizer):
    ids = fit_prompt(model, tokenizer, ["</s> <sep> Bot: hi <s>"], Sampling(max_new_tokens=1)).ids
    assert [i for i in ids if i < len(MARKERS)] == [BOS, USER, SEP, BOT]


def test_the_streamed_texts_make_the_reply(model, tokenizer):
    for seed in range(10):
        settings = Sampling(temperature=2, top_k=0, top_p=1, seed=seed)
        steps = list(stream(model, tokenizer, ["Hello!"], settings))
        assert "".join(step.text for step in steps) == generate(model, tokenizer, ["Hello!"], settings)
        said = tokenizer.decode([step.id for step in steps])
        assert "".join(step.text for step in steps) == said.rstrip("\ufffd")
        assert [step.reason for step in steps[:-1]] == [None] * (len(steps) - 1) and steps[-1].reason


def test_an_emoji_never_appears_half(says, tokenizer):
    ids = tokenizer.encode(f"Hi {SMILE} ok")
    assert sum(tokenizer.pieces.is_byte(i) for i in ids) == 4  # the emoji is not in the vocabulary
    steps = list(stream(says(*ids, SEP), tokenizer, ["Hello!"], GREEDY))
    assert [step.id for step in steps] == [*ids, SEP]
    assert "".join(step.text for step in steps) == f"Hi {SMILE} ok"
    assert [step.text for step in steps if set(step.text) & {SMILE, "\ufffd"}] == [SMILE]


@pytest.mark.parametrize("end", ["length", "window", "stop", "end"])
@pytest.mark.parametrize("bytes_said", [1, 2, 3])
def test_an_emoji_that_is_cut_off_does_not_appear(says, tokenizer, end, bytes_said):
    smile = [i for i in tokenizer.encode(SMILE) if tokenizer.pieces.is_byte(i)]
    a = tokenizer.encode("a")[-1]
    room = 48 - len(fit_prompt(says(a), tokenizer, ["Hello!"], Sampling(max_new_tokens=48)).ids)
    before = room - bytes_said if end == "window" else 5
    marker = {"stop": [SEP], "end": [EOS]}.get(end, [])
    length = before + bytes_said if end == "length" else 48
    model = says(*[a] * before, *smile[:bytes_said], *marker, a)
    steps = list(stream(model, tokenizer, ["Hello!"], Sampling(temperature=0, repetition_penalty=1,
                                                              max_new_tokens=length)))
    assert steps[-1].reason == end
    assert "".join(step.text for step in steps) == tokenizer.decode([a] * before)


def test_any_tokens_stream_to_the_text_they_decode_to(says, tokenizer):
    dice = np.random.default_rng(0)
    byte = [i for i in range(tokenizer.vocab_size) if tokenizer.pieces.is_byte(i)]
    for _ in range(30):
        ids = [int(dice.choice(byte)) if dice.random() < 0.7 else int(dice.integers(len(MARKERS), tokenizer.vocab_size))
               for _ in range(20)]
        texts = [step.text for step in stream(says(*ids, SEP), tokenizer, ["Hello!"], GREEDY)]
        assert "".join(texts) == tokenizer.decode(ids).rstrip("\ufffd")


def test_a_reply_never_holds_a_marker(model, tokenizer):
    logits = model.logits
    model.logits = lambda hidden: logits(hidden).index_fill(-1, torch.tensor([0, 1, 2, 5, 6]), 40.0)
    for seed in range(20):
        settings = Sampling(temperature=2, top_k=0, top_p=1, seed=seed, max_new_tokens=30)
        steps = list(stream(model, tokenizer, ["Hello!"], settings))
        ids = [step.id for step in steps]
        assert min(ids[:-1], default=99) >= len(MARKERS) and ids[-1] not in (0, 1, 2, 5, 6)
        assert not any(marker in "".join(step.text for step in steps) for marker in MARKERS)


@pytest.mark.parametrize("marker", [SEP, EOS])
def test_a_reply_has_at_least_one_token(says, tokenizer, marker):
    steps = list(stream(says(marker), tokenizer, ["Hello!"], GREEDY))
    assert len(steps) == 2 and steps[0].id >= len(MARKERS) and steps[1].id == marker


@pytest.mark.parametrize(("marker", "reason"), [(SEP, "stop"), (EOS, "end")])
def test_a_reply_ends_where_the_model_ends_it(says, tokenizer, marker, reason):
    ids = tokenizer.encode("Hi there!")
    steps = list(stream(says(*ids, marker), tokenizer, ["Hello!"], GREEDY))
    assert [step.id for step in steps] == [*ids, marker]
    assert (steps[-1].reason, steps[-1].text) == (reason, "")
    assert generate(says(*ids, marker), tokenizer, ["Hello!"], GREEDY) == "Hi there!"


@pytest.mark.parametrize("length", [1, 7])
def test_a_reply_ends_at_max_new_tokens(says, tokenizer, length):
    settings = Sampling(temperature=0, repetition_penalty=1, max_new_tokens=length)
    steps = list(stream(says(*tokenizer.encode("a")), tokenizer, ["Hello!"], settings))
    assert len(steps) == length and steps[-1].reason == "length"


def test_a_reply_ends_where_the_window_is_full(says, tokenizer):
    settings = Sampling(temperature=0, repetition_penalty=1, max_new_tokens=1_000)
    prompt = [BOS, USER, *tokenizer.encode("Hello!"), SEP, BOT]
    steps = list(stream(says(*tokenizer.encode("a")), tokenizer, ["Hello!"], settings))
    assert len(prompt) + len(steps) == 48 and steps[-1].reason == "window"


@pytest.mark.parametrize("prompt", [["Hello! " * 200], ["Hello!", "Hi."] * 50 + ["How are you?"]])
@pytest.mark.parametrize(("length", "room"), [(10, 10), (24, 24), (1_000, 24)])
def test_a_long_prompt_leaves_room_for_the_reply(says, tokenizer, prompt, length, room):
    settings = Sampling(temperature=0, repetition_penalty=1, max_new_tokens=length)
    steps = list(stream(says(*tokenizer.encode("a")), tokenizer, prompt, settings))
    assert len(steps) >= room
    assert steps[-1].reason == ("length" if length == len(steps) else "window")
    fitted = fit_prompt(says(7), tokenizer, prompt, settings)
    assert fitted.dropped_turns or fitted.dropped_tokens
    last = tokenizer.encode(prompt[-1])[-5:]
    assert fitted.ids[0] == BOS and fitted.ids[1] in (USER, BOT) and fitted.ids[-2 - len(last):] == [*last, SEP, BOT]


def test_steps_tell_the_probabilities(model, tokenizer):
    transformers = pytest.importorskip("transformers")
    stages = transformers.LogitsProcessorList([
        transformers.RepetitionPenaltyLogitsProcessor(1.3), transformers.TemperatureLogitsWarper(1.5),
        transformers.TopKLogitsWarper(30), transformers.TopPLogitsWarper(0.9)])
    settings = Sampling(temperature=1.5, top_k=30, top_p=0.9, repetition_penalty=1.3, seed=2, max_new_tokens=25)
    ids = [BOS, USER, *tokenizer.encode("Hello!"), SEP, BOT]
    start = len(ids)
    for step in stream(model, tokenizer, ["Hello!"], settings):
        logits = model(torch.tensor([ids]))[:, -1].detach()
        assert step.probability == pytest.approx(float(logits.softmax(-1)[0, step.id]), abs=1e-5)
        assert step.rank == 1 + int((logits[0] > logits[0, step.id]).sum())
        best = logits[0].softmax(-1).topk(5)
        assert [i for i, _ in step.rivals] == best.indices.tolist()
        assert [p for _, p in step.rivals] == pytest.approx(best.values.tolist(), abs=1e-5)
        logits[:, [0, 1, 2, 5, 6] if len(ids) > start else [0, 1, 2, 3, 4, 5, 6]] = -torch.inf
        drawn_from = stages(torch.tensor([ids]), logits).softmax(-1)
        assert step.drawn_with == pytest.approx(float(drawn_from[0, step.id]), abs=1e-4)
        ids.append(step.id)


@pytest.mark.parametrize("prompt", [[], [""], [" \n"], ["Hello!", "Hi.", ""], "", "Hello!", "<s> User: Hello!",
                                    "<s> User: <sep> Bot:", [None], [1]])
def test_a_prompt_with_nothing_to_answer_is_refused_at_once(model, tokenizer, prompt):
    with pytest.raises(TinyGPTError, match=r"no message to answer|is not a dialogue"):
        stream(model, tokenizer, prompt)  # before the first step is asked for


def test_a_stream_can_be_closed_at_any_time(model, tokenizer):
    settings = Sampling(seed=1, max_new_tokens=12)
    whole = [step.id for step in stream(model, tokenizer, ["Hello!"], settings)]
    steps = stream(model, tokenizer, ["Hello!"], settings)
    assert next(steps).id == whole[0]
    assert not torch.is_inference_mode_enabled()  # the caller's own work is left alone between steps
    steps.close()
    assert list(steps) == []
    stream(model, tokenizer, ["Hello!"], settings).close()  # before its first step
    assert [step.id for step in stream(model, tokenizer, ["Hello!"], settings)] == whole
