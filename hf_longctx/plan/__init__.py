"""What each KV head does, as frozen values. No tensors here, and no torch.

Shape letters, used in every docstring of the package: `B` batch rows, `T` query tokens of this call, `S` stored tokens,
`Hq`/`Hkv` query and KV heads, `G = Hq // Hkv`, `D` head dim, `N` blocks of queries, `M` blocks of keys, `K` selected
blocks, `L` layers. A bare size is in tokens.
"""

from .axes import Budget, KVFormat, Placement, Positions, Retention, Scorer, Summary, primitive
from .plan import HeadGroup, HeadPolicy, LayerPlan, Plan
from .selector import Selector
from .whole import require_whole

__all__ = [
    "Budget",
    "HeadGroup",
    "HeadPolicy",
    "KVFormat",
    "LayerPlan",
    "Placement",
    "Plan",
    "Positions",
    "Retention",
    "Scorer",
    "Selector",
    "Summary",
    "primitive",
    "require_whole",
]
