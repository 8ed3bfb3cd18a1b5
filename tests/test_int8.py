"""A base in eight bits against the same base in floats, and against its own rounded weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_refused, make_directory
from safetensors.torch import load_file, save_file

import ivl
import sample
import train as trainer
from experiments import rounding
from extras import int8
from extras.connections import Probe, connected
from extras.int8 import FEW, Int8Llama, Matrix, rounded
from extras.mapped import Mapped
from model import Config, Llama, column_major
from plumbing.chats import read_chats
from plumbing.dataset import Chats, tokenize
from plumbing.pair import Speaker
from plumbing.tokenizer import Tokenizer
from plumbing.weights import allocate, load, save
from vocab_map import VocabMap

PROMPT = [1, 20, 30, 40, 50]


def floats(model: Int8Llama) -> Llama:
    """A plain Llama of the weights that a rounded one stands for."""
    with torch.device("meta"):
        twin = Llama(model.config)
    allocate(twin, "cpu", torch.float32)
    weights = dict(model.named_modules())
    with torch.no_grad():
        for name, p in twin.named_parameters():
            W = weights[name.removesuffix(".weight")].weight
            p.copy_(W.floats(torch.float32) if isinstance(W, Matrix) else W)
    return twin.requires_grad_(False)


def matrix_of(W: torch.Tensor, dtype: torch.dtype = torch.float32) -> Matrix:
    matrix = Matrix(torch.zeros(W.shape, dtype=torch.int8), torch.zeros(W.shape[:-1], dtype=dtype))
    matrix.copy_(W)
    return matrix


@pytest.fixture(scope="module")
def base(base_dir) -> Int8Llama:
    return load(base_dir, network=Int8Llama).requires_grad_(False)


@pytest.fixture
def exact(monkeypatch) -> None:
    """Few rows are multiplied as many are: not in bfloat16."""
    monkeypatch.setattr(int8, "FEW", {"cpu": 0, "cuda": 0})


# ---------------------------------------------------------------- rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_weight_moves_by_more_than_half_a_step(dtype):
    W = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    W *= torch.logspace(-6, 6, 500)[:, None]
    W[7] = 0
    matrix = matrix_of(W, dtype)
    step = matrix.scale.float()[:, None]
    assert ((step * matrix.rounded - W).abs() <= 0.5 * step).all()
    assert matrix.rounded.abs().amax(-1)[8:].min() >= 126  # all the steps are used
    # exact: no digit is lost
    assert torch.equal(matrix.floats(torch.float32), step * matrix.rounded)
    assert not matrix.floats(dtype)[7].any()


def test_every_arithmetic_has_the_same_matrix():
    W = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    wide, narrow = matrix_of(W), matrix_of(W, torch.bfloat16)
    assert torch.equal(wide.rounded, narrow.rounded)
    assert torch.equal(wide.scale, narrow.scale.float())


@pytest.mark.parametrize("rows", [1, FEW["cpu"], FEW["cpu"] + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_with_few_rows_or_many(rows, dtype):
    generator = torch.Generator().manual_seed(0)
    matrix = matrix_of(torch.randn(50, 64, generator=generator), dtype)
    x = torch.randn(1, rows, 64, generator=generator).to(dtype)
    with torch.inference_mode():
        y = F.linear(x, matrix)
    assert y.shape == (1, rows, 50) and y.dtype == dtype
    torch.testing.assert_close(
        y.float(), F.linear(x.float(), matrix.floats(torch.float32)), atol=0.15, rtol=0.01
    )


@pytest.mark.parametrize("n, m", [(33, 16), (30, 24), (7, 65)])
def test_pytorch_s_product_is_given_only_what_it_can_multiply(n, m):
    """With columns that are no multiple of 16 it gives wrong numbers, or ends the program."""
    generator = torch.Generator().manual_seed(0)
    matrix = matrix_of(torch.randn(n, m, generator=generator))
    x = torch.randn(3, m, generator=generator)
    with torch.inference_mode():
        y = F.linear(x, matrix)
    torch.testing.assert_close(y, F.linear(x, matrix.floats(torch.float32)), atol=0.1, rtol=0.02)


@pytest.mark.skipif(int8.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("r, n, m", [(1, 8, 32), (3, 5, 30)])
def test_the_kernel_gives_the_product(r, n, m, monkeypatch):
    if not torch.cuda.is_available():  # interpreted
        monkeypatch.setattr(int8, "COLUMNS", 16)
        # Triton's interpreter takes an integer's bits for a bfloat16's
        monkeypatch.setattr(int8, "VIA", int8.tl.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    matrix = matrix_of(torch.randn(n, m, generator=generator))
    x = torch.randn(r, m, generator=generator)
    y = int8.product(x.to(device), matrix.rounded.to(device), matrix.scale.to(device))
    torch.testing.assert_close(y.cpu(), F.linear(x, matrix.floats(torch.float32)))


# ---------------------------------------------------------------- the network


def test_what_is_loaded_is_what_is_rounded_in_memory(base, base_dir):
    twin = rounded(load(base_dir))
    assert [name for name, _ in twin.named_parameters()] == [n for n, _ in base.named_parameters()]
    for p, q in zip(twin.parameters(), base.parameters()):
        assert torch.equal(p, q) and p.dtype == q.dtype and not p.requires_grad
    assert base.size() == load(base_dir).size()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("length", [5, 40])
def test_logits_are_those_of_the_rounded_weights(tmp_path, tied, length):
    directory = make_directory(tmp_path, seed=1, tie_word_embeddings=tied)
    base = load(directory, network=Int8Llama)
    plain = floats(base)
    x = torch.randint(0, 300, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        mine, expected, unrounded = base(x), plain(x), load(directory)(x)
    tolerance = 0.03 if length <= FEW["cpu"] else 1e-5  # few rows are read in bfloat16
    size = expected.abs().max()
    assert (mine - expected).abs().max() < tolerance * size
    assert 1e-3 * size < (unrounded - expected).abs().max() < 0.2 * size  # that it is rounded


def test_no_matrix_is_left_in_floats(base):
    for name, p in base.named_parameters():
        assert p.dtype == (torch.int8 if p.dim() == 2 else torch.float32), name
    assert column_major(base) is base  # and there is nothing to lay out
    assert base.unembed.rounded is base.embed.rounded


def test_cached_decoding_is_uncached_decoding(base, value_dir):
    value = load(value_dir)
    decoded = [ids[0] for ids in ivl.generate(base, [value], [PROMPT], 30)]
    text = list(PROMPT)
    with torch.inference_mode():
        for _ in decoded:
            x = torch.tensor([text])
            z_post = ivl.combine(base(x), value(x))[0, -1]
            text.append(int(z_post.argmax()))
    assert decoded == text[len(PROMPT) :] and len(set(decoded)) > 5


# ---------------------------------------------------------------- memory


def held(model: Llama) -> int:
    return sum(p.numel() * p.itemsize for p in model.parameters())


def test_it_takes_half_of_bfloat16_and_a_quarter_of_float32():
    with torch.device("meta"):
        config = Config(32000, 512, 2048, 6, 8, 8, 64, 2048)
        plain, base = Llama(config), Int8Llama(config)
    assert held(base) <= 0.27 * held(plain)
    assert held(base.to(torch.bfloat16)) <= 0.53 * held(plain.to(torch.bfloat16))


LOADING = """
import sys, threading, time
from pathlib import Path
import torch
from plumbing.weights import load
from extras.int8 import Int8Llama

def now():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

before, peak, loading = now(), [0], [True]
def watch():
    while loading:
        peak[0] = max(peak[0], now())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model = load(sys.argv[1], network=Int8Llama)
loading.clear()
thread.join()
print(peak[0] - before, sum(p.numel() * p.itemsize for p in model.parameters()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_takes_no_more_than_the_small_model_and_a_tensor(tmp_path):
    config = Config(2000, 1024, 4096, 6, 8, 8, 128, 256)
    save(Llama(config).init_weights(0), tmp_path)
    code = [sys.executable, "-c", LOADING, tmp_path]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    peak, model = map(int, done.stdout.split())
    tensor = 4 * config.hidden_size * config.intermediate_size  # of the widest, in float32
    again = 2 * model  # all of it once more, in bfloat16
    assert peak < model + 5 * tensor < model + again


# ---------------------------------------------------------------- training


@pytest.fixture
def chats(value_dir, chats_file, tmp_path, monkeypatch) -> Chats:
    monkeypatch.setattr("plumbing.dataset.CACHE", tmp_path / "cache")
    return tokenize(read_chats(chats_file), Tokenizer(value_dir), 200)


def losses(base: Llama, value, chats: Chats, steps: int = 4) -> list[float]:
    """Of some steps of training beside a base."""
    settings = trainer.Settings(1e-2, 4, 2, 1, 200, 0.1, "response")
    optimizer = trainer.adamw(value, settings)
    told = []
    for step in range(steps):
        rows = list(range(4 * step, 4 * step + 4))
        numbers = trainer.train_step(base, value, optimizer, chats, rows, settings, 1e-2)
        told += numbers.values()
    return told


@pytest.mark.parametrize("connection", ["residual", "cascade", "cascade+", "probe"])
def test_training_beside_it_is_training_beside_its_rounded_weights(
    base, value_dir, chats, connection
):
    found = []
    for frozen in (base, floats(base)):
        value = load(value_dir)
        if connection == "probe":
            value = Probe(frozen.config).init_weights(0)
        joined_base, joined = connected(connection, frozen, value)
        found.append(losses(joined_base, joined, chats))
        assert all(p.grad is None for p in frozen.parameters())
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0][0] != found[0][3]


def test_the_held_out_loss_of_the_base_alone(base, chats):
    alone = [
        trainer.held_out_loss(frozen, None, chats, list(range(8)), 4)
        for frozen in (base, floats(base))
    ]
    assert alone[0] == pytest.approx(alone[1], rel=1e-4)


def test_a_run_notes_it_and_resumes_with_it_only(train, tmp_path):
    assert train(base_dtype="int8").returncode == 0
    out = tmp_path / "out"
    assert all(W.dtype == torch.float32 for W in load_file(out / "model.safetensors").values())
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert train(out=tmp_path / "plain").returncode == 0
    plain = (tmp_path / "plain" / "log.jsonl").read_text().splitlines()
    alone = [
        next(entry["base_alone"] for entry in log if "base_alone" in entry)
        for log in (entries, map(json.loads, plain))
    ]
    assert alone[0] != alone[1] == pytest.approx(alone[0], rel=0.02)


def test_a_checkpoint_knows_its_base_dtype(train, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_model", stop)
        assert train(base_dtype="int8", save_every=2).returncode == 130
    assert_refused(train(resume=True), "base_dtype = 'int8', not None")
    assert train(resume=True, base_dtype="int8").returncode == 0


def test_a_training_has_one_arithmetic_for_any_number_of_rows(base):
    """--micro_batch_size changes the memory, not the gradient; decoding multiplies few rows in the
    int8 numbers' own way.
    """
    W = base.unembed
    x = torch.randn(40, W.shape[1], generator=torch.Generator().manual_seed(0))
    together = F.linear(x, W)
    with torch.no_grad():
        one_by_one = torch.cat([F.linear(row[None], W) for row in x])
    torch.testing.assert_close(one_by_one, together, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        quick = torch.cat([F.linear(row[None], W) for row in x])
    assert not torch.allclose(quick, together, atol=1e-5, rtol=1e-5)  # it is rounded to bfloat16


# ---------------------------------------------------------------- decoding with others


def replies(base, value) -> list[int]:
    return [ids[0] for ids in ivl.generate(base, [value], [PROMPT], 20)]


def logits(base, *values) -> torch.Tensor:
    """z_post after each of some tokens; a second value model is an antiexpert."""
    tokens = torch.tensor([PROMPT])
    with torch.inference_mode():
        z_base, *z_deltas = [model.reader(1, 16).read_each(tokens) for model in (base, *values)]
        return ivl.combine_all(z_base, z_deltas, [1.0, -1.0][: len(values)])


@pytest.mark.parametrize("connection", ["cascade", "cascade+", "probe"])
def test_a_value_model_that_reads_what_it_says(exact, base, value_dir, connection):
    z = []
    for frozen in (base, floats(base)):
        value = load(value_dir)
        if connection == "probe":
            value = Probe(frozen.config).init_weights(0)
            torch.nn.init.normal_(value.head, 0, 0.1, generator=torch.Generator().manual_seed(0))
        z.append(logits(*connected(connection, frozen, value.requires_grad_(False))))
    torch.testing.assert_close(*z, atol=1e-4, rtol=1e-4)


def test_proxy_tuning(exact, base, value_dir, base_dir):
    values = load(value_dir), load(base_dir)
    z = [logits(frozen, *values) for frozen in (base, floats(base))]
    torch.testing.assert_close(*z, atol=1e-4, rtol=1e-4)


def test_a_base_of_another_vocabulary(exact, base, base_dir, other_dir):
    tokenizers = [Tokenizer(directory) for directory in (base_dir, other_dir)]
    mapping = VocabMap.make(*tokenizers, ["The cat sat on the mat."])
    ids = tokenizers[1].encode("The cat sat on the")
    z = []
    for frozen in (base, floats(base)):
        with torch.inference_mode():
            reader = Mapped(frozen, mapping).reader(1, 64)
            z.append(reader.read(torch.tensor([ids])).softmax(-1))
    torch.testing.assert_close(*z, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- the command lines


def test_sample_and_its_value_model(run, base_dir, value_dir):
    asked = ["sample.py", "--base", base_dir, "--value", value_dir, "--max_new_tokens", 12]
    plain = run(*asked, "Where is the cat?")
    eight = run(*asked, "--base_dtype", "int8", "Where is the cat?")
    assert eight.returncode == 0 and "12 tokens" in eight.stderr, eight.stderr
    assert eight.stdout and plain.stdout
    args = sample.arguments([*map(str, asked[1:5]), "--base_dtype", "int8", "?"])
    speaker = Speaker(args)
    assert type(speaker.base) is Int8Llama and type(speaker.values[0]) is Llama
    assert speaker.values[0].unembed.dtype == torch.float32


def test_what_is_not_frozen_is_not_rounded(train, base_dir):
    assert_refused(train(base_dtype="int8", full=True, value=None), "--full and --base_dtype")
    assert_refused(train(base_dtype="int4"), "--base_dtype", "int4")


def test_it_is_not_compiled(train):
    assert_refused(train(base_dtype="int8", compile=True), "--base_dtype and --compile")


def test_a_base_that_is_rounded_already_is_refused(train, models):
    path = models["base"] / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"quantization_config": {"bits": 8}}))
    assert_refused(train(base_dtype="int8"), str(path), "quantization_config")
    path.write_text(json.dumps(config))
    weights = load_file(models["base"] / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, models["base"] / "model.safetensors")
    assert_refused(train(base_dtype="int8"), name, "only plain floats are read")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_damaged_base_is_refused(train, models, number):
    weights = load_file(models["base"] / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    weights[name][3, 4] = number
    save_file(weights, models["base"] / "model.safetensors")
    assert_refused(train(base_dtype="int8"), name, "not finite")
    del weights[name]
    save_file(weights, models["base"] / "model.safetensors")
    assert_refused(train(base_dtype="int8"), name, "missing")


# ---------------------------------------------------------------- what it loses


def test_a_base_that_is_not_rounded_loses_nothing(base_dir, base):
    plain = load(base_dir)
    texts = [[*PROMPT, *range(60, 100)], list(range(3, 33))]
    same = rounding.compared(plain, plain, texts)
    assert same["loss"] == same["int8 loss"] and same["KL"] == 0
    found = rounding.compared(plain, base, texts)
    assert found["loss"] == same["loss"] != found["int8 loss"]
    assert 1e-6 < found["KL"] < 0.05
    log_p = plain(torch.tensor([texts[1][:-1]]))[0].log_softmax(-1)
    alone = rounding.compared(plain, plain, texts[1:])["loss"]
    assert alone == pytest.approx(F.nll_loss(log_p, torch.tensor(texts[1][1:])).item(), rel=1e-5)
    assert rounding.agreeing(plain, plain, texts, 12) == [12, 12]


def test_models_of_yours_are_compared(run, base_dir, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the mat. " * 60)
    asked = ["experiments/rounding.py", "models", "--base", base_dir, "--tokens", 9]
    told = run(*asked, "--text", text)
    assert told.returncode == 0 and "of 9 greedy tokens" in told.stdout, told.stderr
    text.write_text("The cat")
    assert_refused(run(*asked, "--text", text), "--text", "longer")


@pytest.mark.slow
def test_the_family_of_reproduce(run, tmp_path):
    asked = ["family", "--out", tmp_path, "--scale", 0.05, "--seeds", 1]
    told = run("experiments/rounding.py", *asked)
    assert told.returncode == 0, told.stderr
    figures = json.loads((tmp_path / "rounding.json").read_text())
    assert figures["small: int8 loss / loss"]["mean"] == pytest.approx(1, abs=0.01)
    assert {f"{pair}: form" for pair in rounding.PAIRS} <= set(figures)


# ---------------------------------------------------------------- several ranks

RANKS = """
import sys, json, torch
from extras import sharding
from extras.int8 import Int8Llama
from extras.sharding import Ranks, load_slice, ranks, chooser
from plumbing.files import torchrun
import ivl

@ranks()
def main():
    cpu = torch.device("cpu")
    base = load_slice(sys.argv[1], cpu, torch.float32, 300, Int8Llama)
    value = load_slice(sys.argv[2], cpu, torch.float32, 300)
    shares = [p.numel() for p in base.parameters() if p.dtype == torch.int8]
    steps = ivl.generate(base, [value], [[1, 20, 30, 40, 50]], 20, choose=chooser(300))
    print(json.dumps([[ids[0] for ids in steps], sum(shares)]))

main()
"""


def test_ranks_decode_with_it(base, base_dir, value_dir, tmp_path):
    from test_sharding import torchrun

    script = tmp_path / "ranks.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + RANKS)
    result = torchrun(2, script, base_dir, value_dir)
    assert result.returncode == 0, result.stderr
    tokens, share = json.loads(result.stdout)
    value = load(value_dir)
    expected = [ids[0] for ids in ivl.generate(base, [value], [PROMPT], 20, vocabulary=300)]
    assert tokens[:5] == expected[:5] and len(set(tokens)) > 3
    whole = sum(p.numel() for p in base.parameters() if p.dtype == torch.int8)
    assert share < 0.55 * whole


def test_ranks_train_beside_it(train, models, chats_file, tmp_path):
    from test_sharding import TRAINING, torchrun

    options = ["--base", models["base"], "--value", models["value"], "--data", chats_file]
    options += ["--base_dtype", "int8", "--epochs", 1, *TRAINING]
    result = torchrun(2, ROOT / "train.py", *options, "--out", tmp_path / "two")
    assert result.returncode == 0, result.stderr
    words = dict(zip(map(str, TRAINING[::2]), TRAINING[1::2]))
    one = train(base_dtype="int8", **{name.removeprefix("--"): x for name, x in words.items()})
    assert one.returncode == 0, one.stderr

    def logged(out: Path) -> list[float]:
        entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return [entry[key] for entry in entries for key in ("loss", "base_alone") if key in entry]

    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "out"), rel=2e-3)
