"""Index arithmetic on jagged data: rows packed over requests, told apart by a length per request.

    length_B = [2, 0, 3]    rows = [a b | | c d e]    offsets = [0, 2, 2, 5]

Every function returns int64 indices, on the device of its lengths, and copies no data.
"""

import torch
from torch import Tensor


def start_of(length_B: Tensor) -> Tensor:
    """First row of each request: the exclusive sum of the lengths."""
    return length_B.cumsum(0) - length_B


def request_of(length_B: Tensor, num_rows: int) -> Tensor:
    """Request of each of the ``num_rows`` packed rows."""
    return torch.repeat_interleave(length_B, output_size=num_rows)


def position_from_newest(length_B: Tensor, num_rows: int) -> Tensor:
    """0 for the newest (last) row of each request, counting up towards its oldest."""
    end_B = length_B.cumsum(0)
    row_T = torch.arange(num_rows, device=length_B.device)
    return torch.repeat_interleave(end_B, length_B, output_size=num_rows) - 1 - row_T


def newest_rows(length_B: Tensor, kept_length_B: Tensor, num_kept: int) -> Tensor:
    """Rows of the newest ``kept_length_B`` of each request, in their order; ``num_kept`` is their sum."""
    shift_B = length_B.cumsum(0) - kept_length_B.cumsum(0)
    row = torch.arange(num_kept, device=length_B.device)
    return row + torch.repeat_interleave(shift_B, kept_length_B, output_size=num_kept)


def rows_after(length_B: Tensor, num_added: int) -> tuple[Tensor, Tensor]:
    """Where rows go when ``num_added`` rows are set behind those of each request.

    Returns the new row of each old one (sum of lengths) and of each added one (B x ``num_added``, flattened):
    lengths [2, 1] and one added give [0, 1, 3] and [2, 4].
    """
    B = length_B.numel()
    total = int(length_B.sum())
    request_T = request_of(length_B, total)
    old = torch.arange(total, device=length_B.device) + request_T * num_added
    added_B = length_B.cumsum(0) + torch.arange(B, device=length_B.device) * num_added
    added = added_B.unsqueeze(1) + torch.arange(num_added, device=length_B.device)
    return old, added.flatten()
