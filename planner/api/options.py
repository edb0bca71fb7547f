"""What a user may ask of a plan beside model and machine."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from planner.errors import UnknownNameError, UsageError
from planner.ir.dimension import Dimension
from planner.space.constraints import NO_CONSTRAINTS, Constraints
from planner.space.enumerate import DEFAULT_DIMENSIONS


@dataclass(frozen=True, slots=True)
class Options:
    """What a user may ask of a plan beside model and machine.

    Attributes:
        solver: a name of ``planner.search.auto.SOLVERS``.
        memory_limit_bytes: per device; the smallest device's memory where None.
        precision: ``fp32``, ``tf32`` or ``bf16`` (autocast).
        optimizer: ``sgd``, ``momentum`` or ``adam``.
        sync_batch_norm: statistics over the global batch (as one device) or each rank's own.
        io: ``per-rank``, ``global`` or ``local``; per-rank where every rank gets a sample, else global, if None.
        dimensions: that may be split. The default is all but space, and space too where there are fewer samples than
            devices; a fixed strategy as the solver adds its own to it.
        mesh: such as ``node=2,gpu=4``; candidates are searched where None.
        time_limit_s: for the search, which then gives the best plan until there; what it goes through is otherwise
            decided by counts. Pipelines look at it between their candidates only.
        constraints: on single layers.
        parameter_sharding: ``none``, ``optimizer`` or ``full``, see ``planner.cost.sharding``; if None ``none``,
            or what the fixed strategy that is the solver stands for.
        halo_overlap: ``auto``: halo exchanges run beside computation where that is predicted to be faster; or
            ``always``, or ``never``.
        shares: ``auto``: where devices are not equally fast, pieces in proportion to their speeds are tried too; or
            ``equal`` pieces only.
        halo_recompute: ``auto``: every rank computes the rows of neighbours itself where that is predicted to be
            faster than an exchange (not of fixed strategies); ``always``: wherever it can; or ``never``.
        all_devices: use all devices even where fewer are faster.
        stages: of a pipeline; 1 for none, ``auto`` for one where it is predicted to be faster.
        schedule: a kind of ``planner.ir.schedule``; the fastest that equals one device if None.
        microbatches: that a batch is cut in; the fastest number if None.
        branches: ``auto``: branches of the network on different ranks at the same time, where that is predicted to be
            faster (``planner.search.branches``); or ``none``.
    """

    solver: str = "auto"
    memory_limit_bytes: int | None = None
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    optimizer: Literal["sgd", "momentum", "adam"] = "momentum"
    sync_batch_norm: bool = True
    io: Literal["per-rank", "global", "local"] | None = None
    dimensions: Collection[Dimension] = DEFAULT_DIMENSIONS
    mesh: str | None = None
    time_limit_s: float = 60.0
    constraints: Constraints = NO_CONSTRAINTS
    parameter_sharding: Literal["none", "optimizer", "full"] | None = None
    halo_overlap: Literal["auto", "always", "never"] = "auto"
    shares: Literal["auto", "equal"] = "auto"
    halo_recompute: Literal["auto", "always", "never"] = "auto"
    all_devices: bool = False
    stages: int | Literal["auto"] = 1
    schedule: str | None = None
    microbatches: int | None = None
    branches: Literal["auto", "none"] = "auto"


def options_of(**asked: Any) -> Options:
    """Return the options of keyword arguments: the fields of ``Options``, and ``pin``, ``forbid`` and ``tie``.

    The last three are texts, or sequences of them, as on the command line (``Constraints.of``).

    Raises:
        UsageError: an option is unknown, or its value is of no use.
    """
    texts = {name: asked.pop(name) for name in ("pin", "forbid", "tie") if name in asked}
    if texts and "constraints" in asked:
        raise UsageError("give either constraints or pin, forbid and tie")
    if texts:
        lists = {name: (value,) if isinstance(value, str) else tuple(value) for name, value in texts.items()}
        asked["constraints"] = Constraints.of(**lists)
    known = [each.name for each in fields(Options)]
    for name in asked:
        if name not in known:
            raise UnknownNameError("option", name, [*known, "pin", "forbid", "tie"])
    if not isinstance(asked.get("constraints", NO_CONSTRAINTS), Constraints):
        raise UsageError("constraints must be a planner.api.Constraints; or give pin=[...], forbid=[...], tie=[...]")
    return Options(**asked)


def refuse_useless(options: Options) -> None:
    """Check that every option is of its kind, and one of its names where it has few.

    Raises:
        UsageError: one is not.
    """
    for name, kind in get_type_hints(Options).items():
        value = getattr(options, name)
        names = [each for part in (kind, *get_args(kind)) if get_origin(part) is Literal for each in get_args(part)]
        if isinstance(value, str) and value in names:
            continue
        if isinstance(value, str) and names and int not in get_args(kind):
            raise UnknownNameError(name.replace("_", " "), value, names)
        if not _is_of(value, kind):
            text = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
            raise UsageError(f"{name} is {value!r}, which is not {text}")
    names = [dimension.value for dimension in Dimension]
    if isinstance(options.dimensions, str):
        raise UsageError(f"dimensions is {options.dimensions!r}, which is one text: give a list, of {', '.join(names)}")
    for dimension in options.dimensions:
        if dimension not in names:
            raise UnknownNameError("dimension", str(dimension), names)


def _is_of(value: object, kind: Any) -> bool:
    """Return whether a value is of an annotation; collections and names of few are not looked into."""
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return any(_is_of(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return False
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else get_origin(kind) or kind)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a model comes from, for the plan's provenance."""

    name: str = ""
    source: str = ""
    arguments: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    command: str = ""
