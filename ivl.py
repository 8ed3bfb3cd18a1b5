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

import math
from collections.abc import Collection, Iterator, Sequence
from os.path import commonprefix  # of any sequences, not only of paths

import torch
import torch.nn.functional as F
from torch import Tensor

from files import InputError
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


class MappedBase:
    """A base that is asked for the next token of another vocabulary, for the z_base W of equation (5).

    The text grows by value tokens. The base reads its own, canonical tokenization of it; where the last tokens merge
    differently than before, its cache is rolled back to those that stayed. And where the text stops, a base token need
    not stop. So every boundary of the base's that one more base token can carry past the text's end is kept as a head:
    its place, the log-probability of the ids up to it, the log-probabilities of the next. Each head speaks for the base
    tokens that begin with the bytes since its boundary; what is left of them are the next bytes (see VocabMap.rows).

    canonical, step_back, linear: all of it, or the paper's way where they are False, False, True.
    """
    TAIL = 16  # base tokens at the end of a text that may still merge differently
    FLOOR = 1e-4  # share of a uniform distribution in the mapped one: no token wins or loses by a zero

    def __init__(self, model: Llama, mapping: VocabMap, rows: int, *, canonical: bool = True, step_back: bool = True,
                 linear: bool = False):
        self.model, self.mapping = model, mapping
        self.canonical, self.step_back, self.linear = canonical, step_back, linear
        self.device, self.columns = model.embed.weight.device, len(mapping.value.bytes)
        self.cache = KVCache(model.config, rows, 0, self.device, model.embed.weight.dtype)
        self.ids: list[list[int]] = [[] for _ in range(rows)]  # what the cache holds
        self.sums: list[list[float]] = [[0.0] for _ in range(rows)]  # log-probability of the ids up to each
        self.heads: list[dict[int, tuple[float, Tensor]]] = [{} for _ in range(rows)]

    def next(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """The mapped z_base after each text of value ids, (B, V_value). A text goes on from what it was last time."""
        read = [self.mapping.read(text, self.canonical) for text in texts]
        # the last id that stayed is fed again: the first new id's probability comes from it
        starts = [max(0, len(commonprefix([old, ids])) - 1) for old, (ids, _, _) in zip(self.ids, read)]
        fed = [ids[start:] for start, (ids, _, _) in zip(starts, read)]
        width = max(map(len, fed))
        end, cache = max(starts) + width, self.cache
        if end > cache.k.shape[2]:
            self.cache = KVCache(self.model.config, len(texts), 2 * end, self.device, cache.k.dtype)
            self.cache.k[:, :, :cache.k.shape[2]], self.cache.v[:, :, :cache.k.shape[2]] = cache.k, cache.v
        tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in fed], device=self.device)
        positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(width, device=self.device)
        h = self.model.hidden(tokens, positions, self.cache, end)
        z = torch.stack([self._row(i, start, *read[i], h[i]) for i, start in enumerate(starts)])
        self.ids = [ids for ids, _, _ in read]
        return z

    def _row(self, i: int, start: int, ids: list[int], ends: list[int], text: bytes, h: Tensor) -> Tensor:
        """One row of `next`; h: the hidden states from position `start` on."""
        first = max(start, len(ids) - self.TAIL)
        z = F.linear(h[first - start:len(ids) - start], self.model.head).float()[:, :len(self.mapping.base.bytes)]
        out = z.new_zeros(self.columns)
        if self.linear:
            b, v, w = self.mapping.rows(b"", self.device)
            return out.index_add(0, v, z[-1, b] * w)
        logp = z.log_softmax(-1)
        if first > start or -1 in ends[first:]:  # a new text, or a new part of it: the sums begin anew
            self.heads[i], self.sums[i] = {}, [0.0] * (first + 1)
        sums = self.sums[i][:first + 1]
        for k in range(first + 1, len(ids)):
            sums.append(sums[-1] + logp[k - 1 - first, ids[k]].item())
        last = {len(text): (sums[-1], logp[-1])}
        if self.step_back:
            heads = self.heads[i] | {end: (sums[k], logp[k - first]) for k, end in enumerate(ends) if k >= first <= end}
            heads = {end: head for end, head in heads.items() if len(self.mapping.rows(text[end:], self.device)[0])}
        else:
            heads = last
        self.heads[i], self.sums[i] = heads, sums
        heads = heads or last  # bytes that no base token can spell are passed over
        likeliest = max(logp_head for logp_head, _ in heads.values())
        for end, (logp_head, logp) in heads.items():
            b, v, w = self.mapping.rows(text[end:], self.device)
            out.index_add_(0, v, logp[b].exp() * w, alpha=math.exp(logp_head - likeliest))
        return torch.log((1 - self.FLOOR) * out / out.sum() + self.FLOOR / self.columns)


PAPERS_WAY = dict(canonical=False, step_back=False, linear=True)


@torch.inference_mode()
def retention(base: Llama, mapping: VocabMap, texts: Sequence[str], batch_size: int = 32, **way: bool) -> float:
    """How much longer held-out text is under the mapped base: its nats per byte over the base's own; 1: nothing is lost.

    Counts the texts that both vocabularies can spell and that fit the base's context. Raises InputError if none is left.
    way: of MappedBase; by default the map's own.
    """
    way = way or (PAPERS_WAY if mapping.method == "paper" else {})
    spelt, context = [], base.config.max_position_embeddings
    for text in texts:
        (ours, _), (theirs, _) = (side.spell(text.encode()) for side in (mapping.base, mapping.value))
        whole = all(side.join(ids) == side.space + text.encode()
                    for side, ids in ((mapping.base, ours), (mapping.value, theirs)))
        if whole and len(ours) < context:
            spelt.append((theirs, mapping.read(theirs)[0]))
    if not spelt:
        raise InputError("no held-out text can be spelt in both vocabularies within the base's context; give others")
    own = mapped = 0.0
    for _, ids in spelt:
        z = base(torch.tensor([ids[:-1]], device=base.embed.weight.device))[0]
        own += F.cross_entropy(z.float(), torch.tensor(ids[1:], device=z.device), reduction="sum").item()
    for k in range(0, len(spelt), batch_size):
        rows = [ids for ids, _ in spelt[k:k + batch_size]]
        reader = MappedBase(base, mapping, len(rows), **way)
        for t in range(max(map(len, rows))):
            logp = reader.next([ids[:t] for ids in rows]).log_softmax(-1)
            mapped -= sum(logp[i, ids[t]].item() for i, ids in enumerate(rows) if t < len(ids))
    return mapped / own


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
    mapping: for a base with another tokenizer; prompts and replies are in the value model's ids, equation (5).
    """
    reader = None
    if mapping is not None and not mapping.identity:
        way = PAPERS_WAY if mapping.method == "paper" else {}
        reader, texts = MappedBase(base, mapping, len(prompts), **way), [list(prompt) for prompt in prompts]
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
            texts = [[*text, i] if on else text for text, i, on in zip(texts, ids, running)]
        positions = lengths[:, None] if positions is None else positions + 1
        tokens, last = new[:, None], torch.zeros_like(last)
