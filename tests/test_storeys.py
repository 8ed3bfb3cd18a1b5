"""The house has storeys: who may import whom, looked up in the sources and tried out."""

import ast
import doctest
import importlib
import subprocess
import sys

import pytest
from conftest import ROOT

# commands themselves, with the options of sample.py
COMMANDS = ("extras.serve", "extras.evaluate")
CORE = {path.stem for path in ROOT.glob("*.py")}
PLUMBING = {f"plumbing.{path.stem}" for path in ROOT.glob("plumbing/*.py")} - {"plumbing.__init__"}
EXTRAS = {path.stem for path in ROOT.glob("extras/*.py")} - {"__init__"}
MODULES = sorted(CORE | PLUMBING | {f"extras.{name}" for name in EXTRAS}) + [
    f"experiments.{path.stem}" for path in sorted(ROOT.glob("experiments/*.py"))
]


def path_of(module: str):
    return ROOT / (module.replace(".", "/") + ".py")


def names_in(node: ast.AST) -> set[str]:
    """The project's modules that an import statement names."""
    names = set()
    if isinstance(node, ast.Import):
        names = {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
        names = {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & set(MODULES)


def imports(module: str, anywhere: bool = False) -> set[str]:
    """The project's modules that a module imports when it is imported itself; or anywhere in it."""
    tree = ast.parse(path_of(module).read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if anywhere else tree.body
    return {name for node in nodes for name in names_in(node)}


def test_the_core_is_five_files():
    assert CORE == {"ivl", "model", "vocab_map", "train", "sample"}


@pytest.mark.parametrize("module", sorted(CORE | PLUMBING))
def test_the_core_knows_wings_only_in_the_branch_that_needs_them(module):
    assert imports(module) <= CORE | PLUMBING
    experiments = {name for name in imports(module, anywhere=True) if name.startswith("exper")}
    assert experiments <= ({"experiments.toy"} if module == "train" else set())


@pytest.mark.parametrize("module", ["model", "ivl"])
def test_the_paper_and_the_network_could_be_copied_out(module):
    """They need torch, and each other downwards."""
    assert imports(module, anywhere=True) <= {"model"}


@pytest.mark.parametrize("module", [f"extras.{name}" for name in sorted(EXTRAS)])
def test_no_wing_knows_the_scripts(module):
    known = imports(module, anywhere=True)
    if module in COMMANDS:  # they take the options of sample.py
        known.remove("sample")
    assert not known & {"train", "sample"} and not any(name.startswith("exp") for name in known)


def test_there_are_no_circles():
    seen: dict[str, bool] = {}  # False: on the way down

    def visit(module: str, way: tuple) -> None:
        assert seen.get(module, True), f"a circle: {way}"
        if module not in seen:
            seen[module] = False
            for name in imports(module):
                visit(name, (*way, name))
            seen[module] = True

    for module in MODULES:
        visit(module, (module,))
    assert set(seen) == set(MODULES)


def python(code: str, *args) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )


def test_the_paper_needs_no_tokenizer():
    blocked = "import sys; sys.modules.update(tokenizers=None, jinja2=None, tqdm=None)\n"
    result = python(blocked + "import ivl; print('plumbing.tokenizer' in sys.modules)")
    assert result.stdout == "False\n", result.stderr
    assert python(blocked + "import plumbing.tokenizer").returncode == 1  # that they are blocked


def test_without_the_wings_the_scripts_do_their_plain_job(
    base_dir, value_dir, chats_file, tmp_path
):
    """Each script in a process in which `extras` cannot be imported."""
    code = (
        "import runpy, sys; sys.modules['extras'] = None; sys.modules['experiments'] = None\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    out = tmp_path / "value"
    models = ["--base", base_dir, "--value", value_dir]
    trained = python(
        code,
        "train.py",
        *models,
        "--data",
        chats_file,
        "--out",
        out,
        "--epochs",
        1,
        "--device",
        "cpu",
    )
    assert trained.returncode == 0 and (out / "model.safetensors").exists(), trained.stderr
    said = python(
        code, "sample.py", "--base", base_dir, "--value", out, "--device", "cpu",
        "--max_new_tokens", 3,
        "Where is the cat 3?",
    )  # fmt: skip
    assert said.returncode == 0 and "3 tokens" in said.stderr, said.stderr
    wing = python(
        code, "train.py", *models, "--connection", "cascade", "--data", chats_file, "--out", out
    )
    assert wing.returncode == 1 and "extras" in wing.stderr  # that it is blocked


@pytest.mark.parametrize("module", MODULES)
def test_examples_are_right(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0


def test_bookkeeping_has_examples():
    """Those that can be worked out by hand and checked run as doctests."""
    finder = doctest.DocTestFinder()
    with_examples = {
        test.name
        for module in MODULES
        for test in finder.find(importlib.import_module(module))
        if test.examples
    }
    assert {
        "ivl.combine",
        "vocab_map.warp",
        "vocab_map.paper_rows",
        "plumbing.dataset.epoch_batches",
    } <= (with_examples)
