"""One optimizer step: a batch in, weights moved. The trainer decides which batch, how fast, and when to stop."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from tqdm import tqdm

from tinygpt import parallel
from tinygpt.config import Config, TinyGPTError
from tinygpt.model import TinyGPT
from tinygpt.optim import make_optimizers

Part = tuple[Tensor, Tensor]  # ids (B, T) and targets (B, T)


class Learner:
    """The model, its optimizers and the average of its weights. `config.vocab_size` is the tokenizer's.

    Raises TinyGPTError for a device that is not there, or one that cannot compute in `config.precision`.
    """

    def __init__(self, config: Config):
        self.config = config
        self.device = parallel.own_device(config.device)
        self.dtype = choose_dtype(config.precision, self.device)
        torch.manual_seed(config.seed)
        self.model = TinyGPT(config)
        self.losses = parallel.spread(self.model, self.device, config.shard)  # called like the model
        wanted = config.compile == "yes" or (config.compile == "auto" and self.device.type == "cuda")
        self.compiled = wanted and not (config.shard and parallel.world_size() > 1)
        if self.compiled:
            self.model.losses = torch.compiler.disable(self.model.losses)  # the adaptive head cannot be compiled
            self.losses = torch.compile(self.losses)
        self.optimizers = make_optimizers(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.average = [p.detach().clone() for p in self.model.parameters()] if config.ema_decay else []

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def step(self, parts: list[Part], count: int, rate: float, number: int) -> tuple[Tensor, Tensor]:
        """Moves the weights by one step along the gradient of the mean loss over the batch's `count` learned tokens,
        whatever parts and processes the batch is spread over. `number`, the step's, seeds its dropout.

        Returns the nats of this process's share and the length of the whole gradient, before clipping.
        """
        try:
            nats = self.backward(parts, count, number)
        except RuntimeError as error:
            if not self.compiled or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            self.give_up_compiling(error)
            nats = self.backward(parts, count, number)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = rate
        norm = parallel.whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip))
        for optimizer in self.optimizers:
            if not self.scaler.is_enabled() or torch.isfinite(norm):  # fp16 overflowed: no optimizer may step
                self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        if self.average:
            self.move_average(number)
        return nats, norm

    def backward(self, parts: list[Part], count: int, number: int) -> Tensor:
        torch.manual_seed((self.config.seed * 1_000_003 + number + parallel.rank() * 1_000_000_007) % 2**63)
        self.model.train()
        nats = torch.zeros((), device=self.device)
        for position, (ids, targets) in enumerate(parts, 1):
            parallel.exchange_gradients(self.losses, position == len(parts))
            with self.autocast():
                losses = self.losses(ids, targets).sum()
            share = losses / max(1, count) * parallel.world_size()  # the exchange takes the mean over processes
            self.scaler.scale(share).backward()
            nats += losses.detach()
        return nats

    def give_up_compiling(self, error: Exception) -> None:
        reason = (str(error).splitlines() or [""])[0]
        tqdm.write(f"torch.compile does not work here ({type(error).__name__}: {reason}); going on without it.")
        self.losses, self.compiled = getattr(self.losses, "_orig_mod", self.losses), False
        self.model.zero_grad()

    # ------------------------------------------------------------------------------------------------- the average

    def move_average(self, number: int) -> None:
        """Moves the average of the weights (EMA) towards them, faster in the first steps."""
        decay = min(self.config.ema_decay, (1 + number) / (10 + number))
        for average, parameter in zip(self.average, self.model.parameters(), strict=True):
            average.lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has its averaged weights."""
        parameters = list(self.model.parameters())
        current = [p.detach().clone() for p in parameters]
        try:
            set_weights(parameters, self.average)
            yield
        finally:
            set_weights(parameters, current)

    # ------------------------------------------------------------------------------------------------- the state

    def whole_model(self) -> TinyGPT:
        """The model to be saved and looked at; where it is spread over processes, gathered on the CPU. Every process
        must ask.
        """
        if not self.config.shard or parallel.world_size() == 1:
            return self.model
        with torch.device("meta"):
            model = TinyGPT(self.config)
        weights = {name: parallel.whole(tensor).cpu() for name, tensor in self.model.state_dict().items()}
        model.load_state_dict(weights, assign=True)
        return model.eval()

    def begin_with(self, model: TinyGPT) -> None:
        """Takes up the weights of a model of the same sizes."""
        self.load_tensors({f"{kind}/{name}": parameter for kind in ("model", "average")
                           for name, parameter in model.named_parameters()})

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on, whole and on the CPU. Every process must ask."""
        tensors = {}
        for number, (name, parameter) in enumerate(self.model.named_parameters()):
            tensors[f"model/{name}"] = parameter
            if self.average:
                tensors[f"average/{name}"] = self.average[number]
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer/{name}/{key}"] = torch.as_tensor(value)
        return {name: parallel.whole(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes up what `tensors` gave, in however many processes that was. Raises TinyGPTError where sizes differ."""
        for number, (name, parameter) in enumerate(self.model.named_parameters()):
            for kind in ("model", "average") if self.average else ("model",):
                saved = tensors.get(f"{kind}/{name}")
                if saved is None or saved.shape != parameter.shape:
                    held = "nothing" if saved is None else f"size {tuple(saved.shape)}"
                    raise TinyGPTError(f"The state holds {held} for {kind} {name}, but the run's settings ask for "
                                       f"{tuple(parameter.shape)}; put back the run.json it was saved with.")
                target = parameter if kind == "model" else self.average[number]
                set_weights([target], [parallel.part_of(saved, parameter)])
            for optimizer in self.optimizers:
                prefix = f"optimizer/{name}/"
                held = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                if held and any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                    optimizer.state[parameter] = {
                        key: parallel.part_of(value, parameter) if value.ndim else value.to(self.device)
                        for key, value in held.items()}


@torch.no_grad()
def set_weights(parameters: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What the blocks compute in: bf16 on CUDA that has it, fp16 on older CUDA (a T4), fp32 elsewhere."""
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        with torch.cuda.device(device):  # which it asks about
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    if precision == "fp16" and device.type == "cpu":
        raise TinyGPTError("precision fp16 needs a GPU; take fp32, or bf16 if your CPU has it.")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
