"""What heads do, on a model whose heads are built to do it."""

import math

import pytest
import torch

from tinygpt import Config, TinyGPT
from tinygpt.attention import attention_maps, head_scores, induction_scores
from tinygpt.tokenizer import PAD

CONFIG = Config(vocab_size=200, seq_len=48, embed_dim=96, num_heads=2, num_layers=2, ff_hidden=32, head="tied")


def random_model():
    torch.manual_seed(0)
    return TinyGPT(CONFIG).eval()


@torch.no_grad()
def model_with_a_previous_token_head():
    """In layer 0, head 1 looks one position back: its queries ask for the position code shifted by one, and the
    codes are orthogonal.
    """
    model = random_model()
    model.token_embedding.weight[:, :48] = 0  # positions live in the first half of the width, tokens in the second
    model.position_embedding.weight.zero_()
    model.position_embedding.weight[:, :48] = 50 * torch.eye(48)
    attention = model.blocks[0].attention
    for layer in (attention.query, attention.key):
        layer.weight[48:].zero_()  # head 1's rows
        layer.bias.zero_()
    attention.key.weight[48:, :48] = 3 * torch.eye(48)
    attention.query.weight[48:, :48] = 3 * torch.eye(48).roll(-1, 0)
    return model


def ids(rows=3, length=40):
    return torch.randint(7, 200, (rows, length), generator=torch.Generator().manual_seed(1))


def test_maps_are_softmax_of_queries_and_keys_by_hand():
    model, tokens = random_model(), ids()
    with torch.no_grad():
        x = model.token_embedding(tokens) + model.position_embedding(torch.arange(40))
        normed = model.blocks[0].attention_norm(x)
        attention = model.blocks[0].attention
        query, key = (layer(normed).view(3, 40, 2, 48).transpose(1, 2) for layer in (attention.query, attention.key))
        scores = (query @ key.mT / math.sqrt(48)).masked_fill(torch.ones(40, 40).triu(1).bool(), -math.inf)
    maps = attention_maps(model, tokens)
    assert maps.shape == (3, 2, 2, 40, 40)
    torch.testing.assert_close(maps[:, 0], scores.softmax(-1), atol=1e-6, rtol=1e-5)


def test_a_head_that_looks_one_back_is_found_and_no_other():
    scores = head_scores(model_with_a_previous_token_head(), ids())["previous_token"]
    assert scores[0, 1] > 0.9 and scores.flatten().topk(2).values[1] < 0.3
    assert head_scores(random_model(), ids())["previous_token"].max() < 0.2


def test_scores_are_means_over_the_queries_that_are_no_padding():
    model, tokens = random_model(), ids()
    tokens[1, 25:] = PAD
    scores, maps = head_scores(model, tokens), attention_maps(model, tokens)
    queries = [(row, t) for row, length in ((0, 40), (1, 25), (2, 40)) for t in range(1, length)]
    for layer, head in ((0, 0), (1, 1)):
        rows = [maps[row, layer, head, t] for row, t in queries]
        weights = [[float(w) for w in row if w > 0] for row in rows]
        assert scores["entropy"][layer, head] == pytest.approx(
            -sum(w * math.log(w) for row in weights for w in row) / len(queries), rel=1e-4)
        assert scores["previous_token"][layer, head] == pytest.approx(
            sum(float(row[t - 1]) for row, (_, t) in zip(rows, queries, strict=True)) / len(queries), rel=1e-4)
        assert scores["first_token"][layer, head] == pytest.approx(
            sum(float(row[0]) for row in rows) / len(queries), rel=1e-4)


def test_induction_is_the_weight_after_the_earlier_occurrence():
    """Every head of a model without scores attends to all earlier tokens alike: one part in as many as there are."""
    model = random_model()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.query.weight.zero_()
            block.attention.query.bias.zero_()
    length = (48 - 1) // 2
    expected = sum(1 / (t + 1) for t in range(length + 1, 2 * length + 1)) / length
    torch.testing.assert_close(induction_scores(model), torch.full((2, 2), expected))
