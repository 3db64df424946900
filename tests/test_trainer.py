"""Training: what is learned, what is kept, and that a stopped run goes on as if it never stopped."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import tinygpt.trainer
from tinygpt import Config, Sampling, TinyGPT, TinyGPTError, generate, load_checkpoint
from tinygpt.data import prepare
from tinygpt.learner import Learner
from tinygpt.optim import learning_rate, make_optimizers
from tinygpt.trainer import Trainer, load_run

ROOT = Path(__file__).parent.parent
TINY = Config(vocab_size=400, seq_len=32, embed_dim=24, num_heads=2, num_layers=2, ff_hidden=48, dropout=0.1, lr=3e-3,
              batch_size=8, epochs=2, eval_interval=7, eval_rows=16, patience=0, device="cpu", precision="fp32")
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adamw", "muon"])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with 64 dialogues to learn and 20 to validate on."""
    folder = tmp_path_factory.mktemp("dialogues")
    for split, size in (("train", 64), ("validation", 20)):
        lines = (ROOT / "tests" / "data" / f"{split}.jsonl").read_text("utf-8").splitlines(keepends=True)[:size]
        (folder / f"{split}.jsonl").write_text("".join(lines), "utf-8")
    return [str(folder)]


@pytest.fixture
def make(sources, tmp_path, monkeypatch):
    """Makes a Trainer of TINY with some settings changed."""
    monkeypatch.setenv("TINYGPT_CACHE", sources[0] + "-prepared")  # once for all tests here

    def make(folder="run", **settings):
        config = replace(TINY, **settings)
        return Trainer(config, prepare(sources, config), tmp_path / folder, sources)
    return make


def log(trainer, *names):
    """The lines of the log that hold `names`, as tuples of their values."""
    lines = map(json.loads, (trainer.folder / "log.jsonl").read_text().splitlines())
    return [tuple(line[name] for name in names) for line in lines if all(name in line for name in names)]


def timeless(trainer):
    """All of the log but what the clock and the memory say."""
    lines = map(json.loads, (trainer.folder / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in ("tokens_per_second", "memory_mb")}
            for line in lines]


def same_files(one, other):
    """Whether two runs hold the same model and the same state, to the last bit."""
    for name in ("model.safetensors", "state/state.safetensors"):
        ours, theirs = load_file(one.folder / name), load_file(other.folder / name)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    return True


def stop_after(trainer, step):
    """Lets the trainer be interrupted while it takes that step, as Ctrl-C does."""
    train_step = trainer.train_step

    def interrupted_step():
        if trainer.step == step - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step()
    trainer.train_step = interrupted_step


@torch.no_grad()
def loss_by_hand(model, rows):
    """Mean nats of the tokens that `rows` mark as learned, each from its own row's earlier tokens."""
    model.eval()
    ids = torch.tensor(rows.ids.astype("int64"))
    losses = F.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:], reduction="none")
    return losses[torch.tensor(rows.learned[:, 1:])].mean().item()


# --------------------------------------------------------------------------------------------------- learning

def test_twenty_dialogues_are_learned_by_heart(tmp_path):
    turns = [json.loads(line)["turns"] for line in (ROOT / "tests" / "data" / "train.jsonl").open()][:20]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"turns": [*t, split]}) + "\n" for t in turns))
    config = Config(vocab_size=400, embed_dim=64, num_heads=4, num_layers=2, ff_hidden=256, dropout=0.0, lr=5e-3,
                    batch_size=4, epochs=60, eval_interval=1_000, device="cpu", precision="fp32")
    trainer = Trainer(config, prepare([str(tmp_path)], config), tmp_path / "run", [])
    trainer.start()
    assert loss_by_hand(trainer.model, trainer.data.train) < 0.1


@OPTIMIZERS
def test_training_helps_on_unseen_dialogues(make, optimizer):
    trainer = make(optimizer=optimizer, epochs=6, dropout=0.3, eval_rows=0)
    before = loss_by_hand(trainer.model, trainer.data.validation)
    trainer.start()
    after = loss_by_hand(trainer.model, trainer.data.validation)
    assert after < before - 1
    assert log(trainer, "validation_loss")[-1][0] == pytest.approx(after, abs=1e-5)  # measured without dropout


def test_bf16_trains_and_keeps_fp32_weights(make):
    trainer = make(precision="bf16", epochs=6)
    before = loss_by_hand(trainer.model, trainer.data.train)
    trainer.start()
    assert loss_by_hand(trainer.model, trainer.data.train) < before - 1
    assert {t.dtype for t in load_file(trainer.folder / "model.safetensors").values()} == {torch.float32}


def test_the_logged_losses_are_means_over_learned_tokens(make):
    trainer = make(lr=1e-12, dropout=0.0, epochs=1, batch_size=16, eval_rows=0, replies_only=("dialogues",))
    train, validation = (loss_by_hand(trainer.model, rows) for rows in (trainer.data.train, trainer.data.validation))
    assert trainer.total_steps <= 10 and len(trainer.data.train) % 16  # one line; the last batch is a smaller one
    trainer.start()
    assert log(trainer, "train_loss")[0][0] == pytest.approx(train, abs=1e-5)
    assert log(trainer, "validation_loss")[-1][0] == pytest.approx(validation, abs=1e-5)
    assert log(trainer, "tokens")[-1][0] == trainer.data.train.learned[:, 1:].sum()


def test_the_log_is_json_lines_with_loss_rate_and_speed(make):
    trainer = make()
    train_step, per_step = trainer.train_step, int(trainer.data.train.learned.sum(1).max()) * 8
    trainer.train_step = lambda: time.sleep(0.02) or train_step()
    trainer.start()
    lines = log(trainer, "step", "train_loss", "lr", "tokens_per_second")
    steps = trainer.total_steps
    assert [line[0] for line in lines] == [*range(10, steps, 10), steps]
    for step, loss, rate, speed in lines:
        assert 0 < loss < 10 and 0 < speed <= per_step / 0.02
        assert rate == pytest.approx(learning_rate(step - 1, steps, TINY))
    assert [line[0] for line in log(trainer, "step", "validation_loss")] == [*range(7, steps, 7), steps]
    for loss, perplexity in log(trainer, "validation_loss", "validation_perplexity"):
        assert perplexity == pytest.approx(math.exp(loss))


def test_the_seed_decides(make):
    runs = [make("one"), make("two"), make("three", seed=1)]
    for run in runs:
        torch.manual_seed(time.time_ns() % 2**60)  # what the process drew before does not matter
        run.start()
    assert timeless(runs[0]) == timeless(runs[1]) and same_files(runs[0], runs[1])
    assert log(runs[0], "train_loss")[0] != log(runs[2], "train_loss")[0]


def test_each_epoch_takes_every_row_once_in_an_order_of_its_own(make):
    orders = []
    for seed in (0, 1):
        trainer, taken = make(seed=seed), []
        batch = trainer.batch
        trainer.batch = lambda rows, numbers, batch=batch, taken=taken: taken.extend(numbers) or batch(rows, numbers)
        for _ in range(trainer.total_steps):
            trainer.train_step()
        half = len(taken) // 2
        orders += [taken[:half], taken[half:]]
    assert all(sorted(order) == list(range(len(trainer.data.train))) for order in orders)
    assert len(set(map(tuple, orders))) == 4


def test_any_seed_will_do(make):
    make(seed=20_260_131_235_959, epochs=1).start()


# --------------------------------------------------------------------------------------------------- stopping

@OPTIMIZERS
@pytest.mark.parametrize("step", [3, 10, 13, 14])  # before, with and after a line of the log; with a validation
def test_an_interrupted_run_goes_on_as_if_it_never_stopped(make, optimizer, step, capsys):
    whole, first, second = (make(name, optimizer=optimizer, head="tied") for name in ("whole", "parts", "parts"))
    assert whole.total_steps > 14
    whole.start()
    stop_after(first, step)
    first.start()
    assert first.step == step
    assert f"python train.py --resume {first.folder}" in capsys.readouterr().out
    second.resume()
    assert timeless(second) == timeless(whole) and same_files(second, whole)


@pytest.mark.parametrize("step", [2, 8, 11])
def test_a_run_that_dies_goes_on_from_its_last_state(make, step, monkeypatch):
    whole, first, second = make("whole"), make("parts"), make("parts")
    whole.start()
    train_step = first.train_step
    first.train_step = lambda: train_step() if first.step < step else sys.exit("died")
    with pytest.raises(SystemExit):
        first.start()
    with (first.folder / "log.jsonl").open("a") as file:
        file.write('{"step": 11, "epo')  # a line that the disk got half of
    second.resume()
    assert timeless(second) == timeless(whole) and same_files(second, whole)


KILLS = """
import os, random, signal, sys, time
sys.argv = ["train.py", *sys.argv[1:]]
import train, tinygpt.trainer
for attempt in range(6):
    child = os.fork()
    if child == 0:
        train.run_command(train.main)
        os._exit(0)
    if attempt < 5:
        time.sleep(random.uniform(0.1, 1.5))
        os.kill(child, signal.SIGKILL)
    code = os.waitpid(child, 0)[1]
    print("ended", code)
    if os.path.exists(sys.argv[-1] + "/state/state.safetensors"):
        sys.argv = ["train.py", "--resume", sys.argv[-1]]
"""


def as_flags(config):
    """What train.py takes for a config that differs from the reference in plain values."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in vars(config).items()
            if value != getattr(Config, name)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_that_is_killed_at_five_random_moments_goes_on(make, sources, tmp_path):
    settings = {"epochs": 8.0, "eval_interval": 5, "ema_decay": 0.9}
    whole, parts = make("whole", **settings), make("parts", **settings)
    done = subprocess.run([sys.executable, "-c", KILLS, *as_flags(replace(TINY, **settings)), "--data", *sources,
                           "--out", str(parts.folder)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    assert done.returncode == 0, done.stderr
    ends = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ended")]
    assert ends[0] == str(int(signal.SIGKILL)) and ends[-1] == "0"
    whole.start()
    assert timeless(parts)[-1]["step"] == whole.total_steps > 100
    assert timeless(parts) == timeless(whole) and same_files(parts, whole)


def test_a_process_that_is_told_to_stop_finishes_its_step_and_goes_on(make, sources):
    whole, parts = make("whole", epochs=12.0), make("parts", epochs=12.0)
    log = parts.folder / "log.jsonl"
    process = subprocess.Popen([sys.executable, "train.py", *as_flags(replace(TINY, epochs=12.0)), "--data", *sources,
                                "--out", str(parts.folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())})
    while process.poll() is None and (not log.exists() or log.read_text().count("\n") < 5):
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and f"Go on with: python train.py --resume {parts.folder}" in said
    assert load_run(parts.folder) == (replace(TINY, epochs=12.0), sources, None)
    parts.resume()
    whole.start()
    assert timeless(parts) == timeless(whole) and same_files(parts, whole)


def test_a_run_that_dies_while_it_starts_leaves_a_way_on(make, monkeypatch):
    def die(*_):
        sys.exit("died")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(tinygpt.trainer, "write_tensors", die)
        make().start()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(tinygpt.trainer, "save_checkpoint", die)
        make().start()
    with pytest.raises(TinyGPTError, match="already holds a run; go on with --resume"):
        make().start()
    make().resume()
    assert load_checkpoint(make().folder, "cpu")


def test_a_finished_run_has_nothing_to_go_on_with(make):
    first, second = make(epochs=1), make(epochs=1)
    first.start()
    before = {file: file.read_bytes() for file in first.folder.iterdir() if file.is_file()}
    second.resume()
    assert before == {file: file.read_bytes() for file in first.folder.iterdir() if file.is_file()}


def test_a_second_start_in_the_same_folder_is_refused(make):
    first = make(epochs=1)
    first.start()
    before = {file: (file.stat().st_mtime_ns, file.is_file() and file.read_bytes()) for file in
              first.folder.rglob("*")}
    with pytest.raises(TinyGPTError, match=f"{re.escape(str(first.folder))} already holds a run"):
        make(epochs=1, seed=1).start()
    assert before == {file: (file.stat().st_mtime_ns, file.is_file() and file.read_bytes()) for file in
                      first.folder.rglob("*")}


def test_resuming_on_other_data_is_refused(make):
    make(epochs=1).start()
    with pytest.raises(TinyGPTError, match=r"data of .* has changed since its state was saved"):
        make(epochs=1, copies=2).resume()


def test_resuming_on_one_changed_word_is_refused(sources, make, tmp_path):
    make(epochs=1).start()
    changed = tmp_path / "changed"
    changed.mkdir()
    for split in ("train", "validation"):
        text = (Path(sources[0]) / f"{split}.jsonl").read_text(encoding="utf-8")
        (changed / f"{split}.jsonl").write_text(text.replace("Hello!", "Hallo!"), encoding="utf-8")
    with pytest.raises(TinyGPTError, match=r"data of .* has changed"):
        Trainer(replace(TINY, epochs=1), prepare([str(changed)], TINY), tmp_path / "run", sources).resume()


def test_a_gradient_that_overflows_moves_no_weight(make):
    trainer = make(optimizer="muon")
    trainer.learner.scaler = torch.amp.GradScaler("cpu", enabled=True)
    trainer.model.final_norm.weight.register_hook(lambda gradient: gradient * torch.nan)  # AdamW's, not Muon's
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train_step()
    assert all(torch.equal(before[name], p) for name, p in trainer.model.named_parameters())


def test_a_folder_without_a_run_cannot_go_on(tmp_path):
    with pytest.raises(TinyGPTError, match="holds no run to go on with"):
        load_run(tmp_path / "nothing")


# --------------------------------------------------------------------------------------------------- the best one

def validate_as(trainer, losses):
    """Lets the validations yield `losses`; returns what the weights were at each."""
    weights, losses = [], iter(losses)

    def validation_loss():
        weights.append({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        return next(losses)
    trainer.validation_loss = validation_loss
    return weights


def kept(trainer):
    return dict(load_checkpoint(trainer.folder, "cpu")[0].named_parameters())


@pytest.mark.parametrize(("patience", "losses", "validations", "best"), [
    (2, [3.0, 2.0, 2.5, 2.6, 1.0, 1.0], 4, 1),  # stops before it would get better
    (2, [3.0, 2.0, 2.5, 1.9, 2.1, 2.2], 6, 3),  # an improvement makes it patient again
    (2, [3.0, 3.0, 3.0, 1.0, 1.0, 1.0], 3, 0),  # as good is not better
    (0, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 6, 0),
    (5, [3.0, 2.0, math.nan, 1.0, 1.5, 1.5], 6, 3)])
def test_early_stopping_keeps_the_best_model(make, patience, losses, validations, best):
    trainer = make(patience=patience, eval_interval=3, epochs=10)
    trainer.total_steps = 18
    weights = validate_as(trainer, losses)
    trainer.start()
    assert len(weights) == validations == len(log(trainer, "validation_loss")) and trainer.step == 3 * validations
    for n, seen in enumerate(weights):
        assert all(torch.equal(seen[name], tensor) for name, tensor in kept(trainer).items()) == (n == best)


def test_patience_outlives_an_interruption(make):
    first, second = (make(patience=3, eval_interval=3, epochs=10) for _ in range(2))
    best = validate_as(first, [2.0, 3.0, 3.0])
    stop_after(first, 8)
    first.start()
    validate_as(second, [3.0, 3.0, 3.0])
    second.resume()
    assert second.step == 12  # validations 2, 3 and 4 were worse than the first
    assert all(torch.equal(best[0][name], tensor) for name, tensor in kept(second).items())


def test_the_model_that_was_trained_chats(make):
    trainer = make(epochs=1)
    trainer.start()
    assert isinstance(generate(*load_checkpoint(trainer.folder, "cpu"), ["Hello!"]), str)


# --------------------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_with_one_sentence(make, value):
    trainer = make()
    train_step = trainer.train_step

    def poisoned_step():
        if trainer.step == 9:
            with torch.no_grad():
                trainer.model.final_norm.bias[0] = value
        return train_step()
    trainer.train_step = poisoned_step
    with pytest.raises(TinyGPTError, match=r"^The loss is (nan|inf) at step 9; start .* lower --lr \(now 0"):
        trainer.start()
    assert load_file(trainer.folder / "state/state.safetensors")["model/final_norm.bias"].isfinite().all()
    make().resume()


def test_a_gradient_that_is_not_finite_spoils_no_state(make):
    """The loss of that step is still a number; it is a step after which the state is saved."""
    trainer = make()
    trainer.model.final_norm.weight.register_hook(
        lambda gradient: gradient * (math.inf if trainer.step == TINY.eval_interval - 1 else 1))
    with pytest.raises(TinyGPTError, match=r"^The gradient's length is (nan|inf) at step 6; start .* lower --lr"):
        trainer.start()
    state = load_file(trainer.folder / "state/state.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())
    make().resume()


def test_fp16_on_a_cpu_is_refused(make):
    with pytest.raises(TinyGPTError, match="precision fp16 needs a GPU"):
        make(precision="fp16")


def test_a_disk_that_fills_up_ends_the_run_with_one_sentence_and_keeps_the_last_state(make, sources):
    """The disk is stood in for by a limit on the size of files, lower than the state's once the optimizer has one."""
    whole, parts = make("whole"), make("parts")
    limited = ("import resource, signal, sys\n"
               "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
               "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))\n"
               "import train\ntrain.run_command(train.main)")
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", limited, *as_flags(TINY), "--data", *sources, "--out",
                           str(parts.folder)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert "cannot be written (File too large)" in error and f"train.py --resume {parts.folder}" in error
    assert not list(parts.folder.rglob(".*"))  # nothing half-written is left
    parts.resume()
    whole.start()
    assert timeless(parts) == timeless(whole) and same_files(parts, whole)


def test_a_folder_that_cannot_be_written_is_named(make, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(TinyGPTError, match=r"file/run cannot be written \(Not a directory\)"):
        make("file/run").start()


def test_a_state_of_another_size_is_refused(make):
    make(epochs=1).start()
    other = make("run", epochs=1)
    other.learner = Learner(replace(other.config, ff_hidden=64))
    with pytest.raises(TinyGPTError, match=r"holds size \(48, 24\) for model blocks.0.ff_in.weight.*\(64, 24\)"):
        other.resume()


def test_data_smaller_than_a_batch_are_one_step_an_epoch(make):
    trainer = make(batch_size=10_000, epochs=3)
    trainer.start()
    assert trainer.step == 3 and log(trainer, "tokens")[-1][0] == 3 * trainer.data.train.learned[:, 1:].sum()


# --------------------------------------------------------------------------------------------------- the same steps

def weights_after(trainer, steps=5):
    losses = [trainer.train_step()[0] for _ in range(steps)]
    return losses, [p.detach().clone() for p in trainer.model.parameters()]


@pytest.mark.parametrize("head", ["adaptive", "tied"])
def test_four_parts_of_eight_rows_are_one_batch_of_32(make, head):
    """ProsocialDialog-like data: rows with few and with many learned tokens must count by token, not by part."""
    settings = {"batch_size": 32, "dropout": 0.0, "replies_only": ("dialogues",), "head": head, "epochs": 10}
    one, four = weights_after(make(**settings)), weights_after(make(**settings, accumulation=4))
    assert four[0] == pytest.approx(one[0], rel=1e-6)
    for ours, theirs in zip(four[1], one[1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_changes_no_bit(make, precision):
    off, on = (weights_after(make(gradient_checkpointing=flag, precision=precision)) for flag in (False, True))
    assert off[0] == on[0] and all(map(torch.equal, off[1], on[1]))


def test_gradient_checkpointing_keeps_less(make):
    """Counts the bytes that the forward pass keeps for the backward pass."""
    kept = {}
    for flag in (False, True):
        trainer, kept[flag] = make(gradient_checkpointing=flag, num_layers=6), 0
        ids, targets = trainer.load(0)[0][0]

        def keep(tensor, flag=flag):
            kept[flag] += tensor.numel() * tensor.element_size()
            return tensor
        trainer.model.train()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            trainer.model(ids, targets)
    assert kept[True] < kept[False] / 2


def test_a_compiler_that_fails_is_named_and_done_without(make, monkeypatch, capsys):
    plain = weights_after(make())

    def broken(module):
        def forward(*_):
            raise torch._dynamo.exc.TorchDynamoException("no C++ compiler\nand much more")
        forward._orig_mod = module
        return forward
    monkeypatch.setattr(torch, "compile", broken)
    compiled = weights_after(make(compile="yes"))
    assert plain[0] == compiled[0] and all(map(torch.equal, plain[1], compiled[1]))
    assert "torch.compile does not work here (TorchDynamoException: no C++ compiler);" in capsys.readouterr().out


def test_the_average_of_the_weights_follows_its_formula(make):
    trainer = make(ema_decay=0.8)
    average = [p.detach().clone() for p in trainer.model.parameters()]
    for step in range(12):
        trainer.train_step()
        decay = min(0.8, (1 + step) / (10 + step))
        average = [decay * a + (1 - decay) * p.detach() for a, p in zip(average, trainer.model.parameters(),
                                                                        strict=True)]
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with trainer.learner.averaged():
        for ours, theirs in zip(trainer.model.parameters(), average, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert all(map(torch.equal, before, trainer.model.parameters()))


@pytest.mark.parametrize(("losses", "averaged"), [([3.0, 2.0], True), ([2.0, 3.0], False)])
def test_the_average_is_saved_where_it_is_better(make, losses, averaged):
    trainer = make(ema_decay=0.9, eval_interval=14, epochs=1)
    trainer.total_steps = 14
    seen = validate_as(trainer, losses)
    trainer.start()
    assert all(torch.equal(seen[averaged][name], tensor) for name, tensor in kept(trainer).items())
    assert log(trainer, "validation_loss", "ema_validation_loss") == [tuple(losses)]


# --------------------------------------------------------------------------------------------------- what is seen

def test_every_validation_logs_replies_and_what_the_heads_do(make):
    trainer = make(epochs=1, eval_interval=100)
    trainer.start()
    lines = log(trainer, "replies", "heads")
    assert len(lines) == len(log(trainer, "validation_loss")) == 1
    assert set(lines[-1][0]) == set(tinygpt.trainer.PROMPTS) and len(lines[-1][0]) == 5
    model, tokenizer = load_checkpoint(trainer.folder, "cpu")
    for prompt, reply in lines[-1][0].items():
        assert reply == generate(model, tokenizer, [prompt], Sampling(seed=0))
    assert set(lines[-1][1]) == {"entropy", "diffuse", "distance", "previous_token", "first_token", "separator",
                                   "induction"}
    assert all(torch.tensor(scores).shape == (2, 2) for scores in lines[-1][1].values())


def test_the_log_has_the_length_of_the_gradient_and_the_memory(make):
    trainer = make(epochs=1, grad_clip=1e-3, dropout=0.0)
    model = TinyGPT(trainer.config)
    model.load_state_dict(trainer.model.state_dict())
    (ids, targets), count = trainer.load(0)[0][0], trainer.load(0)[1]
    (model(ids, targets).sum() / count).backward()
    length = math.sqrt(sum(float((p.grad ** 2).sum()) for p in model.parameters()))
    assert trainer.train_step()[2] == pytest.approx(length, rel=1e-4)
    make("logged", epochs=1).start()
    norm, memory = log(make("logged"), "gradient_norm", "memory_mb")[0]
    assert norm > 0 and 50 < memory < 20_000


def test_the_curves_are_a_page_of_their_own_with_what_the_log_says(make):
    trainer = make(epochs=1)
    trainer.start()
    page = (trainer.folder / "curves.html").read_text()
    assert "validation" in page and "What it says now" in page and "Hello! How are you?" in page
    assert not re.search(r"<(script|link)[^>]+(src|href)=", page)  # nothing is fetched


def test_the_plan_counts_and_measures_and_leaves_nothing(make):
    trainer = make(epochs=2)
    said = tinygpt.trainer.plan(trainer)
    values = {line[:24].strip(): line[24:] for line in said.splitlines()}
    assert values["total"] == f"{sum(p.numel() for p in trainer.model.parameters()):,}"
    assert values["learned tokens an epoch"] == f"{trainer.data.train.learned[:, 1:].sum():,}"
    assert values["steps"] == f"{2 * trainer.steps_per_epoch} (2 epochs of {trainer.steps_per_epoch})"
    assert re.match(r"\d[\d,]* learned tokens a second \(\d+\.\d\d s a step\) on cpu", values["speed"])
    assert re.match(r"0\.0 hours \(\d+\.\d minutes\)", values["time"]) and not trainer.folder.exists()


# --------------------------------------------------------------------------------------------------- optimizers

@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [10, 100, 500])
def test_the_learning_rate_is_that_of_transformers(schedule, warmup):
    transformers = pytest.importorskip("transformers")
    config = replace(TINY, lr=0.02, schedule=schedule, warmup_ratio=warmup / 1_000)
    rates = [learning_rate(step, 1_000, config) for step in range(1_001)]
    assert rates[:warmup] == pytest.approx([0.02 * n / warmup for n in range(1, warmup + 1)])  # never a step at 0
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    lengths = (warmup,) if schedule == "constant" else (warmup, 1_000)
    theirs = getattr(transformers, f"get_{schedule}_schedule_with_warmup")(optimizer, *lengths)
    expected = []
    for _ in range(1_001):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert rates[warmup:] == pytest.approx(expected[warmup:])
    assert max(rates) == pytest.approx(0.02)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_the_learning_rate_stands_any_warmup(ratio, steps):
    rates = [learning_rate(step, steps, replace(TINY, warmup_ratio=ratio)) for step in range(steps)]
    assert all(0 < rate <= TINY.lr for rate in rates) and max(rates) == pytest.approx(TINY.lr)


@OPTIMIZERS
@pytest.mark.parametrize("head", ["adaptive", "tied"])
def test_only_matrices_and_embeddings_are_decayed(optimizer, head):
    model = TinyGPT(replace(TINY, head=head))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for one in make_optimizers(model, replace(TINY, optimizer=optimizer, lr=0.1, weight_decay=0.5)):
        one.step()
    for name, parameter in model.named_parameters():
        factor = 1.0 if name.endswith(".bias") or "norm." in name else 1 - 0.1 * 0.5
        torch.testing.assert_close(parameter.detach(), factor * before[name], atol=1e-6, rtol=1e-5)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = TinyGPT(TINY)
    names = {p: name for name, p in model.named_parameters()}
    optimizers = make_optimizers(model, replace(TINY, optimizer="muon"))
    held = {type(one).__name__: [names[p] for group in one.param_groups for p in group["params"]] for one in optimizers}
    matrices = {f"blocks.{n}.{part}.weight" for n in range(2) for part in (
        "attention.query", "attention.key", "attention.value", "attention.out", "ff_in", "ff_out")}
    assert held.keys() == {"Muon", "AdamW"} and set(held["Muon"]) == matrices
    assert sorted(held["Muon"] + held["AdamW"]) == sorted(names.values())


def test_training_with_adamw_is_the_plain_loop(make):
    trainer = make(batch_size=10_000, epochs=6, dropout=0.0, weight_decay=0.3, grad_clip=0.5, lr=0.01, head="tied")
    model = TinyGPT(trainer.config)
    model.load_state_dict(trainer.model.state_dict())
    ids = torch.tensor(trainer.data.train.ids.astype("int64"))
    learned = torch.tensor(trainer.data.train.learned[:, 1:])
    plain = {p for name, p in model.named_parameters() if name.endswith(".bias") or "norm." in name}
    optimizer = torch.optim.AdamW([{"params": [p for p in model.parameters() if p not in plain], "weight_decay": 0.3},
                                   {"params": list(plain), "weight_decay": 0.0}], betas=(0.9, 0.95))
    for step in range(6):
        loss = F.cross_entropy(model(ids[:, :-1])[learned], ids[:, 1:][learned])
        optimizer.zero_grad()
        loss.backward()
        length = math.sqrt(sum(float((p.grad ** 2).sum()) for p in model.parameters()))
        assert length > 0.5  # long enough to be clipped
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * max(0, step - 1) / 5))  # the first step is the warm-up
        for parameter in model.parameters():
            parameter.grad *= 0.5 / length
        optimizer.step()
        trainer.train_step()
    for (name, ours), theirs in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
