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

The last token of an answer is not read: the tokens before it, its *stem*, foretell it. So answers
of one token cost nothing, and those with a common stem are read as one.

Example: of the context `Answer:` and the answers `·A`, `·B`, `·Yes` (tokens `·`, `A`, `B`, `Yes`)
the stem `·` is read once, and gives all three.

Shapes: B batch (contexts), T time, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
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
    # of each context the stems, the longest first, so that in a turn all are of similar length; of
    # each stem the questions
    stems: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for k in sorted(range(len(questions)), key=lambda k: -len(questions[k].answer)):
        context, answer = questions[k]
        stems.setdefault(context, {}).setdefault(answer[:-1], []).append(k)
    longest = max((len(q.context) + len(q.answer) for q in questions), default=0)
    models = [base] if value is None else [base, value]
    never = torch.tensor(sorted(differing), device=base.unembed.device, dtype=torch.long)

    def log_p(z: list[Tensor]) -> Tensor:
        """log softmax of z_post.  z: of each model (..., V) → (..., V)"""
        z_post = z[0] if value is None else combine(z[0], z[1].to(z[0].device), alpha)
        return z_post[..., :vocabulary].index_fill(-1, never, -torch.inf).log_softmax(-1)

    readers: list = []
    before: list[tuple[int, ...]] = []  # the contexts that the readers have read
    for contexts in batches(list(stems), batch_size):
        # 1) the contexts, from where they differ from those before
        shared = 0
        if len(contexts) == len(before):
            shared = min(len(commonprefix(pair)) for pair in zip(before, contexts))
            shared = min(shared, min(map(len, contexts)) - 1)  # one token at least is read
        else:
            readers = [model.reader(len(contexts), longest) for model in models]
        if shared < EXAMPLES:
            shared = 0
        for reader in readers:
            reader.back_to([shared] * len(contexts))
        tokens, counts = padded([context[shared:] for context in contexts])  # (B, T), (B,)
        first = log_p([reader.read(tokens, counts) for reader in readers])  # (B, V)
        before = contexts

        # 2) turn by turn one stem of each row; a row that has no more repeats its last
        found: dict[int, Likelihood] = {}
        rows = [list(stems[context].items()) for context in contexts]
        for turn in range(max(map(len, rows))):
            turns = [row[min(turn, len(row) - 1)] for row in rows]
            read = [[*stem] for stem, _ in turns]
            said, greedy, last = read_stems(readers, first, read, contexts, log_p)
            for reader in readers:
                reader.back_to([len(context) for context in contexts])

            # 3) the last token of each answer
            asked = [(k, row) for row, (_, numbers) in enumerate(turns) for k in numbers]
            numbers, which = zip(*asked)
            ends = torch.tensor([questions[k].answer[-1] for k in numbers], device=last.device)
            of_row = torch.tensor(which, device=last.device)
            log_ps = said[of_row] + last[of_row, ends]  # (n,)
            likeliest = greedy[of_row] & (last.argmax(-1)[of_row] == ends)  # (n,)
            told = map(Likelihood, log_ps.tolist(), likeliest.tolist())
            found |= dict(zip(numbers, told))
        yield found


def read_stems(
    readers: Sequence,
    first: Tensor,
    stems: Sequence[list[int]],
    contexts: Sequence[tuple[int, ...]],
    log_p: Callable[[list[Tensor]], Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """A stem of each row, read after its context: log p of it (B,), whether each of its tokens is
    the likeliest (B,), and log p of what comes next (B, V).

    first (B, V): log p of the token after each context; log_p: from the models' logits.
    """
    # where a stem is shorter than the longest, some token of the row follows, and does not count
    T = max(map(len, stems))
    rows = [[*stem, *[row[-1]] * (T - len(stem))] for stem, row in zip(stems, contexts)]
    tokens = torch.tensor(rows, dtype=torch.long, device=first.device)  # (B, T)
    counts = torch.tensor([len(stem) for stem in stems], device=first.device)  # (B,)
    counted = torch.arange(T, device=first.device) < counts[:, None]  # (B, T)

    said = torch.zeros_like(first[:, 0])  # (B,)
    greedy = torch.ones_like(said, dtype=torch.bool)  # (B,)
    last = first.clone()  # (B, V), what comes after each row's own stem
    p = first[:, None]  # (B, 1, V), of the tokens that are read next
    width = max(1, LOGITS // first.numel())
    for start in range(0, T, width):
        # what is read foretells the tokens after the first of them
        stop = min(start + width, T)
        z = [reader.read_each(tokens[:, start:stop]) for reader in readers]
        p = torch.cat((p[:, -1:], log_p(z)), 1)  # (B, 1 + width, V)
        now, counts_now = tokens[:, start:stop], counted[:, start:stop]
        of_token = p[:, :-1].gather(-1, now[..., None])[..., 0]  # (B, width)
        said += of_token.masked_fill(~counts_now, 0.0).sum(-1)
        greedy &= ((p[:, :-1].argmax(-1) == now) | ~counts_now).all(-1)

        # the rows whose stem ends here
        ends = (start < counts) & (counts <= stop)
        last[ends] = p[ends, counts[ends] - start]
    return said, greedy, last


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
