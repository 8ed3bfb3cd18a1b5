"""Chats as the model will see them: the check to make before a long run.

    python train.py --base DIR --data chats.json --show 3

Targets, which the loss counts, are green in a terminal and between ⟦ and ⟧ elsewhere; special
tokens are told from texts that look like them.
"""

import sys

from plumbing.dataset import Chats
from plumbing.files import visible
from plumbing.tokenizer import Tokenizer

TARGET, SPECIAL, PLAIN = "\033[32m", "\033[7m", "\033[0m"


def show(chats: Chats, tokenizer: Tokenizer, count: int) -> None:
    """Prints the first chats; of preferences each with its rival."""
    coloured = sys.stdout.isatty()
    for row in range(min(count, len(chats))):
        for i in chats.members([row]):
            chat = slice(int(chats.offsets[i]), int(chats.offsets[i + 1]))
            ids, target = chats.ids[chat].tolist(), chats.target[chat].tolist()
            entry = int(chats.entry[i]) + 1
            kind = "rejected reply of chat" if i >= len(chats) else "chat"
            print(f"\n--- {kind} {entry}: {len(ids)} tokens, {sum(target)} targets")
            print(spelt(ids, target, tokenizer, coloured))


def spelt(ids: list[int], target: list[bool], tokenizer: Tokenizer, coloured: bool) -> str:
    """One chat as a text.

    Example, plain: `<s>` is a token here, `</s>` in the question is none
        ‹<s>›User: What is </s>? Assistant: ⟦ An end.‹</s>›⟧
    """
    out, before = "", []
    for run, is_target in runs(ids, target):
        text = ""
        for piece, is_special in split_special(run, tokenizer):
            if not is_special:
                # together with the token before: alone, it would lose a space in front
                known = len(tokenizer.decode(before))
                text += visible(tokenizer.decode(before + piece)[known:])
                before = piece[-1:]
            elif coloured:
                begin = TARGET if is_target else ""
                text += f"{SPECIAL}{tokenizer.tokens[piece[0]]}{PLAIN}{begin}"
            else:
                text += f"‹{tokenizer.tokens[piece[0]]}›"
        if is_target:
            text = f"{TARGET}{text}{PLAIN}" if coloured else f"⟦{text}⟧"
        out += text
    return out


def runs(ids: list[int], target: list[bool]) -> list[tuple[list[int], bool]]:
    """Neighbours that are all targets, or all not.

    Example:
    >>> runs([5, 6, 7, 8], [False, True, True, False])
    [([5], False), ([6, 7], True), ([8], False)]
    """
    found = []
    for i, is_target in zip(ids, target):
        if not found or found[-1][1] != is_target:
            found.append(([], is_target))
        found[-1][0].append(i)
    return found


def split_special(ids: list[int], tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """Special tokens one by one, and what is between them."""
    found = []
    for i in ids:
        special = i in tokenizer.control
        if special or not found or found[-1][1]:
            found.append(([], special))
        found[-1][0].append(i)
    return found
