"""Which parameters are stepped how, and how fast at each step."""

import math

import torch
from torch import nn

from tinygpt.config import Config


def make_optimizers(model: nn.Module, config: Config) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101) for all parameters, or Muon for the blocks'
    matrices and AdamW for the rest. Biases and norms are not decayed.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) steps along the orthogonalised momentum of
    each matrix: query, key and value each on its own, since each is a matrix of its own here.
    """
    matrices = {p for p in model.blocks.parameters() if p.ndim == 2} if config.optimizer == "muon" else set()
    rest = [p for p in model.parameters() if p not in matrices]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon([p for p in model.parameters() if p in matrices], lr=config.lr,
                                           weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """The rate of `step` (0 is the first): up in a line during the warm-up, then as `config.schedule` says."""
    warmup = max(1, round(config.warmup_ratio * total_steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(1, total_steps - warmup)  # 0 to 1
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
