"""A Llama that you can load: configuration, network, reading token by token, the Hub's names.

The network is the one that Llama-2, Llama-3, TinyLlama and CodeLlama share. It needs torch alone;
the files of the Hugging Face Hub are read and written by plumbing/weights.py.

Two products are fused, because reading the weights is what decoding costs: queries, keys and
values come from one matrix, gate and up from another. Their rows are interleaved so that one
contiguous piece of rows is always a whole piece of the network: `qkv` holds, for each key-value
head, its group of query heads, its key head, its value head; `gate_up` holds gate row 0, up row 0,
gate row 1, ... `hf_views` says which of our rows are which tensor of the Hub.

Shapes: B batch, T time, S cache slots that are looked at, H hidden, I inside an MLP, V vocabulary;
of a token N queries and K keys (and values), G = N / K queries to a key, D the width of each.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

TILE = 8  # attention masks are this many slots wide, or a multiple: kernels want them aligned
# what a value model may read; all but the first: extras/connections.py
CONNECTIONS = ("residual", "cascade", "cascade+", "probe")


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
    rms_norm_eps: float = 1e-5  # of new models; a config.json without it means 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or {"rope_type": "linear" | "llama3", ...}
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None


def inverse_frequencies(config: Config) -> Tensor:
    """RoPE's angle per position for each pair of a head's dimensions.  (D/2,) in float32

    Type `llama3` (Llama 3.1's recipe for long contexts) slows the pairs whose wavelength is long
    against the original context by `factor`, keeps the short ones, and blends linearly in between.
    """
    exponent = torch.arange(0, config.head_dim, 2, device="cpu").float() / config.head_dim
    frequency = config.rope_theta**-exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]

    # llama3: how often a pair turns within the original context decides what becomes of it
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # (D/2,), 1: unchanged, 0: slowed
    return keep * frequency + (1 - keep) * frequency / scaling["factor"]


# ---------------------------------------------------------------- network


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: turns each pair (x[i], x[i + D/2]) by its angle.

    x: (..., D).
    cos, sin: (..., D), the angles' cosines twice; minus their sines, then their sines.
    The Hub's layout pairs the two halves of a head; Meta's own files pair neighbours.

    Example: D = 2, a quarter turn, so cos = (0, 0) and sin = (−1, 1):
    >>> rotate(torch.tensor([3.0, 5.0]), torch.zeros(2), torch.tensor([-1.0, 1.0]))
    tensor([-5.,  3.])
    """
    # the roll swaps the halves, and sin holds their signs: (a cos − b sin, b cos + a sin)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Attention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.group = config.num_attention_heads // config.num_key_value_heads
        width = self.kv_heads * self.group * self.head_dim
        self.qkv = nn.Linear(
            config.hidden_size, width + 2 * self.kv_heads * self.head_dim, bias=False
        )
        self.out = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        store: Callable | None = None,
    ) -> Tensor:
        """x (B, T, H) → (B, T, H).

        cos, sin: (B, T, 1, 1, D), see `rotate`. mask: (B, 1, T, S); None: causal.
        store: puts keys and values into a cache, and gives all that are to be looked at.
        """
        B, T, _ = x.shape

        # one product for all; a group's queries and its key turn together
        qkv = self.qkv(x).view(B, T, self.kv_heads, self.group + 2, self.head_dim)
        qk = rotate(qkv[..., :-1, :], cos, sin)
        q = qk[..., :-1, :]  # (B, T, K, G, D)
        k = qk[..., -1, :]  # (B, T, K, D)
        v = qkv[..., -1, :]  # (B, T, K, D)

        # keys and values by heads: those of this text, or all that the cache holds
        if store is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, T, D)
        else:
            k, v = store(k, v)  # (B, K, S, D)

        if T == 1:
            # one token: the G queries of a group take the place of time, so no key is repeated;
            # they stand at one position, so one mask (B, 1, 1, S) serves them all
            q = q[:, 0]  # (B, K, G, D)
            y = F.scaled_dot_product_attention(q, k, v, mask)
            return self.out(y.flatten(1)[:, None])  # (B, 1, H)
        q = q.flatten(2, 3).transpose(1, 2)  # (B, N, T, D), N = K·G
        y = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, enable_gqa=self.group > 1
        )  # (B, N, T, D)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, H)


class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, H) → (B, T, H)."""
        # rows alternate: gate 0, up 0, gate 1, up 1, ...
        gate, up = self.gate_up(x).unflatten(-1, (-1, 2)).unbind(-1)  # (B, T, I) each
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        store: Callable | None = None,
    ) -> Tensor:
        """x (B, T, H) → (B, T, H); the arguments are those of `Attention`."""
        x = x + self.attention(self.attention_norm(x), cos, sin, mask, store)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        # recompute each block in the backward pass instead of storing what it has computed
        self.checkpointing = False
        # a weight is given, or nn.Embedding would draw a random one, for a second even on meta
        weight = torch.zeros(config.vocab_size, config.hidden_size)
        self.embed = nn.Embedding(*weight.shape, _weight=weight)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)

    @property
    def unembed(self) -> Tensor:
        """The unembedding matrix, (V, H): the embedding itself where the two are tied."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def hidden(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        cache: "KVCache | None" = None,
        end: int | None = None,
    ) -> Tensor:
        """The last hidden state, normalised: what the unembedding reads.  (B, T, H)

        x: token ids (B, T), or embeddings (B, T, H). A padded batch is padded on the right:
        attention is causal, so padding never reaches a real token.
        positions: (B, T); without them the sequence starts at 0, and a cache counts as empty.
        cache: keys and values are written to it and, if positions are given, read from it.
        end: with positions, only the cache's first `end` slots are looked at (default: all).
        """
        h = x if x.is_floating_point() else self.embed(x)  # (B, T, H)
        B, T, _ = h.shape
        fresh = positions is None
        if fresh:
            positions = torch.arange(T, device=h.device).expand(B, T)

        # RoPE's cosines and sines, in the type of the products: float32 would promote q and k
        device = h.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        angles = positions[..., None].float() * self.inv_freq  # (B, T, D/2)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        cos = torch.cat((cos, cos), -1)[:, :, None, None]  # (B, T, 1, 1, D)
        sin = torch.cat((-sin, sin), -1)[:, :, None, None]  # (B, T, 1, 1, D)

        # a token sees the slots up to its own: a mask says so, or, if the cache is empty, is_causal
        mask = None
        if cache is not None:
            end = T if fresh else (end or cache.slots)
        if cache is not None and not fresh:
            later = torch.arange(end, device=h.device) > positions[..., None]  # (B, T, S)
            mask = torch.zeros_like(later, dtype=h.dtype).masked_fill_(later, -torch.inf)
            mask = mask[:, None]  # (B, 1, T, S)

        for i, block in enumerate(self.blocks):
            if cache is not None:
                store = partial(cache.store, i, positions, end)  # called with k, v
                h = block(h, cos, sin, mask, store)
            elif self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(block, h, cos, sin, use_reentrant=False)
            else:
                h = block(h, cos, sin)
        return self.norm(h)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        cache: "KVCache | None" = None,
        end: int | None = None,
    ) -> Tensor:
        """Logits, (B, T, V); the arguments are those of `hidden`."""
        return F.linear(self.hidden(x, positions, cache, end), self.unembed)

    def reader(self, rows: int, slots: int) -> "Reader":
        """A way through `rows` texts, with a cache of `slots` tokens for each."""
        return Reader(self, rows, slots)

    @torch.no_grad()
    def init_weights(self, seed: int) -> "Llama":
        """Random weights. What a block adds starts at zero, so it drowns no token's embedding."""
        generator = torch.Generator(self.embed.weight.device).manual_seed(seed)
        # norms (one dimension) stay as they are: ones in a new model, else those that were loaded
        for name, weight in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.down.weight")):
                weight.zero_()
            elif weight.dim() == 2:
                spread = 0.1 if name.startswith("embed") else weight.shape[1] ** -0.5
                weight.normal_(0, spread, generator=generator)
        return self

    def size(self) -> int:
        """The number of parameters."""
        return sum(p.numel() for p in self.parameters())


# ---------------------------------------------------------------- reading, token by token


def tiled(slots: int) -> int:
    """So many slots, or some more: a whole number of tiles."""
    return -(-slots // TILE) * TILE


class KVCache:
    """Keys and values of `slots` positions, allocated once. Position p of a text lives in slot p.

    So a batch of prompts is padded on the right, whatever stands in a slot past a text's end is
    never looked at before it is overwritten, and going back in time is only a matter of the
    positions given next.
    """

    def __init__(
        self, config: Config, rows: int, slots: int, device: torch.device, dtype: torch.dtype
    ):
        self.slots = slots = tiled(slots)
        self.rows = torch.arange(rows, device=device)[:, None]  # (B, 1)
        shape = (rows, config.num_key_value_heads, slots, config.head_dim)
        # zeros, since a masked NaN would still be NaN; a tensor a layer, each written in place
        layers = range(config.num_hidden_layers)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]

    def store(
        self, layer: int, positions: Tensor, end: int, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Writes k, v (B, T, K, D) at `positions` (B, T); gives the first `end` slots."""
        # a layer's k is (B, K, slots, D); with an index on both sides of a slice (B, T) come first
        self.k[layer][self.rows, :, positions] = k
        self.v[layer][self.rows, :, positions] = v
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]  # (B, K, end, D)

    def grow(self, slots: int) -> None:
        """Makes room for so many slots."""
        more = tiled(slots) - self.slots
        self.slots += more
        self.k = [F.pad(k, (0, 0, 0, more)) for k in self.k]
        self.v = [F.pad(v, (0, 0, 0, more)) for v in self.v]


class Reader:
    """A model's way through a batch of texts: its cache, and how far each text has been read.

    Decoding asks for no more of a model than `read` and `room`; whoever looks at a text again uses
    `read_each` and `back_to`. `extras/` has models that read in other ways, each with these four.

    Example, two texts: read [5, 6, 7] and [8], then one token more of each
        read([[5, 6, 7], [8, 0, 0]], counts=[3, 1])   → the logits after 7 and after 8, (2, V)
        read([[9], [4]])                              → the logits after 9 and after 4
        back_to([3, 1])                               → 9 and 4 have not been read
    (lists stand for tensors)
    """

    def __init__(self, model: Llama, rows: int, slots: int):
        self.model = model
        self.device = model.unembed.device
        self.cache = KVCache(model.config, rows, slots, self.device, model.unembed.dtype)
        # how many tokens of each text have been read, for the host
        self.lengths = [0] * rows
        # the same for the device, (B, 1): where each row's next token stands
        self.positions = torch.zeros(rows, 1, dtype=torch.long, device=self.device)

    def hidden(self, tokens: Tensor, counts: Tensor | None = None) -> Tensor:
        """Reads on; the last hidden state at each token, (B, T, H).

        tokens: (B, T).
        counts: (B,), so many of a row's tokens are real, the others are padding and count as not
        read (default: all are real).
        """
        tokens = tokens.to(self.device)
        B, T = tokens.shape
        before = max(self.lengths)
        end = before + T
        if end > self.cache.slots:
            self.cache.grow(2 * end)  # doubled, so that growing is rare

        # without positions the model takes the cache for empty; else it looks at the slots in use
        positions = None
        if before > 0:
            positions = self.positions + torch.arange(T, device=self.device)  # (B, T)
        h = self.model.hidden(tokens, positions, self.cache, tiled(end))  # (B, T, H)

        if counts is None:
            self.positions += T
            self.lengths = [length + T for length in self.lengths]
        else:
            self.positions += counts.to(self.device)[:, None]
            self.lengths = [length + n for length, n in zip(self.lengths, counts.tolist())]
        return h

    def read(self, tokens: Tensor, counts: Tensor | None = None) -> Tensor:
        """Reads on, as `hidden`; the logits after each row's last real token, (B, V)."""
        h = self.hidden(tokens, counts)
        if counts is None:
            last = h[:, -1]  # (B, H)
        else:
            rows = torch.arange(len(h), device=self.device)
            last = h[rows, counts.to(self.device) - 1]  # (B, H)
        return self.logits(last)

    def read_each(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Reads tokens (B, T) on; the logits after each from `start` on, (B, T − start, V)."""
        return self.logits(self.hidden(tokens)[:, start:])

    def logits(self, h: Tensor) -> Tensor:
        """h (..., H) → (..., V), in float32."""
        return F.linear(h, self.model.unembed).float()

    def back_to(self, lengths: Sequence[int]) -> None:
        """Takes each text back to its first `lengths[b]` tokens: the rest is as if never read."""
        self.lengths = list(lengths)
        self.positions.copy_(torch.tensor(self.lengths)[:, None])

    def room(self) -> list[int]:
        """How many tokens each text can still grow by within the model's context."""
        context = self.model.config.max_position_embeddings
        return [context - length for length in self.lengths]


@torch.no_grad()
def column_major(model: Llama) -> Llama:
    """Lays the model's matrices out by columns, in place: on a CPU, products with one vector are
    then up to twice as fast.

    The embedding stays as it is, a token is one of its rows; so a tied unembedding becomes a matrix
    of its own. The network is the same, but `save` wants rows.
    """
    if not any(isinstance(module, nn.Linear) for module in model.modules()):
        return model  # its matrices have a layout of their own, see extras/int8.py
    if model.lm_head is None:
        # on meta, so no memory is taken; the loop below makes the shared weight a copy of its own
        V, H = model.embed.weight.shape
        model.lm_head = nn.Linear(H, V, bias=False, device="meta")
        model.lm_head.weight = nn.Parameter(model.embed.weight)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()
    return model


# ---------------------------------------------------------------- weights in and out


def hf_views(model: Llama) -> dict[str, Tensor]:
    """The Hub's name of each tensor → the view of our parameters that holds it.

    A view's rows may lie apart. Example: `model.layers.0.mlp.gate_proj.weight` is every other row
    of `blocks.0.mlp.gate_up.weight`, beginning with the first.
    """
    config = model.config
    views = {
        "model.embed_tokens.weight": model.embed.weight,
        "model.norm.weight": model.norm.weight,
    }
    if model.lm_head is not None:
        views["lm_head.weight"] = model.lm_head.weight
    for i, block in enumerate(model.blocks):
        qkv = block.attention.qkv.weight.view(
            config.num_key_value_heads, -1, config.head_dim, config.hidden_size
        )  # (K, G+2, D, H)
        gate_up = block.mlp.gate_up.weight.view(
            config.intermediate_size, 2, config.hidden_size
        )  # (I, 2, H)
        layer = {
            "input_layernorm": block.attention_norm.weight,
            "post_attention_layernorm": block.mlp_norm.weight,
            "self_attn.q_proj": qkv[:, :-2],
            "self_attn.k_proj": qkv[:, -2],
            "self_attn.v_proj": qkv[:, -1],
            "self_attn.o_proj": block.attention.out.weight,
            "mlp.down_proj": block.mlp.down.weight,
            "mlp.gate_proj": gate_up[:, 0],
            "mlp.up_proj": gate_up[:, 1],
        }
        views |= {f"model.layers.{i}.{name}.weight": view for name, view in layer.items()}
    return views


def hf_shape(view: Tensor) -> tuple[int, ...]:
    """The shape that the Hub gives to the tensor of a view: its rows in one dimension."""
    if view.dim() == 1:
        return tuple(view.shape)
    return view.numel() // view.shape[-1], view.shape[-1]
