"""TinyGPT: a small GPT that you can chat with, take apart and train."""

from tinygpt.checkpoint import load_checkpoint, save_checkpoint
from tinygpt.config import Config, TinyGPTError
from tinygpt.generate import generate, stream
from tinygpt.model import TinyGPT
from tinygpt.sampling import Sampling
from tinygpt.tokenizer import Tokenizer

__all__ = ["Config", "Sampling", "TinyGPT", "TinyGPTError", "Tokenizer", "generate", "load_checkpoint",
           "save_checkpoint", "stream"]
