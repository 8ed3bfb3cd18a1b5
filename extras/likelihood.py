"""How likely a base and its value model find given answers: log p(answer | context), exactly.

Benchmarks with choices ask this of each choice. What several of them share is read once, by taking
a text back to an earlier place (`model.Reader`):

    contexts of the batch        A: examples, question 1      B: examples, question 2
    1. read each context, and    ──────────────────────►      ──────────────────────►
       its first answer                                ─►                           ──►
    2. back to the contexts                            ◄─                           ◄──
       each row's second answer                        ───►                         ─►
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

from ivl import combine_all, padded
from model import Llama

EXAMPLES = 32  # contexts whose first tokens agree form a group; a shorter beginning is read again
LOGITS = 2**25  # of a model at a time while answers are read; with what is made of them six times


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
    values: Sequence[Llama],
    questions: Sequence[Question],
    batch_size: int,
    *,
    alphas: Sequence[float] | None = None,
    vocabulary: int | None = None,
    differing: Collection[int] = (),
) -> Iterator[dict[int, Likelihood]]:
    """The likelihoods under z_post, batch by batch: the number of a question → its likelihood.

    base, values, alphas, vocabulary: as `ivl.token_by_token` takes them. differing: ids among the
    first `vocabulary` that mean something else to each model, so the pair never says them.
    batch_size: so many contexts are read at a time.
    """
    # context → stem → the questions that end there; the longest answers first: in each turn the
    # stems of a batch are then of similar length
    stems: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for k in sorted(range(len(questions)), key=lambda k: -len(questions[k].answer)):
        context, answer = questions[k]
        stems.setdefault(context, {}).setdefault(answer[:-1], []).append(k)
    longest = sum(max((len(part) for part in parts), default=0) for parts in zip(*questions))
    models = [base, *values]
    V = max(len(model.unembed) for model in models)
    never = torch.tensor(sorted(differing), device=base.unembed.device, dtype=torch.long)

    def log_p(z: list[Tensor]) -> Tensor:
        """log softmax of z_post.  z: of each model (..., V) → (..., V)"""
        z_post = combine_all(z[0], z[1:], alphas)[..., :vocabulary]
        return z_post.index_fill(-1, never, -torch.inf).log_softmax(-1)

    readers: list = []
    before: list[tuple[int, ...]] = []  # the contexts that the readers have read
    for contexts in batches(list(stems), batch_size):
        # 1) back to where the contexts still agree with those before
        shared = 0
        if len(contexts) == len(before):
            shared = min(len(commonprefix(pair)) for pair in zip(before, contexts))
            shared = min(shared, min(map(len, contexts)) - 1)  # one token at least is read
        else:  # another number of rows needs new caches
            readers = [model.reader(len(contexts), longest) for model in models]
        if shared < EXAMPLES:  # too little to be worth a mask
            shared = 0
        for reader in readers:
            reader.back_to([shared] * len(contexts))
        before = contexts

        # 2) turn by turn one stem of each row; a row that has no more repeats its last
        found: dict[int, Likelihood] = {}
        rows = [list(stems[context].items()) for context in contexts]
        for turn in range(max(map(len, rows))):
            turns = [row[min(turn, len(row) - 1)] for row in rows]
            texts = [[*context, *stem] for context, (stem, _) in zip(contexts, turns)]
            if turn == 0:
                pieces = read_contexts(readers, contexts, texts, shared, V, log_p)
            else:
                pieces = read_stems(readers, contexts, texts, V, log_p)
            said, greedy, last = tell(pieces, [stem for stem, _ in turns])

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


def read_contexts(
    readers: Sequence,
    contexts: Sequence[tuple[int, ...]],
    texts: Sequence[list[int]],
    shared: int,
    V: int,
    log_p: Callable[[list[Tensor]], Tensor],
) -> Iterator[Tensor]:
    """Contexts and a stem of each, which begin with `shared` tokens that have been read: the same
    as `read_stems`, if possible in one reading.

    Example: the contexts `abcd` and `abc`, with stems `xy` and `z`, nothing read. One reading gives
    log p after c, d, x, y and after c, z and two tokens of padding; of these each row has its own:
    after d, x, y and after c, z.
    """
    # from the shortest context's last token on there are logits of every row
    start = min(map(len, contexts)) - 1
    B, window = len(texts), max(map(len, texts)) - start
    if B * window * V > LOGITS:
        tokens, counts = padded([context[shared:-1] for context in contexts])  # (B, T), (B,)
        if counts.any():
            for reader in readers:
                reader.read(tokens, counts)
        yield from read_stems(readers, contexts, texts, V, log_p)
        return
    tokens = filled([text[shared:] for text in texts])  # (B, T)
    p = log_p([reader.read_each(tokens, start - shared) for reader in readers])  # (B, window, V)

    # each row from its own context's last token on
    rows = torch.arange(B)[:, None]
    offsets = torch.tensor([[len(context) - 1 - start] for context in contexts])  # (B, 1)
    columns = offsets + torch.arange(window)  # (B, window)
    yield p[rows, columns.clamp(max=window - 1)]


def read_stems(
    readers: Sequence,
    contexts: Sequence[tuple[int, ...]],
    texts: Sequence[list[int]],
    V: int,
    log_p: Callable[[list[Tensor]], Tensor],
) -> Iterator[Tensor]:
    """A stem of each row, whose context has been read: log p (B, T, V) after the context's last
    token, which is read again, and after each of the stem's; in pieces along T.
    """
    ends = [len(context) - 1 for context in contexts]
    for reader in readers:
        reader.back_to(ends)
    tokens = filled([text[end:] for text, end in zip(texts, ends)])  # (B, T)
    for piece in tokens.split(max(1, LOGITS // (len(texts) * V)), 1):
        yield log_p([reader.read_each(piece) for reader in readers])


def filled(texts: Sequence[list[int]]) -> Tensor:
    """Texts side by side (B, T), the shorter ones with their last tokens again and again: these are
    read, what comes of them is left out, and `back_to` takes them back.
    """
    T = max(map(len, texts))
    return torch.tensor([[*text, *text[-1:] * (T - len(text))] for text in texts])


def tell(
    pieces: Iterator[Tensor], stems: Sequence[tuple[int, ...]]
) -> tuple[Tensor, Tensor, Tensor]:
    """log p of each stem (B,), whether each of its tokens is the likeliest (B,), and log p of what
    comes next (B, V).

    pieces: log p (B, T, V) before each token of the stems and after the last, in pieces along T.
    """
    tokens, counts = padded([[*stem, 0] for stem in stems])  # (B, T), (B,)
    counts = counts - 1  # a stem can be empty
    said = greedy = last = None
    start = 0
    for p in pieces:
        stop = min(start + p.shape[1], tokens.shape[1])
        now = tokens[:, start:stop].to(p.device)  # (B, T), padded
        counted = (torch.arange(start, stop) < counts[:, None]).to(p.device)  # (B, T)
        if said is None:
            said = p.new_zeros(len(stems))
            greedy = torch.ones_like(said, dtype=torch.bool)
            last = torch.empty_like(p[:, 0])
        p = p[:, : stop - start]
        of_token = p.gather(-1, now[..., None])[..., 0]  # (B, T)
        said += of_token.masked_fill(~counted, 0.0).sum(-1)
        greedy &= ((p.argmax(-1) == now) | ~counted).all(-1)

        # the rows whose stem ends here
        (ending,) = ((start <= counts) & (counts < stop)).nonzero(as_tuple=True)
        last[ending] = p[ending, counts[ending] - start]
        start = stop
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
