"""Chat files as the world writes them, read into one form.

A `Chat` is a list of messages {"role": "system" | "user" | "assistant", "content": str}, and what
else a file says of it: replies that are not to be learnt from, a worse reply to the same. What each
form looks like stands beside its reader below. Nothing is dropped silently: a record that cannot be
used is counted with its reason, one of no known form ends in an error that names its place.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from files import InputError, parse_json, read_lines, read_text

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
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}
# turns between a model and a program: chats that have them are left out
TOOLS = ("tool", "tools", "tool_call", "tool_response", "function", "function_call", "observation")
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
    context: places of replies that are only read, not learnt.
    rejected: of a preference, a worse reply than the last one.
    """

    messages: list[dict]
    entry: int = 0
    context: set[int] = field(default_factory=set)
    rejected: str | None = None

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
        return [(f"row {i}", record) for i, record in enumerate(read_parquet(path))]
    lines = path.name.endswith((".jsonl", ".jsonl.gz"))
    if not lines:
        text = read_text(path)
        if text.lstrip().startswith("["):
            return [(f"entry {i}", record) for i, record in enumerate(parse_json(text, path))]
    return [(f"line {i}", record) for i, record in read_lines(path)]


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

    Replies that say themselves that they are not to be learnt: "weight": 0, "train": false or
    "loss": false at a turn, "label": false at a whole record, which is then left out:
    >>> chat_of({"messages": [*turns, turns[0], {**you, "weight": 0}]}).context
    {3}
    >>> chat_of({"prompt": "Who?", "completion": "You.", "label": False})
    Traceback (most recent call last):
    chats.LeftOut: labelled as a bad reply
    """
    if not isinstance(record, dict):
        raise Unknown("no object {...}")
    for key in ("label", "kto_tag"):
        if key in record and record[key] in (False, 0, "false", "False"):
            raise LeftOut("labelled as a bad reply")

    # the turns up to a reply, or with it
    turns = prompt_of(record)
    chosen, rejected = record.get("chosen"), record.get("rejected")
    is_preference = chosen is not None and rejected is not None
    if turns is None and not is_preference:
        raise Unknown("none of the fields below")
    messages, context = messages_of(turns or [])
    worse = None
    if is_preference:
        better, worse = replies_of(messages, chosen, rejected)
        messages = better
        # only the last reply is what was preferred
        context = {i for i, m in enumerate(messages[:-1]) if m["role"] == "assistant"}

    if record.get("system") and messages[:1] and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": text_of(record["system"])}, *messages]
        context = {i + 1 for i in context}
    return Chat(messages, context=context, rejected=worse)


def prompt_of(record: dict) -> list | None:
    """The turns of a record without its preference; None if it has none of its own."""
    # whole chats under chosen and rejected have their prompt in them
    if is_whole_chat(record.get("chosen")) and is_whole_chat(record.get("rejected")):
        return None
    for key in ("conversations", "messages", "conversation"):
        if key in record:
            return record[key]

    turns = []
    if "instruction" in record:
        question = text_of(record["instruction"])
        more = record.get("input") or record.get("context")
        if more:
            question += "\n\n" + text_of(more)
        for exchange in record.get("history") or []:
            if not isinstance(exchange, list) or len(exchange) != 2:
                raise Unknown("'history' is no list of pairs")
            turns += [turn("user", exchange[0]), turn("assistant", exchange[1])]
        turns.append(turn("user", question))
    elif isinstance(record.get("prompt"), list):
        turns += record["prompt"]
    elif "prompt" in record:
        turns.append(turn("user", record["prompt"]))
    else:
        return None

    # the reply, if it is not one of a preference
    for key in ("output", "response", "completion"):
        reply = record.get(key)
        if reply is not None:
            return turns + (reply if isinstance(reply, list) else [turn("assistant", reply)])
    return turns


def is_whole_chat(x: object) -> bool:
    """Whether this is a list of turns that begins with a question, or with a system message."""
    if not isinstance(x, list) or not x or not isinstance(x[0], dict):
        return False
    return role_of(x[0]) != "assistant"


def replies_of(prompt: list[dict], chosen: object, rejected: object) -> tuple[list[dict], str]:
    """A preference as (the prompt's messages and the better reply, the worse reply)."""
    whole = []
    for side in (chosen, rejected):
        if isinstance(side, str):
            side = [turn("assistant", side)]
        said, _ = messages_of([side] if isinstance(side, dict) else side)
        # a side may tell the prompt again
        whole.append(said if said[: len(prompt)] == prompt else prompt + said)
    better, worse = whole
    if not better or not worse or better[:-1] != worse[:-1]:
        raise LeftOut("chosen and rejected differ before their last reply")
    if better[-1]["role"] != "assistant" or worse[-1]["role"] != "assistant":
        raise LeftOut("chosen or rejected does not end with a reply")
    return better, worse[-1]["content"]


# ---------------------------------------------------------------- turns


def messages_of(turns: object) -> tuple[list[dict], set[int]]:
    """Turns in whatever words as messages, and the places of replies that are not to be learnt."""
    if not isinstance(turns, list):
        raise Unknown("its turns are no list")
    messages, context = [], set()
    for i, said in enumerate(turns):
        if not isinstance(said, dict):
            raise Unknown(f"turn {i} is no object {{...}}")
        role = role_of(said)
        content = said.get("value", said.get("content"))
        if said.get("tool_calls") or said.get("function_call"):
            raise LeftOut("a turn that calls a tool")
        messages.append({"role": role, "content": text_of(content)})
        if role == "assistant" and not is_learnt(said):
            context.add(i)
    return messages, context


def role_of(said: dict) -> str:
    """A turn's role, in our words. Raises LeftOut for those of tools, Unknown for others."""
    word = said.get("from", said.get("role"))
    role = word.strip().lower() if isinstance(word, str) else word
    if role in TOOLS:
        raise LeftOut(f"a turn of the role {role!r}")
    if not isinstance(role, str) or role not in ROLES:
        raise Unknown(f"the role {word!r} is none of {', '.join(ROLES)}")
    return ROLES[role]


def is_learnt(said: dict) -> bool:
    """Whether a reply is to be learnt: OpenAI's weight, others' train and loss can say no."""
    for key in ("weight", "train", "loss"):
        if said.get(key) is None:
            continue
        if said[key] not in (0, 1):  # False is 0, and True is 1
            raise Unknown(f"{key} = {said[key]!r} is neither 0 nor 1")
        if not said[key]:
            return False
    return True


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
