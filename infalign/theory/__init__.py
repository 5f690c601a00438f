"""Theory: inference procedures, reward transformations, and what the best policy can reach at a KL.

- `procedures`: rank-based decoders as one object (g, G, unbiased order weights, the selector)
- `transforms`: identity, log, normal_icdf, exponential; `tilted`: KL and win rate of the policies they make
- `optimum`: the optimal transformation of a procedure and the win-rate limit W*(KL)
- `judged`: the optimum when another reward judges than the one that decodes, and which N that favours
- `levels`: the one solver underneath, and the same questions for rewards that tie
- `quadrature`, `order_statistics`: the numerics underneath

Laws, tested: G' = g; sum_i a_i Beta(i, m-i+1) = g for the order weights a; `select` has the weights' frequencies;
Phi*' = g(u) g(Q(u)); dW*/dKL = beta; no transformation beats the optimum at equal KL.
The room imports numpy, scipy and `infalign.types` only: no torch, no configuration, no files.

Theory: InfAlign (arXiv:2412.19792). Formulas beyond its abstract were derived for this package and checked twice:
README.md of this folder.
"""

from infalign.theory import transforms
from infalign.theory.judged import JudgedTransform, gold_optimal, gold_win_rate, gold_win_rates
from infalign.theory.levels import TiedPolicy, tied_limit, tied_optimum, tied_win_rate
from infalign.theory.optimum import OptimalTransform, optimal_transform, win_rate_limit
from infalign.theory.procedures import (
    BUILT_IN,
    BestOfN,
    BottomOfN,
    Component,
    KthOfN,
    PessimisticOfN,
    Procedure,
    RandomN,
    SoftBestOfN,
    TopOfN,
    WorstOfN,
)
from infalign.theory.tilted import TiltedPolicy, tilt
from infalign.theory.transforms import CATALOGUE, Transform, exponential, identity, log, log_mirror, normal_icdf

__all__ = [
    "BUILT_IN",
    "CATALOGUE",
    "BestOfN",
    "BottomOfN",
    "Component",
    "JudgedTransform",
    "KthOfN",
    "OptimalTransform",
    "PessimisticOfN",
    "Procedure",
    "RandomN",
    "SoftBestOfN",
    "TiedPolicy",
    "TiltedPolicy",
    "TopOfN",
    "Transform",
    "WorstOfN",
    "exponential",
    "gold_optimal",
    "gold_win_rate",
    "gold_win_rates",
    "identity",
    "log",
    "log_mirror",
    "normal_icdf",
    "optimal_transform",
    "tied_limit",
    "tied_optimum",
    "tied_win_rate",
    "tilt",
    "transforms",
    "win_rate_limit",
]
