"""The norm term's study: what each loss pulls on, and what is noted along the way."""

import json

import pytest
import torch

from experiments import norm, toy
from ivl import loss_sums
from model import Llama
from train import FULL_PRECISION, forward

INPUTS = torch.tensor([[1, 5, 6]])
TARGETS = torch.tensor([[-100, 6, 7]])
COUNTED = torch.tensor([[False, True, True]])
BATCH = INPUTS, TARGETS, COUNTED


def tiny(seed: int) -> Llama:
    """A Llama whose logits are a few nats, and not about zero."""
    model = Llama(toy.shape(16, 32, 1, 2, 33)).init_weights(seed)
    with torch.no_grad():
        model.embed.weight.mul_(50).add_(0.3)
    return model


def pull(loss, base, value, w_norm: float) -> torch.Tensor:
    """The gradient of λ times a norm term by a constant that is added to all logits of z_Δ."""
    constant = torch.zeros((), requires_grad=True)
    shifted = Shifted(value, constant)
    total, _ = loss(base, shifted, BATCH, FULL_PRECISION, 0.0, w_norm)
    return torch.autograd.grad(total, constant, allow_unused=True)[0]


class Shifted:
    """A value model whose logits all have a constant added, by one more hidden unit."""

    def __init__(self, value, constant):
        self.value, self.constant = value, constant

    def hidden(self, tokens):
        h = self.value.hidden(tokens)
        return torch.cat((h, torch.ones_like(h[..., :1]) * self.constant), -1)

    @property
    def unembed(self):
        W = self.value.unembed
        return torch.cat((W, torch.ones_like(W[:, :1])), 1)


def test_only_the_plain_term_pulls_on_the_constant():
    base, value = tiny(1), tiny(2)
    plain = pull(forward, base, value, 1.0)
    z_delta = value(INPUTS)[COUNTED]
    assert plain.item() == pytest.approx(z_delta.sign().mean(-1).sum().item(), abs=1e-5)
    assert abs(plain.item()) > 0.01
    # the median stands between as many logits above as below; it may be one of them
    assert abs(pull(norm.centred, base, value, 1.0).item()) <= 2 / z_delta.shape[-1] + 1e-6


def test_the_centred_loss_is_the_plain_one_of_z_delta_without_its_median():
    base, value = tiny(1), tiny(2)
    loss, sums = norm.centred(base, value, BATCH, FULL_PRECISION, 0.5, 0.25)
    z_base, z_delta = base(INPUTS).detach(), value(INPUTS)
    middle = z_delta.median(-1, keepdim=True).values
    expected = loss_sums(z_base, z_delta - middle, TARGETS, COUNTED)
    assert torch.allclose(sums, torch.stack(expected).detach(), atol=1e-5)
    assert loss.item() == pytest.approx(0.5 * sums[0].item() + 0.25 * sums[1].item(), abs=1e-5)

    # the cross-entropy does not see a constant, nor does its gradient; the norm term is smaller
    plain = forward(base, value, BATCH)[1]
    assert sums[0].item() == pytest.approx(plain[0].item(), abs=1e-4)
    assert sums[1] < plain[1]


def test_lambda_grows_over_the_first_half_of_the_steps(monkeypatch):
    seen = []
    monkeypatch.setattr(norm, "forward", lambda *given: seen.append(given[-2:]))
    warmed = norm.Warmed(steps=8)
    for _ in range(8):
        warmed(None, None, BATCH, FULL_PRECISION, 0.5, 2.0)
    assert seen == [(0.5, w) for w in (0.0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0)]


class Says:
    """A value model that always has these logits."""

    unembed = torch.zeros(1)

    def __init__(self, *z: float):
        self.z = torch.tensor(z)

    def __call__(self, tokens):
        return self.z.expand(*tokens.shape, -1)


class OneBatch:
    def __len__(self):
        return 3

    def batch(self, rows, device):
        assert list(rows) == [0, 1, 2]
        return BATCH


def test_parts_by_hand(monkeypatch):
    # the median is 2; what is left: −4, −1, 0, 0, 0, 1, 2, 3; the targets are 6 and 7
    value = Says(-2, 1, 2, 2, 2, 3, 4, 5)
    parts = norm.parts(value, OneBatch())
    assert parts == {"norm": 21 / 8, "constant": 2, "left": 11 / 8, "demonstrated": 2.5}

    noted = norm.Parts(OneBatch())
    assert noted(15, value) == {} and noted(17, value) == {}
    assert noted(0, value) == noted(16, value) == {f"|z| {key}": x for key, x in parts.items()}


def test_means_over_the_logs_of_the_seeds(tmp_path):
    for seed in (1, 2):
        entries = [
            {"run": "small", "step": 0, "done": 0, "|z| norm": 1.0 * seed, "|z| left": 4.0},
            {"run": "small", "step": 0, "loss": 5.0},
            {"run": "small", "step": 15, "loss": 3.0, "|z| norm": 3.0 * seed, "|z| left": 2.0},
            {"run": "small", "step": 15, "done": 16, "held_out_loss": 3.0},
        ]
        (tmp_path / str(seed)).mkdir()
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (tmp_path / str(seed) / "log.jsonl").write_text(lines)
    means = norm.mean_parts([tmp_path / "1", tmp_path / "2"])
    assert means == {"step": [0, 16], "norm": [1.5, 4.5], "left": [4.0, 2.0]}
