"""Train a value model beside a frozen base.

    python train.py                                                 # the toy family, on any laptop
    python train.py --base DIR --data chats.json --out DIR          # your base, your chats
    python train.py --base DIR --full --data chats.json --out DIR   # fine-tune the model itself
    python train.py --base SMALL MEDIUM LARGE --data ... --out DIR  # a curriculum of bases
    python train.py --base DIR --value DIR --data chats.json --evaluate    # held-out loss of a pair
    torchrun --nproc_per_node 4 train.py --base DIR ...             # on four GPUs

DIRs are Hugging Face directories; --value DIR gives the weights to start from. A run that was
stopped goes on, step for step, with the same command and --resume. The losses of all steps are in
OUT/log.jsonl.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import TEMPLATES, Batch, Chats, Tokenizer, epoch_batches, tokenize
from files import (
    InputError,
    command,
    given,
    open_tensors,
    pick_device,
    pick_dtype,
    save_tensors,
    torchrun,
    writable_folder,
    write_text,
)
from ivl import shared_vocabulary, two_headed_loss
from model import CONNECTIONS, Config, Llama, load, recorded_connection, save

BILLION = 10**9
# on CUDA a batch's T is padded up to a multiple of this: every new shape costs time
ALIGNED = 128


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
    seed: int = 0


def paper_settings(model: Llama, configs: Sequence[Config]) -> dict:
    """Table 5's values for a model of this size, and ours where it has none.

    configs: of the models that it is trained beside; none where it is fine-tuned by itself.
    """
    big = model.size() > 3 * BILLION  # Table 5 knows 1.1B and 7B; this border is ours
    contexts = [config.max_position_embeddings for config in (model.config, *configs)]
    return {
        "lr": 1e-5 if big else 1e-4,
        "batch_size": 16 if big else 32,
        "micro_batch_size": 4,
        "epochs": 3,
        "max_length": min(4096, *contexts),
        "lam": 1.0 if configs else 0.0,
        "norm_over": "response",
    }


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

    def at(self, step: int, steps: int) -> Llama | None:
        """The base of a step."""
        stage = step * len(self.loads) // steps
        if stage != self.stage:
            self.base = None  # freed before the next one is loaded
            self.base = self.loads[stage]()
            self.stage = stage
        return self.base


class OneDevice:
    """What a run asks of the machine; extras/sharding.py answers for several GPUs."""

    writes = True  # whether this process writes the files that all share

    def load(
        self,
        directory: str | Path,
        device: torch.device,
        dtype: torch.dtype,
        arithmetic: torch.dtype,
    ) -> Llama:
        """A model in `dtype`; `arithmetic`, the type of its products, matters on several GPUs."""
        return load(directory, device, dtype)

    def save(self, model: Llama, directory: Path) -> None:
        save(model, directory)

    def parts(self, rows: list[int], size: int) -> list[list[int]]:
        """The chats `rows`, `size` at a time, that are this process's to read.

        Example:
        >>> OneDevice().parts([7, 3, 5], 2)
        [[7, 3], [5]]
        """
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def total(self, *numbers: float) -> list[float]:
        """Sums over all that were read, from the sums over what this process has read."""
        return list(numbers)

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor in one piece, gathered if it is cut up over several GPUs; here it is whole."""
        return tensor

    def rest(self, model: Llama) -> None:
        """Frees what several GPUs gathered for a forward pass; here nothing was gathered."""

    def write_tensors(self, tensors: dict[str, Tensor], path: Path, metadata: dict) -> None:
        save_tensors(tensors, path, metadata)

    def read_tensor(self, file, name: str, like: Tensor) -> Tensor:
        return file.get_tensor(name)

    def in_turn(self):
        """A `with` block that one process goes through first; the others then find its files."""
        return nullcontext()


ONE_DEVICE = OneDevice()
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


def train(
    bases: Curriculum,
    value: Llama,
    chats: Chats,
    settings: Settings,
    out: Path,
    *,
    batch_loss: Callable = forward,
    machine: OneDevice = ONE_DEVICE,
    resume: bool = False,
    save_every: int = 500,
    autocast=FULL_PRECISION,
    name: str = "value",
) -> None:
    """Trains `value` in place to lower CE(z_post) + λ norm term.

    bases: the frozen base of each step, or None for it: then `value` is trained by itself.
    batch_loss: the loss of a part of a batch, called as `forward` is.
    out, name: the folder of log and checkpoint, and what the log calls this run.
    Each step's losses go to out/log.jsonl; every `save_every` steps all that the rest of the run
    depends on goes to out/checkpoint.safetensors, which is removed when the run is complete.
    Raises InputError for too few chats.
    """
    device = value.unembed.device
    align = ALIGNED if device.type == "cuda" else 1
    held_rows, batches = split(chats, settings)
    steps = len(batches)
    optimizer = adamw(value, settings)
    checkpoint = out / "checkpoint.safetensors"
    start = 0
    if resume:
        start = load_checkpoint(checkpoint, value, optimizer, settings, chats, machine)

    def measure_held_out(step: int) -> float:
        return held_out_loss(
            bases.at(step, steps),
            value,
            chats.plain(),
            held_rows,
            settings.micro_batch_size,
            autocast,
            machine,
        )

    with (
        Log(out / "log.jsonl", name, start, machine.writes) as log,
        tqdm(total=steps, initial=start, desc=name, unit=" steps", disable=None) as bar,
    ):
        if start == 0:
            log.note(step=0, held_out_loss=measure_held_out(0))
        for step in range(start, steps):
            # 1) the two denominators, counted over the whole batch before it is cut into parts: so
            #    the parts' gradients add up to the batch's
            rows = batches[step]
            n = chats.loss_count(rows)
            norm_width, norm_count = chats.norm_count(rows, settings.norm_over)

            # 2) forward and backward, part by part. `bases` is asked anew each time: a variable
            #    here would keep the old base alive while the next one is loaded
            sums = torch.zeros(2, device=device)  # cross-entropy, norm term
            for part in machine.parts(rows, settings.micro_batch_size):
                batch = chats.batch(part, device, norm_width, align)
                loss, part_sums = batch_loss(
                    bases.at(step, steps), value, batch, autocast, 1 / n, settings.lam / norm_count
                )
                loss.backward()
                sums += part_sums
            total, total_norm = machine.total(*sums.tolist())

            # 3) one step of AdamW
            grad_norm = torch.nn.utils.clip_grad_norm_(value.parameters(), settings.clip)
            grad_norm = machine.whole(grad_norm).item()
            lr = settings.lr * rate(step, steps, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

            # 4) what came of it
            log.note(
                step=step,
                loss=total / n,
                norm=total_norm / norm_count,
                gradient=grad_norm,
                lr=lr,
                targets=chats.count_targets(rows),
            )
            bar.set_postfix(loss=f"{total / n:.3f}", norm=f"{total_norm / norm_count:.3f}")
            bar.update()

            # 5) at the end of an epoch, and now and then for the case that the run is stopped
            if (step + 1) % (steps // settings.epochs) == 0:
                log.note(step=step, held_out_loss=measure_held_out(step))
            if (step + 1) % save_every == 0 and step + 1 < steps:
                save_checkpoint(checkpoint, value, optimizer, settings, step + 1, chats, machine)
    checkpoint.unlink(missing_ok=True)


def split(chats: Chats, settings: Settings) -> tuple[list[int], list[list[int]]]:
    """The chats that are held out, and the batches of all epochs. The same seed, the same split."""
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(chats), generator=generator)
    cut = max(1, round(settings.held_out * len(chats)))
    held, kept = order[:cut].tolist(), order[cut:]
    if not len(kept):
        raise InputError(
            f"only {len(chats)} chat is left; training and held-out loss need one each"
        )
    batches = []
    for epoch in range(settings.epochs):
        seed = settings.seed * 1_000_003 + epoch
        for places in epoch_batches(chats.lengths()[kept], settings.batch_size, seed):
            batches.append(kept[places].tolist())  # places among those kept → rows of chats
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
    value None measures the base alone.
    """
    # the base alone: it takes the value model's place, with no base beside it
    if value is None:
        value = base
        base = None
    loss = n = 0
    for part in machine.parts(rows, size):
        _, sums = forward(base, value, chats.batch(part, value.unembed.device), autocast)
        loss += sums[0].item()
        n += chats.count_targets(part)
    machine.rest(value)
    loss, n = machine.total(loss, n)
    return loss / n


class Log:
    """OUT/log.jsonl, one JSON object a line; without this run's lines from step `start` on, which
    are written again. Other runs' lines stay.
    """

    def __init__(self, path: Path, run: str, start: int, writes: bool):
        self.run = run
        if writes:
            self.keep(path, start)
        self.file = open(path if writes else os.devnull, "a")

    def keep(self, path: Path, start: int) -> None:
        """Rewrites the file with the lines that stay."""
        text = path.read_text() if path.exists() else ""
        kept = []
        for line in text.split("\n")[:-1]:  # the last is empty, or what a crash has left of a line
            entry = json.loads(line)
            if entry["run"] != self.run or entry["step"] < start:
                kept.append(json.dumps(entry) + "\n")
        write_text(path, "".join(kept))

    def note(self, **entry) -> None:
        self.file.write(json.dumps({"run": self.run, **entry}) + "\n")
        self.file.flush()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()


# ---------------------------------------------------------------- on disk


def save_checkpoint(
    path: Path,
    value: Llama,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    step: int,
    chats: Chats,
    machine: OneDevice = ONE_DEVICE,
) -> None:
    """Writes the weights and the optimizer's state after `step` steps."""
    tensors = {}
    for name, p in value.named_parameters():
        tensors[f"value.{name}"] = p.data
        for key, state in optimizer.state[p].items():
            tensors[f"{key}.{name}"] = state
    machine.write_tensors(
        tensors,
        path,
        {"step": str(step), "chats": chats.report, "settings": json.dumps(asdict(settings))},
    )


@torch.no_grad()
def load_checkpoint(
    path: Path,
    value: Llama,
    optimizer: torch.optim.Optimizer,
    settings: Settings,
    chats: Chats,
    machine: OneDevice = ONE_DEVICE,
) -> int:
    """Restores weights and optimizer; the next step. InputError for other settings or chats."""
    if not path.exists():
        raise InputError(f"{path}: no checkpoint to resume; leave out --resume")
    file = open_tensors(path)
    made_with = file.metadata() or {}
    if not {"step", "chats", "settings"} <= set(made_with):
        raise InputError(f"{path}: is no checkpoint of train.py; leave out --resume")
    for field, old in json.loads(made_with["settings"]).items():
        now = getattr(settings, field)
        if old != now:
            raise InputError(
                f"{path}: was made with {field} = {old}, not {now}; resume with the same"
            )
    if made_with["chats"] != chats.report:
        raise InputError(
            f"{path}: was made with {made_with['chats']}, not {chats.report}; resume with "
            "the same --data"
        )

    for name, p in value.named_parameters():
        p.copy_(machine.read_tensor(file, f"value.{name}", p))
        state = {"step": file.get_tensor(f"step.{name}").to(p.device)}
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = machine.read_tensor(file, f"{key}.{name}", p).to(p.device)
        optimizer.state[p] = state
    return int(made_with["step"])


def save_model(
    value: Llama,
    tokenizer: Tokenizer,
    out: Path,
    base: str | None,
    settings: Settings,
    machine: OneDevice = ONE_DEVICE,
) -> None:
    """The trained model as a Hugging Face directory, with a note on what it is."""
    if settings.connection == "probe":
        value.save(out)
    else:
        machine.save(value, out)
    if not machine.writes:
        return
    kind = "A fine-tuned model."
    if base:
        kind = (
            f"A value model: it was trained to be added, logit by logit, to the frozen base "
            f"`{base}`.\nAlone it is a difference between two models, not a chat model."
        )
        if settings.connection != "residual":
            from extras.connections import record_connection

            record_connection(out, settings.connection)
    tokenizer.save(out)
    noted = json.dumps(asdict(settings), indent=2)
    write_text(out / "README.md", f"{kind}\n\n```json\n{noted}\n```\n")


# ---------------------------------------------------------------- command line


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line. Options of the run that are not given are None or False."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("what to train (nothing: the toy family)").add_argument
    add("--base", nargs="+", help="frozen base: a Hugging Face directory; several are a curriculum")
    add("--value", help="weights that the value model starts from (default: the base's)")
    add("--random", action="store_true", help="start from random weights; --value gives the shape")
    add(
        "--connection",
        choices=CONNECTIONS,
        help="what the value model reads: the text (residual), the base's probabilities (cascade), "
        "both (cascade+), the base's hidden state (probe); default: as --value was trained, else "
        "residual",
    )
    add("--data", help="chats: ShareGPT, messages or Alpaca, .json or .jsonl")
    add("--teacher", help="distil this model: its probabilities instead of the chats' own tokens")
    add(
        "--rejected", help="the chats of --data with worse replies: learn to prefer those of --data"
    )
    add("--out", help="directory of the trained model (default for the toy: out/toy)")
    add("--full", action="store_true", help="fine-tune the base itself, without a value model")
    add(
        "--evaluate",
        action="store_true",
        help="print the held-out loss of the pair and train nothing",
    )
    add(
        "--template",
        choices=TEMPLATES,
        help="chat template (default: the directory's own, else llama-2)",
    )
    add = parser.add_argument_group(
        "how (defaults for real models: the paper's Table 5)"
    ).add_argument
    add("--lr", type=float, help="learning rate (1e-4; 1e-5 above 3B parameters)")
    add("--batch_size", type=int, help="chats per step (32; 16 above 3B)")
    add("--micro_batch_size", type=int, help="chats at a time, for less memory (4)")
    add("--epochs", type=int, help="passes over the chats (3)")
    add("--max_length", type=int, help="tokens per chat (4096, or the models' context)")
    add("--lam", type=float, help="λ, weight of the norm term (1.0)")
    add(
        "--norm_over",
        choices=["response", "all"],
        help="norm term over the replies, or over every position, prompt and padding too, as the "
        "released code has it (response)",
    )
    add("--seed", type=int, help="order of the chats, held-out split (0)")
    add = parser.add_argument_group("with what").add_argument
    add("--resume", action="store_true", help="go on from OUT/checkpoint.safetensors")
    add("--save_every", type=int, help="steps between checkpoints (500)")
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
    args = parser.parse_args(argv)
    for name in ("batch_size", "micro_batch_size", "epochs", "max_length", "save_every"):
        number = getattr(args, name)
        if number is not None and number < 1:
            raise InputError(f"--{name} = {number}; it must be at least 1")
    return args


# options that an evaluation would have no use for
TRAINING_ONLY = (
    "lr",
    "batch_size",
    "epochs",
    "lam",
    "norm_over",
    "seed",
    "save_every",
    "checkpointing",
    "resume",
    "random",
    "teacher",
    "rejected",
    "out",
    "full",
)
# each option, and those that would have no effect beside it
CONFLICTS = {
    "evaluate": TRAINING_ONLY,
    "full": ("value", "random", "connection", "teacher", "rejected", "lam", "norm_over"),
    "rejected": ("teacher",),
}


def check(args: argparse.Namespace) -> None:
    """Raises InputError for options that are missing or cannot take effect."""
    needed = ["data"] if args.evaluate else ["data", "out"]
    for name in needed:
        if getattr(args, name) is None:
            raise InputError(f"--{name} is missing")
    for option in given(args, *CONFLICTS):
        for other in given(args, *CONFLICTS[option]):
            raise InputError(f"--{option} and --{other} do not go together; leave one out")
    if len(args.base) > 1:
        for option in given(args, "full", "evaluate"):
            raise InputError(f"--{option} is for one base; give one")
    if args.evaluate and args.connection and not args.value:
        raise InputError("--evaluate needs --value for --connection; the base alone has none")


def run(args: argparse.Namespace, machine: OneDevice = ONE_DEVICE) -> None:
    """One training, or one evaluation, as the command line asks for it."""
    check(args)
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    autocast = FULL_PRECISION
    if dtype != torch.float32:
        autocast = torch.autocast(device.type, dtype)
    if args.out:
        writable_folder(args.out)

    # 1) tokenizers, which must agree on what an id means, and the shapes of the frozen models
    source = args.value or args.base[0]
    frozen = args.base + ([args.teacher] if args.teacher else [])
    tokenizer = Tokenizer(source, args.template)
    connection = args.connection
    if connection is None:
        connection = recorded_connection(args.value) if args.value else "residual"
    if machine is not ONE_DEVICE and (
        connection != "residual" or given(args, "random", "teacher", "rejected", "compile")
    ):
        raise InputError(
            "under torchrun there is only --connection residual, without --random, --teacher, "
            "--rejected and --compile"
        )
    shared = len(tokenizer.tokens)  # so many leading ids mean the same everywhere
    configs = []
    for directory in frozen:
        other = Tokenizer(directory)
        shared = min(shared, shared_vocabulary(other.tokens, tokenizer.tokens))
        configs.append(Config.load(directory))
        other.check(configs[-1].vocab_size)

    # 2) the models
    def load_frozen(directory: str) -> Llama:
        base = machine.load(directory, device, dtype, dtype).requires_grad_(False)
        return compiled(base) if args.compile else base

    value = start_value(args, connection, configs[0], device, dtype, machine)
    tokenizer.check(value.config.vocab_size)
    loads = [partial(load_frozen, directory) for directory in args.base]
    if args.full:
        loads = [lambda: None]
    trained = value  # what `train` is given: the value model, or the Connected that wraps it
    if connection != "residual":
        from extras.connections import Connected

        def load_watched(directory: str) -> Llama:
            # called by Curriculum.at, when `trained` is the Connected that is made below
            return trained.watched(load_frozen(directory))

        trained = Connected(connection, value)
        loads = [partial(load_watched, directory) for directory in args.base]
    bases = Curriculum(*loads)

    # 3) the settings: the paper's, but for what was given
    beside = [] if args.full else configs
    settings = Settings(**paper_settings(value, beside), connection=connection)
    for field in fields(Settings):
        if getattr(args, field.name, None) is not None:
            setattr(settings, field.name, getattr(args, field.name))

    # 4) the chats, and the loss
    with machine.in_turn():
        chats = tokenize(args.data, tokenizer, settings.max_length)
    batch_loss = forward
    if args.teacher:
        from extras.losses import distill

        batch_loss = partial(distill, load_frozen(args.teacher))
    if args.rejected:
        from extras.losses import BETA, paired, prefer

        chats = paired(chats, tokenize(args.rejected, tokenizer, settings.max_length))
        settings.beta = BETA
        batch_loss = partial(prefer, settings.beta)
    print(f"{args.data}: {chats.report}")
    if int(chats.ids.max()) >= shared:
        raise InputError(
            f"{args.data}: uses token {int(chats.ids.max())}, which only one of the two "
            "vocabularies has"
        )

    # 5) either measure, or train and save
    if args.evaluate:
        base = bases.at(0, 1)
        rows = list(range(len(chats)))
        measured = {"base alone": (base, None)}
        if args.value:
            measured["base + value"] = (base, trained)
        for name, pair in measured.items():
            nats = held_out_loss(*pair, chats, rows, settings.micro_batch_size, autocast, machine)
            print(f"{name}: {nats:.4f} nats per token")
        return
    out = Path(args.out)
    train(
        bases,
        trained,
        chats,
        settings,
        out,
        batch_loss=batch_loss,
        machine=machine,
        resume=args.resume,
        save_every=args.save_every or 500,
        autocast=autocast,
        name="full" if args.full else "value",
    )
    of_bases = None if args.full else "`, `".join(args.base)
    save_model(value, tokenizer, out, of_bases, settings, machine)
    options = f"--base {args.base[-1]} --value {out}"
    if args.full:
        options = f"--base {out} --value none"
    print(f'\nsaved {out}; try\n  python sample.py {options} "Who are you?"')


def start_value(
    args: argparse.Namespace,
    connection: str,
    base_config: Config,
    device: torch.device,
    dtype: torch.dtype,
    machine: OneDevice,
) -> Llama:
    """The model that is trained, as it begins: in float32, whatever the arithmetic."""
    seed = args.seed or 0
    if connection == "probe":
        from extras.connections import Probe

        # a new one has random weights as it is, and there are no blocks in it
        without = ["checkpointing", "compile"] + ([] if args.value else ["random"])
        for option in given(args, *without):
            raise InputError(f"--{option} has no effect on a probe; leave it out")
        if args.value:
            value = Probe.load(args.value, device)
        else:
            value = Probe(base_config).init_weights(seed).to(device)
        value.check(args.base)
    else:
        value = machine.load(args.value or args.base[0], device, torch.float32, dtype)
        value.checkpointing = args.checkpointing
    if args.random:
        value.init_weights(seed)
    return compiled(value) if args.compile else value


def compiled(model: Llama) -> Llama:
    """The model with each of its blocks compiled, in place: one compilation serves them all."""
    for block in model.blocks:
        block.compile()
    return model


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

    for toy_run in toy.runs(args):
        run(toy_run)
    toy.table(args)


if __name__ == "__main__":
    command(main)
