"""Who said it, against decoding, against the formula, and as it is shown."""

import json
import re

import pytest
import torch
from conftest import assert_refused

import ivl
from extras.connections import connected
from extras.explain import STRONG, Said, coloured, columns, read_again, summary, who_said
from plumbing.tokenizer import Tokenizer
from plumbing.weights import load


@pytest.fixture(scope="module")
def models(base_dir, value_dir):
    return load(base_dir), load(value_dir)


@pytest.fixture(scope="module")
def tokenizer(base_dir):
    return Tokenizer(base_dir)


PROMPT = [1, 20, 30, 40]


def explained(base, value, tokenizer, prompt, reply, alpha=1.0, **how) -> list[Said]:
    """Who said what, from the models."""
    return who_said(*read_again(base, [value], prompt, reply, **how), tokenizer, reply, alpha)


def test_a_greedy_reply_is_by_base_or_value(models, tokenizer):
    reply = [ids[0] for ids in ivl.generate(models[0], models[1:], [PROMPT], 25, alphas=[0.7])]
    said = explained(*models, tokenizer, PROMPT, reply, alpha=0.7)
    assert {token.by for token in said} == {"base", "value"} and len(said) == 25
    z_base, z_delta = (model(torch.tensor([PROMPT + reply]))[0, 3:-1].detach() for model in models)
    logp = [z.log_softmax(-1)[range(25), reply] for z in (z_base, z_base + 0.7 * z_delta)]
    assert [token.nats for token in said] == pytest.approx((logp[1] - logp[0]).tolist(), abs=1e-4)
    assert [token.p_post for token in said] == pytest.approx(logp[1].exp().tolist(), abs=1e-4)
    same = (z_base.argmax(-1) == torch.tensor(reply)).tolist()
    assert (
        [token.by == "base" for token in said]
        == same
        == [token.text == token.base for token in said]
    )


def test_without_the_value_model_all_is_the_bases_or_chance(models, tokenizer):
    drawn = [
        ids[0]
        for ids in ivl.generate(
            models[0], models[1:], [PROMPT], 25, alphas=[0.0], temperature=0.8, top_k=3
        )
    ]
    said = explained(*models, tokenizer, PROMPT, drawn, alpha=0.0)
    assert {token.by for token in said} == {"base", "chance"} and {
        token.nats for token in said
    } == {0.0}


def test_a_cascade(models, tokenizer):
    cascade = connected("cascade+", *models)
    reply = [ids[0] for ids in ivl.generate(cascade[0], cascade[1:], [PROMPT], 20)]
    assert "chance" not in {token.by for token in explained(*cascade, tokenizer, PROMPT, reply)}


# ---------------------------------------------------------------- forms

SAID = [
    Said("Good", "I", "value", 7.9, 0.001, 0.9),
    Said(" <day>\n", " <day>\n", "base", 0.1, 0.8, 0.9),
    Said(" you", " me", "chance", -0.5, 0.3, 0.2),
    Said("</s>", "\n", "value", 2.0, 0.1, 0.8),
]


def test_columns_are_plain():
    lines = columns(SAID).split("\n")
    assert lines[0].split("\t") == ["by", "nats", "p_base", "p_post", "token", "base's choice"]
    assert lines[
        2
    ] == 'base\t+0.10\t0.8000\t0.9000\t" <day>\\n"\t" <day>\\n"' and "\033" not in "".join(lines)


def test_terminal_lines_put_the_bases_choice_underneath():
    lines = coloured(SAID, 80).split("\n")
    plain = [re.sub(r"\033\[[0-9;]*m", "", line) for line in lines]
    assert plain[:4] == ["Good <day>⏎", "I", " you</s>", " me ⏎"]
    assert (
        "\033[30;48;5;202mGood\033[0m" in lines[0]
        and "\033[30;48;5;223m</s>" in lines[2]
        and "\033[4m you" in lines[2]
    )
    assert all(
        len(line) <= 10
        for line in [re.sub(r"\033\[[0-9;]*m", "", x) for x in coloured(SAID, 10).split("\n")[:-1]]
    )


def test_the_summary_counts():
    assert summary(SAID) == (
        "4 tokens: 1 as the base alone would have said, 2 changed by the value model, "
        "1 by chance; together +9.5 nats"
    )
    assert f"0 to {STRONG:.0f} nats" in coloured(SAID, 80)


def test_what_is_never_said_is_nobodys_choice(models, tokenizer):
    reply = [5, 6]
    plain = explained(*models, tokenizer, PROMPT, reply)
    z_base = models[0](torch.tensor([PROMPT + reply]))[0, 3:-1].detach()
    never = z_base.argmax(-1).tolist()
    said = explained(*models, tokenizer, PROMPT, reply, never=never)
    z_base[:, never] = -torch.inf
    assert [token.base for token in said] != [token.base for token in plain]
    assert [token.p_base for token in said] == pytest.approx(
        z_base.softmax(-1)[range(2), reply].tolist(), abs=1e-5
    )


def test_letters_of_all_languages_and_line_ends_are_shown_as_such():
    said = [Said("中é", "\n", "value", 2.0, 0.1, 0.8)]
    assert columns(said).split("\n")[1].split("\t")[4:] == ['"中é"', '"\\n"']


def test_every_terminal_line_is_filled():
    token = Said("abcd", "abcd", "base", 0.0, 0.5, 0.5)
    assert coloured([token] * 6, 8).split("\n")[:4] == ["abcdabcd"] * 3 + [""]
    assert coloured([token] * 6, 7).split("\n")[:7] == ["abcd"] * 6 + [""]


def test_no_colour_reaches_past_its_line():
    for line in coloured(SAID, 80).split("\n"):
        colours = re.findall(r"\033\[[0-9;]*m", line)
        assert not colours or colours[-1] == "\033[0m"


def test_as_a_user_asks_for_it(run, base_dir, value_dir, tmp_path):
    def ask(*args):
        return run(
            "sample.py",
            "--base",
            base_dir,
            "--value",
            value_dir,
            "--max_new_tokens",
            8,
            *args,
        )

    result = ask("--html", tmp_path / "page.html", "hello you")
    assert result.returncode == 0, result.stderr
    rows = [line.split("\t") for line in result.stdout.strip().split("\n")]
    assert len(rows) == 9 and all(
        json.loads(row[4]) is not None and row[0] in ("base", "value") for row in rows[1:]
    )
    assert "8 tokens: " in result.stderr and "hello you" in (tmp_path / "page.html").read_text()
    assert_refused(ask("--explain"), "--explain needs a question")
