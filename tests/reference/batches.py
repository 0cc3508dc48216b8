"""Small schemas and random batches for tests."""

import torch

from longer_rec.batch import RequestBatch
from longer_rec.schema import Feature, Schema, Table

SCHEMA = Schema(
    tables=(Table(name="item", num_rows=61), Table(name="category", num_rows=11), Table(name="action", num_rows=7),
            Table(name="user", num_rows=23), Table(name="tag", num_rows=31), Table(name="topic", num_rows=17)),
    item_features=(Feature(name="item", table="item"), Feature(name="category", table="category")),
    event_features=(Feature(name="action", table="action"),),
    user_features=(Feature(name="user", table="user"), Feature(name="tags", table="tag", multi_valued=True),
                   Feature(name="topics", table="topic", multi_valued=True)),
    tasks=("click",),
)


def random_batch(schema: Schema, num_requests: int, seed: int, max_events: int = 6, max_candidates: int = 3,
                 max_tags: int = 4) -> RequestBatch:
    """Valid requests with histories from 0 to ``max_events`` events, and some multi-valued features empty."""
    generator = torch.Generator().manual_seed(seed)

    def lengths(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high + 1, (num_requests,), generator=generator)

    def ids(table: str, count: int) -> torch.Tensor:
        return torch.randint(0, schema.num_rows[table], (count,), generator=generator)

    history_length_B, num_candidates_B = lengths(0, max_events), lengths(1, max_candidates)
    user_length_B = {feature.name: lengths(0, max_tags) if feature.multi_valued else torch.ones_like(history_length_B)
                     for feature in schema.user_features}
    num_events, num_candidates = int(history_length_B.sum()), int(num_candidates_B.sum())
    return RequestBatch(
        history={feature.name: ids(feature.table, num_events) for feature in schema.history_features},
        history_time_T=torch.arange(num_events), history_length_B=history_length_B,
        candidates={feature.name: ids(feature.table, num_candidates) for feature in schema.item_features},
        candidate_dense_CF=torch.zeros(num_candidates, len(schema.item_dense)), num_candidates_B=num_candidates_B,
        label_CY=torch.randint(0, 2, (num_candidates, len(schema.tasks)), generator=generator).float(),
        users={feature.name: ids(feature.table, int(user_length_B[feature.name].sum()))
               for feature in schema.user_features},
        user_length_B=user_length_B, user_dense_BF=torch.zeros(num_requests, len(schema.user_dense)),
        request_time_B=torch.full((num_requests,), 10**9), request_row_B=torch.arange(num_requests))
