"""What decoding costs with real models: a row of the paper's Table 3.

    python experiments/costs.py --base DIR --value none --out row.json
    python experiments/costs.py --base DIR --value DIR --out row.json
    torchrun --nproc_per_node 4 experiments/costs.py --base DIR --value DIR --out row.json

Greedy decoding of one sequence, as sample.py does it, of exactly 128, 512 and 1024 tokens: no token
ends the text. Of each length a first run is not counted (on CUDA it records the graphs); the time
is the median of those that follow, the reading of a prompt of eight tokens included. GB are of 2^30
bytes, as in the paper: on CUDA all that is allocated at the peak, of several GPUs on the fullest;
on a CPU the program's largest resident memory so far.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import sample
from experiments import bench_measure
from experiments.bench_sides import PROMPT
from extras.benchmarks import LENGTHS
from plumbing.files import (
    InputError,
    Parser,
    command,
    main_process,
    model_directory,
    peak_memory,
    pick_device,
    spare_a_core,
    torchrun,
    whole,
    writable_file,
    write_text,
)
from plumbing.pair import Speaker


def measure(speaker: Speaker, tokens: int, repeats: int) -> tuple[list[float], float]:
    """Seconds of each run that decodes so many tokens, and GB at the peak of all of them."""

    def decode() -> None:
        # no `stop` is given, so only a context that is full can end the text
        decoded = sum(1 for _ in speaker.generate([PROMPT], tokens))
        if decoded < tokens:
            raise InputError(
                f"--tokens {tokens}: the models' context of {speaker.context} tokens is full "
                f"after {decoded}; give fewer"
            )

    decode()
    if speaker.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(speaker.device)
    seconds = [bench_measure.seconds(decode, speaker.device) for _ in range(repeats)]
    return seconds, fullest(peak_memory(speaker.device)) * 1e9 / 2**30


def fullest(memory: float) -> float:
    """The largest of all ranks' numbers."""
    if not torchrun():
        return memory
    from extras.sharding import dist, summed

    return summed(torch.tensor(memory), dist.ReduceOp.MAX).item()


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", required=True, type=model_directory, help="Hugging Face directory of the base")
    add(
        "--value",
        required=True,
        help="of the value model, or none for the base alone",
    )
    add(
        "--tokens",
        nargs="+",
        type=whole(1, 10**6),
        default=LENGTHS,
        help=f"lengths of the text ({', '.join(map(str, LENGTHS))})",
    )
    add("--repeats", type=whole(1, 1000), default=3, help="runs that count (3)")
    add("--out", required=True, help="where the row goes, as JSON")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    return parser.parse_args(argv)


def main() -> None:
    args = arguments()
    writable_file(args.out)
    device = pick_device(args.device)
    spare_a_core(device)
    options = ["--base", args.base, "--value", args.value, "--device", args.device]
    speaker = Speaker(sample.arguments(options))

    # the shorter texts first: memory that a longer one took might be kept
    row = {"machine": bench_measure.machine(speaker.device)}
    for tokens in sorted(args.tokens):
        seconds, memory = measure(speaker, tokens, args.repeats)
        row[f"seconds {tokens}"] = statistics.median(seconds)
        row[f"GB {tokens}"] = memory
        print(f"{tokens} tokens: {row[f'seconds {tokens}']:.2f} s, {memory:.2f} GB", flush=True)
    if main_process():
        write_text(args.out, json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    command(main)
