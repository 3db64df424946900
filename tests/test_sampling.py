"""Each stage against transformers' processor of the same name, and the draws against the distribution."""

import math
import types

import numpy as np
import pytest
import torch

from tinygpt import Sampling, TinyGPTError, stream
from tinygpt.sampling import (
    block_repeated_ngrams,
    choices,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalise_repetition,
    scale_by_temperature,
    stages,
)
from tinygpt.tokenizer import MARKERS, Prompt

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}


def distribution(logits, seen, sampling):
    """What the next token is drawn from, over the whole vocabulary."""
    return stages(logits, seen, sampling)["min-p"].softmax(-1)


def random_logits(batch=4, vocabulary=50, scale=3.0):
    torch.manual_seed(3)
    return torch.randn(batch, vocabulary) * scale


@pytest.mark.parametrize("penalty", [1.0, 1.15, 2.0, 5.0])
def test_repetition_penalty_is_that_of_transformers(penalty):
    transformers = pytest.importorskip("transformers")
    logits = random_logits()
    seen = torch.randint(7, 50, (4, 12))
    assert len(set(seen[0].tolist())) < 12  # some are seen twice, and penalised once
    theirs = transformers.RepetitionPenaltyLogitsProcessor(penalty)(seen, logits)
    torch.testing.assert_close(penalise_repetition(logits, seen, penalty), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 5.0])
def test_temperature_is_that_of_transformers(temperature):
    transformers = pytest.importorskip("transformers")
    logits = random_logits()
    theirs = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    torch.testing.assert_close(scale_by_temperature(logits, temperature), theirs, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 40, 49, 50, 1000])
def test_top_k_is_that_of_transformers(k):
    transformers = pytest.importorskip("transformers")
    logits = random_logits()
    theirs = transformers.TopKLogitsWarper(k)(None, logits)
    torch.testing.assert_close(keep_top_k(logits, k), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_top_p_is_that_of_transformers(p, scale):
    transformers = pytest.importorskip("transformers")
    logits = random_logits(scale=scale)
    theirs = transformers.TopPLogitsWarper(p)(None, logits)
    torch.testing.assert_close(keep_top_p(logits, p), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("p", [0.0, 0.01, 0.2, 0.9, 1.0])
def test_min_p_is_that_of_transformers(p):
    transformers = pytest.importorskip("transformers")
    logits = random_logits()
    theirs = transformers.MinPLogitsWarper(p)(None, logits) if p else logits
    torch.testing.assert_close(keep_min_p(logits, p), theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 30])
def test_no_repeated_ngrams_is_that_of_transformers(size):
    transformers = pytest.importorskip("transformers")
    logits = random_logits(batch=20)
    seen = torch.randint(7, 11, (20, 25))  # four words, so that runs come back
    theirs = transformers.NoRepeatNGramLogitsProcessor(size)(seen, logits)
    assert theirs.isinf().any() == (size < 30)
    torch.testing.assert_close(block_repeated_ngrams(logits, seen, size), theirs, atol=1e-5, rtol=0)
    padded = torch.cat([torch.zeros(20, 6, dtype=torch.int64), seen], dim=1)
    torch.testing.assert_close(block_repeated_ngrams(logits, padded, size), theirs, atol=1e-5, rtol=0)


def test_markers_are_no_repetition():
    logits, seen = random_logits(), torch.arange(7).repeat(4, 3)
    assert torch.equal(penalise_repetition(logits, seen, 2.0), logits)
    assert torch.equal(block_repeated_ngrams(logits, seen, 2), logits)


def test_all_stages_in_order_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    logits, seen = random_logits(), torch.randint(7, 50, (4, 12))
    theirs = transformers.LogitsProcessorList([
        transformers.RepetitionPenaltyLogitsProcessor(1.3), transformers.NoRepeatNGramLogitsProcessor(2),
        transformers.TemperatureLogitsWarper(0.7), transformers.TopKLogitsWarper(10),
        transformers.TopPLogitsWarper(0.8), transformers.MinPLogitsWarper(0.1)])(seen, logits).softmax(-1)
    ours = distribution(logits, seen, Sampling(temperature=0.7, top_k=10, top_p=0.8, repetition_penalty=1.3,
                                               min_p=0.1, no_repeat_ngram_size=2))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("settings", [{}, {"top_k": 0}, {"top_k": 0, "top_p": 0.999, "min_p": 0.01},
                                      {"temperature": 0.0}, {"no_repeat_ngram_size": 2, "top_k": 3}])
def test_the_short_way_gives_what_the_stages_give(settings):
    """Over a vocabulary large enough that the nucleus is searched in parts."""
    logits, seen = random_logits(vocabulary=3_000, scale=1.0), torch.randint(7, 50, (4, 12))
    sampling = Sampling(**settings)
    tokens, probabilities = choices(logits, seen, sampling)
    spread = torch.zeros_like(logits).scatter(-1, tokens, probabilities)
    torch.testing.assert_close(spread, distribution(logits, seen, sampling), atol=1e-6, rtol=1e-5)


def test_the_nucleus_of_a_flat_distribution_is_found_in_parts():
    transformers = pytest.importorskip("transformers")
    logits = random_logits(vocabulary=3_000, scale=0.1)
    torch.testing.assert_close(keep_top_p(logits, 0.97), transformers.TopPLogitsWarper(0.97)(None, logits))

@pytest.mark.parametrize(("p", "kept"), [(0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.91, 4)])
def test_the_nucleus_is_the_smallest_set_that_reaches_p(p, kept):
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    likeliest_first = [1, 3, 2, 0]
    assert keep_top_p(logits, p)[0].isfinite().nonzero().flatten().tolist() == sorted(likeliest_first[:kept])


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-40, 5e-324])
def test_temperature_zero_is_the_likeliest_token(temperature):
    logits, seen = random_logits(), torch.zeros(4, 1, dtype=torch.long)
    probabilities = distribution(logits, seen, Sampling(**{**NEUTRAL, "temperature": temperature}))
    expected = torch.nn.functional.one_hot(logits.argmax(-1), 50).float()
    torch.testing.assert_close(probabilities, expected, atol=0, rtol=0)


def test_neutral_values_do_nothing():
    logits, seen = random_logits(), torch.randint(7, 50, (4, 12))
    torch.testing.assert_close(distribution(logits, seen, Sampling(**NEUTRAL)), logits.softmax(-1), atol=0, rtol=0)


def test_stages_leave_their_input_alone():
    logits, seen = random_logits(), torch.randint(7, 50, (4, 12))
    before = logits.clone()
    distribution(logits, seen, Sampling(temperature=0.5, top_k=5, top_p=0.5, repetition_penalty=2.0))
    assert torch.equal(logits, before)


def test_tokens_that_are_cut_stay_cut():
    logits, seen = random_logits(), torch.arange(50).repeat(4, 1)
    logits[:, :45] = -math.inf
    probabilities = distribution(logits, seen, Sampling())
    assert not probabilities[:, :45].any()
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(4))


def test_rows_of_a_batch_do_not_touch_each_other():
    logits, seen = random_logits(), torch.randint(7, 50, (4, 12))
    together = distribution(logits, seen, Sampling())
    alone = [distribution(logits[n:n + 1], seen[n:n + 1], Sampling()) for n in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-7, rtol=0)


@pytest.mark.parametrize(("name", "allowed", "values"), [
    ("temperature", "a number from 0 to 5", [-0.1, 5.1, math.inf]),
    ("top_k", "a whole number of 0 or more", [-1, 2.5, 40.0, math.inf, -math.inf]),
    ("top_p", "a number above 0, up to 1", [0, 0.0, -0.5, 1.01, math.inf]),
    ("repetition_penalty", "a number from 1 to 5", [0.99, 5.01, -1, math.inf]),
    ("min_p", "a number from 0 to 1", [-0.01, 1.01, math.inf]),
    ("no_repeat_ngram_size", "a whole number of 0 or more", [-1, 2.5, math.inf]),
    ("num_candidates", "a whole number from 1 to 16", [0, 17, 2.0]),
    ("max_new_tokens", "a whole number of at least 1", [0, -3, 1.5, 60.0, math.inf]),
    ("seed", "a whole number from -1 to 2^63 - 1", [-2, 2**63, 0.5, 1.0, math.inf])])
def test_values_out_of_range_are_refused_in_one_sentence(name, allowed, values):
    for value in [*values, math.nan, True, False, "1", None, [1], torch.tensor(1)]:
        with pytest.raises(TinyGPTError) as error:
            Sampling(**{name: value})
        assert str(error.value) == f"{name} is {value!r}; give {allowed}."


@pytest.mark.parametrize("settings", [
    {"temperature": 0}, {"temperature": 5}, {"top_k": 0}, {"top_k": 10**9}, {"top_p": 1}, {"top_p": 1e-9},
    {"repetition_penalty": 1}, {"repetition_penalty": 5}, {"min_p": 0}, {"min_p": 1}, {"no_repeat_ngram_size": 3},
    {"no_repeat_ngram_size": 10**9}, {"seed": -1}, {"seed": 2**63 - 1}])
def test_values_at_the_ends_of_their_ranges_can_be_drawn_with(settings):
    logits = random_logits(1)[0]
    logits[:len(MARKERS)] = -math.inf  # the reply does not end early
    assert len(drawn(Sampling(max_new_tokens=5, **settings), logits)) == 5


def drawn(sampling, logits):
    """Tokens that a model draws if it gives the same logits at each step."""
    size = types.SimpleNamespace(seq_len=2_000, num_layers=1, num_heads=1, embed_dim=1)
    model = types.SimpleNamespace(config=size, head=None, parameters=lambda: iter([torch.zeros(1)]),
                                  hidden=lambda ids, cache: torch.zeros(1, ids.size(1), 1),
                                  logits=lambda hidden: logits.clone()[None])
    tokenizer = types.SimpleNamespace(encode_prompt=lambda prompt, room: Prompt([2, 5, 7, 6]), decode=lambda ids: "")
    return [step.id for step in stream(model, tokenizer, ["Hello!"], sampling)]


def fits(counts, p):
    """Whether counts may have come from the distribution p, by chi-square: mean and four standard deviations."""
    chi_square = float(((counts - counts.sum() * p)[p > 0] ** 2 / (counts.sum() * p[p > 0])).sum())
    freedom = int((p > 0).sum()) - 1
    return freedom > 3 and not counts[p == 0].any() and chi_square < freedom + 4 * math.sqrt(2 * freedom)


def test_100_000_draws_fit_the_distribution():
    p = random_logits(1, 40, scale=1.5).softmax(-1)
    p[0, :5] = p[0, 20] = p[0, 39] = 0
    dice = torch.Generator().manual_seed(1)
    counts = np.bincount(draw(p.expand(100_000, -1), [dice] * 100_000).numpy(), minlength=40)
    assert fits(counts, (p[0] / p.sum()).double().numpy())


def test_4_000_tokens_of_replies_fit_the_distribution():
    logits = random_logits(1, 20, scale=1.0)[0]
    logits[:len(MARKERS)] = -math.inf
    p = (logits.double() / 0.7).softmax(-1).numpy()
    p[p < np.sort(p)[-8]] = 0  # top-k
    likeliest = np.argsort(-p)
    p[likeliest[int(np.searchsorted(np.cumsum(p[likeliest]) / p.sum(), 0.9)) + 1:]] = 0  # top-p
    p /= p.sum()
    settings = [Sampling(temperature=0.7, top_k=8, top_p=0.9, repetition_penalty=1, seed=seed, max_new_tokens=400)
                for seed in range(10)]
    counts = np.bincount(np.ravel([drawn(sampling, logits) for sampling in settings]), minlength=20)
    assert counts.sum() == 4_000 and fits(counts, p)
