"""The pictures of made-up tables: what stands in them is what the rows say."""

import sys

import pytest

from experiments import figures, reproduce
from experiments.family import SCORES

COSTS = [f"{unit} {tokens}" for unit in ("seconds", "MB") for tokens in reproduce.LENGTHS]
TABLES = reproduce.TABLES | {"table3": (COSTS, reproduce.COSTS)}  # scores; rows: base, system


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
    assert drawn(picture) == said(rows, single=name != "figure2")
    labels = {text.get_text() for text in picture.legends[0].get_texts()}
    assert labels == {figures.SYSTEMS[row["system"]][1] for row in rows}
    numbers = {text.get_text() for axes in picture.axes for text in axes.texts}
    assert numbers == {f"{row[key]['mean']:.2f}" for row in rows for key in TABLES[name][0]}


def test_figure_3_calls_the_value_model_residual(figure):
    assert drawn(figure("figure3", made("figure3"))) == {
        (*place, label.replace("small value model", "residual")): x
        for (*place, label), x in said(made("figure3")).items()
    }


def test_table_1_has_full_fine_tuning_as_a_line(figure):
    picture, rows = figure("table1", made("table1")), made("table1")
    full = [row for row in rows if row["system"] == "full"]
    values = said([row for row in rows if row["system"] != "full"])
    assert drawn(picture) == {
        place: x for place, x in values.items() if place[0] != "new" or place[1] == "continued"
    }
    for axes in picture.axes[:5]:
        key, (lines,) = (
            axes.get_title("left"),
            [x for x in axes.collections if x.get_label() == "full fine-tuning"],
        )
        scores = [row[key] for row in full if key != "new" or row["base"] == "continued"]
        assert [y for (_, y), _ in lines.get_segments()] == pytest.approx(
            [score["mean"] for score in scores]
        )
        (band,) = [x for x in axes.containers if hasattr(x, "patches") and not x.errorbar]
        assert [
            x for bar in band for x in (bar.get_y(), bar.get_y() + bar.get_height())
        ] == pytest.approx([score[x] for score in scores for x in ("least", "most")])


def test_table_3_has_lines_over_tokens(figure):
    rows = made("table3")
    del rows[1]["MB 512"]
    for axes, unit in zip(figure("table3", rows).axes, ("seconds", "MB"), strict=True):
        assert axes.get_title("left") == unit
        lines = {line.get_label(): line for line in axes.lines}
        for row in rows:
            line = lines.pop(
                f"{row['base']} alone" if row["system"] == "alone" else f"{row['base']} + small"
            )
            tokens = [n for n in (128, 512, 1024) if f"{unit} {n}" in row]
            assert list(line.get_xdata()) == tokens
            assert list(line.get_ydata()) == [row[f"{unit} {n}"]["mean"] for n in tokens]
            assert line.get_linestyle() == ("--" if row["system"] == "alone" else "-")
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
