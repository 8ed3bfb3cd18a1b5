"""The tables and the verdicts on them, at a tiny scale."""

import json

import pytest
import torch

from experiments import reproduce, toy
from files import InputError


def test_verdict_is_by_seeds():
    rows = {"a": {"right": {"seeds": [0.9, 0.8]}}, "b": {"right": {"seeds": [0.5, 0.75]}}}
    assert reproduce.verdict(rows, [("a", "right", 1, "b", 0.0)]) == "agrees"
    assert reproduce.verdict(rows, [("a", "right", 1, "b", 0.2)]) == "undecided"
    assert reproduce.verdict(rows, [("a", "right", -1, "b", 0.0)]) == "disagrees"
    assert reproduce.verdict(rows, [("a", "right", 1, "b", 0.0), ("a", "right", 1, "b", 0.5)]) == "disagrees"


def test_every_claim_compares_rows_of_its_table():
    for *_, name, comparisons in reproduce.CLAIMS:
        assert {row for first, _, _, second, _ in comparisons for row in (first, second)} <= set(reproduce.TABLES[name])
    assert {system for rows in reproduce.TABLES.values() for _, system in rows} == {*reproduce.SYSTEMS, "proxy"}


def test_everything_runs_through_and_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(toy, "BASES", {"small": (16, 16, 1, 1, 1e-3, 4000, 0.5), "large": (16, 32, 1, 1, 1e-3, 4000, 1.0)})
    monkeypatch.setattr(toy, "PEOPLE", 6)
    settings = dict(epochs=1, batch_size=8, micro_batch_size=8)
    monkeypatch.setattr(toy, "VALUE_SETTINGS", toy.VALUE_SETTINGS | settings)
    monkeypatch.setattr(reproduce, "SYSTEMS", {name: (base, changes | settings) for name, (base, changes) in
                                               reproduce.SYSTEMS.items()})
    with pytest.raises(InputError, match="figure2.json"):
        reproduce.findings(tmp_path)
    for name in reproduce.TABLES:
        reproduce.table(name, 2, tmp_path, torch.device("cpu"))
    reproduce.findings(tmp_path)
    assert [row["claim"] for row in json.loads((tmp_path / "findings.json").read_text())] == [1, 2, 3, 4, 9]
    rows = json.loads((tmp_path / "figure3.json").read_text())
    assert [(row["base"], row["system"]) for row in rows] == reproduce.TABLES["figure3"]
    assert all(len(row["right"]["seeds"]) == 2 for row in rows)
    before = capsys.readouterr().out
    monkeypatch.setattr(reproduce, "train", None)  # nothing is trained or scored again
    monkeypatch.setattr(toy, "score", None)
    reproduce.table("table1", 2, tmp_path, torch.device("cpu"))
    assert capsys.readouterr().out in before
