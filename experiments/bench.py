"""Speed against peers, measured side by side on this machine.

    python experiments/bench.py vocab-map --base DIR --value DIR --text FILE    # byte alignment against Algorithm 1

Each line is one comparison: ours, the peer, and how many times faster ours is. --json FILE writes the same.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import vocab_map
from data import Tokenizer
from files import command, read_texts, write_text
from spelling import Spelling


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def bench_vocab_map(args: argparse.Namespace) -> list[dict]:
    """Texts per second of counting. The peer is the paper's approach: DTW over token strings, in Python.

    The peer sees the first texts only, as many as --peer_texts; both work on one core.
    """
    sides = [Spelling(Tokenizer(directory)) for directory in (args.base, args.value)]
    texts = read_texts(args.text)
    few = texts[:args.peer_texts]
    same, ours, peer = (seconds(lambda: count(*sides, some)) for count, some in (
        (vocab_map.count_aligned, few), (vocab_map.count_aligned, texts), (vocab_map.count_warped, few)))
    return [{"name": f"vocab-map, texts/s on the same {len(few)} texts", "ours": len(few) / same, "peer": len(few) / peer,
             "ratio": peer / same},
            {"name": f"vocab-map, texts/s on all {len(texts)} texts", "ours": len(texts) / ours, "peer": len(few) / peer,
             "ratio": len(texts) / ours / (len(few) / peer)}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="where the rows go, as JSON")
    commands = parser.add_subparsers(required=True, metavar="what")
    vocab = commands.add_parser("vocab-map", help="byte alignment against DTW over token strings")
    vocab.add_argument("--base", required=True, help="directory of the base's tokenizer")
    vocab.add_argument("--value", required=True, help="directory of the value model's tokenizer")
    vocab.add_argument("--text", required=True, help="texts to count in")
    vocab.add_argument("--peer_texts", type=int, default=50, help="texts that the slow peer sees (50)")
    vocab.set_defaults(bench=bench_vocab_map)
    args = parser.parse_args()
    rows = args.bench(args)
    for row in rows:
        print(f"{row['name']:45} ours {row['ours']:9.1f}   peer {row['peer']:9.2f}   ratio {row['ratio']:7.1f}")
    if args.json:
        write_text(args.json, json.dumps({"machine": platform.platform(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    command(main)
