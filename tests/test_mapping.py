"""The measurements of vocabulary mapping: their arithmetic by hand, and that each of them runs."""

import json
import shutil

import pytest
import torch
from conftest import TEXT, assert_refused

from experiments import mapping, toy
from plumbing.tokenizer import Tokenizer
from vocab_map import Spelling


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("\n\n".join(TEXT.split(". ") * 3))
    return path


def test_strings_by_hand(base_dir, other_dir):
    # base  ▁The|▁|r|ain    value  The|Ġ|rain: `rain` begins where `r` does, and where the string
    # `r` `ain` does
    base, value = Spelling(Tokenizer(base_dir)), Spelling(Tokenizer(other_dir))
    rows = mapping.count_strings(base, value, ["The rain"], depth=2)
    said = {
        tuple(base.bytes[i] for i in string): {value.bytes[v]: n for v, n in row.items()}
        for string, row in rows.items()
    }
    assert said == {
        (b"The",): {b"The": 1},
        (b"The", b" "): {b"The": 1},
        (b" ",): {b" ": 1},
        (b" ", b"r"): {b" ": 1},
        (b"r",): {b"rain": 1},
        (b"r", b"ain"): {b"rain": 1},
    }


def test_looking_ahead_by_hand(monkeypatch):
    """Whatever it has read, this base says token 0 with probability 0.6 and token 1 with 0.4."""
    monkeypatch.setattr(mapping, "FLOOR", 0.0)
    rows = {(0,): {0: 3, 1: 1}, (1,): {1: 1}, (0, 0): {0: 1}, (0, 1): {1: 1}}

    def base(x):
        return torch.tensor([0.6, 0.4]).log().expand(*x.shape, 2)

    near = mapping.next_token(base, [7], rows, columns=2, depth=1, width=8)
    assert near.tolist() == pytest.approx([0.6 * 3 / 4, 0.6 / 4 + 0.4])
    far = mapping.next_token(base, [7], rows, columns=2, depth=2, width=8)
    # after 1 nothing longer was counted: its own row
    assert far.tolist() == pytest.approx([0.6 * 0.6, 0.6 * 0.4 + 0.4])
    narrow = mapping.next_token(base, [7], rows, columns=2, depth=2, width=1)
    # the string (1,) is not read on, and counts as it is
    assert narrow.tolist() == pytest.approx(far.tolist())


def test_overlap_by_kind(run, base_dir, other_dir, text_file, tmp_path):
    made = run(
        "experiments/mapping.py",
        "overlap",
        "--base",
        base_dir,
        "--value",
        other_dir,
        "--text",
        text_file,
        text_file,
        "--few",
        5,
        "--json",
        tmp_path / "rows.json",
    )
    assert made.returncode == 0, made.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["text"], row["method"]) for row in rows] == [
        (name, method)
        for method in ("ours", "Algorithm 1")
        for name in ("text.txt", "text.txt", "mean")
    ]
    assert all(0 < row["overlap"] <= row["limit"] <= 1 for row in rows)
    assert rows[2]["overlap"] == pytest.approx(rows[0]["overlap"])
    assert_refused(
        run(
            "experiments/mapping.py",
            "overlap",
            "--base",
            base_dir,
            "--value",
            other_dir,
            "--text",
            "nowhere.txt",
        ),
        "nowhere.txt",
    )


@pytest.mark.parametrize("what, rows", [("steps", 7), ("lookahead", 2)])
def test_retention_tables(run, base_dir, other_dir, text_file, tmp_path, what, rows):
    more = ("--depth", 2, "--width", 2) if what == "lookahead" else ("--few", 5)
    made = run(
        "experiments/mapping.py",
        what,
        "--base",
        base_dir,
        "--value",
        other_dir,
        "--text",
        text_file,
        "--held",
        2,
        "--json",
        tmp_path / "rows.json",
        *more,
    )
    assert made.returncode == 0, made.stderr
    report = json.loads((tmp_path / "rows.json").read_text())
    assert len(report) == rows and all(0 < row["retention"] < float("inf") for row in report)
    assert len(made.stdout.splitlines()) == rows + 1


def test_transfer_between_two_families(run, tmp_path, monkeypatch):
    tiny = {name: (16, 16, 1, 1, 1e-3, 4000, 1.0) for name in ("small", "large")}
    monkeypatch.setattr(toy, "BASES", tiny)
    monkeypatch.setattr(toy, "OTHER_BASES", {"large": tiny["large"]})
    for family, seed in (("a", 0), ("b", 0), ("b", 1)):
        toy.make_family(tmp_path / f"{family}{seed}", seed, torch.device("cpu"), family)
    shutil.copytree(tmp_path / "a0" / "small", tmp_path / "a0" / "value")
    monkeypatch.setattr(mapping, "DOCUMENTS", 40)

    def few(path, read=mapping.read_chats):
        reading = read(path)
        reading.chats = reading.chats[:6]
        return reading

    monkeypatch.setattr(mapping, "read_chats", few)
    rows = mapping.transfer(mapping.argparse.Namespace(a=tmp_path / "a0", b=tmp_path / "b0"))
    assert [row["map"] for row in rows] == ["none", "ours", "Algorithm 1"]
    assert all(row["form"] == row["right"] == 0 for row in rows)
    assert all(row["retention"] > 0 for row in rows[1:])
    assert_refused(
        run("experiments/mapping.py", "toy", "--a", tmp_path / "a0", "--b", tmp_path / "b1"),
        "seed 1",
        "share a world",
    )
