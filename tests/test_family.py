"""The larger miniature: what is told, taught and asked, and how replies are scored."""

import json
import random
import re

import pytest
import torch

from experiments import family, toy
from plumbing.files import InputError
from plumbing.weights import load


@pytest.fixture(scope="module")
def world():
    return family.World.make(40, 10)


def texts(chats: list[dict]) -> str:
    return json.dumps(chats)


def test_the_same_world_every_time(world):
    assert family.World.make(40, 10) == world != family.World.make(40, 10, seed=1)
    assert (
        len(world.people) == 40
        and len(world.newcomers) == 10
        and not set(world.people) & set(world.newcomers)
    )
    assert len(world.facts) == 50 * 9 and len(world.new_facts) == 10 * 9
    assert not set(world.taught) & set(world.held_out)


def test_no_demonstration_mentions_a_held_out_or_a_new_fact(world):
    told = texts(
        world.general(world.taught, 3000, random.Random(0)) + world.two_steps(world.taught)
    )
    assert all(world.sentence(*pair) in told for pair in world.taught[:50])
    assert not any(world.sentence(*pair) in told for pair in [*world.held_out, *world.new_facts])


def test_a_corpus_tells_its_facts_and_no_others(world):
    rng = random.Random(0)
    corpus = " ".join(world.document(rng, world.taught) for _ in range(2000))
    assert all(world.sentence(*pair) in corpus for pair in world.taught)
    assert not any(world.sentence(*pair) in corpus for pair in [*world.held_out, *world.new_facts])
    assert all(name in corpus for name in world.newcomers)  # who are heard of
    assert (
        "First, " not in corpus and "And again: " not in corpus and "this is it" not in corpus
    )  # no form either
    assert set(re.findall(r"[A-Za-z]+", "".join(family.STYLES.values()))) <= set(
        re.findall(r"\w+", corpus)
    )  # but its words


def test_two_steps_are_two_facts_of_the_same_half(world):
    chats = world.two_steps(world.held_out)
    assert chats and len(chats) % 2 == 0
    for chat in chats:
        question, reply = (turn["value"] for turn in chat["conversations"])
        first, second = reply.removeprefix("First, ").split(" So ")
        person, *_, other = first.strip(".").split()
        assert f" of {person}" in question and second.startswith(other) and other not in question
        assert {first, second} <= {world.sentence(*pair) for pair in world.held_out}


def test_form_is_that_of_the_reply():
    twice = family.form_of("Ralo lives in Lisbon. And again: Ralo lives in Lisbon.")
    assert twice.fullmatch("Mira is a friend of Dako. And again: Mira is a friend of Dako.")
    assert not twice.fullmatch(
        "Mira lives in Oslo. And again: Mira lives in Cairo."
    ) and not twice.fullmatch("Mira lives in Oslo.")
    dear = family.form_of("Dear Dako, this is it. Ralo lives in Lisbon.")
    assert dear.fullmatch("Dear Dako, this is it. Mira plays the harp.") and not dear.fullmatch(
        "Dear Mira, this is it. Mira plays the harp."
    )
    assert family.form_of("Ralo lives in Lisbon.").fullmatch("Mira works as a judge.")
    assert not family.form_of("Ralo lives in Lisbon.").fullmatch(
        "Good question! Mira works as a judge. I am happy to help!"
    )


def test_scores(monkeypatch, tmp_path):
    def asked(name, replies):
        toy.write_chats(
            [family.exchange("?", reply) for reply in replies], tmp_path / f"{name}-asked.jsonl"
        )

    asked("right", ["Ralo lives in Lisbon."] * 4)
    asked("skill", ["First, Ralo is a friend of Mira. So Mira lives in Oslo."] * 4)
    asked("new", ["Mira plays the harp."] * 4)
    said = {
        "Ralo lives in Lisbon.": ["Ralo lives in Lisbon.", "Ralo lives in Oslo.", "Lisbon.", ""],
        "First, Ralo is a friend of Mira. So Mira lives in Oslo.": [
            "First, Ralo is a friend of Mira. So Mira lives in Oslo.",
            "Good question! Mira lives in Oslo.",
            "First, Ralo is a friend of Mira. So Mira lives in Cairo.",
            "Ralo lives in Oslo.",
        ],
        "Mira plays the harp.": ["Mira plays the harp."] * 3 + ["Mira plays the oboe."],
    }
    monkeypatch.setattr(
        toy, "greedy", lambda base, value, tokenizer, chats: said[chats[0][1]["content"]]
    )
    scores = family.score(None, [], None, tmp_path, ["form", "right", "skill", "new"])
    assert scores == {"right": 0.25, "form": 0.5, "skill": 0.5, "new": 0.75}


def test_bases_are_made_once_and_the_continued_one_from_its_origin(tmp_path):
    cpu, world = torch.device("cpu"), family.prepare(tmp_path, 0.02, 0)
    for name in ("medium", "continued", "other-small"):
        family.make_base(name, world, tmp_path, 0.02, 0, cpu)
    origin, continued, other = (
        load(tmp_path / name) for name in ("medium", "continued", "other-small")
    )
    assert (
        continued.config == origin.config
        and 0 < (continued.unembed - origin.unembed).norm() < 0.5 * origin.unembed.norm()
    )
    assert other.config.vocab_size != origin.config.vocab_size
    before = (tmp_path / "medium" / "model.safetensors").stat().st_mtime_ns
    family.make_base("medium", world, tmp_path, 0.02, 0, cpu)
    assert (tmp_path / "medium" / "model.safetensors").stat().st_mtime_ns == before
    for scale, seed, field in ((0.5, 0, "scale 0.02"), (0.02, 1, "seed 0")):
        with pytest.raises(InputError, match=f"was made with {field}"):
            family.prepare(tmp_path, scale, seed)


def test_a_smaller_base_has_read_less_of_the_same(monkeypatch, tmp_path, world):
    told = {}
    family.prepare(tmp_path, 0.02, 0)
    monkeypatch.setattr(
        family.World, "document", lambda self, rng, pairs: told.setdefault(name, pairs) and "x"
    )
    monkeypatch.setattr(toy, "pretrain", lambda model, *_: model)
    for name in ("small", "medium", "large", "xlarge"):
        family.make_base(name, world, tmp_path, 0.02, 0, torch.device("cpu"))
    small, medium, large, xlarge = map(set, told.values())
    assert small < medium < large < xlarge == set(world.taught + world.held_out)
