"""Chats as tokens: tokenizer, chat template, loss mask, chat files, batches, streaming.

A chat is a list of messages {"role": "system" | "user" | "assistant", "content": str}. A template
turns it into one text; the tokenizer turns the text into ids with character offsets; a token is a
target (the loss counts it) if it begins inside a reply, up to the reply's first stop token. So
every user turn is masked, whatever the template looks like. To find a reply, the chat is rendered
up to it and then with it.
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

        settings = self._settings("tokenizer_config.json")
        config = self._settings("config.json")
        self.bos = self._special("bos", settings, config)
        self.eos = self._special("eos", settings, config)
        self.template = TEMPLATES[template] if template else self._own_template(settings)
        self._compiled = self._compile()
        self.stop = self._stop(config, self._settings("generation_config.json"))

    def _backend(self) -> tokenizers.Tokenizer:
        try:
            backend = tokenizers.Tokenizer.from_str(self.source)
        except Exception as error:  # the library raises nothing more specific
            raise InputError(
                f"{self.path}: not a tokenizer ({error}); the file is damaged, download it again"
            ) from None
        backend.no_padding()
        backend.no_truncation()
        return backend

    def _tokens(self) -> list[str | None]:
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        tokens: list[str | None] = [None] * (1 + max(vocabulary.values()))
        for token, i in vocabulary.items():
            tokens[i] = token
        return tokens

    def _settings(self, name: str) -> dict:
        """What a JSON file beside the tokenizer says; nothing if it is not there."""
        path = self.directory / name
        return read_json(path, dict) if path.exists() else {}

    def _special(self, name: str, settings: dict, config: dict) -> int | None:
        """The id of "bos" or "eos": by its content, else by the number in config.json."""
        token = settings.get(f"{name}_token")
        if isinstance(token, dict):
            token = token.get("content")
        if token is not None and token in self.tokens:  # `tokens` has None for unused ids
            return self.tokens.index(token)
        ids = config.get(f"{name}_token_id")
        return ids[0] if isinstance(ids, list) else ids

    def _own_template(self, settings: dict) -> str:
        """The directory's chat template, else llama-2's."""
        file = self.directory / "chat_template.jinja"
        if file.exists():
            return read_text(file)
        own = settings.get("chat_template")
        if isinstance(own, list):  # several, by name
            own = {entry["name"]: entry["template"] for entry in own}.get("default")
        return own or TEMPLATES["llama-2"]

    def _compile(self) -> jinja2.Template:
        """The template in a sandbox, with what transformers gives to templates."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda x, **options: json.dumps(
            x, ensure_ascii=False, **options
        )
        environment.globals["raise_exception"] = _raise
        try:
            return environment.from_string(self.template)
        except jinja2.TemplateError as error:
            raise self._no_template(error) from None

    def _stop(self, config: dict, generation: dict) -> set[int]:
        """The tokens that end a reply: the end of the text, and what the template puts there."""
        stop = {
            i for settings in (config, generation) for i in _as_list(settings.get("eos_token_id"))
        }
        if self.eos is not None:
            stop.add(self.eos)

        # the last special token of an exchange
        example = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            turn = self.encode(self.render(example))
        except jinja2.TemplateError as error:
            raise self._no_template(error) from None
        added = self.backend.get_added_tokens_decoder()
        special = [i for i in turn if i in added and added[i].special and i != self.bos]
        return stop | set(special[-1:])

    def _no_template(self, error: Exception) -> InputError:
        return InputError(f"{self.directory}: the chat template does not work ({error})")

    def check(self, vocab_size: int) -> None:
        """Raises InputError if a token has no row in a model with `vocab_size` rows."""
        if len(self.tokens) > vocab_size:
            raise InputError(
                f"{self.path}: has {len(self.tokens)} tokens, but the model's vocab_size is "
                f"{vocab_size}; use the tokenizer that belongs to the model"
            )

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with exactly one BOS in front if the tokenizer has one."""
        return self.with_bos(self.backend.encode(text, add_special_tokens=False).ids)

    def with_bos(self, ids: list[int]) -> list[int]:
        """The ids with a BOS in front; unchanged if they have it, or the tokenizer has none."""
        if self.bos is None or ids[:1] == [self.bos]:
            return ids
        return [self.bos, *ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    def render(self, messages: list[dict], reply_next: bool = False) -> str:
        """The chat as one text, up to a reply if `reply_next`. Raises jinja2.TemplateError."""
        return self._compiled.render(
            messages=messages,
            add_generation_prompt=reply_next,
            bos_token="" if self.bos is None else self.tokens[self.bos],
            eos_token="" if self.eos is None else self.tokens[self.eos],
        )

    def prompt(self, messages: list[dict]) -> list[int]:
        """The ids after which the model is to reply. Raises InputError if the template refuses."""
        try:
            return self.encode(self.render(messages, reply_next=True))
        except jinja2.TemplateError as error:
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


def _raise(message: str):
    raise jinja2.TemplateError(message)


def _as_list(x) -> list:
    if x is None:
        return []
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


def _records(path: str | Path) -> list[tuple[str, dict]]:
    """The records of a .json (a list) or .jsonl file, each with its place."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        return [(f"entry {i}", record) for i, record in enumerate(read_json(path))]
    records = []
    for i, line in enumerate(text.split("\n"), 1):  # splitlines() would also split inside a string
        if not line.strip():
            continue
        try:
            records.append((f"line {i}", json.loads(line)))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {i}: not valid JSON ({error.msg})") from None
    return records


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
    report: str  # what became of the chats that were read

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> Tensor:
        return self.offsets.diff()

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
    except jinja2.TemplateError:
        return None

    # the character at which each token begins; a BOS that was put in front begins at 0
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
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
    if not cached.exists():
        _write_cache(path, tokenizer, max_length, cached)
    tensors = open_tensors(cached)
    return Chats(
        ids=tensors.get_tensor("ids"),
        target=tensors.get_tensor("target"),
        offsets=tensors.get_tensor("offsets"),
        report=tensors.metadata()["report"],
    )


def _write_cache(path: str | Path, tokenizer: Tokenizer, max_length: int, cached: Path) -> None:
    """Writes the chats of a file, tokenized, and a report of what became of them."""
    chats = read_chats(path)
    ids, target, offsets = [], [], [0]
    refused = cut = empty = 0
    for chat in tqdm(
        chats, desc=f"tokenizing {Path(path).name}", unit=" chats", leave=False, disable=None
    ):
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

    report = f"{len(offsets) - 1} of {len(chats)} chats, {len(ids)} tokens"
    report += f", {sum(target)} of them targets"
    if cut:
        report += f"; {cut} cut to {max_length} tokens"
    if empty:
        report += f"; {empty} left out: no reply fits"
    if refused:
        report += f"; {refused} left out: the template refuses them"
    if len(offsets) == 1:
        raise InputError(
            f"{path}: no chat has a reply to learn from within --max_length {max_length} ({report})"
        )
    tensors = {
        "ids": torch.tensor(ids, dtype=torch.int32),
        "target": torch.tensor(target),
        "offsets": torch.tensor(offsets),
    }
    save_tensors(tensors, cached, {"report": report})


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
