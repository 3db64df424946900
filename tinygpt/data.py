"""From dialogues on disk or on the Hugging Face Hub to rows of tokens that a model can learn.

load_corpus -> clean_corpora -> encode -> pack -> memory-mapped arrays. A dialogue is a list of turns, plain text,
the speakers taking turns; a split is a list of dialogues.
"""

import hashlib
import json
import logging
import os
import random
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import sentencepiece
from tqdm import tqdm

from tinygpt.config import Config, TinyGPTError
from tinygpt.tokenizer import BOS, BOT, PAD, Tokenizer, normalize

Dialogue = list[str]
SPLITS = ("train", "validation", "test")

# Copies of the two sets on the Hub, tried in this order: (id, revision). The classic `daily_dialog` is a loading
# script, which `datasets` 4 and later refuse.
HUB = {
    "dailydialog": [("OpenRL/daily_dialog", None), ("li2017dailydialog/daily_dialog", "refs/convert/parquet"),
                    ("roskoN/dailydialog", "refs/convert/parquet"), ("DeepPavlov/daily_dialog", None),
                    ("pixelsandpointers/better_daily_dialog", None)],
    "prosocial_dialog": [("allenai/prosocial-dialog", None)],
}
UTTERANCES = {  # the official sizes (for ProsocialDialog: an exchange has two utterances)
    "dailydialog": {"train": 87_170, "validation": 8_069, "test": 7_740},
    "prosocial_dialog": {"train": 240_472, "validation": 40_832, "test": 50_058},
}


@dataclass(frozen=True)
class Corpus:
    """One data set: its dialogues by split, and where they came from."""

    name: str
    splits: dict[str, list[Dialogue]]
    origin: str


@dataclass(frozen=True)
class Rows:
    """Packed rows of seq_len + 1 tokens, memory-mapped: `ids` uint16 or uint32, `learned` bool, both (N, seq_len + 1).

    The model reads row[:-1] and learns row[1:] where `learned`.
    """

    ids: np.ndarray
    learned: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def padding(self) -> float:
        """Share of the tokens that is padding."""
        return float(np.mean(self.ids == PAD))


@dataclass(frozen=True)
class Prepared:
    """What the trainer needs of the data: the tokenizer, the rows, and a report of what was read and left out."""

    tokenizer: Tokenizer
    train: Rows
    validation: Rows
    report: dict
    fingerprint: str  # equal for the same text prepared with the same settings


def prepare(sources: Sequence[str], config: Config, tokenizer: Tokenizer | None = None) -> Prepared:
    """Reads, cleans, tokenises and packs `sources`, or opens what an earlier call made of the same text and settings.

    sources: JSON-lines files, folders of them (train.jsonl, validation.jsonl, test.jsonl), names in `HUB` or Hub ids.
    Raises TinyGPTError for data that cannot be read or is empty.
    """
    if not sources:
        raise TinyGPTError("No data was given; name JSON-lines files, folders or Hub sets with --data, for example "
                           "--data dailydialog prosocial_dialog.")
    corpora = load_corpora(sources)
    folder = cache_folder() / fingerprint(corpora, config, tokenizer)
    if not (folder / "report.json").exists():
        corpora, report = clean_corpora(corpora, config.seed)
        if tokenizer is None:
            texts = [turn for corpus in corpora for dialogue in corpus.splits["train"] for turn in dialogue]
            print(f"Learning a vocabulary from {len(texts):,} turns ...", flush=True)
            tokenizer = Tokenizer.train(texts, config.vocab_size)
        write_rows(folder, corpora, report, tokenizer, config)
    try:
        tokenizer = Tokenizer.load(folder / "tokenizer.model")
        train, validation = (Rows(*(np.load(folder / f"{split}_{part}.npy", mmap_mode="r")
                                    for part in ("ids", "learned"))) for split in SPLITS[:2])
        report = json.loads((folder / "report.json").read_text())
    except (OSError, ValueError, EOFError, TinyGPTError) as error:
        raise TinyGPTError(f"The prepared data in {folder} is damaged ({error}); delete that folder, it is made "
                           "anew.") from None
    if tokenizer.vocab_size != config.vocab_size:
        print(f"The vocabulary has {tokenizer.vocab_size:,} pieces, not {config.vocab_size:,}: that is what these "
              "dialogues hold. The model is sized to fit.")
    for corpus in corpora:  # the same text may have been prepared from another place
        report["corpora"][corpus.name]["origin"] = corpus.origin
    return Prepared(tokenizer, train, validation, report, folder.name)


def cache_folder() -> Path:
    """Where tokenised sets are kept: $TINYGPT_CACHE, or tinygpt in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TINYGPT_CACHE") or Path(base) / "tinygpt")


def fingerprint(corpora: Sequence[Corpus], config: Config, tokenizer: Tokenizer | None) -> str:
    """A name for exactly this text under exactly these settings, and this version of the code that prepares it."""
    settings = ("8", config.vocab_size, config.seq_len, config.bpe_dropout, config.copies,
                config.replies_only, config.seed)
    digest = hashlib.sha256(repr(settings).encode())
    digest.update(tokenizer.model if tokenizer else b"")
    for corpus in corpora:
        digest.update(json.dumps([corpus.name, corpus.splits]).encode())
    return digest.hexdigest()[:24]


def write_rows(folder: Path, corpora: Sequence[Corpus], report: dict, tokenizer: Tokenizer, config: Config) -> None:
    """Encodes and packs the training and validation splits into `folder`, which appears only when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        fill(partial, corpora, report, tokenizer, config)
        partial.rename(folder)
    except OSError:
        if not (folder / "report.json").exists():  # else another process was first, with the same rows
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fill(folder: Path, corpora: Sequence[Corpus], report: dict, tokenizer: Tokenizer, config: Config) -> None:
    """The files of one prepared set."""
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    sentencepiece.set_random_generator_seed(config.seed % 2**32)
    for split in SPLITS[:2]:
        copies, dropout = (config.copies, config.bpe_dropout) if split == "train" else (1, 0.0)
        packed = []
        for _ in range(copies):
            pieces = []  # packed by themselves: in one row with its copy, a dialogue could be copied, not learned
            for corpus in corpora:
                for dialogue in tqdm(corpus.splits.get(split, ()), f"{corpus.name}: {split}", leave=False, delay=1):
                    pieces += encode(dialogue, corpus.name, tokenizer, config, dropout)
            packed.append(pack(pieces, config.seq_len + 1, tokenizer.vocab_size))
        ids, learned = (np.concatenate(parts) for parts in zip(*((r.ids, r.learned) for r in packed), strict=True))
        np.save(folder / f"{split}_ids.npy", ids)
        np.save(folder / f"{split}_learned.npy", learned)
        report[f"{split}_tokens"] = int((ids != PAD).sum())
    (folder / "report.json").write_text(json.dumps(report, indent=1))


# ------------------------------------------------------------------------------------------------- reading

def load_corpora(sources: Sequence[str]) -> list[Corpus]:
    """Several sets, told apart by number where they have one name."""
    corpora, named = [], Counter()
    for corpus in map(load_corpus, sources):
        named[corpus.name] += 1
        again = named[corpus.name] > 1
        corpora.append(replace(corpus, name=f"{corpus.name} ({named[corpus.name]})") if again else corpus)
    return corpora


def load_corpus(source: str) -> Corpus:
    """One data set from a JSON-lines file, a folder of them, a name in `HUB`, or a Hub id ("owner/name").

    Raises TinyGPTError, naming file and line, for what is missing, empty or not a dialogue.
    """
    path = Path(source)
    if path.is_file():
        return Corpus(path.stem if path.stem not in SPLITS else path.resolve().parent.name,
                      {"train": read_json_lines(path)}, str(source))
    if path.is_dir():
        files = {split: path / f"{split}.jsonl" for split in SPLITS if (path / f"{split}.jsonl").is_file()}
        if "train" not in files:
            others = [file for file in sorted(path.glob("*.jsonl")) if file.stem not in SPLITS]
            if not others:
                raise TinyGPTError(f"{source} holds no train.jsonl; put the training dialogues there, one "
                                   '{"turns": ["...", "..."]} a line.')
            train = [dialogue for file in others for dialogue in read_json_lines(file)]
        else:
            train = read_json_lines(files.pop("train"))
        splits = {split: read_json_lines(file) for split, file in files.items()}
        return Corpus(path.resolve().name, {"train": train, **splits}, str(source))
    if source in HUB or re.fullmatch(r"[\w-]+/[\w.-]+", source):
        return load_from_hub(source)
    raise TinyGPTError(f"{source} is neither a file, a folder, nor a Hub set; give a path to JSON lines, one of "
                       f"{', '.join(HUB)}, or a Hub id such as owner/name.")


def read_json_lines(path: Path) -> list[Dialogue]:
    """The `turns` of every line of `path`."""
    dialogues = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                turns = json.loads(line).get("turns")
            except (ValueError, AttributeError, RecursionError):
                raise TinyGPTError(f'{path}, line {number} is not a JSON object; write {{"turns": ["Hello!", "Hi."]}} '
                                   "or remove the line.") from None
            if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
                raise TinyGPTError(f'{path}, line {number}: "turns" must be a list of texts; mend or remove the line.')
            dialogues.append(turns)
    if not dialogues:
        raise TinyGPTError(f'{path} holds no dialogues; give at least one {{"turns": ["Hello!", "Hi."]}} a line.')
    return dialogues


def load_from_hub(source: str) -> Corpus:
    """Tries the known copies of `source` (or the id itself) and says which served, or why none did."""
    import datasets  # heavy, and only needed here

    print(f"Asking the Hugging Face Hub for {source} ...", flush=True)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what fails is told below
    failures = []
    for hub_id, revision in HUB.get(source, [(source, None)]):
        try:
            loaded = datasets.load_dataset(hub_id, revision=revision)
            splits = {split: dialogues_of(loaded[split]) for split in SPLITS if split in loaded}
            check_size(source, splits)
        except Exception as error:  # whatever the Hub or its libraries raise, the next copy may serve
            failures.append(f"{hub_id}: {type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}")
            if isinstance(error, ConnectionError):
                break  # no network: the other copies are out of reach too
            continue
        print(f"{source}: served by {hub_id} on the Hugging Face Hub.")
        return Corpus(source, splits, f"https://huggingface.co/datasets/{hub_id}")
    raise TinyGPTError(f"{source} is no file or folder here, and could not be loaded from the Hugging Face Hub; check "
                       "the spelling and the network, or give --data a local folder of JSON lines.\n"
                       + "\n".join(f"  {failure}" for failure in failures))


def dialogues_of(rows) -> list[Dialogue]:
    """The dialogues of a Hub split, by its columns: lists of utterances, exchanges, or one utterance a row."""
    columns = set(rows.column_names)
    for name in ("turns", "dialog", "dialogue", "utterances"):
        if name in columns:
            dialogues = list(rows[name])
            if not all(isinstance(turns, list) and all(isinstance(t, str) for t in turns) for turns in dialogues):
                raise TinyGPTError(f"its column {name} does not hold lists of texts")
            return dialogues
    grouped = defaultdict(list)
    if {"context", "response", "dialogue_id"} <= columns:
        for number, context, response in zip(rows["dialogue_id"], rows["context"], rows["response"], strict=True):
            grouped[number] += [context, response]
    elif {"dialog_id", "utterance"} <= columns:
        for number, utterance in zip(rows["dialog_id"], rows["utterance"], strict=True):
            grouped[number].append(utterance)
    else:
        raise TinyGPTError(f"its columns are {', '.join(sorted(columns))}; none of them holds dialogues")
    return list(grouped.values())


def check_size(source: str, splits: dict[str, list[Dialogue]]) -> None:
    """Raises TinyGPTError if a known set has lost a split or utterances on its way to the Hub."""
    if "train" not in splits:
        raise TinyGPTError("it has no train split")
    for split, expected in UTTERANCES.get(source, {}).items():
        found = sum(map(len, splits.get(split, ())))
        if found != expected:
            raise TinyGPTError(f"its {split} split has {found:,} utterances; expected {expected:,}")


# ------------------------------------------------------------------------------------------------- cleaning

def detokenize(text: str) -> str:
    """Undoes the spaces that a tokeniser put around punctuation: "I ' m fine ." -> "I'm fine."

    Text without such spaces is left as it is.
    """
    text = re.sub(r"(\w)(?: ' ?(m|s|t|d|re|ve|ll|clock|am|all)|' (m|t|d|ve|ll))\b(?! ?')",
                  lambda match: f"{match[1]}'{(match[2] or match[3]).lower()}", text, flags=re.IGNORECASE)  # I ' Ve
    text = re.sub(r"\b([01]?\d|2[0-3]) ?: ([0-5]\d)\b(?! +[a-z]{3})", r"\1:\2", text)  # 8: 30 -> 8:30
    text = re.sub(r"(\d) \. (\d\d)\b", r"\1.\2", text)  # 16 . 50 -> 16.50
    text = re.sub(r"(\d,\d{3}) , (\d{3})\b", r"\1,\2", text)  # 1,000 , 000 -> 1,000,000
    text = re.sub(r"\s+(?![:;]-?[()])([.,!?;:%)\]]+)(?=\s|$|[\"'.,!?;:)\]])", r"\1", text)  # hello , you -> hello, you
    text = re.sub(r"([.!?,])\s+(?=[.!?](?:\s|$|[.!?]))", r"\1", text)  # . . . -> ...
    text = re.sub(r"([(\[])\s+|(?<!\w)([$£€#])\s+(?=\d)", r"\1\2", text)  # ( so ) -> (so), $ 5 -> $5
    text = re.sub(r'(?<!\w)"\s*([^"]*?)\s*"(?!\w)', r'"\1"', text)  # " so " -> "so"
    return re.sub(r"\S+", lambda word: part_sentences(word[0]), text)


def part_sentences(word: str) -> str:
    """Puts the space back that is missing in end.Then or well,you; an address or an abbreviation is left alone."""
    if "@" in word or "://" in word or "www." in word:
        return word
    return re.sub(r"([a-z])([.!?,])(?=[A-Z][a-z]|I\b)|([a-z])(,)(?=[a-z])", r"\1\3\2\4 ", word)


def clean_text(text: str) -> str:
    """One turn as it is learned: detokenised, straight quotes, single spaces, no control characters."""
    return detokenize(normalize(text))


def key(text: str) -> str:
    """`text` without case, punctuation and spacing: equal keys, equal words."""
    return " ".join(re.findall(r"\w+", text.lower()))


def clean_corpora(corpora: Sequence[Corpus], seed: int) -> tuple[list[Corpus], dict]:
    """Cleans every turn and drops what must not be learned: dialogues without two turns of text, repeated ones, and
    training dialogues that leak into an evaluation split. Without any validation split, one is held out (1 in 20).

    Returns the clean corpora and the report: dialogues read, dropped (by reason) and kept, for each corpus.
    """
    report = {corpus.name: Counter() for corpus in corpora}
    cleaned = []
    for corpus in corpora:
        splits = {}
        for split, dialogues in corpus.splits.items():
            bar = tqdm(dialogues, f"{corpus.name}: cleaning {split}", leave=False, delay=1)
            turned = [[clean_text(turn) for turn in dialogue] for dialogue in bar]
            splits[split] = [dialogue for dialogue in turned if len(dialogue) > 1 and all(dialogue)]
            report[corpus.name][f"{split}_read"] = len(dialogues)
            report[corpus.name][f"{split}_without_two_turns_of_text"] = len(dialogues) - len(splits[split])
        cleaned.append(replace(corpus, splits=splits))
    drop_repeats(cleaned, report)
    if not any(corpus.splits.get("validation") for corpus in cleaned):
        hold_out_validation(cleaned, report, seed)
    drop_leaks(cleaned, report)
    if not any(corpus.splits["train"] for corpus in cleaned) or not any(c.splits.get("validation") for c in cleaned):
        raise TinyGPTError(f"After cleaning, {', '.join(c.origin for c in corpora)} leaves nothing to learn from; give "
                           "at least two different dialogues of two turns or more.")
    return cleaned, {"corpora": {c.name: {"origin": c.origin, **report[c.name]} for c in cleaned}}


def drop_repeats(corpora: Sequence[Corpus], report: dict[str, Counter]) -> None:
    """Keeps the first of training dialogues with the same words, over all corpora."""
    seen = set()
    for corpus in corpora:
        kept = []
        for dialogue in corpus.splits["train"]:
            said = tuple(map(key, dialogue))
            if said not in seen:
                kept.append(dialogue)
            seen.add(said)
        report[corpus.name]["train_repeated"] = len(corpus.splits["train"]) - len(kept)
        corpus.splits["train"] = kept


def drop_leaks(corpora: Sequence[Corpus], report: dict[str, Counter]) -> None:
    """Drops the training dialogues that `leaks` finds in the evaluation splits of any corpus."""
    evaluation = [dialogue for corpus in corpora for split in SPLITS[1:] for dialogue in corpus.splits.get(split, ())]
    for corpus in corpora:
        leaked, _ = leaks(corpus.splits["train"], evaluation)
        corpus.splits["train"] = [d for number, d in enumerate(corpus.splits["train"]) if number not in leaked]
        report[corpus.name].update(train_leaking=len(leaked), train_kept=len(corpus.splits["train"]))


def hold_out_validation(corpora: Sequence[Corpus], report: dict[str, Counter], seed: int) -> None:
    """Moves one training dialogue in 20 of each corpus, and at least one, to a validation split."""
    for corpus in corpora:
        dialogues = random.Random(seed).sample(corpus.splits["train"], len(corpus.splits["train"]))
        held_out = max(1, len(dialogues) // 20) if len(dialogues) > 1 else 0
        corpus.splits["validation"], corpus.splits["train"] = dialogues[:held_out], dialogues[held_out:]
        report[corpus.name]["train_held_out"] = held_out


def leaks(train: Sequence[Dialogue], evaluation: Iterable[Dialogue], min_words: int = 6) -> tuple[set[int], set[int]]:
    """Positions in `train` of dialogues that repeat an evaluation dialogue, case and punctuation ignored: whole, or at
    least half of its utterances of `min_words` words or more (after arXiv 2201.06219); and positions in `evaluation`
    of those that are repeated.
    """
    whole, spoken_in = defaultdict(set), defaultdict(set)
    for position, dialogue in enumerate(train):
        words = tuple(map(key, dialogue))
        whole[words].add(position)
        for utterance in words:
            if utterance.count(" ") + 1 >= min_words:
                spoken_in[utterance].add(position)
    found, repeated = set(), set()
    for number, dialogue in enumerate(evaluation):
        words = tuple(map(key, dialogue))
        longer = {utterance for utterance in words if utterance.count(" ") + 1 >= min_words}
        shared = Counter(position for utterance in longer for position in spoken_in.get(utterance, ()))
        here = whole.get(words, set()) | {position for position, n in shared.items() if 2 * n >= len(longer)}
        found |= here
        if here:
            repeated.add(number)
    return found, repeated


# ------------------------------------------------------------------------------------------------- rows

Piece = tuple[list[int], list[bool]]  # ids and, for each, whether it is learned


def encode(dialogue: Dialogue, name: str, tokenizer: Tokenizer, config: Config,
           dropout: float = 0.0) -> Iterator[Piece]:
    """A dialogue as pieces that fit a row, each `<s>` and then turns from the first word on.

    Where a turn no longer fits, the row is filled with its beginning and the next piece starts with that turn, whole;
    only a turn longer than a row is cut for good. What a speaker says is learned, with the marker that ends it;
    `<s>`, `User:` and `Bot:` are always given.
    """
    replies_only = any(part in name for part in config.replies_only)
    ids, learned = [BOS], [False]
    for turn in tokenizer.encode_turns(dialogue, dropout=dropout):
        learn = not replies_only or turn[0] == BOT
        for start in range(1, len(turn), config.seq_len - 1):
            part = [turn[0], *turn[start:start + config.seq_len - 1]]
            flags = [False, *[learn] * (len(part) - 1)]
            room = config.seq_len + 1 - len(ids)
            if len(part) > room:
                yield ids + part[:room], learned + flags[:room]
                ids, learned = [BOS], [False]
            ids, learned = ids + part, learned + flags
    yield ids, learned


def pack(pieces: Iterable[Piece], width: int, vocab_size: int) -> Rows:
    """Lays pieces side by side in rows of `width` tokens, longest first, each into the fullest row that has room."""
    rows_with_room = [[] for _ in range(width + 1)]
    ordered = sorted((piece for piece in pieces if any(piece[1])), key=lambda piece: -len(piece[0]))
    rows = []
    for ids, learned in ordered:
        room = next((room for room in range(len(ids), width + 1) if rows_with_room[room]), None)
        row = rows_with_room[room].pop() if room is not None else []
        if room is None:
            room = width
            rows.append(row)
        row.append((ids, learned))
        rows_with_room[room - len(ids)].append(row)
    all_ids = np.full((len(rows), width), PAD, dtype=np.uint16 if vocab_size <= 2**16 else np.uint32)
    all_learned = np.zeros((len(rows), width), dtype=bool)
    for number, row in enumerate(rows):
        ids = [i for piece in row for i in piece[0]]
        all_ids[number, :len(ids)] = ids
        all_learned[number, :len(ids)] = [flag for piece in row for flag in piece[1]]
    return Rows(all_ids, all_learned)
