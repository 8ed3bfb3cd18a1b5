"""What a training says of itself: its verdict, its best weights, its progress, its rehearsal."""

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_refused, make_directory, preference

import train as trainer
from extras import losses, rehearse
from extras.rehearse import padded_tokens
from plumbing import ranks, runs
from plumbing.chats import read_chats
from plumbing.dataset import tokenize
from plumbing.files import InputError, open_tensors, save_tensors
from plumbing.tokenizer import Tokenizer
from plumbing.weights import load


def log_of(out, key: str) -> list:
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [entry[key] for entry in lines if key in entry]


def losses_of(base_dir, value_dir, chats_file, seed=0) -> tuple[float, float]:
    """The held-out losses of the base alone and of the pair, by the plain formula."""
    chats = tokenize(read_chats(chats_file), Tokenizer(base_dir), 256)
    order = torch.randperm(len(chats), generator=torch.Generator().manual_seed(seed))
    inputs, targets, _ = chats.batch(order[: max(1, round(0.02 * len(chats)))].tolist())
    z_base, z_delta = (load(directory)(inputs) for directory in (base_dir, value_dir))
    return tuple(
        torch.nn.functional.cross_entropy(z.flatten(0, 1), targets.flatten()).item()
        for z in (z_base, z_base + z_delta)
    )


def test_the_verdict_has_the_losses_of_base_and_pair(train, models, chats_file, tmp_path):
    result = train(lr=1e-2, epochs=2)
    assert result.returncode == 0 and "warning" not in result.stderr, result.stderr
    alone, pair = losses_of(models["base"], tmp_path / "out", chats_file)
    said = f"held-out loss: {alone:.3f} by the base alone, {pair:.3f} with the value model"
    assert said in result.stdout and pair < alone
    assert log_of(tmp_path / "out", "base_alone") == pytest.approx([alone] * 3, abs=1e-4)


def test_a_value_model_that_does_harm_is_warned_of(train, tmp_path):
    result = train(lr=0)  # random weights, untrained
    assert result.returncode == 0
    harm = "warning: on chats that were held out, the value model makes its base worse; "
    assert harm + "a lower --lr, fewer --epochs" in result.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
    # whoever has learnt too little is not told to learn less
    result = train(lr=1e-4, epochs=2, out=tmp_path / "little")
    assert harm + "it was still learning: more --epochs or a higher --lr" in result.stderr


def test_full_fine_tuning_is_compared_with_what_it_was(train, models, chats_file, tmp_path):
    result = train(full=True, value=None, lr=1e-2)
    before, after = (
        losses_of(directory, directory, chats_file)[0]
        for directory in (models["base"], tmp_path / "out")
    )
    assert f"held-out loss: {before:.3f} before training, {after:.3f} after it" in result.stdout
    worse = train(full=True, value=None, lr=1.0, out=tmp_path / "worse")
    assert "warning: on chats that were held out, the model has become worse" in worse.stderr


def test_a_preference_is_judged_by_preferences(train, chats_file, tmp_path):
    chats = json.loads(chats_file.read_text())
    pairs = "".join(preference(chat, "It rains.") for chat in chats)
    (tmp_path / "pairs.jsonl").write_text(pairs)
    result = train(data=tmp_path / "pairs.jsonl", lr=1e-2, epochs=3)
    assert result.returncode == 0, result.stderr
    nats = log_of(tmp_path / "out", "held_out_loss")
    said = f"0.693 by the base alone, {nats[-1]:.3f} with the value model (nats per pair, 1 pairs)"
    assert said in result.stdout and nats[-1] < math.log(2)
    assert log_of(tmp_path / "out", "base_alone") == [math.log(2)] * 4


def test_the_loss_of_held_out_pairs_is_a_mean_over_pairs(base_dir, value_dir, chats_file):
    tokenizer = Tokenizer(base_dir)
    reading = read_chats(chats_file)
    better = tokenize(reading, tokenizer, 256)
    for chat in reading.chats:
        chat.messages[-1]["content"] = "It rains."
    pairs = losses.paired(better, tokenize(reading, tokenizer, 256))
    base, value = load(base_dir), load(value_dir)
    each = []
    for row in (0, 3, 7):
        inputs, targets, _ = pairs.batch([row])
        z_base, z_delta = base(inputs).detach(), value(inputs).detach()
        each.append(losses.pairwise(z_base, z_delta, targets, 0.5).item())
    how = ([0, 3, 7], 2, trainer.FULL_PRECISION, ranks.ONE_DEVICE)
    mean = losses.held_out_pairs(0.5, base, value, pairs, *how)
    assert mean == pytest.approx(sum(each) / 3, rel=1e-5)
    assert losses.held_out_pairs(0.5, base, None, pairs, *how) == math.log(2)


def test_a_picture_decides_nothing(train, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert train().returncode == 0
    assert (out / "curve.png").exists()

    def draw(*_):
        raise AttributeError("made for another version")

    monkeypatch.setattr("extras.curve.draw", draw)
    result = train()
    assert result.returncode == 0 and "no curve.png: made for another" in result.stdout
    assert not (out / "curve.png").exists()  # the old one's went
    monkeypatch.undo()
    (out / "curve.png").mkdir()
    result = train(out=out)
    assert result.returncode == 0 and "no curve.png:" in result.stdout and "try" in result.stdout


def test_what_is_replaced_or_cannot_be_gone_on_with_is_told(train, tmp_path):
    assert "holds a finished model" not in train().stdout
    assert f"{tmp_path}/out holds a finished model, which this run will replace" in train().stdout
    refused = train(resume=True)
    assert_refused(refused, "holds a finished model and no checkpoint", "nothing to go on with")


def test_a_listener_that_leaves_ends_no_training(models, chats_file, tmp_path):
    out = tmp_path / "out"
    pair = f"--base {models['base']} --value {models['value']}"
    shell = f"{sys.executable} train.py {pair} --data {chats_file} --out {out} --epochs 2 | head -1"
    done = subprocess.run(shell, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert (out / "model.safetensors").exists() and (out / "curve.png").exists()
    assert "warning" in done.stderr or log_of(out, "held_out_loss")[-1] < 10


# ---------------------------------------------------------------- the best weights


def test_the_best_weights_are_kept(train, models, chats_file, tmp_path, monkeypatch):
    # the held-out losses are made up: the second epoch's is the best
    nats = iter([3.0, 2.5, 2.0, 2.8, 2.9])
    real = trainer.held_out_loss

    def measure(base, value, *how):
        return 4.0 if value is None else next(nats)

    monkeypatch.setattr(trainer, "held_out_loss", measure)
    result = train(lr=1e-2, epochs=4, keep="best")
    assert result.returncode == 0, result.stderr
    assert "kept the weights after step 2 of 4" in result.stdout
    assert "4.000 by the base alone, 2.000 with the value model" in result.stdout
    assert not (tmp_path / "out" / runs.BEST).exists()

    # the same run, stopped after its second epoch, by hand
    monkeypatch.setattr(trainer, "held_out_loss", real)
    kept = []

    def save(checkpoint, step, real=runs.Checkpoint.save):
        if step == 2:
            kept.append([p.detach().clone() for p in checkpoint.value.parameters()])

    monkeypatch.setattr(runs.Checkpoint, "save", save)
    train(lr=1e-2, epochs=4, out=tmp_path / "again")
    best = load(tmp_path / "out").parameters()
    last = load(tmp_path / "again").parameters()
    for weight, second, fourth in zip(best, kept[0], last):
        assert torch.equal(weight, second) and not torch.equal(weight, fourth)


def test_the_best_weights_survive_a_stop(train, tmp_path, monkeypatch):
    """Stopped and gone on with, the best file is the one of never having stopped."""
    nats = {0: 3.0, 1: 2.0, 2: 2.5, 3: 2.8}

    def measuring(first):
        looks = iter([nats[i] for i in range(first, 4)])
        return lambda base, value, *how: 4.0 if value is None else next(looks)

    monkeypatch.setattr(trainer, "held_out_loss", measuring(0))
    assert train(lr=1e-2, epochs=3, keep="best").returncode == 0

    def crash(checkpoint, step, real=runs.Checkpoint.save):
        real(checkpoint, step)
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "held_out_loss", measuring(0))
    with monkeypatch.context() as patch:
        patch.setattr(runs.Checkpoint, "save", crash)
        assert train(lr=1e-2, epochs=3, keep="best", out=tmp_path / "b").returncode == 130
    best = tmp_path / "b" / runs.BEST
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "held_out_loss", measuring(3))
        content = best.read_bytes()
        best.unlink()
        refused = train(lr=1e-2, epochs=3, keep="best", out=tmp_path / "b", resume=True)
        assert_refused(refused, "best.safetensors", "is missing")
        best.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        refused = train(lr=1e-2, epochs=3, keep="best", out=tmp_path / "b", resume=True)
        assert_refused(refused, "best.safetensors")
        best.write_bytes(content)
        assert_refused(train(lr=1e-2, epochs=3, out=tmp_path / "b", resume=True), "keep")

        # whole, but of another run
        note = {"run": "another", "held_out_loss": "0.1"}
        tensors = {name: p.data for name, p in load(tmp_path / "out").named_parameters()}
        save_tensors(tensors, best, note)
        refused = train(lr=1e-2, epochs=3, keep="best", out=tmp_path / "b", resume=True)
        assert_refused(refused, "best.safetensors", "another run")
        best.write_bytes(content)
    monkeypatch.setattr(trainer, "held_out_loss", measuring(3))
    resumed = train(lr=1e-2, epochs=3, keep="best", out=tmp_path / "b", resume=True)
    assert resumed.returncode == 0, resumed.stderr
    for name in ("model.safetensors", "log.jsonl", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not best.exists()


def test_a_kill_between_the_last_removals_leaves_a_finished_model(train, tmp_path, monkeypatch):
    def unlink(path, *args, real=Path.unlink, **options):
        if path.name == runs.BEST and (tmp_path / "out" / "config.json").exists():
            raise KeyboardInterrupt
        real(path, *args, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    assert train(keep="best").returncode == 130
    monkeypatch.undo()
    assert not (tmp_path / "out" / runs.CHECKPOINT).exists()
    assert train(keep="best").returncode == 0
    assert not (tmp_path / "out" / runs.BEST).exists()


def test_a_new_run_forgets_an_older_ones_best(train, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.jsonl").touch()
    best = tmp_path / "out" / runs.BEST
    best.write_text("what a run has left that was killed")
    seen = []

    def stop(*_, **__):
        seen.append(best.exists())
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Log, "note", stop)
        assert train().returncode == 130
    assert seen == [False]


# ---------------------------------------------------------------- progress


def test_a_pipe_gets_a_line_for_each_epoch(train):
    result = train(epochs=3)
    lines = [line for line in result.stdout.splitlines() if line.startswith("value, epoch")]
    assert [line.split(":")[0] for line in lines] == [
        f"value, epoch {i} of 3, step {i} of 3" for i in (1, 2, 3)
    ]
    assert all("held_out" in line and "loss" in line for line in lines)


@pytest.mark.parametrize("full", [False, True])
def test_what_a_training_says_to_try_can_be_asked(train, run, full):
    result = train(lr=1e-2, **({"full": True, "value": None} if full else {}))
    words = shlex.split(result.stdout.strip().splitlines()[-1].split("sample.py ")[1])
    said = run("sample.py", *words, "--max_new_tokens", 3, "Where is the cat?")
    assert said.returncode == 0 and "3 tokens" in said.stderr, said.stderr


# ---------------------------------------------------------------- what it would take


def test_a_rehearsal_tells_and_writes_nothing(train, models, chats_file, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    train(show=1, value=None, out=None, epochs=None)  # fills the cache, which stays
    before = sorted(tmp_path.rglob("*"))
    result = train(dry_run=True, epochs=5, batch_size=4, lr=1e-2)
    assert result.returncode == 0, result.stderr
    told = {line[:20].strip(): line[20:] for line in result.stdout.splitlines()}
    assert told["trained on"] == "23 chats" and told["held out"] == "1 chats"
    assert told["steps"] == "30 of 4 chats, 5 epochs"
    sizes = {name: f"{load(models[name]).size():,} parameters" for name in ("value", "base")}
    assert told["trained"] == sizes["value"]
    assert told["frozen"] == f"{sizes['base']}: {models['base']}"
    assert "GB" in told["memory"] and "about" in told["time"] and "free" in told["disk"]
    assert sorted(tmp_path.rglob("*")) == before
    # it does not need the folder, and a real run after it is not disturbed
    assert train(dry_run=True, out=None).returncode == 0
    assert train().returncode == 0


def test_a_curriculum_is_rehearsed_beside_its_last_base(run, models, chats_file, tmp_path):
    large = make_directory(tmp_path / "large", seed=4, num_hidden_layers=4)
    words = ["--base", models["base"], large, "--value", models["value"], "--data", chats_file]
    result = run("train.py", *words, "--dry-run", "--epochs", 2)
    assert f"{load(large).size():,} parameters: {large}" in result.stdout
    result = run("train.py", *words, "--dry-run", "--epochs", 1)
    assert_refused(result, "1 steps are too few for 2 bases")


def test_a_rehearsal_counts_padding_and_tries_narrow_and_wide(base_dir, chats_file, monkeypatch):
    """The time is per padded token: here each takes a second."""
    chats = tokenize(read_chats(chats_file), Tokenizer(base_dir), 256)
    settings = trainer.Settings(1e-2, 4, 2, 3, 256, 0.0, "response")
    held_rows, batches = trainer.split(chats, settings)
    by_hand = [
        sum(chats.batch(rows[i : i + 2])[0].numel() for i in range(0, len(rows), 2))
        for rows in batches
    ]
    assert [padded_tokens(chats, rows, 2) for rows in batches] == by_hand

    clock, tried = [0.0], []
    monkeypatch.setattr(rehearse.time, "perf_counter", lambda: clock[0])

    def work(rows):
        tried.append(rows)
        clock[0] += padded_tokens(chats, rows, 2)

    how = (chats, batches, held_rows, 2)
    seconds, _ = rehearse.rehearse(*how, work, work, torch.device("cpu"))
    first = by_hand[: len(batches) // 3]
    assert seconds == pytest.approx(3 * sum(first) + 4 * padded_tokens(chats, held_rows, 2))
    with pytest.raises(InputError, match="a step has loss = nan"):
        rehearse.rehearse(*how, lambda rows: {"loss": math.nan}, work, torch.device("cpu"))
    assert padded_tokens(chats, tried[0], 2) == max(first) and len(tried) == 4


def test_a_rehearsal_of_a_training_without_end_is_as_short(train):
    """Only the batches of one epoch are made."""
    result = train(dry_run=True, out=None, epochs=10**9)
    assert result.returncode == 0 and "1000000000 epochs" in result.stdout, result.stderr


# ---------------------------------------------------------------- measuring a pair


def test_an_evaluation_measures_what_was_held_out_or_says_that_it_measures_all(
    train, models, chats_file, tmp_path
):
    measure = {"out": None, "epochs": None, "evaluate": True}
    every = train(**measure)
    assert "measured on all 24 chats" in every.stdout
    assert train(lr=1e-2, seed=5).returncode == 0

    # the value model knows on what it was trained, and with which seed
    value = tmp_path / "out"
    held = train(value=value, **measure)
    assert "measured on the 1 of 24 chats that were held out in training" in held.stdout
    alone, pair = losses_of(models["base"], value, chats_file, seed=5)
    assert f"base alone: {alone:.4f}" in held.stdout and f"base + value: {pair:.4f}" in held.stdout

    # of other chats it can only be said that all are measured
    (tmp_path / "fewer.json").write_text(json.dumps(json.loads(chats_file.read_text())[1:]))
    other = train(value=value, data=tmp_path / "fewer.json", **measure)
    assert "measured on all 23 chats; if the value model was trained on some" in other.stdout

    # harm is told
    assert train(lr=1.0, out=tmp_path / "bad").returncode == 0
    harmed = train(value=tmp_path / "bad", **measure)
    assert "warning: on these chats the value model makes its base worse" in harmed.stderr
    assert "warning" not in held.stderr


def test_a_base_that_is_no_use_is_named(train, models):
    ours = models["base"] / "model.safetensors"
    file = open_tensors(ours)
    tensors = {name: file.get_tensor(name) for name in file.keys()}
    tensors["model.norm.weight"] *= 1e37  # finite, but its logits are not
    tensors["model.embed_tokens.weight"] *= 1e3
    save_tensors(tensors, ours, {})
    assert_refused(train(), "the base alone has a held-out loss of")


def test_best_is_for_one_base(run, models, chats_file, tmp_path):
    args = ["train.py", "--base", models["base"], models["base"], "--value", models["value"]]
    result = run(*args, "--data", chats_file, "--out", tmp_path / "out", "--keep", "best")
    assert_refused(result, "--keep best compares losses beside one base")


def test_a_log_that_has_lost_lines_ends_no_training(train, tmp_path, monkeypatch):
    def save(model, *_, real=trainer.save_model):
        real(model, *_)
        (tmp_path / "out" / "log.jsonl").write_text("")

    monkeypatch.setattr(trainer, "save_model", save)
    result = train()
    assert result.returncode == 0, result.stderr
    assert "held-out loss: not known, the log has lost lines" in result.stdout
