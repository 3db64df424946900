"""The model against transformers' GPT-2, against formulas, and against itself with and without a cache."""

import math

import pytest
import torch
from torch.nn import functional as F

from tinygpt import Config, TinyGPT, TinyGPTError
from tinygpt.model import Cache, Recorder, choose_device, count_parameters

HEADS = pytest.mark.parametrize("head", ["adaptive", "tied"])


def tiny(head="tied", **sizes):
    """An untrained model whose every parameter, biases and norms too, is far from its usual start."""
    torch.manual_seed(1)
    sizes = {"vocab_size": 90, "seq_len": 24, "embed_dim": 32, "num_heads": 4, "num_layers": 3, "ff_hidden": 48,
             **sizes}
    model = TinyGPT(Config(head=head, dropout=0.0, device="cpu", **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm.weight" in name else 0.0, std=0.2)
    return model


def random_ids(model, batch=3, length=None):
    torch.manual_seed(2)
    return torch.randint(model.config.vocab_size, (batch, length or model.config.seq_len))


def as_gpt2(model):
    """Hugging Face's GPT-2 with the same weights; its Conv1D layers hold them transposed."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    gpt2 = transformers.GPT2LMHeadModel._from_config(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.seq_len, n_embd=c.embed_dim, n_layer=c.num_layers, n_head=c.num_heads,
        n_inner=c.ff_hidden, activation_function="gelu", layer_norm_epsilon=1e-5, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0), attn_implementation="eager").eval()
    weights = {"wte.weight": model.token_embedding.weight, "wpe.weight": model.position_embedding.weight,
               "ln_f.weight": model.final_norm.weight, "ln_f.bias": model.final_norm.bias}
    for n, block in enumerate(model.blocks):
        qkv = (block.attention.query, block.attention.key, block.attention.value)
        for name, layers in {"attn.c_attn": qkv, "attn.c_proj": [block.attention.out], "mlp.c_fc": [block.ff_in],
                             "mlp.c_proj": [block.ff_out]}.items():
            weights[f"h.{n}.{name}.weight"] = torch.cat([layer.weight.T for layer in layers], dim=1)
            weights[f"h.{n}.{name}.bias"] = torch.cat([layer.bias for layer in layers])
        for name, norm in (("ln_1", block.attention_norm), ("ln_2", block.ff_norm)):
            weights[f"h.{n}.{name}.weight"], weights[f"h.{n}.{name}.bias"] = norm.weight, norm.bias
    gpt2.transformer.load_state_dict(weights)
    gpt2.tie_weights()
    return gpt2


def adaptive_by_hand(model, hidden):
    """Grave et al. 2017: the shortlist and the clusters share one softmax, each cluster has one of its own."""
    head = model.head
    top = (hidden @ head.head.weight.T).softmax(-1)
    parts = [top[..., :head.shortlist_size]]
    for n, (down, out) in enumerate(head.tail):
        cluster = (hidden @ down.weight.T @ out.weight.T).softmax(-1)
        parts.append(top[..., head.shortlist_size + n, None] * cluster)
    return torch.cat(parts, -1)


@torch.no_grad()
def test_logits_are_those_of_gpt2():
    model = tiny()
    ids = random_ids(model)
    logits = model(ids)
    assert logits.std() > 0.5
    torch.testing.assert_close(logits, as_gpt2(model)(ids).logits, atol=1e-4, rtol=0)


@HEADS
@pytest.mark.parametrize("chunk", [1, 2, 5, 23, 24])
@torch.no_grad()
def test_decoding_with_a_cache_changes_nothing(head, chunk):
    model = tiny(head)
    ids = random_ids(model)
    cache = Cache(model.config, batch_size=3, device=ids.device)
    logits = torch.cat([model(part, cache=cache) for part in ids.split(chunk, dim=1)], dim=1)
    assert cache.lengths.tolist() == [24] * 3
    torch.testing.assert_close(logits, model(ids), atol=1e-5, rtol=0)


@HEADS
@torch.no_grad()
def test_rows_of_different_lengths_share_a_cache(head):
    model = tiny(head)
    ids, starts = random_ids(model), (3, 17, 9)
    cache = Cache(model.config, batch_size=4, device=ids.device)
    for row, start in enumerate(starts):
        model(ids[row:row + 1, :start], cache=cache.rows(row, row + 1))
    cache.copy_row(1, 3)
    batch, expected = torch.cat([ids, ids[1:2]]), model(torch.cat([ids, ids[1:2]]))
    for step in range(5):
        now = torch.tensor([start + step for start in (*starts, starts[1])])
        logits = model(batch.gather(1, now[:, None]), cache=cache)[:, 0]
        torch.testing.assert_close(logits, expected[torch.arange(4), now], atol=1e-5, rtol=0)
    assert cache.lengths.tolist() == [8, 22, 14, 22]


@HEADS
@torch.no_grad()
def test_watching_the_model_changes_nothing(head):
    model, recorder = tiny(head), Recorder()
    ids = random_ids(model)
    torch.testing.assert_close(model(ids, recorder=recorder), model(ids), atol=1e-5, rtol=0)
    assert [a.shape for a in recorder.attention] == [(3, 4, 24, 24)] * 3
    assert [r.shape for r in recorder.residual] == [(3, 24, 32)] * 4
    for attention in recorder.attention:
        torch.testing.assert_close(attention.sum(-1), torch.ones(3, 4, 24))
        assert not attention.triu(1).any()
    embedded = model.token_embedding.weight[ids] + model.position_embedding.weight[:24]
    torch.testing.assert_close(recorder.residual[0], embedded)
    last = model.final_norm(recorder.residual[-1])
    torch.testing.assert_close(model.logits(last), model(ids), atol=1e-5, rtol=0)


@torch.no_grad()
def test_recorded_attention_and_residuals_are_those_of_gpt2():
    model, recorder = tiny(), Recorder()
    ids = random_ids(model)
    model(ids, recorder=recorder)
    theirs = as_gpt2(model)(ids, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(torch.stack(recorder.attention), torch.stack(theirs.attentions), atol=1e-5, rtol=0)
    residual = torch.stack(recorder.residual[:-1])  # GPT-2 gives the last one normed
    torch.testing.assert_close(residual, torch.stack(theirs.hidden_states[:-1]), atol=1e-4, rtol=0)


@torch.no_grad()
def test_recording_with_a_cache_sees_the_earlier_tokens():
    model, whole, late = tiny(), Recorder(), Recorder()
    ids = random_ids(model)
    model(ids, recorder=whole)
    cache = Cache(model.config, batch_size=3, device=ids.device)
    model(ids[:, :20], cache=cache)
    model(ids[:, 20:], cache=cache, recorder=late)
    for all_rows, last_rows in zip(whole.attention, late.attention, strict=True):
        torch.testing.assert_close(last_rows, all_rows[:, :, 20:], atol=1e-5, rtol=0)


@HEADS
@torch.no_grad()
def test_a_token_changes_nothing_before_itself(head):
    model = tiny(head)
    ids = random_ids(model)
    other = ids.clone()
    other[:, 10] = (other[:, 10] + 1) % 90
    before, after = model(ids), model(other)
    torch.testing.assert_close(before[:, :10], after[:, :10], atol=1e-6, rtol=0)
    assert ((before - after)[:, 10:].abs().amax(-1) > 1e-3).all()


@torch.no_grad()
def test_head_mask_of_ones_is_no_mask():
    model = tiny()
    ids = random_ids(model)
    assert torch.equal(model(ids, head_mask=torch.ones(3, 4)), model(ids))


@pytest.mark.parametrize("recorded", [False, True])
@torch.no_grad()
def test_a_masked_head_is_one_without_output_weights(recorded):
    model = tiny()
    ids = random_ids(model)
    mask = torch.ones(3, 4)
    mask[1, 2] = 0
    whole, masked = model(ids), model(ids, head_mask=mask, recorder=Recorder() if recorded else None)
    model.blocks[1].attention.out.weight[:, 2 * 8:3 * 8] = 0
    torch.testing.assert_close(masked, model(ids), atol=1e-5, rtol=0)
    assert (masked - whole).abs().max() > 1e-2


@pytest.mark.parametrize("vocab_size", [90, 2_500, 9_000])  # two, two and three parts
@torch.no_grad()
def test_adaptive_head_is_the_softmax_of_its_paper(vocab_size):
    model = tiny("adaptive", vocab_size=vocab_size)
    ids = random_ids(model, batch=2)
    probabilities = model(ids).exp()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 24), atol=1e-4, rtol=0)
    torch.testing.assert_close(probabilities, adaptive_by_hand(model, model.hidden(ids)), atol=1e-6, rtol=1e-3)


@HEADS
@torch.no_grad()
def test_losses_are_the_nats_of_the_targets(head):
    model = tiny(head)
    ids = random_ids(model)
    targets = random_ids(model).roll(-1, 1)
    expected = -model(ids).double().softmax(-1).gather(-1, targets[..., None])[..., 0].log()
    torch.testing.assert_close(model(ids, targets).double(), expected, atol=1e-4, rtol=0)


@HEADS
def test_targets_of_minus_100_are_not_learned(head):
    model = tiny(head)
    ids = random_ids(model)
    targets = ids.roll(-1, 1)
    targets[:, 7:] = -100
    losses = model(ids, targets)
    assert (losses[:, :7] > 0).all() and not losses[:, 7:].any()
    losses.sum().backward()
    assert not model.position_embedding.weight.grad[7:].any()  # nothing after the last target had a say
    assert model.position_embedding.weight.grad[:7].abs().sum(-1).all()
    gradient = model.blocks[0].ff_in.weight.grad.clone()
    model.zero_grad()
    model(ids[:, :7], targets[:, :7]).sum().backward()
    torch.testing.assert_close(gradient, model.blocks[0].ff_in.weight.grad, atol=1e-5, rtol=1e-4)


@HEADS
def test_nothing_to_learn_is_no_loss(head):
    model = tiny(head)
    ids = random_ids(model)
    losses = model(ids, torch.full_like(ids, -100))
    assert losses.shape == ids.shape and not losses.any()
    losses.sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_parameters_of_the_reference_model():
    model = TinyGPT(Config())
    counted = count_parameters(model)
    total = counted.pop("total")
    assert total == sum(counted.values()) == sum(p.numel() for p in model.parameters()) == 28_500_480
    assert counted["token embedding"] == 32_000 * 384
    assert counted["attention"] == 8 * 4 * (384 * 384 + 384)
    assert counted["feed-forward"] == 8 * (2 * 384 * 1536 + 1536 + 384)


def test_a_tied_head_costs_no_parameters():
    model = tiny("tied")
    assert count_parameters(model)["output head"] == 0
    assert count_parameters(model)["total"] == sum(p.numel() for p in model.parameters())


@HEADS
def test_too_many_tokens_are_refused_in_one_sentence(head):
    model = tiny(head)
    with pytest.raises(TinyGPTError, match=r"25 tokens do not fit a model of seq_len 24"):
        model(torch.zeros(1, 25, dtype=torch.long))
    cache = Cache(model.config, batch_size=1, device=torch.device("cpu"))
    model(torch.zeros(1, 24, dtype=torch.long), cache=cache)
    with pytest.raises(TinyGPTError, match="25 tokens"):
        model(torch.zeros(1, 1, dtype=torch.long), cache=cache)


def test_a_new_model_knows_nothing():
    torch.manual_seed(0)
    model = TinyGPT(Config(vocab_size=3_000, seq_len=32, embed_dim=64, num_heads=4, num_layers=2, head="tied"))
    ids = random_ids(model, batch=8)
    assert model(ids, ids.roll(-1, 1)).mean().item() == pytest.approx(math.log(3_000), abs=0.1)


def test_dropout_only_acts_in_training():
    torch.manual_seed(0)
    model = TinyGPT(Config(vocab_size=90, seq_len=16, embed_dim=32, num_heads=4, num_layers=2, dropout=0.5))
    ids = random_ids(model)
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


@HEADS
def test_the_output_head_stays_in_fp32_under_autocast(head):
    model = tiny(head)
    ids = random_ids(model)
    with torch.autocast("cpu", torch.bfloat16):
        inner = model.blocks[0].ff_in(torch.zeros(1, 32))
        logits = model(ids)
        loss = model(ids, ids.roll(-1, 1)).mean()
        hidden = torch.randn(5, 32)
        exact = model.logits(hidden)
    assert (inner.dtype, logits.dtype, loss.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert torch.equal(exact, model.logits(hidden))  # not rounded to 16 bits on the way
    full = F.log_softmax(model(ids), -1)
    assert 0 < (F.log_softmax(logits, -1) - full).abs().mean() < 0.1  # the blocks were
    loss.backward()


@torch.no_grad()
def test_a_cache_works_under_autocast():
    model = tiny()
    ids = random_ids(model)
    cache = Cache(model.config, batch_size=3, device=ids.device)
    with torch.autocast("cpu", torch.bfloat16):
        cached = torch.cat([model(part, cache=cache) for part in ids.split(7, dim=1)], dim=1)
    assert (cached.softmax(-1) - model(ids).softmax(-1)).abs().mean() < 0.01


def test_devices_that_are_not_there_are_named():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("banana", "cuda:x", ""):
        with pytest.raises(TinyGPTError, match="give auto, cpu, cuda, cuda:0 or mps"):
            choose_device(name)
    with pytest.raises(TinyGPTError, match=r"device cuda:99 is not there; this machine has cpu.* Use auto\."):
        choose_device("cuda:99")
