"""What a training would take, told after three steps of it: `python train.py ... --dry_run`.

Nothing of it is saved. The first step takes the widest batch, which decides the memory; the two
others, a narrow one and a wide one, tell the time of all.
"""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from model import Llama
from plumbing.dataset import Batches, Chats
from plumbing.files import InputError, peak_memory
from plumbing.jobs import Job
from plumbing.runs import tell

FLOAT = 4  # bytes of a trained weight, and of each of the optimizer's two numbers beside it


def rehearse(
    chats: Chats,
    batches: Batches,
    held_rows: list[int],
    micro_batch_size: int,
    step: Callable[[list[int]], dict[str, float]],
    look: Callable[[list[int]], None],
    device: torch.device,
) -> tuple[float, float]:
    """Tries a training: the seconds that all of it would take, and the most memory so far, in GB.

    batches, held_rows: of the whole training. step: one step on some chats, gives its loss and the
    like; look: the held-out loss of some chats. Raises InputError for numbers that are none.
    """

    def size(rows: list[int]) -> int:
        return padded_tokens(chats, rows, micro_batch_size)

    def seconds(work: Callable, rows: list[int]) -> float:
        begun = time.perf_counter()
        numbers = work(rows) or {}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for name, x in numbers.items():
            if not math.isfinite(x):
                raise InputError(f"a step has {name} = {x}: such a training fails")
        return time.perf_counter() - begun

    # three steps, and a look at a few chats that are held out
    epoch = batches.of_epoch(0)
    narrow_to_wide = sorted(epoch, key=size)
    tried = [narrow_to_wide[len(epoch) // 4], narrow_to_wide[3 * len(epoch) // 4]]
    seconds(step, narrow_to_wide[-1])
    each = [seconds(step, rows) for rows in tried]
    few = held_rows[: 4 * micro_batch_size]
    a_look = seconds(look, few)

    # time grows with the tokens, padding included
    training = sum(each) / sum(map(size, tried)) * batches.epochs * sum(map(size, epoch))
    looking = a_look / size(few) * size(held_rows)
    return training + (batches.epochs + 1) * looking, peak_memory(device)


def report(
    job: Job, base: Llama | None, batches: Batches, held_out: int, seconds: float, memory: float
) -> None:
    """Prints what a training would take. base: that of its last steps; held_out: so many chats."""
    settings, value = job.settings, job.trained
    frozen = "no base"
    if base is not None:
        frozen = f"{base.size():,} parameters: {job.args.base[-1]}"
    rows = [
        ("trained on", f"{len(job.chats) - held_out:,} chats"),
        ("held out", f"{held_out:,} chats"),
        ("steps", f"{len(batches):,} of {settings.batch_size} chats, {settings.epochs} epochs"),
        ("trained", f"{value.size():,} parameters"),
        ("frozen", frozen),
        ("memory", f"{memory:.2f} GB with the widest batch, on {job.device}"),
        ("disk", on_disk(value.size(), settings.keep == "best", job.args.out)),
        ("time", f"about {in_words(seconds)}, after three steps"),
    ]
    for name, words in rows:
        tell(f"  {name:<18}{words}")
    tell("  " + ", ".join(f"{name} {x}" for name, x in asdict(settings).items()))


def padded_tokens(chats: Chats, rows: list[int], micro_batch_size: int) -> int:
    """How many places of tokens a batch takes, part by part, padding included."""
    total = 0
    for start in range(0, len(rows), micro_batch_size):
        part = rows[start : start + micro_batch_size]
        total += len(chats.members(part)) * chats.width(part)
    return total


def on_disk(parameters: int, keeps_best: bool, out: str | None) -> str:
    """The room that a training needs on the disk, and how much there is.

    While a checkpoint (weights and two numbers of the optimizer for each) is written, the one
    before it is still there.

    Example:
    >>> on_disk(10**9, keeps_best=False, out=None)
    '4.000 GB for the model, up to 24.000 GB on the way'
    """
    model = parameters * FLOAT / 1e9
    way = (2 * 3 + keeps_best) * model
    words = f"{model:.3f} GB for the model, up to {way:.3f} GB on the way"
    if out:
        folder = Path(out).resolve()
        while not folder.exists():
            folder = folder.parent
        words += f"; {shutil.disk_usage(folder).free / 1e9:.1f} GB are free in {folder}"
    return words


def in_words(seconds: float) -> str:
    """
    Example:
    >>> in_words(42.3), in_words(754), in_words(12345)
    ('42 s', '12 min 34 s', '3 h 25 min')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
