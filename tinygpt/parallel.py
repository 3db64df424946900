"""One run in several processes, as `torchrun` starts them: each takes its share of every batch.

In a process that is alone all of this does nothing, so the trainer reads the same for one and for many.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tinygpt.config import TinyGPTError
from tinygpt.model import TinyGPT, choose_device


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Inside, the processes that torchrun started know each other: by NCCL on CUDA, else by Gloo. Raises TinyGPTError
    where memory runs out, or another process has ended.
    """
    if started_together():
        device = own_device(device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=3))  # the others wait while the first prepares data
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        if "out of memory" in reason or "can't allocate memory" in reason:
            raise TinyGPTError("The memory is full; give a higher --accumulation (the same steps in smaller parts), "
                               "--gradient-checkpointing, or a smaller model.") from None
        if not together():
            raise
        raise TinyGPTError(f"Process {rank()} can no longer work with the others; one may have ended ({reason}). What "
                           "was last saved is kept: go on with torchrun and --resume.") from None
    finally:
        if together():
            dist.destroy_process_group()


def started_together() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def together() -> bool:
    """Whether this process is `joined` with others."""
    return dist.is_available() and dist.is_initialized()


def own_device(name: str) -> torch.device:
    """What `choose_device` finds; with CUDA, each process on a machine takes a GPU of its own."""
    device = choose_device(name)
    if started_together() and device.type == "cuda":
        return choose_device(f"cuda:{os.environ['LOCAL_RANK']}")
    if started_together() and device.type == "mps":
        raise TinyGPTError("MPS cannot be shared by several processes; give --device cpu, or start without torchrun.")
    return device


def rank() -> int:
    """This process's number; 0 prints and writes."""
    return dist.get_rank() if together() else 0


def world_size() -> int:
    """How many processes work on this run."""
    return dist.get_world_size() if together() else 1


def barrier() -> None:
    """Waits until every process is here."""
    if together():
        dist.barrier()


def total(device: torch.device, *values: Tensor | float) -> list[float]:
    """The sums of `values` over all processes."""
    if not together():
        return [float(value) for value in values]
    sums = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values])
    dist.all_reduce(sums)
    return sums.tolist()


def share(numbers: np.ndarray) -> np.ndarray:
    """The part of `numbers` that is this process's; the shares differ by at most one."""
    return numbers[rank()::world_size()]


def spread(model: TinyGPT, device: torch.device, shard: bool) -> nn.Module:
    """Puts `model` on its device and returns what to call for its losses, so that after `backward` every process
    holds the mean gradient.

    DDP keeps a whole model in each process (Li et al. 2020, https://arxiv.org/abs/2006.15704). With `shard`, FSDP2
    keeps a part of each parameter and gathers a block when it is needed (Zhao et al. 2023,
    https://arxiv.org/abs/2304.11277): for models that outgrow a device.
    """
    if world_size() == 1:
        return model.to(device)
    if not shard:
        model.to(device)
        return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)  # weights may then be changed between forwards
    return model


def exchange_gradients(learner: nn.Module, wanted: bool) -> None:
    """Whether the next `backward` ends with the exchange; of the parts of one batch, only the last one's does."""
    learner = getattr(learner, "_orig_mod", learner)  # inside torch.compile's wrapper
    if isinstance(learner, nn.parallel.DistributedDataParallel):
        learner.require_backward_grad_sync = wanted
    elif hasattr(learner, "set_requires_gradient_sync"):
        learner.set_requires_gradient_sync(wanted)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may hold a part; every process must ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def part_of(tensor: Tensor, held: Tensor) -> Tensor:
    """What this process keeps of a whole `tensor` where it keeps `held` of a parameter."""
    if not hasattr(held, "full_tensor"):
        return tensor.to(held.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(held.device), held.device_mesh, held.placements)
