"""The plan against the paper's Table 3 and against what autograd really keeps."""

import argparse

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from experiments import plan
from experiments.bench_measure import CPU, watched
from experiments.bench_sides import random_llama, weight_bytes
from extras import benchmarks, int8
from extras.int8 import Int8Llama, rounded
from ivl import chunk_rows, generate
from model import Config, Llama
from plumbing.files import InputError
from plumbing.weights import save
from train import forward

SHAPES = {
    "Tinyllama-1.1B": "tinyllama-1.1b",
    "Llama-2-7B": "llama-2-7b",
    "Llama-2-13B": "llama-2-13b",
    "Llama-2-70B": "llama-2-70b",
}


@pytest.mark.parametrize("base, system", benchmarks.paper_costs())
def test_decoding_needs_what_table_3_says(base, system):
    value = {"alone": None, "1.1B": plan.SHAPES["tinyllama-1.1b"]}[system]
    gpus = 4 if base == "Llama-2-70B" else 1
    for tokens in benchmarks.LENGTHS:
        parts = plan.decoding(plan.SHAPES[SHAPES[base]], value, gpus, tokens, 1)
        measured = benchmarks.paper_costs()[base, system][f"GB {tokens}"]
        assert sum(parts.values()) / plan.GIB == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("kv_heads, checkpointing", [(2, False), (8, False), (2, True)])
def test_activations_are_what_autograd_keeps(kv_heads, checkpointing):
    model = Llama(Config(64, 256, 704, 4, 8, kv_heads, 32, 256))
    model.checkpointing = checkpointing
    kept, tokens = {}, 4 * 256
    held = []  # so that no storage is freed and its address used again

    def pack(tensor):
        held.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(pack, lambda tensor: tensor):
        model.hidden(torch.randint(0, 64, (4, 256)))
    expected = tokens * plan.saved(model.config, checkpointing)
    norm = (
        2 * 4 * 256 * tokens
    )  # RMSNorm's input, and on the CPU, where no kernel is fused, its output before the weight
    if checkpointing:  # nothing is recomputed yet: only the residuals
        one = plan.saved(Config(64, 256, 704, 1, 8, kv_heads, 32, 256), False)
        assert sum(kept.values()) == pytest.approx(expected - one * tokens + norm, rel=0.1)
    else:
        weights = 2 * sum(p.numel() for p in model.blocks.parameters())
        assert sum(kept.values()) == pytest.approx(expected + weights + norm + 4 * norm, rel=0.05)


BASE = Config(32000, 512, 2048, 3, 8, 8, 64, 2048)
VALUE = Config(32000, 256, 1280, 3, 4, 4, 64, 2048)


@pytest.fixture(scope="module")
def eight_bits() -> Int8Llama:
    return rounded(random_llama(BASE, CPU, torch.bfloat16, 0))


@pytest.fixture(autouse=True)
def pieces_as_on_a_gpu(monkeypatch):
    """The plan is one for GPUs, where more of an int8 matrix is made floats at a time."""
    monkeypatch.setitem(int8.PIECE, "cpu", int8.PIECE["cuda"])


@pytest.mark.parametrize("tokens, batch", [(512, 1), (64, 1), (256, 3), (64, 20)])
def test_decoding_with_an_int8_base_takes_what_the_plan_says(eight_bits, tokens, batch):
    value = random_llama(VALUE, CPU, torch.bfloat16, 1)
    prompts = torch.randint(3, 32000, (batch, tokens - 1)).tolist()
    peak, _ = watched(lambda: list(generate(eight_bits, [value], prompts, 1)), CPU)
    measured = peak + weight_bytes(eight_bits) + weight_bytes(value)
    parts = plan.decoding(BASE, VALUE, 1, tokens, batch, Int8Llama)
    assert measured == pytest.approx(sum(parts.values()) - plan.LIBRARY, rel=0.05)
    assert parts["weights of the base"] == weight_bytes(eight_bits)


@pytest.mark.parametrize(
    "tokens, batch, checkpointing", [(64, 1, False), (128, 2, False), (128, 4, True)]
)
def test_training_takes_what_the_plan_says(tokens, batch, checkpointing):
    """In the second micro-batch of a step, when there are gradients already."""
    BASE = Config(8000, 256, 1024, 3, 8, 8, 32, 2048)
    VALUE = Config(8000, 128, 640, 3, 4, 4, 32, 2048)
    ids = torch.randint(3, 8000, (batch, tokens + 1))
    chats = ids[:, :-1], ids[:, 1:], torch.ones(batch, tokens, dtype=torch.bool)
    autocast = torch.autocast("cpu", torch.bfloat16)
    value = random_llama(VALUE, CPU, torch.float32, 1)
    value.checkpointing = checkpointing

    # what a CPU needs besides, where less is fused: norms before their weight; in the loss smaller
    # chunks, but with three copies of them in float32
    V, H, layers = VALUE.vocab_size, VALUE.hidden_size, VALUE.num_hidden_layers
    norms = 2 * 4 * H * batch * tokens * (1 if checkpointing else layers + 1)
    rows = {kind: min(batch * tokens, chunk_rows(V, kind)) for kind in ("cpu", "cuda")}
    loss = 12 * V * rows["cpu"]
    for name, n in plan.loss(BASE, VALUE, batch * tokens).items():
        loss += n * rows["cpu"] / rows["cuda"] if "chunk" in name else n

    measured, said = {}, {}
    plain = random_llama(BASE, CPU, torch.bfloat16, 0)
    for base in (plain, rounded(plain)):

        def step(base=base):
            forward(base, value, chats, autocast, 1 / tokens, 1 / tokens)[0].backward()

        step()
        parts = plan.training(BASE, VALUE, 1, tokens, batch, checkpointing, type(base))
        there = weight_bytes(base) + weight_bytes(value)
        assert there == parts["weights of the base"] + parts["weights of the value model"]
        there += parts["gradients"] + parts["optimizer"]
        measured[type(base)] = watched(step, CPU)[0] + there
        # those copies are made once the base's unembedding has been read, and are more
        parts.pop("a piece of the base in bfloat16", None)
        parts["loss"] = loss
        said[type(base)] = sum(parts.values()) - plan.LIBRARY + norms
        assert measured[type(base)] == pytest.approx(said[type(base)], rel=0.05)
    saved = measured[Llama] - measured[Int8Llama]
    assert saved > 5e6
    assert saved == pytest.approx(said[Llama] - said[Int8Llama], rel=0.05)


def planned(capsys, *args) -> str:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    plan.plan(parser.parse_args([str(arg) for arg in args]))
    return capsys.readouterr().out


def test_what_fits_and_what_would(capsys, tmp_path):
    out = planned(capsys, "--base", "llama-2-70b", "--value", "tinyllama-1.1b", "--gpus", 4)
    assert out.count("   fits") == 2 and "at most 95 tokens/s" in out
    out = planned(capsys, "--base", "llama-2-70b", "--value", "tinyllama-1.1b")
    assert "does not fit; with --gpus 2 it would" in out
    out = planned(
        capsys, "--base", "llama-2-7b", "--value", "tinyllama-1.1b", "--micro_batch_size", 16
    )
    assert "does not fit; with --gpus 1 --micro_batch_size 16 --checkpointing it would" in out
    large = ("--base", "llama-2-70b", "--value", "tinyllama-1.1b", "--base_dtype", "int8")
    assert planned(capsys, *large, "--gpu", "h200").count("   fits") == 2
    out = planned(capsys, *large, "--gpu", "h100")
    decoding, training = out.split("training on")
    assert "   fits" in decoding and "   fits" not in training
    out = planned(capsys, *large[:4], "--gpu", "h200", "--gpus", 1)
    assert out.count("   fits") == 0
    out = planned(capsys, "--base", "llama-2-13b", "--gpu", "rtx-4090", "--gpus", 8)
    assert "   fits" in out
    save(Llama(Config(64, 16, 24, 2, 2, 1, 8, 64)), tmp_path)
    assert planned(capsys, "--base", tmp_path, "--tokens", 64).count("   fits") == 2


@pytest.mark.parametrize(
    "args, words",
    [
        (("--base", "llama-9"), "llama-9"),
        (("--base", "llama-2-70b", "--gpus", 3), "--gpus 3"),
        (("--base", "llama-2-7b", "--tokens", 0), "--tokens"),
    ],
)
def test_bad_input_is_named(capsys, args, words):
    with pytest.raises(InputError, match=words):
        planned(capsys, *args)
