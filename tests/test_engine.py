"""Many chats at once: each gets the reply that it would get alone, waits its turn, and leaves nothing behind."""

import gc
import random
import threading
import time
from dataclasses import replace

import pytest
import torch

from tinygpt import Sampling, TinyGPTError, generate, load_checkpoint
from tinygpt.engine import Engine, Ticket
from tinygpt.quantize import int8

LONG = Sampling(seed=1, max_new_tokens=64, temperature=1.5, top_k=0, top_p=1.0)


@pytest.fixture(scope="module", params=["full weights", "8 bits"])
def chat(tiny_checkpoint, request):
    model, tokenizer = load_checkpoint(tiny_checkpoint, "cpu")
    return int8(model) if request.param == "8 bits" else model, tokenizer


@pytest.fixture
def engine(chat):
    return Engine(*chat, capacity=4, line=6)


def text(ticket):
    return "".join(step.text for step in ticket)


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.002)


def test_everyone_gets_the_reply_that_they_would_get_alone(chat):
    engine = Engine(*chat, capacity=4, line=40)
    asked = [([f"Hello number {number}!"],
              Sampling(seed=number, temperature=0.5 + number % 3, num_candidates=1 + number % 2,
                       max_new_tokens=4 + number)) for number in range(20)]
    replies = {}

    def visit(number):
        time.sleep(random.random() / 5)
        replies[number] = text(engine.ask(*asked[number]))
    threads = [threading.Thread(target=visit, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert replies == {number: generate(*chat, *one) for number, one in enumerate(asked)}


def test_who_comes_when_it_is_full_waits_in_line_and_sees_the_place(engine, monkeypatch):
    gate = threading.Event()
    step = engine.decoder.step
    monkeypatch.setattr(engine.decoder, "step", lambda: gate.wait() and step())
    first = [engine.ask(["Hello!"], LONG) for _ in range(4)]
    until(lambda: first[0].place == 0)
    later = [engine.ask(["Hello!"], LONG) for _ in range(3)]
    assert [ticket.place for ticket in later] == [len(engine.waiting) - 2 + n for n in range(3)]
    for _ in range(6 - len(engine.waiting)):
        engine.ask(["Hello!"], LONG)
    with pytest.raises(TinyGPTError, match="busy: 6 are waiting already"):
        engine.ask(["Hello!"], LONG)
    gate.set()
    assert text(later[2]) == text(first[0])  # the same seed
    until(lambda: not engine.begun and not engine.waiting)


def test_closing_frees_the_place_within_a_step(engine):
    tickets = [engine.ask(["Hello!"], LONG) for _ in range(4)]
    for ticket in tickets:
        next(iter(ticket))  # the iterator is dropped at once, as by a visitor who closes the tab
    gc.collect()
    until(lambda: not engine.begun and not engine.decoder.replies)
    assert text(engine.ask(["Hello!"], LONG))


def test_who_waits_can_leave(engine, monkeypatch):
    gate = threading.Event()
    step = engine.decoder.step
    monkeypatch.setattr(engine.decoder, "step", lambda: gate.wait() and step())
    tickets = [engine.ask(["Hello!"], LONG)]
    until(lambda: tickets[0].place == 0)
    tickets += [engine.ask(["Hello!"], LONG) for _ in range(6)]
    places = tickets[-1].place
    tickets[-2].close()
    assert tickets[-1].place == places - 1 and next(tickets[-1].bursts(patience=0.01)) == []
    gate.set()
    until(lambda: not engine.begun and not engine.waiting)


@pytest.mark.parametrize("several", [1, 4])
def test_who_looks_in_now_and_then_can_leave_at_any_time(engine, several):
    steps = engine.ask(["Hello!"], replace(LONG, num_candidates=several)).bursts(patience=0.001)
    until(lambda: engine.begun)
    next(steps)
    steps.close()
    until(lambda: not engine.begun and not engine.decoder.replies)


def test_a_closed_ticket_ends_for_whoever_listens(engine):
    ticket = engine.ask(["Hello!"], LONG)
    ticket.close()
    assert len(list(ticket)) <= 64 and list(ticket) == []


def test_a_step_that_fails_is_told_to_all_it_concerns(engine, monkeypatch):
    step = engine.decoder.step

    def broken():
        monkeypatch.setattr(engine.decoder, "step", step)
        raise RuntimeError("secret")
    monkeypatch.setattr(engine.decoder, "step", broken)
    with pytest.raises(TinyGPTError, match=r"^Something went wrong with this reply\. Please try again\.$"):
        text(engine.ask(["Hello!"], LONG))
    assert text(engine.ask(["Hello!"], LONG))


def test_a_prompt_that_cannot_be_read_concerns_no_one_else(engine, monkeypatch):
    join = engine.decoder.join

    def picky(*replies):
        if replies[0].sampling.seed == 666:
            raise RuntimeError("secret")
        join(*replies)
    monkeypatch.setattr(engine.decoder, "join", picky)
    tickets = [engine.ask(["Hello!"], replace(LONG, seed=seed)) for seed in (1, 666, 2)]
    assert text(tickets[0]) and text(tickets[2])
    with pytest.raises(TinyGPTError, match="Something went wrong"):
        text(tickets[1])


@pytest.mark.parametrize("prompt", [[], [""], ["Hello!", "Hi.", " "]])
def test_a_prompt_with_nothing_to_answer_is_refused(engine, prompt):
    with pytest.raises(TinyGPTError, match="no message to answer"):
        engine.ask(prompt)
    with pytest.raises(TinyGPTError, match="num_candidates is 5; give at most 4"):
        engine.ask(["Hello!"], replace(LONG, num_candidates=5))
    assert not engine.waiting


def test_a_thousand_chats_opened_and_left_at_random_leave_nothing_behind(chat):
    engine = Engine(*chat, capacity=8, line=1_000)
    dice = random.Random(0)
    threads = threading.active_count()
    for number in range(1_000):
        ticket = engine.ask(["Hello!"], replace(LONG, seed=number, max_new_tokens=dice.randint(1, 12)))
        steps = iter(ticket)
        for _ in range(dice.randint(0, 2)):
            next(steps, None)
        if dice.random() < 0.5:
            steps.close()
        ticket.close()
        del steps, ticket
    until(lambda: not engine.begun and not engine.waiting and not engine.decoder.replies)
    until(lambda: not [thing for thing in gc.get_objects() if type(thing) is Ticket and thing.engine is engine])
    assert threading.active_count() == threads


def test_the_engine_alone_computes_on_many_cores(chat, monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        engine, used = Engine(*chat, cores=2), []
        step = engine.decoder.step
        monkeypatch.setattr(engine.decoder, "step", lambda: used.append(torch.get_num_threads()) or step())
        assert text(engine.ask(["Hello!"])) and set(used) == {2}
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
