"""Samples that exist, in place of drawn ones: texts of a file, as tokens, with their log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.generation.likelihood import completion_logps
from infalign.generation.plan import Request
from infalign.types import InputError, Sample, SamplingSettings

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Given:
    """One completion: its text, and log-probabilities of its tokens, or one number, their sum; None: not known."""

    text: str
    logps: Floats | None = None


@dataclass(frozen=True)
class ImportedSampler:
    """Hands out the completions of a file as samples.

    A text is tokenized without special tokens; the end token follows where there is room for it within the length
    limit, and a longer text is cut there. Log-probabilities that the file lacks are the model's; a sum is shared out
    evenly among the tokens.

    Args:
        given: by prompt key, the completions in order.
        tokenizer: the base policy's.
        settings: the length limit; the temperature that they were drawn at.
        end_id: the token that ends a completion.
        model: loads the base policy; asked only where log-probabilities are missing.
    """

    given: Mapping[str, Sequence[Given]]
    tokenizer: Any
    settings: SamplingSettings
    end_id: int
    model: Callable[[], Any]

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """The requested completions, in their order.

        Raises:
            InputError: log-probabilities are missing and the temperature is not 1, or one has another number of them.
        """
        chosen = [self.given[request.key][request.index] for request in requests]
        ids = [self._tokens(one.text) for one in chosen]
        known = [one.logps for one in chosen]
        missing = [row for row, logps in enumerate(known) if logps is None]
        if missing:
            if self.settings.temperature != 1.0:
                raise InputError(
                    f"calibration_samples without log-probabilities, at temperature {self.settings.temperature:g}: "
                    "they can be computed for temperature 1.0 alone; add them to the file (logps)"
                )
            prompts, completions = [list(requests[row].prompt_ids) for row in missing], [ids[row] for row in missing]
            summed = completion_logps(self.model(), prompts, completions)
            for row, value in zip(missing, summed.tolist(), strict=True):
                known[row] = np.array([value])
        return [
            Sample(
                key=request.key,
                index=request.index,
                token_ids=tuple(tokens),
                token_logps=_by_token(logps, len(tokens), request),
                text=self.tokenizer.decode(tokens, skip_special_tokens=True),
                finished=tokens[-1] == self.end_id,
            )
            for request, tokens, logps in zip(requests, ids, known, strict=True)
        ]

    def _tokens(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return [*ids, self.end_id][: self.settings.max_tokens]


def _by_token(logps: Floats | None, count: int, request: Request) -> NDArray[np.float32]:
    assert logps is not None
    if logps.size == count:
        return logps.astype(np.float32)
    if logps.size > 1:
        raise InputError(
            f"calibration_samples: completion {request.index} of prompt {request.key} has {count} tokens (end token "
            f"included) and {logps.size} log-probabilities: give one for each token, or their sum, or leave them out"
        )
    return np.full(count, logps[0] / count, dtype=np.float32)
