"""Chat in a terminal: python -m tinygpt.chat [FOLDER]"""

import sys
from pathlib import Path

import tyro

from tinygpt.checkpoint import load_checkpoint
from tinygpt.config import run_command
from tinygpt.generate import fit_prompt, stream
from tinygpt.quantize import int8
from tinygpt.sampling import Sampling
from tinygpt.tokenizer import normalize


def chat(folder: Path = Path("checkpoints/tinygpt-chat"), /, device: str = "auto",
         sampling: Sampling = Sampling()) -> None:
    """Chat with a trained TinyGPT in the terminal.

    Args:
        folder: Checkpoint folder, as train.py writes it.
        device: cpu, cuda, mps; auto takes the fastest one present.
        sampling: How replies are drawn.
    """
    model, tokenizer = load_checkpoint(folder, device)
    model = int8(model)
    for channel in (sys.stdin, sys.stdout):  # what is not text there must not end the conversation
        channel.reconfigure(errors="replace")
    print("Say something. An empty line starts a new conversation; Ctrl-D or Ctrl-C leaves.")
    turns: list[str] = []
    while True:
        try:
            message = normalize(input("You: " if sys.stdin.isatty() else ""))
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not message:
            turns = []
            print("(a new conversation)")
            continue
        turns.append(message)
        read = fit_prompt(model, tokenizer, turns, sampling)
        if read.dropped_tokens:
            print("(too long: it reads only the end of your message)")
        elif read.dropped_turns:
            print(f"(it no longer sees the first {read.dropped_turns} turns)")
        print("Bot: ", end="", flush=True)
        reply = ""
        try:
            for step in stream(model, tokenizer, turns, sampling):
                reply += step.text
                print(step.text, end="", flush=True)
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        print()
        turns.append(reply)


def main() -> None:
    run_command(lambda: tyro.cli(chat, prog="python -m tinygpt.chat", config=(tyro.conf.OmitArgPrefixes,)))


if __name__ == "__main__":
    main()
