"""Tokenized chats: the loss mask, batches, a report of what became of the chats, a cache.

A token is a target (the loss counts it) if it begins inside a reply, up to the reply's first stop
token. So every user turn is masked, whatever the template looks like.
"""

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from plumbing.chats import Chat, Reading
from plumbing.files import InputError, open_tensors, save_tensors, verify
from plumbing.tokenizer import Refused, Tokenizer

CACHE = Path(__file__).parent.parent / "out" / "cache"
# on CUDA a batch's T is padded up to a multiple of this: every new shape costs time
ALIGNED = {"cuda": 128}
FORMAT = "6"  # of the cached files: raise it when tokenization changes

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
    ) -> Batch:
        """Chats side by side, padded on the right: inputs, targets, counted, (B, T) each.

        targets: the token that each input is to predict, -100: none.
        counted: where the norm term looks: at the targets, or at each row's first `norm_width`
        positions, see `norm_count`.
        T is a multiple of `ALIGNED`. Where `rows` is empty, the batch is one row of padding.

        Example: `[1, 5, 6, 7]`, of which 6 and 7 are a reply, and `[1, 5, 8]`, of which 8 is one
            inputs    1    5    6        targets  -100    6    7        counted  no  yes  yes
                      1    5    0                 -100    8 -100                 no  yes  no
        """
        members = self.members(rows)
        T = max(norm_width, self.width(rows))
        T += -T % ALIGNED.get(torch.device(device).type, 1)
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

    ids, characters = tokenizer.ids_of(text, replies)
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
        parts = [chat.entry, chat.messages, [*chat.unlearnt.items()], chat.ignored]
        hashed.update(json.dumps(parts).encode())
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
            tally.first.setdefault(str(reason), chat.entry + 1)
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
        tally.count_ends(chat_ids, chat_target, fitting, tokenizer.stop)
        tally.ignored.update(chat.ignored)
        pairs = zip(chat_ids[:end], chat_target)
        tally.unknown += sum(learnt and i == tokenizer.unk for i, learnt in pairs)

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
    first: dict[str, int] = field(default_factory=dict)  # the first record that is, by reason
    unlearnt: Counter = field(default_factory=Counter)  # replies, by reason
    replies: int = 0
    cut: int = 0  # chats
    ignored: Counter = field(default_factory=Counter)  # records, by what of them is not read
    unknown: int = 0  # targets that are <unk>
    learnt: int = 0  # replies
    ended: int = 0  # those of them of which a stop token is learnt

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

    def count_ends(
        self, ids: list[int], target: list[bool], ends: list[int], stop: Collection[int]
    ) -> None:
        """Of one chat: of how many replies that are learnt a stop token is, too. What is said has
        none, so it is the end.
        """
        for end in ends:
            begin = end
            while begin > 0 and target[begin - 1] and ids[begin - 1] not in stop:
                begin -= 1
            self.learnt += target[end - 1]
            self.ended += begin > 0 and target[begin - 1]

    def report(self, read: int, used: int, tokens: int, targets: int) -> str:
        """A table; its last line warns where more than a tenth is left out. Raises InputError if
        nothing is used.
        """
        if not used:
            why = ", ".join(f"{reason}: {n}" for reason, n in self.left_out.most_common())
            raise InputError(f"no chat has a reply to learn ({why})")
        rows = [("chats read", read, "")]
        for reason, n in self.left_out.most_common():
            first = f"; the first is record {self.first[reason]}" if reason in self.first else ""
            rows.append(("  left out", n, reason + first))
        rows.append(("chats used", used, ""))
        if self.cut:
            rows.append(("  cut", self.cut, f"to {self.max_length} tokens"))
        rows.append(("replies in them", self.replies, ""))
        rows += [("  not learnt", n, reason) for reason, n in self.unlearnt.most_common() if n]
        rows.append(("tokens", tokens, ""))
        rows.append(("  targets", targets, f"{targets / tokens:.1%}"))
        if self.unknown:
            rows.append(("  unknown", self.unknown, "targets that this tokenizer cannot spell"))
        rows += [("not read", n, name) for name, n in self.ignored.most_common()]
        report = "\n".join(f"  {name:<18}{n:>12,}  {note}".rstrip() for name, n, note in rows)
        if self.ended < 0.9 * self.learnt:
            report += (
                f"\n  warning: {self.learnt - self.ended:,} of {self.learnt:,} replies are learnt "
                "without a token that ends them: the model will go on to --max_new_tokens; choose "
                "another --template, or ask with sample.py --stop TEXT"
            )
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


class Batches:
    """The rows of each step of a training; those of an epoch are made when it is asked for.

    rows: of the chats that are trained on. lengths: theirs.

    Example: three chats, two at a time, for two epochs
    >>> batches = Batches(torch.tensor([5, 6, 7]), torch.tensor([9, 2, 8]), 2, epochs=2, seed=0)
    >>> len(batches), sorted(batches[0] + batches[1]), sorted(batches[2] + batches[3])
    (4, [5, 6, 7], [5, 6, 7])
    """

    def __init__(self, rows: Tensor, lengths: Tensor, batch_size: int, epochs: int, seed: int):
        self.rows = rows
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed * 1_000_003
        self.known = 0, self.of_epoch(0)
        self.per_epoch = len(self.known[1])
        self.epochs = epochs

    def of_epoch(self, epoch: int) -> list[list[int]]:
        batches = epoch_batches(self.lengths, self.batch_size, self.seed + epoch)
        return [self.rows[places].tolist() for places in batches]

    def __len__(self) -> int:
        return self.epochs * self.per_epoch

    def __getitem__(self, step: int) -> list[int]:
        if step >= len(self):
            raise IndexError(step)
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self.known[0]:
            self.known = epoch, self.of_epoch(epoch)
        return self.known[1][place]


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
