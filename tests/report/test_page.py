"""The page: self-contained, escaped, honest, and equal to the artifacts it is made from."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest

from infalign.evaluation.summary import evaluation_from_json
from infalign.report.findings import read_findings
from infalign.report.table import ABSENT
from infalign.stages.recipe import Recipe
from infalign.stages.report import report
from infalign.types import InputError
from tests.report.artifacts import ATTACK, write_calibration, write_evaluation, write_policy, write_recipe, write_run

PLOTS = ("limit", "win_rates", "compute", "rewards", "training", "transform", "calibration")


class Elements(HTMLParser):
    """Every tag with its attributes, and the text between."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("run"), gold=True)
    report(Recipe(output_dir=str(folder)))
    return folder


@pytest.fixture(scope="module")
def html(run_folder) -> str:
    return (run_folder / "report" / "index.html").read_text(encoding="utf-8")


def page_of(folder: Path) -> str:
    return Elements(report(Recipe(output_dir=str(folder))).read_text(encoding="utf-8")).text


def test_page_loads_nothing_from_anywhere(html):
    elements = Elements(html)
    assert not {tag for tag, _ in elements.tags} & {"script", "link", "iframe", "object", "base"}
    outward = ("src", "href", "srcset")
    sources = [value for _, attrs in elements.tags for name, value in attrs.items() if name in outward]
    assert len(sources) == len(PLOTS)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "url(" not in html and "@import" not in html


def test_completions_are_escaped_and_collapsed(html):
    elements = Elements(html)
    assert ATTACK not in html
    assert "&lt;script&gt;" in html
    assert not any(name.startswith("on") for _, attrs in elements.tags for name in attrs)
    assert html.index("<details>") < html.index("&lt;script&gt;")
    assert not any(tag == "details" and "open" in attrs for tag, attrs in elements.tags)


def test_numbers_are_those_of_the_evaluation(run_folder, html):
    evaluation = json.loads((run_folder / "evaluation.json").read_text())
    text, main = Elements(html).text, evaluation["main"]
    for row in evaluation["win_rates"]:
        cells = [row["judge"], f"{row['mean']:.3f}", f"[{row['low']:.3f}, {row['high']:.3f}]"]
        if row["judge"] == "reward":
            cells += [f"{row['limit']:.3f}", f"{row['attainment']:.2f}", f"{row['regret_ratio']:.1f}"]
        else:
            cells += [ABSENT] * 3
        controlled = row["length_controlled"]
        cells += [f"{row['base_reward']:.3f} \N{RIGHTWARDS ARROW} {row['policy_reward']:.3f}"]
        cells += [f"{controlled['mean']:.3f} [{controlled['low']:.3f}, {controlled['high']:.3f}]"]
        assert re.search(r"\s+".join(map(re.escape, cells)), text), cells
    share = f"{100 * main['mean']:.1f} % of the time [{100 * main['low']:.1f}, {100 * main['high']:.1f}] at 0.42 nats"
    assert f"Decoded by BestOfN(4), the policy beats its base {share}" in text
    assert f"{100 * main['limit']:.1f} %: attainment {main['attainment']:.2f}" in text
    assert f"ties the limit is {100 * main['tie_limit']:.1f} %" in text
    assert "Judged by the gold reward length" in text
    assert "prefers the policy's decoded answer in 0.625 [0.551, 0.700] of 160 pairs" in " ".join(text.split())
    assert "name other winners in 14 % of them" in " ".join(text.split())


def test_recipe_versions_and_training_are_shown(html):
    text = Elements(html).text
    assert "learning_rate 1e-05" in text
    assert "120 steps, procedure BestOfN(4), transform optimal" in text
    assert re.search(r"numpy \d", text)
    assert "What this page lacks" not in text


def test_plots_are_written_and_not_blank(run_folder):
    for name in PLOTS:
        pixels = matplotlib.image.imread(run_folder / "report" / f"{name}.png")
        assert min(pixels.shape[:2]) > 200
        assert pixels[..., :3].std() > 0.03, name
    assert not list((run_folder / "report").glob(".*.tmp"))


@pytest.mark.parametrize(
    ("shift", "words", "kind"),
    [
        (0.9, "the policy beats its base", "better"),
        (0.0, "the interval includes 50 %, so this is no evidence that it is better or worse", "unclear"),
        (-0.9, "the policy loses to its base: it wins", "worse"),
    ],
)
def test_verdict_says_no_more_than_the_interval_allows(tmp_path, shift, words, kind):
    write_evaluation(tmp_path, shift)
    page = report(Recipe(output_dir=str(tmp_path))).read_text(encoding="utf-8")
    assert words in Elements(page).text
    assert f'class="card verdict {kind}"' in page


@pytest.mark.parametrize(
    ("write", "absent", "present"),
    [
        (write_calibration, ["policy/manifest.json", "training_log.json", "evaluation.json"], "base samples 2400"),
        (write_policy, ["calibration/manifest.json", "evaluation.json", "infalign evaluate"], "Calibrated reward"),
        (write_evaluation, ["calibration/manifest.json", "policy/manifest.json", "infalign train"], "regret ratio"),
    ],
)
def test_missing_artifacts_are_named_with_the_command(tmp_path, write, absent, present):
    write(tmp_path)
    text = page_of(tmp_path)
    assert all(name in text for name in absent)
    if write is write_policy:
        assert (tmp_path / "report" / "training.png").exists()
    else:
        assert present in text


def test_nothing_to_report_names_what_to_run(tmp_path):
    with pytest.raises(InputError, match=r"holds nothing to report.*infalign run"):
        report(Recipe(output_dir=str(tmp_path)))
    with pytest.raises(InputError, match="lacks output_dir"):
        report(Recipe())


def test_damaged_file_is_named(tmp_path):
    write_evaluation(tmp_path)
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(InputError, match=r"evaluation\.json is damaged"):
        report(Recipe(output_dir=str(tmp_path)))


def test_policy_and_evaluation_of_different_transforms_contradict(tmp_path):
    write_run(tmp_path, steps=4, prompts=4)
    result = json.loads((tmp_path / "evaluation.json").read_text())
    (tmp_path / "evaluation.json").write_text(json.dumps({**result, "transform": "Identity()", "beta": 0.1}))
    text = page_of(tmp_path)
    assert "trained with beta 0.2166" in text and "evaluation.json says 0.1" in text
    assert "No limit and transform plots: recipe.json gives transform" in text
    assert not (tmp_path / "report" / "limit.png").exists()


def test_objective_that_cannot_be_made_is_a_note(tmp_path):
    write_run(tmp_path, steps=4, prompts=4)
    record = json.loads((tmp_path / "recipe.json").read_text())
    record["recipe"]["transform"] = "mine.py:phi"
    (tmp_path / "recipe.json").write_text(json.dumps(record))
    text = page_of(tmp_path)
    assert "No limit and transform plots: transform 'mine.py'" in text
    assert "regret ratio" in text


def test_single_prompt_has_no_interval_and_no_verdict(tmp_path):
    write_recipe(tmp_path)
    result = write_evaluation(tmp_path)
    nothing = {"low": float("nan"), "high": float("nan"), "attainment": float("nan")}
    rows = [{**row, **nothing} for row in result["win_rates"]]
    kl = {"mean": 0.01, "error": float("nan"), "k1": 0.01, "k1_error": float("nan")}
    main = {**result["main"], **nothing, "tie_attainment": float("nan")}
    changed = {**result, "win_rates": rows, "kl": kl, "main": main}
    (tmp_path / "evaluation.json").write_text(json.dumps(changed))
    text = page_of(tmp_path)
    assert "[no interval] at 0.01 nats: there is no interval" in text
    assert "This KL is too small to compare with the limit." in text
    assert "nan" not in text.lower().replace("nano", "")


def test_report_reads_without_torch(tmp_path):
    write_run(tmp_path, steps=4, prompts=4)
    code = (
        "import sys; from infalign.stages.recipe import Recipe; from infalign.stages.report import report; "
        f"report(Recipe(output_dir={str(tmp_path)!r})); "
        "assert not {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules), 'heavy import'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_findings_are_the_tables(tmp_path):
    write_run(tmp_path, steps=4, prompts=5)
    found = read_findings(tmp_path)
    assert len(found.references) == 5 and all(row.shape == (40,) for row in found.references)
    assert found.rewards["policy"].shape == (48 * 16,)
    assert found.rewards["policy"].mean() > found.rewards["base"].mean()
    assert found.missing() == [] and found.contradictions() == []


def test_an_evaluation_is_read_as_it_was_written(tmp_path):
    """Null is NaN; what an older version did not write is not known, and what no version leaves out is missed."""
    write_recipe(tmp_path)
    written = write_evaluation(tmp_path, gold=True)
    found = evaluation_from_json(written)
    content = found.as_json()
    assert {name: content[name] for name in written if name not in ("win_rates", "main")} == {
        name: value for name, value in written.items() if name not in ("win_rates", "main")
    }
    for row, given in zip(
        [*content["win_rates"], content["main"]], [*written["win_rates"], written["main"]], strict=True
    ):
        assert {
            "chosen_by": "",
            "group": "",
            **given,
            "length_controlled": {**row["length_controlled"], **given["length_controlled"]},
        } == row
    assert evaluation_from_json(content).as_json() == content
    rows = [{**row, "low": None} for row in written["win_rates"]]
    assert all(math.isnan(row.low) for row in evaluation_from_json({**written, "win_rates": rows}).win_rates)
    older = {name: value for name, value in written.items() if name not in ("compute", "pairwise", "base", "target_kl")}
    assert math.isnan(evaluation_from_json(older).base.reward) and evaluation_from_json(older).compute is None
    with pytest.raises(InputError, match="'prompts' is missing"):
        evaluation_from_json({name: value for name, value in written.items() if name != "prompts"})
