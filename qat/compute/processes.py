"""Several processes that train one network together, one for each GPU: what they agree on, and in which order.

torchrun starts them and says in the environment which one each is. Each takes its share of every batch, and the
gradients are averaged (DistributedDataParallel); all else is computed by each for itself and comes out the same. What
one alone would decide (to stop, to save) is agreed on at steps that are the same for all, so that none waits for a
message that no other sends. One that fails ends with an exit code other than 0, and torchrun then ends the others.
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

# Statistics of normalizations are made those of the first process where they are used: take_buffers_of_first.
_NAMES = inspect.signature(DistributedDataParallel.__init__).parameters
_KEEP_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False  # its old name
}


@dataclass(frozen=True)
class Processes:
    """This process among ``world_size``; ``rank`` 0 writes files and speaks."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks for all."""
        return self.rank == 0

    def share_of(self, batch_size: int) -> int:
        """How many images of a batch each takes. Raises UserError where they do not come out even."""
        if batch_size % self.world_size or (
            self.world_size > 1 and batch_size < 2 * self.world_size
        ):  # BatchNorm needs two images
            fits = max(batch_size // self.world_size, 2) * self.world_size
            raise UserError(
                f"--batch-size {batch_size} cannot be shared by {self.world_size} processes: give a "
                f"multiple, such as {fits}"
            )
        return batch_size // self.world_size

    def parallel(self, network: nn.Module) -> nn.Module:
        """``network``, which averages its gradients over all."""
        if self.world_size == 1 or not any(parameter.requires_grad for parameter in network.parameters()):
            return network
        # Some networks have parameters that nothing reads; without a word about them, the second step fails.
        return DistributedDataParallel(
            network, gradient_as_bucket_view=True, find_unused_parameters=True, **_KEEP_BUFFERS
        )

    def mean(self, value: float) -> float:
        """The mean of what each gives."""
        return self.sums(value)[0] / self.world_size

    def sums(self, *values: float) -> list[float]:
        """The sums of what each gives."""
        if self.world_size == 1:
            return list(values)  # asked in every step
        found: list[float] = self._all_reduce(torch.tensor(values, dtype=torch.float64)).tolist()
        return found

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether one has raised it."""
        return [bool(count) for count in self.sums(*flags)]

    def add(self, tensor: Tensor) -> Tensor:
        """``tensor``, in place the sum over all."""
        return self._all_reduce(tensor)

    def largest(self, tensor: Tensor) -> Tensor:
        """``tensor``, in place the elementwise maximum over all."""
        return self._all_reduce(tensor, dist.ReduceOp.MAX)

    def _all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        if self.world_size == 1:
            return tensor
        moved = tensor.to(_message_device())
        dist.all_reduce(moved, op)
        return tensor.copy_(moved)

    @contextmanager
    def first_of_machine_before_others(self) -> Iterator[None]:
        """What it holds is done by one process of each machine, and then by the others."""
        first = local_rank() in (None, 0)
        if not first:
            self.wait()
        yield
        if first:
            self.wait()

    def wait(self) -> None:
        """Until all are here."""
        self.any(False)

    def take_buffers_of_first(self, model: nn.Module) -> None:
        """Gives ``model`` of every process the buffers of the first one's: the statistics of normalizations."""
        for buffer in model.buffers() if self.world_size > 1 else ():
            moved = buffer.to(_message_device())
            dist.broadcast(moved, 0)
            buffer.copy_(moved)


SINGLE_PROCESS = Processes()


def unwrap(network: nn.Module) -> nn.Module:
    """The network that ``Processes.parallel`` was given."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def without_averaging(network: Callable[..., Any]) -> AbstractContextManager[Any]:
    """While it lasts, backward passes add to the gradients and no average is taken."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


def local_rank() -> int | None:
    """Which of this machine's processes this is; None where torchrun did not start it."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


@contextmanager
def process_group(device: torch.device) -> Iterator[Processes]:
    """Connects the processes that torchrun started; ``device``: of this one."""
    if local_rank() is None:
        yield SINGLE_PROCESS
        return
    gpu = device.type == "cuda"
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    # Otherwise torch.compile cuts the network into pieces, each compiled for itself, to send gradients earlier.
    with torch._dynamo.config.patch(optimize_ddp=False):
        yield Processes(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()  # not after an error: it would wait for the others, which wait for this one


def _message_device() -> torch.device:
    """Where NCCL and Gloo take tensors from."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
