"""Chats as tokens: tokenizer, chat template, loss mask, readers, batches, streaming.

A chat is a list of messages {"role": "system" | "user" | "assistant", "content": str}. A template turns
it into one text; the tokenizer turns the text into ids with character offsets; a token is a target
(the loss counts it) exactly when it begins inside a reply, so every user turn is masked, whatever the
template looks like. Where replies begin and end is found by rendering the chat up to that point.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import tokenizers
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torch import Tensor
from tqdm import tqdm

from files import InputError, open_tensors, read_json, read_text, save_tensors, write_text

CACHE = Path(__file__).parent / "out" / "cache"
FORMAT = "2"  # of the cached files: raise it when tokenization changes

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
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message.content.strip() + ' [/INST]' -}}
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

    template: a name of TEMPLATES that takes the place of the directory's own; without either, llama-2,
    the paper's. Raises InputError for files that are missing or damaged.
    """

    def __init__(self, directory: str | Path, template: str | None = None):
        self.directory = Path(directory)
        self.path = self.directory / "tokenizer.json"
        self.source = read_text(self.path)
        try:
            self.backend = tokenizers.Tokenizer.from_str(self.source)
        except Exception as error:  # the library raises nothing more specific
            raise InputError(f"{self.path}: not a tokenizer ({error}); the file is damaged, download it again") from None
        self.backend.no_padding()
        self.backend.no_truncation()
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        self.tokens: list[str | None] = [None] * (1 + max(vocabulary.values()))  # the content of each id
        for token, i in vocabulary.items():
            self.tokens[i] = token

        settings, config, generation = (read_json(path, dict) if (path := self.directory / name).exists() else {} for name in (
            "tokenizer_config.json", "config.json", "generation_config.json"))

        def special(name: str) -> int | None:
            token = settings.get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            ids = config.get(f"{name}_token_id")
            return vocabulary.get(token, ids[0] if isinstance(ids, list) else ids)

        self.bos, self.eos = special("bos"), special("eos")
        if template is None:
            own, jinja = settings.get("chat_template"), self.directory / "chat_template.jinja"
            if isinstance(own, list):  # several, by name
                own = {entry["name"]: entry["template"] for entry in own}.get("default")
            self.template = read_text(jinja) if jinja.exists() else own or TEMPLATES["llama-2"]
        else:
            self.template = TEMPLATES[template]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = _raise
        try:
            self._compiled = environment.from_string(self.template)
            turn = self.encode(self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]))
        except jinja2.TemplateError as error:
            raise InputError(f"{self.directory}: the chat template does not work ({error})") from None

        # a reply ends with the end of the text, or with the special token that the template puts there
        self.stop = {i for settings in (config, generation) for i in _as_list(settings.get("eos_token_id"))}
        self.stop |= {self.eos} - {None}
        added = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        self.stop |= set([i for i in turn if i in added and i != self.bos][-1:])

    def check(self, vocab_size: int) -> None:
        """Raises InputError if a token has no row in a model with `vocab_size` rows."""
        if len(self.tokens) > vocab_size:
            raise InputError(f"{self.path}: has {len(self.tokens)} tokens, but the model's vocab_size is {vocab_size}; "
                             "use the tokenizer that belongs to the model")

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with exactly one BOS in front if the tokenizer has one."""
        return self._with_bos(self.backend.encode(text, add_special_tokens=False).ids)

    def _with_bos(self, ids: list[int]) -> list[int]:
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    def render(self, messages: list[dict], reply_next: bool = False) -> str:
        """The chat as one text; `reply_next` adds what stands before a reply. Raises jinja2.TemplateError."""
        names = {"bos_token": self.bos, "eos_token": self.eos}
        return self._compiled.render(messages=messages, add_generation_prompt=reply_next, **{
            name: "" if i is None else self.tokens[i] for name, i in names.items()})

    def prompt(self, messages: list[dict]) -> list[int]:
        """The ids after which the model is to reply. Raises InputError if the template refuses the chat."""
        try:
            return self.encode(self.render(messages, reply_next=True))
        except jinja2.TemplateError as error:
            raise InputError(f"{self.directory}: the chat template refuses this chat ({error})") from None

    def save(self, directory: Path) -> None:
        """Writes the tokenizer and its template where transformers looks for them."""
        names = {"bos_token": self.bos, "eos_token": self.eos}
        settings = {name: self.tokens[i] for name, i in names.items() if i is not None}
        write_text(directory / "tokenizer.json", self.source)
        write_text(directory / "tokenizer_config.json", json.dumps(
            {**settings, "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": self.template}, indent=2) + "\n")
        write_text(directory / "generation_config.json", json.dumps(
            {"bos_token_id": self.bos, "eos_token_id": sorted(self.stop)}, indent=2) + "\n")


class TextStream:
    """The text of ids that come one by one. Half a character is held back until its other half comes.

    Only the last whole character's token and what follows are decoded again, so a step's cost is constant.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self.decode = tokenizer.decode
        self.ids = list(prompt)  # the window: its first `shown` characters are out already
        self.shown = len(self.decode(self.ids))

    def step(self, i: int) -> str:
        """The text that id `i` completes, often ''."""
        self.ids.append(i)
        text = self.decode(self.ids).rstrip("\ufffd")  # decoders write U+FFFD for a byte that is no character yet
        piece = text[self.shown:]
        self.shown = max(self.shown, len(text))
        if "\ufffd" not in (tail := self.decode([i])):
            self.ids, self.shown = [i], len(tail)
        return piece

    def rest(self) -> str:
        """What is still held back when no more ids come."""
        return self.decode(self.ids)[self.shown:]


def _raise(message: str):
    raise jinja2.TemplateError(message)


def _as_list(x) -> list:
    return x if isinstance(x, list) else [] if x is None else [x]


# ---------------------------------------------------------------- readers

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
         "bing": "assistant", "bard": "assistant", "system": "system"}


def _messages(record: dict) -> list[dict]:
    """One record of a chat file as messages; raises KeyError or TypeError where its form is none of the three."""
    if "conversations" in record or "messages" in record:  # ShareGPT: from/value; OpenAI: role/content
        turns = record.get("conversations", record.get("messages"))
        turns = [(ROLES[turn.get("from", turn.get("role"))], turn.get("value", turn.get("content"))) for turn in turns]
    else:  # Alpaca, with LIMA's `history` of earlier exchanges
        question = record["instruction"] + ("\n\n" + record["input"] if record.get("input") else "")
        system = [("system", record["system"])] if record.get("system") else []
        earlier = [turn for q, a in record.get("history") or [] for turn in (("user", q), ("assistant", a))]
        turns = [*system, *earlier, ("user", question), ("assistant", record["output"])]
    if not all(isinstance(content, str) for _, content in turns):
        raise TypeError
    return [{"role": role, "content": content} for role, content in turns]


def read_chats(path: str | Path) -> list[list[dict]]:
    """The chats of a .json (a list) or .jsonl file in ShareGPT, messages or Alpaca form, told by their content.

    Raises InputError that names the line (.jsonl) or the entry (.json) that is of no known form.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        records = [(f"entry {i}", record) for i, record in enumerate(read_json(path))]
    else:
        records = []
        for i, line in enumerate(text.split("\n"), 1):  # splitlines() would also split inside a string
            if line.strip():
                try:
                    records.append((f"line {i}", json.loads(line)))
                except json.JSONDecodeError as error:
                    raise InputError(f"{path}, line {i}: not valid JSON ({error.msg})") from None
    chats = []
    for place, record in records:
        try:
            chats.append(_messages(record))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(
                f"{path}, {place}: not a chat; it needs 'conversations' (from/value), 'messages' (role/content), or "
                "'instruction' and 'output'") from None
    if not chats:
        raise InputError(f"{path}: holds no chats")
    return chats


# ---------------------------------------------------------------- tokenized chats

@dataclass
class Chats:
    """Tokenized chats, end to end: chat i is [offsets[i], offsets[i + 1])."""
    ids: Tensor  # int32
    target: Tensor  # bool: the loss counts this token
    offsets: Tensor  # int64, one more than there are chats
    report: str  # what became of the chats that were read

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> Tensor:
        return self.offsets.diff()

    def batch(self, rows: Sequence[int], device: str | torch.device = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Chats padded on the right: inputs (B, T), the targets they predict (B, T; -100: none), real (B, T) bool.
        No chats are one row of padding."""
        T = max((int(self.offsets[i + 1] - self.offsets[i]) for i in rows), default=2) - 1
        shape = max(1, len(rows)), T
        inputs, targets, real = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100), torch.zeros(shape, dtype=torch.bool)
        for b, i in enumerate(rows):
            piece = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
            ids, target = self.ids[piece].long(), self.target[piece]
            inputs[b, :len(ids) - 1], real[b, :len(ids) - 1] = ids[:-1], True
            targets[b, :len(ids) - 1] = ids[1:].masked_fill(~target[1:], -100)
        return inputs.to(device), targets.to(device), real.to(device)


def tokenize_chat(tokenizer: Tokenizer, chat: list[dict]) -> tuple[list[int], list[bool], list[int]] | None:
    """A chat's ids, which of them are targets, and where its replies end; None if the template refuses the chat.

    A reply's tokens reach up to its first stop token: what a template writes after it is no target.
    Raises InputError for a template that renders a chat's beginning differently once the chat goes on.
    """
    try:
        text = tokenizer.render(chat)
        spans = []
        for i, message in enumerate(chat):
            if message["role"] == "assistant":
                before, after = tokenizer.render(chat[:i], reply_next=True), tokenizer.render(chat[:i + 1])
                if not (after.startswith(before) and text.startswith(after)):
                    raise InputError(f"{tokenizer.directory}: the chat template rewrites earlier turns as a chat goes on, "
                                     "so the replies cannot be told from the rest; choose another with --template")
                spans.append((len(before), len(after)))
    except jinja2.TemplateError:
        return None
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    ids = tokenizer._with_bos(encoding.ids)
    starts = [0] * (len(ids) - len(encoding.ids)) + [start for start, _ in encoding.offsets]
    target, ends, i = [False] * len(ids), [], 0
    for first, after in spans:
        while i < len(ids) and starts[i] < first:
            i += 1
        while i < len(ids) and starts[i] < after:
            target[i] = True
            i += 1
            if ids[i - 1] in tokenizer.stop:
                break
        ends.append(i)
    return ids, target, ends


def tokenize(path: str | Path, tokenizer: Tokenizer, max_length: int) -> Chats:
    """Reads, tokenizes and caches a chat file. A chat longer than max_length tokens is cut after the last reply
    that fits. Raises InputError if no chat with a reply to learn from is left."""
    key = hashlib.sha256("\0".join(
        [FORMAT, read_text(path), tokenizer.source, tokenizer.template, str(sorted(tokenizer.stop)), str(max_length)]).encode())
    cached = CACHE / f"{key.hexdigest()[:24]}.safetensors"
    if not cached.exists():
        chats = read_chats(path)
        ids, target, offsets = [], [], [0]
        refused = cut = empty = 0
        for chat in tqdm(chats, desc=f"tokenizing {Path(path).name}", unit=" chats", leave=False, disable=None):
            while chat and chat[0]["role"] == "assistant":
                chat = chat[1:]  # ShareGPT's pages often begin in the middle
            tokens = tokenize_chat(tokenizer, chat) if chat else ([], [], [])
            if tokens is None:
                refused += 1
                continue
            end = max((end for end in tokens[2] if end <= max_length), default=0)
            if not any(tokens[1][:end]):
                empty += 1
                continue
            cut += end < max(tokens[2])
            ids += tokens[0][:end]
            target += tokens[1][:end]
            offsets.append(len(ids))
        report = f"{len(offsets) - 1} of {len(chats)} chats, {len(ids)} tokens, {sum(target)} of them targets"
        report += "".join(f"; {n} {what}" for n, what in (
            (cut, f"cut to {max_length} tokens"), (empty, "left out: no reply fits"),
            (refused, "left out: the template refuses them")) if n)
        if len(offsets) == 1:
            raise InputError(f"{path}: no chat has a reply to learn from within --max_length {max_length} ({report})")
        save_tensors({"ids": torch.tensor(ids, dtype=torch.int32), "target": torch.tensor(target),
                      "offsets": torch.tensor(offsets)}, cached, {"report": report})
    tensors = open_tensors(cached)
    return Chats(*(tensors.get_tensor(name) for name in ("ids", "target", "offsets")), tensors.metadata()["report"])


def epoch_batches(lengths: Tensor, batch_size: int, seed: int) -> list[list[int]]:
    """One epoch's batches, each of chats of similar length, in random order. The same seed, the same batches."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator)
    batches = []
    for pool in order.split(50 * batch_size):  # sorted within a pool only, so that batches differ between epochs
        pool = pool[lengths[pool].argsort(stable=True)]
        batches += [batch.tolist() for batch in pool.split(batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]
