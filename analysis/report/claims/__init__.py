"""What a study says about the claims of its sources, in sentences made from the numbers of its tables.

A claim is made of comparisons between cells, at the largest batch size of each optimizer. A comparison decides where a
95 % interval lies wholly on one side of a threshold; an interval that holds the threshold, one seed, or a cell of which
confirmed runs diverged or hardly learnt cannot tell. The claim is supported, or contradicted, where all its comparisons
say so, which makes it no easier to be wrong with more of them. How often each verdict comes where it should not is
simulated by benchmarks/claims.py.

Cells are compared that share all other factors: each function is about one variant of a study, and `together` about
all. Tables are of the variant too (`load.of_variant`).
"""

from lbstudy.analysis.report.claims.accuracy import at_largest_batch, generalises_worse, more_than_halves
from lbstudy.analysis.report.claims.minima import wider_minima
from lbstudy.analysis.report.claims.steps import fewer_steps, goals, rivals
from lbstudy.analysis.report.claims.verdicts import (
    Claim,
    Comparison,
    Verdict,
    agreed,
    decide,
    led,
    lost,
    together,
)

__all__ = [
    "Claim",
    "Comparison",
    "Verdict",
    "agreed",
    "at_largest_batch",
    "decide",
    "fewer_steps",
    "generalises_worse",
    "goals",
    "led",
    "lost",
    "more_than_halves",
    "rivals",
    "together",
    "wider_minima",
]
