"""``tower_ref``: LONGER as the paper draws it, slow and obvious.

One candidate at a time, no cache, no packing: [merged events ; user globals ; candidate globals] goes through plain
layers under one explicit mask. It shares with the fast path its weights, the user's globals and ``describe``.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longer_rec.model.inputs import CandidateSide, UserSide
from longer_rec.model.interaction import NUM_EXTREMES, USER_CENTER, USER_SCALE, Interaction, InteractionConfig
from longer_rec.model.layers import CausalLayer
from longer_rec.model.longer import LongerTower
from longer_rec.model.norms import NormPlace
from longer_rec.model.phd import PHDConfig
from tests.reference.attention import merge_ref


def tower_ref(tower: LongerTower, user: UserSide, candidates: CandidateSide) -> Tensor:
    """Twin of ``tower.score(tower.encode(user), candidates)``."""
    logits = [_one_candidate(tower, *each) for each in each_candidate(user, candidates, tower.max_events)]
    return torch.cat(logits) if logits else next(tower.parameters()).new_zeros(0, 1)


def each_candidate(user: UserSide, candidates: CandidateSide, max_events: int
                   ) -> Iterator[tuple[UserSide, CandidateSide]]:
    """Each candidate alone, with its request's user."""
    row = 0
    for request in range(user.length_B.numel()):
        alone = one_request(user, request, max_events)
        for _ in range(int(candidates.length_B[request])):
            yield alone, one_candidate(candidates, row)
            row += 1


def one_request(user: UserSide, request: int, max_events: int) -> UserSide:
    """Request ``request`` of a batch, its history cut to the newest ``max_events``."""
    end = int(user.length_B[:request + 1].sum())
    start = max(end - int(user.length_B[request]), end - max_events)
    return UserSide({name: value[start:end] for name, value in user.event_embedding.items()},
                    {name: value[start:end] for name, value in user.event_id.items()},
                    user.age_T[start:end], torch.tensor([end - start]),
                    {name: value[request:request + 1] for name, value in user.user_embedding.items()},
                    user.dense_BF[request:request + 1])


def one_candidate(candidates: CandidateSide, row: int) -> CandidateSide:
    """Candidate ``row`` alone in a request."""
    return CandidateSide({name: value[row:row + 1] for name, value in candidates.embedding.items()},
                         {name: value[row:row + 1] for name, value in candidates.id.items()},
                         candidates.dense_CF[row:row + 1], torch.tensor([1]))


def _one_candidate(tower: LongerTower, user: UserSide, candidate: CandidateSide) -> Tensor:
    config, scale = tower.config, tower.config.head.id_scale
    merged_MX, _ = merge_ref(tower.merge, event_tokens(tower, user), user.length_B)
    globals_GX = tower.globals(user)[0]
    own, head_inputs = [candidate_token(tower, candidate)], []
    if tower.interaction is not None:
        hidden = interaction_ref(tower.interaction, user, candidate)
        if config.num_candidate_tokens == 2:
            own.insert(0, tower.interaction_token(hidden))
        elif tower.interaction.config.placement == "added":
            own[0] = own[0] + tower.interaction_token(hidden)
        if tower.interaction.config.to_head:
            head_inputs.append(hidden)
    steps = layer_steps(tower, merged_MX, globals_GX, own)
    num_sequence, num_globals, num_own = len(steps[-1].sampled), len(globals_GX), len(own)
    output_QX = tower.final_norm(steps[-1].output_QX)
    sequence, user_out = output_QX[:num_sequence], output_QX[num_sequence:num_sequence + num_globals]
    own_out = output_QX[-num_own:]
    if config.count_matches:
        head_inputs.append(matches_ref(tower, steps[0]))
    item = torch.cat([candidate.embedding[name] for name in tower.item_names], dim=1) * scale
    candidate_inputs = [*head_inputs, own_out.reshape(1, -1), *([item] if scale else []),
                        candidate.dense_CF.to(output_QX.dtype)]
    user_inputs = [user_out.reshape(1, -1)] if config.pooling != "candidate" else []
    if config.pooling == "globals+mean":
        user_inputs.append(sequence.sum(0, keepdim=True) / max(num_sequence, 1))
    if scale:
        user_inputs += [user.user_embedding[name] * scale for name in tower.user_names]
    user_inputs.append(user.dense_BF.to(output_QX.dtype))
    head = tower.head
    weight = torch.cat([head.candidate.weight, head.user.weight], dim=1)
    hidden = torch.cat([*candidate_inputs, *user_inputs], dim=1) @ weight.T + head.candidate.bias
    for linear in head.rest:
        hidden = linear(torch.nn.functional.silu(hidden))
    return hidden


def event_tokens(tower: LongerTower, user: UserSide) -> Tensor:
    tokens = tower.tokens
    events = []
    num_events = user.age_T.numel()
    for i in range(num_events):
        parts = [user.event_embedding[name][i] for name in (*tokens.item_names, *tokens.event_names)]
        bucket = int((tokens.get_buffer("age_boundary") <= float(user.age_T[i])).sum())
        parts.append(tokens.age.weight[bucket])
        events.append(tokens.rest(tokens.first(torch.cat(parts))) + tokens.position.weight[num_events - 1 - i])
    return torch.stack(events) if events else tokens.position.weight[:0]


def candidate_token(tower: LongerTower, candidate: CandidateSide) -> Tensor:
    tokens = tower.tokens
    parts = [*(candidate.embedding[name][0] for name in tokens.item_names), tokens.absent]
    slot = tokens.rest(tokens.first(torch.cat(parts)))
    return (torch.cat([slot] * tokens.merge_size) + tokens.candidate_type).unsqueeze(0)


@dataclass
class Step:
    """One layer: its keys, who sees them, and what came out.

    Queries and keys stand as originals in order of position, the users' hidden tokens, a candidate's; so the last
    queries are the last copies of its own tokens. ``event_S``: the merged event that a key is, None where it is none.
    ``sampled``: positions of the sequence's queries in the cross layer.
    """

    token_SX: Tensor
    seen_QS: Tensor
    is_own_S: Tensor
    event_S: list[int | None]
    sampled: list[int]
    output_QX: Tensor
    score_HQS: Tensor


def matches_ref(tower: LongerTower, cross: Step) -> Tensor:
    """log(1 + n) of each head of the cross layer, 1 x H: the request's weights over the last query's own, summed."""
    counts = []
    for score_QS in cross.score_HQS:
        weights = score_QS[-1].exp()
        shared = weights[cross.seen_QS[-1] & ~cross.is_own_S].sum()
        counts.append(torch.log(1 + shared / weights[-1]))
    return torch.stack(counts).unsqueeze(0)


def layer_steps(tower: LongerTower, merged_MX: Tensor, globals_GX: Tensor, own: list[Tensor]) -> list[Step]:
    """One candidate's whole sequence, hidden copies and all, layer by layer."""
    config, num_events, num_own = tower.config, merged_MX.shape[0], len(own)
    token_SX = torch.cat([merged_MX, globals_GX, *own])
    sampled = positions_ref(config.sampling, num_events, config.num_queries)
    learned = config.sampling == "learnable"
    query_QX = torch.cat([tower.learned[:len(sampled)] if learned else token_SX[sampled], token_SX[num_events:]])
    positions = [*sampled, *range(num_events, token_SX.shape[0])]
    event_S: list[int | None] = [*range(num_events), *[None] * (token_SX.shape[0] - num_events)]
    # Hidden tokens as (place among the queries, copy).
    phd, copies = config.phd or PHDConfig(copies=1), range(2, config.copies + 1)
    chunk = [(place, copy) for place in range(len(sampled))[-phd.chunk:] for copy in copies if phd.chunk]
    hidden = chunk + [(place, copy) for copy in copies for place in range(len(positions))[-num_own:]]
    embedding = tower.copies.embedding
    hidden_UX = torch.stack([query_QX[place] if embedding is None else query_QX[place] + embedding[copy - 2]
                             for place, copy in hidden]) if hidden else query_QX[:0]
    steps = []
    for depth, layer in enumerate(tower.causal_layers):
        placed = [(positions[place], copy) for place, copy in hidden]
        keys = [(position, 1) for position in range(token_SX.shape[0])] + placed
        queries = [(position, 1) for position in positions] + placed
        is_own_S = torch.tensor([position >= token_SX.shape[0] - num_own for position, _ in keys])
        seen_QS = torch.tensor([[sees(query, key, placed[:len(chunk)], phd.window) for key in keys]
                                for query in queries])
        key_SX = torch.cat([token_SX, hidden_UX])
        score_HQS: list[Tensor] = []
        both_QX = layer_ref(layer, config.norm, depth == 0, torch.cat([query_QX, hidden_UX]), key_SX, seen_QS, is_own_S,
                            score_HQS)
        steps.append(Step(key_SX, seen_QS, is_own_S, event_S + [None] * len(hidden), sampled, both_QX,
                          torch.stack(score_HQS)))
        query_QX, hidden_UX = both_QX.split([len(positions), len(hidden)])
        if depth == 0:
            event_S = [None if learned and place < len(sampled) else event_S[position]
                       for place, position in enumerate(positions)]
        token_SX, positions = query_QX, list(range(len(positions)))
    return steps


def sees(query: tuple[int, int], key: tuple[int, int], chunk: list[tuple[int, int]], window: int) -> bool:
    """Whether copy j of position n sees copy i of position m; ``chunk``: the users' hidden tokens, oldest first."""
    (n, j), (m, i) = query, key
    if m == n:
        return i <= j
    if m > n or i == 1:
        return m < n
    before = [hidden for hidden in chunk if hidden[0] < n]
    return j > 1 and key in before[len(before) - min(window, len(before)):]


def layer_ref(layer: CausalLayer, place: NormPlace, is_first: bool, query_QX: Tensor, token_SX: Tensor,
           seen_QS: Tensor, is_own_S: Tensor, scores: list[Tensor] | None = None) -> Tensor:
    """Queries through one layer under an explicit mask; ``is_own_S``: a candidate's own tokens.

    ``scores`` takes those of each head, Q x S.
    """
    is_pre = place == "pre" or (place == "hybrid_star" and is_first)
    query_w, key_w, value_w = layer.qkv.weight.split(token_SX.shape[1])
    read_QX, read_SX = (layer.attention_norm(each) if is_pre else each for each in (query_QX, token_SX))
    heads = []
    for head in range(layer.num_heads):
        part = slice(head * layer.head_width, (head + 1) * layer.head_width)
        query, key, value = read_QX @ query_w[part].T, read_SX @ key_w[part].T, read_SX @ value_w[part].T
        if place in ("hybrid", "hybrid_star"):
            query, key, value = (_rms(each, norm.weight) for each, norm in (
                (query, layer.query_norm), (key, layer.key_norm), (value, layer.value_norm)))
        value = torch.where(is_own_S.unsqueeze(1), value * layer.own_gain[part], value)
        score = query @ key.T / math.sqrt(layer.head_width)
        if scores is not None:
            scores.append(score)
        heads.append(score.masked_fill(~seen_QS, -math.inf).softmax(-1) @ value)
    token_QX = query_QX + layer.proj(torch.cat(heads, dim=1))
    normed_QX = layer.ffn_norm(token_QX)
    ffn_QX = layer.down(torch.nn.functional.silu(layer.up(normed_QX)))
    if is_pre:
        return token_QX + ffn_QX
    return layer.output_norm(normed_QX + ffn_QX) if place == "post" else normed_QX + ffn_QX


def _rms(value: Tensor, weight: Tensor) -> Tensor:
    return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def positions_ref(sampling: str, num_merged: int, num_queries: int) -> list[int]:
    """Twin of ``sampling.sample`` for one history: the position of every query, in chronological order."""
    if sampling == "learnable":
        return [num_merged - 1] * num_queries if num_merged else []
    kept = num_merged if sampling == "all" else min(num_queries, num_merged)
    recent = {"uniform": 0, "recent_uniform": min(num_queries // 2, kept)}.get(sampling, kept)
    back = list(range(recent))
    back += [recent + j * (num_merged - recent) // (kept - recent) for j in range(kept - recent)]
    return sorted(num_merged - 1 - each for each in back)


def interaction_ref(module: Interaction, user: UserSide, candidate: CandidateSide) -> Tensor:
    raw, totals = statistics_ref(module, user, candidate)
    hidden = describe_ref(module.config, raw, totals).to(module.dtype)
    hidden = torch.cat([hidden, *(candidate.embedding[name] for name in module.config.context),
                        candidate.dense_CF.to(module.dtype)], dim=1)
    for linear in module.linears:
        hidden = torch.nn.functional.silu(linear(hidden))
    return hidden


def describe_ref(config: InteractionConfig, raw: Tensor, user_CF: Tensor) -> Tensor:
    """Twin of ``describe``, statistic by statistic."""
    newest_age, oldest_age, newest_basket, oldest_basket, position, baskets = raw[..., :NUM_EXTREMES].unbind(-1)
    num_counts = len(config.decays) + len(config.windows)
    counts = raw[..., NUM_EXTREMES:NUM_EXTREMES + num_counts]
    basket_counts = raw[..., NUM_EXTREMES + num_counts:]
    events, all_baskets = user_CF[:, 0], user_CF[:, 1]
    matched = (baskets > 0).to(raw.dtype)
    repeated = (baskets > 1).to(raw.dtype)
    gaps = (baskets - 1).clamp(min=1)
    period = newest_age / ((oldest_age - newest_age) / gaps).clamp(min=0.02) * repeated
    basket_period = (newest_basket + 1) / ((oldest_basket - newest_basket) / gaps).clamp(min=0.5) * repeated
    regularity = baskets / (oldest_basket + 1) * matched
    share = counts[..., -1] / (events + 5)
    basket_share = baskets / (all_baskets + 1)
    columns = [
        matched,
        ((newest_age.log1p() * matched + 4 * (1 - matched)) - 2) / 1.5,
        (oldest_age.log1p() - 2) / 1.5,
        ((newest_basket.log1p() * matched + 5.7 * (1 - matched)) - 3) / 2,
        ((position.log1p() * matched + 7.6 * (1 - matched)) - 4) / 2.5,
        baskets.log1p() - 0.7,
        period.log1p().clamp(max=4) - 0.5,
        basket_period.log1p().clamp(max=4) - 0.5,
        repeated,
        regularity * 2,
        ((regularity + 0.01).log() + 3) / 1.5,
        ((share + 1e-3).log() + 5) / 1.5,
        ((basket_share + 1e-2).log() + 3.5) / 1.2,
        basket_share * 3,
    ]
    described = torch.cat([torch.stack(columns, dim=-1), ((4 * counts).log1p() - 1.5) / 1.5,
                           ((4 * basket_counts).log1p() - 1.5) / 1.5], dim=-1)
    centre, scale = (torch.tensor(values, dtype=raw.dtype) for values in (USER_CENTER, USER_SCALE))
    totals = (user_CF.log1p() - centre) / scale
    return torch.cat([described.transpose(0, 1).flatten(1), totals], dim=1)


def statistics_ref(module: Interaction, user: UserSide, candidate: CandidateSide) -> tuple[Tensor, Tensor]:
    """Raw statistics (J x 1 x raw) and user totals (1 x 4) of one candidate, event by event."""
    config = module.config
    ages = [float(age) / config.unit_s for age in user.age_T]
    times = sorted({int(age) for age in user.age_T})
    baskets = [times.index(int(age)) for age in user.age_T]
    positions = [len(ages) - 1 - i for i in range(len(ages))]
    rows: list[list[float]] = []
    for name in module.fields:
        wanted = int(candidate.id[name][0])
        hit = [i for i, value in enumerate(user.event_id[name].tolist()) if value == wanted and wanted > 0]
        if not hit:
            rows.append([0.0] * (6 + 2 * len(config.decays) + len(config.windows)))
            continue
        first_of_basket = [i for i in hit if not any(j < i and baskets[j] == baskets[i] for j in hit)]
        rows.append([ages[hit[-1]], ages[hit[0]], baskets[hit[-1]], baskets[hit[0]], positions[hit[-1]],
                     len(first_of_basket), *(sum(math.exp(-ages[i] / tau) for i in hit) for tau in config.decays),
                     *(sum(positions[i] < window for i in hit) for window in config.windows),
                     *(sum(math.exp(-ages[i] / tau) for i in first_of_basket) for tau in config.decays)])
    totals = [len(ages), len(times), min(ages[-1], 60.0) if ages else 60.0, ages[0] if ages else 0.0]
    return torch.tensor(rows, dtype=torch.float64).unsqueeze(1), torch.tensor([totals], dtype=torch.float64)
