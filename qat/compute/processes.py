"""Several processes that train one network together, one for each GPU: what they agree on, and when.

torchrun starts the processes and tells each its rank in the environment. Each takes its share of every batch, and
gradients are averaged (DistributedDataParallel). Each process computes everything else itself, with the same result.
Decisions that could differ (to stop, to save) are made together, at steps that are the same for all, so that no process
waits for a message that nobody sends. A process that fails ends with a nonzero exit code, and torchrun then ends the
others.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qat.base.errors import UserError

# DistributedDataParallel need not copy buffers: take_buffers_of_first copies normalization statistics when needed.
_NAMES = inspect.signature(DistributedDataParallel.__init__).parameters
_KEEP_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False  # its old name
}


@dataclass(frozen=True)
class Processes:
    """This process among ``world_size`` processes; ``rank`` 0 is the main process."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints for all."""
        return self.rank == 0

    def share_of(self, batch_size: int) -> int:
        """How many images of a batch each process takes. Raises UserError if a batch cannot be shared equally."""
        if batch_size % self.world_size or (
            self.world_size > 1 and batch_size < 2 * self.world_size
        ):  # BatchNorm needs two images
            fits = max(batch_size // self.world_size, 2) * self.world_size
            raise UserError(
                f"--batch-size {batch_size} cannot be shared equally by {self.world_size} processes: give a "
                f"multiple of at least two images each, such as {fits}"
            )
        return batch_size // self.world_size

    def parallel(self, network: nn.Module) -> nn.Module:
        """``network``, wrapped so that gradients are averaged over all processes."""
        if self.world_size == 1 or not any(parameter.requires_grad for parameter in network.parameters()):
            return network
        # Some networks have parameters that nothing reads; without this option, the second step would fail.
        return DistributedDataParallel(
            network, gradient_as_bucket_view=True, find_unused_parameters=True, **_KEEP_BUFFERS
        )

    def mean(self, value: float) -> float:
        """The mean of the values of all processes."""
        return self.sums(value)[0] / self.world_size

    def sums(self, *values: float) -> list[float]:
        """The sums of the values of all processes."""
        if self.world_size == 1:
            return list(values)  # without tensors: called in every step
        found: list[float] = self._all_reduce(torch.tensor(values, dtype=torch.float64)).tolist()
        return found

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether any process has raised it."""
        return [bool(count) for count in self.sums(*flags)]

    def add(self, tensor: Tensor) -> Tensor:
        """Replaces ``tensor`` by its sum over all processes, in place."""
        return self._all_reduce(tensor)

    def largest(self, tensor: Tensor) -> Tensor:
        """Replaces ``tensor`` by its elementwise maximum over all processes, in place."""
        return self._all_reduce(tensor, dist.ReduceOp.MAX)

    def _all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        if self.world_size == 1:
            return tensor
        moved = tensor.to(_message_device())
        dist.all_reduce(moved, op)
        return tensor.copy_(moved)

    @contextmanager
    def first_of_machine_before_others(self) -> Iterator[None]:
        """On each machine, one process runs the block first, and then the others."""
        first = local_rank() in (None, 0)
        if not first:
            self.wait()
        yield
        if first:
            self.wait()

    def wait(self) -> None:
        """Waits until all processes have called this."""
        self.any(False)

    def take_buffers_of_first(self, model: nn.Module) -> None:
        """Copies the buffers of ``model``, the statistics of normalizations, from the first process to all others."""
        for buffer in model.buffers() if self.world_size > 1 else ():
            moved = buffer.to(_message_device())
            dist.broadcast(moved, 0)
            buffer.copy_(moved)


SINGLE_PROCESS = Processes()


def unwrap(network: nn.Module) -> nn.Module:
    """The network that was given to ``Processes.parallel``."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def without_averaging(network: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Inside this context, backward passes add to the gradients without averaging over processes."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


def local_rank() -> int | None:
    """The rank of this process on its machine; None if torchrun did not start it."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


@contextmanager
def process_group(device: torch.device) -> Iterator[Processes]:
    """Connects the processes that torchrun started; ``device`` is that of this process."""
    if local_rank() is None:
        yield SINGLE_PROCESS
        return
    gpu = device.type == "cuda"
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    # Otherwise torch.compile splits the network into separately compiled pieces, to send gradients earlier.
    with torch._dynamo.config.patch(optimize_ddp=False):
        yield Processes(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # not after an error: it would wait for others that wait for this process


def _message_device() -> torch.device:
    """The device from which NCCL or Gloo sends tensors."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
