"""What several tests share: a tiny checkpoint, the page served from one, and a browser."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
torch.set_num_threads(1)  # many threads make tiny models slower, by far where cores are shared


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Prepared data goes to a folder of the test's own, never to the user's cache."""
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint folder with random weights, made in a second; its replies are long and mean nothing."""
    from tinygpt import Config, TinyGPT, Tokenizer, save_checkpoint

    folder = tmp_path_factory.mktemp("checkpoint")
    lines = (ROOT / "tests" / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = Tokenizer.train([turn for line in lines for turn in json.loads(line)["turns"]], vocab_size=600)
    torch.manual_seed(0)
    model = TinyGPT(Config(vocab_size=tokenizer.vocab_size, embed_dim=32, num_heads=2, num_layers=2, ff_hidden=64))
    save_checkpoint(folder, model, tokenizer)
    return folder


@contextlib.contextmanager
def served(checkpoint: Path, *program: str):
    """The page's address while a process of its own serves it; `program` stands in for app.py."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, *(program or ("app.py",)), "--checkpoint", str(Path(checkpoint).absolute())]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "GRADIO_SERVER_PORT": str(port)},
                               stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=10):
                break
            if process.poll() is not None:
                raise RuntimeError(f"The page ended with exit code {process.returncode} before it was up.")
            time.sleep(0.1)
        else:
            raise TimeoutError("The page was not up within a minute.")
        yield url
    finally:
        process.terminate()
        process.wait(10)


def open_browser(playwright):
    """Chromium: the system's own where there is one, else Playwright's."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    return playwright.chromium.launch(executable_path=found, args=[
        "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
        "--disable-sync", "--no-first-run"])
