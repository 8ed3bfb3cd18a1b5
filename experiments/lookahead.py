"""What it would bring, and cost, to let the base look several of its own tokens ahead.

    python experiments/lookahead.py --base DIR --value DIR --text FILE

Where value tokens are longer than the base's, the map knows only the first base token of the next value token. Here the
base goes on: the `width` likeliest continuations of each length up to `depth` are read as well, and W's rows are counted
for strings of base tokens instead of one. Prints retention (see mapped.py) and how many texts the base reads per step.
"""

import argparse
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import Tokenizer
from files import command, read_texts
from mapped import MappedBase
from model import Llama, load
from spelling import Spelling, spell


def count_strings(base: Spelling, value: Spelling, texts: list[str], depth: int) -> dict[tuple[int, ...], Counter]:
    """rows[string of up to `depth` base ids][v]: how often value token v begins where the string begins."""
    rows: dict[tuple[int, ...], Counter] = defaultdict(Counter)
    for text in texts:
        b, b_starts, v, v_starts = spell(base, value, text)
        at = {start: i for i, start in reversed(list(enumerate(b_starts.tolist())))}
        for token, start in zip(v, v_starts.tolist()):
            if start in at:
                for n in range(1, depth + 1):
                    rows[tuple(b[at[start]:at[start] + n])][token] += 1
    return rows


def next_token(base: Llama, front: list[int], rows: dict[tuple[int, ...], Counter], columns: int, depth: int,
               width: int) -> torch.Tensor:
    """Mapped probabilities of the next value token after the base ids `front`, (V_value,)."""
    p = torch.zeros(columns)
    strings = {(): 1.0}
    for ahead in range(1, depth + 1):
        kept = dict(sorted(strings.items(), key=lambda entry: -entry[1])[:width])
        ends = [] if ahead == 1 else [entry for entry in strings.items() if entry[0] not in kept]
        logits = base(torch.tensor([[*front, *string] for string in kept]))[:, -1]
        strings = {(*string, i): q * x for (string, q), row in zip(kept.items(), logits.softmax(-1).tolist())
                   for i, x in enumerate(row)}
        for string, q in [*ends, *(strings.items() if ahead == depth else [])]:
            row = next((rows[string[:n]] for n in range(len(string), 0, -1) if string[:n] in rows), None)
            if row:
                total = sum(row.values())
                for v, n in row.items():
                    p[v] += q * n / total
    return (1 - MappedBase.FLOOR) * p / p.sum() + MappedBase.FLOOR / columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "value", "text"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--width", type=int, default=8, help="continuations that the base reads at each length (8)")
    args = parser.parse_args()
    base, value = Spelling(Tokenizer(args.base)), Spelling(Tokenizer(args.value))
    texts = [text[:160] for text in read_texts(args.text) if "\n" not in text]
    held, texts = texts[::400], [text for i, text in enumerate(texts) if i % 400]
    model = load(args.base)
    bos = base.tokenizer.encode("")
    with torch.inference_mode():
        for depth in range(1, 4):
            rows, own, mapped = count_strings(base, value, texts, depth), 0.0, 0.0
            for text in held:
                b, b_starts, v, v_starts = spell(base, value, text)
                z = model(torch.tensor([[*bos, *b]]))[0].log_softmax(-1)
                own -= sum(z[len(bos) - 1 + i, token].item() for i, token in enumerate(b))
                for token, start in zip(v, v_starts.tolist()):
                    front = [*bos, *(i for i, s in zip(b, b_starts.tolist()) if s < start)]
                    mapped -= next_token(model, front, rows, len(value.bytes), depth, args.width)[token].log().item()
            print(f"{depth} ahead: retention {mapped / own:.3f}, {1 + args.width * (depth - 1)} texts read per step", flush=True)


if __name__ == "__main__":
    command(main)
