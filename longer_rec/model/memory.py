"""Bytes that the tower holds while it trains, by part: what autograd keeps between forward and backward.

Counted tensor by tensor, from the lengths of a batch alone: ``model/flops.py`` counts the same computation's work. At
the end of the forward pass of one logical worker everything counted here is alive, which is the peak of a step.
"""

from collections.abc import Collection, Sequence

from longer_rec.model.attention_plan import group_requests
from longer_rec.model.flops import layer_rows
from longer_rec.model.inputs import InputWidths
from longer_rec.model.interaction import NUM_EXTREMES, num_statistics
from longer_rec.model.longer import TowerConfig
from longer_rec.model.norms import LayerNorms, layer_norms

_INDEX = 8  # int64
_FULL = 4  # the residual stream and what norms keep stay fp32 under autocast
# Runs of equal values per event and match field, measured on completejourney (L = 1000).
_RUNS_PER_EVENT = 0.5


def tower_bytes(config: TowerConfig, widths: InputWidths, num_tasks: int, history_lengths: Sequence[int],
                candidate_counts: Sequence[int], recompute: Collection[str] = (), value_bytes: int = 4
                ) -> dict[str, int]:
    """Activations of one batch by part of ``LongerTower.parts``, and the user's "state", which lives until scored.

    ``value_bytes`` is the width of a matmul's operands (2 under bf16). A part that is recomputed keeps its inputs
    alone, but its largest module is there once while it runs again: it is listed as "recomputed".
    """
    count = _Counter(config, widths, num_tasks, history_lengths, candidate_counts, value_bytes)
    parts = count.parts()
    kept = {name: sum(inputs + (0 if name in recompute else rest) for inputs, rest in sizes)
            for name, sizes in parts.items()}
    again = max((rest for name in recompute for _, rest in parts.get(name, [])), default=0)
    return {**kept, "recomputed": again, "state": count.state()}


class _Counter:
    """The sizes that all parts share."""

    def __init__(self, config: TowerConfig, widths: InputWidths, num_tasks: int, history_lengths: Sequence[int],
                 candidate_counts: Sequence[int], value_bytes: int) -> None:
        self.config, self.widths, self.num_tasks, self.value = config, widths, num_tasks, value_bytes
        self.B, self.T, self.C = len(history_lengths), sum(history_lengths), sum(candidate_counts)
        self.candidates = [config.num_candidate_tokens * count for count in candidate_counts]
        self.N = sum(self.candidates)
        self.merged = [-(-length // config.merge_size) for length in history_lengths]
        self.item = sum(widths.item.values())
        self.layers = layer_rows(config, history_lengths)

    def parts(self) -> dict[str, list[tuple[int, int]]]:
        """(what it is given, what else it keeps) of each module of a part."""
        X = self.config.merged_width
        norms = [layer_norms(self.config.norm, depth) for depth in range(len(self.layers))]
        cross, *own = [[(_FULL * X * sum(keys), self._user_layer(keys, queries, norm)),
                        (_FULL * X * self.N, self._candidate_layer(keys, norm))]
                       for (keys, queries), norm in zip(self.layers, norms, strict=True)]
        cross.append((_FULL * X * sum(self.layers[0][0]) if self.config.num_user_globals else 0, 0))
        # index_copy keeps what it copies: the events into groups, the merged tokens beside the globals.
        merge = (_FULL * self.T * self.config.width if self.config.merge_size > 1 else 0, self._merge())
        # Of the head's inputs, the norm before it keeps its own.
        head = (self._head_inputs() + (self.N + sum(self.layers[-1][1])) * _FULL * (X + 2), self._head())
        parts = {"input": [(0, self._input())], "merge": [merge], "cross": cross,
                 "self": [module for layer in own for module in layer], "head": [head]}
        if self.config.interaction is not None:
            parts["interaction"] = [(0, self._interaction())]
        return parts

    def state(self) -> int:
        """Keys and values of every layer, and the runs of matches."""
        caches = sum(2 * self.value * sum(keys) * self.config.merged_width for keys, _ in self.layers)
        interaction = self.config.interaction
        if interaction is None:
            return caches
        num_decays, num_windows = len(interaction.decays), len(interaction.windows)
        row = _INDEX + _FULL * (NUM_EXTREMES + 2 * num_decays + num_windows)
        fields = len(interaction.fields or self.widths.item)
        return caches + int(_RUNS_PER_EVENT * fields * self.T * row)

    def _input(self) -> int:
        config, widths = self.config, self.widths
        event = self.item + sum(widths.event.values()) + config.age_width
        hidden = 2 * config.projection_hidden
        user = config.user_token * (sum(widths.user.values()) + widths.num_dense + 1)
        values = self.T * (event + hidden) + self.C * (self.item + hidden) + self.B * user
        return self.value * values + 2 * _INDEX * self.T

    def _merge(self) -> int:
        config, inner = self.config, self.config.inner_trans
        index = _INDEX * self.T if config.merge_size > 1 else 0
        if inner is None or config.merge_size == 1:
            return index
        K, D, slots = config.merge_size, config.width, sum(self.merged) * config.merge_size
        weights = inner.num_heads * K * (_FULL + (self.value if self.value < _FULL else 0))
        # Attention: normed, q, k, v, mixed; FFN: normed, before and after its activation; the stream at both norms.
        layer = slots * ((6 + 2 * inner.ffn_multiple) * D * self.value + weights + _FULL * (2 * D + 4))
        return index + inner.num_layers * layer + slots * D * self.value

    def _user_layer(self, keys: Sequence[int], queries: Sequence[int], norms: LayerNorms) -> int:
        X, S, Q = self.config.merged_width, sum(keys), sum(queries)
        size = S * (self._input_norm(norms) + 2 * self._head_norm(norms))
        if Q == 0:
            return size
        size += Q * (_INDEX + self.value * X) if Q < S else 0
        return size + Q * self._head_norm(norms) + self._attention(queries, keys) + self._feed_forward(Q, norms)

    def _candidate_layer(self, keys: Sequence[int], norms: LayerNorms) -> int:
        config, N = self.config, self.N
        X, G = config.merged_width, config.num_candidate_tokens
        own_weights = self.C * config.heads * sum(own + 2 for own in range(G))
        size = N * (self._input_norm(norms) + 3 * X * self.value) + self.value * (own_weights + N * X)
        # Behind a norm the gate on own values is a product of its own.
        size += N * (3 * self._head_norm(norms) + norms.heads * self.value * X)
        return size + self._attention(self.candidates, keys) + self._feed_forward(N, norms)

    def _input_norm(self, norms: LayerNorms) -> int:
        """A token's mean and deviation, and itself normalised."""
        return norms.input * (_FULL * 2 + self.value * self.config.merged_width)

    def _head_norm(self, norms: LayerNorms) -> int:
        """What is normalised, before and after its division by a root mean square a head, in fp32."""
        return norms.heads * _FULL * (2 * self.config.merged_width + self.config.heads)

    def _attention(self, queries: Sequence[int], keys: Sequence[int]) -> int:
        """Padded copies of queries, keys and values, the weights, the packed output, and where each row lies."""
        X, H = self.config.merged_width, self.config.heads
        padded_queries = padded_keys = weights = 0
        for requests in group_requests(list(queries), list(keys), H):
            longest_query, longest_key = max(queries[one] for one in requests), max(keys[one] for one in requests)
            padded_queries += len(requests) * longest_query
            padded_keys += len(requests) * longest_key
            weights += len(requests) * longest_query * longest_key * H
        values = (padded_queries + 2 * padded_keys + sum(queries)) * X + weights
        return self.value * values + _INDEX * H * (padded_queries + padded_keys + sum(queries) + sum(keys))

    def _feed_forward(self, rows: int, norms: LayerNorms) -> int:
        X = self.config.merged_width
        return rows * ((1 + norms.output) * _FULL * (X + 2) + self.value * (1 + 2 * self.config.ffn_multiple) * X)

    def _interaction(self) -> int:
        interaction, widths = self.config.interaction, self.widths
        assert interaction is not None
        context = sum(widths.item[name] for name in interaction.context) + widths.num_item_dense
        statistics = num_statistics(interaction, len(interaction.fields or widths.item)) + context
        return self.value * self.C * (statistics + 2 * sum(interaction.hidden))

    def _head_inputs(self) -> int:
        config, widths, X = self.config, self.widths, self.config.merged_width
        has_ids = config.head.id_scale > 0
        candidate = config.num_candidate_tokens * X + has_ids * self.item + widths.num_item_dense
        if config.interaction is not None and config.interaction.to_head:
            candidate += config.interaction.hidden[-1]
        user = (config.num_read_globals + config.reads_sequence) * X
        user += has_ids * sum(widths.user.values()) + widths.num_dense
        return self.value * (self.C * candidate + self.B * user)

    def _head(self) -> int:
        return self.value * self.C * (2 * sum(self.config.head.hidden) + self.num_tasks) + _INDEX * self.C
