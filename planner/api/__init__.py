"""The Python interface: machines, plans, comparisons."""

from planner.api.comparing import (
    Comparison,
    Priced,
    PricedStages,
    compare,
    compare_with,
    local_layers,
    price_plan,
    price_stages,
    reprice,
)
from planner.api.machine import (
    Machine,
    data_sheet_profile,
    machine_of,
    machine_of_links,
    measure_host,
    refuse_unknown_accelerator,
    time_layers,
)
from planner.api.options import Options, Origin
from planner.api.planning import (
    Planner,
    example_inputs,
    measure_layers,
    plan_model,
    prepare,
)
from planner.errors import NoPlanError
from planner.plan.schema import Plan
from planner.space.constraints import Constraints

__all__ = [
    "Comparison",
    "Constraints",
    "Machine",
    "NoPlanError",
    "Options",
    "Origin",
    "Plan",
    "Planner",
    "Priced",
    "PricedStages",
    "compare",
    "compare_with",
    "data_sheet_profile",
    "example_inputs",
    "local_layers",
    "machine_of",
    "machine_of_links",
    "measure_host",
    "measure_layers",
    "plan_model",
    "prepare",
    "price_plan",
    "price_stages",
    "refuse_unknown_accelerator",
    "reprice",
    "time_layers",
]
