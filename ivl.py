"""Inverse Value Learning: the paper in code (Lu et al., NAACL 2025).

A frozen base model knows things; a small value model, trained beside a small base on demonstrations,
knows how to behave. They meet in the logits, so the value model can be moved to another base:

    z_base = π_base(x, y_<t; θ₁)                                                    equation (1)
    z_Δ    = π_Δ(x, y_<t; θ₂)             residual: it reads the text alone         equation (2), §4.1
    z_post = stop_gradient(z_base) + z_Δ                                            equation (3)
    L      = CE(z_post, p_l) + λ ‖z_Δ‖₁   over the tokens of the replies            equation (4), §4.2.1

‖z_Δ‖₁ is taken as a mean over the vocabulary, as in the authors' code: λ = 1.0 (Table 5) belongs to
V = 32000. The term's pull on one logit is λ/V, so for a small vocabulary λ shrinks in proportion.

Shapes: B batch, T time, V vocabulary. θ₁ never receives a gradient: `combine` detaches z_base.
"""

from collections.abc import Collection, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from files import InputError
from mapped import MappedBase
from model import KVCache, Llama
from vocab_map import VocabMap

IGNORE = -100  # the target of a position that is not to be predicted: prompt, padding


# ---------------------------------------------------------------- the objective

def combine(z_base: Tensor, z_delta: Tensor, alpha: float = 1.0) -> Tensor:
    """z_post = stop_gradient(z_base) + α z_Δ, equation (3).  (..., V)

    α = 1 is the paper; 0 gives the base alone, other values dose the value model's influence.
    Where one model's vocabulary has a padded tail, the shared front of both counts.
    """
    V = min(z_base.shape[-1], z_delta.shape[-1])
    return z_base[..., :V].detach() + alpha * z_delta[..., :V]


def norm_term(z_delta: Tensor, counted: Tensor) -> Tensor:
    """Σ over the counted positions of mean_V |z_Δ|, §4.2.1.  z_delta (B, T, V), counted (B, T) bool → scalar

    `counted` keeps padding out: without it the value model would be rewarded for silence where nobody reads.
    """
    return z_delta[counted].float().abs().mean(-1).sum()


def loss_sums(z_base: Tensor | None, z_delta: Tensor, targets: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The two terms of the loss as sums in nats, (cross-entropy, norm term), in float32.

    z_base, z_delta: (B, T, V); z_base None stands for zeros: then z_Δ is a model of its own (full fine-tuning).
    targets: (B, T), the token that each position should predict, or IGNORE. counted: (B, T), see `norm_term`.
    Sums, not means, so that a batch split into parts of unequal length still adds up to the same gradient.
    """
    z_post = z_delta if z_base is None else combine(z_base, z_delta)
    chosen = targets != IGNORE  # the loss of a prompt's tokens is not computed and thrown away
    cross_entropy = F.cross_entropy(z_post[chosen].float(), targets[chosen], reduction="sum")
    return cross_entropy, norm_term(z_delta, counted)


# ---------------------------------------------------------------- vocabularies

def shared_vocabulary(base_tokens: Sequence[str | None], value_tokens: Sequence[str | None]) -> int:
    """How many leading ids mean the same token in both vocabularies.

    base_tokens, value_tokens: the content of each id, None for a row of padding. What one side has past the
    other's end (padding, tokens added later: CodeLlama's 32016 against Llama-2's 32000) is left out of z_post.
    Raises InputError where the two differ in content: equal sizes prove nothing.
    """
    def trimmed(tokens: Sequence[str | None]) -> list[str | None]:
        used = [i for i, token in enumerate(tokens) if token is not None]
        return list(tokens[:used[-1] + 1]) if used else []

    base_tokens, value_tokens = trimmed(base_tokens), trimmed(value_tokens)
    shared = min(len(base_tokens), len(value_tokens))
    for i in range(shared):
        if base_tokens[i] != value_tokens[i]:
            raise InputError(
                f"the base and the value model have different vocabularies: token {i} is {base_tokens[i]!r} in the one "
                f"and {value_tokens[i]!r} in the other; make a map between them with vocab_map.py")
    return shared


# ---------------------------------------------------------------- decoding

def choose(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None) -> Tensor:
    """The next token of each row.  logits (B, V) → (B,)

    temperature 0 takes the likeliest token. top_k keeps the k likeliest (0: all); top_p keeps the fewest
    tokens that together have probability p (1: all), always at least one.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        p = ordered.softmax(-1)
        drop = p.cumsum(-1) - p >= top_p  # all likelier tokens together have reached top_p already
        drop[:, 0] = False
        logits = logits.scatter(-1, order, ordered.masked_fill(drop, -torch.inf))
    # argmax of p / Exponential(1) is a draw from p, without waiting for the device as multinomial does
    noise = torch.empty_like(logits).exponential_(generator=generator)
    return (logits.softmax(-1) / noise).argmax(-1)


@torch.inference_mode()
def generate(base: Llama, value: Llama | None, prompts: Sequence[Sequence[int]], max_new_tokens: int, *,
             alpha: float = 1.0, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
             stop: Collection[int] = (), vocabulary: int | None = None,
             mapping: VocabMap | None = None) -> Iterator[list[int | None]]:
    """Decodes z_post over two key-value caches; value None decodes the base alone.

    prompts: B lists of token ids, of any lengths. Each step yields B new ids; a reply's last one is a token of
    `stop`, and after it the row yields None. Ends when every row has stopped or after max_new_tokens.
    vocabulary: the first ids that may be chosen, see `shared_vocabulary` (default: all that both models have).
    mapping: for a base with another tokenizer; prompts and replies are in the value model's ids, equation (5), and
    replies also end where a text fills the base's context.
    """
    reader = None
    if mapping is not None and not mapping.identity:
        reader, texts = MappedBase(base, mapping, len(prompts)), [list(prompt) for prompt in prompts]
    models = [model for model in (base if reader is None else None, value) if model is not None]
    device, dtype = base.embed.weight.device, base.embed.weight.dtype
    generator = torch.Generator(device).manual_seed(seed)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    slots = longest + max_new_tokens
    caches = [KVCache(model.config, len(prompts), slots, device, dtype) for model in models]
    tokens = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    running = [True] * len(prompts)

    # the first step reads the prompts, all the others one token a row
    positions, last = None, (lengths - 1)[:, None, None]
    for end in range(longest, slots):
        z = [] if reader is None else [reader.next(texts)]
        for model, cache in zip(models, caches):
            h = model.hidden(tokens, positions, cache, end)
            h = h.take_along_dim(last, dim=1)[:, 0]  # the unembedding is needed at a row's last token only
            z.append(F.linear(h, model.head).float())
        z_post = z[0] if len(z) == 1 else combine(*z, alpha)
        new = choose(z_post[:, :vocabulary], temperature, top_k, top_p, generator)
        ids = new.tolist()
        yield [i if on else None for i, on in zip(ids, running)]
        running = [on and i not in stop for i, on in zip(ids, running)]
        if not any(running):
            return
        if reader is not None:
            if reader.full():
                return
            texts = [[*text, i] if on else text for text, i, on in zip(texts, ids, running)]
        positions = lengths[:, None] if positions is None else positions + 1
        tokens, last = new[:, None], torch.zeros_like(last)
