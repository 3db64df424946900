"""A conversation in a few lines: python examples/interactive_chat.py"""

import contextlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that it runs from any folder, without installing anything

from tinygpt import Sampling, load_checkpoint, stream  # noqa: E402
from tinygpt.tokenizer import normalize  # noqa: E402

model, tokenizer = load_checkpoint(ROOT / "checkpoints" / "tinygpt-chat")
turns = []
print("Say something; an empty line ends the conversation.")
with contextlib.suppress(EOFError, KeyboardInterrupt):
    while message := normalize(input("User: ")):
        turns.append(message)
        reply = ""
        print("Bot: ", end="", flush=True)
        for step in stream(model, tokenizer, turns, Sampling(temperature=0.7)):
            reply += step.text
            print(step.text, end="", flush=True)
        print()
        turns.append(reply)
