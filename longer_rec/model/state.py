"""What ``encode`` leaves behind of a user: all that scoring candidates needs, and nothing that depends on one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from longer_rec.model.inputs import InstanceSide


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
class InstanceMemory:
    """Keys and values of the user's instance tokens by layer, and the user's share of what candidates ask with."""

    layers: tuple[LayerCache, ...]
    ask_BF: Tensor


@dataclass(frozen=True)
class UserState:
    """``head_BF`` is the user's share of the head's first layer; the rest is empty where a tower has no use for it.

    ``event_id_T`` are ids of the one feature that a tower searches its events by, aligned with ``layers[0]``. ``past``
    is there while a source model in user order trains, never in serving.
    """

    head_BF: Tensor
    layers: tuple[LayerCache, ...] = ()
    matches: MatchRuns | None = None
    event_id_T: Tensor | None = None
    instances: InstanceMemory | None = None
    past: InstanceSide | None = None


def map_state(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A state, or a part of one, with ``function`` applied to each of its tensors."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(map_state(each, function) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{field.name: map_state(getattr(value, field.name), function) for field in fields(value)})
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors of a state, or of a part of one, in the order of ``map_state``."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_state(value, note)
    return tensors


def state_bytes(state: UserState) -> int:
    """Bytes that the state's tensors hold."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(state))


def join_states(states: Sequence[UserState]) -> UserState:
    """The state of all requests of ``states``, one after the other: as if they had been encoded together."""
    if len(states) == 1:
        return states[0]
    layers = tuple(_join_caches(layers) for layers in zip(*(state.layers for state in states), strict=True))
    runs = [state.matches for state in states if state.matches is not None]
    ids = [state.event_id_T for state in states if state.event_id_T is not None]
    memories = [state.instances for state in states if state.instances is not None]
    return UserState(torch.cat([state.head_BF for state in states]), layers, _join_runs(runs) if runs else None,
                     torch.cat(ids) if ids else None, _join_memories(memories) if memories else None)


def split_state(state: UserState) -> list[UserState]:
    """The state of each request by itself, in memory of its own."""
    B = state.head_BF.shape[0]
    caches = list(zip(*(_split_cache(layer) for layer in state.layers), strict=True)) or [()] * B
    runs: Sequence[MatchRuns | None] = [None] * B if state.matches is None else _split_runs(state.matches)
    ids: Sequence[Tensor | None] = [None] * B
    if state.event_id_T is not None:
        ids = state.event_id_T.split(state.layers[0].length_B.tolist())
    memories = [None] * B if state.instances is None else _split_memory(state.instances)
    return [map_state(UserState(*parts), _copy)
            for parts in zip(state.head_BF.split(1), caches, runs, ids, memories, strict=True)]


def _copy(tensor: Tensor) -> Tensor:
    """Keys and values head by head, as attention reads them: a tenth of its time."""
    if tensor.dim() == 3:
        return tensor.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
    return tensor.clone()


def _join_memories(memories: Sequence[InstanceMemory]) -> InstanceMemory:
    layers = tuple(_join_caches(caches) for caches in zip(*(memory.layers for memory in memories), strict=True))
    return InstanceMemory(layers, torch.cat([memory.ask_BF for memory in memories]))


def _split_memory(memory: InstanceMemory) -> list[InstanceMemory | None]:
    caches = zip(*(_split_cache(layer) for layer in memory.layers), strict=True)
    return [InstanceMemory(*parts) for parts in zip(caches, memory.ask_BF.split(1), strict=True)]


def _join_caches(caches: Sequence[LayerCache]) -> LayerCache:
    windows = [cache.window for cache in caches if cache.window is not None]
    return LayerCache(torch.cat([cache.key_SHE for cache in caches]), torch.cat([cache.value_SHE for cache in caches]),
                      torch.cat([cache.length_B for cache in caches]), _join_caches(windows) if windows else None)


def _split_cache(cache: LayerCache) -> list[LayerCache]:
    lengths = cache.length_B.tolist()
    windows = [None] * len(lengths) if cache.window is None else _split_cache(cache.window)
    return [LayerCache(*parts) for parts in zip(cache.key_SHE.split(lengths), cache.value_SHE.split(lengths),
                                                cache.length_B.split(1), windows, strict=True)]


def _join_runs(runs: Sequence[MatchRuns]) -> MatchRuns:
    by_field = list(zip(*(_rows_of_fields(each) for each in runs), strict=True))
    row_of = [[torch.cat([getattr(each, name)[rows] for each, rows in zip(runs, of_field, strict=True)])
               for of_field in by_field] for name in ("id", "statistic")]
    return MatchRuns(torch.cat(row_of[0]), torch.cat([each.length_JB for each in runs], dim=1), torch.cat(row_of[1]),
                     torch.cat([each.user_BF for each in runs]))


def _rows_of_fields(runs: MatchRuns) -> list[slice]:
    ends = runs.length_JB.sum(1).cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _split_runs(runs: MatchRuns) -> list[MatchRuns]:
    J, B = runs.length_JB.shape
    lengths = runs.length_JB.flatten().tolist()
    id_parts, statistic_parts = runs.id.split(lengths), runs.statistic.split(lengths)
    return [MatchRuns(torch.cat(id_parts[b::B]), runs.length_JB[:, b:b + 1], torch.cat(statistic_parts[b::B]),
                      runs.user_BF[b:b + 1]) for b in range(B)]
