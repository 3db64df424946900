"""Two processes are one run: the same losses, one writer, and a way on when one of them dies."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinygpt import load_checkpoint

ROOT = Path(__file__).parent.parent
SETTINGS = ["--vocab-size=400", "--seq-len=32", "--embed-dim=32", "--num-heads=2", "--num-layers=2", "--ff-hidden=64",
            "--dropout=0", "--optimizer=muon", "--lr=3e-3", "--batch-size=8", "--epochs=0.35", "--eval-interval=8",
            "--eval-rows=9", "--ema-decay=0.9", "--device=cpu", "--precision=fp32", "--data=tests/data"]
DIES = """
import os, signal, sys
sys.argv[0] = "train.py"
import tinygpt.trainer, train
step = tinygpt.trainer.Trainer.train_step
def train_step(self):
    if os.environ["RANK"] == "1" and self.step == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
tinygpt.trainer.Trainer.train_step = train_step
train.run_command(train.main)
"""


def stopped_after(folder, count, *command):
    """Runs a command and tells it to stop when its log has that many lines; what it printed."""
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    while process.poll() is None and (not (folder / "log.jsonl").exists() or len(lines(folder)) < count):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=120)[0]


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=300)


def torchrun(*command):
    return run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("flags", [["--accumulation=2"], ["--shard"]])
def test_two_processes_learn_what_one_does_and_go_on_when_one_has_died(tmp_path, flags):
    script = tmp_path / "dies.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{DIES}")
    alone, both = tmp_path / "alone", tmp_path / "both"
    assert run("train.py", *SETTINGS, "--out", alone).returncode == 0
    died = torchrun(script, *SETTINGS, *flags, "--out", both)
    assert died.returncode and "Process 0 can no longer work with the others" in died.stderr
    assert "in train_step" not in died.stderr  # torchrun shows a traceback, of its own
    done = torchrun("train.py", "--resume", both)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Done: validation loss") == 1
    ours, theirs = lines(both), lines(alone)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] and theirs[-1]["step"] > 30
    for one, other in zip(ours, theirs, strict=True):
        for name in ("tokens", "train_loss", "validation_loss", "ema_validation_loss", "gradient_norm", "lr"):
            tolerance = 2e-3 if name == "gradient_norm" else 1e-4
            assert one.get(name, 0) == pytest.approx(other.get(name, 0), rel=tolerance), name
    models = [load_checkpoint(folder, "cpu")[0] for folder in (both, alone)]
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        assert (ours - theirs).abs().mean() < 1e-3  # AdamW blows up what rounding does to rare tokens
    finished = run("train.py", "--resume", both)  # alone it can go on as well, though there is nothing left to do
    assert finished.returncode == 0, finished.stderr


def test_two_processes_stop_at_the_same_step(tmp_path):
    folder = tmp_path / "run"
    said = stopped_after(folder, 3, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py",
                         *SETTINGS, "--epochs=50", "--out", folder)
    assert said.count("Stopped after step") == 1, said
    assert f"Go on with: torchrun --nproc-per-node=2 train.py --resume {folder}" in said


def test_sharding_alone_is_refused(tmp_path):
    refused = run("train.py", *SETTINGS, "--shard", "--out", tmp_path / "run")
    assert refused.returncode == 2 and "start them with torchrun" in refused.stderr
    assert not (tmp_path / "run").exists()
