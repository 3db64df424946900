"""Speed of replies beside nanoGPT and transformers' GPT-2 of the same sizes, and of 16 chats at once, in one run.

    git clone https://github.com/karpathy/nanoGPT
    python tests/benchmarks/generation_speed.py nanoGPT

Weights are random, the prompt has 24 tokens, each reply 100, temperature 0.7, top-k 40; the contenders take turns.
"""

import argparse
import multiprocessing
import statistics
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from tinygpt.config import Config
from tinygpt.engine import Engine
from tinygpt.generate import Decoder, Reply
from tinygpt.model import TinyGPT
from tinygpt.quantize import int8
from tinygpt.sampling import Sampling
from tinygpt.tokenizer import Prompt

VOCABULARY, SEQ_LEN, PROMPT, NEW = 32_000, 128, 24, 100
IDS = torch.randint(7, VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
PLAIN = Sampling(temperature=0.7, top_k=40, top_p=1, repetition_penalty=1, max_new_tokens=NEW, seed=0)


class NoText:
    """Stands in for the tokenizer, so that random tokens need no decoding; ours decodes in some 0.1 ms a token."""

    def encode_prompt(self, prompt, room):
        return Prompt(list(IDS))

    def decode(self, ids):
        return ""


def never_ending(head: str) -> TinyGPT:
    """A model of random weights that does not end its reply before it is long enough."""
    model = TinyGPT(Config(vocab_size=VOCABULARY, seq_len=SEQ_LEN, head=head)).eval()
    logits = model.logits
    model.logits = lambda hidden: logits(hidden).index_fill_(-1, torch.tensor([3, 4]), -torch.inf)
    return model


def nanogpt(checkout: Path):
    sys.path.insert(0, str(checkout))
    from model import GPT, GPTConfig

    model = GPT(GPTConfig(block_size=SEQ_LEN, vocab_size=VOCABULARY, n_layer=8, n_head=6, n_embd=384, dropout=0.0,
                          bias=True)).eval()
    return lambda: model.generate(torch.tensor([IDS]), NEW, temperature=0.7, top_k=40)


def transformers_gpt2():
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, logging

    logging.set_verbosity_error()
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=SEQ_LEN, n_embd=384, n_layer=8, n_head=6,
                                       bos_token_id=2, eos_token_id=None)).eval()
    settings = GenerationConfig(do_sample=True, temperature=0.7, top_k=40, max_new_tokens=NEW, use_cache=True,
                                eos_token_id=None, pad_token_id=0)
    ids = torch.tensor([IDS])
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)


def alone(model: TinyGPT):
    def reply():
        decoder, one = Decoder(model, NoText()), Reply(Prompt(list(IDS)), PLAIN)
        decoder.join(one)
        while decoder.replies:
            decoder.step()
    return reply


def bandwidth() -> float:
    """Bytes a second at which this machine reads memory, by summing what no cache holds."""
    data = torch.ones(2**26)
    data.sum()
    started = time.perf_counter()
    for _ in range(5):
        data.sum()
    return 5 * data.numel() * 4 / (time.perf_counter() - started)


def together(engine: Engine, chats: int) -> tuple[float, list[float]]:
    """Seconds for `chats` replies at once, and the seconds of each."""
    took = []

    def chat():
        started = time.perf_counter()
        for _ in engine.ask(["Hello!"], PLAIN):
            pass
        took.append(time.perf_counter() - started)
    threads = [threading.Thread(target=chat) for _ in range(chats)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started, took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="folder of a nanoGPT checkout")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = never_ending("adaptive")
    contenders = {"nanoGPT generate": nanogpt(arguments.checkout), "transformers GPT-2 generate": transformers_gpt2(),
                  "TinyGPT, tied head": alone(never_ending("tied")), "TinyGPT, adaptive head": alone(model),
                  "TinyGPT, adaptive head, int8": alone(int8(model))}
    seconds = {name: [] for name in contenders}
    with torch.inference_mode():
        for turn in range(arguments.rounds + 1):  # the first one warms up
            for name, reply in contenders.items():
                started = time.perf_counter()
                reply()
                if turn:
                    seconds[name].append(time.perf_counter() - started)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, medians of {arguments.rounds}\n\n"
          "| one chat | tokens/s | x nanoGPT | x transformers |\n|---|---:|---:|---:|")
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, taken in median.items():
        peers = " | ".join(f"{median[peer] / taken:.1f}" for peer in list(median)[:2])
        print(f"| {name} | {NEW / taken:,.0f} | {peers} |")
    weights = sum(p.numel() * (1 if name.startswith("blocks") and p.ndim == 2 else 4)
                  for name, p in model.named_parameters() if "embedding" not in name)
    limit = bandwidth() / weights
    ours = NEW / median["TinyGPT, adaptive head, int8"]
    print(f"\nReading the {weights / 2**20:.0f} MB of weights once a token allows {limit:,.0f} tokens/s here; one chat "
          f"reaches {ours / limit:.0%} of it.\n")
    child = multiprocessing.get_context("spawn").Process(target=many_at_once)
    child.start()
    child.join()


def many_at_once() -> None:
    """The second table, in a process of its own, as the page's engine has it."""
    cores = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    first, engine = None, Engine(int8(never_ending("adaptive")), NoText(), capacity=16, cores=cores)
    together(engine, 16)  # warms up
    print("| chats at once | tokens/s | x one | slowest / mean |\n|---:|---:|---:|---:|")
    for chats in (1, 4, 16):
        runs = [together(engine, chats) for _ in range(3)]
        speed = statistics.median(chats * NEW / taken for taken, _ in runs)
        first = first or speed
        slowest = statistics.median(max(each) / statistics.mean(each) for _, each in runs)
        print(f"| {chats} | {speed:,.0f} | {speed / first:.1f} | {slowest:.2f} |")


if __name__ == "__main__":
    main()
