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
    """A linear layer whose weights are read as 8 bits for up to `most_rows` rows, and in full for more, where
    arithmetic takes longer than reading.
    """

    def __init__(self, linear: nn.Linear, most_rows: int):
        super().__init__()
        self.linear, self.most_rows = linear, most_rows
        scale = (linear.weight.detach().abs().amax(dim=1) / 127).clamp_min(1e-20).bfloat16()  # (out,)
        weight = (linear.weight.detach() / scale.float()[:, None]).round().clamp(-127, 127)  # (out, in)
        self.register_buffer("scale", scale)
        self.register_buffer("weight", weight.to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.size(-1))  # (rows, in)
        if rows.size(0) > self.most_rows:
            return self.linear(x)
        y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale)  # (rows, out)
        return (y + self.linear.bias).view(*x.shape[:-1], -1)  # fp32, as the bias is


class Int8Attention(MultiHeadAttention):
    """Attention whose query, key and value are read in one go."""

    def __init__(self, attention: MultiHeadAttention, most_rows: int):
        nn.Module.__init__(self)
        self.num_heads = attention.num_heads
        parts = attention.query, attention.key, attention.value
        joint = nn.Linear(parts[0].in_features, 3 * parts[0].out_features, device=parts[0].weight.device)
        joint.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]), requires_grad=False)
        joint.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]), requires_grad=False)
        self.joint = Int8Linear(joint, most_rows)
        self.out = Int8Linear(attention.out, most_rows)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.joint(x).chunk(3, dim=-1)  # (B, T, C) each


def int8(model: TinyGPT, most_rows: int = 16) -> TinyGPT:
    """`model` with 8-bit weights in its blocks for steps of up to `most_rows` tokens; the rest is shared with `model`.
    On a GPU, which is fast enough, and for sizes that the kernel does not know, `model` itself.
    """
    config = model.config
    if next(model.parameters()).device.type != "cpu" or config.embed_dim % 16 or config.ff_hidden % 16:
        return model
    fast = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for block in fast.blocks:
        block.attention = Int8Attention(block.attention, most_rows)
        block.ff_in, block.ff_out = Int8Linear(block.ff_in, most_rows), Int8Linear(block.ff_out, most_rows)
    return fast
