"""Training end to end, in small: as a user runs it, and against never having stopped."""

import gc
import json
import math
import os
import shutil
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_refused, in_a_process, preference

import ivl
import train as trainer
from extras import losses as losses_module
from extras.connections import Connected, Probe
from model import Config, Llama
from plumbing import ranks, runs
from plumbing.chats import read_chats
from plumbing.dataset import tokenize
from plumbing.files import InputError
from plumbing.jobs import compiled
from plumbing.tokenizer import Tokenizer
from plumbing.weights import load

FAST = dict(
    lr=1e-2,
    batch_size=4,
    micro_batch_size=2,
    epochs=2,
    max_length=200,
    lam=0.1,
    norm_over="response",
    seed=3,
)


def entries(path, key="loss"):
    return [entry[key] for entry in map(json.loads, path.read_text().splitlines()) if key in entry]


@pytest.fixture
def setup(base_dir, value_dir, chats_file, tmp_path, monkeypatch):
    monkeypatch.setattr("plumbing.dataset.CACHE", tmp_path / "cache")
    chats = tokenize(read_chats(chats_file), Tokenizer(value_dir), 200)

    base = load(base_dir)

    def run(
        out,
        *,
        bases=(lambda: base,),
        value=None,
        chats=chats,
        resume=False,
        save_every=100,
        batch_loss=trainer.forward,
        **changes,
    ):
        value = value or load(value_dir)
        joined, loads = value, bases
        if (connection := changes.get("connection", "residual")) != "residual":
            joined = Connected(connection, value)
            loads = [partial(lambda load_base: joined.watched(load_base()), base) for base in bases]
        trainer.train(
            trainer.Curriculum(*loads),
            joined,
            chats,
            trainer.Settings(**FAST | changes),
            tmp_path / out,
            resume=resume,
            save_every=save_every,
            batch_loss=batch_loss,
        )
        return value, entries(tmp_path / out / "log.jsonl")

    return run


def test_loss_falls_and_the_held_out_loss_is_logged(setup, tmp_path):
    _, losses = setup("a")
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5
    held_out = entries(tmp_path / "a" / "log.jsonl", "held_out_loss")
    assert len(held_out) == 3 and held_out[-1] < held_out[0]


@pytest.mark.parametrize("norm_over", ["response", "all"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(setup, norm_over):
    # chats of one batch differ in their number of targets: averaging parts by batch would show here
    (one, losses_one), (many, losses_many) = (
        setup(str(size), micro_batch_size=size, norm_over=norm_over, held_out=0.05)
        for size in (4, 1)
    )
    torch.testing.assert_close(
        torch.tensor(losses_one), torch.tensor(losses_many), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("size", [1, 4])
def test_the_norm_over_all_counts_every_position_of_the_whole_batch(
    setup, value_dir, chats_file, tmp_path, size
):
    """Prompt and padding too, as the released code does, however the batch is cut into parts."""
    chats = tokenize(read_chats(chats_file), Tokenizer(value_dir), 200)
    settings = trainer.Settings(**FAST | {"norm_over": "all"})
    rows = trainer.split(chats, settings)[1][0]
    with torch.no_grad():
        expected = load(value_dir)(chats.batch(rows)[0]).abs().mean().item()
    setup("a", norm_over="all", micro_batch_size=size)
    assert entries(tmp_path / "a" / "log.jsonl", "norm")[0] == pytest.approx(expected, rel=1e-5)


def test_resume_equals_never_having_stopped(setup, tmp_path, monkeypatch):
    straight, losses = setup("straight")

    def crash(checkpoint, step, real=runs.Checkpoint.save):
        real(checkpoint, step)
        if step == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Checkpoint, "save", crash)
        with pytest.raises(KeyboardInterrupt):
            setup("stopped", save_every=3)
    with open(
        tmp_path / "stopped" / "log.jsonl", "a"
    ) as log:  # steps after the checkpoint are done again
        log.write(json.dumps({"run": "value", "step": 9, "loss": 0.0}) + '\n{"run": "val')
    resumed, again = setup("stopped", resume=True)
    assert again == losses
    for a, b in zip(straight.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


def test_resume_of_another_run_is_refused(value_dir, tmp_path):
    value = load(value_dir)
    optimizer = torch.optim.AdamW(value.parameters())
    value(torch.tensor([[1]])).sum().backward()
    optimizer.step()

    def checkpoint(steps=9, **changes):
        run = {"lr": 0.01, "chats": "a hash", "base": ["another"], "teacher": None} | changes
        return runs.Checkpoint(tmp_path, value, optimizer, run, steps)

    with pytest.raises(InputError, match="no checkpoint to resume"):
        checkpoint().load()
    checkpoint().save(5)
    assert checkpoint().load() == 5
    for changes, words in (
        ({"lr": 0.02}, "lr = 0.01, not 0.02"),
        ({"chats": "other"}, "made with another chats"),
        ({"base": ["another", "second"]}, "made with another base"),
        ({"teacher": "a hash"}, "made with another teacher"),
        ({"new": 1}, "new = None, not 1"),
        ({"steps": 4}, "holds step '5' of 4"),
    ):
        with pytest.raises(InputError, match=words):
            checkpoint(**changes).load()
    shutil.copy(value_dir / "model.safetensors", tmp_path / runs.CHECKPOINT)
    with pytest.raises(InputError, match="no checkpoint of this train.py"):
        checkpoint().load()


def test_the_base_does_not_change(setup, base_dir):
    base = load(base_dir)
    setup("a", bases=[lambda: base])
    for p, before in zip(base.parameters(), load(base_dir).parameters()):
        assert torch.equal(p, before) and p.grad is None


def test_a_curriculum_divides_the_same_steps(setup, base_dir, tmp_path, monkeypatch):
    _, straight = setup("straight")
    bases, used = [load(base_dir) for _ in range(3)], []
    for base in bases[1:]:
        torch.nn.init.zeros_(base.norm.weight)

    def forward(base, *arguments):
        used.append(bases.index(base))
        return trainer.forward(base, *arguments)

    loads = [lambda: bases[0], lambda: bases[1], lambda: bases[2]]
    _, losses = setup(
        "curriculum", bases=loads, batch_loss=forward, micro_batch_size=4, save_every=5
    )
    assert used == 4 * [0] + 4 * [1] + 4 * [2] and len(straight) == len(losses) == 12
    assert losses[:4] == pytest.approx(straight[:4], abs=1e-4) and losses[4] != pytest.approx(
        straight[4], abs=1e-2
    )


def test_a_resumed_curriculum_goes_on_with_the_right_base(setup, base_dir, tmp_path, monkeypatch):
    zero = load(base_dir)
    torch.nn.init.zeros_(zero.norm.weight)
    loads = [lambda: load(base_dir), lambda: zero]
    _, losses = setup("straight", bases=loads)

    def crash(checkpoint, step, real=runs.Checkpoint.save):
        real(checkpoint, step)
        if step == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs.Checkpoint, "save", crash)
        with pytest.raises(KeyboardInterrupt):
            setup("stopped", save_every=9, bases=loads)
    assert setup("stopped", resume=True, bases=loads)[1] == losses


@pytest.mark.parametrize("connection", ["residual", "cascade"])
def test_a_base_is_freed_before_the_next_is_loaded(setup, base_dir, connection):
    bases = []

    def load_base():
        gc.collect()
        assert all(base() is None for base in bases)
        base = load(base_dir)
        bases.append(weakref.ref(base))
        return base

    setup("a", bases=[load_base] * 3, connection=connection)
    assert len(bases) == 3


def test_a_probe_trains_its_own_parameters_only(setup, base_dir):
    base, probe = load(base_dir), Probe(load(base_dir).config).init_weights(0)
    before = [p.clone() for p in probe.parameters()]
    _, losses = setup("a", bases=[lambda: base], value=probe, connection="probe")
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, old) for p, old in zip(probe.parameters(), before))
    for p, old in zip(base.parameters(), load(base_dir).parameters()):
        assert torch.equal(p, old) and p.grad is None


@pytest.mark.parametrize("connection", ["cascade", "cascade+"])
def test_cascades_learn(setup, connection):
    _, losses = setup("a", connection=connection)
    assert losses[-1] < losses[0] - 0.5


def test_distillation_learns_the_teacher(setup, base_dir, tmp_path):
    teacher = load(base_dir)
    with torch.no_grad():
        teacher.norm.weight.mul_(1.3)
    _, losses = setup("a", batch_loss=partial(losses_module.distill, teacher), lam=0.0)
    assert losses[-1] < 0.9 * losses[0]
    same = partial(losses_module.distill, load(base_dir))
    nothing = setup(
        "b", batch_loss=same, value=Probe(teacher.config).init_weights(0), connection="probe"
    )[1]
    assert nothing[0] == pytest.approx(0, abs=1e-6)  # the base teaches nothing new


def test_preferences_are_learnt_and_micro_batches_keep_pairs_together(
    setup, chats_file, value_dir, tmp_path
):
    worse = tmp_path / "worse.json"
    worse.write_text(
        chats_file.read_text()
        .replace("On the mat.", "The cat says good.")
        .replace("In garden", "It rains")
    )
    tokenizer = Tokenizer(value_dir)
    pairs = losses_module.paired(
        *(tokenize(read_chats(file), tokenizer, 200) for file in (chats_file, worse))
    )
    (_, whole), (_, parts) = (
        setup(
            str(size),
            chats=pairs,
            beta=0.1,
            lr=1e-3,
            micro_batch_size=size,
            batch_loss=partial(losses_module.prefer, 0.1),
        )
        for size in (4, 1)
    )
    assert len(whole) == 12 and whole[-1] < whole[0] - 0.1
    torch.testing.assert_close(torch.tensor(whole), torch.tensor(parts), atol=1e-3, rtol=0)


def test_learning_rate_warms_up_and_ends_at_zero():
    settings = trainer.Settings(**FAST, warmup=0.1)
    rates = [trainer.rate(step, 100, settings) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)]) and max(rates) == 1.0
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0.0)
    assert trainer.rate(0, 1, settings) == 1.0


# ---------------------------------------------------------------- as a user runs it


def test_train_then_sample(run, base_dir, value_dir, chats_file, tmp_path):
    out = tmp_path / "out"
    result = run(
        "train.py",
        "--base",
        base_dir,
        "--value",
        value_dir,
        "--data",
        chats_file,
        "--out",
        out,
        "--epochs",
        2,
        "--lr",
        1e-2,
        "--lam",
        0.1,
        "--checkpointing",
    )
    assert result.returncode == 0, result.stderr
    assert (
        "chats used                  24" in result.stdout
        and f"python sample.py --base {base_dir} --value {out}" in result.stdout
    )
    assert {"config.json", "model.safetensors", "tokenizer.json", "log.jsonl"} <= set(
        os.listdir(out)
    )
    assert "Alone it is" in (out / "README.md").read_text()
    import transformers

    theirs = transformers.LlamaForCausalLM.from_pretrained(out)
    ids = torch.tensor([[1, 20, 30]])
    torch.testing.assert_close(theirs(ids).logits, load(out)(ids), atol=1e-4, rtol=0)
    reply = run(
        "sample.py",
        "--base",
        base_dir,
        "--value",
        out,
        "--max_new_tokens",
        8,
        "Where is the cat 3?",
    )
    assert reply.returncode == 0 and "tok/s" in reply.stderr
    both = run("train.py", "--base", base_dir, "--value", out, "--data", chats_file, "--evaluate")
    alone, together = (float(line.split()[-4]) for line in both.stdout.splitlines()[-2:])
    assert together < alone


def test_in_a_process_of_its_own(base_dir, value_dir, chats_file, tmp_path):
    models = ["--base", base_dir, "--value", value_dir, "--data", chats_file]
    trained = in_a_process("train.py", *models, "--out", tmp_path / "out", "--epochs", 1)
    assert trained.returncode == 0 and "saved" in trained.stdout, trained.stderr
    assert_refused(in_a_process("train.py", *models), "--out is missing")


def test_full_fine_tuning(run, base_dir, chats_file, tmp_path):
    result = run(
        "train.py",
        "--base",
        base_dir,
        "--full",
        "--data",
        chats_file,
        "--out",
        tmp_path / "full",
        "--epochs",
        2,
        "--lr",
        1e-2,
    )
    assert result.returncode == 0, result.stderr
    losses = entries(tmp_path / "full" / "log.jsonl")
    assert losses[-1] < losses[0] and "fine-tuned" in (tmp_path / "full" / "README.md").read_text()
    hint = (
        result.stdout.strip().splitlines()[-1].split()
    )  # the command that it ends with works as it stands
    reply = run(*hint[1:6], "--max_new_tokens", 4, "Who are you?")
    assert hint[:2] == ["python", "sample.py"] and reply.returncode == 0, reply.stderr


def test_curriculum_random_and_preferences_as_a_user_runs_them(
    run, base_dir, value_dir, chats_file, tmp_path
):
    pairs, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    pairs.write_text("".join(map(preference, json.loads(chats_file.read_text()))))
    given = "--data", pairs, "--out", out, "--epochs", 1, "--lr", 1e-3, "--lam", 0.1
    result = run(
        "train.py",
        "--base",
        base_dir,
        value_dir,
        "--value",
        value_dir,
        "--random",
        "--batch_size",
        8,
        *given,
    )
    assert result.returncode == 0, result.stderr
    assert (
        f"`{base_dir}`, `{value_dir}`" in (out / "README.md").read_text()
        and '"beta": 0.1' in (out / "README.md").read_text()
    )
    assert (
        entries(out / "log.jsonl", "norm")[0]
        < 0.5
        < load(value_dir)(torch.tensor([[1, 20, 30]])).abs().mean()
    )
    assert_refused(
        run("train.py", "--base", base_dir, "--full", "--random", *given), "--full and --random"
    )


def test_bad_input_ends_in_one_line(run, base_dir, value_dir, chats_file, tmp_path):
    def train(**changes):
        given = {
            "base": base_dir,
            "value": value_dir,
            "data": chats_file,
            "out": tmp_path / "out",
        } | changes
        return run(
            "train.py",
            *(
                x
                for name, value in given.items()
                if value is not None
                for x in (f"--{name}", value)
            ),
        )

    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n{oops\n")
    assert_refused(train(data=bad), "bad.jsonl, line 2")
    assert_refused(train(data=tmp_path / "absent.json"), "absent.json", "cannot be read")
    assert_refused(train(base=tmp_path / "absent"), "absent", "is no directory")
    assert_refused(train(data=None), "--data is missing")
    assert_refused(train(base=None), "--base is missing")
    assert_refused(train(epochs=0), "--epochs")
    assert_refused(train(device="cuda:7"), "--device cuda:7")
    (tmp_path / "file").write_text("")
    assert_refused(train(out=tmp_path / "file" / "out"), "out", "cannot be written")
    torn = shutil.copytree(value_dir, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((value_dir / "model.safetensors").read_bytes()[:-9])
    assert_refused(train(value=torn), "torn/model.safetensors", "not a readable safetensors file")
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


@pytest.mark.slow
def test_compiled_blocks_train_the_same_model(run, base_dir, value_dir, chats_file, tmp_path):
    for name, options in (("plain", []), ("compiled", ["--compile"])):
        result = run(
            "train.py",
            *("--base", base_dir, "--value", value_dir, "--data", chats_file, "--lr", 1e-2),
            *("--epochs", 1, "--out", tmp_path / name, *options),
        )
        assert result.returncode == 0, result.stderr
    plain, compiled = (entries(tmp_path / name / "log.jsonl") for name in ("plain", "compiled"))
    assert plain == pytest.approx(compiled, abs=1e-4)
    weights = [dict(load(tmp_path / name).named_parameters()) for name in ("plain", "compiled")]
    torch.testing.assert_close(*weights, atol=1e-4, rtol=0)


def test_batches_of_whole_tiles_train_the_same(setup, monkeypatch):
    """On CUDA all batches, the held-out ones too, are padded to a multiple of 128, since every new
    shape of attention costs time there: here the same, on the CPU.
    """
    _, losses = setup("plain")
    shapes = set()
    attention = F.scaled_dot_product_attention

    def noted(q, *others, **options):
        shapes.add(q.shape[-2])
        return attention(q, *others, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    monkeypatch.setattr("plumbing.dataset.ALIGNED", {"cpu": 128})
    _, padded = setup("padded")
    assert padded == pytest.approx(losses, abs=1e-5)
    assert shapes == {128}


def test_many_shapes_stay_compiled(monkeypatch):
    """A curriculum compiles blocks of several shapes, each read in several ways; past its limit
    PyTorch would run the last ones as they are, without a word.
    """
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(0)

        def run(*args):
            graphs[-1] += 1
            return graph(*args)

        return run

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile(f, backend=backend))
    for width in range(16, 16 + 4 * 12, 4):
        config = Config(20, width, 24, 2, 2, 1, 8, 64)
        model = compiled(Llama(config))
        before = sum(graphs)
        model(torch.ones(1, 5, dtype=torch.long))
        assert sum(graphs) == before + 2, f"a block of width {width} is not compiled"


def test_a_curriculum_of_the_command_line_frees_its_bases_too(
    run, base_dir, value_dir, chats_file, tmp_path, monkeypatch
):
    bases = []

    def loading(*asked, real=ranks.load):
        gc.collect()
        model = real(*asked)
        if model.config.hidden_size == 32:  # not the value model
            assert all(base() is None for base in bases)
            bases.append(weakref.ref(model))
        return model

    monkeypatch.setattr(ranks, "load", loading)
    models = ["--base", base_dir, base_dir, base_dir, "--value", value_dir, "--data", chats_file]
    result = run("train.py", *models, "--epochs", 1, "--batch_size", 8, "--out", tmp_path / "out")
    assert result.returncode == 0 and len(bases) == 3, result.stderr


def test_training_is_adamw_by_hand_with_the_scheduled_rate(setup, base_dir, value_dir, tmp_path):
    """Not only the log, also the weights must come of the rate that a step is meant to have."""
    trained, _ = setup("a", warmup=0.25)
    chats = tokenize(read_chats(tmp_path / "chats.json"), Tokenizer(value_dir), 200)
    _, batches = trainer.split(chats, trainer.Settings(**FAST))
    base, value = load(base_dir), load(value_dir)
    weights = list(value.parameters())
    means = [torch.zeros_like(p) for p in weights]
    squares = [torch.zeros_like(p) for p in weights]
    rates = []
    for t, rows in enumerate(batches, 1):
        # the loss, and its gradient, shortened to 1
        inputs, targets, counted = chats.batch(rows)
        cross_entropy, norm = ivl.loss_sums(base(inputs), value(inputs), targets, counted)
        loss = (cross_entropy + FAST["lam"] * norm) / (targets >= 0).sum()
        gradients = torch.autograd.grad(loss, weights)
        length = torch.stack([gradient.norm() for gradient in gradients]).norm().item()

        # three of the twelve steps are the warm-up, the other nine half a turn of the cosine
        share = t / 3 if t <= 3 else (1 + math.cos(math.pi * (t - 4) / 9)) / 2
        rates.append(FAST["lr"] * share)
        with torch.no_grad():
            for p, gradient, mean, square in zip(weights, gradients, means, squares):
                gradient = gradient / max(1.0, length)
                mean.mul_(0.9).add_(0.1 * gradient)
                square.mul_(0.999).add_(0.001 * gradient**2)
                if p.dim() > 1:
                    p.mul_(1 - rates[-1] * 0.01)
                step = mean / (1 - 0.9**t) / ((square / (1 - 0.999**t)).sqrt() + 1e-8)
                p.sub_(rates[-1] * step)
    assert entries(tmp_path / "a" / "log.jsonl", "lr") == pytest.approx(rates)
    assert len(rates) == 12
    for p, expected in zip(trained.parameters(), weights):
        torch.testing.assert_close(p, expected, atol=1e-4, rtol=0)


def test_the_papers_settings_by_the_size_of_the_model():
    """Table 5 knows 1.1B and 7B."""
    small = Config(32000, 2048, 5632, 22, 32, 4, 64, 16384)
    large = Config(32000, 4096, 11008, 32, 32, 32, 128, 2048)
    with torch.device("meta"):
        models = Llama(small), Llama(large)
    common = {"micro_batch_size": 4, "epochs": 3, "norm_over": "response"}
    assert trainer.table_5(models[0], [small]) == trainer.Settings(
        lr=1e-4, batch_size=32, max_length=4096, lam=1.0, **common
    )
    assert trainer.table_5(models[1], []) == trainer.Settings(
        lr=1e-5, batch_size=16, max_length=2048, lam=0.0, **common
    )
    assert trainer.table_5(models[0], [small, large]).max_length == 2048


def test_more_bases_than_steps_are_refused(setup, base_dir):
    with pytest.raises(InputError, match="12 steps are too few for 13 bases"):
        setup("a", bases=[lambda: load(base_dir)] * 13)
