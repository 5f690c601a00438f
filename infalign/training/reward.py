"""`CTRLReward`: raw reward -> calibrated -> transformed, as one TRL reward function.

It needs the K reference rewards of each prompt as a dataset column (`SampleTable.attach`) and nothing of infalign's
trainer: it works in TRL's own `RLOOTrainer` (sequence KL in the reward, no scaling) and, with `scale_rewards="none"`
and beta > 0, in `GRPOTrainer`, whose default scaling would divide the transform away (see `callbacks.GRPOCheck`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from infalign.calibration.quantile import Method, calibrate, clip_to_open
from infalign.rewards.loader import Reward, load_reward
from infalign.runtime.distributed import gathered, rank, together
from infalign.theory.transforms import check_transform
from infalign.training.direct import Direct, direct_rewards_of_groups
from infalign.types import InputError, RewardError

DATA_COLUMNS = "infalign_columns"
"""A column of a training set that holds each row's columns of the data as a mapping, in place of a column for each."""
PROMPT_IDS = "infalign_prompt_ids"
"""A column of a training set that holds each prompt's tokens, as calibration had them."""

Transform = Callable[[NDArray[np.float64]], NDArray[np.float64]]


class CTRLReward:
    """A TRL reward function with the values `Phi(C(x, y))`.

    Args:
        reward: the raw reward: a callable in TRL's form, anything `load_reward` takes, or a loaded `Reward`.
        transform: `Phi`, a vectorised function of u in (0, 1); u is clipped to [1/(2(K+1)), 1 - 1/(2(K+1))]. Or
            `direct.Direct(procedure)`: rewards whose policy gradient is that of the win rate itself.
        method: of calibration, "midrank" or "interpolated".
        column: the dataset column with each prompt's reference rewards.
        on_error: what a reward that keeps failing does: "error" stops, "mask" leaves its samples out.

    Attributes:
        raw: the guarded raw reward.
        procedure: the transform's procedure when it knows one, else None.
    """

    def __init__(
        self,
        reward: Any,
        transform: Transform | Direct,
        *,
        method: Method = "midrank",
        column: str = "ref_rewards",
        on_error: Literal["error", "mask"] = "error",
    ) -> None:
        if not callable(transform) and not isinstance(transform, Direct):
            raise InputError(
                f"transform must be a function of the quantile, got {transform!r}: e.g. optimal_transform(...)"
            )
        if not isinstance(transform, Direct):
            check_transform(transform, f"transform {transform!r:.80}")
        self.raw = reward if isinstance(reward, Reward) else load_reward(reward, on_error=on_error)
        self.transform = transform
        self.method: Method = method
        self.column = column
        self.procedure = getattr(transform, "procedure", None)
        self.__name__ = "ctrl"

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
        references = columns.pop(self.column)
        columns = data_columns(columns)
        raw_B = self.raw(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        calibrated_B = calibrate(raw_B[:, None], references, self.method)[:, 0]
        if isinstance(self.transform, Direct):
            transformed_B = _direct(self.transform, raw_B, references)  # NaN where a group has too few scores
        else:
            counts_B = np.array([np.count_nonzero(~np.isnan(np.asarray(row, dtype=float))) for row in references])
            transformed_B = np.asarray(self.transform(clip_to_open(calibrated_B, counts_B)), dtype=np.float64)
        scored_B = ~np.isnan(raw_B if not isinstance(self.transform, Direct) else transformed_B)
        if not np.isfinite(transformed_B[scored_B]).all():
            raise RewardError(f"the transform {self.transform!r} is not finite on (0, 1): bound it")
        if log_metric is not None and scored_B.any():
            for name, values in (("raw", raw_B), ("calibrated", calibrated_B), ("transformed", transformed_B)):
                with np.errstate(over="ignore"):  # the mean of rewards near the largest float
                    log_metric(f"reward/{name}", float(values[scored_B].mean()))
        if log_metric is not None:
            log_metric("reward/unscored", float(1.0 - scored_B.mean()))
        return [float(value) if scored else None for value, scored in zip(transformed_B, scored_B, strict=True)]


def _direct(objective: Direct, raw_B: NDArray[np.float64], references: Sequence[Any]) -> NDArray[np.float64]:
    """This rank's direct rewards; a prompt's samples may lie on several ranks, so groups are made of all of them."""
    if objective.num_generations is None:
        raise InputError("the direct objective needs to know how many samples a prompt has: Direct(num_generations=G)")
    parts = gathered((raw_B, list(references)))  # in rank order, as TRL lays the batch out
    rewards_B = np.concatenate([rewards for rewards, _ in parts])
    rows = [row for _, rows in parts for row in rows]
    found, _ = direct_rewards_of_groups(rewards_B, rows, objective.procedure, objective.num_generations)
    start = sum(rewards.size for rewards, _ in parts[: rank()]) if len(parts) > 1 else 0
    return found[start : start + raw_B.size]


def data_columns(columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The columns of a batch that are the data's, for the raw reward.

    Args:
        columns: those of the training set; where it has `DATA_COLUMNS`, the data's are in there.

    >>> data_columns({"infalign_columns": [{"answer": 5}, {}], "trainer_state": None})
    {'trainer_state': None, 'answer': [5, None]}
    """
    kept = {name: value for name, value in columns.items() if name not in (DATA_COLUMNS, PROMPT_IDS)}
    rows = columns.get(DATA_COLUMNS, ())
    names = sorted({name for row in rows for name in row})
    return kept | {name: [row.get(name) for row in rows] for name in names}
