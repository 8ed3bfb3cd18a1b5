"""The picture of the method: a reply in which each token can be opened, and a slider for α.

    python sample.py --html reply.html "question"
    python sample.py --html reply.html --compare out/toy/small "question"    # two bases

One HTML file that needs nothing else; how it looks and moves stands in page.html. Here are the
numbers. The page computes z_post = z_base + α z_Δ of a few words by itself, for every α; what makes
its probabilities exact is the sum over all *other* words, which it cannot know:

    p(y) = exp z_post(y) / (Σ over the words shown + exp others(α))

so `others`, a log Σ exp, is sent along for each stop of the slider. And whatever word is the
likeliest at one of these stops is among the words shown.
"""

import html
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from extras.explain import STRONG, Said, texts
from plumbing.files import read_text, visible
from plumbing.tokenizer import Tokenizer
from vocab_map import token_bytes

TEMPLATE = Path(__file__).with_name("page.html")
BEST = 4  # so many of the likeliest words are shown, of each of a few distributions
DIGITS = 9  # decimals: enough even where α is large
MARKS = str.maketrans({"\n": "⏎", "\t": "⇥", " ": "␣"})


# ---------------------------------------------------------------- the numbers


def stops(alpha: float) -> list[float]:
    """Where the slider can stand: 0, 0.05, ... 2, and where the reply was made.

    Example:
    >>> stops(0.5)[:3], len(stops(0.5)), stops(7.0)[-2:]
    ([0.0, 0.05, 0.1], 41, [2.0, 7.0])
    """
    return sorted({k / 20 for k in range(41)} | {alpha})


def shown_words(z_post: Tensor, alphas: Sequence[float], alpha: float, said: int) -> list[int]:
    """The words of one step that are shown, the likeliest at `alpha` first.

    z_post: (A, V), for each of `alphas`; 0, 1, 2 and alpha are among them.
    """
    words = {said}
    k = min(BEST, z_post.shape[1])
    for a in {0.0, 1.0, 2.0, alpha}:
        words |= set(z_post[alphas.index(a)].topk(k).indices.tolist())
    # each that is the choice somewhere
    words |= set(z_post.argmax(-1).tolist())

    # what cannot be said is not shown, not even if there are fewer than k words
    z = z_post[alphas.index(alpha)]  # (V,)
    words = {i for i in words if i == said or z[i] > -torch.inf}
    return sorted(words, key=lambda i: (-z[i].item(), i))


def step_numbers(
    z_base: Tensor, z_delta: Tensor, said: int, alphas: Sequence[float], alpha: float
) -> tuple[list[int], dict]:
    """The words that are shown of one step, and the step's numbers.  z_base, z_delta (V,)

    From each of the two its median is taken away, a constant, which softmax does not see: so 0 is
    the middling word, and steps can be compared. (It is the constant that the norm term ‖z_Δ‖₁
    would choose, too.)
    """
    # −∞ has no part in a median
    z_base, z_delta = z_base.double(), z_delta.double()  # (V,) each
    z_base = z_base - z_base[z_base > -torch.inf].median()
    z_delta = z_delta - z_delta.median()

    # equation (3) for all α at once
    strengths = torch.tensor(alphas, dtype=torch.float64, device=z_base.device)  # (A,)
    z_post = z_base + strengths[:, None] * z_delta  # (A, V)
    words = shown_words(z_post, alphas, alpha, said)
    z_post[:, words] = -torch.inf
    others = z_post.logsumexp(-1)  # (A,)
    return words, {
        "z_base": rounded(z_base[words]),
        "z_delta": rounded(z_delta[words]),
        "others": rounded(others),
    }


def rounded(z: Tensor) -> list[float | None]:
    """Numbers as JSON can hold them: None stands for −∞, "never"."""
    return [round(x, DIGITS) if math.isfinite(x) else None for x in z.tolist()]


@torch.inference_mode()
def column(
    title: tuple[str, str],
    said: Sequence[Said],
    z_base: Tensor,
    z_delta: Tensor,
    tokenizer: Tokenizer,
    reply: Sequence[int],
    alpha: float = 1.0,
) -> dict:
    """One base's side of the page.

    title: of `title_of`; said: what `explain.who_said` makes of the arguments that follow, of which
    z_base and z_delta (n, V) are of `explain.read_again`.
    Gives {"title", "said", "tokens"}, where a token is
        said        which of the words it is that was said
        words       [{"id", "text", "special"}, ...], those shown
        z_base, z_delta   a number for each word
        others      log Σ exp z_post of all other words, a number for each stop of the slider
    """
    if z_base.device.type == "mps":  # which knows no float64
        z_base, z_delta = z_base.cpu(), z_delta.cpu()
    written, spelt = texts(tokenizer), token_bytes(tokenizer)
    alphas = stops(alpha)
    tokens = []
    for k, token in enumerate(reply):
        ids, numbers = step_numbers(z_base[k], z_delta[k], token, alphas, alpha)
        # a special token stands for no text
        words = [{"id": i, "text": marked(written[i]), "special": spelt[i] is None} for i in ids]
        tokens.append({"said": ids.index(token), "words": words, **numbers})
    return {"title": title, "said": said, "tokens": tokens}


def marked(text: str) -> str:
    """A text in which all that has no ink can be seen.

    Example:
    >>> marked(" day" + chr(10)), marked("a b" + chr(27))
    ('␣day⏎', 'a␣b\\\\x1b')
    """
    return visible(text.translate(MARKS))


def title_of(
    directories: Sequence[str | Path], sizes: Sequence[int], alphas: Sequence[float]
) -> tuple[str, str]:
    """A column's title: the base's name, and what is said beside it in smaller letters.

    directories, sizes (numbers of parameters): of the base and of each value model. alphas: the
    strengths of these.

    Example:
    >>> title_of(["toy/large", "toy/value"], [750592, 174464], [1.0])
    ('large', '750,592 parameters + value model “value”, 174,464')
    """
    base, *values = [Path(directory).resolve().name for directory in directories]
    about = f"{sizes[0]:,} parameters"
    for name, size, alpha in zip(values, sizes[1:], alphas):
        about += f" {'−' if alpha < 0 else '+'} value model “{name}”, {size:,}"
    return base, about


# ---------------------------------------------------------------- the page


def page(question: str, columns: Sequence[dict], alpha: float) -> str:
    """All of it, as HTML. columns: of `column`, from left to right.

    What is written here can be read without JavaScript; the rest is made from the numbers.
    """
    data = {
        "alphas": stops(alpha),
        "alpha": alpha,
        "strong": STRONG,
        "open": opened(columns),
        "columns": [side["tokens"] for side in columns],
    }
    parts = {
        "question": html.escape(question),
        "columns": "\n".join(map(column_html, columns)),
        "alpha": f"{alpha:g}",
        "strong": f"{STRONG:g}",
        # no text within can end the script that the numbers stand in
        "data": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
    }
    # all at once: a question that spells a place to fill in stays a question
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], read_text(TEMPLATE))


def opened(columns: Sequence[dict]) -> list[int | None]:
    """The token of each column that is open at first: where two replies part, else the first that
    the value model has changed.
    """
    said = [[step["words"][step["said"]]["id"] for step in side["tokens"]] for side in columns]
    for k, ids in enumerate(zip(*said)):
        if len(set(ids)) > 1:
            return [k] * len(columns)
    found = []
    for side in columns:
        changed = [k for k, token in enumerate(side["said"]) if token.by == "value"]
        found.append(changed[0] if changed else None)
    return found


def column_html(side: dict) -> str:
    tokens = "".join(token_html(token, step) for token, step in zip(side["said"], side["tokens"]))
    name, about = map(html.escape, side["title"])
    return (
        f'<section class="column"><h2><strong>{name}</strong> {about}</h2>\n'
        f'<div class="reply" role="group" aria-label="the reply of {name}">{tokens}</div>\n'
        f'<div class="panel" role="region" aria-label="the open token of {name}" hidden></div>'
        "</section>"
    )


def token_html(token: Said, step: dict) -> str:
    """One token of the reply: a button with what was said, and underneath what the base would say.

    A space in front stands outside of the button, where a line can break.
    """
    word = step["words"][step["said"]]
    text = word["text"]
    space = ""
    if text.startswith("␣") and text != "␣":
        space, text = " ", text[1:]
    kind = "word special" if word["special"] else "word"
    under = "" if token.by == "base" else marked(token.base)
    if under != "␣":
        under = under.removeprefix("␣")
    strength = min(1.0, abs(token.nats) / STRONG)
    title = f"{token.by}: {token.nats:+.2f} nats, p_base {token.p_base:.4f}, "
    title += f"p_post {token.p_post:.4f}"
    line_end = "<br>" if token.text.endswith("\n") else ""
    return (
        f'{space}<button type="button" class="token" data-by="{token.by}" title="{title}" '
        f'style="--strength: {strength:.2f}"><span class="{kind}">{html.escape(text)}</span>'
        f'<span class="under">{html.escape(under)}</span></button>{line_end}'
    )
