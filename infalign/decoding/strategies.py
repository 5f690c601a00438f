"""The strategies that a recipe knows by name."""

from __future__ import annotations

from collections.abc import Callable

from infalign.decoding.adaptive import Adaptive
from infalign.decoding.by_procedure import ByProcedure
from infalign.decoding.early_rejection import EarlyRejection
from infalign.decoding.majority_vote import MajorityVote
from infalign.decoding.rejection import Rejection
from infalign.decoding.strategy import Strategy

STRATEGIES: dict[str, Callable[..., Strategy]] = {
    "procedure": ByProcedure,
    "rejection": Rejection,
    "majority_vote": MajorityVote,
    "early_rejection": EarlyRejection,
    "adaptive": Adaptive,
}
"""`strategy: rejection`, with `strategy_kwargs` as the arguments beside n (or, where it has one, the procedure)."""

TAKES_PROCEDURE = ("procedure", "early_rejection")
"""Those whose first argument is the procedure; the others take n."""
