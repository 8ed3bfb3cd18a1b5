"""Decoding's machinery: a step over fixed buffers, its layouts, and the same step as a CUDA graph."""

import pytest
import torch

import decode
import ivl
from conftest import make_directory
from model import load

PROMPTS = [[1, 20, 30, 40], [1, 99], [1, 5, 6, 7, 8, 9, 10, 11]]
WAYS = [dict(), dict(temperature=1.0, top_k=20, top_p=0.9, seed=3)]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def replies(base, value, **options):
    return list(ivl.generate(base, value, PROMPTS, 40, **options))


@torch.inference_mode()
def test_a_lane_gives_the_logits_of_the_whole_text(base_dir):
    """Also where the step looks at slots that nothing has been written to, as a recorded one does."""
    model = load(base_dir)
    lane, texts = decode.Lane(model, len(PROMPTS), 32), [list(prompt) for prompt in PROMPTS]
    z = lane.prefill(PROMPTS)
    for end in (9, 10, 32, 32):
        expected = torch.stack([model(torch.tensor([text]))[0, -1] for text in texts])
        torch.testing.assert_close(z, expected, atol=1e-4, rtol=1e-4)
        new = z.argmax(-1)
        texts = [text + [i] for text, i in zip(texts, new.tolist())]
        lane.tokens.copy_(new[:, None])
        z = lane.step(end)


@pytest.mark.parametrize("tied", [True, False])
def test_column_major_is_the_same_network(tmp_path, tied):
    model = load(make_directory(tmp_path, seed=1, tie_word_embeddings=tied))
    x = torch.tensor(PROMPTS[2:])
    before, embedding = model(x), model.embed.weight.clone()
    assert decode.column_major(model) is model
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.embed.weight, embedding) and model.embed.weight.is_contiguous()
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name != "embed.weight"]
    assert len(matrices) == 4 * len(model.blocks) + 1
    assert all(p.stride() == (1, len(p)) for p in matrices)  # neighbours in a column are neighbours in memory


# ---------------------------------------------------------------- on a GPU

@pytest.fixture
def on_cuda(base_dir, value_dir):
    return [load(directory, "cuda") for directory in (base_dir, value_dir)]


@needs_cuda
@pytest.mark.parametrize("way", WAYS)
def test_the_graph_decodes_as_the_plain_step_does(on_cuda, monkeypatch, way):
    monkeypatch.setattr(decode, "SHORTEST", 16)  # so that three graphs are recorded on the way
    graphs = [replies(*on_cuda, **way), replies(*on_cuda, **way), replies(on_cuda[0], None, **way)]

    def plain(lanes, decide, generator):
        return lambda end: decide([lane.step(end) for lane in lanes])
    monkeypatch.setattr(ivl, "record_steps", plain)
    assert graphs == [replies(*on_cuda, **way), replies(*on_cuda, **way), replies(on_cuda[0], None, **way)]


@needs_cuda
def test_the_graph_stops_where_the_plain_step_stops(on_cuda):
    free = replies(*on_cuda)
    stop = {step[0] for step in free[5:6]} | {step[1] for step in free[3:4]}
    first = [next((t for t, step in enumerate(free) if step[i] in stop), len(free) - 1) for i in range(len(PROMPTS))]
    assert replies(*on_cuda, stop=stop) == [[i if t <= end else None for i, end in zip(step, first)]
                                            for t, step in enumerate(free[:max(first) + 1])]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two CUDA devices")
@pytest.mark.parametrize("way", WAYS)
def test_the_value_model_on_a_second_device(on_cuda, value_dir, way):
    assert replies(on_cuda[0], load(value_dir, "cuda:1"), **way) == replies(*on_cuda, **way)
