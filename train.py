"""Train a value model beside a frozen base.

    python train.py                                                 # the toy family, on any laptop
    python train.py --base DIR --data chats.json --out DIR          # your base, your chats
    python train.py --base DIR --full --data chats.json --out DIR   # fine-tune the model itself
    python train.py --base SMALL MEDIUM LARGE --data ... --out DIR  # a curriculum of bases
    python train.py --base DIR --data chats.json --out DIR --dry_run       # what it would take
    python train.py --base DIR --value DIR --data chats.json --evaluate    # held-out loss of a pair
    torchrun --nproc_per_node 4 train.py --base DIR ...             # on four GPUs

DIRs are Hugging Face directories; --value DIR gives the weights to start from. A run that was
stopped, by Ctrl-C or in whatever way, goes on, step for step, with the same command and --resume.
The losses of all steps are in OUT/log.jsonl, and in OUT/curve.png where matplotlib is installed.
"""

import argparse
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ivl import two_headed_loss
from model import CONNECTIONS, Config, Llama
from plumbing.dataset import Batch, Batches, Chats
from plumbing.files import (
    SEED,
    InputError,
    Parser,
    command,
    given,
    model_directory,
    number,
    own_folder,
    refuse_overwriting,
    torchrun,
    whole,
)
from plumbing.jobs import Job
from plumbing.ranks import ONE_DEVICE, OneDevice
from plumbing.runs import (
    CHECKPOINT,
    Best,
    Checkpoint,
    Log,
    Stop,
    check_finite,
    draw_curve,
    judge,
    made_with,
    note_on,
    read_log,
    refuse_stopped,
    resuming,
    save_model,
    tell,
    unit_of,
    warn,
)
from plumbing.tokenizer import TEMPLATES

BILLION = 10**9
COUNT = whole(1, 10**9)


@dataclass
class Settings:
    """What decides the numbers of a run. A checkpoint can be resumed only with its own settings."""

    lr: float  # AdamW's largest: after a linear warm-up, a cosine to zero
    batch_size: int  # chats per step
    micro_batch_size: int  # chats at a time: it changes the memory, not the gradient
    epochs: int
    max_length: int  # tokens; longer chats are cut at a turn
    lam: float  # λ, weight of the norm term; its pull on one logit is λ / vocabulary
    # the norm term is a mean over the replies' tokens, "response", or over all, prompt and padding
    # too, "all", as in the released code
    norm_over: str
    connection: str = "residual"  # what the value model reads, see extras/connections.py
    beta: float = 0.0  # of the loss over pairs of chats; 0: the chats are no pairs
    warmup: float = 0.04  # share of the steps, Table 5
    weight_decay: float = 0.01  # on matrices; the released scripts' value
    clip: float = 1.0  # largest norm of the gradient
    held_out: float = 0.02  # share of the chats that is not trained on; the released scripts' value
    keep: str = "last"  # which weights are saved: the last, or those of the best held-out loss
    seed: int = 0


def table_5(model: Llama, configs: Sequence[Config]) -> Settings:
    """Table 5's values for a model of this size, and ours where it has none.

    configs: of the models that it is trained beside; none where it is fine-tuned by itself.
    """
    big = model.size() > 3 * BILLION  # Table 5 knows 1.1B and 7B; this border is ours
    contexts = [config.max_position_embeddings for config in (model.config, *configs)]
    return Settings(
        lr=1e-5 if big else 1e-4,
        batch_size=16 if big else 32,
        micro_batch_size=4,
        epochs=3,
        max_length=min(4096, *contexts),
        lam=1.0 if configs else 0.0,
        norm_over="response",
    )


# ---------------------------------------------------------------- what a run is given


class Curriculum:
    """The frozen bases of a run, one after the other, each for an equal share of the steps (§6).

    One base is a curriculum of one; None fine-tunes the model itself.

    It owns the base: nobody else holds it, so that one base is freed before the next is loaded.

    Example: two bases, five steps
    >>> bases = Curriculum(lambda: "small", lambda: "large")
    >>> [bases.at(step, 5) for step in range(5)]
    ['small', 'small', 'small', 'large', 'large']
    """

    def __init__(self, *loads: Callable[[], Llama | None]):
        self.loads = loads
        self.stage = None
        self.base = None
        self.losses: dict[int, float] = {}  # of the bases alone, by their stages

    def at(self, step: int, steps: int) -> Llama | None:
        """The base of a step."""
        stage = step * len(self.loads) // steps
        if stage != self.stage:
            self.base = None  # freed before the next one is loaded
            self.base = self.loads[stage]()
            self.stage = stage
        return self.base

    def alone(self, measure: Callable[[Llama], float]) -> float:
        """The held-out loss of the base that was asked for last, measured once: it never changes.
        Raises InputError if it is no number.
        """
        if self.stage not in self.losses:
            self.losses[self.stage] = measure(self.base)
        loss = self.losses[self.stage]
        if not math.isfinite(loss):
            raise InputError(
                f"the base alone has a held-out loss of {loss}; its weights are of no use with "
                "these chats"
            )
        return loss


FULL_PRECISION = nullcontext()  # in the place of torch.autocast


# ---------------------------------------------------------------- one run


def forward(
    base: Llama | None,
    value: Llama,
    batch: Batch,
    autocast=FULL_PRECISION,
    w_ce: float = 1.0,
    w_norm: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The weighted loss of one batch, and the sums of its two terms (2,).

    base None fine-tunes `value` itself. Other losses, with the same arguments: extras/losses.py.
    """
    inputs, targets, counted = batch  # (B, T) each

    # the base only reads: no gradient, no graph, in its own precision
    h_base = W_base = None
    if base is not None:
        with torch.no_grad():
            h_base = base.hidden(inputs)  # (B, T, H_b)
            W_base = base.unembed  # (V, H_b)

    # the value model learns; the loss adds its logits to the base's
    with autocast:
        h_value = value.hidden(inputs)  # (B, T, H_v)
        return two_headed_loss(
            h_base, W_base, h_value, value.unembed, targets, counted, w_ce, w_norm
        )


@torch.no_grad()
def held_out_loss(
    base: Llama | None,
    value: Llama | None,
    chats: Chats,
    rows: list[int],
    size: int,
    autocast=FULL_PRECISION,
    machine: OneDevice = ONE_DEVICE,
) -> float:
    """Cross-entropy of z_post in nats per target token over the chats `rows`, `size` at a time;
    value None measures the base alone. Of preferences: extras/losses.py.
    """
    # the base alone: it takes the value model's place, with no base beside it
    if value is None:
        value = base
        base = None
    chats = chats.plain()
    device = value.unembed.device
    loss = n = 0
    for part in machine.parts(rows, size):
        batch = chats.batch(part, device)
        _, sums = forward(base, value, batch, autocast)
        loss += sums[0].item()
        n += chats.count_targets(part)
    machine.rest(value)
    loss, n = machine.total(loss, n)
    return loss / n


def train_step(
    base: Llama | None,
    value: Llama,
    optimizer: torch.optim.Optimizer,
    chats: Chats,
    rows: list[int],
    settings: Settings,
    lr: float,
    *,
    batch_loss: Callable = forward,
    machine: OneDevice = ONE_DEVICE,
    autocast=FULL_PRECISION,
) -> dict[str, float]:
    """One step of AdamW on the chats `rows`: its loss, norm term and gradient norm, of which one
    may be no number; then nothing is changed. The arguments are those of `train`.
    """
    device = value.unembed.device

    # 1) the two denominators, counted over the whole batch before it is cut into parts: so the
    #    parts' gradients add up to the batch's
    n = chats.loss_count(rows)
    norm_width, norm_count = chats.norm_count(rows, settings.norm_over)

    # 2) forward and backward, part by part
    sums = torch.zeros(2, device=device)  # cross-entropy, norm term
    for part in machine.parts(rows, settings.micro_batch_size):
        batch = chats.batch(part, device, norm_width)
        part_loss, part_sums = batch_loss(
            base, value, batch, autocast, 1 / n, settings.lam / norm_count
        )
        part_loss.backward()
        sums += part_sums
    total, total_norm = machine.total(*sums.tolist())

    # 3) one step of AdamW, unless something is no number any more
    gradient = torch.nn.utils.clip_grad_norm_(value.parameters(), settings.clip)
    numbers = {
        "loss": total / n,
        "norm": total_norm / norm_count,
        "gradient": machine.whole(gradient).item(),
    }
    if all(map(math.isfinite, numbers.values())):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad()
    return numbers


def nothing_more(done: int, value: Llama) -> dict[str, float]:
    """Nothing is measured along with the losses: `watch` of most runs."""
    return {}


def train(
    bases: Curriculum,
    value: Llama,
    chats: Chats,
    settings: Settings,
    out: Path,
    *,
    batch_loss: Callable = forward,
    measure: Callable = held_out_loss,
    watch: Callable[[int, Llama], dict] = nothing_more,
    machine: OneDevice = ONE_DEVICE,
    resume: bool = False,
    save_every: int = 500,
    autocast=FULL_PRECISION,
    name: str = "value",
    origin: dict | None = None,
) -> None:
    """Trains `value` in place to lower CE(z_post) + λ norm term. With settings.keep "best" it ends
    with the weights of the epoch whose held-out loss was best.

    bases: the frozen base of each step, or None for it: then `value` is trained by itself.
    batch_loss: the loss of a part of a batch, called as `forward` is.
    measure: the loss of the held-out chats, called as `held_out_loss` is.
    watch: what else is to be logged, asked before the first step and after each one.
    out, name: the folder of log and checkpoint, and what the log calls this run.
    origin: what else the numbers come from, see `Job.origin`; a checkpoint remembers it.
    Each step's losses go to out/log.jsonl. After every `save_every` steps, after an epoch, and when
    the run is to stop, all that the rest of it depends on goes to out/checkpoint.safetensors.
    Raises InputError for too few chats and for losses that are no numbers, KeyboardInterrupt when
    it was stopped.
    """
    # 1) what is trained on, and where an earlier run has left off
    held_rows, batches = split(chats, settings, len(bases.loads))
    steps = len(batches)
    per_epoch = steps // settings.epochs
    optimizer = adamw(value, settings)
    identity = made_with(settings, chats, origin, name)
    checkpoint = Checkpoint(out, value, optimizer, identity, steps, machine)
    best = Best(out, value, identity, machine)
    start = 0
    if resume:
        start = checkpoint.load()
        if settings.keep == "best":
            best.load(due=start >= per_epoch)
    shown = dict.fromkeys(("loss", "norm", "held_out"), "?")  # beside the bar

    def look(step: int, done: int, **more: float) -> float:
        """Measures the held-out chats after `done` steps, with the base of `step`: logs and shows
        it, and gives it back.
        """
        how = (chats, held_rows, settings.micro_batch_size, autocast, machine)
        if bases.at(step, steps) is not None:
            more["base_alone"] = bases.alone(lambda base: measure(base, None, *how))
        loss = measure(bases.at(step, steps), value, *how)
        check_finite(checkpoint, f"step {step}, held-out chats", held_out_loss=loss)
        log.note(step=step, done=done, held_out_loss=loss, **more)
        shown["held_out"] = f"{loss:.3f}"
        bar.set_postfix(shown)
        return loss

    with (
        Log(out / "log.jsonl", name, start, machine.writes) as log,
        Stop() as stop,
        tqdm(total=steps, initial=start, desc=name, unit=" steps", disable=None) as bar,
    ):
        begun = time.monotonic()
        if start == 0:
            best.clear()
            look(0, done=0, **watch(0, value))
        else:
            tell(f"{name}: going on after step {start} of {steps}")
        for step in range(start, steps):
            # 2) a step. `bases` is asked anew each time: a variable here would keep the old base
            #    alive while the next one is loaded
            rows = batches[step]
            lr = settings.lr * rate(step, steps, settings)
            numbers = train_step(
                bases.at(step, steps),
                value,
                optimizer,
                chats,
                rows,
                settings,
                lr,
                batch_loss=batch_loss,
                machine=machine,
                autocast=autocast,
            )
            entries = [int(chats.entry[i]) + 1 for i in chats.members(rows)]
            check_finite(checkpoint, f"step {step}, chats {entries} of the file", **numbers)

            # 3) what came of it
            targets = chats.count_targets(rows)
            log.note(step=step, **numbers, lr=lr, targets=targets, **watch(step + 1, value))
            shown |= {"loss": f"{numbers['loss']:.3f}", "norm": f"{numbers['norm']:.3f}"}
            bar.set_postfix(shown)
            bar.update()

            # 4) the held-out loss at the end of an epoch
            epoch_ends = (step + 1) % per_epoch == 0
            if epoch_ends:
                held_out_loss = look(step, done=step + 1)
                if settings.keep == "best":
                    best.offer(held_out_loss)
                words = ", ".join(f"{key} {number}" for key, number in shown.items())
                words += f", {time.monotonic() - begun:.0f} s"
                epoch = f"epoch {(step + 1) // per_epoch} of {settings.epochs}"
                tell(f"{name}, {epoch}, step {step + 1} of {steps}: {words}")

            # 5) a checkpoint then, now and then, and when somebody wants to stop (one rank's wish
            #    is all ranks': they stop after the same step)
            (stopped,) = machine.total(float(stop.asked > 0))
            if epoch_ends or (step + 1) % save_every == 0 or stopped:
                checkpoint.save(step + 1)
            if stopped and step + 1 < steps:
                raise KeyboardInterrupt

    # 6) the weights to keep
    if settings.keep == "best":
        best.restore()


def hold_out(chats: Chats, settings: Settings) -> tuple[list[int], Tensor]:
    """The chats that are held out, and those that are trained on. The same seed, the same split."""
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(chats), generator=generator)
    cut = max(1, round(settings.held_out * len(chats)))
    held, kept = order[:cut].tolist(), order[cut:]
    if not len(kept):
        raise InputError(
            f"only {len(chats)} chat is left; training and held-out loss need one each"
        )
    return held, kept


def split(chats: Chats, settings: Settings, bases: int = 1) -> tuple[list[int], Batches]:
    """The chats that are held out, and the batches of all epochs. Raises InputError for fewer
    batches than bases.
    """
    held, kept = hold_out(chats, settings)
    size, epochs = settings.batch_size, settings.epochs
    batches = Batches(kept, chats.lengths()[kept], size, epochs, settings.seed)
    if len(batches) < bases:
        raise InputError(
            f"{len(batches)} steps are too few for {bases} bases; give more chats or --epochs"
        )
    return held, batches


def adamw(value: Llama, settings: Settings) -> torch.optim.AdamW:
    """AdamW: matrices decay, vectors (norms) do not."""
    matrices = [p for p in value.parameters() if p.dim() > 1]
    others = [p for p in value.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=settings.lr,
        fused=True,
    )


def rate(step: int, steps: int, settings: Settings) -> float:
    """The share of the learning rate at a step: linear warm-up, then a cosine down to zero."""
    warmup = max(1, round(settings.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))


# ---------------------------------------------------------------- command line


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Options of the run that are not given are None or False."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what to train (nothing: the toy family)").add_argument
    add(
        "--base",
        nargs="+",
        type=model_directory,
        help="frozen base: a Hugging Face directory; several are a curriculum",
    )
    add(
        "--value",
        type=model_directory,
        help="weights that the value model starts from (default: the base's)",
    )
    add("--random", action="store_true", help="start from random weights; --value gives the shape")
    add(
        "--connection",
        choices=CONNECTIONS,
        help="what the value model reads: the text (residual), the base's probabilities (cascade), "
        "both (cascade+), the base's hidden state (probe); default: as --value was trained, else "
        "residual",
    )
    add(
        "--data",
        nargs="+",
        help="chats, in files (.json, .jsonl, .gz, .parquet) or folders, in the forms of chats.py",
    )
    add(
        "--teacher",
        type=model_directory,
        help="distil this model: its probabilities instead of the chats' own tokens",
    )
    add(
        "--chosen",
        action="store_true",
        help="of data with rejected replies, learn the chosen ones as demonstrations",
    )
    add("--out", help="directory of the trained model (default for the toy: out/toy)")
    add("--full", action="store_true", help="fine-tune the base itself, without a value model")
    add(
        "--evaluate",
        action="store_true",
        help="print the loss of base and pair and train nothing: on the chats that were held out, "
        "if --value was trained on just these, else on all",
    )
    add(
        "--dry_run",
        action="store_true",
        help="print steps, parameters, memory and time of the training after three steps of it, "
        "which are forgotten; only the cache of tokens is written",
    )
    add(
        "--show",
        type=whole(1, 10**6),
        metavar="N",
        help="print N chats as the model will see them, targets marked, and train nothing",
    )
    add(
        "--template",
        choices=TEMPLATES,
        help="chat template (default: the directory's own, else llama-2)",
    )
    add = parser.add_argument_group(
        "how (defaults for real models: the paper's Table 5)"
    ).add_argument
    add("--lr", type=number(0, 1e12), help="learning rate (1e-4; 1e-5 above 3B parameters)")
    add("--batch_size", type=COUNT, help="chats per step (32; 16 above 3B)")
    add("--micro_batch_size", type=COUNT, help="chats at a time, for less memory (4)")
    add("--epochs", type=COUNT, help="passes over the chats (3)")
    add("--max_length", type=COUNT, help="tokens per chat (4096, or the models' context)")
    add("--lam", type=number(0, 1e12), help="λ, weight of the norm term (1.0)")
    add(
        "--norm_over",
        choices=["response", "all"],
        help="norm term over the replies, or over every position, prompt and padding too, as the "
        "released code has it (response)",
    )
    add("--seed", type=SEED, help="order of the chats, held-out split (0)")
    add = parser.add_argument_group("with what").add_argument
    add("--resume", action="store_true", help="go on from OUT/checkpoint.safetensors")
    add(
        "--save_every",
        type=COUNT,
        help="steps between checkpoints (500); there is also one after each epoch",
    )
    add(
        "--keep",
        choices=["last", "best"],
        help="save the last weights, or those of the epoch with the best held-out loss (last)",
    )
    add(
        "--checkpointing", action="store_true", help="recompute activations: less memory, more time"
    )
    add("--compile", action="store_true", help="compile the blocks: slow to start, then faster")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16"],
        help="of the arithmetic; the trained weights stay float32 (auto: bfloat16 on CUDA)",
    )
    add(
        "--base_dtype",
        choices=["int8"],
        help="round the frozen base to eight bits: a quarter of float32's memory, half of "
        "bfloat16's, for a little precision (default: the base is in --dtype)",
    )
    return parser.parse_args(argv)


# options that an evaluation would have no use for
TRAINING_ONLY = (
    "lr",
    "batch_size",
    "epochs",
    "lam",
    "norm_over",
    "seed",
    "save_every",
    "keep",
    "checkpointing",
    "resume",
    "random",
    "teacher",
    "out",
    "full",
)
# each option, and those that would have no effect beside it
CONFLICTS = {
    "show": (
        *("evaluate", "micro_batch_size", "compile", "connection", "base_dtype"),
        *TRAINING_ONLY,
    ),
    "evaluate": ("chosen", *TRAINING_ONLY),
    "dry_run": ("show", "evaluate", "resume", "save_every"),
    "full": (
        *("value", "random", "connection", "teacher", "lam", "norm_over"),
        "base_dtype",
    ),
    "base_dtype": ("compile",),
}


def check(args: argparse.Namespace) -> None:
    """Raises InputError for options that are missing or cannot take effect."""
    writes = not (args.evaluate or args.show or args.dry_run)
    needed = ["data", "out"] if writes else ["data"]
    for name in needed:
        if getattr(args, name) is None:
            raise InputError(f"--{name} is missing")
    for option in given(args, *CONFLICTS):
        for other in given(args, *CONFLICTS[option]):
            raise InputError(f"--{option} and --{other} do not go together; leave one out")
    if len(args.base) > 1 and args.keep == "best":
        raise InputError("--keep best compares losses beside one base; leave it out, or give one")
    if len(args.base) > 1:
        for option in given(args, "full", "evaluate"):
            raise InputError(f"--{option} is for one base; give one")
    if args.evaluate and args.connection and not args.value:
        raise InputError("--evaluate needs --value for --connection; the base alone has none")
    models = [("base", base) for base in args.base]
    models += [("value", args.value), ("teacher", args.teacher)]
    refuse_overwriting("out", args.out, models)
    for data in args.data:
        inside = args.out and Path(args.out).resolve().is_relative_to(Path(data).resolve())
        if inside and Path(data).is_dir():
            raise InputError(
                f"--out {args.out}: lies in {data}, all of which is read as chats; give another"
            )


def run(
    args: argparse.Namespace,
    machine: OneDevice = ONE_DEVICE,
    watch: Callable[[int, Llama], dict] = nothing_more,
) -> None:
    """One training, or one evaluation, as the command line asks for it. watch: see `train`."""
    check(args)
    if args.show:
        from extras.show import show

        job = Job(args, table_5, machine)
        return show(job.chats, job.tokenizer, args.show)
    if args.evaluate:
        return evaluate(Job(args, table_5, machine))
    if args.dry_run:
        if args.out:
            refuse_stopped(Path(args.out), resume=False)
        return dry_run(Job(args, table_5, machine))

    # in a folder that no other run has; where a run was stopped, the command that goes on
    folder = own_folder(args.out, ["log.jsonl", CHECKPOINT]) if machine.writes else nullcontext()
    out = Path(args.out)
    checkpoint = out / CHECKPOINT
    with folder:
        if machine.writes:
            refuse_stopped(out, args.resume)
            if not args.resume and (out / "config.json").exists():
                tell(f"{out} holds a finished model, which this run will replace in the end")
        try:
            train_and_save(Job(args, table_5, machine), watch)
        except KeyboardInterrupt:
            if checkpoint.exists():
                print(f"stopped, and saved; this goes on:\n  {resuming()}", file=sys.stderr)
            raise


def losses_of(job: Job) -> tuple[Callable, Callable]:
    """The loss of a part of a batch, called as `forward` is, and of held-out chats, called as
    `held_out_loss` is.
    """
    if job.teacher is not None:
        from extras.losses import distill

        return partial(distill, job.teacher), held_out_loss
    if job.settings.beta:
        from extras.losses import held_out_pairs, prefer

        return partial(prefer, job.settings.beta), partial(held_out_pairs, job.settings.beta)
    return forward, held_out_loss


def train_and_save(job: Job, watch: Callable[[int, Llama], dict]) -> None:
    """Trains, saves what was trained, and says what it is worth."""
    args = job.args
    out = Path(args.out)
    name = "full" if args.full else "value"
    batch_loss, measure = losses_of(job)
    train(
        Curriculum(*job.loads),
        job.trained,
        job.chats,
        job.settings,
        out,
        batch_loss=batch_loss,
        measure=measure,
        watch=watch,
        machine=job.machine,
        resume=args.resume,
        save_every=args.save_every or 500,
        autocast=job.autocast,
        name=name,
        origin=job.origin(),
    )
    of_bases = None if args.full else "`, `".join(args.base)
    chats = job.chats.fingerprint()
    save_model(job.value, job.tokenizer, out, of_bases, job.settings, job.machine, chats)
    tell(f"\nsaved {out}")
    if job.machine.writes:
        entries = [entry for entry in read_log(out / "log.jsonl") if entry["run"] == name]
        held_rows, _ = hold_out(job.chats, job.settings)
        judge(entries, job.settings, args.full, len(held_rows))
        draw_curve(entries, out / "curve.png", unit_of(job.settings))
        pair = ["--base", args.base[-1], "--value", args.out]
        if args.full:
            pair = ["--base", args.out, "--value", "none"]
        tell(f"try\n  {shlex.join(['python', 'sample.py', *map(str, pair)])}")


def evaluate(job: Job) -> None:
    """Prints the loss of the base alone, and of the pair: on the chats that were held out where
    the value model was trained on just these, else on all.
    """
    rows = list(range(len(job.chats)))
    measured = f"all {len(rows)} chats"
    note = note_on(job.args.value) if job.args.value else {}
    if note.get("chats") == job.chats.fingerprint():
        job.settings.seed, job.settings.held_out = note["seed"], note["held_out"]
        rows, _ = hold_out(job.chats, job.settings)
        measured = f"the {len(rows)} of {len(job.chats)} chats that were held out in training"
    elif job.args.value:
        measured += "; if the value model was trained on some of them, that flatters it"
    tell(f"measured on {measured}")

    base = job.loads[0]()
    pairs = {"base alone": (base, None)}
    if job.args.value:
        pairs["base + value"] = (base, job.trained)
    losses = []
    for name, pair in pairs.items():
        size = job.settings.micro_batch_size
        nats = held_out_loss(*pair, job.chats, rows, size, job.autocast, job.machine)
        if not math.isfinite(nats):
            raise InputError(f"{name}: the loss is {nats}; these weights are of no use")
        tell(f"{name}: {nats:.4f} nats per token")
        losses.append(nats)
    if losses[-1] > losses[0]:
        warn("on these chats the value model makes its base worse")


def dry_run(job: Job) -> None:
    """Says what the training would take, after three steps of it beside the last base."""
    from extras.rehearse import rehearse, report

    settings, value = job.settings, job.trained
    held_rows, batches = split(job.chats, settings, len(job.loads))
    base = job.loads[-1]()
    optimizer = adamw(value, settings)
    batch_loss, measure = losses_of(job)
    how = {"batch_loss": batch_loss, "machine": job.machine, "autocast": job.autocast}
    size = settings.micro_batch_size

    def step(rows: list[int]) -> dict[str, float]:
        return train_step(base, value, optimizer, job.chats, rows, settings, settings.lr, **how)

    def look(rows: list[int]) -> None:
        measure(base, value, job.chats, rows, size, job.autocast, job.machine)

    seconds, memory = rehearse(job.chats, batches, held_rows, size, step, look, job.device)
    report(job, base, batches, len(held_rows), seconds, memory)


def main() -> None:
    args = arguments()
    machine = ONE_DEVICE
    if torchrun():
        from extras.sharding import Ranks

        machine = Ranks()
    if args.base is not None:
        run(args, machine)
        return
    if torchrun():
        raise InputError(
            "the toy family is made by one process: leave out torchrun, or give --base"
        )

    # without a base: the toy's family is made, and its runs are runs like any other
    from experiments import toy

    for toy_run, watch in toy.runs(args):
        run(toy_run, watch=watch)
    toy.table(args)


if __name__ == "__main__":
    command(main)
