"""An oracle for tests and notebooks: what every query sees, token by token, and a model run on it in float64.

Nothing here comes from `cache/`, `select/` or `kernels/`. The oracle follows each rule as it is stated: for every
query, each visible key is rotated afresh at the place where it is read, blocks are scored one by one, and what is
stored in few bits is quantized and read back token by token. It is slow, and for tiny models.
"""

from .models import feed, rounding, tiny_llama
from .oracle import Widened, oracle_gradients, oracle_logits, oracle_reads
from .visible import key_positions, masks

__all__ = [
    "Widened",
    "feed",
    "key_positions",
    "masks",
    "oracle_gradients",
    "oracle_logits",
    "oracle_reads",
    "rounding",
    "tiny_llama",
]
