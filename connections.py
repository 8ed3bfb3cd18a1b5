"""How a value model is joined to its base: what it reads.

    residual   z_Δ = π_Δ(x, y_<t; θ)                 the text alone                                  §4.1
    cascade    z_Δ = π_Δ(p_base W_e; θ)              the base's probabilities, softmax(z_base)       §4.1
    cascade+   z_Δ = π_Δ(p_base W_e + h_embed; θ)    both                                            §4.1
    probe      z_Δ = MLP(h_base; θ)                  the base's last hidden state                    §3.2, A.1

W_e is the value model's own embedding matrix, h_embed its embedding of the text. A residual value model can run
while the base does, the others wait for it; only a probe is bound to the width of one base.

Shapes: B batch, T time, V vocabulary, H hidden, I the width inside a probe.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from files import InputError, open_tensors, read_json, save_tensors, write_text
from model import Config, KVCache, Llama

CONNECTIONS = ("residual", "cascade", "cascade+", "probe")
CHUNK = {"cpu": 2**21, "cuda": 2**25}  # logits of one model that exist at a time


# ---------------------------------------------------------------- what the value model reads

def expected_embedding(h_base: Tensor, head_base: Tensor, embed: Tensor) -> Tensor:
    """p_base W_e, the embedding of the token that the base expects.  (B, T, H_v)

    h_base (B, T, H_b): the base's last hidden states; head_base (V, H_b); embed (V, H_v), which gets a gradient.
    p_base (B, T, V) is never held in full: it is made in chunks, and in the backward pass made again.
    """
    V = min(len(head_base), len(embed))

    def part(h: Tensor, head: Tensor, embed: Tensor) -> Tensor:
        return F.linear(h, head).float().softmax(-1).to(embed.dtype) @ embed

    def again(*inputs: Tensor) -> Tensor:
        return checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)

    do = again if torch.is_grad_enabled() else part
    rows = h_base.detach().flatten(0, 1).split(max(1, CHUNK.get(embed.device.type, 2**24) // V))
    return torch.cat([do(h, head_base.detach()[:V], embed[:V]) for h in rows]).unflatten(0, h_base.shape[:2])


def value_input(connection: str, value: "Llama | Probe", tokens: Tensor, h_base: Tensor | None,
                head_base: Tensor | None) -> Tensor:
    """What `value.hidden` is to read: token ids (B, T) or vectors (B, T, H).

    tokens (B, T): the text; h_base (B, T, H_b), head_base (V, H_b): of the base, unused by a residual value model.
    """
    if connection == "residual":
        return tokens
    if connection == "probe":
        return h_base.detach()
    h = expected_embedding(h_base, head_base, value.embed.weight)
    return h + value.embed(tokens) if connection == "cascade+" else h


# ---------------------------------------------------------------- the probe

class Probe(nn.Module):
    """z_Δ = W_down (σ(W_gate h + b_gate) ⊙ (W_up h + b_up)) + b_down: a Llama's MLP with biases, appendix A.1.

    (As printed, W_down is applied before ⊙; then the shapes would not fit.) It stands where a Llama would: `hidden`
    gives the MLP's inside (B, T, I + 1) and `head` is (V, I + 1). The last feature is always 1, and its column b_down.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = replace(config, num_hidden_layers=0)  # its base's: so many layers have its keys and values
        self.gate, self.up = (nn.Linear(config.hidden_size, config.intermediate_size) for _ in range(2))
        self.head = nn.Parameter(torch.zeros(config.vocab_size, config.intermediate_size + 1))

    def hidden(self, h_base: Tensor, positions: Tensor | None = None, cache: KVCache | None = None,
               end: int | None = None) -> Tensor:
        """The arguments are those of `Llama.hidden`; a probe looks at one position at a time and needs no cache."""
        return F.pad(F.silu(self.gate(h_base)) * self.up(h_base), (0, 1), value=1.0)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Probe":
        """Random weights, but z_Δ = 0: training starts at the base itself."""
        generator = torch.Generator(self.head.device).manual_seed(seed)
        for layer in (self.gate, self.up):
            layer.weight.normal_(0, layer.in_features ** -0.5, generator=generator)
            layer.bias.zero_()
        self.head.zero_()
        return self

    def check(self, bases: Sequence[str | Path]) -> None:
        """Raises InputError for a base whose hidden state is not as wide as what the probe reads."""
        for base in bases:
            if (width := Config.load(base).hidden_size) != self.config.hidden_size:
                raise InputError(f"{base}: has a hidden state of {width} numbers, but the probe was made for one of "
                                 f"{self.config.hidden_size}; a probe belongs to its base, train another for this one")

    def size(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.parameters())

    def save(self, directory: str | Path) -> None:
        directory = Path(directory)
        save_tensors({name: p.data for name, p in self.named_parameters()}, directory / "model.safetensors", {})
        config = {"model_type": "ivl-probe", **asdict(self.config)}  # nobody is to take it for a Llama
        write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> "Probe":
        """Raises InputError for a directory that holds no probe, or a damaged one."""
        directory = Path(directory)
        raw, tensors = read_json(directory / "config.json", dict), open_tensors(directory / "model.safetensors")
        try:
            probe = cls(Config(**{field.name: raw[field.name] for field in fields(Config)}))
            probe.load_state_dict({name: tensors.get_tensor(name) for name in tensors.keys()})
        except (KeyError, TypeError, RuntimeError):
            raise InputError(f"{directory}: holds no probe that train.py has saved; train one with --connection probe") from None
        return probe.to(device, dtype)


# ---------------------------------------------------------------- on disk

def record_connection(directory: str | Path, connection: str) -> None:
    """Notes in a value model's `config.json` how it is joined to its base."""
    path = Path(directory) / "config.json"
    write_text(path, json.dumps({**read_json(path, dict), "ivl_connection": connection}, indent=2) + "\n")


def recorded_connection(directory: str | Path) -> str:
    """The connection of a value model; any Llama can serve as a residual one. Raises InputError for an unknown one."""
    path = Path(directory) / "config.json"
    connection = read_json(path, dict).get("ivl_connection", "residual")
    if connection not in CONNECTIONS:
        raise InputError(f"{path}: ivl_connection = {connection!r} is none of {', '.join(CONNECTIONS)}")
    return connection
