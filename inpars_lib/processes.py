"""The process group of torchrun."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from inpars_lib.cli import InputError
from inpars_lib.files import is_special

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessGroup:
    """This process among those that torchrun started, or alone."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> "ProcessGroup":
        """Return the group that torchrun describes in environment variables."""
        return cls(*(int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))))

    def check_inputs(self, *paths: str | None) -> None:
        """Check that each process can read the inputs, which standard input and pipes do not allow.

        Raises:
            InputError: An input can be read only once, and there are several processes.
        """
        for path in paths:
            if self.size > 1 and path and (path == "-" or is_special(path)):
                raise InputError(f"{path}: standard input and pipes are not shared by several processes. Name a file.")

    def barrier(self) -> None:
        """Wait until every rank gets here."""
        self.broadcast(None)

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank, once every rank gets here."""
        if self.size == 1:
            return value
        import torch.distributed as distributed

        if not distributed.is_initialized():  # one rank may have much more work than another
            distributed.init_process_group("gloo", timeout=timedelta(days=30))
        distributed.barrier()
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def close(self) -> None:
        """Wait for every rank, then leave the group. A rank that ends earlier breaks the connections of the others."""
        if self.size == 1:
            return
        import torch.distributed as distributed

        if distributed.is_initialized():
            distributed.barrier()
            distributed.destroy_process_group()
