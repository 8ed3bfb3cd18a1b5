"""Who said it: each token of a reply, put down to the base or to the value model (§3.1, the first advantage).

    python sample.py --explain "question"            # in colour, the base's own choice underneath; in a pipe: columns
    python sample.py --html reply.html "question"    # the same as a page

A token y is by
    base     if z_base alone is largest at y: the base would have said it, too, after the same text
    value    if it is not, and z_post is largest at y: the value model has changed the choice
    chance   if neither is: sampling has picked it
and log p_post(y) − log p_base(y), the log p_Δ of §2, says in nats how much the value model has done for it.
"""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from connections import Probe, value_input
from data import Tokenizer
from ivl import combine, proxy
from mapped import MappedBase
from model import Llama
from spelling import token_bytes
from vocab_map import VocabMap

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
def who_said(base: Llama, value: Llama | Probe, tokenizer: Tokenizer, prompt: Sequence[int], reply: Sequence[int], *,
             connection: str = "residual", antiexpert: Llama | None = None, alpha: float = 1.0,
             vocabulary: int | None = None, mapping: VocabMap | None = None) -> list[Said]:
    """The tokens of `reply`, which the models gave after `prompt`. The arguments are those of `ivl.generate`."""
    first, ids = len(prompt) - 1, torch.tensor([[*prompt, *reply[:-1]]], device=base.embed.weight.device)
    if mapping is None or mapping.identity:
        h_base = base.hidden(ids)
        z_base = F.linear(h_base[0, first:], base.head)  # (n, V)
    else:
        h_base, reader = None, MappedBase(base, mapping, 1)
        z_base = torch.cat([reader.next([[*prompt, *reply[:t]]]) for t in range(len(reply))])
    h = value.hidden(value_input(connection, value, ids.to(value.head.device), h_base, base.head))
    z_delta = F.linear(h[0, first:], value.head).to(z_base.device)
    if antiexpert is not None:
        z_delta = proxy(z_delta, antiexpert(ids)[0, first:])
    z_post = combine(z_base.float(), z_delta.float(), alpha)[:, :vocabulary]
    z_base = z_base[:, :z_post.shape[1]].float()
    said = torch.tensor(reply, device=z_post.device)
    logs = [z.log_softmax(-1).gather(-1, said[:, None])[:, 0].tolist() for z in (z_base, z_post)]
    choices = [z.argmax(-1).tolist() for z in (z_base, z_post)]
    spelt = token_bytes(tokenizer)

    def text(i: int) -> str:
        return tokenizer.tokens[i] if spelt[i] is None else spelt[i].decode(errors="backslashreplace")

    return [Said(text(y), text(b), "base" if y == b else "value" if y == p else "chance", log_post - log_base,
                 *torch.tensor([log_base, log_post]).exp().tolist())
            for y, b, p, log_base, log_post in zip(reply, *choices, *logs)]


def summary(said: Sequence[Said]) -> str:
    count = {by: sum(token.by == by for token in said) for by in ("base", "value", "chance")}
    return (f"{len(said)} tokens: {count['base']} as the base alone would have said, {count['value']} changed by the value "
            f"model, {count['chance']} by chance; together {sum(token.nats for token in said):+.1f} nats")


# ---------------------------------------------------------------- forms

def columns(said: Sequence[Said]) -> str:
    """A line per token, separated by tabs; texts as JSON strings, so that spaces and line ends can be seen."""
    rows = [("by", "nats", "p_base", "p_post", "token", "base's choice")]
    rows += [(token.by, f"{token.nats:+.2f}", f"{token.p_base:.4f}", f"{token.p_post:.4f}",
              *(json.dumps(text, ensure_ascii=False) for text in (token.text, token.base))) for token in said]
    return "\n".join("\t".join(row) for row in rows)


def coloured(said: Sequence[Said], width: int) -> str:
    """For a terminal of `width` columns: lines of tokens, and under each the base's own choices that differ."""
    out, cells, used = [], [], 0

    def end_line() -> None:
        nonlocal cells, used
        out.append("".join(cell for cell, _ in cells).rstrip())
        if any(under.strip() for _, under in cells):
            out.append("\033[90m" + "".join(under for _, under in cells).rstrip() + "\033[0m")
        cells, used = [], 0

    for token in said:
        text, under = (s.replace("\n", "⏎") for s in (token.text, "" if token.by == "base" else token.base))
        room = max(len(text), len(under) + bool(under))
        if used and used + room > width:
            end_line()
        style = {"base": "", "chance": "\033[4m", "value": f"\033[30;48;5;{SHADES[shade(token)]}m"}[token.by]
        cells.append((style + text + "\033[0m" * bool(style) + " " * (room - len(text)), under.ljust(room)))
        used += room
        if token.text.endswith("\n"):
            end_line()
    end_line()
    legend = "".join(f"\033[30;48;5;{c}m  \033[0m" for c in SHADES)
    return "\n".join([*out, "", f"plain: the base  {legend} value model, 0 to {STRONG:.0f} nats  \033[4mchance\033[0m  "
                                "\033[90munderneath: what the base alone would have said\033[0m"])


def shade(token: Said) -> int:
    return min(len(SHADES) - 1, int(abs(token.nats) / STRONG * len(SHADES)))


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Who said it</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 17px/2.9 system-ui, sans-serif; max-width: 46em; margin: 2em auto; padding: 0 1em }}
h1, p {{ font-size: 1em; line-height: 1.5; color: GrayText; font-weight: normal; white-space: pre-wrap }}
ruby {{ ruby-position: under }} rt {{ color: GrayText; font-size: .6em; white-space: pre }}
span {{ white-space: pre-wrap; border-radius: .2em }}
.value {{ background: rgb(255 130 20 / var(--strength)) }}
.chance {{ text-decoration: underline dotted }}
</style>
<h1>{question}</h1>
<div>{reply}</div>
<p>{summary}
Plain: the base alone would have said the same. <span class="value" style="--strength: .6">Coloured</span>: the value model has
changed the choice, full colour from {strong:.0f} nats. <span class="chance">Dotted</span>: picked by sampling. Underneath: what the
base alone would have said. Numbers appear where the mouse rests.</p>
</html>
"""


def page(said: Sequence[Said], question: str) -> str:
    """The whole reply as a page that needs nothing else."""
    def one(token: Said) -> str:
        text, under = html.escape(token.text), html.escape(token.base.replace("\n", "⏎"))
        title = f"{token.by}: {token.nats:+.2f} nats, p_base {token.p_base:.4f}, p_post {token.p_post:.4f}"
        strength = min(1.0, abs(token.nats) / STRONG)
        span = f'<span class="{token.by}" style="--strength: {strength:.2f}" title="{title}">{text}</span>'
        return span if token.by == "base" else f"<ruby>{span}<rt>{under}</rt></ruby>"

    return PAGE.format(question=html.escape(question), reply="".join(map(one, said)), summary=summary(said),
                       strong=STRONG)
