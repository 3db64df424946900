"""Every size and setting of a model and its training, in one flat, frozen dataclass."""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints


class TinyGPTError(Exception):
    """A mistake its maker can mend: one sentence with what, where, what is allowed, what to do."""


@dataclass(frozen=True)
class Config:
    """Checked on creation: `TinyGPTError` lists every problem at once.

    The defaults are the reference model: 8 pre-norm layers, 6 heads of 64, 128 tokens.
    """

    # The model
    vocab_size: int = 32_000
    """Pieces in the vocabulary; a small corpus may yield fewer, and the model shrinks with it."""
    seq_len: int = 128
    """Longest sequence the model sees, in tokens."""
    embed_dim: int = 384
    """Width of the residual stream; a multiple of num_heads."""
    num_heads: int = 6
    """Attention heads a layer."""
    num_layers: int = 8
    """Decoder blocks."""
    ff_hidden: int = 1536
    """Hidden width of the feed-forward network; usually 4 x embed_dim."""
    dropout: float = 0.05
    """Share of activations zeroed in training, 0 to below 1."""
    head: Literal["adaptive", "tied"] = "adaptive"
    """Output layer: adaptive softmax, or plain softmax sharing the token embedding (GPT-2's)."""

    # The data
    bpe_dropout: float = 0.0
    """Share of merges left out at random as training text is cut into tokens: words are learned by their parts too."""
    copies: int = 1
    """How often each training dialogue is cut into tokens for one pass; with bpe_dropout, each time differently."""
    replies_only: tuple[str, ...] = ("prosocial",)
    """Data sets (part of their name) whose User turns are read but never learned."""

    # The training
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for everything, or Muon for the blocks' matrices and AdamW for the rest."""
    lr: float = 1e-4
    """Peak learning rate; Muon's updates are scaled to the size of AdamW's, so one serves both."""
    weight_decay: float = 0.01
    """Decoupled weight decay of the matrices and embeddings, times the learning rate a step."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls to zero after the warm-up; constant: not at all, to go on from later."""
    warmup_ratio: float = 0.05
    """Share of all steps during which the learning rate rises, 0 to 1."""
    batch_size: int = 32
    """Rows of seq_len tokens an optimizer step, over all processes."""
    accumulation: int = 1
    """Parts that each batch is learned in, one after the other: the same step in less memory."""
    gradient_checkpointing: bool = False
    """Compute each block again in the backward pass instead of keeping it: less memory, a third more time."""
    shard: bool = False
    """With several processes (torchrun), spread the parameters over them instead of copying them: FSDP2."""
    epochs: float = 10.0
    """Passes over the training rows; 2.5 stops in the middle of the third."""
    grad_clip: float = 1.0
    """Longest gradient (L2 norm over all parameters) before it is scaled down."""
    ema_decay: float = 0.0
    """Keep an average of the weights too (0.99 spans some hundred steps); the better one is saved. 0: none."""
    eval_interval: int = 500
    """Optimizer steps between validations; a resumable state is saved at each."""
    eval_rows: int = 1024
    """Validation rows looked at, spread evenly; 0 looks at all."""
    patience: int = 5
    """Validations without improvement before training stops early; 0 never stops early."""
    seed: int = 0
    """Seed of the weights, the order of the rows and dropout."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the blocks; auto: bf16 or fp16 on CUDA, fp32 elsewhere."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """torch.compile: a minute's wait, then faster steps; auto: on CUDA only (on a CPU it brought nothing)."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the fastest one present."""

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise TinyGPTError("These settings cannot work:\n" + "\n".join(f"  {p}" for p in problems))

    def _problems(self) -> Iterator[str]:
        """One sentence for each value that cannot work, with what is allowed."""
        misfits = [(field.name, field.default) for field in dataclasses.fields(self)
                   if not is_like(getattr(self, field.name), field.default)]
        for name, default in misfits:
            yield f"{name} is {getattr(self, name)!r}; give {KINDS[type(default)]}, for example {default!r}."
        if misfits:
            return  # the checks below compare numbers
        for name in ("vocab_size", "embed_dim", "num_heads", "num_layers", "ff_hidden", "batch_size", "accumulation",
                     "eval_interval", "copies"):
            if getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}; give a whole number of at least 1."
        for name in ("eval_rows", "patience"):
            if getattr(self, name) < 0:
                yield f"{name} is {getattr(self, name)}; give 0 or more."
        if not 0 <= self.seed < 2**63:
            yield f"seed is {self.seed}; give a whole number from 0 to 2^63 - 1."
        for name in ("lr", "grad_clip", "epochs"):
            if not 0 < getattr(self, name) < float("inf"):
                yield f"{name} is {getattr(self, name)}; give a number above 0, for example {getattr(Config, name)}."
        if self.head == "adaptive" and 0 < self.embed_dim < 16:
            yield (f"embed_dim is {self.embed_dim}; the adaptive head gives rare tokens a sixteenth of it, so give at "
                   "least 16, or head tied.")
        if 0 < self.vocab_size < 8:
            yield f"vocab_size is {self.vocab_size}; give at least 8: seven markers and something to say."
        if self.seq_len < 16:
            yield f"seq_len is {self.seq_len}; give at least 16 tokens, enough for a question and a reply."
        for name in ("dropout", "bpe_dropout"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name} is {getattr(self, name)}; give a share from 0 to below 1, for example 0.1."
        if self.shard and self.compile == "yes":
            yield "compile is 'yes', but sharded parameters are not compiled; give compile no, or leave out shard."
        if not 0 <= self.ema_decay < 1:
            yield f"ema_decay is {self.ema_decay}; give 0 for none, or a share below 1, for example 0.99."
        if self.accumulation > self.batch_size > 0:
            yield (f"accumulation is {self.accumulation}, more parts than batch_size {self.batch_size} has rows; give "
                   f"at most {self.batch_size}.")
        if not 0 <= self.warmup_ratio <= 1:
            yield f"warmup_ratio is {self.warmup_ratio}; give a share from 0 to 1, for example 0.05."
        if not 0 <= self.weight_decay < float("inf"):
            yield f"weight_decay is {self.weight_decay}; give 0 or more, for example 0.01."
        if self.num_heads > 0 and self.embed_dim % self.num_heads:
            fit = max(self.embed_dim // self.num_heads, -(-16 // self.num_heads)) * self.num_heads
            yield (f"embed_dim {self.embed_dim} does not divide into num_heads {self.num_heads}; "
                   f"take embed_dim {fit} or {fit + self.num_heads}, or another num_heads.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                yield f"{name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}."


KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", tuple: "a list of texts"}
CHOICES = {name: get_args(kind) for name, kind in get_type_hints(Config).items() if get_origin(kind) is Literal}


def is_like(value: object, default: object) -> bool:
    """Whether `value` is of the kind of `default`; a whole number also serves where any number does."""
    if isinstance(default, tuple):
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is type(default)


PRESETS: dict[str, Config] = {
    "reference": Config(),
    "chat": Config(bpe_dropout=0.1, copies=5, epochs=2, optimizer="muon", lr=6e-3, dropout=0.1, weight_decay=0.1,
                   schedule="linear", batch_size=16, eval_interval=400, eval_rows=512),
    "nano": Config(vocab_size=1024, embed_dim=96, num_heads=3, num_layers=2, ff_hidden=384, dropout=0.0,
                   lr=3e-3, batch_size=16, epochs=80, eval_interval=50),
}

SIZES = ("vocab_size", "seq_len", "embed_dim", "num_heads", "num_layers", "ff_hidden", "head")  # what weights must fit
RETIRED = {"role_shift"}  # settings of earlier versions, which a checkpoint's config.json may still name


def to_json(config: Config) -> dict:
    """`config` as plain JSON values, in the order of its fields."""
    return dataclasses.asdict(config)


def from_json(values: dict, origin: str) -> Config:
    """The `Config` that `to_json` wrote; `origin` names the file in the error for a value that does not fit."""
    values = {name: value for name, value in values.items() if name not in RETIRED}
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(Config)})
    if unknown:
        raise TinyGPTError(f"{origin} has settings unknown to this version: {', '.join(unknown)}. "
                           "Remove them or use the version that wrote the file.")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        return Config(**values)
    except TinyGPTError as error:
        raise TinyGPTError(f"{origin}: {error}") from None


def run_command(main: Callable[[], None]) -> None:
    """Runs a command line's `main`; a `TinyGPTError`, or a file that cannot be read or written, becomes one message
    on stderr and exit code 2.
    """
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (TinyGPTError, OSError) as error:
        named = isinstance(error, OSError) and error.filename
        print(f"Error: {error.filename}: {error.strerror}" if named else f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
