"""The norm term of §4.2.1 taken apart, and two others in its place.

    python experiments/reproduce.py norm       # each of them at three strengths, see below

    plain      λ mean|z_Δ|                     the paper's, `ivl.norm_term`
    centred    λ mean|z_Δ − median(z_Δ)|       blind to a constant added to all logits
    warmed     λ mean|z_Δ|, where λ grows over the first half of the steps

A value model begins as a copy of its base, and a language model's logits stand far from zero: a
constant can be added to all of them, and no probability changes. The plain term sees that constant,
and pulls on it with λ, the sum of λ/V over all words. The cross-entropy does not see it. `parts`
measures both, the constant and what is left.

Registered, as the directions of claims.py are: one of them becomes an option of train.py if, at one
of its strengths, it has more few-shot and more form on the largest base than the plain term of
λ = 0.3 in every seed, and on average more of both together than the plain term at any strength.

`centred` and `Warmed` are each a `batch_loss` for `train.train`. Neither is the paper's. They hold
z_base and z_Δ of a micro-batch in full. Shapes: B batch, T time, V vocabulary.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from extras.losses import logits
from ivl import loss_sums
from model import Llama
from plumbing.dataset import Batch, Chats
from plumbing.runs import read_log
from train import forward

WARMED = 0.5  # share of the steps over which λ grows
LOOKED_AT = 64  # chats whose z_Δ is taken apart along the training


def centre(z_delta: Tensor) -> Tensor:
    """z_Δ without its constant, (..., V). Of all constants the median leaves the smallest norm.

    Example: the same opinion, said with two logits instead of four
    >>> centre(torch.tensor([1.0, 1.0, 1.0, -3.0, 0.0]))
    tensor([ 0.,  0.,  0., -4., -1.])
    """
    return z_delta - z_delta.detach().median(-1, keepdim=True).values


def centred(
    base: Llama, value: Llama, batch: Batch, autocast, w_ce: float, w_norm: float
) -> tuple[Tensor, Tensor]:
    """`train.forward` with the centred norm term.

    The cross-entropy is that of the plain z_Δ, since a constant changes no probability.
    """
    inputs, targets, counted = batch
    z_base, z_delta = logits(base, value, inputs, autocast)
    cross_entropy, norm = loss_sums(z_base, centre(z_delta), targets, counted)
    return w_ce * cross_entropy + w_norm * norm, torch.stack((cross_entropy, norm)).detach()


class Warmed:
    """`train.forward` with λ growing from 0, in a straight line, over the first WARMED of `steps`.

    It counts its calls, one a step: a batch must not be cut into micro-batches.
    """

    def __init__(self, steps: int):
        self.rising = max(1, round(WARMED * steps))
        self.done = 0

    def __call__(
        self, base: Llama, value: Llama, batch: Batch, autocast, w_ce: float, w_norm: float
    ) -> tuple[Tensor, Tensor]:
        share = min(1.0, self.done / self.rising)
        self.done += 1
        return forward(base, value, batch, autocast, w_ce, share * w_norm)


# ---------------------------------------------------------------- what it does along the way


@torch.no_grad()
def parts(value: Llama, chats: Chats) -> dict[str, float]:
    """Means of |z_Δ| over the targets of the first chats, in nats: of all of it, of the constant in
    it, of what is left, and of what is left for the token that is demonstrated.
    """
    inputs, targets, counted = chats.batch(range(min(LOOKED_AT, len(chats))), value.unembed.device)
    z_delta = value(inputs)[counted].float()  # (n, V)
    left = centre(z_delta)  # (n, V)
    demonstrated = left.gather(-1, targets[counted][:, None])  # (n, 1)
    return {
        "norm": z_delta.abs().mean().item(),
        "constant": (z_delta - left)[:, 0].abs().mean().item(),
        "left": left.abs().mean().item(),
        "demonstrated": demonstrated.abs().mean().item(),
    }


class Parts:
    """`parts` while a model is being trained, as they are before the first step, after every 16th
    and in the end: `watch` of `train.train`.
    """

    EVERY = 16

    def __init__(self, chats: Chats):
        self.chats = chats

    def __call__(self, done: int, value: Llama) -> dict[str, float]:
        if done % self.EVERY:
            return {}
        return {f"|z| {name}": x for name, x in parts(value, self.chats).items()}


def mean_parts(folders: Sequence[Path]) -> dict[str, list[float]]:
    """`Parts` along the training, from the logs of the same training with several seeds: "step",
    how many are done, and of each part its mean over the seeds.
    """
    logs = []
    for folder in folders:
        entries = [entry for entry in read_log(folder / "log.jsonl") if "|z| norm" in entry]
        logs.append(entries)
    # what is noted before the first step has "done" = 0, what is noted after one its number
    steps = [entry["done"] if "done" in entry else entry["step"] + 1 for entry in logs[0]]
    means = {"step": steps}
    for key in logs[0][0]:
        if key.startswith("|z| "):
            columns = zip(*([entry[key] for entry in entries] for entries in logs))
            means[key.removeprefix("|z| ")] = [sum(column) / len(column) for column in columns]
    return means
