"""What the attention heads do, in numbers."""

import torch
from torch import Tensor

from tinygpt.model import Recorder, TinyGPT
from tinygpt.tokenizer import BOS, MARKERS, PAD


@torch.no_grad()
def attention_maps(model: TinyGPT, ids: Tensor) -> Tensor:
    """ids (B, T) -> what each head attends to (B, num_layers, num_heads, T, T): queries down, keys across, rows
    sum to 1.
    """
    recorder = Recorder()
    model.hidden(ids, recorder=recorder)
    return torch.stack(recorder.attention, dim=1)


def head_scores(model: TinyGPT, ids: Tensor) -> dict[str, Tensor]:
    """What each head does on average over the queries of `ids` (B, T) but the first and the padding:

    - entropy: of the attention in nats, 0 (one key) to ln T (all alike);
    - previous_token: the weight on the token just before, 0 to 1;
    - first_token: the weight on the first token, 0 to 1, where a head often rests (Xiao et al. 2023, section 3,
      https://arxiv.org/abs/2309.17453);
    - induction: see `induction_scores`.

    Each (num_layers, num_heads). Dropout must be off (`model.eval()`).
    """
    sums = {"entropy": 0, "previous_token": 0, "first_token": 0}
    for row in ids:  # one at a time: the maps of many rows and a long window would fill the memory
        maps = attention_maps(model, row[None])[0]  # (num_layers, num_heads, T, T)
        queries = row[1:] != PAD  # (T - 1,)
        sums["entropy"] += torch.special.entr(maps).sum(-1)[..., 1:][..., queries].sum(-1)
        sums["previous_token"] += maps.diagonal(-1, -2, -1)[..., queries].sum(-1)
        sums["first_token"] += maps[..., 1:, 0][..., queries].sum(-1)
    count = int((ids[:, 1:] != PAD).sum())
    return {**{name: total / count for name, total in sums.items()}, "induction": induction_scores(model)}


def induction_scores(model: TinyGPT, sequences: int = 8, seed: int = 0) -> Tensor:
    """The weight on the token after this one's earlier occurrence, in random tokens said twice: 0 to 1,
    (num_layers, num_heads). A head that scores high copies what came next last time (Olsson et al. 2022,
    https://arxiv.org/abs/2209.11895).
    """
    device = next(model.parameters()).device
    length = (model.config.seq_len - 1) // 2
    dice = torch.Generator().manual_seed(seed)
    said = torch.randint(len(MARKERS), model.config.vocab_size, (sequences, length), generator=dice)
    ids = torch.cat([torch.full((sequences, 1), BOS), said, said], dim=1).to(device)
    again = slice(length + 1, None)  # the queries of the second time
    maps = (attention_maps(model, row[None])[0, ..., again, :] for row in ids)  # (num_layers, num_heads, length, T)
    return sum(each.diagonal(2, -2, -1).mean(-1) for each in maps) / sequences
