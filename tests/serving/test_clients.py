"""Sessions of the clients people have, against the endpoint: their own defaults, nothing switched off."""

from __future__ import annotations

import importlib.util
import json

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
