"""How a value model is joined to its base: what it reads.

    residual   z_Δ = π_Δ(x, y_<t; θ)                 the text alone                        §4.1
    cascade    z_Δ = π_Δ(p_base W_e; θ)              its probabilities, softmax(z_base)    §4.1
    cascade+   z_Δ = π_Δ(p_base W_e + h_embed; θ)    both                                  §4.1
    probe      z_Δ = MLP(h_base; θ)                  the base's last hidden state          §3.2, A.1

W_e is the value model's own embedding matrix, h_embed its embedding of the text. A residual value
model can run while the base does, the others wait for it; only a probe is bound to one base's
width.

Training and decoding know residual value models only. `Connected` makes the others look like one:

    value = Connected("cascade", value)
    base = value.watched(base)          # after each read `value` sees its hidden states

Shapes: B batch, T time, V vocabulary, H hidden, I the width inside a probe.
"""

import json
import weakref
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ivl import chunk_rows
from model import Config, KVCache, Llama, Reader
from plumbing.files import (
    TABLE,
    Field,
    InputError,
    check_tensor,
    fields_of,
    open_tensors,
    read_json,
    save_tensors,
    whole,
    write_text,
)
from plumbing.weights import SHAPE, check_weight, read_config

MODEL_TYPE = "ivl-probe"  # in a probe's config.json: nobody is to take it for a Llama

# ---------------------------------------------------------------- what the value model reads


def expected_embedding(h_base: Tensor, W_base: Tensor, W_embed: Tensor) -> Tensor:
    """p_base W_e, the embedding of the token that the base expects.  (B, T, H_v)

    h_base (B, T, H_b): the base's last hidden states; W_base (V, H_b): its unembedding; W_embed
    (V, H_v), which gets a gradient. p_base (B, T, V) is never held in full: it is made in chunks,
    and in the backward pass made again.
    """
    V = min(len(W_base), len(W_embed))
    W_base = W_base.detach()[:V]

    def part(h: Tensor, W_embed: Tensor) -> Tensor:
        p_base = F.linear(h, W_base).float().softmax(-1)  # (chunk, V)
        return p_base.to(W_embed.dtype) @ W_embed  # (chunk, H_v)

    parts = []
    rows = h_base.detach().flatten(0, 1)  # (B·T, H_b)
    for h in rows.split(chunk_rows(V, W_embed.device.type)):  # (chunk, H_b)
        if torch.is_grad_enabled():
            parts.append(
                checkpoint(part, h, W_embed[:V], use_reentrant=False, preserve_rng_state=False)
            )
        else:
            parts.append(part(h, W_embed[:V]))
    return torch.cat(parts).unflatten(0, h_base.shape[:2])  # (B, T, H_v)


def value_input(
    connection: str,
    value: "Llama | Probe",
    tokens: Tensor,
    h_base: Tensor | None,
    W_base: Tensor | None,
) -> Tensor:
    """What `value.hidden` is to read: token ids (B, T) or vectors (B, T, H).

    tokens (B, T): the text; h_base (B, T, H_b), W_base (V, H_b): hidden states and unembedding of
    the base, unused by a residual value model.
    """
    if connection == "residual":
        return tokens
    if connection == "probe":
        return h_base.detach()
    h = expected_embedding(h_base, W_base, value.embed.weight)  # (B, T, H_v)
    if connection == "cascade+":
        h = h + value.embed(tokens)
    return h


class Connected:
    """A value model that reads what a base says, in the place of one that reads the text.

    Every other attribute is the value model's own. Only `hidden` differs: it looks at the base's
    last hidden states, so the base must have read the same tokens just before.
    """

    def __init__(self, connection: str, value: "Llama | Probe"):
        self.connection = connection
        self.value = value
        # base_ref and h_base, what the base has read last, are there from the first `seen` on

    def __getattr__(self, name: str):
        return getattr(self.value, name)

    def watched(self, base: Llama) -> "Watched":
        """The base, to be used from now on: its hidden states reach this value model."""
        return Watched(base, self)

    def seen(self, base: Llama, h_base: Tensor) -> None:
        """The watched base calls this after each read. Only a weak reference to it is kept, so that
        a curriculum can free it.
        """
        self.base_ref = weakref.ref(base)
        self.h_base = h_base  # (B, T, H_b)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        end: int | None = None,
    ) -> Tensor:
        """As `Llama.hidden`, of the tokens (B, T) that the base has read last."""
        x = value_input(self.connection, self.value, tokens, self.h_base, self.base_ref().unembed)
        return self.value.hidden(x, positions, cache, end)

    def reader(self, rows: int, slots: int) -> Reader:
        # not the inner value model's: this Reader has to call the `hidden` above
        return Reader(self, rows, slots)


class Watched:
    """A base whose last hidden states are shown to a `Connected` value model."""

    def __init__(self, base: Llama, watcher: Connected):
        self.base = base
        self.watcher = watcher

    def __getattr__(self, name: str):
        return getattr(self.base, name)

    def hidden(self, *args, **options) -> Tensor:
        """As `Llama.hidden`."""
        h_base = self.base.hidden(*args, **options)
        self.watcher.seen(self.base, h_base)
        return h_base

    def reader(self, rows: int, slots: int) -> Reader:
        # not the inner base's: this Reader has to call the `hidden` above
        return Reader(self, rows, slots)


def connected(connection: str, base: Llama, value: "Llama | Probe") -> tuple:
    """(base, value), joined; a residual value model needs no joining."""
    if connection == "residual":
        return base, value
    value = Connected(connection, value)
    return value.watched(base), value


# ---------------------------------------------------------------- the probe


class Probe(nn.Module):
    """z_Δ = W_down (σ(W_gate h + b_gate) ⊙ (W_up h + b_up)) + b_down, a Llama's MLP with biases,
    A.1.

    (As printed, W_down is applied before ⊙; then the shapes would not fit.) It stands where a Llama
    would: `hidden` gives the MLP's inside (B, T, I + 1) and `unembed` is (V, I + 1). The last
    feature is always 1, and its column b_down.
    """

    def __init__(self, config: Config):
        super().__init__()
        # its base's shape, without layers: there are no keys and values to cache
        self.config = replace(config, num_hidden_layers=0)
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        # (V, I + 1): W_down, and b_down as its last column
        self.head = nn.Parameter(torch.zeros(config.vocab_size, config.intermediate_size + 1))

    @property
    def unembed(self) -> Tensor:
        return self.head

    def hidden(
        self,
        h_base: Tensor,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        end: int | None = None,
    ) -> Tensor:
        """As `Llama.hidden`; a probe looks at one position at a time and needs no cache."""
        inside = F.silu(self.gate(h_base)) * self.up(h_base)  # (B, T, I)
        return F.pad(inside, (0, 1), value=1.0)  # (B, T, I + 1)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Probe":
        """Random weights, but z_Δ = 0: training starts at the base itself."""
        generator = torch.Generator(self.head.device).manual_seed(seed)
        for layer in (self.gate, self.up):
            layer.weight.normal_(0, layer.in_features**-0.5, generator=generator)
            layer.bias.zero_()
        self.head.zero_()
        return self

    def check(self, bases: Sequence[str | Path]) -> None:
        """Raises InputError for a base whose hidden state is of another width than the probe's."""
        for base in bases:
            width = read_config(base).hidden_size
            if width != self.config.hidden_size:
                raise InputError(
                    f"{base}: has a hidden state of {width} numbers, but the probe was made for "
                    f"one of {self.config.hidden_size}; a probe belongs to its base, train another "
                    "for this one"
                )

    def size(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        tensors = {name: p.data for name, p in self.named_parameters()}
        save_tensors(tensors, directory / "model.safetensors", {})
        config = {"model_type": MODEL_TYPE, **asdict(self.config)}
        write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(
        cls,
        directory: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Probe":
        """Raises InputError for a directory that holds no probe, or a damaged one."""
        path = Path(directory) / "config.json"
        raw = read_json(path, TABLE)
        if raw.get("model_type") != MODEL_TYPE:
            raise InputError(
                f"{path}: model_type = {raw.get('model_type')!r} is no probe's; train one with "
                "--connection probe"
            )
        config = Config(**fields_of(raw, SHAPE | {"num_hidden_layers": Field(whole(0, 0))}, path))

        # the shapes are compared before memory is taken
        path = Path(directory) / "model.safetensors"
        tensors = open_tensors(path)
        with torch.device("meta"):
            probe = cls(config)
        for name, p in probe.named_parameters():
            check_tensor(tensors, name, tuple(p.shape), path)
        weights = {name: tensors.get_tensor(name) for name, _ in probe.named_parameters()}
        for name, weight in weights.items():
            check_weight(name, weight, directory)
        probe.load_state_dict(weights, assign=True)
        return probe.to(device, dtype)


# ---------------------------------------------------------------- on disk


def record_connection(directory: str | Path, connection: str) -> None:
    """Notes in a value model's `config.json` how it is joined to its base."""
    path = Path(directory) / "config.json"
    noted = {**read_json(path, TABLE), "ivl_connection": connection}
    write_text(path, json.dumps(noted, indent=2) + "\n")
