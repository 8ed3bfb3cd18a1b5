"""Every option of the scripts takes effect or is refused: none is ignored."""

import argparse
import json
import shutil
import sys

import pytest
import torch
from conftest import make_directory

import extras.rehearse
import sample
import train as trainer
from experiments import toy
from model import Llama
from plumbing import pair
from plumbing.files import InputError


def actions(script, monkeypatch) -> list[argparse.Action]:
    """All options of a script, as its parser has them."""
    parsers = []

    class Stop(Exception):
        pass

    def parse_args(parser, *_):
        parsers.append(parser)
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        with pytest.raises(Stop):
            script.arguments([])
    return [action for action in parsers[0]._actions if action.dest != "help"]


def covered(script, examples: dict, monkeypatch) -> None:
    """An option that is new must come with an example."""
    assert {action.dest for action in actions(script, monkeypatch)} == set(examples)


def differs(run, plain: list, example: list) -> str:
    """What an option does: "effect", "refused", or "nothing"."""
    try:
        changed = run([*plain, *example])
    except InputError:
        return "refused"
    return "nothing" if changed == run(plain) else "effect"


# ---------------------------------------------------------------- train.py

TRAIN = {
    "base": ["--base", "BASE", "VALUE"],
    "value": ["--value", "VALUE"],
    "random": ["--random"],
    "connection": ["--connection", "cascade"],
    "data": ["--data", "OTHER"],
    "teacher": ["--teacher", "BASE"],
    "chosen": ["--chosen"],
    "show": ["--show", "2"],
    "out": ["--out", "ELSEWHERE"],
    "full": ["--full"],
    "evaluate": ["--evaluate"],
    "dry_run": ["--dry-run"],
    "template": ["--template", "llama-2"],
    "lr": ["--lr", "0"],
    "batch_size": ["--batch_size", "3"],
    "micro_batch_size": ["--micro_batch_size", "1"],
    "epochs": ["--epochs", "1"],
    "max_length": ["--max_length", "60"],
    "lam": ["--lam", "0"],
    "norm_over": ["--norm_over", "all"],
    "seed": ["--seed", "7"],
    "resume": ["--resume"],
    "save_every": ["--save_every", "7"],
    "keep": ["--keep", "best"],
    "checkpointing": ["--checkpointing"],
    "compile": ["--compile"],
    "device": ["--device", "cuda:99"],
    "dtype": ["--dtype", "bfloat16"],
    "base_dtype": ["--base_dtype", "int8"],
}


@pytest.fixture
def train_calls(base_dir, value_dir, chats_file, tmp_path, monkeypatch):
    """Runs train.py up to its calls of `train` and `held_out_loss`, and tells all about them."""
    monkeypatch.setattr("plumbing.dataset.CACHE", tmp_path / "cache")
    other = tmp_path / "other.json"
    other.write_text(chats_file.read_text().replace("mat", "floor"))
    places = {
        "BASE": base_dir,
        "VALUE": value_dir,
        "CHATS": chats_file,
        "OTHER": other,
        "ELSEWHERE": tmp_path / "elsewhere",
        "OUT": tmp_path / "out",
    }
    calls = []

    def told_of(value) -> dict:
        return {
            "class": type(value).__name__,
            "checkpointing": value.checkpointing,
            "compiled": value.blocks[0]._compiled_call_impl is not None,
            "weights": float(sum(p.detach().double().sum() for p in value.parameters())),
        }

    def train(
        bases,
        value,
        chats,
        settings,
        out,
        *,
        batch_loss,
        measure,
        watch,
        machine,
        autocast,
        **others,
    ):
        base = bases.at(0, 1)
        losses = {"run": others["name"], "held_out_loss": 2.0, "base_alone": 3.0}
        lines = [json.dumps({**losses, "step": 0, "done": done}) + "\n" for done in (0, 1)]
        (out / "log.jsonl").write_text("".join(lines))
        calls.append(
            {
                "bases": len(bases.loads),
                "base": None if base is None else (type(base).__name__, base.unembed.dtype),
                "value": told_of(value),
                "chats": (type(chats).__name__, chats.report, chats.ids.tolist()),
                "settings": vars(settings),
                "out": str(out),
                "loss": getattr(batch_loss, "func", batch_loss).__name__,
                "measure": getattr(measure, "func", measure).__name__,
                "autocast": type(autocast).__name__,
                **others,
            }
        )

    def held_out_loss(base, value, chats, rows, size, autocast, machine):
        models = [told_of(model) for model in (base, value) if model is not None]
        calls.append((models, chats.ids.tolist(), rows, size, type(autocast).__name__))
        return 1.0

    def rehearse(chats, batches, held_rows, micro_batch_size, step, look, device):
        calls.append(("rehearsed", len(batches)))
        return 1.0, 1.0

    monkeypatch.setattr(trainer, "train", train)
    monkeypatch.setattr(trainer, "held_out_loss", held_out_loss)
    monkeypatch.setattr(trainer, "save_model", lambda *_: None)
    monkeypatch.setattr(extras.rehearse, "rehearse", rehearse)
    monkeypatch.setitem(sys.modules, "extras.curve", None)  # there is nothing to draw

    def run(argv: list[str]) -> list:
        calls.clear()
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        monkeypatch.setattr(sys, "argv", ["train.py", *(str(places.get(x, x)) for x in argv)])
        trainer.main()
        return list(calls)

    return run


@pytest.mark.parametrize("option", TRAIN)
def test_training(train_calls, option, monkeypatch):
    covered(trainer, TRAIN, monkeypatch)
    plain = ["--base", "BASE", "--data", "CHATS", "--out", "OUT"]
    assert differs(train_calls, plain, TRAIN[option]) != "nothing"
    full = [*plain, "--full"]
    if option not in ("base", "full"):
        assert differs(train_calls, full, TRAIN[option]) != "nothing"
    measured = ["--base", "BASE", "--value", "VALUE", "--data", "CHATS", "--evaluate"]
    if option not in ("value", "evaluate"):
        assert differs(train_calls, measured, TRAIN[option]) != "nothing"


def test_hyphens_are_underscores(train_calls):
    plain = ["--base", "BASE", "--data", "CHATS", "--out", "OUT"]
    hyphens = train_calls([*plain, "--micro-batch-size=1", "--norm-over", "all"])
    assert hyphens == train_calls([*plain, "--micro_batch_size", "1", "--norm_over=all"])
    assert hyphens != train_calls(plain)


@pytest.mark.parametrize("option", TRAIN)
def test_the_toy(train_calls, option, base_dir, tmp_path, monkeypatch):
    if option == "base":
        pytest.skip("with it there is no toy")

    def make_family(out, seed, device, family="a"):
        for name in ("small", "large"):
            shutil.copytree(base_dir, out / name, dirs_exist_ok=True)
        chats = [
            {"instruction": f"Where is cat {i} of {seed}?", "output": "On it."} for i in range(9)
        ]
        (out / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))

    monkeypatch.setattr(toy, "make_family", make_family)
    monkeypatch.setattr(toy, "table", lambda args: None)
    monkeypatch.setattr(toy, "OUT", tmp_path / "out")

    def run(argv: list[str]) -> list:
        calls = train_calls(argv)
        assert len(calls) == (3 if "--resume" not in argv else len(calls))
        return calls

    if option == "resume":  # there is nothing to go on with: it begins anew, as often as it likes
        assert train_calls(TRAIN[option])[0]["resume"] is False
        (tmp_path / "out" / "value").mkdir(exist_ok=True)
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
        (tmp_path / "out" / "value" / "checkpoint.safetensors").touch()
        assert train_calls(TRAIN[option])[0]["resume"] is True
        (tmp_path / "out" / "small-full").mkdir(exist_ok=True)
        done = "```json\n" + json.dumps({"lr": 1e-3, "seed": 0}) + "\n```\n"
        (tmp_path / "out" / "small-full" / "README.md").write_text(done)
        assert len(train_calls(TRAIN[option])) == 2
        # without it, what can be gone on with is not overwritten
        with pytest.raises(InputError, match="go on with --resume"):
            train_calls([])
        assert (tmp_path / "out" / "small-full" / "README.md").exists()
        with pytest.raises(InputError, match="was made with lr = 0.001, not 0.5"):
            train_calls(["--resume", "--lr", "0.5"])
        return
    assert differs(run, [], TRAIN[option]) != "nothing"


def test_zero_is_a_number_on_the_toy_too(train_calls, base_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "table", lambda args: None)
    monkeypatch.setattr(toy, "OUT", tmp_path / "out")
    monkeypatch.setattr(
        toy, "BASES", {name: (16, 16, 1, 1, 1e-3, 5000, 0.5) for name in ("small", "large")}
    )
    assert train_calls([])[0]["settings"]["lam"] == 0.1
    assert train_calls(["--lam", "0"])[0]["settings"]["lam"] == 0.0


# ---------------------------------------------------------------- sample.py

SAMPLE = {
    "question": ["Who is the cat?"],
    "base": ["--base", "OTHER"],
    "value": ["--value", "none"],
    "draft": ["--draft", "BASE"],
    "map": ["--map", "OUT"],
    "template": ["--template", "llama-2"],
    "explain": ["--explain"],
    "html": ["--html", "OUT"],
    "compare": ["--compare", "OTHER"],
    "raw": ["--raw"],
    "system": ["--system", "You are a cat."],
    "alpha": ["--alpha", "0"],
    "temperature": ["--temperature", "0.7"],
    "top_k": ["--top_k", "3"],
    "top_p": ["--top_p", "0.5"],
    "seed": ["--seed", "7"],
    "stop": ["--stop", "\x02"],  # the text of the id that is said below
    "max_new_tokens": ["--max_new_tokens", "2"],
    "prompts": ["--prompts", "PROMPTS"],
    "out": ["--out", "OUT"],
    "batch_size": ["--batch_size", "1"],
    "device": ["--device", "cuda:99"],
    "drafted": ["--drafted", "3"],
    "dtype": ["--dtype", "bfloat16"],
    "base_dtype": ["--base_dtype", "int8"],
}


@pytest.fixture
def sample_calls(base_dir, value_dir, tmp_path, monkeypatch, capsys):
    """Runs sample.py's main, and tells how it called `generate` and what it printed and wrote."""
    other = make_directory(tmp_path / "other", seed=9)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Where is the cat?\nWho?\n")
    out = tmp_path / "out" / "file"
    places = {"BASE": base_dir, "VALUE": value_dir, "OTHER": other, "PROMPTS": prompts, "OUT": out}
    calls = []

    def generate(base, values, prompts, max_new_tokens, rounds, **options):
        drafts = getattr(rounds, "__self__", None)
        models = [
            (
                type(model).__name__,
                model.unembed.dtype,
                "hidden" in vars(model),
                float(model.unembed.detach().to(torch.float64).sum()),
            )
            for model in [base, *values, *([drafts.draft] if drafts else [])]
        ]
        options["drafted"] = drafts.drafted if drafts else 0
        options = {name: str(option) for name, option in options.items()}
        calls.append((models, prompts, max_new_tokens, options))
        yield [5] * len(prompts)
        yield [2] * len(prompts)

    monkeypatch.setattr(pair, "generate", generate)
    monkeypatch.setattr(pair, "column_major", lambda model: model)
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(EOFError))

    def run(argv: list[str]) -> tuple:
        calls.clear()
        shutil.rmtree(out.parent, ignore_errors=True)
        monkeypatch.setattr(sys, "argv", ["sample.py", *(str(places.get(x, x)) for x in argv)])
        sample.main()
        written = out.read_text() if out.exists() else None
        return list(calls), capsys.readouterr().out, written

    return run


@pytest.mark.parametrize("option", SAMPLE)
def test_sampling(sample_calls, option, monkeypatch):
    covered(sample, SAMPLE, monkeypatch)
    pair = ["--base", "BASE", "--value", "VALUE"]
    asked = [*pair, "Where?"]
    if option != "question":
        assert differs(sample_calls, asked, SAMPLE[option]) != "nothing"
        alone = ["--base", "BASE", "--value", "none", "Where?"]
        if option != "value":
            assert differs(sample_calls, alone, SAMPLE[option]) != "nothing"
        drafted = [*pair, "--draft", "OTHER", "Where?"]
        assert differs(sample_calls, drafted, SAMPLE[option]) != "nothing"
    if option != "prompts":
        many = [*pair, "--prompts", "PROMPTS"]
        assert differs(sample_calls, many, SAMPLE[option]) != "nothing"
    if option in ("question", "prompts", "raw", "explain", "html", "out", "batch_size"):
        assert differs(sample_calls, pair, SAMPLE[option]) != "nothing"


def test_models_are_llamas_where_nothing_else_is_asked_for(sample_calls):
    ((models, *_),) = sample_calls(["--base", "BASE", "--value", "VALUE", "Where?"])[0]
    assert [name for name, *_ in models] == [Llama.__name__] * 2
