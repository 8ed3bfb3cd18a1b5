"""That each bench runs and compares like with like. No test measures time."""

import argparse
import json
import math
import re
import sys
import time
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import test_graphs
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_refused

import ivl
from experiments import bench, bench_gpu, bench_measure, bench_sides, bench_speculative, plan
from experiments.bench_measure import CPU, Kernel
from extras import speculative
from model import Config, Llama, column_major
from plumbing.files import InputError

TOYS = ("toy-large", "toy-small")
TINY = Config(2000, 64, 96, 2, 2, 2, 32, 64), Config(2000, 128, 96, 2, 2, 2, 32, 64)
fake_cuda = test_graphs.cuda
needs_library = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="this torch does not have it"
)


@pytest.fixture
def bench_main(monkeypatch, tmp_path, capfd):
    """Runs bench.py in this process: bench_main("loss", "--tokens", 8) → what --json wrote, what
    was printed."""

    def run(*args) -> tuple[dict, str]:
        file = tmp_path / "rows.json"
        device = []
        if args[0] != "vocab-map" and "--device" not in args:
            device = ["--device", "cpu"]
        argv = ["bench.py", *map(str, args), *device, "--json", str(file)]
        monkeypatch.setattr(sys, "argv", argv)
        bench.main()
        return json.loads(file.read_text()), capfd.readouterr().out

    return run


def check(written: dict, printed: str, names: list[str], units: list[str]) -> None:
    assert torch.__version__ in written["machine"] and "threads" in written["machine"]
    expected = [(name, unit) for name in names for unit in units]
    assert [(row["name"], row["unit"]) for row in written["rows"]] == expected
    for row in written["rows"]:
        assert row["name"] in printed
        assert all(math.isfinite(row[key]) and row[key] > 0 for key in ("ours", "peer", "ratio"))
        better = row["peer"] / row["ours"]
        if row["unit"].endswith("/s"):
            better = row["ours"] / row["peer"]
        assert row["ratio"] == pytest.approx(better)


def names_of(what: str, *keys: str) -> list[str]:
    return [one.name for one in bench.COMPARISONS[what] if one.key in keys]


# ---------------------------------------------------------------- decoding


def test_decode(bench_main):
    written, printed = bench_main("decode", "--shape", *TOYS, "--tokens", 3, 5, "--repeats", 1)
    names = [
        "ours base+value / ours base alone",
        "ours base alone / transformers base alone",
        "ours base+value / transformers base alone",
        "ours base+value / two cached transformers models",
        "ours base+value / two transformers models, caches off",
        "ours with an int8 base / ours base+value",
    ]
    check(written, printed, names * 2, ["tokens/s", "MB"])
    rows = [row for row in written["rows"] if row["unit"] == "tokens/s"]
    assert [row["tokens"] for row in rows] == [3] * 6 + [5] * 6
    assert [row["agreement"] for row in rows] == [None, 1, None, 1, 1, None] * 2
    assert all(row["shape"] == "toy-large + toy-small" and 0 < row["share"] for row in rows)
    assert "toy-small + toy-large" in printed
    assert "3 tokens" in printed and "5 tokens" in printed


def test_memory_of_decoding_has_the_weights_of_those_who_read(bench_main):
    written, _ = bench_main("decode", "--shape", *TOYS, "--tokens", 3, "--repeats", 1)
    base, value = (4 * plan.size(bench.config_of(name)) / 1e6 for name in TOYS)
    untied = 4 * 1536 * 128 / 1e6, 4 * 1536 * 64 / 1e6  # ours on a CPU has unembeddings of its own
    for row in written["rows"]:
        if row["unit"] == "MB" and "int8" in row["name"]:
            saved = base + untied[0] - 0.27 * base  # int8 numbers need no unembedding of their own
            assert row["peer"] - row["ours"] > saved - 0.3
        elif row["unit"] == "MB":
            for key, side in zip(("ours", "peer"), row["name"].split(" / ")):
                least = base if "alone" in side else base + value
                if side.startswith("ours"):
                    least += untied[0] if "alone" in side else sum(untied)
                assert least < row[key] < least + 0.3, row  # MB of caches and all the rest


def test_ours_and_the_peers_choose_the_same_tokens():
    pair = bench_sides.random_pair(TOYS, CPU, {"their base", "their pair"})
    variants = bench_sides.decode_variants(
        pair, 40, {"base", "both", "their base", "their pair", "uncached"}
    )
    said = {name: run() for name, run in variants.items()}
    assert len(set(said["both"])) > 20 and said["both"] != said["base"]
    assert said["both"] == said["their pair"] == said["uncached"]
    assert said["base"] == said["their base"]


def test_one_decoder_serves_text_after_text():
    base, value = (bench_sides.random_llama(name, CPU, torch.float32, 1) for name in TOYS)
    decode = bench_sides.decoder(base, value)
    first = bench_sides.ours(decode, [1, 2, 3], 12)
    other = bench_sides.ours(decode, [4, 5], 12)
    assert bench_sides.ours(decode, [1, 2, 3], 12) == first != other


def test_on_cuda_the_decoder_is_made_of_graphs(monkeypatch):
    from extras import graphs

    made = []

    class Graphs:
        def __init__(self, base, values):
            made.append((base, values))

        def rounds(self, replies, seed):
            while True:
                yield [[7]]

    monkeypatch.setattr(graphs, "Graphs", Graphs)

    class Base:
        unembed = SimpleNamespace(device=torch.device("cuda"))

    base = Base()
    decode = bench_sides.decoder(base)
    assert bench_sides.ours(decode, [1], 3) == bench_sides.ours(decode, [1], 3) == [7, 7, 7]
    assert made == [(base, ())]


@pytest.mark.parametrize(
    "a, b, share",
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1),
        ([1, 2, 3, 4], [1, 9, 3, 4], 0.25),
        ([1, 2, 3, 4], [9, 2, 3, 4], 0),
    ],
)
def test_agreement_ends_at_the_first_difference(a, b, share):
    assert bench.agreement(a, b) == share


# ---------------------------------------------------------------- which rows, and when


@pytest.fixture
def ran(monkeypatch):
    """Which variants are measured, and how often; nothing is run."""
    ran = []

    def measure(variants, repeats, device):
        for name in variants:
            ran.append(name)
            yield name, bench.Measured(1.0, 10**7, [1])

    monkeypatch.setattr(bench, "measure", measure)
    return ran


@pytest.mark.parametrize(
    "peers, sides",
    [
        (["alone"], {"both", "base"}),
        (["uncached"], {"both", "uncached"}),
        (["ours base alone / transformers base alone", "pair"], {"both", "their pair", "base"}),
    ],
)
def test_peers_choose_what_is_measured_and_each_is_measured_once(bench_main, ran, peers, sides):
    written, _ = bench_main("decode", "--shape", *TOYS, "--tokens", 3, "--peers", *peers)
    assert set(ran) - {"value", "their base"} == sides
    assert all(n == 1 for n in Counter(ran).values())
    assert len(written["rows"]) == 2 * len(peers)


def test_on_a_gpu_the_slow_peers_see_the_shortest_length_only(monkeypatch, ran):
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(bench, "random_pair", lambda names, device, wanted: FakePair())
    monkeypatch.setattr(
        bench, "decode_variants", lambda pair, tokens, wanted: dict.fromkeys(wanted)
    )
    all_of_them = bench.COMPARISONS["decode"]
    for peers in (None, ["pair", "uncached"]):
        args = SimpleNamespace(device=torch.device("cuda"), peers=peers, compile=False, repeats=1)
        del ran[:]
        list(bench.bench_decode([TOYS], [64, 128, 256], all_of_them, args))
        seen = Counter(ran)
        assert seen["uncached"] == seen["their pair"] == (1 if peers is None else 3)
        assert seen["both"] == seen["their base"] == 3


class FakePair:
    def members(self, side: str) -> list:
        return []

    def weights(self, side: str) -> int:
        return 0


def test_a_killed_run_leaves_the_rows_that_it_has(bench_main, monkeypatch, tmp_path, capfd):
    def measure(variants, repeats, device):
        for name in variants:
            if name == "their pair":
                raise KeyboardInterrupt
            yield name, bench.Measured(1.0, 1000, [1])

    monkeypatch.setattr(bench, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        bench_main("decode", "--shape", *TOYS, "--tokens", 3)
    written = json.loads((tmp_path / "rows.json").read_text())
    printed = capfd.readouterr().out
    check(written, printed, names_of("decode", "alone", "base", "transformers"), ["tokens/s", "MB"])


def test_rows_are_given_when_both_sides_are_measured(monkeypatch):
    order = []

    def measure(variants, repeats, device):
        for name in variants:
            order.append(name)
            yield name, bench.Measured(1.0, 100, None)

    monkeypatch.setattr(bench, "measure", measure)
    comparisons = bench.COMPARISONS["loss"][:2]
    args = SimpleNamespace(repeats=1, device=CPU)
    variants = dict.fromkeys(("two-headed", "eager", "compiled"))
    for comparison, _ in bench.compared(comparisons, variants, args):
        order.append(comparison.key)
    assert order == ["two-headed", "eager", "eager", "compiled", "compiled"]


# ---------------------------------------------------------------- speculative decoding


def test_speculative_with_random_weights(bench_main):
    options = ("--tokens", 13, "--repeats", 1, "--share", 1, "--drafted", 1, 3)
    written, printed = bench_main("speculative", "--shape", *TOYS, TOYS[1], *options)
    names = [f"speculative, {way} / plain" for way in ("1 drafted", "3 drafted")]
    check(written, printed, names, ["tokens/s"])
    assert "1.00 of 1 drafted tokens stand" in written["rows"][0]["note"]
    assert "predicted" in written["rows"][0]["note"]
    assert "3.00 of 3 drafted tokens stand" in written["rows"][1]["note"]


def test_speculative_with_directories(bench_main, base_dir, value_dir, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello you\nWhere is the dog?\nThe cat\nnever asked\n")
    models = ("--base", base_dir, "--draft", base_dir, "--value", value_dir, "--prompts", prompts)
    options = ("--limit", 3, "--batch_size", 2, "--tokens", 9, "--repeats", 1, "--drafted", 3)
    written, printed = bench_main("speculative", *models, *options)
    check(
        written,
        printed,
        ["speculative, 3 drafted / plain"],
        ["tokens/s"],
    )
    for row in written["rows"]:
        assert "3 of 3 replies are the same" in row["note"]
    assert "3.00 of 3 drafted tokens stand" in written["rows"][0]["note"]  # its own draft


def test_a_coin_decides_what_stands_and_only_in_its_block():
    drafted, z_post = torch.zeros(2000, 2, dtype=torch.long), torch.randn(2000, 3, 5)
    true = speculative.verify_likeliest(drafted, z_post)[0]
    with bench_speculative.coin(0.5):
        stood = speculative.verify_likeliest(drafted, z_post)[0]
    assert stood.float().mean().item() == pytest.approx(0.5 + 0.25, abs=0.06)
    assert speculative.verify_likeliest(drafted, z_post)[0].equal(true) and not true.equal(stood)


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("there", [False, True])
def test_loss(bench_main, monkeypatch, there):
    if not there:
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)  # as in torch 2.11
    elif not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch does not have it")
    written, printed = bench_main("loss", "--shape", *TOYS, "--tokens", 16, "--repeats", 1)
    peers = names_of("loss", "eager", *["library"] * there)
    check(written, printed, peers, ["tokens/s", "MB", "MB beyond"])
    assert written["rows"][2]["model"]["dW"] == 4 * 1536 * 64
    assert "any method returns" in printed and "a chunk of z_base" in printed


@pytest.mark.parametrize("tokens", [100, 500])
def test_the_memory_model_agrees_with_the_peak(monkeypatch, tokens):
    """Within 2 %, where all is one chunk and where it is several."""
    monkeypatch.setattr(ivl, "CPU_LOGITS", 2**18)  # 128 rows of 2000 words
    run = bench_sides.loss_variants(*TINY, tokens, CPU, {"two-headed"})["two-headed"]
    model = plan.loss(*TINY, tokens, "cpu")
    measured, _ = bench_measure.watched(run, CPU)
    assert measured == pytest.approx(sum(model.values()), rel=0.02)


def test_the_loss_beyond_its_gradients_does_not_grow_with_the_text():
    model = [plan.loss(*TINY, tokens, "cuda") for tokens in (16384, 4 * 16384)]
    beyond = [sum(parts.values()) - parts["dh"] - parts["dW"] for parts in model]
    assert beyond[0] == beyond[1] and model[1]["dh"] == 4 * model[0]["dh"]


def test_loss_variants_have_one_gradient():
    configs = [bench.config_of(name) for name in TOYS]
    variants = bench_sides.loss_variants(*configs, 24, CPU, {"two-headed", "eager"})
    for ours, eager in zip(variants["two-headed"](), variants["eager"](), strict=True):
        torch.testing.assert_close(ours, eager, atol=1e-6, rtol=1e-4)


@needs_library
def test_the_library_s_gradient_lacks_the_norm_term_only():
    configs = [bench.config_of(name) for name in TOYS]
    variants = bench_sides.loss_variants(*configs, 24, CPU, {"library", "eager"})
    for theirs, eager in zip(variants["library"](), variants["eager"](), strict=True):
        assert 0 < (theirs - eager).abs().max() < 0.01  # the pull on a logit: 1 / (24 × 1536)


# ---------------------------------------------------------------- a training step


def test_train_step(bench_main):
    written, printed = bench_main("train-step", "--shape", *TOYS, "--tokens", 16, "--repeats", 1)
    names = names_of("train-step", "eager", "transformers", "int8")
    check(written, printed, names, ["tokens/s", "MB"])
    assert all(0 < row["share"] for row in written["rows"] if row["unit"] == "tokens/s")


def test_train_step_with_compiled_blocks(bench_main, monkeypatch):
    compiled = []

    def note(model: Llama) -> Llama:
        compiled.append(model)
        return model

    monkeypatch.setattr(bench_sides, "compiled", note)  # else it would take a minute
    options = ("--shape", *TOYS, "--tokens", 16, "--repeats", 1, "--peers", "eager", "--compile")
    written, printed = bench_main("train-step", *options)
    assert {row["name"] for row in written["rows"]} == set(
        names_of("train-step", "eager", "compiled")
    )
    assert [model.config for model in compiled] == [bench.config_of(name) for name in TOYS[::-1]]


def test_training_steps_of_all_sides_are_the_same_step(monkeypatch):
    monkeypatch.setattr(bench_sides, "compiled", lambda model: model)
    torch.manual_seed(0)
    base, value = (
        bench_sides.random_llama(name, CPU, torch.float32, seed) for seed, name in enumerate(TOYS)
    )
    base.requires_grad_(False)
    untouched = bench_sides.copy(value)
    losses = {}
    for name in ("ours", "compiled", "eager", "transformers"):
        step = bench_sides.step_variants(base, bench_sides.copy(untouched), 16, {name})[name]
        losses[name] = [step().item(), step().item()]  # the first one has been done by then
        assert losses[name][1] < losses[name][0]
        assert losses[name] == pytest.approx(losses["ours"], rel=1e-5)


def test_flop_of_a_forward_pass_by_hand():
    config = bench.config_of("toy-large")  # tied: every matrix is multiplied with
    matrices = 3 * (4 * 128 * 128 + 3 * 128 * 320) + 1536 * 128
    # queries with keys, weights with values; half is in the future
    attention = 3 * 4 * 32 * 2 * 2 * (10 * 10 / 2)
    assert bench_sides.forward_flop(config, matrices, 10) == 2 * matrices * 10 + attention
    untied = bench.config_of("58m")
    assert bench_sides.forward_flop(untied, 32000 * 512 + 7, 1) == 2 * 7 + 6 * 512 * 2


# ---------------------------------------------------------------- measuring


def test_peak_memory_on_a_cpu_is_that_of_the_tensors():
    def run():
        a = torch.zeros(1000, 250)  # 1 MB
        b = a + 1
        del a
        return b + 1

    # the numbers 1 are tensors too
    assert bench_measure.watched(run, CPU)[0] == pytest.approx(2_000_000, abs=100)


def test_peak_memory_on_cuda_counts_what_the_first_run_leaves(monkeypatch):
    allocator = SimpleNamespace(now=1000, peak=1000)

    def run() -> str:
        if allocator.now == 1000:
            allocator.peak = 9000  # compiling
            allocator.now = 1300  # a cache that stays
        allocator.peak = max(allocator.peak, allocator.now + 50)
        return "result"

    def reset(device) -> None:
        allocator.peak = allocator.now

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocator.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocator.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    assert bench_measure.watched(run, torch.device("cuda")) == (350, "result")


def test_a_long_run_is_not_repeated(monkeypatch):
    ran = []
    monkeypatch.setattr(bench_measure, "LONG", 0)
    got = dict(bench_measure.measure({"slow": lambda: ran.append(1)}, 5, CPU))
    assert got["slow"].seconds > 0
    assert len(ran) == 2  # for its memory, for its time


def test_variants_take_turns_and_are_given_after_their_last_run():
    ran = []
    variants = {name: lambda name=name: ran.append(name) for name in "ab"}
    for name, _ in bench_measure.measure(variants, 2, CPU):
        ran.append(name.upper())
    assert "".join(ran) == "ab" + "ab" + "aA" + "bB"


def test_weights_read_per_token():
    tied, untied = (
        bench_sides.random_llama(name, CPU, torch.float32, 0) for name in ("toy-small", "24m")
    )
    of_tied, of_untied = 4 * tied.size(), 4 * (untied.size() - 32000 * 256)
    assert bench_sides.bytes_per_token(tied) == of_tied
    assert bench_sides.bytes_per_token(untied) == of_untied
    assert bench_sides.bytes_per_token(tied, untied) == of_tied + of_untied


def test_shapes_have_the_size_in_their_name():
    sizes = {
        "24m": 0.024,
        "58m": 0.058,
        "tinyllama-1.1b": 1.10,
        "llama-3.2-1b": 1.236,
        "llama-3.2-3b": 3.21,
        "llama-2-7b": 6.74,
        "llama-3-8b": 8.03,
        "llama-2-13b": 13.02,
        "llama-2-70b": 68.98,
    }
    for name, billions in sizes.items():
        size = plan.size(bench.config_of(name))
        assert size / 1e9 == pytest.approx(billions, rel=0.01), name


# ---------------------------------------------------------------- kernels


def test_kernels_on_a_cpu_are_the_operations_that_compute():
    a, b = torch.ones(4, 4), torch.ones(4)

    def run() -> None:
        c = F.linear(a, a)  # one product, though it transposes
        d = c.view(2, 8).t()[1:] + 1  # the number becomes a tensor
        F.rms_norm(d, (2,)).contiguous()
        b.copy_(a[0])

    found = bench_measure.kernels(run, CPU)
    names = [kernel.name for kernel in found]
    assert names[:2] == ["mm", "add"] and names[-1] == "copy_"
    assert all(first.start <= second.start for first, second in zip(found, found[1:]))
    assert not {"view", "t", "slice", "as_strided", "empty"} & set(names)


def test_kernels_on_cuda_are_those_of_the_device(monkeypatch):
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [  # name, where, start, end, whether it is only a name for several
        ("gemm", cuda, 50, 60, False),
        ("aten::mm", cpu, 0, 5, False),
        ("rms_norm", cuda, 10, 20, False),
        ("Memcpy DtoH", cuda, 61, 62, False),
        ("a step", cuda, 10, 62, True),
    ]
    noted = []

    class Profile:
        def __init__(self, activities, acc_events):
            noted.extend(activities)
            self.profiler = SimpleNamespace(
                kineto_results=SimpleNamespace(events=lambda: [Event(*event) for event in events])
            )

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    class Event:
        def __init__(self, *fields):
            names = ("name", "device_type", "start_ns", "end_ns", "is_user_annotation")
            for name, field in zip(names, fields, strict=True):
                setattr(self, name, lambda field=field: field)

    monkeypatch.setattr(bench_measure, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    found = bench_measure.kernels(lambda: None, torch.device("cuda"))
    assert found == [Kernel("rms_norm", 10, 20), Kernel("gemm", 50, 60)]
    assert torch.profiler.ProfilerActivity.CUDA in noted
    assert bench_measure.idle(found) == (50, 30)
    assert bench_measure.by_time(found + found[:1], 1) == [("rms_norm", 2, 20)]


def test_kernels_of_a_step(bench_main):
    written, printed = bench_main("kernels", "--shape", *TOYS)
    names = [f"kernels per step, ours base+value / ours {peer} alone" for peer in ("base", "value")]
    check(written, printed, names, ["kernels"])
    both, (base, value) = written["rows"][0]["ours"], (row["peer"] for row in written["rows"])
    # of the pair's one chooses instead of two, and one adds
    assert both == base + value
    assert re.search(r"^mm +22\.0 ", printed, re.MULTILINE)  # four a layer of 3 + 2, two heads


def test_on_cuda_as_many_steps_are_profiled(fake_cuda, monkeypatch):
    """The fake's steps are replayed; the first one was recorded before."""
    base, value = (bench_sides.random_llama(name, CPU, torch.float32, 1) for name in TOYS)

    def kernels(run, device) -> int:
        before = dict(fake_cuda.made)
        run()
        assert fake_cuda.made["recordings"] == before["recordings"] > 0
        return fake_cuda.made["replays"] - before["replays"]

    monkeypatch.setattr(bench_sides, "kernels", kernels)
    monkeypatch.setattr(test_graphs.graphs, "SHORTEST", 64)  # one graph for all steps, as on a GPU
    decode = partial(ivl.generate, base, [value], rounds=test_graphs.graphs.Kept().rounds)
    assert bench_sides.profiled(decode, 20, CPU) == 20


# ---------------------------------------------------------------- the GPU's rows


def test_rows_and_parts_belong_together():
    assert len({row.key for row in bench_gpu.ROWS}) == len(bench_gpu.ROWS)
    assert list(dict.fromkeys(row.part for row in bench_gpu.ROWS)) == list(bench_gpu.PARTS)
    least = sum(part.least for part in bench_gpu.PARTS.values())
    assert least < 60 * bench_gpu.MINUTES < 9 * 60


@pytest.mark.parametrize(
    "key, ratio, met, text",
    [
        ("pair", 1.2, True, "1.20"),
        ("pair", 1.21, False, "1.21"),
        ("bandwidth", 0.8, True, "80 %"),
        ("bandwidth", 0.79, False, "79 %"),
        ("transformers", 1.0, False, "1.00"),
        ("loss-memory", 1 / 15.6, True, "1/15.6"),
        ("loss-beyond", 1 / 39, False, "1/39.0"),
        ("gaps", 0.25, None, "0.25"),
    ],
)
def test_a_goal_is_met_or_not(key, ratio, met, text):
    goal = next(row.goal for row in bench_gpu.ROWS if row.key == key)
    assert bench_gpu.verdict(goal, ratio) is met
    assert bench_gpu.written(goal, ratio) == text


@pytest.mark.slow
def test_the_gpu_s_rows_rehearsed_on_a_cpu(bench_main, tmp_path):
    """The whole flow: each part in a process of its own, each row printed and written."""
    written, printed = bench_main("gpu", "--shape", *TOYS, "--tokens", 4, 8)
    table = (tmp_path / "rows.md").read_text()
    assert [row["key"] for row in written["rows"]] == [row.key for row in bench_gpu.ROWS]
    for row in written["rows"]:
        if row["only_cuda"]:
            assert row["note"] == "skipped: needs CUDA" and row["ratio"] is None
        else:
            assert row["ratio"] == row["ours"] / row["peer_figure"] > 0, row
            assert TOYS[0] in row["shape"] and (row["met"] is None) == (row["goal"] == "")
        for text in (printed, table):
            assert row["what"] in text and row["peer"] in text and row["note"] in text
    assert len(table.splitlines()) == 4 + len(bench_gpu.ROWS)


@pytest.fixture
def report(tmp_path):
    report = bench_gpu.Report(tmp_path / "gpu.json")
    report.begin("a machine")
    return report


def run_part(monkeypatch, report, code: str, left: float = 500.0, name: str = "loss") -> dict:
    """What a part leaves in the report whose process runs `code`: row → its note."""
    real = bench_gpu.in_process

    def in_process(command, limit):
        return real([sys.executable, "-c", f"import sys\n{code}", *command[2:]], limit)

    monkeypatch.setattr(bench_gpu, "in_process", in_process)
    bench_gpu.run_part(name, bench_gpu.Job("cpu"), report, left)
    return {row["key"]: row["note"] for row in report.rows()}


def test_a_part_that_fails_says_why_and_keeps_its_rows(monkeypatch, report, capfd):
    report.measured(bench_gpu.Figures("loss-memory", 1.0, 20.0, "small"))
    notes = run_part(monkeypatch, report, "raise TypeError('no such kernel')")
    assert notes == {
        "loss-memory": "",
        "loss-beyond": "failed: TypeError: no such kernel",
        "loss-time": "failed: TypeError: no such kernel",
    }
    assert "Traceback" in report.rows()[-1]["more"]
    assert "Traceback" in capfd.readouterr().err


def test_a_part_that_takes_too_long_is_ended(monkeypatch, report):
    monkeypatch.setitem(bench_gpu.PARTS, "loss", bench_gpu.Part(None, 1, 1))
    notes = run_part(monkeypatch, report, "import time; time.sleep(60)")
    assert set(notes.values()) == {"skipped: not done after 1 s"}


def test_what_a_part_has_started_is_ended_with_it(tmp_path):
    """Compilers' workers, say: they would hold the GPU."""
    sign = tmp_path / "still here"
    worker = f"import time; time.sleep(2); open({str(sign)!r}, 'w')"
    part = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    assert bench_gpu.in_process([sys.executable, "-c", part], 1) == (None, "")
    time.sleep(2)
    assert not sign.exists()


def test_a_part_is_not_begun_too_late(monkeypatch, report):
    notes = run_part(monkeypatch, report, "", left=bench_gpu.PARTS["loss"].least - 1)
    assert len(notes) == 3 and all("begun too late" in note for note in notes.values())


def test_tests_that_fail_are_named(monkeypatch, capsys):
    said = "FAILED tests/test_ivl.py::test_a[1] - Assert\n1 failed, 41 passed, 3 skipped in 9.13s\n"
    ended = SimpleNamespace(stdout=said, stderr="", returncode=1)
    monkeypatch.setattr(bench_gpu.subprocess, "run", lambda *args, **options: ended)
    (figures,) = bench_gpu.tests(bench_gpu.Job("cpu"))
    assert (figures.ours, figures.peer) == (41, 42) and "test_a[1]" in figures.note
    ended.stdout, ended.stderr = "", "/usr/bin/python: No module named pytest\n"
    with pytest.raises(RuntimeError, match="No module named pytest"):
        list(bench_gpu.tests(bench_gpu.Job("cpu")))


def test_rows_are_given_as_soon_as_they_are_measured(monkeypatch):
    """A part that is ended before it is done has lost nothing that was measured."""
    done = []

    def fails(model):
        raise RuntimeError("the time is over")

    monkeypatch.setattr(bench_gpu, "rounded", fails)
    with pytest.raises(RuntimeError, match="over"):
        for figures in bench_gpu.decode(bench_gpu.Job("cpu", decode=TOYS, lengths=(2, 4))):
            done.append(figures.key)
    assert done == ["pair", "bandwidth", "length"]


def test_the_rows_lie_where_a_machine_that_is_lent_gives_them_back(monkeypatch, tmp_path):
    monkeypatch.setenv("OUT", str(tmp_path))
    parser = argparse.ArgumentParser()
    bench_gpu.add_arguments(parser)
    assert parser.parse_args([]).json == str(tmp_path / "bench_gpu.json")


def test_the_tests_that_are_run_are_there():
    assert all((ROOT / file).exists() for file in bench_gpu.TESTS)


def test_only_the_reading_of_a_token_is_compiled(monkeypatch):
    models = [bench_sides.random_llama(name, CPU, torch.float32, 0) for name in TOYS]
    decode = bench_sides.decoder(*map(column_major, models))
    expected = bench_sides.ours(decode, [1, 2, 3], 6)
    seen = []

    def compile(function, dynamic):
        def compiled(x, *more):
            seen.append(x.shape)
            return function(x, *more)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    for _ in range(2):  # the second time replaces the first
        bench_gpu.compile_steps(models)
    assert bench_sides.ours(decode, [1, 2, 3], 6) == expected
    assert seen == [(1, 1)] * 2 * 5


# ---------------------------------------------------------------- vocabularies, and mistakes


def test_vocab_map_writes_its_rows_too(bench_main, base_dir, value_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat.\n\nThe dog is in the garden.\n")
    written, printed = bench_main(
        "vocab-map", "--base", base_dir, "--value", value_dir, "--text", text
    )
    names = ["vocab-map, the same texts", "vocab-map, ours on all texts"]
    check(written, printed, names, ["texts/s"])


@pytest.mark.parametrize(
    "args, words",
    [
        (["decode", "--shape", "llama-9", "58m"], "llama-9.*toy-small.*58m"),
        (["loss", "--shape", "llama-3-8b", "58m"], "128256.*32000"),
        (["train-step", "--tokens", "0"], "--tokens"),
        (["decode", "--device", "cuda:99"], "cuda:99"),
        (["decode", "--peers", "alone", "vllm"], "--peers vllm: .*alone.*uncached"),
        (["loss", "--peers", "pair"], "--peers pair: .*eager.*library"),
        (["speculative", "--base", "x"], "--draft is missing.*--prompts"),
        (["speculative", "--shape", "58m", "24m", "toy-small"], "32000.*1536"),
        (["gpu"], "--shape and --tokens"),
        (["gpu", "--shape", "llama-3-8b", "58m", "--tokens", "4", "8"], "128256.*32000"),
        (["gpu", "--shape", *TOYS, "--tokens", "0", "8"], "--tokens"),
    ],
)
def test_mistakes_are_named(bench_main, args, words):
    with pytest.raises(InputError, match=words):
        bench_main(*args)


def test_a_peer_that_torch_lacks_is_named(bench_main, monkeypatch):
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    with pytest.raises(InputError, match="--peers library: torch"):
        bench_main("loss", "--peers", "library")


def test_a_mistake_is_one_line(run):
    assert_refused(run("experiments/bench.py", "loss", "--shape", "58m", "58"), "--shape 58:")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be measured")
def test_without_a_gpu_there_is_nothing_to_measure(run):
    assert_refused(run("experiments/bench.py", "gpu"), "no GPU", "--device cpu")
