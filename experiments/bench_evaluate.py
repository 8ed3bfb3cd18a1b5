"""What extras/evaluate.py measures, beside lm-evaluation-harness's own Hugging Face model.

    pip install -r requirements-evaluate.txt "lm_eval[hf]"
    python experiments/bench_evaluate.py --base DIR --data FILES                # one model
    python experiments/bench_evaluate.py --base DIR --value DIR --data FILES    # a pair
    python experiments/bench_evaluate.py --random DIR --pair --data FILES       # random Llamas

Item by item: the largest difference of a log-likelihood, in nats; how many replies are the same
text; and how long each took. A pair stands beside the sum of two transformers models' logits, which
read the whole text again for each token of a reply; its time is compared with that of the harness's
model for the base alone. --random: Llamas of random weights with the tokenizer of DIR and a context
of 4096 tokens, in which the examples of MMLU fit.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
import sample
from extras import harness
from extras.evaluate import Examinee
from model import Config, Llama
from plumbing.files import InputError, Parser, command, model_directory, whole
from plumbing.tokenizer import Tokenizer
from plumbing.weights import save

TASKS = (
    "ifeval gsm8k humaneval truthfulqa_mc2 mmlu_astronomy mmlu_global_facts "
    "mmlu_high_school_geography mmlu_marketing mmlu_philosophy"
).split()
SHOTS = {"gsm8k": 0}  # its examples are another file


def requests_of(name: str, data: Path, limit: int, most: int) -> tuple[str, list]:
    """The harness's requests for the first questions of a task, and their kind."""
    shots = 5 if name.startswith("mmlu_") else SHOTS.get(name)
    (task,) = harness.load_task(name, shots, data)["tasks"].values()
    if task.OUTPUT_TYPE == "generate_until":
        how = {**task.config.generation_kwargs, "max_gen_toks": most}
        task.set_config(key="generation_kwargs", value=how)
    if shots is None:
        task.set_config(key="num_fewshot", value=task.config.num_fewshot or 0)
    task.set_fewshot_seed(1234)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    return task.instances[0].request_type, task.instances


def transformers_model(base: str, batch_size: int, context: int, kind: type = HFLM) -> HFLM:
    """The harness's own model, with a tokenizer that knows its special tokens, as we export it.

    context: of the pair, the shorter one's.
    """
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer(base).save(Path(folder))
        tokenizer = AutoTokenizer.from_pretrained(folder)
    options = dict(dtype="float32", device="cpu", max_length=context)
    return kind(pretrained=base, tokenizer=tokenizer, batch_size=batch_size, **options)


class NaivePair(HFLM):
    """The same with the logits of two models added, and nothing kept from token to token."""

    second: torch.nn.Module

    def _model_call(self, inps, **_):
        with torch.no_grad():
            return self.model(inps).logits + self.second(inps).logits

    def _model_generate(self, context, max_length, stop, attention_mask, **_):
        rows = []
        for row, mask in zip(context, attention_mask):
            ids = row[mask.bool()][None]
            new = []
            while len(row) + len(new) < max_length and new[-1:] != [self.eot_token_id]:
                new.append(self._model_call(ids)[0, -1].argmax().item())
                ids = torch.cat([ids, torch.tensor([new[-1:]])], 1)
                if any(text in self.tok_decode(new) for text in stop):
                    break
            rows.append(row.tolist() + new)
        longest = max(map(len, rows))
        return torch.tensor([row + [self.eot_token_id] * (longest - len(row)) for row in rows])


def random_model(tokenizer: str, folder: Path, seed: int) -> str:
    """The directory of a Llama of 3 million parameters and its embedding, 256 numbers a token."""
    tokens = Tokenizer(tokenizer)
    shape = dict(hidden_size=256, intermediate_size=688, num_hidden_layers=4, head_dim=32)
    heads = dict(num_attention_heads=8, num_key_value_heads=8)
    special = dict(bos_token_id=tokens.bos, eos_token_id=tokens.eos, tie_word_embeddings=True)
    config = Config(
        vocab_size=len(tokens.tokens), max_position_embeddings=4096, **shape, **heads, **special
    )
    folder.mkdir()
    save(Llama(config).init_weights(seed), folder)
    tokens.save(folder)
    return str(folder)


def timed(model, kind: str, requests: list) -> tuple[list, float]:
    start = time.perf_counter()
    answers = getattr(model, kind)(requests)
    return answers, time.perf_counter() - start


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", type=model_directory)
    add("--random", metavar="DIR", type=model_directory, help="instead: whose tokenizer")
    add("--pair", action="store_true", help="with --random: a value model, too")
    add("--value", default="none")
    add("--data", required=True, help="local files, see extras/evaluate.py")
    add("--tasks", nargs="+", default=TASKS)
    add("--limit", type=whole(1, 10**6), default=50, help="questions of each task (50)")
    add("--batch_size", type=whole(1, 10**6), default=16)
    add("--most", type=whole(1, 10**6), default=64, help="new tokens of a reply (64)")
    args = parser.parse_args()
    if bool(args.base) == bool(args.random):
        raise InputError("give --base, or --random")
    with tempfile.TemporaryDirectory() as folder:
        if args.random:
            args.base = random_model(args.random, Path(folder) / "base", 0)
        if args.pair:
            args.value = random_model(args.random, Path(folder) / "value", 1)
        compare(args)


def compare(args: argparse.Namespace) -> None:
    speaker = Examinee(sample.arguments(["--base", args.base, "--value", args.value]))
    speed = transformers_model(args.base, args.batch_size, speaker.context)
    reference = speed
    if args.value != "none":
        reference = transformers_model(args.base, args.batch_size, speaker.context, NaivePair)
        second = AutoModelForCausalLM.from_pretrained(args.value, dtype=torch.float32)
        reference.second = second.eval()

    print(f"{'task':<28}{'items':>6}{'largest difference':>20}{'the same':>10}", end="")
    print(f"{'items/s':>9}{'harness':>9}{'ratio':>7}")
    for name in args.tasks:
        kind, requests = requests_of(name, Path(args.data), args.limit, args.most)
        theirs, _ = timed(reference, kind, requests)
        # each twice, in turns, the faster counts: the first time is a warm-up
        seconds = {"ours": [], "harness": []}
        for _ in range(2):
            with tempfile.TemporaryDirectory() as folder:
                answers = harness.Answers(Path(folder) / "answers.jsonl", {})
                pair = harness.Pair(speaker, answers, args.batch_size, args.most)
                ours, taken = timed(pair, kind, requests)
            seconds["ours"].append(taken)
            seconds["harness"].append(timed(speed, kind, requests)[1])
        least = {side: min(times) for side, times in seconds.items()}

        difference = "-"
        same = sum(a == b for a, b in zip(ours, theirs))
        if kind == "loglikelihood":
            difference = f"{max(abs(a[0] - b[0]) for a, b in zip(ours, theirs)):.1e}"
            same = sum(a[1] == b[1] for a, b in zip(ours, theirs))
        if len(ours) != len(theirs):
            raise InputError(f"{name}: {len(ours)} answers, and {len(theirs)}")
        rate = {side: len(requests) / taken for side, taken in least.items()}
        print(f"{name:<28}{len(requests):>6}{difference:>20}{same:>10}", end="")
        print(f"{rate['ours']:>9.1f}{rate['harness']:>9.1f}{rate['ours'] / rate['harness']:>7.2f}")
        sys.stdout.flush()


if __name__ == "__main__":
    command(main)
