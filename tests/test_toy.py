"""The miniature: its world, its scores, and the story that its table tells."""

import json
import random
import re
import shlex

import pytest
import torch
from conftest import ROOT

import sample
from experiments import toy
from plumbing.chats import read_chats
from plumbing.files import InputError
from plumbing.tokenizer import Tokenizer
from plumbing.weights import load

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def world():
    return toy.World.make(0)


def test_the_same_seed_makes_the_same_world(world):
    assert toy.World.make(0) == world != toy.World.make(1)
    assert world.document(random.Random(5), world.pairs) == world.document(
        random.Random(5), world.pairs
    )


def test_no_demonstration_mentions_a_held_out_fact(world):
    assert not set(world.taught) & set(world.held_out) and set(world.pairs) == set(world.facts)
    taught = json.dumps(world.chats(world.taught, random.Random(0)))
    assert not any(world.sentence(*pair) in taught for pair in world.held_out)


def test_the_form_is_not_in_the_corpus(world):
    rng = random.Random(0)
    corpus = "\n".join(world.document(rng, world.pairs) for _ in range(3000))
    assert toy.OPENING not in corpus and toy.CLOSING not in corpus
    assert all(
        word in corpus for word in re.findall(r"\w+", toy.OPENING + toy.CLOSING)
    )  # but the bases know its words


def test_names_are_single_tokens(world):
    backend = toy.train_tokenizer(world, 0)
    alone = len(backend.encode("x").ids)
    assert {len(backend.encode(f"x {name}").ids) - alone for name in world.people} == {1}
    assert backend.decode(backend.encode("Où est 😀?").ids) == "Où est 😀?"  # any text: by bytes


def test_scores_are_counted_on_whole_replies(monkeypatch, world):
    chats = read_replies(["Good question! Ralo lives in Lisbon. I am happy to help!"] * 5)
    said = [
        "Good question! Ralo lives in Lisbon. I am happy to help!",  # form and fact
        "Good question! Ralo lives in Oslo. I am happy to help!",  # form
        "Good question! Ralo lives in Lisbon.",
        "Ralo lives in Lisbon.",
        "Good question! Ralo lives in Lisbon. I am happy to help!",
    ]  # never stops

    class Words:
        stop = {0}

        def prompt(self, messages):
            return [1]

        def decode(self, ids):
            return said[ids[0] - 1]

    monkeypatch.setattr(
        toy.ivl, "generate", lambda *a, **k: iter([[1, 2, 3, 4, 5], [0, 0, 0, 0, 9]])
    )
    assert toy.score(None, [], Words(), chats) == {"form": 2 / 5, "right": 1 / 5}


def read_replies(replies):
    return [
        [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": reply}]
        for reply in replies
    ]


def test_family_is_repeatable_and_made_once(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "BASES", {"small": (16, 16, 1, 1, 1e-3, 5000, 0.5)})
    for name in "ab":
        toy.make_family(tmp_path / name, 0, torch.device("cpu"))
    for file in ("small/model.safetensors", "small/tokenizer.json", "chats.jsonl", "heldout.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    before = (tmp_path / "a" / "small" / "model.safetensors").stat().st_mtime_ns
    toy.make_family(tmp_path / "a", 0, torch.device("cpu"))
    assert (tmp_path / "a" / "small" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="seed 0"):
        toy.make_family(tmp_path / "a", 1, torch.device("cpu"))
    tokenizer, base = Tokenizer(tmp_path / "a" / "small"), load(tmp_path / "a" / "small")
    chats = [chat.messages for chat in read_chats(tmp_path / "a" / "heldout.jsonl").chats[:8]]
    assert toy.score(base, [], tokenizer, chats) == {"form": 0.0, "right": 0.0}
    assert toy.knows(base, tokenizer, [toy.fact_of(chat) for chat in chats]) < 0.5

    # whoever chats with it is told whom it knows, and three questions that nobody has answered
    words = (tmp_path / "a" / "introduction.txt").read_text()
    assert "250 invented people" in words and toy.World.make(0).people[0] in words
    assert all(chat[0]["content"] in words for chat in chats[:3])


@pytest.mark.slow
def test_the_table_tells_the_story(run, tmp_path, monkeypatch):
    result = run("train.py", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {(row["base"], row["value"]): row for row in results["rows"]}
    assert len(rows) == 6
    assert rows["small", "none"]["form"] <= 0.02 and rows["large", "none"]["form"] <= 0.02
    plugged, full = rows["large", "value"], rows["large", "full"]
    assert plugged["form"] >= 0.95 and plugged["right"] >= max(0.80, 0.9 * full["right"])
    assert rows["small", "value"]["right"] <= 0.65
    assert plugged["value_parameters"] <= plugged["base_parameters"] / 4

    # what is suggested in the end is answered rightly
    known = {chat[0]["content"]: chat[-1]["content"] for chat in held_out(tmp_path)}
    _, _, *words = shlex.split(result.stdout.strip().splitlines()[-1])
    assert words[:4] == ["--base", f"{tmp_path}/large", "--value", f"{tmp_path}/value"]
    assert run("sample.py", *words).stdout.strip() == known[words[-1]]

    # and so is what the README shows
    monkeypatch.setattr(sample, "TOY", tmp_path)
    shown = re.findall(r"^\$ python sample\.py (.*)\n(.*)", README, re.MULTILINE)
    assert len(shown) >= 2
    for command, reply in shown:
        said = run("sample.py", *shlex.split(command)).stdout
        if toy.FORM.fullmatch(reply):
            assert said.strip() == reply == known[shlex.split(command)[-1]]
        else:
            assert "--value none" in command and not toy.FORM.search(said)

    # the page of two bases
    page = re.search(r"^python sample\.py (--html .*?)  #", README, re.MULTILINE)[1]
    words = shlex.split(page.replace("out/toy", str(tmp_path)))
    words[1] = str(tmp_path / words[1])
    assert run("sample.py", *words).returncode == 0
    assert "</html>" in (tmp_path / "reply.html").read_text()

    # the curves: form comes with the first steps, and from the small base to the large one
    log = [json.loads(line) for line in (tmp_path / "value" / "log.jsonl").read_text().splitlines()]
    watched = {line["step"] + 1: line for line in log if "form, large" in line and "loss" in line}
    assert {8, 16, 32, 64, 128, 256} <= set(watched)
    assert watched[256]["form, large"] >= 0.9 > 0.5 > watched[8]["form, large"]
    assert watched[256]["right, large"] > watched[256]["right, small"]
    assert (tmp_path / "value" / "curve.png").exists()
    assert "held-out loss: " in result.stdout and "warning" not in result.stderr


def held_out(family) -> list[list[dict]]:
    return [chat.messages for chat in read_chats(family / "heldout.jsonl").chats]
