"""Train a TinyGPT: python train.py --preset chat --data dailydialog prosocial_dialog --out checkpoints/mine"""

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from tinygpt import parallel
from tinygpt.checkpoint import load_config
from tinygpt.config import PRESETS, SIZES, Config, TinyGPTError, run_command
from tinygpt.data import Prepared, prepare
from tinygpt.learner import choose_dtype
from tinygpt.tokenizer import Tokenizer
from tinygpt.trainer import Trainer, load_run, plan, refuse_used


@dataclass(frozen=True)
class Command:
    """Train a TinyGPT on dialogues.

    Every setting of the model and its training is a flag; those not given come from the preset.
    """

    config: Annotated[Config, tyro.conf.arg(name="")]
    preset: str = "reference"
    """Where settings not given come from: reference (the plain recipe), chat (the one behind the
    bundled model), nano (seconds on a CPU)."""
    data: list[str] = field(default_factory=lambda: ["dailydialog", "prosocial_dialog"])
    """JSON-lines files, folders of them (train.jsonl, validation.jsonl), or Hugging Face Hub sets."""
    out: Path = Path("checkpoints/run")
    """Folder for the checkpoint, the log and the resumable state."""
    init: Path | None = None
    """Start from this checkpoint's weights, with its sizes and its tokenizer, instead of from nothing."""
    resume: Path | None = None
    """Go on with the run in this folder; every setting comes from there, so give no other flag."""
    plan: bool = False
    """Train nothing; print parameters, tokens, memory and the time that a few measured steps foretell."""


def main() -> None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="reference")
    preset = first.parse_known_args()[0].preset
    if preset not in PRESETS:
        raise TinyGPTError(f"preset is {preset!r}; give one of {', '.join(PRESETS)}.")
    given = Command(PRESETS[preset], preset=preset)
    command = tyro.cli(Command, default=given, prog="train.py")
    if command.resume and (replace(command, resume=None) != given or preset != "reference"):
        raise TinyGPTError("--resume takes every setting from the run it goes on with; leave out the other flags, or "
                           "start a new run with them.")
    config, sources, init = command.config, command.data, command.init
    if command.resume:
        config, sources, init = load_run(command.resume)
    elif init:
        config = sized_like(load_config(init), config, PRESETS[preset])
    if not command.resume and not command.plan:
        refuse_used(command.out)
    with parallel.joined(config.device):
        if config.shard and parallel.world_size() == 1 and not command.resume:
            raise TinyGPTError("--shard spreads the parameters over several processes; start them with torchrun "
                               "--nproc-per-node=N train.py ..., or leave it out.")
        choose_dtype(config.precision, parallel.own_device(config.device))  # before minutes of preparation
        tokenizer = Tokenizer.load((command.resume or init) / "tokenizer.model") if init else None  # the run has a copy
        data = prepare_once(sources, config, tokenizer)
        trainer = Trainer(config, data, command.resume or command.out, sources, init)
        if command.plan:
            foretold = plan(trainer)
            if trainer.writes:
                print(foretold)
        elif command.resume:
            trainer.resume()
        else:
            trainer.start()


def sized_like(init: Config, config: Config, preset: Config) -> Config:
    """`config` with the sizes of the checkpoint to start from. Raises TinyGPTError for a size asked for otherwise."""
    sizes = {name: getattr(init, name) for name in SIZES}
    asked = [name for name in SIZES if getattr(config, name) not in (getattr(preset, name), sizes[name])]
    if asked:
        raise TinyGPTError(f"--init takes the sizes of its checkpoint ({asked[0]} {sizes[asked[0]]}, not "
                           f"{getattr(config, asked[0])}); leave out --{asked[0].replace('_', '-')}, or start without "
                           "--init.")
    return replace(config, **sizes)


def prepare_once(sources: list[str], config: Config, tokenizer: Tokenizer | None) -> Prepared:
    """The first process prepares the data, the others then open it."""
    if parallel.rank():
        parallel.barrier()
    data = prepare(sources, config, tokenizer)
    if not parallel.rank():
        parallel.barrier()
    return data


if __name__ == "__main__":
    run_command(main)
