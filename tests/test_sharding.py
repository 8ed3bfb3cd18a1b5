"""Several ranks against one: gloo processes on the CPU, started by torchrun as a user starts them.

This file is also what they run: the functions under "as a rank" are named by its first argument.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_directory
from safetensors.torch import load_file

import ivl
import train as trainer
from extras import sharding
from extras.mapped import Mapped
from model import Config, Llama, hf_views
from plumbing import runs
from plumbing.dataset import Chats
from plumbing.files import torchrun as torchrun_started
from plumbing.tokenizer import Tokenizer
from plumbing.weights import load, save
from vocab_map import VocabMap

TRAINING = [
    "--device",
    "cpu",
    "--lr",
    1e-2,
    "--batch_size",
    5,
    "--micro_batch_size",
    2,
    "--lam",
    0.1,
    "--max_length",
    200,
]


def torchrun(n: int, script: Path, *args, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(n),
            script,
            *map(str, args),
        ],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # not on GPUs


def trained(directory: Path) -> tuple[list[float], dict]:
    """All that a run logged, and what it saved."""
    entries = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return (
        [
            entry[key]
            for entry in entries
            for key in ("loss", "norm", "gradient", "held_out_loss")
            if key in entry
        ],
        load_file(directory / "model.safetensors"),
    )


def assert_same(run: Path, expected: Path, atol: float) -> None:
    (log, weights), (expected_log, expected_weights) = trained(run), trained(expected)
    torch.testing.assert_close(torch.tensor(log), torch.tensor(expected_log), atol=1e-5, rtol=0)
    torch.testing.assert_close(weights, expected_weights, atol=atol, rtol=0)


def errors(result: subprocess.CompletedProcess) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


# ---------------------------------------------------------------- one rank alone


def test_with_gpus_numbers_and_tensors_each_have_a_backend(monkeypatch):
    """Without one for the CPU, the first sum of numbers would end the job."""
    asked = []

    class Stop(Exception):
        pass

    def init_process_group(backend, **_):
        asked.append(backend)
        raise Stop

    monkeypatch.setattr(sharding.dist, "init_process_group", init_process_group)
    monkeypatch.setattr(sharding.dist, "rendezvous", lambda _: iter([(None, 0, 1)]))
    monkeypatch.setenv("LOCAL_RANK", "0")
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        with pytest.raises(Stop), sharding.ranks():
            pass
    assert asked == ["cpu:gloo,cuda:nccl", "gloo"]


def test_ranks_answer_all_that_a_run_asks_of_the_machine():
    """Ranks is no subclass: a wing does not know the script."""
    asked = {name for name in vars(trainer.OneDevice) if not name.startswith("_")}
    assert asked == {name for name in vars(sharding.Ranks) if not name.startswith("_")}


def test_every_rank_gets_as_many_parts_and_every_chat_one_rank(monkeypatch):
    for n in (1, 2, 3, 4):
        monkeypatch.setattr(sharding, "rank_count", lambda: n)
        for chats in (1, 2, 5, 8, 9):
            for size in (1, 2, 4):
                parts = []
                for i in range(n):
                    monkeypatch.setattr(sharding, "rank", lambda: i)
                    parts.append(sharding.Ranks().parts(list(range(chats)), size))
                assert (
                    len({len(part) for part in parts}) == 1
                    and max(len(x) for part in parts for x in part) <= size
                )
                assert sorted(row for part in parts for rows in part for row in rows) == list(
                    range(chats)
                )


def test_no_chats_are_a_row_of_padding():
    chats = Chats(
        torch.tensor([1, 2]), torch.tensor([True, True]), torch.tensor([0, 2]), torch.zeros(1), ""
    )
    for norm_width in (0, 1):
        inputs, targets, counted = chats.batch([], norm_width=norm_width)
        assert inputs.shape == targets.shape == counted.shape == (1, 1)
        assert targets.item() < 0 and not counted.item()


def test_the_rows_of_the_hub_s_tensors_are_where_hf_views_says():
    model = Llama(Config(10, 8, 6, 2, 4, 2, 2, 16))
    parameters = dict(model.named_parameters())
    for name, view in hf_views(model).items():
        parameter, rows = sharding.hub_rows(model.config)[name]
        torch.testing.assert_close(parameters[parameter][rows].view(view.shape), view)
        assert (rows.diff() > 0).all()


# ---------------------------------------------------------------- training


@pytest.fixture
def pair(tmp_path) -> list:
    """Arguments for train.py; the ranks do not divide the rows of the two models evenly."""
    base = make_directory(tmp_path / "base", 1, tie_word_embeddings=False)
    value = make_directory(
        tmp_path / "value", 2, hidden_size=16, num_attention_heads=2, num_key_value_heads=1
    )
    return ["--base", base, "--value", value, *TRAINING]


@pytest.fixture
def one(pair, chats_file, tmp_path, monkeypatch):
    """Trains on one rank: one(epochs, ...) → the arguments of the run, its directory."""

    def runner(epochs: int, *more):
        args = [*pair, "--data", chats_file, "--epochs", epochs, *more]
        monkeypatch.setattr(
            sys, "argv", ["train.py", *map(str, args), "--out", str(tmp_path / "one")]
        )
        trainer.main()
        return args, tmp_path / "one"

    return runner


def test_three_ranks_train_as_one(one, tmp_path):
    args, expected = one(1)
    result = torchrun(3, ROOT / "train.py", *args, "--checkpointing", "--out", tmp_path / "three")
    assert result.returncode == 0, result.stderr
    assert_same(tmp_path / "three", expected, atol=1e-4)
    assert result.stdout.count("chats used") == result.stdout.count("sample.py") == 1


def test_what_all_ranks_refuse_is_told_once(pair, tmp_path):
    result = torchrun(
        2, ROOT / "train.py", *pair, "--data", tmp_path / "absent.json", "--out", tmp_path / "out"
    )
    assert result.returncode and len(errors(result)) == 1 and "absent.json" in errors(result)[0], (
        result.stderr
    )


@pytest.mark.parametrize("option", [["--compile"], ["--random"], ["--connection", "cascade"]])
def test_what_several_ranks_cannot_do_is_refused(pair, chats_file, tmp_path, option):
    args = [*pair, "--data", chats_file, "--out", tmp_path / "out", *option]
    with pytest.raises(trainer.InputError, match=f"under torchrun.*{option[0]}"):
        trainer.run(trainer.arguments(list(map(str, args))), sharding.Ranks())


@pytest.mark.slow
@pytest.mark.parametrize("n, dtype", [(2, "float32"), (4, "float32"), (1, "bfloat16")])
def test_fifty_steps_equal_one_rank(n, dtype, one, tmp_path):
    args, expected = one(11, "--dtype", dtype)
    result = torchrun(n, ROOT / "train.py", *args, "--out", tmp_path / "many")
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "many" / "log.jsonl").read_text().splitlines()) == 55 + 12
    assert_same(tmp_path / "many", expected, atol=1e-3 if n > 1 else 0)


@pytest.mark.slow
def test_a_rank_dies_and_the_run_goes_on_with_other_ranks(one, tmp_path):
    args, expected = one(6)
    args += ["--save_every", 10]
    result = torchrun(2, __file__, "train_and_die", *args, "--out", tmp_path / "two")
    assert result.returncode and len(errors(result)) == 1 and "--resume" in errors(result)[0], (
        result.stderr
    )
    assert result.stderr.count("Traceback") == 1, result.stderr  # torchrun's own
    checkpoint = tmp_path / "two" / "checkpoint.safetensors"
    assert (
        load_file(checkpoint) and len(list((tmp_path / "two").glob(".*.tmp"))) == 1
    )  # the second was half-written
    for n in (4, 1):
        out = tmp_path / f"from-two-to-{n}"
        out.mkdir()
        for name in ("checkpoint.safetensors", "log.jsonl"):
            (out / name).write_bytes((tmp_path / "two" / name).read_bytes())
        result = torchrun(n, __file__, "train_and_rewrite", *args, "--resume", "--out", out)
        assert result.returncode == 0, result.stderr
        assert (out / "again.safetensors").read_bytes() == checkpoint.read_bytes()
        assert_same(out, expected, atol=1e-3)


# ---------------------------------------------------------------- decoding

CHOICES = [
    dict(temperature=t, top_k=k, top_p=p)
    for t, k, p in (
        (0, 0, 1),
        (1, 0, 1),
        (0.5, 0, 1),
        (2, 5, 1),
        (1, 1, 1),
        (1, 1000, 1),
        (1, 0, 0.9),
        (2, 0, 0.3),
        (1, 0, 1e-9),
        (3, 40, 0.8),
    )
]


def as_one(vocabulary: int | None):
    """What sample.py chooses with: alone, or as one of several ranks."""
    return sharding.chooser(vocabulary) if torchrun_started() else ivl.choose


def load_slice(directory: Path, vocabulary: int | None) -> Llama:
    cpu = torch.device("cpu")
    if torchrun_started():
        return sharding.load_slice(directory, cpu, torch.float32, vocabulary)
    return load(directory, cpu, torch.float32)


def chosen() -> list:
    """Tokens from random logits, of which a rank gets its slice, and from such in which many are
    equal."""
    tokens = []
    for seed in range(8):
        logits = 4 * torch.randn(3, 317, generator=torch.Generator().manual_seed(seed))
        slices = logits[
            :, sharding.cut(317, sharding.rank()) : sharding.cut(317, sharding.rank() + 1)
        ]
        for options in CHOICES:
            tokens.append(
                as_one(317)(slices, *options.values(), torch.Generator().manual_seed(seed)).tolist()
            )
        tokens.append(as_one(317)(slices.round(), 0, 0, 1, None).tolist())
    return tokens


def decoded(base: Path, value: Path, other: Path) -> list:
    """Replies of base, of base and value, and of the base and a value model with other tokens."""
    tokenizers = [Tokenizer(directory) for directory in (base, other)]
    V, mapping = len(tokenizers[0].tokens), VocabMap.make(*tokenizers, ["The cat sat on the mat."])
    models = [load_slice(directory, V) for directory in (base, value)]
    whole = [load_slice(directory, None) for directory in (base, other)]
    prompts = [tokenizer.encode("Where is the cat?") for tokenizer in tokenizers]
    steps = []
    for options in CHOICES[::3]:
        for values in (models[1:], []):
            how = {"vocabulary": V, "choose": as_one(V), **options}
            steps += ivl.generate(models[0], values, [prompts[0], [1, 5]], 12, **how)
        how = {"choose": as_one(None), **options}
        steps += ivl.generate(Mapped(whole[0], mapping), whole[1:], [prompts[1]], 4, **how)
    return steps


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """A base that 4 ranks can share and whose head is its own, a value model that 2 can, one with
    other tokens."""
    path = tmp_path_factory.mktemp("models")
    return [
        make_directory(
            path / "base",
            1,
            tie_word_embeddings=False,
            num_attention_heads=8,
            num_key_value_heads=4,
        ),
        make_directory(path / "value", 2, hidden_size=16),
        make_directory(path / "other", 3, bytelevel=True),
    ]


@pytest.mark.parametrize(
    "n", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_ranks_decode_what_one_decodes(n, models):
    result = torchrun(n, __file__, "decode", *models)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [chosen(), decoded(*models)]
    assert ("value: stays whole" in result.stderr) == (n > 2) and (
        "base: stays whole" in result.stderr
    ) == (n == 3)


@pytest.mark.slow
def test_sample_under_torchrun(run, models, tmp_path):
    args = [
        "--device",
        "cpu",
        "--base",
        models[0],
        "--value",
        models[1],
        "--max_new_tokens",
        8,
        "--temperature",
        0.7,
        "--seed",
        1,
    ]
    (tmp_path / "questions.txt").write_text("Where is the cat?\nWho?\n")
    for given, stdin in (
        (["Who are you?"], ""),
        (["--prompts", tmp_path / "questions.txt"], ""),
        ([], "Who?\nWhere?\n"),
    ):
        expected = run("sample.py", *args, *given, stdin=stdin)
        result = torchrun(2, ROOT / "sample.py", *args, *given, stdin=stdin)
        assert expected.returncode == result.returncode == 0, result.stderr
        assert result.stdout == expected.stdout and result.stderr.count(
            "tok/s"
        ) == expected.stderr.count("tok/s")


@pytest.fixture
def as_ranks(monkeypatch):
    """as_ranks(n, f) → what f() gives on each of n ranks, which are threads of this process."""

    def runner(n: int, function: Callable) -> list:
        here, given, all_are_here = threading.local(), [None] * n, threading.Barrier(n, timeout=60)

        def summed(x, op=sharding.dist.ReduceOp.SUM):
            given[here.rank] = x.clone()
            all_are_here.wait()
            together = torch.stack(given)
            if op == sharding.dist.ReduceOp.SUM:
                x.copy_(together.sum(0))
            elif op == sharding.dist.ReduceOp.MAX:
                x.copy_(together.amax(0))
            else:
                x.copy_(together.amin(0))
            all_are_here.wait()  # all have read it, so the next sum may begin
            return x

        def as_rank(rank: int):
            here.rank = rank
            try:
                return function()
            except BaseException:
                all_are_here.abort()  # or the others would wait for it
                raise

        monkeypatch.setattr(sharding, "rank", lambda: here.rank)
        monkeypatch.setattr(sharding, "rank_count", lambda: n)
        monkeypatch.setattr(sharding, "summed", summed)
        with ThreadPoolExecutor(n) as threads:
            return list(threads.map(as_rank, range(n)))

    return runner


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_every_token_can_be_chosen_whatever_rank_has_it(as_ranks, n):
    """Vocabularies that the ranks cannot divide evenly too, and each token the likeliest once."""
    for V in (10, 11, 12, 13):
        logits = torch.zeros(V, V)
        logits.fill_diagonal_(200.0)

        def chosen_here():
            here = logits[
                :, sharding.cut(V, sharding.rank()) : sharding.cut(V, sharding.rank() + 1)
            ]
            tokens = []
            for options in ((0, 0, 1), (1, 0, 1), (1, 1, 1), (1, 0, 0.9)):
                generator = torch.Generator().manual_seed(0)
                tokens.append(sharding.choose_from_slices(V, here, *options, generator).tolist())
            return here.shape[1], tokens

        widths, tokens = zip(*as_ranks(n, chosen_here))
        assert sum(widths) == V
        assert max(widths) - min(widths) <= 1
        assert all(row == list(range(V)) for of_rank in tokens for row in of_rank)


LAST = 317  # tokens that count, a prime number: no number of ranks divides it


@pytest.fixture
def last_dir(tmp_path) -> Path:
    """A model that three ranks can share, and that almost always says one of its last two tokens;
    past those there is padding, which it likes even more."""
    directory = make_directory(
        tmp_path / "last",
        4,
        vocab_size=320,
        tie_word_embeddings=False,
        num_attention_heads=6,
        num_key_value_heads=3,
    )
    model = load(directory)
    with torch.no_grad():
        rows = model.lm_head.weight
        rows[LAST - 2] = 100 * rows[LAST - 1]
        rows[LAST - 1] = -rows[LAST - 2]
        rows[LAST:] = 2 * rows[LAST - 2]
    save(model, directory)
    return directory


def decoded_last(directory: Path) -> list:
    """Greedy replies and drawn ones, of the first LAST tokens."""
    model = load_slice(directory, LAST)
    prompts = [[1, LAST - 1], [1, 5, LAST - 2, 7]]
    steps = []
    for temperature in (0, 0.5):
        options = dict(vocabulary=LAST, temperature=temperature, choose=as_one(LAST))
        steps += ivl.generate(model, [], prompts, 12, **options)
    return steps


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_last_tokens_of_the_vocabulary_are_decoded(as_ranks, monkeypatch, last_dir, n):
    expected = decoded_last(last_dir)
    assert {LAST - 2, LAST - 1} <= {token for step in expected for token in step}
    monkeypatch.setattr(sys.modules[__name__], "torchrun_started", lambda: True)
    assert as_ranks(n, lambda: decoded_last(last_dir)) == n * [expected]


@pytest.mark.slow
def test_three_processes_decode_the_last_tokens(last_dir):
    result = torchrun(3, __file__, "decode_last", last_dir)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == decoded_last(last_dir)
    assert "stays whole" not in result.stderr


# ---------------------------------------------------------------- memory


@pytest.mark.slow
def test_no_rank_holds_more_than_its_share(tmp_path):
    config = Config(32000, 2048, 5632, 20, 32, 4, 64, 2048)
    with torch.device("meta"):
        model = Llama(config)
    views = hf_views(model)
    save(model, tmp_path, torch.bfloat16, lambda name: torch.randn(views[name].numel()))
    whole = 2 * model.size()
    result = torchrun(4, __file__, "load_and_measure", tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]
    print(*lines, sep="\n")
    assert (
        whole > 2e9
        and len(lines) == 4
        and max(line["anonymous"] for line in lines) < whole / 4 + 300e6
    )


# ---------------------------------------------------------------- as a rank


def train_and_die() -> None:
    """Rank 0 is killed in the middle of writing the second checkpoint."""
    saves, tensors = [], []

    def save(checkpoint, step, real=runs.Checkpoint.save):
        saves.append(step)
        real(checkpoint, step)

    def whole(self, tensor, real=sharding.Ranks.whole):
        tensors.append(len(saves))
        if sharding.rank() == 0 and tensors.count(2) == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, tensor)

    runs.Checkpoint.save, sharding.Ranks.whole = save, whole
    trainer.command(trainer.main)


def train_and_rewrite() -> None:
    """The checkpoint from which it goes on is written again, before the first step."""

    def load(checkpoint, real=runs.Checkpoint.load):
        step = real(checkpoint)
        path = checkpoint.path
        checkpoint.path = path.with_name("again.safetensors")
        checkpoint.save(step)
        checkpoint.path = path
        return step

    runs.Checkpoint.load = load
    trainer.command(trainer.main)


@sharding.ranks()
def decode() -> None:
    for directory in sys.argv[1:]:
        assert (
            not sharding.load_slice(
                directory, torch.device("cpu"), torch.float32, 300
            ).embed.weight.shape[0]
            > 150
        )
    print(json.dumps([chosen(), decoded(*map(Path, sys.argv[1:]))]))


@sharding.ranks()
def decode_last() -> None:
    print(json.dumps(decoded_last(Path(sys.argv[1]))))


@sharding.ranks()
def load_and_measure() -> None:
    """Tells the most memory that this process had while loading, in bytes; the interpreter and its
    libraries included.

    Anonymous memory is what a process takes for itself. Resident memory has the pages of files in
    it too, which all ranks share and the system takes back when it needs them."""

    def now(field: str) -> int:
        line = next(
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(field)
        )
        return 1024 * int(line.split()[1])

    before, peak, loading = now("RssAnon"), [0], [True]

    def watch() -> None:
        while loading:
            peak.append(max(peak.pop(), now("RssAnon")))
            time.sleep(0.005)

    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory begins anew
    thread = threading.Thread(target=watch)
    thread.start()
    model = sharding.Ranks().load(sys.argv[1], torch.device("cpu"), torch.bfloat16, torch.bfloat16)
    loading.clear()
    thread.join()
    share = sum(p.to_local().numel() * p.itemsize for p in model.parameters())
    print(
        json.dumps(
            {
                "rank": sharding.rank(),
                "share": share,
                "before": before,
                "anonymous": peak[0],
                "resident": now("VmHWM"),
            }
        ),
        file=sys.__stderr__,
    )


if __name__ == "__main__":
    globals()[sys.argv.pop(1)]()
