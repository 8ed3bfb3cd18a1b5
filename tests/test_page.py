"""The page of --html: its numbers against the models' full logits, and a real browser with it."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import groupby
from types import SimpleNamespace

import pytest
import torch
from conftest import TEXT, assert_refused, make_directory

import ivl
import sample
from extras import page as wing
from extras.connections import connected
from extras.explain import Said, read_again, who_said
from extras.mapped import Mapped
from extras.page import column, opened, page, stops
from plumbing.pair import Speaker
from plumbing.tokenizer import Tokenizer
from plumbing.weights import load
from vocab_map import VocabMap

PROMPT = [1, 20, 30, 40]
ALPHA = 0.33  # which is no stop of the slider by itself
NEVER = 77
HOSTILE = "</script><i>{{data}}"
BROWSERS = ["chromium", "chromium-browser", "google-chrome"]


@pytest.fixture(scope="module")
def models(base_dir, value_dir):
    return load(base_dir), load(value_dir)


@pytest.fixture(scope="module")
def tokenizer(base_dir):
    return Tokenizer(base_dir)


def made(models, tokenizer, reply, alpha=1.0, title=("name", "about"), **how) -> dict:
    """A column of the page."""
    told = *read_again(models[0], models[1:], PROMPT, reply, **how), tokenizer, reply, alpha
    return column(title, who_said(*told), *told)


def full_logits(models, reply) -> list[torch.Tensor]:
    """z_base and z_Δ, (n, V) each, from the whole text at once, without what is never said."""
    texts = torch.tensor([PROMPT + reply])
    z_base, z_delta = (model(texts)[0, len(PROMPT) - 1 : -1].detach().double() for model in models)
    z_base[:, NEVER] = -math.inf
    return [z_base, z_delta]


# ---------------------------------------------------------------- the numbers


def drawn(models, alpha: float, n: int = 8) -> list[int]:
    """A reply with something of everything: drawn tokens, the base's choices, and the end."""
    how = {"temperature": 1.0, "choose": ivl.never(torch.tensor([NEVER]), ivl.choose)}
    reply = [
        ids[0] for ids in ivl.generate(models[0], models[1:], [PROMPT], n, alphas=[alpha], **how)
    ]
    for _ in range(3):
        z_base, _ = full_logits(models, reply + [2])
        reply.append(z_base[-1].argmax().item())
    return reply + [2]


@pytest.mark.parametrize("alpha", [1.0, ALPHA, -3.0, 1e6])
def test_what_is_sent_is_enough_for_every_stop(models, tokenizer, alpha):
    reply = drawn(models, alpha)
    side = made(models, tokenizer, reply, alpha, never=[NEVER])
    z_base, z_delta = full_logits(models, reply)
    assert len(stops(alpha)) == 41 + (alpha != 1) and stops(alpha) == sorted(stops(alpha))
    for k, token in enumerate(side["tokens"]):
        ids = [word["id"] for word in token["words"]]
        assert ids[token["said"]] == reply[k] and len(ids) == len(set(ids)) <= 20
        for a, others in zip(stops(alpha), token["others"], strict=True):
            z_post = z_base[k] + a * z_delta[k]
            z = [b + a * d for b, d in zip(token["z_base"], token["z_delta"], strict=True)]
            p = torch.tensor([*z, others], dtype=torch.double).softmax(-1)
            tolerance = max(1e-4, abs(a) * 1e-5)  # float32 had so many digits
            assert p[:-1].tolist() == pytest.approx(z_post.softmax(-1)[ids].tolist(), abs=tolerance)
            assert z_post.argmax() == ids[max(range(len(z)), key=z.__getitem__)]
        assert NEVER not in ids
        # the best four, of the base alone and at 1 and 2
        for a in (0, 1, 2):
            assert {*(z_base[k] + a * z_delta[k]).topk(4).indices.tolist()} <= {*ids}


def test_zero_is_the_middling_word(models, tokenizer):
    side = made(models, tokenizer, [5, 2], vocabulary=101)
    for k, z in enumerate(full_logits(models, [5, 2])[1]):
        token = side["tokens"][k]
        ids = [word["id"] for word in token["words"]]
        expected = (z - z[:101].median())[ids]
        assert token["z_delta"] == pytest.approx(expected.tolist(), abs=1e-4)
        assert max(ids) < 101


@pytest.mark.parametrize("kind", ["cascade", "mapped"])
def test_whatever_answers_has_a_page(models, tokenizer, base_dir, other_dir, kind):
    alpha = 0.5
    if kind == "cascade":
        models = connected("cascade", *models)
    else:
        tokenizer = Tokenizer(other_dir)
        mapping = VocabMap.make(Tokenizer(base_dir), tokenizer, TEXT.split(". "))
        models = Mapped(models[0], mapping), load(other_dir)
    vocabulary = len(tokenizer.tokens)
    reply = [
        ids[0] for ids in ivl.generate(models[0], models[1:], [PROMPT], 6, vocabulary=vocabulary)
    ]
    side = made(models, tokenizer, reply, alpha, vocabulary=vocabulary)
    stop = stops(alpha).index(alpha)
    for said, token in zip(side["said"], side["tokens"], strict=True):
        z = [b + alpha * d for b, d in zip(token["z_base"], token["z_delta"])]
        p = torch.tensor([*z, token["others"][stop]]).softmax(-1)
        assert p[token["said"]].item() == pytest.approx(said.p_post, abs=1e-4)
    assert "null" not in json.dumps(side["tokens"])


def test_a_word_that_never_comes(monkeypatch):
    """A base whose map gives a word nothing, and a vocabulary that is shown whole."""
    z_base = torch.tensor([0.0, -math.inf, 2.0, 1.0])
    words, token = wing.step_numbers(z_base, torch.tensor([0.0, 9.0, 0.0, 0.0]), 0, stops(1.0), 1.0)
    assert words == [2, 3, 0] and token["z_base"] == [1.0, 0.0, -1.0]
    assert token["others"] == [None] * 41
    words, token = wing.step_numbers(z_base, torch.zeros(4), 1, stops(1.0), 1.0)  # it was said
    assert words == [2, 3, 0, 1] and token["z_base"][3] is None


def test_the_choice_at_an_alpha_in_between_is_shown():
    """Word 0 is the likeliest at 0.5 alone; four others are at 0, and four at 1 and 2."""
    z_base = torch.tensor([0.0] + [1.0] * 4 + [-3.0] * 4)
    z_delta = torch.tensor([0.0] + [-4.0] * 4 + [4.0] * 4)
    words, _ = wing.step_numbers(z_base, z_delta, 5, stops(1.0), 1.0)
    assert set(words) == set(range(9))


def step(said: int) -> dict:
    return {"said": 0, "words": [{"id": said, "text": "x", "special": False}]}


def side(ids: list[int], by: str) -> dict:
    said = [Said("x", "x", {"b": "base", "v": "value"}[letter], 0, 0, 0) for letter in by]
    return {"said": said, "tokens": [step(i) for i in ids]}


def test_what_is_open_at_first():
    assert opened([side([5, 6, 7], "bvv")]) == [1]
    assert opened([side([5, 6], "bb")]) == [None]
    assert opened([side([5, 6, 7], "bvv"), side([5, 6, 8], "bvb")]) == [2, 2]
    assert opened([side([5, 6, 7], "bvv"), side([5, 6], "bb")]) == [1, None]


# ---------------------------------------------------------------- without JavaScript


def test_page_is_escaped_and_self_contained(models, tokenizer):
    reply = drawn(models, 1.0)
    title = "<base>", "& value"
    text = page("Who <are> you?", [made(models, tokenizer, reply, title=title)], 1.0)
    assert text.count("Who &lt;are&gt; you?") == 2
    assert "<h2><strong>&lt;base&gt;</strong> &amp; value</h2>" in text
    assert not re.search(r"https?:|src=|href=|url\(|@import|<link|<img", text)
    assert "{{" not in text


def test_the_reply_can_be_read_without_javascript(models, tokenizer):
    reply = drawn(models, 1.0)
    dom = parsed(page("Who?", [made(models, tokenizer, reply)], 1.0))
    said = who_said(*read_again(models[0], models[1:], PROMPT, reply), tokenizer, reply)
    assert [token["data-by"] for token in dom.tokens[0]] == [token.by for token in said]
    for token, expected in zip(dom.tokens[0], said):
        strength = re.fullmatch(r"--strength: ([\d.]+)", token["style"])[1]
        assert float(strength) == pytest.approx(min(1, abs(expected.nats) / 8), abs=0.01)
        assert bool(token["under"]) == (expected.by != "base")
    assert dom.tokens[0][-1]["word"] == "</s>"


def test_spaces_and_line_ends_are_seen():
    def shown(text: str, base: str = "\n", special: bool = False) -> str:
        words = [{"id": 1, "text": wing.marked(text), "special": special}]
        return wing.token_html(
            Said(text, base, "value", 2.0, 0.1, 0.8), {"said": 0, "words": words}
        )

    assert shown(" 中é").startswith(" <button") and ">中é</span>" in shown(" 中é")
    assert ">⏎</span></button>" in shown("a")
    assert ">a⏎</span>" in shown("a\n") and shown("a\n").endswith("</button><br>")
    assert ">␣</span>" in shown(" ") and ">␣a␣b</span>" in shown("  a b")
    assert 'class="word special">&lt;/s&gt;<' in shown("</s>", special=True)
    assert ">x\\x1b</span></button>" in shown("a", " x\x1b")


# ---------------------------------------------------------------- in a browser


class Page(HTMLParser):
    """What a page tells: of each column its tokens, of each open token its words."""

    def __init__(self):
        super().__init__()
        self.tokens, self.words, self.panels, self.names = [], [], [], []
        self.title = self.rest = self.result = None
        self.place, self.in_token = "", False
        self.tags = []

    def handle_starttag(self, tag, attributes):
        about = dict(attributes)
        self.tags.append(tag)
        kind = (about.get("class") or "").split() or [""]
        self.place = {"h1": "h1", "h2": "h2", "strong": "h2"}.get(tag, kind[0])
        if kind[0] == "column":
            self.tokens.append([])
            self.names.append("")
            self.words.append([])
        elif kind[0] == "panel":
            self.panels.append(about)
        elif tag == "button":
            self.in_token = True
            self.tokens[-1].append(about | {"word": "", "under": ""})
        elif "data-z-post" in about:
            self.words[-1].append(about | {"bars": {}, "zero": []})
        elif kind[0] == "track" and self.words and self.words[-1]:
            self.words[-1][-1]["zero"].append(percents(about["style"])[0])
        elif kind[0] == "bar":
            self.words[-1][-1]["bars"][kind[1]] = percents(about["style"])
        self.result = about.get("data-result", self.result)

    def handle_data(self, data):
        if self.place in ("word", "under") and self.in_token:
            self.tokens[-1][-1][self.place] += data
        if self.place == "h1":
            self.title = (self.title or "") + data
        if self.place == "rest":
            self.rest = data
        if self.place == "h2":
            self.names[-1] += data

    def handle_endtag(self, tag):
        self.place = "h2" if tag == "strong" else ""
        self.in_token &= tag != "button"


def percents(style: str) -> list[float]:
    return [float(x) for x in re.findall(r"(-?[\d.e-]+)%", style)]


def parsed(text: str) -> Page:
    found = Page()
    found.feed(text)
    return found


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Opens a file in a browser; what has become of the page."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    profile = tmp_path_factory.mktemp("browser")

    def browse(path, fragment: str = "") -> Page:
        done = subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
                "--no-first-run", "--disable-background-networking", "--disable-component-update",
                "--disable-sync", f"--user-data-dir={profile}", "--virtual-time-budget=2000",
                "--dump-dom", path.as_uri() + fragment,
            ],
            capture_output=True,
            text=True,
            timeout=120,
        )  # fmt: skip
        return parsed(done.stdout)

    return browse


@pytest.fixture(scope="module")
def one(models, tokenizer, tmp_path_factory):
    """A page about one reply, in which the question and a token are hostile; made at α = 0.33."""
    reply = drawn(models, ALPHA)
    written = wing.texts(tokenizer)
    hostile = {word: HOSTILE for word in (2, reply[1])}
    with pytest.MonkeyPatch.context() as patch:
        texts = [hostile.get(i, text) for i, text in enumerate(written)]
        patch.setattr(wing, "texts", lambda tokenizer: texts)
        side = made(models, tokenizer, reply, ALPHA, never=[NEVER])
    path = tmp_path_factory.mktemp("page") / "one.html"
    path.write_text(page(HOSTILE, [side], ALPHA), encoding="utf-8")
    return SimpleNamespace(path=path, reply=reply, z=full_logits(models, reply))


@pytest.mark.parametrize(
    "fragment, alpha",
    [("", ALPHA), ("#alpha=0", 0), ("#alpha=0.35&token=12", 0.35), ("#alpha=1", 1)],
)
def test_what_the_browser_computes(browse, one, fragment, alpha):
    dom = browse(one.path, fragment)
    z_base, z_delta = one.z
    z_post = z_base + alpha * z_delta
    p_base, p_post = z_base.softmax(-1), z_post.softmax(-1)  # (n, V)

    # the hostile texts are texts
    assert dom.title == HOSTILE and dom.tags.count("script") == 2 and "i" not in dom.tags
    (tokens,) = dom.tokens
    assert tokens[1]["word"] == tokens[-1]["word"] == wing.marked(HOSTILE)

    # each token of the reply
    assert [int(token["data-said"]) for token in tokens] == one.reply
    chosen = zip(one.reply, z_base.argmax(-1).tolist(), z_post.argmax(-1).tolist())
    for k, (token, (said, base, post)) in enumerate(zip(tokens, chosen, strict=True)):
        by = "base" if said == base else "value" if said == post else "chance"
        assert token["data-by"] == by
        assert (int(token["data-base-choice"]), int(token["data-choice"])) == (base, post)
        assert float(token["data-p-base"]) == pytest.approx(p_base[k, said].item(), abs=1e-4)
        assert float(token["data-p-post"]) == pytest.approx(p_post[k, said].item(), abs=1e-4)
        nats = (z_post[k].log_softmax(-1) - z_base[k].log_softmax(-1))[said].item()
        assert float(token["data-nats"]) == pytest.approx(nats, abs=1e-3)
        assert ("instead" in token["class"].split()) == (post != said)
        assert bool(token["under"]) == (post != said or by != "base")

    # the words of the open one
    k = int(dom.panels[0]["data-token"]) - 1
    assert k == (11 if "token" in fragment else k) and tokens[k]["aria-expanded"] == "true"
    (words,) = dom.words
    ids = [int(word["data-word"]) for word in words]
    scale = set()
    for i, word in zip(ids, words):
        base, delta, post = (float(word[f"data-z-{name}"]) for name in ("base", "delta", "post"))
        assert base + alpha * delta == pytest.approx(post, abs=1e-6)
        assert float(word["data-p-base"]) == pytest.approx(p_base[k, i].item(), abs=1e-4)
        assert float(word["data-p-post"]) == pytest.approx(p_post[k, i].item(), abs=1e-4)
        roles = {"base": z_base[k].argmax(), "pair": z_post[k].argmax(), "said": one.reply[k]}
        assert word["data-chosen"] == " ".join(name for name in roles if roles[name] == i)

        # bars: from the line at 0 to the left or to the right, one scale for all
        bars = {"base": base, "value": alpha * delta, "post": post}
        assert list(word["bars"]) == list(bars) and len({*word["zero"]}) == 1
        for name, z in bars.items():
            left, width = word["bars"][name]
            start = left + width if z < 0 else left
            assert start == pytest.approx(word["zero"][0], abs=1e-3)
            assert left > -1e-3 and left + width < 100 + 1e-3
            if abs(z) > 0.1:
                scale.add(round(width / abs(z), 2))
    assert len({round(x, 1) for x in scale}) == 1
    others = 1 - p_post[k, ids].sum().item()
    assert float(dom.panels[0]["data-others"]) == pytest.approx(others, abs=1e-4)

    # what is written about the words that are not shown: at 0, 1, 2 and here
    written = re.findall(r"([\d.]+)\xa0% at α\xa0=\xa0([\d.]+)", dom.rest)
    assert [float(a) for _, a in written] == sorted({0, 1, 2, alpha})
    for percent, a in written:
        others = 1 - (z_base + float(a) * z_delta)[k].softmax(-1)[ids].sum().item()
        assert float(percent) == pytest.approx(100 * others, abs=0.06)


def test_of_equally_likely_words_the_first_id_is_chosen_as_in_python(browse, tmp_path):
    """The words stand in the order of z_post; the base likes two of them alike."""
    z_base = torch.tensor([5.0, 5.0, 0.0])
    ids, numbers = wing.step_numbers(z_base, torch.tensor([0.0, 2.0, 0.0]), 1, stops(1.0), 1.0)
    assert ids[0] == 1 and z_base.argmax() == 0
    words = [{"id": i, "text": f"word{i}", "special": False} for i in ids]
    token = {"said": 0, "words": words, **numbers}
    column = {"title": ("a", "b"), "said": [Said("x", "y", "value", 0, 0, 0)], "tokens": [token]}
    path = tmp_path / "page.html"
    path.write_text(page("Who?", [column], 1.0), encoding="utf-8")
    for alpha, by in ((1, "value"), (0, "chance")):
        ((only,),) = browse(path, f"#alpha={alpha}&token=1").tokens
        assert only["data-by"] == by


def with_script(source, path, script: str):
    """A copy of a page with a script of the test at its end."""
    text = source.read_text(encoding="utf-8")
    block = f"<script>{{ {script} }}</script></html>"  # its names are its own
    path.write_text(text.replace("</html>", block), encoding="utf-8")
    return path


KEYS = """
const buttons = document.querySelectorAll(".reply .token"), told = [];
const press = key => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const tell = () => told.push([
  [...buttons].indexOf(document.activeElement),
  [...buttons].findIndex(button => button.getAttribute("aria-expanded") === "true"),
  [...buttons].filter(button => button.tabIndex === 0).map(button => [...buttons].indexOf(button)),
]);
buttons[0].focus(); tell();
buttons[0].click(); tell();  // what Enter and Space do to a button
const keys = "ArrowRight ArrowRight ArrowLeft End ArrowRight Home ArrowLeft Escape ArrowRight";
for (const key of keys.split(" ")) { press(key); tell(); }
document.activeElement.click(); tell();
document.activeElement.click(); tell();
document.activeElement.click();
const slider = document.getElementById("slider");
slider.value = 30;
slider.dispatchEvent(new Event("input"));
setTimeout(() => {
  const alpha = document.getElementById("alpha").textContent;
  const said = [slider.getAttribute("aria-valuetext"), alpha, location.hash, slider.type];
  document.body.dataset.result = JSON.stringify([told, said, buttons[0].tagName]);
}, 500);
"""


def test_it_can_be_used_with_a_keyboard(browse, one, tmp_path):
    path = with_script(one.path, tmp_path / "keys.html", KEYS)
    told, (spoken, shown, address, kind), tag = json.loads(browse(path, "#alpha=0&token=").result)
    last = len(one.reply) - 1
    places = [(0, -1), (0, 0), (1, 1), (2, 2), (1, 1), (last, last), (last, last), (0, 0), (0, 0)]
    places += [(0, -1), (1, -1), (1, 1), (1, -1)]
    assert [tuple(row[:2]) for row in told] == places
    # Tab comes to one button only, where one was
    assert all(row[2] == row[:1] for row in told) and tag == "BUTTON" and kind == "range"
    assert float(spoken) == float(shown) == stops(ALPHA)[30] == 1.45
    assert address == "#alpha=1.45&token=2"


MEASURE = """
addEventListener("load", () => {
  const bars = document.querySelectorAll(".bar").length;
  parent.postMessage([document.documentElement.scrollWidth, innerWidth, bars], "*");
});
"""
FRAMES = """<body><script>
addEventListener("message", event => document.body.dataset.result = JSON.stringify(event.data));
</script><iframe src="phone.html#alpha=2&token=12,3" width="360" height="800"></iframe></body>"""


def test_a_phone_need_not_scroll_sideways(browse, models, tokenizer, tmp_path):
    reply = drawn(models, 5.0, n=40)
    long = "incomprehensibilities" * 9
    with pytest.MonkeyPatch.context() as patch:
        texts = [long if i in reply[2:4] else text for i, text in enumerate(wing.texts(tokenizer))]
        patch.setattr(wing, "texts", lambda tokenizer: texts)
        sides = [made(models, tokenizer, reply, 5.0, title=(long, long)) for _ in range(2)]
    whole = tmp_path / "whole.html"
    whole.write_text(page(long, sides, 5.0), encoding="utf-8")
    with_script(whole, tmp_path / "phone.html", MEASURE)
    (tmp_path / "frames.html").write_text(FRAMES)
    width, room, bars = json.loads(browse(tmp_path / "frames.html").result)
    assert width <= room == 360 and bars >= 24


# ---------------------------------------------------------------- as a user asks for it


@pytest.fixture
def ask(run, base_dir, value_dir):
    def ask(*args, base=base_dir):
        models = ["--base", base, "--value", value_dir]
        how = ["--temperature", 0, "--max_new_tokens", 8]
        return run("sample.py", *models, *how, *args)

    return ask


def test_two_bases_side_by_side(ask, browse, base_dir, value_dir, tmp_path):
    small = make_directory(tmp_path / "a <small> base", seed=9)
    path = tmp_path / "page.html"
    result = ask("--alpha", 0.5, "--compare", small, "--html", path, "hello </script> you")
    assert result.returncode == 0, result.stderr
    dom = browse(path)
    assert len(dom.tokens) == len(dom.words) == 2 and dom.title == "hello </script> you"
    small_size, base_size, value_size = (
        f"{load(directory).size():,}" for directory in (small, base_dir, value_dir)
    )
    about = f"parameters + value model “value”, {value_size}"
    assert dom.names == [f"a <small> base {small_size} {about}", f"base {base_size} {about}"]

    # each says what it says by itself, and both are at one α
    tokenizer, value = Tokenizer(value_dir), load(value_dir)
    prompt = tokenizer.prompt([{"role": "user", "content": "hello </script> you"}])
    replies = []
    for directory, tokens in zip((small, base_dir), dom.tokens):
        how = {"alphas": [0.5], "stop": tokenizer.stop}
        reply = [ids[0] for ids in ivl.generate(load(directory), [value], [prompt], 8, **how)]
        assert [int(token["data-said"]) for token in tokens] == reply
        assert "chance" not in {token["data-by"] for token in tokens}
        replies.append(reply)

    # open where they part
    parted = [a == b for a, b in zip(*replies)].index(False) + 1
    assert [panel["data-token"] for panel in dom.panels] == [str(parted)] * 2
    blocks = [key for key, _ in groupby(result.stdout.split("\n"), lambda line: line[:3] == "by\t")]
    assert blocks.count(True) == 2 and f"over {small}:\n" in result.stdout
    assert f"wrote {path}" in result.stderr


def test_a_token_that_differs_is_on_no_page(base_dir, value_dir, tmp_path):
    """Where two vocabularies differ in a few tokens, those are never said, so never shown."""
    models = ["--base", base_dir, "--value", value_dir, "--max_new_tokens", 3]
    options = [*models, "--temperature", 0, "--html", tmp_path / "page.html", "hello"]
    speaker = Speaker(sample.arguments([str(option) for option in options]))
    prompt = speaker.tokenizer.prompt([{"role": "user", "content": "hello"}])

    def shown() -> list[list[int]]:
        tokens = sample.explain_reply(speaker, prompt, speaker.whole_reply(prompt))["tokens"]
        return [[word["id"] for word in token["words"]] for token in tokens]

    before = shown()
    spoilt = before[0][-1]  # the least likely of those that are shown, which is not said
    speaker.differing = {spoilt}
    assert spoilt in before[0] and not any(spoilt in ids for ids in shown())


def test_what_cannot_be_compared_is_refused(ask, other_dir, value_dir, tmp_path):
    page = tmp_path / "page.html"
    assert_refused(ask("--compare", value_dir, "hello"), "--compare", "without --html")
    assert_refused(ask("--compare", other_dir, "--html", page, "hello"), "different vocabularies")
    nothing = tmp_path / "nothing"
    assert_refused(ask("--compare", nothing, "--html", page, "hello"), str(nothing))
    part = make_directory(tmp_path / "part", seed=9)
    into = part / "config.json"
    assert_refused(ask("--compare", part, "--html", into, "hello"), "part of a model")
    short = make_directory(tmp_path / "short", seed=9, max_position_embeddings=8)
    assert_refused(ask("--compare", short, "--html", page, "hello you " * 9), "context is 8")
    assert not page.exists()
