"""From a dialogue to the Bot's reply, token by token."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from tinygpt.model import Cache, TinyGPT
from tinygpt.sampling import Sampling, distribution
from tinygpt.tokenizer import BOS, BOT, EOS, MARKERS, PAD, SEP, UNK, USER, Prompt, Tokenizer

NEVER_SAID = [PAD, UNK, BOS, USER, BOT]  # the model says text and ends its turn; it never writes another speaker's
Reason = Literal["end", "stop", "length", "window"]


@dataclass(frozen=True)
class Step:
    """One token of a reply, as it is drawn."""

    id: int
    text: str  # what it adds to the reply; an unfinished UTF-8 character waits for its last byte, or is left out
    probability: float  # in the model's own distribution, of all tokens
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
    dice = new_dice(sampling)
    cache = Cache(model.config, batch_size=1, device=device)
    ids = list(prompt.ids)
    hidden = model.hidden(torch.tensor([ids], device=device), cache)[:, -1]  # (1, C)
    reply, said = [], ""
    while True:
        token, *probabilities = draw(model.logits(hidden), ids, not reply, sampling, dice)
        if token in (SEP, EOS):
            yield Step(token, "", *probabilities, reason="stop" if token == SEP else "end")
            return
        ids.append(token)
        reply.append(token)
        text = tokenizer.decode(reply).rstrip("\ufffd")  # bytes of an unfinished character decode to U+FFFD
        reason = ("length" if len(reply) >= sampling.max_new_tokens else
                  "window" if len(ids) >= model.config.seq_len else None)
        yield Step(token, text[len(said):], *probabilities, reason)
        if reason:
            return
        said = text
        hidden = model.hidden(torch.tensor([[token]], device=device), cache)[:, -1]  # (1, C)


@torch.inference_mode()
def generate_many(model: TinyGPT, tokenizer: Tokenizer, prompts: Sequence[str | Sequence[str]],
                  sampling: Sampling = Sampling(), batch_size: int = 64) -> list[str]:
    """`generate` for many prompts, those of one length decoded side by side. Each gets the reply that it would get
    alone (up to float rounding); with a seed, every prompt starts from that seed.
    """
    fitted = [fit_prompt(model, tokenizer, prompt, sampling).ids for prompt in prompts]
    by_length = defaultdict(list)
    for number, ids in enumerate(fitted):
        by_length[len(ids)].append(number)
    batches = [same[start:start + batch_size] for _, same in sorted(by_length.items())
               for start in range(0, len(same), batch_size)]
    replies = [""] * len(fitted)
    with tqdm(total=len(fitted), desc="replies", leave=False, delay=2) as bar:
        for batch in batches:
            for number, reply in zip(batch, _decode(model, [fitted[n] for n in batch], sampling), strict=True):
                replies[number] = tokenizer.decode(reply).rstrip("\ufffd")
            bar.update(len(batch))
    return replies


def _decode(model: TinyGPT, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
    """Replies, as ids, to prompts of one length."""
    device = next(model.parameters()).device
    dice = [new_dice(sampling) for _ in prompts]
    room = min(sampling.max_new_tokens, model.config.seq_len - len(prompts[0]))
    cache = Cache(model.config, len(prompts), device)
    hidden = model.hidden(torch.tensor(prompts, device=device), cache)[:, -1]  # (B, C)
    replies: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))
    for _ in range(room):
        logits = model.logits(hidden)  # (B, V)
        drawn = [PAD] * len(prompts)  # what is fed to a reply that has ended changes no other
        for row in sorted(running):
            ids = prompts[row] + replies[row]
            drawn[row] = draw(logits[row:row + 1], ids, not replies[row], sampling, dice[row])[0]
            if drawn[row] in (SEP, EOS):
                running.remove(row)
            else:
                replies[row].append(drawn[row])
        if not running:
            break
        hidden = model.hidden(torch.tensor(drawn, device=device)[:, None], cache)[:, -1]  # (B, C)
    return replies


def new_dice(sampling: Sampling) -> torch.Generator:
    """What chance comes from: the seed, or the system where it is -1."""
    return torch.Generator().manual_seed(sampling.seed if sampling.seed >= 0 else random.getrandbits(63))


def draw(logits: Tensor, ids: list[int], first: bool, sampling: Sampling, dice: torch.Generator) -> tuple:
    """Draws the token after `ids` from logits (1, V): its id, its probability in the model's own distribution, and
    the one it was drawn with. The `first` token of a reply is always text; markers are no repetition.
    """
    own = logits.softmax(dim=-1)  # (1, V)
    never = [*NEVER_SAID, SEP, EOS] if first else NEVER_SAID
    allowed = logits.index_fill(-1, torch.tensor(never, device=logits.device), -torch.inf)  # (1, V)
    seen = torch.tensor([[i for i in ids if i >= len(MARKERS)]], device=logits.device, dtype=torch.int64)  # (1, S)
    drawn_from = distribution(allowed, seen, sampling)  # (1, V)
    token = int(torch.multinomial(drawn_from[0].cpu(), 1, generator=dice))
    return token, float(own[0, token]), float(drawn_from[0, token])
