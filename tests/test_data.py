"""The data: reading, cleaning, packing and keeping dialogues, each against cases made by hand."""

import json
import random
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest

from tinygpt import Config, TinyGPTError, Tokenizer, data
from tinygpt.data import Corpus, Rows, clean_corpora, clean_text, encode, fill, load_corpus, pack, prepare
from tinygpt.tokenizer import BOS, BOT, EOS, PAD, SEP, USER

WORDS = [a + b for a in ("bo", "ka", "li", "mu", "pe", "ra", "si", "to") for b in ("nd", "lle", "ry", "st", "ven", "x")]


def random_dialogues(count, seed=0):
    dice = random.Random(seed)
    return [[" ".join(dice.choices(WORDS, k=dice.randint(1, 25))) for _ in range(dice.randint(2, 12))]
            for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([turn for dialogue in random_dialogues(100) for turn in dialogue], 600)


def write(path, dialogues):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in dialogues))
    return str(path)


def clean(train, seed=0, **splits):
    (corpus,), report = clean_corpora([Corpus("set", {"train": train, **splits}, "somewhere")], seed)
    return corpus.splits, report["corpora"]["set"]


# ------------------------------------------------------------------------------------------------- detokenising

@pytest.mark.parametrize("tokenised, plain", [
    ("I ' m fine , thanks .", "I'm fine, thanks."), ("I’m sorry , I can ’ t .", "I'm sorry, I can't."),
    ("Don ' t you think it ' s late ?", "Don't you think it's late?"),
    ("We ' re here , they ' ll come .", "We're here, they'll come."),
    ("I ' d say you ' ve won .", "I'd say you've won."), ("at nine o ' clock .", "at nine o'clock."),
    ("Yes , ma ' am .", "Yes, ma'am."), ("Hi , y ' all !", "Hi, y'all!"), ("James ' s car", "James's car"),
    ("It costs $ 5 .", "It costs $5."), ("50 % off !", "50% off!"), ("He is right.But why ?", "He is right. But why?"),
    ("Sure!Come in.What ' s up?Tell me", "Sure! Come in. What's up? Tell me"), ("no,thanks", "no, thanks"),
    ("Well . . . maybe", "Well... maybe"), ("Well ... maybe", "Well... maybe"), ("What ? ! No ! ! !", "What?! No!!!"),
    ('He said , " Hello , Jim . " and left .', 'He said, "Hello, Jim." and left.'),
    ('Say " cheese " .', 'Say "cheese".'), ("“ So ” , he said", '"So", he said'),
    ("( Of course ; why not ? )", "(Of course; why not?)"),
    ("Good-bye , Mr . Smith .", "Good-bye, Mr. Smith.")])
def test_tokenised_text_is_mended(tokenised, plain):
    assert clean_text(tokenised) == plain


CLEAN = [
    '"Hi," he said.', 'She said "no" and "yes".', "U.S.", "the U.S.A. team", "3.5", "1,000 people", "dogs' bones",
    "The dogs' bones, e.g. these.", "i.e. that", "See https://example.com/a/b?c=d.e for more.", "me@mail.example.com",
    "It's 9:30 p.m., isn't it?", "rock 'n' roll", "Wait... what?!", "$5 (or so)", "well-known", "a/b", "50%", "Yes!",
    "He's 6'2\" tall.", "I.Q. of 120", "J.K. Rowling", "5 > 3 & 2 < 4"]


@pytest.mark.parametrize("text", CLEAN)
def test_clean_text_stays_as_it_is(text):
    assert clean_text(text) == text


@pytest.mark.parametrize("text", [
    "In 2010: 15 people came.", "the players' all-star game", "The boys' all went home", "Take 2: 50 dollars.",
    "Thanks :)", "a 6\" and a 7\" pipe", "a 5$ bill", "C# is a language", "Joe.Smith@Example.Com", "a Ph.D. in law",
    "call it node.JS", "https://example.com/?at=a,b"])
def test_more_clean_text_stays_as_it_is(text):
    assert clean_text(text) == text


@pytest.mark.parametrize("tokenised, plain", [
    ("I ' Ve got it .", "I've got it."), ("It ′ s late .", "It's late."), ("At 8: 30 .", "At 8:30."),
    ("It is $ 16 . 50 .", "It is $16.50."), ("over 1,000 , 000 books", "over 1,000,000 books")])
def test_more_tokenised_text_is_mended(tokenised, plain):
    assert clean_text(tokenised) == plain


# ------------------------------------------------------------------------------------------------- dropping

LONG = "This is a sentence of more than six words, number"


def test_training_dialogues_do_not_leak_into_a_held_out_validation_split():
    pairs = [[[f"{LONG} {n}.", "Yes."], [f"{LONG} {n}.", "No."]] for n in range(60)]  # each pair shares its long turn
    splits, report = clean([dialogue for pair in pairs for dialogue in pair])
    held_out = {dialogue[0] for dialogue in splits["validation"]}
    assert held_out and held_out.isdisjoint(dialogue[0] for dialogue in splits["train"])
    assert report["train_leaking"] > 0


def test_short_and_repeated_dialogues_are_dropped():
    first, second, third = ["Hello, Ann!", "Hi, Bob."], ["How are you?", "Fine."], ["Hi, Bob.", "Hello, Ann!"]
    train = [first, ["Only one"], [], ["Something", " \t "], second, ["hello ann", "HI BOB"], third]
    splits, report = clean(train, validation=[["Bye.", "See you."], ["One turn"]])
    assert splits["train"] == [first, second, third]
    assert splits["validation"] == [["Bye.", "See you."]]
    assert (report["train_read"], report["train_repeated"], report["train_kept"]) == (7, 1, 3)
    assert (report["train_without_two_turns_of_text"], report["validation_without_two_turns_of_text"]) == (3, 1)
    assert report["origin"] == "somewhere"


@pytest.mark.parametrize("split", ["validation", "test"])
def test_training_dialogues_that_leak_are_dropped(split):
    evaluation = [["Hi.", "Bye."], [f"{LONG} 1.", f"{LONG} 2.", f"{LONG} 3.", f"{LONG} 4.", "Short one."]]
    leaking = [["HI", "bye!"],  # the whole, though short
               ["Other words.", f"{LONG} 1?", f"{LONG.lower()} 4"]]  # half of the longer utterances
    innocent = [["Hi.", "Bye.", "Wait."], [f"{LONG} 1.", "Short one.", f"{LONG} 5."], ["Bye.", "Hi."]]
    splits, report = clean([*leaking, *innocent], **{"validation": [["Some", "text"]], split: evaluation})
    assert splits["train"] == innocent
    assert splits[split] == evaluation
    assert report["train_leaking"] == 2


def test_leaks_are_found_across_corpora():
    shared = [f"{LONG} 1.", f"{LONG} 2."]
    a = Corpus("a", {"train": [shared, ["Keep", "this"]]}, "a")
    b = Corpus("b", {"train": [["Other", "words"]], "test": [shared], "validation": [["x", "y"]]}, "b")
    (a, b), report = clean_corpora([a, b], 0)
    assert a.splits["train"] == [["Keep", "this"]] and b.splits["train"] == [["Other", "words"]]
    assert report["corpora"]["a"]["train_leaking"] == 1


def test_validation_is_held_out_when_there_is_none():
    train = [[f"Question {n}", f"Answer {n}"] for n in range(100)]
    splits, report = clean(train)
    assert len(splits["validation"]) == report["train_held_out"] == 5
    assert sorted(splits["train"] + splits["validation"]) == sorted(train)
    assert clean(train)[0] == splits  # the same every time
    assert clean(train, seed=1)[0]["validation"] != splits["validation"]
    assert [len(clean(train[:2])[0][split]) for split in ("train", "validation")] == [1, 1]


@pytest.mark.parametrize("train", [[["a", "b"]], [["a", "b"], ["A", "B."]], [["a"], ["b"]], [["", ""], [" ", "\n"]]])
def test_nothing_left_to_learn_is_one_sentence(train):
    with pytest.raises(TinyGPTError, match="somewhere leaves nothing to learn from; give at least two"):
        clean(train)


# ------------------------------------------------------------------------------------------------- rows

def pieces_of(row):
    """The pieces of a row, each a tuple of ids from its <s> to before the next <s> or the padding."""
    row = [i for i in row.tolist() if i != PAD]
    starts = [n for n, i in enumerate(row) if i == BOS]
    return [tuple(row[a:b]) for a, b in pairwise([*starts, len(row)])]


def pieces_in(rows):
    return Counter(piece for row in rows.ids for piece in pieces_of(row))


def rows_of(dialogues, tokenizer, name="set", **settings):
    config = Config(**settings)
    pieces = [piece for dialogue in dialogues for piece in encode(dialogue, name, tokenizer, config)]
    return pack(pieces, config.seq_len + 1, tokenizer.vocab_size)


def filled(folder, dialogues, tokenizer, name="set", **settings):
    """The training rows that `fill` writes."""
    folder.mkdir()
    corpus = Corpus(name, {"train": dialogues, "validation": dialogues}, "here")
    fill(folder, [corpus], {}, tokenizer, Config(**settings))
    return Rows(np.load(folder / "train_ids.npy"), np.load(folder / "train_learned.npy"))


def test_rows_start_with_s_hold_every_dialogue_and_little_padding(tokenizer):
    dialogues = random_dialogues(500)
    rows = rows_of(dialogues, tokenizer, seq_len=256)
    assert rows.ids.shape == rows.learned.shape == (len(rows), 257) and rows.ids.dtype == np.uint16
    assert (rows.ids[:, 0] == BOS).all()
    assert rows.padding < 0.05
    assert rows.padding == np.mean(rows.ids == 0)
    whole = [d for d in dialogues if len(tokenizer.encode_dialogue(d)) <= 257]
    assert len(whole) > 300
    missing = Counter(tuple(tokenizer.encode_dialogue(d)) for d in whole) - pieces_in(rows)
    assert not missing
    for ids, learned in zip(rows.ids, rows.learned, strict=True):
        end = int((ids != PAD).sum())
        assert (ids[end:] == PAD).all()  # padding only at the end, and
        assert learned.tolist() == [i not in (PAD, BOS, USER, BOT) for i in ids.tolist()]  # all said is learned


def test_padding_is_small_at_the_default_length(tokenizer):
    rows = rows_of(random_dialogues(500, seed=1), tokenizer)
    assert rows.ids.shape[1] == 129 and rows.padding < 0.05 and (rows.ids[:, 0] == BOS).all()


def test_every_turn_of_a_long_dialogue_is_whole_in_some_row(tokenizer):
    dialogues = [d for d in random_dialogues(300, seed=2) if len(tokenizer.encode_dialogue(d)) > 129][:20]
    assert len(dialogues) == 20
    found = pieces_in(rows_of(dialogues, tokenizer))
    for dialogue in dialogues:
        for n, turn in enumerate(dialogue):
            end = EOS if n == len(dialogue) - 1 else SEP
            wanted = (BOT if n % 2 else USER, *tokenizer.encode(turn), end)
            assert any(piece[a:a + len(wanted)] == wanted for piece in found for a in range(len(piece))), turn


def test_a_turn_longer_than_a_row_is_split_and_whole_in_sum(tokenizer):
    text = " ".join(random.Random(3).choices(WORDS, k=100))
    pieces = list(encode([text, "bond"], "set", tokenizer, Config(seq_len=32)))
    assert all(len(ids) <= 33 and ids[0] == BOS for ids, _ in pieces)
    assert all(learned == [i not in (BOS, USER, BOT) for i in ids] for ids, learned in pieces)
    parts = [ids[2:] for ids, _ in pieces if ids[1] == USER]
    whole = [*tokenizer.encode(text), SEP]
    assert len(parts) > 3
    assert [i for part in parts for i in part][:len(whole)] == whole


def test_only_the_bots_replies_are_learned_of_such_sets(tokenizer):
    dialogues = [["lira lira", "bond", "mux mux", "kast"], ["mux", "rast toven"]]
    rows = rows_of(dialogues, tokenizer, name="prosocial_dialog")
    (row,) = [tokenizer.decode(row[learned]) for row, learned in zip(rows.ids, rows.learned, strict=True)]
    ids = rows.ids[rows.learned].tolist()
    assert sorted(row.split()) == ["bond", "kast", "rast", "toven"]
    assert [i for i in ids if i < 7] in ([SEP, EOS, EOS], [EOS, SEP, EOS])
    assert BOS not in ids and USER not in ids and BOT not in ids


def test_replies_only_names_part_of_a_set(tokenizer):
    for names, learned in ((("social",), "kast"), ((), "bond kast"), (("other",), "bond kast")):
        rows = rows_of([["bond", "kast"]], tokenizer, name="prosocial_dialog", replies_only=names)
        assert tokenizer.decode(rows.ids[rows.learned]) == learned


def test_no_row_holds_a_dialogue_twice(tokenizer, tmp_path):
    dialogues = random_dialogues(60)
    rows = filled(tmp_path / "rows", dialogues, tokenizer, copies=6, seq_len=128)
    begins = Counter()
    for row in rows.ids:
        texts = [tokenizer.decode(piece) for piece in pieces_of(row)]
        assert len(texts) == len(set(texts))
        begins.update(texts)
    whole = [count for text, count in begins.items() if text in {" ".join(d) for d in dialogues}]
    assert len(whole) > 20 and min(whole) == 6


def test_bpe_dropout_cuts_the_same_text_anew(tokenizer, tmp_path):
    dialogue = [" ".join(random.Random(5).choices(WORDS, k=12)), "bond kast lira"]
    settings = {"bpe_dropout": 0.3, "copies": 6, "seq_len": 128}
    rows = filled(tmp_path / "first", [dialogue], tokenizer, **settings)
    ways = pieces_in(rows)
    assert len(ways) > 3 and sum(ways.values()) == 6
    assert {tokenizer.decode(way) for way in ways} == {tokenizer.decode(tokenizer.encode_dialogue(dialogue))}
    assert sum(map(len, ways)) > len(ways) * len(tokenizer.encode_dialogue(dialogue))
    again = filled(tmp_path / "again", [dialogue], tokenizer, **settings)
    assert (again.ids == rows.ids).all()
    other = filled(tmp_path / "other", [dialogue], tokenizer, **settings, seed=1)
    assert other.ids.shape != rows.ids.shape or (other.ids != rows.ids).any()
    validation = np.load(tmp_path / "first" / "validation_ids.npy")
    assert [way for way in pieces_in(Rows(validation, validation > 0))] == [tuple(tokenizer.encode_dialogue(dialogue))]


def test_a_large_vocabulary_gets_wider_ids():
    rows = pack([([BOS, 70_000], [False, True])], 4, vocab_size=100_000)
    assert rows.ids.dtype == np.uint32 and rows.ids.tolist() == [[BOS, 70_000, PAD, PAD]]


# ------------------------------------------------------------------------------------------------- preparing, keeping

SMALL = Config(vocab_size=500, seq_len=32)


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "talk"
    write(folder / "train.jsonl", random_dialogues(40))
    write(folder / "validation.jsonl", random_dialogues(5, seed=9))
    return str(folder)


def test_prepare_reads_a_folder(source):
    prepared = prepare([source], SMALL)
    for rows, dialogues in ((prepared.train, random_dialogues(40)), (prepared.validation, random_dialogues(5, seed=9))):
        said = "".join(prepared.tokenizer.decode(ids) for ids in rows.ids)
        assert isinstance(rows.ids, np.memmap) and isinstance(rows.learned, np.memmap)
        assert all(word in said for dialogue in dialogues for turn in dialogue for word in turn.split())
    assert prepared.report["corpora"]["talk"]["train_kept"] == 40
    assert prepared.report["train_tokens"] == int((prepared.train.ids != PAD).sum())


def test_a_second_time_nothing_is_computed(source, cache, monkeypatch):
    first = prepare([source], SMALL)
    before = files(cache)
    monkeypatch.setattr(data, "encode", None)
    monkeypatch.setattr(Tokenizer, "train", None)
    second = prepare([source], SMALL)
    assert files(cache) == before and len(list(cache.iterdir())) == 1
    assert (second.train.ids == first.train.ids).all() and second.report == first.report


def test_other_text_or_settings_are_prepared_anew(source, cache, tmp_path):
    prepare([source], SMALL)
    prepare([source], Config(vocab_size=500, seq_len=48))
    prepare([source], Config(vocab_size=500, seq_len=32, copies=2))
    prepare([source], Config(vocab_size=500, seq_len=32, lr=0.5))  # this one does not touch the rows
    assert len(list(cache.iterdir())) == 3
    write(tmp_path / "talk" / "train.jsonl", random_dialogues(40)[:-1])
    prepare([source], SMALL)
    assert len(list(cache.iterdir())) == 4


def test_a_moved_source_is_still_known(source, cache, tmp_path):
    prepare([source], SMALL)
    shutil.move(source, tmp_path / "elsewhere" / "talk")
    prepare([str(tmp_path / "elsewhere" / "talk")], SMALL)
    assert len(list(cache.iterdir())) == 1


def test_an_interrupted_write_leaves_no_half_cache(source, cache, monkeypatch):
    whole = np.save
    calls = []

    def interrupted(path, rows):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        whole(path, rows)
    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare([source], SMALL)
    monkeypatch.setattr(np, "save", whole)
    prepared = prepare([source], SMALL)
    assert len(prepared.train) > 0 and len(prepared.validation) > 0
    fresh = pieces_in(rows_of(random_dialogues(40), prepared.tokenizer, seq_len=32))
    assert pieces_in(prepared.train) == fresh


def test_a_tokenizer_of_ones_own_is_kept(source, tokenizer):
    assert prepare([source], SMALL, tokenizer).tokenizer.model == tokenizer.model


def test_several_sources_are_learned_together(source, tmp_path):
    more = write(tmp_path / "more.jsonl", [["zebra apple", "quilt"], ["quilt jolly", "zebra"]])
    prepared = prepare([source, more], SMALL)
    assert "zebra" in "".join(prepared.tokenizer.decode(ids) for ids in prepared.train.ids)
    assert {"talk", "more"} == set(prepared.report["corpora"])


def test_two_sources_of_the_same_name_are_both_in_the_report(tmp_path):
    sources = [write(tmp_path / folder / "talk.jsonl", random_dialogues(30, seed)) for seed, folder in enumerate("ab")]
    report = prepare(sources, SMALL).report["corpora"]
    assert sorted(entry["train_read"] for entry in report.values()) == [30, 30]


def test_the_fingerprint_is_of_the_text_wherever_it_is_named_from(tmp_path, monkeypatch):
    sources = [write(tmp_path / folder / "talk.jsonl", random_dialogues(30, seed)) for seed, folder in enumerate("ab")]
    monkeypatch.chdir(tmp_path)
    assert prepare(sources, SMALL).fingerprint == prepare(["a/talk.jsonl", "b/talk.jsonl"], SMALL).fingerprint


# ------------------------------------------------------------------------------------------------- reading

GOOD = b'{"turns": ["Hello!", "Hi."]}\n'


@pytest.mark.parametrize("content, said", [
    (b"", "talk.jsonl holds no dialogues; give"), (b"\n \n", "talk.jsonl holds no dialogues; give"),
    (GOOD + b"Hello there\n", "talk.jsonl, line 2 is not a JSON object"), (GOOD + b"\n[1]\n", "line 3 is not a JSON"),
    (GOOD + b'{"turns": ["Hello!"', "line 2 is not a JSON object"), (b"null\n", "line 1 is not a JSON object"),
    (GOOD + b'{"turns": ["caf\xe9", "x"]}\n', "line 2 is not"), (GOOD.decode().encode("utf-16"), "line 1 "),
    (GOOD + b'{"turns": ["Hello!", 3]}\n', 'line 2: "turns" must be a list of texts'),
    (GOOD + b'{"turns": "Hello!"}\n', 'line 2: "turns" must be'), (b'{"dialog": ["a", "b"]}\n', 'line 1: "turns" must'),
    (GOOD + b'{"turns": [["a", "b"]]}\n', "line 2"), (b"\x89PNG\r\n\x1a\n\x00", "line 1 is not a JSON object")])
def test_a_bad_file_is_one_sentence_with_its_line(tmp_path, content, said):
    (tmp_path / "talk.jsonl").write_bytes(content)
    with pytest.raises(TinyGPTError) as caught:
        load_corpus(str(tmp_path / "talk.jsonl"))
    message = str(caught.value)
    assert said in message and message.startswith(str(tmp_path)) and "\n" not in message


@pytest.mark.parametrize("source", ["missing.jsonl", "/no/such/folder", "a b/c", "../missing"])
def test_a_missing_path_is_one_sentence(source):
    with pytest.raises(TinyGPTError, match=r"neither a file, a folder, nor a Hub set; give"):
        load_corpus(source)


def test_a_folder_without_training_text_is_refused(tmp_path):
    with pytest.raises(TinyGPTError, match=r"holds no train.jsonl; put"):
        load_corpus(str(tmp_path))
    write(tmp_path / "validation.jsonl", [["a", "b"]])
    with pytest.raises(TinyGPTError, match=r"holds no train.jsonl; put"):
        load_corpus(str(tmp_path))


def test_no_source_is_refused():
    with pytest.raises(TinyGPTError, match="No data was given; name"):
        prepare([], SMALL)


def test_what_is_read_from_files_and_folders(tmp_path):
    a, b, c = ["Hello!", "Hi."], ["How?", "So."], ["Bye.", "Bye."]
    alone = load_corpus(write(tmp_path / "one" / "mine.jsonl", [a, b]))
    assert (alone.name, alone.splits) == ("mine", {"train": [a, b]})
    write(tmp_path / "one" / "yours.jsonl", [c])
    write(tmp_path / "one" / "test.jsonl", [b])
    folder = load_corpus(str(tmp_path / "one"))  # no train.jsonl: all other files are
    assert (folder.name, folder.splits) == ("one", {"train": [a, b, c], "test": [b]})
    write(tmp_path / "one" / "train.jsonl", [c])
    assert load_corpus(str(tmp_path / "one")).splits == {"train": [c], "test": [b]}
    assert load_corpus(str(tmp_path / "one" / "train.jsonl")).name == "one"
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD)
    assert load_corpus(str(tmp_path / "bom.jsonl")).splits == {"train": [a]}


# ------------------------------------------------------------------------------------------------- the Hub

def hub(monkeypatch, sets):
    """Makes `datasets.load_dataset` serve `sets` by id, and an error for all others; returns what was asked for."""
    asked = []

    def load_dataset(hub_id, revision=None):
        asked.append((hub_id, revision))
        if hub_id not in sets:
            raise RuntimeError(f"Dataset scripts are no longer supported\nbut found {hub_id}.py")
        return datasets.DatasetDict({split: datasets.Dataset.from_dict(columns)
                                     for split, columns in sets[hub_id].items()})
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    copies = [("a/first", None), ("b/second", "refs/convert/parquet"), ("c/third", None)]
    monkeypatch.setattr(data, "HUB", {"talk": copies})
    monkeypatch.setattr(data, "UTTERANCES", {"talk": {"train": 4, "validation": 2}})
    return asked


TALK = {"train": {"dialog": [["Hello!", "Hi."], ["How?", "So."]]}, "validation": {"dialog": [["Bye.", "Bye."]]}}


def test_when_the_first_copy_fails_the_next_one_serves_and_is_named(monkeypatch, capsys):
    asked = hub(monkeypatch, {"b/second": TALK, "c/third": TALK})
    corpus = load_corpus("talk")
    assert asked == [("a/first", None), ("b/second", "refs/convert/parquet")]
    assert corpus.splits == {"train": [["Hello!", "Hi."], ["How?", "So."]], "validation": [["Bye.", "Bye."]]}
    assert corpus.origin == "https://huggingface.co/datasets/b/second"
    assert "served by b/second" in capsys.readouterr().out


def test_a_copy_that_lost_utterances_is_refused(monkeypatch):
    less = {"train": {"dialog": [["Hello!", "Hi."]]}, "validation": TALK["validation"]}
    hub(monkeypatch, {"a/first": less, "b/second": {"train": TALK["train"]}, "c/third": TALK})
    assert load_corpus("talk").origin.endswith("c/third")


def test_when_all_fail_one_message_names_each(monkeypatch):
    hub(monkeypatch, {"b/second": {"train": {"dialog": [["Hello!", "Hi."]]}}, "c/third": {"test": TALK["train"]}})
    with pytest.raises(TinyGPTError) as caught:
        load_corpus("talk")
    heading, *reasons = str(caught.value).splitlines()
    assert "talk" in heading and "give --data" in heading
    assert [reason.split(":")[0].strip() for reason in reasons] == ["a/first", "b/second", "c/third"]
    assert "Dataset scripts are no longer supported" in reasons[0]
    assert "train split has 2 utterances; expected 4" in reasons[1] and "no train split" in reasons[2]


def test_any_hub_id_is_tried_as_it_is(monkeypatch):
    asked = hub(monkeypatch, {"me/my-set.v2": TALK})
    assert load_corpus("me/my-set.v2").splits["train"] == [["Hello!", "Hi."], ["How?", "So."]]
    assert asked == [("me/my-set.v2", None)]


def test_the_known_sets_are_those_of_the_description():
    assert set(data.HUB) == set(data.UTTERANCES) == {"dailydialog", "prosocial_dialog"}
    assert sum(data.UTTERANCES["dailydialog"].values()) == 102_979  # 13,118 dialogues of 7.9 turns


@pytest.mark.parametrize("columns", [
    {"turns": [["a", "b", "c"], ["d", "e"]]}, {"dialog": [["a", "b", "c"], ["d", "e"]], "act": [[0, 1, 0], [1, 1]]},
    {"dialogue": [["a", "b", "c"], ["d", "e"]]}, {"utterances": [["a", "b", "c"], ["d", "e"]], "emotions": [[], []]},
    {"dialog_id": [7, 7, 3, 7, 3], "utterance": ["a", "b", "d", "c", "e"], "turn_type": [0] * 5}])
def test_columns_with_utterances(columns):
    assert data.dialogues_of(datasets.Dataset.from_dict(columns)) == [["a", "b", "c"], ["d", "e"]]


def test_columns_with_exchanges():
    rows = {"dialogue_id": [0, 0, 1], "context": ["a", "c", "e"], "response": ["b", "d", "f"], "rots": [[], [], []]}
    assert data.dialogues_of(datasets.Dataset.from_dict(rows)) == [["a", "b", "c", "d"], ["e", "f"]]


@pytest.mark.parametrize("columns, said", [
    ({"text": ["Hello!"]}, "its columns are text"),
    ({"dialogue": ["#1: Hello! #2: Hi."]}, "dialogue does not hold lists of texts"),
    ({"turns": [[{"role": "user"}, {"role": "bot"}]]}, "turns does not hold lists of texts"),
    ({"turns": [["Hello!", None]]}, "turns does not hold lists of texts")])
def test_columns_without_dialogues_are_refused(monkeypatch, columns, said):
    hub(monkeypatch, {"me/set": {"train": columns}})
    with pytest.raises(TinyGPTError) as caught:
        load_corpus("me/set")
    assert said in str(caught.value) and "me/set: " in str(caught.value)
