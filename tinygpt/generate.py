"""From a dialogue to the Bot's reply, token by token."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from tinygpt.model import Cache, TinyGPT
from tinygpt.sampling import Sampling, distribution
from tinygpt.tokenizer import BOS, BOT, EOS, PAD, SEP, UNK, USER, Prompt, Tokenizer

NEVER_SAID = [PAD, UNK, BOS, USER, BOT]  # the model says text and ends its turn; it never writes another speaker's
Reason = Literal["end", "stop", "length", "window"]


@dataclass(frozen=True)
class Step:
    """One token of a reply, as it is drawn."""

    id: int
    text: str  # what it adds to the reply; an unfinished UTF-8 character waits for its last byte
    probability: float  # in the model's own distribution
    drawn_with: float  # in the distribution after `Sampling`'s stages
    reason: Reason | None = None  # set on the last step: the Bot's turn ended, the dialogue ended, max_new_tokens or
    #                               seq_len was reached ("stop", "end", "length", "window")


def generate(model: TinyGPT, tokenizer: Tokenizer, prompt: str | Sequence[str], sampling: Sampling = Sampling()) -> str:
    """The Bot's reply to `prompt`: the turns so far, the last one the User's, or the trusted string form
    "<s> User: Hello! <sep> Bot:". Raises TinyGPTError for a prompt with nothing to answer.
    """
    return "".join(step.text for step in stream(model, tokenizer, prompt, sampling))


def stream(model: TinyGPT, tokenizer: Tokenizer, prompt: str | Sequence[str],
           sampling: Sampling = Sampling()) -> Iterator[Step]:
    """Like `generate`, a step a token; closing the iterator stops the work. Each token costs one light step on a
    key-value cache. The model's own probabilities are kept beside those it was drawn with.
    """
    return _steps(model, tokenizer, fit_prompt(model, tokenizer, prompt, sampling), sampling)


def fit_prompt(model: TinyGPT, tokenizer: Tokenizer, prompt: str | Sequence[str], sampling: Sampling) -> Prompt:
    """The prompt as the model will read it, with room kept for the reply (at most half of the window)."""
    seq_len = model.config.seq_len
    return tokenizer.encode_prompt(prompt, seq_len - min(sampling.max_new_tokens, seq_len // 2))


@torch.inference_mode()
def _steps(model: TinyGPT, tokenizer: Tokenizer, prompt: Prompt, sampling: Sampling) -> Iterator[Step]:
    device = next(model.parameters()).device
    dice = torch.Generator().manual_seed(sampling.seed if sampling.seed >= 0 else random.getrandbits(63))
    cache = Cache(model.config, batch_size=1, device=device)
    ids = list(prompt.ids)
    hidden = model.hidden(torch.tensor([ids], device=device), cache)[:, -1]  # (1, C)
    reply, said = [], ""
    while True:
        logits = model.logits(hidden)  # (1, V)
        logits[:, NEVER_SAID] = -torch.inf
        if not reply:
            logits[:, [SEP, EOS]] = -torch.inf  # a reply has at least one token
        drawn_from = distribution(logits, torch.tensor([ids], device=device), sampling)  # (1, V)
        token = int(torch.multinomial(drawn_from[0].cpu(), 1, generator=dice))
        probabilities = float(logits.softmax(dim=-1)[0, token]), float(drawn_from[0, token])
        if token in (SEP, EOS):
            rest = tokenizer.decode(reply)[len(said):]
            yield Step(token, rest, *probabilities, reason="stop" if token == SEP else "end")
            return
        ids.append(token)
        reply.append(token)
        text = tokenizer.decode(reply)
        reason = ("length" if len(reply) >= sampling.max_new_tokens else
                  "window" if len(ids) >= model.config.seq_len else None)
        safe = len(text) if reason else len(text.rstrip("\ufffd"))  # unfinished bytes decode to U+FFFD
        yield Step(token, text[len(said):safe], *probabilities, reason)
        if reason:
            return
        said = text[:safe]
        hidden = model.hidden(torch.tensor([[token]], device=device), cache)[:, -1]  # (1, C)
