"""That each bench runs and compares like with like. No test measures time."""

import json
import math
import sys

import pytest
import torch
from conftest import ROOT, assert_refused

sys.path.insert(0, str(ROOT / "experiments"))
import bench
from files import InputError

CPU = torch.device("cpu")
TOYS = ("toy-large", "toy-small")


@pytest.fixture
def bench_main(monkeypatch, tmp_path, capsys):
    """Runs bench.py in this process: bench_main("loss", "--tokens", 8) → what --json wrote, what was printed."""
    def run(*args) -> tuple[dict, str]:
        file = tmp_path / "rows.json"
        device = [] if args[0] == "vocab-map" or "--device" in args else ["--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, args), *device, "--json", str(file)])
        bench.main()
        return json.loads(file.read_text()), capsys.readouterr().out
    return run


def check(written: dict, printed: str, names: list[str], units: list[str]) -> None:
    assert torch.__version__ in written["machine"] and "threads" in written["machine"]
    assert [(row["name"], row["unit"]) for row in written["rows"]] == [(name, unit) for name in names for unit in units]
    for row in written["rows"]:
        assert row["name"] in printed
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("ours", "peer", "ratio"))
        better = row["ours"] / row["peer"] if row["unit"].endswith("/s") else row["peer"] / row["ours"]
        assert row["ratio"] == pytest.approx(better)


def test_decode(bench_main):
    written, printed = bench_main("decode", "--shape", *TOYS, "--tokens", 3, 5, "--repeats", 1)
    names = ["ours base+value / ours base alone", "ours base alone / transformers base alone",
             "ours base+value / transformers base alone", "ours base+value / two cached transformers models",
             "ours base+value / two transformers models, caches off"]
    check(written, printed, names * 2, ["tokens/s", "MB"])
    rows = [row for row in written["rows"] if row["unit"] == "tokens/s"]
    assert [row["tokens"] for row in rows] == [3] * 5 + [5] * 5
    assert [row["agreement"] for row in rows] == [None, 1, None, 1, 1] * 2
    assert all(row["shape"] == "toy-large + toy-small" and 0 < row["share"] for row in rows)
    assert "toy-small + toy-large" in printed and "3 tokens" in printed and "5 tokens" in printed


def test_ours_and_the_peers_choose_the_same_tokens():
    base, value = (bench.random_llama(name, CPU, torch.float32, seed) for seed, name in enumerate(TOYS))
    twins = [bench.transformers_twin(model) for model in (base, value)]
    prompt = [5, 3, 8]
    both = bench.ours(base, value, prompt, 40)
    assert len(set(both)) > 20 and both != bench.ours(base, None, prompt, 40)
    assert bench.transformers_pair(*twins, prompt, 40) == both == bench.transformers_pair_uncached(*twins, prompt, 40)
    assert bench.transformers_alone(twins[0], prompt, 40) == bench.ours(base, None, prompt, 40)


@pytest.mark.parametrize("a, b, share", [([1, 2, 3, 4], [1, 2, 3, 4], 1), ([1, 2, 3, 4], [1, 9, 3, 4], 0.25),
                                         ([1, 2, 3, 4], [9, 2, 3, 4], 0)])
def test_agreement_ends_at_the_first_difference(a, b, share):
    assert bench.agreement(a, b) == share


def test_loss(bench_main):
    written, printed = bench_main("loss", "--shape", *TOYS, "--tokens", 16, "--repeats", 1)
    peers = ["eager", "F.linear_cross_entropy (no norm term, base gradient too)"]
    check(written, printed, [f"two-headed loss / {peer}" for peer in peers], ["tokens/s", "MB"])


def test_loss_variants_have_one_gradient():
    variants = bench.loss_variants(TOYS, 24, CPU, compiled=False)
    for ours, eager in zip(variants["two-headed"](), variants["eager"](), strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-6, rtol=1e-4)
    library = [run for name, run in variants.items() if name.startswith("F.")][0]
    for theirs, eager in zip(library(), variants["eager"](), strict=True):  # its pull on a logit is 1 / (24 × 1536)
        assert 0 < (theirs - eager).abs().max() < 0.01


def test_train_step(bench_main):
    written, printed = bench_main("train-step", "--shape", *TOYS, "--tokens", 16, "--repeats", 1)
    check(written, printed, ["training step, ours / ours with the eager loss",
                             "training step, ours / two transformers models, logits added"], ["tokens/s", "MB"])
    assert all(0 < row["share"] for row in written["rows"] if row["unit"] == "tokens/s")


def test_training_steps_of_both_sides_are_the_same_step():
    torch.manual_seed(0)
    base, value = (bench.random_llama(name, CPU, torch.float32, seed) for seed, name in enumerate(TOYS))
    steps = bench.step_variants(base.requires_grad_(False), value, 16)
    theirs = steps.pop("two transformers models, logits added")
    theirs()  # ours and the eager one, which share a model, have each done a step
    losses = [step().item() for step in (*steps.values(), theirs, theirs)]
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-5) and losses[1] < losses[0]


def test_flop_of_a_forward_pass_by_hand():
    config = bench.config_of("toy-large")  # tied: every matrix is multiplied with
    matrices = 3 * (4 * 128 * 128 + 3 * 128 * 320) + 1536 * 128
    attention = 3 * 4 * 32 * 2 * 2 * (10 * 10 / 2)  # queries with keys, weights with values; half is in the future
    assert bench.forward_flop(config, matrices, 10) == 2 * matrices * 10 + attention
    untied = bench.config_of("58m")
    assert bench.forward_flop(untied, 32000 * 512 + 7, 1) == 2 * 7 + 6 * 512 * 2


def test_peak_memory_on_a_cpu_is_that_of_the_tensors():
    def run():
        a = torch.zeros(1000, 250)  # 1 MB
        b = a + 1
        del a
        return b + 1
    assert bench.watched(run, CPU)[0] == pytest.approx(2_000_000, abs=100)  # the numbers 1 are tensors too


def test_a_long_run_is_not_repeated(monkeypatch):
    ran = []
    monkeypatch.setattr(bench, "LONG", 0)
    assert bench.measure({"slow": lambda: ran.append(1)}, 5, CPU)["slow"].seconds > 0
    assert len(ran) == 2  # for its memory, for its time


def test_weights_read_per_token():
    tied, untied = (bench.random_llama(name, CPU, torch.float32, 0) for name in ("toy-small", "24m"))
    assert bench.bytes_per_token(tied) == 4 * tied.size()
    assert bench.bytes_per_token(untied) == 4 * (untied.size() - 32000 * 256)


def test_shapes_have_the_size_in_their_name():
    for name, billions in (("24m", 0.024), ("58m", 0.058), ("tinyllama-1.1b", 1.10), ("llama-3.2-1b", 1.236),
                           ("llama-3.2-3b", 3.21), ("llama-2-7b", 6.74), ("llama-3-8b", 8.03), ("llama-2-13b", 13.02),
                           ("llama-2-70b", 68.98)):
        with torch.device("meta"):
            assert bench.Llama(bench.config_of(name)).size() / 1e9 == pytest.approx(billions, rel=0.01), name


def test_vocab_map_writes_its_rows_too(bench_main, base_dir, value_dir, tmp_path):
    (tmp_path / "text.txt").write_text("The cat sat on the mat.\n\nThe dog is in the garden.\n")
    written, printed = bench_main("vocab-map", "--base", base_dir, "--value", value_dir, "--text", tmp_path / "text.txt")
    check(written, printed, ["vocab-map, the same texts", "vocab-map, ours on all texts"], ["texts/s"])


@pytest.mark.parametrize("args, words", [
    (["decode", "--shape", "llama-9", "58m"], "llama-9.*toy-small.*58m"),
    (["loss", "--shape", "llama-3-8b", "58m"], "128256.*32000"),
    (["train-step", "--tokens", "0"], "--tokens"),
    (["decode", "--device", "cuda:99"], "cuda:99"),
])
def test_mistakes_are_named(bench_main, args, words):
    with pytest.raises(InputError, match=words):
        bench_main(*args)


def test_a_mistake_is_one_line(run):
    assert_refused(run("experiments/bench.py", "loss", "--shape", "58m", "58"), "--shape 58:")
