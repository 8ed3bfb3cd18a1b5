"""The tables, at a tiny scale."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_refused

from experiments import family, figures, reproduce

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
        assert {system for _, system in rows} <= set(figures.SYSTEMS) and name in figures.TITLES
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
    bases = [path.name for path in (tmp_path / "family").iterdir() if path.is_dir()]
    assert sorted(bases) == ["large", "small"]  # no others

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
        and "was made with --scale 0.02" in result.stderr
        and "Traceback" not in result.stderr
    )


def test_table_3_alone_asks_for_a_model_but_no_scores(monkeypatch, tmp_path):
    ((recipe, rows),) = reproduce.planned(["table3"]).items()
    asked = []
    monkeypatch.setattr(reproduce, "trained", lambda name, *_: asked.append(name) or tmp_path)
    reproduce.score_rows(rows, 0, tmp_path, torch.device("cpu"))
    assert asked == ["small"] == [recipe] and not any(tmp_path.iterdir())


def test_a_base_alone_is_scored_as_it_is_and_once(monkeypatch, tmp_path):
    world = family.prepare(tmp_path / "family", 0.02)
    family.make_base("small", world, tmp_path / "family", 0.02, torch.device("cpu"))
    asked, made = [], (tmp_path / "family" / "small" / "model.safetensors").read_bytes()

    def score(base, value, tokenizer, out, kinds):
        assert value is None and torch.equal(base.embed.weight, alone.embed.weight)
        asked.extend(kinds)
        return {kind: len(asked) / 10 for kind in kinds}

    alone = reproduce.load(tmp_path / "family" / "small", "cpu")
    monkeypatch.setattr(family, "score", score)
    monkeypatch.setattr(reproduce, "trained", lambda *_: pytest.fail("trains"))
    monkeypatch.setitem(reproduce.TABLES, "table1", (("form", "right"), [("small", "alone")]))

    # every seed has the same score, which is measured for the first of them
    (row,) = reproduce.scored("table1", 3, tmp_path, torch.device("cpu"))
    assert asked == ["form", "right"]
    assert row["form"] == reproduce.spread([0.2] * 3) == row["right"]
    assert row["form"]["least"] == row["form"]["most"] and len(row["form"]["seeds"]) == 3
    assert (tmp_path / "family" / "small" / "model.safetensors").read_bytes() == made

    # another table asks for what is missing
    reproduce.score("small", "alone", ("right", "skill"), 0, tmp_path, torch.device("cpu"))
    assert asked == ["form", "right", "skill"]
    assert not [*tmp_path.glob("seed*")]


def test_jobs_score_a_base_alone_for_one_seed_only(monkeypatch, tmp_path):
    jobs = {}
    monkeypatch.setattr(reproduce, "run", lambda made, what, _: jobs.update({what: made}))
    monkeypatch.setattr(reproduce, "scored", lambda *_: [])
    monkeypatch.setattr(reproduce, "show", lambda *_: None)
    reproduce.tables(["table4"], 0.02, 2, tmp_path, torch.device("cpu"))
    asked = [
        (seed, *row)
        for job in jobs["training and scoring"]
        for rows, seed, *_ in [job.args]
        for row in rows
    ]
    assert sorted(asked) == [
        (0, "medium", "alone"),
        (0, "medium", "proxy"),
        (0, "medium", "small"),
        (1, "medium", "proxy"),
        (1, "medium", "small"),
    ]
    bases = {base for job in jobs["bases"] for base in job.args[0]}
    assert bases == {"small", "medium"}


@pytest.mark.slow
def test_everything_runs_through(tmp_path):
    result = reproduce_py("all", "--scale", 0.02, "--seeds", 1, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "findings.json").read_text())
    assert [row["claim"] for row in results] == [*range(1, 10)]
    assert {row["verdict"] for row in results} <= {"agrees", "disagrees", "undecided"}
    for name in (*reproduce.TABLES, "table3"):
        assert (
            json.loads((tmp_path / f"{name}.json").read_text())
            and (tmp_path / f"{name}.png").exists()
        )
