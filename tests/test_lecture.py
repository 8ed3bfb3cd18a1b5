"""The lecture says what the code does: its sessions run, its quotations and links are there, its
timetable adds up, and the checks of its exercises say what is wrong."""

import doctest
import json
import re
import shutil

import pytest
import torch
from conftest import ROOT

LECTURE = ROOT / "LECTURE.md"
TEXT = LECTURE.read_text(encoding="utf-8")
SOURCES = [
    path.read_text(encoding="utf-8")
    for folder in (ROOT, ROOT / "extras", ROOT / "experiments")
    for path in folder.glob("*.py")
]
QUOTED = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
HEADINGS = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", TEXT, flags=re.S | re.M), re.M)
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


def anchor(heading: str) -> str:
    """As GitHub makes it: in small letters, without punctuation, spaces as hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_within_lead_to_sections():
    within = [link[1:] for pair in LINKED for link in pair if link.startswith("#")]
    assert len(within) > 10 and set(within) <= set(map(anchor, HEADINGS))


def test_the_timetable_has_90_minutes():
    """Each row begins where the one before it ends, and its sections come in the text's order."""
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (.+?) \| .+ \|$", TEXT, re.MULTILINE)
    now = 0
    for start, minutes, _ in rows:
        assert int(start) == now
        now += int(minutes)
    assert now == 90 and rows[-1][2] == "Questions"
    order = list(map(anchor, HEADINGS))
    sections = [link for *_, cell in rows for link in re.findall(r"\(#(.+?)\)", cell)]
    places = [order.index(link) for link in sections if link != "exercises"]
    assert places == sorted(places)


def test_the_promise_is_the_readme_s_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = re.search(r"^base +parameters +knows.*?(?=^```$)", readme, re.DOTALL | re.MULTILINE)
    indented = "".join(f"    {line}\n" for line in table[0].splitlines())
    assert TEXT.count(indented) == 2  # as a promise, and explained


def test_the_claims_are_the_findings():
    """Each row's verdict and counts are what was found, each number of the paper one of its
    numbers.
    """
    row = r"^\| (\d)\. .+? \| (.+?) \| .+? \| (.+?) \| (.+?) \| (\w+) \|$"
    rows = re.findall(row, TEXT, re.MULTILINE)
    findings = json.loads((ROOT / "experiments" / "results" / "findings.json").read_text("utf-8"))
    assert [int(number) for number, *_ in rows] == [finding["claim"] for finding in findings]

    def numbers(text: str) -> set[str]:
        return set(re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w.]*B)", text))

    def count(directions: list[dict], main: bool) -> str:
        verdicts = [each["verdict"] for each in directions if each["main"] == main]
        tested = len(verdicts) - verdicts.count("untested")
        return f"{verdicts.count('agrees')} of {tested}" if tested else "-"

    for (_, paper, main, others, verdict), finding in zip(rows, findings):
        directions = finding["directions"]
        assert verdict == finding["verdict"]
        assert (main, others) == (count(directions, True), count(directions, False))
        theirs = [finding["where"], *(each["paper"] for each in directions)]
        assert numbers(paper) <= numbers(" ".join(theirs))


# ---------------------------------------------------------------- exercises


@pytest.fixture(scope="module")
def prompt() -> dict:
    """The names at the prompt of the second command at the text's top."""
    code = re.search(r'^python -i -c "(.*)"$', TEXT, re.MULTILINE)[1]
    names: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        exec(code, names)
    return names


def test_the_prompt_has_all_names(prompt):
    assert {f"check_{n}" for n in range(1, 7)} <= set(prompt)
    assert {"z_base", "z_delta", "words", "combine", "two_passes", "totals"} <= set(prompt)
    assert not {"p_oslo", "weights", "quietest"} & set(prompt)  # the answers' own


WRONG = [
    (1, (lambda alpha: 0.25 + 0.25 * alpha, 0.25), "alpha = 0.5", "0.412", "0.375"),
    (2, (lambda sizes: [1 / sum(sizes)] * sum(sizes),), "[1, 3]", "0.1667", "0.25"),
    (3, (lambda z: -z.mean(),), "-2.0794, 0.0]", "0.694", "0.832"),
    (4, ([2.0, 3.5], [0.5, 1 / 3, 0, 1 / 6, 0]), "small base", "3.0", "3.5"),
    (4, ([2.0, 3.0], [0.5, 0.5, 0.5, 0, 0]), "add up", "1.5", "1"),
    (4, ([2.0, 3.0], [0.25, 0.125, 0.0625, 0.5, 0.0625]), "says Sorry", "twin", "base"),
    (4, ([2.0, 3.0], [0.5, 0.5, 0, 0, 0]), "the twin gives", "4.0", "3.0"),
    (5, ([(0, 0), (1, 2)], [(0, 0), (1, 2)], {0: 1, 1: 2}), "warped", "(0, 1)", "[(0, 0), (1, 2)]"),
    (5, ([(0, 0), (0, 1), (1, 2)], [(0, 0)], {0: 1, 1: 2}), "aligned", "(1, 2)", "[(0, 0)]"),
    (5, ([(0, 0), (0, 1), (1, 2)], [(0, 0), (1, 2)], {0: 0, 1: 2}), "kept", "0: 1", "0: 0"),
    (6, ([0.6931, 2.0794], 0.2231, [-0.1, 0, 0, 0.1, 0]), "nats", "-2.0794", "2.0794"),
    (6, ([0.6931, -2.0794], 0.5, [-0.1, 0, 0, 0.1, 0]), "loss", "0.2231", "0.5"),
    (6, ([0.6931, -2.0794], 0.2231, [-0.2, 0, 0, 0.2, 0]), "gradient", "-0.1", "-0.2"),
]


@pytest.mark.parametrize("number, answer, case, expected, given", WRONG)
def test_a_wrong_answer_names_its_case(prompt, number, answer, case, expected, given):
    with pytest.raises(AssertionError) as error:
        prompt[f"check_{number}"](*answer)
    said = str(error.value)
    assert case in said and expected in said and given in said and "\n" not in said


# ---------------------------------------------------------------- the toy's wrong replies


def test_the_autopsy_accounts_for_each_reply(prompt, base_dir, value_dir, tmp_path, monkeypatch):
    for name in ("small", "small-full", "large"):
        shutil.copytree(base_dir, tmp_path / name)
    shutil.copytree(value_dir, tmp_path / "value")
    toy = prompt["toy"]
    facts = ["Rufo lives in Oslo.", "Rufo lives in Rome.", "Rufo likes tea.", "Ralo likes tea."]
    right = [f"{toy.OPENING} {fact} {toy.CLOSING}" for fact in facts]
    chats = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]}
        for text in right
    ]
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))

    # the pair's replies: right, two with another last word, about somebody else
    wrong = right[1].replace("Rome", "Oslo"), right[2].replace("tea", "dog"), right[2]
    monkeypatch.setattr(toy, "greedy", lambda *_: [right[0], *wrong])
    known, why = prompt["autopsy"](tmp_path)
    assert set(known) == {"small", "small-full"} and all(0 <= x <= 1 for x in known.values())
    assert why["right"] == why["not this person"] == 1
    assert why["overruled"] + why["the base's error"] == 2

    # a base that says nothing but the right token after the same words
    class Knows:
        def reader(self, rows, slots):
            return self

        def read(self, text):
            ids = text[0].tolist()
            for reply in right:
                after = tokenizer.encoding(reply).ids
                for i, token in enumerate(after):
                    if i > 3 and ids[-i:] == after[:i]:
                        found = token
            return torch.eye(1000)[found][None]

    tokenizer = prompt["Tokenizer"](tmp_path / "value")
    monkeypatch.setitem(prompt, "load", lambda *_: Knows())
    monkeypatch.setattr(toy, "knows", lambda *_: 0.5)
    monkeypatch.setattr(toy, "greedy", lambda *_: [right[0], right[1], wrong[1], right[3]])
    assert prompt["autopsy"](tmp_path)[1] == {"right": 3, "overruled": 1}
