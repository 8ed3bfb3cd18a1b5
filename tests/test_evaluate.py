"""The paper's benchmarks: against the harness's own model, on files made here and on real ones."""

import json
import os
import random
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_refused, make_directory

pytest.importorskip("lm_eval", reason="the harness is not installed")

import datasets  # noqa: E402
import nltk  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

import sample  # noqa: E402
from extras import benchmarks, evaluate, harness  # noqa: E402
from extras.benchmarks import BENCHMARKS, COLUMNS  # noqa: E402
from plumbing.files import InputError  # noqa: E402
from plumbing.pair import Speaker  # noqa: E402
from plumbing.tokenizer import Tokenizer

SENTENCES = (
    "The cat sat on the mat.",
    "Where is the dog?",
    "The dog is in the garden.",
    "It rains.",
    "What does the cat say?",
    "The cat says good morning!",
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whoever asks the network in these tests has failed."""

    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# ---------------------------------------------------------------- files made here


def hub_copy(folder, path, config, **splits):
    """A data set's folder as `hf download` leaves it."""
    folder = folder / path.split("/")[-1]
    place = config or "data"
    (folder / place).mkdir(parents=True)
    files = []
    for split, rows in splits.items():
        name = f"{place}/{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows).to_parquet(folder / name)
        files.append(f"  - split: {split}\n    path: {place}/{split}-*\n")
    head = f"configs:\n- config_name: {config or 'default'}\n  data_files:\n{''.join(files)}"
    (folder / "README.md").write_text(f"---\n{head}---\n")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A few questions of each benchmark, in the forms in which they come."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)

    def lines(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def say():
        return draw.choice(SENTENCES)

    # as their authors published them
    for split in ("train", "test"):
        rows = [{"question": f"{n}. {say()}", "answer": f"{say()}\n#### {n}"} for n in range(8)]
        lines(f"gsm8k-{split}.jsonl", rows)
    kwargs = [{"num_words": 3, "relation": "at least"}]
    instruction = {"instruction_id_list": ["length_constraints:number_words"], "kwargs": kwargs}
    lines("ifeval.jsonl", [{"key": n, "prompt": say(), **instruction} for n in range(5)])
    program = {"entry_point": "f"}
    program |= {"canonical_solution": "    return 2 * x\n"}
    program |= {"test": "def check(candidate):\n    assert candidate(2) == 4\n"}
    rows = [{"prompt": f'def f(x):\n    """Twice x, {n}."""\n', **program} for n in range(3)]
    lines("HumanEval.jsonl", [{"task_id": f"HumanEval/{n}", **row} for n, row in enumerate(rows)])
    tests = ["assert f(2) == 4", "assert f(3) == 6", "assert f(0) == 0"]
    task = {"code": "def f(x):\n    return 2 * x", "test_list": tests, "test_setup_code": ""}
    rows = [{"task_id": n, "text": f"{n}. Double x by f.", **task} for n in (3, 11, 12)]
    lines("mbpp.jsonl", rows)
    (folder / "nltk_data" / "tokenizers" / "punkt_tab").mkdir(parents=True)  # for ifeval
    (folder / "mmlu").mkdir()
    head = "question,choice0,choice1,choice2,choice3,answer\n"
    for split in ("dev", "test"):
        row = ["Where is it?", "on the mat", "in the garden", '"here, there"', "nowhere"]
        rows = "".join(",".join([*row, str(n % 4)]) + "\n" for n in range(6))
        (folder / "mmlu" / f"astronomy_{split}.csv").write_text(head + rows)
        rows = "".join(",".join([*row, "ABCD"[n % 4]]) + "\n" for n in range(6))
        (folder / "mmlu" / f"anatomy_{split}.csv").write_text(rows)
    head = "\ufeffType,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
    row = "A,B,Where is the cat?,On the mat,On the mat; In the garden,Nowhere; It rains; ,-\n"
    (folder / "truthfulqa.csv").write_text(head + 4 * row)
    (folder / "toxigen").mkdir()
    for group in ("cats", "dogs"):
        rows = "".join(f"- {say()}\\n- {n}\n" for n in range(5))
        (folder / "toxigen" / f"hate_{group}.txt").write_text(rows)
    turns = {"category": "math", "turns": ["Where is the dog?", "And the cat?"]}
    lines("mt-bench-questions.jsonl", [{"question_id": 81 + n, **turns} for n in range(2)])

    # as the Hub has them
    def choices(n):
        return {"text": [say() for _ in range(4)], "label": list("ABCD")}

    rows = [
        {"question": say(), "choices": choices(n), "answerKey": "ABCD"[n % 4]} for n in range(30)
    ]
    splits = {"train": rows, "validation": rows, "test": rows[:6]}
    hub_copy(folder, "allenai/ai2_arc", "ARC-Challenge", **splits)
    row = {"ctx_a": say(), "ctx_b": "it rains", "activity_label": "Cats"}
    rows = [{**row, "endings": [say() for _ in range(4)], "label": str(n % 4)} for n in range(12)]
    hub_copy(folder, "Rowan/hellaswag", None, train=rows, validation=rows[:6])
    row = {"option1": "mat", "option2": "dog"}
    rows = [
        {"sentence": f"The {n} cats sat on the _ .", **row, "answer": str(1 + n % 2)}
        for n in range(12)
    ]
    hub_copy(folder, "allenai/winogrande", "winogrande_xl", train=rows, validation=rows[:6])
    return folder


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    """A base and a value model with room for examples."""
    folder = tmp_path_factory.mktemp("roomy")
    changes = dict(max_position_embeddings=4096)
    return make_directory(folder / "base", 1, **changes), make_directory(
        folder / "value", 2, **changes
    )


@pytest.fixture
def measured(run, roomy, data_dir, tmp_path):
    """extras/evaluate.py on small models: measured("--tasks", "gsm8k")."""

    def measured(*words, base=roomy[0], value=roomy[1], data=data_dir, out=tmp_path / "out"):
        models = ["--base", base, "--max_new_tokens", 12]
        if "--value" not in words:
            models += ["--value", value]
        return run("extras/evaluate.py", *models, "--data", data, "--out", out, *words)

    return measured


def pair_of(base, value, out, batch_size=4, most=12):
    """The models as the harness sees them."""
    speaker = evaluate.Examinee(sample.arguments(["--base", str(base), "--value", str(value)]))
    out.mkdir(exist_ok=True)
    return harness.Pair(speaker, harness.Answers(out / "answers.jsonl", {}), batch_size, most)


def requests_of(name, shots, data, limit=50, most=None):
    (task,) = harness.load_task(name, shots, data)["tasks"].values()
    if most and task.OUTPUT_TYPE == "generate_until":
        how = {**task.config.generation_kwargs, "max_gen_toks": most}
        task.set_config(key="generation_kwargs", value=how)
    task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return task.instances


def their_model(base, tmp_path, kind=HFLM, context=None):
    """The harness's own model, with our tokenizer as we export it."""
    Tokenizer(base).save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    options = dict(dtype="float32", device="cpu", max_length=context)
    return kind(pretrained=str(base), tokenizer=tokenizer, batch_size=4, **options)


# ---------------------------------------------------------------- equality


@pytest.mark.parametrize(
    "name, shots", [("arc_challenge", 25), ("hellaswag", 10), ("winogrande", 5)]
)
def test_answers_are_as_likely_as_for_the_harness(roomy, data_dir, tmp_path, name, shots):
    requests = requests_of(name, shots, data_dir)
    ours = pair_of(roomy[0], "none", tmp_path / "ours").loglikelihood(requests)
    theirs = their_model(roomy[0], tmp_path).loglikelihood(requests)
    assert len(ours) == len(theirs) >= 12
    assert [one[1] for one in ours] == [one[1] for one in theirs]
    for a, b in zip(ours, theirs):
        assert a[0] == pytest.approx(b[0], abs=1e-3)


def test_replies_are_those_of_the_harness(roomy, data_dir, tmp_path):
    requests = requests_of("gsm8k", 5, data_dir, most=12)
    ours = pair_of(roomy[0], "none", tmp_path / "ours").generate_until(requests)
    theirs = their_model(roomy[0], tmp_path).generate_until(requests)
    assert ours == theirs and len({*ours}) > 1


def test_a_text_that_is_too_long_loses_its_beginning(base_dir, data_dir, tmp_path):
    """The context is 256 tokens, and the examples have more."""
    ours = pair_of(base_dir, "none", tmp_path / "ours")
    theirs = their_model(base_dir, tmp_path)
    requests = requests_of("arc_challenge", 25, data_dir)
    for a, b in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests)):
        assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1]
    assert ours.cut == len({request.args for request in requests})
    requests = requests_of("gsm8k", 5, data_dir, most=12)
    assert ours.generate_until(requests) == theirs.generate_until(requests)
    assert ours.cut > len(requests)


def test_whole_texts_are_as_likely_as_for_the_harness(base_dir, tmp_path):
    from lm_eval.api.instance import Instance

    texts = [
        " ".join(SENTENCES) * n for n in (1, 9)
    ]  # within the context of 256 tokens, and past it
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in texts]
    ours = pair_of(base_dir, "none", tmp_path / "ours").loglikelihood_rolling(requests)
    theirs = their_model(base_dir, tmp_path).loglikelihood_rolling(requests)
    assert ours == pytest.approx(theirs, abs=1e-2) and ours[1] < 3 * ours[0]


CHATS = [
    [{"role": "user", "content": "Where is the dog?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where is the dog?"},
        {"role": "assistant", "content": "In the garden."},
        {"role": "user", "content": "And the cat?"},
    ],
]


MARKED = """
{%- for message in messages -%}
    {{- bos_token + message.role + ': ' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content.strip() + eos_token -}}{%- endgeneration -%}
    {%- else -%}{{- message.content.strip() + ' ' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- bos_token + 'assistant: ' -}}{%- endif -%}"""


# one that does not strip what is said
KEEPS = """{{- bos_token -}}
{%- for message in messages -%}{{- '[' + message.role + ']\n' + message.content + eos_token -}}
{%- endfor -%}{%- if add_generation_prompt -%}{{- '[assistant]\n' -}}{%- endif -%}"""


@pytest.mark.parametrize("template", ["plain", "llama-2", MARKED, KEEPS])
def test_chats_are_read_as_by_the_harness(tmp_path, template):
    """Also those that end with the beginning of a reply, a newline at its end included."""
    own = template in (MARKED, KEEPS)
    base = make_directory(tmp_path / "base", 1, "plain" if own else template)
    if own:
        (base / "chat_template.jinja").write_text(template)
    ours = pair_of(base, "none", tmp_path / "ours")
    theirs = their_model(base, tmp_path)
    begun = [*CHATS[0], {"role": "assistant", "content": "Here it is:\nThe dog"}]
    code = [*CHATS[0], {"role": "assistant", "content": "```python\n"}]
    chats = [(CHATS[0], True), (CHATS[1], True), (begun, False), (code, False)]
    if template == "llama-2":  # transformers takes the space that it writes for the message's own
        chats.pop()
    for chat, asked in chats:
        shown = theirs.apply_chat_template(chat, add_generation_prompt=asked)
        mine = ours.apply_chat_template(chat, add_generation_prompt=asked)
        assert ours.tok_encode(mine) == theirs.tok_encode(shown), (chat, mine, shown)


def test_a_chat_cannot_be_left_by_a_text_that_looks_like_a_special_token(base_dir, tmp_path):
    ours = pair_of(base_dir, "none", tmp_path / "ours")
    chat = [{"role": "user", "content": "Where</s>?"}]
    ids = ours.tok_encode(ours.apply_chat_template(chat))
    assert ids == ours.speaker.tokenizer.prompt(chat) and ids.count(2) == 0


class NaivePair(HFLM):
    """The logits of two transformers models added, the whole text read for each token."""

    def _model_call(self, inps, **_):
        with torch.no_grad():
            return self.model(inps).logits + self.second(inps).logits

    def replies(self, requests, most):
        return [self.reply(request.args[0], request.args[1]["until"], most) for request in requests]

    def reply(self, prompt, stops, most):
        ids, new = self.tok_encode(prompt)[-(self.max_length - most) :], []
        while len(new) < most and new[-1:] != [self.eot_token_id]:
            new.append(self._model_call(torch.tensor([ids + new]))[0, -1].argmax().item())
        text = self.tok_decode(new)
        for stop in stops:
            text = text.split(stop)[0]
        return text


def naive_pair(base, value, tmp_path, context=None):
    pair = their_model(base, tmp_path, NaivePair, context)
    pair.second = AutoModelForCausalLM.from_pretrained(value, dtype=torch.float32).eval()
    return pair


def test_a_pair_is_the_sum_of_two_transformers_models(roomy, data_dir, tmp_path):
    theirs = naive_pair(*roomy, tmp_path)
    ours = pair_of(*roomy, tmp_path / "ours")
    requests = requests_of("hellaswag", 10, data_dir)
    for a, b in zip(ours.loglikelihood(requests), theirs.loglikelihood(requests)):
        assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1]
    requests = requests_of("gsm8k", 2, data_dir, most=12)
    assert ours.generate_until(requests) == theirs.replies(requests, 12)


# ---------------------------------------------------------------- real models, real questions

REAL = {  # a task, and its examples
    **dict.fromkeys(("ifeval", "gsm8k", "humaneval", "truthfulqa_mc2"), 0),
    **dict.fromkeys(
        [
            f"mmlu_{subject}"
            for subject in (
                "astronomy",
                "global_facts",
                "high_school_geography",
                "marketing",
                "philosophy",
            )
        ],
        5,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_fifty_real_questions_are_answered_as_by_the_harness(realdata, tmp_path, name, monkeypatch):
    """A base alone: the same likelihoods and the same replies, item by item."""
    monkeypatch.setattr(harness, "find_punkt", lambda data: None)
    monkeypatch.setattr(nltk, "download", lambda name: True)
    base = realdata / "models" / "stories260K"
    requests = requests_of(name, REAL[name], realdata / "benchmarks", most=16)
    assert len({request.doc_id for request in requests}) == 50
    ours = getattr(pair_of(base, "none", tmp_path / "ours", 16, 16), requests[0].request_type)
    theirs = getattr(their_model(base, tmp_path), requests[0].request_type)
    compare(ours(requests), theirs(requests))


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_real_pair_is_the_sum_of_two_transformers_models(realdata, tmp_path, name, monkeypatch):
    monkeypatch.setattr(harness, "find_punkt", lambda data: None)
    monkeypatch.setattr(nltk, "download", lambda name: True)
    base, value = (realdata / "models" / name for name in ("stories260K", "llama2xs"))
    requests = requests_of(name, REAL[name], realdata / "benchmarks", most=16)
    ours = pair_of(base, value, tmp_path / "ours", 16, 16)
    theirs = naive_pair(base, value, tmp_path, ours.speaker.context)
    if requests[0].request_type == "loglikelihood":
        compare(ours.loglikelihood(requests), theirs.loglikelihood(requests))
    else:
        compare(ours.generate_until(requests), theirs.replies(requests, 16))


def compare(ours, theirs):
    """Likelihoods within a thousandth of a nat, replies letter by letter."""
    assert len(ours) == len(theirs) >= 50
    for a, b in zip(ours, theirs):
        if isinstance(a, str):
            assert a == b
        else:
            assert a[0] == pytest.approx(b[0], abs=1e-3) and a[1] == b[1]


# ---------------------------------------------------------------- the command


def scores(out) -> dict:
    row = json.loads((out / "row.json").read_text())
    row.pop("limit", None)
    return row


def known(out) -> dict:
    """Keys and answers that a run has kept, but for the line about the pair."""
    return dict(json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()[1:])


def test_a_row_of_table_1(measured, tmp_path):
    """All tasks but those that need a judge or a sandbox; the row has the paper's columns."""
    tasks = "mt-bench ifeval gsm8k arc_challenge hellaswag truthfulqa_mc2 winogrande".split()
    done = measured("--tasks", *tasks, "mmlu_astronomy", "mmlu_anatomy", "--limit", 4)
    assert done.returncode == 0, done.stderr
    row = scores(tmp_path / "out")
    assert row.pop("MT-Bench") is None
    assert row.keys() == {"IFEval", "GSM8K", "ARC", "Hellaswag", "TruthfulQA", "Winogrande"}
    assert all(0 <= score <= 100 for score in row.values())
    assert 0 < row["TruthfulQA"] < 100

    # the harness's own files, and the table: a line of columns, one of scores
    results = json.loads((tmp_path / "out" / "results_arc_challenge.json").read_text())
    assert results["results"]["arc_challenge"]["acc,none"] == row["ARC"] / 100
    assert results["n-shot"]["arc_challenge"] == 25 and results["config"]["limit"] == 4
    samples = (tmp_path / "out" / "samples_hellaswag.jsonl").read_text().splitlines()
    assert len(samples) == 4 and len(json.loads(samples[0])["resps"]) == 4
    _, table = done.stdout.split("\n\n")
    head, line, prompts, *notes = table.splitlines()
    assert head.split() == [*COLUMNS] and line.startswith("this pair  ")
    assert line.split()[2:] == [
        "-" if row.get(column) is None else f"{row[column]:.2f}" for column in COLUMNS
    ]
    assert "the harness's" in prompts and len(notes) == 7
    assert "(hellaswag: limit 4)" in notes and "(gsm8k: limit 4, max_new_tokens 12)" in notes
    assert "mmlu_anatomy acc " in done.stdout
    for name in ("ifeval", "gsm8k", "mt-bench"):
        assert f"{name}, as chats\n" in done.stderr
    assert "hellaswag\n" in done.stderr


def test_what_is_asked_as_a_chat(measured, tmp_path, roomy):
    """A pair, and a model with a template; a base without one goes on from plain text."""

    def first_prompt(out):
        sample = (out / "samples_gsm8k.jsonl").read_text().splitlines()[0]
        return json.loads(sample)["arguments"][0][0]

    words = ("--tasks", "gsm8k", "--limit", 1)
    bare = make_directory(tmp_path / "bare", 1, template=None, max_position_embeddings=4096)
    measured(*words, value="none", base=bare, out=tmp_path / "a")
    assert first_prompt(tmp_path / "a").startswith("Question: ")
    measured(*words, value="none", out=tmp_path / "b")
    assert first_prompt(tmp_path / "b").startswith("<s>User: Question: ")
    measured(*words, value="none", base=bare, out=tmp_path / "c")
    measured(*words, "--template", "llama-2", value="none", base=bare, out=tmp_path / "d")
    assert first_prompt(tmp_path / "d").startswith("<s>[INST] Question: ")
    assert first_prompt(tmp_path / "d").endswith("[/INST]")


def test_a_run_that_was_stopped_goes_on(measured, tmp_path, monkeypatch):
    words = ("--tasks", "winogrande", "gsm8k", "--batch_size", 2)
    whole = measured(*words, out=tmp_path / "whole")
    kept = known(tmp_path / "whole")
    assert len(kept) == 6 * 2 + 8

    # stopped after some answers, the last one half written
    add, left = harness.Answers.add, iter(range(9))

    def stop(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        add(*args)

    with monkeypatch.context() as patch:
        patch.setattr(harness.Answers, "add", stop)
        assert measured(*words).returncode == 130
    out = tmp_path / "out"
    assert not (out / "row.json").exists() and len(known(out)) == 9
    with open(out / "answers.jsonl", "a") as file:
        file.write('["0123", [-1.')

    # what is known is not asked again
    asked = []
    likelihoods = evaluate.Examinee.likelihoods

    def counted(self, questions, batch_size):
        asked.extend(questions)
        yield from likelihoods(self, questions, batch_size)

    monkeypatch.setattr(evaluate.Examinee, "likelihoods", counted)
    again = measured(*words)
    assert again.stdout == whole.stdout and len(asked) == 12 - 9
    assert known(out).keys() == kept.keys() and scores(out) == scores(tmp_path / "whole")
    measured(*words)
    assert len(asked) == 12 - 9


def test_what_is_known_is_not_asked_again(measured, tmp_path, monkeypatch):
    """Also where one score has no spread; another task, or another form, is asked."""
    words = ("--value", "none", "--limit", 1)
    first = measured("--tasks", "winogrande", "gsm8k", *words)
    assert first.returncode == 0, first.stderr
    row = scores(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Speaker, "__init__", None)
        again = measured("--tasks", "winogrande", "gsm8k", *words)
        assert again.stdout == first.stdout and again.stderr.count("known already") == 2
        assert scores(tmp_path / "out") == row

        # as plain text it would be another question
        patch.setattr(evaluate.Evaluation, "as_chats", lambda self, name: False)
        with pytest.raises(TypeError):
            measured("--tasks", "gsm8k", *words)
    assert measured("--tasks", "hellaswag", *words).returncode == 0
    assert scores(tmp_path / "out").keys() == {"GSM8K", "Winogrande", "Hellaswag"}
    assert measured("--tasks", "gsm8k", "--value", "none", "--limit", 2).returncode == 0
    lines = (tmp_path / "out" / "samples_gsm8k.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 2  # two questions, each by two ways to find the number


def test_a_judge_need_not_be_named_again(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.mt_bench, "find", lambda data, what: data / FILES[what])
    means = {"MT-Bench": 4.5, "turn 1": 5.0, "turn 2": 4.0, "by category": {"math": 4.5}}
    monkeypatch.setattr(evaluate.mt_bench, "judge", lambda *_: means)
    words = ("--tasks", "mt-bench")
    judge = ("--judge_url", "http://127.0.0.1:9/v1", "--judge_model", "gpt-4")
    assert measured(*words).returncode == 0 and scores(tmp_path / "out") == {"MT-Bench": None}
    done = measured(*words, *judge)
    assert done.returncode == 0 and scores(tmp_path / "out") == {"MT-Bench": 4.5}
    assert "(mt-bench: max_new_tokens 12, judge gpt-4)" in done.stdout
    assert measured(*words).stdout == done.stdout
    assert scores(tmp_path / "out") == {"MT-Bench": 4.5}


FILES = dict.fromkeys(("questions", "prompts", "references"), "mt-bench-questions.jsonl")


def test_answers_of_another_pair_are_refused(measured, tmp_path, roomy, base_dir):
    words = ("--tasks", "winogrande", "--limit", 1)
    assert measured(*words).returncode == 0
    file = str(tmp_path / "out" / "answers.jsonl")
    assert_refused(measured(*words, "--alpha", 0.5), file, "--alpha", "choose another --out")
    assert_refused(measured(*words, value=roomy[0]), file, "--value")
    assert_refused(measured(*words, "--template", "llama-2"), file, "--template")
    assert_refused(measured(*words, value="none"), file, "--value")


def test_code_is_run_only_where_it_is_allowed(measured, tmp_path):
    for name in ("humaneval", "mbpp"):
        assert_refused(measured("--tasks", name), name, "--run_code")
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_programs_are_checked_in_the_sandbox(measured, tmp_path, monkeypatch):
    """The harness's own tasks, with replies that are right but for one."""

    def replies(self, prompts, stops, most, **changes):
        def reply(text):
            ids = self.tokenizer.encoding(text).ids
            return type("Reply", (), {"ids": ids})

        texts = ["return 2 * x\n```\nIt doubles.", "return 3 * x\n```"]
        body = "\n    " if stops else "\ndef f(x):\n    "  # mbpp asks for all of it, and no stops
        return [reply(body + texts[n == 0]) for n, _ in enumerate(prompts)]

    monkeypatch.setattr(Speaker, "whole_replies", replies)
    done = measured("--tasks", "humaneval", "mbpp", "--run_code")
    assert done.returncode == 0, done.stderr
    assert scores(tmp_path / "out") == {
        "HumanEval": pytest.approx(200 / 3),
        "MBPP": pytest.approx(50),
    }


def test_toxic_completions_are_counted(measured, tmp_path, monkeypatch):
    """Texts are judged by a classifier; here by one that finds a third of them toxic."""

    class Classifier:
        def __init__(self, directory):
            assert directory == str(tmp_path)

        def share(self, texts):
            assert len(texts) == 4
            return 1 / 3

    monkeypatch.setattr(harness, "Classifier", Classifier)
    done = measured("--tasks", "toxigen_generation", "--toxigen_judge", tmp_path, "--limit", 4)
    assert done.returncode == 0, done.stderr
    assert scores(tmp_path / "out") == {"Toxigen↓": pytest.approx(100 / 3)}


def test_a_real_classifier(tmp_path):
    """A tiny random RoBERTa of transformers: its two labels, and weights from safetensors only."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import (
        PreTrainedTokenizerFast,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "cat": 4, "dog": 5}
    backend = Backend(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    special = dict(pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path)
    shape = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config = RobertaConfig(vocab_size=6, max_position_embeddings=20, num_labels=2, **shape)
    torch.manual_seed(0)
    model = RobertaForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.out_proj.weight.mul_(100)
        model.roberta.embeddings.word_embeddings.weight.mul_(50)
    model.save_pretrained(tmp_path)

    texts = ["cat", "dog", "cat dog dog", "dog cat", "cat cat cat cat"]
    judge = harness.Classifier(str(tmp_path))
    with torch.no_grad():
        ids = [torch.tensor([[words[word] for word in text.split()]]) for text in texts]
        expected = [model(one).logits.argmax().item() for one in ids]
    assert 0 < sum(expected) < 5
    assert judge.share(texts) == sum(expected) / 5

    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="is no classifier"):
        harness.Classifier(str(tmp_path))


# ---------------------------------------------------------------- local files


def test_files_of_the_authors(data_dir):
    def rows(path, name=None):
        return benchmarks.local_rows(data_dir, path, name)

    astronomy, anatomy = (rows("cais/mmlu", name) for name in ("astronomy", "anatomy"))
    assert [row["answer"] for row in astronomy["test"]] == [0, 1, 2, 3, 0, 1]
    assert [row["answer"] for row in anatomy["dev"]] == [0, 1, 2, 3, 0, 1]
    assert astronomy["dev"][0]["choices"][2] == "here, there"
    (first, *_) = rows("truthfulqa/truthful_qa", "multiple_choice")["validation"]
    assert first["question"] == "Where is the cat?"
    assert first["mc1_targets"] == {
        "choices": ["On the mat", "Nowhere", "It rains"],
        "labels": [1, 0, 0],
    }
    assert first["mc2_targets"]["labels"] == [1, 1, 0, 0]
    assert [row["task_id"] for row in rows("google-research-datasets/mbpp")["test"]] == [11, 12]
    toxic = benchmarks.toxic_prompts(data_dir, per_group=3)
    assert [row["group"] for row in toxic] == ["cats", "dogs"] * 3
    assert all(row["text"].count("\n") == 1 and "\\" not in row["text"] for row in toxic)
    assert toxic == benchmarks.toxic_prompts(data_dir, per_group=3)
    assert rows("someone/else") == {}


def test_what_is_missing_is_told_before_a_model_is_loaded(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(Speaker, "__init__", None)
    monkeypatch.setattr(harness.nltk.data, "path", [])
    empty = tmp_path / "empty"
    empty.mkdir()

    def refused(name, *words):
        options = ("--toxigen_judge", empty) if name == "toxigen_generation" else ()
        assert_refused(measured("--tasks", name, *options, data=empty), *words)

    command = "hf download --repo-type dataset {} --local-dir DIR/{}"
    refused("gsm8k", str(empty), command.format("openai/gsm8k", "gsm8k"))
    refused("arc_challenge", command.format("allenai/ai2_arc", "ai2_arc"))
    refused("mmlu", command.format("cais/mmlu", "mmlu"))
    refused("ifeval", "punkt_tab", "nltk.downloader")
    refused("toxigen_generation", "toxigen/hate_GROUP.txt")
    refused("mt-bench", "question.jsonl")
    refused("gsm9k", "gsm9k", "no such task", "gsm8k")


def test_too_few_examples_are_told(measured, data_dir, tmp_path):
    done = measured("--tasks", "gsm8k", "--shots", 20)
    assert_refused(done, "gsm8k", "20 examples")
    assert measured("--tasks", "gsm8k", "--shots", 3, "--limit", 1).returncode == 0


@pytest.mark.parametrize(
    "name, file, text, told",
    [
        ("gsm8k", "gsm8k-test.jsonl", '{"question": "x"}', "answer"),
        ("gsm8k", "gsm8k-test.jsonl", "[1, 2]", "line 1"),
        ("gsm8k", "gsm8k-test.jsonl", '{"question": 5, "answer": null}', "question"),
        ("humaneval", "HumanEval.jsonl", '{"task_id": "a", "prompt": "b"}', "line 1"),
        ("mbpp", "mbpp.jsonl", '{"task_id": "a"}', "task_id"),
        ("mbpp", "mbpp.jsonl", '{"task_id": 11, "text": "a", "test_list": ["b"]}', "test_list"),
        ("truthfulqa_mc2", "truthfulqa.csv", "Question,Best Answer,Correct Answers\\n", "column"),
    ],
)
def test_a_damaged_line_is_named(measured, tmp_path, name, file, text, told):
    (tmp_path / file).write_text(text.replace("\\n", "\n") + "\n")
    code = ["--run_code"] * (name in ("humaneval", "mbpp"))
    assert_refused(measured("--tasks", name, *code, data=tmp_path), file, told)


def test_all_that_is_missing_is_told_at_once(measured, tmp_path):
    (tmp_path / "empty").mkdir()
    done = measured("--tasks", "gsm8k", "hellaswag", "mt-bench", data=tmp_path / "empty")
    assert_refused(done, "openai/gsm8k", "Rowan/hellaswag", "question.jsonl")
    assert not (tmp_path / "out" / "answers.jsonl").exists()
    assert_refused(measured("--tasks", "gsm8k", data=tmp_path / "none"), "none: is no folder")


def test_an_instruction_that_nobody_can_check_is_told_before_it_is_asked(
    measured, data_dir, tmp_path
):
    line = json.loads((data_dir / "ifeval.jsonl").read_text().splitlines()[0])
    line["instruction_id_list"] = ["letters:all_e"]
    (tmp_path / "ifeval.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "nltk_data" / "tokenizers" / "punkt_tab").mkdir(parents=True)
    done = measured("--tasks", "ifeval", data=tmp_path)
    assert_refused(done, "ifeval, question 1", "letters:all_e")


def test_files_that_are_not_ours_are_refused(measured, tmp_path):
    words = ("--tasks", "winogrande", "--limit", 1)
    assert measured(*words).returncode == 0
    results = tmp_path / "out" / "results_winogrande.json"
    results.write_text('{"conditions": {}}')
    assert_refused(measured(*words), "results_winogrande.json", "remove it")
    results.unlink()
    answers = tmp_path / "out" / "answers.jsonl"
    lines = answers.read_text()
    for damaged in ('"abc"\n', '["k", 1, 2]\n', '[["x"], 3]\n', '["pair", 7]\n'):
        answers.write_text(damaged)
        assert_refused(measured(*words), "answers.jsonl", "remove the file")
    answers.write_text(lines.partition("\n")[2])
    assert_refused(measured(*words), "answers.jsonl", "of which models")


def test_other_questions_in_the_same_folder_are_asked(measured, data_dir, tmp_path):
    file = tmp_path / "gsm8k-test.jsonl"
    file.write_text((data_dir / "gsm8k-test.jsonl").read_text())
    words = ("--tasks", "gsm8k", "--limit", 1)
    measured(*words, data=tmp_path)
    assert "known already" in measured(*words, data=tmp_path).stderr
    file.write_text(json.dumps({"question": "Another one?", "answer": "#### 7"}) + "\n")
    assert "known already" not in measured(*words, data=tmp_path).stderr


def test_damaged_files_are_refused(measured, tmp_path):
    (tmp_path / "mmlu").mkdir()
    (tmp_path / "mmlu" / "astronomy_test.csv").write_text("Where?,a,b,c,d,7\n")
    done = measured("--tasks", "mmlu_astronomy", data=tmp_path)
    assert_refused(done, "astronomy_test.csv, question 1", "0 to 3 or A to D")
    (tmp_path / "truthfulqa.csv").write_text("Question,Answer\na,b\n")
    done = measured("--tasks", "truthfulqa_mc2", data=tmp_path)
    assert_refused(done, "truthfulqa.csv", "'Best Answer'")
    (tmp_path / "gsm8k-test.jsonl").write_text('{"question": ')
    done = measured("--tasks", "gsm8k", data=tmp_path)
    assert_refused(done, "gsm8k-test.jsonl, line 1", "not valid JSON")


# ---------------------------------------------------------------- the command line


def test_options_that_cannot_take_effect_are_refused(measured, base_dir, tmp_path):
    task = ("--tasks", "winogrande")
    assert_refused(measured(), "--suite paper", "--tasks")
    assert_refused(measured(*task, "--suite", "paper"), "do not go together")
    assert_refused(measured(*task, "--temperature", 1), "temperature", "decides that itself")
    assert_refused(measured(*task, "--system", "Be brief."), "system", "decides that itself")
    assert_refused(measured(*task, "--draft", base_dir), "--draft", "no new tokens")
    assert_refused(measured(*task, "--judge_url", "http://127.0.0.1"), "--judge_url", "mt-bench")
    assert_refused(measured("--tasks", "mt-bench", "--judge_model", "x"), "go together")
    assert_refused(measured(*task, "--toxigen_judge", tmp_path), "--toxigen_judge")
    assert_refused(measured(*task, "--run_code"), "--run_code")
    assert_refused(measured("--tasks", "mt-bench", "--shots", 2), "--shots")
    assert measured(*task, "--batch-size", 3, "--limit", 1).returncode == 0


def test_a_folder_of_others_is_no_place_for_results(measured, tmp_path, roomy):
    (tmp_path / "mine.txt").write_text("mine")
    assert_refused(measured("--tasks", "winogrande", out=tmp_path), "mine.txt")
    assert_refused(measured("--tasks", "winogrande", out=roomy[0]), "not from here")
    assert_refused(measured("--tasks", "winogrande", out=roomy[0] / "x"), "--out")


def test_a_reply_that_fits_no_context_is_refused(run, base_dir, data_dir, tmp_path):
    """IFEval asks for 1280 tokens; the context is 256."""
    words = ["--base", base_dir, "--value", "none", "--data", data_dir, "--out", tmp_path / "out"]
    done = run("extras/evaluate.py", *words, "--tasks", "ifeval")
    assert done.returncode == 2 and "1280 tokens" in done.stderr
    assert "256" in done.stderr and "--max_new_tokens" in done.stderr


def test_without_the_harness_one_line_says_what_to_install(run, monkeypatch, tmp_path, base_dir):
    monkeypatch.setattr(evaluate, "harness", None)
    monkeypatch.setattr(evaluate, "MISSING", "lm_eval", raising=False)
    words = ["--base", base_dir, "--value", "none", "--tasks", "gsm8k", "--out", tmp_path / "out"]
    done = run("extras/evaluate.py", *words)
    assert_refused(done, "lm_eval is missing", "pip install -r requirements-evaluate.txt")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the paper's scores


def test_the_papers_rows():
    rows = benchmarks.paper_rows()
    assert len(rows) == 29
    assert rows["Llama-2-70B", "1.1B norm"] == dict(
        zip(COLUMNS, (5.37, 16.8, 24.9, 70, 37.8, 28.6, 62.8, 66.7, 67.9, 37.1, 82.9))
    )
    assert rows["Tinyllama-1.1B", "Full"]["MT-Bench"] == 3.84
    assert all(len(row) == 11 for (_, system), row in rows.items() if "proxy" not in system)
    assert {benchmark.column for benchmark in BENCHMARKS.values()} | {"MT-Bench"} == {*COLUMNS}


def test_the_papers_rows_stand_beside_models_of_their_size():
    names = [*benchmarks.beside(6_738_415_616, 1_100_048_384)]
    assert "Llama-2-7B + 1.1B norm" in names and "Codellama-7B + 1.1B" in names
    assert not any("fine-tuned" in name or "+ 7B" in name or "13B" in name for name in names)
    assert not any("proxy" in name for name in names)
    tuned = benchmarks.beside(6_738_415_616, 1_100_048_384, proxy=True)
    assert [*tuned] == ["Llama-2-7B + 1.1B - 1.1B, proxy tuning"]
    assert [*benchmarks.beside(68_976_648_192)] == ["Llama-2-70B fully fine-tuned"]
    assert benchmarks.beside(260_032) == {} == benchmarks.beside(260_032, 1_100_048_384)


# ---------------------------------------------------------------- several ranks


@pytest.mark.slow
def test_two_ranks_answer_as_one(measured, roomy, data_dir, tmp_path):
    """Each with a slice of both models; started again, and where something is missing, they end."""
    words = ("--tasks", "winogrande", "gsm8k", "--limit", "4")
    assert measured(*words, out=tmp_path / "one").returncode == 0

    def two(*words, data=data_dir):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [
            "--nproc_per_node",
            "2",
            "-m",
            "extras.evaluate",
            "--base",
            roomy[0],
            "--value",
            roomy[1],
        ]
        command += ["--max_new_tokens", "12", "--data", data, "--out", tmp_path / "two", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            [*map(str, command)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
            timeout=300,
        )

    done = two(*words)
    assert done.returncode == 0, done.stderr
    ours, theirs = known(tmp_path / "one"), known(tmp_path / "two")
    assert ours.keys() == theirs.keys() and len(ours) == 12
    for key, answer in ours.items():
        if isinstance(answer, str):
            assert theirs[key] == answer
        else:
            assert theirs[key][0] == pytest.approx(answer[0], abs=1e-3)
    again = two(*words)
    assert again.returncode == 0 and again.stderr.count("known already") == 2, again.stderr
    assert again.stdout == done.stdout
    missing = two("--tasks", "hellaswag", data=tmp_path)
    assert missing.returncode != 0 and missing.stderr.count("error: ") == 1
    assert "has no Rowan/hellaswag" in missing.stderr
