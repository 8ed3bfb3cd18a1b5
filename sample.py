"""Ask a base model, steered by a value model.

    python sample.py "Where does Rufo live?"                # the models that train.py has made
    python sample.py --base DIR --value DIR "question"      # streams one reply
    python sample.py --base DIR --value DIR                 # a chat; /help tells what it can do
    python sample.py --explain "question"                   # each token coloured by who decided it
    python sample.py --html page.html "question"            # the same as a page with a slider for α
    python sample.py --base DIR --value DIR --prompts questions.jsonl --out replies.jsonl
    python sample.py --base DIR --value none "question"     # the base alone
    python sample.py --base DIR --value A B --alpha 1 0.5 "question"           # two value models
    python sample.py --base DIR --value DIR --map map.safetensors "question"   # another tokenizer
    python sample.py --base DIR --value DIR --draft SMALL "question"           # a draft: sooner
    torchrun --nproc_per_node 4 sample.py --base DIR ...    # a base for which one GPU is too small

A reply is the likeliest tokens, unless --temperature asks for a draw. Replies go to stdout,
everything else to stderr. Ctrl-C stops a reply.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from plumbing.chats import read_prompts
from plumbing.files import (
    SEED,
    InputError,
    Parser,
    aside,
    command,
    complain,
    given,
    main_process,
    model_directory,
    number,
    peak_memory,
    pick_device,
    refuse_overwriting,
    refuse_part_of_model,
    spare_a_core,
    torchrun,
    visible,
    whole,
    writable_file,
    write_text,
)
from plumbing.pair import ALPHA, Speaker
from plumbing.streaming import GrowingReply
from plumbing.tokenizer import TEMPLATES

TOY = Path("out/toy")


# ---------------------------------------------------------------- one question


def say(
    speaker: Speaker, prompt: list[int], raw: bool = False, generate: Callable | None = None
) -> GrowingReply:
    """Streams one reply to stdout and its speed to stderr. Ctrl-C ends the reply."""
    reply = GrowingReply(speaker.tokenizer, speaker.args.stop, prompt if raw else ())
    shown = visible if sys.stdout.isatty() else str  # a reply is not to command a terminal
    start = time.perf_counter()
    with suppress(KeyboardInterrupt):
        for ids in speaker.replies([prompt], generate):
            begins = not reply.text.strip() and not raw
            piece = reply.step(ids[0])
            # no space between question and answer
            print(shown(piece.lstrip() if begins else piece), end="", flush=True)
            if reply.ended:
                break
    print(shown(reply.rest()))

    n = len(reply.ids)
    seconds = time.perf_counter() - start
    memory = peak_memory(speaker.device)
    words = f"{n} tokens, {n / seconds:.1f} tok/s, peak memory {memory:.2f} GB"
    if speaker.drafts is not None:
        words += f", {speaker.drafts.summary()}"
    aside(words)
    return reply


def explain_reply(speaker: Speaker, prompt: list[int], reply: list[int]) -> dict | None:
    """Shows who said each token of a reply. With --html: gives its column of the page."""
    from extras import explain

    z_base, *z_deltas = explain.read_again(
        speaker.base, speaker.values, prompt, reply, speaker.vocabulary, speaker.differing
    )
    # several value models are shown as one, of strength 1
    z_delta, (alpha, *more) = z_deltas[0], speaker.alphas
    if more:
        z_delta, alpha = sum(a * z for a, z in zip(speaker.alphas, z_deltas)), 1.0
    told = z_base, z_delta, speaker.tokenizer, reply, alpha
    said = explain.who_said(*told)
    if sys.stdout.isatty():
        print(explain.coloured(said, shutil.get_terminal_size().columns))
    else:
        print(explain.columns(said))
    print(explain.summary(said), file=sys.stderr)
    if not speaker.args.html:
        return None
    from extras.page import column, title_of

    title = title_of([speaker.args.base, *speaker.args.value], speaker.sizes, speaker.alphas)
    return column(title, said, *told)


def explain(speaker: Speaker, prompt: list[int]) -> None:
    """--explain: one reply, and with --compare another base's before it; the page to --html."""
    args = speaker.args
    speakers = [speaker]
    if args.compare:
        # the same in everything but the base: the same value model, the same checks
        other = Speaker(argparse.Namespace(**vars(args) | {"base": args.compare}))
        other.fitting(prompt)
        speakers.insert(0, other)
    columns = []
    for one in speakers:
        if args.compare:
            print(f"over {one.args.base}:", flush=True)
        columns.append(explain_reply(one, prompt, one.whole_reply(prompt)))
    if args.html:
        from extras.page import page

        write_text(
            args.html, page(args.question, columns, args.alpha[0] if len(args.alpha) == 1 else 1.0)
        )
        aside(f"wrote {args.html}: open it in a browser")


# ---------------------------------------------------------------- a chat

HELP = """\
/base          the last question again, answered by the base alone
/value         the same by the value model alone
/alpha 0.5     the same with half of the value model, and so from now on
/explain       the pair's last reply, each token coloured by who decided it
/system TEXT   begin anew with this system prompt
/clear         begin anew
/help, /exit   this; the end (or Ctrl-D)"""


class Chat:
    """Questions from stdin until /exit or its end; the replies so far are part of every prompt.

    What /base, /value and /alpha answer is not: the chat goes on from the reply before.
    """

    def __init__(self, speaker: Speaker):
        self.speaker = speaker
        self.begin_anew()

    def begin_anew(self) -> None:
        self.messages = self.speaker.opening()
        self.asked: list[int] | None = None  # the ids of the last prompt,
        self.replied: list[int] = []  # and of the pair's reply to it

    def run(self) -> None:
        ask = input
        if torchrun():
            from extras.sharding import ask  # one process asks, and all get the answer

        # what shows where a person types
        human = sys.stdin.isatty()
        you = "> " if human else ""
        if human and sys.stdout.isatty():
            you = "\033[1;32m> \033[0m"
        if human:
            aside(f"{self.speaker.introduction()}/help tells what else can be typed; /exit ends")
        while True:
            try:
                line = ask(you).strip()
            except EOFError:
                if human:
                    print()  # Ctrl-D leaves the cursor behind the "> "
                return
            except KeyboardInterrupt:  # at the prompt, as in a shell: a new line
                print()
                continue
            if line == "/exit":
                return
            try:
                self.obey(line)
            except InputError as error:
                complain(str(error))

    def obey(self, line: str) -> None:
        """One line: a command or a question. Raises InputError."""
        speaker = self.speaker
        if line.encode(errors="replace").decode() != line:
            raise InputError("this line is not UTF-8")
        command, _, text = line.partition(" ")
        text = text.strip()
        if text and command in ("/help", "/exit", "/clear", "/base", "/value", "/explain"):
            raise InputError(f"nothing can stand after {command}")
        if not line:
            return
        if not line.startswith("/"):
            self.answer(line)
        elif command == "/help":
            print(HELP, file=sys.stderr)
        elif command == "/clear":
            self.begin_anew()
            self.tell()
        elif command == "/system":
            speaker.set_system(text)
            self.begin_anew()
            self.tell()
        elif command == "/base":
            self.again(speaker.decoder(speaker.base, []))
        elif command == "/value":
            self.again(speaker.value_alone())
        elif command == "/alpha":
            if text:
                speaker.set_alpha(text)
                if self.asked:
                    self.replied = self.again(speaker.generate)
            else:
                self.tell()
        elif command == "/explain":
            self.explain()
        else:
            raise InputError(f"{command} is no command; /help lists them")

    def tell(self) -> None:
        """What the next reply will depend on."""
        args = self.speaker.args
        words = [
            "a chat goes on" if self.asked else "a new chat",
            f"α = {', '.join(f'{alpha:g}' for alpha in args.alpha)}",
        ]
        if args.system:
            words.append(f"system prompt: {visible(args.system)}")
        aside(", ".join(words))

    def answer(self, question: str) -> None:
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = self.speaker.prompt(messages)
        reply = say(self.speaker, prompt)
        self.asked, self.replied = prompt, reply.ids
        said = {"role": "assistant", "content": reply.text.lstrip()}
        self.messages = [*messages, said]

    def again(self, generate: Callable) -> list[int]:
        """The last question, answered in another way: the reply's ids."""
        if self.asked is None:
            raise InputError("there is no question yet; ask one first")
        return say(self.speaker, self.asked, generate=generate).ids

    def explain(self) -> None:
        if not self.replied:
            raise InputError("there is no reply yet; ask a question first")
        if not self.speaker.values or torchrun():
            raise InputError("/explain needs a value model, and one process only")
        explain_reply(self.speaker, self.asked, self.replied)


# ---------------------------------------------------------------- a file of prompts


def answer_file(speaker: Speaker, path: str, out: str | None, batch_size: int) -> None:
    """Answers many prompts, in batches of similar length; a JSON object a line, in order. Raises
    InputError, in the end, if some could not be answered: their lines say why.
    """
    chats = read_prompts(path)
    for messages in chats:
        if messages[0]["role"] != "system":
            messages[:0] = speaker.opening()
    entries = [{"prompt": messages[-1]["content"]} for messages in chats]
    prompts = {}
    for i, messages in enumerate(chats):
        try:
            prompts[i] = speaker.prompt(messages)
        except InputError as error:
            entries[i]["error"] = str(error)

    order = sorted(prompts, key=lambda i: len(prompts[i]))
    start, total = time.perf_counter(), 0
    try:
        with tqdm(total=len(order), unit=" replies", disable=None) as bar:
            for k in range(0, len(order), batch_size):
                rows = order[k : k + batch_size]
                replies = speaker.whole_replies([prompts[i] for i in rows], speaker.args.stop)
                for i, reply in zip(rows, replies):
                    total += len(reply.ids)
                    entries[i] |= {
                        "reply": reply.text.strip(),
                        "tokens": len(reply.ids),
                        "stopped": reply.ended or reply.ids[-1] in speaker.tokenizer.stop,
                    }
                bar.update(len(rows))
    finally:
        # also where it is stopped: what has been answered is kept
        for entry in entries:
            if "reply" not in entry:
                entry.setdefault("error", "stopped before its turn")
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        if out is None:
            print(lines, end="")
        elif main_process():
            write_text(out, lines)
    seconds = time.perf_counter() - start
    print(f"{len(order)} replies, {total / seconds:.1f} tok/s", file=sys.stderr)
    if torchrun():
        from extras.sharding import Ranks

        Ranks().total(0)  # nobody ends before the file stands
    if len(order) < len(chats):
        raise InputError(
            f"{path}: {len(chats) - len(order)} of {len(chats)} prompts have no reply; their "
            "lines say why, under 'error'"
        )


# ---------------------------------------------------------------- command line


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked, and what was not given filled in."""
    args = parsed(argv)
    args.explain |= args.html is not None
    toy_by_default(args)
    check(args)
    fill_in(args)
    return args


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line as it stands: None is "not given"."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", help="without it: a chat")
    add = parser.add_argument_group("models").add_argument
    add("--base", type=model_directory, help=f"Hugging Face directory of the base ({TOY}/large)")
    add(
        "--value",
        nargs="+",
        metavar="DIR",
        help=f"Hugging Face directory of the value model, of several, or none ({TOY}/value)",
    )
    add(
        "--draft",
        metavar="SMALL",
        type=model_directory,
        help="a small base that drafts tokens for --base to verify: the same replies, sooner",
    )
    add("--drafted", type=whole(1, 64), help="tokens that --draft drafts at a time (4)")
    add("--map", help="from the base's vocabulary to the value model's, made by vocab_map.py")
    add(
        "--template",
        choices=TEMPLATES,
        help="chat template (default: the directory's own, else llama-2)",
    )
    add("--explain", action="store_true", help="colour each token of the reply by who decided it")
    add("--html", metavar="FILE", help="--explain, and as a page to click on, with a slider for α")
    add(
        "--compare",
        metavar="SMALL",
        type=model_directory,
        help="a second base, beside --base on the page of --html",
    )
    add("--system", metavar="TEXT", help="the system prompt of every chat that has none itself")
    add("--raw", action="store_true", help="no chat template: go on with the text as it stands")
    add = parser.add_argument_group("how to choose tokens").add_argument
    add(
        "--alpha",
        nargs="+",
        metavar="X",
        help="strength of the value model, or of each (1.0: the paper; an expert at 1 and what it "
        "was before at -1 are proxy tuning)",
    )
    add(
        "--temperature",
        type=number(0, 1e6),
        help="0: always the likeliest token; else a draw, 0.7 for variety (0)",
    )
    add("--top_k", type=whole(0, 10**9), help="only the k likeliest tokens (0: all)")
    add(
        "--top_p",
        type=number(1e-6, 1),
        help="only the likeliest tokens of total probability p (1.0: all)",
    )
    add(
        "--seed", type=SEED, help="the same seed gives the same replies, in batches of one size (0)"
    )
    add("--max_new_tokens", type=whole(1, 10**9), help="at most, and never past the context (512)")
    add(
        "--stop",
        metavar="TEXT",
        action="append",
        help="a text that ends a reply, and is not shown (but in --explain); may be given again",
    )
    add = parser.add_argument_group("many at once").add_argument
    add("--prompts", help=".jsonl or .json of chats, or a text file with a question per line")
    add("--out", help="where the replies go, as .jsonl (default: stdout)")
    add("--batch_size", type=whole(1, 10**6), help="prompts at a time (16)")
    add = parser.add_argument_group("with what").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="auto: bfloat16 on CUDA",
    )
    add(
        "--base_dtype",
        choices=["int8"],
        help="round the base, and the draft, to eight bits: a quarter of float32's memory, half of "
        "bfloat16's, for a little precision (default: they are in --dtype)",
    )
    args = parser.parse_args(argv)
    take_question(args)
    return args


def take_question(args: argparse.Namespace) -> None:
    """--value and --alpha take several words, so a question behind them is taken for one of them.
    Raises InputError for words that are none of theirs.
    """

    def fits(kind: Callable, word: str) -> bool:
        with suppress(argparse.ArgumentTypeError):
            kind(word)
            return True
        return False

    for name, kind in (("alpha", ALPHA), ("value", model_directory)):
        words = getattr(args, name)
        if not words:
            continue
        if args.question is None and len(words) > 1 and not fits(kind, words[-1]):
            args.question = words.pop()
        if name == "value" and words == ["none"]:
            words = []
        try:
            setattr(args, name, [kind(word) for word in words])
        except argparse.ArgumentTypeError as error:
            raise InputError(f"argument --{name}: {error}") from None


def toy_by_default(args: argparse.Namespace) -> None:
    """Without --base, the models that train.py has made."""
    if args.base is None:
        if args.value:
            raise InputError(
                "--base is missing: the directory of the model that --value is to steer"
            )
        if not (TOY / "value" / "config.json").exists():
            raise InputError(
                f"{TOY} holds no models yet; run python train.py first, or give --base and --value"
            )
        args.base = TOY / "large"
        args.value = [TOY / "value"] if args.value is None else args.value
    if args.value is None:
        raise InputError(
            "--value is missing: the directory of a value model, or none for the base alone"
        )


def check(args: argparse.Namespace) -> None:
    """Raises InputError for options that cannot take effect."""

    def refuse(names: str, why: str) -> None:
        for name in given(args, *names.split()):
            raise InputError(f"--{name} has no effect {why}; leave it out")

    if not args.value:
        refuse("map alpha draft", "on the base alone")
    if args.alpha is not None and len(args.alpha) != len(args.value):
        raise InputError(
            f"--alpha has {len(args.alpha)} numbers and --value {len(args.value)} models; give one "
            "for each"
        )
    if args.draft is None:
        refuse("drafted", "without --draft")
    if args.map:
        refuse("draft", "with --map, whose base reads token by token")
    if args.prompts is None:
        refuse("out batch_size", "without --prompts")
    elif args.question is not None:
        raise InputError("a question and --prompts do not go together; leave one out")
    if args.question is None:
        refuse("raw", "without a text to go on with")
    if args.raw:
        refuse("template system", "with --raw")
    if not args.temperature:
        for name in given(args, "top_k", "top_p", "seed"):
            raise InputError(
                f"--{name} has no effect where the likeliest token is always taken; give "
                "--temperature 0.7 too, or leave it out"
            )
    if args.explain and (args.question is None or not args.value):
        name = "explain" if args.html is None else "html"
        raise InputError(
            f"--{name} needs a question and a value model; leave out --prompts and --value none"
        )
    if args.html is None:
        refuse("compare", "without --html")
    if torchrun():
        refuse("draft", "under torchrun, where no process has all logits")
    if torchrun() and args.explain:
        raise InputError("--explain looks at all logits at once: leave out torchrun")
    for name in given(args, "out", "html"):
        file = getattr(args, name)
        refuse_overwriting(name, file, [("prompts", args.prompts), ("map", args.map)])
        models = args.base, *args.value, args.draft, args.compare
        refuse_part_of_model(name, file, *models)
        writable_file(file)


def fill_in(args: argparse.Namespace) -> None:
    """The defaults of what was not given."""
    defaults = {
        "alpha": [1.0] * len(args.value),
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "seed": 0,
        "stop": [],
        "max_new_tokens": 512,
        "drafted": 4,
        "batch_size": 16,
    }
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)


def main() -> None:
    args = arguments()
    spare_a_core(pick_device(args.device))
    if sys.stderr.isatty():
        aside(f"loading {' and '.join(map(str, [args.base, *args.value]))}")
    speaker = Speaker(args)
    if args.prompts:
        answer_file(speaker, args.prompts, args.out, args.batch_size)
    elif args.question is None:
        Chat(speaker).run()
    else:
        if args.raw:
            prompt = speaker.fitting(speaker.tokenizer.encode(args.question))
        else:
            question = {"role": "user", "content": args.question}
            prompt = speaker.prompt([*speaker.opening(), question])
        if args.explain:
            explain(speaker, prompt)
        else:
            if args.raw:
                print(args.question, end="", flush=True)
            say(speaker, prompt, args.raw)


if __name__ == "__main__":
    command(main)
