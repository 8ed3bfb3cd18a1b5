"""How likely a base and its value model find given answers: log p(answer | context), exactly.

Benchmarks with choices ask this of each choice. What several of them share is read once, by taking
a text back to an earlier place (`model.Reader`):

    contexts of the batch        A: examples, question 1      B: examples, question 2
    1. read both contexts        ──────────────────────►      ──────────────────────►
    2. each row's first answer                         ─►                           ──►
       back to the contexts                            ◄─                           ◄──
    3. each row's second answer                        ───►                         ─►
    ...
    the next batch begins where it still agrees with this one: after the examples

The first token of an answer is already foretold by the context, so an answer of one token costs
nothing, and one of n tokens n - 1.

Shapes: B batch (contexts), T time, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from os.path import commonprefix  # of any sequences, not only of paths
from typing import NamedTuple

import torch
from torch import Tensor

from ivl import combine, padded
from model import Llama

EXAMPLES = 32  # contexts that begin with so many equal tokens are read one after the other
LOGITS = 2**26  # that exist at a time while answers are read


class Question(NamedTuple):
    """A context (one id or more) and an answer to it (one id or more)."""

    context: tuple[int, ...]
    answer: tuple[int, ...]


class Likelihood(NamedTuple):
    """log p of the whole answer, in nats, and whether each of its tokens is the likeliest."""

    log_p: float
    greedy: bool


@torch.inference_mode()
def log_likelihoods(
    base: Llama,
    value: Llama | None,
    questions: Sequence[Question],
    batch_size: int,
    *,
    alpha: float = 1.0,
    vocabulary: int | None = None,
    differing: Collection[int] = (),
) -> Iterator[dict[int, Likelihood]]:
    """The likelihoods under z_post, batch by batch: the number of a question → its likelihood.

    base, value, alpha, vocabulary: as `ivl.generate` takes them. differing: ids among the first
    `vocabulary` that mean something else to each model, so the pair never says them.
    batch_size: so many contexts are read at a time.
    """
    # the answers to each context, the longest first, so that in a turn all are of similar length
    answers: dict[tuple[int, ...], list[int]] = {}
    for k, question in enumerate(questions):
        answers.setdefault(question.context, []).append(k)
    for numbers in answers.values():
        numbers.sort(key=lambda k: -len(questions[k].answer))
    longest = max((len(q.context) + len(q.answer) for q in questions), default=0)
    models = [base] if value is None else [base, value]
    never = torch.tensor(sorted(differing), device=base.unembed.device, dtype=torch.long)

    def log_p(z: list[Tensor]) -> Tensor:
        """log softmax of z_post.  z: of each model (..., V) → (..., V)"""
        z_post = z[0] if value is None else combine(z[0], z[1].to(z[0].device), alpha)
        return z_post[..., :vocabulary].index_fill(-1, never, -torch.inf).log_softmax(-1)

    readers: list = []
    before: list[tuple[int, ...]] = []  # the contexts that the readers have read
    for contexts in batches(list(answers), batch_size):
        # 1) the contexts, from where they differ from those before
        shared = 0
        if len(contexts) == len(before):
            shared = min(len(commonprefix(pair)) for pair in zip(before, contexts))
            shared = min(shared, min(map(len, contexts)) - 1)  # one token at least is read
        if len(contexts) != len(before):
            readers = [model.reader(len(contexts), longest) for model in models]
        if shared < EXAMPLES:
            shared = 0
        lengths = [len(context) for context in contexts]
        for reader in readers:
            reader.back_to([shared] * len(contexts))
        tokens, counts = padded([context[shared:] for context in contexts])  # (B, T), (B,)
        first = log_p([reader.read(tokens, counts) for reader in readers])  # (B, V)
        before = contexts

        # 2) turn by turn one answer of each row; a row that has no more repeats its last
        found: dict[int, Likelihood] = {}
        numbers = [answers[context] for context in contexts]
        for turn in range(max(map(len, numbers))):
            asked = [row[min(turn, len(row) - 1)] for row in numbers]  # B questions
            replies = [questions[k].answer for k in asked]
            told = read_answers(readers, first, replies, log_p)
            for reader in readers:
                reader.back_to(lengths)
            found |= dict(zip(asked, told))
        yield found


def read_answers(
    readers: Sequence, first: Tensor, answers: Sequence[Sequence[int]], log_p
) -> list[Likelihood]:
    """An answer of each row, read after its context.

    first (B, V): log p of the token after each context; log_p: from the models' logits.
    """
    # where an answer is shorter than the longest, its last token stands again, and does not count
    T = max(map(len, answers))
    rows = [[*answer, *[answer[-1]] * (T - len(answer))] for answer in answers]
    tokens = torch.tensor(rows, device=first.device)  # (B, T)
    counts = torch.tensor([len(answer) for answer in answers], device=first.device)  # (B,)

    # log p of each token and of the likeliest one; the last token of all need not be read
    said = [first.gather(-1, tokens[:, :1])]  # of (B, 1)
    likeliest = [first.argmax(-1, keepdim=True)]  # of (B, 1)
    width = max(1, LOGITS // first.numel())
    for start in range(0, T - 1, width):
        stop = min(start + width, T - 1)
        z = [reader.read_each(tokens[:, start:stop]) for reader in readers]
        p = log_p(z)  # (B, width, V)
        said.append(p.gather(-1, tokens[:, start + 1 : stop + 1, None])[..., 0])
        likeliest.append(p.argmax(-1))

    # the sums over each answer's own tokens
    counted = torch.arange(T, device=first.device) < counts[:, None]  # (B, T)
    sums = torch.cat(said, 1).masked_fill(~counted, 0.0).sum(-1)  # (B,)
    greedy = ((torch.cat(likeliest, 1) == tokens) | ~counted).all(-1)  # (B,)
    return [Likelihood(*row) for row in zip(sums.tolist(), greedy.tolist())]


def batches(
    contexts: Sequence[tuple[int, ...]], batch_size: int
) -> Iterator[list[tuple[int, ...]]]:
    """The contexts in batches: those with the same examples follow each other, and within these,
    as among all others, the longest come first, so that little is padded.
    """
    # neighbours in the order of their tokens have the longest common beginnings
    ordered = sorted(contexts)
    groups = [ordered[:1]]
    for last, context in pairwise(ordered):
        if last[:EXAMPLES] != context[:EXAMPLES]:
            groups.append([])
        groups[-1].append(context)

    # a group that fills no two batches shares too little to stand alone
    others = [context for group in groups if len(group) < 2 * batch_size for context in group]
    groups = [group for group in groups if len(group) >= 2 * batch_size]
    for group in [*groups, others]:
        group = sorted(group, key=lambda context: (-len(context), context))
        for k in range(0, len(group), batch_size):
            yield group[k : k + batch_size]
