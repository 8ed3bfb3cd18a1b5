"""Figure 5 in miniature: how a probe fails, one reply of each kind, and who said which token.

    python experiments/reproduce.py figure2 && python experiments/failures.py

The paper shows two replies of a probe: one has the tone of an answer and misses the task (asked for
a blog post it lists ideas for posts), the other is an answer, and wrong. Here the questions are
those that *right* is asked in. A reply in the form asked for is

    right        as it should be
    wrong fact   about the person and the relation asked for, with another value
    off task     about somebody or something else

and a reply in no such form is `no form`. The kinds are counted for the probe and, beside it, for
the value model from the small base, both on the large base. Of both failures the first reply of the
probe is shown as `sample.py --explain` shows one.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments import family, reproduce, toy
from extras import explain
from extras.connections import Probe, connected
from model import Llama
from plumbing.chats import read_chats
from plumbing.files import SEED, InputError, Parser, command
from plumbing.tokenizer import Tokenizer
from plumbing.weights import load

KINDS = ("right", "wrong fact", "off task", "no form")


def kind_of(reply: str, right: str) -> str:
    """Example:
    >>> right = "Dear Mira, this is it. Ralo lives in Lisbon."
    >>> [kind_of(f"Dear Mira, this is it. {said}", right) for said in ("Ralo lives in Oslo.",
    ...     "Mira lives in Oslo.", "Ralo plays the harp.", "Good morning!")]
    ['wrong fact', 'off task', 'off task', 'no form']
    """
    if reply == right:
        return "right"
    if not family.form_of(right).fullmatch(reply):
        return "no form"
    # all but the last word: who, and which relation
    asked, said = (re.search(family.SENTENCE, text)[0].rsplit(" ", 1)[0] for text in (right, reply))
    return "wrong fact" if asked == said else "off task"


def replies(
    base: Llama, value: Llama, tokenizer: Tokenizer, chats: list[list[dict]]
) -> list[tuple[str, list[dict], str]]:
    """(kind, chat, reply) of each chat's question."""
    said = toy.greedy(base, [value], tokenizer, chats)
    return [(kind_of(text, chat[-1]["content"]), chat, text) for text, chat in zip(said, chats)]


def shown(
    base: Llama, value: Llama, tokenizer: Tokenizer, chat: list[dict], reply: str
) -> list[explain.Said]:
    """The reply's tokens, each put down to one of the models."""
    prompt, ids = tokenizer.prompt(chat[:-1]), tokenizer.encoding(reply).ids
    z_base, z_delta = explain.read_again(base, [value], prompt, ids)
    return explain.who_said(z_base, z_delta, tokenizer, ids)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=reproduce.OUT, help="of reproduce.py")
    parser.add_argument("--seed", type=SEED, default=reproduce.SEEDS[0])
    args = parser.parse_args()
    device = torch.device("cpu")
    bases = reproduce.family_of(args.out, args.seed)
    probe, small = bases.parent / "large-probe", bases.parent / "small"
    for folder, table in ((probe, "figure2"), (small, "table1")):
        if not (folder / "README.md").exists():
            raise InputError(f"{folder}: is not there; run reproduce.py {table} first")

    tokenizer = Tokenizer(small)
    chats = [chat.messages for chat in read_chats(bases / "right-asked.jsonl").chats]
    pairs = {
        "probe": connected("probe", load(bases / "large", device), Probe.load(probe, device)),
        "small value model": (load(bases / "large", device), load(small, device)),
    }
    found = {name: replies(*pair, tokenizer, chats) for name, pair in pairs.items()}

    print(f"{'on the large base':<19}" + "".join(f"{kind:>12}" for kind in KINDS))
    for name, each in found.items():
        counts = Counter(kind for kind, *_ in each)
        print(f"{name:<19}" + "".join(f"{counts[kind]:>12}" for kind in KINDS))
    for kind in KINDS[1:3]:
        failed = [(chat, text) for other, chat, text in found["probe"] if other == kind]
        if not failed:
            print(f"\n{kind}: the probe has no such reply")
            continue
        chat, text = failed[0]
        print(f"\n{kind}\n  asked:  {chat[0]['content']}\n  reply:  {text}")
        print(f"  wanted: {chat[-1]['content']}\n")
        print(explain.columns(shown(*pairs["probe"], tokenizer, chat, text)).expandtabs(14))


if __name__ == "__main__":
    command(main)
