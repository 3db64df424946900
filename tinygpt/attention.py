"""What the attention heads do: their maps and scores, what each layer would say, and what changes without a head.

`inspect` makes one recorded pass over a text; the other functions work on what it gives. Shapes as in model.py; L is
num_layers. Attention says where a head reads, not why the model answers as it does (Jain & Wallace 2019,
https://arxiv.org/abs/1902.10186): to learn that, remove the head (`without`) and see what changes.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tinygpt.config import TinyGPTError
from tinygpt.model import Recorder, TinyGPT
from tinygpt.tokenizer import BOS, BOT, MARKERS, PAD, SEP, USER

Head = tuple[int, int]  # layer and head, both from 0


@dataclass(frozen=True)
class Inspection:
    """One recorded pass over one text."""

    ids: Tensor  # (T,)
    attention: Tensor  # (L, H, T, T): queries down, keys across; rows sum to 1, what lies ahead is 0
    heads: Tensor  # (L, H, T, D), what each head gives
    residual: Tensor  # (L + 1, T, C): the embeddings, then the residual stream after each layer
    log_probs: Tensor  # (T, V), of the token that follows each


@torch.no_grad()
def inspect(model: TinyGPT, ids: Sequence[int] | Tensor) -> Inspection:
    """The pass over `ids` (T,), 1 to seq_len tokens, recorded. Dropout must be off (`model.eval()`)."""
    ids = torch.as_tensor(ids, device=next(model.parameters()).device)
    if ids.ndim != 1 or not len(ids):
        raise TinyGPTError("There is nothing to look at; give at least one token.")
    recorder = Recorder()
    hidden = model.hidden(ids[None], recorder=recorder)
    return Inspection(ids, torch.cat(recorder.attention), torch.cat(recorder.heads), torch.cat(recorder.residual),
                      model.logits(hidden[0]).log_softmax(-1))


@torch.no_grad()
def attention_maps(model: TinyGPT, ids: Tensor) -> Tensor:
    """The attention (L, H, T, T) of `inspect` alone, for ids (T,)."""
    recorder = Recorder()
    model.hidden(ids[None].to(next(model.parameters()).device), recorder=recorder)
    return torch.cat(recorder.attention)


# ----------------------------------------------------------------------------------------------------- what heads do

def map_scores(attention: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """What each head does on average over the queries of one text but the first and the padding, from its attention
    (L, H, T, T) and ids (T,). Each (L, H), NaN for a text of one token:

    - entropy: of the attention in nats, 0 (one key) to ln T (all alike);
    - diffuse: the entropy as a share of the most that a query could have, 0 to 1;
    - distance: how many tokens back it looks, 0 to T - 1;
    - previous_token: the weight on the token just before, 0 to 1;
    - first_token: the weight on the first token, 0 to 1, where a head often rests (Xiao et al. 2023, section 3,
      https://arxiv.org/abs/2309.17453);
    - separator: the weight on markers (<sep>, User:, Bot:), 0 to 1 (Clark et al. 2019, section 3.2,
      https://arxiv.org/abs/1906.04341).
    """
    places = torch.arange(len(ids), device=ids.device)
    queries = (places > 0) & (ids != PAD)  # (T,)
    rows = attention[:, :, queries]  # (L, H, Q, T)
    entropy = torch.special.entr(rows).sum(-1)  # (L, H, Q)
    back = (places[queries][:, None] - places).clamp_min(0)  # (Q, T)
    marker = torch.isin(ids, torch.tensor([SEP, USER, BOT], device=ids.device))  # (T,)
    each = {"entropy": entropy, "diffuse": entropy / (places[queries] + 1).log(), "distance": (rows * back).sum(-1),
            "previous_token": (rows * (back == 1)).sum(-1), "first_token": rows[..., 0],
            "separator": rows[..., marker].sum(-1)}
    return {name: values.mean(-1) for name, values in each.items()}


def head_scores(model: TinyGPT, ids: Tensor) -> dict[str, Tensor]:
    """`map_scores` over the rows of `ids` (B, T) together, and `induction_scores`. Each (L, H)."""
    totals, count = {}, 0
    for row in ids:  # one at a time: the maps of many rows and a long window would fill the memory
        queries = int((row[1:] != PAD).sum())
        for name, score in map_scores(attention_maps(model, row), row).items() if queries else ():
            totals[name] = totals.get(name, 0) + score * queries
        count += queries
    return {**{name: total / count for name, total in totals.items()}, "induction": induction_scores(model)}


def induction_scores(model: TinyGPT, sequences: int = 8, seed: int = 0) -> Tensor:
    """The weight on the token after this one's earlier occurrence, in random tokens said twice: 0 to 1, (L, H). A head
    that scores high copies what came next last time (Olsson et al. 2022, https://arxiv.org/abs/2209.11895).
    """
    length = (model.config.seq_len - 1) // 2
    dice = torch.Generator().manual_seed(seed)
    said = torch.randint(len(MARKERS), model.config.vocab_size, (sequences, length), generator=dice)
    rows = torch.cat([torch.full((sequences, 1), BOS), said, said], dim=1)
    maps = (attention_maps(model, row)[:, :, length + 1:] for row in rows)  # (L, H, length, T), the second time
    return sum(each.diagonal(2, -2, -1).mean(-1) for each in maps) / sequences


def induction_on_text(attention: Tensor, ids: Tensor) -> Tensor:
    """The same on a text: the weight on tokens that followed an earlier occurrence of the query's token, over the
    queries that have one; 0 to 1, (L, H), NaN if no token but markers occurs twice.
    """
    earlier = torch.ones(len(ids), len(ids), dtype=torch.bool, device=ids.device).tril(-1)
    before = (ids[:, None] == ids) & (ids >= len(MARKERS)) & earlier  # (T, T)
    after = before.roll(1, dims=1)  # the tokens that came next
    queries = before.any(-1)
    return (attention * after).sum(-1)[..., queries].mean(-1)


def kinds(scores: dict[str, Tensor]) -> list[list[tuple[str, float]]]:
    """For each head, what it seems to be, by its scores, and how sure that is (0 to 1): the largest of its shares if
    it is at least 0.4, else diffuse if its entropy is at least 0.8 of the most possible, else mixed.
    """
    names = [name for name in ("previous_token", "first_token", "separator", "induction") if name in scores]
    shares = torch.stack([scores[name] for name in names]).nan_to_num()  # (names, L, H)
    best, which = shares.max(0)

    def kind(layer: int, head: int) -> tuple[str, float]:
        share, spread = float(best[layer, head]), float(scores["diffuse"][layer, head])
        if share >= 0.4:
            return names[which[layer, head]].replace("_", " "), share
        return ("diffuse", spread) if spread >= 0.8 else ("mixed", 1 - max(share, spread))
    return [[kind(layer, head) for head in range(best.size(1))] for layer in range(best.size(0))]


def rollout(attention: Tensor) -> Tensor:
    """How much of each token reaches each position after each layer, if attention and the residual stream mix in
    equal parts: (L, H, T, T) -> (L, T, T), rows sum to 1. Abnar & Zuidema 2020, section 3
    (https://arxiv.org/abs/2005.00928).
    """
    mixed = (attention.mean(1) + torch.eye(attention.size(-1), device=attention.device)) / 2  # (L, T, T)
    reached = [mixed[0]]
    for layer in mixed[1:]:
        reached.append(layer @ reached[-1])
    return torch.stack(reached)


# ------------------------------------------------------------------------------------- what it would say, and without

@torch.no_grad()
def logit_lens(model: TinyGPT, residual: Tensor, top: int = 1) -> tuple[Tensor, Tensor]:
    """What the model would say next if it stopped after each layer: residual (L + 1, T, C) -> the `top` likeliest
    tokens and their probabilities, both (L + 1, T, top). nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    seen = [model.logits(model.final_norm(layer)).softmax(-1).topk(top) for layer in residual]
    return torch.stack([layer.indices for layer in seen]), torch.stack([layer.values for layer in seen])


def without(model: TinyGPT, inspection: Inspection, heads: Iterable[Head],
            how: Literal["zero", "mean"] = "zero") -> TinyGPT:
    """`model` with `heads` removed: their output is zero, or its mean over the text inspected (Wang et al. 2022,
    section 2.1, https://arxiv.org/abs/2211.00593, with that text for the data set). It shares all weights with
    `model`, which stays as it is. Raises TinyGPTError for a head that there is not.
    """
    mask = head_mask(model, heads)
    fill = (1 - mask)[..., None] * inspection.heads.mean(2) if how == "mean" else None  # (L, H, D)
    twin = copy.copy(model)
    twin.hidden = lambda ids, cache=None, *_: model.hidden(ids, cache, mask, fill)
    return twin


@torch.no_grad()
def next_log_probs(model: TinyGPT, ids: Tensor) -> Tensor:
    """The log-probabilities (V,) of the token after ids (T,)."""
    return model.logits(model.hidden(ids[None])[:, -1])[0].log_softmax(-1)


def head_mask(model: TinyGPT, heads: Iterable[Head]) -> Tensor:
    """1 for every head to keep, 0 for `heads`: (L, H)."""
    config = model.config
    mask = torch.ones(config.num_layers, config.num_heads, device=next(model.parameters()).device)
    for layer, head in heads:
        if layer not in range(config.num_layers) or head not in range(config.num_heads):
            raise TinyGPTError(f"There is no head {head} in layer {layer}; layers go from 0 to "
                               f"{config.num_layers - 1}, heads from 0 to {config.num_heads - 1}.")
        mask[int(layer), int(head)] = 0
    return mask


def change(before: Tensor, after: Tensor) -> Tensor:
    """KL(before || after) in nats, 0 or more, of log-probabilities (..., V): (...)."""
    return (before.exp() * (before - after).clamp(-1e4, 1e4)).sum(-1).clamp_min(0)


@torch.no_grad()
def head_importance(model: TinyGPT, inspection: Inspection, position: int = -1) -> Tensor:
    """How much the next-token distribution at `position` changes when each head alone is removed: KL in nats (L, H),
    as in Michel et al. 2019, section 3.2 (https://arxiv.org/abs/1905.10650), one head at a time.
    """
    ids = inspection.ids[:position % len(inspection.ids) + 1]
    shape = model.config.num_layers, model.config.num_heads
    masks = 1 - torch.eye(math.prod(shape), device=ids.device).view(-1, *shape)  # a row for each head, (L * H, L, H)
    changes = []
    for some in masks.split(shape[1]):  # a layer's heads at once
        hidden = model.hidden(ids.expand(len(some), -1), head_mask=some.transpose(0, 1))[:, -1]
        changes.append(change(inspection.log_probs[position], model.logits(hidden).log_softmax(-1)))
    return torch.stack(changes)


def for_bertviz(inspection: Inspection) -> list[Tensor]:
    """The maps as BertViz's head_view and model_view take them: for each layer (1, H, T, T). CircuitsVis's
    attention_patterns takes one layer, `inspection.attention[layer]`.
    """
    return [layer[None].cpu() for layer in inspection.attention]
