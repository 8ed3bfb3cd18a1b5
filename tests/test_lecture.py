"""The lecture says what the code does: its sessions run, its quotations and links are there."""

import doctest
import re

import pytest
from conftest import ROOT

LECTURE = ROOT / "LECTURE.md"
TEXT = LECTURE.read_text(encoding="utf-8")
SOURCES = [
    path.read_text(encoding="utf-8")
    for folder in (ROOT, ROOT / "extras", ROOT / "experiments")
    for path in folder.glob("*.py")
]
QUOTED = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
LINKED = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", TEXT)


def test_sessions_run():
    result = doctest.testfile(str(LECTURE), module_relative=False, encoding="utf-8")
    assert result.attempted > 0 and result.failed == 0


def test_code_is_a_session_or_a_quotation():
    fences = re.findall(r"^```(\w*)$", TEXT, re.MULTILINE)
    assert set(fences[::2]) == {"pycon", "python", "sh"} and set(fences[1::2]) == {""}


@pytest.mark.parametrize("block", QUOTED)
def test_quotation_is_in_the_source(block):
    assert any("\n" + block in "\n" + source for source in SOURCES)  # whole lines


def test_links_lead_somewhere():
    files = {
        link.partition("#")[0]
        for pair in LINKED
        for link in pair
        if link and not re.match(r"https?:|#", link)
    }
    assert files and [file for file in files if not (ROOT / file).exists()] == []
