"""Floating-point operations of our tower: its exact matmuls, from lengths alone.

A multiply and an add count as two. ``tower_flops`` counts what ``torch.utils.flop_counter`` counts, matmuls alone,
for one forward pass; backward does twice that. Padding within attention groups is not in it.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from longer_rec.model.inputs import InputWidths
from longer_rec.model.longer import TowerConfig


@dataclass(frozen=True)
class TowerFlops:
    """One forward pass by part; ``cross`` and ``self_layers`` hold both sides, user and candidates."""

    input: int
    merge: int
    interaction: int
    cross: int
    self_layers: int
    head: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


def tower_flops(config: TowerConfig, widths: InputWidths, num_tasks: int, history_lengths: Sequence[int],
                candidate_counts: Sequence[int]) -> TowerFlops:
    """FLOPs of scoring a batch of requests, from its lengths alone (histories as cut to the tower's L)."""
    K, D, X = config.merge_size, config.width, config.merged_width
    B, T, C = len(history_lengths), sum(history_lengths), sum(candidate_counts)
    merged = [-(-length // K) for length in history_lengths]
    item, event = sum(widths.item.values()), sum(widths.event.values()) + config.age_width
    user = sum(widths.user.values())
    hidden = config.projection_hidden
    first, second = hidden or D, hidden * D
    inputs = 2 * (T * ((item + event) * first + second) + C * (item * first + second) + event * first)
    inputs += 2 * B * config.user_token * (user + widths.num_dense + 1) * X
    merge = 0
    if config.inner_trans is not None:
        inner = config.inner_trans
        slots = sum(merged) * K
        layer = slots * (4 * D * D + 2 * inner.ffn_multiple * D * D) + 2 * sum(merged) * K * K * D
        merge = 2 * (inner.num_layers * layer + slots * D * D)
    copied = hidden_rows(config, history_lengths)
    layers = [_layer_flops(config, keys, queries, candidate_counts, depth)
              + _hidden_flops(config, keys, copied, candidate_counts, depth)
              for depth, (keys, queries) in enumerate(layer_rows(config, history_lengths))]
    candidate_in, user_in = config.head_widths(widths)
    chain = [*config.head.hidden, num_tasks]
    head = 2 * C * (candidate_in * chain[0] + _chain(chain)) + 2 * B * user_in * chain[0]
    return TowerFlops(inputs, merge, _interaction_flops(config, widths, C), layers[0], sum(layers[1:]), head)


def sampled_rows(config: TowerConfig, history_lengths: Sequence[int]) -> list[int]:
    """Sequence queries of each request."""
    merged = [-(-length // config.merge_size) for length in history_lengths]
    if config.sampling == "all":
        return merged
    if config.sampling == "learnable":
        return [config.num_queries * (length > 0) for length in merged]
    return [min(length, config.num_queries) for length in merged]


def layer_rows(config: TowerConfig, history_lengths: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """(keys, queries) of each layer's user side, by request."""
    keys = [-(-length // config.merge_size) + config.num_user_globals for length in history_lengths]
    sampled = [length + config.num_user_globals for length in sampled_rows(config, history_lengths)]
    read = sampled if config.reads_sequence else [config.num_read_globals] * len(keys)
    queries = [sampled] * config.num_self_layers + [read]
    return list(zip([keys, *queries[:-1]], queries, strict=True))


def hidden_rows(config: TowerConfig, history_lengths: Sequence[int]) -> list[int]:
    """Hidden tokens of each request's user (``phd.py``)."""
    chunk = config.phd.chunk if config.phd is not None else 0
    return [min(length, chunk) * (config.copies - 1) for length in sampled_rows(config, history_lengths)]


def candidate_rows(config: TowerConfig, depth: int) -> tuple[int, int]:
    """Own tokens of one candidate in a layer: all of them, and those whose outputs are read."""
    G, R = config.num_candidate_tokens, config.copies
    return G * R, G if depth == config.num_self_layers else G * R


def _layer_flops(config: TowerConfig, keys: Sequence[int], queries: Sequence[int], counts: Sequence[int], depth: int
                 ) -> int:
    """Projections and FFN of the user's queries and the candidates' tokens; attention of both over the keys."""
    X, (own, read) = config.merged_width, candidate_rows(config, depth)
    per_query = 2 * X * X + 2 * config.ffn_multiple * X * X
    linear = (sum(keys) + own * sum(counts)) * 2 * X * X + (sum(queries) + read * sum(counts)) * per_query
    return 2 * linear + 4 * X * sum(key * (query + read * count)
                                    for key, query, count in zip(keys, queries, counts, strict=True))


def _hidden_flops(config: TowerConfig, keys: Sequence[int], hidden: Sequence[int], counts: Sequence[int], depth: int
                  ) -> int:
    """What a window adds: the users' hidden tokens, and candidates' attention to the newest of them."""
    if config.phd is None or not config.phd.window:
        return 0
    X, is_last = config.merged_width, depth == config.num_self_layers
    window = [min(rows, config.phd.window) for rows in hidden]
    per_candidate = config.num_candidate_tokens * (1 if is_last else config.copies - 1)
    seen = 4 * X * per_candidate * sum(count * rows for count, rows in zip(counts, window, strict=True))
    if is_last:
        return seen + 4 * X * X * sum(window)
    linear = 2 * sum(hidden) * (4 * X * X + 2 * config.ffn_multiple * X * X)
    return seen + linear + 4 * X * sum(rows * (key + rows) for rows, key in zip(hidden, keys, strict=True))


def _interaction_flops(config: TowerConfig, widths: InputWidths, num_candidates: int) -> int:
    interaction = config.interaction
    if interaction is None:
        return 0
    chain = [interaction.input_width(widths), *interaction.hidden]
    if interaction.placement != "none":
        chain.append(config.merged_width)
    return 2 * num_candidates * _chain(chain)


def _chain(widths: Sequence[int]) -> int:
    """Weights of a chain of linear layers."""
    return sum(left * right for left, right in zip(widths[:-1], widths[1:], strict=True))
