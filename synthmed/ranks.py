"""Several processes that take one training's private steps together, as torchrun starts them.

Process 0 runs the command. The others follow: they wait for a training, hold the same model, and
work out the gradients of their share of a step's patients. What is summed is summed in one order
whoever worked it out, so that on CPUs of a kind the result is that of one process, bit for bit.
Process 0 alone writes: checkpoints, logs, and the ledger, before a step is announced.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from synthmed.errors import ResourceError

if TYPE_CHECKING:
    from torch import Tensor

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

Message = Mapping[str, Any]


@dataclass
class _State:
    """What this process knows of the others."""

    rank: int = 0
    world: int = 1
    in_step: bool = False


_STATE = _State()


def launched() -> bool:
    """Whether torchrun has started this process with others."""
    return all(k in os.environ for k in _TORCHRUN) and int(os.environ["WORLD_SIZE"]) > 1


def rank() -> int:
    """Number of this process; 0 where it is alone."""
    return _STATE.rank


def world() -> int:
    """How many there are; 1 where this one is alone."""
    return _STATE.world


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes; at the end process 0 sends them home."""
    import torch.distributed as dist

    # the others wait while process 0 reads scans, and while it samples
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    _STATE.rank, _STATE.world = dist.get_rank(), dist.get_world_size()
    if _STATE.rank:
        # process 0 ends the step and saves; torchrun tells all of them to stop
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        if _STATE.rank == 0 and not _STATE.in_step:
            with suppress(ResourceError):  # who has gone need not be sent home
                tell(None)
        _STATE.rank, _STATE.world, _STATE.in_step = 0, 1, False
        dist.destroy_process_group()


def tell(message: Message | None) -> None:
    """From process 0 to all others; nothing where it is alone, or called by another."""
    if _STATE.world > 1 and _STATE.rank == 0:
        _broadcast(message)


def told() -> Message | None:
    """What process 0 tells next; null is to go home."""
    return _broadcast(None)


def _broadcast(message: Message | None) -> Message | None:
    import torch.distributed as dist

    box: list[Any] = [message]
    with _speaking():
        dist.broadcast_object_list(box, src=0)
    out: Message | None = box[0]
    return out


@contextmanager
def step(message: Message) -> Iterator[None]:
    """Announce a step that all take part in."""
    tell(message)
    _STATE.in_step = True
    yield
    _STATE.in_step = False


def same(tensors: Sequence[Tensor]) -> None:
    """Set these to what process 0 has: where rounding differs, processes would drift apart."""
    if _STATE.world == 1:
        return
    import torch.distributed as dist

    with _speaking():
        for t in tensors:
            here = t.detach().cpu().contiguous()
            dist.broadcast(here, src=0)
            t.data.copy_(here)


def gathered(part: Any) -> list[Any]:
    """What each process has, in their order."""
    if _STATE.world == 1:
        return [part]
    import torch.distributed as dist

    every: list[Any] = [None] * _STATE.world
    with _speaking():
        dist.all_gather_object(every, part)
    return every


def meet() -> None:
    """Wait for the others: what process 0 has written is read by all before it changes."""
    gathered(None)


@contextmanager
def _speaking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's words for a connection that is gone
        raise ResourceError(
            f"another of the {_STATE.world} processes has ended",
            "Its own message says why; the same command goes on.",
        ) from error
