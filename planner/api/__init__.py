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
from planner.api.decomposing import PricedDecomposition, price_decomposition
from planner.api.exporting import export_dot, export_placements, layer_graph
from planner.api.inference import InferenceOptions, plan_inference
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
from planner.api.reporting import report
from planner.api.what_if import Case, Outcome, cases, what_if
from planner.devices.graph import Cluster
from planner.errors import NoPlanError
from planner.plan.schema import Plan
from planner.space.constraints import Constraints

__all__ = [
    "Case",
    "Cluster",
    "Comparison",
    "Constraints",
    "InferenceOptions",
    "Machine",
    "NoPlanError",
    "Options",
    "Origin",
    "Outcome",
    "Plan",
    "Planner",
    "Priced",
    "PricedDecomposition",
    "PricedStages",
    "cases",
    "compare",
    "compare_with",
    "data_sheet_profile",
    "example_inputs",
    "export_dot",
    "export_placements",
    "layer_graph",
    "local_layers",
    "machine_of",
    "machine_of_links",
    "measure_host",
    "measure_layers",
    "plan_inference",
    "plan_model",
    "prepare",
    "price_decomposition",
    "price_plan",
    "price_stages",
    "refuse_unknown_accelerator",
    "report",
    "reprice",
    "time_layers",
    "what_if",
]
