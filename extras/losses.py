"""The other losses that z_post can have, the third advantage of §3.1: a teacher's probabilities,
and preferences.

`distill` and `prefer`, their first argument bound by `partial`, are each a `batch_loss` for
`train.train`, in the place of `train.forward`. Both hold z_base and z_Δ of a micro-batch in full,
unlike `ivl.two_headed_loss`. Shapes: B batch, T time, V vocabulary.
"""

import math
from collections.abc import Sequence
from itertools import pairwise as neighbours  # `pairwise` is a loss here

import torch
import torch.nn.functional as F
from torch import Tensor

from ivl import combine, norm_term
from model import Llama
from plumbing.dataset import Batch, Chats
from plumbing.files import InputError

BETA = 0.1  # β of the pairwise loss, DPO's


# ---------------------------------------------------------------- a teacher


def distillation(z_base: Tensor, z_delta: Tensor, z_teacher: Tensor, targets: Tensor) -> Tensor:
    """Σ KL(p_teacher ‖ p_post) in nats over the positions that have a target: equation (4), p_l
    being a teacher's.

    z_base, z_delta, z_teacher: (B, T, V); targets: (B, T), negative: none. Only the shared front of
    the vocabularies counts.
    """
    has_target = targets >= 0  # (B, T)
    z_post = combine(z_base, z_delta)
    V = min(z_post.shape[-1], z_teacher.shape[-1])
    log_p = z_post[has_target][:, :V].float().log_softmax(-1)  # (n, V)
    log_p_teacher = z_teacher.detach()[has_target][:, :V].float().log_softmax(-1)  # (n, V)
    return F.kl_div(log_p, log_p_teacher, reduction="sum", log_target=True)


def distill(
    teacher: Llama, base: Llama, value: Llama, batch: Batch, autocast, w_kl: float, w_norm: float
) -> tuple[Tensor, Tensor]:
    """`train.forward` with the teacher's probabilities in the place of the chats' own tokens."""
    inputs, targets, counted = batch
    with torch.no_grad():
        z_teacher = teacher(inputs)  # (B, T, V)
    z_base, z_delta = logits(base, value, inputs, autocast)
    kl = distillation(z_base, z_delta, z_teacher, targets)
    return weighted(kl, norm_term(z_delta, counted), w_kl, w_norm)


# ---------------------------------------------------------------- preferences


def pairwise(z_base: Tensor, z_delta: Tensor, targets: Tensor, beta: float) -> Tensor:
    """Σ −log σ(β (r(y_w) − r(y_l))) in nats over pairs of replies, where
    r(y) = Σ_t log p_post(y_t) − log p_base(y_t).

    z_base, z_delta: (2B, T, V), targets: (2B, T), negative: none; reply i is y_w, preferred to y_l,
    reply B + i. This is DPO (Rafailov et al., 2024), whose frozen reference is here the base: r is
    what z_Δ has changed.
    """
    has_target = targets >= 0  # (2B, T)
    z_post = combine(z_base, z_delta)
    z_base = z_base.detach()[..., : z_post.shape[-1]]

    def log_p(z: Tensor) -> Tensor:
        """The log-probability of each reply, (2B,)."""
        each = F.cross_entropy(z[has_target].float(), targets[has_target], reduction="none")  # (n,)
        reply = has_target.nonzero()[:, 0]  # (n,), the reply that each target belongs to
        return each.new_zeros(len(targets)).index_add(0, reply, -each)  # (2B,)

    r_better, r_worse = (log_p(z_post) - log_p(z_base)).chunk(2)  # (B,) each
    return -F.logsigmoid(beta * (r_better - r_worse)).sum()


def prefer(
    beta: float, base: Llama, value: Llama, batch: Batch, autocast, w_pairs: float, w_norm: float
) -> tuple[Tensor, Tensor]:
    """`train.forward` for a batch of `Pairs`: the pairwise loss, not cross-entropy."""
    inputs, targets, counted = batch
    z_base, z_delta = logits(base, value, inputs, autocast)
    loss = pairwise(z_base, z_delta, targets, beta)
    return weighted(loss, norm_term(z_delta, counted), w_pairs, w_norm)


@torch.no_grad()
def held_out_pairs(
    beta: float,
    base: Llama,
    value: Llama | None,
    pairs: "Pairs",
    rows: list[int],
    size: int,
    autocast,
    machine,
) -> float:
    """`train.held_out_loss` of preferences: the pairwise loss in nats per pair. The base alone, for
    which every r is 0, has log 2.
    """
    if value is None:
        return math.log(2)
    loss = n = 0
    for part in machine.parts(rows, size):
        batch = pairs.batch(part, value.unembed.device)
        _, sums = prefer(beta, base, value, batch, autocast, 1.0, 0.0)
        loss += sums[0].item()
        n += len(part)
    loss, n = machine.total(loss, n)
    return loss / n


class Pairs(Chats):
    """Chats of which each has a rival with a worse reply to the same question.

    Example: three chats with rivals are six in all; their pair 0 is chats 0 and 3, so
    `batch([0, 2])` has the rows 0, 2, 3, 5: two preferred chats, then their two rivals.
    """

    def __len__(self) -> int:
        return super().__len__() // 2

    def lengths(self) -> Tensor:
        """Of each pair the preferred one's."""
        return super().lengths()[: len(self)]

    def plain(self) -> Chats:
        """All chats singly; the preferred ones come first, so the rows of pairs are theirs too."""
        return Chats(**self.tensors(), report=self.report)

    def loss_count(self, rows: Sequence[int]) -> int:
        """The loss is a mean over pairs."""
        return len(rows)

    def members(self, rows: Sequence[int]) -> list[int]:
        """The chats that a batch of these pairs has, all preferred ones first."""
        return [*rows, *(i + len(self) for i in rows)]


def paired(better: Chats, worse: Chats) -> Pairs:
    """Both as one: the rival of chat i stands at len(better) + i. What one of them lacks, which did
    not fit, say, is left out of both. Raises InputError if they do not ask the same.
    """
    # the chats that both have, by their numbers in the files
    both = set(better.entry.tolist()) & set(worse.entry.tolist())
    lost = len(better) - len(both)
    if torch.equal(better.ids, worse.ids):
        raise InputError("the chosen and the rejected replies are the same, all of them")
    rejected = "\n".join(f"  rejected: {line.strip()}" for line in worse.report.splitlines())
    better = subset(better, both)
    worse = subset(worse, both)
    if not both or questions(better) != questions(worse):
        raise InputError("the rejected replies do not answer the questions of --data, one for one")

    report = f"{better.report}\n  {'pairs':<18}{len(both):>12,}"
    if lost:
        report += (
            f"\n  {'  left out':<18}{lost:>12,}  the rejected reply cannot be used\n{rejected}"
        )
    return Pairs(
        ids=torch.cat((better.ids, worse.ids)),
        target=torch.cat((better.target, worse.target)),
        offsets=torch.cat((better.offsets, better.offsets[-1] + worse.offsets[1:])),
        entry=torch.cat((better.entry, worse.entry)),
        report=report,
    )


def subset(chats: Chats, entries: set[int]) -> Chats:
    """Some of the chats, by their numbers in the files."""
    rows = [i for i, entry in enumerate(chats.entry.tolist()) if entry in entries]
    pieces = [slice(int(chats.offsets[i]), int(chats.offsets[i + 1])) for i in rows]
    lengths = [0] + [piece.stop - piece.start for piece in pieces]
    return Chats(
        ids=torch.cat([chats.ids[:0], *(chats.ids[piece] for piece in pieces)]),
        target=torch.cat([chats.target[:0], *(chats.target[piece] for piece in pieces)]),
        offsets=torch.tensor(lengths).cumsum(0),
        entry=chats.entry[rows],
        report=chats.report,
    )


def questions(chats: Chats) -> list[list[int]]:
    """Of each chat the ids before its first target; later turns are not compared."""
    asked = []
    for start, end in neighbours(chats.offsets.tolist()):
        # argmax gives the first of equal ones: the place of the first target
        length = int(chats.target[start:end].int().argmax())
        asked.append(chats.ids[start : start + length].tolist())
    return asked


# ---------------------------------------------------------------- what both need


def logits(base: Llama, value: Llama, inputs: Tensor, autocast) -> tuple[Tensor, Tensor]:
    """z_base without gradient, and z_Δ, in full: (B, T, V) each."""
    with torch.no_grad():
        z_base = F.linear(base.hidden(inputs), base.unembed)
    with autocast:
        z_delta = F.linear(value.hidden(inputs), value.unembed)
    V = min(z_base.shape[-1], z_delta.shape[-1])  # the words that both have
    return z_base[..., :V], z_delta[..., :V]


def weighted(loss: Tensor, norm: Tensor, w_loss: float, w_norm: float) -> tuple[Tensor, Tensor]:
    """The loss, and the two sums (2,) without gradient."""
    return w_loss * loss + w_norm * norm, torch.stack((loss, norm)).detach()
