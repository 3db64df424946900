"""From logits to the distribution that the next token is drawn from.

The stages run in one order: repetition penalty -> temperature -> top-k -> top-p -> draw. Each is a pure function on
logits (B, V); a token that is cut has a logit of -inf.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tinygpt.config import TinyGPTError


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn. Raises TinyGPTError, naming the range, for a value outside it."""

    temperature: float = 0.7
    """Below 1 the likely tokens gain, above 1 the unlikely ones; 0 always takes the likeliest. 0 to 5."""
    top_k: int = 40
    """Only the k likeliest tokens may be drawn; 0 allows all."""
    top_p: float = 0.9
    """Only the likeliest tokens that together reach this probability may be drawn; above 0 to 1, 1 allows all."""
    repetition_penalty: float = 1.15
    """Tokens seen before have their logits divided by this (multiplied if negative); 1 to 5, 1 does nothing."""
    max_new_tokens: int = 40
    """Longest reply, in tokens; at least 1."""
    seed: int = -1
    """Same seed, same reply; -1 draws anew each time."""

    def __post_init__(self) -> None:
        for name, allowed, fits in (
                ("temperature", "a number from 0 to 5", lambda v: 0 <= v <= 5),
                ("top_k", "a whole number of 0 or more", lambda v: isinstance(v, int) and v >= 0),
                ("top_p", "a number above 0, up to 1", lambda v: 0 < v <= 1),
                ("repetition_penalty", "a number from 1 to 5", lambda v: 1 <= v <= 5),
                ("max_new_tokens", "a whole number of at least 1", lambda v: isinstance(v, int) and v >= 1),
                ("seed", "a whole number from -1 to 2^63 - 1", lambda v: isinstance(v, int) and -1 <= v < 2**63)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value != value or not fits(value):
                raise TinyGPTError(f"{name} is {value!r}; give {allowed}.")


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes the tokens `seen` (B, S) less likely (Keskar et al. 2019, section 4.1; https://arxiv.org/abs/1909.05858)."""
    if penalty == 1:
        return logits
    scores = logits.gather(-1, seen)  # (B, S)
    return logits.scatter(-1, seen, torch.where(scores < 0, scores * penalty, scores / penalty))  # (B, V)


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
    ordered, tokens = logits.sort(descending=True)  # (B, V)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # probability of all likelier tokens
    return torch.full_like(logits, -torch.inf).scatter(-1, tokens, ordered.masked_fill(before >= p, -torch.inf))


def distribution(logits: Tensor, seen: Tensor, sampling: Sampling) -> Tensor:
    """All stages in order: logits (B, V) and the tokens so far (B, S) -> probabilities (B, V)."""
    logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
    logits = scale_by_temperature(logits, sampling.temperature)
    logits = keep_top_k(logits, sampling.top_k)
    logits = keep_top_p(logits, sampling.top_p)
    return logits.softmax(dim=-1)
