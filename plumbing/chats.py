"""Chat files as the world writes them, read into one form.

A `Chat` is a list of messages {"role": "system" | "user" | "assistant", "content": str}, and what
else a file says of it: replies that are not to be learnt from, a worse reply to the same. What each
form looks like stands beside its reader below. Nothing is dropped silently: a record that cannot be
used is counted with its reason, one of no known form ends in an error that names its place.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from plumbing.files import InputError, parse_json, read_lines, read_text

ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
# turns between a model and a program: chats that have them are left out
TOOLS = (
    *("tool", "tools", "tool_call", "tool_response", "tool_result", "tool_results"),
    *("function", "function_call", "function_response", "observation", "ipython", "environment"),
)
# fields that say whether a reply is to be learnt, without _ and in small letters: of a turn, and of
# a whole record; and what others that may mean something like it have in their names
OF_TURN = ("weight", "lossweight", "train", "trainable", "training", "loss")
OF_RECORD = ("label", "ktotag")
SUSPECT = ("weight", "loss", "mask", "train", "label", "tag")
NO, YES = (0, "0", "false", "no"), (1, "1", "true", "yes")  # False is 0, and True is 1
WHOLE = r"\s*Human:.*Assistant:"  # with a reply or the place for one behind it
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
FORMS = (
    "'conversations' (from/value), 'messages' (role/content), 'instruction' and 'output', or "
    "'prompt' and 'completion'; beside a prompt 'chosen' and 'rejected' make a preference"
)


class LeftOut(Exception):
    """A record that is well-formed, but of no use here; the message says why."""


class Unknown(Exception):
    """A record of no known form; the message says where it stops being one."""


@dataclass
class Chat:
    """One chat of a file.

    entry: its number among all records that were read, from 0 on.
    unlearnt: places of replies that are only read, not learnt, each with the reason.
    rejected: of a preference, a worse reply than the last one.
    ignored: what its record has that nobody reads, though it may mean something.
    """

    messages: list[dict]
    entry: int = 0
    unlearnt: dict[int, str] = field(default_factory=dict)
    rejected: str | None = None
    ignored: tuple[str, ...] = field(default=(), compare=False)

    def worse(self) -> "Chat":
        """The same chat with its rejected reply."""
        last = {"role": "assistant", "content": self.rejected}
        return replace(self, messages=[*self.messages[:-1], last], rejected=None)


@dataclass
class Reading:
    """What files have given: the chats, how many records were read, why some are left out."""

    chats: list[Chat]
    read: int
    left_out: Counter

    def preferences(self) -> int:
        """How many of the chats have a rejected reply."""
        return sum(chat.rejected is not None for chat in self.chats)

    def worse(self) -> "Reading":
        """The rejected replies' chats."""
        return replace(self, chats=[chat.worse() for chat in self.chats])


# ---------------------------------------------------------------- files


def read_chats(*paths: str | Path) -> Reading:
    """The chats of files and of folders of files: .json (a list), .jsonl, each also with .gz, and
    .parquet. Raises InputError that names the line (.jsonl) or the entry of a record that is of no
    known form.
    """
    reading = Reading([], 0, Counter())
    for path in all_files(paths):
        for place, record in records_of(path):
            try:
                chat = chat_of(record)
                chat.entry = reading.read
                reading.chats.append(chat)
            except LeftOut as reason:
                reading.left_out[str(reason)] += 1
            except Unknown as reason:
                raise InputError(
                    f"{path}, {place}: not a chat ({reason}); it needs {FORMS}"
                ) from None
            reading.read += 1
    if not reading.read:
        raise InputError(f"{' '.join(map(str, paths))}: holds no chats")
    return reading


def all_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files that were named, and those of the folders that were. Raises InputError."""
    files = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        inside = [file for file in sorted(path.rglob("*")) if file.name.endswith(SUFFIXES)]
        if not inside:
            raise InputError(f"{path}: no file in it ends in {', '.join(SUFFIXES)}")
        files += inside
    return files


def records_of(path: Path) -> list[tuple[str, object]]:
    """The records of one file, each with its place. Raises InputError."""
    if path.suffix == ".parquet":
        return [(f"row {i}", record) for i, record in enumerate(read_parquet(path), 1)]
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        whole = one_json(path)
        if whole is not None:
            return [(f"entry {i}", record) for i, record in enumerate(whole, 1)]
    return [(f"line {i}", record) for i, record in read_lines(path)]


def one_json(path: Path) -> list | None:
    """The records of a file that is one JSON: a list, an object with a list under "data", or a
    single record. None for lines of JSON under the name .json. Raises InputError.
    """
    text = read_text(path).lstrip()
    if text.startswith("["):
        return parse_json(text, path)
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return None  # `read_lines` says what is wrong, if it is no better
    parsed = parse_json(text, path)
    data = parsed.get("data") if isinstance(parsed, dict) else None
    return data if isinstance(data, list) else [parsed]


def read_parquet(path: Path) -> list[dict]:
    """The rows of a parquet file. Raises InputError."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{path}: a parquet file is read with pyarrow; pip install it, or save as .jsonl"
        ) from None
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: not a readable parquet file ({error})") from None


def read_prompts(path: str) -> list[list[dict]]:
    """Chats to be answered: a chat file (without last replies), or a text file, line by line."""
    if not path.endswith(SUFFIXES):
        # splitlines() would also split at what a text may hold
        lines = [line for line in read_text(path).split("\n") if line.strip()]
        if not lines:
            raise InputError(f"{path}: holds no prompts")
        return [[{"role": "user", "content": line}] for line in lines]
    reading = read_chats(path)
    for reason, n in reading.left_out.items():
        raise InputError(f"{path}: {n} records cannot be asked ({reason}); leave them out")
    chats = [chat.messages for chat in reading.chats]
    for i, messages in enumerate(chats):
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages or messages[-1]["role"] != "user":
            raise InputError(f"{path}, chat {i + 1}: does not end with a question")
    return chats


# ---------------------------------------------------------------- records


def chat_of(record: object) -> Chat:
    """One record as a chat. Raises LeftOut and Unknown.

    ShareGPT's form, and OpenAI's; either may have a "system" beside it:
    >>> turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]
    >>> chat_of({"conversations": turns}).messages
    [{'role': 'user', 'content': 'Who?'}, {'role': 'assistant', 'content': 'I.'}]
    >>> turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    >>> said = chat_of({"messages": turns}).messages
    >>> said == turns
    True

    Alpaca's ("input" and "history" may be there), Dolly's, and prompt and completion:
    >>> said == chat_of({"instruction": "Who?", "input": "", "output": "I."}).messages
    True
    >>> said == chat_of({"instruction": "Who?", "context": "", "response": "I."}).messages
    True
    >>> said == chat_of({"prompt": "Who?", "completion": "I."}).messages
    True
    >>> said == chat_of({"prompt": turns[:1], "completion": turns[1:]}).messages
    True

    A preference: a prompt in one of these forms beside chosen and rejected replies, which are
    texts, turns, or lists of turns; or two whole chats:
    >>> chat = chat_of({"prompt": "Who?", "chosen": "I.", "rejected": "You."})
    >>> chat.messages == said, chat.rejected
    (True, 'You.')
    >>> you = {"role": "assistant", "content": "You."}
    >>> chat == chat_of({"chosen": turns, "rejected": [turns[0], you]})
    True
    >>> chat == chat_of({"messages": turns[:1], "chosen": turns[1], "rejected": you})
    True

    Another of ms-swift's:
    >>> chat == chat_of({"messages": turns, "rejected_response": "You."})
    True

    Replies that say themselves that they are not to be learnt: "weight": 0, "train": false,
    "Trainable": "no" and the like at a turn; "label": false at a whole record, which is left out:
    >>> chat_of({"messages": [*turns, turns[0], {**you, "weight": 0}]}).unlearnt
    {3: 'said not to be learnt'}
    >>> chat_of({"prompt": "Who?", "completion": "You.", "label": False})
    Traceback (most recent call last):
    plumbing.chats.LeftOut: labelled as a bad reply
    """
    if not isinstance(record, dict):
        raise Unknown("no object {...}")
    record = without_null(record)
    for key in ("tools", "functions"):
        if record.get(key, []) not in ([], "", "[]"):
            raise LeftOut("a chat with tools")
    record |= ms_swift(record)
    if "chosen" in record or "rejected" in record:
        return replace(preference_of(record), ignored=ignored_in(record, prompt_of(record) or []))
    if says_no(record, OF_RECORD):
        raise LeftOut("labelled as a bad reply")

    turns = prompt_of(record)
    if turns is None:
        raise Unknown("none of the fields below")
    turns += reply_of(record, turns)
    messages, unlearnt = messages_of(turns)
    return Chat(messages, unlearnt=unlearnt, ignored=ignored_in(record, turns))


def ms_swift(record: dict) -> dict:
    """`chosen` and `rejected` of a record in ms-swift's form, {} of all others: `messages` beside a
    worse reply, or beside other messages.
    """
    turns = record.get("messages")
    if isinstance(turns, list) and turns and "rejected_response" in record:
        return {"chosen": turns[-1], "rejected": record["rejected_response"]}
    for key in ("rejected_messages", "messages_rejected"):
        if isinstance(turns, list) and key in record:
            return {"chosen": turns, "rejected": record[key]}
    return {}


def ignored_in(record: dict, turns: list) -> tuple[str, ...]:
    """What a record has that may say something of what to learn, and is not read."""
    ignored = []
    if {"messages", "conversations"} <= record.keys():
        if record["messages"] != record["conversations"]:
            ignored.append("'messages' beside 'conversations'")
    names = {(name, OF_RECORD) for name in record}
    names |= {(name, OF_TURN) for turn in turns if isinstance(turn, dict) for name in turn}
    for name, known in sorted(names):
        if small(name) not in known and any(word in small(name) for word in SUSPECT):
            ignored.append(f"the field {name!r}")
    return tuple(dict.fromkeys(ignored))


def small(name: object) -> str:
    """A field's name without _ and in small letters."""
    return str(name).lower().replace("_", "").replace("-", "")


def says_no(fields: dict, names: Sequence[str]) -> bool:
    """Whether one of the fields with these names says no. Raises Unknown for what is neither yes
    nor no at a turn (a record's label may be a class).
    """
    for name, x in fields.items():
        if small(name) not in names or x is None:
            continue
        said = x.strip().lower() if isinstance(x, str) else x
        if said in NO:
            return True
        if said not in YES and names is OF_TURN:
            raise Unknown(f"{name} = {x!r} is neither 0 nor 1")
    return False


def prompt_of(record: dict) -> list | None:
    """The turns of a record, without a reply that it has in a field of its own; None if there are
    none. A system message may stand beside them.
    """
    key = next(
        (key for key in ("conversations", "messages", "conversation") if key in record), None
    )
    asked = next(
        (key for key in ("instruction", "prompt", "question", "input") if key in record), None
    )
    turns = []
    if not isinstance(record.get("history", []), list):
        raise Unknown("'history' is no list of pairs")
    for exchange in record.get("history", []):
        if not isinstance(exchange, list) or len(exchange) != 2:
            raise Unknown("'history' is no list of pairs")
        turns += [turn("user", exchange[0]), turn("assistant", exchange[1])]
    if key is not None:
        if isinstance(record[key], str):
            raise Unknown(f"{key!r} is a text, no list of turns")
        turns += turns_of(record[key])
    elif isinstance(record.get(asked), list):
        turns += record[asked]
    elif asked is not None:
        # a task, and what it is about
        if isinstance(record[asked], str) and re.fullmatch(
            WHOLE + r"\s*", record[asked], re.DOTALL
        ):
            raise Unknown("a whole chat in one text; give it as turns")
        parts = [record[asked]]
        parts += [record.get(more) for more in ("question", "input", "context") if more != asked]
        turns.append(turn("user", "\n\n".join(text_of(part) for part in parts if part)))
    else:
        return None

    system = record.get("system") or record.get("system_prompt")
    if system:
        system = turn("system", text_of(system))
        if turns and isinstance(turns[0], dict) and role_of(turns[0]) == "system":
            if text_of(content_of(turns[0])) != system["content"]:
                raise LeftOut("two system messages")
        else:
            turns = [system, *turns]
    return turns


def reply_of(record: dict, turns: list) -> list:
    """The reply that a record has in a field of its own, as turns; none where the turns end with a
    reply already.
    """
    if turns and isinstance(turns[-1], dict) and role_of(turns[-1]) == "assistant":
        return []
    for key in ("output", "response", "completion", "answer"):
        if key in record:
            return turns_of(record[key])
    return []


def preference_of(record: dict) -> Chat:
    """A record with a chosen and a rejected reply. Raises LeftOut and Unknown."""
    if "chosen" not in record or "rejected" not in record:
        raise Unknown("one of 'chosen' and 'rejected' is missing")
    for text in (record["chosen"], record["rejected"]):
        if isinstance(text, str) and re.match(WHOLE, text, re.DOTALL):
            raise Unknown("a whole chat in one text; give it as turns")
    prompt, _ = messages_of(prompt_of(record) or [])
    while prompt and prompt[-1]["role"] == "assistant":
        prompt.pop()  # the chosen reply, once more
    better, worse = (continued(prompt, record[side]) for side in ("chosen", "rejected"))
    if better[:-1] != worse[:-1]:
        raise LeftOut("chosen and rejected differ before their last reply")
    if better[-1]["content"].strip() == worse[-1]["content"].strip():
        raise LeftOut("chosen and rejected are the same")
    if not any(message["role"] == "user" for message in better):
        raise Unknown("chosen and rejected have no question beside them")

    # only the last reply is what was preferred
    earlier = [i for i, message in enumerate(better[:-1]) if message["role"] == "assistant"]
    unlearnt = dict.fromkeys(earlier, "earlier than what was preferred")
    return Chat(better, unlearnt=unlearnt, rejected=worse[-1]["content"])


def continued(prompt: list[dict], side: object) -> list[dict]:
    """A prompt's messages and what follows, which may tell the end of the prompt again.

    Example: after a prompt of two turns, the second is told again
    >>> be, who, i = turn("system", "Be."), turn("user", "Who?"), turn("assistant", "I.")
    >>> continued([be, who], [who, i]) == [be, who, i]
    True
    """
    said, unlearnt = messages_of(turns_of(side))
    if len(said) - 1 in unlearnt:
        raise LeftOut(f"chosen or rejected is {unlearnt[len(said) - 1]}")
    again = [
        n for n in range(len(said)) if prompt[len(prompt) - n :] == said[:n] and n <= len(prompt)
    ]
    if not said or said[-1]["role"] != "assistant":
        raise LeftOut("chosen or rejected does not end with a reply")
    if prompt and max(again) == 0 and said[0]["role"] != "assistant":
        raise LeftOut("chosen or rejected does not go on from its prompt")
    return prompt + said[max(again) :]


# ---------------------------------------------------------------- turns


def turns_of(x: object) -> list:
    """Turns, from a list of them, a single one, or the text of a reply."""
    if isinstance(x, str):
        return [turn("assistant", x)]
    if isinstance(x, dict):
        return [x]
    if not isinstance(x, list):
        raise Unknown("its turns are no list")
    return x


def messages_of(turns: list) -> tuple[list[dict], dict[int, str]]:
    """Turns in whatever words as messages, and the places of replies that are not to be learnt."""
    messages, unlearnt = [], {}
    for i, said in enumerate(turns):
        if not isinstance(said, dict):
            raise Unknown(f"turn {i} is no object {{...}}")
        said = without_null(said)
        role = role_of(said)
        if said.get("tool_calls") or said.get("function_call") or said.get("function_calls"):
            raise LeftOut("a turn that calls a tool")
        if said.get("reasoning_content") or said.get("thinking"):
            raise LeftOut("a reply with its reasoning in a field of its own")
        content = text_of(content_of(said))
        messages.append(turn(role, content))
        if role == "assistant" and says_no(said, OF_TURN):
            unlearnt[i] = "said not to be learnt"
        elif role == "assistant" and not content.strip():
            unlearnt[i] = "empty"
    return messages, unlearnt


def without_null(fields: dict) -> dict:
    """Files that were merged have columns that are null."""
    return {name: x for name, x in fields.items() if x is not None}


def content_of(said: dict) -> object:
    said = without_null(said)
    return said.get("value", said.get("content"))


def role_of(said: dict) -> str:
    """A turn's role, in our words. Raises LeftOut for those of tools, Unknown for others."""
    said = without_null(said)
    word = said.get("from", said.get("role"))
    role = word.strip().lower() if isinstance(word, str) else word
    if role in TOOLS:
        raise LeftOut(f"a turn of the role {role!r}")
    if not isinstance(role, str) or role not in ROLES:
        raise Unknown(f"the role {word!r} is none of {', '.join(ROLES)}")
    return ROLES[role]


def turn(role: str, content: object) -> dict:
    return {"role": role, "content": content}


def text_of(content: object) -> str:
    """What a turn says: a text, or a list of parts that are texts.

    Example:
    >>> text_of([{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}])
    'Who are you?'
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Unknown(f"{type(content).__name__} where a text belongs")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind is not None and kind != "text":
            raise LeftOut(f"a part of the type {kind!r}")
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise Unknown("a part that is no text")
        texts.append(part["text"])
    return "".join(texts)
