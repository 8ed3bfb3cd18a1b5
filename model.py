"""A Llama that you can load: configuration, network, key-value cache, weights in and out.

The network is the one that Llama-2, Llama-3, TinyLlama and CodeLlama share, and the files are
those of the Hugging Face Hub (`config.json`, `*.safetensors`), read and written.

Two products are fused, because reading the weights is what decoding costs: queries, keys and
values come from one matrix, gate and up from another. Their rows are interleaved so that one
contiguous piece of rows is always a whole piece of the network: `qkv` holds, for each key-value
head, its group of query heads, its key head, its value head; `gate_up` holds gate row 0, up row 0,
gate row 1, ... `hf_views` says which of our rows are which tensor of the Hub.

Shapes: B batch, T time, S cache slots, H hidden, V vocabulary, N query heads, K key-value heads,
G = N / K queries a group, D head width.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from files import InputError, open_tensors, read_json, save_tensors, write_text

SHARD_BYTES = 5 * 2**30  # a saved model is split into files of about this size, as on the Hub


# ---------------------------------------------------------------- configuration

@dataclass
class Config:
    """A Llama's shape, under the names that Hugging Face's `config.json` gives it."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or {"rope_type": "linear" | "llama3", ...}
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @classmethod
    def load(cls, directory: str | Path) -> "Config":
        """Reads `directory/config.json`. Raises InputError for a field that this network does not have."""
        path = Path(directory) / "config.json"
        raw = read_json(path, dict)
        supported = {"model_type": ["llama"], "hidden_act": ["silu", None], "attention_bias": [False, None],
                     "mlp_bias": [False, None], "quantization_config": [None], "partial_rotary_factor": [1.0, None]}
        for field, allowed in supported.items():
            if raw.get(field) not in allowed:
                raise InputError(f"{path}: {field} = {raw.get(field)!r} is not supported (only {allowed[0]!r}); "
                                 "choose a plain Llama model")

        def positive(field: str, default: int | None = None) -> int:
            value = raw.get(field) if raw.get(field) is not None else default
            if not isinstance(value, int) or value <= 0:
                raise InputError(f"{path}: {field} = {value!r}; it must be a positive integer")
            return value

        heads, hidden = positive("num_attention_heads"), positive("hidden_size")
        config = cls(
            vocab_size=positive("vocab_size"), hidden_size=hidden, intermediate_size=positive("intermediate_size"),
            num_hidden_layers=positive("num_hidden_layers"), num_attention_heads=heads,
            num_key_value_heads=positive("num_key_value_heads", heads), head_dim=positive("head_dim", hidden // heads),
            max_position_embeddings=positive("max_position_embeddings", 2048),
            rms_norm_eps=raw.get("rms_norm_eps", 1e-6), tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
            bos_token_id=raw.get("bos_token_id"), eos_token_id=raw.get("eos_token_id"))
        if heads % config.num_key_value_heads:
            raise InputError(f"{path}: num_attention_heads must be a multiple of num_key_value_heads")

        rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})  # the new spelling, the old one
        config.rope_theta = float(rope.pop("rope_theta", raw.get("rope_theta") or 10000.0))
        kind = rope.setdefault("rope_type", rope.pop("type", "default"))
        needs = {"default": (), "linear": ("factor",), "llama3": (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
        if kind not in needs:
            raise InputError(f"{path}: rope_type = {kind!r} is not supported (only {', '.join(needs)})")
        for field in needs[kind]:
            if not isinstance(rope.get(field), (int, float)):
                raise InputError(f"{path}: RoPE of type {kind!r} needs the number {field!r}")
        config.rope_scaling = None if kind == "default" else rope
        return config

    def save(self, directory: str | Path, dtype: torch.dtype) -> None:
        """Writes `config.json` with both the old and the new spelling of RoPE and dtype."""
        name = str(dtype).removeprefix("torch.")
        rope = {"rope_theta": self.rope_theta, **(self.rope_scaling or {"rope_type": "default"})}
        raw = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **asdict(self), "rope_parameters": rope,
               "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "dtype": name, "torch_dtype": name}
        write_text(Path(directory) / "config.json", json.dumps(raw, indent=2) + "\n")


def inverse_frequencies(config: Config) -> Tensor:
    """RoPE's angle per position for each pair of a head's dimensions.  (D/2,) in float32

    Type `llama3` (Llama 3.1's recipe for long contexts) slows the pairs whose wavelength is long against
    the original context by `factor`, keeps the short ones, and blends linearly in between.
    """
    frequency = config.rope_theta ** -(torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)  # in the original context
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequency + (1 - keep) * frequency / scaling["factor"]


# ---------------------------------------------------------------- network

def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turns each pair (x[i], x[i + D/2]) by its angle. x: (..., D); cos of the angles, twice, −sin and sin: (..., D)

    The Hub's layout pairs the two halves of a head; Meta's own files pair neighbours.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        self.group = config.num_attention_heads // config.num_key_value_heads
        self.qkv = nn.Linear(config.hidden_size, self.kv_heads * (self.group + 2) * self.head_dim, bias=False)
        self.out = nn.Linear(self.kv_heads * self.group * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, store) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, self.kv_heads, self.group + 2, self.head_dim)
        qk = rotate(qkv[..., :-1, :], cos, sin)  # a group's queries and its key turn together
        q, k, v = qk[..., :-1, :], qk[..., -1, :], qkv[..., -1, :]  # (B, T, K, G, D), (B, T, K, D) twice
        k, v = (k.transpose(1, 2), v.transpose(1, 2)) if store is None else store(k, v)  # (B, K, S, D)
        # of one token, the queries of a group see the same keys: G stands where time would, and no key is repeated
        q = q[:, 0] if T == 1 else q.flatten(2, 3).transpose(1, 2)  # (B, K, G, D) or (B, N, T, D)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1,
                                           enable_gqa=self.group > 1 and T > 1)
        return self.out(y.flatten(1)[:, None] if T == 1 else y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None = None, store=None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, store)
        return x + self.mlp(self.mlp_norm(x))


class KVCache:
    """Keys and values of `slots` positions, allocated once. Position p of a sequence lives in slot p.

    So a batch of prompts is padded on the right, whatever stands in a slot past a row's position is
    never looked at before it is overwritten, and going back in time is only a matter of the
    positions given next.
    """

    def __init__(self, config: Config, batch: int, slots: int, device, dtype: torch.dtype):
        self.slots = slots
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, slots, config.head_dim)
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for _ in "kv")  # a masked NaN would still be NaN

    def store(self, layer: int, positions: Tensor, k: Tensor, v: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """Writes k, v (B, T, K, D) at `positions` (B, T); gives the first `end` slots, (B, K, end, D)."""
        keys, values, k, v = self.k[layer], self.v[layer], k.transpose(1, 2), v.transpose(1, 2)
        places = positions[:, None, :, None].expand_as(k)
        keys.scatter_(2, places, k)
        values.scatter_(2, places, v)
        return keys[:, :, :end], values[:, :, :end]


class Llama(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # recompute each block in the backward pass instead of storing it
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, False)
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)

    @property
    def head(self) -> Tensor:
        """The unembedding matrix, (V, H)."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def hidden(self, x: Tensor, positions: Tensor | None = None, cache: KVCache | None = None,
               end: int | None = None) -> Tensor:
        """The last hidden state, normalised: what the unembedding reads.  (B, T, H)

        x: token ids (B, T), or embeddings (B, T, H). A padded batch is padded on the right: attention is
        causal, so padding never reaches a real token.
        positions: (B, T); without them the sequence starts at 0, and a cache counts as empty.
        cache: keys and values are written to it and, if positions are given, read from it.
        end: only the first `end` slots of the cache are looked at (default: all); no position may reach it.
        """
        h = x if x.is_floating_point() else self.embed(x)
        fresh = positions is None
        if fresh:
            positions = torch.arange(h.shape[1], device=h.device).expand(h.shape[:2])
        angles = positions[..., None].float() * self.inv_freq
        cos, sin = angles.cos().to(h.dtype), angles.sin().to(h.dtype)
        cos, sin = (torch.cat(halves, -1)[:, :, None, None] for halves in ((cos, cos), (-sin, sin)))  # (B, T, 1, 1, D)
        mask = None
        if cache is not None:
            end = h.shape[1] if fresh else (end or cache.slots)
            if not fresh:  # from an empty cache plain causal attention is the same, and faster
                later = torch.arange(end, device=h.device) > positions[..., None]  # (B, T, end)
                mask = torch.zeros_like(later, dtype=h.dtype).masked_fill_(later, -torch.inf)[:, None]
        for i, block in enumerate(self.blocks):
            if cache is not None:
                h = block(h, cos, sin, mask, lambda k, v: cache.store(i, positions, k, v, end))
            elif self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, cos, sin, use_reentrant=False)
            else:
                h = block(h, cos, sin)
        return self.norm(h)

    def forward(self, x: Tensor, positions: Tensor | None = None, cache: KVCache | None = None,
                end: int | None = None) -> Tensor:
        """Logits, (B, T, V); the arguments are those of `hidden`."""
        return F.linear(self.hidden(x, positions, cache, end), self.head)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Llama":
        """Random weights. What a block adds starts at zero, so a token's embedding is not drowned before it is used."""
        generator = torch.Generator(self.embed.weight.device).manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                weight.zero_()
            elif weight.dim() == 2:
                weight.normal_(0, 0.1 if name.startswith("embed") else weight.shape[1] ** -0.5, generator=generator)
        return self

    def size(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.parameters())


# ---------------------------------------------------------------- weights in and out

def hf_views(model: Llama) -> dict[str, Tensor]:
    """The Hub's name of each tensor → the view of our parameters that holds it (its rows may lie apart)."""
    config = model.config
    views = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight}
    if model.lm_head is not None:
        views["lm_head.weight"] = model.lm_head.weight
    for i, block in enumerate(model.blocks):
        qkv = block.attention.qkv.weight.view(config.num_key_value_heads, -1, config.head_dim, config.hidden_size)
        gate_up = block.mlp.gate_up.weight.view(config.intermediate_size, 2, config.hidden_size)
        views |= {f"model.layers.{i}.{name}.weight": view for name, view in {
            "input_layernorm": block.attention_norm.weight, "post_attention_layernorm": block.mlp_norm.weight,
            "self_attn.q_proj": qkv[:, :-2], "self_attn.k_proj": qkv[:, -2], "self_attn.v_proj": qkv[:, -1],
            "self_attn.o_proj": block.attention.out.weight, "mlp.down_proj": block.mlp.down.weight,
            "mlp.gate_proj": gate_up[:, 0], "mlp.up_proj": gate_up[:, 1]}.items()}
    return views


def hf_shape(view: Tensor) -> tuple[int, ...]:
    return (view.numel() // view.shape[-1], view.shape[-1]) if view.dim() > 1 else tuple(view.shape)


def weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index, dict).get("weight_map")
        if not isinstance(names, dict):
            raise InputError(f"{index}: has no 'weight_map'; download the index again")
        return sorted({directory / name for name in names.values()})
    if not (directory / "model.safetensors").exists() and list(directory.glob("*.bin")):
        raise InputError(f"{directory}: has weights in pickle files only (*.bin), which are never read; "
                         "convert them to safetensors")
    return [directory / "model.safetensors"]


def stored_tensors(directory: Path, views: dict[str, Tensor]) -> Iterator[tuple]:
    """The names of `views` as the directory's files hold them, each with a slice still to be read: [:] is the tensor.
    Raises InputError for a file that is missing or damaged, and for tensors that do not fit `config.json`."""
    missing = set(views)
    for file in weight_files(directory):
        for name in open_tensors(file).keys():
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and name not in views):
                continue  # both follow from the configuration
            if name not in views:
                raise InputError(f"{file}: tensor {name} has no place in the model that config.json describes")
            tensor = open_tensors(file).get_slice(name)  # opened anew: what was read of the last one leaves the memory
            if (shape := tuple(tensor.get_shape())) != hf_shape(views[name]):
                raise InputError(f"{file}: tensor {name} has shape {shape}; config.json asks for {hf_shape(views[name])}")
            missing.discard(name)
            yield name, tensor
    if missing:
        raise InputError(f"{directory}: tensor {min(missing)} is in none of its safetensors files ({len(missing)} missing)")


@torch.no_grad()
def load(directory: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Llama:
    """A Llama from a Hugging Face directory; raises InputError. Peak memory: the model, plus one tensor of its files."""
    with torch.device("meta"):
        model = Llama(Config.load(directory))
    model.to(dtype).to_empty(device=device)
    model.inv_freq = inverse_frequencies(model.config).to(device)  # in float32 whatever the dtype
    views = hf_views(model)
    for name, tensor in stored_tensors(Path(directory), views):
        views[name].copy_(tensor[:].view(views[name].shape))
    return model


@torch.no_grad()
def save(model: Llama, directory: str | Path, dtype: torch.dtype = torch.float32, fetch: Callable | None = None) -> None:
    """Writes `config.json` and safetensors as the Hub has them. fetch: Hub name → tensor, if not the model's own."""
    directory, shards, weight_map, offset, views = Path(directory), {}, {}, 0, hf_views(model)
    for name, view in views.items():
        shards.setdefault(offset // SHARD_BYTES, {})[name] = torch.empty(hf_shape(view), dtype=dtype, device="meta")
        offset += view.numel() * dtype.itemsize
    for i, shard in enumerate(shards.values(), 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_tensors(shard, directory / file, {"format": "pt"}, fetch or views.get)
        weight_map |= dict.fromkeys(shard, file)
    model.config.save(directory, dtype)
    if len(shards) > 1:  # last, since by its index a sharded model is found
        write_text(directory / "model.safetensors.index.json",
                   json.dumps({"metadata": {"total_size": offset}, "weight_map": weight_map}, indent=2) + "\n")
