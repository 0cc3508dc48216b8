"""The ranker without a history: the same features and the same head."""

from typing import Literal

from longer_rec.model.baselines.common import Baseline, BaselineConfig
from longer_rec.model.head import HeadConfig


class NoSequenceConfig(BaselineConfig):
    """Raw embeddings are all there is to read, so they are not scaled down by default."""

    kind: Literal["no_sequence"] = "no_sequence"
    head: HeadConfig = HeadConfig(id_scale=1.0)


class NoSequenceTower(Baseline):
    """Candidate and user embeddings -> head; without ``interaction`` its score cannot depend on the history."""
