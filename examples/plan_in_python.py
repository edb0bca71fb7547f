"""Plan AlexNet for four nodes of four P100 in Python, and read the plan.

    python examples/plan_in_python.py

Needs no GPU: the machine is known by name, and the network is built without weights.
"""

import torch

from planner.api import Origin, plan_model
from planner.models import entry
from planner.units import format_bytes, format_seconds

alexnet = entry("alexnet")
with torch.device("meta"):
    model = alexnet.build()
images = torch.empty(512, *alexnet.input_shape, device="meta")  # the global batch

plan = plan_model(model, (images,), cluster="4x4-p100-ib100", origin=Origin("alexnet", "alexnet"))
plan.save("alexnet.json")

totals, search = plan.totals, plan.search
print(f"step {format_seconds(totals.step_s)}, {totals.samples_per_s:.0f} images/s, {format_bytes(totals.memory_bytes)}")
print(f"no strategy of these splits is faster than {format_seconds(search.lower_bound_s)} (gap {search.gap:.1%})")
for other in plan.baselines:
    print(f"  {other.name:20} {format_seconds(other.step_s):>10}  {other.step_s / totals.step_s:.2f} x the plan")
for layer in plan.stages[0].layers:
    split = " ".join(f"{axis}={dimension}" for axis, dimension in layer.split.items())
    print(f"  {layer.id:20} {format_seconds(layer.cost.compute_s):>10}  {split}")
