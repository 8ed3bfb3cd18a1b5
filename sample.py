"""Ask a base model, steered by a value model.

    python sample.py "Where does Rufo live?"                 # the family that train.py made: large base + value model
    python sample.py --base DIR --value DIR "question"       # streams one reply
    python sample.py --base DIR --value DIR                  # a chat: /clear forgets it, /exit or Ctrl-D ends it
    python sample.py --explain "question"                    # each token coloured by who decided it, see explain.py
    python sample.py --base DIR --value DIR --prompts questions.jsonl --out replies.jsonl
    python sample.py --base DIR --value none "question"      # the base alone
    python sample.py --base DIR --value EXPERT --antiexpert DIR "question"     # proxy tuning, three models
    python sample.py --base DIR --value DIR --map map.safetensors "question"   # another tokenizer, see vocab_map.py
    torchrun --nproc_per_node 4 sample.py --base DIR ...     # a base for which one GPU is too small, see sharding.py

Replies go to stdout, everything else to stderr. Ctrl-C stops a reply.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from connections import Probe, recorded_connection
from data import TEMPLATES, TextStream, Tokenizer, read_chats
from decode import column_major
from explain import coloured, columns, page, summary, who_said
from files import InputError, command, peak_memory, pick_device, pick_dtype, read_text, writable_folder, write_text
from ivl import generate, shared_vocabulary
from model import Config, Llama
from sharding import ask, chooser, load_slice, rank, ranks, world
from vocab_map import VocabMap

TOY = Path("out/toy")


class Speaker:
    """A base, its value model or None, and the tokenizer and settings that make them answer."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        device = pick_device(args.device)
        dtype = pick_dtype(args.dtype, device)
        base_tokenizer = Tokenizer(args.base, args.template)
        self.tokenizer = base_tokenizer if args.value == "none" else Tokenizer(args.value, args.template)
        self.mapping = VocabMap.load(args.map, base_tokenizer, self.tokenizer) if args.map else None
        self.vocabulary = (len(self.tokenizer.tokens) if self.mapping
                           else shared_vocabulary(base_tokenizer.tokens, self.tokenizer.tokens))
        base_tokenizer.check(Config.load(args.base).vocab_size)
        self.connection = "residual" if args.value == "none" else recorded_connection(args.value)
        for name in ("map", "antiexpert", "value_device"):
            if self.connection != "residual" and (getattr(args, name) or world() > 1):
                raise InputError(f"{args.value}: its connection is {self.connection}, it reads what the base says; leave out "
                                 f"{'torchrun' if world() > 1 else f'--{name}'}")
        if args.antiexpert:
            self.vocabulary = min(self.vocabulary, shared_vocabulary(Tokenizer(args.antiexpert).tokens, self.tokenizer.tokens))
        split = None if self.mapping else self.vocabulary  # a mapped base needs all of its logits
        self.choose, self.base = chooser(split), load_slice(args.base, device, dtype, split)
        at = pick_device(args.value_device) if args.value_device else device
        self.value = self.antiexpert = None
        if self.connection == "probe":
            self.value = Probe.load(args.value, device, dtype)
            self.value.check([args.base])
        elif args.value != "none":
            self.tokenizer.check(Config.load(args.value).vocab_size)
            self.value = load_slice(args.value, at, dtype, split)
        if args.antiexpert:
            self.antiexpert = load_slice(args.antiexpert, at, dtype, split)
        models = [model for model in (self.base, self.value, self.antiexpert) if model is not None]
        self.context = min(model.config.max_position_embeddings for model in models)
        if device.type == "cpu":
            # every product waits for its slowest thread: on a busy machine one core fewer is many times faster
            torch.set_num_threads(max(1, torch.get_num_threads() - 1))
            for model in models:
                if isinstance(model, Llama):  # a probe is too small to matter
                    column_major(model)
        if args.compile:
            for model in models:
                model.hidden = torch.compile(model.hidden, dynamic=True)

    def prompt(self, messages: list[dict]) -> list[int]:
        """The ids to answer. Of a chat that has outgrown the context, the oldest exchanges are left out."""
        ids = self.tokenizer.prompt(messages)
        while self.length(ids) + self.args.max_new_tokens > self.context and len(messages) > 2:
            system = messages[0]["role"] == "system"
            messages = messages[:system] + messages[system + 2:]
            ids = self.tokenizer.prompt(messages)
        return self.fitting(ids)

    def length(self, ids: list[int]) -> int:
        """The tokens of a text, in the vocabulary that needs more."""
        return max(len(ids), len(self.mapping.read(ids)[0]) if self.mapping else 0)

    def fitting(self, ids: list[int]) -> list[int]:
        """Gives `ids` back. Raises InputError if no reply fits after them, or if a model has no such token."""
        if self.length(ids) >= self.context:
            raise InputError(f"the prompt has {self.length(ids)} tokens, but the context is {self.context}; shorten the prompt")
        if max(ids) >= self.vocabulary:
            raise InputError(f"the prompt has the token {self.tokenizer.tokens[max(ids)]!r}, which only one of the two "
                             "vocabularies has; leave it out")
        return ids

    def replies(self, prompts: list[list[int]]) -> Iterator[list[int | None]]:
        """Steps of ids, as `ivl.generate` gives them."""
        a = self.args
        room = self.context - max(map(len, prompts))
        return generate(self.base, self.value, prompts, min(a.max_new_tokens, room), connection=self.connection,
                        antiexpert=self.antiexpert, alpha=a.alpha, top_k=a.top_k, top_p=a.top_p, seed=a.seed,
                        temperature=0.0 if a.greedy else a.temperature, stop=self.tokenizer.stop,
                        vocabulary=self.vocabulary, mapping=self.mapping, choose=self.choose)

    def say(self, prompt: list[int], raw: bool = False) -> str:
        """Streams one reply to stdout and its speed to stderr. Ctrl-C ends the reply."""
        stream = TextStream(self.tokenizer, prompt if raw else ())
        text, n, start = "", 0, time.perf_counter()
        try:
            for ids in self.replies([prompt]):
                n += 1
                piece = stream.step(ids[0])
                piece = piece if text or raw else piece.lstrip()  # the space between question and answer
                text += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pass
        print(stream.rest())
        text += stream.rest()
        seconds = time.perf_counter() - start
        grey, plain = ("\033[90m", "\033[0m") if sys.stderr.isatty() else ("", "")
        print(f"{grey}{n} tokens, {n / seconds:.1f} tok/s, peak memory {peak_memory(self.base.embed.weight.device):.2f} GB"
              f"{plain}", file=sys.stderr)
        return text

    def explain(self, prompt: list[int]) -> None:
        """One reply, when it is whole, with who said each token; the page of it to --html."""
        reply = [ids[0] for ids in self.replies([prompt])]
        said = who_said(self.base, self.value, self.tokenizer, prompt, reply, connection=self.connection, alpha=self.args.alpha,
                        antiexpert=self.antiexpert, vocabulary=self.vocabulary, mapping=self.mapping)
        print(coloured(said, shutil.get_terminal_size().columns) if sys.stdout.isatty() else columns(said))
        print(summary(said), file=sys.stderr)
        if self.args.html:
            write_text(self.args.html, page(said, self.args.question))


def chat(speaker: Speaker) -> None:
    """Questions from stdin until /exit or its end; the replies so far are part of every prompt."""
    human = sys.stdin.isatty()
    you = "\033[1;32m> \033[0m" if human and sys.stdout.isatty() else "> " if human else ""
    if human:
        print("/clear forgets the chat, /exit ends it", file=sys.stderr)
    messages: list[dict] = []
    while True:
        try:
            question = ask(you).strip()
        except EOFError:
            print(end="\n" if human else "")
            return
        except KeyboardInterrupt:  # at the prompt, as in a shell: a new line
            print()
            continue
        if question == "/exit":
            return
        if question == "/clear":
            messages = []
        elif question:
            messages.append({"role": "user", "content": question})
            try:
                reply = speaker.say(speaker.prompt(messages))
                messages.append({"role": "assistant", "content": reply})
            except InputError as error:
                print(f"error: {error}", file=sys.stderr)
                messages.pop()


def read_prompts(path: str) -> list[list[dict]]:
    """Chats to be answered: a chat file (a last reply is left out), or a text file with a question per line."""
    if not path.endswith((".json", ".jsonl")):
        chats = [[{"role": "user", "content": line}] for line in read_text(path).splitlines() if line.strip()]
        if not chats:
            raise InputError(f"{path}: holds no prompts")
        return chats
    chats = [chat[:-1] if chat[-1:] and chat[-1]["role"] == "assistant" else chat for chat in read_chats(path)]
    for i, messages in enumerate(chats, 1):
        if not messages or messages[-1]["role"] != "user":
            raise InputError(f"{path}, chat {i}: does not end with a question")
    return chats


def answer_file(speaker: Speaker, path: str, out: str | None) -> None:
    """Answers many prompts, batches of similar length at a time; one JSON object per line, in the file's order."""
    chats = read_prompts(path)
    prompts = [speaker.prompt(messages) for messages in chats]
    lines = [""] * len(chats)
    order = sorted(range(len(chats)), key=lambda i: len(prompts[i]))
    start, total = time.perf_counter(), 0
    with tqdm(total=len(chats), unit=" replies", disable=None) as bar:
        for first in range(0, len(order), speaker.args.batch_size):
            rows = order[first:first + speaker.args.batch_size]
            for i, column in zip(rows, zip(*speaker.replies([prompts[i] for i in rows]))):
                ids = [token for token in column if token is not None]
                total += len(ids)
                stream = TextStream(speaker.tokenizer)
                reply = "".join(map(stream.step, ids)) + stream.rest()
                lines[i] = json.dumps({
                    "prompt": chats[i][-1]["content"], "reply": reply.strip(),
                    "tokens": len(ids), "stopped": ids[-1] in speaker.tokenizer.stop}, ensure_ascii=False)
            bar.update(len(rows))
    print(f"{len(chats)} replies, {total / (time.perf_counter() - start):.1f} tok/s", file=sys.stderr)
    if out is None:
        print("\n".join(lines))
    elif rank() == 0:
        write_text(out, "\n".join(lines) + "\n")


@ranks()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", help="without it: a chat")
    group = parser.add_argument_group("models")
    group.add_argument("--base", help=f"Hugging Face directory of the base ({TOY}/large)")
    group.add_argument("--value", help=f"Hugging Face directory of the value model, or none ({TOY}/value)")
    group.add_argument("--antiexpert", help="proxy tuning, to compare with: what --value was before it was fine-tuned")
    group.add_argument("--map", help="from the base's vocabulary to the value model's, made by vocab_map.py")
    group.add_argument("--template", choices=TEMPLATES, help="chat template (default: the directory's own, else llama-2)")
    group.add_argument("--explain", action="store_true", help="colour each token of the reply by who decided it")
    group.add_argument("--html", metavar="FILE", help="--explain, and as a page")
    group.add_argument("--raw", action="store_true", help="no chat template: go on with the text as it stands")
    group = parser.add_argument_group("how to choose tokens")
    group.add_argument("--alpha", type=float, default=1.0, help="strength of the value model (1.0: the paper)")
    group.add_argument("--greedy", action="store_true", help="always the likeliest token")
    group.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (0.7)")
    group.add_argument("--top_k", type=int, default=0, help="only the k likeliest tokens (0: all)")
    group.add_argument("--top_p", type=float, default=1.0, help="only the likeliest tokens of total probability p (1.0: all)")
    group.add_argument("--seed", type=int, default=0, help="the same seed gives the same replies (0)")
    group.add_argument("--max_new_tokens", type=int, default=512, help="at most, and never past the context (512)")
    group = parser.add_argument_group("many at once")
    group.add_argument("--prompts", help=".jsonl or .json of chats, or a text file with a question per line")
    group.add_argument("--out", help="where the replies go, as .jsonl (default: stdout)")
    group.add_argument("--batch_size", type=int, default=16, help="prompts at a time (16)")
    group = parser.add_argument_group("with what")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    group.add_argument("--value_device", help="of the value model, if it is to sit elsewhere than the base: cuda:1")
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 on CUDA")
    group.add_argument("--compile", action="store_true", help="torch.compile: slow to start, then faster")
    args = parser.parse_args()
    for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("top_k", 0), ("temperature", 0)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} = {getattr(args, name)}; it must be at least {least}")
    if args.value_device and world() > 1:
        raise InputError("--value_device is for one process; under torchrun both models are cut up over all devices")
    if not 0 < args.top_p <= 1:
        raise InputError(f"--top_p = {args.top_p}; it must be above 0 and at most 1")
    if args.base is None:
        if args.value not in (None, "none"):
            raise InputError("--base is missing: the directory of the model that --value is to steer")
        if not (TOY / "value" / "config.json").exists():
            raise InputError(f"{TOY} holds no models yet; run python train.py first, or give --base and --value")
        args.base, args.value = TOY / "large", args.value or TOY / "value"
    if args.value is None:
        raise InputError("--value is missing: the directory of a value model, or none for the base alone")

    if args.antiexpert and args.value == "none":
        raise InputError("--value is missing: the expert that --antiexpert is compared with")
    args.explain |= args.html is not None
    if args.explain and (args.question is None or args.prompts or args.value == "none"):
        raise InputError("--explain needs a question and a value model; leave out --prompts and --value none")
    if args.explain and world() > 1:
        raise InputError("--explain looks at all logits at once: leave out torchrun")
    for file in filter(None, (args.out, args.html)):
        writable_folder(Path(file).parent)
    speaker = Speaker(args)
    if args.prompts:
        answer_file(speaker, args.prompts, args.out)
    elif args.question is None:
        chat(speaker)
    else:
        prompt = (speaker.fitting(speaker.tokenizer.encode(args.question)) if args.raw
                  else speaker.prompt([{"role": "user", "content": args.question}]))
        if args.explain:
            speaker.explain(prompt)
        else:
            print(args.question if args.raw else "", end="", flush=True)
            speaker.say(prompt, args.raw)


if __name__ == "__main__":
    command(main)
