"""MT-Bench (Zheng et al. 2023): questions of two turns, answered by a pair, rated by a judge model.

    path = answers(speaker, find(data, "questions"), "out", batch_size=16)
    scores = judge(path, find(data, "questions"), "out", "https://api.openai.com/v1", "gpt-4", key)

The files are those of FastChat, whose own scripts can go on from them. The judge is any model
behind OpenAI's chat completions; it is asked with FastChat's own prompts and reference answers,
which the user brings, so that a rating means what everybody's means.
"""

import json
import os
import re
import reprlib
import secrets
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from http.client import HTTPException, InvalidURL
from pathlib import Path

from tqdm import tqdm

from plumbing.files import (
    TABLE,
    TEXT,
    Field,
    InputError,
    Kind,
    fields_of,
    given,
    list_of,
    number,
    parse_json,
    read_text,
    visible,
    whole,
    whole_lines,
    writable_folder,
    write_text,
    writing,
)
from plumbing.pair import Speaker

# how freely a reply is drawn, and whether the judge sees a reference answer: as in FastChat
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
TEMPERATURES |= {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0}
OTHERS = 0.7
MOST = 1024  # new tokens of a turn
WITH_REFERENCE = ("math", "reasoning", "coding")

# what the notes of an answer may tell
CUT = "a reply cut at the most tokens or the end of the context"
FORGOTTEN = "the first turn not read, for want of context"
NO_REPLY = "no reply"

# (with reference, turn) → FastChat's name of the judge's prompt, and the places to be filled in it
PROMPTS = {
    (False, 1): ("single-v1", "question answer"),
    (True, 1): ("single-math-v1", "question answer ref_answer_1"),
    (False, 2): ("single-v1-multi-turn", "question_1 question_2 answer_1 answer_2"),
    (True, 2): (
        "single-math-v1-multi-turn",
        "question_1 question_2 answer_1 answer_2 ref_answer_1 ref_answer_2",
    ),
}

PLACE = re.compile(r"\{(\w+)\}")

# what → where FastChat has the file, and where it may be in the user's folder
FILES = {
    "questions": ("mt_bench/question.jsonl", "mt-bench-questions.jsonl", "mt_bench/question.jsonl"),
    "prompts": ("judge_prompts.jsonl", "mt_bench/judge_prompts.jsonl", "judge_prompts.jsonl"),
    "references": ("mt_bench/reference_answer/gpt-4.jsonl",) * 2,
}

ID = Field(whole(0, 10**9))
TWO = Kind("a list of two texts", lambda x: x in list_of(TEXT) and len(x) == 2)
CHOICES = Kind(
    "a list that begins with {turns: [two texts]}",
    lambda x: x in list_of(TABLE) and any(choice.get("turns") in TWO for choice in x[:1]),
)
QUESTION = {"question_id": ID, "category": Field(TEXT), "turns": Field(TWO)}
QUESTION |= {"reference": Field(list_of(TEXT), [])}
ANSWER = {"question_id": ID, "choices": Field(CHOICES), "settings": Field(TABLE, {})}
PROMPT = {"name": Field(TEXT), "system_prompt": Field(TEXT), "prompt_template": Field(TEXT)}
JUDGMENT = {"question_id": ID, "model": Field(TEXT), "user_prompt": Field(TEXT)}
JUDGMENT |= {"turn": Field(whole(1, 2)), "score": Field(number(-1, 10))}

WAITS = (2, 4, 8, 16, 32)  # seconds before a judge is asked again that was busy or not there
TIMEOUT = 300  # seconds
LARGEST = 2**24  # bytes of what a judge sends
EVERY = 60  # seconds between lines of progress, where no bar can be seen


# ---------------------------------------------------------------- files


def find(data: str | Path, what: str) -> Path:
    """One of `FILES` in the user's folder. Raises InputError that says where to get it."""
    theirs, *places = FILES[what]
    for place in places:
        if (Path(data) / place).is_file():
            return Path(data) / place
    raise InputError(
        f"{Path(data) / places[0]} is missing; copy fastchat/llm_judge/data/{theirs} there, from "
        "https://github.com/lm-sys/FastChat"
    )


def records(path: str | Path, table: dict[str, Field], text: str) -> list[tuple[str, dict]]:
    """The objects in the text of a .jsonl file, each with its place. Raises InputError unless each
    has the fields of the table.
    """
    found = []
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{path}, line {i}"
            raw = parse_json(line, path, i)
            if raw not in TABLE:
                raise InputError(f"{place}: must be {TABLE.words}")
            found.append((place, raw | fields_of(raw, table, place)))
    return found


def appended(path: Path, table: dict[str, Field]) -> list[tuple[str, dict]]:
    """The records of a file that grows by `append`. A last line that a kill has torn is dropped."""
    writable_folder(path.parent)
    if not path.exists():
        return []
    return records(path, table, whole_lines(path))


def append(path: Path, entries: Sequence[dict]) -> None:
    """Adds lines to a file, on the disk before this ends."""
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def read_questions(path: str | Path) -> list[dict]:
    """FastChat's questions, in order. Raises InputError."""
    questions = {}
    for place, question in records(path, QUESTION, read_text(path)):
        if question["question_id"] in questions:
            raise InputError(f"{place}: question {question['question_id']} is there twice")
        questions[question["question_id"]] = question
    if not questions:
        raise InputError(f"{path}: holds no questions")
    return [*questions.values()]


def progress(items: Sequence, what: str) -> Iterator:
    """The items, under a bar; where stderr is no terminal, with a line now and then."""
    said = time.monotonic()
    for i, item in enumerate(tqdm(items, desc=what, disable=None), 1):
        yield item
        late = time.monotonic() - said >= EVERY
        if late and not sys.stderr.isatty():
            print(f"{what}: {i} of {len(items)}", file=sys.stderr, flush=True)
            said = time.monotonic()


def file_name(name: str) -> str:
    """A model's name as that of a file.

    Example:
    >>> file_name("openai/gpt-4")
    'openai_gpt-4'
    """
    return re.sub(r"[^\w.+-]", "_", name)


# ---------------------------------------------------------------- answering


def answers(
    speaker: Speaker,
    questions_file: str | Path,
    out_dir: str | Path,
    batch_size: int,
    limit: int | None = None,
    model_id: str | None = None,
    max_new_tokens: int = MOST,
) -> Path:
    """Answers both turns of each question: the file OUT_DIR/mt_bench/model_answer/MODEL_ID.jsonl.

    limit: only the first questions; model_id: by default the names of the models' directories.
    What the file holds already is kept. A seed gives the same replies again, stopped in between or
    not, if batch_size and limit are the same. Raises InputError; a chat that does not fit the
    context is noted in its line, and counted on stderr.
    """
    questions = read_questions(questions_file)[:limit]
    settings = settings_of(speaker) | {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    if model_id is None:
        model_id = "+".join(filter(None, [settings["base"], settings["value"]]))
    path = Path(out_dir, "mt_bench", "model_answer", f"{file_name(model_id)}.jsonl")
    done = {}
    for place, entry in appended(path, ANSWER):
        for name, x in settings.items():
            if entry["settings"].get(name) != x:
                raise InputError(
                    f"{place}: was answered with {name} = {entry['settings'].get(name)!r}, now it "
                    f"is {x!r}; remove the file, or give another folder or name"
                )
        done[entry["question_id"]] = entry

    # batches of one temperature, the same ones whatever is answered already: so the draws are too
    batches = []
    for t in sorted({temperature(question) for question in questions}):
        alike = [question for question in questions if temperature(question) == t]
        batches += [alike[k : k + batch_size] for k in range(0, len(alike), batch_size)]
    left = [batch for batch in batches if any(q["question_id"] not in done for q in batch)]
    for batch in progress(left, "MT-Bench: batches answered"):
        new = {}
        for question, chat in zip(batch, converse(speaker, batch, max_new_tokens)):
            entry = {"question_id": question["question_id"], "answer_id": secrets.token_hex(11)}
            entry |= {"model_id": model_id, "choices": [{"index": 0, "turns": chat["turns"]}]}
            entry |= {"tstamp": time.time(), "settings": settings, "notes": chat["notes"]}
            new[question["question_id"]] = entry
        append(path, [entry for i, entry in new.items() if i not in done])
        done = new | done

    # in order, as FastChat leaves it
    write_text(path, "".join(json.dumps(done[i]) + "\n" for i in sorted(done)))
    asked = [done[question["question_id"]] for question in questions]
    problems = Counter(n["problem"] for entry in asked for n in entry["notes"])
    told = [f"{n} times {problem}" for problem, n in sorted(problems.items())]
    print("; ".join([f"MT-Bench: {len(asked)} questions answered", *told]), file=sys.stderr)
    return path


def temperature(question: dict) -> float:
    return TEMPERATURES.get(question["category"], OTHERS)


def settings_of(speaker: Speaker) -> dict:
    """On what the replies depend, as it is noted beside them."""
    args = speaker.args
    names = ("base", "value", "map")
    found = {"base": [args.base], "value": args.value, "map": [args.map] if args.map else []}
    found = {
        name: " ".join(Path(x).resolve().name for x in each) for name, each in found.items() if each
    }
    others = ("template", "system", "alpha", "top_k", "top_p", "seed", "stop", "dtype")
    others += (*given(args, "base_dtype"),)
    return dict.fromkeys(names) | found | {name: getattr(args, name) for name in others}


def converse(speaker: Speaker, questions: Sequence[dict], most: int) -> list[dict]:
    """Both turns of a batch of questions of one temperature: of each {messages, turns, notes}."""
    chats = [{"messages": speaker.opening(), "turns": [], "notes": []} for _ in questions]
    for turn in (1, 2):
        # the prompts; in the second one stands the first reply
        prompts = {}
        for i, (question, chat) in enumerate(zip(questions, chats)):
            chat["messages"].append({"role": "user", "content": question["turns"][turn - 1]})
            try:
                prompts[i] = speaker.prompt(chat["messages"])
                if prompts[i] != speaker.tokenizer.prompt(chat["messages"]):
                    chat["notes"].append({"turn": turn, "problem": FORGOTTEN})
            except InputError as error:
                chat["notes"].append({"turn": turn, "problem": NO_REPLY, "why": str(error)})

        # the replies, each batch and turn with a seed of its own
        replies = {}
        if prompts:
            seed = speaker.args.seed + 2 * questions[0]["question_id"] + turn
            how = dict(seed=seed, temperature=temperature(questions[0]))
            made = speaker.whole_replies([*prompts.values()], speaker.args.stop, most, **how)
            replies = dict(zip(prompts, made))
        for i, chat in enumerate(chats):
            text = ""
            if i in replies:
                text = replies[i].text.strip()
                ended = replies[i].ended or replies[i].ids[-1] in speaker.tokenizer.stop
                if not ended:
                    chat["notes"].append({"turn": turn, "problem": CUT})
            chat["turns"].append(text)
            chat["messages"].append({"role": "assistant", "content": text})
    return chats


# ---------------------------------------------------------------- judging


def judge(
    answers_file: str | Path,
    questions_file: str | Path,
    out_dir: str | Path,
    url: str,
    model: str,
    key: str | None = None,
    limit: int | None = None,
) -> dict:
    """Asks a judge for a rating of each turn, of 1 to 10, and gives their means: see `means`.

    url: of an address like OpenAI's, to which /chat/completions is added. limit: only the first
    questions. The judge's prompts and reference answers are looked for in the folder of the
    questions, see `find`. What OUT_DIR/mt_bench/model_judgment/JUDGE_single.jsonl holds already is
    not asked again, also where the judge gave no rating (-1). Raises InputError.
    """
    questions = {question["question_id"]: question for question in read_questions(questions_file)}
    data = Path(questions_file).parent
    if data.name == "mt_bench":
        data = data.parent
    asked = judge_prompts(questions, find(data, "prompts"), find(data, "references"), answers_file)
    questions = dict([*questions.items()][:limit])
    asked = {turn: what for turn, what in asked.items() if turn[0] in questions}

    # what is judged already
    speaker = Path(answers_file).stem  # as FastChat names it
    path = Path(out_dir, "mt_bench", "model_judgment", f"{file_name(model)}_single.jsonl")
    judged = {}
    for place, entry in appended(path, JUDGMENT):
        turn = entry["question_id"], entry["turn"]
        if entry["model"] == speaker and turn in asked:
            judged[turn] = entry
            if entry["user_prompt"] != asked[turn][2]:
                raise InputError(
                    f"{place}: judges another answer than the one in {answers_file}; remove the "
                    "file, or give another folder"
                )

    # the rest
    left = [turn for turn in asked if turn not in judged]
    for i, turn in progress(left, "MT-Bench: turns judged"):
        name, system, prompt = asked[i, turn]
        judgment = ask(url, model, system, prompt, key)
        entry = {"question_id": i, "model": speaker, "judge": [model, name], "user_prompt": prompt}
        entry |= {"judgment": judgment, "score": rating(judgment), "turn": turn}
        judged[i, turn] = entry | {"tstamp": time.time()}
        append(path, [judged[i, turn]])

    # what is left out of the means is told
    scores = means({turn: judged[turn]["score"] for turn in asked}, questions)
    for what in ("not rated", "not answered"):
        if scores[what]:
            words = ", ".join(map(str, scores[what]))
            print(f"MT-Bench: {len(scores[what])} {what}: {words}", file=sys.stderr)
    return scores


def judge_prompts(
    questions: dict[int, dict], prompts_file: Path, references_file: Path, answers_file: str | Path
) -> dict[tuple[int, int], tuple[str, str, str]]:
    """What the judge is asked: (question, turn) → name, system prompt and user prompt."""
    # FastChat's prompts, with the places that are to be filled
    wanted = {name: set(places.split()) for name, places in PROMPTS.values()}
    prompts = {}
    for place, prompt in records(prompts_file, PROMPT, read_text(prompts_file)):
        name = prompt["name"]
        prompts[name] = prompt
        if name in wanted and set(PLACE.findall(prompt["prompt_template"])) != wanted[name]:
            places = ", ".join(f"{{{word}}}" for word in sorted(wanted[name]))
            raise InputError(f"{place}: prompt_template must have the places {places}")
    for name in wanted:
        if name not in prompts:
            raise InputError(f"{prompts_file}: the prompt {name} is missing; copy the file again")

    # the reference answers; those beside the questions where there is no other
    references = {i: question["reference"] for i, question in questions.items()}
    for _, entry in records(references_file, ANSWER, read_text(references_file)):
        references[entry["question_id"]] = entry["choices"][0]["turns"]

    asked = {}
    for place, entry in records(answers_file, ANSWER, read_text(answers_file)):
        i = entry["question_id"]
        if i not in questions:
            raise InputError(f"{place}: there is no question {i}")
        turns, replies = questions[i]["turns"], entry["choices"][0]["turns"]
        with_reference = questions[i]["category"] in WITH_REFERENCE
        filling = {"question": turns[0], "question_1": turns[0], "question_2": turns[1]}
        filling |= {"answer": replies[0], "answer_1": replies[0], "answer_2": replies[1]}
        if with_reference:
            if references[i] not in TWO or not all(references[i]):
                raise InputError(f"{references_file}: has no reference answer to question {i}")
            filling["ref_answer_1"], filling["ref_answer_2"] = references[i]
        for turn in (1, 2):
            name = PROMPTS[with_reference, turn][0]
            template = prompts[name]["prompt_template"]
            user = PLACE.sub(lambda match: filling[match[1]], template)
            asked[i, turn] = name, prompts[name]["system_prompt"], user
    if not asked:
        raise InputError(f"{answers_file}: holds no answers")
    return asked


def check_judge(url: str, key: str | None) -> None:
    """Raises InputError for what cannot be an address, or a key."""
    if not re.fullmatch(r"https?://[!-~]+", url):
        raise InputError(f"{url}: is no address; it must be like https://api.openai.com/v1")
    if key and not re.fullmatch("[!-~]+", key):
        raise InputError("the key of the judge holds a space, or what no key has; set it again")


def ask(url: str, model: str, system: str, user: str, key: str | None) -> str:
    """What a model at an address says. Raises InputError, which names the address."""
    check_judge(url, key)
    address = url.rstrip("/") + "/chat/completions"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": 2048}
    request = urllib.request.Request(address, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    if key:
        request.add_unredirected_header("Authorization", f"Bearer {key}")  # for nobody else
    for wait in (*WAITS, None):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                said = response.read(LARGEST).decode(errors="replace")
            break
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            with suppress(OSError, HTTPException):
                problem += ": " + error.read(LARGEST).decode(errors="replace")
            again = error.code == 429 or error.code >= 500
        except (ValueError, OverflowError, InvalidURL) as error:
            problem, again = f"is no address ({error})", False
        except (OSError, HTTPException) as error:
            problem, again = str(getattr(error, "reason", "") or error or type(error)), True
        if key:
            problem = problem.replace(key, "***")
        problem = " ".join(problem.split())[:300]
        if not again or wait is None:
            raise InputError(f"{address}: {problem}")
        print(f"({visible(f'{address}: {problem}')}; again in {wait} s)", file=sys.stderr)
        time.sleep(wait)

    reply = parse_json(said, address)
    try:
        content = reply["choices"][0]["message"]["content"]
    except (TypeError, LookupError):
        content = False
    if content is None:
        return ""  # it would not answer: no rating
    if content not in TEXT:
        raise InputError(f"{address}: {reprlib.repr(said)} is no chat completion of OpenAI's kind")
    return content


def rating(judgment: str) -> float:
    """The rating that a judge gives; -1: none, or none of its scale.

    Example:
    >>> rating("[1] is right. Rating: [[7.5]]"), rating("Rating: [8]"), rating("a good answer")
    (7.5, 8.0, -1)
    """
    match = re.search(r"\[\[(\d+\.?\d*)\]\]", judgment) or re.search(r"\[(\d+\.?\d*)\]", judgment)
    if match is None or float(match[1]) > 10:
        return -1
    return float(match[1])


def means(ratings: dict[tuple[int, int], float], questions: dict[int, dict]) -> dict:
    """Means of the ratings of (question, turn); those of -1 are left out, and named.

    Example:
    >>> questions = {81: {"category": "writing"}, 82: {"category": "writing"}}
    >>> means({(81, 1): 7.0, (81, 2): 4.0, (82, 1): 9.0, (82, 2): -1}, questions)["turn 1"]
    8.0
    """

    def mean(counts: Callable[[int, int], bool]) -> float | None:
        rated = [score for turn, score in ratings.items() if score != -1 and counts(*turn)]
        return sum(rated) / len(rated) if rated else None

    categories = {i: question["category"] for i, question in questions.items()}
    answered = {i for i, _ in ratings}
    return {
        "MT-Bench": mean(lambda i, turn: True),
        "turn 1": mean(lambda i, turn: turn == 1),
        "turn 2": mean(lambda i, turn: turn == 2),
        "by category": {
            name: mean(lambda i, turn: categories[i] == name)
            for name in dict.fromkeys(categories[i] for i in categories if i in answered)
        },
        "not rated": [turn for turn, score in ratings.items() if score == -1],
        "not answered": [i for i in questions if i not in answered],
    }
