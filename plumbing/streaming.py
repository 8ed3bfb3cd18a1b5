"""The text of a reply while its ids come: whole characters only, and up to a text that ends it."""

from collections.abc import Sequence

from plumbing.tokenizer import Tokenizer


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

        # whole by itself: the next steps decode from this id on, and it is out already (a special
        # token has no text, and a space before the next word depends on what was before it)
        tail = self.decode([i])
        if tail and "\ufffd" not in tail:
            self.ids, self.shown = [i], len(tail)
        return piece

    def rest(self) -> str:
        """What is still held back when no more ids come."""
        return self.decode(self.ids)[self.shown :]


class GrowingReply:
    """The text of a reply while its ids come, up to the first of the texts `stops`, if one comes.

    What may be the beginning of such a text is held back until more is known.

    Example: with "###" in `stops`, a reply of the ids for "It", " is #", "1", " ##", "# User" is
    shown as "It", " is ", "#1", " ", "", and has ended.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), prompt: Sequence[int] = ()):
        self.stream = TextStream(tokenizer, prompt)
        self.stops = stops
        self.ids: list[int] = []
        self.text = ""  # what is certain
        self.held = ""
        self.ended = False

    def step(self, i: int) -> str:
        """The text that is certain now, often ''."""
        self.ids.append(i)
        return self.certain(self.stream.step(i))

    def rest(self) -> str:
        """What is still held back when no more ids come."""
        if self.ended:
            return ""
        piece = self.certain(self.stream.rest())
        if not self.ended:
            piece += self.held
            self.text += self.held
        return piece

    def certain(self, piece: str) -> str:
        """The text that no stop text can begin in any more, now that `piece` has come."""
        self.held += piece
        places = [self.held.find(text) for text in self.stops if text in self.held]
        self.ended = bool(places)
        if places:
            known = min(places)
        else:
            known = len(self.held) - max(map(self.begun, self.stops), default=0)
        certain = self.held[:known]
        self.held = self.held[known:]
        self.text += certain
        return certain

    def begun(self, text: str) -> int:
        """With how many of the first characters of `text` the held ones end."""
        return max(n for n in range(len(text)) if self.held.endswith(text[:n]))
