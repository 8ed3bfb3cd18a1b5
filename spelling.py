"""Tokens as the bytes that they stand for.

`▁the`, `Ġthe` and `<0xE4>` are how tokenizers write bytes down; strings of two tokenizers cannot be compared, bytes can.
Chinese, emoji and code then align as everything else does.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence

import numpy as np

from data import Tokenizer
from files import InputError

CUT = re.compile(rb"(?<=[!-~])(?= [!-~])")  # between two words
PIECE = 512  # bytes of a text that are tokenized at a time, at least


def byte_alphabet() -> dict[str, int]:
    """The characters by which byte-level tokenizers write the 256 bytes: printable ones as they are, others from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """What each id stands for: bytes, or None for special tokens and for ids that are not used.

    Raises InputError for tokenizers that are neither byte-level (`Ġ`) nor SentencePiece-like (`▁`, `<0x0A>`).
    """
    decoder = json.dumps(json.loads(tokenizer.source).get("decoder"), ensure_ascii=False)
    added = tokenizer.backend.get_added_tokens_decoder()
    unknown = json.loads(tokenizer.source)["model"].get("unk_token")
    if "ByteLevel" in decoder:
        alphabet = byte_alphabet()

        def spelt(token: str) -> bytes:
            return bytes(alphabet[c] for c in token)
    elif "▁" in decoder:
        def spelt(token: str) -> bytes:
            byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
            return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
    else:
        raise InputError(f"{tokenizer.path}: its decoder is neither byte-level nor SentencePiece-like ('▁'), so its tokens "
                         "cannot be read as bytes; choose a Llama-like tokenizer")
    return [None if token is None or token == unknown or (i in added and added[i].special) else
            token.encode() if i in added else spelt(token) for i, token in enumerate(tokenizer.tokens)]


class Spelling:
    """How a tokenizer's ids spell bytes, and bytes its ids."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.bytes = token_bytes(tokenizer)
        self.pieces = [data or b"" for data in self.bytes]
        self.lengths = np.array([len(data) for data in self.pieces])
        spelt = [(data, i) for i, data in enumerate(self.bytes) if data]
        fallback = re.compile("<0x..>")  # of two tokens with the same bytes, 'A' and <0x41>, the text's own is the first
        self.index = {data: i for data, i in sorted(
            spelt, key=lambda entry: (not fallback.fullmatch(tokenizer.tokens[entry[1]]), -entry[1]))}
        self.longest = max(map(len, self.index))
        # SentencePiece puts a space in front of every text
        self.space = b" " if self.join(tokenizer.backend.encode("a", add_special_tokens=False).ids) == b" a" else b""
        self.cuts = not any(CUT.search(data) for data in self.pieces)  # no token spans two words: they can be told apart
        self.spell_piece = functools.lru_cache(maxsize=4096)(self._spell_piece)

    def join(self, ids: Sequence[int]) -> bytes:
        return b"".join(map(self.pieces.__getitem__, ids))

    def first(self, data: bytes) -> int | None:
        """The longest token that `data` begins with; None if there is none."""
        for end in range(min(len(data), self.longest), 0, -1):
            if (i := self.index.get(data[:end])) is not None:
                return i
        return None

    def split(self, data: bytes) -> list[int]:
        """Longest tokens first to last; a byte that no token begins with is left out."""
        ids = []
        while data:
            i = self.first(data)
            ids += [] if i is None else [i]
            data = data[1 if i is None else len(self.bytes[i]):]
        return ids

    def spell(self, text: bytes) -> tuple[list[int], list[int]]:
        """The canonical ids of a text, and where each ends in `space + text`, in bytes.

        From the first byte on that the tokenizer itself does not reproduce (half a character, what its normalizer
        drops, a character that it lacks), the longest tokens take over for the piece: so the ids spell all that they can.
        A long text is tokenized in pieces that begin with a word: one that grows, token by token, costs only its last.
        """
        data, ids, ends, start = self.space + text, [], [], 0
        while start is not None:
            cut = CUT.search(data, start + PIECE) if self.cuts else None
            stop = cut.start() if cut else None
            new, places = self.spell_piece(data[start:stop].removeprefix(self.space))
            ids += new
            ends += [start + end for end in places]
            start = stop
        return ids, ends

    def _spell_piece(self, text: bytes) -> tuple[list[int], list[int]]:
        try:
            valid = text.decode()
        except UnicodeDecodeError as error:
            valid = text[:error.start].decode()
        return self.place(self.tokenizer.backend.encode(valid, add_special_tokens=False).ids, text)

    def place(self, ids: list[int], text: bytes) -> tuple[list[int], list[int]]:
        """What `spell` gives, from the tokenizer's own ids of the text."""
        data, ends = self.space + text, self.lengths[ids].cumsum().tolist()
        if self.join(ids) == data:
            return ids, ends
        kept = end = 0
        for i in ids:
            if not self.bytes[i] or not data.startswith(self.bytes[i], end):
                break
            kept, end = kept + 1, end + len(self.bytes[i])
        ids, ends = ids[:kept], ends[:kept]
        while end < len(data):
            i = self.first(data[end:end + self.longest])
            end += 1 if i is None else len(self.bytes[i])
            if i is not None:
                ids.append(i)
                ends.append(end)
        return ids, ends

    def starts(self, texts: Sequence[str]) -> Iterator[tuple[list[int], np.ndarray]]:
        """Of each text the canonical ids, and the byte of the text at which each begins."""
        for text, encoding in zip(texts, self.tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)):
            ids, ends = self.place(encoding.ids, text.encode())
            yield ids, np.maximum(np.array([0, *ends[:-1]]) - len(self.space), 0)


def spell(base: Spelling, value: Spelling, texts: Sequence[str]) -> Iterator[tuple[list[int], np.ndarray, list[int], np.ndarray]]:
    """Each text in both vocabularies: base ids, the byte at which each begins, value ids, their bytes.

    Where only one tokenizer puts a space in front of a text, the base's first token is taken as if both did what the
    value's does: 'The' and ' The' at the front of a text are one and the same, anywhere else they are not.
    """
    for k in range(0, len(texts), 256):
        for (b, b_starts), (v, v_starts) in zip(base.starts(texts[k:k + 256]), value.starts(texts[k:k + 256])):
            if base.space != value.space and b:
                first = value.space + base.bytes[b[0]].removeprefix(base.space)
                b[0] = base.index.get(first, b[0])
            yield b, b_starts, v, v_starts


def fingerprint(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers whose ids mean the same."""
    return hashlib.sha256(repr((tokenizer.tokens, tokenizer.bos, tokenizer.eos)).encode()).hexdigest()[:32]
