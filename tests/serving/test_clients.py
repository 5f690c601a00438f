"""Sessions of the clients people have, against the endpoint: their own defaults, nothing switched off."""

from __future__ import annotations

import asyncio
import importlib.util
import json

import openai
import pytest

from tests.serving.running import running, tiny_keys

TASK = """
task: infalign_served
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{a}}}}"
metric_list: [{{metric: exact_match}}]
generation_kwargs: {{until: ["\\n"]}}
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    with running(folder, tiny_keys(folder)) as one:
        yield one


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra `eval`")
@pytest.mark.parametrize(
    ("kind", "path"), [("local-chat-completions", "chat/completions"), ("local-completions", "completions")]
)
def test_lm_evals_default_decoding(served, tmp_path, kind, path):
    """Greedy, 256 tokens, stop strings and a seed of its own: as it sends them. The answers are the endpoint's."""
    import lm_eval  # noqa: PLC0415 - an extra
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    greedy = served.client().completions.create(model="tiny", prompt="the cat sat", temperature=0).choices[0].text
    rows = [{"q": "the cat sat", "a": greedy.strip()}, {"q": "the dog ran", "a": "nothing like it"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "task.yaml").write_text(TASK.format(folder=tmp_path))
    chat = kind == "local-chat-completions"
    arguments = {
        "model": "tiny",
        "base_url": f"{served.url}/v1/{path}",
        "tokenized_requests": False,
        "num_concurrent": 1,
    }
    if not chat:
        arguments |= {"tokenizer_backend": "huggingface", "tokenizer": str(served.folder / "tiny")}
    found = lm_eval.simple_evaluate(
        model=kind,
        model_args=arguments,
        tasks=["infalign_served"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=chat,
        log_samples=True,
        bootstrap_iters=0,
    )
    answers = [sample["resps"][0][0] for sample in found["samples"]["infalign_served"]]
    assert all(answers) and (chat or answers[0].strip() == greedy.strip())


CHAT = [{"role": "system", "content": "the dog"}, {"role": "user", "content": "the cat sat"}]


@pytest.mark.slow
def test_a_session_of_openais_client(served):
    """What people's scripts send: models, chats, streams, several choices, the extras that servers of its kind take."""
    client = served.client()
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    asked = {"model": "tiny", "messages": CHAT, "seed": 7}
    whole = client.chat.completions.create(**asked, temperature=0.7, max_tokens=5)
    streamed = client.chat.completions.create(**asked, temperature=0.7, max_tokens=5, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in streamed) == whole.choices[0].message.content
    neutral = {
        "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": False, "chat_template_kwargs": {},
        "skip_special_tokens": True,
    }  # fmt: skip
    same = client.chat.completions.create(
        **asked, temperature=0.7, max_tokens=5, n=1, user="me", frequency_penalty=0, presence_penalty=0, top_p=1,
        logprobs=True, extra_body=neutral,
    )  # fmt: skip
    assert same.choices[0].message.content == whole.choices[0].message.content
    told = same.choices[0].logprobs
    assert told is not None and told.content and all(one.logprob <= 0 for one in told.content)
    greedy = [client.chat.completions.create(**asked, temperature=0).choices[0].message.content for _ in range(2)]
    assert greedy[0] == greedy[1]
    long = client.chat.completions.with_raw_response.create(**asked, max_tokens=5000)
    assert "X-Infalign-Note" in long.headers and long.parse().choices[0].finish_reason in ("length", "stop")
    with pytest.raises(openai.BadRequestError, match="frequency_penalty"):
        client.chat.completions.create(**asked, frequency_penalty=0.5)


@pytest.mark.slow
def test_a_session_of_litellm(served):
    litellm = pytest.importorskip("litellm")
    asked = {"model": "openai/tiny", "api_base": f"{served.url}/v1", "api_key": "none", "messages": CHAT, "seed": 3}
    whole = litellm.completion(**asked, temperature=0.7, max_tokens=5)
    assert whole.usage.completion_tokens > 0 and whole.choices[0].finish_reason in ("length", "stop")
    streamed = list(litellm.completion(**asked, temperature=0.7, max_tokens=5, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in streamed) == whole.choices[0].message.content
    later = asyncio.run(litellm.acompletion(**asked, temperature=0.7, max_tokens=5))
    assert later.choices[0].message.content == whole.choices[0].message.content
    batch = litellm.batch_completion(**{**asked, "messages": [CHAT, CHAT[1:]]}, temperature=0.7, max_tokens=5)
    assert len(batch) == 2 and all(one.choices[0].message.content for one in batch)
    text = litellm.text_completion(
        model="text-completion-openai/tiny", api_base=f"{served.url}/v1", api_key="none", prompt="the cat", seed=3
    )
    assert text.choices[0].text


@pytest.mark.slow
def test_a_session_of_langchain(served):
    chat = pytest.importorskip("langchain_openai").ChatOpenAI
    core = pytest.importorskip("langchain_core.prompts")
    model = chat(model="tiny", base_url=f"{served.url}/v1", api_key="none", temperature=0.7, seed=5, max_retries=0)
    whole = model.invoke("the cat sat")
    assert whole.content and whole.usage_metadata["output_tokens"] > 0
    assert "".join(str(part.content) for part in model.stream("the cat sat")) == whole.content
    assert asyncio.run(model.ainvoke("the cat sat")).content == whole.content
    assert len(model.batch(["the cat", "the dog", "a bird"])) == 3
    chain = core.ChatPromptTemplate.from_messages([("system", "the {animal}"), ("user", "{said}")]) | model
    assert chain.invoke({"animal": "dog", "said": "why"}).content
    short = chat(model="tiny", base_url=f"{served.url}/v1", api_key="none", max_tokens=2, temperature=0)
    assert short.invoke("the cat sat").response_metadata["finish_reason"] in ("length", "stop")
