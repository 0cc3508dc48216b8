"""The LONGER tower: token merge, one cross-causal layer, N self-causal layers, head.

In chronological order a request is [merged events ; user globals ; candidate globals] under a bottom-right-aligned
causal mask. ``encode`` runs everything left of the candidates and keeps each layer's keys and values; ``score`` runs
the candidates' tokens against them. Source: LONGER, arXiv 2505.04421; the candidate globals stand last, so that the
user's side never depends on a candidate.
"""

from dataclasses import replace
from typing import Literal, cast

import pydantic
import torch
from torch import Tensor, nn

from longer_rec.config import Config
from longer_rec.errors import ConfigError
from longer_rec.model.compressor import CompressConfig
from longer_rec.model.head import Head, HeadConfig, scaled_inputs
from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide, all_ages, keep_newest
from longer_rec.model.instances import InstanceTokensConfig, build_instances
from longer_rec.model.interaction import InteractionConfig, build_interaction
from longer_rec.model.jagged import request_of, rows_after
from longer_rec.model.layers import CausalLayer
from longer_rec.model.linear import Linear
from longer_rec.model.merge import InnerTransConfig, TokenMerge
from longer_rec.model.norms import LayerInit, NormKind, NormPlace, build_norm, layer_norms
from longer_rec.model.own_attention import own_mask
from longer_rec.model.phd import HiddenCopies, PHDConfig, check_phd
from longer_rec.model.sampling import DEFAULT_QUERIES, Queries, Sampling, check_sampling, fewest_events, newest, sample
from longer_rec.model.state import LayerCache, UserState
from longer_rec.model.tokens import EventTokens, UserGlobals, age_bucket

_SIDES = ("encode", "encode_hidden", "score", "score_and_count")


class TowerConfig(Config):
    """D = ``width``, K = ``merge_size``, X = K * D.

    ``num_heads`` 0 means K, the fewest that match slot by slot. With h * K of them the heads of a slot start as
    matchers of different item features, while there are as many: the item, and what it is.
    """

    kind: Literal["longer"] = "longer"
    width: int = pydantic.Field(32, ge=1)
    merge_size: int = pydantic.Field(2, ge=1)
    inner_trans: InnerTransConfig | None = None
    sampling: Sampling = "recent"
    num_queries: int = pydantic.Field(DEFAULT_QUERIES, ge=0, description="sequence tokens that are queries")
    num_self_layers: int = pydantic.Field(1, ge=0)
    num_heads: int = pydantic.Field(0, ge=0)
    ffn_multiple: int = pydantic.Field(4, ge=1)
    dropout: float = pydantic.Field(0.0, ge=0.0, lt=1.0)
    norm: NormPlace = "pre"
    norm_kind: NormKind = "layer"
    layer_init: LayerInit | None = pydantic.Field(None, description="null: megatron for hybrid norms, else plain")
    count_matches: bool = pydantic.Field(False, description="the head reads what each cross-layer head found")
    matcher_gamma: float = pydantic.Field(2.0, ge=0.0, description="W_q, W_k start as this times I; 0: random start")
    projection_hidden: int = pydantic.Field(0, ge=0, description="hidden width of the input projection; 0: linear")
    age_buckets: int = pydantic.Field(64, ge=2)
    age_width: int = pydantic.Field(8, ge=1)
    user_token: bool = True
    num_cls_tokens: int = pydantic.Field(0, ge=0)
    interaction: InteractionConfig | None = None
    head: HeadConfig = HeadConfig()
    pooling: Literal["candidate", "globals", "globals+mean"] = "globals"
    phd: PHDConfig | None = None
    compress: CompressConfig | None = pydantic.Field(None, description="a source model of instance tokens")
    instances: InstanceTokensConfig | None = None

    @property
    def merged_width(self) -> int:
        return self.merge_size * self.width

    @property
    def heads(self) -> int:
        return self.num_heads or self.merge_size

    def heads_by_field(self, num_features: int) -> int:
        """Heads of a slot that start as matchers of features of their own; 1: all of them compare whole tokens."""
        per_slot = self.heads // self.merge_size if self.heads % self.merge_size == 0 else 1
        return per_slot if per_slot <= num_features and self.matcher_gamma and not self.projection_hidden else 1

    @property
    def megatron_layers(self) -> int:
        """Layers among which Megatron's start divides the stream; 0 where layers start as PyTorch starts them."""
        init = self.layer_init or ("megatron" if self.norm.startswith("hybrid") else "plain")
        return (1 + self.num_self_layers) * (init == "megatron")

    @property
    def num_candidate_tokens(self) -> int:
        return 2 if self.interaction is not None and self.interaction.placement == "token" else 1

    @property
    def copies(self) -> int:
        """R of parallel hidden decoding; 1 without it."""
        return 1 if self.phd is None else self.phd.copies

    @property
    def num_user_globals(self) -> int:
        return int(self.user_token) + self.num_cls_tokens

    @property
    def num_read_globals(self) -> int:
        """User globals whose outputs the head reads."""
        return 0 if self.pooling == "candidate" else self.num_user_globals

    @property
    def fewest_events(self) -> int:
        """The least ``max_events`` that the tower can be built for."""
        return fewest_events(self.sampling, self.num_queries, self.merge_size)

    @property
    def reads_sequence(self) -> bool:
        return self.pooling == "globals+mean"

    def head_widths(self, widths: InputWidths) -> tuple[int, int]:
        """Of all that the head reads, of a candidate and of a user."""
        candidate, user = self.head.raw_widths(widths)
        if self.interaction is not None and self.interaction.to_head:
            candidate += self.interaction.width
        if self.instances is not None:
            candidate += self.instances.out_width
        candidate += self.count_matches * self.heads
        return (candidate + self.num_candidate_tokens * self.merged_width,
                user + (self.num_read_globals + self.reads_sequence) * self.merged_width)


class LongerTower(nn.Module):
    """``encode`` a user once, ``score`` any number of candidates against it."""

    def __init__(self, config: TowerConfig, widths: InputWidths, num_tasks: int, max_events: int) -> None:
        super().__init__()
        _check(config, widths, max_events)
        self.config, self.max_events = config, max_events
        X = config.merged_width
        self.item_names, self.user_names = tuple(widths.item), tuple(widths.user)
        self.tokens = EventTokens(widths, config.width, config.merge_size, config.projection_hidden, max_events,
                                  config.age_buckets, config.age_width)
        if (num_blocks := config.heads_by_field(len(widths.item))) > 1:
            self.tokens.start_by_field(num_blocks)
        self.merge = TokenMerge(config.width, config.merge_size, config.inner_trans)
        self.globals = UserGlobals(widths, X, config.user_token, config.num_cls_tokens)
        if config.sampling == "learnable":
            self.learned = nn.Parameter(torch.randn(config.num_queries, X) * 0.3)
        self.layers = nn.ModuleList(
            CausalLayer(X, config.heads, config.ffn_multiple, config.dropout, config.norm_kind, config.matcher_gamma,
                        layer_norms(config.norm, depth), config.megatron_layers)
            for depth in range(1 + config.num_self_layers))
        self.copies = HiddenCopies(config.phd or PHDConfig(copies=1), X)
        self.final_norm = build_norm(config.norm_kind, X)
        self.interaction = build_interaction(config.interaction, widths)
        if config.interaction is not None and config.interaction.placement != "none":
            self.interaction_token = Linear(config.interaction.width, X)
        self.instances = build_instances(config.instances, widths, self.interaction)
        if config.instances is not None:
            self.instance_token = Linear(config.instances.out_width, X)
        self.head = Head(config.head, *config.head_widths(widths), num_tasks, config.compress)

    @property
    def causal_layers(self) -> list[CausalLayer]:
        """Cross-causal first, then the self-causal ones."""
        return cast(list[CausalLayer], list(self.layers))

    def parts(self) -> dict[str, list[tuple[nn.Module, str]]]:
        """Modules and their methods by part of the tower: what can be recomputed, and measured, by itself."""
        cross, *own = self.causal_layers
        parts: dict[str, list[tuple[nn.Module, str]]] = {
            "input": [(self.tokens, "events"), (self.tokens, "candidates"), (self.globals, "forward")],
            "merge": [(self.merge, "forward")] if self.merge.inner is None else [(self.merge.inner, "piece")],
            "cross": [(cross, method) for method in _SIDES],
            "self": [(layer, method) for layer in own for method in _SIDES],
            "head": [(self.head, "encode"), (self.head, "forward")]}
        if self.interaction is not None:
            parts["interaction"] = [(self.interaction, "score")]
        if self.instances is not None:
            parts["instances"] = [(self.instances, "encode"), (self.instances, "score")]
        return parts

    def encode(self, user: UserSide) -> UserState:
        """The user's side: keys and values of each layer, the user's share of the head, the runs of matches."""
        user = keep_newest(user, self.max_events)
        merged_MX, merged_length_B = self.merge(self.tokens.events(user), user.length_B)
        token_SX = append_globals(merged_MX, merged_length_B, self.globals(user))
        length_B = merged_length_B + self.config.num_user_globals
        if self.config.sampling == "learnable":
            token_SX = torch.cat([token_SX, self.learned.to(token_SX.dtype)])
        sampled = sample(self.config.sampling, length_B, self.config.num_user_globals, self.config.num_queries)
        hidden_UX, chunk = self.copies.of_queries(token_SX, length_B, sampled, self.config.num_user_globals)
        caches: list[LayerCache] = []
        for depth, layer in enumerate(self.causal_layers):
            is_last = depth == self.config.num_self_layers
            queries = sampled if depth == 0 else Queries(length_B)
            if is_last and not self.config.reads_sequence:
                queries = newest(length_B, torch.full_like(length_B, self.config.num_read_globals))
            token_SX, cache = layer.encode(token_SX, length_B, queries)
            if chunk is not None:
                hidden_UX, window = layer.encode_hidden(hidden_UX, cache, chunk, chunk.position_U(depth, is_last))
                cache = replace(cache, window=window)
            length_B = queries.length_B
            caches.append(cache)
        runs = self.interaction.encode(user) if self.interaction is not None else None
        return UserState(self._encode_head(user, self.final_norm(token_SX), length_B), tuple(caches), runs,
                         instances=self.instances.encode(user) if self.instances is not None else None,
                         past=user.instances if self.head.compressor is not None else None)

    def score(self, state: UserState, candidates: CandidateSide) -> Tensor:
        """Logits C x Y."""
        num_candidates = candidates.id[self.item_names[0]].numel()
        token_CX = self.tokens.candidates(candidates)
        parts, tokens, statistics = [], [token_CX], []
        if self.interaction is not None and state.matches is not None:
            hidden = self.interaction.score(state.matches, candidates)
            statistics.append(hidden)
            if self.config.num_candidate_tokens == 2:
                tokens.insert(0, self.interaction_token(hidden).to(token_CX.dtype))
            elif self.interaction.config.placement == "added":
                tokens = [token_CX + self.interaction_token(hidden)]
            if self.interaction.config.to_head:
                parts.append(hidden)
        if self.instances is not None and state.instances is not None:
            recalled = self.instances.score(state.instances, candidates, statistics)
            tokens[-1] = tokens[-1] + self.instance_token(recalled)
            parts.append(recalled)
        token_CGX = self.copies.of_candidates(torch.stack(tokens, dim=1))
        for depth, (layer, cache) in enumerate(zip(self.causal_layers, state.layers, strict=True)):
            mask = own_mask(len(tokens), self.config.copies, last_copy_alone=depth == self.config.num_self_layers)
            if depth == 0 and self.config.count_matches:
                token_CGX, matches_CH = layer.score_and_count(token_CGX, cache, candidates.length_B, mask)
                parts.append(matches_CH)
            else:
                token_CGX = layer.score(token_CGX, cache, candidates.length_B, mask)
        parts.append(self.final_norm(token_CGX).flatten(1))
        parts += scaled_inputs(candidates.embedding, self.item_names, self.config.head.id_scale)
        parts.append(candidates.dense_CF.to(token_CX.dtype))
        request_C = request_of(candidates.length_B, num_candidates)
        return self.head(torch.cat(parts, dim=1), state.head_BF, request_C, state.past)

    def retime(self, state: UserState, age_T: Tensor, user: UserSide) -> UserState | None:
        """``state`` of the same events at another request time, bitwise what ``encode`` gives; None if it needs that.

        ``age_T`` are the ages when the state was made, of the one request's events and then of its instances. Keys,
        values and the head's share read an age through its bucket alone, so they hold until one changes its bucket;
        matches are counted anew.
        """
        now_T, = all_ages(user)
        readers = [self.tokens] if self.instances is None else [self.tokens, self.instances.side]
        for reader in readers:
            boundary = reader.get_buffer("age_boundary")
            if not torch.equal(age_bucket(age_T, boundary), age_bucket(now_T, boundary)):
                return None
        runs = self.interaction.encode(user) if self.interaction is not None else None
        return replace(state, matches=runs)

    def _encode_head(self, user: UserSide, output_QX: Tensor, length_B: Tensor) -> Tensor:
        B, num_globals = length_B.numel(), self.config.num_read_globals
        end_B = length_B.cumsum(0)
        row_BG = end_B.unsqueeze(1) - num_globals + torch.arange(num_globals, device=end_B.device)
        parts = [output_QX.index_select(0, row_BG.flatten()).view(B, num_globals * self.config.merged_width)]
        if self.config.reads_sequence:
            sequence = torch.ones(output_QX.shape[0], 1, device=output_QX.device, dtype=output_QX.dtype)
            sequence = sequence.index_fill(0, row_BG.flatten(), 0.0)
            request_Q = request_of(length_B, output_QX.shape[0])
            total = output_QX.new_zeros(B, output_QX.shape[1]).index_add(0, request_Q, output_QX * sequence)
            parts.append(total / (length_B - num_globals).clamp(min=1).unsqueeze(1))
        parts += scaled_inputs(user.user_embedding, self.user_names, self.config.head.id_scale)
        parts.append(user.dense_BF.to(output_QX.dtype))
        return self.head.encode(torch.cat(parts, dim=1))


def append_globals(merged_MX: Tensor, length_B: Tensor, global_BGX: Tensor) -> Tensor:
    """[merged events ; user globals] of each request, packed."""
    G = global_BGX.shape[1]
    if G == 0:
        return merged_MX
    merged_row, global_row = rows_after(length_B, G)
    global_rows = global_BGX.flatten(0, 1)
    joined = merged_MX.new_zeros(merged_MX.shape[0] + global_rows.shape[0], merged_MX.shape[1])
    return joined.index_copy(0, merged_row, merged_MX).index_copy(0, global_row, global_rows.to(joined.dtype))


def _check(config: TowerConfig, widths: InputWidths, max_events: int) -> None:
    check_sampling(config.sampling, config.num_queries, config.num_self_layers, config.reads_sequence,
                   config.merge_size, max_events)
    if config.phd is not None:
        check_phd(config.phd, config.sampling, config.num_queries, -(-max_events // config.merge_size))
    X, H = config.merged_width, config.heads
    if X % H:
        divisors = [heads for heads in range(1, X + 1) if X % heads == 0]
        raise ConfigError(f"model.num_heads={H} does not divide the merged width {X} (width {config.width} x "
                          f"merge_size {config.merge_size}); use one of {divisors}")
    if config.inner_trans is not None and config.width % config.inner_trans.num_heads:
        raise ConfigError(f"model.inner_trans.num_heads={config.inner_trans.num_heads} does not divide model.width="
                          f"{config.width}; choose a divisor")
    if config.inner_trans is not None and config.merge_size == 1:
        raise ConfigError("model.inner_trans needs groups of more than one event: set model.merge_size above 1 or "
                          "model.inner_trans to null")
    if config.norm == "hybrid_star" and config.num_self_layers == 0:
        raise ConfigError("model.norm=hybrid_star norms its first layer unlike the others and model.num_self_layers=0 "
                          "leaves no other; set model.num_self_layers to 1 or more, or model.norm to hybrid")
    if not widths.item:
        raise ConfigError("the tower needs at least one item feature; add one to the schema")
