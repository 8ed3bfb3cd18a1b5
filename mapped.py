"""A base that is asked in another vocabulary: z_base W of equation (5), with all of the base's knowledge kept.

The paper maps the logits after each token and gives the base what was chosen, token by token: "mapped to multiple
consecutive target tokens, which are unfamiliar to the source model". Here the base reads what it is used to, its own
tokenization of the text so far, and is asked for the next bytes.
"""

import math
from collections.abc import Sequence
from os.path import commonprefix  # of any sequences, not only of paths

import torch
import torch.nn.functional as F
from torch import Tensor

from files import InputError
from model import KVCache, Llama
from vocab_map import VocabMap

PAPERS_WAY = dict(canonical=False, step_back=False, linear=True)


class MappedBase:
    """A base that is asked for the next token of another vocabulary, for the z_base W of equation (5).

    The text grows by value tokens. The base reads its own, canonical tokenization of it; where the last tokens merge
    differently than before, its cache is rolled back to those that stayed. And where the text stops, a base token need
    not stop. So every boundary of the base's that one more base token can carry past the text's end is kept as a head:
    its place, the log-probability of the ids up to it, the log-probabilities of the next. Each head speaks for the base
    tokens that begin with the bytes since its boundary; what is left of them are the next bytes (see VocabMap.rows).

    way: canonical, step_back, linear. By default the map's own: True, True, False, or PAPERS_WAY for the paper's.
    """
    TAIL = 16  # base tokens at the end of a text that may still merge differently
    FLOOR = 1e-4  # share of a uniform distribution in the mapped one: no token wins or loses by a zero

    def __init__(self, model: Llama, mapping: VocabMap, rows: int, **way: bool):
        self.model, self.mapping = model, mapping
        way = dict(canonical=True, step_back=True, linear=False) | (PAPERS_WAY if mapping.method == "paper" else {}) | way
        self.canonical, self.step_back, self.linear = way["canonical"], way["step_back"], way["linear"]
        self.device, self.columns = model.embed.weight.device, len(mapping.value.bytes)
        self.cache = KVCache(model.config, rows, 0, self.device, model.embed.weight.dtype)
        self.ids: list[list[int]] = [[] for _ in range(rows)]  # what the cache holds
        self.sums: list[list[float]] = [[0.0] for _ in range(rows)]  # log-probability of the ids up to each
        self.heads: list[dict[int, tuple[float, Tensor]]] = [{} for _ in range(rows)]

    def next(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """The mapped z_base after each text of value ids, (B, V_value). A text may grow by one id from call to call."""
        if self.step_back and not any(self.ids):  # the heads that growing id by id would have left behind
            for back in range(max(map(self.mapping.reach, texts)), 0, -1):
                self._read([text[:max(0, len(text) - back)] for text in texts])
        return self._read(texts)

    def _read(self, texts: Sequence[Sequence[int]]) -> Tensor:
        read = [self.mapping.read(text, self.canonical) for text in texts]
        # the last id that stayed is fed again: the first new id's probability comes from it
        starts = [max(0, len(commonprefix([old, ids])) - 1) for old, (ids, _, _) in zip(self.ids, read)]
        fed = [ids[start:] for start, (ids, _, _) in zip(starts, read)]
        width = max(map(len, fed))
        end, cache = max(starts) + width, self.cache
        if end > cache.slots:
            self.cache = KVCache(self.model.config, len(texts), 2 * end, self.device, cache.k.dtype)
            self.cache.k[..., :cache.slots, :], self.cache.v[..., :cache.slots, :] = cache.k, cache.v
        tokens = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in fed], device=self.device)
        positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(width, device=self.device)
        h = self.model.hidden(tokens, positions, self.cache, end)
        z = torch.stack([self._row(i, start, *read[i], h[i]) for i, start in enumerate(starts)])
        self.ids = [ids for ids, _, _ in read]
        return z

    def full(self) -> bool:
        """Whether one of the texts fills the base's context."""
        return max(map(len, self.ids)) >= self.model.config.max_position_embeddings

    def _row(self, i: int, start: int, ids: list[int], ends: list[int], text: bytes | None, h: Tensor) -> Tensor:
        """One row of `next`; h: the hidden states from position `start` on."""
        first = max(start, len(ids) - self.TAIL)
        z = F.linear(h[first - start:len(ids) - start], self.model.head).float()[:, :len(self.mapping.base.bytes)]
        out = z.new_zeros(self.columns)
        if self.linear:
            b, v, w = self.mapping.rows(b"", self.device)
            return out.index_add(0, v, z[-1, b] * w)
        logp = z.log_softmax(-1)
        if first > start or -1 in ends[first:]:  # a new text, or a new part of it: the sums begin anew
            self.heads[i], self.sums[i] = {}, [0.0] * (first + 1)
        sums = self.sums[i][:first + 1]
        for k in range(first + 1, len(ids)):
            sums.append(sums[-1] + logp[k - 1 - first, ids[k]].item())

        def pending(end: int) -> bytes | None:
            return text if text is None else text[end:]

        last = {len(text or b""): (sums[-1], logp[-1])}
        if self.step_back:
            heads = self.heads[i] | {end: (sums[k], logp[k - first]) for k, end in enumerate(ends) if k >= first and end >= 0}
            heads = {end: head for end, head in heads.items() if self.mapping.reaches(pending(end))}
        else:
            heads = last
        self.heads[i], self.sums[i] = heads, sums
        heads = heads or last  # bytes that no base token can spell are passed over
        likeliest = max(logp_head for logp_head, _ in heads.values())
        for end, (logp_head, logp) in heads.items():
            b, v, w = self.mapping.rows(pending(end), self.device)
            out.index_add_(0, v, logp[b].exp() * w, alpha=math.exp(logp_head - likeliest))
        return torch.log((1 - self.FLOOR) * out / out.sum().clamp_min(1e-30) + self.FLOOR / self.columns)


@torch.inference_mode()
def retention(base: Llama, mapping: VocabMap, texts: Sequence[str], batch_size: int = 32, **way: bool) -> float:
    """How much longer held-out text is under the mapped base: its nats per byte over the base's own; 1: nothing is lost.

    Counts the texts that both vocabularies can spell and that fit the base's context. Raises InputError if none is left.
    way: of MappedBase.
    """
    spelt, context = [], base.config.max_position_embeddings
    for text in texts:
        (ours, _), (theirs, _) = (side.spell(text.encode()) for side in (mapping.base, mapping.value))
        whole = all(side.join(ids) == side.space + text.encode()
                    for side, ids in ((mapping.base, ours), (mapping.value, theirs)))
        if whole and len(ours) < context:
            spelt.append((theirs, mapping.read(theirs)[0]))
    if not spelt:
        raise InputError("no held-out text can be spelt in both vocabularies within the base's context; give others")
    own = mapped = 0.0
    for _, ids in spelt:
        z = base(torch.tensor([ids[:-1]], device=base.embed.weight.device))[0]
        own += F.cross_entropy(z.float(), torch.tensor(ids[1:], device=z.device), reduction="sum").item()
    for k in range(0, len(spelt), batch_size):
        rows = [ids for ids, _ in spelt[k:k + batch_size]]
        reader = MappedBase(base, mapping, len(rows), **way)
        for t in range(max(map(len, rows))):
            logp = reader.next([ids[:t] for ids in rows]).log_softmax(-1)
            mapped -= sum(logp[i, ids[t]].item() for i, ids in enumerate(rows) if t < len(ids))
    return mapped / own
