"""Importances: values of the surviving connections of a layer, which pruning compares over all layers.

An importance is a score with its normalisation (see `Importance`):

- a score rates the surviving connections: those of one layer, as `magnitude` does by |w| (`tombola.importance.scores`),
  or those of the whole network, from its gradients or its inputs (`tombola.importance.network_scores`);
- a normalisation (`tombola.importance.normalisation`) makes the scores of different layers comparable.

Any score goes with any normalisation: `find("taylor/l1")` returns such an importance.

The five importances of the paper (Vandersmissen and Oramas, arXiv 2302.11244) are `magnitude`, `l1`, `l2`, `softmax`
and `min_max`. `lamp` (Lee et al., arXiv 2010.07611) and `random` are references for comparisons. You can also use a
function of your own as an importance: it takes the absolute values of the n surviving weights of a layer, a float64
tensor of shape (n,), and returns n numbers.
"""

from tombola.importance.importances import (
    IMPORTANCES,
    SCORES,
    Importance,
    Seeded,
    as_importance,
    find,
    is_built_in,
    l1,
    l2,
    lamp,
    magnitude,
    min_max,
    random,
    rank,
    softmax,
)
from tombola.importance.network_scores import Network, NetworkScore
from tombola.importance.normalisation import NORMALISATIONS, Normalisation
from tombola.importance.scores import Score, Survivors

__all__ = [
    "IMPORTANCES",
    "NORMALISATIONS",
    "SCORES",
    "Importance",
    "Network",
    "NetworkScore",
    "Normalisation",
    "Score",
    "Seeded",
    "Survivors",
    "as_importance",
    "find",
    "is_built_in",
    "l1",
    "l2",
    "lamp",
    "magnitude",
    "min_max",
    "random",
    "rank",
    "softmax",
]
