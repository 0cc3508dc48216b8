"""The source model's bottleneck: all it knows of a training instance as one vector (IAT, arXiv 2604.08933, stage 1).

h, the inputs of a tower's head, become z = sigmoid(W h + b), and the head goes on from z alone: z is what is stored. In
user order z first passes a causal transformer over the vectors of the user's earlier instances.
"""

from typing import Literal

import pydantic
import torch
from torch import Tensor, nn

from longer_rec.config import Config
from longer_rec.errors import ConfigError
from longer_rec.model.inputs import InstanceSide
from longer_rec.model.token_stack import TokenStack
from longer_rec.model.tokens import age_boundaries, age_bucket


class CompressConfig(Config):
    """``temporal``: instances each on their own. ``user``: behind the user's earlier ones, ``max_tokens`` at most.

    ``reverse_second_pass``: every second epoch reads the order of the one before backwards, so that users who were read
    first, by an untrained model, are then read last.
    """

    order: Literal["temporal", "user"] = "temporal"
    dim: int = pydantic.Field(64, ge=4, description="I, width of an instance's vector")
    max_tokens: int = pydantic.Field(256, ge=1, description="earlier instances of a user; user order alone")
    num_layers: int = pydantic.Field(2, ge=1, description="of the transformer; user order alone")
    num_heads: int = pydantic.Field(4, ge=1)
    ffn_multiple: int = pydantic.Field(2, ge=1)
    reverse_second_pass: bool = False


class Compressor(nn.Module):
    """W h + b (C x I) -> what the rest of the head reads (C x I).

    Without ``reads_past`` it gives the vector itself, which knows no other instance and is what the paper stores.
    """

    def __init__(self, config: CompressConfig) -> None:
        super().__init__()
        if config.dim % config.num_heads:
            raise ConfigError(f"model.compress.num_heads={config.num_heads} does not divide model.compress.dim="
                              f"{config.dim}; choose a divisor")
        self.config, self.reads_past = config, config.order == "user"
        if config.order == "user":
            self.age = nn.Embedding(64, config.dim)
            nn.init.normal_(self.age.weight, std=0.1)
            self.register_buffer("age_boundary", age_boundaries(64), persistent=False)
            self.past = TokenStack(config.dim, config.num_layers, config.num_heads, config.ffn_multiple)

    def forward(self, hidden_CI: Tensor, past: InstanceSide | None, num_candidates_B: Tensor) -> Tensor:
        """``past``: earlier instances, as vectors of a store, which no gradient enters, or as rows of this batch."""
        vector_CI = torch.sigmoid(hidden_CI)
        if self.config.order == "temporal" or not self.reads_past:
            return vector_CI
        assert past is not None
        past_NI = vector_CI[past.row_N] if past.row_N is not None else past.vector_NI.detach().to(vector_CI.dtype)
        token_NI = past_NI + self.age(age_bucket(past.age_N, self.get_buffer("age_boundary")))
        return self.past.score(vector_CI, self.past.encode(token_NI, past.length_B), num_candidates_B)


def count_candidates(request_C: Tensor, num_requests: int) -> Tensor:
    """Candidates of each request."""
    return torch.bincount(request_C, minlength=num_requests)
