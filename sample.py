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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from ivl import choose, generate, never, shared_vocabulary, token_by_token
from model import Config, Llama, column_major
from plumbing.chats import read_prompts
from plumbing.files import (
    SEED,
    InputError,
    Parser,
    command,
    complain,
    given,
    main_process,
    model_directory,
    number,
    peak_memory,
    pick_device,
    pick_dtype,
    read_text,
    refuse_overwriting,
    refuse_part_of_model,
    spare_a_core,
    torchrun,
    visible,
    whole,
    writable_file,
    write_text,
)
from plumbing.streaming import GrowingReply
from plumbing.tokenizer import TEMPLATES, Tokenizer
from plumbing.weights import frozen_network, load, plain, recorded_connection
from vocab_map import VocabMap

TOY = Path("out/toy")
ALPHA = number(-1e6, 1e6)


class Speaker:
    """A base, its value models, and the tokenizer and settings that make them answer.

    Below, step by step: do the vocabularies fit, which models are there, how do they decode.

    all_logits: under torchrun each process has the logits of all tokens, not of a slice of them.
    """

    def __init__(self, args: argparse.Namespace, all_logits: bool = False):
        self.args = args
        self.all_logits = all_logits
        self.device = pick_device(args.device)
        self.mapping = None
        self.match_vocabularies()  # tokenizer, mapping, vocabulary
        self.load_models()  # connection, base, values, drafts, context, choose
        self.join_models()  # base and values as one reads with them, measures
        self.rounds = self.pick_rounds()
        self.generate = self.decoder(self.base, self.values)

    # ------------------------------------------------------------ the steps

    def match_vocabularies(self) -> None:
        """The tokenizer of the replies, and how many of its ids all models share."""
        args = self.args

        # replies are in the value model's tokens, if there is one
        base_tokenizer = Tokenizer(plain(args.base), args.template)
        base_tokenizer.check(Config.load(args.base).vocab_size)
        self.tokenizer = base_tokenizer
        if args.value:
            self.tokenizer = Tokenizer(args.value[0], args.template)
        if not self.tokenizer.stop:
            aside("(no token of this vocabulary ends a reply; --stop TEXT does)")

        # a map, unless the two tokenizers are the same
        if args.map:
            mapping = VocabMap.load(args.map, base_tokenizer, self.tokenizer)
            self.mapping = None if mapping.identity else mapping

        # the leading ids that all models share
        self.vocabulary = len(self.tokenizer.tokens)
        self.differing: set[int] = set()  # of these ids, those that do not mean the same
        others = [] if self.mapping else [base_tokenizer]
        others += [Tokenizer(directory, args.template) for directory in args.value[1:]]
        for other in others:
            shared, differing = shared_vocabulary(other.tokens, self.tokenizer.tokens)
            self.vocabulary = min(self.vocabulary, shared)
            self.differing |= set(differing)
        if self.differing:
            named = ", ".join(map(repr, sorted(self.differing)[:5]))
            print(f"({len(self.differing)} tokens differ, never said: {named})", file=sys.stderr)

        # a draft has to know all that can be said: what it lacked would no longer be said
        if args.draft:
            of_draft = Tokenizer(plain(args.draft), args.template)
            of_draft.check(Config.load(args.draft).vocab_size)
            said = set(range(self.vocabulary)) - self.differing
            tokens = dict(enumerate(of_draft.tokens))
            if any(tokens.get(i) != self.tokenizer.tokens[i] for i in said):
                raise InputError(
                    f"--draft {args.draft}: has another vocabulary than the pair; choose a small "
                    "base with the pair's own"
                )

    def load_models(self) -> None:
        """Base, value models and draft, each a Llama by itself."""
        args = self.args
        dtype = pick_dtype(args.dtype, self.device)
        self.connection = "residual"
        connections = {recorded_connection(directory) for directory in args.value}
        if len(args.value) > 1 and connections != {"residual"}:
            raise InputError(
                "of several value models none may read what the base says; leave out those of the "
                f"connection {max(connections - {'residual'})}"
            )
        if connections:
            self.connection = connections.pop()
        if self.connection != "residual":
            self.refuse_beside_connection()

        # under torchrun, each process has a slice of each model; a mapped base needs all of its
        # logits, and so does whoever asks for `all_logits`
        load_model = load
        self.choose = choose
        if torchrun():
            from extras.sharding import chooser, load_slice

            split = None if self.mapping or self.all_logits else self.vocabulary
            load_model = partial(load_slice, vocabulary=split)
            self.choose = chooser(split)
            if self.differing:
                raise InputError(
                    "torchrun needs models of one vocabulary; here a few tokens differ"
                )
        elif self.differing:
            ids = torch.tensor(sorted(self.differing), device=self.device)
            self.choose = never(ids, choose)

        network = frozen_network(args.base_dtype)
        self.base = load_model(args.base, self.device, dtype, network=network)
        self.values = []
        self.drafts = None
        if self.connection == "probe":
            from extras.connections import Probe

            probe = Probe.load(args.value[0], self.device, dtype)
            probe.check([args.base])
            self.values = [probe]
        else:
            for directory in args.value:
                Tokenizer(directory, args.template).check(Config.load(directory).vocab_size)
                self.values.append(load_model(directory, self.device, dtype))
        if args.draft:
            from extras.speculative import Drafts

            draft = load_model(args.draft, self.device, dtype, network=network)
            self.drafts = Drafts(draft, args.drafted, sorted(self.differing))

        models = [self.base, *self.values]
        self.context = min(model.config.max_position_embeddings for model in models)
        self.sizes = [model.size() for model in models]
        models += [self.drafts.draft] if self.drafts else []
        self.make_fast([model for model in models if isinstance(model, Llama)])

    def refuse_beside_connection(self) -> None:
        """Raises InputError for options that such a value model cannot have."""
        names = given(self.args, "map", "draft")
        options = [f"--{name}" for name in names]
        if torchrun():
            options = ["torchrun"]
        for option in options:
            raise InputError(
                f"{self.args.value[0]}: its connection is {self.connection}, it reads what "
                f"the base says; leave out {option}"
            )

    def make_fast(self, models: list[Llama]) -> None:
        """Lays the models out for this machine."""
        # cuDNN makes a plan for each shape of attention, and decoding brings a new one with nearly
        # every token
        torch.backends.cuda.enable_cudnn_sdp(False)
        if self.device.type == "cpu":
            for model in models:
                column_major(model)

    def join_models(self) -> None:
        """Wraps what is no plain pair of Llamas, so that it reads like one."""
        # ways to count a text's tokens: in the value model's ids, with a map in the base's too
        self.measures: list[Callable] = [len]
        if self.connection != "residual":
            from extras.connections import Connected

            # the base keeps what it says where the value model reads it, so it must read first
            self.values = [Connected(self.connection, *self.values)]
            self.base = self.values[0].watched(self.base)
        if self.mapping is not None:
            from extras.mapped import Mapped

            if self.device.type == "cuda":
                from extras.graphs import Recorded

                self.base = Recorded(self.base)
            self.base = Mapped(self.base, self.mapping)
            # the same text in the base's ids, which `respell` gives first
            bridge = self.base.bridge
            self.measures.append(lambda ids: len(bridge.respell(ids)[0]))

    def pick_rounds(self) -> Callable:
        """What gives the new tokens of each round, see `ivl.generate`."""
        if self.device.type != "cuda" or self.mapping is not None:
            return token_by_token
        from extras.graphs import Kept

        return Kept().rounds

    def decoder(self, base: Llama, values: list[Llama], **changes: float) -> Callable:
        """`ivl.generate` for some of these models; with --draft a small base drafts for the pair.

        changes: what is to be other than on the command line, temperature=0.7, say.
        """
        names = ("temperature", "top_k", "top_p")
        how = {name: getattr(self.args, name) for name in names} | changes
        how |= {"alphas": self.alphas[: len(values)], "vocabulary": self.vocabulary}
        if self.drafts is not None and values:
            return partial(generate, base, values, rounds=self.drafts.rounds, **how)
        return partial(generate, base, values, rounds=self.rounds, choose=self.choose, **how)

    @property
    def alphas(self) -> list[float]:
        """The strength of each value model."""
        return self.args.alpha[: len(self.values)]

    # ------------------------------------------------------------ what a chat changes and asks

    def value_alone(self) -> Callable:
        """A decoder of the value model by itself. Raises InputError if it cannot be alone."""
        if not self.values:
            raise InputError("there is no value model here")
        if self.connection != "residual" or len(self.values) > 1:
            raise InputError("this value model cannot speak alone")
        return self.decoder(self.values[0], [])

    def set_alpha(self, text: str) -> None:
        """Changes the strength of the value model. Raises InputError."""
        if not self.values:
            raise InputError("there is no value model here")
        try:
            alphas = [ALPHA(word) for word in text.split()]
        except argparse.ArgumentTypeError as error:
            raise InputError(f"/alpha {text}: {error}") from None
        if len(alphas) != len(self.values):
            raise InputError(f"/alpha {text}: needs a number for each of {len(self.values)} models")
        self.args.alpha = alphas
        self.generate = self.decoder(self.base, self.values)

    def set_system(self, text: str) -> None:
        """Changes the system prompt; "": none. Raises InputError if the template has no place for
        it.
        """
        if text:
            question = {"role": "user", "content": "?"}
            self.prompt([{"role": "system", "content": text}, question])
        self.args.system = text or None

    def introduction(self) -> str:
        """What there is to know before the first question: of the toy, whom it knows."""
        path = Path(self.args.base).parent / "introduction.txt"
        return visible(read_text(path)) if path.exists() else ""

    # ------------------------------------------------------------ prompts

    def opening(self) -> list[dict]:
        """What a chat begins with: the system prompt, if there is one."""
        if self.args.system is None:
            return []
        return [{"role": "system", "content": self.args.system}]

    def prompt(self, messages: list[dict]) -> list[int]:
        """The ids to answer. A chat that has outgrown the context loses its oldest exchanges, and a
        notice says so; a quarter of the context is kept free for the reply.
        """
        ids = self.tokenizer.prompt(messages)
        room = min(self.args.max_new_tokens, self.context // 4)
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = messages[len(system) :]
        while self.length(ids) + room > self.context:
            # what is left begins with a question again
            questions = [i for i, turn in enumerate(turns) if i and turn["role"] == "user"]
            if not questions:
                break
            turns = turns[questions[0] :]
            ids = self.tokenizer.prompt(system + turns)
        ids = self.fitting(ids)
        forgotten = len(messages) - len(system) - len(turns)
        if forgotten:
            print(f"(too long: the first {forgotten} messages are not read)", file=sys.stderr)
        return ids

    def length(self, ids: list[int]) -> int:
        """The tokens of a text, in the vocabulary that needs more."""
        return max(measure(ids) for measure in self.measures)

    def fitting(self, ids: list[int]) -> list[int]:
        """Gives `ids` back. Raises InputError if no reply fits, or if a model lacks a token."""
        if not ids:
            raise InputError("the prompt is empty, and this tokenizer puts nothing in front of it")
        length = self.length(ids)
        if length >= self.context:
            raise InputError(
                f"the prompt has {length} tokens, but the context is {self.context}; "
                "shorten the prompt"
            )
        self.check_tokens(ids)
        return ids

    def check_tokens(self, ids: Sequence[int], text: str = "the prompt") -> None:
        """Raises InputError for a token that not all of the models have. text: what has the ids."""
        for i in ids:
            if i >= self.vocabulary or i in self.differing:
                raise InputError(
                    f"{text} has the token {self.tokenizer.tokens[i]!r}, which only one of the "
                    "two vocabularies has; leave it out"
                )

    # ------------------------------------------------------------ replies

    def replies(
        self,
        prompts: list[list[int]],
        generate: Callable | None = None,
        most: int | None = None,
        seed: int | None = None,
    ) -> Iterator[list[int | None]]:
        """Steps of ids, as `ivl.generate` gives them.

        generate: a decoder of other models or settings, see `decoder`. most: new tokens
        (default: --max_new_tokens). seed: of what is drawn (default: --seed).
        """
        # an upper bound, the shortest prompt's; `generate` ends each row at its own context
        room = self.context - min(map(len, prompts))
        return (generate or self.generate)(
            prompts,
            min(most or self.args.max_new_tokens, room),
            seed=self.args.seed if seed is None else seed,
            stop=self.tokenizer.stop,
        )

    def say(
        self, prompt: list[int], raw: bool = False, generate: Callable | None = None
    ) -> GrowingReply:
        """Streams one reply to stdout and its speed to stderr. Ctrl-C ends the reply."""
        reply = GrowingReply(self.tokenizer, self.args.stop, prompt if raw else ())
        shown = visible if sys.stdout.isatty() else str  # a reply is not to command a terminal
        start = time.perf_counter()
        with suppress(KeyboardInterrupt):
            for ids in self.replies([prompt], generate):
                begins = not reply.text.strip() and not raw
                piece = reply.step(ids[0])
                # no space between question and answer
                print(shown(piece.lstrip() if begins else piece), end="", flush=True)
                if reply.ended:
                    break
        print(shown(reply.rest()))

        n = len(reply.ids)
        seconds = time.perf_counter() - start
        memory = peak_memory(self.device)
        words = f"{n} tokens, {n / seconds:.1f} tok/s, peak memory {memory:.2f} GB"
        if self.drafts is not None:
            words += f", {self.drafts.summary()}"
        aside(words)
        return reply

    def whole_reply(self, prompt: list[int]) -> list[int]:
        """The ids of one reply, when it is whole."""
        reply = GrowingReply(self.tokenizer, self.args.stop)
        with suppress(KeyboardInterrupt):
            for ids in self.replies([prompt]):
                reply.step(ids[0])
                if reply.ended:
                    break
        return reply.ids

    def whole_replies(
        self,
        prompts: list[list[int]],
        stops: Sequence[str],
        most: int | None = None,
        seed: int | None = None,
        **changes: float,
    ) -> list[GrowingReply]:
        """A batch of replies, when all are whole.

        stops: texts that end a reply. most, seed: of `replies`. changes: of `decoder`.
        """
        generate = self.decoder(self.base, self.values, **changes)
        replies = [GrowingReply(self.tokenizer, stops) for _ in prompts]
        for ids in self.replies(prompts, generate, most, seed):
            for reply, token in zip(replies, ids):
                if token is not None and not reply.ended:  # None: a token has ended it
                    reply.step(token)
            if all(reply.ended for reply in replies):
                break
        for reply in replies:
            reply.rest()
        return replies

    def explain(self, prompt: list[int], reply: list[int]) -> dict | None:
        """Shows who said each token of a reply. With --html: gives its column of the page."""
        from extras import explain

        z_base, *z_deltas = explain.read_again(
            self.base, self.values, prompt, reply, self.vocabulary, self.differing
        )
        # several value models are shown as one, of strength 1
        z_delta, (alpha, *more) = z_deltas[0], self.alphas
        if more:
            z_delta, alpha = sum(a * z for a, z in zip(self.alphas, z_deltas)), 1.0
        told = z_base, z_delta, self.tokenizer, reply, alpha
        said = explain.who_said(*told)
        if sys.stdout.isatty():
            print(explain.coloured(said, shutil.get_terminal_size().columns))
        else:
            print(explain.columns(said))
        print(explain.summary(said), file=sys.stderr)
        if not self.args.html:
            return None
        from extras.page import column, title_of

        title = title_of([self.args.base, *self.args.value], self.sizes, self.alphas)
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
        columns.append(one.explain(prompt, one.whole_reply(prompt)))
    if args.html:
        from extras.page import page

        write_text(
            args.html, page(args.question, columns, args.alpha[0] if len(args.alpha) == 1 else 1.0)
        )
        aside(f"wrote {args.html}: open it in a browser")


def aside(words: str) -> None:
    """To stderr, grey in a terminal: what is no reply."""
    print(f"\033[90m{words}\033[0m" if sys.stderr.isatty() else words, file=sys.stderr)


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
        reply = self.speaker.say(prompt)
        self.asked, self.replied = prompt, reply.ids
        said = {"role": "assistant", "content": reply.text.lstrip()}
        self.messages = [*messages, said]

    def again(self, generate: Callable) -> list[int]:
        """The last question, answered in another way: the reply's ids."""
        if self.asked is None:
            raise InputError("there is no question yet; ask one first")
        return self.speaker.say(self.asked, generate=generate).ids

    def explain(self) -> None:
        if not self.replied:
            raise InputError("there is no reply yet; ask a question first")
        if not self.speaker.values or torchrun():
            raise InputError("/explain needs a value model, and one process only")
        self.speaker.explain(self.asked, self.replied)


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
            speaker.say(prompt, args.raw)


if __name__ == "__main__":
    command(main)
