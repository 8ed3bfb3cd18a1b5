"""Vocabulary mapping: a base and a value model with different tokenizers (section 4.2.2, appendix B).

    python vocab_map.py --base DIR --value DIR --text FILE... --out map.safetensors
    python sample.py --base DIR --value DIR --map map.safetensors "question"

W (|V_base| × |V_value|, sparse) says which value tokens a base token stands for. Two ways to make it:

`paper`, Algorithm 1: tokenize a text both ways, warp one sequence onto the other (DTW) at the least edit
distance between tokens, count the pairs, normalise, keep one value token per base token. W maps logits.

`bytes`, the default: both tokenizations spell the same bytes, so nothing has to be guessed. Row b of W is
P(the value token that begins where b begins | b), counted. W maps probabilities: the next base token is one
thing or another, so the next value token's probability is a sum over them, log(softmax(z_base) W). A sum of
logits would give a value token that many unlikely base tokens begin a large logit, for no reason.

Tokens are the bytes that they stand for, never strings: `▁the`, `Ġthe` and the bytes of 中 compare as they should.
"""

import argparse
import functools
import json
import math
import operator
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data import Tokenizer
from files import InputError, command, open_tensors, peak_memory, read_texts, save_tensors, write_text
from spelling import Spelling, fingerprint, spell

FORMAT = "ivl vocabulary map 1"
SEEN, UNSEEN = 1.0, 0.01  # counts that a token's own bytes add: to a base token's row, to a value token's column


# ---------------------------------------------------------------- Algorithm 1: MinED and DTW

@functools.lru_cache(maxsize=1 << 20)
def edit_distance(a: bytes, b: bytes) -> int:
    """The least number of bytes to insert, delete or replace to make b of a."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]


def cost(a: bytes, b: bytes) -> float:
    """MinED's cost of a pair, a tenth where one token contains the other (the released code)."""
    return edit_distance(a, b) * (0.1 if a in b or b in a else 1.0)


def warp(base: Sequence[bytes], value: Sequence[bytes]) -> list[tuple[int, int]]:
    """Dynamic time warping: the cheapest path of pairs (i, j) from (0, 0) to the two ends, each step ahead in i, j or both."""
    N, M = len(base), len(value)
    total = [[float("inf")] * (M + 1) for _ in range(N + 1)]
    total[0][0] = 0.0
    for i in range(N):
        for j in range(M):
            total[i + 1][j + 1] = cost(base[i], value[j]) + min(total[i][j], total[i][j + 1], total[i + 1][j])
    path, i, j = [], N, M
    while i and j:
        path.append((i - 1, j - 1))
        i, j = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda cell: total[cell[0]][cell[1]])
    return path[::-1]


def count_warped(base: Spelling, value: Spelling, texts: Sequence[str]) -> dict[tuple[int, int], float]:
    """C of Algorithm 1: how often DTW pairs base token b with value token v. Markers are removed from the tokens."""
    counts: Counter = Counter()
    for b, _, v, _ in tqdm(spell(base, value, texts), "warping", len(texts), unit=" texts", leave=False, disable=None):
        counts.update((b[i], v[j]) for i, j in warp(*([side.bytes[i].strip(b" ") for i in ids]
                                                      for side, ids in ((base, b), (value, v)))))
    return counts


def paper_rows(counts: dict[tuple[int, int], float], columns: int) -> dict[tuple[int, int], float]:
    """The released normalisation: minus the row's mean, over the column's largest, then each row's largest alone.

    columns: |V_value|, over which a row's mean is taken. Base tokens that the texts lack have no entry.
    """
    row_sum, largest = Counter(), Counter()
    for (b, _), n in counts.items():
        row_sum[b] += n
    centred = {(b, v): n - row_sum[b] / columns for (b, v), n in counts.items()}
    for (_, v), x in centred.items():
        largest[v] = max(largest[v], x)
    best: dict[int, tuple[float, int]] = {}
    for (b, v), x in centred.items():  # in a column without a count above the mean there is nothing to divide by
        best[b] = max(best.get(b, (-math.inf, 0)), (x / (largest[v] or 1.0), v))
    return {(b, v): x for b, (x, v) in best.items()}


# ---------------------------------------------------------------- alignment by bytes

def count_aligned(base: Spelling, value: Spelling, texts: Sequence[str]) -> dict[tuple[int, int], float]:
    """How often value token v begins at the byte where base token b begins."""
    keys = [np.empty(0, np.int64)]
    spelt = tqdm(spell(base, value, texts), "aligning", len(texts), unit=" texts", leave=False, disable=None)
    for b, b_starts, v, v_starts in spelt:
        _, i, j = np.intersect1d(b_starts, v_starts, return_indices=True)
        keys.append(np.array(b, np.int64)[i] * len(value.bytes) + np.array(v, np.int64)[j])
    pairs, n = np.unique(np.concatenate(keys), return_counts=True)
    return dict(zip(zip((pairs // len(value.bytes)).tolist(), (pairs % len(value.bytes)).tolist()), n.tolist()))


def nearest(data: bytes, side: Spelling) -> int:
    """The token to stand in for `data`: the same bytes, else the longest that it begins with, else MinED's."""
    first = side.first(data)
    return min(side.index.values(), key=lambda i: edit_distance(data, side.bytes[i])) if first is None else first


def byte_rows(base: Spelling, value: Spelling, counts: dict[tuple[int, int], float]) -> dict[tuple[int, int], float]:
    """W with rows that sum to 1 and no empty column: the counts, and what the tokens' own bytes say.

    Each base token counts once more for its nearest value token: all that is known of one that the texts lack.
    Each value token gets a hundredth of a count from its nearest base token: it may come, but rarely.
    Special tokens: bos to bos, eos to eos, the same name to the same; the rest of the base's to eos, since a text
    ends there; the rest of the value's get a share of bos, which a base never predicts.
    """
    W = Counter(counts)
    for b, data in enumerate(base.bytes):
        if data:
            W[b, nearest(data, value)] += SEEN
    for v, data in enumerate(value.bytes):
        if data:
            W[nearest(data, base), v] += UNSEEN
    ours, theirs = base.tokenizer, value.tokenizer
    names = {token: v for v, token in enumerate(theirs.tokens) if token is not None and not value.bytes[v]}
    end = next(v for v in (theirs.eos, theirs.bos, 0) if v is not None)
    special = {b: names.get(token, end) for b, token in enumerate(ours.tokens) if token is not None and not base.bytes[b]}
    special |= {b: v for b, v in ((ours.bos, theirs.bos), (ours.eos, theirs.eos)) if None not in (b, v)}
    W.update(dict.fromkeys(special.items(), SEEN))
    start = next(b for b in (ours.bos, ours.eos, 0) if b is not None)
    W.update({(start, v): UNSEEN for v in set(names.values()) - set(special.values())})
    total = Counter()
    for (b, _), n in W.items():
        total[b] += n
    return {(b, v): n / total[b] for (b, v), n in W.items()}


# ---------------------------------------------------------------- the map

class VocabMap:
    """W between two tokenizers, and what is needed to decode with it.

    method: "bytes" or "paper". base_ids, value_ids, p: the nonzeros of W, (nnz,) each, by rows.
    """
    def __init__(self, base: Tokenizer, value: Tokenizer, method: str, base_ids: Tensor, value_ids: Tensor, p: Tensor):
        self.base, self.value, self.method = Spelling(base), Spelling(value), method
        self.base_ids, self.value_ids, self.p = base_ids, value_ids, p
        self.identity = fingerprint(base) == fingerprint(value)
        self.sorted = sorted((data, i) for i, data in enumerate(self.base.bytes) if data)
        self.first = torch.searchsorted(base_ids, torch.arange(len(base.tokens) + 1))  # where each row begins
        self.rows = functools.lru_cache(maxsize=4096)(self._rows)

    @classmethod
    def make(cls, base: Tokenizer, value: Tokenizer, texts: Sequence[str], method: str = "bytes") -> "VocabMap":
        """The map that the texts (and, for "bytes", the tokens' own bytes) tell; the identity for equal tokenizers."""
        sides = Spelling(base), Spelling(value)
        if fingerprint(base) == fingerprint(value):
            W = {(i, i): 1.0 for i in range(len(base.tokens))}
        elif method == "paper":
            W = paper_rows(count_warped(*sides, texts), len(value.tokens))
        else:
            W = byte_rows(*sides, count_aligned(*sides, texts))
        pairs = torch.tensor(sorted(W), dtype=torch.long).reshape(-1, 2)
        return cls(base, value, method, pairs[:, 0].contiguous(), pairs[:, 1].contiguous(),
                   torch.tensor([W[b, v] for b, v in pairs.tolist()]))

    def save(self, path: str | Path) -> None:
        """Writes W with the fingerprints of both tokenizers. Raises InputError."""
        save_tensors({"base_ids": self.base_ids, "value_ids": self.value_ids, "p": self.p}, path, {
            "format": FORMAT, "method": self.method, "base": fingerprint(self.base.tokenizer),
            "value": fingerprint(self.value.tokenizer)})

    @classmethod
    def load(cls, path: str | Path, base: Tokenizer, value: Tokenizer) -> "VocabMap":
        """Raises InputError for a file that is damaged or was made for other tokenizers."""
        file = open_tensors(path)
        made = file.metadata() or {}
        if made.get("format") != FORMAT:
            raise InputError(f"{path}: is no vocabulary map (format = {made.get('format')!r}); make one with vocab_map.py")
        for side, tokenizer in (("base", base), ("value", value)):
            if made.get(side) != fingerprint(tokenizer):
                raise InputError(f"{path}: was made for another {side} tokenizer than {tokenizer.path}; make a map for "
                                 "these two with vocab_map.py")
        try:
            b, v, p = map(file.get_tensor, ("base_ids", "value_ids", "p"))
            sound = (b.shape == v.shape == p.shape and len(p) and b.dtype == v.dtype == torch.long
                     and bool((b.diff() >= 0).all()) and 0 <= b[0] and b[-1] < len(base.tokens)
                     and 0 <= v.min() and v.max() < len(value.tokens) and bool(p.isfinite().all() and (p >= 0).all()))
        except Exception:  # the library's errors for a missing or cut tensor have no common class
            sound = False
        if not sound:
            raise InputError(f"{path}: its tensors are no sparse matrix between these vocabularies; make it again")
        return cls(base, value, made["method"], b, v, p)

    def _range(self, pending: bytes) -> tuple[int, int]:
        """Where the base tokens stand, in the sorted list, that begin with `pending` and go further."""
        return (bisect_left(self.sorted, (pending, len(self.base.bytes))),  # behind the token that is `pending` itself
                bisect_left(self.sorted, (pending + b"\xff" * self.base.longest, 0)))

    def reaches(self, pending: bytes | None) -> bool:
        """Whether one base token can begin with these bytes and go further."""
        return pending is None or operator.lt(*self._range(pending))

    def reach(self, ids: Sequence[int]) -> int:
        """How many of the last value ids may lie inside one base token that goes further than they do."""
        text = self.read(ids)[2] or b""
        open_bytes = max((n for n in range(min(len(text), self.base.longest) + 1) if self.reaches(text[len(text) - n:])),
                         default=0)
        lengths = list(accumulate(len(self.value.bytes[i] or b"") for i in reversed(ids)))
        return sum(length <= open_bytes for length in lengths)

    def _rows(self, pending: bytes | None, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """W where the text goes on `pending` bytes past a boundary of the base: (base ids, value ids, p).

        Only base tokens that begin with those bytes and go further count, and they count by their remainder: by the
        row of the base token with these bytes, else by the longest value token at its front. Empty if there are none.
        None is the front of a text where only the value's tokenizer puts a space: base tokens count as if they had it.
        """
        if pending == b"":
            return self.base_ids.to(device), self.value_ids.to(device), self.p.to(device)
        if pending is None:
            rests = [(i, self.value.space + data) for data, i in self.sorted]
        else:
            rests = [(i, data[len(pending):]) for data, i in self.sorted[slice(*self._range(pending))]]
        b, v, p = [], [], []
        for i, rest in rests:
            if (same := self.base.index.get(rest)) is not None:
                row = slice(self.first[same], self.first[same + 1])
                v += self.value_ids[row].tolist()
                p += self.p[row].tolist()
            elif (token := self.value.first(rest)) is not None:
                v.append(token)
                p.append(1.0)
            b += [i] * (len(v) - len(b))
        b, v = (torch.tensor(ids, dtype=torch.long, device=device) for ids in (b, v))
        return b, v, torch.tensor(p, device=device)

    def read(self, ids: Sequence[int], canonical: bool = True) -> tuple[list[int], list[int], bytes | None]:
        """What value ids say, in the base's ids: (ids, ends, text).

        text: the bytes since the last special token, as the base spells them, None at a front as in `rows`; ends: where
        each id ends there, -1 for those before. canonical: tokenized as the base is used to, else token by token.
        """
        base, value = self.base.tokenizer, self.value.tokenizer
        swap = {value.bos: base.bos} | dict.fromkeys(value.stop, base.eos)
        out = [next(i for i in (base.bos, base.eos, 0) if i is not None)]
        ids = ids[1:] if value.bos is not None and ids[:1] == [value.bos] else ids
        special = [i for i, token in enumerate(ids) if swap.get(token) is not None]
        for start, stop in zip([0, *(i + 1 for i in special)], [*special, len(ids)]):
            ends, segment = [-1] * (len(out) - 1) + [0], ids[start:stop]
            stream = self.value.join(segment)
            text = stream.removeprefix(self.value.space)
            data = self.base.space + text if stream or not self.value.space else b"" if self.base.space else None
            if canonical:
                new, places = self.base.spell(text) if stream else ([], [])
            else:
                new = [i for token in segment for i in self.base.split(self.value.bytes[token] or b"")]
                places = list(accumulate(len(self.base.bytes[i]) for i in new))
            out, ends = out + new, ends + places
            if stop < len(ids):
                out.append(swap[ids[stop]])
        return out, ends, data


# ---------------------------------------------------------------- report

def overlap(mapping: VocabMap, texts: Sequence[str]) -> tuple[float, float, list[tuple[int, int]]]:
    """Appendix B's overlap ratio, the highest that is possible, and the base tokens that miss most often: (id, misses).

    Each base token of a text is replaced by its likeliest value token; the multiset overlap with the text's own value
    tokens, over their number, is averaged over the texts. One token for one cannot exceed |base tokens| / |value tokens|.
    """
    best: dict[int, tuple[float, int]] = {}
    for b, v, p in zip(mapping.base_ids.tolist(), mapping.value_ids.tolist(), mapping.p.tolist()):
        best[b] = max(best.get(b, (-1.0, 0)), (p, v))
    ratios, limits, misses = [], [], Counter()
    for ids, _, golden, _ in spell(mapping.base, mapping.value, texts):
        if golden:
            left, hit = Counter(golden), 0
            for b in ids:
                v = best.get(b, (0.0, -1))[1]
                hit += left[v] > 0
                misses[b] += left[v] <= 0
                left[v] -= 1
            ratios.append(hit / len(golden))
            limits.append(min(1.0, len(ids) / len(golden)))
    return sum(ratios) / len(ratios), sum(limits) / len(limits), [(b, n) for b, n in misses.most_common(10) if n]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="directory of the base, or of its tokenizer")
    parser.add_argument("--value", required=True, help="directory of the value model, or of its tokenizer")
    parser.add_argument("--text", required=True, nargs="+", help="texts to count in: .json, .jsonl, or plain text")
    parser.add_argument("--heldout", nargs="+", help="texts to measure on (default: every tenth of --text, not counted)")
    parser.add_argument("--method", choices=["bytes", "paper"], default="bytes", help="paper: Algorithm 1, as released")
    parser.add_argument("--retention", action="store_true", help="measure what the base's knowledge loses (needs the models)")
    parser.add_argument("--out", help="where the map goes")
    parser.add_argument("--json", help="where the report goes, as JSON")
    args = parser.parse_args()

    base, value = Tokenizer(args.base), Tokenizer(args.value)
    texts = [text for path in args.text for text in read_texts(path)]
    if args.heldout:
        held = [text for path in args.heldout for text in read_texts(path)]
    else:
        held = texts[::10]
        texts = [text for i, text in enumerate(texts) if i % 10]
    if not texts:
        raise InputError(f"{args.text[0]}: one text cannot be both counted and held out; give more, or --heldout")
    start = time.perf_counter()
    mapping = VocabMap.make(base, value, texts, args.method)
    seconds = time.perf_counter() - start
    if args.out:
        mapping.save(args.out)
    ratio, limit, worst = overlap(mapping, held)
    used = [len(side.tokens) - side.tokens.count(None) for side in (base, value)]
    report = {"method": args.method, "coverage_base": len(set(mapping.base_ids.tolist())) / used[0],
              "coverage_value": len(set(mapping.value_ids.tolist())) / used[1], "overlap": ratio, "overlap_limit": limit,
              "nonzeros": len(mapping.p), "texts_per_second": len(texts) / seconds, "seconds": seconds,
              "peak_mb": 1000 * peak_memory(torch.device("cpu"))}
    if args.retention:
        from mapped import retention  # only here are models needed
        from model import load

        report["retention"] = retention(load(args.base), mapping, held)
    for name, x in report.items():
        print(f"{name:18}{x if isinstance(x, (str, int)) else f'{x:.4g}'}")
    print("worst             " + ", ".join(f"{base.tokens[b]!r} {n}" for b, n in worst))
    if args.json:
        write_text(args.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    command(main)
