"""The tables, at a tiny scale."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_refused

from experiments import claims, expert, family, figures, reproduce, toy
from plumbing.chats import Chat

ROOT = Path(__file__).parent.parent


def reproduce_py(*args) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "experiments/reproduce.py", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_every_row_has_a_recipe_and_a_colour():
    for name, (_, rows) in reproduce.TABLES.items():
        trained = [row for row in rows if row[1] != "alone"]
        assert {reproduce.recipe_of(*row) for row in trained} <= set(reproduce.RECIPES)
        assert {base for base, _ in rows} <= set(family.BASES) | {"continued"}
        if name in figures.TITLES:
            assert {system for _, system in rows} <= set(figures.SYSTEMS)
    assert {base for base, _ in reproduce.COSTS} <= set(figures.BASES)


def test_bad_numbers_are_refused(run, tmp_path):
    for args in (("--seeds", 0), ("--scale", 0), ("--scale", 17), ("--nothing",)):
        result = run("experiments/reproduce.py", "figure3", *args, "--out", tmp_path)
        assert_refused(result, args[0])
        assert not any(tmp_path.iterdir())


def test_a_table_is_made_and_what_is_there_is_not_made_again(tmp_path):
    args = ("figure3", "--scale", 0.02, "--seeds", 1, "--out", tmp_path)
    result = reproduce_py(*args)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "figure3.json").read_text())
    assert [(row["base"], row["system"]) for row in rows] == reproduce.TABLES["figure3"][1]
    assert all(len(row[key]["seeds"]) == 1 for row in rows for key in ("form", "right"))
    bases = [path.name for path in (tmp_path / "seed11" / "family").iterdir() if path.is_dir()]
    assert sorted(bases) == ["medium", "small"]  # no others

    def times() -> dict:
        return {
            path: path.stat().st_mtime_ns
            for name in ("*.safetensors", "scores.json")
            for path in tmp_path.rglob(name)
        }

    made = times()
    assert len(made) == 2 + 3 * 2  # two bases, three value models and their scores
    assert reproduce_py(*args).stdout == result.stdout and times() == made
    result = reproduce_py("figure3", "--scale", 0.03, "--out", tmp_path)
    assert (
        result.returncode == 2
        and "was made with scale 0.02" in result.stderr
        and "Traceback" not in result.stderr
    )


def test_table_3_alone_asks_for_models_but_no_scores(monkeypatch, tmp_path):
    recipes = reproduce.planned(["table3"])
    asked = []
    monkeypatch.setattr(reproduce, "trained", lambda name, *_: asked.append(name) or tmp_path)
    for rows in recipes.values():
        reproduce.score_rows(rows, 0, tmp_path, torch.device("cpu"))
    assert asked == ["small", "expert"] == [*recipes] and not any(tmp_path.iterdir())


def test_a_base_alone_is_scored_as_it_is_and_once(monkeypatch, tmp_path):
    folder = reproduce.family_of(tmp_path, 11)
    world = family.prepare(folder, 0.02, 11)
    family.make_base("small", world, folder, 0.02, 11, torch.device("cpu"))
    asked, made = [], (folder / "small" / "model.safetensors").read_bytes()

    def score(base, values, tokenizer, out, kinds, alphas):
        assert values == alphas == [] and torch.equal(base.embed.weight, alone.embed.weight)
        asked.extend(kinds)
        return {kind: len(asked) / 10 for kind in kinds}

    alone = reproduce.load(folder / "small", "cpu")
    monkeypatch.setattr(family, "score", score)
    monkeypatch.setattr(reproduce, "trained", lambda *_: pytest.fail("trains"))
    monkeypatch.setitem(reproduce.TABLES, "table1", (("form", "right"), [("small", "alone")]))
    for _ in range(2):
        (row,) = reproduce.scored("table1", [11], tmp_path, torch.device("cpu"))
        assert asked == ["form", "right"] and row["form"] == reproduce.spread([0.2])
    assert (folder / "small" / "model.safetensors").read_bytes() == made

    # another table asks for what is missing
    reproduce.score("small", "alone", ("right", "skill"), 11, tmp_path, torch.device("cpu"))
    assert asked == ["form", "right", "skill"]


def test_each_seed_has_bases_and_trainings_of_its_own(monkeypatch, tmp_path):
    jobs = {}
    monkeypatch.setattr(reproduce, "run", lambda made, what, _: jobs.update({what: made}))
    monkeypatch.setattr(reproduce, "scored", lambda *_: [])
    monkeypatch.setattr(reproduce, "show", lambda *_: None)
    reproduce.tables(["table4"], 0.02, [3, 4], tmp_path, torch.device("cpu"))
    asked = [
        (seed, *row)
        for job in jobs["training and scoring"]
        for rows, seed, *_ in [job.args]
        for row in rows
    ]
    rows = reproduce.TABLES["table4"][1]
    assert sorted(asked) == sorted((seed, *row) for seed in (3, 4) for row in rows)
    made = [
        (base, folder, seed)
        for job in jobs["bases"]
        for bases, folder, _, seed, _ in [job.args]
        for base in bases
    ]
    assert sorted(made) == [
        (base, tmp_path / f"seed{seed}" / "family", seed)
        for base in ("medium", "small")
        for seed in (3, 4)
    ]
    # the worlds differ, and each is written to its own folder
    people = [json.loads((folder / "few-shot.json").read_text()) for _, folder, _ in made[:2]]
    assert people[0] != people[1]


def test_the_expert_keeps_the_first_epoch_of_its_best_form(monkeypatch, tmp_path):
    folder = reproduce.family_of(tmp_path, 3)
    world = family.prepare(folder, 0.02, 3)
    family.make_base("small", world, folder, 0.02, 3, torch.device("cpu"))
    missed, looked_at = iter([1.0, 0.5, 0.25, 0.25, 0.75]), []

    def form_missed(tokenizer, records, base, expert, *_):
        assert base is None  # nothing beside it
        looked_at.append(expert.embed.weight.clone())
        return next(missed)

    monkeypatch.setattr(expert, "form_missed", form_missed)
    directory = reproduce.trained("expert", 3, tmp_path, torch.device("cpu"))
    kept = reproduce.load(directory, "cpu").embed.weight
    assert len(looked_at) == 5 and torch.equal(kept, looked_at[2])
    assert not torch.equal(looked_at[3], kept)


def test_the_share_of_forms_missed(monkeypatch, tmp_path):
    said = [
        "Good question! Ralo lives in Oslo. I am happy to help!",
        "Ralo lives in Oslo.",
        "",
        "?",
    ]
    wanted = [said[0].replace("Oslo", "Lima"), "Mira plays the harp.", said[0], said[1]]
    records = [Chat([{"content": "?"}, {"content": text}]) for text in reversed(wanted)]
    monkeypatch.setattr(toy, "greedy", lambda model, value, tokenizer, chats: said)
    chats = SimpleNamespace(entry=torch.tensor([3, 2, 1, 0]))
    assert expert.form_missed(None, records, None, None, chats, [0, 1, 2, 3], 8) == 0.5


@pytest.mark.slow
def test_everything_runs_through(tmp_path):
    result = reproduce_py("all", "--scale", 0.02, "--seeds", 1, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "findings.json").read_text())
    assert [row["claim"] for row in results] == [*range(1, 10)]
    assert {row["verdict"] for row in results} <= set(claims.VERDICTS)
    for name in figures.TITLES:
        assert json.loads((tmp_path / f"{name}.json").read_text())
        assert (tmp_path / f"{name}.png").exists()
    parts = json.loads((tmp_path / "norm-parts.json").read_text())
    assert parts.keys() == set(reproduce.NORM_STUDY) and parts["small"]["norm"]
