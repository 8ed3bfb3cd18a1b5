"""Vocabulary mapping: a base and a value model with different tokenizers (section 4.2.2, appendix
B).

    python vocab_map.py --base DIR --value DIR --text FILE... --out map.safetensors
    python sample.py --base DIR --value DIR --map map.safetensors "question"

W (|V_base| × |V_value|, sparse) says which value tokens a base token stands for. Two ways to make
it:

`paper`, Algorithm 1: tokenize a text both ways, warp one sequence onto the other (DTW) at the least
edit distance between tokens, count the pairs, normalise, keep one value token per base token. W
maps logits.

`bytes`, the default: both tokenizations spell the same bytes, so nothing has to be guessed. Row b
of W is P(the value token that begins where b begins | b), counted. W maps probabilities: the next
base token is one thing or another, so the next value token's probability is a sum over them,
log(softmax(z_base) W). Logits must
not be summed: a value token that begins many unlikely base tokens would get a large one, just
because they are many.

Tokens are the bytes that they stand for, never strings: `▁the`, `Ġthe` and the bytes of 中 compare
as they should.
"""

import argparse
import functools
import hashlib
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from plumbing.files import (
    InputError,
    Parser,
    command,
    model_directory,
    open_tensors,
    peak_memory,
    read_texts,
    refuse_overwriting,
    refuse_part_of_model,
    save_tensors,
    verify,
    writable_file,
    write_text,
)
from plumbing.tokenizer import Tokenizer

FORMAT = "ivl vocabulary map 1"
METHODS = ["bytes", "paper"]
# pseudo-counts: each base token's for its nearest value token, so that no row is empty, and each
# value token's from its nearest base token, so that no column is
ROW_PRIOR, COLUMN_PRIOR = 1.0, 0.01
CUT = re.compile(rb"(?<=[!-~])(?= [!-~])")  # between two words
PIECE = 512  # bytes of a text that are tokenized at a time, at least


# ---------------------------------------------------------------- tokens as bytes


def byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers write the 256 bytes: printable ones as they
    are, the others from U+0100 on.

    Example: a space, byte 32, is the 33rd that is not printable
    >>> byte_alphabet()["a"], byte_alphabet()["Ġ"]
    (97, 32)
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """What each id stands for: bytes, or None for special tokens and for ids that are not used.

    Raises InputError for tokenizers that are neither byte-level (`Ġ`) nor SentencePiece-like (`▁`,
    `<0x0A>`).
    """
    source = json.loads(tokenizer.source)
    decoder = json.dumps(source.get("decoder"), ensure_ascii=False)
    unknown = source["model"].get("unk_token")
    added = tokenizer.backend.get_added_tokens_decoder()
    alphabet = byte_alphabet()

    def from_byte_level(token: str) -> bytes:
        return bytes(alphabet[character] for character in token)

    def from_sentence_piece(token: str) -> bytes:
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        if byte:
            return bytes.fromhex(byte[1])
        return token.replace("▁", " ").encode()

    if "ByteLevel" in decoder:
        to_bytes = from_byte_level
    elif "▁" in decoder:
        to_bytes = from_sentence_piece
    else:
        raise InputError(
            f"{tokenizer.path}: its decoder is neither byte-level nor SentencePiece-like "
            "('▁'), so its tokens cannot be read as bytes; choose a Llama-like tokenizer"
        )

    stands_for = []
    for i, token in enumerate(tokenizer.tokens):
        if token is None or token == unknown or (i in added and added[i].special):
            stands_for.append(None)
        elif i in added:
            stands_for.append(token.encode())
        else:
            stands_for.append(to_bytes(token))
    return stands_for


class Spelling:
    """How a tokenizer's ids spell bytes, and bytes its ids."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.bytes = token_bytes(tokenizer)
        self.pieces = [data or b"" for data in self.bytes]
        self.lengths = np.array([len(data) for data in self.pieces])
        self.index = self._index()
        self.longest = max(map(len, self.index))
        # SentencePiece puts a space in front of every text
        alone = tokenizer.backend.encode("a", add_special_tokens=False).ids
        self.space = b" " if self.join(alone) == b" a" else b""
        # whether no token spans two words: then words can be told apart
        self.cuts = not any(CUT.search(data) for data in self.pieces)
        self.spell_piece = functools.lru_cache(maxsize=4096)(self._spell_piece)

    def _index(self) -> dict[bytes, int]:
        """The id of each string of bytes. Of two tokens with the same bytes, `A` and `<0x41>`, it
        is the one that texts have, else the one with the smaller id.
        """
        fallback = re.compile("<0x..>")

        def rank(i: int) -> tuple[bool, int]:
            return not fallback.fullmatch(self.tokenizer.tokens[i]), -i

        ids = [i for i, data in enumerate(self.bytes) if data]
        return {self.bytes[i]: i for i in sorted(ids, key=rank)}  # the last one stays

    def join(self, ids: Sequence[int]) -> bytes:
        return b"".join(map(self.pieces.__getitem__, ids))

    def front(self, data: bytes) -> int | None:
        """The longest token that `data` begins with; None if there is none."""
        for end in range(min(len(data), self.longest), 0, -1):
            i = self.index.get(data[:end])
            if i is not None:
                return i
        return None

    def split(self, data: bytes) -> list[int]:
        """Longest tokens first to last; a byte that no token begins with is left out."""
        ids = []
        while data:
            i = self.front(data)
            if i is None:
                data = data[1:]
            else:
                ids.append(i)
                data = data[len(self.bytes[i]) :]
        return ids

    def spell(self, text: bytes) -> tuple[list[int], list[int]]:
        """The canonical ids of a text, and where each ends in `space + text`, in bytes.

        From the first byte on that the tokenizer itself does not reproduce (half a character, what
        its normalizer drops, a character that it lacks), the longest tokens take over for the
        piece: so the ids spell all that they can. A long text is tokenized in pieces that begin
        with a word: one that grows, token by token, costs only its last.
        """
        data = self.space + text
        ids, ends = [], []
        start = 0
        while start is not None:
            # one piece: up to the first border of words after PIECE bytes, else up to the end
            cut = CUT.search(data, start + PIECE) if self.cuts else None
            stop = cut.start() if cut else None
            # the tokenizer puts its space in front of each piece, so the piece's own is taken off
            new, places = self.spell_piece(data[start:stop].removeprefix(self.space))
            ids += new
            ends += [start + end for end in places]
            start = stop
        return ids, ends

    def _spell_piece(self, text: bytes) -> tuple[list[int], list[int]]:
        try:
            valid = text.decode()
        except UnicodeDecodeError as error:
            valid = text[: error.start].decode()
        return self.place(self.tokenizer.backend.encode(valid, add_special_tokens=False).ids, text)

    def place(self, ids: list[int], text: bytes) -> tuple[list[int], list[int]]:
        """What `spell` gives, from the tokenizer's own ids of the text."""
        data = self.space + text
        ends = self.lengths[ids].cumsum().tolist()
        if self.join(ids) == data:
            return ids, ends

        # as many as spell the text's front
        kept = end = 0
        for i in ids:
            if not self.bytes[i] or not data.startswith(self.bytes[i], end):
                break
            kept += 1
            end += len(self.bytes[i])
        ids, ends = ids[:kept], ends[:kept]

        # and then the longest tokens
        while end < len(data):
            i = self.front(data[end : end + self.longest])
            if i is None:
                end += 1
                continue
            end += len(self.bytes[i])
            ids.append(i)
            ends.append(end)
        return ids, ends

    def starts(self, texts: Sequence[str]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Of each text the canonical ids, and the byte of the text at which each begins."""
        encodings = self.tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
        for text, encoding in zip(texts, encodings):
            ids, ends = self.place(encoding.ids, text.encode())
            begins = np.array(ends, np.int64) - self.lengths[ids]
            yield ids, np.maximum(begins - len(self.space), 0)


def spell(
    base: Spelling, value: Spelling, texts: Sequence[str]
) -> Iterator[tuple[list[int], np.ndarray, list[int], np.ndarray]]:
    """Each text in both vocabularies: base ids, where each begins (bytes), value ids, where.

    Where only one tokenizer puts a space in front of a text, the base's first token is taken as if
    both did what the value's does: `The` and `·The` at the front of a text are one and the same,
    anywhere else they are not.
    """
    for k in range(0, len(texts), 256):
        both = zip(base.starts(texts[k : k + 256]), value.starts(texts[k : k + 256]))
        for (b, b_starts), (v, v_starts) in both:
            if base.space != value.space and b:
                # the base's first token, but with the space that the value's tokenizer puts there
                as_value = value.space + base.bytes[b[0]].removeprefix(base.space)
                b[0] = base.index.get(as_value, b[0])
            yield b, b_starts, v, v_starts


def fingerprint(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers whose ids mean the same."""
    meaning = repr((tokenizer.tokens, tokenizer.bos, tokenizer.eos))
    return hashlib.sha256(meaning.encode()).hexdigest()[:32]


# ---------------------------------------------------------------- Algorithm 1: MinED and DTW


@functools.lru_cache(maxsize=1 << 20)
def edit_distance(a: bytes, b: bytes) -> int:
    """The least number of bytes to insert, delete or replace to make b of a.

    Example:
    >>> edit_distance(b"cat", b"car"), edit_distance(b"cat", b"ca"), edit_distance(b"", b"abc")
    (1, 1, 3)
    """
    row = list(range(len(b) + 1))  # distances of a's front so far to each front of b
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i  # corner: the distance of the two fronts without x and y
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def cost(a: bytes, b: bytes) -> float:
    """MinED's cost of a pair, a tenth where one token contains the other (the released code)."""
    distance = edit_distance(a, b)
    return 0.1 * distance if a in b or b in a else distance


def warp(base: Sequence[bytes], value: Sequence[bytes]) -> list[tuple[int, int]]:
    """Dynamic time warping: the cheapest path of pairs (i, j) from (0, 0) to the two ends, each
    step ahead in i, in j, or in both.

    Example: `123`, `4` against `1`, `2`, `3`, `4`: the first token stands for three
    >>> warp([b"123", b"4"], [b"1", b"2", b"3", b"4"])
    [(0, 0), (0, 1), (0, 2), (1, 3)]
    """
    N, M = len(base), len(value)
    total = [[math.inf] * (M + 1) for _ in range(N + 1)]  # the cheapest path to each cell
    total[0][0] = 0.0
    for i in range(N):
        for j in range(M):
            cheapest = min(total[i][j], total[i][j + 1], total[i + 1][j])
            total[i + 1][j + 1] = cost(base[i], value[j]) + cheapest

    # back from the end, each time to where the path came from
    path = []
    i, j = N, M
    while i and j:
        path.append((i - 1, j - 1))
        before = (i - 1, j - 1), (i - 1, j), (i, j - 1)
        i, j = min(before, key=lambda cell: total[cell[0]][cell[1]])
    return path[::-1]


def count_warped(
    base: Spelling, value: Spelling, texts: Sequence[str]
) -> dict[tuple[int, int], float]:
    """C of Algorithm 1: how often DTW pairs base token b with value token v, markers removed."""
    counts: Counter = Counter()
    spelt = spell(base, value, texts)
    for b, _, v, _ in tqdm(spelt, "warping", len(texts), unit=" texts", leave=False, disable=None):
        b_bytes = [base.bytes[i].strip(b" ") for i in b]
        v_bytes = [value.bytes[i].strip(b" ") for i in v]
        counts.update((b[i], v[j]) for i, j in warp(b_bytes, v_bytes))
    return counts


def paper_rows(counts: dict[tuple[int, int], float], columns: int) -> dict[tuple[int, int], float]:
    """The released normalisation: minus row means, each column stretched to 0 … 1, each row's
    largest.

    columns: |V_value|, over which a row's mean is taken. Base tokens that the texts lack have no
    entry; what has no entry counts as 0 for a column's smallest and largest (of a real vocabulary
    every column lacks some).

    Example: 4 columns; the rows' means are 3 and 1, so column 0 has the entries 9 and 1, column 1
    the entries −3 and 3
    >>> paper_rows({(0, 0): 12, (1, 0): 0, (1, 1): 4}, columns=4)
    {(0, 0): 1.0, (1, 1): 1.0}
    """
    # minus the row's mean
    row_sum: Counter = Counter()
    for (b, _), n in counts.items():
        row_sum[b] += n
    centred = {(b, v): n - row_sum[b] / columns for (b, v), n in counts.items()}

    # each column from its smallest to its largest
    smallest: Counter = Counter()
    largest: Counter = Counter()
    for (_, v), x in centred.items():
        smallest[v] = min(smallest[v], x)
        largest[v] = max(largest[v], x)

    # of each row the largest, as (entry, v)
    best: dict[int, tuple[float, int]] = {}
    for (b, v), x in centred.items():
        stretched = (x - smallest[v]) / ((largest[v] - smallest[v]) or 1.0)
        best[b] = max(best.get(b, (-math.inf, 0)), (stretched, v))
    return {(b, v): x for b, (x, v) in best.items()}


# ---------------------------------------------------------------- alignment by bytes


def count_aligned(
    base: Spelling, value: Spelling, texts: Sequence[str]
) -> dict[tuple[int, int], float]:
    """How often value token v begins at the byte where base token b begins.

    Example: `The cat` as `The`, `·cat` and as `The`, `·c`, `at`: the bytes at which tokens begin
    are 0, 3 and 0, 3, 5, so (`The`, `The`) and (`·cat`, `·c`) count once each.
    """
    columns = len(value.bytes)
    keys = [np.empty(0, np.int64)]  # b · |V_value| + v, one for each pair
    spelt = spell(base, value, texts)
    for b, b_starts, v, v_starts in tqdm(
        spelt, "aligning", len(texts), unit=" texts", leave=False, disable=None
    ):
        # i, j: the places in b and v of tokens that begin at one byte (of several, the first)
        _, i, j = np.intersect1d(b_starts, v_starts, return_indices=True)
        keys.append(np.array(b, np.int64)[i] * columns + np.array(v, np.int64)[j])
    pairs, n = np.unique(np.concatenate(keys), return_counts=True)
    ids = zip((pairs // columns).tolist(), (pairs % columns).tolist())
    return dict(zip(ids, n.tolist()))


def nearest(data: bytes, side: Spelling) -> int:
    """The token to stand in for `data`: the same bytes, else its longest front, else MinED's."""
    front = side.front(data)
    if front is not None:
        return front
    return min(side.index.values(), key=lambda i: edit_distance(data, side.bytes[i]))


def byte_rows(
    base: Spelling, value: Spelling, counts: dict[tuple[int, int], float]
) -> dict[tuple[int, int], float]:
    """W with rows that sum to 1 and no empty column: counts, and what the tokens' bytes say.

    Each base token counts once more for its nearest value token: all that is known of one that the
    texts lack. Each value token gets a hundredth of a count from its nearest base token: it may
    come, but rarely. Special tokens: see `special_pairs`.
    """
    W = Counter(counts)
    for b, data in enumerate(base.bytes):
        if data:
            W[b, nearest(data, value)] += ROW_PRIOR
    for v, data in enumerate(value.bytes):
        if data:
            W[nearest(data, base), v] += COLUMN_PRIOR
    W.update(special_pairs(base, value))  # a Counter adds

    total: Counter = Counter()
    for (b, _), n in W.items():
        total[b] += n
    return {(b, v): n / total[b] for (b, v), n in W.items()}


def special_pairs(base: Spelling, value: Spelling) -> dict[tuple[int, int], float]:
    """Counts for the tokens that have no bytes.

    bos to bos, eos to eos, the same name to the same; the rest of the base's to eos, since a text
    ends there; the rest of the value's get a share of bos, which a base never predicts.
    """
    ours, theirs = base.tokenizer, value.tokenizer  # ours: the base's; theirs: the value model's

    # each special token of the base: its namesake, else the end of a text
    names = {
        token: v
        for v, token in enumerate(theirs.tokens)
        if token is not None and not value.bytes[v]
    }
    end = next(v for v in (theirs.eos, theirs.bos, 0) if v is not None)
    stands_for = {
        b: names.get(token, end)
        for b, token in enumerate(ours.tokens)
        if token is not None and not base.bytes[b]
    }

    # bos and eos go together, whatever their names
    for b, v in ((ours.bos, theirs.bos), (ours.eos, theirs.eos)):
        if b is not None and v is not None:
            stands_for[b] = v

    # the value's special tokens that nothing stands for yet
    start = next(b for b in (ours.bos, ours.eos, 0) if b is not None)
    rest = set(names.values()) - set(stands_for.values())
    counts = {(b, v): ROW_PRIOR for b, v in stands_for.items()}
    return counts | {(start, v): COLUMN_PRIOR for v in rest}


# ---------------------------------------------------------------- the map


class VocabMap:
    """W between two tokenizers. How a base decodes through it: extras/mapped.py.

    method: "bytes" or "paper". base_ids, value_ids, p: the nonzeros of W, (nnz,) each, by rows.
    """

    def __init__(
        self,
        base: Tokenizer,
        value: Tokenizer,
        method: str,
        base_ids: Tensor,
        value_ids: Tensor,
        p: Tensor,
    ):
        self.base, self.value = Spelling(base), Spelling(value)
        self.method = method
        self.base_ids, self.value_ids, self.p = base_ids, value_ids, p
        self.identity = fingerprint(base) == fingerprint(value)

    @classmethod
    def make(
        cls, base: Tokenizer, value: Tokenizer, texts: Sequence[str], method: str = "bytes"
    ) -> "VocabMap":
        """The map that the texts tell; the identity for equal tokenizers."""
        sides = Spelling(base), Spelling(value)
        if fingerprint(base) == fingerprint(value):
            W = {(i, i): 1.0 for i in range(len(base.tokens))}
        elif method == "paper":
            W = paper_rows(count_warped(*sides, texts), len(value.tokens))
        else:
            W = byte_rows(*sides, count_aligned(*sides, texts))
        pairs = torch.tensor(sorted(W), dtype=torch.long).reshape(-1, 2)
        base_ids, value_ids = pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
        p = torch.tensor([W[b, v] for b, v in pairs.tolist()])
        return cls(base, value, method, base_ids, value_ids, p)

    def save(self, path: str | Path) -> None:
        """Writes W with the fingerprints of both tokenizers. Raises InputError."""
        tensors = {"base_ids": self.base_ids, "value_ids": self.value_ids, "p": self.p}
        save_tensors(
            tensors,
            path,
            {
                "format": FORMAT,
                "method": self.method,
                "base": fingerprint(self.base.tokenizer),
                "value": fingerprint(self.value.tokenizer),
            },
        )

    @classmethod
    def load(cls, path: str | Path, base: Tokenizer, value: Tokenizer) -> "VocabMap":
        """Raises InputError for a file that is damaged or was made for other tokenizers."""
        file = open_tensors(path)
        made = file.metadata() or {}
        if made.get("format") != FORMAT or made.get("method") not in METHODS:
            raise InputError(
                f"{path}: is no vocabulary map (format = {made.get('format')!r}, method = "
                f"{made.get('method')!r}); make one with vocab_map.py"
            )
        verify(file, path)
        for side, tokenizer in (("base", base), ("value", value)):
            if made.get(side) != fingerprint(tokenizer):
                raise InputError(
                    f"{path}: was made for another {side} tokenizer than {tokenizer.path}; "
                    "make a map for these two with vocab_map.py"
                )
        try:
            base_ids, value_ids, p = map(file.get_tensor, ("base_ids", "value_ids", "p"))
            sound = is_sparse(base_ids, value_ids, p, len(base.tokens), len(value.tokens))
        except Exception:  # the library's errors for a missing or cut tensor have no common class
            sound = False
        if not sound:
            raise InputError(
                f"{path}: its tensors are no sparse matrix between these vocabularies; "
                "make it again"
            )
        return cls(base, value, made["method"], base_ids, value_ids, p)


def is_sparse(rows: Tensor, columns: Tensor, p: Tensor, n: int, m: int) -> bool:
    """Whether these are the nonzeros of an (n, m) matrix, by rows, all of them finite and ≥ 0."""
    if not (rows.shape == columns.shape == p.shape and p.dim() == 1 and len(p)):
        return False
    if not (rows.dtype == columns.dtype == torch.long and bool((rows.diff() >= 0).all())):
        return False
    inside = 0 <= rows[0] and rows[-1] < n and 0 <= columns.min() and columns.max() < m
    return bool(inside) and bool((p.isfinite() & (p >= 0)).all())


# ---------------------------------------------------------------- report


def overlap(mapping: VocabMap, texts: Sequence[str]) -> tuple[float, float, list[tuple[int, int]]]:
    """Appendix B's overlap ratio, the highest possible one, and the worst ids: (id, misses).

    Each base token of a text is replaced by its likeliest value token; the multiset overlap with
    the text's own value tokens, over their number, is averaged over the texts. One token for one
    cannot exceed |base tokens| / |value tokens|.
    """
    # the likeliest value token of each base token, as (p, v)
    best: dict[int, tuple[float, int]] = {}
    nonzeros = zip(mapping.base_ids.tolist(), mapping.value_ids.tolist(), mapping.p.tolist())
    for b, v, p in nonzeros:
        best[b] = max(best.get(b, (-1.0, 0)), (p, v))

    ratios, limits = [], []
    misses: Counter = Counter()
    for ids, _, golden, _ in spell(mapping.base, mapping.value, texts):
        if not golden:
            continue
        left = Counter(golden)
        hits = 0
        for b in ids:
            _, v = best.get(b, (0.0, -1))
            if left[v] > 0:
                hits += 1
            else:
                misses[b] += 1
            left[v] -= 1
        ratios.append(hits / len(golden))
        limits.append(min(1.0, len(ids) / len(golden)))
    if not ratios:
        raise InputError("the value tokenizer spells none of the held-out texts; give others")
    return sum(ratios) / len(ratios), sum(limits) / len(limits), misses.most_common(10)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--base",
        required=True,
        type=model_directory,
        help="directory of the base, or of its tokenizer",
    )
    add(
        "--value",
        required=True,
        type=model_directory,
        help="directory of the value model, or of its tokenizer",
    )
    add("--text", required=True, nargs="+", help="texts to count in: .json, .jsonl, or plain text")
    add(
        "--heldout",
        nargs="+",
        help="texts to measure on (default: every tenth of --text, not counted)",
    )
    add(
        "--method",
        choices=METHODS,
        default="bytes",
        help="paper: Algorithm 1, as released",
    )
    add(
        "--retention",
        action="store_true",
        help="measure what the base's knowledge loses (needs the models)",
    )
    add("--out", help="where the map goes")
    add("--json", help="where the report goes, as JSON")
    args = parser.parse_args()
    texts = [("text", text) for text in args.text]
    texts += [("heldout", text) for text in args.heldout or []]
    refuse_overwriting("out", args.out, texts)
    refuse_overwriting("json", args.json, [*texts, ("out", args.out)])

    for option, file in (("out", args.out), ("json", args.json)):
        if file is not None:
            refuse_part_of_model(option, file, args.base, args.value)
            writable_file(file)

    # texts to count in, texts to measure on
    base, value = Tokenizer(args.base), Tokenizer(args.value)
    texts = [text for path in args.text for text in read_texts(path)]
    if args.heldout:
        held = [text for path in args.heldout for text in read_texts(path)]
    else:
        held = texts[::10]
        texts = [text for i, text in enumerate(texts) if i % 10]
    if not texts:
        raise InputError(
            f"{args.text[0]}: one text cannot be both counted and held out; give more, or --heldout"
        )

    start = time.perf_counter()
    mapping = VocabMap.make(base, value, texts, args.method)
    seconds = time.perf_counter() - start
    if args.out:
        mapping.save(args.out)

    # what the map is worth
    ratio, limit, worst = overlap(mapping, held)
    base_used = len(base.tokens) - base.tokens.count(None)
    value_used = len(value.tokens) - value.tokens.count(None)
    report = {
        "method": args.method,
        "coverage_base": len(set(mapping.base_ids.tolist())) / base_used,
        "coverage_value": len(set(mapping.value_ids.tolist())) / value_used,
        "overlap": ratio,
        "overlap_limit": limit,
        "nonzeros": len(mapping.p),
        "texts_per_second": len(texts) / seconds,
        "seconds": seconds,
        "peak_mb": 1000 * peak_memory(torch.device("cpu")),
    }
    if args.retention:
        from extras.mapped import retention  # only here are models needed
        from plumbing.weights import load

        model = load(args.base)
        base.check(model.config.vocab_size)
        report["retention"] = retention(model, mapping, held)

    for name, x in report.items():
        shown = x if isinstance(x, (str, int)) else f"{x:.4g}"
        print(f"{name:18}{shown}")
    print("worst             " + ", ".join(f"{base.tokens[b]!r} {n}" for b, n in worst))
    if args.json:
        write_text(args.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    command(main)
