"""8-bit weights for replies on a CPU.

A step of a few chats takes as long as reading the weights from memory, so a quarter of the bytes is a fraction of the
time. Each row of a matrix is rounded to 255 steps of its own size (as in Dettmers et al. 2022, section 2,
https://arxiv.org/abs/2208.07339, for weights alone); what flows between the matrices stays as it was.
"""

import copy

import torch
from torch import Tensor, nn

from tinygpt.model import TinyGPT


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


def int8(model: TinyGPT, most_rows: int = 16) -> TinyGPT:
    """`model` with 8-bit weights in its blocks for steps of up to `most_rows` tokens; the rest is shared with `model`.
    On a GPU, which is fast enough, `model` itself.
    """
    if next(model.parameters()).device.type != "cpu":
        return model
    fast = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for block in fast.blocks:
        for holder in (block, block.attention):
            for name, layer in list(holder.named_children()):
                if isinstance(layer, nn.Linear) and layer.in_features % 16 == 0:  # the kernel knows no others
                    setattr(holder, name, Int8Linear(layer, most_rows))
    return fast
