"""Replies as a user asks for them."""

import json

import pytest
from conftest import assert_refused, in_a_process, make_directory


@pytest.fixture
def ask(run, base_dir, value_dir):
    def runner(*args, stdin="", base=base_dir, value=value_dir):
        return run(
            "sample.py",
            "--base",
            base,
            "--value",
            value,
            "--max_new_tokens",
            12,
            *args,
            stdin=stdin,
        )

    return runner


def test_one_reply_is_repeatable_and_plain(ask):
    first, again, other = ask("hello you"), ask("hello you"), ask("--seed", 1, "hello you")
    assert first.returncode == 0, first.stderr
    assert (
        first.stdout == again.stdout != other.stdout and "\033" not in first.stdout + first.stderr
    )
    assert "tok/s, peak memory" in first.stderr
    assert ask("--greedy", "hello you").stdout == ask("--temperature", 0, "hello you").stdout


def test_alpha_zero_prints_what_the_base_alone_prints(ask):
    alone = ask("--greedy", "hello you", value="none").stdout
    assert (
        ask("--greedy", "--alpha", 0, "hello you").stdout
        == alone
        != ask("--greedy", "hello you").stdout
    )


def test_raw_continues_the_text(ask):
    assert ask("--raw", "--greedy", "The cat sat").stdout.startswith("The cat sat")


def test_chat_keeps_its_history_until_cleared(ask):
    result = ask("--greedy", stdin="hello you\nhello you\n/clear\nhello you\n\n/exit\nnever read\n")
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count("tok/s") == 3
    single = ask("--greedy", "hello you").stdout
    assert (
        result.stdout.startswith(single)
        and result.stdout.endswith(single)
        and result.stdout != 3 * single
    )


def test_a_chat_that_outgrows_the_context_forgets_its_beginning(ask):
    # about 40 tokens each time, in a context of 256
    result = ask("--greedy", stdin="hello you\n" * 12)
    assert (
        result.returncode == 0
        and result.stderr.count("tok/s") == 12
        and "error" not in result.stderr
    )


@pytest.mark.parametrize(
    "name, text",
    [
        ("questions.txt", "hello you\n\nWhere is the dog?\nThe cat\n"),
        (
            "questions.jsonl",
            "\n".join(
                json.dumps(
                    {
                        "messages": [
                            {"role": "user", "content": q},
                            {"role": "assistant", "content": "known"},
                        ]
                    }
                )
                for q in ("hello you", "Where is the dog?", "The cat")
            ),
        ),
    ],
)
def test_many_prompts_are_answered_in_order(ask, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    result = ask(
        "--greedy",
        "--prompts",
        tmp_path / name,
        "--out",
        tmp_path / "replies.jsonl",
        "--batch_size",
        2,
    )
    assert result.returncode == 0, result.stderr
    replies = [json.loads(line) for line in (tmp_path / "replies.jsonl").read_text().splitlines()]
    assert [reply["prompt"] for reply in replies] == ["hello you", "Where is the dog?", "The cat"]
    for reply in replies:  # as when asked one by one
        assert reply["reply"] == ask("--greedy", reply["prompt"]).stdout.strip()
        assert reply["tokens"] == 12 or reply["stopped"]
    assert [
        json.loads(line)
        for line in ask("--greedy", "--prompts", tmp_path / name).stdout.splitlines()
    ] == replies


def test_bad_input_ends_in_one_line(ask, run, tmp_path, base_dir):
    other = make_directory(tmp_path / "other", 3, bytelevel=True)
    assert_refused(ask("hello", value=other), "different vocabularies", "vocab_map.py")
    assert_refused(ask("hello", value=tmp_path / "absent"), "absent")
    assert_refused(ask("hello " * 300), "the context is 256", "shorten")
    assert_refused(ask("--top_p", 0, "hello"), "--top_p")
    assert_refused(ask("--prompts", tmp_path / "absent.txt"), "absent.txt")
    assert_refused(run("sample.py", "--base", base_dir, "hello"), "--value is missing")
    (tmp_path / "empty.txt").write_text("\n")
    assert_refused(ask("--prompts", tmp_path / "empty.txt"), "empty.txt", "no prompts")
    (tmp_path / "file").write_text("")
    assert_refused(
        ask("--prompts", tmp_path / "file", "--out", tmp_path / "file" / "out.jsonl"),
        "file",
        "cannot be written",
    )


LILY = "Once upon a time, there was a little girl named Lily. She loved to play outs"
STORIES = {
    "stories260K": LILY
    + "ide in the park. One day, she saw a big, red ball. She wanted to play with it, "
    "but it was too high.\nLily",
    "llama2xs": LILY
    + "ide and came to play with her friends. One day, she went to the park to play with "
    "her toys. She was very happy. He wanted to",
    "babyllama-tok105": LILY,
    "babyllama-tok361-as-tok105": LILY,
}


def test_in_a_process_of_its_own(base_dir, value_dir):
    """As a user starts it: a reply on stdout, or one line on stderr and status 2."""
    models = ["--base", base_dir, "--value", value_dir]
    said = in_a_process("sample.py", *models, "--greedy", "--max_new_tokens", 4, "hello you")
    assert said.returncode == 0 and said.stdout.strip() and "4 tokens" in said.stderr, said.stderr
    chatted = in_a_process("sample.py", *models, "--max_new_tokens", 4, stdin="hello\n/exit\n")
    assert chatted.returncode == 0 and chatted.stderr.count("tok/s") == 1
    assert_refused(in_a_process("sample.py", *models, "--top_p", 0, "hello"), "--top_p")


@pytest.mark.parametrize("name", STORIES)
def test_real_checkpoints_tell_their_story(run, realdata, name):
    result = run(
        "sample.py",
        "--value",
        "none",
        "--greedy",
        "--max_new_tokens",
        60,
        "--raw",
        "--base",
        realdata / "models" / name,
        "Once upon a time",
    )
    assert result.stdout == STORIES[name] + "\n"
