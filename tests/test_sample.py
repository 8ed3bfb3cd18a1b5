"""Replies as a user asks for them."""

import gc
import json
import weakref

import pytest
import torch
from conftest import assert_refused, in_a_process, make_directory

import sample
from plumbing.pair import Speaker
from plumbing.streaming import GrowingReply
from plumbing.tokenizer import Tokenizer
from vocab_map import VocabMap


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
    warm = ("--temperature", 0.7, "hello you")
    first, again, other = ask(*warm), ask(*warm), ask("--seed", 1, *warm)
    assert first.returncode == 0, first.stderr
    assert (
        first.stdout == again.stdout != other.stdout and "\033" not in first.stdout + first.stderr
    )
    assert "tok/s, peak memory" in first.stderr
    # without a temperature: the likeliest tokens
    assert ask("hello you").stdout == ask("--temperature", 0, "hello you").stdout != first.stdout


def test_alpha_zero_prints_what_the_base_alone_prints(ask):
    alone = ask("hello you", value="none").stdout
    assert ask("--alpha", 0, "hello you").stdout == alone != ask("hello you").stdout


def test_raw_continues_the_text(ask):
    assert ask("--raw", "The cat sat").stdout.startswith("The cat sat")


def test_chat_keeps_its_history_until_cleared(ask):
    result = ask(stdin="hello you\nhello you\n/clear\nhello you\n\n/exit\nnever read\n")
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count("tok/s") == 3
    single = ask("hello you").stdout
    assert (
        result.stdout.startswith(single)
        and result.stdout.endswith(single)
        and result.stdout != 3 * single
    )


def test_a_chat_that_outgrows_the_context_forgets_its_beginning(ask):
    # about 40 tokens each time, in a context of 256
    result = ask(stdin="hello you\n" * 12)
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
        assert reply["reply"] == ask(reply["prompt"]).stdout.strip()
        assert reply["tokens"] == 12 or reply["stopped"]
    assert [
        json.loads(line) for line in ask("--prompts", tmp_path / name).stdout.splitlines()
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
    said = in_a_process("sample.py", *models, "--max_new_tokens", 4, "hello you")
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
        "--max_new_tokens",
        60,
        "--raw",
        "--base",
        realdata / "models" / name,
        "Once upon a time",
    )
    assert result.stdout == STORIES[name] + "\n"


# ---------------------------------------------------------------- a text that ends a reply


def said(text: str, *stops: str) -> list[str]:
    """What is shown of a text that comes character by character, and at its end."""

    class Characters:
        def decode(self, ids):
            return "".join(map(chr, ids))

    reply = GrowingReply(Characters(), stops)
    pieces = []
    for character in text:
        pieces.append(reply.step(ord(character)))
        if reply.ended:
            break
    pieces.append(reply.rest())
    assert "".join(pieces) == reply.text
    return pieces


def test_a_stop_text_is_held_back_until_it_is_known():
    assert said("It is", "#") == ["I", "t", " ", "i", "s", ""]
    assert said("a##b###c", "###") == ["a", "", "", "##b", "", "", "", ""]
    assert said("a##", "###") == ["a", "", "", "##"]
    assert "".join(said("aab", "aac", "ab")) == "a"
    assert "".join(said("one two", "two", "one t")) == ""


def test_the_first_of_several_stop_texts_ends_a_reply():
    class Words:  # a token is a text
        def decode(self, ids):
            return "".join(ids)

    # half a character, which no other half follows, may be what a reply is to end at
    class Halves:
        def decode(self, ids):
            return "".join("a" if i else "\ufffd" for i in ids)

    reply = GrowingReply(Halves(), ["\ufffd"])
    assert reply.step(1) == "a" and reply.step(0) == "" and reply.rest() == ""
    assert reply.text == "a" and reply.ended

    reply = GrowingReply(Words(), ["one", "two"])
    assert reply.step("a two, one") == "a " and reply.ended and reply.rest() == ""
    assert reply.text == "a "


def test_a_stop_text_ends_a_reply(ask, tmp_path):
    question = "Where is the dog?"
    whole = ask(question).stdout.strip()
    stop = whole[4:6]
    before = whole[: whole.index(stop)]
    cut = ask("--stop", "never", "--stop", stop, question)
    assert cut.stdout.rstrip("\n") == before and "12 tokens" not in cut.stderr
    # the same in a batch, where the others go on
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"hello you\n{question}\n")
    plain, stopped = (
        [json.loads(line) for line in ask("--prompts", prompts, *options).stdout.split("\n")[:-1]]
        for options in ([], ["--stop", stop])
    )
    assert stopped[1]["reply"] == before.strip() and stopped[1]["stopped"]
    assert stopped[0] == plain[0] and not plain[0]["stopped"]
    # and in an explanation, which has the tokens up to it
    rows = ask("--explain", "--stop", stop, question).stdout.strip().split("\n")
    assert len(rows) - 1 == stopped[1]["tokens"] < plain[1]["tokens"]


# ---------------------------------------------------------------- a chat


def test_the_same_question_three_answers(ask):
    """/base, /value and /alpha answer the last question as the options do, and leave the chat."""
    pair = ask("hello you").stdout
    base = ask("hello you", value="none").stdout
    half = ask("--alpha", 0.5, "hello you").stdout
    assert len({pair, base, half}) == 3
    lines = ["hello you", "/base", "/value", "/alpha 0.5", "/alpha 1", "Who?"]
    result = ask(stdin="\n".join(lines) + "\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(pair + base)
    assert half in result.stdout and result.stdout.count(pair) == 2
    # the chat went on from the pair's own reply
    plain = ask(stdin="hello you\nWho?\n").stdout
    assert result.stdout.endswith(plain.removeprefix(pair))


def test_the_value_model_alone_says_what_it_says_as_a_base(ask, value_dir):
    alone = ask("hello you", base=value_dir, value="none").stdout
    assert ask(stdin="hello you\n/value\n").stdout.endswith(alone)


def test_system_prompts(ask, tmp_path):
    told = ask("--system", "You are a cat.", "hello you").stdout
    assert told != ask("hello you").stdout
    result = ask(stdin="hello you\n/system You are a cat.\nhello you\n/system\nhello you\n")
    plain = ask("hello you").stdout
    assert result.stdout == plain + told + plain
    # of a file, the chats that have none of their own
    chats = [
        [{"role": "user", "content": "hello you"}],
        [{"role": "system", "content": "A dog."}, {"role": "user", "content": "hello you"}],
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in chats))
    ours, own = (
        json.loads(line)["reply"]
        for line in ask("--system", "You are a cat.", "--prompts", path).stdout.splitlines()
    )
    assert ours == told.strip()
    assert own == ask("--system", "A dog.", "hello you").stdout.strip() != ours


def test_a_chat_says_what_its_replies_depend_on(ask):
    lines = ["/alpha 0.5", "/system You are a cat.", "/alpha", "/clear", "/system", "hello you"]
    result = ask(stdin="\n".join(lines) + "\n")
    told = "a new chat, α = 0.5, system prompt: You are a cat.\n"
    assert result.stderr.startswith(3 * told + "a new chat, α = 0.5\n")
    assert result.stdout == ask("--alpha", 0.5, "hello you").stdout


def test_a_system_prompt_that_the_template_refuses_is_refused_at_once(run, tmp_path):
    base = make_directory(tmp_path / "base", seed=1, template=None)
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system\n\x1b[31mrole') }}"
    )
    template += "{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    model = ["--base", base, "--value", "none", "--max_new_tokens", 3]
    assert_refused(run("sample.py", *model, "--system", "x", "hello"), "no system")
    result = run("sample.py", *model, stdin="/system You are a cat.\nhello\n")
    assert result.returncode == 0 and "3 tokens" in result.stderr
    first = result.stderr.splitlines()[0]
    assert first.startswith("error: ") and "no system" in first and "\\x1b" in first


def test_explain_in_a_chat_is_the_options(ask):
    result = ask(stdin="hello you\n/explain\n")
    assert result.stdout == ask("hello you").stdout + ask("--explain", "hello you").stdout


def test_a_chat_answers_what_it_cannot_do(ask):
    lines = ["/base", "/explain", "/nothing", "/alpha much", "/clear now", "/help", "hello you"]
    result = ask(stdin="\n".join(lines) + "\n")
    assert result.returncode == 0 and result.stdout == ask("hello you").stdout
    for words in (
        "no question yet",
        "no reply yet",
        "/nothing is no command",
        "/alpha much: 'much' is not a number",
        "nothing can stand after /clear",
        "/system TEXT",
    ):
        assert words in result.stderr
    alone = ask(stdin="hello you\n/value\n/alpha 1\n/explain\n", value="none")
    assert alone.stderr.count("there is no value model") == 2
    assert "/explain needs a value model" in alone.stderr


def test_a_line_that_is_no_text_is_refused_and_the_chat_goes_on(ask):
    result = ask(stdin="\udcff hello\nhello you\n")
    assert result.stderr.startswith("error: this line is not UTF-8\n")
    assert result.stdout == ask("hello you").stdout


def test_a_model_that_is_not_here_is_told_where_it_is(ask, run, chats_file, tmp_path):
    name = "meta-llama/Llama-3.2-1B"
    hint = f"hf download {name} --local-dir Llama-3.2-1B"
    assert_refused(ask("hello", base=name), "--base", hint)
    assert_refused(ask("hello", value=name), "--value", hint)
    trained = run("train.py", "--base", name, "--data", chats_file, "--out", tmp_path / "out")
    assert_refused(trained, "--base", hint)
    absent = ask("hello", base="a/b/c")
    assert_refused(absent, "a/b/c is no directory")
    assert "download" not in absent.stderr
    hint = "hf download OWNER/Llama-2-7b --local-dir Llama-2-7b"
    assert_refused(ask("hello", base="Llama-2-7b"), "--base", hint)


@pytest.mark.parametrize("mapped", [False, True])
def test_models_go_with_their_speaker(base_dir, value_dir, other_dir, tmp_path, mapped):
    """Under torchrun NCCL waits at its end until all recorded graphs are gone: nothing that holds
    them may wait for the garbage collector.
    """
    words = ["--base", base_dir, "--value", value_dir]
    if mapped:
        mapping = VocabMap.make(Tokenizer(base_dir), Tokenizer(other_dir), ["The cat sat."])
        mapping.save(tmp_path / "map.safetensors")
        words = ["--base", base_dir, "--value", other_dir, "--map", tmp_path / "map.safetensors"]
    gc.collect()
    gc.disable()
    try:
        speaker = Speaker(sample.arguments([*map(str, words)]))
        list(speaker.replies([[1, 5]], most=2))
        owner = weakref.ref(speaker), weakref.ref(speaker.base)
        del speaker
        assert [one() for one in owner] == [None, None]
    finally:
        gc.enable()


def test_decoding_does_not_plan_attention_anew_for_each_length(base_dir):
    """cuDNN would, for each of the shapes that come with nearly every token."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    Speaker(sample.arguments(["--base", str(base_dir), "--value", "none"]))
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_several_value_models_and_the_question_behind_them(run, base_dir, value_dir, tmp_path):
    """Proxy tuning is an expert at 1 and what it was before at -1; the same twice is none."""
    other = make_directory(tmp_path / "other", seed=5)

    def ask(*words):
        return run("sample.py", "--base", base_dir, "--max_new_tokens", 12, *words)

    def said(*words):
        result = ask(*words)
        assert result.returncode == 0, result.stderr
        return result.stdout

    alone = said("--value", "none", "hello you")
    one = said("--value", value_dir, "hello you")
    assert said("--value", value_dir, other, "--alpha", 1, 0, "hello you") == one != alone
    assert said("hello you", "--alpha", 1, 0, "--value", value_dir, other) == one
    assert said("--alpha", 1, -1, "--value", value_dir, value_dir, "hello you") == alone
    both = said("--value", value_dir, other, "hello you")
    assert both == said("--value", other, value_dir, "hello you") not in (one, alone)
    chat = run(
        "sample.py", "--base", base_dir, "--max_new_tokens", 12, "--value", value_dir, other,
        stdin="hello you\n/alpha 1 0\n/alpha 1\n/value\n",
    )  # fmt: skip
    assert chat.stdout == both + one
    assert (
        "needs a number for each of 2 models" in chat.stderr and "cannot speak alone" in chat.stderr
    )
    assert_refused(
        ask("--value", value_dir, other, "--alpha", 1, "--", "q"), "--alpha has 1 numbers"
    )
    assert_refused(ask("--value", tmp_path / "x", "hello"), "--value", "is no directory")
    assert_refused(ask("--value", value_dir, tmp_path / "x", "--alpha", 1, 1, "q"), "no directory")
    assert_refused(ask("--value", value_dir, "--alpha", "much", "hello"), "--alpha", "not a number")
    explained = ask("--value", value_dir, other, "--explain", "hello you")
    assert explained.returncode == 0 and "changed by the value model" in explained.stderr
