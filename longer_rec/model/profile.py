"""What each part of the tower costs, from what ``torch.profiler`` records."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Final

from torch.profiler import profile, record_function

from longer_rec.model.longer import LongerTower
from longer_rec.model.tower import AnyTower

REST: Final = "rest of the tower"
_BACKWARD = "autograd::engine::evaluate_function"
_PART = "part of the tower: "


@contextmanager
def named_parts(tower: AnyTower) -> Iterator[None]:
    """Calls of the parts' methods appear under their part in what a profiler records; towers without parts do not."""
    replaced: list[tuple[Any, str, Any]] = []
    for part, methods in tower.parts().items() if isinstance(tower, LongerTower) else ():
        for module, method in methods:
            replaced.append((module, method, vars(module).get(method)))
            setattr(module, method, _recorded(getattr(module, method), _PART + part))
    try:
        yield
    finally:
        for module, method, before in replaced:
            delattr(module, method) if before is None else setattr(module, method, before)


def _recorded(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @wraps(function)
    def recorded(*arguments: Any) -> Any:
        with record_function(name):
            return function(*arguments)

    return recorded


def part_times(traced: profile, around: str, on_gpu: bool = False) -> dict[str, float]:
    """Microseconds of each part, forward and backward, and of the rest, within what was recorded as ``around``.

    An autograd node belongs to the part whose call made it: both carry the same sequence number. Recomputation runs
    within the backward pass, and is in that. ``on_gpu``: of the kernels, which the host only launches.
    """
    spent: dict[str, float] = {REST: 0.0}
    made_by: dict[int, str] = {}
    part, part_end, backward_end, around_end = REST, 0.0, 0.0, 0.0

    def add(name: str, event: Any, within: bool) -> None:
        elapsed = event.device_time_total if on_gpu else event.time_range.elapsed_us()
        spent[name] = spent.get(name, 0.0) + elapsed
        spent[REST] -= elapsed * within

    for event in sorted(traced.events() or [], key=lambda each: each.time_range.start):
        start, end = event.time_range.start, event.time_range.end
        if event.name == around:
            around_end = end
            add(REST, event, within=False)
        elif start >= around_end or start < backward_end:
            continue
        elif event.name.startswith(_PART):
            part, part_end = event.name.removeprefix(_PART), end
            add(part, event, within=True)
        elif event.name.startswith(_BACKWARD):
            backward_end = end
            # Kernels that another thread's backward launches are not in the host's span around it.
            add(made_by.get(event.sequence_nr, REST), event, within=not on_gpu)
        elif event.sequence_nr >= 0:
            made_by[event.sequence_nr] = part if start < part_end else REST
    return spent
