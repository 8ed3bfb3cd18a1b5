"""What a training would take, told after three steps of it: `python train.py ... --dry_run`.

Nothing is written. The first step takes the widest batch, which decides the memory; the two others,
a narrow one and a wide one, tell the time of all.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from data import Chats
from files import peak_memory


def rehearse(
    chats: Chats,
    batches: list[list[int]],
    held_rows: list[int],
    micro_batch_size: int,
    step: Callable[[list[int]], None],
    look: Callable[[list[int]], None],
    device: torch.device,
) -> tuple[float, float, float]:
    """Tries a training: the seconds that its steps would take, the seconds of one look at all chats
    that are held out, and the most memory so far, in GB.

    batches, held_rows: of the whole training. step, look: one step on some chats; the held-out loss
    of some chats, of base and pair.
    """

    def size(rows: list[int]) -> int:
        return padded_tokens(chats, rows, micro_batch_size)

    def seconds(work: Callable, rows: list[int]) -> float:
        begun = time.perf_counter()
        work(rows)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    # three steps, and a look at a few chats that are held out
    narrow_to_wide = sorted(batches, key=size)
    tried = [narrow_to_wide[len(batches) // 4], narrow_to_wide[3 * len(batches) // 4]]
    step(narrow_to_wide[-1])
    each = [seconds(step, rows) for rows in tried]
    few = held_rows[: 4 * micro_batch_size]
    a_look = seconds(look, few)

    # time grows with the tokens, padding included
    per_token = sum(each) / sum(map(size, tried))
    training = per_token * sum(map(size, batches))
    looking = a_look / size(few) * size(held_rows)
    return training, looking, peak_memory(device)


def padded_tokens(chats: Chats, rows: list[int], micro_batch_size: int) -> int:
    """How many places of tokens a batch takes, part by part, padding included."""
    total = 0
    for start in range(0, len(rows), micro_batch_size):
        part = rows[start : start + micro_batch_size]
        total += len(chats.members(part)) * chats.width(part)
    return total


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


def free(folder: str | Path) -> float:
    """The room on the disk where a folder is or would be, in GB."""
    folder = Path(folder).resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 1e9
