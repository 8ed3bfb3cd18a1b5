"""Speculative decoding with a shared value model: a small base drafts, the large base verifies.

    python sample.py --base LARGE --value DIR --draft SMALL "question"

The draft is the small base + value models, the target the large base + *the same* value models. Of
a text that ends with the token t, a round with three drafted tokens is

    small base    reads t, x₁, x₂ one by one, for z_draft
    value model   reads t, x₁, x₂, x₃ one by one, for z_Δ
                  x₁, x₂, x₃ are chosen by z_draft + α z_Δ
    large base    reads t, x₁, x₂, x₃ at once, for z_base
                  z_base + α z_Δ says which of them stand; z_Δ is known already

If x₃ does not stand, the target chooses another token in its place, and the next round begins with
text, x₁, x₂, y. If all three stand it chooses a fourth one: so a round gives at least one token.

Nothing is lost (Leviathan et al., 2023, "Fast Inference from Transformers via Speculative
Decoding"): greedily chosen tokens are those of plain decoding, drawn ones have the same
distribution. What the large base reads at once it rounds in another way than token by token, so
two tokens that are level, which in bfloat16 some are, may change places.

How many to draft is for --drafted to say: what a reply ends with tells how many of them stood, and
whether it pays, a clock does. On CUDA all reads are recorded, see graphs.py.

Refused: a map, since a mapped base reads token by token; several processes, where no one has all
logits; value models that read what a base says, since then z_Δ is another beside another base.

Shapes: B batch, V vocabulary, k drafted tokens.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ivl import Replies, combine_all, draw, padded, probabilities
from model import Llama

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


class Drafts:
    """Rounds of drafted tokens, in the place of `ivl.token_by_token`; counts how many stood.

    draft: the small base. drafted: how many tokens a round drafts, k. never: ids that are not
    chosen.
    """

    def __init__(self, draft: Llama, drafted: int, never: Sequence[int] = ()):
        self.draft = draft
        self.drafted = drafted
        self.never = never
        self.recorded = {}  # on CUDA: each model, and the same with its reads recorded
        self.tried = 0  # drafted tokens so far, and
        self.stood = 0  # those of them that stood

    def summary(self) -> str:
        """How the drafted tokens fared."""
        return f"{self.stood} of {self.tried} drafted tokens stood"

    def fast(self, model: Llama):
        """On CUDA the model with its reads recorded, kept from text to text."""
        if model.unembed.device.type != "cuda":
            return model
        from extras.graphs import Recorded

        return self.recorded.setdefault(model, Recorded(model))

    @torch.inference_mode()
    def rounds(
        self,
        base: Llama,
        values: Sequence[Llama],
        replies: Replies,
        *,
        alphas: Sequence[float] | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        vocabulary: int | None = None,
    ) -> Iterator[list[list[int]]]:
        """The new tokens of each row, round by round; the options of `ivl.token_by_token`."""
        # 1) a reader for each model; none looks past the shortest context
        tokens, counts = padded(replies.texts)  # (B, T), (B,)
        B, T = tokens.shape
        context = min(model.config.max_position_embeddings for model in [base, *values])
        replies.limit([context - start for start in replies.starts])
        slots = T + max(end - start for end, start in zip(replies.ends, replies.starts))
        of_base, of_draft, *of_values = [
            self.fast(model).reader(B, slots) for model in [base, self.draft, *values]
        ]
        device = base.unembed.device
        generator = torch.Generator(device).manual_seed(seed)
        never = torch.tensor(self.never, dtype=torch.long, device=device)

        def post(z: Tensor, z_deltas: Sequence[Tensor]) -> Tensor:
            """z_post of the tokens that can be said, as what is chosen from: logits, or their
            probabilities.
            """
            z_post = combine_all(z, z_deltas, alphas)[..., :vocabulary]  # (..., V)
            z_post = z_post.index_fill(-1, never, -torch.inf)
            if temperature:
                return probabilities(z_post, temperature, top_k, top_p)
            return z_post

        def choose(p: Tensor) -> Tensor:
            """The next token of each row.  (B, V) → (B,)"""
            return draw(p, generator) if temperature else p.argmax(-1)

        # 2) base and value models read the prompts, and choose a first token
        p = post(
            of_base.read(tokens, counts), [reader.read(tokens, counts) for reader in of_values]
        )
        yield choose(p)[:, None].tolist()
        while True:
            # 3) so many are drafted that with the target's own token all fit; and the draft has to
            #    read all but the last of them
            fits = self.draft.config.max_position_embeddings - max(map(len, replies.texts)) + 1
            k = max(0, min(self.drafted, replies.room() - 1, fits))
            last = torch.tensor([text[-1:] for text in replies.texts], device=device)  # (B, 1)

            # 4) small base and value models draft. The small base begins with what it has not read:
            #    the last token, the one before if all had stood, and what had no draft
            unread = [text[n:] for text, n in zip(replies.texts, of_draft.lengths)]
            tokens, counts = padded(unread)  # (B, T), (B,)
            read, z_deltas, q = [last], [], []
            for _ in range(k):
                z_deltas.append([reader.read(read[-1]) for reader in of_values])  # (B, V) each
                q.append(post(of_draft.read(tokens, counts), z_deltas[-1]))  # (B, V)
                read.append(choose(q[-1])[:, None])  # (B, 1)
                tokens, counts = read[-1], None

            # 5) the large base reads all at once; the value models the last token, for one more
            z_deltas.append([reader.read(read[-1]) for reader in of_values])
            tokens = torch.cat(read, 1)  # (B, k + 1)
            z_deltas = [torch.stack(z, 1) for z in zip(*z_deltas)]  # (B, k + 1, V) each
            p = post(of_base.read_each(tokens), z_deltas)  # (B, k + 1, V)

            # 6) each row keeps what stands, and the target's own token
            drafted = tokens[:, 1:]  # (B, k)
            if temperature:
                stood, new = verify_drawn(drafted, q, p, generator)  # (B,) each
            else:
                stood, new = verify_likeliest(drafted, p)
            rows = list(zip(drafted.tolist(), stood.tolist(), new.tolist(), replies.running))
            self.tried += k * sum(replies.running)
            self.stood += sum(n for _, n, _, on in rows if on)
            yield [[*row[:n], i] for row, n, i, _ in rows]

            # 7) what was read beyond is taken back: all but the last token of each text has been
            #    read. A row that has ended stays where it is
            lengths = [len(text) - 1 for text in replies.texts]
            if of_base.lengths != lengths:
                for reader in [of_base, *of_values]:
                    reader.back_to(lengths)
                of_draft.back_to([min(pair) for pair in zip(lengths, of_draft.lengths)])
