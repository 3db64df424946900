"""Training speed and memory beside nanoGPT's model code: same sizes, batch, precision and optimizer, in one run.

    git clone https://github.com/karpathy/nanoGPT
    python tests/benchmarks/training_speed.py nanoGPT --precision fp32

Each model lives in a process of its own and they take turns, a step each, so that what else the machine does falls on
all alike. A step is forward, backward, clipping and AdamW (fused) on 32 rows of 128 tokens, drawn so that an id is as
frequent as its rank says (Zipf); dropout is off. With bf16, autocast computes nanoGPT's logits in bf16 too; TinyGPT's
are fp32.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from tinygpt.trainer import memory_in_use

ROWS, TOKENS, VOCABULARY = 32, 128, 32_000
NAMES = ("nanoGPT", "TinyGPT, tied head", "TinyGPT, adaptive head")


def nanogpt_step(checkout: Path, precision: str):
    sys.path.insert(0, str(checkout))
    from model import GPT, GPTConfig

    model = GPT(GPTConfig(block_size=TOKENS, vocab_size=VOCABULARY, n_layer=8, n_head=6, n_embd=384, dropout=0.0,
                          bias=True))
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}],
                                  lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step(ids, targets, number):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            _, loss = model(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def tinygpt_step(head: str, precision: str):
    from tinygpt.config import Config
    from tinygpt.learner import Learner

    learner = Learner(Config(vocab_size=VOCABULARY, seq_len=TOKENS, head=head, dropout=0.0, device="cpu",
                             precision=precision))
    return lambda ids, targets, number: learner.step([(ids, targets)], targets.numel(), 1e-4, number)


def work(name: str, checkout: Path, precision: str) -> None:
    """A step for every line on stdin; answers with its seconds and the megabytes taken so far."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a model prints goes elsewhere
    step = nanogpt_step(checkout, precision) if name == NAMES[0] else tinygpt_step(
        "tied" if "tied" in name else "adaptive", precision)
    dice = torch.Generator().manual_seed(0)
    often = 1 / torch.arange(1, VOCABULARY + 1)
    for number, _ in enumerate(sys.stdin):
        rows = torch.multinomial(often, ROWS * (TOKENS + 1), replacement=True, generator=dice).view(ROWS, TOKENS + 1)
        ids, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
        started = time.perf_counter()
        step(ids, targets, number)
        seconds = time.perf_counter() - started
        print(seconds, memory_in_use(torch.device("cpu")), file=answers, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not (arguments.checkout / "model.py").is_file():
        parser.error(f"{arguments.checkout} is no nanoGPT checkout: it has no model.py")
    if arguments.worker:
        return work(arguments.worker, arguments.checkout, arguments.precision)
    command = [sys.executable, __file__, str(arguments.checkout), "--precision", arguments.precision, "--worker"]
    workers = {name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
               for name in NAMES}
    seconds, memory = {name: [] for name in NAMES}, {}
    for turn in range(arguments.steps + 2):  # the first two warm up
        for name, worker in workers.items():
            worker.stdin.write("step\n")
            worker.stdin.flush()
            taken, memory[name] = map(float, worker.stdout.readline().split())
            if turn >= 2:
                seconds[name].append(taken)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    peer = seconds[NAMES[0]]
    print(f"{arguments.precision}, {torch.get_num_threads()} threads, torch {torch.__version__}, medians of "
          f"{arguments.steps} steps\n\n| | s a step | tokens/s | x nanoGPT (median of pairs) | peak MB |\n"
          "|---|---:|---:|---:|---:|")
    for name in NAMES:
        median = statistics.median(seconds[name])
        ratio = statistics.median(a / b for a, b in zip(peer, seconds[name], strict=True))
        print(f"| {name} | {median:.2f} | {ROWS * TOKENS / median:,.0f} | {ratio:.2f} | {memory[name]:,.0f} |")


if __name__ == "__main__":
    main()
