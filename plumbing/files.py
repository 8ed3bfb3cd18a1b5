"""The edge to the outside: files, devices, errors. Every other file leans on this one.

Bad input ends in one clear line: `InputError` is for what a user can mend, and `command` turns it
into that line and exit status 2. What an option or a field of a file may be is said once, by a
`Kind`. Output appears whole or not at all: `replacing` writes under a temporary name.
"""

import argparse
import gzip
import hashlib
import json
import os
import platform
import re
import reprlib
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

try:
    import fcntl
except ImportError:  # not on Windows, where no folder is locked
    fcntl = None

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


# in the metadata of the tensors that we write: a hash of the file, made while it was still unknown
HASH, UNKNOWN = "sha256", b"?" * 64


class InputError(Exception):
    """Something given cannot be used; the message names the file, the field and the remedy."""


# ---------------------------------------------------------------- what may be given


@dataclass(frozen=True)
class Kind:
    """What an option or a field of a file may be: in words, as a test, and read from an option.

    Example:
    >>> 3 in whole(1, 9), True in whole(1, 9), 0.5 in number(0, 1), float("nan") in number(0, 1)
    (True, False, True, False)
    """

    words: str
    test: Callable[[object], bool]
    parse: Callable[[str], object] = str

    def __contains__(self, x: object) -> bool:
        return self.test(x)

    def __or__(self, other: "Kind") -> "Kind":
        return Kind(f"{self.words} or {other.words}", lambda x: x in self or x in other)

    def __call__(self, text: str):
        """The value of an option: argparse's `type`."""
        x = None
        with suppress(ValueError):
            x = self.parse(text)
        if x not in self:
            raise argparse.ArgumentTypeError(f"{reprlib.repr(text)} is not {self.words}")
        return x


def whole(least: int, most: int) -> Kind:
    """Whole numbers in a range. To Python True is one too: not here."""
    words = f"a whole number from {least} to {most}"
    return Kind(words, lambda x: type(x) is int and least <= x <= most, int)


def number(least: float, most: float) -> Kind:
    """Numbers in a range; NaN and infinity are in none."""
    words = f"a number from {least:g} to {most:g}"
    return Kind(words, lambda x: type(x) in (int, float) and least <= x <= most, float)


def list_of(kind: Kind) -> Kind:
    words = f"a list, each {kind.words}"
    return Kind(words, lambda x: isinstance(x, list) and all(y in kind for y in x))


TEXT = Kind("a text", lambda x: isinstance(x, str))
FLAG = Kind("true or false", lambda x: isinstance(x, bool))
LIST = Kind("a list", lambda x: isinstance(x, list))
TABLE = Kind("an object {...}", lambda x: isinstance(x, dict))
SEED = whole(0, 2**32 - 1)
REQUIRED = object()


class Field(NamedTuple):
    """A field of a JSON file: what it may be, and what it is where the file has none, or null."""

    kind: Kind
    default: object = REQUIRED


def fields_of(raw: Mapping, table: dict[str, Field], place: str | Path) -> dict:
    """The fields of an object that a table names. Raises InputError, in which `place` is named.

    Example:
    >>> fields_of({"layers": 2, "else": 5}, {"layers": Field(whole(1, 9))}, "config.json")
    {'layers': 2}
    """
    found = {}
    for name, field in table.items():
        x = raw.get(name)
        if x is None:
            x = field.default
            if x is REQUIRED:
                raise InputError(f"{place}: {name} is missing; it must be {field.kind.words}")
        elif x not in field.kind:
            raise InputError(f"{place}: {name} = {reprlib.repr(x)}; it must be {field.kind.words}")
        found[name] = x
    return found


# ---------------------------------------------------------------- reading


def readable(path: str | Path) -> Path:
    """The path of a file that can be opened. Raises InputError for one that is not there, for a
    folder, and for a pipe, which might let us wait for ever.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); check the path") from None
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: cannot be read (it is a folder, or no plain file)")
    return Path(path)


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, with or without a byte-order mark, or of one packed as .gz. Raises
    InputError.
    """
    opened = gzip.open if str(path).endswith(".gz") else open
    try:
        with opened(readable(path), "rt", encoding="utf-8-sig") as file:
            return file.read()
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); check the path") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from None


def read_json(path: str | Path, kind: Kind):
    """The parsed contents of a JSON file. InputError if it is not valid, or not of this kind."""
    parsed = parse_json(read_text(path), path)
    if parsed not in kind:
        raise InputError(f"{path}: holds {reprlib.repr(parsed)}; it must be {kind.words}")
    return parsed


def read_fields(path: str | Path, table: dict[str, Field]) -> dict:
    """The fields of a JSON file that a table names, see `fields_of`. Raises InputError."""
    return fields_of(read_json(path, TABLE), table, path)


def parse_json(text: str, path: str | Path, line: int | None = None):
    """A JSON text, parsed; `line`: its place in a file of many. Raises InputError."""

    def refuse(constant: str):
        raise ValueError(f"{constant} is no number of JSON")

    place = path if line is None else f"{path}, line {line}"
    try:
        parsed = json.loads(text, parse_constant=refuse)
        # half a character, which JSON can spell and no file can hold
        if re.search(r"\\u[dD][89abAB]", text):
            json.dumps(parsed, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}, line {line or error.lineno}: not valid JSON ({error.msg})"
        ) from None
    except UnicodeEncodeError:
        raise InputError(
            f"{place}: has half a character (\\ud800 to \\udfff, alone); write it whole or "
            "leave it out"
        ) from None
    except (ValueError, RecursionError) as error:  # digits by the thousand, lists in lists in ...
        raise InputError(f"{place}: not valid JSON ({reprlib.repr(str(error))})") from None
    return parsed


def read_lines(path: str | Path) -> list[tuple[int, object]]:
    """The parsed lines of a .jsonl file, each with its number; empty ones are left out. Raises
    InputError.
    """
    lines = read_text(path).split("\n")  # splitlines() would also split inside a string
    return [(i, parse_json(line, path, i)) for i, line in enumerate(lines, 1) if line.strip()]


def whole_lines(path: str | Path) -> str:
    """The text of a file to which a run adds lines; a last line that a kill has torn is cut off,
    from the file too. Raises InputError.
    """
    text = read_text(path)
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    return whole


def read_texts(path: str | Path) -> list[str]:
    """The texts of a file: the strings of a .json or .jsonl file, else its paragraphs. Raises
    InputError if there are none.

    Strings of at most 20 characters are roles and names and are left out; texts are cut into pieces
    of 2000 characters.
    """

    def strings(parsed) -> list[str]:
        """All strings in a parsed JSON, however deep, in order."""
        found, left = [], [parsed]
        while left:
            x = left.pop()
            if isinstance(x, str):
                found.append(x)
            elif isinstance(x, (list, dict)):
                # the last one is looked at first
                left += reversed(x.values() if isinstance(x, dict) else x)
        return found

    if str(path).endswith((".json", ".jsonl")):
        if str(path).endswith(".json"):
            parsed = parse_json(read_text(path), path)
        else:
            parsed = [record for _, record in read_lines(path)]
        texts = [text for text in strings(parsed) if len(text) > 20]
    else:
        texts = [text for text in re.split(r"\n\s*\n", read_text(path)) if text.strip()]
    if not texts:
        raise InputError(f"{path}: holds no text")
    return [text[i : i + 2000] for text in texts for i in range(0, len(text), 2000)]


def open_tensors(path: str | Path) -> safe_open:
    """A safetensors file, opened; a tensor is read when asked for. Raises InputError."""
    try:
        return safe_open(readable(path), "pt")
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: not a readable safetensors file ({error}); download or make it again"
        ) from None


def verify(file: safe_open, path: str | Path) -> None:
    """Raises InputError unless all of an open file is as `save_tensors` has written it."""
    noted = (file.metadata() or {}).get(HASH)
    if not noted or noted != hash_of(path, noted):
        raise InputError(f"{path}: is damaged (not as it was written); remove or make it again")


def hash_of(path: str | Path, noted: str) -> str:
    """The hash of a safetensors file with the hash that is noted in it blanked out."""
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        hashed.update(file.read(size).replace(noted.encode(), UNKNOWN))
        while piece := file.read(2**20):
            hashed.update(piece)
    return hashed.hexdigest()


def check_tensor(file: safe_open, name: str, shape: tuple[int, ...], path: str | Path) -> None:
    """Raises InputError unless an open file has this tensor, in float32 and of this shape."""
    try:
        tensor = file.get_slice(name)
    except SafetensorError:
        raise InputError(f"{path}: tensor {name} is missing; the file is damaged") from None
    found = tensor.get_dtype(), tuple(tensor.get_shape())
    if found != ("F32", shape):
        raise InputError(f"{path}: tensor {name} is {found}; it must be {('F32', shape)}")


# ---------------------------------------------------------------- writing


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What goes wrong in the block is told as an InputError about this file."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); check the folder and the free space"
        ) from None


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Gives a temporary name, which replaces `path` if the block ends without an error. A link
    stays a link: what it leads to is replaced.
    """
    path = Path(path)
    refuse_non_file(path)
    if path.is_symlink():
        path = path.resolve()
    temporary = temporary_for(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            clear_temporaries(path.parent)
            yield temporary
            # on the disk, before what it replaces is gone
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        remove(temporary)


def refuse_non_file(path: Path) -> None:
    """Raises InputError for a folder, and for a device, say, in whose place a file would stand."""
    # (/dev/stdout is a file wherever it is redirected to one)
    of_system = str(path.absolute().parent) in ("/dev", "/dev/fd", "/proc/self/fd")
    if of_system or (path.exists() and not path.is_file()):
        raise InputError(f"{path}: cannot be written (it is a folder, or no plain file)")


def temporary_for(path: Path) -> Path:
    """A name beside `path` that tells which process of which machine is writing there."""
    return path.with_name(f".{path.name}.ivl-{platform.node()}-{os.getpid()}.tmp")


def clear_temporaries(folder: Path, of_all: bool = False) -> None:
    """Removes what writers that were killed have left in a folder.

    of_all: whoever they were; for a folder in which nobody else can be writing.
    """
    for temporary in folder.glob(".*.ivl-*.tmp"):
        machine, _, process = temporary.name[:-4].rpartition(".ivl-")[2].rpartition("-")
        is_dead = machine == platform.node() and process.isdecimal() and not is_alive(int(process))
        if of_all or is_dead:
            remove(temporary)


def is_alive(process: int) -> bool:
    """Whether a process of this machine is running."""
    if os.name != "posix":
        return True  # elsewhere asking would end it
    try:
        os.kill(process, 0)  # asks only
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def remove(path: Path) -> None:
    """Removes a file or a folder, if it is there."""
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file whole or not at all. Raises InputError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_tensors(
    tensors: dict[str, Tensor],
    path: str | Path,
    metadata: dict[str, str],
    fetch: Callable[[str], Tensor] | None = None,
) -> None:
    """Writes a safetensors file whole or not at all, one tensor at a time, and a hash of them all
    into its metadata. Raises InputError.

    fetch: name → the data, asked for when its turn comes; `tensors` then only tell dtypes and
    shapes.
    """
    # the header: of each tensor its type, shape, and place in the file
    # the widest types first: so each tensor begins at a multiple of its item size
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))
    header = {"__metadata__": {**metadata, HASH: UNKNOWN.decode()}}
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

    hashed = hashlib.sha256(front)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(len(front).to_bytes(8, "little") + front)
        for name, tensor in tensors.items():
            if fetch:
                tensor = fetch(name).to("cpu", tensor.dtype)
            data = tensor.cpu().contiguous().flatten().view(torch.uint8).numpy()
            hashed.update(data)
            file.write(data)
        file.seek(8 + front.index(UNKNOWN))
        file.write(hashed.hexdigest().encode())


def writable_folder(path: str | Path) -> Path:
    """Makes a folder and proves that it can be written to, before hours are spent."""
    with replacing(Path(path) / ".writable") as temporary:
        temporary.touch()
    (Path(path) / ".writable").unlink(missing_ok=True)  # another rank may have been faster
    return Path(path)


def writable_file(path: str | Path) -> None:
    """Proves that a file can be written, before minutes are spent on what goes into it."""
    refuse_non_file(Path(path))
    writable_folder(Path(path).parent)


@contextmanager
def own_folder(path: str | Path, marks: Collection[str]) -> Iterator[Path]:
    """A folder that belongs to this process until the block ends, made if it is not there.

    marks: names of which a folder of ours has one. Raises InputError for a folder with files of
    others, for one that another process has, and for one that cannot be written to.
    """
    path = Path(path)
    held = []
    if path.is_dir():
        held = [file.name for file in path.iterdir() if not file.name.startswith(".")]
    if held and not set(marks) & set(held):
        raise InputError(
            f"{path}: holds files that are not from here ({min(held)}); give a folder that is new "
            "or empty"
        )
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(path)
    try:
        writable_folder(path)
        if lock is not None:
            clear_temporaries(path, of_all=True)
        yield path
    finally:
        if lock is not None:
            os.close(lock)


def lock_folder(path: Path) -> int | None:
    """Locks a folder until the number that is given back is closed, or the process ends, however
    that ends. None where there are no locks. Raises InputError if another process has it.
    """
    if fcntl is None:
        return None
    folder = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(folder)
        raise InputError(
            f"{path}: another run is writing there; wait for it, or give another folder"
        ) from None
    except OSError:
        os.close(folder)
        print(f"({path}: a file system without locks; start no second run there)", file=sys.stderr)
        return None
    return folder


def refuse_overwriting(
    output: str, target: str | Path | None, inputs: Iterable[tuple[str, str | Path | None]]
) -> None:
    """Raises InputError if what is to be written is what is read, by whatever path.

    output, target: an option and its path, None: not given; inputs: the same of what is read.
    """
    for option, source in inputs:
        if target is None or source is None:
            continue
        same = os.path.realpath(target) == os.path.realpath(source)
        if os.path.exists(target) and os.path.exists(source):
            same = os.path.samefile(target, source)  # whatever the names
        if same:
            raise InputError(
                f"--{output} and --{option} are the same, {target}: it would be overwritten; "
                f"give another --{output}"
            )


def refuse_part_of_model(option: str, file: str | Path, *directories: str | Path | None) -> None:
    """Raises InputError if what is to be written is a file of one of these models, or might be
    taken for one.
    """
    models = [Path(model).resolve() for model in directories if model not in (None, "none")]
    if Path(file).resolve().parent in models:
        raise InputError(f"--{option} {file}: is part of a model; give another folder")


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
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
            raise RuntimeError
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise InputError(
            f"--device {name}: there is no such device here; try --device cpu"
        ) from None


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """'auto' is bfloat16 on GPUs that compute in it (A100 and later), else float32."""
    if name == "auto":
        name = "float32"
        if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
            name = "bfloat16"
    return getattr(torch, name)


def spare_a_core(device: torch.device) -> None:
    """On a CPU, one core is left to others: a product waits for the slowest of its threads."""
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))


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


def model_directory(path: str) -> str:
    """Of an option: the directory of a model. Raises argparse's error if it is not there."""
    if Path(path).is_dir():
        return path
    problem = f"{path} is no directory"
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path) and not Path(path).exists():
        source, name = path, path.split("/")[-1]
        if "/" not in path:
            source = f"OWNER/{name}"
        problem += (
            f" here; if it is a model of the Hugging Face Hub, `hf download {source} --local-dir "
            f"{name}` makes the directory {name}"
        )
    raise argparse.ArgumentTypeError(problem)


class Parser(argparse.ArgumentParser):
    """A command line of which each fault is one line, like all others."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments"):
            message += " (a text of several words needs quotes)"
        raise InputError(message)

    def with_underscores(self, word: str) -> str:
        """--max-length=5 is --max_length=5; what is no option stays as it is."""
        name, equals, value = word.partition("=")
        name = name.replace("-", "_").replace("__", "--", 1)
        return name + equals + value if name in self._option_string_actions else word

    def parse_known_args(self, argv=None, namespace=None) -> tuple[argparse.Namespace, list[str]]:
        """`parse_args` calls it too, and refuses the words that are left."""
        words = sys.argv[1:] if argv is None else argv
        words = [self.with_underscores(word) for word in words]
        args, rest = super().parse_known_args(words, namespace)
        options = {action.dest for action in self._actions if action.option_strings}
        for dest, value in vars(args).items():
            name = f"--{dest}" if dest in options else f"the {dest}"
            words = value if isinstance(value, list) else [value]
            for word in filter(lambda word: isinstance(word, str), words):
                if not word:
                    raise InputError(f"{name} is empty; leave it out, or fill it in")
                if "\0" in word or word.encode(errors="replace").decode() != word:
                    raise InputError(f"{name} {word!r}: holds a NUL, or is not UTF-8")
        return args, rest


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
    repair_streams()
    if torchrun():
        from extras.sharding import ranks

        main = ranks()(main)  # a context manager, here as a decorator: main runs inside it
    try:
        main()
        sys.stdout.flush()  # what cannot be written is told here, not by Python as it ends
    except InputError as error:
        fail(str(error))
    except (torch.OutOfMemoryError, MemoryError):
        fail(OUT_OF_MEMORY)
    except BrokenPipeError:  # whoever read it, `head` say, has had enough
        lead_nowhere(sys.stdout)
        sys.exit(1)
    except OSError as error:
        if error.strerror is None:
            raise
        lead_nowhere(sys.stdout)
        fail(f"{error.filename or 'the output'}: {error.strerror}")
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # so PyTorch says it of host memory
            raise
        fail(OUT_OF_MEMORY)
    except KeyboardInterrupt:
        sys.exit(130)


OUT_OF_MEMORY = (
    "out of memory; lower --micro_batch_size or --max_length (training), --batch_size or "
    "--max_new_tokens (sampling), or choose --dtype bfloat16 or --base_dtype int8"
)


def complain(message: str) -> None:
    """One line on stderr, whatever the message holds."""
    print("error: " + visible(" ".join(message.split())), file=sys.stderr)


def fail(message: str) -> None:
    """One line on stderr, and exit status 2."""
    complain(message)
    sys.exit(2)


def repair_streams() -> None:
    """A stream that was closed leads nowhere; a terminal without our letters gets their numbers;
    typed bytes that are no text are told from text later, where a line can be refused.
    """
    streams = (("stdin", "surrogateescape"), ("stdout", "backslashreplace"))
    for name, errors in (*streams, ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=errors)


def lead_nowhere(stream) -> None:
    """What is still unwritten is dropped, or Python's flush at exit would raise the error again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@cache
def say_once(text: str) -> None:
    """To stderr, however often it is said."""
    print(text, file=sys.stderr)


def aside(words: str) -> None:
    """To stderr, grey in a terminal: what is no reply."""
    print(f"\033[90m{words}\033[0m" if sys.stderr.isatty() else words, file=sys.stderr)


def visible(text: str) -> str:
    """A text whose control characters, which could do things to a terminal, are spelt out.

    Example:
    >>> visible("red: " + chr(27) + "[31m")
    'red: \\\\x1b[31m'
    """
    return CONTROL.sub(lambda match: ascii(match[0])[1:-1], text)


# all but tab and newline; and those that turn the direction of writing around
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
