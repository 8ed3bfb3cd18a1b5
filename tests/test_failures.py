"""Replies that fail: what kind each is, and that the first of a kind is shown with its tokens."""

import re

import torch
from conftest import assert_refused

from experiments import failures, family, reproduce, toy
from extras.connections import Probe
from plumbing.runs import save_model
from plumbing.weights import read_config
from train import Settings


def test_kinds_in_every_form():
    for style, form in family.STYLES.items():
        right = form.format("Ralo likes soup.", "Mira")
        kinds = {
            text: failures.kind_of(form.format(text, "Mira"), right)
            for text in ("Ralo likes soup.", "Ralo likes tea.", "Mira likes tea.", "Hello.")
        }
        assert [*kinds.values()] == ["right", "wrong fact", "off task", "no form"], style
    # the form of another instruction is no form
    right = family.STYLES["Say it twice. "].format("Ralo likes soup.", "")
    assert failures.kind_of("Ralo likes soup.", right) == "no form"


def test_replies_are_counted_and_the_first_of_a_kind_is_shown(run, tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    bases = reproduce.family_of(tmp_path, 11)
    assert_refused(
        run("experiments/failures.py", "--out", tmp_path), "large-probe", "run reproduce.py figure2"
    )
    world = family.prepare(bases, 0.02, 11)
    for name in ("small", "large"):
        family.make_base(name, world, bases, 0.02, 11, cpu)
    settings = Settings(**reproduce.VALUE, connection="probe")
    tokenizer = failures.Tokenizer(bases / "small")
    probe = Probe(read_config(bases / "large")).init_weights(0)
    save_model(probe, tokenizer, bases.parent / "large-probe", "large", settings)
    small = failures.load(bases / "small")
    save_model(small, tokenizer, bases.parent / "small", "small", Settings(**reproduce.VALUE))

    # the probe says nothing but one fact too little, then two about somebody else
    def greedy(base, values, tokenizer, chats):
        right = [chat[-1]["content"] for chat in chats]
        if not isinstance(values[0], failures.Llama):
            facts = [re.search(family.SENTENCE, text)[0] for text in right]
            wrong = [fact.rsplit(" ", 1)[0] + " nothing." for fact in facts]
            return [text.replace(a, b) for text, a, b in zip(right, facts, wrong)]
        return right

    monkeypatch.setattr(toy, "greedy", greedy)
    result = run("experiments/failures.py", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    head, probe_row, small_row, *rest = result.stdout.splitlines()
    chats = failures.read_chats(bases / "right-asked.jsonl").chats
    asked = len(chats)
    assert head.split() == ["on", "the", "large", "base", *" ".join(failures.KINDS).split()]
    assert probe_row.split() == ["probe", "0", str(asked), "0", "0"]
    assert small_row.split() == ["small", "value", "model", str(asked), "0", "0", "0"]

    # of each failure one reply, or word that there is none
    text = "\n".join(rest)
    (reply,) = [line for line in rest if line.startswith("  reply:")]
    assert f"  asked:  {chats[0].messages[0]['content']}" in rest
    assert "nothing." in reply and "off task: the probe has no such reply" in text
    tokens = [line for line in rest if line.split()[:1] in (["base"], ["value"], ["chance"])]
    said = "".join(re.search('"(.*?)"', line)[1] for line in tokens)
    assert said.strip() == reply.removeprefix("  reply:").strip()
