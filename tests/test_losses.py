"""Distillation and preferences, against their formulas and by hand."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from extras import losses
from plumbing.dataset import Chats
from plumbing.files import InputError
from plumbing.weights import load


def batch(B=4, T=7, V=11, seed=0):
    g = torch.Generator().manual_seed(seed)
    z_base, z_delta, z_teacher = (
        torch.randn(B, T, V, generator=g, requires_grad=True) for _ in range(3)
    )
    targets = torch.randint(0, V, (B, T), generator=g)
    targets[:, :3], targets[0, 5:] = -100, -100
    return z_base, z_delta, z_teacher, targets


def test_distillation_worked_by_hand():
    # p_teacher = (3/4, 1/4), z_post = (0 + log 2, log 2 − log 2) → p_post = (2/3, 1/3)
    z_base, z_delta = (
        torch.tensor([[[0.0, math.log(2)]]]),
        torch.tensor([[[math.log(2), -math.log(2)]]]),
    )
    z_teacher = torch.tensor([[[math.log(3), 0.0]]])
    kl = losses.distillation(z_base, z_delta, z_teacher, torch.tensor([[0]]))
    assert kl.item() == pytest.approx(0.75 * math.log(9 / 8) + 0.25 * math.log(3 / 4), abs=1e-6)
    assert losses.distillation(
        z_base, z_delta, z_base + z_delta + 5, torch.tensor([[0]])
    ).item() == pytest.approx(0, abs=1e-6)


def test_distillation_gradient_is_softmax_minus_the_teachers():
    z_base, z_delta, z_teacher, targets = batch()
    losses.distillation(z_base, z_delta, z_teacher, targets).backward()
    expected = ((z_base + z_delta).softmax(-1) - z_teacher.softmax(-1)) * (targets >= 0)[..., None]
    torch.testing.assert_close(z_delta.grad, expected.detach(), atol=1e-6, rtol=0)
    assert z_base.grad is None and z_teacher.grad is None


def test_pairwise_worked_by_hand():
    # V = 2, one token a reply, p_base = (1/2, 1/2). y_w = 0, z_Δ = (log 3, 0): p_post = 3/4, r_w =
    # log 3/2; y_l = 0, z_Δ = 0: r_l = 0. With β = 2: −log σ(2 log 3/2) = log(1 + 4/9)
    z_base = torch.zeros(2, 1, 2)
    z_delta = torch.tensor([[[math.log(3), 0.0]], [[0.0, 0.0]]])
    loss = losses.pairwise(z_base, z_delta, torch.zeros(2, 1, dtype=torch.long), 2.0)
    assert loss.item() == pytest.approx(math.log(13 / 9), abs=1e-6)


def test_pairwise_equals_its_formula_pair_by_pair():
    z_base, z_delta, _, targets = batch()
    loss = losses.pairwise(z_base, z_delta, targets, 0.3)
    (gradient,) = torch.autograd.grad(loss, z_delta)

    def r(i):
        t = targets[i] >= 0
        picked = range(int(t.sum())), targets[i][t]
        return (
            (z_base + z_delta)[i][t].log_softmax(-1)[picked] - z_base[i][t].log_softmax(-1)[picked]
        ).sum()

    expected = sum(-torch.log(torch.sigmoid(0.3 * (r(i) - r(i + 2)))) for i in range(2))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z_delta)[0])
    (losses.pairwise(z_base, z_delta, targets, 0.3)).backward()
    assert z_base.grad is None
    assert losses.pairwise(z_base, torch.zeros_like(z_delta), targets, 0.3).item() == pytest.approx(
        2 * math.log(2)
    )


def test_losses_from_hidden_states(base_dir, value_dir):
    base, value = load(base_dir), load(value_dir)
    ids = torch.randint(3, 200, (4, 9), generator=torch.Generator().manual_seed(0))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    batch = inputs, targets, targets >= 0
    z_base, z_delta = base(inputs), value(inputs)
    norm = z_delta.abs().mean(-1).sum()
    for expected, (loss, sums) in (
        (
            losses.distillation(z_base, z_delta, base(inputs), targets),
            losses.distill(base, base, value, batch, nullcontext(), 0.7, 0.3),
        ),
        (
            losses.pairwise(z_base, z_delta, targets, 0.1),
            losses.prefer(0.1, base, value, batch, nullcontext(), 0.7, 0.3),
        ),
    ):
        torch.testing.assert_close(sums, torch.stack((expected, norm)).detach())
        torch.testing.assert_close(loss, 0.7 * expected + 0.3 * norm)
    loss.backward()
    assert all(p.grad is None for p in base.parameters()) and value.unembed.grad.abs().sum() > 0


def test_the_words_that_only_the_value_model_has_count_for_nothing(base_dir, value_dir):
    class Narrow:
        """A base with fewer words."""

        def __init__(self, base):
            self.hidden, self.unembed = base.hidden, base.unembed[:250]

    base, value = load(base_dir), load(value_dir)
    ids = torch.randint(3, 200, (4, 9), generator=torch.Generator().manual_seed(0))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    batch = inputs, targets, targets >= 0
    norm = value(inputs)[..., :250].abs().mean(-1).sum()
    for loss in (partial(losses.distill, base), partial(losses.prefer, 0.1)):
        _, sums = loss(Narrow(base), value, batch, nullcontext(), 1.0, 1.0)
        torch.testing.assert_close(sums[1], norm.detach())


def test_the_words_that_only_the_base_has_count_for_nothing():
    z_base, z_delta, z_teacher, targets = batch()
    wide = F.pad(z_base.detach(), (0, 3), value=9.0)
    for loss in (
        partial(losses.pairwise, targets=targets, beta=0.3),
        partial(losses.distillation, z_teacher=z_teacher, targets=targets),
    ):
        torch.testing.assert_close(loss(wide, z_delta), loss(z_base, z_delta))


def chats(*rows) -> Chats:
    """Chats of these ids, of which those above 50 are targets."""
    ids = [i for row in rows for i in row]
    offsets = torch.tensor([0, *torch.tensor([len(row) for row in rows]).cumsum(0)])
    return Chats(
        torch.tensor(ids, dtype=torch.int32),
        torch.tensor([i > 50 for i in ids]),
        offsets,
        torch.arange(len(rows)),
        f"{len(rows)} chats",
    )


def test_pairs_must_ask_the_same():
    better, worse = chats([1, 2, 60, 61], [1, 3, 62]), chats([1, 2, 70], [1, 3, 71, 72, 73])
    both = losses.paired(better, worse)
    assert both.batch([1])[0].tolist() == [[1, 3, 0, 0], [1, 3, 71, 72]]
    assert both.batch([1])[1].tolist() == [[-100, 62, -100, -100], [-100, 71, 72, 73]]
    with pytest.raises(InputError, match="one for one"):
        losses.paired(better, chats([1, 2, 70], [1, 4, 71]))


def test_a_pair_of_which_one_is_left_out_is_no_pair():
    better, worse = chats([1, 2, 60, 61], [1, 3, 62]), chats([1, 3, 71, 72])
    worse.entry += 1  # its first chat did not fit
    both = losses.paired(better, worse)
    assert both.batch([0])[0].tolist() == [[1, 3, 0], [1, 3, 71]] and len(both) == 1
    assert "left out                   1  the rejected reply" in both.report
