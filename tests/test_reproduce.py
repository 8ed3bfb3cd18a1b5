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
    for option in (("--scale", 2), ("--device", "cpu")):
        result = run("experiments/reproduce.py", "figure3", "--commands", *option)
        assert_refused(result, f"{option[0]} has no effect with --commands")


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


def test_commands_name_every_row_once():
    names = [*reproduce.TABLES]
    lines = [shlex.split(line) for line in reproduce.commands(names, 2, Path("o"))]
    asked = [line for line in lines if "sample.py" in line]
    assert len({line[-1] for line in asked}) == len(asked)  # no replies over others
    rows = {row for _, rows in reproduce.TABLES.values() for row in rows}
    alone = {row for row in rows if row[1] == "alone"}
    assert len(asked) == 2 * len(rows - alone) + len(alone)
    assert sum("train.py" in line for line in lines) == 2 * len(reproduce.RECIPES)
    assert not any("--greedy" in line for line in lines)  # as sample.py does unasked
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
    assert {line[-1] for line in asked if "/alone/" in line[-1]} == {
        f"o/replies/alone/{base}.jsonl" for base, _ in alone
    }
    (line,) = [line for line in asked if line[-1] == "o/replies/alone/large.jsonl"]
    assert " ".join(line) == (
        "python sample.py --base o/family/large --value none --prompts o/family/questions.jsonl "
        "--out o/replies/alone/large.jsonl"
    )
    assert {line[-1] for line in asked if "--antiexpert" in line} == {
        f"o/replies/seed{seed}/small-full/medium.jsonl" for seed in (0, 1)
    }
    assert {line[-1] for line in asked if "--map" in line} == {
        f"o/replies/seed{seed}/{name}/other.jsonl"
        for seed in (0, 1)
        for name in ("small", "small-norm", "curriculum")
    }


def comments(lines: list[str]) -> dict[str, str]:
    """path → what is said of it, in the head of a script."""
    said = [line.removeprefix("#     ") for line in lines if line.startswith("#     ")]
    return dict(line.split(": ", 1) for line in said)


@pytest.mark.parametrize("name", [*reproduce.TABLES, "table3"])
def test_a_script_stops_at_errors_and_says_what_it_reads(name):
    lines = [*reproduce.script([name], 2, Path("o"))]
    assert lines[0].startswith("set -e")
    commands = [shlex.split(line) for line in reproduce.commands([name], 2, Path("o"))]
    assert [shlex.split(line) for line in lines if line.startswith("python ")] == commands

    # all that stands in the family and is not made here
    said = comments(lines)
    words = {word for words in commands for word in words if word.startswith("o/family/")}
    assert said.keys() == words - {"o/family/map.safetensors"}
    assert all(about == reproduce.PARTS[Path(path).name] for path, about in said.items())


def test_a_script_names_what_is_left_to_judge(tmp_path):
    for name, (_, rows) in reproduce.TABLES.items():
        text = "\n".join(reproduce.script([name], 2, Path("o")))
        _, left = text.split("cat <<'END'\n")
        of_replies, of_answers = reproduce.JUDGES[name]
        assert left.endswith("\nEND") and "MT-Bench" in of_replies
        assert of_replies in left and of_answers in left
        assert bool(of_answers) == ("nothing here writes" in left) == name.startswith("table")

        # each of its files of replies, once
        files = [line.split(": ")[0].strip() for line in left.splitlines() if "    o/" in line]
        assert len(files) == len(rows) == len({*files})
        commands = map(shlex.split, reproduce.commands([name], 2, Path("o")))
        written = {words[-1] for words in commands if words[1] == "sample.py"}
        expected = {file.replace("*", seed) for file in files for seed in "01"}
        assert expected == written
    assert "nothing is left" in "\n".join(reproduce.script(["table3"], 2, Path("o")))


def test_a_script_trains_nothing_before_all_is_there(tmp_path):
    out = tmp_path / "it's here"
    names = ["figure4", "table1"]
    # commands that would be seen
    text = "\n".join(reproduce.script(names, 1, out)).replace("\npython ", "\necho ")

    def ran() -> subprocess.CompletedProcess:
        return subprocess.run(["bash"], input=text, capture_output=True, text=True, cwd=tmp_path)

    needed = [Path(path) for path in comments(text.splitlines())]
    assert len(needed) == len(reproduce.PARTS)
    for path in needed:
        result = ran()
        assert result.returncode == 2 and not result.stdout, result
        assert f"error: {path} is not there" in result.stderr
        assert len(result.stderr.splitlines()) == 1
        path.mkdir(parents=True)
    result = ran()
    assert result.returncode == 0 and not result.stderr, result
    assert result.stdout.startswith("vocab_map.py") and "left to judge" in result.stdout

    # a command that fails is the last
    text = text.replace("\necho train.py", "\nfalse train.py", 1)
    result = ran()
    assert result.returncode == 1 and "train.py" not in result.stdout


def test_findings_have_no_commands_and_the_help_promises_no_scores(run):
    assert_refused(run("experiments/reproduce.py", "findings", "--commands"), "trains nothing")
    assert "judges nothing" in " ".join(run("experiments/reproduce.py", "--help").stdout.split())


@pytest.mark.slow
def test_commands_run_as_they_are(tmp_path):
    world = family.prepare(tmp_path / "family", 0.02)
    for name in ("small", "medium", "large", "other", "other-small"):
        family.make_base(name, world, tmp_path / "family", 0.02, torch.device("cpu"))
    (tmp_path / "family" / "questions.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "Who is it?"}]}\n'
    )
    script = "\n".join(reproduce.script(["figure4", "table4"], 1, tmp_path)).replace(
        "\npython ", f"\n{sys.executable} "
    )
    result = subprocess.run(["bash"], input=script, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = {row for name in ("figure4", "table4") for row in reproduce.TABLES[name][1]}
    written = {*tmp_path.glob("replies/**/*.jsonl")}
    assert written == {reproduce.replies_of(*row, 0, tmp_path) for row in rows}
