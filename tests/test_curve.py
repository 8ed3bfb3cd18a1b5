"""The picture of a training: what is drawn is what the log says."""

import json

import pytest

figures = pytest.importorskip("matplotlib.figure", reason="pictures need matplotlib")

from extras import curve  # noqa: E402


@pytest.fixture
def picture(monkeypatch):
    """Draws, and gives the figure that was written."""
    drawn = []

    def write(figure, *_, real=figures.Figure.savefig, **options):
        drawn.append(figure)
        real(figure, *_, **options)

    monkeypatch.setattr(figures.Figure, "savefig", write)

    def draw(entries, path):
        curve.draw(entries, path, "nats per pair")
        assert path.read_bytes().startswith(b"\x89PNG")
        return drawn[-1]

    return draw


def lines(axes) -> dict:
    return {line.get_label(): [*map(list, line.get_data())] for line in axes.lines}


ENTRIES = [
    {"step": 0, "done": 0, "held_out_loss": 5.0, "base_alone": 3.0}
    | {"form, small": 0.0, "right, large": 0.0},
    {"step": 0, "loss": 4.0, "norm": 1.0},
    {"step": 1, "loss": 2.0, "norm": 0.5, "form, small": 0.5, "right, large": 0.25},
    {"step": 1, "done": 2, "held_out_loss": 2.5, "base_alone": 3.0},
]


def test_it_draws_what_the_log_says(picture, tmp_path):
    losses, norms, scores = picture(ENTRIES, tmp_path / "curve.png").axes
    assert losses.get_ylabel() == "nats per pair"
    assert lines(losses)["training"] == [[1, 2], [4.0, 2.0]]
    assert lines(losses)["held out"] == [[0, 2], [5.0, 2.5]]
    assert lines(losses)["held out, the base alone"] == [[0, 2], [3.0, 3.0]]
    assert [line.get_ydata().tolist() for line in norms.lines] == [[1.0, 0.5]]
    assert lines(scores) == {"form, small": [[0, 2], [0, 0.5]], "right, large": [[0, 2], [0, 0.25]]}


def test_a_model_by_itself_has_no_base_and_few_have_scores(picture, tmp_path):
    entries = [
        {
            key: x
            for key, x in entry.items()
            if key in ("step", "done", "loss", "norm", "held_out_loss")
        }
        for entry in ENTRIES
    ]
    losses, _ = picture(entries, tmp_path / "curve.png").axes
    assert set(lines(losses)) >= {"training", "held out"}
    assert "held out, the base alone" not in lines(losses)


def test_every_training_draws_its_own(train, tmp_path):
    assert train().returncode == 0
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[0])["step"] == 0
