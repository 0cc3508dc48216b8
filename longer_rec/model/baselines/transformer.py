"""The full causal Transformer: no merge, every event a query in every layer, the candidate attends (LONGER's table).

It is LONGER with K = 1 and all events as queries, so it is that tower: pre-norm layers of causal attention and FFN, the
candidate's token last. What nobody reads is not computed: the last layer's outputs at the events.
"""

from typing import Literal

from longer_rec.model.longer import TowerConfig


class TransformerConfig(TowerConfig):
    """``TowerConfig`` with what makes it a plain Transformer held fast; 1 + ``num_self_layers`` layers."""

    kind: Literal["transformer"] = "transformer"  # type: ignore[assignment]  # a subclass, to be built and planned alike
    merge_size: Literal[1] = 1
    inner_trans: None = None
    sampling: Literal["all"] = "all"
