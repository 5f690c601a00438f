"""The offline solver: a policy from base samples that exist, without rollouts and without calls of the reward.

Calibration has drawn K samples of every prompt, scored them and kept their log-probabilities under the base. With
`l = log pi(y|x) - log pi_ref(y|x)` and C the mid-rank of a sample among the prompt's own K, the KL-regularised optimum
is `l = Phi(C)/beta - log Z` (infalign/theory/README.md, equation 3), and each of these losses has a policy of that form
as its minimum:

| loss | on a group of G samples | its minimum | source |
|---|---|---|---|
| variance | `beta/(2(G-1)) sum_i (x_i - mean x)^2`, `x = Phi(C)/beta - l` | the transform's optimum; log Z is absorbed | ours |
| qrpo | `beta/(2G) sum_i (x_i - log Z)^2`, Z exact for these K samples | the same | arXiv:2507.08068 |
| tup | binary cross-entropy of `l`: base samples above quantile t against all of them | uniform above t | arXiv:2608.19748 |
| ipo | `beta/4 (l_best - l_worst - 1/(2 beta))^2` of a group | `theory.pairs.BestAndWorst(G)` as Phi | arXiv:2310.12036 |
| bonbon | `-a log pi(best) + (1-a) (l_best - l_worst - (G-1) H_(G-1))^2` | about the Best-of-G policy | arXiv:2406.00832 |

Every loss is normalised so that a step is about as large as the online solver's: at `pi = pi_ref` the gradient of
`variance` is that of RLOO on the same samples. REBEL (arXiv:2404.16767) is the pairwise form of `variance`, G = 2.

Deviations. QRPO's Z is that of a uniform quantile; here it is that of the K mid-ranks, ties included, and its square is
divided by 2 beta. TUP's paper was not available: the loss was built from its closed form.
"""  # noqa: E501 - a table

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special
from torch import Tensor
from torch.nn.functional import softplus

from infalign.calibration.quantile import calibrate
from infalign.models.shared_prefix import pad_left, pad_right
from infalign.rewards.fingerprint import digest
from infalign.runtime.seeds import stream
from infalign.training.baselines import Baseline
from infalign.training.checks import MOST_KL_AT_START
from infalign.training.reward import REF_COMPLETIONS, REF_LOGPS, CTRLReward
from infalign.types import InputError

Array = NDArray[np.float64]
Name = Literal["variance", "qrpo", "tup", "ipo", "bonbon"]
LOSSES: tuple[Name, ...] = get_args(Name)
"""The words that `loss` takes."""
OF_A_TRANSFORM = ("variance", "qrpo")
"""Those whose minimum is the optimum of the recipe's transform; the others have an aim of their own."""
_OPTIONS: dict[str, dict[str, str]] = {
    "tup": {"threshold": "a quantile in (0, 1): above which all samples are equally good"},
    "bonbon": {"alpha": "a weight in [0, 1]: of the best sample's log-likelihood"},
}
_ALPHA = 0.005  # BoNBoN's own
_POINTWISE = ("raw", "par")  # baselines whose value of a sample does not depend on the policy's other samples


@dataclass(frozen=True)
class OfflineLoss:
    """Which loss, with its options; made by `offline_loss`.

    Attributes:
        name: one of `LOSSES`.
        threshold: of `tup`, a base quantile.
        alpha: of `bonbon`.
    """

    name: Name = "variance"
    threshold: float | None = None
    alpha: float = _ALPHA

    @property
    def label(self) -> str:
        """What tells it from others, the same text in every run and version."""
        more = {"tup": f" above {self.threshold}", "bonbon": f" {self.alpha:g}"}
        return self.name + more.get(self.name, "")

    def targets(self, reward: CTRLReward, rewards_K: Array, beta: float, quantiles_K: Array | None = None) -> Array:
        """(K,) what the loss wants to know of each of a prompt's samples, from the rewards of all of them.

        `variance`: Phi(C). `qrpo`: Phi(C) - beta log Z. `tup`: the density of the truncated policy. The others: C.

        Args:
            reward: its transform is Phi.
            rewards_K: raw rewards, without NaN.
            beta: the KL coefficient.
            quantiles_K: `mid_ranks` of the rewards, where they are known already.
        """
        quantiles_K = mid_ranks(rewards_K) if quantiles_K is None else quantiles_K
        if self.name == "tup":
            assert self.threshold is not None
            ties_K = (rewards_K[:, None] == rewards_K).mean(1)  # the width of a sample's cell: its tie block's mass
            above_K = np.clip((quantiles_K + ties_K / 2.0 - self.threshold) / ties_K, 0.0, 1.0)
            return above_K / (1.0 - self.threshold)
        if self.name not in OF_A_TRANSFORM:
            return quantiles_K
        if isinstance(reward.transform, Baseline):
            values_K = reward.transform.values(rewards_K, rewards_K)
        else:
            values_K = np.asarray(reward.transform(quantiles_K), dtype=np.float64)  # type: ignore[operator]
        if self.name == "qrpo":
            values_K = values_K - beta * (special.logsumexp(values_K / beta) - np.log(values_K.size))
        return values_K

    def __call__(self, log_ratios_PG: Tensor, logps_PG: Tensor, targets_PG: Tensor, beta: float) -> Tensor:
        """The mean loss of P groups, with gradients.

        Args:
            log_ratios_PG: log pi - log pi_ref of G base samples of each prompt, nats.
            logps_PG: log pi of them.
            targets_PG: from `targets`.
            beta: the KL coefficient; `tup` and `bonbon` have none.
        """
        return _LOSS[self.name](self, log_ratios_PG, logps_PG, targets_PG, beta)


def mid_ranks(rewards_K: Array) -> Array:
    """(K,) mid-ranks in (0, 1) of a prompt's samples among themselves.

    >>> mid_ranks(np.array([3.0, 1.0, 1.0, 2.0])).tolist()
    [0.875, 0.25, 0.25, 0.625]
    """
    return calibrate(rewards_K[None], rewards_K[None])[0]


def offline_loss(
    name: str | None, options: Mapping[str, Any] | None = None, target_kl: float | None = None
) -> OfflineLoss:
    """The loss of that name with its options.

    Args:
        name: one of `LOSSES`; None is `variance`.
        options: `{threshold: ...}` of `tup`, `{alpha: ...}` of `bonbon`.
        target_kl: nats; without a threshold, that of `tup` is where the truncated policy has this KL, 1 - e^-KL.

    Raises:
        InputError: an unknown name, an option that the loss has not, or a value out of range.

    >>> round(offline_loss("tup", target_kl=1.0).threshold, 3)
    0.632
    """
    name, options = name or "variance", dict(options or {})
    if name not in LOSSES:
        raise InputError(f"loss {name!r} is unknown: one of {', '.join(LOSSES)}")
    known = _OPTIONS.get(name, {})
    for option, value in options.items():
        if option not in known:
            has = "; ".join(f"{one}: {text}" for one, text in known.items()) or "none"
            raise InputError(f"loss_kwargs: {name} has no option {option!r}; it has {has}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        inside = number and (0.0 < value < 1.0 if option == "threshold" else 0.0 <= value <= 1.0)
        if not inside:
            raise InputError(f"loss_kwargs: {option} must be {known[option].partition(':')[0]}, got {value!r}")
    if name == "tup" and "threshold" not in options:
        if target_kl is None:
            raise InputError("loss tup needs target_kl, or loss_kwargs: {threshold: 0.6}")
        options["threshold"] = float(-np.expm1(-target_kl))
    return OfflineLoss(name, **options)  # type: ignore[arg-type]


def check_offline(loss: OfflineLoss, rewards: Sequence[CTRLReward], arguments: Any) -> CTRLReward:
    """See that a run can be trained offline; returns its reward.

    Args:
        loss: of the run.
        rewards: its `CTRLReward`s.
        arguments: a `CTRLConfig`.

    Raises:
        InputError: several rewards, an objective whose values depend on the policy's own samples, pooled calibration,
            groups that a step would cut apart, or settings of rollouts.
    """
    if len(rewards) != 1:
        raise InputError(
            f"solver: offline trains for one calibrated reward, got {len(rewards)}: combine several before "
            "calibration (reward_models/calibrated_sum.py), or train online"
        )
    reward, transform = rewards[0], rewards[0].transform
    pointwise = callable(transform) or (isinstance(transform, Baseline) and transform.name in _POINTWISE)
    if loss.name in OF_A_TRANSFORM and not pointwise:
        named = getattr(transform, "name", "direct")
        raise InputError(
            f"solver: offline needs a value for each sample alone, and objective {named} is about the policy's own "
            f"samples: use a transform (objective: transform), {' or '.join(_POINTWISE)}, or solver: online"
        )
    if reward.method != "midrank":
        raise InputError(
            f"solver: offline ranks samples among themselves, got calibration_method {reward.method}: leave it out"
        )
    groups, rest = divmod(arguments.per_device_train_batch_size, arguments.num_generations)
    if rest or not groups:
        raise InputError(
            f"solver: offline trains on whole groups: per_device_train_batch_size must be a multiple of "
            f"num_generations, got {arguments.per_device_train_batch_size} and {arguments.num_generations}"
        )
    if arguments.num_generations < 2:
        raise InputError("solver: offline compares samples of a prompt: num_generations must be at least 2, got 1")
    for name in ("mask_truncated_completions", "use_vllm"):
        if getattr(arguments, name):
            raise InputError(f"{name}: true is about rollouts, and solver: offline draws none: leave it out")
    return reward


class OfflineSamples:
    """Makes a trainer's batches from the base samples in its data set.

    Rows need the reward's column, and `ref_completion_ids` and `ref_logps` (`reward.REF_COMPLETIONS`, `REF_LOGPS`), all
    of one length. A visit of a prompt takes G of its K samples; visits go through all of them before one comes again,
    in an order that follows from the seed and the prompt alone.

    Args:
        loss: what is minimised.
        reward: names its column and has the transform.
        group: G.
        seed: of the run.
    """

    def __init__(self, loss: OfflineLoss, reward: CTRLReward, group: int, seed: int) -> None:
        self.loss, self.reward, self.group, self.seed = loss, reward, group, seed
        self.fresh_visits = 0  # visits of a prompt before one of its samples comes again

    def check_rows(self, rows: Any, where: str = "train_dataset") -> None:
        """See that rows have what the solver needs.

        Args:
            rows: a data set with a length.
            where: its name, for messages.

        Raises:
            InputError: a column is missing, lengths differ, a number is not finite, or a prompt has fewer than G
                samples.
        """
        wanted = (self.reward.column, REF_COMPLETIONS, REF_LOGPS)
        if not hasattr(rows, "__len__"):
            raise InputError(f"{where} is a stream: solver: offline needs a data set of known length")
        for number in range(len(rows)):
            row = rows[number]
            if missing := [name for name in wanted if name not in row]:
                raise InputError(
                    f"{where} has no column {missing[0]!r}, which solver: offline needs (token ids of the base "
                    "samples, and their log-probabilities, summed over tokens): attach both with "
                    "SampleTable.attach(..., samples=True), or use solver: online"
                )
            counts = [len(row[name]) for name in wanted]
            if len(set(counts)) > 1:
                told = ", ".join(f"{count} {name}" for name, count in zip(wanted, counts, strict=True))
                raise InputError(f"{where}, row {number}: samples, rewards and log-probabilities differ: {told}")
            for name in (self.reward.column, REF_LOGPS):
                values = np.asarray(row[name], dtype=np.float64)  # None is NaN
                if (bad := np.flatnonzero(~np.isfinite(values))).size:
                    raise InputError(
                        f"{where}, row {number}: {name} must be finite numbers, got {row[name][bad[0]]} at index "
                        f"{bad[0]}: leave out samples without a score or a log-probability"
                    )
            if counts[0] < self.group:
                raise InputError(
                    f"{where}, row {number}: {counts[0]} scored samples are fewer than num_generations {self.group}: "
                    "lower it, or draw more (num_calibration_samples)"
                )
            visits = counts[0] // self.group
            self.fresh_visits = visits if number == 0 else min(self.fresh_visits, visits)

    def batch(
        self,
        rows: Sequence[Mapping[str, Any]],
        prompt_ids: Sequence[Sequence[int]],
        visit: int,
        beta: float,
        pad_id: int,
        device: torch.device,
    ) -> dict[str, Tensor]:
        """TRL's batch of rows, G after each other with the same prompt, with what the loss needs in place of rollouts.

        Args:
            rows: B rows.
            prompt_ids: their prompts' tokens.
            visit: how often these prompts came before.
            beta: the KL coefficient.
            pad_id: the padding token.
            device: of the tensors.

        Returns:
            `prompt_ids`, `prompt_mask` (B, P), `completion_ids`, `completion_mask` (B, T), `targets` and `ref_logps`
            (B,), `raw` and `quantiles` (B,), the rewards and their ranks among the K.
        """
        completions: list[Sequence[int]] = []
        found: dict[str, list[Array]] = {"targets": [], "ref_logps": [], "raw": [], "quantiles": []}
        for start in range(0, len(rows), self.group):
            row = rows[start]
            rewards_K = np.asarray(row[self.reward.column], dtype=np.float64)
            chosen = self._chosen(prompt_ids[start], rewards_K.size, visit)
            completions += [[int(token) for token in row[REF_COMPLETIONS][number]] for number in chosen]
            quantiles_K = mid_ranks(rewards_K)
            found["targets"].append(self.loss.targets(self.reward, rewards_K, beta, quantiles_K)[chosen])
            found["ref_logps"].append(np.asarray(row[REF_LOGPS], dtype=np.float64)[chosen])
            found["raw"].append(rewards_K[chosen])
            found["quantiles"].append(quantiles_K[chosen])
        ids_BP, mask_BP = pad_left(prompt_ids, pad_id, device)
        ids_BT, mask_BT = pad_right(completions, pad_id, device)
        tensors = {
            name: torch.from_numpy(np.concatenate(values).astype(np.float32)).to(device)
            for name, values in found.items()
        }
        return {
            "prompt_ids": ids_BP,
            "prompt_mask": mask_BP,
            "completion_ids": ids_BT,
            "completion_mask": mask_BT,
            **tensors,
        }

    def _chosen(self, prompt_ids: Sequence[int], count: int, visit: int) -> NDArray[np.intp]:
        """The numbers of the samples of a visit: the next G of a pass over all K, each pass in an order of its own."""
        groups = count // self.group  # what is left over of a pass is another's turn
        order = stream(self.seed, f"offline-{digest(list(prompt_ids))}", visit // groups).permutation(count)
        place = visit % groups * self.group
        return order[place : place + self.group]


def check_samples_at_start(log_ratios: Array, policy: str, rough_tokens: float | None = None) -> None:
    """Before the first step the policy gives the cached samples their cached log-probabilities.

    Args:
        log_ratios: log pi - log pi_ref of the first batch, nats.
        policy: where it was loaded from.
        rough_tokens: in half precision, mean tokens of a sample: rounding adds up with their square root (0.04 nats at
            64 tokens in bfloat16 was seen). None: in float32.

    Raises:
        InputError: it does not.
    """
    off, most = float(np.abs(log_ratios).mean()), MOST_KL_AT_START * max(1.0, rough_tokens or 1.0) ** 0.5
    if not off <= most:
        raise InputError(
            f"at step 0 the log-probabilities of the cached samples under the policy ({policy}) are off by {off:.3g} "
            f"nats on average, at most {most:.2g} is rounding: they are another model's, of another template "
            "or temperature, or end-of-sequence tokens were left out; calibrate this model, or leave their "
            "log-probabilities out of the file, so that they are computed"
        )


def importance_kl(log_ratios: Tensor) -> Tensor:
    """KL(pi || pi_ref) in nats from base samples: the mean of `w log w - w + 1`, w = pi/pi_ref; unbiased, (B,) terms.

    Heavy-tailed where pi is far from pi_ref: a monitor up to about two nats.
    """
    weights = log_ratios.clamp(max=20.0).exp()
    return weights * log_ratios - weights + 1.0


def _variance(loss: OfflineLoss, log_ratios_PG: Tensor, logps_PG: Tensor, targets_PG: Tensor, beta: float) -> Tensor:
    return beta / 2.0 * (targets_PG / beta - log_ratios_PG).var(dim=1).mean()


def _qrpo(loss: OfflineLoss, log_ratios_PG: Tensor, logps_PG: Tensor, targets_PG: Tensor, beta: float) -> Tensor:
    return beta / 2.0 * (targets_PG / beta - log_ratios_PG).square().mean()


def _tup(loss: OfflineLoss, log_ratios_PG: Tensor, logps_PG: Tensor, targets_PG: Tensor, beta: float) -> Tensor:
    # the classifier whose logit is l tells samples of the truncated policy (base samples, weighted) from base samples:
    # its best l is the log of their density ratio
    return (targets_PG * softplus(-log_ratios_PG) + softplus(log_ratios_PG)).mean()


def _ipo(loss: OfflineLoss, log_ratios_PG: Tensor, logps_PG: Tensor, targets_PG: Tensor, beta: float) -> Tensor:
    best, worst, differ = _best_and_worst(targets_PG)
    margin = log_ratios_PG.gather(1, best) - log_ratios_PG.gather(1, worst)
    return beta / 4.0 * ((margin - 1.0 / (2.0 * beta)).square() * differ).mean()


def _bonbon(loss: OfflineLoss, log_ratios_PG: Tensor, logps_PG: Tensor, targets_PG: Tensor, beta: float) -> Tensor:
    best, worst, differ = _best_and_worst(targets_PG)
    margin = log_ratios_PG.gather(1, best) - log_ratios_PG.gather(1, worst)
    group = targets_PG.shape[1]
    wanted = (group - 1) * sum(1.0 / number for number in range(1, group))  # its mean under the Best-of-G policy
    likelihood = logps_PG.gather(1, best)
    return (((1.0 - loss.alpha) * (margin - wanted).square() - loss.alpha * likelihood) * differ).mean()


def _best_and_worst(quantiles_PG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(P, 1) columns of the best and the worst of each group, and 1 where they differ: equals say nothing."""
    best, worst = quantiles_PG.argmax(1, keepdim=True), quantiles_PG.argmin(1, keepdim=True)
    return best, worst, (quantiles_PG.gather(1, best) > quantiles_PG.gather(1, worst)).to(quantiles_PG.dtype)


_LOSS: dict[str, Callable[[OfflineLoss, Tensor, Tensor, Tensor, float], Tensor]] = {
    "variance": _variance,
    "qrpo": _qrpo,
    "tup": _tup,
    "ipo": _ipo,
    "bonbon": _bonbon,
}
