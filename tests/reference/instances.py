"""Slow twins of what reads instance tokens: one candidate at a time, every token by itself."""

from dataclasses import replace

import torch
from torch import Tensor

from longer_rec.model.compressor import Compressor
from longer_rec.model.inputs import CandidateSide, InputWidths, InstanceSide, InstanceWidths, UserSide
from longer_rec.model.instances import InstanceTokens
from longer_rec.model.token_stack import TokenStack
from tests.reference.longer import layer_ref
from tests.reference.towers import DAY_S, WIDTHS

INSTANCE_WIDTHS = InstanceWidths(width=6, num_labels=2, max_tokens=9, features=("item", "quantity"))
READING = replace(WIDTHS, instance=INSTANCE_WIDTHS)


def make_instances(lengths: list[int], seed: int = 5, widths: InputWidths = READING) -> InstanceSide:
    """Tokens of the given numbers, oldest first, with ties."""
    given = widths.instance
    assert given is not None
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    ages = [torch.randint(1, 9, (n,), generator=generator).sort(descending=True).values * DAY_S for n in lengths]
    sizes = {name: {**widths.item, **widths.event}[name] for name in given.features}
    return InstanceSide(
        torch.tensor(lengths), torch.cat(ages), torch.rand(count, given.width, generator=generator).double(),
        torch.randint(0, 2, (count, given.num_labels), generator=generator).float(),
        {name: torch.randn(count, size, generator=generator).double().requires_grad_() for name, size in sizes.items()})


def stack_ref(stack: TokenStack, token_LD: Tensor, own_X: Tensor) -> Tensor:
    """Twin of ``TokenStack`` for one candidate: [groups aligned to the newest ; candidate], an explicit causal mask."""
    K, X = stack.merge_size, own_X.numel()
    padded = torch.cat([token_LD.new_zeros(-len(token_LD) % K, X // K), token_LD])
    token_SX = torch.cat([padded.reshape(-1, X), own_X.unsqueeze(0)])
    for depth, layer in enumerate(stack.causal_layers):
        S = len(token_SX)
        first = max(0, S - 1 - stack.num_queries) if depth == 0 and stack.num_queries is not None else 0
        seen_QS = torch.ones(S, S, dtype=torch.bool).tril()[first:]
        token_SX = layer_ref(layer, "pre", False, token_SX[first:], token_SX, seen_QS, torch.arange(S) == S - 1)
    return stack.norm(token_SX[-1])


def instances_ref(module: InstanceTokens, user: UserSide, candidates: CandidateSide, statistics_CF: Tensor) -> Tensor:
    """Twin of ``module.score(module.encode(user), candidates, [statistics_CF])``."""
    past, side, outputs, row = user.instances, module.side, [], 0
    assert past is not None
    for request, count in enumerate(candidates.length_B.tolist()):
        events = _of_request(user.length_B, request)
        tokens = [_token(module, past, at, place) for place, at in
                  enumerate(reversed(list(_of_request(past.length_B, request))))][::-1]
        mean = sum((torch.cat([user.event_embedding[name][at] for name in module.item_names]) for at in events),
                   torch.zeros(sum(WIDTHS.item.values())).double()) / max(len(events), 1)
        asked_by_user = torch.cat([*(user.user_embedding[name][request] for name in module.user_names),
                                   user.dense_BF[request], mean])
        for at in range(row, row + count):
            inputs = torch.cat([*(candidates.embedding[name][at] for name in module.item_names),
                                candidates.dense_CF[at], statistics_CF[at]])
            asked = torch.sigmoid(module.ask(inputs) + module.ask_user(asked_by_user))
            known = [candidates.embedding[name][at] for name in side.item_names]
            own = torch.cat([asked, side.first(torch.cat([*known, side.absent])) + side.candidate_type])
            outputs.append(module.out(_read(module, tokens, own)))
        row += count
    return torch.stack(outputs)


def _read(module: InstanceTokens, tokens: list[Tensor], own: Tensor) -> Tensor:
    if module.config.aggregator != "din":
        token_LD = torch.stack(tokens) if tokens else own.new_zeros(0, module.config.width)
        return stack_ref(module.stack, token_LD, own.repeat(module.stack.merge_size))
    unit, own, total = module.activation, module.norm(own), torch.zeros_like(own)
    for token in map(module.norm, tokens):
        hidden = unit.product @ (token * own) + unit.event(token) + unit.candidate(own)
        total = total + unit.out(torch.nn.functional.silu(hidden)) * token
    return total


def _token(module: InstanceTokens, past: InstanceSide, at: int, place: int) -> Tensor:
    side = module.side
    bucket = int((side.get_buffer("age_boundary") <= float(past.age_N[at])).sum())
    label = past.label_NY[at].double()
    parts = [label if name == "label" else past.embedding[name][at] for name in (*side.item_names, *side.event_names)]
    projected = side.first(torch.cat([*parts, side.age.weight[bucket]])) + side.position.weight[place]
    return torch.cat([torch.sigmoid(module.adapt(past.vector_NI[at])), projected])


def compressor_ref(compressor: Compressor, hidden_CI: Tensor, past: InstanceSide, num_candidates_B: Tensor) -> Tensor:
    """Twin of ``Compressor.forward`` in user order."""
    vector_CI, outputs, row = torch.sigmoid(hidden_CI), [], 0
    boundary = compressor.get_buffer("age_boundary")
    for request, count in enumerate(num_candidates_B.tolist()):
        tokens = [(past.vector_NI[at] if past.row_N is None else vector_CI[past.row_N[at]])
                  + compressor.age.weight[int((boundary <= float(past.age_N[at])).sum())]
                  for at in _of_request(past.length_B, request)]
        token_LD = torch.stack(tokens) if tokens else vector_CI[:0]
        outputs += [stack_ref(compressor.past, token_LD, vector_CI[at]) for at in range(row, row + count)]
        row += count
    return torch.stack(outputs)


def _of_request(length_B: Tensor, request: int) -> range:
    end = int(length_B[:request + 1].sum())
    return range(end - int(length_B[request]), end)
