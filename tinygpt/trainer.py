"""The training loop: rows in, a checkpoint folder out, resumable from its last saved state.

A step depends on nothing but the weights, the optimizers and its own number: the order of the rows comes from (seed,
epoch) and dropout from (seed, step). So a resumed run needs no random state and goes on as if never stopped.
"""

import json
import math
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tinygpt import parallel
from tinygpt.attention import head_scores
from tinygpt.checkpoint import load_checkpoint, read_tensors, save_checkpoint, write_atomically, write_tensors
from tinygpt.config import Config, TinyGPTError, from_json, to_json
from tinygpt.data import Prepared, Rows
from tinygpt.figures import training_page
from tinygpt.generate import generate
from tinygpt.learner import Learner, Part
from tinygpt.model import IGNORE, TinyGPT, count_parameters
from tinygpt.optim import learning_rate
from tinygpt.sampling import Sampling

PROMPTS = ("Hello! How are you?", "What do you like to do on weekends?", "I had a bad day at work.",
           "Where should we eat tonight?", "I want to hit my brother.")  # answered at every validation


class Trainer:
    """Trains a TinyGPT on prepared rows and keeps the one with the lowest validation loss in `folder`.

    Writes the checkpoint (see checkpoint.py), log.jsonl with a line every ten steps and every validation, curves.html,
    run.json (data sources and report), and state/ from which `Trainer.resume` goes on. `init` is a checkpoint of the
    same sizes and tokenizer whose weights `start` begins with. The processes that torchrun starts share every batch,
    and the first one writes. Raises TinyGPTError if the folder already holds a run.
    """

    def __init__(self, config: Config, data: Prepared, folder: str | Path, sources: list[str],
                 init: Path | None = None):
        self.folder = Path(folder)
        self.config = replace(config, vocab_size=data.tokenizer.vocab_size)
        self.data = data
        self.learner = Learner(self.config)
        self.model, self.device = self.learner.model, self.learner.device
        self.steps_per_epoch = math.ceil(len(data.train) / config.batch_size)
        self.total_steps = max(1, round(config.epochs * self.steps_per_epoch))
        sources = [str(Path(source).resolve()) if Path(source).exists() else source for source in sources]
        self.init = init
        self.run = {"sources": sources, "init": str(init.resolve()) if init else None, "config": to_json(config),
                    "data": data.report}
        self.writes = parallel.rank() == 0
        self.step = 0  # steps done
        self.tokens = 0  # tokens learned
        self.best = math.inf  # lowest validation loss so far
        self.worse = 0  # validations since
        self.unlogged = {"loss": 0.0, "tokens": 0, "seconds": 0.0}  # sums since the last line of the log
        self.prefetched: tuple[list[Part], int] | None = None  # the next step's batch
        self.interrupted = False  # a signal reached this process
        self.stopping = False  # one reached any of them

    def start(self) -> None:
        """Trains from the beginning, or from the weights of `init`."""
        refuse_used(self.folder)
        if self.init:
            model, _ = load_checkpoint(self.init, "cpu")
            self.learner.begin_with(model)
        parallel.barrier()  # no process writes before all have looked
        try:
            if self.writes:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(self.folder / "run.json", json.dumps(self.run, indent=1).encode())
                write_atomically(self.folder / "tokenizer.model", self.data.tokenizer.model)
            self.save_state()  # first, so that a folder that holds a run is always one that can go on
            self.save_model()
        except OSError as error:
            raise TinyGPTError(f"{self.folder} cannot be written ({error.strerror}); give another --out, or make room "
                               "or give access there.") from None
        self.fit()

    def resume(self) -> None:
        """Goes on from the state last saved in the folder."""
        self.load_state()
        parallel.barrier()  # no process writes before all have read
        if self.writes:
            log = self.folder / "log.jsonl"
            lines = log.read_text().splitlines(keepends=True) if log.exists() else []
            whole = [line for line in lines if line.endswith("\n")]  # the last one may have been cut off
            write_atomically(log, "".join(line for line in whole if json.loads(line)["step"] <= self.step).encode())
        self.fit()

    # ------------------------------------------------------------------------------------------------- the loop

    def fit(self) -> None:
        """Steps until the epochs are over, validation stops improving, or Ctrl-C."""
        size = parallel.world_size()
        program = "python" if size == 1 else f"torchrun --nproc-per-node={size}"
        go_on = f"{program} train.py --resume {self.folder}"
        previous = {number: signal.signal(number, self.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with tqdm(total=self.total_steps, initial=self.step, unit="step", dynamic_ncols=True,
                      disable=not self.writes) as bar:
                self.loop(bar)
            if self.stopping:
                self.save_state()
        except OSError as error:
            raise TinyGPTError(f"{error.filename or self.folder} cannot be written ({error.strerror}); the last good "
                               f"model and state are kept. Make room or give access, then: {go_on}") from None
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.stopping:
            self.say(f"Stopped after step {self.step:,}. Go on with: {go_on}")
        else:
            self.say(f"Done: validation loss {self.best:.3f} nats a token (perplexity {math.exp(self.best):.1f}). "
                     f"Chat with it: python -m tinygpt.chat {self.folder}")

    def loop(self, bar: tqdm) -> None:
        config = self.config
        while self.step < self.total_steps and not self.stopping:
            if config.patience and self.worse >= config.patience:
                self.say(f"No better validation loss for {self.worse} validations: stopped early at step "
                         f"{self.step:,}.")
                return
            started = time.perf_counter()
            loss, count, norm = self.train_step()
            for name, value in (("loss", loss), ("tokens", count), ("seconds", time.perf_counter() - started)):
                self.unlogged[name] += value
            bar.update()
            if self.step % 10 == 0 or self.step == self.total_steps:
                loss = self.unlogged["loss"] / max(1, self.unlogged["tokens"])
                speed = self.unlogged["tokens"] / self.unlogged["seconds"]
                self.log(train_loss=loss, lr=learning_rate(self.step - 1, self.total_steps, config),
                         gradient_norm=norm, tokens_per_second=round(speed), memory_mb=memory_in_use(self.device))
                best = f"best validation {self.best:.3f}, " if math.isfinite(self.best) else ""
                bar.set_postfix_str(f"loss {loss:.3f}, {best}{speed:,.0f} tokens/s")
                self.unlogged = dict.fromkeys(self.unlogged, 0)
            if self.step % config.eval_interval == 0 or self.step == self.total_steps:
                self.check()

    def train_step(self) -> tuple[float, int, float]:
        """One optimizer step. Returns the summed loss in nats, the tokens learned, and the gradient's length."""
        parts, count = self.prefetched or self.load(self.step)
        rate = learning_rate(self.step, self.total_steps, self.config)
        nats, norm = self.learner.step(parts, count, rate, self.step)
        self.prefetched = self.load(self.step + 1) if self.step + 1 < self.total_steps else None
        nats, interruptions = parallel.total(self.device, nats, self.interrupted)  # waits for the device
        norm = float(norm)
        if not math.isfinite(nats) or not (math.isfinite(norm) or self.learner.scaler.is_enabled()):
            what = f"loss is {nats}" if not math.isfinite(nats) else f"gradient's length is {norm}"
            raise TinyGPTError(f"The {what} at step {self.step:,}; start again in another --out with a lower --lr (now "
                               f"{self.config.lr}) or --precision fp32. {self.folder} keeps the best model so far.")
        self.stopping = interruptions > 0
        self.step += 1
        self.tokens += count
        return nats, count, norm

    def load(self, step: int) -> tuple[list[Part], int]:
        """This process's share of that step's batch, part by part, and the tokens learned in the whole batch."""
        rows, config = self.data.train, self.config
        epoch, batch = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((config.seed, epoch)).permutation(len(rows))
        numbers = order[batch * config.batch_size:(batch + 1) * config.batch_size]
        parts = np.array_split(numbers, min(config.accumulation, len(numbers)))
        return [self.batch(rows, part) for part in parts], int(rows.learned[numbers, 1:].sum())

    def batch(self, rows: Rows, numbers: np.ndarray) -> Part:
        """This process's share of the rows of these numbers -> ids (B, T) and targets (B, T), the next tokens, -100
        where not learned.
        """
        mine = parallel.share(numbers)
        given = mine if len(mine) else numbers[:1]  # nothing to learn in it, but every process takes every step
        ids = torch.from_numpy(rows.ids[given].astype(np.int64))  # (B, T + 1)
        targets = torch.where(torch.from_numpy(rows.learned[given]) & bool(len(mine)), ids, IGNORE)
        pair = ids[:, :-1].contiguous(), targets[:, 1:].contiguous()
        early = self.device.type == "cuda"  # copied while the GPU computes, which takes pinned memory
        if early:
            pair = pair[0].pin_memory(), pair[1].pin_memory()
        return pair[0].to(self.device, non_blocking=early), pair[1].to(self.device, non_blocking=early)

    def say(self, text: str) -> None:
        if self.writes:
            tqdm.write(text)

    def interrupt(self, number: int, frame: object) -> None:
        """First Ctrl-C: the step is finished and the state saved. Second: out at once."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    # ------------------------------------------------------------------------------------------------- validation

    def check(self) -> None:
        """Validates, keeps the model (or its average) if it is the best so far, and saves the state."""
        losses = {"validation_loss": self.validation_loss()}
        if self.learner.average:
            with self.learner.averaged():
                losses["ema_validation_loss"] = self.validation_loss()
        best = min(losses, key=losses.get)
        self.worse = 0 if losses[best] < self.best else self.worse + 1
        if losses[best] < self.best:
            self.best = losses[best]
            if best == "validation_loss":
                self.save_model()
            else:
                with self.learner.averaged():
                    self.save_model()
        model = self.learner.whole_model()
        if self.writes:
            perplexity = math.exp(min(losses["validation_loss"], 50))
            self.log(**losses, validation_perplexity=perplexity, replies=self.replies(model), heads=self.heads(model))
        self.save_state()

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss in nats over the learned tokens of the validation rows, without dropout."""
        rows, size = self.data.validation, self.config.batch_size
        numbers = spaced(len(rows), self.config.eval_rows or len(rows))
        self.model.eval()
        nats, learned = 0.0, 0
        for start in tqdm(range(0, len(numbers), size), "validation", leave=False, delay=1, disable=not self.writes):
            ids, targets = self.batch(rows, numbers[start:start + size])
            with self.learner.autocast():
                nats += self.model(ids, targets).sum().item()
            learned += int((targets != IGNORE).sum())
        nats, learned = parallel.total(self.device, nats, learned)
        return nats / max(1, learned)

    def replies(self, model: TinyGPT) -> dict[str, str]:
        """What the model answers to `PROMPTS`, also shown."""
        replies = {prompt: generate(model, self.data.tokenizer, [prompt], Sampling(seed=0)) for prompt in PROMPTS}
        for prompt, reply in replies.items():
            self.say(f"  {prompt} -> {reply}")
        return replies

    def heads(self, model: TinyGPT) -> dict[str, list[list[float]]]:
        """The scores of every head, a list a layer, on validation rows."""
        rows = self.data.validation.ids
        ids = torch.from_numpy(rows[spaced(len(rows), 16), :-1].astype(np.int64))
        return {name: [[round(head, 4) for head in layer] for layer in scores.tolist()]
                for name, scores in head_scores(model, ids.to(next(model.parameters()).device)).items()}

    # ------------------------------------------------------------------------------------------------- files

    def log(self, **values: object) -> None:
        if not self.writes:
            return
        line = {"step": self.step, "epoch": round(self.step / self.steps_per_epoch, 3), "tokens": self.tokens, **values}
        line = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                for name, value in line.items()}  # JSON knows no infinity
        path = self.folder / "log.jsonl"
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
        if "validation_loss" in values or self.step == 10:
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            write_atomically(self.folder / "curves.html", training_page(lines, self.folder.name).encode())

    def save_model(self) -> None:
        model = self.learner.whole_model()
        if self.writes:
            save_checkpoint(self.folder, model, self.data.tokenizer)

    def save_state(self) -> None:
        """Everything that the next step depends on, in one file."""
        tensors = self.learner.tensors()
        position = {"step": self.step, "tokens": self.tokens, "worse": self.worse,
                    "unlogged": self.unlogged, "scaler": self.learner.scaler.state_dict(),
                    "best": self.best if math.isfinite(self.best) else None,
                    "data": self.data.fingerprint}
        if self.writes:
            (self.folder / "state").mkdir(exist_ok=True)
            write_tensors(self.folder / "state" / "state.safetensors", tensors, {"position": json.dumps(position)})

    def load_state(self) -> None:
        """Takes up what `save_state` wrote. Raises TinyGPTError for other data or sizes."""
        tensors, metadata = read_tensors(self.folder / "state" / "state.safetensors")
        saved = json.loads(metadata["position"])
        if saved["data"] != self.data.fingerprint:
            raise TinyGPTError(f"The data of {self.folder} has changed since its state was saved; put it back as it "
                               "was, or start a new run.")
        self.learner.load_tensors(tensors)
        if saved["scaler"] and self.learner.scaler.is_enabled():  # a run may go on where the arithmetic is another
            self.learner.scaler.load_state_dict(saved["scaler"])
        self.step, self.tokens, self.worse = saved["step"], saved["tokens"], saved["worse"]
        self.best = saved["best"] if saved["best"] is not None else math.inf
        self.unlogged = saved["unlogged"]


def spaced(length: int, wanted: int) -> np.ndarray:
    """`wanted` positions, or all, spread evenly over `length`."""
    return np.linspace(0, length - 1, min(length, wanted)).round().astype(int)


def memory_in_use(device: torch.device) -> int | None:
    """Megabytes: the most so far, on CUDA of tensors, on a CPU of the process (None on Windows, where Python does not
    know it); on MPS what is held now.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() // 2**20
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)


def plan(trainer: Trainer, timed_steps: int = 3) -> str:
    """What the run would take, measured on a few steps that leave nothing behind in its folder; `trainer`'s weights
    have moved, so it is of no more use.
    """
    config, data = trainer.config, trainer.data
    trainer.train_step()  # the first one is slower
    started, tokens = time.perf_counter(), trainer.tokens
    for _ in range(timed_steps):
        trainer.train_step()
    seconds = (time.perf_counter() - started) / timed_steps
    speed = (trainer.tokens - tokens) / timed_steps / seconds
    weights = sum(p.numel() for p in trainer.model.parameters())
    state = sum(tensor.numel() * tensor.element_size() for tensor in trainer.learner.tensors().values())
    hours = trainer.total_steps * seconds / 3600
    measured = memory_in_use(trainer.device)
    rows = [*((name, f"{count:,}") for name, count in count_parameters(trainer.model).items()),
            ("", ""),
            ("rows an epoch", f"{len(data.train):,} of {config.seq_len} tokens, {data.train.padding:.1%} padding"),
            ("learned tokens an epoch", f"{int(data.train.learned[:, 1:].sum()):,}"),
            ("steps", f"{trainer.total_steps:,} ({config.epochs:g} epochs of {trainer.steps_per_epoch:,})"),
            ("memory", f"{(state + 4 * weights) / 2**20:,.0f} MB for weights, averages, gradients and optimizer"
                       + (f"; {measured:,} MB measured in all" if measured else "")),
            ("speed", f"{speed:,.0f} learned tokens a second ({seconds:.2f} s a step) on {trainer.device}"),
            ("time", f"{hours:.1f} hours ({hours * 60:.1f} minutes), validations not counted")]
    return "\n".join(f"{name:<24}{value}".rstrip() for name, value in rows)


def refuse_used(folder: str | Path) -> None:
    """Raises TinyGPTError if `folder` already holds a run or a checkpoint."""
    if any((Path(folder) / name).exists() for name in ("config.json", "state/state.safetensors")):
        raise TinyGPTError(f"{folder} already holds a run; go on with --resume {folder}, or give another --out.")


def load_run(folder: str | Path) -> tuple[Config, list[str], Path | None]:
    """Config as it was asked for, data sources, and the checkpoint it began with, of a run that can go on. Raises
    TinyGPTError if there is none.
    """
    folder = Path(folder)
    if not (folder / "state" / "state.safetensors").exists() or not (folder / "run.json").exists():
        raise TinyGPTError(f"{folder} holds no run to go on with (no state/state.safetensors); start one in a "
                           "folder of its own with python train.py --out FOLDER.")
    path = folder / "run.json"
    try:
        run = json.loads(path.read_text())
        config, sources, init = from_json(run["config"], str(path)), list(run["sources"]), run.get("init")
        return config, sources, Path(init) if init else None
    except (ValueError, KeyError, TypeError):
        raise TinyGPTError(f"{path} is damaged, so the run cannot go on; put back the file that train.py wrote, or "
                           "start a new run.") from None
