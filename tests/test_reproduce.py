"""The tables, at a tiny scale."""

import json
import shlex
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
        assert {reproduce.recipe_of(*row) for row in rows} <= set(reproduce.RECIPES)
        assert {system for _, system in rows} <= set(figures.SYSTEMS) and name in figures.TITLES
    assert {base for base, _ in reproduce.COSTS} <= set(figures.BASES)


def test_bad_numbers_are_refused(run, tmp_path):
    for args in (("--seeds", 0), ("--scale", 0), ("--scale", 17)):
        result = run("experiments/reproduce.py", "figure3", *args, "--out", tmp_path)
        assert_refused(result, "a scale from 0 to 16")
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
    assert (
        reproduce_py(*args).stdout == result.stdout and times() == made and len(made) == 2 + 3 * 2
    )
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


def test_commands_name_every_row_once():
    names = [*reproduce.TABLES]
    lines = [shlex.split(line) for line in reproduce.commands(names, 2, Path("o"))]
    asked = [line for line in lines if "sample.py" in line]
    assert len({line[-1] for line in asked}) == len(asked)  # no replies over others
    rows = {row for _, rows in reproduce.TABLES.values() for row in rows}
    assert len(asked) == 2 * len(rows) and sum("train.py" in line for line in lines) == 2 * len(
        reproduce.RECIPES
    )
    assert not any(
        line[1] in ("train.py", "sample.py")
        for line in map(shlex.split, reproduce.commands(["table3"], 2, Path("o")))
    )
    curriculum = next(" ".join(line) for line in lines if line[-1] == "o/seed1/curriculum")
    assert curriculum == (
        "python train.py --base o/family/small o/family/medium o/family/large "
        "--connection residual --lam 0.0 --value o/family/small "
        "--data o/family/general.jsonl --seed 1 --out o/seed1/curriculum"
    )
    assert {line[-1] for line in asked if "--antiexpert" in line} == {
        f"o/seed{seed}/small-full/medium.jsonl" for seed in (0, 1)
    }
    assert {line[-1] for line in asked if "--map" in line} == {
        f"o/seed{seed}/{name}/other.jsonl"
        for seed in (0, 1)
        for name in ("small", "small-norm", "curriculum")
    }


@pytest.mark.slow
def test_commands_run_as_they_are(tmp_path):
    world = family.prepare(tmp_path / "family", 0.02)
    for name in ("small", "medium", "large", "other", "other-small"):
        family.make_base(name, world, tmp_path / "family", 0.02, torch.device("cpu"))
    (tmp_path / "family" / "questions.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Who is it?"}]}\n'
    )
    script = "\n".join(reproduce.commands(["figure4", "table4"], 1, tmp_path)).replace(
        "python ", f"{sys.executable} "
    )
    result = subprocess.run(["bash", "-e"], input=script, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = {row for name in ("figure4", "table4") for row in reproduce.TABLES[name][1]}
    assert len([*tmp_path.glob("seed0/*/*.jsonl")]) - len(
        [*tmp_path.glob("seed0/*/log.jsonl")]
    ) == len(rows)
