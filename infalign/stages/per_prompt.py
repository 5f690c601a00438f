"""Win rates prompt by prompt: what paired comparisons of several policies need of an evaluation.

evaluation/per_prompt.parquet     key, kl (nats), and a column JUDGE/DECODER for each row of the table; NaN for a prompt
                                  that is not of the row's group
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from infalign.evaluation.length import Side
from infalign.evaluation.sweep import PerPrompt
from infalign.evaluation.winrate import judged_win_rate, prompt_win_rate
from infalign.runtime.artifacts import write_whole
from infalign.types import InputError

if TYPE_CHECKING:
    from infalign.theory.procedures import Procedure

Array = NDArray[np.float64]
FILE = "evaluation/per_prompt.parquet"


def wins_per_prompt(policy: Side, base: Side, procedure: Procedure, judged_by_another: bool = False) -> Array:
    """(P,) win rates of the policy, both sides decoded; the terms of a `DecoderRow`'s mean."""
    if judged_by_another:
        return judged_win_rate((policy.proxy, policy.judge), (base.proxy, base.judge), procedure).per_prompt
    scored = [
        [np.asarray(row, dtype=np.float64)[~np.isnan(row)] for row in rows] for rows in (policy.proxy, base.proxy)
    ]
    return np.array([prompt_win_rate(ours, theirs, procedure) for ours, theirs in zip(*scored, strict=True)])


def write_per_prompt(output: Path, found: PerPrompt) -> None:
    """Write the file under an output folder, whole or not at all."""
    columns = {"key": list(found.keys), "kl": found.kl_P}
    columns |= {f"{judge}/{label}": wins_P for (judge, label), wins_P in found.wins.items()}
    write_whole(output / FILE, lambda path: pq.write_table(pa.table(columns), path))


def read_per_prompt(output: Path) -> PerPrompt:
    """What `write_per_prompt` wrote.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        table = pq.read_table(output / FILE)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f"{output / FILE} can't be read ({error}): evaluate again") from error
    wins = {
        tuple(name.split("/", 1)): table[name].to_numpy() for name in table.column_names if name not in ("key", "kl")
    }
    return PerPrompt(tuple(table["key"].to_pylist()), table["kl"].to_numpy(), wins)
