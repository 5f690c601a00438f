"""A captured step, replayed, gives what the steps themselves give; a graph of torch.fx stands in for CUDA's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoModelForCausalLM

from infalign.generation import hf
from infalign.generation.hf import decode_rows
from infalign.models import captured
from infalign.models.captured import CapturedDecoding, why_not_captured
from infalign.models.shared_prefix import Decoding
from infalign.types import SamplingSettings
from tests.tiny import CLOSE, tiny_causal

PROMPTS = [(5, 6, 7, 8), (9, 10), (11,), (5, 6, 7, 8), (9, 10), (12, 13, 14, 15, 16, 17, 18)]


def recorded(step):
    """Like a CUDA graph: the operations, with the tensors and Python's numbers of now, to be repeated."""
    saved = [(tensor, tensor.clone()) for tensor in tensors_of(step.__self__)]
    graph = make_fx(lambda nothing: step())(torch.zeros(1))
    for tensor, before in saved:  # CUDA's capture runs nothing, this one did
        tensor.copy_(before)
    return lambda: graph(torch.zeros(1))


def tensors_of(decoding):
    layers = decoding.own.layers
    yield from (decoding.positions, decoding._place, decoding.own_bias, decoding._ids)
    yield from (part for layer in layers if layer.is_initialized for part in (layer._keys, layer._values))


@pytest.fixture(scope="module", params=["llama", "gpt_neox"])
def model(request, tmp_path_factory):
    return AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path_factory.mktemp("model"), request.param)).eval()


@torch.no_grad()
def test_replayed_steps_are_the_steps(model, monkeypatch):
    """Over a full block, with rows leaving, prompts of unlike length, and the last prompt gone."""
    monkeypatch.setattr(captured, "BLOCK", 6)
    captures = []
    plain = Decoding(model, PROMPTS, room=10)
    replayed = CapturedDecoding(model, PROMPTS, 10, lambda step: captures.append(step) or recorded(step))
    rows = torch.arange(6)
    for place in range(10):
        if place == 3:
            left = torch.arange(len(rows))[:-2]
            rows = rows[left]
            plain.keep(left)
            replayed.keep(left)
        ids = (7 * rows + 3 * place + 4) % 20
        torch.testing.assert_close(replayed.logits(ids), plain.logits(ids), atol=CLOSE, rtol=0)
    assert len(captures) == 3, "one at first, one after the departure, one for the second block"


@torch.no_grad()
def test_samples_are_the_same(model, monkeypatch):
    """All the way through `decode_rows`, rows ending at different tokens."""
    uniforms = np.random.default_rng(1).random((6, 12))
    ends = list(range(20, 60))
    expected = decode_rows(model, PROMPTS, uniforms, SamplingSettings(12), ends)
    monkeypatch.setattr(
        hf, "decoding_for", lambda model, prompts, room: CapturedDecoding(model, prompts, room, recorded)
    )
    found = decode_rows(model, PROMPTS, uniforms, SamplingSettings(12), ends)
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    assert len({len(ids) for ids, _ in found}) > 1
    for (_, logps), (_, others) in zip(found, expected, strict=True):
        np.testing.assert_allclose(logps, others, atol=CLOSE)


class TestTrust:
    @torch.no_grad()
    def test_models_that_can_be_captured(self, model):
        assert why_not_captured(model, recorded) is None

    @torch.no_grad()
    def test_a_number_of_pythons_that_changes_is_found(self, model):
        """A replay that does not see later steps: the one fault that a graph can have in silence."""

        def stale(step):
            result = step()
            return lambda: result

        assert "changes the model's results" in str(why_not_captured(model, stale))

    @torch.no_grad()
    def test_what_cannot_be_captured_runs_as_it_is(self, model):
        def fails(step):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        reason = "RuntimeError: operation not permitted when stream is capturing"
        assert why_not_captured(model, fails) == reason
        plain, other = Decoding(model, PROMPTS, 8), CapturedDecoding(model, PROMPTS, 8, fails)
        for place in range(8):
            ids = torch.arange(6) + place
            torch.testing.assert_close(other.logits(ids), plain.logits(ids), atol=CLOSE, rtol=0)
        assert other.failure == reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(tmp_path, dtype):
    """The same samples, up to what another order of rounding makes of close calls, and really by graphs."""
    model = AutoModelForCausalLM.from_pretrained(tiny_causal(tmp_path, "llama"), dtype=dtype).cuda().eval()
    assert why_not_captured(model) is None
    rows = list(itertools.islice(itertools.cycle(PROMPTS), 60))
    uniforms = np.random.default_rng(1).random((60, 300))
    replays = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.cuda.CUDAGraph,
            "replay",
            lambda graph, replay=torch.cuda.CUDAGraph.replay: replays.append(replay(graph)),
        )
        found = decode_rows(model, rows, uniforms, SamplingSettings(300), [3])
        assert len(replays) > 200
        patch.setattr(hf, "decoding_for", Decoding)
        expected = decode_rows(model, rows, uniforms, SamplingSettings(300), [3])
    same = np.mean([a == b for (a, _), (b, _) in zip(found, expected, strict=True)])
    assert same > (0.9 if dtype == torch.float32 else 0.2)
