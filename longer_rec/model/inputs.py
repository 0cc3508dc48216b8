"""What a tower is given: embedded histories and candidates, still jagged, with the ids behind them.

Tables live outside the model, so widths are all it knows of them.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longer_rec.model.jagged import newest_rows


@dataclass(frozen=True)
class InstanceWidths:
    """What instance tokens bring: vectors ``width`` wide, labels, and the named item or event features; at most
    ``max_tokens`` of them a request."""

    width: int
    num_labels: int
    max_tokens: int
    features: tuple[str, ...] = ()


@dataclass(frozen=True)
class InputWidths:
    """Embedding width of each feature; ``item`` features exist on events and candidates, the first is the item id."""

    item: dict[str, int]
    event: dict[str, int]
    user: dict[str, int]
    num_dense: int
    num_item_dense: int = 0
    instance: InstanceWidths | None = None


@dataclass(frozen=True)
class InstanceSide:
    """Tokens of N past instances, packed over requests, oldest to newest in each.

    From a store ``vector_NI``, ``label_NY`` and ``embedding`` (feature -> N x E); of this batch ``row_N``, candidates.
    ``age_N``: int64 seconds to the request, at least 1.
    """

    length_B: Tensor
    age_N: Tensor
    vector_NI: Tensor
    label_NY: Tensor
    embedding: dict[str, Tensor]
    row_N: Tensor | None = None


@dataclass(frozen=True)
class UserSide:
    """B requests without their candidates; T events packed over requests, oldest to newest in each.

    ``event_embedding``: feature -> T x E, ``event_id``: feature -> T (int64), ``age_T``: int64 seconds from the
    event to the request, at least 1, ``length_B``: events of each request, ``user_embedding``: feature -> B x E.
    """

    event_embedding: dict[str, Tensor]
    event_id: dict[str, Tensor]
    age_T: Tensor
    length_B: Tensor
    user_embedding: dict[str, Tensor]
    dense_BF: Tensor
    instances: InstanceSide | None = None


@dataclass(frozen=True)
class CandidateSide:
    """C candidates packed over requests: feature -> C x E, feature -> C (int64), dense features, and the number of
    candidates of each request."""

    embedding: dict[str, Tensor]
    id: dict[str, Tensor]
    dense_CF: Tensor
    length_B: Tensor


def all_ages(user: UserSide) -> list[Tensor]:
    """Of each request the ages of its events, then those of its instances."""
    ages = user.age_T.split(user.length_B.tolist())
    if user.instances is None:
        return list(ages)
    of_instances = user.instances.age_N.split(user.instances.length_B.tolist())
    return [torch.cat(both) for both in zip(ages, of_instances, strict=True)]


def keep_newest(user: UserSide, max_events: int) -> UserSide:
    """``user`` with histories cut to their newest ``max_events``: what a tower built for L = ``max_events`` reads."""
    if user.age_T.numel() <= max_events or int(user.length_B.max()) <= max_events:  # .max(): host sync on GPU
        return user
    kept_B = user.length_B.clamp(max=max_events)
    row = newest_rows(user.length_B, kept_B, int(kept_B.sum()))
    return replace(user, length_B=kept_B, age_T=user.age_T[row],
                   event_embedding={name: value[row] for name, value in user.event_embedding.items()},
                   event_id={name: value[row] for name, value in user.event_id.items()})


def concat_features(embedding: dict[str, Tensor], names: tuple[str, ...]) -> Tensor:
    """The named embeddings side by side, in the order of ``names``."""
    return torch.cat([embedding[name] for name in names], dim=-1)
