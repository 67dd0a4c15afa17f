"""What an operator sets: one variable of the environment, which every process of vLLM inherits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import UnsupportedError
from ..plan.whole import require_whole

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..plan import Selector
    from ..select.summaries import MinMax

Roles = tuple[bool, ...]
"""Of a layer's KV heads: True for one that retrieves, and reads chosen blocks; False for one that streams."""


@dataclass(frozen=True)
class Ends:
    """Blocks that a streaming head reads: so many at the start of a row, and so many at its end."""

    first: int
    last: int

    @property
    def blocks(self) -> int:
        """Of both ends."""
        return self.first + self.last


@dataclass(frozen=True)
class PageChoice:
    """A decode step reads `token_budget` tokens of a longer context, in vLLM's own blocks; prompts are vLLM's.

    Paper: Quest (arXiv:2406.10774) §3; bounds of logical pages inside a block, LServe (arXiv:2502.14866) §3.5.
    Differs: see `methods.Quest`; pages are chosen anew at every step, and no head streams. Up to `token_budget` tokens
    of context everything is vLLM's own.

    Args:
        token_budget: tokens that a step reads in all; whole blocks (`--block-size`).
        sub: tokens behind one pair of bounds; divides the block.
        dense_layers: first layers, which read everything.
        share: `kv_head`: each KV head chooses; `all`: one choice for all heads of a layer.
        sink: first tokens that are always read.
        local: last tokens that are always read; the query's block always is.
    """

    variable: ClassVar[str] = "HF_LONGCTX_VLLM_QUEST"
    """Set to a JSON object of knobs (`{}`: the defaults), it has decode steps read chosen pages."""

    token_budget: int = 2048
    sub: int = 16
    dense_layers: int = 2
    share: Literal["kv_head", "all"] = "kv_head"
    sink: int = 4
    local: int = 1

    def __post_init__(self) -> None:
        where = self.variable
        require_whole(where, 0, dense_layers=self.dense_layers)
        require_whole(where, token_budget=self.token_budget, sub=self.sub)
        if self.share not in ("kv_head", "all"):
            raise ValueError(f"{where}: expected share 'kv_head' or 'all'; got {self.share!r}. Give one of them.")

    @classmethod
    def read(cls, text: str) -> Self:
        """Knobs from a JSON object.

        Raises:
            ValueError: no object, a knob that there is not, or a value that it does not take.
        """
        try:
            said = json.loads(text)
        except json.JSONDecodeError:
            said = None
        known = [knob.name for knob in fields(cls)]
        if not isinstance(said, dict) or not said.keys() <= set(known):
            knobs, example = ", ".join(known), f"{cls.variable}='{{\"token_budget\": 1024}}'"
            raise ValueError(f"{cls.variable}: expected a JSON object of {knobs}; got {text!r}. Try {example}.")
        return cls(**said)

    def summary(self, block: int) -> MinMax:
        """What is kept beside vLLM's blocks of so many tokens; errors as `selector`."""
        from ..select.summaries import MinMax

        return MinMax(block, self.sub)

    def selector(self, block: int) -> Selector:
        """The choice for vLLM's blocks of so many tokens.

        Raises:
            ValueError: a budget that is not whole blocks, or has no room; a `sub` that does not divide the block.
        """
        from ..methods.pages import best_pages

        return best_pages(self.variable, self.token_budget, self.summary(block), self.sink, self.local, self.share, 1)

    def ends(self, block: int) -> Ends | None:
        """What streaming heads read of vLLM's blocks of so many tokens; None: no head streams."""
        return None

    def roles(self, config: Any, name: str, kv_heads: int) -> tuple[Roles, ...]:
        """Of each layer of a model.

        Args:
            config: of the model's text.
            name: of the model, or its folder.
            kv_heads: of a layer.
        """
        return ((True,) * kv_heads,) * int(config.num_hidden_layers)


@dataclass(frozen=True)
class HeadChoice(PageChoice):
    """Streaming heads read both ends of a context, the others `token_budget` tokens of it; prompts are vLLM's.

    Paper: LServe (arXiv:2502.14866) §3. Differs: prompts are read densely, a choice holds for one step, keys and values
    are stored as vLLM stores them, all of them; streaming heads read whole blocks. vLLM's own at sparsity 0, or where
    both ends meet, and token_budget >= length.

    Args:
        token_budget: as above, of a retrieval head.
        sub: as above, like the next four.
        dense_layers: in them streaming heads read everything, too.
        share: of the retrieval heads.
        sink: of the retrieval heads.
        local: of the retrieval heads.
        pattern: gates of KV heads: a folder or file in the published format, or the name of a shipped pattern; None
            finds a shipped one for the model.
        sparsity: share of the KV heads that stream, 0 to 1; the lowest gates stream.
        sinks: first tokens that streaming heads read, up to a whole block.
        window: last tokens that streaming heads read, up to whole blocks.
    """

    variable: ClassVar[str] = "HF_LONGCTX_VLLM_LSERVE"
    """Set to a JSON object of knobs (`{}`: the defaults), it has heads stream or read chosen pages in decode steps."""

    token_budget: int = 4096
    dense_layers: int = 0
    sink: int = 0
    pattern: str | None = None
    sparsity: float = 0.5
    sinks: int = 128
    window: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        require_whole(self.variable, 0, sinks=self.sinks)
        require_whole(self.variable, window=self.window)
        if not isinstance(self.pattern, str | None):
            raise ValueError(f"{self.variable}: expected pattern as a path or name; got {self.pattern!r}. Give a file.")
        if type(self.sparsity) not in (int, float) or not 0 <= self.sparsity <= 1:
            raise ValueError(
                f"{self.variable}: expected sparsity between 0 (all heads retrieve) and 1 (all stream); got "
                f"{self.sparsity!r}. The paper uses 0.5."
            )

    def ends(self, block: int) -> Ends:
        """As many blocks as sinks and window can touch, wherever the query stands in its own."""
        return Ends(-(-self.sinks // block), 1 + (self.window + block - 2) // block)

    def roles(self, config: Any, name: str, kv_heads: int) -> tuple[Roles, ...]:
        """As above, by the gates.

        Raises:
            UnsupportedError: no pattern is known for the model.
            ValueError: the pattern is for another number of layers or heads, or is none; a missing file: its OSError.
        """
        from ..heads import check_pattern, find_pattern, load_pattern, retrieval_heads

        found = find_pattern(config, name) if self.pattern is None else load_pattern(self.pattern)
        layers = int(config.num_hidden_layers)
        if found is None:
            raise UnsupportedError(
                f"{self.variable}: expected a published head pattern for {name} ({layers} layers, {kv_heads} KV "
                "heads); got none that fits. Give pattern a folder in the published format (hf-longctx heads train)."
            )
        check_pattern(found, layers, kv_heads)
        return retrieval_heads(found, self.sparsity)


def asked(environ: Mapping[str, str]) -> PageChoice | None:
    """What the environment asks for; None: nothing.

    Raises:
        ValueError: both variables are set, or one does not hold knobs.
    """
    said = [kind for kind in (PageChoice, HeadChoice) if kind.variable in environ]
    if len(said) > 1:
        both = " and ".join(kind.variable for kind in said)
        raise ValueError(f"vLLM: expected one of {both}; got both. Leave one of them out.")
    return said[0].read(environ[said[0].variable]) if said else None
