"""Tokenizer and chat template: chats to ids, ids to text.

A template turns a chat (chats.py) into one text; the tokenizer turns the text into ids with
character offsets. To find a reply, the chat is rendered up to it and then with it; a template that
marks its replies itself, with {% generation %}, is believed.

The ids are those of `apply_chat_template` in transformers, from the directory that `save` writes,
but for one thing: a text in a message that looks like a special token (`</s>`, `<|eot_id|>`) stays
a text. With transformers it becomes the token, and so whoever writes a message, or a file of them,
can end a turn or begin another.
"""

import json
import re
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

import jinja2
import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from plumbing.files import (
    FLAG,
    LIST,
    TABLE,
    TEXT,
    Field,
    InputError,
    fields_of,
    limited,
    list_of,
    read_json,
    read_text,
    whole,
    write_text,
)

# what is read of the files beside a tokenizer
TOKEN = whole(0, 2**24)
IDS = TOKEN | list_of(TOKEN)
NUMBERS = {"bos_token_id": Field(IDS, []), "eos_token_id": Field(IDS, [])}
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
SETTINGS = {
    **dict.fromkeys(SPECIAL, Field(TEXT | TABLE, None)),
    "chat_template": Field(TEXT | LIST, None),
    "add_bos_token": Field(FLAG, True),
}
# what else a saved tokenizer keeps, for transformers
KEPT = (
    *SPECIAL,
    "add_bos_token",
    "add_eos_token",
    "additional_special_tokens",
    "extra_special_tokens",
    "clean_up_tokenization_spaces",
    "model_max_length",
    "padding_side",
    "truncation_side",
)
# what a template, which comes from a stranger, may take for a chat: time, memory, text
SECONDS, BYTES, CHARACTERS = 5, 2**29, 2**24
# characters that Unicode keeps free for programs
GUARD = "\ufdd0"  # inside what only looks like a special token
BEGIN, END = "\ufdd1", "\ufdd2"  # around the replies that a template marks
MARKS = str.maketrans("", "", GUARD + BEGIN + END)

TEMPLATES = {
    "llama-2": """
{%- if messages[0].role == 'system' -%}
    {%- set system = '<<SYS>>\\n' + messages[0].content.strip() + '\\n<</SYS>>\\n\\n' -%}
    {%- set messages = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- bos_token + '[INST] ' + (system if loop.first else '')
            + message.content.strip() + ' [/INST]' -}}
    {%- elif message.role == 'assistant' and not loop.first -%}
        {{- ' ' + message.content.strip() + ' ' + eos_token -}}
    {%- else -%}
        {{- raise_exception('a chat begins with a question, or one system message') -}}
    {%- endif -%}
{%- endfor -%}""",
    "plain": """
{{- bos_token -}}
{%- for message in messages -%}
    {%- if not loop.first -%}{{- '\\n' -}}{%- endif -%}
    {{- message.role.capitalize() + ': ' + message.content.strip() -}}
    {%- if message.role == 'assistant' -%}{{- eos_token -}}{%- endif -%}
    {%- if loop.last and message.role != 'assistant' -%}{{- '\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- if messages and messages[-1].role == 'assistant' -%}{{- '\\n' -}}{%- endif -%}
    {{- 'Assistant:' -}}
{%- endif -%}""",
}


# ---------------------------------------------------------------- tokenizer and template


class Tokenizer:
    """`tokenizer.json` of a Hugging Face directory, with its special tokens and its chat template.

    template: a name of TEMPLATES that takes the place of the directory's own; without either,
    llama-2, the paper's. Raises InputError for files that are missing or damaged.
    """

    def __init__(self, directory: str | Path, template: str | None = None):
        self.directory = Path(directory)
        self.path = self.directory / "tokenizer.json"
        self.source = read_text(self.path)
        self.backend = self._backend()
        self.tokens = self._tokens()  # the content of each id, None for one that is not used

        raw = self._beside("tokenizer_config.json")
        self.kept = {key: raw[key] for key in KEPT if key in raw}
        settings = fields_of(raw, SETTINGS, self.directory / "tokenizer_config.json")
        config, generation = (
            fields_of(self._beside(name), NUMBERS, self.directory / name)
            for name in ("config.json", "generation_config.json")
        )
        self.bos = self._id_of("bos", settings, config)
        self.eos = self._id_of("eos", settings, config)
        self.adds_bos = settings["add_bos_token"]
        # what templates may ask for: bos_token, eos_token, pad_token, ...
        self.names = {name: content_of(settings[name]) for name in SPECIAL}
        for name, i in (("bos_token", self.bos), ("eos_token", self.eos)):
            self.names[name] = "" if i is None else self.tokens[i]
        own = TEMPLATES[template] if template else self._own_template(settings)
        self.has_template = own is not None  # its own, or one that was asked for
        self.template = own or TEMPLATES["llama-2"]
        self.now = datetime.now()  # some templates write the date
        self._compiled = self._compile()

        # the tokens that control a chat: those that are called special, and what the template uses
        self.added = self.backend.get_added_tokens_decoder()
        self.control = {
            i
            for i, token in self.added.items()
            if token.special or (token.content and token.content in self.template)
        }
        self.stop = {
            i for numbers in (config, generation) for i in _as_list(numbers["eos_token_id"])
        }
        if self.eos is not None:
            self.stop.add(self.eos)
        self._learn_from_example()

    def _backend(self) -> tokenizers.Tokenizer:
        try:
            backend = tokenizers.Tokenizer.from_str(self.source)
        except Exception as error:  # the library raises nothing more specific
            raise self._damaged(error) from None
        backend.no_padding()
        backend.no_truncation()
        return backend

    def _tokens(self) -> list[str | None]:
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        largest = max(vocabulary.values(), default=None)
        if largest not in TOKEN:
            raise self._damaged(f"its largest id is {largest}")
        tokens: list[str | None] = [None] * (1 + largest)
        for token, i in vocabulary.items():
            tokens[i] = token
        return tokens

    def _damaged(self, reason: object) -> InputError:
        return InputError(
            f"{self.path}: not a tokenizer ({reason}); the file is damaged, download it again"
        )

    def _beside(self, name: str) -> dict:
        """A JSON file beside the tokenizer, which need not be there."""
        path = self.directory / name
        return read_json(path, TABLE) if path.exists() else {}

    def _id_of(self, name: str, settings: dict, config: dict) -> int | None:
        """The id of "bos" or "eos": by its content, else by the number in config.json."""
        token = content_of(settings[f"{name}_token"])
        if token is not None and token in self.tokens:  # `tokens` has None for unused ids
            return self.tokens.index(token)
        ids = _as_list(config[f"{name}_token_id"])
        if not ids:
            return None
        if ids[0] >= len(self.tokens) or self.tokens[ids[0]] is None:
            raise InputError(
                f"{self.directory / 'config.json'}: {name}_token_id = {ids[0]} is no token of "
                f"{self.path.name}; they do not belong together"
            )
        return ids[0]

    def _own_template(self, settings: dict) -> str | None:
        """The directory's chat template, if it has one."""
        file = self.directory / "chat_template.jinja"
        if file.exists():
            return read_text(file)
        own = settings["chat_template"]
        if isinstance(own, list):  # several, by name
            named = [entry for entry in own if entry in TABLE and entry.get("name") == "default"]
            own = named[0].get("template") if named else None
        if own is not None and own not in TEXT:
            raise self._no_template("it is no text")
        return own or None

    def _compile(self) -> jinja2.Template:
        """The template in a sandbox, with what transformers gives to templates."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
        )
        environment.filters["tojson"] = lambda x, **options: json.dumps(
            x, ensure_ascii=False, **options
        )
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: self.now.strftime(form)
        try:
            with limited(SECONDS, BYTES):
                return environment.from_string(self.template)
        except Exception as error:  # Python's own among them: a RecursionError, an OverflowError
            raise self._no_template(error) from None

    def _learn_from_example(self) -> None:
        """Adds what an example shows: the tokens by which the template controls a chat, and the
        special one, if any, that it puts after a reply.
        """
        asked = {"role": "user", "content": "Why so?"}
        answered = {"role": "assistant", "content": "So it is."}
        try:
            text, replies, _ = self.replies([asked, answered] * 2)
        except Refused:
            return  # such a template can still write prompts
        ids, places = self.spell(text)
        self.control |= {i for i in ids if i in self.added}
        for reply in replies:
            for i, (start, _) in zip(ids, places):
                if reply.said <= start < reply.end and i in self.control and i != self.bos:
                    self.stop.add(i)
                    return

    def _no_template(self, error: object) -> InputError:
        if isinstance(error, Exception):
            error = f"{type(error).__name__}: {error}"
        return InputError(
            f"{self.directory}: the chat template does not work ({str(error)[:200]}); choose "
            "another with --template"
        )

    def check(self, vocab_size: int) -> None:
        """Raises InputError if a token has no row in a model with `vocab_size` rows."""
        if len(self.tokens) > vocab_size:
            raise InputError(
                f"{self.path}: has {len(self.tokens)} tokens, but the model's vocab_size is "
                f"{vocab_size}; use the tokenizer that belongs to the model"
            )

    # ------------------------------------------------------------ plain texts

    def encode(self, text: str) -> list[int]:
        """The ids of a plain text, with one BOS in front if the tokenizer has one and is used to
        it. Raises InputError.
        """
        ids = self.encoding(text).ids
        if self.bos is None or not self.adds_bos or ids[:1] == [self.bos]:
            return ids
        return [self.bos, *ids]

    def encoding(self, text: str) -> tokenizers.Encoding:
        """The ids of a text and the characters that they stand for. Raises InputError."""
        try:
            return self.backend.encode(text, add_special_tokens=False)
        except Exception as error:  # of the library: half a character, a rule that does not work
            raise InputError(
                f"{self.path}: cannot tokenize {reprlib.repr(text)} ({error})"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    # ------------------------------------------------------------ chats

    def render(self, messages: list[dict], reply_next: bool = False) -> str:
        """The chat as one text, up to a reply if `reply_next`, with GUARD, BEGIN and END in it.
        Raises Refused if the template does not want such a chat, InputError if it does not work.
        """
        with self.template_at_work():
            return self._render(self.guarded(messages), reply_next)

    @contextmanager
    def template_at_work(self) -> Iterator[None]:
        """A template can do wrong whatever Python can: all of it becomes an InputError."""
        try:
            with limited(SECONDS, BYTES):
                yield
        except (Refused, InputError):
            raise
        except Exception as error:
            raise self._no_template(error) from None

    def _render(self, guarded: list[dict], reply_next: bool = False) -> str:
        text = self._compiled.render(
            messages=guarded,
            add_generation_prompt=reply_next,
            tools=None,
            documents=None,
            **{name: token for name, token in self.names.items() if token is not None},
        )
        if len(text) > CHARACTERS:
            raise self._no_template(f"it makes {len(text)} characters of a chat")
        return text

    def guarded(self, messages: list[dict]) -> list[dict]:
        """Messages in which what looks like a control token is none: a GUARD is put into it.

        Example: `the end</s>` → `the end<GUARD/s>`
        """
        guarded = []
        for message in messages:
            content = message["content"].translate(MARKS)
            for token in (self.tokens[i] for i in self.control):
                if token in content:
                    if len(token) == 1:  # nowhere to put a GUARD
                        raise Refused(f"a message has {token!r}, which is a special token")
                    content = content.replace(token, token[0] + GUARD + token[1:])
            guarded.append({**message, "content": content})
        return guarded

    def replies(self, messages: list[dict]) -> tuple[str, list["Reply"], bool]:
        """The chat as one text with GUARDs, the replies in it, and whether the template has marked
        them itself. Raises Refused, also where the replies cannot be told from the rest.
        """
        with self.template_at_work():
            guarded = self.guarded(messages)
            text, marked = unmarked(self._render(guarded))
            if marked:
                return text, [Reply(begin, begin, end) for begin, end in marked], True
            places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
            return text, [self._reply(text, guarded, i) for i in places], False

    def _reply(self, text: str, guarded: list[dict], i: int) -> "Reply":
        """Where the reply i stands in a chat's text: the chat is rendered up to it, and with it."""
        before, _ = unmarked(self._render(guarded[:i], reply_next=True))
        after, _ = unmarked(self._render(guarded[: i + 1]))
        if not text.startswith(before):
            raise Refused("the template's prompt is not how its replies begin")
        content = guarded[i]["content"].strip()
        said = text.find(content, len(before)) + len(content)
        if text.startswith(after):
            return Reply(len(before), max(len(before), min(said, len(after))), len(after))

        # some templates put EOS only where no more is to come: what the two texts share counts, but
        # for the first characters of a next turn that happen to be the same
        shared = commonprefix([after, text])
        if said < len(before) + len(content) or said > len(shared):
            raise Refused("the template rewrites earlier turns as a chat goes on")
        ends = [said]
        for token in (self.tokens[i] for i in self.control):
            found = shared.rfind(token, said)
            if found >= 0:
                ends.append(found + len(token))
        return Reply(len(before), said, max(ends))

    def spell(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of a rendered chat, and of each where its characters begin and end. GUARDs have
        kept special tokens apart, and go. Raises Refused, and InputError.
        """
        encoding = self.encoding(text)
        if GUARD not in text:
            return encoding.ids, encoding.offsets
        ids, places = [], []
        for i, (start, end) in zip(encoding.ids, encoding.offsets):
            characters = text[start:end]
            if characters and not characters.strip(GUARD):
                continue
            if GUARD in characters:
                raise Refused("a message has a special token's text, which cannot be kept apart")
            ids.append(i)
            places.append((start, end))
        return ids, places

    def prompt(self, messages: list[dict]) -> list[int]:
        """The ids after which the model is to reply. Raises InputError if the template refuses."""
        try:
            text, _ = unmarked(self.render(messages, reply_next=True))
            return self.spell(text)[0]
        except Refused as error:
            raise InputError(
                f"{self.directory}: no prompt can be made of this chat: {error}"
            ) from None

    def save(self, directory: Path) -> None:
        """Writes the tokenizer and its template where transformers looks for them."""
        settings = {
            **self.kept,
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": self.template,
        }
        if self.bos is not None:
            settings["bos_token"] = self.tokens[self.bos]
        if self.eos is not None:
            settings["eos_token"] = self.tokens[self.eos]
        generation = {"bos_token_id": self.bos, "eos_token_id": sorted(self.stop)}
        write_text(directory / "tokenizer.json", self.source)
        write_text(directory / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
        write_text(directory / "generation_config.json", json.dumps(generation, indent=2) + "\n")


class TextStream:
    """The text of ids that come one by one. Half a character is held back until it is whole.

    Only the last whole character's token and what follows are decoded again, so a step's cost is
    constant.

    Example: `é` as two ids, one byte each
        step(first byte) → ""       step(second byte) → "é"
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self.decode = tokenizer.decode
        # the ids that each step decodes; the first `shown` characters of that are out already
        self.ids = list(prompt)
        self.shown = len(self.decode(self.ids))

    def step(self, i: int) -> str:
        """The text that id `i` completes, often ''."""
        self.ids.append(i)
        text = self.decode(self.ids).rstrip("\ufffd")  # U+FFFD: bytes that are no character
        piece = text[self.shown :]
        self.shown = max(self.shown, len(text))

        # whole by itself: the next steps decode from this id on, and it is out already
        tail = self.decode([i])
        if "\ufffd" not in tail:
            self.ids, self.shown = [i], len(tail)
        return piece

    def rest(self) -> str:
        """What is still held back when no more ids come."""
        return self.decode(self.ids)[self.shown :]


class Refused(Exception):
    """A template has no form for this chat; the message says why."""


class Reply(NamedTuple):
    """Where a reply stands in a chat's text: its first character, the end of what is said, and the
    end of what the template puts after it.
    """

    begin: int
    said: int
    end: int


def _refuse(message: str):
    raise Refused(f"the template refuses them ({str(message)[:80]})")


def _as_list(x: int | list[int]) -> list[int]:
    return x if isinstance(x, list) else [x]


def content_of(token: str | dict | None) -> str | None:
    """A special token of `tokenizer_config.json`: a text, or an object that has it."""
    return token.get("content") if isinstance(token, dict) else token


class Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, by which a template marks what a model has said."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller) -> str:
        return BEGIN + caller() + END


def unmarked(rendered: str) -> tuple[str, list[tuple[int, int]]]:
    """A text without BEGIN and END, and the places between them.

    Example:
    >>> unmarked(f"Who? {BEGIN}I.{END} Oh.")
    ('Who? I. Oh.', [(5, 7)])
    """
    text, spans, begin = "", [], 0
    for piece in re.split(f"([{BEGIN}{END}])", rendered):
        if piece == BEGIN:
            begin = len(text)
        elif piece == END:
            spans.append((begin, len(text)))
        else:
            text += piece
    return text, spans
