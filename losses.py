"""The other losses that z_post can have, the third advantage of §3.1: a teacher's probabilities, and preferences.

Both hold z_base and z_Δ of a micro-batch in full, unlike `ivl.two_headed_loss`, whose form they share.
Shapes: B batch, T time, V vocabulary.
"""

from itertools import pairwise as neighbours

import torch
import torch.nn.functional as F
from torch import Tensor

from data import Chats
from files import InputError
from ivl import combine, norm_term
from model import Llama

BETA = 0.1  # β of the pairwise loss, DPO's


def distillation(z_base: Tensor, z_delta: Tensor, z_teacher: Tensor, targets: Tensor) -> Tensor:
    """Σ KL(p_teacher ‖ p_post) in nats over the positions that have a target: equation (4), p_l being a teacher's.

    z_base, z_delta, z_teacher: (B, T, V); targets: (B, T), negative: none. Only the shared front of the vocabularies counts.
    """
    chosen, z_post = targets >= 0, combine(z_base, z_delta)
    V = min(z_post.shape[-1], z_teacher.shape[-1])
    log_p, log_teacher = (z[chosen][:, :V].float().log_softmax(-1) for z in (z_post, z_teacher.detach()))
    return F.kl_div(log_p, log_teacher, reduction="sum", log_target=True)


def pairwise(z_base: Tensor, z_delta: Tensor, targets: Tensor, beta: float) -> Tensor:
    """Σ −log σ(β (r(y_w) − r(y_l))) in nats over pairs of replies, where r(y) = Σ_t log p_post(y_t) − log p_base(y_t).

    z_base, z_delta: (2B, T, V), targets: (2B, T), negative: none; reply i is y_w, preferred to y_l, reply B + i.
    This is DPO (Rafailov et al., 2024), whose frozen reference is here the base: r is what z_Δ has changed.
    """
    chosen, z_post = targets >= 0, combine(z_base, z_delta)

    def log_p(z: Tensor) -> Tensor:
        each = F.cross_entropy(z[chosen].float(), targets[chosen], reduction="none")
        return each.new_zeros(len(targets)).index_add(0, chosen.nonzero()[:, 0], -each)  # (2B,)

    better, worse = (log_p(z_post) - log_p(z_base.detach()[..., :z_post.shape[-1]])).chunk(2)
    return -F.logsigmoid(beta * (better - worse)).sum()


# ---------------------------------------------------------------- in the form of ivl.two_headed_loss

def distillation_loss(h_base: Tensor, head_base: Tensor, h_value: Tensor, head_value: Tensor, targets: Tensor,
                      counted: Tensor, w_kl: float, w_norm: float, teacher: Llama, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """w_kl · KL + w_norm · norm term, and the two sums (2,) without gradient. teacher reads inputs (B, T)."""
    with torch.no_grad():
        z_base, z_teacher = F.linear(h_base, head_base), teacher(inputs)
    z_delta = F.linear(h_value, head_value)
    return weighted(distillation(z_base, z_delta, z_teacher, targets), norm_term(z_delta, counted), w_kl, w_norm)


def pairwise_loss(h_base: Tensor, head_base: Tensor, h_value: Tensor, head_value: Tensor, targets: Tensor,
                  counted: Tensor, w_pairs: float, w_norm: float, beta: float) -> tuple[Tensor, Tensor]:
    """w_pairs · pairwise loss + w_norm · norm term, and the two sums (2,) without gradient."""
    with torch.no_grad():
        z_base = F.linear(h_base, head_base)
    z_delta = F.linear(h_value, head_value)
    return weighted(pairwise(z_base, z_delta, targets, beta), norm_term(z_delta, counted), w_pairs, w_norm)


def weighted(loss: Tensor, norm: Tensor, w_loss: float, w_norm: float) -> tuple[Tensor, Tensor]:
    return w_loss * loss + w_norm * norm, torch.stack((loss, norm)).detach()


# ---------------------------------------------------------------- preferences as chats

def paired(better: Chats, worse: Chats) -> Chats:
    """Both as one: chat i is preferred to chat len(better) + i. Raises InputError if they do not ask the same."""
    def questions(chats: Chats) -> list[list[int]]:
        return [chats.ids[start:start + int(chats.target[start:end].int().argmax())].tolist()
                for start, end in neighbours(chats.offsets.tolist())]

    if questions(better) != questions(worse):
        raise InputError("--rejected must hold the chats of --data, one for one, with other replies "
                         f"(--data: {better.report}; --rejected: {worse.report})")
    return Chats(torch.cat((better.ids, worse.ids)), torch.cat((better.target, worse.target)),
                 torch.cat((better.offsets, better.offsets[-1] + worse.offsets[1:])), f"{better.report}; {worse.report}")
