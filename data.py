"""Chats as tokens: tokenizer, chat template, loss mask, batches, streaming.

A template turns a chat (chats.py) into one text; the tokenizer turns the text into ids with
character offsets; a token is a target (the loss counts it) if it begins inside a reply, up to the
reply's first stop token. So every user turn is masked, whatever the template looks like. To find a
reply, the chat is rendered up to it and then with it; a template that marks its replies itself,
with {% generation %}, is believed.

The ids are those of `apply_chat_template` in transformers, from the directory that `save` writes,
but for one thing: a text in a message that looks like a special token (`</s>`, `<|eot_id|>`) stays
a text. With transformers it becomes the token, and so whoever writes a message, or a file of them,
can end a turn or begin another.
"""

import hashlib
import json
import re
import reprlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

import jinja2
import jinja2.ext
import tokenizers
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torch import Tensor
from tqdm import tqdm

from chats import Chat, Reading
from files import (
    FLAG,
    LIST,
    TABLE,
    TEXT,
    Field,
    InputError,
    fields_of,
    limited,
    list_of,
    open_tensors,
    read_json,
    read_text,
    save_tensors,
    verify,
    whole,
    write_text,
)

CACHE = Path(__file__).parent / "out" / "cache"
FORMAT = "5"  # of the cached files: raise it when tokenization changes

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


# ---------------------------------------------------------------- tokenized chats

Batch = tuple[Tensor, Tensor, Tensor]  # inputs, targets, counted: see Chats.batch


@dataclass
class Chats:
    """Tokenized chats, one after another: chat i is ids[offsets[i] : offsets[i + 1]]."""

    ids: Tensor  # int32
    target: Tensor  # bool: the loss counts this token
    offsets: Tensor  # int64, one more than there are chats
    entry: Tensor  # int64, the number of each chat among the records that were read, from 0 on
    report: str  # what became of the chats that were read

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> Tensor:
        return self.offsets.diff()

    def tensors(self) -> dict[str, Tensor]:
        """All that a training depends on."""
        names = ("ids", "target", "offsets", "entry")
        return {name: getattr(self, name) for name in names}

    def fingerprint(self) -> str:
        """What tells these chats from others, as this tokenizer and template write them."""
        hashed = hashlib.sha256()
        for name, tensor in self.tensors().items():
            hashed.update(f"{name} {tensor.dtype} {len(tensor)} ".encode())
            hashed.update(tensor.numpy())
        return hashed.hexdigest()

    def members(self, rows: Sequence[int]) -> list[int]:
        """The chats that `rows` put in a batch: themselves. Pairs (extras/losses.py): two each."""
        return list(rows)

    def plain(self) -> "Chats":
        """The chats that held-out loss is measured on, each by itself."""
        return self

    def count_targets(self, rows: Sequence[int]) -> int:
        """The number of tokens that are to be predicted."""
        # nothing comes before a chat's first token, so that one is never predicted
        count = 0
        for i in self.members(rows):
            count += int(self.target[self.offsets[i] + 1 : self.offsets[i + 1]].sum())
        return count

    def loss_count(self, rows: Sequence[int]) -> int:
        """What the loss of these chats is a mean over: here their targets, of pairs the pairs."""
        return self.count_targets(rows)

    def norm_count(self, rows: Sequence[int], norm_over: str) -> tuple[int, int]:
        """Where the norm term looks: (norm_width for `batch`, number of positions counted there).

        "response": (0, number of targets). "all": (T, rows · T), every position up to the longest
        row's end, prompt and padding too, as the released code does.
        """
        if norm_over == "response":
            return 0, self.count_targets(rows)
        width = self.width(rows)
        return width, width * len(self.members(rows))

    def width(self, rows: Sequence[int]) -> int:
        """T of a batch of them: the longest one's inputs, all of it but the last token."""
        lengths = [int(self.offsets[i + 1] - self.offsets[i]) for i in self.members(rows)]
        return max(lengths, default=2) - 1  # no chats: T = 1

    def batch(
        self,
        rows: Sequence[int],
        device: str | torch.device = "cpu",
        norm_width: int = 0,
        align: int = 1,
    ) -> Batch:
        """Chats side by side, padded on the right: inputs, targets, counted, (B, T) each.

        targets: the token that each input is to predict, -100: none.
        counted: where the norm term looks: at the targets, or at each row's first `norm_width`
        positions, see `norm_count`.
        T is a multiple of `align`. Where `rows` is empty, the batch is one row of padding.

        Example: `[1, 5, 6, 7]`, of which 6 and 7 are a reply, and `[1, 5, 8]`, of which 8 is one
            inputs    1    5    6        targets  -100    6    7        counted  no  yes  yes
                      1    5    0                 -100    8 -100                 no  yes  no
        """
        members = self.members(rows)
        T = max(norm_width, self.width(rows))
        T = -(-T // align) * align  # rounded up
        shape = (max(1, len(members)), T)
        inputs = torch.zeros(shape, dtype=torch.long)  # (B, T)
        targets = torch.full(shape, -100)  # (B, T)
        for b, i in enumerate(members):
            # the inputs are all tokens but the last, the targets all but the first
            chat = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
            ids = self.ids[chat].long()
            target = self.target[chat]
            inputs[b, : len(ids) - 1] = ids[:-1]
            targets[b, : len(ids) - 1] = ids[1:].masked_fill(~target[1:], -100)
        counted = targets >= 0
        if norm_width and members:
            counted[:, :norm_width] = True
        return inputs.to(device), targets.to(device), counted.to(device)


def tokenize_chat(tokenizer: Tokenizer, chat: Chat) -> tuple[list[int], list[bool], list[int]]:
    """(ids, is it a target, where replies end) of a chat. Raises Refused and InputError.

    A reply's tokens reach up to the stop token that follows what is said: what a template writes
    after it is no target. Where the template marks the replies itself, all that it marks is.
    """
    text, replies, marked = tokenizer.replies(chat.messages)
    places = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if len(replies) != len(places):
        if chat.unlearnt:
            raise Refused("the template marks parts of replies, of which some are not to be learnt")
        places = range(len(replies))

    ids, characters = tokenizer.spell(text)
    target = [False] * len(ids)
    ends = []  # of each reply, one past its last token
    i = 0
    for place, reply in zip(places, replies):
        # a marked reply has all tokens that it has a part of, others those that begin in it
        while i < len(ids) and characters[i][1 if marked else 0] < reply.begin + marked:
            i += 1
        while i < len(ids) and characters[i][0] < reply.end:
            target[i] = place not in chat.unlearnt
            i += 1
            is_stop = ids[i - 1] in tokenizer.stop and characters[i - 1][0] >= reply.said
            if is_stop and not marked:  # it is itself the last target
                break
        ends.append(i)
    return ids, target, ends


def tokenize(reading: Reading, tokenizer: Tokenizer, max_length: int) -> Chats:
    """Tokenizes chats, and caches what comes of it. A chat longer than max_length tokens is cut
    after the last reply that fits. Raises InputError if no chat with a reply to learn is left.
    """
    # the cached file's name is a hash of all that the result depends on; a template may look at the
    # date, so what it makes of an example does too
    example = [{"role": "user", "content": "a"}]
    parts = [
        FORMAT,
        str((reading.read, sorted(reading.left_out.items()))),
        tokenizer.source,
        tokenizer.template,
        str(tokenizer.prompt(example)),
        str((sorted(tokenizer.stop), sorted(tokenizer.control), tokenizer.names)),
        str(max_length),
    ]
    hashed = hashlib.sha256("\0".join(parts).encode())
    for chat in reading.chats:
        hashed.update(json.dumps([chat.entry, chat.messages, [*chat.unlearnt.items()]]).encode())
    key = hashed.hexdigest()[:24]
    cached = CACHE / f"{key}.safetensors"
    chats = _read_cache(cached)
    if chats is None:
        chats = _tokenize(reading, tokenizer, max_length)
        CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)  # chats are nobody else's business
        save_tensors(chats.tensors(), cached, {"report": chats.report})
    return chats


def _read_cache(cached: Path) -> Chats | None:
    """What `tokenize` has kept; None if it is not there, or is not what was written."""
    if not cached.exists():
        return None
    try:
        file = open_tensors(cached)
        verify(file, cached)
    except InputError:  # a damaged one is made again
        return None
    tensors = {name: file.get_tensor(name) for name in file.keys()}
    return Chats(**tensors, report=file.metadata()["report"])


def _tokenize(reading: Reading, tokenizer: Tokenizer, max_length: int) -> Chats:
    """Chats, tokenized, and a report of what became of them. Raises InputError."""
    # packed: a list of Python's numbers would take ten times the room
    ids, target, offsets, entry = array("i"), bytearray(), [0], []
    tally = Tally(max_length, Counter(reading.left_out))
    for chat in tqdm(reading.chats, "tokenizing", unit=" chats", leave=False, disable=None):
        begun, before = from_first_question(chat)
        if not any(message["role"] == "assistant" for message in begun.messages):
            tally.left_out["no reply in them"] += 1
            continue
        try:
            chat_ids, chat_target, ends = tokenize_chat(tokenizer, begun)
        except Refused as reason:
            tally.left_out[str(reason)] += 1
            continue
        if not any(chat_target):
            tally.left_out["no reply in them that is to be learnt"] += 1
            continue

        # as many replies as fit
        fitting = [reply_end for reply_end in ends if reply_end <= max_length]
        end = max(fitting, default=0)
        if not any(chat_target[:end]):
            tally.left_out[tally.no_fit] += 1
            continue
        ids.extend(chat_ids[:end])
        target.extend(chat_target[:end])
        offsets.append(len(ids))
        entry.append(chat.entry)
        tally.count_replies(begun, before, len(ends) - len(fitting), len(ends))

    report = tally.report(reading.read, len(entry), len(ids), sum(target))
    return Chats(
        ids=torch.frombuffer(ids, dtype=torch.int32),
        target=torch.frombuffer(target, dtype=torch.bool),
        offsets=torch.tensor(offsets),
        entry=torch.tensor(entry),
        report=report,
    )


@dataclass
class Tally:
    """What became of chats and of the replies in those that are used."""

    max_length: int
    left_out: Counter  # chats, by reason
    unlearnt: Counter = field(default_factory=Counter)  # replies, by reason
    replies: int = 0
    cut: int = 0  # chats

    @property
    def no_fit(self) -> str:
        return f"no reply fits into --max_length {self.max_length}"

    def count_replies(self, chat: Chat, before: int, past: int, found: int) -> None:
        """Of one chat: how many replies stood before its first question; how many are past the cut
        of all that were found in its text.
        """
        places = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        self.replies += before + len(places)
        self.cut += past > 0
        self.unlearnt["before the first question"] += before
        self.unlearnt["not marked by the template"] += max(0, len(places) - found)
        # (a template may mark several parts of a reply: then `past` counts parts)
        self.unlearnt["past the cut"] += min(past, len(places))
        within = places[: len(places) - past] if past else places
        self.unlearnt.update(chat.unlearnt[i] for i in within if i in chat.unlearnt)

    def report(self, read: int, used: int, tokens: int, targets: int) -> str:
        """A table; its last line warns where more than a tenth is left out. Raises InputError if
        nothing is used.
        """
        if not used:
            why = ", ".join(f"{reason}: {n}" for reason, n in self.left_out.most_common())
            raise InputError(f"no chat has a reply to learn ({why})")
        rows = [("chats read", read, "")]
        rows += [("  left out", n, reason) for reason, n in self.left_out.most_common()]
        rows.append(("chats used", used, ""))
        if self.cut:
            rows.append(("  cut", self.cut, f"to {self.max_length} tokens"))
        rows.append(("replies in them", self.replies, ""))
        rows += [("  not learnt", n, reason) for reason, n in self.unlearnt.most_common() if n]
        rows.append(("tokens", tokens, ""))
        rows.append(("  targets", targets, f"{targets / tokens:.1%}"))
        report = "\n".join(f"  {name:<18}{n:>12,}  {note}".rstrip() for name, n, note in rows)
        if used >= 0.9 * read:
            return report

        reason = self.left_out.most_common(1)[0][0]
        remedy = ""
        if reason == self.no_fit:
            remedy = "; a larger --max_length keeps more, if the models' context allows it"
        elif "template" in reason:
            remedy = "; another --template may take them"
        return f"{report}\n  warning: {1 - used / read:.0%} of the chats are left out{remedy}"


def from_first_question(chat: Chat) -> tuple[Chat, int]:
    """A chat without the replies before its first question, and how many those are: ShareGPT's
    pages often begin in the middle.
    """
    speakers = [message["role"] for message in chat.messages]
    question = speakers.index("user") if "user" in speakers else len(speakers)
    kept = [i for i, role in enumerate(speakers) if i > question or role != "assistant"]
    unlearnt = {kept.index(i): reason for i, reason in chat.unlearnt.items() if i in kept}
    return Chat([chat.messages[i] for i in kept], chat.entry, unlearnt), len(speakers) - len(kept)


def epoch_batches(lengths: Tensor, batch_size: int, seed: int) -> list[list[int]]:
    """One epoch's batches, of chats of similar length, in random order that `seed` decides.

    Example: chats of 9, 2, 8 and 3 tokens, two at a time: the long ones go together
    >>> sorted(sorted(batch) for batch in epoch_batches(torch.tensor([9, 2, 8, 3]), 2, seed=0))
    [[0, 2], [1, 3]]
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator)
    batches = []
    for pool in order.split(50 * batch_size):  # sorted in a pool only, so that epochs differ
        pool = pool[lengths[pool].argsort(stable=True)]
        batches += [batch.tolist() for batch in pool.split(batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]
