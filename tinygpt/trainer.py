"""The training loop: rows in, a checkpoint folder out, resumable from its last saved state.

A step depends on nothing but the weights, the optimizers and its own number: the order of the rows comes from (seed,
epoch) and dropout from (seed, step). So a resumed run needs no random state and goes on as if never stopped.
"""

import json
import math
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tinygpt.checkpoint import read_tensors, save_checkpoint, write_atomically, write_tensors
from tinygpt.config import Config, TinyGPTError, from_json, to_json
from tinygpt.data import Prepared, Rows
from tinygpt.model import IGNORE, TinyGPT, choose_device
from tinygpt.optim import learning_rate, make_optimizers


class Trainer:
    """Trains a TinyGPT on prepared rows and keeps the one with the lowest validation loss in `folder`.

    Writes the checkpoint (see checkpoint.py), log.jsonl with a line every ten steps and every validation, run.json
    (data sources and report), and state/ from which `Trainer.resume` goes on. Raises TinyGPTError if the folder
    already holds a run.
    """

    def __init__(self, config: Config, data: Prepared, folder: str | Path, sources: list[str]):
        self.folder = Path(folder)
        self.config = replace(config, vocab_size=data.tokenizer.vocab_size)
        self.data = data
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(config.precision, self.device)
        torch.manual_seed(config.seed)
        self.model = TinyGPT(self.config).to(self.device)
        self.optimizers = make_optimizers(self.model, self.config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.steps_per_epoch = math.ceil(len(data.train) / config.batch_size)
        self.total_steps = max(1, round(config.epochs * self.steps_per_epoch))
        sources = [str(Path(source).resolve()) if Path(source).exists() else source for source in sources]
        self.run = {"sources": sources, "config": to_json(config), "data": data.report}
        self.step = 0  # steps done
        self.tokens = 0  # tokens learned
        self.best = math.inf  # lowest validation loss so far
        self.worse = 0  # validations since
        self.unlogged = {"loss": 0.0, "tokens": 0, "seconds": 0.0}  # sums since the last line of the log
        self.interrupted = False

    def start(self) -> None:
        """Trains from the beginning."""
        refuse_used(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "run.json", json.dumps(self.run, indent=1).encode())
        self.save_state()  # first, so that a folder that holds a run is always one that can go on
        save_checkpoint(self.folder, self.model, self.data.tokenizer)
        self.fit()

    def resume(self) -> None:
        """Goes on from the state last saved in the folder."""
        tensors, metadata = read_tensors(self.folder / "state" / "state.safetensors")
        saved = json.loads(metadata["position"])
        if saved["data"] != self.data.fingerprint:
            raise TinyGPTError(f"The data of {self.folder} has changed since its state was saved; put it back as it "
                               "was, or start a new run.")
        self.step, self.tokens, self.worse = saved["step"], saved["tokens"], saved["worse"]
        self.best = saved["best"] if saved["best"] is not None else math.inf
        self.unlogged = saved["unlogged"]
        if saved["scaler"] and self.scaler.is_enabled():  # a run may go on where the arithmetic is another
            self.scaler.load_state_dict(saved["scaler"])
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(tensors[f"model/{name}"])
                for optimizer in self.optimizers:
                    prefix = f"optimizer/{name}/"
                    held = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                    if held and any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                        optimizer.state[parameter] = {key: value.to(self.device) for key, value in held.items()}
        log = self.folder / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # the last one may have been cut off
        write_atomically(log, "".join(line for line in whole if json.loads(line)["step"] <= self.step).encode())
        del tensors
        self.fit()

    def save_state(self) -> None:
        """Everything that the next step depends on, in one file."""
        tensors = {f"model/{name}": p.detach().cpu() for name, p in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer/{name}/{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
        position = {"step": self.step, "tokens": self.tokens, "worse": self.worse,
                    "unlogged": self.unlogged, "scaler": self.scaler.state_dict(),
                    "best": self.best if math.isfinite(self.best) else None,
                    "data": self.data.fingerprint}
        (self.folder / "state").mkdir(exist_ok=True)
        write_tensors(self.folder / "state" / "state.safetensors", tensors, {"position": json.dumps(position)})

    # ------------------------------------------------------------------------------------------------- the loop

    def fit(self) -> None:
        """Steps until the epochs are over, validation stops improving, or Ctrl-C."""
        previous = {number: signal.signal(number, self.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with tqdm(total=self.total_steps, initial=self.step, unit="step", dynamic_ncols=True) as bar:
                self.loop(bar)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.interrupted:
            self.save_state()
            print(f"Stopped after step {self.step:,}. Go on with: python train.py --resume {self.folder}")
        else:
            print(f"Done: validation loss {self.best:.3f} nats a token (perplexity {math.exp(self.best):.1f}). "
                  f"Chat with it: python -m tinygpt.chat {self.folder}")

    def loop(self, bar: tqdm) -> None:
        config = self.config
        while self.step < self.total_steps and not self.interrupted:
            if config.patience and self.worse >= config.patience:
                print(f"\nNo better validation loss for {self.worse} validations: stopped early at step {self.step:,}.")
                return
            started = time.perf_counter()
            loss, count, rate = self.train_step()
            for name, value in (("loss", loss), ("tokens", count), ("seconds", time.perf_counter() - started)):
                self.unlogged[name] += value
            bar.update()
            if self.step % 10 == 0 or self.step == self.total_steps:
                loss = self.unlogged["loss"] / max(1, self.unlogged["tokens"])
                speed = self.unlogged["tokens"] / self.unlogged["seconds"]
                self.log(train_loss=loss, lr=rate, tokens_per_second=round(speed))
                best = f"best validation {self.best:.3f}, " if math.isfinite(self.best) else ""
                bar.set_postfix_str(f"loss {loss:.3f}, {best}{speed:,.0f} tokens/s")
                self.unlogged = dict.fromkeys(self.unlogged, 0)
            if self.step % config.eval_interval == 0 or self.step == self.total_steps:
                self.check()

    def train_step(self) -> tuple[float, int, float]:
        """One optimizer step. Returns the summed loss in nats, the tokens learned, and the learning rate."""
        config = self.config
        epoch, batch = divmod(self.step, self.steps_per_epoch)
        order = np.random.default_rng((config.seed, epoch)).permutation(len(self.data.train))
        ids, targets = self.batch(self.data.train, order[batch * config.batch_size:(batch + 1) * config.batch_size])
        count = int((targets != IGNORE).sum())
        rate = learning_rate(self.step, self.total_steps, config)
        torch.manual_seed((config.seed * 1_000_003 + self.step) % 2**63)  # this step's dropout
        self.model.train()
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(ids, targets).sum() / max(1, count)
        if not torch.isfinite(loss):
            raise TinyGPTError(f"The loss is {loss.item()} at step {self.step:,}; start again in another --out with a "
                               f"lower --lr (now {config.lr}) or --precision fp32. {self.folder} keeps the best model "
                               "so far.")
        self.scaler.scale(loss).backward()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        for optimizer in self.optimizers:
            if not self.scaler.is_enabled() or torch.isfinite(norm):  # fp16 overflowed: no optimizer may step
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        self.step += 1
        self.tokens += count
        return loss.item() * count, count, rate

    def batch(self, rows: Rows, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """Rows by number -> ids (B, T) and targets (B, T), the next tokens, -100 where not learned."""
        ids = torch.from_numpy(rows.ids[numbers].astype(np.int64))  # (B, T + 1)
        targets = torch.where(torch.from_numpy(rows.learned[numbers]), ids, IGNORE)
        return ids[:, :-1].to(self.device), targets[:, 1:].to(self.device)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean loss in nats over the learned tokens of the validation rows, without dropout."""
        rows, config = self.data.validation, self.config
        count = min(len(rows), config.eval_rows or len(rows))
        numbers = np.linspace(0, len(rows) - 1, count).round().astype(int)
        self.model.eval()
        losses, learned = 0.0, 0
        for start in tqdm(range(0, count, config.batch_size), "validation", leave=False, delay=1):
            ids, targets = self.batch(rows, numbers[start:start + config.batch_size])
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                losses += self.model(ids, targets).sum().item()
            learned += int((targets != IGNORE).sum())
        return losses / max(1, learned)

    def check(self) -> None:
        """Validates, keeps the model if it is the best so far, and saves the state."""
        loss = self.validation_loss()
        self.worse = 0 if loss < self.best else self.worse + 1
        if loss < self.best:
            self.best = loss
            save_checkpoint(self.folder, self.model, self.data.tokenizer)
        self.log(validation_loss=loss, validation_perplexity=math.exp(min(loss, 50)))
        self.save_state()

    def log(self, **values: float) -> None:
        line = {"step": self.step, "epoch": round(self.step / self.steps_per_epoch, 3), "tokens": self.tokens, **values}
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def interrupt(self, number: int, frame: object) -> None:
        """First Ctrl-C: the step is finished and the state saved. Second: out at once."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What the blocks compute in: bf16 on CUDA that has it, fp16 on older CUDA (a T4), fp32 elsewhere."""
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if precision == "fp16" and device.type == "cpu":
        raise TinyGPTError("precision fp16 needs a GPU; take fp32, or bf16 if your CPU has it.")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def refuse_used(folder: str | Path) -> None:
    """Raises TinyGPTError if `folder` already holds a run or a checkpoint."""
    if any((Path(folder) / name).exists() for name in ("config.json", "state/state.safetensors")):
        raise TinyGPTError(f"{folder} already holds a run; go on with --resume {folder}, or give another --out.")


def load_run(folder: str | Path) -> tuple[Config, list[str]]:
    """Config as it was asked for and data sources of a run that can go on. Raises TinyGPTError if there is none."""
    folder = Path(folder)
    if not (folder / "state" / "state.safetensors").exists() or not (folder / "run.json").exists():
        raise TinyGPTError(f"{folder} holds no run to go on with (no state/state.safetensors); start one in a "
                           "folder of its own with python train.py --out FOLDER.")
    path = folder / "run.json"
    try:
        run = json.loads(path.read_text())
        return from_json(run["config"], str(path)), list(run["sources"])
    except (ValueError, KeyError, TypeError):
        raise TinyGPTError(f"{path} is damaged, so the run cannot go on; put back the file that train.py wrote, or "
                           "start a new run.") from None
