"""What the endpoint answers, by OpenAI's own client over a real socket: the choice among candidates, and its shape."""

from __future__ import annotations

import asyncio
import json

import httpx
import numpy as np
import pytest
import torch
from openai import AsyncOpenAI, NotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from infalign.decoding.decode import decode, plan_decoding
from infalign.generation.hf import HFSampler
from infalign.models.loading import end_token_ids, load_policy
from infalign.rewards.scoring import score_samples
from infalign.serving.answer import pieces
from infalign.stages.experiment import Experiment
from infalign.stages.generate import generate
from infalign.stages.recipe import load_recipe
from infalign.theory.procedures import BestOfN
from infalign.types import Prompt, prompt_key
from tests.serving.running import events, running, tiny_keys

CHAT = [{"role": "user", "content": "the cat sat"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with running(folder, tiny_keys(folder)) as one:
        yield one


@pytest.fixture(scope="module")
def client(served):
    return served.client()


@pytest.fixture(scope="module")
def recipe(served):
    return load_recipe(tiny_keys(served.folder))


def ask(client, prompt="the cat sat", **more):
    own = {"return_candidates": True, **more.pop("infalign", {})}
    return client.completions.create(model="tiny", prompt=prompt, extra_body={"infalign": own}, **more)


# --- what is chosen


@pytest.mark.parametrize("seed", [7, 42])
def test_answers_are_those_of_decode(seed, served, client, recipe):
    """For a chat: the same candidates, rewards and choice as `decode` of the same stream."""
    experiment = Experiment(recipe)
    key = prompt_key(CHAT) if seed == 42 else f"{prompt_key(CHAT)}/{seed}/0"
    prompt = Prompt(CHAT, key)
    model = load_policy(recipe.model_name_or_path, device=torch.device("cpu"))
    ends = end_token_ids(model, experiment.tokenizer)
    sampler = HFSampler(model, experiment.tokenizer, recipe.sampling, ends, "42/generate")
    ids = experiment.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    batches = plan_decoding([prompt], [tuple(ids)], BestOfN(4), max_tokens=6, tokens_per_batch=400)
    score = lambda prompts, samples: score_samples(experiment.reward, prompts, samples)  # noqa: E731
    ((expected,),) = decode(batches, {key: prompt}, sampler, score, BestOfN(4), 42)
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, seed=seed, extra_body={"infalign": {"return_candidates": True}}
    )
    (choice,) = answer.choices
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert choice.infalign["chosen"] == expected.chosen and choice.infalign["seed"] == seed
    assert [one["text"] for one in choice.infalign["candidates"]] == [one.text for one in expected.candidates]
    np.testing.assert_allclose([one["reward"] for one in choice.infalign["candidates"]], expected.rewards_N)
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == sum(len(one.token_ids) for one in expected.candidates)
    assert answer.usage.infalign["chosen_tokens"] == len(expected.candidates[expected.chosen].token_ids)


def test_the_recipes_seed_gives_what_generate_writes(served, client, recipe, tmp_path):
    texts = ["the cat", "a dog ran", "the mat"]
    (tmp_path / "prompts.txt").write_text("\n".join(texts))
    path = generate(recipe, prompts=str(tmp_path / "prompts.txt"), output=str(tmp_path / "out.jsonl"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for text, row in zip(texts, rows, strict=True):
        (choice,) = ask(client, text, seed=42).choices
        assert (choice.text, choice.infalign["chosen"]) == (row["completion"], row["chosen"])
        assert [one["text"] for one in choice.infalign["candidates"]] == [c["completion"] for c in row["candidates"]]


def test_the_choice_is_the_best_of_its_candidates(client):
    """By the scores told, and those by the reward's definition."""
    chosen = set()
    for seed in range(12):
        (choice,) = ask(client, seed=seed).choices
        candidates = choice.infalign["candidates"]
        assert len(candidates) == 4
        best = max(range(4), key=lambda place: candidates[place]["reward"])
        assert choice.infalign["chosen"] == best and choice.text == candidates[best]["text"]
        assert all(int(one["reward"]) == len(one["text"]) for one in candidates)
        chosen.add(best)
    assert len(chosen) > 1


def test_the_same_request_has_the_same_answer_alone_and_among_others(served, client):
    """Sixteen at a time, of several prompts, seeds and settings; prompts that differ in case too."""
    asked = [
        {"prompt": prompt, "seed": seed, "max_tokens": 3 + seed % 2}
        for prompt in ("the cat", "the Cat", "a dog", "red moon and sun") for seed in range(4)
    ]  # fmt: skip
    alone = [ask(client, **one).choices[0].text for one in asked]

    async def together():
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as many:
            found = await asyncio.gather(*(many.completions.create(model="tiny", **one) for one in asked + asked))
        return [one.choices[0].text for one in found]

    before = served.metrics()["infalign_batches_total"]
    assert asyncio.run(together()) == alone + alone
    assert served.metrics()["infalign_batches_total"] - before < 32, "nothing was decoded together"
    assert len(set(alone)) > 12


def test_without_a_seed_every_answer_is_its_own(client):
    assert len({ask(client).choices[0].text for _ in range(8)}) > 4


def test_choices_are_decoded_each_on_its_own(client):
    """Choice 0 is that of n=1; a list of prompts comes prompt by prompt, the same prompt twice drawn twice."""
    two = ask(client, seed=5, n=2).choices
    assert [one.index for one in two] == [0, 1]
    assert two[0].text == ask(client, seed=5).choices[0].text != two[1].text
    four = ask(client, ["the cat sat", "a dog", "the cat sat"], seed=5, n=2).choices
    assert [one.index for one in four] == list(range(6))
    assert [one.text for one in four[:2]] == [one.text for one in two]
    assert four[2].text == ask(client, "a dog", seed=5).choices[0].text
    assert len({one.text for one in four}) == 6
    chat = client.chat.completions.create(model="tiny", messages=CHAT, n=3, seed=5)
    assert [one.index for one in chat.choices] == [0, 1, 2] and len({one.message.content for one in chat.choices}) == 3


# --- settings


def test_a_stop_string_ends_a_completion_before_it_is_scored(client):
    """Candidates are the beginnings of those without stop, and are scored as such: another one may win."""
    moved = 0
    for seed in range(10):
        plain = ask(client, seed=seed).choices[0]
        words = plain.text.split()
        if len(words) < 4:
            continue
        (cut,) = ask(client, seed=seed, stop=[words[2], "no such word"]).choices
        for before, after in zip(plain.infalign["candidates"], cut.infalign["candidates"], strict=True):
            expected = before["text"].split(words[2])[0]
            assert after["text"] == expected and int(after["reward"]) == len(expected)
            stopped = expected != before["text"]
            assert after["finish_reason"] == ("stop" if stopped else before["finish_reason"])
        best = max(cut.infalign["candidates"], key=lambda one: one["reward"])
        assert cut.text == best["text"] and words[2] not in cut.text
        moved += cut.infalign["chosen"] != plain.infalign["chosen"]
    assert moved > 0


def test_tokens_beyond_a_stop_are_counted_as_drawn(client):
    plain, cut = ask(client, seed=3), ask(client, seed=3, stop=[" "])
    assert cut.usage.completion_tokens == plain.usage.completion_tokens
    assert cut.usage.infalign["chosen_tokens"] == 1 < plain.usage.infalign["chosen_tokens"]


def test_the_length_is_the_requests(client):
    for count in (1, 3):
        answer = ask(client, max_tokens=count, seed=1)
        assert [one["tokens"] for one in answer.choices[0].infalign["candidates"]] == [count] * 4
        assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 4 * count
    chat = client.chat.completions.create(model="tiny", messages=CHAT, max_completion_tokens=2, seed=1)
    assert chat.usage.completion_tokens == 8


@pytest.mark.parametrize("setting", [{"temperature": 0.001}, {"top_p": 1e-6}])
def test_sampling_settings_are_the_requests(setting, client, recipe):
    """Close to greedy: every candidate is the model's argmax, step by step."""
    experiment = Experiment(recipe)
    model = load_policy(recipe.model_name_or_path, device=torch.device("cpu"))
    ids = list(experiment.tokenizer("the cat sat").input_ids)
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    greedy = experiment.tokenizer.decode(ids[3:], skip_special_tokens=True)
    assert {one["text"] for one in ask(client, **setting).choices[0].infalign["candidates"]} == {greedy}


@pytest.mark.parametrize("how", [{"infalign": {"n": 9}}, {"best_of": 9}])
def test_the_candidates_may_be_the_requests(how, client):
    answer = ask(client, seed=11, **how)
    candidates = answer.choices[0].infalign["candidates"]
    assert len(candidates) == 9 and answer.choices[0].text == max(candidates, key=lambda one: one["reward"])["text"]
    four = ask(client, seed=11).choices[0].infalign["candidates"]
    assert [one["text"] for one in candidates[:4]] == [one["text"] for one in four]
    assert answer.usage.infalign == {**answer.usage.infalign, "candidates": 9, "reward_calls": 9}


def test_the_answer_says_nothing_of_candidates_unless_asked(client):
    answer = client.completions.create(model="tiny", prompt="the cat")
    assert not hasattr(answer.choices[0], "infalign") and answer.system_fingerprint.startswith("infalign-")


def test_fields_that_say_nothing_are_taken(client):
    client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": [{"type": "text", "text": "the cat"}]}],
        user="u", metadata={"a": "b"}, presence_penalty=0, frequency_penalty=0.0, logprobs=False, tools=[],
        response_format={"type": "text"}, stop=None, tool_choice="auto", parallel_tool_calls=True,
        extra_body={
            "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": False, "min_tokens": 0,
            "skip_special_tokens": True, "use_beam_search": False, "length_penalty": 1.0,
        },
    )  # fmt: skip


def test_a_chat_in_parts_is_the_chat(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "the cat "}, {"type": "text", "text": "sat"}]}]
    one, other = (client.chat.completions.create(model="tiny", messages=m, seed=3) for m in (parts, CHAT))
    assert one.choices[0].message.content == other.choices[0].message.content


# --- what is done otherwise than asked, and said


def test_at_temperature_0_the_likeliest_tokens_are_drawn_once(client, recipe):
    """Greedy by definition: the argmax of plain passes, whatever the seed; said in the answer and in a header."""
    raw = client.completions.with_raw_response.create(model="tiny", prompt="the cat sat", temperature=0, seed=1)
    answer = raw.parse()
    model = AutoModelForCausalLM.from_pretrained(recipe.model_name_or_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(recipe.model_name_or_path)
    ids, start = tokenizer("the cat sat").input_ids, len(tokenizer("the cat sat").input_ids)
    while len(ids) < start + 6 and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert answer.choices[0].text == tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert ask(client, temperature=0, seed=2).choices[0].text == answer.choices[0].text
    assert answer.usage.infalign["candidates"] == 1
    note = "temperature 0: all candidates would be alike, so one is drawn"
    assert raw.headers["x-infalign-note"] == note and answer.infalign == {"notes": [note]}


def test_more_tokens_than_the_recipes_are_cut_and_said(client, tmp_path):
    raw = client.completions.with_raw_response.create(model="tiny", prompt="the cat sat", max_tokens=700, seed=4)
    plain = client.completions.with_raw_response.create(model="tiny", prompt="the cat sat", seed=4)
    assert raw.parse().choices[0].text == plain.parse().choices[0].text
    assert raw.headers["x-infalign-note"] == "max_tokens is 6, the recipe's max_completion_length, and not 700"
    assert "x-infalign-note" not in plain.headers
    stream = client.chat.completions.with_raw_response.create(model="tiny", messages=CHAT, max_tokens=700, stream=True)
    assert "max_tokens is 6" in stream.headers["x-infalign-note"]
    with running(tmp_path, tiny_keys(tmp_path), max_tokens_policy="refuse") as strict:
        refused = strict.post(json={"model": "tiny", "prompt": "the cat", "max_tokens": 7})
    assert refused.status_code == 400 and "is at most 6 here" in refused.json()["error"]["message"]


def test_log_probabilities_are_the_models(client, recipe):
    """Of the chosen completion, at the temperature that drew it: against a plain pass over the whole text."""
    model = AutoModelForCausalLM.from_pretrained(recipe.model_name_or_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(recipe.model_name_or_path)
    answer = ask(client, temperature=0.7, seed=3, logprobs=0).choices[0]
    chat = client.chat.completions.create(model="tiny", messages=CHAT, seed=3, logprobs=True).choices[0]
    ids = tokenizer.convert_tokens_to_ids(answer.logprobs.tokens)
    prompt = tokenizer("the cat sat").input_ids
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1] / 0.7
    wanted = logits.log_softmax(-1)[range(len(ids)), ids]
    assert answer.logprobs.token_logprobs == pytest.approx(wanted.tolist(), abs=1e-4)
    assert [one.token for one in chat.logprobs.content] and all(one.logprob <= 0 for one in chat.logprobs.content)
    assert ask(client, seed=3).choices[0].logprobs is None


def test_variables_of_the_chat_template_are_the_requests(tmp_path):
    keys = tiny_keys(tmp_path)
    template = tmp_path / "tiny" / "chat_template.jinja"
    template.write_text("{% if loud %}red {% endif %}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with running(tmp_path, keys) as served:
        client = served.client()
        plain, loud = (
            client.chat.completions.create(
                model="tiny", messages=CHAT, seed=1, extra_body={"chat_template_kwargs": {"loud": one}}
            )
            for one in (False, True)
        )
    assert loud.usage.prompt_tokens == plain.usage.prompt_tokens + 1


# --- streams


def test_a_stream_is_the_text(client):
    plain = client.chat.completions.create(model="tiny", messages=CHAT, seed=9, n=2)
    stream = client.chat.completions.create(
        model="tiny", messages=CHAT, seed=9, n=2, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    for choice in plain.choices:
        own = [one.choices[0] for one in chunks if one.choices and one.choices[0].index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        assert len(own) > 4
    assert chunks[-1].choices == [] and chunks[-1].usage.model_dump() == plain.usage.model_dump()
    assert {one.id for one in chunks} == {chunks[0].id} and all(one.usage is None for one in chunks[:-1])


def test_a_stream_of_text_ends_with_done(served, client):
    body = {"model": "tiny", "prompt": "the cat", "seed": 4, "stream": True, "infalign": {"return_candidates": True}}
    response = served.post(json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    told = events(response.text)
    assert told[-1] == "[DONE]" and all("usage" not in one for one in told[:-1])
    plain = ask(client, "the cat", seed=4).choices[0]
    assert "".join(one["choices"][0]["text"] for one in told[:-1]) == plain.text
    assert told[-2]["choices"][0]["infalign"] == plain.infalign


@pytest.mark.parametrize("text", ["", " a  b\n\nc ", "one", "\n", "日本語 の"])
def test_pieces_are_the_text(text):
    assert "".join(pieces(text)) == text


# --- the other paths


def test_the_description_is_of_what_is_read(served):
    told = httpx.get(f"{served.url}/openapi.json", trust_env=False).json()
    assert told["openapi"] == "3.1.0" and set(told["paths"]) >= {"/v1/chat/completions", "/v1/completions", "/health"}
    for name, fields in (
        ("ChatRequest", {"messages", "max_completion_tokens"}),
        ("TextRequest", {"prompt", "best_of"}),
    ):
        properties = set(told["components"]["schemas"][name]["properties"])
        assert fields <= properties and not properties & ({"prompt", "messages"} - fields)
        refused = served.post(json={"model": "tiny", "prompt": "x", "nonsense": 1}).json()["error"]["message"]
        assert name != "TextRequest" or refused.partition("read: ")[2] == ", ".join(sorted(properties))
    page = httpx.get(f"{served.url}/docs", trust_env=False)
    assert page.headers["content-type"].startswith("text/html") and "max_tokens" in page.text
    assert "src=" not in page.text


def test_models_and_health(served, client):
    assert [one.id for one in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(NotFoundError, match="no model 'other' here, only 'tiny'"):
        client.models.retrieve("other")
    health = httpx.get(f"{served.url}/health", trust_env=False).json()
    assert health == {
        "status": "ready", "model": "tiny", "procedure": "BestOfN(4)", "last_batch": "well", "queue_length": 0,
        "in_progress": 0,
    }  # fmt: skip


def test_the_numbers_add_up(served, client):
    before = served.metrics()
    answers = [ask(client, seed=seed, n=1 + seed % 2, stop=["the"]) for seed in range(5)]
    chat = client.chat.completions.create(model="tiny", messages=CHAT)
    with pytest.raises(Exception, match="temperature"):
        ask(client, temperature=3)
    after = served.metrics()
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    usages = [one.usage for one in [*answers, chat]]
    assert grown['infalign_requests_total{path="/v1/completions",status="200"}'] == 5
    assert grown['infalign_requests_total{path="/v1/completions",status="400"}'] == 1
    assert grown['infalign_requests_total{path="/v1/chat/completions",status="200"}'] == 1
    assert grown["infalign_choices_total"] == 8
    assert grown["infalign_candidates_total"] == grown["infalign_reward_calls_total"] == 32
    assert grown['infalign_tokens_total{kind="completion"}'] == sum(one.completion_tokens for one in usages)
    assert grown['infalign_tokens_total{kind="prompt"}'] == sum(one.prompt_tokens for one in usages)
    assert grown["infalign_request_seconds_count"] == 7 == grown['infalign_request_seconds_bucket{le="+Inf"}']
    assert grown["infalign_unscored_total"] == 0 and after["infalign_queue_length"] == 0


def test_32_at_a_time_and_none_is_lost(served):
    async def all_of_them():
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as many:
            tasks = [many.completions.create(model="tiny", prompt=f"the cat {i}", seed=i) for i in range(32)]
            return await asyncio.gather(*tasks)

    found = asyncio.run(all_of_them())
    client = served.client()
    again = [ask(client, f"the cat {i}", seed=i).choices[0].text for i in range(32)]
    assert [one.choices[0].text for one in found] == again
