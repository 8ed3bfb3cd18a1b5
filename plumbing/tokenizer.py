"""Tokenizer and chat template: chats to ids, ids to text.

A template turns a chat (chats.py) into one text; the tokenizer turns the text into ids with
character offsets. To find the replies, the chat is rendered with a mark after what each message
says, and once more up to a reply; a template that marks its replies itself, with {% generation %},
is believed.

The ids are those of `apply_chat_template` in transformers, from the directory that `save` writes,
but for one thing: a text in a message that looks like a special token (`</s>`, `<|eot_id|>`) stays
a text. With transformers it becomes the token, and so whoever writes a message, or a file of them,
can end a turn or begin another.
"""

import json
import re
import reprlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jinja2
import jinja2.ext
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from plumbing.files import (
    LIST,
    TABLE,
    TEXT,
    Field,
    InputError,
    fields_of,
    list_of,
    read_json,
    read_text,
    say_once,
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
# characters that Unicode keeps free for programs
GUARD = "\ufdd0"  # inside what only looks like a special token
BEGIN, END = "\ufdd1", "\ufdd2"  # around what a template marks as said by a model
FIRST, LAST = "\ufdd3", "\ufdd4"  # around what a message says, with its number in these digits:
DIGITS = "\ufde0\ufde1\ufde2\ufde3\ufde4\ufde5\ufde6\ufde7\ufde8\ufde9"
PRIVATE = re.compile(f"[{GUARD}{BEGIN}{END}{FIRST}{LAST}{DIGITS}]")
MARKS = re.compile(f"({BEGIN}|{END}|[{FIRST}{LAST}][{DIGITS}]+)")

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
        unk = getattr(self.backend.model, "unk_token", None)
        self.unk = None if unk is None else self.backend.token_to_id(unk)
        # what templates may ask for: bos_token, eos_token, pad_token, ...
        self.names = {name: content_of(settings[name]) for name in SPECIAL}
        for name, i in (("bos_token", self.bos), ("eos_token", self.eos)):
            self.names[name] = "" if i is None else self.tokens[i]
        own = TEMPLATES[template] if template else self._own_template(settings)
        self.has_template = own is not None  # its own, or one that was asked for
        self.template = own or TEMPLATES["llama-2"]
        self.now = datetime.now()  # some templates write the date
        self._compiled = self._compile()

        # the tokens that control a chat: the special ones, and those that the template puts around
        # what is said
        self.added = self.backend.get_added_tokens_decoder()
        self.control = {i for i, token in self.added.items() if token.special}
        self.stop = {
            i for numbers in (config, generation) for i in _as_list(numbers["eos_token_id"])
        }
        if self.eos is not None:
            self.stop.add(self.eos)
        self._learn_from_example()

    def _backend(self) -> tokenizers.Tokenizer:
        backend = _of_library(tokenizers.Tokenizer.from_str, self._damaged, self.source)
        backend.no_padding()
        backend.no_truncation()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None
            say_once(f"({self.path}: its dropout is off: a text has the same ids each time)")
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
        if PRIVATE.search(self.template):
            raise self._no_template("it writes characters that are kept for programs")
        try:
            return environment.from_string(self.template)
        except Exception as error:  # Python's own among them: a RecursionError, an OverflowError
            raise self._no_template(f"{type(error).__name__}: {error}") from None

    def _learn_from_example(self) -> None:
        """Adds what examples show: the tokens by which the template controls a chat, and the one,
        if any, that it puts after a reply.
        """
        system = {"role": "system", "content": "Be so."}
        asked = {"role": "user", "content": "Why so?"}
        answered = {"role": "assistant", "content": "So it is."}
        # (a template may take no system message; one that refuses both can still write prompts)
        for chat in ([system, asked, answered], [asked, answered] * 2):
            try:
                text, replies, _ = self.replies(chat)
            except Fails as error:
                if chat[0] is asked:
                    raise self._no_template(error) from None
                continue
            except Refused:
                continue
            ids, places = self.spell(text)
            self.control |= {i for i in ids if i in self.added}
            after = [
                i
                for reply in replies
                for i, (start, _) in zip(ids, places)
                if reply.said <= start < reply.end and i in self.control and i != self.bos
            ]
            self.stop |= set(after[:1])

    def _no_template(self, error: object) -> InputError:
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
        """The ids of a plain text, with what the tokenizer itself adds in front of one, a BOS say.
        Raises InputError.
        """
        ids, plain = self.encoding(text, adds=True).ids, self.encoding(text).ids
        if ids[len(ids) - len(plain) :] != plain:
            raise InputError(
                f"{self.path}: its post_processor puts {self.tokens[ids[-1]]!r} behind a text, so "
                "that nothing can follow; take that out of it"
            )
        doubled = self.bos is not None and ids[:2] == [self.bos] * 2  # the text has it already
        return ids[1:] if doubled else ids

    def encoding(self, text: str, adds: bool = False) -> tokenizers.Encoding:
        """The ids of a text and the characters that they stand for; adds: with special tokens that
        the tokenizer adds. Raises InputError.
        """

        def fault(error: object) -> InputError:
            # half a character, a rule that does not work
            return InputError(f"{self.path}: cannot tokenize {reprlib.repr(text)} ({error})")

        return _of_library(self.backend.encode, fault, text, add_special_tokens=adds)

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    # ------------------------------------------------------------ chats

    def render(self, messages: list[dict], reply_next: bool = False) -> str:
        """The chat as the template writes it, up to a reply if `reply_next`. Raises Refused if the
        template does not want such a chat, or fails.
        """
        names = {name: token for name, token in self.names.items() if token is not None}
        try:
            return self._compiled.render(
                messages=messages,
                add_generation_prompt=reply_next,
                tools=None,
                documents=None,
                **names,
            )
        except Refused:
            raise
        except Exception as error:  # a template can do wrong whatever Python can
            reason = f"{type(error).__name__}: {str(error)[:80]}"
            raise Fails(f"the template does not work: {reason}") from None

    def marked(self, messages: list[dict], reply_next: bool = False) -> "Rendered":
        """The chat as one text, and where in it each message's content ends. Raises Refused.

        Example: `<user>Who?<assistant>I.</s>`, and the contents end at 10 and 23.
        """
        # marks stand inside of the white space around a content, which a template may strip
        contents = [PRIVATE.sub("", message["content"]) for message in messages]
        plain, with_marks = [], []
        for i, (message, content) in enumerate(zip(messages, contents)):
            number = "".join(DIGITS[int(digit)] for digit in str(i))
            said = content.strip()
            before = content[: len(content) - len(content.lstrip())]
            after = content[len(before + said) :]
            marked = f"{before}{FIRST}{number}{said}{LAST}{number}{after}"
            plain.append({**message, "content": content})
            with_marks.append({**message, "content": marked})

        # some templates read what is said, and could be misled
        rendered = Rendered.parse(self.render(with_marks, reply_next))
        if rendered.text != Rendered.parse(self.render(plain, reply_next)).text:
            raise Refused("the template reads what is said, so its place cannot be known")
        return self.guarded(rendered, contents)

    def guarded(self, rendered: "Rendered", contents: list[str]) -> "Rendered":
        """The same with a GUARD in all that looks like a control token where a message says it: so
        it is none. Raises Refused where that cannot be done.

        Example: the message `the end</s>` → `the end<GUARD/s>`
        """
        names = [self.tokens[i] for i in self.control]
        named = [name for name in names if any(name in content for content in contents)]
        if not named:
            return rendered
        looks = re.compile("|".join(re.escape(name) for name in sorted(named, key=len)[::-1]))
        places, before = [], 0
        for i, content in enumerate(contents):
            first, end = rendered.firsts.get(i), rendered.ends.get(i, before)
            if first is not None:
                found = list(looks.finditer(rendered.text, first, end))
                places += [match.start() for match in found]
                lost = [match[0] for match in found if len(match[0]) == 1]  # no place for a GUARD
            else:
                # the template has read the content and written it anew, as it does with thoughts:
                # there its tokens are its own, but for those that end or begin something
                found = set(looks.findall(content)) & set(looks.findall(rendered.text, before, end))
                lost = [name for name in found if not self._reads(name)]
            if lost:
                raise Refused(f"a message has {lost[0]!r}, which is a special token")
            before = end
        return rendered.with_guards(places)

    def _reads(self, name: str) -> bool:
        """Whether a token in a reply may be one that the template looks for."""
        ends = {self.tokens[i] for i in self.stop | {self.bos} if i is not None}
        return name in self.template and name not in ends

    def replies(self, messages: list[dict]) -> tuple[str, list["Reply"], bool]:
        """The chat as one text with GUARDs, the replies in it, and whether the template has marked
        them itself. Raises Refused, also where the replies cannot be told from the rest.
        """
        rendered = self.marked(messages)
        text, ends, spans = rendered.text, rendered.ends, rendered.spans
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not places:
            return text, [], False
        # what the template puts between a message and a reply to it, by the role of the message
        headers: dict[str, str] = {}
        for i in places:
            role = messages[i - 1]["role"] if i else ""
            if role not in headers or i == places[-1]:
                headers[role] = self._header(text, messages[:i])

        if spans:
            replies = []
            for begin, end in spans:
                said = [ends[i] for i in places if i in ends and begin <= ends[i] <= end]
                replies.append(self._ended(text, Reply(begin, max(said, default=begin), end)))
            return text, replies, True

        # what it puts after the last reply
        last = places[-1]
        whole = rendered if last == len(messages) - 1 else self.marked(messages[: last + 1])
        if not ends.keys() >= {i for place in places for i in (place - 1, place) if i >= 0}:
            raise Refused("the template leaves out or rewrites earlier turns")
        after = whole.text[past(messages[last], whole.text, whole.ends[last]) :]

        replies = []
        for i in places:
            header = headers[messages[i - 1]["role"] if i else ""]
            begins = [0] if i == 0 else [past(messages[i - 1], text, ends[i - 1]), ends[i - 1]]
            begins = [begin for begin in begins if text.startswith(header, begin)]
            if not begins or begins[0] + len(header) > ends[i]:
                raise Refused("the template's prompt is not how its replies begin")

            said = past(messages[i], text, ends[i])
            end = said + len(after) * text.startswith(after, said)
            replies.append(self._ended(text, Reply(begins[0] + len(header), ends[i], end)))
        return text, replies, False

    def _header(self, text: str, before: list[dict]) -> str:
        """What the template puts between the last of these messages and a reply to it, in a chat
        whose text begins with them. Raises Refused if it does not: then the prompt that is asked
        would not be the one that was learnt.
        """
        if before:
            last = {**before[-1], "content": before[-1]["content"].rstrip()}
            before = [*before[:-1], last]
        prompt = self.marked(before, reply_next=True)
        place = prompt.ends.get(len(before) - 1, 0)
        if not text.startswith(prompt.text[:place]):
            raise Refused("the template's prompt is not how its replies begin")
        return prompt.text[place:]

    def _ended(self, text: str, reply: "Reply") -> "Reply":
        """The reply with the token that ends it, where that stands just behind it: some templates
        put one only between two turns, or behind what they have marked, or end the last reply in
        another way.
        """
        names = [self.tokens[i] for i in self.control if i != self.bos]
        if not names or any(name in text[reply.said : reply.end] for name in names):
            return reply
        ends = re.compile(r"\s*(?:" + "|".join(map(re.escape, names)) + ")")
        match = ends.match(text, reply.end)
        return reply._replace(end=match.end()) if match else reply

    def ids_of(
        self, text: str, replies: Sequence["Reply"]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """`spell`, so that what stands before a reply has the ids that it has as a prompt: where
        the first reply's first token would begin in the prompt, at a space say, the replies are
        tokenized apart from what stands before them. Raises Refused, and InputError.
        """
        ids, places = self.spell(text)
        begins = [reply.begin for reply in replies]
        if not begins:
            return ids, places
        prompt, _ = self.spell(text[: begins[0]])
        if ids[: len(prompt)] == prompt:
            return ids, places
        ids, places = [], []
        for begin, end in zip([0, *begins], [*begins, len(text)]):
            new, where = self.spell(text[begin:end])
            ids += new
            places += [(begin + start, begin + stop) for start, stop in where]
        return ids, places

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
            text = self.marked(messages, reply_next=True).text
            replies = []
            if any(message["role"] == "assistant" for message in messages):
                with suppress(Refused):  # whose replies cannot be found are not learnt either
                    replies = self.replies(messages)[1]
            return self.ids_of(text, replies)[0]
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


def shared_vocabulary(
    base_tokens: Sequence[str | None], value_tokens: Sequence[str | None]
) -> tuple[int, list[int]]:
    """How many leading ids both vocabularies have, and those of them that do not mean the same.

    base_tokens, value_tokens: the content of each id, None for a row of padding. What one side has
    past the other's end (padding, tokens added later: CodeLlama's 32016 against Llama-2's 32000) is
    left out of z_post. A few ids that differ, one in a thousand, can be left out too (one character
    is lost where a tokenizer was saved anew, say); raises InputError for more: equal sizes prove
    nothing.

    Example:
    >>> shared_vocabulary(["<s>", "a", "b", None], ["<s>", "a", "b", "c"])
    (3, [])
    """

    def used(tokens: Sequence[str | None]) -> int:
        """The length without the padding at the end."""
        return max((i + 1 for i, token in enumerate(tokens) if token is not None), default=0)

    shared = min(used(base_tokens), used(value_tokens))
    differing = [i for i in range(shared) if base_tokens[i] != value_tokens[i]]
    if len(differing) > shared / 1000:
        i = differing[0]
        raise InputError(
            "the base and the value model have different vocabularies: "
            f"{len(differing)} of {shared} tokens differ, the first is token "
            f"{i}, {base_tokens[i]!r} in the one and {value_tokens[i]!r} in the other; "
            "make a map between them with vocab_map.py"
        )
    return shared, differing


class Refused(Exception):
    """A template has no form for this chat; the message says why."""


class Fails(Refused):
    """A template ends in an error; the message says which."""


class Reply(NamedTuple):
    """Where a reply stands in a chat's text: its first character, the end of what is said, and the
    end of what the template puts after it.
    """

    begin: int
    said: int
    end: int


class Rendered(NamedTuple):
    """A chat as one text, and what marks in it have said.

    firsts, ends: the number of a message → where what it says begins, and ends. spans: what the
    template has marked as said by a model.
    """

    text: str
    firsts: dict[int, int]
    ends: dict[int, int]
    spans: list[tuple[int, int]]

    @classmethod
    def parse(cls, rendered: str) -> "Rendered":
        """Takes the marks out of a text. Raises Fails for marks inside of marks.

        Example:
        >>> Rendered.parse(f"Who? {BEGIN}{FIRST}{DIGITS[1]}I.{LAST}{DIGITS[1]}{END} Oh.")
        Rendered(text='Who? I. Oh.', firsts={1: 5}, ends={1: 7}, spans=[(5, 7)])
        """
        text, places, spans = [], {FIRST: {}, LAST: {}}, []
        begin, length = None, 0
        for piece in MARKS.split(rendered):
            if piece[:1] in (FIRST, LAST):
                i = int("".join(str(DIGITS.index(digit)) for digit in piece[1:]))
                # (a content that is written twice has no one place)
                of_messages = places[piece[0]]
                of_messages[i] = None if i in of_messages else length
            elif piece in (BEGIN, END):
                if (piece == BEGIN) != (begin is None):
                    raise Fails("it puts one {% generation %} into another")
                if piece == END:
                    spans.append((begin, length))
                begin = length if piece == BEGIN else None
            else:
                text.append(piece)
                length += len(piece)
        firsts, ends = (
            {i: x for i, x in each.items() if x is not None} for each in places.values()
        )
        return cls("".join(text), firsts, ends, spans)

    def with_guards(self, places: Sequence[int]) -> "Rendered":
        """The same with a GUARD behind the character at each of these places, in order."""

        def moved(place: int) -> int:
            return place + bisect_left(places, place)

        cuts = [0, *(place + 1 for place in places), len(self.text)]
        text = GUARD.join(self.text[a:b] for a, b in pairwise(cuts))
        firsts, ends = ({i: moved(x) for i, x in each.items()} for each in (self.firsts, self.ends))
        return Rendered(text, firsts, ends, [(moved(a), moved(b)) for a, b in self.spans])


def past(message: dict, text: str, end: int) -> int:
    """Where a message ends whose last character but white space stands before `end`: with the white
    space, if the template has kept it.
    """
    content = message["content"]
    space = content[len(content.rstrip()) :]
    return end + len(space) * text.startswith(space, end)


def _refuse(message: str):
    raise Refused(f"the template refuses them ({str(message)[:80]})")


def _of_library(call: Callable, fault: Callable[[object], InputError], *args, **options):
    """What a function of tokenizers gives; what it raises becomes `fault`."""
    try:
        return call(*args, **options)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # nothing more specific; a panic of Rust is no Exception
        raise fault(error) from None


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
