"""A checkpoint folder: what comes back is what was saved, and nothing damaged is ever taken for good."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tinygpt import Config, TinyGPT, TinyGPTError, Tokenizer, checkpoint, load_checkpoint, save_checkpoint
from tinygpt.checkpoint import write_atomically
from tinygpt.config import to_json

ROOT = Path(__file__).parent.parent
NAMES = {"config.json", "tokenizer.model", "model.safetensors"}
IDS = torch.tensor([[2, 5, 40, 41, 42, 4, 6]])


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["hello there", "how are you", "fine thanks"], 300)


@pytest.fixture
def make(tokenizer):
    def make(seed=0, **settings):
        torch.manual_seed(seed)
        sizes = {"seq_len": 16, "embed_dim": 16, "num_heads": 2, "num_layers": 2, "ff_hidden": 24, **settings}
        return TinyGPT(Config(vocab_size=tokenizer.vocab_size, **sizes)).eval()
    return make


@pytest.fixture
def folder(tmp_path, make, tokenizer):
    save_checkpoint(tmp_path / "run", make(), tokenizer)
    return tmp_path / "run"


def refused(folder):
    """The one message with which loading `folder` fails."""
    with pytest.raises(TinyGPTError) as caught:
        load_checkpoint(folder, "cpu")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- whole

@pytest.mark.parametrize("head", ["adaptive", "tied"])
def test_the_loaded_model_gives_the_same_logits(tmp_path, make, tokenizer, head):
    model = make(head=head, dropout=0.3)
    save_checkpoint(tmp_path / "a" / "b", model, tokenizer)
    loaded, loaded_tokenizer = load_checkpoint(tmp_path / "a" / "b", "cpu")
    assert torch.equal(loaded(IDS), model(IDS))
    assert loaded.config == model.config and loaded_tokenizer.model == tokenizer.model
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_half_precision_halves_the_file_and_loads_as_single(tmp_path, folder, make, tokenizer):
    model = make()
    save_checkpoint(tmp_path / "half", model, tokenizer, torch.float16)
    loaded, _ = load_checkpoint(tmp_path / "half", "cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    for name, parameter in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter.half().float())
    bytes_of = [(path / "model.safetensors").stat().st_size for path in (folder, tmp_path / "half")]
    assert bytes_of[0] - bytes_of[1] == pytest.approx(2 * sum(p.numel() for p in model.parameters()), abs=100)


def test_the_folder_holds_three_plain_files(folder):
    assert {path.name for path in folder.iterdir()} == NAMES
    assert json.loads((folder / "config.json").read_text())["embed_dim"] == 16
    for path in folder.iterdir():
        assert not path.read_bytes().startswith((b"\x80", b"PK"))  # neither a pickle nor a zip of pickles


def test_loading_leaves_the_folder_and_the_random_state_alone(folder):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    state = torch.get_rng_state()
    load_checkpoint(str(folder), "cpu")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_checkpoint_from_before_a_setting_was_added_still_loads(folder, make, tokenizer, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(checkpoint, "to_json", lambda config: {k: v for k, v in to_json(config).items() if k != "seed"})
        save_checkpoint(folder, make(seed=5), tokenizer)
    loaded, _ = load_checkpoint(folder, "cpu")
    assert torch.equal(loaded(IDS), make(seed=5)(IDS)) and loaded.config.seed == Config().seed


def test_a_foreign_device_is_refused(folder):
    with pytest.raises(TinyGPTError, match="auto"):
        load_checkpoint(folder, "toaster")


# ------------------------------------------------------------------------------------------------- damaged

def test_any_flipped_bit_of_the_weights_is_noticed(folder):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    dice = random.Random(0)
    places = [*range(16), header - 1, header, len(content) - 1, *dice.sample(range(16, header), 150),
              *dice.sample(range(header, len(content)), 100)]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << dice.randrange(8)
        path.write_bytes(damaged)
        message = refused(folder)
        assert "model.safetensors" in message and ("again" in message or "put back" in message), (place, message)


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.parametrize("keep", [slice(0), slice(1), slice(7), slice(100), slice(400), slice(-2)], ids=str)
def test_a_truncated_file_is_named(folder, name, keep):
    (folder / name).write_bytes((folder / name).read_bytes()[keep])
    message = refused(folder)
    assert name in message and any(remedy in message for remedy in ("put back", "again", "copy")), message


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    message = refused(folder)
    assert name in message and "ive a" in message


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_folder_in_place_of_a_file_is_named(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    assert name in refused(folder)


def test_no_checkpoint_is_one_sentence(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty is not a checkpoint: config.json is missing (found: nothing). Give" in refused(tmp_path / "empty")
    assert "nowhere is not a checkpoint: config.json is missing (found: no such" in refused(tmp_path / "nowhere")
    (tmp_path / "empty" / "photo.png").touch()
    assert "(found: photo.png)" in refused(tmp_path / "empty")
    assert "config.json is not a checkpoint" in refused(folder / "config.json")


def test_a_tokenizer_of_another_model_is_refused(folder, tokenizer):
    other = Tokenizer.train(["entirely other words", "are learned here"], 300)
    (folder / "tokenizer.model").write_bytes(other.model)
    message = refused(folder)
    assert str(folder / "tokenizer.model") in message and "put back" in message
    assert f"(vocabulary {other.vocab_size})" in message and f"(vocabulary {tokenizer.vocab_size})" in message


@pytest.mark.parametrize("change", [{"num_layers": 3}, {"num_heads": 4}, {"seq_len": 17}, {"dropout": 0.2}])
def test_an_edited_config_is_refused(folder, change):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    message = refused(folder)
    assert str(path) in message and "put back" in message


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"null", b"\xff\xfe", b'"text"'])
def test_a_config_that_is_no_json_object_is_refused(folder, content):
    (folder / "config.json").write_bytes(content)
    assert "config.json is not a JSON object; put back" in refused(folder)


@pytest.mark.parametrize("change, said", [({"num_heads": 3}, "num_heads 3"), ({"embed_dim": "16"}, "embed_dim is '16'"),
                                          ({"n_layer": 2}, "n_layer")])
def test_an_impossible_config_names_the_file_and_the_setting(folder, change, said):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(TinyGPTError) as caught:
        load_checkpoint(folder, "cpu")
    assert str(path) in str(caught.value) and said in str(caught.value)


def test_weights_of_another_program_are_refused(folder):
    from safetensors.torch import save_file

    save_file({"wte.weight": torch.zeros(4, 4)}, folder / "model.safetensors")
    assert "model.safetensors" in refused(folder)


def test_a_pickle_is_never_opened(folder):
    class Trap:
        def __reduce__(self):
            return os.abort, ()
    torch.save({"trap": Trap()}, folder / "model.safetensors")
    assert "model.safetensors" in refused(folder)


# ------------------------------------------------------------------------------------------------- killed

@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_failure_in_the_middle_leaves_the_old_checkpoint(folder, make, tokenizer, monkeypatch, call, number):
    old, new, calls = make(), make(seed=1), []
    real = getattr(os, call)

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            raise OSError(28, "No space left on device")
        return real(*arguments)
    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(folder, new, tokenizer)
    assert torch.equal(load_checkpoint(folder, "cpu")[0](IDS), old(IDS))
    save_checkpoint(folder, new, tokenizer)
    assert torch.equal(load_checkpoint(folder, "cpu")[0](IDS), new(IDS))


def test_a_killed_process_leaves_the_old_or_the_new_content(tmp_path):
    path = tmp_path / "file"
    size = 2_000_000
    write_atomically(path, b"0" * size)
    program = ("import sys; from pathlib import Path; from tinygpt.checkpoint import write_atomically\n"
               "print('go', flush=True)\n"
               f"while True: [write_atomically(Path(sys.argv[1]), c * {size}) for c in (b'0', b'1')]")
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    with process:
        try:
            assert process.stdout.readline() == b"go\n"
            for _ in range(30):
                assert path.read_bytes() in (b"0" * size, b"1" * size)  # at any moment
        finally:
            process.kill()
    assert path.read_bytes() in (b"0" * size, b"1" * size)
