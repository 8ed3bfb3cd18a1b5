"""The pictures of made-up tables: what stands in them is what the rows say."""

import json
import sys
from pathlib import Path

import pytest
from conftest import assert_refused

from experiments import figures, reproduce
from experiments.family import SCORES

RESULTS = Path(figures.__file__).parent / "results"
COSTS = [f"{unit} {tokens}" for unit in ("seconds", "MB") for tokens in reproduce.LENGTHS]
ALL = reproduce.TABLES | {"table3": (COSTS, reproduce.COSTS)}  # scores; rows: base, system
TABLES = {name: ALL[name] for name in figures.TITLES}


@pytest.fixture
def figure():
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    return figures.figure


def made(name: str) -> list[dict]:
    """Rows in which no two scores are the same, and seeds reach further up than down."""
    (scores, rows), means = TABLES[name], (0.1 + i / 200 for i in range(200))
    return [
        {
            "base": base,
            "system": system,
            **{
                key: {"mean": mean, "least": mean - 0.02, "most": mean + 0.05}
                for key, mean in zip(scores, means)
            },
        }
        for base, system in rows
    ]


def said(rows: list[dict], single: bool = False) -> dict[tuple, object]:
    """(panel, group, label) → mean, least, most, of all that the rows hold."""
    return {
        (f"base: {row['base']}", key, figures.SYSTEMS[row["system"]][1])
        if single
        else (key, row["base"], figures.SYSTEMS[row["system"]][1]): pytest.approx(
            [row[key][x] for x in ("mean", "least", "most")]
        )
        for row in rows
        for key in row.keys() & {*SCORES}
    }


def drawn(picture) -> dict[tuple, list]:
    """The same of the bars of a picture, none of which may lie upon another."""
    found = {}
    for axes in picture.axes:
        groups, taken = [label.get_text() for label in axes.get_xticklabels()], []
        for container in axes.containers:
            if getattr(container, "errorbar", None):
                lines = container.errorbar.lines[2][0].get_segments()
                for bar, ((left, least), (right, most)) in zip(container, lines, strict=True):
                    assert left == right == pytest.approx(bar.get_x() + bar.get_width() / 2)
                    place = axes.get_title("left"), groups[round(left)], container.get_label()
                    found[place] = [bar.get_height(), least, most]
                    taken.append((bar.get_x(), bar.get_x() + bar.get_width()))
        taken.sort()
        assert all(end < start for (_, end), (start, _) in zip(taken, taken[1:]))
    return found


@pytest.mark.parametrize("name", TABLES)
def test_a_png_and_nothing_else(figure, tmp_path, name):
    figures.draw(name, made(name), tmp_path / f"{name}.png")
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.png"]
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("name", ["figure2", "figure4", "table2", "table4"])
def test_bars_say_the_rows(figure, name):
    picture, rows = figure(name, made(name)), made(name)
    assert drawn(picture) == said(rows, single=name in ("figure4", "table2"))
    labels = {text.get_text() for text in picture.subfigs[0].legends[0].get_texts()}
    assert labels == {figures.SYSTEMS[row["system"]][1] for row in rows}
    numbers = {text.get_text() for axes in picture.axes for text in axes.texts}
    assert numbers == {f"{row[key]['mean']:.2f}" for row in rows for key in TABLES[name][0]}


def test_figure_3_calls_the_value_model_residual(figure):
    assert drawn(figure("figure3", made("figure3"))) == {
        (*place, label.replace("small value model", "residual")): x
        for (*place, label), x in said(made("figure3")).items()
    }


def test_table_1_has_full_fine_tuning_and_the_base_alone_as_lines(figure):
    picture, rows = figure("table1", made("table1")), made("table1")
    values = said([row for row in rows if row["system"] not in ("full", "alone")])
    assert drawn(picture) == {
        place: x for place, x in values.items() if place[0] != "new" or place[1] == "continued"
    }

    for axes in picture.axes[:5]:
        key = axes.get_title("left")
        bands = [x for x in axes.containers if hasattr(x, "patches") and not x.errorbar]
        for system, band in zip(("alone", "full"), bands, strict=True):
            here = [row for row in rows if row["system"] == system]
            scores = [row[key] for row in here if key != "new" or row["base"] == "continued"]

            # the line: a mean in each group, across its bars
            label = figures.SYSTEMS[system][1]
            (lines,) = [x for x in axes.collections if x.get_label() == label]
            segments = lines.get_segments()
            assert [y for (_, y), _ in segments] == pytest.approx([x["mean"] for x in scores])
            assert [x for (x, _), _ in segments] == pytest.approx(
                [i - 0.46 for i in range(len(scores))]
            )

            # the band: from the smallest to the largest
            ends = [y for bar in band for y in (bar.get_y(), bar.get_y() + bar.get_height())]
            assert ends == pytest.approx([x[end] for x in scores for end in ("least", "most")])

    # a sixth panel would be empty: it holds the legend
    free = picture.axes[5]
    assert not free.axison and not free.has_data()
    labels = {text.get_text() for text in free.get_legend().get_texts()}
    assert labels == {figures.SYSTEMS[row["system"]][1] for row in rows}


def caption_of(picture) -> str:
    """What stands under a picture, in one line."""
    (text,) = picture.subfigs[1].texts
    return text.get_text().replace("\n", " ")


@pytest.mark.parametrize("name", TABLES)
def test_the_caption_says_what_each_score_means_and_no_other(figure, name):
    below = caption_of(figure(name, made(name)))
    shown = {key.split()[0] for key in TABLES[name][0]}
    assert {key for key in figures.MEANINGS if f"{key}: {figures.MEANINGS[key]}" in below} == shown
    assert {key for key in figures.MEANINGS if f"{key}:" in below} == shown


@pytest.mark.parametrize("name", TABLES)
def test_all_text_stands_on_the_picture_and_titles_near_their_axes(figure, name):
    # the bars as they are, and all of them as high as can be, with numbers above them
    for top in (0, 1):
        rows = made(name)
        for row in rows:
            for key in row.keys() & {*SCORES}:
                row[key] = {x: y + top * (1 - y) for x, y in row[key].items()}
        picture = figure(name, rows)
        picture.canvas.draw()
        width, height = picture.bbox.size

        (caption,) = picture.subfigs[1].texts
        box = caption.get_window_extent()
        assert 0 <= box.x0 and box.x1 <= width and 0 <= box.y0
        lowest = min(axes.get_tightbbox().y0 for axes in picture.axes)
        assert box.y1 < lowest

        for legend in picture.subfigs[0].legends:
            box = legend.get_window_extent()
            assert 0 <= box.x0 and box.x1 <= width

        for axes in picture.axes:
            title = axes._left_title.get_window_extent()
            if title.width == 0:
                continue
            gap = title.y0 - axes.get_window_extent().y1
            assert 0 < gap < 10 / 72 * picture.dpi  # 10 points
            assert all(text.get_window_extent().y1 < title.y0 for text in axes.texts)


def test_a_score_that_is_0_for_all_has_no_panel_and_the_caption_says_so(figure):
    nothing = {"mean": 0, "least": 0, "most": 0}
    for name, key in (("table1", "skill"), ("figure3", "form"), ("table4", "skill")):
        rows = [row | {key: nothing} for row in made(name)]
        picture = figure(name, rows)
        places = [axes.get_title("left") for axes in picture.axes]
        places += [x.get_text() for axes in picture.axes for x in axes.get_xticklabels()]
        assert key not in places and "right" in places
        assert f"{key} ({figures.MEANINGS[key]}): 0 for all, left out." in caption_of(picture)
        assert f"{key}:" not in caption_of(picture)

        # once above 0, in one seed: no longer
        rows[-1] = rows[-1] | {key: nothing | {"most": 0.01}}
        assert "left out" not in caption_of(figure(name, rows))

    # where all are 0 there is nothing else to show
    rows = [row | dict.fromkeys(("form", "right"), nothing) for row in made("figure3")]
    assert [axes.get_title("left") for axes in figure("figure3", rows).axes] == ["form", "right"]


def test_pictures_are_drawn_again_from_a_folder(figure, run, tmp_path):
    assert_refused(run("experiments/figures.py", "--out", tmp_path), "no table of reproduce.py")
    (tmp_path / "table4.json").write_text(json.dumps(made("table4")))
    (tmp_path / "findings.json").write_text("[]")
    result = run("experiments/figures.py", "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(tmp_path / "table4.png")]
    made_now = sorted(path.name for path in tmp_path.iterdir())
    assert made_now == ["findings.json", "table4.json", "table4.png"]


@pytest.mark.parametrize("name", TABLES)
def test_the_results_have_the_rows_of_their_tables(name):
    rows = json.loads((RESULTS / f"{name}.json").read_text())
    assert [(row["base"], row["system"]) for row in rows] == TABLES[name][1]
    assert all(row.keys() == {"base", "system", *TABLES[name][0]} for row in rows)


def test_table_3_has_lines_over_tokens(figure):
    rows = made("table3")
    del rows[1]["MB 512"]
    for axes, unit in zip(figure("table3", rows).axes, ("seconds", "MB"), strict=True):
        assert axes.get_title("left") == unit
        lines = {line.get_label(): line for line in axes.lines}
        for row in rows:
            system = row["system"]
            line = lines.pop(f"{row['base']} {'alone' if system == 'alone' else '+ ' + system}")
            tokens = [n for n in (128, 512, 1024) if f"{unit} {n}" in row]
            assert list(line.get_xdata()) == tokens
            assert list(line.get_ydata()) == [row[f"{unit} {n}"]["mean"] for n in tokens]
            assert line.get_linestyle() == {"alone": "--", "small": "-", "proxy": ":"}[system]
        assert not lines
        spans = [segment for x in axes.collections for segment in x.get_segments()]
        assert sorted(x for (_, least), (_, most) in spans for x in (least, most)) == pytest.approx(
            sorted(
                score[x]
                for row in rows
                for key, score in row.items()
                if key.startswith(unit)
                for x in ("least", "most")
            )
        )


def test_a_missing_score_leaves_out_its_bar(figure):
    for name, key in (("figure2", "right"), ("table2", "skill")):
        rows = made(name)
        del rows[1][key]
        assert drawn(figure(name, rows)) == said(rows, single=name == "table2")


def test_seeds_that_agree_need_no_exact_mean(figure):
    score = {"mean": sum([0.1] * 3) / 3, "least": 0.1, "most": 0.1}
    assert score["mean"] > score["most"]
    (bar,) = drawn(
        figure("table4", [{"base": "medium", "system": "small", "form": score}])
    ).values()
    assert bar == pytest.approx([0.1] * 3)


def test_a_system_without_a_colour_is_not_passed_over(figure):
    with pytest.raises(ValueError, match="unheard of"):
        figure("table4", [row | {"system": "unheard of"} for row in made("table4")])


def test_without_matplotlib_only_drawing_fails(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError):
        figures.draw("table4", made("table4"), tmp_path / "table4.png")
    assert not [*tmp_path.iterdir()]
