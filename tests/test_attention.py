"""What heads do, on a model whose heads are built to do it."""

import math

import numpy as np
import pytest
import torch

from tinygpt import Config, TinyGPT, TinyGPTError
from tinygpt.attention import (
    attention_maps,
    for_bertviz,
    head_importance,
    head_scores,
    induction_on_text,
    induction_scores,
    inspect,
    kinds,
    logit_lens,
    next_log_probs,
    rollout,
    without,
)
from tinygpt.tokenizer import BOS, BOT, PAD, SEP, USER

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


@torch.no_grad()
def model_with_an_induction_head():
    """Head 1 of layer 0 writes the token before each position beside it; head 2 of layer 1 looks for the positions
    that have the present token there. Positions, tokens and tokens before are +-1 codes in thirds of the width.
    """
    torch.manual_seed(2)
    model = TinyGPT(Config(vocab_size=200, seq_len=48, embed_dim=144, num_heads=3, num_layers=2, ff_hidden=32,
                           head="tied")).eval()
    here, token, before = slice(0, 48), slice(48, 96), slice(96, 144)
    model.token_embedding.weight.zero_()
    model.token_embedding.weight[:, token] = torch.randint(0, 2, (200, 48)).float() * 2 - 1
    model.position_embedding.weight.zero_()
    model.position_embedding.weight[:, here] = 10 * torch.eye(48)
    first, second = (block.attention for block in model.blocks)
    for layer in (first.query, first.key, first.value, first.out, second.query, second.key):
        layer.weight.zero_()
    first.key.weight[48:96, here] = 3 * torch.eye(48)  # head 1's rows
    first.query.weight[48:96, here] = 3 * torch.eye(48).roll(-1, 0)
    first.value.weight[48:96, token] = torch.eye(48)
    first.out.weight[before, 48:96] = torch.eye(48)
    second.query.weight[96:144, token] = 3 * torch.eye(48)
    second.key.weight[96:144, before] = 3 * torch.eye(48)
    return model


@torch.no_grad()
def told_without(model, seen, *heads):
    return without(model, seen, *heads)(seen.ids[None])[0].log_softmax(-1)


def test_maps_are_softmax_of_queries_and_keys_by_hand():
    model, tokens = random_model(), ids(1)
    with torch.no_grad():
        x = model.token_embedding(tokens) + model.position_embedding(torch.arange(40))
        normed = model.blocks[0].attention_norm(x)
        attention = model.blocks[0].attention
        query, key = (layer(normed).view(1, 40, 2, 48).transpose(1, 2) for layer in (attention.query, attention.key))
        scores = (query @ key.mT / math.sqrt(48)).masked_fill(torch.ones(40, 40).triu(1).bool(), -math.inf)
    maps = attention_maps(model, tokens[0])
    assert maps.shape == (2, 2, 40, 40)
    torch.testing.assert_close(maps[:1], scores.softmax(-1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(inspect(model, tokens[0]).attention, maps)


def test_everything_inspected_is_what_transformers_gpt2_does():
    transformers = pytest.importorskip("transformers")
    model, tokens = random_model(), ids(1)[0]
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=200, n_positions=48, n_embd=96, n_layer=2, n_head=2, n_inner=32, activation_function="gelu",
        attn_implementation="eager")).eval()
    body = theirs.transformer
    with torch.no_grad():
        for parameter in model.parameters():  # else every bias is 0
            parameter.add_(torch.randn_like(parameter) / 20)
        body.wte.weight.copy_(model.token_embedding.weight)
        body.wpe.weight.copy_(model.position_embedding.weight)
        body.ln_f.load_state_dict(model.final_norm.state_dict())
        for block, their in zip(model.blocks, body.h, strict=True):
            own = block.attention
            their.ln_1.load_state_dict(block.attention_norm.state_dict())
            their.ln_2.load_state_dict(block.ff_norm.state_dict())
            their.attn.c_attn.weight.copy_(torch.cat([m.weight for m in (own.query, own.key, own.value)]).T)
            their.attn.c_attn.bias.copy_(torch.cat([m.bias for m in (own.query, own.key, own.value)]))
            for layer, conv in ((own.out, their.attn.c_proj), (block.ff_in, their.mlp.c_fc),
                                (block.ff_out, their.mlp.c_proj)):
                conv.weight.copy_(layer.weight.T)
                conv.bias.copy_(layer.bias)
        given = theirs(tokens[None], output_attentions=True, output_hidden_states=True)
        seen = inspect(model, tokens)
        torch.testing.assert_close(seen.attention, torch.cat(given.attentions), atol=1e-5, rtol=0)
        torch.testing.assert_close(seen.residual[:2], torch.cat(given.hidden_states[:2]), atol=1e-5, rtol=0)
        torch.testing.assert_close(seen.log_probs, given.logits[0].log_softmax(-1), atol=1e-5, rtol=0)
        middle = theirs.lm_head(body.ln_f(given.hidden_states[1][0])).softmax(-1)
        lens, odds = logit_lens(model, seen.residual, top=3)
        torch.testing.assert_close(odds[1], middle.topk(3).values, atol=1e-5, rtol=0)
        assert torch.equal(lens[1], middle.topk(3).indices)
        torch.testing.assert_close(odds[2, :, 0], seen.log_probs.exp().amax(-1), atol=1e-5, rtol=0)
        body.h[1].attn.c_proj.weight[48:].zero_()  # all that head 1 of layer 1 has a say in
        ablated = theirs(tokens[None]).logits[0].log_softmax(-1)
        torch.testing.assert_close(told_without(model, seen, [(1, 1)]), ablated, atol=1e-5, rtol=0)


def test_a_head_that_looks_one_back_is_found_and_no_other():
    scores = head_scores(model_with_a_previous_token_head(), ids())["previous_token"]
    assert scores[0, 1] > 0.9 and scores.flatten().topk(2).values[1] < 0.3
    assert head_scores(random_model(), ids())["previous_token"].max() < 0.2


def test_an_induction_head_is_found_and_no_other():
    model = model_with_an_induction_head()
    scores = head_scores(model, ids())
    assert scores["induction"][1, 2] > 0.8 and scores["induction"].flatten().topk(2).values[1] < 0.3
    assert scores["previous_token"][0, 1] > 0.9
    labels = kinds(scores)
    assert labels[1][2][0] == "induction" and labels[1][2][1] == pytest.approx(float(scores["induction"][1, 2]))
    assert labels[0][1][0] == "previous token" and labels[0][0][0] == "diffuse"
    assert induction_scores(random_model()).max() < 0.2
    said = torch.tensor([BOS, *range(20, 30), *range(20, 30)])
    on_text = induction_on_text(attention_maps(model, said), said)
    assert on_text[1, 2] > 0.8 and on_text.flatten().topk(2).values[1] < 0.3
    assert induction_on_text(attention_maps(model, said[:11]), said[:11]).isnan().all()


def test_scores_are_means_over_the_queries_that_are_no_padding():
    model, tokens = random_model(), ids()
    tokens[1, 25:] = PAD
    tokens[0, 7] = tokens[2, 9] = SEP
    scores = head_scores(model, tokens)
    maps = [attention_maps(model, row) for row in tokens]
    queries = [(row, t) for row, length in ((0, 40), (1, 25), (2, 40)) for t in range(1, length)]
    marked = [{t for t, id in enumerate(row) if id in (SEP, USER, BOT)} for row in tokens.tolist()]
    for layer, head in ((0, 0), (1, 1)):
        expected = {name: 0 for name in ("entropy", "diffuse", "distance", "previous_token", "first_token",
                                         "separator")}
        for row, t in queries:
            weights = maps[row][layer, head, t].tolist()
            entropy = -sum(w * math.log(w) for w in weights if w > 0)
            for name, value in (
                    ("entropy", entropy), ("diffuse", entropy / math.log(t + 1)), ("previous_token", weights[t - 1]),
                    ("distance", sum(w * (t - key) for key, w in enumerate(weights))), ("first_token", weights[0]),
                    ("separator", sum(weights[key] for key in marked[row]))):
                expected[name] += value / len(queries)
        assert {name: float(scores[name][layer, head]) for name in expected} == pytest.approx(expected, rel=1e-3)


def test_rollout_follows_the_tokens_through_the_layers():
    maps = attention_maps(random_model(), ids(1, 12)[0]).numpy()
    reached = np.eye(12)
    for layer, told in zip(maps, rollout(torch.from_numpy(maps)).numpy(), strict=True):
        reached = (0.5 * layer.mean(0) + 0.5 * np.eye(12)) @ reached
        np.testing.assert_allclose(told, reached, atol=1e-6)
    np.testing.assert_allclose(reached.sum(-1), 1, atol=1e-5)


def test_removing_heads_by_their_mean_and_all_in_turn():
    model = model_with_an_induction_head()
    seen = inspect(model, ids(1)[0])
    with torch.no_grad():
        out = model.blocks[1].attention.out
        whole, constant = out.weight.clone(), out.bias.clone()
        out.bias += out.weight[:, 96:] @ seen.heads[1, 2].mean(0)
        out.weight[:, 96:].zero_()
        expected = model(seen.ids[None])[0].log_softmax(-1)
        out.weight.copy_(whole)
        out.bias.copy_(constant)
    torch.testing.assert_close(told_without(model, seen, [(1, 2)], "mean"), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(told_without(model, seen, []), seen.log_probs, atol=1e-5, rtol=0)
    torch.testing.assert_close(next_log_probs(model, seen.ids), seen.log_probs[-1], atol=1e-5, rtol=1e-5)
    for position in (-1, 10):
        importance = head_importance(model, seen, position)
        for head in ((0, 0), (0, 1), (1, 2)):
            after = told_without(model, seen, [head])[position]
            kl = torch.nn.functional.kl_div(after, seen.log_probs[position], reduction="sum", log_target=True)
            assert float(importance[head]) == pytest.approx(float(kl), abs=1e-5)
    for head in ((2, 0), (0, 3), (-1, 0)):
        with pytest.raises(TinyGPTError, match=f"no head {head[1]} in layer {head[0]}"):
            without(model, seen, [head])
    with pytest.raises(TinyGPTError, match="nothing to look at"):
        inspect(model, [])


def test_bertviz_gets_a_layer_at_a_time():
    seen = inspect(random_model(), ids(1)[0])
    given = for_bertviz(seen)
    assert [layer.shape for layer in given] == [(1, 2, 40, 40)] * 2
    assert torch.equal(given[1][0], seen.attention[1])


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
