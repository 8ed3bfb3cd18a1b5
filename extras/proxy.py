"""Proxy tuning, to compare with (Liu et al., 2024; appendix D of the paper).

Nothing is trained beside the base: a small model is fine-tuned by itself, and what that has changed
in its logits is added to the base's. So a third model runs at inference: the small one as it was
before. `Proxy` is a value model made of the two.
"""

from collections.abc import Sequence

from torch import Tensor

from model import Config, Llama


class Proxy:
    """z_Δ = z_expert − z_antiexpert, in the place of a value model."""

    def __init__(self, expert: Llama, antiexpert: Llama):
        self.models = expert, antiexpert

    @property
    def config(self) -> Config:
        """Of the one with the shorter context, which is the limit of both."""
        return min(
            (model.config for model in self.models),
            key=lambda config: config.max_position_embeddings,
        )

    @property
    def unembed(self) -> Tensor:
        return self.models[0].unembed  # it tells the device: z_Δ is given where the expert is

    def reader(self, rows: int, slots: int) -> "ProxyReader":
        return ProxyReader([model.reader(rows, slots) for model in self.models])


class ProxyReader:
    """The two readers as one, see `model.Reader`."""

    def __init__(self, readers: list):
        self.readers = readers

    def read(self, tokens: Tensor, counts: Tensor | None = None) -> Tensor:
        return self._difference([reader.read(tokens, counts) for reader in self.readers])

    def read_each(self, tokens: Tensor, start: int = 0) -> Tensor:
        return self._difference([reader.read_each(tokens, start) for reader in self.readers])

    def _difference(self, z: list[Tensor]) -> Tensor:
        z_expert, z_antiexpert = z  # (..., V)
        V = min(z_expert.shape[-1], z_antiexpert.shape[-1])
        return z_expert[..., :V] - z_antiexpert[..., :V].to(z_expert.device)

    def back_to(self, lengths: Sequence[int]) -> None:
        for reader in self.readers:
            reader.back_to(lengths)

    def room(self) -> list[int]:
        return [min(rooms) for rooms in zip(*(reader.room() for reader in self.readers))]
