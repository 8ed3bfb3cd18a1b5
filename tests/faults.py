"""Do the tests see faults? Puts small faults into a source file, one at a time, and runs its tests.

    python tests/faults.py ivl.py --count 40 --seed 0      # forty faults, drawn at random
    python tests/faults.py ivl.py --line 112               # all faults of a line
    python tests/faults.py ivl.py --fault 17               # one again, by the number it is told by
    python tests/faults.py all --count 15 --json out.json  # every file of the table below

A fault is seen if a test fails, or hangs. One that passes changes nothing that anybody could
notice, or is a hole in the tests: that is for a reader to judge. All of it happens in a copy of the
repository, in a temporary folder.
"""

import argparse
import ast
import copy
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
TESTS = {  # each source file, and the arguments of pytest for the tests beside it
    "ivl.py": ["test_ivl.py", "test_kernels.py", "test_graphs.py", "test_speculative.py"],
    "model.py": ["test_model.py", "test_ivl.py"],
    "plumbing/weights.py": ["test_model.py", "test_trust.py"],
    "plumbing/runs.py": ["test_train.py", "test_verdict.py", "test_trust.py"],
    "plumbing/jobs.py": ["test_train.py", "test_verdict.py", "test_trust.py", "test_flags.py"],
    "plumbing/pair.py": ["test_sample.py", "test_trust.py", "test_flags.py"],
    "plumbing/ranks.py": ["test_train.py", "test_verdict.py"],
    "plumbing/streaming.py": ["test_data.py", "test_sample.py"],
    "plumbing/chats.py": ["test_chats.py", "test_data.py"],
    "plumbing/tokenizer.py": ["test_data.py", "test_chats.py", "test_trust.py"],
    "plumbing/dataset.py": ["test_data.py", "test_chats.py", "test_trust.py"],
    "train.py": ["test_train.py", "test_verdict.py", "test_trust.py", "test_flags.py"],
    "sample.py": ["test_sample.py", "test_trust.py", "test_flags.py"],
    "vocab_map.py": ["test_vocab_map.py"],
    "plumbing/files.py": ["test_trust.py", "test_data.py", "test_model.py", "test_flags.py"],
    "extras/connections.py": ["test_connections.py", "test_train.py"],
    "extras/curve.py": ["test_curve.py"],
    "extras/benchmarks.py": ["test_evaluate.py", "test_full_size.py"],
    "extras/evaluate.py": ["test_evaluate.py"],
    "extras/explain.py": ["test_explain.py"],
    "extras/graphs.py": ["test_graphs.py"],
    "extras/harness.py": ["test_evaluate.py"],
    "extras/likelihood.py": ["test_likelihood.py", "test_evaluate.py"],
    "extras/int8.py": ["test_int8.py"],
    "extras/losses.py": ["test_losses.py", "test_train.py"],
    "extras/mapped.py": ["test_vocab_map.py"],
    "extras/mt_bench.py": ["test_mt_bench.py", "test_evaluate.py"],
    "extras/page.py": ["test_page.py"],
    "extras/rehearse.py": ["test_verdict.py"],
    "extras/speculative.py": ["test_speculative.py"],
    "extras/sandbox.py": ["test_sandbox.py"],
    "extras/serve.py": ["test_serve.py"],
    "extras/show.py": ["test_chats.py"],
    # the slow ones too, but for the two slowest
    "extras/sharding.py": ["test_sharding.py", "-m", "", "-k", "not its_share and not a_rank_dies"],
}
SHORTEST = 60  # seconds that a run of the tests is given at least


# ---------------------------------------------------------------- faults

OPPOSITES = {
    ast.Lt: ast.LtE,
    ast.Gt: ast.GtE,
    ast.Eq: ast.NotEq,
    ast.Is: ast.IsNot,
    ast.In: ast.NotIn,
    ast.Add: ast.Sub,
    ast.Mult: ast.Div,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.And: ast.Or,
}
OPPOSITES |= {new: old for old, new in OPPOSITES.items() if new not in OPPOSITES}
OTHER_NAMES = {"min": "max", "amin": "amax", "any": "all"}
OTHER_NAMES |= {new: old for old, new in OTHER_NAMES.items()}

# what is left alone: types and texts for people
FIELDS_LEFT = {"annotation", "returns", "decorator_list", "bases", "msg"}
KEYWORDS_LEFT = {"help", "description", "formatter_class", "metavar", "desc", "unit", "indent"}
KEYWORDS_LEFT |= {"device"}  # these tests run on one
CALLS_LEFT = {"print", "write", "set_postfix"}


@dataclass
class Fault:
    """One change of a source file: bytes `begin` to `end` are replaced."""

    number: int  # among all of the file
    line: int
    kind: str
    old: str
    new: str
    begin: int
    end: int

    def __str__(self) -> str:
        return f"{self.number:4}  line {self.line:3}  {self.kind}:  {self.old}  →  {self.new}"


def called(node: ast.AST) -> str:
    """The name of what a call calls, `max` for `x.max()`; "" for what is no call."""
    if not isinstance(node, ast.Call):
        return ""
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def left_alone(node: ast.AST) -> bool:
    """Whether a node and all within it is a text for people, or no part of what is tested."""
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # a docstring
    if isinstance(node, ast.Expr) and called(node.value) in CALLS_LEFT:
        return True
    if isinstance(node, ast.keyword):
        return node.arg in KEYWORDS_LEFT
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def nodes(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all within it that may be changed."""
    if left_alone(node):
        return
    yield node
    for name, field in ast.iter_fields(node):
        if name in FIELDS_LEFT:
            continue
        for child in field if isinstance(field, list) else [field]:
            if isinstance(child, ast.AST):
                yield from nodes(child)


def changed(node: ast.AST, **fields) -> ast.AST:
    """A node with other fields."""
    new = copy.copy(node)
    for name, field in fields.items():
        setattr(new, name, field)
    return new


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """What can be done to a node: kind of fault, what is replaced, what by."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in OPPOSITES:
            yield "comparison", node, changed(node, ops=[OPPOSITES[type(op)]()])
        case ast.BinOp(op=op) if type(op) in OPPOSITES:
            yield "arithmetic", node, changed(node, op=OPPOSITES[type(op)]())
            yield "operand dropped", node, node.left
        case ast.AugAssign(op=op) if type(op) in OPPOSITES:
            yield "arithmetic", node, changed(node, op=OPPOSITES[type(op)]())
        case ast.BoolOp(op=op):
            yield "and, or", node, changed(node, op=OPPOSITES[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert()):
            yield "sign dropped", node, node.operand
        case ast.Constant(value=bool()):
            yield "constant", node, ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield "constant", node, ast.Constant(node.value + 1)
        case ast.Slice():
            for bound in ("lower", "upper"):
                if getattr(node, bound) is not None:
                    yield "bound dropped", node, changed(node, **{bound: None})

    if isinstance(node, (ast.If, ast.IfExp)):
        for truth in (True, False):
            yield "condition", node.test, ast.Constant(truth)

    if isinstance(node, ast.Call):
        name, args, keywords = called(node), node.args, node.keywords
        if name in OTHER_NAMES:
            field = "id" if isinstance(node.func, ast.Name) else "attr"
            func = changed(node.func, **{field: OTHER_NAMES[name]})
            yield "other function", node, changed(node, func=func)
        if len(args) > 1 and name not in ("min", "max"):
            yield "arguments swapped", node, changed(node, args=[args[1], args[0], *args[2:]])
        if len(args) > 1:
            yield "argument dropped", node, changed(node, args=args[:-1])
        if keywords and keywords[-1].arg not in KEYWORDS_LEFT:
            yield "argument dropped", node, changed(node, keywords=keywords[:-1])

    # statements whose absence leaves no name undefined
    is_effect = isinstance(node, (ast.Expr, ast.AugAssign))
    if isinstance(node, ast.Assign):
        is_effect = isinstance(node.targets[0], (ast.Attribute, ast.Subscript))
    if is_effect and not isinstance(getattr(node, "value", None), (ast.Yield, ast.YieldFrom)):
        yield "statement deleted", node, ast.Pass()


def find_faults(source: bytes) -> list[Fault]:
    """All faults that can be put into a source file, in the order of its text."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node in nodes(ast.parse(source)):
        for kind, old, new in changes(node):
            text = ast.unparse(new)
            # parentheses, wherever another operator beside it could tear it apart
            if isinstance(new, (ast.BinOp, ast.BoolOp, ast.Compare, ast.UnaryOp)):
                text = f"({text})"
            begin = starts[old.lineno - 1] + old.col_offset  # in bytes
            end = starts[old.end_lineno - 1] + old.end_col_offset
            found.append(Fault(0, old.lineno, kind, ast.unparse(old), text, begin, end))
    found.sort(key=lambda fault: (fault.begin, fault.end))
    for i, fault in enumerate(found):
        fault.number = i
    return found


def with_fault(source: bytes, fault: Fault) -> bytes:
    """The source file with a fault in it."""
    return source[: fault.begin] + fault.new.encode() + source[fault.end :]


# ---------------------------------------------------------------- runs of the tests


def passes(folder: Path, file: str, limit: float) -> bool:
    """Whether the tests beside a source file pass, within so many seconds."""
    args = [f"tests/{arg}" if arg.endswith(".py") else arg for arg in TESTS[file]]
    env = dict(os.environ)
    env["PYTHONDONTWRITEBYTECODE"] = "1"  # or two faults of one second could be taken for another
    env.setdefault("IVL_REALDATA", str(ROOT.parent / "shared" / "realdata"))
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *args],
        cwd=folder,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(limit) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        # whatever is still running, and what that has started
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def chosen(faults: list[Fault], args: argparse.Namespace) -> list[Fault]:
    """Those that the command line asks for."""
    if args.fault is not None:
        return [fault for fault in faults if fault.number == args.fault]
    if args.line is not None:
        return [fault for fault in faults if fault.line == args.line]
    count = min(args.count, len(faults))
    drawn = random.Random(args.seed).sample(faults, count)
    return sorted(drawn, key=lambda fault: fault.number)


def try_file(folder: Path, file: str, args: argparse.Namespace) -> list[dict]:
    """Puts faults into one file; what became of each."""
    path = folder / file
    source = path.read_bytes()
    faults = find_faults(source)

    start = time.monotonic()
    if not passes(folder, file, float("inf")):
        sys.exit(f"{file}: its tests fail without any fault; mend them first")
    limit = max(SHORTEST, 4 * (time.monotonic() - start))

    print(f"{file}: {len(faults)} faults are possible")
    results = []
    for fault in tqdm(chosen(faults, args), desc=file, unit=" faults", disable=None):
        path.write_bytes(with_fault(source, fault))
        passed = passes(folder, file, limit)
        path.write_bytes(source)
        results.append({"file": file, "passed": passed, **asdict(fault)})
        tqdm.write(f"{'PASSED' if passed else 'seen  '}{fault}")
        sys.stdout.flush()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", choices=["all", *TESTS])
    parser.add_argument("--count", type=int, default=20, help="how many faults in each file")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--line", type=int, help="all faults that begin in this line")
    parser.add_argument("--fault", type=int, help="the fault of this number")
    parser.add_argument("--json", type=Path, help="a file for the results")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "copy"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("out", ".*", "__pycache__"))
        results = []
        for file in TESTS if args.file == "all" else [args.file]:
            results += try_file(folder, file, args)

    passed = [result for result in results if result["passed"]]
    print(f"\n{len(results) - len(passed)} of {len(results)} faults were seen")
    for result in passed:
        print(f"passed: {result['file']}:{result['line']}  {result['old']}  →  {result['new']}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
