#!/usr/bin/env bash
# One command for a machine with an NVIDIA card and this repository: all that only a card can show, into one file with
# its card. Without a card: benchmarks/gpu.sh --device cpu goes through the same steps with the demo.
#
#   benchmarks/gpu.sh [--weights CHECKPOINT] [--only SECTION ...]
set -euo pipefail
cd "$(dirname "$0")/.."
python benchmarks/wheels.py
exec python benchmarks/gpu.py -o "benchmarks/results/gpu.json" "$@"
