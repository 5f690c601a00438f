"""Decoding on a GPU, a step of which is one launch: a CUDA graph of the model's pass over one token a row.

Starting the kernels of a small model takes the host several times as long as the GPU takes to run them. A graph replays
them from fixed addresses, so nothing that changes from step to step may be a number of Python's: the place that a
token's keys go to is a tensor, and attention runs over all places of a block, those to come masked. A new graph is made
when rows leave and when a block is full. The first step of every shape runs as it is, which warms up what the second
step's capture may not do.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from infalign.models.shared_prefix import Decoding, OwnLayer, apart, precision, rounding
from infalign.runtime.console import notice

Step = Callable[[], Tensor]

BLOCK = 256
"""Places of the decoded tokens that one graph attends to."""
LEAST = 8
"""Tokens from which a graph pays for its capture, which takes about as long as two steps."""


def cuda_graph(step: Step) -> Step:
    """Capture `step` without running it; what is returned replays it and gives the same tensor every time."""
    # the default stream can't be captured; another one must wait for what is under way on it, and the other way round
    graph, stream, here = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(here)
    collecting = gc.isenabled()
    gc.disable()  # collected tensors of other graphs would be freed into this one
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")  # other threads may go on using CUDA
            try:
                result = step()
            except BaseException:
                with suppress(RuntimeError):  # the capture is invalid already: the reason is the first error
                    graph.capture_end()
                raise
            graph.capture_end()
    finally:
        if collecting:
            gc.enable()
    here.wait_stream(stream)

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


class CapturedDecoding(Decoding):
    """`Decoding` by replaying a captured step. The logits of a step are overwritten by the next.

    Args:
        model, prompts, room: as for `Decoding`.
        capture: makes a function that repeats a step's work on the tensors that it was made with.
    """

    KEPT = 1 / 2  # rows that leave cost a capture, rows that stay next to nothing

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], room: int, capture: Callable[[Step], Step] = cuda_graph
    ) -> None:
        self._room, self._seen = room, min(room, BLOCK)
        self._place = torch.zeros(1, dtype=torch.long, device=model.device)
        self._capture: Callable[[Step], Step] | None = capture
        self.failure: str | None = None
        """Why a capture failed; steps are run as they are since."""
        super().__init__(model, prompts, room)
        self._count = 0
        self._ids = self.positions.new_zeros(len(prompts))
        self._mask_places()
        self._begin_anew()

    def _layer(self, rows: int) -> OwnLayer:
        return _FixedLayer(rows, self)

    def logits(self, ids_B: Tensor) -> Tensor:
        """(B, V) logits of the next token after one more input token a row; valid until the next call."""
        if self._count == self._seen:  # the block is full: attend to one more, which takes a new graph
            self._seen = min(self._room, self._seen + BLOCK)
            self._mask_places()
            self._begin_anew()
        self._count += 1
        self._ids.copy_(ids_B)  # the graph reads this very tensor
        if self._replay is None and self._warm and self._capture is not None:
            try:
                self._replay = self._capture(self._step)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # nothing of the step was run: it can still be run as it is
                self._capture, self.failure = None, f"{type(error).__name__}: {_first_line(error)}"
        self._warm = True
        return self._step() if self._replay is None else self._replay()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, by a new graph."""
        super().keep(rows)
        self._ids = self._ids[rows]
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._replay: Step | None = None
        self._warm = False

    def _mask_places(self) -> None:
        """-inf at the places of this block that no token has been written to."""
        places = torch.arange(self._seen, device=self._place.device)
        self.own_bias = torch.where(places < self._place, 0.0, -torch.inf)

    def _step(self) -> Tensor:
        assert self.own_bias is not None
        # the new token's own place is open from now on; its index is a tensor, so that a replay reads the current one
        self.own_bias.index_fill_(0, self._place, 0.0)
        logits = self._forward(self._ids)
        # in place, like everything here that the next replay must find changed
        self.positions.add_(1)
        self._place.add_(1)
        return logits


class _FixedLayer(OwnLayer):
    """One layer's keys and values at fixed addresses; all places of the block are shown, zero where none is written."""

    def __init__(self, rows: int, decoding: CapturedDecoding) -> None:
        super().__init__(rows, decoding._room)
        self.decoding = decoding

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token's keys and values (B, heads, 1, width) at the decoding's place."""
        if not self.is_initialized:
            self.make_room(key_states, value_states)
        self._keys.index_copy_(2, self.decoding._place, key_states)
        self._values.index_copy_(2, self.decoding._place, value_states)
        return self.show(self.decoding._seen)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._keys, self._values = self._keys[indices], self._values[indices]
        self.show(self.decoding._seen)


# --- trust ------------------------------------------------------------------------------------------------------------

_verdicts: WeakKeyDictionary[Any, dict[Any, bool]] = WeakKeyDictionary()


def decoding_for(model: Any, prompts: Sequence[Sequence[int]], room: int) -> Decoding:
    """`CapturedDecoding` on a GPU, for a model that it was seen to be right for; else `Decoding`.

    Args:
        model: a causal language model for which `why_plain` is None.
        prompts: B prompts' token ids.
        room: most tokens that will be decoded.
    """
    if model.device.type != "cuda" or room < LEAST:
        return Decoding(model, prompts, room)
    verdicts = _verdicts.setdefault(model, {})
    key = precision(model)
    if key not in verdicts:
        why = why_not_captured(model)
        verdicts[key] = why is None
        if why is not None:
            notice(f"decoding starts every kernel anew, without a CUDA graph: {why}")
    return (CapturedDecoding if verdicts[key] else Decoding)(model, prompts, room)


def why_not_captured(model: Any, capture: Callable[[Step], Step] = cuda_graph) -> str | None:
    """Why a graph of `model` can't be trusted: some steps both ways, rows leaving between them. None: it can."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    prompts = [[token % vocabulary for token in row] for row in ([5, 6, 7, 8], [9, 10], [5, 6, 7, 8])]
    rows = torch.arange(3, device=model.device)
    try:
        by_step, by_graph = Decoding(model, prompts, room=8), CapturedDecoding(model, prompts, 8, capture)
        for place in range(8):
            if place == 5:
                rows = rows[1:]
                by_step.keep(rows)
                by_graph.keep(rows)
            ids = (11 * rows + 3 * place + 1) % vocabulary  # different by row and step, nothing more
            expected, found = by_step.logits(ids), by_graph.logits(ids)
            if not (difference := apart(found, expected)) <= rounding(expected):
                return f"it changes the model's results by {difference:.2g}"
            if by_graph.failure:
                return by_graph.failure
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model does that a capture forbids
        return f"{type(error).__name__}: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
