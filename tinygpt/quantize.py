"""8-bit weights for replies on a CPU.

A step of a few chats takes as long as reading the weights from memory, so a quarter of the bytes is a fraction of the
time. Each row of a matrix is rounded to 255 steps of its own size (as in Dettmers et al. 2022, section 2,
https://arxiv.org/abs/2208.07339, for weights alone); what flows between the matrices stays as it was.
"""

import copy

import torch
from torch import Tensor, nn

from tinygpt.model import MultiHeadAttention, TinyGPT


class Int8Linear(nn.Module):
    """A linear layer whose weights are read as 8 bits."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        scale = (weight.abs().amax(dim=1) / 127).clamp_min(1e-20).bfloat16()  # (out,)
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1)).bfloat16()  # (rows, in)
        y = torch._weight_int8pack_mm(rows, self.weight, self.scale) + self.bias  # (rows, out) fp32, as the bias is
        return y.view(*x.shape[:-1], -1)


class Int8Attention(MultiHeadAttention):
    """Attention whose query, key and value are read in one go."""

    def __init__(self, attention: MultiHeadAttention):
        nn.Module.__init__(self)
        self.num_heads = attention.num_heads
        parts = attention.query, attention.key, attention.value
        self.joint = Int8Linear(torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts]))
        self.out = Int8Linear(attention.out.weight, attention.out.bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.joint(x).chunk(3, dim=-1)  # (B, T, C) each


@torch.no_grad()
def int8(model: TinyGPT) -> TinyGPT:
    """`model` with 8-bit weights in its blocks, to generate with; the rest is shared with `model`. On a GPU, which is
    fast enough, and for widths that the kernel does not know, `model` itself.
    """
    config = model.config
    if next(model.parameters()).device.type != "cpu" or config.embed_dim % 16 or config.ff_hidden % 16:
        return model
    fast = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for block in fast.blocks:
        block.attention = Int8Attention(block.attention)
        for name in ("ff_in", "ff_out"):
            layer = getattr(block, name)
            setattr(block, name, Int8Linear(layer.weight, layer.bias))
    return fast
