"""A base that is asked in another vocabulary: z_base W of equation (5), keeping what the base
knows.

The paper maps the logits after each token and gives the base what was chosen, token by token:
"mapped to multiple consecutive target tokens, which are unfamiliar to the source model". Here the
base reads what it is used to, its own tokenization of the text so far, and is asked for the next
*bytes*.

Example. The text is `The ca`, in value tokens `The`, `·c`, `a` (· is a space), and the next value
token is wanted. The base has the tokens `The`, `·c`, `a`, `t`, `r`, `·cat`, `·car` and `at`:

    bytes        T  h  e  ·  c  a  |  next?
    boundary     ^        ^     ^  ^
                 0        3     5  6          the base has read  The | ·c | a

The base may still want to say `·cat`, which began at byte 3, before the text's end. So a boundary
counts if some base token that begins there reaches past the text's end. From byte 0 none does:

    boundary   pending   base tokens that go on     what is left of them (rest)   weight
    3          `·ca`     `·cat`, `·car`             `t`, `r`                      p(The)
    5          `a`       `at`                       `t`                           p(The, ·c)
    6          ``        all                        all of them                   p(The, ·c, a)

The weights are probabilities of all ids up to the boundary. The value token `t` gets, before all
are made to sum to 1,

    p(The) p(·cat | The) + p(The, ·c) p(at | The, ·c) + p(The, ·c, a) p(t | The, ·c, a).

The last row is the paper's z_base W, with probabilities in the place of logits; a token-by-token
reading loses the rows above it. When the value token `t` is added, the base's own tokens of the
text are `The`, `·cat`: so `·c`, `a` are taken back from its cache.

`Bridge` is the bookkeeping of bytes, `Mapped` the base as `ivl.generate` takes it, `MappedReader`
the sum above.
"""

import functools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from os.path import commonprefix  # of any sequences, not only of paths

import torch
import torch.nn.functional as F
from torch import Tensor

from ivl import padded
from model import Config, Llama
from plumbing.files import InputError
from vocab_map import VocabMap

PAPERS_WAY = dict(canonical=False, step_back=False, linear=True)
TAIL = 16  # base tokens at the end of a text that may still merge differently
FLOOR = 1e-4  # share of a uniform distribution in the mapped one: no token wins or loses by a zero


# ---------------------------------------------------------------- bytes


class Bridge:
    """What decoding asks of a map: a text of value ids in the base's ids, and W past a boundary.

    `pending` is the bytes from a boundary to the end of the text. It is None at the front of a text
    where only the value's tokenizer puts a space: there base tokens count as if they had it.
    """

    def __init__(self, mapping: VocabMap):
        self.mapping = mapping
        self.base, self.value = mapping.base, mapping.value
        # the base's tokens in the order of their bytes: those with a common beginning are
        # neighbours
        self.sorted = sorted((data, i) for i, data in enumerate(self.base.bytes) if data)
        # where each row of W begins: its base ids ascend
        ids = torch.arange(len(self.base.bytes) + 1)
        self.row_starts = torch.searchsorted(mapping.base_ids, ids)
        self.rows = functools.lru_cache(maxsize=4096)(self._rows)

    # ------------------------------------------------------------ tokens that go on

    def _range(self, pending: bytes) -> slice:
        """Where in `sorted` the base tokens stand that begin with `pending` and go further."""
        # (pending, N) sorts after the token `pending` itself, whatever its id, and before all that
        # go further; pending + \xff... sorts after all of those
        first = bisect_left(self.sorted, (pending, len(self.base.bytes)))
        stop = bisect_left(self.sorted, (pending + b"\xff" * self.base.longest, 0))
        return slice(first, stop)

    def goes_on(self, pending: bytes | None) -> bool:
        """Whether one base token can begin with these bytes and go further."""
        if pending is None:
            return True
        found = self._range(pending)
        return found.start < found.stop

    def count_open(self, ids: Sequence[int]) -> int:
        """How many of the last value ids may lie inside one base token that goes further than they.

        Example: of `The`, `·c`, `a` the last two, because of `·cat`.
        """
        _, _, text = self.respell(ids)
        text = text or b""
        open_bytes = 0
        for n in range(min(len(text), self.base.longest) + 1):
            if self.goes_on(text[len(text) - n :]):
                open_bytes = n
        lengths = accumulate(len(self.value.bytes[i] or b"") for i in reversed(ids))
        return sum(length <= open_bytes for length in lengths)

    # ------------------------------------------------------------ W past a boundary

    def _rows(self, pending: bytes | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """W where the text goes on `pending` bytes past a boundary: (base ids, value ids, p),
        (nnz,) each; empty if no base token goes on.

        Example: after `·ca`, the token `·cat` counts as its rest, `t`: as the base token `t` if
        there is one, else as the longest value token at the rest's front.
        """
        if pending == b"":
            mapping = self.mapping
            return mapping.base_ids.to(device), mapping.value_ids.to(device), mapping.p.to(device)
        base_ids, value_ids, p = [], [], []
        for i, rest in self._rests(pending):
            tokens, weights = self._row_of(rest)
            base_ids += [i] * len(tokens)
            value_ids += tokens
            p += weights
        base_ids = torch.tensor(base_ids, dtype=torch.long, device=device)
        value_ids = torch.tensor(value_ids, dtype=torch.long, device=device)
        return base_ids, value_ids, torch.tensor(p, device=device)

    def _rests(self, pending: bytes | None) -> list[tuple[int, bytes]]:
        """The base tokens that go on past `pending`, and what is left of each."""
        if pending is None:
            return [(i, self.value.space + data) for data, i in self.sorted]
        return [(i, data[len(pending) :]) for data, i in self.sorted[self._range(pending)]]

    def _row_of(self, rest: bytes) -> tuple[list[int], list[float]]:
        """The value tokens that these bytes stand for, and their weights."""
        same = self.base.index.get(rest)
        if same is not None:
            row = slice(self.row_starts[same], self.row_starts[same + 1])
            return self.mapping.value_ids[row].tolist(), self.mapping.p[row].tolist()
        token = self.value.front(rest)
        return ([], []) if token is None else ([token], [1.0])

    # ------------------------------------------------------------ the text in the base's ids

    def respell(
        self, ids: Sequence[int], canonical: bool = True
    ) -> tuple[list[int], list[int], bytes | None]:
        """What value ids say, in the base's ids: (ids, ends, text).

        text: the bytes since the last special token, as the base spells them, None at a front (see
        the class); ends: where each id ends there, -1 for those before.
        canonical: tokenized as the base is used to, else token by token.

        Example: `<s>`, `The`, `·c`, `a`, `t` → ids `<s>`, `The`, `·cat`; ends 0, 3, 7; text
        `The·cat`
        """
        base, value = self.base.tokenizer, self.value.tokenizer
        start_of_text = next(i for i in (base.bos, base.eos, 0) if i is not None)
        # what the value's special tokens are in the base's vocabulary
        swap = {value.bos: base.bos} | dict.fromkeys(value.stop, base.eos)
        if value.bos is not None and ids[:1] == [value.bos]:
            ids = ids[1:]

        # special tokens cut the text into segments, of which each is tokenized by itself
        out, ends, text = [start_of_text], [0], b""
        cuts = [k for k, i in enumerate(ids) if swap.get(i) is not None]
        for start, stop in zip([0, *(k + 1 for k in cuts)], [*cuts, len(ids)]):
            # places count anew from here: the last id, a special token, ends at 0
            ends = [-1] * (len(out) - 1) + [0]
            new, places, text = self._segment(ids[start:stop], canonical)
            out += new
            ends += places
            if stop < len(ids):
                out.append(swap[ids[stop]])
        return out, ends, text

    def _segment(
        self, ids: Sequence[int], canonical: bool
    ) -> tuple[list[int], list[int], bytes | None]:
        """`respell` for value ids without special tokens."""
        spelt = self.value.join(ids)
        plain = spelt.removeprefix(self.value.space)
        # nothing said yet, and the value's first token will bring a space: if the base's will too,
        # both begin at b""; else None, base tokens count as if they had it. In all other cases the
        # base's own space, if it has one, stands in front
        if spelt or not self.value.space:
            text = self.base.space + plain
        else:
            text = b"" if self.base.space else None

        if canonical:
            new, places = self.base.spell(plain) if spelt else ([], [])
            return new, places, text
        # token by token: these spell the value's bytes, perhaps with another space in front
        new = [i for token in ids for i in self.base.split(self.value.bytes[token] or b"")]
        shift = len(text or b"") - len(spelt)
        ends = accumulate(len(self.base.bytes[i]) for i in new)
        return new, [max(0, end + shift) for end in ends], text


# ---------------------------------------------------------------- the base


class Mapped:
    """A base in the place of one with the value model's vocabulary.

    canonical: the base reads its own tokenization of the text (else value token by value token).
    step_back: boundaries before the text's end count too (else only the end).
    linear: logits are mapped, z_base W (else probabilities).
    By default True, True, False; for a map of the method "paper" PAPERS_WAY, the other way round.
    """

    def __init__(self, base: Llama, mapping: VocabMap, **way: bool):
        default = dict(canonical=True, step_back=True, linear=False)
        if mapping.method == "paper":
            default = PAPERS_WAY
        way = default | way
        self.base = base
        self.bridge = Bridge(mapping)
        self.canonical = way["canonical"]
        self.step_back = way["step_back"]
        self.linear = way["linear"]

    @property
    def config(self) -> Config:
        return self.base.config

    @property
    def unembed(self) -> Tensor:
        return self.base.unembed

    def reader(self, rows: int, slots: int) -> "MappedReader":
        return MappedReader(self, rows, slots)


@dataclass
class Boundary:
    """A place in a text where a base token ends, and what the base says there."""

    log_p: float  # of the base's ids up to here
    next_log_p: Tensor  # (V_base,), of the next id


@dataclass
class State:
    """One text of the batch, and where the base stands in it."""

    value_ids: list[int] = field(default_factory=list)
    base_ids: list[int] = field(default_factory=list)  # what the base's cache holds
    # log_p[k]: of the base's ids up to and with base_ids[k]; relative, since only ratios matter
    log_p: list[float] = field(default_factory=lambda: [0.0])
    boundaries: dict[int, Boundary] = field(default_factory=dict)  # by their place in bytes


class MappedReader:
    """The way of a mapped base through a batch of texts of value ids, see `model.Reader`."""

    def __init__(self, mapped: Mapped, rows: int, slots: int):
        self.mapped = mapped
        self.bridge = mapped.bridge
        self.base_reader = mapped.base.reader(rows, slots)
        self.states = [State() for _ in range(rows)]
        self.boundaries_unknown = True  # the texts are new, or were taken back

    def read(self, tokens: Tensor, counts: Tensor | None = None) -> Tensor:
        """Reads on in value ids (B, T); the mapped logits after each row's last, (B, V_value)."""
        ids = tokens.tolist()
        if counts is not None:
            ids = [row[:n] for row, n in zip(ids, counts.tolist())]
        texts = [[*state.value_ids, *new] for state, new in zip(self.states, ids)]

        # a text's spelling shows its own boundaries only: `The·ca` as The | ·ca has none after ·c,
        # which the spelling of `The·c` had. Growing id by id would have met it; texts that come at
        # once are therefore looked at without their last `back` ids first, the shortest first
        if self.boundaries_unknown and self.mapped.step_back:
            for back in range(max(map(self.bridge.count_open, texts)), 0, -1):
                self._look_at([text[: max(0, len(text) - back)] for text in texts])
        self.boundaries_unknown = False
        z = self._look_at(texts)
        for state, value_ids in zip(self.states, texts):
            state.value_ids = value_ids
        return z

    def read_each(self, tokens: Tensor, start: int = 0) -> Tensor:
        """Reads on; the mapped logits after each of the tokens (B, T) from `start` on:
        (B, T − start, V_value).
        """
        z = [self.read(tokens[:, : start + 1])]
        for column in tokens[:, start + 1 :].unbind(1):
            z.append(self.read(column[:, None]))
        return torch.stack(z, 1)

    def back_to(self, lengths: Sequence[int]) -> None:
        # boundaries before the cut that still counted there are gone, so the text is read again
        self.states = [
            State(state.value_ids[:length]) for state, length in zip(self.states, lengths)
        ]
        self.boundaries_unknown = True

    def room(self) -> list[int]:
        context = self.mapped.config.max_position_embeddings
        return [context - len(state.base_ids) for state in self.states]

    def _look_at(self, texts: Sequence[list[int]]) -> Tensor:
        """The mapped logits after each text of value ids, (B, V_value)."""
        spelt = [self.bridge.respell(text, self.mapped.canonical) for text in texts]

        # ids that the base has read stay; the last of them is read again, for what it predicts
        starts = []
        for state, (ids, _, _) in zip(self.states, spelt):
            stayed = len(commonprefix([state.base_ids, ids]))
            starts.append(max(0, stayed - 1))
        self.base_reader.back_to(starts)
        tokens, counts = padded([ids[start:] for start, (ids, _, _) in zip(starts, spelt)])
        h = self.base_reader.hidden(tokens, counts)  # (B, T, H)
        return torch.stack(
            [
                self._logits(state, start, ids, ends, text, h_row)
                for state, start, (ids, ends, text), h_row in zip(self.states, starts, spelt, h)
            ]
        )

    def _logits(
        self,
        state: State,
        start: int,
        ids: list[int],
        ends: list[int],
        text: bytes | None,
        h: Tensor,
    ) -> Tensor:
        """The mapped logits after one text, (V_value,).

        ids, ends, text: of `Bridge.respell`; h (T, H): hidden states from position `start` on.
        """
        # what the base says after each of its last ids
        begin = max(start, len(ids) - TAIL)
        h = h[begin - start : len(ids) - start]
        z = F.linear(h, self.mapped.unembed).float()  # (n, V)
        z = z[:, : len(self.bridge.base.bytes)]  # (n, V_base)
        state.base_ids = ids
        if self.mapped.linear:
            return self._mapped_linearly(z[-1])
        next_log_p = z.log_softmax(-1)  # (n, V_base), after each of these ids

        # more than TAIL new ids, or a special token among them: what is kept cannot be continued
        if begin > start or -1 in ends[begin:]:
            state.boundaries = {}
            state.log_p = [0.0] * (begin + 1)  # relative to `begin`: only ratios matter
        self._extend_log_p(state, begin, next_log_p)
        last = {len(text or b""): Boundary(state.log_p[-1], next_log_p[-1])}
        if not self.mapped.step_back:
            return self._mixture(last, text)
        self._move_boundaries(state, ends, text, begin, next_log_p)
        # none is left if the base cannot spell the last bytes: then what it says after its last id
        # counts as if said at the text's end
        return self._mixture(state.boundaries or last, text)

    def _mapped_linearly(self, z_base: Tensor) -> Tensor:
        """z_base W, as the paper has it: logits, after the last token alone.  (V_value,)"""
        base_ids, value_ids, w = self.bridge.rows(b"", z_base.device)
        mapped = z_base.new_zeros(len(self.bridge.value.bytes))
        return mapped.index_add(0, value_ids, z_base[base_ids] * w)

    def _extend_log_p(self, state: State, begin: int, next_log_p: Tensor) -> None:
        """Brings `state.log_p` up to date; next_log_p (n, V_base): after ids from `begin` on."""
        # state.log_p[k] = state.log_p[k - 1] + log p(id k), which row k - 1 - begin predicts
        del state.log_p[begin + 1 :]
        for k in range(begin + 1, len(state.base_ids)):
            id_log_p = next_log_p[k - 1 - begin, state.base_ids[k]].item()
            state.log_p.append(state.log_p[-1] + id_log_p)

    def _move_boundaries(
        self, state: State, ends: list[int], text: bytes | None, begin: int, next_log_p: Tensor
    ) -> None:
        """Adds the boundaries of ids from `begin` on; keeps those with a token past the end."""
        boundaries = dict(state.boundaries)
        for k in range(begin, len(ends)):
            if ends[k] >= 0:
                boundaries[ends[k]] = Boundary(state.log_p[k], next_log_p[k - begin])
        state.boundaries = {}
        for place, boundary in boundaries.items():
            if self.bridge.goes_on(pending(text, place)):
                state.boundaries[place] = boundary

    def _mixture(self, boundaries: dict[int, Boundary], text: bytes | None) -> Tensor:
        """Each boundary speaks for the base tokens that go on from it.  (V_value,)"""
        likeliest = max(boundary.log_p for boundary in boundaries.values())
        mixed = torch.zeros(len(self.bridge.value.bytes), device=self.mapped.unembed.device)
        for place, boundary in boundaries.items():
            base_ids, value_ids, w = self.bridge.rows(pending(text, place), mixed.device)
            p = boundary.next_log_p[base_ids].exp() * w
            mixed.index_add_(0, value_ids, p, alpha=math.exp(boundary.log_p - likeliest))
        mixed = mixed / mixed.sum().clamp_min(1e-30)
        return torch.log((1 - FLOOR) * mixed + FLOOR / len(mixed))


def pending(text: bytes | None, place: int) -> bytes | None:
    """The bytes of a text from a place to its end."""
    return None if text is None else text[place:]


# ---------------------------------------------------------------- what is kept


@torch.inference_mode()
def retention(
    base: Llama, mapping: VocabMap, texts: Sequence[str], batch_size: int = 32, **way: bool
) -> float:
    """How much longer held-out text is under the mapped base: its nats per byte over the base's
    own; 1: nothing is lost.

    Counts the texts that both vocabularies can spell and that fit the base's context. Raises
    InputError if none is left. way: of `Mapped`.
    """
    mapped = Mapped(base, mapping, **way)
    context = base.config.max_position_embeddings

    def whole(side, ids: list[int], text: str) -> bool:
        return side.join(ids) == side.space + text.encode()

    spelt = []
    for text in texts:
        base_ids, _ = mapping.base.spell(text.encode())
        value_ids, _ = mapping.value.spell(text.encode())
        if (
            whole(mapping.base, base_ids, text)
            and whole(mapping.value, value_ids, text)
            and len(base_ids) < context
        ):
            spelt.append((value_ids, mapped.bridge.respell(value_ids)[0]))
    if not spelt:
        raise InputError(
            "no held-out text can be spelt in both vocabularies within the base's "
            "context; give others"
        )

    # nats of the base itself
    own = 0.0
    for _, ids in spelt:
        z = base(torch.tensor([ids[:-1]], device=base.unembed.device))[0].float()
        z = z[:, : len(mapping.base.bytes)]  # (T, V_base)
        own += F.cross_entropy(z, torch.tensor(ids[1:], device=z.device), reduction="sum").item()

    # nats of the mapped base: value token by value token, from an empty text on
    total = 0.0
    for k in range(0, len(spelt), batch_size):
        rows = [ids for ids, _ in spelt[k : k + batch_size]]
        reader = mapped.reader(len(rows), 0)
        tokens, counts = padded([[]] * len(rows))
        for t in range(max(map(len, rows))):
            log_p = reader.read(tokens, counts).log_softmax(-1)  # (B, V)
            total -= sum(log_p[i, ids[t]].item() for i, ids in enumerate(rows) if t < len(ids))
            tokens = torch.tensor([[ids[min(t, len(ids) - 1)]] for ids in rows])
            counts = torch.tensor([int(t < len(ids)) for ids in rows])
    return total / own
