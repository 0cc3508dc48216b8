"""The head: outputs of the global tokens and scaled raw embeddings -> MLP -> one logit per task."""

import math

import pydantic
import torch.nn.functional as F
from torch import Tensor, nn

from longer_rec.config import Config
from longer_rec.model.compressor import CompressConfig, Compressor, count_candidates
from longer_rec.model.inputs import InputWidths, InstanceSide, concat_features
from longer_rec.model.linear import Linear


class HeadConfig(Config):
    """``id_scale`` keeps raw embeddings small, so that the head does not memorise ids; 0 leaves them out."""

    hidden: tuple[int, ...] = (128, 64)
    dropout: float = pydantic.Field(0.0, ge=0.0, lt=1.0)
    id_scale: float = pydantic.Field(0.1, ge=0.0)
    prior: float = pydantic.Field(0.2, gt=0.0, lt=1.0, description="share of positives the untrained head predicts")

    def raw_widths(self, widths: InputWidths) -> tuple[int, int]:
        """Of raw embeddings and dense features, which join a tower's outputs: a candidate's and a user's."""
        has_ids = self.id_scale > 0
        return (has_ids * sum(widths.item.values()) + widths.num_item_dense,
                has_ids * sum(widths.user.values()) + widths.num_dense)


class Head(nn.Module):
    """MLP over [candidate inputs ; user inputs], whose first layer is split so that the user's part is done once.

    A source model's first layer is the bottleneck (``compressor.py``), the rest decompresses.
    """

    def __init__(self, config: HeadConfig, candidate_width: int, user_width: int, num_tasks: int,
                 compress: CompressConfig | None = None) -> None:
        super().__init__()
        widths = (*((compress.dim,) if compress else ()), *config.hidden, num_tasks)
        self.dropout = config.dropout
        self.candidate = Linear(candidate_width, widths[0])
        self.user = Linear(user_width, widths[0], bias=False)
        rest = [Linear(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True)]
        self.rest = nn.ModuleList(rest)
        bound = 1 / math.sqrt(max(candidate_width + user_width, 1))
        for linear in (self.candidate, self.user):
            nn.init.uniform_(linear.weight, -bound, bound)
        nn.init.constant_([self.candidate, *rest][-1].bias, math.log(config.prior / (1 - config.prior)))
        self.compressor = Compressor(compress) if compress else None

    def encode(self, user_BX: Tensor) -> Tensor:
        """The user's share of the first layer, B x F."""
        return self.user(user_BX)

    def forward(self, candidate_CX: Tensor, user_BF: Tensor, request_C: Tensor, past: InstanceSide | None = None
                ) -> Tensor:
        """Logits C x Y; ``past`` is what a compressor in user order reads."""
        hidden = self.candidate(candidate_CX) + user_BF.index_select(0, request_C)
        for depth, linear in enumerate(self.rest):
            if depth == 0 and self.compressor is not None:
                hidden = self.compressor(hidden, past, count_candidates(request_C, user_BF.shape[0]))
            else:
                hidden = F.silu(hidden)
            hidden = linear(F.dropout(hidden, self.dropout, self.training))
        return hidden


def scaled_inputs(embedding: dict[str, Tensor], names: tuple[str, ...], scale: float) -> list[Tensor]:
    """The raw embeddings for the head, or nothing where the scale is 0."""
    return [concat_features(embedding, names) * scale] if scale and names else []
