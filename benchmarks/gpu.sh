#!/usr/bin/env bash
# What only a CUDA card can show: the card's tests, then peak memory by phase on the demo and, if given, on a
# checkpoint of full shape (benchmarks/synthetic.py writes one). Results go to benchmarks/results/.
#
#   benchmarks/gpu.sh [CHECKPOINT]
set -euo pipefail
cd "$(dirname "$0")/.."
python -m pytest tests/test_cuda.py
python benchmarks/memory.py --device cuda -o benchmarks/results/memory-demo-cuda.json
if [ $# -gt 0 ]; then
    python benchmarks/memory.py --device cuda --model "$1" --vram 8GiB -o benchmarks/results/memory-8gib-cuda.json
fi
