"""A checkpoint is a folder: config.json, tokenizer.model, model.safetensors, and what else its maker adds.

model.safetensors carries the hashes of its own tensors, of the tokenizer and of the config, so that loading can tell
a damaged or mixed-up folder from a good one. Files are written beside their place, flushed, then renamed: a kill at
any moment leaves the last good one. Nothing is pickled.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tinygpt.config import Config, TinyGPTError, from_json, to_json
from tinygpt.model import TinyGPT, choose_device
from tinygpt.tokenizer import Tokenizer


def save_checkpoint(folder: str | Path, model: TinyGPT, tokenizer: Tokenizer,
                    dtype: torch.dtype = torch.float32) -> None:
    """Writes the model into `folder`, made if missing. `dtype` float16 halves the file, for a model to give away."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(to_json(model.config), indent=2).encode()
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(folder / "tokenizer.model", tokenizer.model)
    write_atomically(folder / "config.json", config + b"\n")
    write_tensors(folder / "model.safetensors", tensors, {
        "config": json.dumps(to_json(model.config)), "tokenizer": hashlib.sha256(tokenizer.model).hexdigest()})


def load_checkpoint(folder: str | Path, device: str | torch.device | None = None) -> tuple[TinyGPT, Tokenizer]:
    """The model, in fp32 and ready to generate, and its tokenizer. `device` None takes the fastest one present.

    Raises TinyGPTError, naming the file, for a folder that lacks one, a damaged one, or ones that do not belong
    together.
    """
    folder = Path(folder)
    config = load_config(folder)
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    path = folder / "model.safetensors"
    tensors, metadata = read_tensors(path)
    if metadata.get("tokenizer") != hashlib.sha256(tokenizer.model).hexdigest():
        raise TinyGPTError(f"{folder / 'tokenizer.model'} (vocabulary {tokenizer.vocab_size}) is not the one that "
                           f"{path} (vocabulary {config.vocab_size}) was trained with; put back the tokenizer.model "
                           "that came with it.")
    if metadata.get("config") != json.dumps(json.loads((folder / "config.json").read_bytes())):
        raise TinyGPTError(f"{folder / 'config.json'} does not describe {path}; put back the config.json that came "
                           "with it.")
    with torch.device("meta"):  # no memory and no initialisation for weights that are about to be replaced
        model = TinyGPT(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if expected != {name: tensor.shape for name, tensor in tensors.items()}:
        raise TinyGPTError(f"{path} does not hold the tensors of its config.json; download the checkpoint again.")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    return model.to(choose_device(device or "auto")).requires_grad_(False).eval(), tokenizer


def load_config(folder: Path) -> Config:
    """The checked `config.json` of a checkpoint folder."""
    path = folder / "config.json"
    if not path.is_file():
        held = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing" if folder.is_dir() else "no such folder"
        raise TinyGPTError(f"{folder} is not a checkpoint: config.json is missing (found: {held}). Give a folder that "
                           "train.py wrote, for example checkpoints/tinygpt-chat.")
    try:
        values = json.loads(path.read_bytes())
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise TinyGPTError(f"{path} is not a JSON object; put back the config.json that came with the checkpoint.")
    return from_json(values, str(path))


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file with `metadata` and the hash of its tensors."""
    write_atomically(path, save(tensors, {**metadata, "sha256": digest(tensors)}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors (on the CPU) and metadata that `write_tensors` wrote. Raises TinyGPTError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Copies: what get_tensor gives is a view of the file, which may be replaced while it is in use.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise TinyGPTError(f"{path} is missing; give a checkpoint folder that train.py wrote.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise TinyGPTError(f"{path} cannot be read ({error}); it is damaged or only half there. Download or train the "
                           "checkpoint again.") from None
    if metadata.get("sha256") != digest(tensors):
        raise TinyGPTError(f"{path} is damaged: its tensors do not have the hash that was written with them. Download "
                           "or train the checkpoint again.")
    return tensors, metadata


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of `tensors`."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().view(torch.uint8).numpy() if tensor.ndim else str(tensor.item()).encode())
    return sha.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """`path` holds either what it held before or all of `content`, whenever the process dies."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
