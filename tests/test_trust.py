"""Nothing is lost, nothing is let in, nothing goes wrong in silence."""

import ast
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_refused

import train as trainer
from plumbing import dataset, files, ranks, runs, weights
from plumbing.chats import read_chats
from plumbing.dataset import tokenize
from plumbing.files import InputError, pick_dtype
from plumbing.pair import Speaker
from plumbing.tokenizer import TEMPLATES, Tokenizer
from plumbing.weights import load


def change(path: Path, **fields) -> None:
    """Sets fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def put(path: Path, name: str, value: float) -> None:
    """Sets the first number of a tensor in a safetensors file."""
    file = files.open_tensors(path)
    tensors = {key: file.get_tensor(key) for key in file.keys()}
    tensors[name].view(-1)[0] = value
    files.save_tensors(tensors, path, file.metadata())


# ---------------------------------------------------------------- models are whole


def test_a_new_model_leaves_nothing_of_an_older_one(train, models, tmp_path, monkeypatch):
    """An older sharded model, and its template, would be read first."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(weights, "SHARD_BYTES", 20_000)
        assert train(lr=1e-2).returncode == 0
    assert (out / "model.safetensors.index.json").exists()
    (out / "chat_template.jinja").write_text("{{ 'an older one' }}")
    old = load(out).unembed.clone()

    assert train(lr=2e-2).returncode == 0
    assert not (out / "model.safetensors.index.json").exists()
    assert not list(out.glob("model-0*")) and not list(out.glob(".*"))
    assert not torch.equal(load(out).unembed, old)
    assert Tokenizer(out).template == Tokenizer(models["value"]).template


@pytest.mark.parametrize("broken", ["save_tensors", "write_text"])
def test_what_goes_wrong_while_saving_leaves_the_old_model(train, tmp_path, monkeypatch, broken):
    out = tmp_path / "out"
    assert train().returncode == 0
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.name != "log.jsonl"}

    def fail(*_):
        raise InputError("the disk is full")

    module = weights if broken == "save_tensors" else runs
    monkeypatch.setattr(module, broken, fail)
    if broken == "write_text":  # the log is written with it too
        monkeypatch.setattr(runs.Log, "keep", lambda *_: None)
    assert_refused(train(lr=1e-2), "the disk is full")
    after = {file.name: file.read_bytes() for file in out.iterdir() if file.name != "log.jsonl"}
    checkpoint = after.pop(runs.CHECKPOINT)
    assert checkpoint and after == before


def test_the_checkpoint_stays_until_the_model_stands(train, tmp_path, monkeypatch):
    straight = train(out=tmp_path / "straight")
    assert straight.returncode == 0

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "describe", killed)
        stopped = train()
    assert stopped.returncode == 130 and "--resume" in stopped.stderr
    assert train(resume=True).returncode == 0
    for name in ("model.safetensors", "log.jsonl"):
        theirs, ours = (tmp_path / folder / name for folder in ("straight", "out"))
        assert theirs.read_bytes() == ours.read_bytes()
    assert not (tmp_path / "out" / runs.CHECKPOINT).exists()


def test_a_run_that_was_stopped_is_not_overwritten(train, tmp_path):
    assert train().returncode == 0
    (tmp_path / "out" / runs.CHECKPOINT).write_bytes(b"")
    assert_refused(train(), runs.CHECKPOINT, "--resume")


# ---------------------------------------------------------------- where it is written


def test_out_is_never_what_is_read(train, models, tmp_path):
    (tmp_path / "link").symlink_to(models["base"])
    assert_refused(train(out=models["base"]), "--out and --base are the same")
    assert_refused(train(out=tmp_path / "link"), "--out and --base are the same")
    assert_refused(train(out=models["value"]), "--out and --value are the same")
    assert_refused(
        train(out=models["value"], value=None, teacher=models["value"]),
        "--out and --teacher are the same",
    )


def test_a_folder_of_others_is_refused(train, tmp_path, monkeypatch):
    assert_refused(train(out=""), "out", "empty")
    assert_refused(train(out="."), ".", "not from here")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "README.md").write_text("thesis")
    assert_refused(train(out=mine), "mine", "README.md")
    assert os.listdir(mine) == ["README.md"] and (mine / "README.md").read_text() == "thesis"


def test_two_runs_in_one_folder(train, tmp_path):
    """The second is refused while the first lives, and only then."""
    out = tmp_path / "out"
    holder = [
        sys.executable,
        "-c",
        "import sys; from plumbing.files import own_folder\n"
        f"lock = own_folder({str(out)!r}, ['log.jsonl'])\n"
        "with lock: print('held', flush=True); sys.stdin.read()",
    ]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with subprocess.Popen(holder, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        assert_refused(train(), "another run")
        other.kill()  # which gives it no chance to tidy up
    assert train().returncode == 0


def test_what_the_dead_have_left_is_cleared_and_the_living_are_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = platform.node()
    (tmp_path / f".model.ivl-{here}-{dead.pid}.tmp").mkdir()
    (tmp_path / f".log.jsonl.ivl-{here}-{dead.pid}.tmp").write_text("half")
    living = [f".other.ivl-{here}-{os.getppid()}.tmp", f".other.ivl-elsewhere-{dead.pid}.tmp"]
    mine = [".backup.20240101.tmp"]
    for name in living + mine:
        (tmp_path / name).write_text("half")
    files.write_text(tmp_path / "file", "whole")
    assert sorted(os.listdir(tmp_path)) == sorted([*living, *mine, "file"])
    # in a folder that is locked nobody else can be writing
    with files.own_folder(tmp_path, ["file"]):
        assert sorted(os.listdir(tmp_path)) == sorted([*mine, "file"])


def test_sample_does_not_overwrite_its_prompts(run, models, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n")
    pair = ["--base", models["base"], "--value", models["value"]]
    assert_refused(
        run("sample.py", *pair, "--prompts", prompts, "--out", prompts), "--out and --prompts"
    )
    assert prompts.read_text() == "hello\n"
    for folder in (".", tmp_path):
        refused = run("sample.py", *pair, "--prompts", prompts, "--out", folder)
        assert refused.returncode == 2 and "it is a folder" in refused.stderr


# ---------------------------------------------------------------- numbers that are none


def test_a_loss_that_is_no_number_stops_the_run(train, tmp_path, monkeypatch):
    calls = []

    def forward(*arguments, real=trainer.forward):
        loss, sums = real(*arguments)
        calls.append(arguments)
        # after the held-out loss and the first steps
        if len(calls) == 5:
            loss, sums = loss * torch.nan, sums * torch.nan
        return loss, sums

    monkeypatch.setattr(trainer, "forward", forward)
    result = train(batch_size=4, save_every=1)
    assert_refused(result, "loss = nan", "chats [", "checkpoint.safetensors holds step")
    names = set(os.listdir(tmp_path / "out"))
    assert names == {"log.jsonl", runs.CHECKPOINT}
    calls[:] = [None] * 10
    assert train(batch_size=4, save_every=1, resume=True).returncode == 0


def test_a_rate_that_blows_the_weights_up_is_not_saved_as_if_well(train, tmp_path):
    result = train(lr=1e12, epochs=3, batch_size=2)
    assert result.returncode == 2 and "the training has failed" in result.stderr, result.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("option", ["lr", "lam"])
@pytest.mark.parametrize("word", ["nan", "inf", "-1", "abc"])
def test_options_are_finite_numbers(train, tmp_path, option, word):
    assert_refused(train(**{option: word}), f"--{option}", "a number from 0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [["--temperature", "nan"], ["--top_p", "2"], ["--seed", str(2**64)], ["--alpha", "inf"]],
)
def test_options_of_sample_are_in_range(run, models, words):
    pair = ["--base", models["base"], "--value", models["value"]]
    assert_refused(run("sample.py", *pair, *words, "hello"), words[0])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(run, train, models, number):
    name = "model.layers.1.mlp.up_proj.weight"
    put(models["base"] / "model.safetensors", name, number)
    assert_refused(train(), str(models["base"]), name, "not finite")
    assert_refused(
        run("sample.py", "--base", models["base"], "--value", "none", "hello"), name, "not finite"
    )


def test_a_checkpoint_that_is_no_numbers_is_refused(train, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "describe", interrupted)
    assert train().returncode == 130
    put(tmp_path / "out" / runs.CHECKPOINT, "value.norm.weight", float("nan"))
    assert_refused(train(resume=True), runs.CHECKPOINT, "not finite")


def interrupted(*_):
    raise KeyboardInterrupt


# ---------------------------------------------------------------- a run knows itself


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"base": "value"}, "another base"),
        ({"value": "base"}, "another value"),
        ({"teacher": "base"}, "another teacher"),
        ({"full": True, "value": None}, "run = 'value', not 'full'"),
        ({"data": "other"}, "another chats"),
        ({"lr": 0.5}, "lr = 0.0001, not 0.5"),
        ({"dtype": "bfloat16"}, "dtype = 'float32', not 'bfloat16'"),
        ({"epochs": 2}, "epochs = 1, not 2"),
    ],
)
def test_resume_wants_the_same_run(
    train, models, chats_file, tmp_path, monkeypatch, changes, words
):
    with monkeypatch.context() as patch:
        patch.setattr(runs, "describe", interrupted)
        assert train().returncode == 130
    # as many chats, as many tokens
    other = tmp_path / "other.json"
    other.write_text(chats_file.read_text().replace("dog", "cat", 1))
    places = {"other": other, **models}
    changes = {name: places.get(word, word) for name, word in changes.items()}
    assert_refused(train(resume=True, **changes), words, "resume with the same")
    # the same under another name is the same
    shutil.move(models["base"], tmp_path / "moved")
    assert train(resume=True, base=tmp_path / "moved").returncode == 0


def test_a_checkpoint_of_other_shapes_is_refused(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(runs, "describe", interrupted)
        assert train().returncode == 130
    path = tmp_path / "out" / runs.CHECKPOINT
    whole = path.read_bytes()
    file = files.open_tensors(path)
    tensors = {key: file.get_tensor(key) for key in file.keys()}
    note = file.metadata()

    def resumed(**changes):
        files.save_tensors({**tensors, **changes}, path, note)
        return train(resume=True)

    # one number would be broadcast to all
    assert_refused(resumed(**{"value.norm.weight": torch.ones(1)}), "value.norm.weight", "(1,)")
    assert_refused(resumed(**{"exp_avg.norm.weight": torch.ones(1)}), "exp_avg.norm.weight")
    del tensors["exp_avg_sq.norm.weight"]
    assert_refused(resumed(), "exp_avg_sq.norm.weight", "missing")
    for step in ("0", "-1", "1000", "1e3", "٣", ""):
        path.write_bytes(whole)
        note["step"] = step
        assert_refused(resumed(), runs.CHECKPOINT, "holds step")
    note["step"], note["run"] = "1", "{oops"
    assert_refused(resumed(), runs.CHECKPOINT, "not valid JSON")


def test_a_log_of_somebody_else_is_left_alone(train, tmp_path):
    log = tmp_path / "out" / "log.jsonl"
    log.parent.mkdir()
    for line in ('{"level": "info"}', "[1]", "started", '{"run": "value", "step": -1}'):
        log.write_text(line + "\n")
        assert_refused(train(), "log.jsonl")
        assert log.read_text() == line + "\n"


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_who_is_asked_to_stop_saves_and_says_how_to_go_on(
    train, models, chats_file, tmp_path, which
):
    assert train(epochs=3, out=tmp_path / "straight").returncode == 0
    out = tmp_path / "out"
    words = ["--data", chats_file, "--out", out, "--epochs", 3]
    for name, directory in models.items():
        words += [f"--{name}", directory]
    command = [sys.executable, ROOT / "train.py", *map(str, words)]

    # it stops in the middle: it is asked when the log has its first step, and each step is slow
    slow = f"import time, runpy, sys; sys.argv = {[str(word) for word in command[1:]]!r}\n"
    slow += "import ivl; real = ivl.two_headed_loss\n"
    slow += "def two_headed_loss(*a): time.sleep(0.1); return real(*a)\n"
    slow += (
        "ivl.two_headed_loss = two_headed_loss; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    run = [sys.executable, "-c", slow]
    with subprocess.Popen(run, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        log = out / "log.jsonl"
        while not (log.exists() and '"loss"' in log.read_text()):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(which)
        _, said = process.communicate()
    assert process.returncode == 130 and "Traceback" not in said, said
    last = said.strip().splitlines()[-1]
    assert last.strip().startswith(f"python {ROOT}/train.py") and last.endswith("--resume"), said
    assert not (out / "model.safetensors").exists()

    assert train(epochs=3, resume=True).returncode == 0
    for name in ("model.safetensors", "log.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


# ---------------------------------------------------------------- the cache of tokenized chats


def test_a_damaged_cache_is_made_again(models, chats_file):
    tokenizer = Tokenizer(models["value"])
    right = tokenize(read_chats(chats_file), tokenizer, 200)
    (cached,) = dataset.CACHE.glob("*.safetensors")
    assert dataset.CACHE.stat().st_mode & 0o777 == 0o700  # other people's chats
    whole = cached.read_bytes()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    for damaged in (b"", whole[:-9], bytes(flipped)):
        cached.write_bytes(damaged)
        again = tokenize(read_chats(chats_file), tokenizer, 200)
        assert again.fingerprint() == right.fingerprint() and cached.read_bytes() == whole


# ---------------------------------------------------------------- many prompts


def test_a_prompt_that_does_not_fit_is_told_and_the_others_are_answered(run, models, tmp_path):
    prompts, replies = tmp_path / "prompts.txt", tmp_path / "replies.jsonl"
    prompts.write_text("hello you\n" + "hello " * 300 + "\nWho says\x0bwhat?\n")
    pair = ["--base", models["base"], "--value", models["value"]]
    words = ["--prompts", prompts, "--out", replies, "--max_new_tokens", 5]
    result = run("sample.py", *pair, *words)
    assert result.returncode == 2 and "1 of 3 prompts have no reply" in result.stderr
    first, second, third = map(json.loads, replies.read_text().splitlines())
    assert "the context is 256" in second["error"] and "reply" not in second
    assert third["prompt"] == "Who says\x0bwhat?"
    alone = run("sample.py", *pair, "--max_new_tokens", 5, "hello you")
    assert first["reply"] == alone.stdout.strip()


def test_a_long_prompt_leaves_the_others_their_room(run, models, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello you\n" + "hello " * 60 + "\n")
    pair = ["--base", models["base"], "--value", models["value"]]
    for directory in models.values():  # nothing ends a reply but its room
        change(directory / "config.json", eos_token_id=None)
        (directory / "tokenizer_config.json").write_text(
            json.dumps({"bos_token": "<s>", "chat_template": "{{ messages[0].content }}"})
        )
    counts = []
    for options in (["--batch_size", 1], ["--batch_size", 2]):
        result = run("sample.py", *pair, "--prompts", prompts, *options)
        counts.append([json.loads(line)["tokens"] for line in result.stdout.splitlines()])
    assert counts[0] == counts[1] and counts[0][0] > 200


# ---------------------------------------------------------------- strangers' templates

HOSTILE = {
    "loops without end": "{% for i in range(10**9) %}{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "division by zero": "{{ 1 / 0 }}",
    "types": "{{ messages + 1 }}",
    "another file": "{% include '/etc/passwd' %}",
    "Python's insides": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "nothing of that name": "{{ messages[0].content.missing.more }}",
    "private characters": "{% for m in messages %}{{ '\ufdd1' + m.content }}{% endfor %}",
    "generation in generation": "{% for m in messages %}{% generation %}{{ m.role }}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endgeneration %}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_one_line(models, name):
    (models["base"] / "chat_template.jinja").write_text(HOSTILE[name], encoding="utf-8")
    with pytest.raises(InputError, match="the chat template does not work"):
        Tokenizer(models["base"])


@pytest.mark.parametrize("template", [5, ["x"], [{"name": "default", "template": 5}], {"a": 1}])
def test_templates_of_other_types_are_one_line(models, template):
    change(models["base"] / "tokenizer_config.json", chat_template=template)
    if template == ["x"]:  # a list without a default is none at all
        assert Tokenizer(models["base"]).template == TEMPLATES["llama-2"]
        return
    with pytest.raises(InputError, match="chat"):
        Tokenizer(models["base"])


# ---------------------------------------------------------------- strangers' files

JSON = {
    "deep": "[" * 100_000,
    "digits": "1" + "0" * 5000,
    "half a character": '"\\ud800"',
    "no number": "NaN",
    "cut": '{"a": ',
}


@pytest.mark.parametrize("name", JSON)
def test_hostile_json_is_one_line(run, train, models, tmp_path, name):
    bad = tmp_path / "bad.json"
    bad.write_text(f'[{{"instruction": "a", "output": "b", "x": {JSON[name]}}}]')
    assert_refused(train(data=bad), "bad.json")
    bad = tmp_path / "bad.jsonl"
    good = '{"instruction": "a", "output": "b"}\n'
    bad.write_text(good + f'{{"instruction": "a", "output": "b", "x": {JSON[name]}}}\n')
    assert_refused(train(data=bad), "bad.jsonl, line 2")
    (models["value"] / "config.json").write_text(f'{{"vocab_size": {JSON[name]}}}')
    assert_refused(train(), "value/config.json")


@pytest.mark.parametrize(
    "field, value",
    [
        ("num_hidden_layers", 10**6),
        ("num_hidden_layers", True),
        ("vocab_size", 2**40),
        ("hidden_size", 2**24),
        ("hidden_size", 33),
        ("head_dim", 3),
        ("head_dim", 0),
        ("rope_theta", "abc"),
        ("rope_theta", [10000]),
        ("rope_parameters", [1]),
        ("rope_parameters", {"rope_type": ["llama3"]}),
        ("rope_parameters", {"rope_type": "linear", "factor": 0}),
        ("rms_norm_eps", "small"),
        ("max_position_embeddings", -5),
        ("tie_word_embeddings", "yes"),
        ("eos_token_id", "two"),
        ("eos_token_id", [1, None]),
        ("bos_token_id", 10**6),
        ("ivl_connection", 5),
    ],
)
def test_hostile_configurations_are_one_line(run, models, field, value):
    if field == "bos_token_id":
        (models["value"] / "tokenizer_config.json").unlink()
    change(models["value"] / "config.json", **{field: value})
    pair = ["--base", models["base"], "--value", models["value"]]
    assert_refused(run("sample.py", *pair, "hello"), str(models["value"]))


def test_missing_ids_are_none(models):
    change(models["base"] / "config.json", eos_token_id=[], bos_token_id=None)
    (models["base"] / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer(models["base"], "plain")
    assert tokenizer.bos is None and tokenizer.eos is None


@pytest.mark.parametrize("name", ["../base/model.safetensors", "/etc/passwd", "x.bin", 5, "a\0b"])
def test_an_index_leads_nowhere_else(models, name):
    (models["value"] / "model.safetensors").unlink()
    index = models["value"] / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(InputError, match="index.json"):
        load(models["value"])


def test_what_is_no_plain_file_is_refused_and_not_waited_for(run, train, models, tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert_refused(train(data=tmp_path / "pipe.jsonl"), "pipe.jsonl", "no plain file")
    (models["value"] / "model.safetensors").unlink()
    os.mkfifo(models["value"] / "model.safetensors")
    assert_refused(train(), "model.safetensors", "no plain file")
    assert_refused(train(data=tmp_path / "absent"), "cannot be read")
    assert_refused(train(data="a\0b"), "--data", "NUL")
    with pytest.raises(InputError, match="cannot be read"):
        files.read_text("a\0b")


def test_weights_that_are_twice_there_or_no_floats_are_named(models):
    path = models["value"] / "model.safetensors"
    file = files.open_tensors(path)
    tensors = {key: file.get_tensor(key) for key in file.keys()}
    whole_numbers = {**tensors, "model.norm.weight": torch.ones(16, dtype=torch.int32)}
    files.save_tensors(whole_numbers, path, {})
    with pytest.raises(InputError, match="model.norm.weight is of type I32"):
        load(models["value"])
    files.save_tensors(tensors, models["value"] / "a.safetensors", {})
    files.save_tensors(tensors, models["value"] / "b.safetensors", {})
    path.unlink()
    index = models["value"] / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    with pytest.raises(InputError, match="b.safetensors: tensor .* is in a.safetensors too"):
        load(models["value"])


# ---------------------------------------------------------------- options, streams, terminals


def test_more_tokens_than_the_context_are_refused(train):
    assert_refused(train(max_length=257), "--max_length = 257", "256")


def test_an_evaluation_of_the_base_alone_loads_it_once(train, monkeypatch):
    loads = []

    def loading(directory, *arguments, real=ranks.load):
        loads.append(Path(directory).name)
        return real(directory, *arguments)

    monkeypatch.setattr(ranks, "load", loading)
    result = train(value=None, out=None, epochs=None, evaluate=True)
    assert result.returncode == 0 and loads == ["base"], result.stderr


def test_an_empty_question_is_refused(run, models):
    pair = ["--base", models["base"], "--value", models["value"]]
    assert_refused(run("sample.py", *pair, "--raw", ""), "empty")
    for directory in models.values():  # no BOS either
        (directory / "tokenizer_config.json").write_text("{}")
        change(directory / "config.json", bos_token_id=None)
        change(
            directory / "tokenizer.json",
            normalizer={"type": "Strip", "strip_left": True, "strip_right": True},
            post_processor=None,
        )
    assert_refused(run("sample.py", *pair, "--raw", " "), "the prompt is empty")


def shell(line: str, **environment) -> subprocess.CompletedProcess:
    """A command line in a shell, in which `python` is this one."""
    line = line.replace("python sample.py", f"{sys.executable} sample.py")
    variables = {**os.environ, **environment}
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, cwd=ROOT, env=variables, timeout=300
    )


def test_streams_that_are_closed_full_or_of_few_letters(models):
    pair = f"--base {models['base']} --value {models['value']} --max_new_tokens 4"
    chat = f"python sample.py {pair}"
    closed = shell(f"{chat} <&-")
    assert closed.returncode == 0 and not closed.stderr, closed.stderr
    full = shell(f"{chat} hello > /dev/full")
    assert full.returncode == 2 and full.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in full.stderr and "Exception" not in full.stderr
    ascii_only = shell(f"{chat} --raw 'the cat ☺'", PYTHONIOENCODING="ascii")
    assert ascii_only.returncode == 0 and "\\u263a" in ascii_only.stdout, ascii_only.stderr
    # a line that is no text ends neither the chat nor the answers
    lines = shell(f"printf 'hello\\n\\xff\\xfe\\nhello\\n' | {chat}")
    assert lines.returncode == 0 and lines.stderr.count("tok/s") == 2, lines.stderr
    assert "error: " in lines.stderr


def test_control_characters_are_seen_not_obeyed():
    assert files.visible("a\x1b[2Jb\x07\x9bc\u202e") == "a\\x1b[2Jb\\x07\\x9bc\\u202e"
    assert files.visible("é\n\t中👩‍👧") == "é\n\t中👩‍👧"


def test_a_chat_says_what_it_forgets(run, models):
    pair = ["--base", models["base"], "--value", models["value"], "--max_new_tokens", 20]
    result = run("sample.py", *pair, stdin="hello you\n" * 12)
    assert result.returncode == 0 and result.stderr.count("tok/s") == 12
    assert "the first 2 messages are not read" in result.stderr


def test_a_default_reply_length_does_not_make_a_chat_forget_at_once(run, models):
    pair = ["--base", models["base"], "--value", models["value"], "--top_k", 1]
    result = run("sample.py", *pair, stdin="hello you\n")
    assert "not read" not in result.stderr  # 512 tokens are asked for, of a context of 256


def test_the_source_runs_nothing_from_a_file():
    """No pickle, no eval, no exec; the sandbox is there to run programs."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "extras").glob("*.py")]:
        text = path.read_text()
        names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
        assert not names & {"eval", "exec"} or path.name == "sandbox.py", path.name
        for word in ("pickle", "torch.load(", "marshal"):
            uses = [line for line in text.splitlines() if word in line]
            told = [line for line in uses if "pickle file" in line]
            assert uses == told, f"{path.name}: {uses}"


# ---------------------------------------------------------------- what reviewers found


def test_a_wish_to_stop_is_heard_once_and_where_nobody_listens(monkeypatch):
    """torchrun passes a signal on, which comes twice; and `| tee log` dies of the same Ctrl-C."""

    class Gone:
        def write(self, _):
            raise BrokenPipeError

        flush = write

    monkeypatch.setattr(sys, "stderr", Gone())
    with runs.Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        monkeypatch.setattr(runs, "TWICE", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)


def test_saving_does_not_mind_what_a_process_of_the_same_number_has_left(train, tmp_path):
    """In a container a script has the same number each time."""
    assert train().returncode == 0
    weights.temporary_for(tmp_path / "out" / "model").mkdir()
    assert train().returncode == 0


def test_a_swap_that_cannot_succeed_is_not_begun(train, tmp_path):
    out = tmp_path / "out"
    assert train().returncode == 0
    before = (out / "model.safetensors").read_bytes()
    (out / "chat_template.jinja").mkdir()
    (out / "tokenizer_notes.txt").write_text("mine")
    assert_refused(train(lr=1e-2), "chat_template.jinja", "folder")
    assert (out / "model.safetensors").read_bytes() == before and (out / "config.json").exists()
    (out / "chat_template.jinja").rmdir()
    assert train(lr=1e-2, resume=True).returncode == 0
    assert (out / "tokenizer_notes.txt").read_text() == "mine"


def test_a_run_that_fails_at_once_leaves_the_log_of_the_model_that_stands(
    train, tmp_path, monkeypatch
):
    assert train().returncode == 0
    log = (tmp_path / "out" / "log.jsonl").read_text()
    monkeypatch.setattr(trainer, "held_out_loss", lambda *_: float("nan"))
    assert_refused(train(), "held-out loss of nan")
    assert (tmp_path / "out" / "log.jsonl").read_text() == log
    assert_refused(train(out=None, epochs=None, evaluate=True), "the loss is nan")


def test_a_model_that_reads_a_base_is_no_base(run, train, models, tmp_path):
    change(models["value"] / "config.json", ivl_connection="cascade")
    assert_refused(train(base=models["value"], value=None), "beside a base")
    assert_refused(train(value=None, teacher=models["value"]), "beside a base")
    alone = ["--base", models["value"], "--value", "none", "hello"]
    assert_refused(run("sample.py", *alone), "beside a base")
    proxy = ["--base", models["base"], "--value", models["base"], models["value"]]
    assert_refused(run("sample.py", *proxy, "hello"), "of several value models", "cascade")


def test_looking_at_chats_loads_no_model(train, monkeypatch):
    monkeypatch.setattr(ranks, "load", lambda *_: pytest.fail("a model is loaded"))
    assert train(out=None, epochs=None, show=1).returncode == 0
    assert_refused(train(data="absent.json"), "absent.json")  # told before models are loaded
    assert_refused(train(out=None, epochs=None, show=1, compile=True), "--show and --compile")


def test_prompts_may_be_packed_and_what_is_answered_is_kept(run, models, tmp_path, monkeypatch):
    import gzip

    prompts, replies = tmp_path / "prompts.jsonl.gz", tmp_path / "replies.jsonl"
    with gzip.open(prompts, "wt") as file:
        file.write('{"prompt": "hello you"}\n{"prompt": "Where is the dog?"}\n')
    pair = ["--base", models["base"], "--value", models["value"], "--max_new_tokens", 3]
    words = ["--prompts", prompts, "--out", replies, "--batch_size", 1]
    assert run("sample.py", *pair, *words).returncode == 0
    asked = [json.loads(line)["prompt"] for line in replies.read_text().splitlines()]
    assert asked == ["hello you", "Where is the dog?"]

    calls = []

    def stopped(speaker, prompts, *how, real=Speaker.replies):
        calls.append(prompts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(speaker, prompts, *how)

    monkeypatch.setattr(Speaker, "replies", stopped)
    assert run("sample.py", *pair, *words).returncode == 130
    first, second = map(json.loads, replies.read_text().splitlines())
    assert "reply" in first and second["error"] == "stopped before its turn"


def test_replies_do_not_go_into_a_model(run, models):
    pair = ["--base", models["base"], "--value", models["value"]]
    prompts = models["base"] / "prompts.txt"
    prompts.write_text("hello\n")
    config = (models["value"] / "config.json").read_text()
    words = ["--prompts", prompts, "--out", models["value"] / "config.json"]
    assert_refused(run("sample.py", *pair, *words), "part of a model")
    assert (models["value"] / "config.json").read_text() == config


@pytest.mark.parametrize("device", ["meta", "hpu", "cuda:x", "cuda:"])
def test_devices_that_cannot_be_meant_are_one_line(train, device):
    assert_refused(train(device=device), f"--device {device}")


def test_a_file_without_a_hash_is_no_file_of_ours(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors", {"format": "x"})
    with pytest.raises(InputError, match="damaged"):
        files.verify(files.open_tensors(tmp_path / "a.safetensors"), tmp_path / "a.safetensors")


def test_outputs_that_are_there_already_are_replaced_but_no_part_of_a_model(
    run, models, tmp_path, monkeypatch
):
    pair = ["--base", models["base"], "--value", models["value"]]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hello\n")
    here = ROOT / ".replies.jsonl"  # in the folder in which the scripts run
    here.write_text("old")
    try:
        words = ["--prompts", prompts, "--out", here.name, "--max_new_tokens", 2]
        assert run("sample.py", *pair, *words).returncode == 0
        assert json.loads(here.read_text())["prompt"] == "hello"
    finally:
        here.unlink()
    text = tmp_path / "text.txt"
    text.write_text("The cat sat.\n\nThe dog sat.\n")
    same = ["--text", text, "--out", tmp_path / "map"]
    for words in (["--out", text], ["--json", text], ["--out", "m", "--json", "m"]):
        refused = run("vocab_map.py", *pair, *same, *words)
        assert_refused(refused, "are the same", "would be overwritten")
    for option, name in (("--out", "model.safetensors"), ("--json", "config.json")):
        target = models["value"] / name
        before = target.read_bytes()
        assert_refused(
            run("vocab_map.py", *pair, "--text", text, option, target), "part of a model"
        )
        assert target.read_bytes() == before


def test_a_link_stays_a_link_and_a_device_a_device(run, models, tmp_path):
    pair = ["--base", models["base"], "--value", models["value"], "--max_new_tokens", 2]
    (tmp_path / "target.html").write_text("old")
    (tmp_path / "link.html").symlink_to("target.html")
    assert run("sample.py", *pair, "--html", tmp_path / "link.html", "hello").returncode == 0
    assert (tmp_path / "link.html").is_symlink()
    assert "</html>" in (tmp_path / "target.html").read_text()
    assert_refused(run("sample.py", *pair, "--html", "/dev/stdout", "hello"), "/dev/stdout")
    # a file that a model does not have, but would read
    page = models["value"] / "chat_template.jinja"
    assert_refused(run("sample.py", *pair, "--html", page, "hello"), "part of a model")
    assert not page.exists()


def test_a_core_is_left_to_others():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        files.spare_a_core(torch.device("cuda"))
        assert torch.get_num_threads() == 3
        for left in (2, 1, 1):
            files.spare_a_core(torch.device("cpu"))
            assert torch.get_num_threads() == left
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("capability, name", [((7, 5), "float32"), ((8, 0), "bfloat16")])
def test_bfloat16_only_where_a_gpu_computes_in_it(monkeypatch, capability, name):
    """A T4 would emulate it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_dtype("auto", torch.device("cuda")) == getattr(torch, name)
    assert pick_dtype("bfloat16", torch.device("cuda")) == torch.bfloat16
