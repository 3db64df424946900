"""The two command lines as a user runs them: train, chat, and one short message for every mistake."""

import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SMALL = ["--preset", "nano", "--embed-dim", "32", "--num-heads", "2", "--num-layers", "1", "--ff-hidden", "64",
         "--seq-len", "32", "--batch-size", "64", "--epochs", "1", "--device", "cpu"]


def process(*arguments, said=b""):
    """A command line in a process of its own; `said` is what the user types into it."""
    env = {**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, env=env, input=said, capture_output=True,
                          timeout=60)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.fixture
def run(monkeypatch, capfd):
    """The same within this process, which is much faster."""
    def run(program, *arguments, said=b""):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(said), encoding="utf-8"))
        capfd.readouterr()
        try:
            if program == "chat":
                runpy.run_module("tinygpt.chat", run_name="__main__")
            else:
                runpy.run_path(program, run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code
        return code, *capfd.readouterr()
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder made by the command line itself, and what that printed."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYGPT_CACHE", str(folder / "cache"))
        return folder / "run", process("train.py", *SMALL, "--data", "tests/data", "--out", folder / "run")


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(outcome):
    """What a refused command says: a short message on stderr, with exit code 2."""
    code, _, error = outcome
    assert code == 2, error
    assert "Traceback" not in error and len(error.strip().splitlines()) <= 12
    return error


# ------------------------------------------------------------------------------------------------- what works

def test_training_leaves_a_checkpoint(trained):
    folder, (code, out, error) = trained
    assert code == 0, error
    assert re.search(r"validation loss \d\.\d+ nats", out) and f"python -m tinygpt.chat {folder}" in out
    assert {path.name for path in folder.iterdir()} == {"config.json", "tokenizer.model", "model.safetensors",
                                                        "log.jsonl", "curves.html", "run.json", "state"}


def test_the_checkpoint_chats(trained):
    code, out, error = process("-m", "tinygpt.chat", trained[0], "--device", "cpu", "--max-new-tokens", "5",
                               said="Hello!\nHow are you? 😀\n\nBye.".encode())
    assert (code, error) == (0, "")
    assert [line[:5] for line in out.splitlines() if line] == ["Say s", "Bot: ", "Bot: ", "(a ne", "Bot: "]
    assert all(len(line) > len("Bot: ") for line in out.splitlines() if line.startswith("Bot: "))


def test_a_run_begins_with_the_weights_of_another(trained, run, tmp_path):
    data, begun = tmp_path / "other", tmp_path / "begun"
    data.mkdir()
    turns = '{"turns": ["Do you sell zebra crossings, number %d?", "We sell %d of them, sir."]}\n'
    (data / "train.jsonl").write_text("".join(turns % (n, n) for n in range(40)), "utf-8")
    code, _, error = run("train.py", "--preset", "nano", "--init", trained[0], "--lr", "1e-9", "--epochs", "1",
                         "--device", "cpu", "--data", data, "--out", begun)
    assert code == 0, error
    assert (begun / "tokenizer.model").read_bytes() == (trained[0] / "tokenizer.model").read_bytes()
    before, after = load_file(trained[0] / "model.safetensors"), load_file(begun / "model.safetensors")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    moved = tmp_path / "moved"  # the first checkpoint may be gone when the run goes on
    trained[0].rename(moved)
    try:
        code, _, error = run("train.py", "--resume", begun)
    finally:
        moved.rename(trained[0])
    assert code == 0, error


def test_a_size_that_the_first_weights_do_not_have_is_refused(trained, run, tmp_path):
    error = refused(run("train.py", "--preset", "nano", "--init", trained[0], "--num-layers", "3", "--out",
                        tmp_path / "run"))
    assert "num_layers 1, not 3" in error and "--num-layers" in error
    error = refused(run("train.py", "--init", tmp_path, "--out", tmp_path / "run"))
    assert f"{tmp_path} is not a checkpoint" in error


def test_a_plan_trains_nothing(run, tmp_path):
    code, out, error = run("train.py", *SMALL, "--data", "tests/data", "--out", tmp_path / "run", "--plan")
    assert code == 0, error
    for what in ("token embedding", "total", "learned tokens an epoch", "memory", "tokens a second", "minutes"):
        assert what in out
    assert not (tmp_path / "run").exists()


def test_the_same_seed_says_the_same(trained, run):
    first, second, other = (run("chat", trained[0], "--device", "cpu", "--temperature", "2", "--max-new-tokens", "8",
                                "--seed", seed, said=b"Hello!\n") for seed in (1, 1, 2))
    assert first[0] == 0 and first == second != other


@pytest.mark.parametrize("program", ["train.py", "chat"])
def test_help(run, program):
    code, out, _ = run(program, "--help")
    assert code == 0 and "usage" in out.lower()


# ------------------------------------------------------------------------------------------------- what is refused

@pytest.mark.parametrize("arguments, said", [
    (["--num-heads", "5", "--embed-dim", "384"], "embed_dim 384 does not divide into num_heads 5; take"),
    (["--dropout", "2", "--lr", "0", "--seed", "-1"], "seed is -1"), (["--seed", str(2**70)], "seed is"),
    (["--data", "missing.jsonl"], "missing.jsonl is neither a file"), (["--data"], "No data was given"),
    (["--data", "LICENSE"], "LICENSE, line 1 is not a JSON object"), (["--nonsense", "3"], "--nonsense"),
    (["--num-layers", "two"], "--num-layers"),
    (["--preset", "huge"], "preset is 'huge'; give one of reference, chat, nano"),
    (["--head", "none"], "--head"), (["--device", "toaster"], "device is 'toaster'; give auto"),
    (["--precision", "fp16"], "fp16 needs a GPU"), (["--out", "LICENSE"], "LICENSE"),
    (["--out", "LICENSE/run"], "LICENSE/run")], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_train_refuses(run, tmp_path, arguments, said):
    licence = (ROOT / "LICENSE").read_bytes()
    outcome = run("train.py", *SMALL, "--data", "tests/data", "--out", tmp_path / "run", *arguments)
    assert said in refused(outcome)
    assert not (tmp_path / "run").exists() and (ROOT / "LICENSE").read_bytes() == licence


def test_train_never_overwrites_a_run(trained, run):
    folder, _ = trained
    before = content(folder)
    assert f"{folder} already holds a run; go on with --resume {folder}" in refused(
        run("train.py", *SMALL, "--data", "tests/data", "--out", folder))
    assert content(folder) == before


def test_resume_without_a_run_is_refused(run, tmp_path):
    assert "holds no run to go on with" in refused(run("train.py", "--resume", tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "photo.png").touch()
    assert "holds no run to go on with" in refused(run("train.py", "--resume", tmp_path))


@pytest.mark.parametrize("flags", [["--lr", "0.5"], ["--preset", "nano"], ["--out", "elsewhere"], ["--epochs", "20"]])
def test_resume_refuses_settings_that_it_would_ignore(run, trained, flags):
    assert "leave out the other flags" in refused(run("train.py", "--resume", trained[0], *flags))


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"sources": []}'])
def test_resume_of_a_damaged_run_is_refused(run, tmp_path, damage):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "state.safetensors").write_bytes(b"")
    (tmp_path / "run.json").write_bytes(damage)
    assert "run.json" in refused(run("train.py", "--resume", tmp_path))


@pytest.mark.parametrize("arguments, said", [
    (["nowhere"], "nowhere is not a checkpoint"), (["tests"], "config.json is missing"),
    (["LICENSE"], "LICENSE is not"), (["RUN", "--temperature", "9"], "temperature is 9.0; give a number from 0 to 5"),
    (["RUN", "--nonsense"], "--nonsense"), (["RUN", "--top-k", "many"], "--top-k"),
    (["RUN", "--device", "toaster"], "device is 'toaster'")])
def test_chat_refuses(trained, run, arguments, said):
    arguments = [trained[0] if argument == "RUN" else argument for argument in arguments]
    outcome = run("chat", *arguments, said=b"Hello!\n")
    assert said in refused(outcome) and "Bot:" not in outcome[1]


def test_chat_refuses_in_a_process_of_its_own():
    assert "nowhere is not a checkpoint" in refused(process("-m", "tinygpt.chat", "nowhere"))


@pytest.mark.parametrize("said", ["\u200b\nHello!\n".encode(), b"caf\xe9\nHello!\n"], ids=["invisible", "latin-1"])
def test_chat_goes_on_after_an_odd_line(trained, run, said):
    code, out, error = run("chat", trained[0], "--device", "cpu", "--max-new-tokens", "5", said=said)
    assert code == 0, error
    assert out.splitlines()[-2].startswith("Bot: ")
