"""What survives a vocabulary map, and what each step of the method brings (section 4.2.2, Figure 4,
appendix B).

    python experiments/mapping.py overlap --base DIR --value DIR --text FILE...
        two tokenizers: overlap by kind of text
    python experiments/mapping.py steps --base DIR --value DIR --text FILE
        two models: retention, step by step
    python experiments/mapping.py lookahead --base DIR --value DIR --text FILE
        retention if the base looked tokens ahead
    python experiments/mapping.py toy --a out/toy --b out/toy_b
        the transfer from end to end

`overlap` and `steps` hold out every tenth text and measure on that. The toy's folders come from
`train.py --out A` and `experiments/toy.py --family b --out B` with the same --seed.
"""

import argparse
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments import toy
from extras.mapped import FLOOR, PAPERS_WAY, Mapped, retention
from model import Llama
from plumbing.chats import read_chats
from plumbing.files import TABLE, InputError, command, read_json, read_texts, write_text
from plumbing.tokenizer import Tokenizer
from plumbing.weights import load
from vocab_map import Spelling, VocabMap, overlap, spell

METHODS = {"bytes": "ours", "paper": "Algorithm 1"}
DOCUMENTS = 600  # of the toy's world, to count in and to measure on


def hold_out(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """(nine tenths to count in, every tenth to measure on)"""
    return [text for i, text in enumerate(texts) if i % 10], list(texts[::10])


# ---------------------------------------------------------------- overlap, appendix B


def overlaps(args: argparse.Namespace) -> list[dict]:
    """One row a file and method: the overlap ratio on its held-out texts and the highest that is
    possible.

    The maps are counted in all files together. Algorithm 1 sees `--few` texts of each: warping is
    slow.
    """
    base, value = Tokenizer(args.base), Tokenizer(args.value)
    counted, held = zip(*(hold_out(read_texts(path)) for path in args.text))
    few = [part[: args.few] for part in counted]
    rows = []
    for method, parts in (("bytes", counted), ("paper", few)):
        mapping = VocabMap.make(base, value, [text for part in parts for text in part], method)
        for path, texts in zip(args.text, held):
            ratio, limit, _ = overlap(mapping, texts)
            rows.append(
                {
                    "text": Path(path).name,
                    "method": METHODS[method],
                    "overlap": ratio,
                    "limit": limit,
                }
            )
        own = [row for row in rows if row["method"] == METHODS[method]]
        mean = {key: sum(row[key] for row in own) / len(own) for key in ("overlap", "limit")}
        rows.append({"text": "mean", "method": METHODS[method], **mean})
    return rows


# ---------------------------------------------------------------- retention, step by step


def steps(args: argparse.Namespace) -> list[dict]:
    """One row a step, from Algorithm 1 to the default: retention on held-out texts (1.0: nothing is
    lost).

    Stepping back adds up probabilities over boundaries, so it is there for mixtures only.
    """
    base, value = Tokenizer(args.base), Tokenizer(args.value)
    counted, held = hold_out([text for text in read_texts(args.text) if "\n" not in text])
    held = held[: args.held]
    model = load(args.base)
    maps = {
        "bytes": VocabMap.make(base, value, counted),
        "paper": VocabMap.make(base, value, counted[: args.few], "paper"),
    }
    ways = [("paper", PAPERS_WAY)]
    for linear in (True, False):
        for canonical in (False, True):
            ways.append(("bytes", dict(linear=linear, canonical=canonical, step_back=False)))
            if not linear:
                ways.append(("bytes", dict(linear=linear, canonical=canonical, step_back=True)))

    rows = []
    for name, way in tqdm(ways, "steps", leave=False, disable=None):
        rows.append(
            {
                "map": METHODS[name],
                "space": "logits" if way["linear"] else "probabilities",
                "the base reads": "its own tokens" if way["canonical"] else "token by token",
                "steps back": "yes" if way["step_back"] else "no",
                "retention": retention(model, maps[name], held, **way),
            }
        )
    return rows


# ---------------------------------------------------------------- looking ahead


def count_strings(
    base: Spelling, value: Spelling, texts: Sequence[str], depth: int
) -> dict[tuple[int, ...], Counter]:
    """rows[string of up to `depth` base ids][v]: how often value token v begins where the string
    begins.
    """
    rows: dict[tuple[int, ...], Counter] = defaultdict(Counter)
    for b, b_starts, v, v_starts in spell(base, value, texts):
        at = {}  # byte → the first base token that begins there
        for i, start in enumerate(b_starts.tolist()):
            at.setdefault(start, i)
        for token, start in zip(v, v_starts.tolist()):
            if start not in at:
                continue
            i = at[start]
            for n in range(1, depth + 1):
                rows[tuple(b[i : i + n])][token] += 1
    return rows


def next_token(
    base: Llama,
    front: list[int],
    rows: dict[tuple[int, ...], Counter],
    columns: int,
    depth: int,
    width: int,
) -> torch.Tensor:
    """Probabilities of the next value token after the base ids `front`, (V_value,), from strings of
    base tokens.

    The `width` likeliest strings of each length are read on, up to `depth`; the others count as
    they are.
    """
    p = torch.zeros(columns)

    def count(string: tuple[int, ...], q: float) -> None:
        """Adds what the longest counted front of a string says, q being the string's own
        probability.
        """
        for n in range(len(string), 0, -1):
            if string[:n] in rows:
                row = rows[string[:n]]
                total = sum(row.values())
                for v, times in row.items():
                    p[v] += q * times / total
                return

    strings = {(): 1.0}  # and how likely each is
    for ahead in range(1, depth + 1):
        # the likeliest are read on; the others end here
        kept = dict(sorted(strings.items(), key=lambda entry: -entry[1])[:width])
        if ahead > 1:
            for string, q in strings.items():
                if string not in kept:
                    count(string, q)

        # each that is read on, with every token after it
        logits = base(torch.tensor([[*front, *string] for string in kept]))[:, -1]
        strings = {}
        for (string, q), row in zip(kept.items(), logits.softmax(-1).tolist()):
            for i, x in enumerate(row):
                strings[(*string, i)] = q * x
    for string, q in strings.items():
        count(string, q)
    return (1 - FLOOR) * p / p.sum() + FLOOR / columns


@torch.inference_mode()
def lookahead(args: argparse.Namespace) -> list[dict]:
    """What a base whose tokens are shorter than the value model's would gain by reading several of
    its own ahead.

    Retention and the texts that the base reads per step. The base starts at its last boundary
    before the value token.
    """
    base, value = Spelling(Tokenizer(args.base)), Spelling(Tokenizer(args.value))
    counted, held = hold_out([text[:160] for text in read_texts(args.text) if "\n" not in text])
    held = held[: args.held]
    model = load(args.base)
    bos = base.tokenizer.encode("")
    report = []
    for depth in range(1, args.depth + 1):
        rows = count_strings(base, value, counted, depth)
        own = mapped = 0.0
        spelt = spell(base, value, held)
        for b, b_starts, v, v_starts in tqdm(
            spelt, f"{depth} ahead", len(held), leave=False, disable=None
        ):
            # nats of the base itself
            z = model(torch.tensor([[*bos, *b]]))[0].log_softmax(-1)  # (T, V)
            own -= sum(z[len(bos) - 1 + i, token].item() for i, token in enumerate(b))

            # nats of the mapped base, value token by value token
            for token, start in zip(v, v_starts.tolist()):
                front = [*bos, *(i for i, s in zip(b, b_starts.tolist()) if s < start)]
                p = next_token(model, front, rows, len(value.bytes), depth, args.width)
                mapped -= p[token].log().item()
        report.append(
            {
                "tokens ahead": depth,
                "texts read per step": 1 + args.width * (depth - 1),
                "retention": mapped / own,
            }
        )
    return report


# ---------------------------------------------------------------- the toy


def transfer(args: argparse.Namespace) -> list[dict]:
    """Family A's value model on the large base of each family: form and right, as in train.py's
    table.

    The maps are counted in documents of the world, such as the bases have read.
    """
    seed, other_seed = (read_json(at / "family.json", TABLE)["seed"] for at in (args.a, args.b))
    if seed != other_seed:
        raise InputError(
            f"{args.b}: was made with seed {other_seed}, but {args.a} with {seed}; they must "
            "share a world"
        )

    # the value model with both bases, what they are asked, and what their vocabularies are counted
    # in
    value, tokenizer = load(args.a / "value"), Tokenizer(args.a / "value")
    large = load(args.a / "large")
    base, other = load(args.b / "large"), Tokenizer(args.b / "large")
    questions = [chat.messages for chat in read_chats(args.a / "heldout.jsonl").chats]
    facts = [toy.fact_of(chat) for chat in questions]
    world, rng = toy.World.make(seed), random.Random(seed + 2)
    counted, held = hold_out([world.document(rng, world.pairs) for _ in range(DOCUMENTS)])

    rows = [
        {
            "base": "same vocabulary",
            "map": "none",
            "knows": toy.knows(large, tokenizer, facts),
            **toy.score(large, [value], tokenizer, questions),
        }
    ]
    for method in METHODS:
        mapping = VocabMap.make(other, tokenizer, counted, method)
        rows.append(
            {
                "base": "another vocabulary",
                "map": METHODS[method],
                "knows": toy.knows(base, other, facts),
                **toy.score(Mapped(base, mapping), [value], tokenizer, questions),
                "overlap": overlap(mapping, held)[0],
                "retention": retention(base, mapping, held),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="what")
    for name, measure, summary in (
        ("overlap", overlaps, "overlap by kind of text"),
        ("steps", steps, "retention, step by step"),
        ("lookahead", lookahead, "retention if the base looks tokens ahead"),
        ("toy", transfer, "the toy's value model on a base with another tokenizer"),
    ):
        sub = commands.add_parser(name, help=summary)
        sub.set_defaults(measure=measure)
        sub.add_argument("--json", help="where the rows go, as JSON")
        if name == "toy":
            sub.add_argument(
                "--a", type=Path, default=toy.OUT, help=f"family A with its value model ({toy.OUT})"
            )
            sub.add_argument(
                "--b", type=Path, default=f"{toy.OUT}_b", help=f"family B ({toy.OUT}_b)"
            )
            continue
        sub.add_argument("--base", required=True, help="directory of the base")
        sub.add_argument(
            "--value", required=True, help="directory of the value model, or of its tokenizer"
        )
        sub.add_argument(
            "--text",
            required=True,
            nargs="+" if name == "overlap" else None,
            help="texts, held-out ones included",
        )
        if name != "lookahead":
            sub.add_argument(
                "--few", type=int, default=200, help="texts of a file that Algorithm 1 sees (200)"
            )
        if name != "overlap":
            sub.add_argument(
                "--held",
                type=int,
                default=24,
                help="held-out texts that models are asked about (24)",
            )
        if name == "lookahead":
            sub.add_argument(
                "--depth", type=int, default=3, help="how far ahead, in tokens of the base (3)"
            )
            sub.add_argument(
                "--width", type=int, default=8, help="strings that are read on at each length (8)"
            )
    args = parser.parse_args()
    rows = args.measure(args)

    # a table, its columns as wide as they need be
    names = list(rows[-1])
    table = [names]
    for row in rows:
        cells = [row.get(name, "") for name in names]
        table.append([f"{x:.3f}" if isinstance(x, float) else str(x) for x in cells])
    widths = [max(map(len, column)) for column in zip(*table)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    if args.json:
        write_text(args.json, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    command(main)
