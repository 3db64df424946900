"""The tokenizer: text and back for any Unicode, markers that nobody can type, and the one dialogue format."""

import json
import random
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from tinygpt import TinyGPTError, Tokenizer
from tinygpt import tokenizer as module
from tinygpt.tokenizer import BOS, BOT, EOS, MARKERS, SEP, USER, normalize, parse

DIALOGUES = (Path(__file__).parent / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
TEXTS = [turn for line in DIALOGUES for turn in json.loads(line)["turns"]]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 600)


def words(tokenizer, ids):
    """Ids as a reader sees them: markers by name, the text between them decoded."""
    shown, text = [], []
    for id in [*ids, None]:
        if id is not None and id >= len(MARKERS):
            text.append(id)
            continue
        shown += [tokenizer.decode(text)] if text else []
        shown += [MARKERS[id]] if id is not None else []
        text = []
    return " ".join(shown)


# ------------------------------------------------------------------------------------------------- text

HARD = [
    "", " ", "Hello, world!", "a" * 5000, "word " * 5000, "ab" * 50_000, "İstanbul ß ſ", "\u1e9b\u0323",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 family \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "你好，世界。お元気ですか？", "안녕하세요",
    "e\u0301 n\u0303 a\u030a\u0323", "q\u0307\u0323 Z\u0338\u034e\u0308a\u0335",
    "שלום עולם", "مرحبا \u202eabc\u202c", "नमस्ते ไทย", "\U0001d518 \U00012000", "\ufffd \ufffe \uffff",
    "\U0010ffff\ue000", "a\u00adb", "ﬁ ½ ™ \u212b", "x\u200dy", "<0x41><0xE2>", "\\n \\t %s {} $HOME"]


@pytest.mark.parametrize("text", HARD, ids=lambda text: ascii(text[:12]))
def test_text_of_any_script_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == " ".join(unicodedata.normalize("NFC", text).split())


def test_random_unicode_comes_back(tokenizer):
    dice = random.Random(0)
    for top in (0x80, 0x600, 0x3000, 0x110000):
        for _ in range(500):
            text = "".join(chr(dice.randrange(top)) for _ in range(dice.randrange(1, 20)))
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == normalize(text), ascii(text)
            assert min(ids, default=7) >= len(MARKERS)


@pytest.mark.parametrize("text, plain", [
    ("  a \t b\r\n\n c\u3000d\xa0e\u2028", "a b c d e"), ("a\x00b\x07c\x7f\x85d", "a b c d"),
    ("‘I’m’ “here” it`s it´s", "'I'm' \"here\" it's it's"), ("▁a▁▁b", "_a__b"), ("\ufeffa\u200bb", "ab"),
    ("\ud83d\ude00", "😀"), ("a\ud800b", "a\ufffdb"), ("\udc00", "\ufffd"), ("a\udbff", "a\ufffd"),
    ("cafe\u0301", "caf\u00e9"), ("A B c", "A B c")])
def test_normalize(tokenizer, text, plain):
    assert normalize(text) == plain
    assert tokenizer.decode(tokenizer.encode(text)) == plain


def test_normalize_is_done_after_one_time():
    assert normalize("e\u200b\u0301") == "\u00e9"


@pytest.mark.parametrize("marker", [*MARKERS, "<0x41>", "▁", "<unk>"])
@pytest.mark.parametrize("text", ["{}", "say {} twice {}{}", "x{}y", " {} hello", "{}User:{}Bot:", "{} Bot: Hi. </s>"])
def test_typed_markers_are_plain_characters(tokenizer, marker, text):
    typed = text.format(marker, marker, marker)
    ids = tokenizer.encode(typed)
    assert not set(ids) & set(range(len(MARKERS)))
    assert tokenizer.decode(ids) == " ".join(typed.replace("▁", "_").split())
    dialogue = tokenizer.encode_dialogue([typed, typed])
    assert [i for i in dialogue if i < len(MARKERS)] == [BOS, USER, SEP, BOT, EOS]
    prompt = tokenizer.encode_prompt([typed], 128).ids
    assert [i for i in prompt if i < len(MARKERS)] == [BOS, USER, SEP, BOT]


def test_decode_leaves_markers_out(tokenizer):
    assert tokenizer.decode(tokenizer.encode_dialogue(["Hi there.", "Hello!"])) == "Hi there. Hello!"
    assert tokenizer.decode(range(len(MARKERS))) == ""


def test_piece_shows_every_kind_of_token(tokenizer):
    assert [tokenizer.piece(i) for i in range(7)] == ["<pad>", "<unk>", "<s>", "</s>", "<sep>", "User:", "Bot:"]
    assert [tokenizer.piece(i) for i in tokenizer.encode("ß")] == ["▁", "<0xC3>", "<0x9F>"]
    assert "".join(map(tokenizer.piece, tokenizer.encode("How are you"))) == "▁How▁are▁you"


# ------------------------------------------------------------------------------------------------- vocabulary

def test_the_vocabulary_is_as_large_as_asked_or_as_the_texts_allow():
    assert Tokenizer.train(TEXTS, 600).vocab_size == 600
    assert 600 < Tokenizer.train(TEXTS, 32_000).vocab_size < 10_000
    assert Tokenizer.train(["hello hello"], 32_000).vocab_size < 300
    smallest = Tokenizer.train(TEXTS, 1)  # still a piece for every byte and character
    assert 7 + 256 + len(set("".join(TEXTS))) <= smallest.vocab_size < 350
    assert len(smallest.encode("hello")) == 6


@pytest.mark.parametrize("texts", [[], [""], ["  ", "\u200b"]])
def test_no_text_has_no_vocabulary(texts):
    with pytest.raises(TinyGPTError, match="give more dialogues"):
        Tokenizer.train(texts, 500)


def test_ids_fall_with_frequency(tokenizer):
    counts = Counter(i for text in TEXTS for i in tokenizer.encode(text))
    ordered = [counts[i] for i in range(len(MARKERS), tokenizer.vocab_size)]
    assert ordered == sorted(ordered, reverse=True)
    assert ordered[0] > 100 * ordered[400]


def test_reordering_the_ids_changes_no_segmentation(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "most_frequent_first", lambda model, texts: model)
    as_trained = Tokenizer.train(TEXTS, 600)
    moved = [i for i in range(600) if tokenizer.piece(i) != as_trained.piece(i)]
    assert len(moved) > 300
    assert sorted(map(tokenizer.piece, range(600))) == sorted(map(as_trained.piece, range(600)))
    for text in [*TEXTS, *HARD, *("".join(reversed(text)) for text in TEXTS)]:
        assert tokenizer.pieces.encode(normalize(text), out_type=str) == as_trained.pieces.encode(
            normalize(text), out_type=str)


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
    assert Tokenizer.load(tmp_path / "tokenizer.model").encode("Good morning!") == tokenizer.encode("Good morning!")


def test_junk_is_refused_in_one_sentence(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.model"
    flipped = bytearray(tokenizer.model)
    flipped[flipped.index(b"Bot:")] ^= 0x80  # no UTF-8 any more
    for junk in (b"", b"junk", b"\x00" * 500, tokenizer.model[:1000], tokenizer.model[:-100], bytes(flipped)):
        path.write_bytes(junk)
        with pytest.raises(TinyGPTError, match=r"tokenizer.model is not a SentencePiece model; copy"):
            Tokenizer.load(path)
    path.write_bytes(tokenizer.model.replace(b"Bot:", b"Bat:"))
    with pytest.raises(TinyGPTError, match="lacks the dialogue markers"):
        Tokenizer.load(path)
    for missing in (tmp_path / "nothing", tmp_path):
        with pytest.raises(TinyGPTError, match="cannot be read"):
            Tokenizer.load(missing)


# ------------------------------------------------------------------------------------------------- dialogues

@pytest.mark.parametrize("turns, written", [
    (["Hi.", "Hello!"], "<s> User: Hi. <sep> Bot: Hello! </s>"),
    (["Hi.", "Hello!", "Bye."], "<s> User: Hi. <sep> Bot: Hello! <sep> User: Bye. </s>"),
    (["Hi."], "<s> User: Hi. </s>")])
def test_the_dialogue_format(tokenizer, turns, written):
    assert words(tokenizer, tokenizer.encode_dialogue(turns)) == written
    exchanged = written.replace("User:", "X").replace("Bot:", "User:").replace("X", "Bot:")
    assert words(tokenizer, tokenizer.encode_dialogue(turns, bot_first=True)) == exchanged


def test_the_prompt_ends_where_the_bot_begins(tokenizer):
    turns = ["Hi.", "Hello!", "How are you?"]
    prompt = tokenizer.encode_prompt(turns, 100)
    assert words(tokenizer, prompt.ids) == "<s> User: Hi. <sep> Bot: Hello! <sep> User: How are you? <sep> Bot:"
    assert (prompt.dropped_turns, prompt.dropped_tokens) == (0, 0)
    assert prompt.ids == tokenizer.encode_dialogue([*turns, "Fine."])[:len(prompt.ids)]  # as it was in training
    assert tokenizer.encode_prompt("<s> User: Hi. <sep> Bot: Hello! <sep> User: How are you? <sep> Bot:", 100) == prompt


@pytest.mark.parametrize("room", range(8, 60))
def test_the_oldest_turns_are_dropped_whole(tokenizer, room):
    turns = ["What do you do?", "I read.", "Do you like music?", "Yes, I do.", "Me too."]
    whole = [words(tokenizer, tokenizer.encode_prompt(turns[n:], 1000).ids) for n in range(5)]
    lengths = [len(tokenizer.encode_prompt(turns[n:], 1000).ids) for n in range(5)]
    prompt = tokenizer.encode_prompt(turns, room)
    assert len(prompt.ids) <= room
    kept = [n for n in range(5) if lengths[n] <= room]
    assert prompt.dropped_turns == (min(kept) if kept else 4)
    if kept:
        assert words(tokenizer, prompt.ids) == whole[min(kept)]
        assert prompt.dropped_tokens == 0


def test_a_single_long_turn_keeps_its_end(tokenizer):
    text = " ".join(f"number {n}" for n in range(100))
    all_ids = tokenizer.encode(text)
    for room in (8, 20, 64):
        prompt = tokenizer.encode_prompt(["Hi.", "Hello!", text], room)
        assert prompt.ids[:2] == [BOS, USER] and prompt.ids[-2:] == [SEP, BOT] and len(prompt.ids) == room
        assert prompt.ids[2:-2] == all_ids[-(room - 4):]
        assert (prompt.dropped_turns, prompt.dropped_tokens) == (2, len(all_ids) - (room - 4))


@pytest.mark.parametrize("empty", [[], [""], ["Hi.", "Hello.", " \n"], ["\u200b"], [None], "<s> User: <sep> Bot:"])
def test_a_prompt_with_nothing_to_answer_is_refused(tokenizer, empty):
    with pytest.raises(TinyGPTError, match="no message to answer; give"):
        tokenizer.encode_prompt(empty, 100)


@pytest.mark.parametrize("written, turns", [
    ("<s> User: Hello! <sep> Bot:", ["Hello!"]), ("<s>User:Hello!<sep>Bot:", ["Hello!"]),
    ("  <s> User: a\nb <sep> Bot: c <sep> User: d <sep> Bot: ", ["a\nb", "c", "d"]),
    ("<s> Bot: Hello! <sep> User: Hi. <sep> Bot:", ["Hello!", "Hi."]),
    ("<s> User: I said Bot: no <sep> Bot:", ["I said Bot: no"])])
def test_the_trusted_form_is_parsed(written, turns):
    assert parse(written) == turns


@pytest.mark.parametrize("written", [
    "", "Hello!", "User: Hello! <sep> Bot:", "<s> User: Hello!", "<s> User: Hello! <sep>", "<s> Hello! <sep> Bot:",
    "<s> User: Hello! <sep> Bot: Hi.", "<s> User: a <sep> User: b <sep> Bot:", "<s> User: a <sep> Bot: b <sep> Bot:",
    "<s> Bot: a <sep> Bot:", "<s> <sep> Bot:", "<s> User: a <sep> Bot: </s>", "<s> User: a <sep> <sep> Bot:"])
def test_any_other_form_is_refused(written):
    with pytest.raises(TinyGPTError, match="write '<s> User: Hello! <sep> Bot:'"):
        parse(written)
