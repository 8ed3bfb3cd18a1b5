"""The edge to the outside: files, devices, errors. Every other file leans on this one.

Bad input ends in one clear line: `InputError` is for what a user can mend, and `command` turns it
into that line and exit status 2. Output appears whole or not at all: `replacing` writes under a
temporary name.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {  # as safetensors calls them
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class InputError(Exception):
    """Something given cannot be used; the message names the file, the field and the remedy."""


# ---------------------------------------------------------------- reading


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark. Raises InputError."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from None


def read_json(path: str | Path, kind: type = object):
    """The parsed contents of a JSON file. InputError if it is not valid, or not a `kind`."""
    try:
        parsed = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    if not isinstance(parsed, kind):
        raise InputError(f"{path}: holds a {type(parsed).__name__} where a {kind.__name__} belongs")
    return parsed


def read_texts(path: str | Path) -> list[str]:
    """The texts of a file: the strings of a .json or .jsonl file, else its paragraphs. Raises
    InputError if there are none.

    Strings of at most 20 characters are roles and names and are left out; texts are cut into pieces
    of 2000 characters.
    """

    def strings(x) -> Iterator[str]:
        """All strings in a parsed JSON, however deep."""
        if isinstance(x, str):
            yield x
        elif isinstance(x, (list, dict)):
            for y in x.values() if isinstance(x, dict) else x:
                yield from strings(y)

    if str(path).endswith(".json"):
        texts = [text for text in strings(read_json(path)) if len(text) > 20]
    elif str(path).endswith(".jsonl"):
        lines = [line for line in read_text(path).split("\n") if line.strip()]
        try:
            records = [json.loads(line) for line in lines]
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: a line is not valid JSON ({error.msg})") from None
        texts = [text for text in strings(records) if len(text) > 20]
    else:
        texts = [text for text in re.split(r"\n\s*\n", read_text(path)) if text.strip()]
    if not texts:
        raise InputError(f"{path}: holds no text")
    return [text[i : i + 2000] for text in texts for i in range(0, len(text), 2000)]


# ---------------------------------------------------------------- writing


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary name, which replaces `path` if the block ends without an error."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); check the folder and the free space"
        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file whole or not at all. Raises InputError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def open_tensors(path: str | Path) -> safe_open:
    """A safetensors file, opened; a tensor is read when asked for. Raises InputError."""
    try:
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: not a readable safetensors file ({error}); download or make it again"
        ) from None


def save_tensors(
    tensors: dict[str, Tensor],
    path: str | Path,
    metadata: dict[str, str],
    fetch: Callable[[str], Tensor] | None = None,
) -> None:
    """Writes a safetensors file whole or not at all, one tensor at a time. Raises InputError.

    fetch: name → the data, asked for when its turn comes; `tensors` then only tell dtypes and
    shapes.
    """
    # the header: of each tensor its type, shape, and place in the file
    # the widest types first: so each tensor begins at a multiple of its item size
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    header = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.itemsize
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    front = json.dumps(header).encode()
    front += b" " * (-len(front) % 8)  # so that the data begins at a multiple of 8 bytes

    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(front).to_bytes(8, "little") + front)
        for name, tensor in tensors.items():
            if fetch:
                tensor = fetch(name).to("cpu", tensor.dtype)
            data = tensor.cpu().contiguous().flatten().view(torch.uint8)
            file.write(data.numpy())


def writable_folder(path: str | Path) -> Path:
    """Makes a folder and proves that it can be written to, before hours are spent."""
    with replacing(Path(path) / ".writable") as temporary:
        temporary.touch()
    (Path(path) / ".writable").unlink(missing_ok=True)  # another rank may have been faster
    return Path(path)


# ---------------------------------------------------------------- devices


def torchrun() -> bool:
    """Whether torchrun has started this process, as one of several: see extras/sharding.py."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def main_process() -> bool:
    """Whether this process writes what all have made."""
    return os.environ.get("RANK", "0") == "0" or not torchrun()


def pick_device(name: str) -> torch.device:
    """'auto' is CUDA, else Apple's MPS, else the CPU. Raises InputError if it is not there."""
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # torchrun starts one process for each GPU
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(
            f"--device {name}: there is no such device here; try --device cpu"
        ) from None


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 on CUDA, else float32."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, name)


def peak_memory(device: torch.device) -> float:
    """The most memory taken so far, in GB: the device's on CUDA, else the whole program's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---------------------------------------------------------------- command lines


def given(args: argparse.Namespace, *names: str) -> list[str]:
    """Those of the options that the command line has; None and False are no option, 0 is one.

    Example:
    >>> given(argparse.Namespace(lam=0.0, full=False, value=None), "lam", "full", "value")
    ['lam']
    """
    # not `in (None, False)`: 0 == False
    return [
        name
        for name in names
        if getattr(args, name) is not None and getattr(args, name) is not False
    ]


def command(main: Callable[[], None]) -> None:
    """Runs a script's `main`: what the user can mend becomes one line and exit status 2."""
    if torchrun():
        from extras.sharding import ranks

        main = ranks()(main)  # a context manager, here as a decorator: main runs inside it
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError:
        print(
            "error: the device is out of memory; lower --micro_batch_size or --max_length "
            "(training), --batch_size or --max_new_tokens (sampling), or choose --dtype bfloat16",
            file=sys.stderr,
        )
        sys.exit(2)
    except BrokenPipeError:  # whoever read it, `head` say, has had enough
        # stdout now leads nowhere, or Python's flush at exit would raise the error again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
