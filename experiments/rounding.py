"""What a base in eight bits loses, see extras/int8.py.

    python experiments/rounding.py family                   # on the bases of reproduce.py
    python experiments/rounding.py models --base DIR... --text FILE

`family`: the loss of a base and of the same in eight bits, on texts that it has not read; and the
scores of a value model on the large base, trained beside the small one in float32 or in int8 and
plugged into the large one in float32 or in int8. Each seed has a family and trainings of its own,
kept in --out, where reproduce.py keeps its own.

`models`: the same loss on a text, the Kullback-Leibler divergence of the rounded base's next-token
probabilities from the base's, in nats, and after how many tokens greedy continuations part.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from experiments import family, reproduce
from experiments.reproduce import family_of, make_bases, spread, trained
from extras.int8 import rounded
from ivl import generate
from model import Llama
from plumbing.files import (
    LIST,
    SEED,
    InputError,
    Parser,
    command,
    model_directory,
    number,
    pick_device,
    read_json,
    read_text,
    whole,
    write_text,
)
from plumbing.tokenizer import Tokenizer
from plumbing.weights import load

SCORES = ("right", "form")
# a value model's recipe, see reproduce.py, and whether the large base is in eight bits
PAIRS = {
    "all float32": ("small", False),
    "trained beside int8": ("small int8", False),
    "plugged into int8": ("small", True),
    "both int8": ("small int8", True),
}
TEXTS = 100  # that losses are measured on
LENGTH = 200  # tokens of a piece of a text
PROMPT = 8  # tokens of it that are continued


# ---------------------------------------------------------------- two bases, one of them rounded


@torch.inference_mode()
def compared(base: Llama, twin: Llama, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Loss of a base and of its rounded twin, and KL(base ‖ twin), in nats per token."""
    loss, twin_loss, divergence, n = 0.0, 0.0, 0.0, 0
    for text in texts:
        ids = torch.tensor([text], device=base.unembed.device)
        log_p, log_q = (model(ids[:, :-1])[0].float().log_softmax(-1) for model in (base, twin))
        targets = ids[0, 1:, None]  # (T, 1)
        loss -= log_p.gather(-1, targets).sum().item()
        twin_loss -= log_q.gather(-1, targets).sum().item()
        divergence += kl(log_p, log_q).sum().item()
        n += len(targets)
    return {"loss": loss / n, "int8 loss": twin_loss / n, "KL": divergence / n}


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats.  (..., V) → (...)

    Example: ½ ln (½ / ¾) + ½ ln (½ / ¼) = ½ ln (4/3)
    >>> kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log())
    tensor(0.1438)
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def agreeing(base: Llama, twin: Llama, prompts: Sequence[Sequence[int]], most: int) -> list[int]:
    """After how many tokens the greedy continuations of each prompt part, at most so many."""
    said = [zip(*generate(model, [], prompts, most)) for model in (base, twin)]
    return [count_alike(*pair) for pair in zip(*said)]


def count_alike(a: Sequence[int], b: Sequence[int]) -> int:
    """Example:
    >>> count_alike([5, 6, 7, 8], [5, 6, 9, 8])
    2
    """
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b)))


# ---------------------------------------------------------------- what is measured


def of_seed(seed: int, scale: float, out: Path, device: torch.device) -> dict[str, float]:
    """All figures of one seed; what they need is made if it is not there."""
    folder = family_of(out, seed)
    make_bases(("small", "large"), folder, scale, seed, device)
    bases = {name: load(folder / name, device) for name in ("small", "large")}
    tokenizer = Tokenizer(folder / "small")
    figures = {}

    # the bases alone
    documents = read_json(folder / "documents.json", LIST)[:TEXTS]
    for name, base in bases.items():
        found = compared(base, rounded(base), [tokenizer.encode(text) for text in documents])
        figures[f"{name}: int8 loss / loss"] = found["int8 loss"] / found["loss"]
        figures[f"{name}: KL"] = found["KL"]

    # the value models on the large base
    for title, (recipe, in_eight_bits) in PAIRS.items():
        directory = trained(recipe, seed, out, device)
        base = rounded(bases["large"]) if in_eight_bits else bases["large"]
        scores = family.score(base, [load(directory, device)], tokenizer, folder, SCORES)
        figures |= {f"{title}: {name}": score for name, score in scores.items()}
    return figures


def of_models(directory: str, text: str, tokens: int, device: torch.device) -> dict:
    """The figures of a base on pieces of a text."""
    base, tokenizer = load(directory, device), Tokenizer(directory)
    ids = tokenizer.encode(text)
    length = min(LENGTH, base.config.max_position_embeddings)
    pieces = [ids[i : i + length] for i in range(0, len(ids) - length, length)][:TEXTS]
    if not pieces:
        raise InputError(
            f"--text is shorter than {length} tokens of {directory}; give a longer one"
        )
    twin = rounded(base)
    prompts = [piece[:PROMPT] for piece in pieces[:16]]
    most = min(tokens, length - PROMPT)
    alike = agreeing(base, twin, prompts, most)
    return {**compared(base, twin, pieces), "tokens": most, "agree": alike}


# ---------------------------------------------------------------- command line


def arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="what", dest="what")
    of_family = commands.add_parser("family", help="the family of reproduce.py")
    of_family.add_argument("--out", type=Path, default=reproduce.OUT)
    of_family.add_argument("--scale", type=number(1e-3, 16), default=1.0)
    of_family.add_argument("--seeds", type=whole(1, 1000), default=3, help="families (3)")
    of_family.add_argument("--first_seed", type=SEED, default=reproduce.SEEDS[0])
    models = commands.add_parser("models", help="models of yours")
    models.add_argument("--base", nargs="+", type=model_directory, required=True)
    models.add_argument("--text", required=True, help="a text file")
    models.add_argument(
        "--tokens", type=whole(1, 10**6), default=100, help="to continue with (100)"
    )
    for sub in commands.choices.values():
        sub.add_argument("--device", default="auto")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = pick_device(args.device)
    if args.what == "models":
        for directory in args.base:
            found = of_models(directory, read_text(args.text), args.tokens, device)
            agree, most = found["agree"], found["tokens"]
            print(
                f"{directory}: loss {found['loss']:.4f}, in int8 {found['int8 loss']:.4f}; KL "
                f"{found['KL']:.5f} nats; of {most} greedy tokens {sum(agree) / len(agree):.0f} "
                f"agree on average ({min(agree)} to {max(agree)}, {len(agree)} texts)"
            )
        return

    seeds = range(args.first_seed, args.first_seed + args.seeds)
    each = [of_seed(seed, args.scale, args.out, device) for seed in seeds]
    spreads = {name: spread([figures[name] for figures in each]) for name in each[0]}
    for name, figures in spreads.items():
        print("{:<40}{mean:.5f} ({least:.5f} to {most:.5f})".format(name, **figures))
    write_text(args.out / "rounding.json", json.dumps(spreads, indent=2) + "\n")


if __name__ == "__main__":
    command(main)
