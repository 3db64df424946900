"""The model: a decoder-only transformer, small enough to read in one sitting.

Read from the bottom up if you like the whole before its parts: `TinyGPT` embeds the tokens, sends them through
`num_layers` `DecoderBlock`s, and an output head turns each position into a distribution over the next token.

Shapes stand at the ends of the lines. B: sequences in the batch, T: tokens fed now, S: tokens attended to
(S = T, unless a cache holds earlier ones), C: embed_dim, H: num_heads, D = C / H: width of a head, V: vocab_size.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tinygpt.config import Config, TinyGPTError

IGNORE = -100  # a target that is not learned, as in torch's cross_entropy


class Cache:
    """Keys and values of the tokens seen so far, so that each new token costs one light step. The rows of a batch may
    hold different numbers of tokens.
    """

    def __init__(self, config: Config, batch_size: int, device: torch.device, dtype: torch.dtype = torch.float32):
        head_dim = config.embed_dim // config.num_heads
        shape = (config.num_layers, batch_size, config.num_heads, config.seq_len, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths = torch.zeros(batch_size, dtype=torch.int64)  # tokens held in each row, on the CPU

    def rows(self, start: int, end: int) -> "Cache":
        """Some of the rows, as a cache that shares their memory."""
        some = object.__new__(Cache)
        some.keys, some.values = self.keys[:, start:end], self.values[:, start:end]
        some.lengths = self.lengths[start:end]
        return some

    def copy_row(self, source: int, target: int) -> None:
        """Makes the row `target` hold what `source` holds."""
        length = int(self.lengths[source])
        self.lengths[target] = length
        for held in (self.keys, self.values):
            held[:, target, :, :length] = held[:, source, :, :length]

    def extend(self, layer: int, key: Tensor, value: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Stores `layer`'s keys and values (B, H, T, D) of the tokens at `positions` (B, T); returns all that any row
        holds (B, H, S, D).
        """
        start, end = int(self.lengths.min()), int(self.lengths.max()) + key.size(2)
        for held, new in ((self.keys, key), (self.values, value)):
            if start + key.size(2) == end:  # all rows are equally long
                held[layer, :, :, start:end] = new
            else:
                held[layer][torch.arange(len(positions))[:, None], :, positions] = new.transpose(1, 2)
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


@dataclass
class Recorder:
    """Fills up during a forward pass that it is handed to: what each layer attended to and passed on."""

    attention: list[Tensor] = field(default_factory=list)  # num_layers x (B, H, T, S), rows sum to 1
    heads: list[Tensor] = field(default_factory=list)  # num_layers x (B, H, T, D), what each head gives
    residual: list[Tensor] = field(default_factory=list)  # num_layers + 1 x (B, T, C), the embeddings first


class MultiHeadAttention(nn.Module):
    """Causal multi-head self-attention (Vaswani et al. 2017, section 3.2; https://arxiv.org/abs/1706.03762)."""

    def __init__(self, config: Config):
        super().__init__()
        self.num_heads = config.num_heads
        self.query = nn.Linear(config.embed_dim, config.embed_dim)
        self.key = nn.Linear(config.embed_dim, config.embed_dim)
        self.value = nn.Linear(config.embed_dim, config.embed_dim)
        self.out = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, layer: int, positions: Tensor, cache: Cache | None = None,
                head_mask: Tensor | None = None, head_fill: Tensor | None = None,
                recorder: Recorder | None = None) -> Tensor:
        query, key, value = map(self.split_heads, self.project(x))  # (B, H, T, D) each
        if cache is not None:
            key, value = cache.extend(layer, key, value, positions)  # (B, H, S, D)
        if recorder is None:
            heads = self.attend(query, key, value, positions)  # (B, H, T, D)
        else:
            heads, weights = self.attend_in_the_open(query, key, value, positions)
            recorder.attention.append(weights)
            recorder.heads.append(heads)
        if head_mask is not None:
            heads = heads * head_mask.to(heads)[..., None, None]  # (B, H, T, D)
        if head_fill is not None:
            heads = heads + head_fill.to(heads)[:, None]  # (B, H, T, D)
        return self.out(heads.transpose(1, 2).flatten(2))  # (B, T, C)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.query(x), self.key(x), self.value(x)  # (B, T, C) each

    def split_heads(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), self.num_heads, -1).transpose(1, 2)  # (B, T, C) -> (B, H, T, D)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        """The fast path: torch's fused kernel, which never holds the weights (so they see no dropout)."""
        if query.size(2) == key.size(2):
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        mask = None if query.shape[::2] == (1, 1) else causal_mask(positions, key.size(2))
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    def attend_in_the_open(self, query: Tensor, key: Tensor, value: Tensor,
                           positions: Tensor) -> tuple[Tensor, Tensor]:
        """The same, written out: softmax(QK^T / sqrt(D)) V, with the weights (B, H, T, S) kept."""
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))  # (B, H, T, S)
        weights = scores.masked_fill(~causal_mask(positions, key.size(2)), -torch.inf).softmax(dim=-1)  # (B, H, T, S)
        return weights @ value, weights


def causal_mask(positions: Tensor, seen: int) -> Tensor:
    """True where a token at one of `positions` (B, T) may look: at itself and to its left (B, 1, T, S)."""
    return (torch.arange(seen, device=positions.device) <= positions[..., None])[:, None]


class DecoderBlock(nn.Module):
    """Attention, then a feed-forward network, each normed before and added to the residual stream (pre-norm)."""

    def __init__(self, config: Config):
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.embed_dim)
        self.attention = MultiHeadAttention(config)
        self.ff_norm = nn.LayerNorm(config.embed_dim)
        self.ff_in = nn.Linear(config.embed_dim, config.ff_hidden)
        self.ff_out = nn.Linear(config.ff_hidden, config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, layer: int, positions: Tensor, cache: Cache | None = None,
                head_mask: Tensor | None = None, head_fill: Tensor | None = None,
                recorder: Recorder | None = None) -> Tensor:
        attended = self.attention(self.attention_norm(x), layer, positions, cache, head_mask, head_fill, recorder)
        x = x + self.dropout(attended)  # (B, T, C)
        expanded = F.gelu(self.ff_in(self.ff_norm(x)))  # (B, T, ff_hidden)
        return x + self.dropout(self.ff_out(expanded))  # (B, T, C)


class TinyGPT(nn.Module):
    """A GPT (Radford et al. 2019) with learned positions and, by default, an adaptive softmax.

    `model(ids)` gives logits, `model(ids, targets)` the loss of each token. `hidden` is the one pass through the
    blocks that training, generation and inspection share; `logits` puts the output head on it.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.embed_dim)
        self.position_embedding = nn.Embedding(config.seq_len, config.embed_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.embed_dim)
        # The adaptive head gives rare tokens fewer dimensions (Grave et al. 2017, https://arxiv.org/abs/1609.04309),
        # so ids must fall with frequency, as our Tokenizer's do. The tied head is the token embedding, used twice.
        self.head = None
        if config.head == "adaptive":
            self.head = nn.AdaptiveLogSoftmaxWithLoss(config.embed_dim, config.vocab_size, cutoffs(config.vocab_size))
        self.apply(init_weights)
        for block in self.blocks:  # GPT-2: what adds to the residual stream starts smaller, the deeper the model
            for layer in (block.attention.out, block.ff_out):
                nn.init.normal_(layer.weight, std=0.02 / math.sqrt(2 * config.num_layers))

    def forward(self, ids: Tensor, targets: Tensor | None = None, cache: Cache | None = None,
                head_mask: Tensor | None = None, head_fill: Tensor | None = None,
                recorder: Recorder | None = None) -> Tensor:
        """ids (B, T) int64 -> logits (B, T, V) fp32; with targets (B, T), the loss of each token in nats (B, T).

        A target of -100 is not learned: its loss is 0. `cache` holds earlier tokens and takes these in; `head_mask`
        (num_layers, num_heads), or one for each row (num_layers, B, num_heads), scales each head's output, 0 removes
        it; `head_fill` (num_layers, num_heads, D) is added to it then; `recorder` is filled.
        Raises TinyGPTError for more tokens than seq_len.
        """
        hidden = self.hidden(ids, cache, head_mask, head_fill, recorder)  # (B, T, C)
        return self.logits(hidden) if targets is None else self.losses(hidden, targets)

    def hidden(self, ids: Tensor, cache: Cache | None = None, head_mask: Tensor | None = None,
               head_fill: Tensor | None = None, recorder: Recorder | None = None) -> Tensor:
        """ids (B, T) -> what the last block passes on, normed (B, T, C)."""
        tokens = ids.size(1)
        end = tokens if cache is None else tokens + int(cache.lengths.max())
        if end > self.config.seq_len:
            raise TinyGPTError(f"{end} tokens do not fit a model of seq_len {self.config.seq_len}; give fewer.")
        positions = torch.arange(tokens, device=ids.device)[None]  # (1, T)
        if cache is not None:
            positions = positions + cache.lengths[:, None].to(ids.device)  # (B, T)
        x = self.token_embedding(ids) + self.position_embedding(positions)  # (B, T, C)
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            if recorder is not None:
                recorder.residual.append(x)
            mask = None if head_mask is None else head_mask[layer]
            fill = None if head_fill is None else head_fill[layer]
            if self.training and self.config.gradient_checkpointing:
                x = checkpoint(block, x, layer, positions, cache, mask, fill, recorder, use_reentrant=False)
            else:
                x = block(x, layer, positions, cache, mask, fill, recorder)
        if recorder is not None:
            recorder.residual.append(x)
        if cache is not None:
            cache.lengths += tokens
        return self.final_norm(x)  # (B, T, C)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (..., C) -> logits (..., V) fp32; the adaptive head's are log-probabilities already."""
        with torch.autocast(hidden.device.type, enabled=False):  # 16 bits are too coarse for 32,000 classes
            hidden = hidden.float()
            if self.head is None:
                return F.linear(hidden, self.token_embedding.weight.float())
            return self.head.log_prob(hidden.flatten(0, -2)).unflatten(0, hidden.shape[:-1])

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden (B, T, C), targets (B, T) -> nats a token, 0 where the target is not learned (B, T)."""
        if self.head is None:
            losses = F.cross_entropy(self.logits(hidden).flatten(0, 1), targets.flatten(), ignore_index=IGNORE,
                                     reduction="none")
            return losses.view_as(targets)
        learned = targets != IGNORE  # the adaptive head has no ignore_index, so it sees only these
        losses = torch.zeros(targets.shape, device=hidden.device)  # (B, T)
        with torch.autocast(hidden.device.type, enabled=False):
            losses[learned] = -self.head(hidden[learned].float(), targets[learned]).output
        if self.training:  # tokens that are all frequent leave a tail unused; processes that share a run must agree
            losses = losses + 0.0 * sum(parameter.sum() for parameter in self.head.parameters())
        return losses


def cutoffs(vocab_size: int) -> list[int]:
    """Where the adaptive softmax's frequent, middling and rare tokens part; fewer parts for a small vocabulary."""
    return [cutoff for cutoff in (2_000, 8_000) if cutoff < vocab_size] or [max(1, vocab_size // 2)]


def init_weights(module: nn.Module) -> None:
    """GPT-2's initialisation: matrices and embeddings from N(0, 0.02), biases zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name; "auto" takes CUDA, then MPS, then the CPU. Raises TinyGPTError if it is not there."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator if accelerator and accelerator.type in ("cuda", "mps") else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TinyGPTError(f"device is {name!r}; give auto, cpu, cuda, cuda:0 or mps.") from None
    there = device.type == "cpu" or (accelerator and device.type == accelerator.type
                                     and (device.index or 0) < torch.accelerator.device_count())
    if not there:
        raise TinyGPTError(f"device {name} is not there; this machine has "
                           f"{'cpu' if accelerator is None else f'cpu and {accelerator}'}. Use auto.")
    return device


def count_parameters(model: TinyGPT) -> dict[str, int]:
    """Parameters by component, the sum under "total"; a tied head has none of its own."""
    attention = sum(p.numel() for block in model.blocks for p in block.attention.parameters())
    components = {
        "token embedding": model.token_embedding.weight.numel(),
        "position embedding": model.position_embedding.weight.numel(),
        "attention": attention,
        "feed-forward": sum(p.numel() for b in model.blocks for m in (b.ff_in, b.ff_out) for p in m.parameters()),
        "norms": sum(p.numel() for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()),
        "output head": 0 if model.head is None else sum(p.numel() for p in model.head.parameters()),
    }
    return {**components, "total": sum(components.values())}
