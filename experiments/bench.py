"""Speed against peers, measured side by side on this machine.

    python experiments/bench.py decode           # on a CPU toys, then 58M + 24M; on a GPU 7B + 1.1B
    python experiments/bench.py decode --shape llama-2-13b tinyllama-1.1b --tokens 128 512 1024
    python experiments/bench.py loss --shape llama-3-8b llama-3.2-1b --tokens 16384 --peers eager
    python experiments/bench.py train-step --shape tinyllama-1.1b tinyllama-1.1b --compile
    python experiments/bench.py kernels          # how many a step of decoding launches
    python experiments/bench.py speculative --base DIR --draft SMALL --value DIR --prompts FILE
    python experiments/bench.py vocab-map --base DIR --value DIR --text FILE
    python experiments/bench.py gpu              # on a GPU: all that is to be measured there
    python experiments/bench.py plan --base llama-2-70b --value tinyllama-1.1b --gpus 4 --gpu h100

A line is one comparison: ours, the peer, and the ratio, which is above 1 where ours is better.
Models have a published shape and random weights, the same on both sides. After a warm-up the two
sides take turns, and the medians are compared. A line is printed as soon as it is measured, and
--json FILE has what there is until then. --peers chooses among the comparisons. `plan` measures
nothing. On a CPU the number of threads is that of OMP_NUM_THREADS.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import vocab_map
from experiments import bench_gpu, bench_speculative, plan
from experiments.bench_measure import (
    Kernel,
    Measured,
    by_time,
    copy_bandwidth,
    machine,
    measure,
    seconds,
)
from experiments.bench_sides import (
    SHAPES,
    agreement,
    bytes_per_token,
    check_pair,
    config_of,
    decode_variants,
    decoder,
    loss_variants,
    peak_rate,
    profiled,
    random_llama,
    random_pair,
    step_flop,
    step_variants,
)
from plumbing.files import InputError, command, pick_device, pick_dtype, read_texts, write_text
from plumbing.tokenizer import Tokenizer
from vocab_map import Spelling


@dataclass(frozen=True)
class Comparison:
    key: str  # for --peers
    ours: str  # which variants are compared
    peer: str
    name: str


COMPARISONS = {
    "decode": [
        Comparison("alone", "both", "base", "ours base+value / ours base alone"),
        Comparison("base", "base", "their base", "ours base alone / transformers base alone"),
        Comparison(
            "transformers", "both", "their base", "ours base+value / transformers base alone"
        ),
        Comparison(
            "pair", "both", "their pair", "ours base+value / two cached transformers models"
        ),
        Comparison(
            "uncached",
            "both",
            "uncached",
            "ours base+value / two transformers models, caches off",
        ),
        Comparison("int8", "int8", "both", "ours with an int8 base / ours base+value"),
    ],
    "loss": [
        Comparison("eager", "two-headed", "eager", "two-headed loss / eager"),
        Comparison("compiled", "two-headed", "compiled", "two-headed loss / compiled eager"),
        Comparison(
            "library",
            "two-headed",
            "library",
            "two-headed loss / F.linear_cross_entropy (no norm term, base gradient too)",
        ),
    ],
    "train-step": [
        Comparison("eager", "ours", "eager", "training step, ours / ours with the eager loss"),
        Comparison(
            "transformers",
            "ours",
            "transformers",
            "training step, ours / two transformers models, logits added",
        ),
        Comparison("int8", "int8", "ours", "training step, ours with an int8 base / ours"),
        Comparison("compiled", "compiled", "ours", "training step, ours compiled / ours"),
    ],
}
SLOW = ("pair", "uncached")  # on a GPU at the shortest length only, unless --peers names them
# what each bench takes where the command line says nothing: pairs of base and value, tokens, peers
DEFAULTS = {
    "decode": {
        "cpu": (
            [("toy-large", "toy-small"), ("58m", "24m")],
            [256],
            ["alone", "base", "transformers", "pair", "uncached", "int8"],
        ),
        "cuda": (
            [("llama-2-7b", "tinyllama-1.1b")],
            [128, 512, 1024],
            ["alone", "base", "transformers", "pair", "uncached", "int8"],
        ),
    },
    "loss": {
        "cpu": ([("58m", "24m")], [1024], ["eager", "library"]),
        "cuda": (
            [("tinyllama-1.1b", "tinyllama-1.1b"), ("llama-3-8b", "llama-3.2-1b")],
            [16384],
            ["eager", "compiled", "library"],
        ),
    },
    "train-step": {
        "cpu": (
            [("toy-large", "toy-small"), ("58m", "24m")],
            [512],
            ["eager", "transformers", "int8"],
        ),
        "cuda": ([("tinyllama-1.1b", "tinyllama-1.1b")], [4096], ["eager", "transformers", "int8"]),
    },
    "kernels": {
        "cpu": ([("toy-large", "toy-small")], None, None),
        "cuda": ([("llama-2-7b", "tinyllama-1.1b")], None, None),
    },
}
STEPS = 20  # of decoding, whose kernels are counted


# ---------------------------------------------------------------- rows


class Rows:
    """Prints rows, a block for each shape and length, and writes what there is to a file. Of a
    comparison's rows only the first says its name."""

    def __init__(self, device: torch.device, file: str | None, wide: int):
        self.machine = machine(device)
        self.file = file
        self.wide = wide
        self.rows: list[dict] = []
        self.block = None
        self.write()  # a folder that cannot be written is found out now

    def write(self) -> None:
        if self.file:
            whole = {"machine": self.machine, "rows": self.rows}
            write_text(self.file, json.dumps(whole, indent=2) + "\n")

    def add(self, comparison: list[dict]) -> None:
        first = comparison[0]
        block = first["shape"], first["tokens"]
        if block != self.block:
            title = first["shape"]
            if first["tokens"]:
                title += f", {first['tokens']} tokens"
            print(f"\n{title:{self.wide}}{'ours':>12}{'peer':>12}{'ratio':>18}")
            self.block = block
        for row in comparison:
            notes = []
            if "share" in row:
                notes.append(f"{row['share']:.0%} of {row['limit']}")
            if row.get("agreement") not in (None, 1):
                notes.append(f"the first {row['agreement']:.0%} of the tokens agree")
            if "note" in row:
                notes.append(row["note"])
            name = row["name"] if row is first else ""
            line = (
                f"{name:{self.wide}}{row['ours']:12.1f}{row['peer']:12.1f} {row['unit']:9}"
                f"{row['ratio']:8.2f}  {'; '.join(notes)}"
            )
            print(line.rstrip(), flush=True)
        self.rows += comparison
        self.write()


def compare(
    name: str, shape: str, tokens: int, ours: Measured, peer: Measured, **more
) -> list[dict]:
    """Two rows: tokens per second, peak memory in MB (10^6 bytes)."""
    common = {"name": name, "shape": shape, "tokens": tokens}
    speed = {
        "unit": "tokens/s",
        "ours": tokens / ours.seconds,
        "peer": tokens / peer.seconds,
        "ratio": peer.seconds / ours.seconds,
    }
    memory = {
        "unit": "MB",
        "ours": ours.bytes / 1e6,
        "peer": peer.bytes / 1e6,
        "ratio": peer.bytes / ours.bytes,
    }
    return [common | speed | more, common | memory]


def compared(
    comparisons: list[Comparison],
    variants: dict[str, Callable],
    args: argparse.Namespace,
    weights: Callable[[str], int] = lambda side: 0,
) -> Iterator[tuple[Comparison, dict[str, Measured]]]:
    """Measures all variants, each once however many comparisons it is in; gives a comparison as
    soon as its two sides are measured, with all that is measured by then.

    weights: what a variant takes besides, in bytes."""
    got = {}
    left = list(comparisons)
    for name, measured in measure(variants, args.repeats, args.device):
        measured.bytes += weights(name)
        got[name] = measured
        for comparison in list(left):
            if comparison.ours in got and comparison.peer in got:
                left.remove(comparison)
                yield comparison, got


def sides(comparisons: list[Comparison]) -> set[str]:
    """The variants that are in any of the comparisons."""
    found = set()
    for comparison in comparisons:
        found |= {comparison.ours, comparison.peer}
    return found


# ---------------------------------------------------------------- decoding


def bench_decode(
    shapes: list[tuple[str, str]],
    lengths: list[int],
    comparisons: list[Comparison],
    args: argparse.Namespace,
) -> Iterator[list[dict]]:
    """Greedy decoding of one sequence, with the reading of a short prompt. Memory: weights, caches
    and all the rest."""
    bandwidth = copy_bandwidth(args.device)
    for names in shapes:
        pair = random_pair(names, args.device, sides(comparisons))
        if args.compile:
            pair.base.hidden = torch.compile(pair.base.hidden, dynamic=True)
            pair.value.hidden = torch.compile(pair.value.hidden, dynamic=True)

        table = {}
        for tokens in lengths:
            chosen = comparisons
            if args.device.type == "cuda" and args.peers is None and tokens > min(lengths):
                chosen = [comparison for comparison in comparisons if comparison.key not in SLOW]
            variants = decode_variants(pair, tokens, sides(chosen) | {"value"})
            for comparison, got in compared(chosen, variants, args, pair.weights):
                mine, peer = got[comparison.ours], got[comparison.peer]
                table[tokens] = got

                # the tokens are the same where both sides read the same models
                alike = None
                if pair.members(comparison.ours) == pair.members(comparison.peer):
                    alike = agreement(mine.result, peer.result)
                read = bytes_per_token(*pair.members(comparison.ours)) * tokens
                yield compare(
                    comparison.name,
                    " + ".join(names),
                    tokens,
                    mine,
                    peer,
                    share=read / mine.seconds / bandwidth,
                    limit=f"copy bandwidth, {bandwidth / 1e9:.1f} GB/s",
                    agreement=alike,
                )
        print_times(table, *names)


def print_times(table: dict[int, dict[str, Measured]], base: str, value: str) -> None:
    """Time and peak memory in the form of the paper's Table 3."""
    lengths = "".join(f"{f'{tokens} tokens':>22}" for tokens in table)
    print(f"\n{'ours: time / peak memory':<32}{lengths}")
    names = {"value": value, "base": base, "both": f"{value} + {base}"}
    for side, name in names.items():
        cells = []
        for got in table.values():
            cell = "–"
            if side in got:
                cell = f"{got[side].seconds:.2f}s / {got[side].bytes / 1e9:.2f}GB"
            cells.append(f"{cell:>22}")
        print(f"{name:<32}{''.join(cells)}", flush=True)


# ---------------------------------------------------------------- the kernels of a step


def bench_kernels(
    shapes: list[tuple[str, str]],
    lengths: None,
    comparisons: None,
    args: argparse.Namespace,
) -> Iterator[list[dict]]:
    """How many kernels a step of decoding launches; on a CPU, how many aten operations compute
    something."""
    for names in shapes:
        pair = random_pair(names, args.device, set())
        counts = {}
        for side in ("both", "base", "value"):
            first, *second = pair.members(side)
            decode = decoder(first, *second)
            found = profiled(decode, STEPS, args.device)
            counts[side] = len(found) / STEPS
            if side == "both":
                whole = found
        for peer in ("base", "value"):
            row = {
                "name": f"kernels per step, ours base+value / ours {peer} alone",
                "shape": " + ".join(names),
                "tokens": None,
                "unit": "kernels",
                "ours": counts["both"],
                "peer": counts[peer],
                "ratio": counts[peer] / counts["both"],
            }
            yield [row]
        print_kernels(whole, STEPS)


def print_kernels(found: list[Kernel], steps: int) -> None:
    """What most of the time of a step goes to."""
    total = sum(kernel.end - kernel.start for kernel in found)
    print(f"\n{'base+value, per step':<68}{'number':>8}{'share':>8}")
    for name, number, time in by_time(found, 12):
        print(f"{name[:66]:<68}{number / steps:8.1f}{time / total:8.1%}")


# ---------------------------------------------------------------- the loss


def bench_loss(
    shapes: list[tuple[str, str]],
    lengths: list[int],
    comparisons: list[Comparison],
    args: argparse.Namespace,
) -> Iterator[list[dict]]:
    """Forward and backward of cross-entropy and norm term. Memory: on top of hidden states and
    unembeddings; with, and without the two gradients that any method returns."""
    for names in shapes:
        configs = [config_of(name) for name in names]
        for tokens in lengths:
            model = plan.loss(*configs, tokens, args.device.type)
            gradients = model["dh"] + model["dW"]
            variants = loss_variants(*configs, tokens, args.device, sides(comparisons))
            for comparison, got in compared(comparisons, variants, args):
                mine, peer = got[comparison.ours], got[comparison.peer]
                rows = compare(comparison.name, " + ".join(names), tokens, mine, peer)
                beyond = {
                    "unit": "MB beyond",
                    "ours": (mine.bytes - gradients) / 1e6,
                    "peer": (peer.bytes - gradients) / 1e6,
                    "ratio": (peer.bytes - gradients) / (mine.bytes - gradients),
                    "model": model,
                }
                yield [*rows, rows[1] | beyond]
            print_memory(model, got["two-headed"].bytes)


def print_memory(model: dict[str, int], measured: int) -> None:
    """The two-headed loss's memory by tensor, as `plan.loss` has it, and as it was measured."""
    gradients = model["dh"] + model["dW"]
    total = sum(model.values())
    print(f"\n{'two-headed loss: MB at the peak':<46}{'model':>10}{'measured':>10}")
    for name, size in model.items():
        print(f"  {name:<44}{size / 1e6:10.2f}")
    print(f"  {'all':<44}{total / 1e6:10.2f}{measured / 1e6:10.2f}")
    print(
        f"  {'beyond dh and dW, which any method returns':<44}{(total - gradients) / 1e6:10.2f}"
        f"{(measured - gradients) / 1e6:10.2f}",
        flush=True,
    )


# ---------------------------------------------------------------- one training step


def bench_train_step(
    shapes: list[tuple[str, str]],
    lengths: list[int],
    comparisons: list[Comparison],
    args: argparse.Namespace,
) -> Iterator[list[dict]]:
    """One step of training on one sequence. Memory: on top of weights and optimizer. Share: model
    FLOP utilisation."""
    device = args.device
    dtype = pick_dtype("auto", device)
    rate, limit = peak_rate(device)
    for names in shapes:
        for tokens in lengths:
            base = random_llama(names[0], device, dtype, 0).requires_grad_(False)
            value = random_llama(names[1], device, torch.float32, 1)
            variants = step_variants(base, value, tokens, sides(comparisons))
            for comparison, got in compared(comparisons, variants, args):
                mine, peer = got[comparison.ours], got[comparison.peer]
                share = step_flop(base, value, tokens) / mine.seconds / rate
                yield compare(
                    comparison.name,
                    " + ".join(names),
                    tokens,
                    mine,
                    peer,
                    share=share,
                    limit=limit,
                )


# ---------------------------------------------------------------- vocabularies


def bench_vocab_map(args: argparse.Namespace) -> Iterator[list[dict]]:
    """Texts per second of counting. The peer is the paper's approach: DTW over token strings, in
    Python.

    The peer sees the first texts only, as many as --peer_texts; both work on one core."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    spellings = [Spelling(Tokenizer(directory)) for directory in (args.base, args.value)]
    texts = read_texts(args.text)
    few = texts[: args.peer_texts]
    same = seconds(lambda: vocab_map.count_aligned(*spellings, few))
    mine = seconds(lambda: vocab_map.count_aligned(*spellings, texts))
    peer = seconds(lambda: vocab_map.count_warped(*spellings, few))
    names = "vocab-map, the same texts", "vocab-map, ours on all texts"
    for name, counted, time in zip(names, (few, texts), (same, mine)):
        speed, peer_speed = len(counted) / time, len(few) / peer
        row = {
            "name": name,
            "shape": f"{len(counted)} texts",
            "tokens": None,
            "unit": "texts/s",
            "ours": speed,
            "peer": peer_speed,
            "ratio": speed / peer_speed,
        }
        yield [row]


# ---------------------------------------------------------------- command line

BENCHES = {
    "decode": bench_decode,
    "loss": bench_loss,
    "train-step": bench_train_step,
    "kernels": bench_kernels,
}


def choose_peers(what: str, names: list[str] | None, default: list[str]) -> list[Comparison]:
    """The comparisons of a bench that --peers names, by their keys or their names."""
    known = {}
    for comparison in COMPARISONS[what]:
        known[comparison.key] = known[comparison.name] = comparison
    for name in names or ():
        if name not in known:
            keys = ", ".join(comparison.key for comparison in COMPARISONS[what])
            raise InputError(f"--peers {name}: is none of the comparisons {keys}")
        if known[name].key == "library" and not has_library():
            raise InputError(f"--peers {name}: torch {torch.__version__} does not have it")
    wanted = {known[name].key for name in names or default}
    if not has_library():
        wanted.discard("library")
    return [comparison for comparison in COMPARISONS[what] if comparison.key in wanted]


def has_library() -> bool:
    """Whether torch has this loss: from 2.13 on."""
    return hasattr(F, "linear_cross_entropy")


def add_arguments(what: str, sub: argparse.ArgumentParser) -> None:
    """The options of the benches that measure models."""
    taken = []
    for device in ("cpu", "cuda"):
        shapes, lengths, _ = DEFAULTS[what][device]
        text = ", ".join(" + ".join(pair) for pair in shapes)
        if lengths:
            text += f" at {', '.join(map(str, lengths))} tokens"
        taken.append(text)
    sub.add_argument(
        "--shape",
        nargs=2,
        action="append",
        metavar=("BASE", "VALUE"),
        help=f"may be repeated; of {', '.join(SHAPES)} (on a CPU {taken[0]}; on a GPU {taken[1]})",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sub.add_argument("--device", default=device, help="cpu, cuda, cuda:1")
    if what == "kernels":
        return
    sub.add_argument("--tokens", nargs="+", type=int, help="one or more lengths (see --shape)")
    sub.add_argument("--repeats", type=int, default=3, help="runs of which the median counts (3)")
    known = "; ".join(f"{comparison.key}: {comparison.name}" for comparison in COMPARISONS[what])
    on_cpu, on_gpu = (", ".join(DEFAULTS[what][device][2]) for device in ("cpu", "cuda"))
    slow = ""
    if what == "decode":
        slow = f"; there {' and '.join(SLOW)} at the shortest length only, unless named here"
    sub.add_argument(
        "--peers",
        nargs="+",
        metavar="PEER",
        help=f"of {known} (on a CPU {on_cpu}; on a GPU {on_gpu}{slow})",
    )
    if what == "decode":
        sub.add_argument(
            "--compile", action="store_true", help="compile our models, as sample.py does"
        )
    if what == "train-step":
        sub.add_argument(
            "--compile", action="store_true", help="ours with compiled blocks too, as train.py"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="what", dest="what")
    for what, bench in BENCHES.items():
        first = bench.__doc__.split(".")[0]
        add_arguments(what, commands.add_parser(what, help=first, description=bench.__doc__))
    sub = commands.add_parser("vocab-map", help="byte alignment against DTW over token strings")
    sub.add_argument("--base", required=True, help="directory of the base's tokenizer")
    sub.add_argument("--value", required=True, help="directory of the value model's tokenizer")
    sub.add_argument("--text", required=True, help="texts to count in")
    sub.add_argument("--peer_texts", type=int, default=50, help="texts for the slow peer (50)")
    sub.set_defaults(device="cpu")
    sub = commands.add_parser("speculative", help=bench_speculative.bench.__doc__)
    bench_speculative.add_arguments(sub)
    for sub in commands.choices.values():
        sub.add_argument("--json", help="file for the rows, as JSON, written row by row")
    bench_gpu.add_arguments(commands.add_parser("gpu", help="all that is to be measured on a GPU"))
    sub = commands.add_parser("plan", help="what a pair of models would need, see plan.py")
    plan.add_arguments(sub)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.what == "plan":
        return plan.plan(args)
    if args.what == "gpu":
        return bench_gpu.gpu(args)

    args.device = pick_device(args.device)
    if args.device.type not in ("cpu", "cuda"):
        raise InputError(f"--device {args.device}: only cpu and cuda can be measured")
    if args.what in ("vocab-map", "speculative"):
        bench = bench_vocab_map if args.what == "vocab-map" else bench_speculative.bench
        rows = Rows(args.device, args.json, 60)
        for row in bench(args):
            rows.add(row)
        return

    # what to measure
    shapes, lengths, peers = DEFAULTS[args.what][args.device.type]
    shapes = args.shape or shapes
    for base, value in shapes:
        check_pair(base, value)
    comparisons = None
    if args.what != "kernels":
        lengths = args.tokens or lengths
        if min(args.repeats, *lengths) < 1:
            raise InputError("--tokens and --repeats must be at least 1")
        comparisons = choose_peers(args.what, args.peers, peers)
        added = COMPARISONS["train-step"][-1]
        if args.what == "train-step" and args.compile and added not in comparisons:
            comparisons.append(added)

    print(machine(args.device))
    wide = 60
    if comparisons:
        wide = max(len(comparison.name) for comparison in comparisons)
    rows = Rows(args.device, args.json, wide)
    for comparison in BENCHES[args.what](shapes, lengths, comparisons, args):
        rows.add(comparison)


if __name__ == "__main__":
    command(main)
