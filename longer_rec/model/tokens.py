"""From embeddings to tokens: events, candidates and the user's global tokens.

An event token is project([item features ; event features ; age]) + position, its age the embedding of the
log-bucketed time to the request, its position counted from the newest event. A candidate goes through the same
projection, with learned vectors in place of what only an event has, is tiled over the K slots of a merged token and
marked by a type vector: so the two lie in one space and attention can match them.
"""

import math

import torch
from torch import Tensor, nn

from longer_rec.model.inputs import CandidateSide, InputWidths, UserSide, concat_features
from longer_rec.model.jagged import position_from_newest
from longer_rec.model.linear import Linear, linear

MAX_AGE_S = 10 * 365 * 86400


def age_boundaries(num_buckets: int) -> Tensor:
    """``num_buckets - 1`` lower ends of the buckets 1 .. in seconds, log-spaced from 1 s to 10 years (float64)."""
    exponent = torch.arange(num_buckets - 1, dtype=torch.float64) / max(num_buckets - 2, 1)
    return torch.exp(exponent * math.log(MAX_AGE_S))


def age_bucket(age_T: Tensor, boundary: Tensor) -> Tensor:
    """Bucket of each age: 0 below 1 s, the last from 10 years on."""
    return torch.bucketize(age_T.to(boundary.dtype), boundary, right=True)


class EventTokens(nn.Module):
    """The projection that events and candidates share."""

    def __init__(self, widths: InputWidths, width: int, merge_size: int, hidden: int, max_events: int,
                 age_buckets: int, age_width: int) -> None:
        super().__init__()
        self.item_names, self.event_names = tuple(widths.item), tuple(widths.event)
        self.item_widths = tuple(widths.item.values())
        self.item_width = sum(self.item_widths)
        self.merge_size = merge_size
        event_width = sum(widths.event.values())
        self.age = nn.Embedding(age_buckets, age_width)
        self.position = nn.Embedding(max_events, width)
        self.absent = nn.Parameter(torch.randn(event_width + age_width) * 0.3)
        self.candidate_type = nn.Parameter(torch.randn(merge_size * width) * 0.1)
        self.first = Linear(self.item_width + event_width + age_width, hidden or width)
        self.rest = nn.Sequential(nn.SiLU(), Linear(hidden, width)) if hidden else nn.Identity()
        self.register_buffer("age_boundary", age_boundaries(age_buckets), persistent=False)
        # Keeps the angles between items, which attention starts out comparing; a type vector of std 0.3 drowns them:
        # with it, matching was not learned in 300 steps, with 0.1 in 60 (tests/unit/test_model_build.py's task).
        nn.init.orthogonal_(self.first.weight)
        nn.init.normal_(self.age.weight, std=0.3)
        nn.init.normal_(self.position.weight, std=0.02)

    @torch.no_grad()
    def start_by_field(self, num_blocks: int) -> None:
        """Let each of ``num_blocks`` equal parts of a token start as a view of item features of its own.

        The first part reads the schema's first item feature, the item itself, the others share the rest in turn: so a
        head that compares this part counts matches of these features alone. In a token of all features the item, whose
        embedding is the longest, drowns what its category or brand would tell. Event features and ages start at a
        tenth, for they are no part of a match.
        """
        weight = self.first.weight
        columns = torch.arange(self.item_width).split(self.item_widths)
        num_others = num_blocks - 1
        fields = [columns[:1], *(columns[1 + number::num_others] for number in range(num_others))]
        weight[:, self.item_width:] *= 0.1
        weight[:, :self.item_width] = 0.0
        for rows, features in zip(torch.arange(weight.shape[0]).chunk(num_blocks), fields, strict=True):
            read = torch.cat(features)
            weight[rows.unsqueeze(1), read] = nn.init.orthogonal_(weight.new_empty(rows.numel(), read.numel()))

    def events(self, user: UserSide) -> Tensor:
        """T x D."""
        parts = [user.event_embedding[name] for name in (*self.item_names, *self.event_names)]
        # index_select: on a CPU its backward adds up the same sums as an embedding's, in a third to half of the time.
        bucket_T = age_bucket(user.age_T, self.get_buffer("age_boundary"))
        parts.append(self.age.weight.index_select(0, bucket_T))
        position_T = position_from_newest(user.length_B, user.age_T.numel())
        return self.rest(self.first(torch.cat(parts, dim=-1))) + self.position.weight.index_select(0, position_T)

    def candidates(self, candidates: CandidateSide) -> Tensor:
        """C x X. The part of the projection that all candidates share is worked out once."""
        weight = self.first.weight
        shared = weight[:, self.item_width:].to(self.absent.dtype) @ self.absent + self.first.bias
        item = (concat_features(candidates.embedding, self.item_names) if self.item_names
                else candidates.dense_CF[:, :0].to(weight.dtype))
        token_CD = self.rest(linear(item, weight[:, :self.item_width], shared))
        return token_CD.repeat(1, self.merge_size) + self.candidate_type


class UserGlobals(nn.Module):
    """The user's global tokens, B x G x X: the user token, then the learned CLS tokens."""

    def __init__(self, widths: InputWidths, merged_width: int, user_token: bool, num_cls_tokens: int) -> None:
        super().__init__()
        self.user_names = tuple(widths.user)
        inputs = sum(widths.user.values()) + widths.num_dense + 1
        self.project = Linear(inputs, merged_width) if user_token else None
        self.cls = nn.Parameter(torch.randn(num_cls_tokens, merged_width) * 0.3)
        self.num_tokens = int(user_token) + num_cls_tokens

    def forward(self, user: UserSide) -> Tensor:
        tokens = []
        if self.project is not None:
            length = torch.log1p(user.length_B.to(self.cls.dtype)).unsqueeze(-1) / 7.0
            dense = user.dense_BF.to(self.cls.dtype)
            parts = [*(user.user_embedding[name] for name in self.user_names), dense, length]
            tokens.append(self.project(torch.cat(parts, dim=-1)).unsqueeze(1))
        tokens.append(self.cls.expand(user.length_B.numel(), -1, -1))
        return torch.cat(tokens, dim=1)
