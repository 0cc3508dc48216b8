"""Every ranker under one roof: configuration in, a module that encodes users and scores candidates out."""

from collections.abc import Callable, Mapping
from typing import Annotated

import pydantic

from longer_rec.config import Config
from longer_rec.errors import ConfigError
from longer_rec.model.baselines.common import Baseline
from longer_rec.model.baselines.count import CountConfig, CountTower
from longer_rec.model.baselines.din import DinConfig, DinTower
from longer_rec.model.baselines.hstu import HstuConfig, HstuTower
from longer_rec.model.baselines.no_sequence import NoSequenceConfig, NoSequenceTower
from longer_rec.model.baselines.sasrec import SasRecConfig, SasRecTower
from longer_rec.model.baselines.sim_hard import SimHardConfig, SimHardTower
from longer_rec.model.baselines.sum_pooling import SumPoolingConfig, SumPoolingTower
from longer_rec.model.baselines.transformer import TransformerConfig
from longer_rec.model.baselines.twin import TwinConfig, TwinTower
from longer_rec.model.inputs import InputWidths
from longer_rec.model.longer import LongerTower, TowerConfig

AnyTowerConfig = Annotated[
    TowerConfig | TransformerConfig | NoSequenceConfig | CountConfig | SumPoolingConfig | DinConfig | SimHardConfig
    | TwinConfig | HstuConfig | SasRecConfig,
    pydantic.Field(discriminator="kind")]
# Each has ``encode(UserSide) -> UserState`` and ``score(UserState, CandidateSide) -> C x Y``; nothing else is called.
AnyTower = LongerTower | Baseline | CountTower
_TOWERS: Mapping[type[Config], Callable[..., AnyTower]] = {
    TowerConfig: LongerTower, TransformerConfig: LongerTower, NoSequenceConfig: NoSequenceTower,
    CountConfig: CountTower, SumPoolingConfig: SumPoolingTower, DinConfig: DinTower, SimHardConfig: SimHardTower,
    TwinConfig: TwinTower, HstuConfig: HstuTower, SasRecConfig: SasRecTower}


def build_tower(config: AnyTowerConfig, widths: InputWidths, num_tasks: int, max_events: int) -> AnyTower:
    """A tower that reads the newest ``max_events`` of a history and gives C x ``num_tasks`` logits.

    Raises ``ConfigError`` where sizes do not divide or a feature is unknown.
    """
    if max_events < 1:
        raise ConfigError(f"max_events={max_events} must be at least 1; a history of no event is the no_sequence tower")
    if num_tasks < 1:
        raise ConfigError(f"num_tasks={num_tasks} must be at least 1; name a task in the schema")
    reads = getattr(config, "instances", None) is not None
    if reads and widths.instance is None:
        raise ConfigError("model.instances has nothing to read; name a store in data.instances, or set it to null")
    compress = getattr(config, "compress", None)
    if widths.instance is not None and not reads and (compress is None or compress.order != "user"):
        raise ConfigError("data.instances has no reader; set model.instances, or data.instances to null")
    return _TOWERS[type(config)](config, widths, num_tasks, max_events)
