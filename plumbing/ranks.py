"""What a run asks of the machine, answered for one device; for several, by extras/sharding.py."""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from model import Llama
from plumbing.files import save_tensors
from plumbing.weights import load, save


class OneDevice:
    """What a run asks of the machine; extras/sharding.py answers for several GPUs."""

    writes = True  # whether this process writes the files that all share

    def load(
        self,
        directory: str | Path,
        device: torch.device,
        dtype: torch.dtype,
        arithmetic: torch.dtype,
        network: type[Llama] = Llama,
    ) -> Llama:
        """A model in `dtype`; `arithmetic`, the type of its products, matters on several GPUs."""
        return load(directory, device, dtype, network)

    def save(self, model: Llama, directory: Path) -> None:
        save(model, directory)

    def parts(self, rows: list[int], size: int) -> list[list[int]]:
        """The chats `rows`, `size` at a time, that are this process's to read.

        Example:
        >>> OneDevice().parts([7, 3, 5], 2)
        [[7, 3], [5]]
        """
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def total(self, *numbers: float) -> list[float]:
        """Sums over all that were read, from the sums over what this process has read."""
        return list(numbers)

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor in one piece, gathered if it is cut up over several GPUs; here it is whole."""
        return tensor

    def rest(self, model: Llama) -> None:
        """Frees what several GPUs gathered for a forward pass; here nothing was gathered."""

    def write_tensors(self, tensors: dict[str, Tensor], path: Path, metadata: dict) -> None:
        save_tensors(tensors, path, metadata)

    def read_tensor(self, file, name: str, like: Tensor) -> Tensor:
        return file.get_tensor(name)

    def in_turn(self):
        """A `with` block that one process goes through first; the others then find its files."""
        return nullcontext()


ONE_DEVICE = OneDevice()
