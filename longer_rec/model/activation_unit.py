"""DIN's activation unit: a small network of a candidate and an event weighs the event (Zhou et al., 1706.06978)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longer_rec.model.linear import Linear, batched
from longer_rec.model.state import LayerCache


class ActivationUnit(nn.Module):
    """a(x, v) = w . silu(W_p (x * v) + W_x x + W_v v + b), for all pairs of a request by one matmul.

    W_p (x * v) + W_x x = (W_p diag(v) + W_x) x: a candidate's F x D matrix, so neither the product nor the event's
    share costs anything per pair. The difference x - v, which the paper's implementation adds, is linear in both and
    already there. SiLU in place of PReLU or Dice.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.product = nn.Parameter(torch.empty(hidden, width))
        self.event = Linear(width, hidden, bias=False)
        self.candidate = Linear(width, hidden)
        self.out = Linear(hidden, 1)
        # Starts as a matcher: x * v summed up, compared with thresholds between none and a whole match.
        with torch.no_grad():
            self.product.copy_(8.0 / width * (1 + 0.1 * torch.randn(hidden, width)))
            self.candidate.bias.copy_(torch.linspace(-6.0, -2.0, hidden))
            self.out.weight.fill_(1.0 / hidden)
            self.out.bias.zero_()
            self.event.weight.mul_(0.1)
            self.candidate.weight.mul_(0.1)

    def of_candidates(self, token_CD: Tensor) -> tuple[Tensor, Tensor]:
        """What a candidate brings to each of its pairs: C x F x D and C x F."""
        return self.product * token_CD.unsqueeze(1) + self.event.weight, self.candidate(token_CD)

    def forward(self, unit_CFD: Tensor, shift_CF: Tensor, event_LD: Tensor) -> Tensor:
        """Weights C x L of one request."""
        hidden = batched(unit_CFD.flatten(0, 1), event_LD.T).unflatten(0, shift_CF.shape) + shift_CF.unsqueeze(-1)
        return torch.einsum("cfl,f->cl", F.silu(hidden), self.out.weight[0]) + self.out.bias

    def pool(self, token_CD: Tensor, memory: LayerCache, num_candidates_B: Tensor, softmax: bool = False) -> Tensor:
        """C x D: each candidate's sum of its request's events, which ``memory`` holds as values of one head."""
        counts, lengths = num_candidates_B.tolist(), memory.length_B.tolist()  # host sync on GPU
        unit_CFD, shift_CF = self.of_candidates(token_CD)
        interests = [token_CD[:0]]
        for unit, shift, event_LD in zip(unit_CFD.split(counts), shift_CF.split(counts),
                                         memory.value_SHE.squeeze(1).split(lengths), strict=True):
            weight_CL = self(unit, shift, event_LD)
            interests.append(batched(weight_CL.softmax(-1) if softmax else weight_CL, event_LD))
        return torch.cat(interests)
