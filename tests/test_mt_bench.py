"""MT-Bench: answers of small models, and a judge of our own at an address of this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import make_directory

import sample
from extras import mt_bench
from plumbing.files import InputError
from plumbing.pair import Speaker

QUESTIONS = [
    ("math", "Where is the cat?"),
    ("writing", "What does the dog say?"),
    ("coding", "The cat sat on the mat, and the dog is in the garden. Where is the mat?"),
    ("stem", "Where is the garden?"),
    ("reasoning", "Is it the dog?"),
    ("poetry", "Hello"),
    ("math", "The cat says"),
    ("writing", "Good morning!"),
]
QUESTIONS = [
    {"question_id": 90 - i, "category": category, "turns": [text, "And the dog?"]}
    for i, (category, text) in enumerate(QUESTIONS)
]
GREEDY = {q["question_id"] for q in QUESTIONS if q["category"] in ("math", "coding", "reasoning")}
DRAWN = {q["question_id"] for q in QUESTIONS} - GREEDY


def speaker_of(base: Path, value: Path, *words) -> Speaker:
    words = ["--base", base, "--value", value, "--device", "cpu", *words]
    return Speaker(sample.arguments([*map(str, words)]))


@pytest.fixture(scope="module")
def speaker(base_dir, value_dir):
    return speaker_of(base_dir, value_dir)


@pytest.fixture
def data(tmp_path) -> Path:
    """The user's folder: questions, and our own stand-ins for FastChat's prompts and references."""
    folder = tmp_path / "data"
    (folder / "mt_bench" / "reference_answer").mkdir(parents=True)
    write(folder / "mt_bench" / "question.jsonl", QUESTIONS)
    prompts = [
        {"name": name, "system_prompt": f"Be {name}.", "prompt_template": places + " {x}, 1 to 10?"}
        for name, places in mt_bench.PROMPTS.values()
    ]
    for prompt in prompts:
        places = prompt["prompt_template"].split(" {x}")[0].split()
        prompt["prompt_template"] = "; ".join(f"{place} is {{{place}}}" for place in places)
    write(folder / "mt_bench" / "judge_prompts.jsonl", prompts)
    references = [
        {"question_id": q["question_id"], "choices": [{"turns": ["on the mat", "in the garden"]}]}
        for q in QUESTIONS
        if q["question_id"] in GREEDY
    ]
    write(folder / "mt_bench" / "reference_answer" / "gpt-4.jsonl", references)
    return folder


@pytest.fixture
def answer(speaker, data, tmp_path):
    """answers() to the questions, of 12 tokens each: by id what was said."""

    def answer(out="out", batch_size=2, speaker=speaker, **how):
        questions = mt_bench.find(data, "questions")
        how = {"max_new_tokens": 12} | how
        path = mt_bench.answers(speaker, questions, tmp_path / out, batch_size, **how)
        return said(path)

    return answer


def write(path: Path, entries: list) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def read(path: Path) -> list:
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(path: Path) -> dict:
    return {entry["question_id"]: entry["choices"][0]["turns"] for entry in read(path)}


def the_file(folder: Path) -> Path:
    (file,) = folder.glob("**/mt_bench/model_*/*.jsonl")
    return file


# ---------------------------------------------------------------- answers


def test_both_turns_are_what_the_pair_says_alone(speaker, answer, tmp_path):
    """Also in a batch; the second question comes after the first reply."""
    answers = answer(batch_size=8)
    assert {*answers} == GREEDY | DRAWN
    for question in QUESTIONS:
        messages = []
        for text, reply in zip(question["turns"], answers[question["question_id"]], strict=True):
            messages.append({"role": "user", "content": text})
            prompt = speaker.tokenizer.prompt(messages)
            alone = speaker.whole_replies([prompt], (), 12, temperature=0.0)
            same = alone[0].text.strip() == reply
            assert same or question["question_id"] in DRAWN
            messages.append({"role": "assistant", "content": reply})
    one_by_one = answer("alone", batch_size=1)
    assert all(one_by_one[i] == answers[i] for i in GREEDY)


def test_a_reply_ends_where_it_stops(speaker, answer, tmp_path, monkeypatch):
    """At a token, at a text, at the end of the context; the other rows of the batch go on."""
    texts = [question["turns"][0] for question in QUESTIONS]
    prompts = [speaker.tokenizer.prompt([{"role": "user", "content": text}]) for text in texts]

    def replies(most=12):
        return speaker.whole_replies(prompts, speaker.args.stop, most, temperature=0.0)

    free = replies()
    with monkeypatch.context() as patch:
        end = free[0].ids[5]
        patch.setattr(speaker.tokenizer, "stop", {end})
        for reply, whole in zip(replies(), free, strict=True):
            ids = whole.ids
            assert reply.ids == (ids[: ids.index(end) + 1] if end in ids else ids)
        assert len(replies()[0].ids) <= 6 and max(len(reply.ids) for reply in replies()) == 12
    with monkeypatch.context() as patch:
        end = free[0].text[1:3]
        patch.setattr(speaker.args, "stop", [end])
        assert [r.text for r in replies()] == [whole.text.partition(end)[0] for whole in free]
        assert not all(reply.ended for reply in replies())
        answer(batch_size=8)
    cut = {e["question_id"]: [n["turn"] for n in e["notes"]] for e in read(the_file(tmp_path))}
    assert 1 not in cut[90] and [1, 2] in cut.values()
    for reply, prompt in zip(replies(10**9), prompts, strict=True):
        assert reply.ids[-1] in speaker.tokenizer.stop or len(prompt) + len(reply.ids) == 256


def test_the_file_is_fastchats(answer, tmp_path, capsys):
    answer(model_id="us/mine")
    file = tmp_path / "out" / "mt_bench" / "model_answer" / "us_mine.jsonl"
    entries = read(file)
    assert [entry["question_id"] for entry in entries] == sorted(GREEDY | DRAWN)
    for entry in entries:
        assert entry["model_id"] == "us/mine" and isinstance(entry["tstamp"], float)
        assert [*entry["choices"][0]] == ["index", "turns"] and len(entry["choices"]) == 1
    assert len({entry["answer_id"] for entry in entries}) == 8
    notes = [note for entry in entries for note in entry["notes"]]
    assert {note["problem"] for note in notes} == {mt_bench.CUT}  # random models do not stop
    assert f"8 questions answered; {len(notes)} times {mt_bench.CUT}" in capsys.readouterr().err


def test_categories_have_their_temperatures(speaker, answer, monkeypatch):
    real, asked = speaker.whole_replies, []

    def whole_replies(prompts, stops, most, seed, temperature):
        asked.append((temperature, len(prompts), seed))
        return real(prompts, stops, most, seed, temperature=temperature)

    monkeypatch.setattr(speaker, "whole_replies", whole_replies)
    answer(batch_size=3)
    counts = [(temperature, n) for temperature, n, _ in asked[::2]]
    assert counts == [(0.0, 3), (0.0, 1), (0.1, 1), (0.7, 3)]  # "poetry" is nobody's category
    assert len({seed for _, _, seed in asked}) == len(asked)


def test_a_seed_gives_the_same_replies_again(answer, base_dir, value_dir):
    first = answer()
    assert answer("again") == first
    other = speaker_of(base_dir, value_dir)
    other.args.seed = 1
    changed = answer("other", speaker=other)
    assert {i for i in first if first[i] != changed[i]} == DRAWN


def test_stopped_in_between_is_as_if_never_stopped(speaker, answer, tmp_path, monkeypatch):
    whole = answer()
    real, left = speaker.whole_replies, [5]

    def stopping(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(speaker, "whole_replies", stopping)
    with pytest.raises(KeyboardInterrupt):
        answer("stopped")
    file = the_file(tmp_path / "stopped")
    assert len(read(file)) == 4  # two batches of two
    ids = [entry["answer_id"] for entry in read(file)]

    # torn in its last line; of a batch of which one is missing both are decoded again
    file.write_text(file.read_text()[:-30])
    left[0] = 2 * 4
    append, added = mt_bench.append, []
    monkeypatch.setattr(mt_bench, "append", lambda *a: (added.extend(a[1]), append(*a)))
    assert answer("stopped") == whole and left == [0] and len(added) == 8 - 3
    again = {entry["answer_id"] for entry in read(file)}
    assert len(again & set(ids)) == 3
    left[0] = 0
    assert answer("stopped") == whole


def test_a_limit_takes_the_first_ones_and_more_can_follow(answer):
    assert {*answer(limit=3)} == {90, 89, 88}
    assert {*answer()} == GREEDY | DRAWN == {*answer(limit=3)}


def test_answers_of_other_settings_are_not_mixed(answer, base_dir, value_dir):
    answer()
    weak = speaker_of(base_dir, value_dir, "--alpha", 0.5)
    with pytest.raises(
        InputError, match=r"line 1: was answered with alpha = \[1.0\], now it is \[0.5\]"
    ):
        answer(speaker=weak)
    with pytest.raises(InputError, match="max_new_tokens = 12, now it is 13"):
        answer(max_new_tokens=13)
    assert answer(speaker=weak, model_id="weak") != answer()


def test_what_does_not_fit_is_noted_and_counted(answer, data, tmp_path, capsys):
    questions = [dict(QUESTIONS[0]), dict(QUESTIONS[2]), dict(QUESTIONS[4])]
    questions[0]["turns"] = ["cat " * 300, "Where?"]
    questions[1]["turns"] = ["Where?", "dog " * 300]
    questions[2]["turns"] = ["Where?", "dog " * 100]
    write(data / "mt_bench" / "question.jsonl", questions)
    answers = answer(max_new_tokens=200)
    notes = {e["question_id"]: e["notes"] for e in read(the_file(tmp_path / "out"))}
    kinds = {i: [(n["turn"], n["problem"]) for n in notes[i]] for i in notes}
    assert answers[90][0] == "" and kinds[90][0] == (1, mt_bench.NO_REPLY)
    assert "the context is 256" in notes[90][0]["why"]
    assert answers[88][1] == "" and (2, mt_bench.NO_REPLY) in kinds[88] and answers[88][0]
    assert (2, mt_bench.FORGOTTEN) in kinds[86] and answers[86][1]  # after 200 tokens
    told = capsys.readouterr().err
    assert "2 times no reply" in told and f"times {mt_bench.FORGOTTEN}" in told


def test_progress_without_a_terminal_is_lines(answer, monkeypatch, capsys):
    monkeypatch.setattr(mt_bench, "EVERY", 0)
    answer(batch_size=3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:-1] == [f"MT-Bench: batches answered: {i} of 4" for i in (1, 2, 3, 4)]


def test_the_real_questions(realdata, tmp_path):
    file = mt_bench.find(realdata / "benchmarks", "questions")
    long = {"max_position_embeddings": 4096}
    base = make_directory(tmp_path / "base", 1, **long)
    speaker = speaker_of(base, make_directory(tmp_path / "value", 2, **long))
    answers = said(mt_bench.answers(speaker, file, tmp_path, 16, max_new_tokens=3))
    assert [*answers] == [*range(81, 161)] and all(map(len, answers.values()))
    notes = [n["problem"] for e in read(the_file(tmp_path)) for n in e["notes"]]
    assert {*notes} == {mt_bench.CUT}  # all have been read whole
    categories = {q["category"] for q in mt_bench.read_questions(file)}
    assert categories == {*mt_bench.TEMPERATURES}


@pytest.mark.parametrize(
    "line, words",
    [
        ("{", "line 2: not valid JSON"),
        ("[]", "line 2: must be an object"),
        ('{"category": "math", "turns": ["a", "b"]}', "line 2: question_id is missing"),
        ('{"question_id": 3, "turns": ["a", "b"]}', "line 2: category is missing"),
        ('{"question_id": 3, "category": "math", "turns": ["a"]}', "must be a list of two texts"),
        ('{"question_id": 3, "category": "math", "turns": "ab"}', "must be a list of two texts"),
        (json.dumps(QUESTIONS[0]), "line 2: question 90 is there twice"),
    ],
)
def test_bad_questions_are_refused(answer, data, line, words):
    file = data / "mt_bench" / "question.jsonl"
    file.write_text(json.dumps(QUESTIONS[0]) + "\n" + line)
    with pytest.raises(InputError, match=words) as refused:
        answer()
    assert str(file) in str(refused.value)


# ---------------------------------------------------------------- the judge


class Judge(ThreadingHTTPServer):
    """Answers with what `script` holds, then with ratings of 7; keeps what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.asked, self.keys = [], [], []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


def completion(content) -> str:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append((self.path, json.loads(body)))
        self.server.keys.append(self.headers["Authorization"])
        scripted = self.server.script.pop(0) if self.server.script else completion("Good: [[7]]")
        status, text = (200, scripted) if isinstance(scripted, str) else scripted
        if status is None:
            return  # hangs up
        self.send_response(status)
        if status == 302:
            self.send_header("Location", text)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self):
        self.server.keys.append(self.headers["Authorization"])
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"a page")

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(mt_bench, "WAITS", (0, 0))
    monkeypatch.setattr(mt_bench, "TIMEOUT", 30)
    server = Judge()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def answers_file(tmp_path) -> Path:
    """What a model has said, one line by FastChat itself."""
    entries = [
        {
            "question_id": q["question_id"],
            "model_id": "mine",
            "choices": [{"index": 0, "turns": [f"first {q['question_id']}", "second {question}"]}],
        }
        for q in QUESTIONS
    ]
    write(tmp_path / "mine.jsonl", entries)
    return tmp_path / "mine.jsonl"


@pytest.fixture
def judge(server, data, answers_file, tmp_path):
    def judge(model="gpt-4", key="sk-secret", url=server.url):
        questions = mt_bench.find(data, "questions")
        return mt_bench.judge(answers_file, questions, tmp_path / "out", url, model, key)

    return judge


def test_the_judge_is_asked_as_fastchat_asks(server, judge, tmp_path, capsys):
    judge("us/gpt-4")
    assert len(server.asked) == 16
    path, body = server.asked[0]
    assert path == "/v1/chat/completions" and server.keys[0] == "Bearer sk-secret"
    assert body["model"] == "us/gpt-4" and body["temperature"] == 0 and body["max_tokens"] == 2048
    roles = [{m["role"]: m["content"] for m in body["messages"]} for _, body in server.asked]
    asked = {(turns["system"], turns["user"]) for turns in roles}
    assert ("Be single-v1.", "question is Hello; answer is first 85") in asked
    assert (
        "Be single-math-v1-multi-turn.",
        "question_1 is The cat says; question_2 is And the dog?; answer_1 is first 84; answer_2 is "
        "second {question}; ref_answer_1 is on the mat; ref_answer_2 is in the garden",
    ) in asked
    assert sum(system == "Be single-v1-multi-turn." for system, _ in asked) == 4
    assert sum(system == "Be single-math-v1." for system, _ in asked) == 4
    file = tmp_path / "out" / "mt_bench" / "model_judgment" / "us_gpt-4_single.jsonl"
    entry = read(file)[1]
    names = "question_id model judge user_prompt judgment score turn tstamp".split()
    assert [*entry] == names and entry["judge"] == ["us/gpt-4", "single-math-v1-multi-turn"]
    assert (entry["question_id"], entry["turn"], entry["model"]) == (90, 2, "mine")
    assert (entry["judgment"], entry["score"]) == ("Good: [[7]]", 7)
    assert "secret" not in file.read_text() + "".join(capsys.readouterr())


def test_the_scores_are_means_of_what_was_rated(server, judge, capsys):
    ratings = [
        "[1] [[4]]",
        "[[8.5]]",
        "[1] Rating: [6]",
        "none",
        "[[100]]",
        None,
        "[[10]]",
        "[[0]]",
    ]
    server.script = [completion(rating) for rating in ratings]
    scores = judge()
    assert scores["not rated"] == [(89, 2), (88, 1), (88, 2)] and scores["not answered"] == []
    first, second = [4, 1, 10, 7, 7, 7, 7], [8.5, 0, 7, 7, 7, 7]
    assert scores["turn 1"] == pytest.approx(sum(first) / 7)
    assert scores["turn 2"] == pytest.approx(sum(second) / 6)
    assert scores["MT-Bench"] == pytest.approx(sum(first + second) / 13)
    assert scores["by category"]["math"] == pytest.approx((4 + 8.5 + 7 + 7) / 4)
    assert scores["by category"]["coding"] is None and scores["by category"]["stem"] == 5
    assert "3 not rated: (89, 2), (88, 1), (88, 2)" in capsys.readouterr().err
    assert judge() == scores and len(server.asked) == 16  # nothing is asked twice


def test_a_busy_judge_is_asked_again(server, judge, capsys):
    busy = (429, "sk-secret has\na limit")
    server.script = [busy, (503, ""), completion("[[3]]"), (None, ""), busy]
    assert judge()["turn 1"] == 6.5 and len(server.asked) == 20
    told = capsys.readouterr().err
    assert f"({server.url}/chat/completions: HTTP 429 Too Many Requests: *** has a limit" in told
    assert "HTTP 503" in told and "secret" not in told


def test_stopped_in_between_the_rest_is_asked(server, judge, tmp_path):
    server.script = [completion("[[3]]")] * 3 + [(429, "")] * 3
    with pytest.raises(InputError, match=f"^{server.url}/chat/completions: HTTP 429"):
        judge()
    file = the_file(tmp_path / "out")
    assert len(read(file)) == 3
    others = {**read(file)[0], "model": "others", "user_prompt": "?"}
    file.write_text(json.dumps(others) + "\n" + file.read_text()[:-9])  # the last line is torn
    server.asked.clear()
    assert judge()["MT-Bench"] == (3 * 2 + 7 * 14) / 16
    assert len(server.asked) == 14 and len(read(file)) == 17


@pytest.mark.parametrize(
    "scripted, words",
    [
        ("a page", "line 1: not valid JSON"),
        ("null", "is no chat completion"),
        ("[]", "is no chat completion"),
        ('{"choices": []}', "is no chat completion"),
        (completion(7), "is no chat completion"),
        ((401, '{"error": "no such key: sk-secret"}'), r"HTTP 401 Unauthorized: .*no such key: \*"),
        ((404, ""), "HTTP 404"),
    ],
)
def test_what_is_no_judgment_is_refused(server, judge, scripted, words):
    server.script = [scripted]
    with pytest.raises(InputError, match=words) as refused:
        judge()
    assert f"{server.url}/chat/completions" in str(refused.value) and len(server.asked) == 1
    assert "secret" not in str(refused.value)


def test_a_key_goes_to_nobody_else(server, judge):
    server.script = [(302, f"{server.url}/elsewhere")]
    with pytest.raises(InputError, match="not valid JSON"):
        judge()
    assert server.keys == ["Bearer sk-secret", None]
    judge(key=None)
    assert server.keys[2:] == [None] * 16
    with pytest.raises(InputError, match="^the key of the judge holds a space") as refused:
        judge("other", key="sk-secret\n")
    assert "sk" not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "judge",
        "http://a b",
        "http://127.0.0.1:x",
        "http://a..b",
        "http://u:p@h",
    ],
)
def test_what_is_no_address_is_refused(server, judge, url):
    with pytest.raises(InputError, match="is no address") as refused:
        judge(url=url)
    assert url in str(refused.value)


def test_nobody_there(server, judge, capsys):
    with pytest.raises(InputError, match=r"^http://127.0.0.1:9/chat/completions: .*refused"):
        judge(url="http://127.0.0.1:9/")
    assert capsys.readouterr().err.count("again in 0 s") == 2


def test_other_answers_than_those_judged_are_refused(server, judge, answers_file):
    judge()
    answers_file.write_text(answers_file.read_text().replace("first 88", "third 88"))
    with pytest.raises(InputError, match="line 5: judges another answer"):
        judge()


def test_questions_without_an_answer_are_told(server, judge, answers_file, capsys):
    write(answers_file, read(answers_file)[:2])
    assert judge()["not answered"] == [88, 87, 86, 85, 84, 83]
    assert "6 not answered: 88, 87," in capsys.readouterr().err
    write(answers_file, [])
    with pytest.raises(InputError, match=f"{answers_file}: holds no answers"):
        judge()


def test_references_beside_the_questions_take_the_place_of_missing_ones(server, judge, data):
    references = data / "mt_bench" / "reference_answer" / "gpt-4.jsonl"
    write(references, read(references)[1:])
    with pytest.raises(InputError, match="gpt-4.jsonl: has no reference answer to question 90"):
        judge()
    for own in (["ours", ""], ["ours"], ["ours", "ours too"]):
        assert not server.asked
        questions = [{**QUESTIONS[0], "reference": own}, *QUESTIONS[1:]]
        write(data / "mt_bench" / "question.jsonl", questions)
        if len([*filter(None, own)]) < 2:
            with pytest.raises(InputError, match="has no reference answer to question 90"):
                judge()
    judge()
    assert "ref_answer_1 is ours" in server.asked[0][1]["messages"][1]["content"]


@pytest.mark.parametrize("name", ["judge_prompts.jsonl", "reference_answer/gpt-4.jsonl"])
def test_missing_files_are_told_with_their_source(server, judge, data, name):
    (data / "mt_bench" / name).unlink()
    with pytest.raises(InputError, match="is missing; copy fastchat/llm_judge/data/") as refused:
        judge()
    assert str(data / "mt_bench" / name) in str(refused.value)
    assert name in str(refused.value).split("llm_judge/data/")[1]


@pytest.mark.parametrize(
    "name, old, new, words",
    [
        ("judge_prompts.jsonl", "{answer}", "{reply}", "line 1: prompt_template must have"),
        ("judge_prompts.jsonl", '"name": "single-v1"', '"name": "x"', "prompt single-v1 is miss"),
        ("judge_prompts.jsonl", '"system_prompt"', '"x"', "line 1: system_prompt is missing"),
        ("reference_answer/gpt-4.jsonl", '"turns"', '"x"', "line 1: choices = "),
        ("question.jsonl", "90", "91", "mine.jsonl, line 1: there is no question 90"),
    ],
)
def test_damaged_files_are_refused(server, judge, data, name, old, new, words):
    file = data / "mt_bench" / name
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match=words):
        judge()
    assert not server.asked
