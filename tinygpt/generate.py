"""From a dialogue to the Bot's reply, token by token.

A `Decoder` holds several replies that grow side by side: they join and leave between steps. `stream` is a decoder with
one reply, `generate_many` keeps one full, and engine.py shares one among visitors.
"""

import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from tqdm import tqdm

from tinygpt.model import Cache, TinyGPT
from tinygpt.sampling import Sampling, choices, draw
from tinygpt.tokenizer import BOS, BOT, EOS, PAD, SEP, UNK, USER, Prompt, Tokenizer

NEVER_SAID = [PAD, UNK, BOS, USER, BOT]  # the model says text and ends its turn; it never writes another speaker's
RIVALS = 5
Reason = Literal["end", "stop", "length", "window"]


@dataclass(frozen=True)
class Step:
    """One token of a reply, as it is drawn."""

    id: int
    text: str  # what it adds to the reply; an unfinished UTF-8 character waits for its last byte, or is left out
    probability: float  # in the model's own distribution, of all tokens
    drawn_with: float  # in the distribution after `Sampling`'s stages
    rank: int  # among all tokens by the model's own probability; 1 is the likeliest
    rivals: tuple[tuple[int, float], ...]  # the likeliest tokens and the model's own probability of each
    reason: Reason | None = None  # set on the last step: the Bot's turn ended, the dialogue ended, max_new_tokens or
    #                               seq_len was reached ("stop", "end", "length", "window")


class Reply:
    """A reply as it grows: what was read and said so far. One that has `begun` with some tokens goes on as if it had
    drawn them.
    """

    def __init__(self, prompt: Prompt, sampling: Sampling, candidate: int = 0, begun: Sequence[int] = ()):
        self.ids = [*prompt.ids, *begun]
        self.prompt_length = len(prompt.ids)
        self.sampling = sampling
        self.text = ""
        self.steps: list[Step] = []
        seed = sampling.seed if sampling.seed >= 0 else random.getrandbits(63)
        self.dice = torch.Generator().manual_seed((seed + candidate * 1_000_003) % 2**63)
        for _ in begun:
            torch.rand(1, dtype=torch.float64, generator=self.dice)

    @property
    def said(self) -> list[int]:
        return self.ids[self.prompt_length:]

    @property
    def likelihood(self) -> float:
        """Mean log-probability per token by the model itself; a reply that was cut off counts as less likely than any
        that came to an end.
        """
        ended = self.steps[-1].reason in ("stop", "end")
        return sum(math.log(max(step.probability, 1e-30)) for step in self.steps) / len(self.steps) - 100 * (not ended)


class Decoder:
    """Replies decoded side by side in one batch, each with its own settings, by one forward pass a step.

    A reply gets the tokens that it would get alone, up to float rounding.
    """

    def __init__(self, model: TinyGPT, tokenizer: Tokenizer, capacity: int = 1):
        self.model, self.tokenizer, self.capacity = model, tokenizer, capacity
        self.device = next(model.parameters()).device
        self.cache = Cache(model.config, capacity, self.device)
        self.replies: list[Reply] = []  # row n of the cache holds all tokens of replies[n] but the last

    @torch.inference_mode()
    def join(self, *replies: Reply) -> None:
        """Takes in replies to one and the same prompt, reading it once; there must be room for them."""
        row = len(self.replies)
        self.cache.lengths[row:row + len(replies)] = 0
        read = replies[0].ids[:-1]  # the last token is fed with everyone's, in the next step
        if read:
            self.model.hidden(torch.tensor([read], device=self.device), self.cache.rows(row, row + 1))
        for other in range(row + 1, row + len(replies)):
            self.cache.copy_row(row, other)
        self.replies += replies

    def leave(self, reply: Reply) -> None:
        """Makes room; the last reply moves into the free row."""
        row, last = self.replies.index(reply), self.replies.pop()
        if last is not reply:
            self.cache.copy_row(len(self.replies), row)
            self.replies[row] = last

    @torch.inference_mode()
    def step(self) -> list[tuple[Reply, Step]]:
        """One more token for every reply; those that end with it leave."""
        replies = list(self.replies)
        last = torch.tensor([[reply.ids[-1]] for reply in replies], device=self.device)  # (B, 1)
        logits = self.model.logits(self.model.hidden(last, self.cache.rows(0, len(replies)))[:, -1])  # (B, V)
        own = logits if self.model.head else logits.log_softmax(dim=-1)  # the adaptive head gives log-probabilities
        tokens, drawn_with = self.draw(replies, logits)  # (B,), (B,)
        said = own.gather(-1, tokens[:, None])  # (B, 1)
        ranks = (own > said).sum(dim=-1) + 1  # (B,)
        likeliest = own.topk(RIVALS)  # (B, RIVALS)
        steps = []
        for reply, id, own_odds, odds, rank, values, ids in zip(
                replies, tokens.tolist(), said[:, 0].exp().tolist(), drawn_with.tolist(), ranks.tolist(),
                likeliest.values.exp().tolist(), likeliest.indices.tolist(), strict=True):
            step = self.tell(reply, Step(id, "", own_odds, odds, rank, tuple(zip(ids, values, strict=True))))
            reply.steps.append(step)
            steps.append((reply, step))
            if step.reason:
                self.leave(reply)
        return steps

    def draw(self, replies: list[Reply], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A token (B,) for each reply and what it was drawn with (B,); rows with the same settings are drawn
        together.
        """
        allowed = sayable(logits, [not reply.said for reply in replies])  # (B, V)
        tokens = torch.empty(len(replies), dtype=torch.int64, device=self.device)
        drawn_with = torch.empty(len(replies), device=self.device)
        alike = defaultdict(list)
        for row, reply in enumerate(replies):
            sampling = replace(reply.sampling, seed=0, max_new_tokens=1, num_candidates=1)  # as far as stages care
            alike[sampling].append(row)
        for sampling, rows in alike.items():
            longest = max(len(replies[row].ids) for row in rows)
            seen = torch.tensor([[PAD] * (longest - len(replies[row].ids)) + replies[row].ids for row in rows],
                                device=self.device)  # (b, S); padding is no repetition
            ids, probabilities = choices(allowed if len(alike) == 1 else allowed[rows], seen, sampling)  # (b, K)
            column = draw(probabilities, [replies[row].dice for row in rows])[:, None]  # (b, 1)
            tokens[rows] = ids.gather(-1, column)[:, 0]
            drawn_with[rows] = probabilities.gather(-1, column)[:, 0]
        return tokens, drawn_with

    def tell(self, reply: Reply, step: Step) -> Step:
        """Adds the token to the reply; the step with its text, and the reason if it is the last."""
        if step.id in (SEP, EOS):
            return replace(step, reason="stop" if step.id == SEP else "end")
        reply.ids.append(step.id)
        text = self.tokenizer.decode(reply.said).rstrip("\ufffd")  # an unfinished character decodes to U+FFFD
        new, reply.text = text[len(reply.text):], text
        reason = ("length" if len(reply.said) >= reply.sampling.max_new_tokens else
                  "window" if len(reply.ids) >= self.model.config.seq_len else None)
        return replace(step, text=new, reason=reason)


def generate(model: TinyGPT, tokenizer: Tokenizer, prompt: str | Sequence[str], sampling: Sampling = Sampling()) -> str:
    """The Bot's reply to `prompt`: the turns so far, the last one the User's, or the trusted string form
    "<s> User: Hello! <sep> Bot:". Raises TinyGPTError for a prompt with nothing to answer.
    """
    return "".join(step.text for step in stream(model, tokenizer, prompt, sampling))


def stream(model: TinyGPT, tokenizer: Tokenizer, prompt: str | Sequence[str],
           sampling: Sampling = Sampling()) -> Iterator[Step]:
    """Like `generate`, a step a token; closing the iterator stops the work. Each token costs one light step on a
    key-value cache. With several candidates, the chosen one's steps come when all have ended.
    """
    fitted = fit_prompt(model, tokenizer, prompt, sampling)  # raises at once, not at the first step
    return _steps(Decoder(model, tokenizer, sampling.num_candidates), candidates(fitted, sampling))


def _steps(decoder: Decoder, replies: list[Reply]) -> Iterator[Step]:
    decoder.join(*replies)
    while decoder.replies:
        steps = decoder.step()
        if len(replies) == 1:
            yield steps[0][1]
    if len(replies) > 1:
        yield from max(replies, key=lambda reply: reply.likelihood).steps


def sayable(logits: torch.Tensor, first: Sequence[bool]) -> torch.Tensor:
    """logits (B, V) without what the Bot never says; the first token of a reply (B,) is always text."""
    allowed = logits.index_fill(-1, torch.tensor(NEVER_SAID, device=logits.device), -torch.inf)
    for row in (row for row, begins in enumerate(first) if begins):
        allowed[row, [SEP, EOS]] = -torch.inf
    return allowed


def candidates(prompt: Prompt, sampling: Sampling, begun: Sequence[int] = ()) -> list[Reply]:
    """The replies to be drawn for one prompt, all of them begun alike; the likeliest is given (Adiwardana et al. 2020,
    section 2.4; https://arxiv.org/abs/2001.09977).
    """
    if sampling.seed < 0:
        sampling = replace(sampling, seed=random.getrandbits(62))
    return [Reply(prompt, sampling, number, begun) for number in range(sampling.num_candidates)]


def fit_prompt(model: TinyGPT, tokenizer: Tokenizer, prompt: str | Sequence[str], sampling: Sampling) -> Prompt:
    """The prompt as the model will read it, with room kept for the reply (at most half of the window)."""
    seq_len = model.config.seq_len
    return tokenizer.encode_prompt(prompt, seq_len - min(sampling.max_new_tokens, seq_len // 2))


def generate_many(model: TinyGPT, tokenizer: Tokenizer, prompts: Sequence[str | Sequence[str]],
                  sampling: Sampling = Sampling(), batch_size: int = 64) -> list[str]:
    """`generate` for many prompts, decoded side by side: as one reply ends, the next begins. Each gets the reply that
    it would get alone (up to float rounding); with a seed, every prompt starts from that seed.
    """
    groups = [candidates(fit_prompt(model, tokenizer, prompt, sampling), sampling) for prompt in prompts]
    waiting = sorted(groups, key=lambda group: group[0].prompt_length)  # neighbours in length share more of each step
    decoder = Decoder(model, tokenizer, max(batch_size, sampling.num_candidates))
    with tqdm(total=len(groups) * sampling.num_candidates, desc="replies", leave=False, delay=2) as bar:
        while waiting or decoder.replies:
            while waiting and len(decoder.replies) + sampling.num_candidates <= decoder.capacity:
                decoder.join(*waiting.pop())
            bar.update(sum(step.reason is not None for _, step in decoder.step()))
    return [max(group, key=lambda reply: reply.likelihood).text for group in groups]
