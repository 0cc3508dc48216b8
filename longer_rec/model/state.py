"""What ``encode`` leaves behind of a user: all that scoring candidates needs, and nothing that depends on one."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, packed over requests: [merged events oldest to newest ; user globals] of each.

    ``window``: those of the users' newest hidden tokens (``phd.py``), which only hidden copies of candidates see.
    """

    key_SHE: Tensor
    value_SHE: Tensor
    length_B: Tensor
    window: "LayerCache | None" = None


@dataclass(frozen=True)
class MatchRuns:
    """Statistics of the events that share a feature value within a request: one row, a run, per distinct value.

    Runs stand in order of (field, request, id). ``id``: int64 per run, ``length_JB``: runs of each field and request,
    ``statistic``: runs x raw statistics, ``user_BF``: totals of each request.
    """

    id: Tensor
    length_JB: Tensor
    statistic: Tensor
    user_BF: Tensor


@dataclass(frozen=True)
class UserState:
    """``head_BF`` is the user's share of the head's first layer; the rest is empty where a tower has no use for it.

    ``event_id_T`` are ids of the one feature that a tower searches its events by, aligned with ``layers[0]``.
    """

    head_BF: Tensor
    layers: tuple[LayerCache, ...] = ()
    matches: MatchRuns | None = None
    event_id_T: Tensor | None = None
