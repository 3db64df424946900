"""8-bit weights say nearly what the full ones say, for any number of rows."""

import pytest
import torch

from tinygpt import Config, Sampling, TinyGPT, generate, load_checkpoint
from tinygpt.quantize import Int8Linear, int8


def test_the_layer_is_the_product_with_rounded_weights():
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 96)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        layer = Int8Linear(linear.weight, linear.bias)
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        rounded = torch.nn.functional.linear(x, (linear.weight / scale).round() * scale, linear.bias)
        assert (layer(x) - rounded).abs().max() < 0.02 < rounded.abs().max()
        assert not torch.equal(layer(x), linear(x))
        torch.testing.assert_close(layer(x)[1, 3], layer(x[1, 3][None])[0], atol=0, rtol=0)  # no row minds another


@pytest.mark.parametrize("head", ["adaptive", "tied"])
def test_a_model_loses_little_and_the_original_nothing(head):
    torch.manual_seed(0)
    model = TinyGPT(Config(vocab_size=300, embed_dim=128, num_heads=2, num_layers=3, ff_hidden=256, head=head)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(7, 300, (2, 8))
    with torch.no_grad():
        before = model(ids)
        fast = int8(model)
        odds, rounded = before.log_softmax(-1), fast(ids).log_softmax(-1)
        assert 0 < (odds.exp() * (odds - rounded)).sum(-1).mean() < 0.01  # nats
        assert torch.equal(model(ids), before)
    assert fast.token_embedding.weight is model.token_embedding.weight
    held = {t.data_ptr(): t.nbytes for t in [*fast.parameters(), *fast.buffers()]}
    assert sum(held.values()) < sum(p.nbytes for p in model.parameters())  # the full matrices are let go


def test_widths_that_the_kernel_does_not_know_are_left_alone():
    torch.manual_seed(0)
    model = TinyGPT(Config(vocab_size=300, embed_dim=42, num_heads=7, num_layers=1, ff_hidden=80)).eval()
    assert int8(model) is model


def test_it_chats(tiny_checkpoint):
    model, tokenizer = load_checkpoint(tiny_checkpoint, "cpu")
    settings = Sampling(seed=1, max_new_tokens=12)
    first, second = (generate(int8(model), tokenizer, ["Hello!"], settings) for _ in range(2))
    assert first == second != ""
