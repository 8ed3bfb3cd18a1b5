"""Verdicts: what they follow from, and where they are written."""

import json

import pytest

from experiments import claims, reproduce
from files import InputError


def test_verdict_is_by_seeds():
    assert claims.verdict([[True, True], [True, True]]) == "agrees"
    assert claims.verdict([[True, True], [False, True]]) == "undecided"
    assert claims.verdict([[True, True], [False, False]]) == "disagrees"


def test_every_claim_looks_at_rows_of_its_tables():
    assert [claim[0] for claim in claims.CLAIMS] == [*range(1, 10)]
    costs = [f"seconds {n}" for n in reproduce.LENGTHS]
    for *_, names, comparisons in claims.CLAIMS:
        there = {
            (*row, key)
            for name in names
            for keys, rows in [reproduce.TABLES.get(name, (costs, reproduce.COSTS))]
            for row in rows
            for key in keys
        }
        for comparison in comparisons:
            seen = []
            comparison(lambda *place: seen.append(place) or 0.5)
            assert seen and set(seen) <= there


def test_findings_are_computed_from_the_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(
        claims,
        "CLAIMS",
        [
            (
                1,
                "text",
                "theirs",
                ["figure2"],
                [
                    lambda v: v("small", "full", "right") - v("small", "probe", "right") > 0.2,
                    lambda v: v("small", "full", "right") > 0.85,
                ],
            )
        ],
    )
    with pytest.raises(InputError, match="run reproduce.py figure2 first"):
        claims.findings(tmp_path)
    rows = [
        {
            "base": "small",
            "system": system,
            "form": reproduce.spread([1.0, 1.0]),
            "right": reproduce.spread(seeds),
        }
        for system, seeds in (("full", [0.8, 0.9]), ("probe", [0.1, 0.2]))
    ]
    reproduce.show("figure2", rows, tmp_path)
    claims.findings(tmp_path)
    assert json.loads((tmp_path / "findings.json").read_text()) == [
        {
            "claim": 1,
            "text": "text",
            "paper": "theirs",
            "verdict": "undecided",
            "ours": "full on small: right 0.85; probe on small: right 0.15. "
            "The comparisons hold in 2, 1 of 2 seeds",
        }
    ]
