"""The page: one HTML file that holds everything it shows, filled from findings and nothing else."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from infalign.calibration.diagnostics import Diagnostics
from infalign.evaluation.summary import Evaluation
from infalign.report.compute_plot import compute_table, saving
from infalign.report.findings import Findings
from infalign.report.names import short_transform
from infalign.report.table import ABSENT, Table, markdown, number, share, win_rate_table
from infalign.report.training_plot import Log, series
from infalign.report.verdict import headline, outcome, remarks


@dataclass(frozen=True)
class Plot:
    """A PNG, how to read it, and where on the page it belongs ("evaluation", "training", "objective")."""

    name: str
    section: str
    caption: str
    png: bytes
    wide: bool = False

    @property
    def data(self) -> str:
        """The PNG as the address of an image that needs no file."""
        return "data:image/png;base64," + base64.b64encode(self.png).decode()


@dataclass(frozen=True)
class Setting:
    """A recipe key with its value, whether that is the default, and what it means."""

    name: str
    value: Any
    is_default: bool = False
    meaning: str = ""


@dataclass(frozen=True)
class Page:
    """What the template is filled from.

    `notes` are sentences about what could not be drawn, `limited_by` about what limited the result; `settings` are the
    recipe's, by heading.
    """

    title: str
    findings: Findings
    plots: Sequence[Plot] = ()
    notes: Sequence[str] = ()
    settings: Mapping[str, Sequence[Setting]] = field(default_factory=dict)
    limited_by: Sequence[str] = ()


def render_page(page: Page) -> str:
    """The HTML, everything inline, every text escaped."""
    environment = templates()
    environment.filters |= {"turns": turns, "setting": setting_text, "reward": lambda value: number(value, 3)}
    return environment.get_template("page.html.jinja").render(page=page, title=page.title, **_results(page.findings))


def templates() -> Environment:
    """The pages' templates; every text is escaped."""
    return Environment(
        loader=PackageLoader("infalign", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _results(findings: Findings) -> dict[str, Any]:
    """The page's sentences and tables."""
    evaluation, calibration = findings.evaluation, findings.calibration
    described = (calibration or {}).get("diagnostics")
    table = compute = None
    if evaluation is not None:
        table = win_rate_table(evaluation.win_rates, evaluation.procedure, evaluation.confidence)
        compute = evaluation.compute
    return {
        "found": findings,
        "outcome": outcome(evaluation.main.low, evaluation.main.high) if evaluation else "unknown",
        "headline": headline(evaluation) if evaluation else "Not evaluated yet: there are no win rates to show.",
        "remarks": remarks(evaluation) if evaluation else [],
        "win_rates": table,
        "win_rates_markdown": markdown(table) if table else "",
        "kl_line": kl_line(evaluation) if evaluation else "",
        "judge_line": judge_line(evaluation) if evaluation else "",
        "text_lines": [f"{str(one)[:1].upper()}{str(one)[1:]}." for one in evaluation.texts] if evaluation else [],
        "samples": sample_table(evaluation) if evaluation else None,
        "compute_line": saving(compute) if compute else "",
        "compute_costs": compute_table(compute) if compute else None,
        "diagnostics": diagnostics_table(described) if described else None,
        "warnings": Diagnostics(**described).warnings() if described else [],
        "training": training_table(findings.log) if findings.log else None,
        "training_line": training_line(findings),
        "versions": package_versions(findings),
        "examples": evaluation.examples if evaluation else (),
    }


def kl_line(evaluation: Evaluation) -> str:
    """Measured KL by both estimators, beside what was aimed for."""
    kl, target = evaluation.kl, evaluation.target_kl
    aimed = "" if target is None else f" target_kl was {target:g}."
    return (
        f"Sequence KL {number(kl.mean, 3)} ± {number(kl.error, 3)} nats (summed over tokens; the plain log-ratio "
        f"gives {number(kl.k1, 3)} ± {number(kl.k1_error, 3)}; ± is one standard error over prompts).{aimed}"
    )


def judge_line(evaluation: Evaluation) -> str:
    """What a pairwise judge said of decoded answers, and how far its two orders agree; empty without one."""
    found = evaluation.pairwise
    if found is None:
        return ""
    rate = found.win_rate
    return (
        f"A pairwise judge ({found.judge}) prefers the policy's decoded answer in {number(rate.mean, 3)} "
        f"[{number(rate.low, 3)}, {number(rate.high, 3)}] of {found.pairs} pairs; its two orders name other "
        f"winners in {100 * found.disagreement:.0f} % of them."
    )


def training_line(findings: Findings) -> str:
    """Steps, transform and beta of the policy, and its run time."""
    policy = findings.policy
    if policy is None:
        return ""
    parts = policy["parts"]
    words = [f"{policy['steps']} steps" if "steps" in policy else "", f"procedure {parts.get('procedure', '?')}"]
    transform = parts.get("transform", "?")
    words += ["direct objective" if transform == "direct" else f"transform {short_transform(transform)}"]
    words += [_coefficient(parts, findings.log or [])] if "beta" in parts else []
    seconds = [row["train_runtime"] for row in findings.log or [] if "train_runtime" in row]
    words += [f"{seconds[-1] / 60:.1f} minutes"] if seconds else []
    return ", ".join(word for word in words if word) + "."


def _coefficient(parts: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> str:
    """β, or from where to where it went."""
    logged = [row["beta"] for row in log if "beta" in row]
    if not logged or f"{logged[0]:.3g}" == f"{logged[-1]:.3g}":
        return f"β {logged[-1] if logged else parts['beta']:.4g}"
    return f"β from {logged[0]:.3g} to {logged[-1]:.3g}"


def package_versions(findings: Findings) -> dict[str, dict[str, str]]:
    """Versions by package, then by the stage that recorded them."""
    stages = {"calibration": findings.calibration, "policy": findings.policy}
    recorded = {name: manifest["versions"] for name, manifest in stages.items() if manifest and "versions" in manifest}
    packages = dict.fromkeys(package for versions in recorded.values() for package in versions)
    return {
        package: {stage: versions.get(package, ABSENT) for stage, versions in recorded.items()} for package in packages
    }


def turns(content: Any) -> list[dict[str, str]]:
    """A prompt's turns as role and content; a plain text is one turn without a role.

    >>> turns("Hi")
    [{'role': '', 'content': 'Hi'}]
    """
    if isinstance(content, str):
        return [{"role": "", "content": content}]
    return [{"role": str(turn.get("role", "")), "content": str(turn.get("content", ""))} for turn in content]


def setting_text(value: Any) -> str:
    """A recipe value as YAML would have it.

    >>> setting_text(None), setting_text(True), setting_text("optimal"), setting_text([1, 2])
    ('unset', 'true', 'optimal', '[1, 2]')
    """
    if value is None or value == "":
        return "unset"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


# --- the tables of samples, diagnostics and training ------------------------------------------------------------------


def sample_table(evaluation: Evaluation) -> Table:
    """What the samples of base and policy look like."""
    rows = []
    for name, label, show in (
        ("reward", "mean reward", lambda value: number(value, 4)),
        ("tokens", "mean tokens", lambda value: number(value, 1)),
        ("clipped", "cut at the length limit", share),
        ("duplicates", "duplicates of an earlier sample", share),
    ):
        rows.append((label, *(show(getattr(side, name)) for side in (evaluation.base, evaluation.policy))))
    return Table(("one sample", "base", "policy"), tuple(rows))


def diagnostics_table(diagnostics: Mapping[str, Any]) -> Table:
    """The calibration's diagnostics (fields of `Diagnostics`)."""
    rows = [
        ("prompts", str(diagnostics["prompts"])),
        ("base samples", str(diagnostics["samples"])),
        ("tied rewards (pairs of one prompt)", share(diagnostics["ties"])),
        ("duplicate completions", share(diagnostics["duplicates"])),
        ("cut at the length limit", share(diagnostics["clipped"])),
        ("without a score", share(diagnostics["unscored"])),
        ("drawn alike: p-value", number(diagnostics["uniformity"], 3)),
    ]
    if diagnostics.get("cost") is not None:
        at = f" at {number(diagnostics['cost_kl'], 2)} nats"
        rows.append((f"win rate this K is expected to cost{at}", f"{100 * diagnostics['cost']:.1f} points"))
    return Table(("calibration", ""), tuple(rows))


_LOGGED = (
    ("reward/raw", "reward"),
    ("reward/calibrated", "calibrated reward"),
    ("reward/transformed", "transformed reward"),
    ("kl_seq", "sequence KL (nats)"),
    ("reward/unscored", "samples without a score"),
    ("entropy", "entropy (nats per token)"),
    ("completions/mean_length", "completion length (tokens)"),
    ("completions/clipped_ratio", "cut at the length limit"),
    ("grad_norm", "gradient norm"),
    ("loss", "loss"),
    ("eval_winrate", "validation win rate, as decoded"),
    ("eval_winrate_1", "validation win rate, one sample"),
    ("eval_kl_seq", "validation sequence KL (nats)"),
)


def training_table(log: Log) -> Table:
    """Whatever was logged: its mean over the first and the last tenth of the logs."""
    rows = []
    for name, label in _LOGGED:
        values = series(log, name)[1]
        if values.size:
            tenth = max(1, values.size // 10)
            rows.append((label, _shown_mean(values[:tenth]), _shown_mean(values[-tenth:])))
    return Table(("mean over logs", "first tenth", "last tenth"), tuple(rows))


def _shown_mean(values: np.ndarray) -> str:
    mean = float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
    return ABSENT if math.isnan(mean) else f"{mean:.4g}"
