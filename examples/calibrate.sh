#!/usr/bin/env bash
# Plan from what is known of this machine, measure the plan, and plan again from the measurement.
#
#     bash examples/calibrate.sh
set -euo pipefail
layerwise plan digits-alexnet --cluster local-2 --batch 64 --all-devices -o plan.json
layerwise run plan.json --measured run.json
layerwise calibrate plan.json --measured run.json -o profile.json
layerwise plan digits-alexnet --cluster local-2 --batch 64 --all-devices --profile profile.json -o calibrated.json
layerwise diff plan.json calibrated.json
