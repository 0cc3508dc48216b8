"""Statistics of a candidate's matches in the history: the paper's "compressed user x item interactions".

For each match field (item, category, ...) the events that carry the candidate's value are counted: in total, by
basket, with exponential decay, within the newest events; how long ago the newest was, how regular they are. The user
side groups its events into runs, one per distinct value, so a candidate costs a binary search and no C x L matrix is
ever made. Id 0, out-of-vocabulary, matches nothing. A basket is the set of a history's events at one time.
"""

import math
from typing import Literal

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longer_rec.config import Config
from longer_rec.errors import ConfigError
from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide
from longer_rec.model.jagged import position_from_newest, request_of, start_of
from longer_rec.model.linear import Linear
from longer_rec.model.state import MatchRuns

# A run's key is (field * B + request) << ID_BITS | id.
ID_BITS = 40
# newest age, oldest age, newest basket, oldest basket, newest position, baskets, then the decayed and windowed counts.
NUM_EXTREMES = 6


class InteractionConfig(Config):
    """``fields`` are item features; none given means all. ``unit_s`` is the unit of times, a week by default."""

    fields: tuple[str, ...] = ()
    unit_s: float = pydantic.Field(7 * 86400.0, gt=0)
    decays: tuple[float, ...] = pydantic.Field((1.0, 4.0, 16.0, 64.0), description="time constants in units")
    windows: tuple[int, ...] = pydantic.Field((50, 200, 1000), description="newest events counted")
    context: tuple[str, ...] = pydantic.Field((), description="item features whose embeddings join, e.g. popularity")
    hidden: tuple[int, ...] = pydantic.Field((128, 64), min_length=1)
    dropout: float = pydantic.Field(0.0, ge=0.0, lt=1.0)
    placement: Literal["token", "added", "none"] = pydantic.Field(
        "token", description="a global token of its own, added to the candidate's token (half the work), or neither")
    to_head: bool = pydantic.Field(True, description="straight into the head as well")

    @property
    def width(self) -> int:
        """Of what ``Interaction`` gives."""
        return self.hidden[-1]

    def input_width(self, widths: InputWidths) -> int:
        """Of what its MLP reads: statistics, the context's embeddings, dense features."""
        context = sum(widths.item[name] for name in self.context) + widths.num_item_dense
        return num_statistics(self, len(self.fields or widths.item)) + context


def num_statistics(config: InteractionConfig, num_fields: int) -> int:
    """Width of ``candidate_statistics``."""
    return num_fields * (14 + 2 * len(config.decays) + len(config.windows)) + 4


def group_matches(config: InteractionConfig, fields: tuple[str, ...], user: UserSide,
                  dtype: torch.dtype = torch.float32) -> MatchRuns:
    """Group each request's events by the value of each field; cost O(J T log T), independent of candidates."""
    T, B, J = user.age_T.numel(), user.length_B.numel(), len(fields)
    device = user.age_T.device
    age_T = user.age_T.to(dtype) / config.unit_s
    basket_T, num_baskets_B = _baskets(user)
    position_T = position_from_newest(user.length_B, T)
    weight = _event_weights(config, age_T, position_T)
    segment = torch.arange(J, device=device).unsqueeze(1) * B + request_of(user.length_B, T)
    id_JT = torch.stack([user.event_id[name] for name in fields])
    key, order = torch.sort(((segment << ID_BITS) | id_JT).flatten(), stable=True)
    known = (key & ((1 << ID_BITS) - 1)) > 0
    key, event = key[known], order[known] % max(T, 1)
    basket = basket_T[event]
    is_first = torch.ones_like(key, dtype=torch.bool)
    is_first[1:] = key[1:] != key[:-1]
    starts = is_first.nonzero().squeeze(1)
    ends = torch.cat([starts, starts.new_tensor([key.numel()])])[1:] - 1
    is_first[1:] |= basket[1:] != basket[:-1]
    basket_start = is_first.cumsum(0)[starts] - 1
    num_decays = len(config.decays)
    count = F.embedding_bag(event, weight, starts, mode="sum")
    baskets = F.embedding_bag(event[is_first], weight[:, :num_decays + 1].contiguous(), basket_start, mode="sum")
    newest, oldest = event[ends], event[starts]
    extremes = torch.stack([age_T[newest], age_T[oldest], basket_T[newest].to(dtype), basket_T[oldest].to(dtype),
                            position_T[newest].to(dtype), baskets[:, 0]], dim=1)
    statistic = torch.cat([extremes, count[:, 1:], baskets[:, 1:]], dim=1)
    run_key = key[starts]
    length_JB = torch.bincount(run_key >> ID_BITS, minlength=J * B).view(J, B)
    return MatchRuns(run_key & ((1 << ID_BITS) - 1), length_JB, statistic,
                     _user_totals(user, age_T, num_baskets_B))


def matched_rows(fields: tuple[str, ...], runs: MatchRuns, candidates: CandidateSide) -> Tensor:
    """J x C x raw statistics: the run of each candidate's value, zeros where the history has none."""
    J, B = runs.length_JB.shape
    id_JC = torch.stack([candidates.id[name] for name in fields])
    if runs.id.numel() == 0:
        return runs.statistic.new_zeros(*id_JC.shape, runs.statistic.shape[1])
    request_C = request_of(candidates.length_B, id_JC.shape[1])
    segment_JC = torch.arange(J, device=request_C.device).unsqueeze(1) * B + request_C
    key_JC = (segment_JC << ID_BITS) | id_JC
    run_key = (request_of(runs.length_JB.flatten(), runs.id.numel()) << ID_BITS) | runs.id
    row_JC = torch.searchsorted(run_key, key_JC).clamp_(max=run_key.numel() - 1)
    match_JC = (run_key[row_JC] == key_JC) & (id_JC > 0)
    return runs.statistic[row_JC] * match_JC.unsqueeze(-1)


def candidate_statistics(config: InteractionConfig, fields: tuple[str, ...], runs: MatchRuns,
                         candidates: CandidateSide) -> Tensor:
    """C x ``num_statistics``, each roughly within [-3, 3]."""
    raw = matched_rows(fields, runs, candidates)
    request_C = request_of(candidates.length_B, raw.shape[1])
    return describe(config, raw, runs.user_BF[request_C])


def describe(config: InteractionConfig, raw: Tensor, user_CF: Tensor) -> Tensor:
    """Raw statistics (J x C x raw, all 0 without a match) as network inputs: logarithms, ratios, fixed scaling.

    The scaling is fixed rather than estimated: nothing to fit, store or get wrong between training and serving.
    """
    newest_age, oldest_age, newest_basket, oldest_basket, position, baskets = raw[..., :NUM_EXTREMES].unbind(-1)
    events, all_baskets = user_CF[:, 0], user_CF[:, 1]
    matched, repeated = torch.stack([baskets > 0, baskets > 1]).to(raw.dtype)
    # In weeks and in baskets: how long ago the newest match was, in mean distances between matches.
    newest = torch.stack([newest_age, newest_basket + 1])
    span = torch.stack([oldest_age - newest_age, oldest_basket - newest_basket])
    distance = (span / (baskets - 1).clamp(min=1)).maximum(_like(raw, (0.02, 0.5)).view(2, 1, 1))
    periods = (newest / distance * repeated).clamp(max=math.expm1(4))
    regularity = baskets / (oldest_basket + 1) * matched
    share = raw[..., NUM_EXTREMES + len(config.decays) + len(config.windows) - 1] / (events + 5)
    basket_share = baskets / (all_baskets + 1)
    counts = 4 * raw[..., NUM_EXTREMES:]
    logs = torch.stack([newest_age, oldest_age, newest_basket, position, baskets, *periods, regularity, share,
                        basket_share], dim=-1)
    table = _like(raw, (*_LOGS, *[_COUNT_LOG] * counts.shape[-1])).T
    added, centre, spread, unmatched = table
    logs = torch.cat([logs, counts], dim=-1).add_(added).log_().sub_(centre)
    logs = torch.addcmul(logs, 1 - matched.unsqueeze(-1), unmatched).div_(spread)
    first, shares, counted = logs.split([7, 3, counts.shape[-1]], dim=-1)
    described = torch.cat([matched.unsqueeze(-1), first, torch.stack([repeated, regularity * 2], dim=-1), shares,
                           (basket_share * 3).unsqueeze(-1), counted], dim=-1)
    totals = (user_CF.log1p() - _like(user_CF, USER_CENTER)) / _like(user_CF, USER_SCALE)
    return torch.cat([described.transpose(0, 1).flatten(1), totals], dim=1)


# Of each logarithm in ``describe``: what is added before it, centre, spread, and what stands for it without a match.
_LOGS = ((1.0, 2.0, 1.5, 4.0), (1.0, 2.0, 1.5, 0.0), (1.0, 3.0, 2.0, 5.7), (1.0, 4.0, 2.5, 7.6), (1.0, 0.7, 1.0, 0.0),
         (1.0, 0.5, 1.0, 0.0), (1.0, 0.5, 1.0, 0.0), (0.01, -3.0, 1.5, 0.0), (1e-3, -5.0, 1.5, 0.0),
         (1e-2, -3.5, 1.2, 0.0))
_COUNT_LOG = (1.0, 1.5, 1.5, 0.0)
# Of log(1 + events, baskets, age of the newest event, age of the oldest event).
USER_CENTER = (6.0, 4.0, 0.4, 3.0)
USER_SCALE = (1.0, 1.0, 0.5, 1.0)


class Interaction(nn.Module):
    """Statistics, the context's embeddings and the dense features -> MLP, C x its last hidden width."""

    def __init__(self, config: InteractionConfig, fields: tuple[str, ...], input_width: int) -> None:
        super().__init__()
        self.config, self.fields = config, fields
        widths = (input_width, *config.hidden)
        self.linears = nn.ModuleList(Linear(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True))

    @property
    def dtype(self) -> torch.dtype:
        """Of the statistics: fp32, or fp64 where the weights are; counts and ages do not fit fewer bits."""
        return torch.float64 if next(self.parameters()).dtype == torch.float64 else torch.float32

    def encode(self, user: UserSide) -> MatchRuns:
        with torch.no_grad():
            return group_matches(self.config, self.fields, user, self.dtype)

    def context(self, candidates: CandidateSide) -> list[Tensor]:
        """What the statistics are read against, such as how popular the item is: a popular item that was never
        bought says more than a rare one."""
        dense_CF = candidates.dense_CF.to(self.dtype)
        return [*(candidates.embedding[name] for name in self.config.context), dense_CF]

    def score(self, runs: MatchRuns, candidates: CandidateSide) -> Tensor:
        with torch.no_grad():
            hidden = candidate_statistics(self.config, self.fields, runs, candidates)
        hidden = torch.cat([hidden, *self.context(candidates)], dim=1)
        for i, layer in enumerate(self.linears):
            hidden = F.dropout(hidden, self.config.dropout, self.training) if i else hidden
            hidden = F.silu(layer(hidden))
        return hidden


def build_interaction(config: InteractionConfig | None, widths: InputWidths) -> Interaction | None:
    """The module of a configuration, if there is one; ``ConfigError`` for a feature that items do not have."""
    if config is None:
        return None
    for name in (*config.fields, *config.context):
        if name not in widths.item:
            raise ConfigError(f"model.interaction names the item feature {name!r}; known are {', '.join(widths.item)}")
    return Interaction(config, config.fields or tuple(widths.item), config.input_width(widths))


def _like(tensor: Tensor, values: tuple[float | tuple[float, ...], ...]) -> Tensor:
    return torch.tensor(values, dtype=tensor.dtype, device=tensor.device)


def _event_weights(config: InteractionConfig, age_T: Tensor, position_T: Tensor) -> Tensor:
    """T x (1 + decays + windows): a one, exp(-age / decay), and whether the event is within the window."""
    decay = torch.exp(-age_T.unsqueeze(1) / _like(age_T, config.decays))
    window = (position_T.unsqueeze(1) < torch.tensor(config.windows, device=age_T.device)).to(age_T.dtype)
    return torch.cat([torch.ones_like(age_T).unsqueeze(1), decay, window], dim=1)


def _baskets(user: UserSide) -> tuple[Tensor, Tensor]:
    """Basket of each event, 0 the newest, and the number of baskets of each request."""
    T = user.age_T.numel()
    request_T = request_of(user.length_B, T)
    opens = torch.ones_like(user.age_T)
    opens[1:] = ((user.age_T[1:] != user.age_T[:-1]) | (request_T[1:] != request_T[:-1])).long()
    number_T = opens.cumsum(0)
    total = torch.cat([number_T.new_zeros(1), number_T])
    end_B = user.length_B.cumsum(0)
    last_B = total[end_B]
    return last_B[request_T] - number_T, last_B - total[end_B - user.length_B]


def _user_totals(user: UserSide, age_T: Tensor, num_baskets_B: Tensor) -> Tensor:
    """B x 4: events, baskets, age of the newest and of the oldest event (60 units and 0 for an empty history)."""
    has = user.length_B > 0
    padded = torch.cat([age_T, age_T.new_zeros(1)])
    newest = torch.where(has, padded[(user.length_B.cumsum(0) - 1).clamp(min=0)].clamp(max=60), 60.0)
    oldest = torch.where(has, padded[start_of(user.length_B)], 0.0)
    return torch.stack([user.length_B.to(age_T.dtype), num_baskets_B.to(age_T.dtype), newest, oldest], dim=1)
