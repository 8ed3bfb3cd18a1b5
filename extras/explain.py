"""Who said it: each token of a reply, put down to the base or to the value model (§3.1, the first
advantage).

    python sample.py --explain "question"            # in colour; in a pipe: columns
    python sample.py --html reply.html "question"    # and as a page, see extras/page.py

A token y is by
    base     if z_base alone is largest at y: the base would have said it, too, after the same text
    value    if it is not, and z_post is largest at y: the value model has changed the choice
    chance   if neither is: sampling has picked it
and log p_post(y) − log p_base(y), the log p_Δ of §2, says in nats how much the value model has done
for it.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ivl import combine
from model import Llama
from plumbing.files import visible
from plumbing.tokenizer import Tokenizer
from vocab_map import token_bytes

STRONG = 8.0  # nats from which a colour is as strong as it gets
SHADES = (230, 223, 216, 209, 202)  # of a terminal's 256 colours: pale to deep orange


@dataclass
class Said:
    """One token of a reply."""

    text: str
    base: str  # what the base alone would have said here
    by: str  # "base", "value", "chance"
    nats: float  # log p_post − log p_base of the token
    p_base: float
    p_post: float


@torch.inference_mode()
def read_again(
    base: Llama,
    values: Sequence[Llama],
    prompt: Sequence[int],
    reply: Sequence[int],
    vocabulary: int | None = None,
    never: Collection[int] = (),
) -> list[Tensor]:
    """z_base and each z_Δ before each of the reply's n tokens, (n, V) each, in float32.

    base, values: whatever has a `reader`, as in `ivl.generate`; `read_each` reads the reply at
    once.
    vocabulary: the first ids that could be chosen; never: of these, those that could not, which
    get z_base = −∞.
    """
    # the models read the prompt, then the reply: their logits before each of its tokens
    readers = [model.reader(1, len(prompt) + len(reply)) for model in [base, *values]]
    z = [reader.read(torch.tensor([prompt])) for reader in readers]  # (1, V) each
    if len(reply) > 1:
        rest = [reader.read_each(torch.tensor([reply[:-1]])) for reader in readers]
        z = [torch.cat((before, after[0])) for before, after in zip(z, rest)]  # (n, V) each

    # over the vocabulary that all have
    V = min(vocabulary or z[0].shape[1], *(z_model.shape[1] for z_model in z))
    z_base, *z_deltas = [z_model[:, :V].to(z[0].device) for z_model in z]
    if never:
        ids = torch.tensor(sorted(never), device=z_base.device)
        z_base = z_base.index_fill(1, ids, -torch.inf)
    return [z_base, *z_deltas]


def texts(tokenizer: Tokenizer) -> list[str]:
    """How each id is written: its text, or the name of a special token."""
    written = []
    for token, data in zip(tokenizer.tokens, token_bytes(tokenizer)):
        text = token or ""
        if data is not None:
            text = data.decode(errors="backslashreplace")
        written.append(text)
    return written


@torch.inference_mode()
def who_said(
    z_base: Tensor, z_delta: Tensor, tokenizer: Tokenizer, reply: Sequence[int], alpha: float = 1.0
) -> list[Said]:
    """The tokens of `reply`, each put down to one of the models.

    z_base, z_delta: (n, V), of `read_again`.
    """
    z_post = combine(z_base, z_delta, alpha)  # (n, V)

    # what each would have chosen, and how likely each found what was said
    ids = torch.tensor(reply, device=z_post.device)[:, None]  # (n, 1)
    log_base = z_base.log_softmax(-1).gather(-1, ids)[:, 0]  # (n,)
    log_post = z_post.log_softmax(-1).gather(-1, ids)[:, 0]  # (n,)
    text = texts(tokenizer)

    tokens = []
    rows = zip(
        reply,
        z_base.argmax(-1).tolist(),
        z_post.argmax(-1).tolist(),
        log_base.tolist(),
        log_post.tolist(),
        log_base.exp().tolist(),
        log_post.exp().tolist(),
    )
    for token, base_choice, post_choice, log_p_base, log_p_post, p_base, p_post in rows:
        by = "chance"
        if token == base_choice:
            by = "base"
        elif token == post_choice:
            by = "value"
        tokens.append(
            Said(text[token], text[base_choice], by, log_p_post - log_p_base, p_base, p_post)
        )
    return tokens


def summary(said: Sequence[Said]) -> str:
    count = {by: sum(token.by == by for token in said) for by in ("base", "value", "chance")}
    return (
        f"{len(said)} tokens: {count['base']} as the base alone would have said, "
        f"{count['value']} changed by the value model, {count['chance']} by chance; "
        f"together {sum(token.nats for token in said):+.1f} nats"
    )


# ---------------------------------------------------------------- forms


def columns(said: Sequence[Said]) -> str:
    """A line per token, separated by tabs; texts as JSON strings, in which spaces are seen."""
    rows = [("by", "nats", "p_base", "p_post", "token", "base's choice")]
    rows += [
        (
            token.by,
            f"{token.nats:+.2f}",
            f"{token.p_base:.4f}",
            f"{token.p_post:.4f}",
            *(json.dumps(text, ensure_ascii=False) for text in (token.text, token.base)),
        )
        for token in said
    ]
    return "\n".join("\t".join(row) for row in rows)


def coloured(said: Sequence[Said], width: int) -> str:
    """For a terminal of `width` columns: lines of tokens, and the base's choices underneath."""
    out, cells, used = [], [], 0

    def end_line() -> None:
        nonlocal cells, used
        out.append("".join(cell for cell, _ in cells).rstrip())
        if any(under.strip() for _, under in cells):
            out.append("\033[90m" + "".join(under for _, under in cells).rstrip() + "\033[0m")
        cells, used = [], 0

    for token in said:
        text, under = (
            visible(s.replace("\n", "⏎"))
            for s in (token.text, "" if token.by == "base" else token.base)
        )
        # a cell holds the token and what stands under it, and then a gap to the next choice
        room = max(len(text), len(under) + bool(under))
        if used and used + room > width:
            end_line()
        style = {"base": "", "chance": "\033[4m", "value": f"\033[30;48;5;{SHADES[shade(token)]}m"}[
            token.by
        ]
        cells.append(
            (style + text + "\033[0m" * bool(style) + " " * (room - len(text)), under.ljust(room))
        )
        used += room
        if token.text.endswith("\n"):
            end_line()
    end_line()
    legend = "".join(f"\033[30;48;5;{c}m  \033[0m" for c in SHADES)
    return "\n".join(
        [
            *out,
            "",
            f"plain: the base  {legend} value model, 0 to {STRONG:.0f} nats  \033[4mchance\033[0m  "
            "\033[90munderneath: what the base alone would have said\033[0m",
        ]
    )


def shade(token: Said) -> int:
    """Which of SHADES: the stronger, the more nats in either direction."""
    return min(len(SHADES) - 1, int(abs(token.nats) / STRONG * len(SHADES)))
