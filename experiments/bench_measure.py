"""What bench.py measures with: time, memory, and the kernels of a step, on this machine."""

import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler says that it starts and stops

LONG = 10  # seconds, see `measure`
CPU = torch.device("cpu")
# aten operations that look at a tensor in another way or make room for one: nothing is computed
STILL = set(
    "alias as_strided contiguous detach empty empty_like empty_strided expand flatten item narrow "
    "permute reshape resize_ resolve_conj resolve_neg result_type select slice squeeze t to "
    "transpose unbind unflatten unsqueeze view _reshape_alias _unsafe_view".split()
)
PREPARED = {"copy_", "fill_", "zero_", "_to_copy"}  # also what becomes of a number that is added


@dataclass
class Measured:
    seconds: float  # median
    bytes: int  # of tensors at the peak, on top of those that were there before
    result: object  # what the run gave


# ---------------------------------------------------------------- time and memory


def seconds(run: Callable[[], object], device: torch.device = CPU) -> float:
    """How long a run takes, until the device is done."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def watched(run: Callable[[], object], device: torch.device) -> tuple[int, object]:
    """The bytes of tensors at the peak of a run, on top of those that were there before, and what
    the run gave.

    On CUDA a first run goes before: it compiles and records, which takes memory of its own; what it
    leaves behind for later runs (caches, workspaces) counts. On a CPU it is the sum over all that
    torch's allocator hands out and takes back: exact, where the program's resident memory would
    also count what malloc keeps for later.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        return torch.cuda.max_memory_allocated(device) - before, result

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    now = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak, result


def in_turns(
    variants: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, float]:
    """The median seconds of each variant: once to warm up, then `repeats` rounds in turns."""
    for run in variants.values():
        run()
    times = [[seconds(run, device) for run in variants.values()] for _ in range(repeats)]
    return dict(zip(variants, map(statistics.median, zip(*times))))


def measure(
    variants: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> Iterator[tuple[str, Measured]]:
    """Each variant once for its memory, which also warms it up; then `repeats` rounds in which they
    take turns on the clock. Gives a variant as soon as its last run is done.

    A variant that takes longer than LONG runs in the first round only: its ratio is far from 1.
    """
    if device.type == "cuda":
        open_libraries(device)
    memory = {}
    times = {name: [] for name in variants}
    with tqdm(total=len(variants) * (repeats + 1), unit=" runs", leave=False, disable=None) as bar:
        for name, run in variants.items():
            memory[name] = watched(run, device)
            bar.update()
        for turn in range(repeats):
            for name, run in variants.items():
                bar.update()
                if times[name] and times[name][0] >= LONG:
                    continue  # was given in the first round
                times[name].append(seconds(run, device))
                if turn == repeats - 1 or times[name][0] >= LONG:
                    yield name, Measured(statistics.median(times[name]), *memory[name])


def open_libraries(device: torch.device) -> None:
    """Has the libraries take their workspaces, which would else count for whoever comes first."""
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(128, 128, device=device, dtype=dtype)
        a @ a


# ---------------------------------------------------------------- the kernels of a run


@dataclass
class Kernel:
    name: str
    start: int  # nanoseconds
    end: int


def kernels(run: Callable[[], object], device: torch.device) -> list[Kernel]:
    """What a run executes, in the order of its beginning, by torch's profiler.

    On CUDA the kernels. On a CPU the aten operations that compute something and call no other one;
    of those that a GPU has a kernel for (their names begin with `_`, as in _fused_rms_norm) the
    operation itself. So their number is about that of a GPU's kernels.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as profiled:
        seconds(run, device)

    found = []
    if device.type == "cuda":
        for event in profiled.profiler.kineto_results.events():
            on_device = event.device_type() == torch.autograd.DeviceType.CUDA
            if on_device and not event.is_user_annotation() and not event.name().startswith("Mem"):
                found.append(Kernel(event.name(), event.start_ns(), event.end_ns()))
    else:
        for event in profiled.events():
            if event.cpu_parent is None:
                found += operations(event)
    return sorted(found, key=lambda kernel: kernel.start)


def operations(event) -> list[Kernel]:
    """The aten operations at or below a profiler's event that `kernels` counts."""
    name = event.name.removeprefix("aten::")
    whole = name.startswith("_") and name not in STILL | PREPARED
    inner = []
    if not whole:
        for child in event.cpu_children:
            inner += operations(child)
    # what an operation only copies or fills in beforehand belongs to it
    prepared = all(kernel.name in PREPARED for kernel in inner)
    if not prepared or not event.name.startswith("aten::") or name in STILL:
        return inner
    start, end = event.time_range.start, event.time_range.end  # microseconds
    return [Kernel(name, int(1000 * start), int(1000 * end))]


def idle(found: list[Kernel]) -> tuple[int, int]:
    """Nanoseconds from the first kernel's start to the last one's end, and those of them in which
    none ran. Kernels may overlap.

    Example: from 0 to 10 and from 15 to 20, with one from 2 to 4 beside the first
    >>> idle([Kernel("a", 0, 10), Kernel("b", 2, 4), Kernel("c", 15, 20)])
    (20, 5)
    """
    gaps = 0
    until = found[0].start
    for kernel in found:
        gaps += max(0, kernel.start - until)
        until = max(until, kernel.end)
    return until - found[0].start, gaps


def by_time(found: list[Kernel], most: int) -> list[tuple[str, int, int]]:
    """The kernels that take most of the time: name, how often, nanoseconds in all."""
    times, numbers = Counter(), Counter()
    for kernel in found:
        times[kernel.name] += kernel.end - kernel.start
        numbers[kernel.name] += 1
    return [(name, numbers[name], total) for name, total in times.most_common(most)]


# ---------------------------------------------------------------- the machine


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of copying a tensor that is larger than any cache."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = source.clone()
    times = [seconds(lambda: target.copy_(source), device) for _ in range(9)]
    return 2 * size / statistics.median(times)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP per second of a large square matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = random_matrix(n, device, dtype), random_matrix(n, device, dtype)
    times = [seconds(lambda: a @ b, device) for _ in range(9)]
    return 2 * n**3 / statistics.median(times)


def random_matrix(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, n, device=device, dtype=dtype)


def machine(device: torch.device) -> str:
    """What was measured on, in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":")[1].strip()
                break
    threads = torch.get_num_threads()
    return f"{model}, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}"
