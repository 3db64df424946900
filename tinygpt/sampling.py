"""From logits to the distribution that the next token is drawn from.

The stages run in one order: repetition penalty, no repeated n-grams -> temperature -> top-k -> top-p -> min-p -> draw.
Each is a pure function on logits (B, V); a token that is cut has a logit of -inf.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tinygpt.config import TinyGPTError
from tinygpt.tokenizer import MARKERS


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn. Raises TinyGPTError, naming the range, for a value outside it."""

    temperature: float = 0.7
    """Below 1 the likely tokens gain, above 1 the unlikely ones; 0 always takes the likeliest. 0 to 5."""
    top_k: int = 40
    """Only the k likeliest tokens may be drawn; 0 allows all."""
    top_p: float = 0.9
    """Only the likeliest tokens that together reach this probability may be drawn; above 0 to 1, 1 allows all."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the likeliest may be drawn; 0 to 1, 0 allows all."""
    repetition_penalty: float = 1.15
    """Tokens seen before have their logits divided by this (multiplied if negative); 1 to 5, 1 does nothing."""
    no_repeat_ngram_size: int = 0
    """No run of this many tokens may be said a second time; 0 allows it."""
    max_new_tokens: int = 40
    """Longest reply, in tokens; at least 1."""
    seed: int = -1
    """Same seed, same reply; -1 draws anew each time."""
    num_candidates: int = 1
    """Replies drawn side by side, of which the likeliest per token is given (sample-and-rank); 1 to 16."""

    def __post_init__(self) -> None:
        for name, allowed, fits in (
                ("temperature", "a number from 0 to 5", lambda v: 0 <= v <= 5),
                ("top_k", "a whole number of 0 or more", lambda v: isinstance(v, int) and v >= 0),
                ("top_p", "a number above 0, up to 1", lambda v: 0 < v <= 1),
                ("min_p", "a number from 0 to 1", lambda v: 0 <= v <= 1),
                ("repetition_penalty", "a number from 1 to 5", lambda v: 1 <= v <= 5),
                ("no_repeat_ngram_size", "a whole number of 0 or more", lambda v: isinstance(v, int) and v >= 0),
                ("max_new_tokens", "a whole number of at least 1", lambda v: isinstance(v, int) and v >= 1),
                ("seed", "a whole number from -1 to 2^63 - 1", lambda v: isinstance(v, int) and -1 <= v < 2**63),
                ("num_candidates", "a whole number from 1 to 16", lambda v: isinstance(v, int) and 1 <= v <= 16)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value or not fits(value):
                raise TinyGPTError(f"{name} is {value!r}; give {allowed}.")


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes the tokens `seen` (B, S) less likely (Keskar et al. 2019, section 4.1; https://arxiv.org/abs/1909.05858).
    Markers are no repetition.
    """
    if penalty == 1:
        return logits
    scores = logits.gather(-1, seen)  # (B, S)
    penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
    return logits.scatter(-1, seen, penalised.where(seen >= len(MARKERS), scores))  # (B, V)


def block_repeated_ngrams(logits: Tensor, seen: Tensor, size: int) -> Tensor:
    """Cuts each token that would end a run of `size` tokens that is already among `seen` (B, S): Paulus et al. 2018,
    section 2.5 (https://arxiv.org/abs/1705.04304). Markers are never cut. 0 cuts nothing.
    """
    if size == 0 or seen.size(1) < size:
        return logits
    runs = seen.unfold(1, size, 1)  # (B, S - size + 1, size)
    last = seen[:, None, seen.size(1) - size + 1:]  # (B, 1, size - 1), what the next token would complete
    ends = runs[..., -1]  # (B, S - size + 1)
    again = (runs[..., :-1] == last).all(-1) & (ends >= len(MARKERS))
    cut = logits.gather(-1, ends).masked_fill(again, -torch.inf)
    return logits.scatter_reduce(-1, ends, cut, "amin")  # (B, V); a token that ends several runs is cut by any of them


def scale_by_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Divides by the temperature; 0, or next to it (logits would overflow), keeps only the likeliest token."""
    return keep_top_k(logits, 1) if temperature < 1e-5 else logits / temperature  # (B, V)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Cuts all but the k likeliest tokens (Fan et al. 2018, section 5.4; https://arxiv.org/abs/1805.04833)."""
    if k == 0 or k >= logits.size(-1):
        return logits
    values, tokens = logits.topk(k)  # (B, k)
    return torch.full_like(logits, -torch.inf).scatter(-1, tokens, values)  # (B, V)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keeps the smallest set of likeliest tokens that reaches probability p: the nucleus (Holtzman et al. 2020,
    section 3.1; https://arxiv.org/abs/1904.09751).
    """
    if p == 1:
        return logits
    probabilities, size = logits.softmax(dim=-1), min(256, logits.size(-1))
    while True:  # a few tokens mostly reach p, and the rest need not be sorted
        likeliest, tokens = probabilities.topk(size)  # (B, size)
        before = likeliest.cumsum(dim=-1) - likeliest  # probability of all likelier tokens
        if size == logits.size(-1) or bool((before[:, -1] >= p).all()):
            break
        size = min(8 * size, logits.size(-1))
    kept = logits.gather(-1, tokens).masked_fill(before >= p, -torch.inf)
    return torch.full_like(logits, -torch.inf).scatter(-1, tokens, kept)  # (B, V)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Cuts tokens less than p times as likely as the likeliest (Nguyen et al. 2024, section 3;
    https://arxiv.org/abs/2407.01082).
    """
    if p == 0:
        return logits
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(dim=-1, keepdim=True), -torch.inf)


def stages(logits: Tensor, seen: Tensor, sampling: Sampling) -> dict[str, Tensor]:
    """What each stage makes of logits (B, V) after the tokens `seen` (B, S): its name -> logits (B, V), in order. The
    softmax of the last one is what the next token is drawn from.
    """
    made = {"model": logits}
    made["repetition"] = block_repeated_ngrams(penalise_repetition(logits, seen, sampling.repetition_penalty), seen,
                                               sampling.no_repeat_ngram_size)
    made["temperature"] = scale_by_temperature(made["repetition"], sampling.temperature)
    made["top-k"] = keep_top_k(made["temperature"], sampling.top_k)
    made["top-p"] = keep_top_p(made["top-k"], sampling.top_p)
    made["min-p"] = keep_min_p(made["top-p"], sampling.min_p)
    return made


def choices(logits: Tensor, seen: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their probabilities, both (B, K): `stages`, but what top-k cut is left out, so
    that the later stages have little to do.
    """
    logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
    logits = block_repeated_ngrams(logits, seen, sampling.no_repeat_ngram_size)
    tokens = torch.arange(logits.size(-1), device=logits.device).expand(logits.shape)  # (B, V)
    if 0 < sampling.top_k < logits.size(-1):
        logits, tokens = logits.topk(sampling.top_k)  # (B, K), the same ones at any temperature
    logits = scale_by_temperature(logits, sampling.temperature)
    return tokens, keep_min_p(keep_top_p(logits, sampling.top_p), sampling.min_p).softmax(dim=-1)


def draw(probabilities: Tensor, dice: list[torch.Generator]) -> Tensor:
    """A column for each row of probabilities (B, K), by the row's own dice: (B,). Chance is turned into a column by
    the inverse of the summed probabilities, so that a row draws the same in any company.
    """
    chance = torch.cat([torch.rand(1, dtype=torch.float64, generator=one) for one in dice])  # (B,)
    reached = probabilities.cpu().double().cumsum(dim=-1)  # (B, K)
    column = torch.searchsorted(reached, chance[:, None] * reached[:, -1:], right=True)  # (B, 1), as chance < 1
    return column[:, 0].to(probabilities.device)


def idle(sampling: Sampling) -> list[str]:
    """A sentence for each setting that has no effect because of another one."""
    notes = []
    if sampling.temperature < 1e-5:
        notes.append("Temperature 0 always takes the likeliest token: top-k, top-p, min-p and the seed change nothing.")
    elif sampling.top_k == 1:
        notes.append("Top-k 1 always takes the likeliest token: temperature, top-p, min-p and the seed change nothing.")
    elif sampling.min_p == 1:
        notes.append("Min-p 1 keeps only the likeliest token: temperature, top-k, top-p and the seed change nothing.")
    if notes and sampling.num_candidates > 1:
        notes.append("All candidates are alike then: one would do.")
    return notes
