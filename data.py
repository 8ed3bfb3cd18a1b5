"""Chats as tokens: tokenizer, chat template, loss mask, chat files, batches, streaming.

A chat is a list of messages {"role": "system" | "user" | "assistant", "content": str}. A template
turns it into one text; the tokenizer turns the text into ids with character offsets; a token is a
target (the loss counts it) if it begins inside a reply, up to the reply's first stop token. So
every user turn is masked, whatever the template looks like. To find a reply, the chat is rendered
up to it and then with it.
"""

import hashlib
import json
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import tokenizers
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torch import Tensor
from tqdm import tqdm

from files import (
    LIST,
    TABLE,
    TEXT,
    Field,
    InputError,
    limited,
    list_of,
    open_tensors,
    parse_json,
    read_fields,
    read_lines,
    read_text,
    save_tensors,
    whole,
    write_text,
)

CACHE = Path(__file__).parent / "out" / "cache"
FORMAT = "3"  # of the cached files: raise it when tokenization changes

# what is read of the files beside a tokenizer
TOKEN = whole(0, 2**24)
IDS = TOKEN | list_of(TOKEN)
NUMBERS = {"bos_token_id": Field(IDS, []), "eos_token_id": Field(IDS, [])}
SETTINGS = {
    "bos_token": Field(TEXT | TABLE, None),
    "eos_token": Field(TEXT | TABLE, None),
    "chat_template": Field(TEXT | LIST, None),
}
# a template comes from a stranger: so long may it take for a chat, so much memory and text may it
# make
SECONDS, BYTES, CHARACTERS = 5, 2**29, 2**24

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
    {%- else -%}
        {{- ' ' + message.content.strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}""",
    "plain": """
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- 'Assistant: ' + message.content.strip() + eos_token -}}
        {%- if not loop.last -%}{{- '\\n' -}}{%- endif -%}
    {%- else -%}
        {{- message.role.capitalize() + ': ' + message.content.strip() + '\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}""",
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

        settings = self._settings("tokenizer_config.json", SETTINGS)
        config = self._settings("config.json", NUMBERS)
        generation = self._settings("generation_config.json", NUMBERS)
        self.bos = self._special("bos", settings, config)
        self.eos = self._special("eos", settings, config)
        self.template = TEMPLATES[template] if template else self._own_template(settings)
        self._compiled = self._compile()
        self.stop = self._stop(config, generation)

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

    def _settings(self, name: str, table: dict[str, Field]) -> dict:
        """What a JSON file beside the tokenizer says of these fields; it need not be there."""
        path = self.directory / name
        if path.exists():
            return read_fields(path, table)
        return {field: default for field, (_, default) in table.items()}

    def _special(self, name: str, settings: dict, config: dict) -> int | None:
        """The id of "bos" or "eos": by its content, else by the number in config.json."""
        token = settings[f"{name}_token"]
        if isinstance(token, dict):
            token = token.get("content")
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

    def _own_template(self, settings: dict) -> str:
        """The directory's chat template, else llama-2's."""
        file = self.directory / "chat_template.jinja"
        if file.exists():
            return read_text(file)
        own = settings["chat_template"]
        if isinstance(own, list):  # several, by name
            named = [entry for entry in own if entry in TABLE and entry.get("name") == "default"]
            own = named[0].get("template") if named else None
        if own is not None and own not in TEXT:
            raise self._no_template("it is no text")
        return own or TEMPLATES["llama-2"]

    def _compile(self) -> jinja2.Template:
        """The template in a sandbox, with what transformers gives to templates."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda x, **options: json.dumps(
            x, ensure_ascii=False, **options
        )
        environment.globals["raise_exception"] = _refuse
        try:
            with limited(SECONDS, BYTES):
                return environment.from_string(self.template)
        except Exception as error:  # Python's own among them: a RecursionError, an OverflowError
            raise self._no_template(error) from None

    def _stop(self, config: dict, generation: dict) -> set[int]:
        """The tokens that end a reply: the end of the text, and what the template puts there."""
        stop = {i for settings in (config, generation) for i in _as_list(settings["eos_token_id"])}
        if self.eos is not None:
            stop.add(self.eos)

        # the last special token of an exchange
        example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            turn = self.encode(self.render(example))
        except Refused as error:
            raise self._no_template(error) from None
        added = self.backend.get_added_tokens_decoder()
        special = [i for i in turn if i in added and added[i].special and i != self.bos]
        return stop | set(special[-1:])

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

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with exactly one BOS in front if the tokenizer has one. Raises
        InputError.
        """
        return self.with_bos(self.encoding(text).ids)

    def encoding(self, text: str) -> tokenizers.Encoding:
        """The ids of a text and the characters that they stand for. Raises InputError."""
        try:
            return self.backend.encode(text, add_special_tokens=False)
        except Exception as error:  # of the library: half a character, a rule that does not work
            raise InputError(
                f"{self.path}: cannot tokenize {reprlib.repr(text)} ({error})"
            ) from None

    def with_bos(self, ids: list[int]) -> list[int]:
        """The ids with a BOS in front; unchanged if they have it, or the tokenizer has none."""
        if self.bos is None or ids[:1] == [self.bos]:
            return ids
        return [self.bos, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    def render(self, messages: list[dict], reply_next: bool = False) -> str:
        """The chat as one text, up to a reply if `reply_next`. Raises Refused if the template does
        not want such a chat, InputError if it does not work.
        """
        try:
            with limited(SECONDS, BYTES):
                text = self._compiled.render(
                    messages=messages,
                    add_generation_prompt=reply_next,
                    bos_token="" if self.bos is None else self.tokens[self.bos],
                    eos_token="" if self.eos is None else self.tokens[self.eos],
                )
        except Refused:
            raise
        except Exception as error:  # a template can do wrong whatever Python can
            raise self._no_template(error) from None
        if len(text) > CHARACTERS:
            raise self._no_template(f"it makes {len(text)} characters of a chat")
        return text

    def prompt(self, messages: list[dict]) -> list[int]:
        """The ids after which the model is to reply. Raises InputError if the template refuses."""
        try:
            return self.encode(self.render(messages, reply_next=True))
        except Refused as error:
            raise InputError(
                f"{self.directory}: the chat template refuses this chat ({error})"
            ) from None

    def save(self, directory: Path) -> None:
        """Writes the tokenizer and its template where transformers looks for them."""
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": self.template}
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
    """A template has no form for this chat, and says so."""


def _refuse(message: str):
    raise Refused(message)


def _as_list(x: int | list[int]) -> list[int]:
    return x if isinstance(x, list) else [x]


# ---------------------------------------------------------------- chat files

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}


def _messages(record: dict) -> list[dict]:
    """One record of a chat file as messages; KeyError or TypeError where its form is not known.

    Example, ShareGPT's form:
    >>> turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "I."}]
    >>> _messages({"conversations": turns})
    [{'role': 'user', 'content': 'Who?'}, {'role': 'assistant', 'content': 'I.'}]
    """
    turns = []
    if "conversations" in record or "messages" in record:
        # ShareGPT: from/value; OpenAI: role/content
        for turn in record.get("conversations", record.get("messages")):
            role = ROLES[turn.get("from", turn.get("role"))]
            turns.append((role, turn.get("value", turn.get("content"))))
    else:
        # Alpaca, with LIMA's `history` of earlier exchanges
        question = record["instruction"]
        if record.get("input"):
            question += "\n\n" + record["input"]
        if record.get("system"):
            turns.append(("system", record["system"]))
        for asked, answered in record.get("history") or []:
            turns += [("user", asked), ("assistant", answered)]
        turns += [("user", question), ("assistant", record["output"])]
    if not all(isinstance(content, str) for _, content in turns):
        raise TypeError
    return [{"role": role, "content": content} for role, content in turns]


def _records(path: str | Path) -> list[tuple[str, object]]:
    """The records of a .json (a list) or .jsonl file, each with its place. Raises InputError."""
    text = read_text(path)
    if text.lstrip().startswith("[") and not str(path).endswith(".jsonl"):
        return [(f"entry {i}", record) for i, record in enumerate(parse_json(text, path))]
    return [(f"line {i}", record) for i, record in read_lines(path)]


def read_chats(path: str | Path) -> list[list[dict]]:
    """The chats of a .json (a list) or .jsonl file, in ShareGPT, messages or Alpaca form.

    Raises InputError that names the line (.jsonl) or the entry (.json) that is of no known form.
    """
    chats = []
    for place, record in _records(path):
        try:
            chats.append(_messages(record))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(
                f"{path}, {place}: not a chat; it needs 'conversations' (from/value), 'messages' "
                "(role/content), or 'instruction' and 'output'"
            ) from None
    if not chats:
        raise InputError(f"{path}: holds no chats")
    return chats


# ---------------------------------------------------------------- tokenized chats

Batch = tuple[Tensor, Tensor, Tensor]  # inputs, targets, counted: see Chats.batch


@dataclass
class Chats:
    """Tokenized chats, one after another: chat i is ids[offsets[i] : offsets[i + 1]]."""

    ids: Tensor  # int32
    target: Tensor  # bool: the loss counts this token
    offsets: Tensor  # int64, one more than there are chats
    entry: Tensor  # int64, the place of each chat in its file, from 0 on
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


def tokenize_chat(
    tokenizer: Tokenizer, chat: list[dict]
) -> tuple[list[int], list[bool], list[int]] | None:
    """(ids, is it a target, where replies end) of a chat; None if the template refuses it.

    A reply's tokens reach up to its first stop token: what a template writes after it is no target.
    Raises InputError for a template that renders a chat's beginning differently once the chat goes
    on.
    """
    # each reply's characters: the chat is rendered up to the reply, and with it
    try:
        text = tokenizer.render(chat)
        spans = []
        for i, message in enumerate(chat):
            if message["role"] != "assistant":
                continue
            before = tokenizer.render(chat[:i], reply_next=True)
            after = tokenizer.render(chat[: i + 1])
            if not (after.startswith(before) and text.startswith(after)):
                raise InputError(
                    f"{tokenizer.directory}: the chat template rewrites earlier turns as a "
                    "chat goes on, so the replies cannot be told from the rest; choose "
                    "another with --template"
                )
            spans.append((len(before), len(after)))
    except Refused:
        return None

    # the character at which each token begins; a BOS that was put in front begins at 0
    encoding = tokenizer.encoding(text)
    ids = tokenizer.with_bos(encoding.ids)
    starts = [0] * (len(ids) - len(encoding.ids)) + [start for start, _ in encoding.offsets]

    # the tokens that begin in a reply, up to its stop token
    target = [False] * len(ids)
    ends = []  # of each reply, one past its last target
    i = 0
    for reply_start, reply_end in spans:
        while i < len(ids) and starts[i] < reply_start:
            i += 1
        while i < len(ids) and starts[i] < reply_end:
            target[i] = True
            i += 1
            if ids[i - 1] in tokenizer.stop:  # it is itself the last target
                break
        ends.append(i)
    return ids, target, ends


def tokenize(path: str | Path, tokenizer: Tokenizer, max_length: int) -> Chats:
    """Reads, tokenizes and caches a chat file. A chat longer than max_length tokens is cut after
    the last reply that fits. Raises InputError if no chat with a reply to learn from is left.
    """
    # the cached file's name is a hash of all that the result depends on
    parts = [
        FORMAT,
        read_text(path),
        tokenizer.source,
        tokenizer.template,
        str(sorted(tokenizer.stop)),
        str((tokenizer.bos, tokenizer.eos)),
        str(max_length),
    ]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    cached = CACHE / f"{key}.safetensors"
    chats = _read_cache(cached)
    if chats is None:
        chats = _tokenize(path, tokenizer, max_length)
        CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)  # chats are nobody else's business
        note = {"report": chats.report, "fingerprint": chats.fingerprint()}
        save_tensors(chats.tensors(), cached, note)
    return chats


def _read_cache(cached: Path) -> Chats | None:
    """What `tokenize` has kept; None if it is not there, or is not what was written."""
    if not cached.exists():
        return None
    try:
        file = open_tensors(cached)
        tensors = {name: file.get_tensor(name) for name in ("ids", "target", "offsets", "entry")}
        chats = Chats(**tensors, report=file.metadata()["report"])
        return chats if file.metadata()["fingerprint"] == chats.fingerprint() else None
    except Exception:  # a damaged file fails in many ways, and is made again for all of them
        return None


def _tokenize(path: str | Path, tokenizer: Tokenizer, max_length: int) -> Chats:
    """The chats of a file, tokenized, and a report of what became of them."""
    chats = read_chats(path)
    ids, target, offsets, entry = [], [], [0], []
    refused = cut = empty = 0
    bar = tqdm(chats, f"tokenizing {Path(path).name}", unit=" chats", leave=False, disable=None)
    for i, chat in enumerate(bar):
        while chat and chat[0]["role"] == "assistant":
            chat = chat[1:]  # ShareGPT's pages often begin in the middle
        tokens = tokenize_chat(tokenizer, chat) if chat else ([], [], [])
        if tokens is None:
            refused += 1
            continue

        # as many replies as fit
        chat_ids, chat_target, ends = tokens
        end = max((end for end in ends if end <= max_length), default=0)
        if not any(chat_target[:end]):
            empty += 1
            continue
        if end < max(ends):
            cut += 1
        ids += chat_ids[:end]
        target += chat_target[:end]
        offsets.append(len(ids))
        entry.append(i)

    report = f"{len(entry)} of {len(chats)} chats, {len(ids)} tokens"
    report += f", {sum(target)} of them targets"
    if cut:
        report += f"; {cut} cut to {max_length} tokens"
    if empty:
        report += f"; {empty} left out: no reply fits"
    if refused:
        report += f"; {refused} left out: the template refuses them"
    if not entry:
        raise InputError(
            f"{path}: no chat has a reply to learn from within --max_length {max_length} ({report})"
        )
    return Chats(
        ids=torch.tensor(ids, dtype=torch.int32),
        target=torch.tensor(target),
        offsets=torch.tensor(offsets),
        entry=torch.tensor(entry),
        report=report,
    )


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
