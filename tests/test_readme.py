"""The README is short, its links and files are there, its options exist. What it shows of the toy
is looked at in test_toy.py, where there is a toy.
"""

import argparse
import re

import pytest
from conftest import ROOT

import sample
import train
import vocab_map
from experiments import bench, reproduce
from extras import evaluate

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("path", ["README.md", "experiments/README.md"])
def test_links_lead_somewhere(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        file, _, anchor = link.partition("#")
        target = (ROOT / path).parent / file if file else ROOT / path
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(title) for title in titles}, link


def slug(title: str) -> str:
    """A title as GitHub links to it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def test_the_tree_names_all_there_is():
    tree = README.partition("## What to read")[2].partition("```")[2].partition("```")[0]
    named = set(re.findall(r"[\w/]+\.py", tree))
    core = {path.name for path in ROOT.glob("*.py")}
    below = {path.name for path in [*ROOT.glob("plumbing/*.py"), *ROOT.glob("extras/*.py")]}
    below -= {"__init__.py"}
    assert core | below <= named
    assert named <= core | below | {path.name for path in ROOT.glob("experiments/*.py")}


def options(script) -> set[str]:
    """The options of a script, of all of its subcommands."""
    parsers = []

    class Stop(Exception):
        pass

    def stop(parser, *_, **__):
        parsers.append(parser)
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        with pytest.raises(Stop):
            getattr(script, "arguments", script.main)()
    known = set(parsers[0]._option_string_actions)
    for action in parsers[0]._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                known |= set(sub._option_string_actions)
    return known


def test_every_option_exists():
    """Each --option that the README names is one of some script's."""
    scripts = [train, sample, vocab_map, bench, reproduce, evaluate]
    known = set().union(*map(options, scripts)) | {"--check", "--nproc_per_node", "--local_dir"}
    written = {
        word.replace("-", "_").replace("__", "--", 1)
        for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", README)
    }
    assert written <= known
