"""Speculative decoding with a shared value model: a small base drafts, the large base verifies.

    python sample.py --base LARGE --value DIR --draft SMALL "question"

The draft is the small base + value model, the target the large base + *the same* value model. Of a
text that ends with the token t, a round with three drafted tokens is

    small base    reads t, x₁, x₂ one by one, for z_draft
    value model   reads t, x₁, x₂, x₃ one by one, for z_Δ
                  x₁, x₂, x₃ are chosen by z_draft + α z_Δ
    large base    reads t, x₁, x₂, x₃ at once, for z_base
                  z_base + α z_Δ says which of them stand; z_Δ is known already

If x₃ does not stand, the target chooses another token in its place, and the next round begins with
text, x₁, x₂, y. If all three stand it chooses a fourth one: so a round gives at least one token.

Nothing is lost (Leviathan et al., 2023, "Fast Inference from Transformers via Speculative
Decoding"): greedily chosen tokens are those of `ivl.generate`, drawn ones have the same
distribution. What the large base reads at once it rounds in another way than token by token, so
two tokens that are level, which in bfloat16 some are, may change places.

Refused: a map, since a mapped base reads token by token; several processes, where no one has all
logits; value models that read what a base says, since then z_Δ is another beside another base.

Shapes: B batch, V vocabulary, k drafted tokens.
"""

import math
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from extras.int8 import FEW, Matrix
from ivl import combine, draw, padded, probabilities
from model import Llama

LONGEST = 16  # tokens that are drafted at most
FIRST_GUESS = 0.7  # of the share that stands; it counts like one drafted token that was seen
MEMORY = 0.98  # how much of what was seen still counts a round later
# a layer costs, besides reading its weights, the time of so many more
LAYER = {"cpu": 1.2e6, "cuda": 5e7}
ROUND = 1.1  # what a round takes, over what its reading takes


# ---------------------------------------------------------------- how many to draft


def speedup(share: float, k: int, price: float) -> float:
    """How many times faster than plain decoding k drafted tokens a round are (Theorem 3.8 there).

    share: of the drafted tokens that are looked at, those that stand, β. price: of the round, where
    a step of plain decoding costs 1.

    Example: half of them stand, and two cost half a step: 1 + ½ + ¼ tokens in the time of 1.5
    >>> speedup(0.5, 2, 1.5)
    1.1666666666666667
    """
    tokens = sum(share**i for i in range(k + 1))
    return tokens / price


def product(rows: int, kind: str, bits: int) -> float:
    """What a product of so many rows with a matrix costs; 1: to read the matrix as floats.

    On a GPU reading is all. On a CPU a product of two float rows takes twice as long as one of one;
    from three rows on PyTorch lays the matrix out anew, and more rows cost little. Eight bits are
    multiplied by four rows at a time, and are made floats for many, see int8.py.
    """
    many = rows > FEW
    if kind != "cpu":
        if bits > 8:
            return 1.0
        return 2.5 if many else 0.5
    as_floats = min(rows, 3) + 0.1 * rows
    if bits > 8:
        return as_floats
    return as_floats if many else 0.25 + 0.3 * math.ceil(rows / 4) + 0.05 * rows


def cost(model: Llama, rows: int) -> float:
    """What it costs to read so many tokens at once, those of all rows of a batch: the time of
    reading so many weights as floats.
    """
    kind = model.unembed.device.type
    total = 0.0
    for part in getattr(model, "models", [model]):  # those of a `Proxy` are two
        weights = part.unembed.numel() + sum(p.numel() for p in part.blocks.parameters())
        bits = 8 if isinstance(part.unembed, Matrix) else 16
        total += LAYER.get(kind, LAYER["cuda"]) * len(part.blocks)
        total += weights * product(rows, kind, bits)
    return total


def prices(base: Llama, draft: Llama, value: Llama, B: int) -> list[float]:
    """What a round with 0, 1, 2, ... drafted tokens costs, where a step of plain decoding costs 1.

    An estimate from the models' sizes and not from a clock: the same seed is to give the same
    tokens, and these depend on how many were drafted.
    """
    plain = cost(base, B) + cost(value, B)
    drafting = cost(draft, B) + cost(value, B)
    rounds = [
        ROUND * (k * drafting + cost(base, (k + 1) * B) + cost(value, B)) / plain
        for k in range(1, LONGEST + 1)
    ]
    return [1.0, *rounds]


class Pace:
    """How many tokens to draft in the next round, from its price and from how many have stood.

    It is the k with the best `speedup`: many where most stand, none where few do. What was seen is
    forgotten by and by, so after rounds without a draft one is tried again.
    prices: of rounds with 0, 1, 2, ... drafted tokens, see `prices`.

    Example: a drafted token costs a third of a step; two rows reject their first one; much later
    >>> pace = Pace([1, 4 / 3, 5 / 3, 2])
    >>> pace.length()
    2
    >>> pace.seen(2, [0, 0])
    >>> pace.length()
    0
    >>> for _ in range(60):
    ...     pace.seen(0, [0])
    >>> pace.length()
    1
    """

    def __init__(self, prices: Sequence[float]):
        self.prices = prices
        self.looked_at = 1.0
        self.stood = FIRST_GUESS

    def length(self) -> int:
        share = self.stood / self.looked_at
        return max(range(len(self.prices)), key=lambda k: speedup(share, k, self.prices[k]))

    def seen(self, k: int, stood: Sequence[int]) -> None:
        """A round of k drafted tokens in each row, of which so many have stood."""
        # the first one that does not stand is the last one that is looked at
        looked_at = sum(min(k, n + 1) for n in stood)
        self.looked_at = 1 + MEMORY * (self.looked_at - 1) + looked_at
        self.stood = FIRST_GUESS + MEMORY * (self.stood - FIRST_GUESS) + sum(stood)


# ---------------------------------------------------------------- which of them stand


def stands(drafted: Tensor, q: Tensor, p: Tensor, generator: torch.Generator) -> Tensor:
    """Which tokens the target agrees to: x stands with probability min(1, p(x) / q(x)).  (B, k)

    drafted (B, k); q, p (B, k, V): what the draft drew them from, what the target would.
    """
    p = p.gather(-1, drafted[..., None])[..., 0]  # (B, k)
    q = q.gather(-1, drafted[..., None])[..., 0]  # (B, k)
    return torch.rand(p.shape, device=p.device, generator=generator) * q < p


def lacking(q: Tensor, p: Tensor) -> Tensor:
    """What the draft's tokens lack to the target's distribution: a multiple of max(0, p − q).

    q, p: (B, V). Where q is all zeros, since nothing was drafted, this is p.

    Example: q takes the first token too often, so the target's own token is the second or third
    >>> lacking(torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.5, 0.25, 0.25]]))
    tensor([[0.0000, 0.2500, 0.2500]])
    """
    rest = (p - q).clamp(min=0)
    # no more than rounding can be lacking anywhere, and yet a token was rejected
    return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


def leading(agreed: Tensor) -> Tensor:
    """How many of each row are true before the first that is not.  (B, k) → (B,)

    >>> leading(torch.tensor([[True, False, True], [True, True, True]]))
    tensor([1, 3])
    """
    return agreed.long().cumprod(-1).sum(-1)


def verify_likeliest(drafted: Tensor, z_post: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafted tokens stand, and the target's own token after those, (B,) each; greedy.

    drafted (B, k); z_post (B, k + 1, V): the target's logits before each of them and after all.
    """
    likeliest = z_post.argmax(-1)  # (B, k + 1)
    stood = leading(likeliest[:, :-1] == drafted)
    return stood, likeliest.gather(1, stood[:, None])[:, 0]


def verify_drawn(
    drafted: Tensor, q: Sequence[Tensor], p: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`verify_likeliest` for drawn tokens: so that they have the target's distribution.

    drafted (B, k); q: k times (B, V), what they were drawn from; p (B, k + 1, V): what the target
    draws from.
    """
    # after the last drafted token nothing was drafted
    q = torch.stack([*q, torch.zeros_like(p[:, 0])], 1)  # (B, k + 1, V)
    stood = leading(stands(drafted, q[:, :-1], p[:, :-1], generator))
    rows = torch.arange(len(p), device=p.device)
    return stood, draw(lacking(q[rows, stood], p[rows, stood]), generator)


# ---------------------------------------------------------------- decoding


class Replies:
    """The texts of a batch, which grow by several tokens a round, and not all by as many.

    ends: how long each text may become.

    Example: two prompts; the first row gets two tokens and then one, the second one and then two,
    of which the first stops it. A step is given when all rows have its token.
    >>> replies = Replies([[5], [6, 7]], ends=[9, 9], stop=[2])
    >>> replies.grow([[1, 3], [4]])
    >>> list(replies.steps())
    [[1, 4]]
    >>> replies.grow([[8], [2, 9]])
    >>> list(replies.steps())
    [[3, 2], [8, None]]
    """

    def __init__(self, prompts: Sequence[Sequence[int]], ends: list[int], stop: Collection[int]):
        self.texts = [list(prompt) for prompt in prompts]
        self.starts = [len(prompt) for prompt in prompts]
        self.ends = ends
        self.stop = stop
        self.running = [True] * len(prompts)
        self.given = 0

    def grow(self, new: Sequence[Sequence[int]]) -> None:
        """New tokens of each row; a row that has ended takes no more."""
        for row, text in enumerate(self.texts):
            for i in new[row]:
                if self.running[row]:
                    text.append(i)
                    self.running[row] = i not in self.stop and len(text) < self.ends[row]

    def steps(self) -> Iterator[list[int | None]]:
        """What can be given now, as `ivl.generate` gives it."""
        sizes = [len(text) - start for text, start in zip(self.texts, self.starts)]
        waiting = [n for n, on in zip(sizes, self.running) if on]
        ready = min(waiting, default=max(sizes))
        for t in range(self.given, ready):
            rows = zip(self.texts, self.starts, sizes)
            yield [text[start + t] if t < n else None for text, start, n in rows]
        self.given = ready

    def room(self) -> int:
        """How many tokens all rows that go on have room for."""
        rows = zip(self.texts, self.ends, self.running)
        return min(end - len(text) for text, end, on in rows if on)

    def longest(self) -> int:
        """The length of the longest text that goes on."""
        return max(len(text) for text, on in zip(self.texts, self.running) if on)


@torch.inference_mode()
def generate(
    base: Llama,
    draft: Llama,
    value: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    alpha: float = 1.0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Collection[int] = (),
    vocabulary: int | None = None,
    never: Sequence[int] = (),
    pace: Pace | None = None,
) -> Iterator[list[int | None]]:
    """`ivl.generate` for base + value model, with `draft` as the small base that drafts.

    The tokens are the same where they are not drawn; else they have the same distribution, but a
    seed stands for other ones than there. It yields what `ivl.generate` yields, several steps at
    a time. All models have the words that can be said.
    never: ids that are not chosen. pace: how many tokens to draft (default: `Pace` by `prices`).
    """
    # 1) readers, and where each text ends at the latest
    context = min(model.config.max_position_embeddings for model in (base, value))
    ends = [min(context, len(prompt) + max_new_tokens) for prompt in prompts]
    replies = Replies(prompts, ends, stop)
    tokens, counts = padded(prompts)  # (B, T), (B,)
    B, T = tokens.shape
    models = base, draft, value
    of_base, of_draft, of_value = (model.reader(B, T + max_new_tokens) for model in models)
    device = base.unembed.device
    generator = torch.Generator(device).manual_seed(seed)
    never = torch.tensor(never, dtype=torch.long, device=device)
    pace = pace or Pace(prices(base, draft, value, B))

    def post(z: Tensor, z_delta: Tensor) -> Tensor:
        """z_post of the words that can be said, as what is chosen from: logits or probabilities."""
        z_post = combine(z, z_delta.to(device), alpha)[..., :vocabulary]  # (..., V)
        if len(never):
            z_post = z_post.index_fill(-1, never, -torch.inf)
        if temperature:
            return probabilities(z_post, temperature, top_k, top_p)
        return z_post

    def choose(p: Tensor) -> Tensor:
        """The next token of each row.  (B, V) → (B,)"""
        return draw(p, generator) if temperature else p.argmax(-1)

    def step(tokens: Tensor, counts: Tensor | None = None) -> list[list[int]]:
        """A step of plain decoding: base and value model read on; each row's new token."""
        p = post(of_base.read(tokens, counts), of_value.read(tokens, counts))  # (B, V)
        return choose(p)[:, None].tolist()

    def speculate(k: int, last: Tensor) -> list[list[int]]:
        """A round of k drafted tokens; each row's new ones.  last (B, 1): each text's last token"""
        # small base and value model draft. The small base begins with what it has not read: the
        # last token, the one before if all had stood, and what was chosen without a draft
        unread = [text[n:] for text, n in zip(replies.texts, of_draft.lengths)]
        tokens, counts = padded(unread)  # (B, T), (B,)
        read, z_delta, q = [last], [], []
        for _ in range(k):
            z_delta.append(of_value.read(read[-1]))  # (B, V)
            q.append(post(of_draft.read(tokens, counts), z_delta[-1]))  # (B, V)
            read.append(choose(q[-1])[:, None])  # (B, 1)
            tokens, counts = read[-1], None

        # the large base reads all at once; the value model the last token, for one more
        z_delta.append(of_value.read(read[-1]))
        tokens = torch.cat(read, 1)  # (B, k + 1)
        p = post(of_base.read_each(tokens), torch.stack(z_delta, 1))  # (B, k + 1, V)

        # each row keeps what stands, and the target's own token
        drafted = tokens[:, 1:]  # (B, k)
        if temperature:
            stood, new = verify_drawn(drafted, q, p, generator)  # (B,) each
        else:
            stood, new = verify_likeliest(drafted, p)
        rows = zip(drafted.tolist(), stood.tolist(), new.tolist())
        return [[*row[:n], i] for row, n, i in rows]

    # 2) base and value model read the prompts
    replies.grow(step(tokens, counts))
    while True:
        yield from replies.steps()
        if not any(replies.running):
            return

        # 3) so many are drafted that with the target's own token all fit; and the draft has to read
        #    all but the last of them
        context = draft.config.max_position_embeddings
        k = max(0, min(pace.length(), replies.room() - 1, context - replies.longest() + 1))
        last = torch.tensor([text[-1:] for text in replies.texts], device=device)  # (B, 1)
        new = speculate(k, last) if k > 0 else step(last)
        pace.seen(k, [len(row) - 1 for row, on in zip(new, replies.running) if on])
        replies.grow(new)

        # 4) what was read beyond is taken back: all but the last token of each text has been read.
        #    A row that has ended stays where it is
        lengths = [len(text) - 1 for text in replies.texts]
        if of_base.lengths != lengths:
            of_base.back_to(lengths)
            of_value.back_to(lengths)
            of_draft.back_to([min(pair) for pair in zip(lengths, of_draft.lengths)])
