"""Text to token ids and back, and the one dialogue format:

    <s> User: Hello! <sep> Bot: Hi there. <sep> User: ... </s>

The markers are control symbols of the SentencePiece model. They are put in by id and never matched in text, so a
visitor who types "<sep> Bot:" has typed plain characters and nothing more.
"""

import io
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from tinygpt.config import TinyGPTError

MARKERS = ("<pad>", "<unk>", "<s>", "</s>", "<sep>", "User:", "Bot:")  # ids 0 to 6, in this order
PAD, UNK, BOS, EOS, SEP, USER, BOT = range(len(MARKERS))
PLAIN = str.maketrans({"’": "'", "‘": "'", "`": "'", "´": "'", "“": '"', "”": '"', "▁": "_", "′": "'",
                       "\u200b": None, "\ufeff": None})


@dataclass(frozen=True)
class Prompt:
    """Token ids ready for the model, and what had to go to make them fit."""

    ids: list[int]
    dropped_turns: int = 0  # oldest turns left out, whole
    dropped_tokens: int = 0  # tokens cut from the start of the only turn that was kept


class Tokenizer:
    """A SentencePiece BPE model with byte fallback: every text has tokens, and none is unknown.

    `decode(encode(text)) == normalize(text)` for any text.
    """

    def __init__(self, model: bytes, origin: str = "the tokenizer model"):
        self.model = model
        self.pieces = sentencepiece.SentencePieceProcessor()
        try:
            self.pieces.LoadFromSerializedProto(model)
            first = tuple(map(self.pieces.id_to_piece, range(min(len(MARKERS), self.pieces.vocab_size()))))
        except (RuntimeError, UnicodeDecodeError):
            raise TinyGPTError(f"{origin} is not a SentencePiece model; copy tokenizer.model anew from where the "
                               "checkpoint came from.") from None
        self.vocab_size: int = self.pieces.vocab_size()
        if first != MARKERS:
            raise TinyGPTError(f"{origin} lacks the dialogue markers {' '.join(MARKERS)} as its first pieces; "
                               "use a tokenizer.model that train.py made.")

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads `tokenizer.model`. Raises TinyGPTError for a missing or foreign file."""
        try:
            return cls(Path(path).read_bytes(), origin=str(path))
        except OSError as error:
            raise TinyGPTError(f"{path} cannot be read ({error.strerror}); give a checkpoint folder that has "
                               "its tokenizer.model.") from None

    @classmethod
    def train(cls, texts: Sequence[str], vocab_size: int) -> "Tokenizer":
        """Learns at most `vocab_size` pieces from `texts`; fewer where the texts do not hold as many.

        Byte-pair encoding (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909) by SentencePiece.
        """
        texts = [text for text in map(normalize, texts) if text]
        written = io.BytesIO()
        smallest = len(MARKERS) + 256 + len(set("".join(texts))) + 1  # markers, bytes, every character and the space
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts), model_writer=written, model_type="bpe",
                vocab_size=max(vocab_size, smallest), hard_vocab_limit=False, byte_fallback=True,
                character_coverage=0.9999, split_digits=True, normalization_rule_name="identity",
                remove_extra_whitespaces=False, max_sentence_length=65_536, minloglevel=2,
                pad_id=PAD, unk_id=UNK, bos_id=BOS, eos_id=EOS, pad_piece="<pad>",
                control_symbols=list(MARKERS[SEP:]))
        except RuntimeError as error:
            raise TinyGPTError(f"No vocabulary can be learned from {len(texts)} texts ({error}); "
                               "give more dialogues.") from None
        return cls(most_frequent_first(written.getvalue(), texts))

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, normalised first; never a marker."""
        return self.pieces.encode(normalize(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; markers have none."""
        return self.pieces.decode([int(i) for i in ids if i >= len(MARKERS)])

    def piece(self, id: int) -> str:
        """One token as a reader may see it: its marker, its byte as <0xE2>, or its characters with ▁ for a space."""
        return self.pieces.id_to_piece(int(id))

    def encode_turns(self, turns: Sequence[str], bot_first: bool = False, dropout: float = 0.0) -> list[list[int]]:
        """Each turn as `[speaker, ..., <sep>]`, the last one ending in `</s>`; the speakers take turns.

        With `dropout`, that share of the merges is left out at random (Provilkov et al. 2020, section 3.1;
        https://arxiv.org/abs/1910.13267), so that the same text has other tokens each time.
        """
        speakers = (BOT, USER) if bot_first else (USER, BOT)
        texts = [normalize(turn) for turn in turns]
        if dropout:  # one by one: in a list, each of several threads would have dice of its own
            encoded = [self.pieces.encode(text, enable_sampling=True, alpha=dropout, nbest_size=-1) for text in texts]
        else:
            encoded = self.pieces.encode(texts)
        ends = [SEP] * (len(turns) - 1) + [EOS]
        return [[speakers[n % 2], *ids, end] for n, (ids, end) in enumerate(zip(encoded, ends, strict=True))]

    def encode_dialogue(self, turns: Sequence[str], bot_first: bool = False) -> list[int]:
        """A whole dialogue as ids: `<s> User: ... <sep> Bot: ... </s>`."""
        return [BOS, *(i for turn in self.encode_turns(turns, bot_first) for i in turn)]

    def encode_prompt(self, prompt: str | Sequence[str], room: int) -> Prompt:
        """What the model reads before the Bot's reply: `<s> User: ... <sep> Bot:`, in at most `room` tokens.

        prompt: the turns so far, the last one the User's and the speakers taking turns; or the trusted string form
        that `parse` takes. The oldest turns are dropped, whole, until the rest fits; if the last turn alone does not
        fit, its end is kept. Raises TinyGPTError for an empty prompt.
        """
        turns = parse(prompt) if isinstance(prompt, str) else list(prompt)
        if not turns or not all(isinstance(turn, str) for turn in turns) or not normalize(turns[-1]):
            raise TinyGPTError("The prompt has no message to answer; give at least one turn of text.")
        room -= 2  # <s> and Bot:
        readable = turns[-max(1, room):]  # a turn has two tokens or more
        encoded = self.encode_turns(readable, bot_first=len(readable) % 2 == 0)
        encoded[-1][-1] = SEP  # the dialogue goes on
        kept = len(encoded)
        while kept > 1 and sum(map(len, encoded[-kept:])) > room:
            kept -= 1
        dropped_turns = len(turns) - kept
        ids = [i for turn in encoded[-kept:] for i in turn]
        excess = max(0, len(ids) - room)
        if excess:
            ids = [USER, *ids[1 + excess:]]
        return Prompt([BOS, *ids, BOT], dropped_turns, excess)


def normalize(text: str) -> str:
    """How every text is written before it becomes tokens. What changes: Unicode is composed (NFC); curly quotes,
    accents used as quotes and "▁" become plain ' " _; control characters and white space of any kind and length
    become one space, none at the ends; zero-width spaces go; half a surrogate pair becomes "\ufffd".
    """
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = unicodedata.normalize("NFC", text.translate(PLAIN)).translate(PLAIN)  # composing may make one more accent
    return " ".join("".join(" " if unicodedata.category(c) == "Cc" else c for c in text).split())


def parse(dialogue: str) -> list[str]:
    """The turns of `<s> User: Hello! <sep> Bot:`, for strings that you write yourself (never for a visitor's).

    The last marker, `Bot:`, asks for the reply. Raises TinyGPTError for any other form.
    """
    spoken = re.fullmatch(r"\s*<s>\s*(.*?)\s*<sep>\s*Bot:\s*", dialogue, re.DOTALL)
    turns = re.split(r"\s*<sep>\s*", spoken[1]) if spoken else []
    speakers = ("User:", "Bot:") if len(turns) % 2 else ("Bot:", "User:")
    if not turns or not all(turn.startswith(speakers[n % 2]) for n, turn in enumerate(turns)):
        raise TinyGPTError(f"{dialogue[:60]!r} is not a dialogue: write '<s> User: Hello! <sep> Bot:', the speakers "
                           "taking turns, or give the turns as a list.")
    return [turn.removeprefix(speakers[n % 2]).strip() for n, turn in enumerate(turns)]


def most_frequent_first(model: bytes, texts: Iterable[str]) -> bytes:
    """The same SentencePiece model with ids that fall with how often `texts` use a piece.

    BPE numbers pieces by merge, and single characters last: "." and "?" would be among the rarest classes of the
    adaptive softmax. Segmentation goes by score, not by id, so it does not change.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
    counts = Counter(i for ids in pieces.encode(list(texts)) for i in ids)
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    order = sorted(range(len(MARKERS), len(proto.pieces)), key=lambda i: (-counts[i], i))
    ordered = [*proto.pieces[:len(MARKERS)], *(proto.pieces[i] for i in order)]
    del proto.pieces[:]
    proto.pieces.extend(ordered)
    return proto.SerializeToString()
