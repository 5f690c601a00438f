"""`CTRLReward`: raw reward -> calibrated -> transformed, as one TRL reward function.

It needs the K reference rewards of each prompt as a dataset column (`SampleTable.attach`) and nothing of infalign's
trainer: it works in TRL's own `RLOOTrainer` (sequence KL in the reward, no scaling) and, with `scale_rewards="none"`
and beta > 0, in `GRPOTrainer`, whose default scaling would divide the transform away (see `callbacks.GRPOCheck`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from infalign.calibration.pooling import Visits, pooled_ranks
from infalign.calibration.quantile import Method, calibrate, clip_to_open
from infalign.calibration.table import REFERENCES
from infalign.evaluation.winrate import prompt_win_rate
from infalign.rewards.loader import Reward, load_reward
from infalign.runtime.distributed import gathered, rank, together
from infalign.theory.transforms import check_transform
from infalign.training.baselines import Baseline
from infalign.training.direct import Direct, check_group, direct_rewards
from infalign.types import InputError, RewardError

DATA_COLUMNS = "infalign_columns"
"""A column of a training set that holds each row's columns of the data as a mapping, in place of a column for each."""
PROMPT_IDS = "infalign_prompt_ids"
"""A column of a training set that holds each prompt's tokens, as calibration had them."""
TERMS = "infalign_terms"
"""A column of a training set with the numbers of the terms that each prompt is trained for, where it is not all."""
REF_COMPLETIONS, REF_LOGPS = REFERENCES
"""Columns of a training set with the token ids of each prompt's base samples and their log-probabilities."""
_OURS = (DATA_COLUMNS, PROMPT_IDS, TERMS, REF_COMPLETIONS, REF_LOGPS)

Array = NDArray[np.float64]
Transform = Callable[[Array], Array]


@dataclass(frozen=True)
class _Groups:
    """The rollouts of all ranks, a prompt a row, with each prompt's reference rewards and the name of its visits."""

    rewards_PG: Array
    log_ratios_PG: Array
    references: Sequence[Any]
    keys: Sequence[str]
    ours: Sequence[bool]
    """Whether the reward is trained on the prompt."""
    mine: slice
    """This rank's rollouts among all of them."""


class _LastScores:
    """A reward's scores of the batch that it was last asked about: terms with one reward ask it once."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward
        self.completions: Sequence[Any] | None = None
        self.asked_B: Sequence[bool] = ()
        self.scores_B: Array = np.empty(0)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any] | None,
        columns: Mapping[str, Any],
        asks_B: Sequence[bool],
    ) -> Array:
        """Raw rewards (B,), NaN for no score and where `asks_B` is false: the reward never sees these."""
        if completions is not self.completions or asks_B != self.asked_B:
            self.completions = None  # in case it fails
            self.scores_B = np.full(len(asks_B), np.nan)

            def those(values: Any) -> Any:
                listed = isinstance(values, (list, tuple)) and len(values) == len(asks_B)
                return [one for one, asked in zip(values, asks_B, strict=True) if asked] if listed else values

            if all(asks_B):
                given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
            else:
                given = {name: those(values) for name, values in columns.items()}
                given |= {"prompts": those(prompts), "completions": those(completions)}
                given |= {"completion_ids": those(completion_ids)}
            if any(asks_B):
                self.scores_B[np.asarray(asks_B)] = self.reward(**given)
            self.completions, self.asked_B = completions, asks_B
        return self.scores_B.copy()


class CTRLReward:
    """A TRL reward function with the values `Phi(C(x, y))`.

    Args:
        reward: the raw reward: a callable in TRL's form, anything `load_reward` takes, or a loaded `Reward`.
        transform: `Phi`, a vectorised function of u in (0, 1); u is clipped to [1/(2(K+1)), 1 - 1/(2(K+1))]. Or
            `direct.Direct(procedure)`: rewards whose policy gradient is that of the win rate itself; or
            `baselines.Baseline(name, procedure)`: a rival objective on the raw reward.
        method: of calibration, "midrank" or "interpolated"; or "pooled", which also ranks among the prompt's rollouts,
            earlier visits' included (`calibration.pooling`), and needs `CTRLTrainer`, which knows their
            log-probabilities.
        column: the dataset column with each prompt's reference rewards.
        on_error: what a reward that keeps failing does: "error" stops, "mask" leaves its samples out.
        num_generations: G, rollouts of a prompt, which come one after the other: what the direct objective, pooled
            calibration and the logged win rate need to know. `CTRLTrainer` sets it.
        name: for logs. One of several must have a name of its own; what it logs is then followed by it
            (`winrate/NAME`).
        only: this reward's number in the data set's column `TERMS`: prompts without it are worth 0 here.

    Attributes:
        raw: the guarded raw reward, and `scores`, which asks it once a batch.
        log_ratios_B: log pi - log pi_ref of the rollouts that are about to be scored; `CTRLTrainer` sets it.
        visits: rollouts of earlier visits, for pooled calibration.
        procedure: the transform's procedure when it knows one, else None.
    """

    def __init__(
        self,
        reward: Any,
        transform: Transform | Direct | Baseline,
        *,
        method: Method | Literal["pooled"] = "midrank",
        column: str = "ref_rewards",
        on_error: Literal["error", "mask"] = "error",
        num_generations: int | None = None,
        name: str = "ctrl",
        only: int | None = None,
    ) -> None:
        of_groups = isinstance(transform, (Direct, Baseline))
        if not callable(transform) and not of_groups:
            raise InputError(
                f"transform must be a function of the quantile, got {transform!r}: e.g. optimal_transform(...)"
            )
        if isinstance(transform, Baseline) and method != "midrank":
            raise InputError(
                f"method={method!r} ranks rewards, and {transform.name} is on the raw reward: leave it out"
            )
        if not of_groups:
            check_transform(transform, f"transform {transform!r:.80}")
        self.raw = reward if isinstance(reward, Reward) else load_reward(reward, on_error=on_error)
        self.scores = _LastScores(self.raw)
        self.transform = transform
        self.method: Method | Literal["pooled"] = method
        self.num_generations = num_generations
        self.log_ratios_B: Array | None = None
        self.visits = Visits()
        self.hidden: frozenset[str] = frozenset()
        self.column = column
        self.procedure = getattr(transform, "procedure", None)
        self.name = self.__name__ = name
        self.only = only

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Transformed rewards, one a completion; None where the raw reward gave no score.

        Every rank of a launch calls this at the same time, as TRL does: a failure on one is raised on all.

        Raises:
            InputError: the reference rewards are missing from the dataset.
            RewardError: the raw reward failed, or the transform is not finite.
        """
        rewards: list[float | None] = []
        with together():
            rewards = self._transformed(prompts, completions, completion_ids, log_metric, columns)
        return rewards

    def join(self, num_generations: int | None, all_of_them: Sequence[CTRLReward]) -> None:
        """Get ready for training: `CTRLTrainer` calls it.

        Args:
            num_generations: G.
            all_of_them: this reward and the others of the run, whose reference rewards are not for this one to read.

        Raises:
            InputError: the objective needs more rollouts.
        """
        if isinstance(self.transform, (Direct, Baseline)) and num_generations is not None:
            check_group(self.transform, num_generations)
        self.num_generations = num_generations
        self.hidden = frozenset(one.column for one in all_of_them)
        self.scores = next(one.scores for one in all_of_them if one.raw.fingerprint == self.raw.fingerprint)

    def is_for(self, terms: Sequence[int]) -> bool:
        """Whether a prompt that is trained for these terms is trained for this one."""
        return self.only is None or self.only in terms

    def metric(self, name: str) -> str:
        """What a number of this reward is called in logs."""
        return name if self.name == "ctrl" else f"{name}/{self.name}"

    def require_references(self, columns: Iterable[str], where: str) -> None:
        """See that the reference rewards are among the columns of a data set, which is called `where`.

        Raises:
            InputError: they are not.
        """
        if self.column not in columns:
            raise InputError(
                f"{where} has no column {self.column!r} with the reference rewards: "
                "attach the calibration table (SampleTable.attach), and keep remove_unused_columns false"
            )

    def _transformed(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any] | None,
        log_metric: Callable[[str, float], None] | None,
        columns: dict[str, Any],
    ) -> list[float | None]:
        self.require_references(columns, "the dataset")
        references = columns[self.column]
        ours_B = [self.is_for(terms) for terms in columns.get(TERMS) or [()] * len(references)]
        columns = {name: values for name, values in columns.items() if name not in {*self.hidden, self.column}}
        keys = _visit_keys(prompts, references, columns) if self.method == "pooled" else [""] * len(references)
        columns = data_columns(columns)
        of_groups = isinstance(self.transform, (Direct, Baseline)) or self.method == "pooled"
        plain: Method = "midrank" if self.method == "pooled" else self.method
        runs = _runs(references)
        grouped = of_groups or (self.num_generations is not None and self.procedure is not None)
        with together() if grouped else nullcontext():  # a rank that fails must not leave the others gathering
            raw_B = self.scores(prompts, completions, completion_ids, columns, ours_B)
            calibrated_B = np.concatenate(
                [
                    calibrate(raw_B[None, rows], references[rows][:1], plain)[0]
                    if len(references[rows.start])
                    else np.full(rows.stop - rows.start, 0.5)
                    for rows in runs
                ]
            )
        groups = self._everybodys(raw_B, references, keys, ours_B) if grouped else None
        logged: dict[str, float] = {}
        if of_groups:
            assert groups is not None
            transformed_B = self._of_groups(groups, logged)
        else:
            assert not isinstance(self.transform, (Direct, Baseline))
            counts = [np.count_nonzero(~np.isnan(np.asarray(references[rows.start], dtype=float))) for rows in runs]
            counts_B = np.repeat(counts, [rows.stop - rows.start for rows in runs])
            transformed_B = np.asarray(self.transform(clip_to_open(calibrated_B, counts_B)), dtype=np.float64)
        # an objective of groups has no value for one with too few scores
        of_raw = isinstance(self.transform, (Direct, Baseline))
        transformed_B = np.where(ours_B, transformed_B, 0.0)
        scored_B = ~np.isnan(np.where(ours_B, transformed_B if of_raw else raw_B, 0.0))
        if not np.isfinite(transformed_B[scored_B]).all():
            raise RewardError(f"the transform {self.transform!r} is not finite on (0, 1): bound it")
        told_B = scored_B & np.asarray(ours_B)
        if told_B.any():
            for name, values in (("raw", raw_B), ("calibrated", calibrated_B), ("transformed", transformed_B)):
                with np.errstate(over="ignore"):  # the mean of rewards near the largest float
                    logged[f"reward/{name}"] = float(values[told_B].mean())
        logged["reward/unscored"] = float(1.0 - scored_B.mean())
        if groups is not None and (wins := self._win_rate(groups)) is not None:
            logged["winrate"] = wins
        if log_metric is not None:
            for name, value in logged.items():
                log_metric(self.metric(name), value)
        return [float(value) if scored else None for value, scored in zip(transformed_B, scored_B, strict=True)]

    def _everybodys(
        self, raw_B: Array, references: Sequence[Any], keys: Sequence[str], ours_B: Sequence[bool]
    ) -> _Groups:
        """All ranks' rollouts in whole groups: a prompt's may lie on several."""
        if self.num_generations is None:
            raise InputError(
                "an objective of groups and pooled calibration need to know how many samples a prompt has: "
                "CTRLReward(..., num_generations=G)"
            )
        if self.method == "pooled" and self.log_ratios_B is None:
            raise InputError(
                "pooled calibration needs the rollouts' log-probabilities, which CTRLTrainer hands on (for the TRL "
                "versions that it was tested with): use it, or method='midrank'"
            )
        own = np.zeros(raw_B.size) if self.log_ratios_B is None else self.log_ratios_B
        # in rank order, as TRL lays the batch out
        parts = gathered((raw_B, list(references), own, list(keys), list(ours_B)))
        before = sum(len(part[0]) for part in parts[: rank()]) if len(parts) > 1 else 0
        rewards, ratios = (np.concatenate([part[column] for part in parts]) for column in (0, 2))
        if rewards.size % self.num_generations:
            raise InputError(f"{rewards.size} samples are not groups of num_generations={self.num_generations}")
        shape = (-1, self.num_generations)
        return _Groups(
            rewards_PG=rewards.reshape(shape),
            log_ratios_PG=ratios.reshape(shape),
            references=[row for part in parts for row in part[1]][:: self.num_generations],
            keys=[key for part in parts for key in part[3]][:: self.num_generations],
            ours=[one for part in parts for one in part[4]][:: self.num_generations],
            mine=slice(before, before + raw_B.size),
        )

    def _of_groups(self, groups: _Groups, logged: dict[str, float]) -> Array:
        """This rank's values that depend on all samples of a prompt; what pooled ranks are worth is logged."""
        values_PG, effective = np.empty(groups.rewards_PG.shape), []
        for number, (rewards_G, references) in enumerate(zip(groups.rewards_PG, groups.references, strict=True)):
            if not groups.ours[number]:
                values_PG[number] = 0.0
            elif self.method == "pooled":
                key, ratios_G = groups.keys[number], groups.log_ratios_PG[number]
                below, up_to, count = pooled_ranks(rewards_G, references, ratios_G, earlier=self.visits.of(key))
                self.visits.add(key, rewards_G, ratios_G)
                effective.append(count)
                values_PG[number] = self._of_ranks(below, up_to, count)
            elif isinstance(self.transform, (Direct, Baseline)):
                values_PG[number] = self.transform.values(rewards_G, references)
        if effective:
            logged["calibration/effective_samples"] = float(np.mean(effective))
        return values_PG.reshape(-1)[groups.mine]

    def _win_rate(self, groups: _Groups) -> float | None:
        """How often the decoded rollouts beat the decoded calibration samples; None where there are too few of them.

        It is the procedure's win rate on the prompts that are trained on, against the samples that they are ranked in.
        """
        procedure: Any = self.procedure
        values: list[float] = []
        if not hasattr(procedure, "order_weights"):
            return None
        for rewards_G, references, trained in zip(groups.rewards_PG, groups.references, groups.ours, strict=True):
            if not trained:
                continue
            ours, theirs = (row[~np.isnan(row)] for row in (rewards_G, np.asarray(references, dtype=np.float64)))
            if min(ours.size, theirs.size) >= procedure.n:
                values.append(prompt_win_rate(ours, theirs, procedure))
        return float(np.mean(values)) if values else None

    def _of_ranks(self, below_G: Array, up_to_G: Array, count: float) -> Any:
        """Rewards of a prompt's samples from the base's mass below them and up to them."""
        if isinstance(self.transform, Direct):
            cdf = self.transform.procedure.cdf
            scored = ~np.isnan(below_G)  # a tie block gets the mean of G at its two ends: decoded, it loses or ties
            beats = np.full(below_G.size, np.nan)
            beats[scored] = (cdf(below_G[scored]) + cdf(up_to_G[scored])) / 2.0
            return direct_rewards(beats, self.transform.procedure)
        assert not isinstance(self.transform, Baseline)  # no ranks, and never pooled
        return self.transform(clip_to_open((below_G + up_to_G) / 2.0, np.array(count)))


def _runs(references: Sequence[Any]) -> list[slice]:
    """Neighbouring rows with the same reference rewards: a prompt's rollouts come one after the other."""
    starts = [0] if len(references) else []
    for row in range(1, len(references)):
        ours, before = references[row], references[row - 1]
        if ours is not before and not np.array_equal(ours, before):
            starts.append(row)
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(references)], strict=True)]


def _visit_keys(prompts: Sequence[Any], references: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """A name for each row's prompt with its data: two rows share it where a rollout of one could be the other's."""
    rows = zip(prompts, references, columns.get(DATA_COLUMNS) or [None] * len(prompts), strict=True)
    return [
        blake2b(repr((prompt, np.asarray(row, dtype=float).tolist(), data)).encode(), digest_size=12).hexdigest()
        for prompt, row, data in rows
    ]


def data_columns(columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The columns of a batch that are the data's, for the raw reward.

    Args:
        columns: those of the training set; where it has `DATA_COLUMNS`, the data's are in there.

    >>> data_columns({"infalign_columns": [{"answer": 5}, {}], "trainer_state": None})
    {'trainer_state': None, 'answer': [5, None]}
    """
    kept = {name: value for name, value in columns.items() if name not in _OURS}
    rows = columns.get(DATA_COLUMNS, ())
    names = sorted({name for row in rows for name in row})
    return kept | {name: [row.get(name) for row in rows] for name in names}
