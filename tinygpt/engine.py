"""One model for many visitors: their replies grow in one batch, a token at a time, in one thread.

`Engine.ask` gives a `Ticket`; iterating over it yields the reply's steps as they are drawn. Whoever comes when the
batch is full waits in line and can see the place; whoever closes a ticket frees its place within one step.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

import torch

from tinygpt.config import TinyGPTError
from tinygpt.generate import Decoder, Reply, Step, candidates, fit_prompt
from tinygpt.model import TinyGPT
from tinygpt.sampling import Sampling
from tinygpt.tokenizer import Prompt, Tokenizer

log = logging.getLogger(__name__)
PACE = 0.05  # seconds; waking a visitor's thread for every single token would slow everyone down


class Ticket:
    """A reply that was asked for. Iterate over it once; `close` ends it early."""

    def __init__(self, engine: "Engine", prompt: Prompt, sampling: Sampling):
        self.engine, self.prompt = engine, prompt
        self.replies = candidates(prompt, sampling)
        self.drawn: queue.SimpleQueue[Step | TinyGPTError | None] = queue.SimpleQueue()
        self.closed = False

    @property
    def place(self) -> int:
        """How many are served before this one can begin, itself included; 0 once it has begun."""
        return self.engine.place(self)

    def __iter__(self) -> Iterator[Step]:
        for burst in self.bursts():
            yield from burst

    def bursts(self, patience: float | None = None) -> Iterator[list[Step]]:
        """The steps as they are drawn, those of `PACE` seconds at a time (the first at once), and none whenever none
        came within `patience` seconds. Raises TinyGPTError if the reply cannot be finished.
        """
        try:
            while not self.closed:
                burst = []
                with suppress(queue.Empty):
                    burst.append(self.drawn.get(timeout=patience))
                    while True:
                        burst.append(self.drawn.get_nowait())
                steps = [step for step in burst if isinstance(step, Step)]
                yield steps
                if len(steps) < len(burst):  # closed elsewhere, or failed
                    for error in burst:
                        if isinstance(error, TinyGPTError):
                            raise error
                    return
                if steps and steps[-1].reason:
                    return
                time.sleep(PACE)
        finally:
            self.close()

    def close(self) -> None:
        """Gives the place to someone else; harmless for a reply that has ended."""
        self.engine.close(self)

    def take(self, step: Step) -> None:
        """A token of one of the candidates was drawn. One candidate is told as it grows, the best of several when all
        have ended.
        """
        if len(self.replies) == 1:
            self.drawn.put(step)
        elif not any(reply in self.engine.begun for reply in self.replies):  # two may end in the same step
            for step in max(self.replies, key=lambda reply: reply.likelihood).steps:
                self.drawn.put(step)


class Engine:
    """Decodes for all tickets at once, at most `capacity` replies side by side; `line` more tickets may wait.

    With `cores`, its thread alone computes on that many, and this and all later threads on one: with more threads than
    cores, GNU OpenMP lets each wait for work asleep, and steps took twice as long. Best before this thread has
    computed on several.
    """

    def __init__(self, model: TinyGPT, tokenizer: Tokenizer, capacity: int = 16, line: int = 20,
                 cores: int | None = None):
        self.model, self.tokenizer, self.line = model, tokenizer, line
        self.decoder = Decoder(model, tokenizer, capacity)
        self.waiting: deque[Ticket] = deque()
        self.begun: dict[Reply, Ticket] = {}
        self.changed = threading.Condition()  # guards `waiting`, `begun` and each ticket's `closed`
        awake = threading.Event()
        threading.Thread(target=self.work, args=(awake, cores), name="engine", daemon=True).start()
        awake.wait()
        if cores:
            torch.set_num_threads(1)

    def ask(self, prompt: str | Sequence[str], sampling: Sampling = Sampling()) -> Ticket:
        """Asks for the Bot's reply to `prompt`, as `stream` does. Raises TinyGPTError for a prompt with nothing to
        answer, for more candidates than the batch holds, and where the line is full.
        """
        ticket = Ticket(self, fit_prompt(self.model, self.tokenizer, prompt, sampling), sampling)
        if len(ticket.replies) > self.decoder.capacity:
            raise TinyGPTError(f"num_candidates is {len(ticket.replies)}; give at most {self.decoder.capacity}.")
        with self.changed:
            if len(self.waiting) >= self.line:
                raise TinyGPTError(f"TinyGPT is busy: {len(self.waiting)} are waiting already. Try again in a minute.")
            self.waiting.append(ticket)
            self.changed.notify()
        return ticket

    def place(self, ticket: Ticket) -> int:
        with self.changed:
            return self.waiting.index(ticket) + 1 if ticket in self.waiting else 0

    def close(self, ticket: Ticket) -> None:
        with self.changed:
            ticket.closed = True
            ticket.drawn.put(None)
            if ticket in self.waiting:
                self.waiting.remove(ticket)

    # ------------------------------------------------------------------------------------------------- the thread

    def work(self, awake: threading.Event, cores: int | None) -> None:
        """Admits, draws and tells, for ever."""
        if cores:
            torch.set_num_threads(cores)
            torch.get_num_threads()  # without this, the next call elsewhere would set it for this thread too
        awake.set()
        while True:
            with self.changed:
                while not (self.waiting or self.begun):
                    self.changed.wait()
            self.take_turn()  # a function of its own, so that this thread holds on to no reply while it waits

    def take_turn(self) -> None:
        """One step for all."""
        try:
            self.admit()
            for reply, step in self.decoder.step() if self.decoder.replies else ():
                ticket = self.begun.pop(reply) if step.reason else self.begun[reply]
                ticket.take(step)
        except Exception:  # nobody waits for ever, and the next ones are served
            self.fail(set(self.begun.values()))
            self.decoder.replies.clear()

    def admit(self) -> None:
        """Lets go of closed tickets, and takes in the first of the line if there is room: one a step, so that reading
        its prompt holds nobody up for long.
        """
        with self.changed:
            for reply in [reply for reply, ticket in self.begun.items() if ticket.closed]:
                del self.begun[reply]
                self.decoder.leave(reply)
            room = self.decoder.capacity - len(self.decoder.replies)
            if not self.waiting or len(self.waiting[0].replies) > room:
                return
            ticket = self.waiting.popleft()
            self.begun |= dict.fromkeys(ticket.replies, ticket)
        try:
            self.decoder.join(*ticket.replies)
        except Exception:
            self.fail([ticket])

    def fail(self, tickets: Iterable[Ticket]) -> None:
        """Says in the server's log what went wrong, and to those concerned that it did."""
        log.exception("A reply failed.")
        with self.changed:
            for ticket in tickets:
                ticket.drawn.put(TinyGPTError("Something went wrong with this reply. Please try again."))
                for reply in ticket.replies:
                    self.begun.pop(reply, None)
