"""Bytes that the tower holds while it trains, by part: what autograd keeps between forward and backward.

Counted tensor by tensor, from the lengths of a batch alone: ``model/flops.py`` counts the same computation's work. At
the end of the forward pass of one logical worker everything counted here is alive, which is the peak of a step.
"""

from collections.abc import Collection, Sequence

from longer_rec.model.attention_plan import group_requests
from longer_rec.model.flops import candidate_rows, hidden_rows, layer_rows
from longer_rec.model.inputs import InputWidths
from longer_rec.model.interaction import NUM_EXTREMES
from longer_rec.model.longer import TowerConfig
from longer_rec.model.merge import PIECE_SLOTS
from longer_rec.model.norms import LayerNorms, layer_norms
from longer_rec.model.own_attention import own_mask

_INDEX = 8  # int64
_FULL = 4  # the residual stream and what norms keep stay fp32 under autocast
# Runs of equal values per event and match field, measured on completejourney (L = 1000).
_RUNS_PER_EVENT = 0.5


def tower_bytes(config: TowerConfig, widths: InputWidths, num_tasks: int, history_lengths: Sequence[int],
                candidate_counts: Sequence[int], recompute: Collection[str] = (), value_bytes: int = 4,
                attention_bytes: int | None = None) -> dict[str, int]:
    """Activations of one batch by part of ``LongerTower.parts``, and the user's "state", which lives until scored.

    ``value_bytes`` is the width of a matmul's operands (2 under bf16), ``attention_bytes`` that of queries, keys and
    values, the same if not given (4 under bf16 on a CPU, see ``model/linear.py``). A part that is recomputed keeps its
    inputs alone, but its largest module is there once while it runs again: it is listed as "recomputed".
    """
    count = _Counter(config, widths, num_tasks, history_lengths, candidate_counts, value_bytes,
                     attention_bytes or value_bytes)
    parts = count.parts()
    kept = {name: sum(inputs + (0 if name in recompute else rest) for inputs, rest in sizes)
            for name, sizes in parts.items()}
    again = max((rest for name in recompute for _, rest in parts.get(name, [])), default=0)
    return {**kept, "recomputed": again, "state": count.state()}


class _Counter:
    """The sizes that all parts share."""

    def __init__(self, config: TowerConfig, widths: InputWidths, num_tasks: int, history_lengths: Sequence[int],
                 candidate_counts: Sequence[int], value_bytes: int, attention_bytes: int) -> None:
        self.config, self.widths, self.num_tasks = config, widths, num_tasks
        self.value, self.attended = value_bytes, attention_bytes
        self.B, self.T, self.C = len(history_lengths), sum(history_lengths), sum(candidate_counts)
        self.counts = candidate_counts
        self.merged = [-(-length // config.merge_size) for length in history_lengths]
        self.item = sum(widths.item.values())
        self.layers = layer_rows(config, history_lengths)
        self.hidden = hidden_rows(config, history_lengths)
        window = config.phd.window if config.phd is not None else 0
        self.window = [min(rows, window) for rows in self.hidden]

    def parts(self) -> dict[str, list[tuple[int, int]]]:
        """(what it is given, what else it keeps) of each module of a part."""
        X = self.config.merged_width
        cross, *own = [[(_FULL * X * sum(keys), self._user_layer(keys, queries, depth)),
                        self._hidden_layer(keys, depth), self._candidate_layer(keys, depth)]
                       for depth, (keys, queries) in enumerate(self.layers)]
        # index_copy keeps what it copies: the events into groups, the merged tokens beside the globals.
        cross.append((_FULL * X * sum(self.layers[0][0]) if self.config.num_user_globals else 0, 0))
        # Of the head's inputs, the norm before it keeps its own.
        outputs = self.C * self.config.num_candidate_tokens + sum(self.layers[-1][1])
        head = (self._head_inputs() + outputs * _FULL * (X + 2), self._head())
        parts = {"input": [(0, self._input())], "merge": self._merge(), "cross": cross,
                 "self": [module for layer in own for module in layer], "head": [head]}
        if self.config.interaction is not None:
            parts["interaction"] = [(0, self._interaction())]
        return parts

    def state(self) -> int:
        """Keys and values of every layer, and the runs of matches."""
        caches = sum(2 * self.attended * sum(keys + self.window) * self.config.merged_width for keys, _ in self.layers)
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

    def _merge(self) -> list[tuple[int, int]]:
        """The events copied into groups, and each piece of InnerTrans."""
        config, inner = self.config, self.config.inner_trans
        if config.merge_size == 1:
            return [(0, 0)]
        copied = self.T * (_FULL * config.width + _INDEX)
        if inner is None:
            return [(copied, 0)]
        K, D, slots = config.merge_size, config.width, sum(self.merged) * config.merge_size
        weights = inner.num_heads * K * (_FULL + (self.attended if self.attended < _FULL else 0))
        # Attention: normed, q, k, v, mixed; FFN: normed, before and after its activation; the stream at both norms.
        layer = (3 * D * self.attended + (3 + 2 * inner.ffn_multiple) * D * self.value + weights + _FULL * (2 * D + 4))
        group, rest = _FULL * D, inner.num_layers * layer + D * self.value - _FULL * D
        most = max(PIECE_SLOTS // K, 1) * K
        pieces = [most] * (slots // most) + [slots % most]
        return [(copied, 0), *((size * group, size * rest) for size in pieces)]

    def _user_layer(self, keys: Sequence[int], queries: Sequence[int], depth: int) -> int:
        X, S, Q, norms = self.config.merged_width, sum(keys), sum(queries), layer_norms(self.config.norm, depth)
        size = S * (self._input_norm(norms) + 2 * self._head_norm(norms))
        if Q == 0:
            return size
        size += Q * (_INDEX + self.value * X) if Q < S else 0
        masked = depth == 0 and self.config.sampling not in ("recent", "all")
        size += Q * self._head_norm(norms) + self._attention(queries, keys, masked)
        return size + self._feed_forward(Q, norms)

    def _hidden_layer(self, keys: Sequence[int], depth: int) -> tuple[int, int]:
        """Of the users' hidden tokens."""
        norms, is_last = layer_norms(self.config.norm, depth), depth == self.config.num_self_layers
        X, N, W = self.config.merged_width, sum(self.hidden), sum(self.window)
        if is_last or N == 0:
            return _FULL * X * N, W * (self._input_norm(norms) + 2 * self._head_norm(norms) + _FULL * X + _INDEX)
        size = N * (self._input_norm(norms) + 3 * self._head_norm(norms) + self.value * X) + self._join(N)
        size += self._attention(self.hidden, keys, True) + self._attention(self.hidden, self.hidden, True)
        return _FULL * X * N, size + self._feed_forward(N, norms)

    def _input_norm(self, norms: LayerNorms) -> int:
        """A token's mean and deviation, and itself normalised."""
        return norms.input * (_FULL * 2 + self.value * self.config.merged_width)

    def _head_norm(self, norms: LayerNorms) -> int:
        """What is normalised, before and after its division by a root mean square a head, in fp32."""
        return norms.heads * _FULL * (2 * self.config.merged_width + self.config.heads)

    def _candidate_layer(self, keys: Sequence[int], depth: int) -> tuple[int, int]:
        config, norms = self.config, layer_norms(self.config.norm, depth)
        own, read = candidate_rows(config, depth)
        X, N, Q = config.merged_width, own * self.C, read * self.C
        mask = own_mask(config.num_candidate_tokens, config.copies, last_copy_alone=read < own)
        own_weights = self.C * config.heads * sum(len(rows) + 1 for rows in mask.seen)
        size = N * (self._input_norm(norms) + 2 * X * self.attended) + self.attended * (own_weights + 2 * Q * X)
        # Behind a norm the gate on own values is a product of its own.
        size += (2 * N + Q) * self._head_norm(norms) + N * norms.heads * self.attended * X
        size += self.value * Q * X if read < own else 0
        if sum(self.window):
            size += self._attention([mask.num_hidden * count for count in self.counts], self.window)
            size += self._join(mask.num_hidden * self.C) + self.attended * Q * X
        size += self._attention([read * count for count in self.counts], keys)
        return _FULL * X * N, size + self._feed_forward(Q, norms)

    def _join(self, rows: int) -> int:
        """Two log-sum-exps a head before and after their bound, their softmax in both widths, their sum."""
        return rows * self.config.heads * (7 * _FULL + 2 * self.attended * (self.attended < _FULL))

    def _attention(self, queries: Sequence[int], keys: Sequence[int], masked: bool = False) -> int:
        """Padded copies of queries, keys and values, the weights, a mask, the packed output, where each row lies."""
        X, H = self.config.merged_width, self.config.heads
        padded_queries = padded_keys = weights = 0
        for requests in group_requests(list(queries), list(keys), H):
            longest_query, longest_key = max(queries[one] for one in requests), max(keys[one] for one in requests)
            padded_queries += len(requests) * longest_query
            padded_keys += len(requests) * longest_key
            weights += len(requests) * longest_query * longest_key * H
        values = (padded_queries + 2 * padded_keys + sum(queries)) * X + weights
        index = _INDEX * H * (padded_queries + padded_keys + sum(queries) + sum(keys))
        return self.attended * values + index + masked * weights // H

    def _feed_forward(self, rows: int, norms: LayerNorms) -> int:
        X = self.config.merged_width
        return rows * ((1 + norms.output) * _FULL * (X + 2) + self.value * (1 + 2 * self.config.ffn_multiple) * X)

    def _interaction(self) -> int:
        interaction = self.config.interaction
        assert interaction is not None
        return self.value * self.C * (interaction.input_width(self.widths) + 2 * sum(interaction.hidden))

    def _head_inputs(self) -> int:
        candidate, user = self.config.head_widths(self.widths)
        return self.value * (self.C * candidate + self.B * user)

    def _head(self) -> int:
        return self.value * self.C * (2 * sum(self.config.head.hidden) + self.num_tasks) + _INDEX * self.C
