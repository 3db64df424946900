"""What a model is worth: python -m tinygpt.evaluate CHECKPOINT --data FOLDER ...

Text: how well the model predicts what people said, over a whole split, each turn given all earlier ones that fit in
the window. Replies: what it answers to every context, beside a reply that never changes and the reply that stands
under the most similar context of the training split.
"""

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from tinygpt import quantize
from tinygpt.checkpoint import load_checkpoint, write_atomically
from tinygpt.config import TinyGPTError, run_command
from tinygpt.data import Corpus, Dialogue, clean_text, leaks, load_corpora
from tinygpt.generate import generate_many
from tinygpt.model import IGNORE, TinyGPT
from tinygpt.sampling import Sampling
from tinygpt.tokenizer import BOS, BOT, PAD, Tokenizer

CONSTANT_REPLY = "I don't know."

# ------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True)
class TextScore:
    """Sums over a whole split: every rate follows from them, whatever the batches were."""

    nats: float  # of every token said, and of the marker that ends each turn
    tokens: int
    bytes: int  # of the text, UTF-8; the markers have none
    words: int  # between white space

    @property
    def rates(self) -> dict[str, float]:
        return {"nats_per_token": self.nats / self.tokens, "bits_per_byte": self.nats / math.log(2) / self.bytes,
                "perplexity_per_piece": math.exp(self.nats / self.tokens),
                "perplexity_per_word": math.exp(self.nats / self.words), "tokens": self.tokens}


def windows(dialogue: Dialogue, tokenizer: Tokenizer, seq_len: int) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """The dialogue as `(ids, turn, scored)` windows of at most seq_len + 1 tokens, `turn` numbering the turn of each
    token; each turn is `scored` in exactly one, the one that shows it after all earlier turns that fit, whole. What is
    longer than a window counts as several turns of its speaker.
    """
    encoded = [[turn[0], *turn[start:start + seq_len - 1]] for turn in tokenizer.encode_turns(dialogue)
               for start in range(1, len(turn), seq_len - 1)]
    first = next_turn = 0
    while next_turn < len(encoded):
        while first < next_turn and 1 + sum(map(len, encoded[first:next_turn + 1])) > seq_len + 1:
            first += 1
        end = next_turn + 1
        while end < len(encoded) and 1 + sum(map(len, encoded[first:end + 1])) <= seq_len + 1:
            end += 1
        numbered = [(i, number) for number in range(first, end) for i in encoded[number]]
        yield ([BOS, *(i for i, _ in numbered)], [-1, *(number for _, number in numbered)],
               list(range(next_turn, end)))
        next_turn = end


@torch.inference_mode()
def score_text(model: TinyGPT, tokenizer: Tokenizer, dialogues: Sequence[Dialogue], batch_size: int = 32,
               replies_only: bool = False) -> TextScore:
    """How well `model` predicts `dialogues` (cleaned ones): all turns, or only the second speaker's."""
    device = next(model.parameters()).device
    rows = []
    for dialogue in dialogues:
        for ids, turns, scored in windows(dialogue, tokenizer, model.config.seq_len):
            starts = [n == 0 or turns[n] != turns[n - 1] for n in range(len(ids))]  # User: and Bot: are given
            speakers = {turn: i for turn, i, start in zip(turns, ids, starts, strict=True) if start}
            wanted = {number for number in scored if not replies_only or speakers[number] == BOT}
            targets = [i if turn in wanted and not start else IGNORE
                       for i, turn, start in zip(ids, turns, starts, strict=True)]
            if wanted:
                rows.append((ids[:-1], targets[1:]))
    rows.sort(key=lambda row: len(row[0]))  # neighbours of one length, little padding
    nats, tokens = 0.0, 0
    for start in tqdm(range(0, len(rows), batch_size), "scoring text", leave=False, delay=2):
        batch = rows[start:start + batch_size]
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _ in batch], device=device)
        targets = torch.tensor([row + [IGNORE] * (width - len(row)) for _, row in batch], device=device)
        nats += model(ids, targets).sum(dim=1).cpu().double().sum().item()
        tokens += int((targets != IGNORE).sum())
    texts = [turn for dialogue in dialogues for n, turn in enumerate(dialogue) if not replies_only or n % 2]
    return TextScore(nats, tokens, sum(len(text.encode()) for text in texts), sum(len(text.split()) for text in texts))


# ------------------------------------------------------------------------------------------------- replies


def words(text: str) -> list[str]:
    """Words and punctuation marks, lower-cased: nltk's WordPunctTokenizer, which needs no download."""
    from nltk.tokenize import wordpunct_tokenize

    return wordpunct_tokenize(text.lower())


def score_replies(replies: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU-1 to 4 (Papineni et al. 2002) against one reference each, in percent, smoothed by nltk's method 1;
    distinct-1 and 2 (Li et al. 2016, https://arxiv.org/abs/1510.03055); words a reply; and the share of replies that
    say a run of three words twice.
    """
    from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu

    said, wanted = [words(reply) for reply in replies], [[words(reference)] for reference in references]
    scores = {f"bleu_{n}": 100 * corpus_bleu(wanted, said, weights=[1 / n] * n,
                                             smoothing_function=SmoothingFunction().method1) for n in range(1, 5)}
    for n in (1, 2):
        ngrams = Counter(tuple(reply[i:i + n]) for reply in said for i in range(len(reply) - n + 1))
        scores[f"distinct_{n}"] = len(ngrams) / max(1, ngrams.total())
    runs = [[tuple(reply[i:i + 3]) for i in range(len(reply) - 2)] for reply in said]
    repeats = sum(len(run) != len(set(run)) for run in runs)
    return {**scores, "words_per_reply": sum(map(len, said)) / max(1, len(said)),
            "repeating": repeats / max(1, len(said)), "replies": len(said)}


def contexts_and_replies(dialogues: Sequence[Dialogue]) -> list[tuple[list[str], str]]:
    """Every turn of the second speaker, with all turns before it."""
    return [(dialogue[:n], dialogue[n]) for dialogue in dialogues for n in range(1, len(dialogue), 2)]


def nearest_neighbour_replies(contexts: Sequence[list[str]], train: Sequence[Dialogue]) -> list[str]:
    """The reply under the training message most like the last message of each context (cosine of tf-idf words)."""
    pairs = [(context[-1], reply) for context, reply in contexts_and_replies(train)]
    documents = [Counter(words(message)) for message, _ in pairs]
    spread = Counter(word for document in documents for word in document)
    weight = {word: math.log(len(pairs) / count) for word, count in spread.items()}
    found_in = defaultdict(list)  # word -> the messages with it, and its share of their length
    for number, document in enumerate(documents):
        norm = math.sqrt(sum((count * weight[word]) ** 2 for word, count in document.items())) or 1.0
        for word, count in document.items():
            found_in[word].append((number, count * weight[word] / norm))
    postings = {word: (np.array([n for n, _ in where]), np.array([share for _, share in where]))
                for word, where in found_in.items()}
    replies = []
    for context in tqdm(contexts, "nearest neighbours", leave=False, delay=2):
        likeness = np.zeros(len(pairs))
        for word, count in Counter(words(context[-1])).items():
            if word in postings:
                numbers, shares = postings[word]
                likeness[numbers] += count * weight[word] * shares
        replies.append(pairs[int(likeness.argmax())][1])
    return replies


# ------------------------------------------------------------------------------------------------- the report


def parts(corpus: Corpus, split: str) -> dict[str, tuple[list[Dialogue], list[Dialogue]]]:
    """The split, "official" and, where some of it also stands in the training split, "clean" without those: name ->
    (its dialogues, the training dialogues), cleaned.
    """
    dialogues, train = (cleaned(corpus.splits.get(name, ())) for name in (split, "train"))
    if not dialogues:
        raise TinyGPTError(f"{corpus.origin} has no dialogue of two turns of text to measure on; give another --data.")
    repeated = leaks(train, dialogues)[1]
    found = {f"{corpus.name} {split}, official": (dialogues, train)}
    if 0 < len(repeated) < len(dialogues):
        clean = [dialogue for number, dialogue in enumerate(dialogues) if number not in repeated]
        found[f"{corpus.name} {split}, clean"] = clean, train
    return found


def cleaned(dialogues: Sequence[Dialogue]) -> list[Dialogue]:
    """As they would be learned: each turn cleaned, those without two turns of text left out."""
    turned = ([clean_text(turn) for turn in dialogue] for dialogue in dialogues)
    return [dialogue for dialogue in turned if len(dialogue) > 1 and all(dialogue)]


def evaluate(models: dict[str, tuple[TinyGPT, Tokenizer]], dialogues: Sequence[Dialogue], train: Sequence[Dialogue],
             sampling: Sampling, max_replies: int) -> dict[str, dict]:
    """All figures of each of `models` on `dialogues`, by its name. Replies go to every context, or to `max_replies` of
    them, evenly spread; the baselines are the same for all.
    """
    pairs = contexts_and_replies(dialogues)
    if 0 < max_replies < len(pairs):
        pairs = [pairs[n] for n in np.linspace(0, len(pairs) - 1, max_replies).round().astype(int)]
    contexts, references = [context for context, _ in pairs], [reply for _, reply in pairs]
    baselines = {"constant reply": score_replies([CONSTANT_REPLY] * len(pairs), references)}
    if train:
        baselines["nearest neighbour"] = score_replies(nearest_neighbour_replies(contexts, train), references)
    fingerprint = hashlib.sha256(json.dumps(list(dialogues)).encode()).hexdigest()
    return {name: {
        "dialogues": len(dialogues), "sha256": fingerprint,
        "text": score_text(model, tokenizer, dialogues).rates,
        "text_of_replies": score_text(model, tokenizer, dialogues, replies_only=True).rates,
        "replies": {"model": score_replies(generate_many(model, tokenizer, contexts, sampling), references),
                    **baselines}}
        for name, (model, tokenizer) in models.items()}


def report(results: dict[str, dict[str, dict]]) -> str:
    """The figures as two Markdown tables. results: part of the data -> model's name -> figures."""
    several = any(len(by_model) > 1 for by_model in results.values())
    lines = ["| text | bits/byte | nats/token | perplexity/piece | perplexity/word |", "|---|---:|---:|---:|---:|"]
    for part, by_model in results.items():
        for key, label in (("text", "all turns"), ("text_of_replies", "replies")):
            for name, figures in by_model.items():
                rates = figures[key]
                lines.append(f"| {part}, {label}{f': {name}' if several else ''} | {rates['bits_per_byte']:.3f} | "
                             f"{rates['nats_per_token']:.3f} | {rates['perplexity_per_piece']:.1f} | "
                             f"{rates['perplexity_per_word']:.1f} |")
    lines += ["", "| replies | BLEU-1 | BLEU-2 | BLEU-3 | BLEU-4 | distinct-1 | distinct-2 | words | repeating |",
              "|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for part, by_model in results.items():
        models = {name if several else "model": figures["replies"]["model"] for name, figures in by_model.items()}
        baselines = {who: scores for who, scores in next(iter(by_model.values()))["replies"].items() if who != "model"}
        for who, s in {**models, **baselines}.items():
            bleu = " | ".join(f"{s[f'bleu_{n}']:.2f}" for n in range(1, 5))
            lines.append(f"| {part}: {who} | {bleu} | {s['distinct_1']:.3f} | {s['distinct_2']:.3f} | "
                         f"{s['words_per_reply']:.1f} | {s['repeating']:.1%} |")
    return "\n".join(lines)


def command(folder: Path, /, data: list[str], split: list[Literal["test", "validation"]] = ["test"],  # noqa: B006
            compare: list[Path] = [], max_replies: int = 0, device: str = "auto",  # noqa: B006
            int8: bool = False, sampling: Sampling = Sampling(seed=0)) -> None:
    """Measure a trained TinyGPT; prints two tables and writes metrics.json into the checkpoint folder.

    Args:
        folder: Checkpoint folder, as train.py writes it.
        data: Folders with train.jsonl and the split, Hugging Face Hub sets, or single JSON-lines files.
        split: Which splits to measure on; a single file is measured whole.
        compare: Other checkpoint folders, measured on the same text and shown beside it; nothing is written there.
        max_replies: Contexts to reply to, evenly spread over the split; 0 replies to all.
        device: cpu, cuda, mps; auto takes the fastest one present.
        int8: Measure with the 8-bit weights that chats on a CPU use.
        sampling: How replies are drawn.
    """
    models = {str(path): load_checkpoint(path, device) for path in (folder, *compare)}
    if int8:
        models = {name: (quantize.int8(model), tokenizer)
                  for name, (model, tokenizer) in models.items()}
    wanted = {}
    for source, corpus in zip(data, load_corpora(data), strict=True):
        if Path(source).is_file():
            corpus = replace(corpus, splits={"whole": corpus.splits["train"]})
        for name in ["whole"] if Path(source).is_file() else split:
            if not corpus.splits.get(name):
                raise TinyGPTError(f"{corpus.origin} has no {name} split; give a folder with {name}.jsonl.")
            wanted |= parts(corpus, name)
    results = {part: evaluate(models, *dialogues, sampling, max_replies) for part, dialogues in wanted.items()}
    settings = {"sampling": asdict(sampling), "max_replies": max_replies, "int8": int8, "bleu_smoothing": "method1",
                "words": "nltk wordpunct, lower case"}
    print(report(results))
    metrics = {"settings": settings, "results": {part: by_model[str(folder)] for part, by_model in results.items()}}
    write_atomically(folder / "metrics.json", json.dumps(metrics, indent=1).encode())


def main() -> None:
    run_command(lambda: tyro.cli(command, prog="python -m tinygpt.evaluate", config=(tyro.conf.OmitArgPrefixes,)))


if __name__ == "__main__":
    main()
