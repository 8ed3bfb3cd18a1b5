"""A run's folder: log, checkpoint, best weights, the model in the end, and how it is stopped."""

import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch
from tqdm import tqdm

from model import Llama
from plumbing.dataset import Chats
from plumbing.files import (
    SEED,
    TABLE,
    TEXT,
    Field,
    InputError,
    check_tensor,
    fields_of,
    number,
    open_tensors,
    parse_json,
    read_text,
    torchrun,
    verify,
    whole,
    write_text,
    writing,
)
from plumbing.ranks import ONE_DEVICE, OneDevice
from plumbing.tokenizer import Tokenizer
from plumbing.weights import replacing_model

TWICE = 2.0  # seconds after which a second Ctrl-C is another one
CHECKPOINT = "checkpoint.safetensors"  # in OUT, as long as a run is not complete
BEST = "best.safetensors"  # likewise, with --keep best
FORMAT = "ivl checkpoint 2"
FINGERPRINTS = ("base", "value", "teacher", "chats")  # what a checkpoint knows by a hash
# of the note that a trained model has beside it
NOTED = {
    "seed": Field(SEED),
    "held_out": Field(number(0, 1)),
    "chats": Field(TEXT),
}
LOGGED = {"run": Field(TEXT), "step": Field(whole(0, 2**53))}  # of each line of OUT/log.jsonl


def tell(line: str) -> None:
    """A line to stdout, above a bar. That nobody reads it any more ends no training."""
    with suppress(OSError):
        tqdm.write(line)
        sys.stdout.flush()


def check_finite(checkpoint: "Checkpoint", where: str, **numbers: float) -> None:
    """Raises InputError if a number of a run is NaN or infinite: then all later ones would be."""
    for name, x in numbers.items():
        if not math.isfinite(x):
            raise InputError(
                f"{where}: {name} = {x}, so the training has failed; nothing of it is saved, "
                f"{checkpoint.last()}; look at these chats, or train anew with a lower --lr"
            )


def read_log(path: Path) -> list[dict]:
    """The lines of a log that are whole. Raises InputError."""
    lines = []
    if path.exists():
        lines = read_text(path).split("\n")[:-1]  # what follows is half a line, or nothing
    entries = []
    for i, line in enumerate(lines, 1):
        entry = parse_json(line, path, i)
        if entry not in TABLE:
            raise InputError(f"{path}, line {i}: is none of train.py's; move the file away")
        fields_of(entry, LOGGED, f"{path}, line {i}")
        entries.append(entry)
    return entries


class Log:
    """OUT/log.jsonl, one JSON object a line; without this run's lines from step `start` on, which
    are written again. Other runs' lines stay. Raises InputError.
    """

    def __init__(self, path: Path, run: str, start: int, writes: bool):
        self.path = path if writes else Path(os.devnull)
        self.run = run
        self.kept = self.keep(start) if writes else None
        self.file = None

    def keep(self, start: int) -> str:
        """The lines that stay."""
        kept = ""
        for entry in read_log(self.path):
            if entry["run"] != self.run or entry["step"] < start:
                kept += json.dumps(entry) + "\n"
        return kept

    def note(self, **entry) -> None:
        # only now, when there is something to tell, the earlier run's lines go
        if self.kept is not None:
            write_text(self.path, self.kept)
            self.kept = None
        with writing(self.path):
            if self.file is None:
                self.file = open(self.path, "a")
            self.file.write(json.dumps({"run": self.run, **entry}) + "\n")
            self.file.flush()

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        if self.file is not None:
            self.file.close()


class Stop:
    """Ctrl-C and SIGTERM, noted in the place of ending the program: a step can end first. Who asks
    again after a while is obeyed at once.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.asked = 0.0  # when, on the clock of `monotonic`

    def note(self, *_) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked = now
            with suppress(OSError, RuntimeError):  # whoever listened may be gone
                print("\nstopping after this step; once more stops at once", file=sys.stderr)
        elif now - self.asked > TWICE:  # sooner it is the same wish, passed on by torchrun
            raise KeyboardInterrupt

    def __enter__(self) -> "Stop":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # others get no signals
            self.before = {which: signal.signal(which, self.note) for which in self.SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for which, handler in self.before.items():
            signal.signal(which, handler)


def warn(words: str) -> None:
    print(f"warning: {words}", file=sys.stderr)


# ---------------------------------------------------------------- on disk


def made_with(settings, chats: Chats, origin: dict | None, name: str) -> dict:
    """All that the numbers of a run depend on: a checkpoint goes on only in the same run."""
    return {"run": name, "chats": chats.fingerprint(), **asdict(settings), **(origin or {})}


def date_of(checkpoint: Path) -> datetime | None:
    """The date that a run's chats were written with; None if it has none."""
    if not checkpoint.exists():
        return None
    run = parse_json((open_tensors(checkpoint).metadata() or {}).get("run", "{}"), checkpoint)
    with suppress(AttributeError, TypeError, ValueError):
        return datetime.fromisoformat(run.get("date"))
    return None


class Checkpoint:
    """The weights and the optimizer's state after some step, in a file of OUT.

    identity: what the run is made with, see `made_with`. steps: so many has it.
    """

    def __init__(
        self,
        out: Path,
        value: Llama,
        optimizer: torch.optim.Optimizer,
        identity: dict,
        steps: int,
        machine: OneDevice = ONE_DEVICE,
    ):
        self.path = out / CHECKPOINT
        self.value, self.optimizer = value, optimizer
        self.identity, self.steps, self.machine = identity, steps, machine
        self.step = None  # of the file, once it is written or read

    def last(self) -> str:
        """Where to go on from, in words."""
        if self.step is None:
            return "and there is no checkpoint yet"
        return f"and {self.path} holds step {self.step}"

    def size(self) -> float:
        """The norm of all weights together: finite only if they are."""
        return self.machine.whole(torch.nn.utils.get_total_norm(self.value.parameters())).item()

    def save(self, step: int) -> None:
        """Writes what `step` steps have made. Raises InputError if that is no numbers."""
        check_finite(self, f"after step {step - 1}", weights=self.size())
        tensors = {}
        for name, p in self.value.named_parameters():
            tensors[f"value.{name}"] = p.data
            for key, state in self.optimizer.state[p].items():
                tensors[f"{key}.{name}"] = state
        note = {"format": FORMAT, "step": str(step), "run": json.dumps(self.identity)}
        self.machine.write_tensors(tensors, self.path, note)
        self.step = step

    @torch.no_grad()
    def load(self) -> int:
        """Restores weights and optimizer; the next step. InputError for another run's file."""
        if not self.path.exists():
            raise InputError(f"{self.path}: no checkpoint to resume; leave out --resume")
        file = open_tensors(self.path)
        note = file.metadata() or {}
        if note.get("format") != FORMAT:
            raise InputError(f"{self.path}: is no checkpoint of this train.py; leave out --resume")
        if self.machine.writes:
            verify(file, self.path)
        self.check_run(parse_json(note.get("run", ""), self.path))
        step = note.get("step", "")
        if not step.isdecimal() or not 0 < int(step[:12]) <= self.steps:
            raise InputError(f"{self.path}: holds step {step[:20]!r} of {self.steps}; remove it")
        self.read(file)
        if not math.isfinite(self.size()):
            raise InputError(f"{self.path}: has weights that are not finite; remove it")
        self.step = int(step)
        return self.step

    def check_run(self, run: object) -> None:
        """Raises InputError for a checkpoint that was made with something else."""
        if run not in TABLE:
            raise InputError(f"{self.path}: does not say of which run it is; remove it")
        for field, now in self.identity.items():
            then = run.get(field)
            if then == now:
                continue
            words = f"{field} = {then!r}, not {now!r}"
            if field in FINGERPRINTS:  # whose numbers tell nobody a thing
                words = f"another {field}"
            raise InputError(f"{self.path}: was made with {words}; resume with the same")

    def read(self, file) -> None:
        """The tensors of an open file, each where it belongs. Raises InputError."""
        for name, p in self.value.named_parameters():
            shapes = {f"{key}.{name}": tuple(p.shape) for key in ("value", "exp_avg", "exp_avg_sq")}
            shapes[f"step.{name}"] = ()
            for tensor, shape in shapes.items():
                check_tensor(file, tensor, shape, self.path)

        for name, p in self.value.named_parameters():
            p.copy_(self.machine.read_tensor(file, f"value.{name}", p))
            # copies, or the state would stay a part of the file
            state = {"step": file.get_tensor(f"step.{name}").clone().to(p.device)}
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = self.machine.read_tensor(file, f"{key}.{name}", p).clone().to(p.device)
            self.optimizer.state[p] = state


class Best:
    """With --keep best: the weights of the lowest held-out loss so far, in a file of OUT.

    identity: see `Checkpoint`.
    """

    def __init__(self, out: Path, value: Llama, identity: dict, machine: OneDevice = ONE_DEVICE):
        self.path = out / BEST
        self.value, self.identity, self.machine = value, identity, machine
        self.loss = math.inf

    def clear(self) -> None:
        """Removes what an earlier run has left."""
        if self.machine.writes:
            self.path.unlink(missing_ok=True)

    def load(self, due: bool) -> None:
        """Finds out how good the best weights have been. due: whether there must be some by now.
        Raises InputError.
        """
        if not self.path.exists():
            if due:
                raise InputError(f"{self.path}: is missing; train anew, without --resume")
            return
        file = open_tensors(self.path)
        note = file.metadata() or {}
        if note.get("run") != json.dumps(self.identity):
            raise InputError(f"{self.path}: is of another run; train anew, without --resume")
        if self.machine.writes:
            verify(file, self.path)
        for name, p in self.value.named_parameters():
            check_tensor(file, name, tuple(p.shape), self.path)
        self.loss = float(note["held_out_loss"])

    def offer(self, loss: float) -> None:
        """The weights as they are have this held-out loss."""
        if loss < self.loss:
            tensors = {name: p.data for name, p in self.value.named_parameters()}
            note = {"run": json.dumps(self.identity), "held_out_loss": repr(loss)}
            self.machine.write_tensors(tensors, self.path, note)
            self.loss = loss

    @torch.no_grad()
    def restore(self) -> None:
        """Gives the model its best weights back."""
        file = open_tensors(self.path)
        for name, p in self.value.named_parameters():
            p.copy_(self.machine.read_tensor(file, name, p))


def save_model(
    value: Llama,
    tokenizer: Tokenizer,
    out: Path,
    base: str | None,
    settings,
    machine: OneDevice = ONE_DEVICE,
    chats: str = "",
) -> None:
    """The trained model as a Hugging Face directory, with a note on what it is, in the place of an
    earlier one. Then the run is complete, and its checkpoint goes.

    chats: the fingerprint of those that it was trained on, for the note.
    """
    with replacing_model(out) if machine.writes else nullcontext() as new:
        if settings.connection == "probe":
            value.save(new)
        else:
            machine.save(value, new)
        if machine.writes:
            describe(new, tokenizer, base, {**asdict(settings), "chats": chats})
    if machine.writes:
        (out / CHECKPOINT).unlink(missing_ok=True)
        (out / BEST).unlink(missing_ok=True)


def describe(out: Path, tokenizer: Tokenizer, base: str | None, made_with: dict) -> None:
    """What belongs beside a model's weights: tokenizer, connection, and a note for people, in which
    `note_on` finds again what it was made with.
    """
    kind = "A fine-tuned model."
    if base:
        kind = (
            f"A value model: it was trained to be added, logit by logit, to the frozen base "
            f"`{base}`.\nAlone it is a difference between two models, not a chat model."
        )
        if made_with["connection"] != "residual":
            from extras.connections import record_connection

            record_connection(out, made_with["connection"])
    tokenizer.save(out)
    noted = json.dumps(made_with, indent=2)
    write_text(out / "README.md", f"{kind}\n\n```json\n{noted}\n```\n")


def note_on(directory: str | Path) -> dict:
    """What a model was made with, by the note that `describe` has left; {} if there is none."""
    path = Path(directory) / "README.md"
    if not path.exists():
        return {}
    noted = read_text(path).partition("```json")[2].partition("```")[0]
    with suppress(InputError):
        made_with = parse_json(noted, path)
        return fields_of(made_with, NOTED, path) if made_with in TABLE else {}
    return {}


def refuse_stopped(out: Path, resume: bool) -> None:
    """Raises InputError for a run that would be lost, and for one that is not there to go on."""
    checkpoint = out / CHECKPOINT
    if checkpoint.exists() and not resume:
        raise InputError(
            f"{checkpoint}: holds a run that was stopped; go on with --resume, or remove it"
        )
    if resume and not checkpoint.exists() and (out / "config.json").exists():
        raise InputError(
            f"{out}: holds a finished model and no checkpoint, so there is nothing to go on with"
        )


def resuming() -> str:
    """The command that goes on with this run."""
    words = list(sys.argv)
    if "--resume" not in words:
        words.append("--resume")
    start = "python"
    if torchrun():
        start = f"torchrun --nproc_per_node {os.environ['LOCAL_WORLD_SIZE']}"
    return f"{start} {shlex.join(words)}"


def judge(log: list[dict], settings, full: bool, held_out: int) -> None:
    """Says what the training was worth on chats that it has not seen, and warns if it was harm.

    log: its entries, of which those with held-out losses are looked at. full: whether a model was
    trained by itself. held_out: how many chats, or pairs of them, were.
    """
    looks = {entry["done"]: entry for entry in log if "held_out_loss" in entry}
    before = looks.pop(0, None)
    if not before or not looks:
        tell("held-out loss: not known, the log has lost lines")
        return
    losses = {done: entry["held_out_loss"] for done, entry in looks.items()}
    last = max(losses)
    kept = last
    if settings.keep == "best":
        kept = min(losses, key=losses.get)
        tell(f"kept the weights after step {kept} of {last}")
    loss = losses[kept]

    # a model that is trained by itself is compared with what it was
    if full:
        alone = before["held_out_loss"]
        words = f"{alone:.3f} before training, {loss:.3f} after it"
        harm = "the model has become worse"
    else:
        alone = looks[kept]["base_alone"]
        words = f"{alone:.3f} by the base alone, {loss:.3f} with the value model"
        harm = "the value model makes its base worse"
    kind = "pairs" if settings.beta else "chats"
    tell(f"held-out loss: {words} ({unit_of(settings)}, {held_out} {kind})")
    if loss > alone:
        # what the losses of the epochs say: has it learnt too little, or too much?
        advice = "a lower --lr, fewer --epochs or --keep best may help, or more chats"
        if losses[last] == min(losses.values()) and loss < before["held_out_loss"]:
            advice = "it was still learning: more --epochs or a higher --lr may help"
        warn(f"on chats that were held out, {harm}; {advice}")


def draw_curve(entries: list[dict], picture: Path, unit: str) -> None:
    """The picture of the training, if it can be drawn: it decides nothing."""
    with suppress(OSError):
        picture.unlink(missing_ok=True)  # an earlier run's
    try:
        from extras.curve import draw

        draw(entries, picture, unit)
        tell(f"its curve: {picture}")
    except Exception as error:  # whatever a library of pictures may raise
        tell(f"no {picture.name}: {error}")


def unit_of(settings) -> str:
    """What held-out losses are in."""
    return "nats per pair" if settings.beta else "nats per token"
