#!/usr/bin/env bash
# Everything that only a GPU can show, in under nine minutes and without a network: the kernels' tests on the device,
# the kernel table, whole steps of two model shapes with up to 256 adapters in a step and 1,000 in the arena.
# Writes a few files into bench/results/<gpu>-<commit>/ (or $OUT). Without a GPU it says so and is done.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD/.src:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
if ! GPU=$($PYTHON -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-").lower())' 2>/dev/null); then
    echo "no GPU here: nothing to check"
    exit 0
fi
if ! $PYTHON -c 'import msgspec' 2>/dev/null && ls .whl/*.whl >/dev/null 2>&1; then  # wheels that were brought along
    $PYTHON -m pip install -q --no-index --no-deps --no-compile --upgrade --target /tmp/loraplex-site .whl/*.whl
    export PYTHONPATH="$PYTHONPATH:/tmp/loraplex-site"
fi
COMMIT=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
RESULTS=${OUT:-bench/results/$GPU-$COMMIT}
mkdir -p "$RESULTS"
: >"$RESULTS/log"
failed=()
run() {  # run NAME SECONDS COMMAND…
    local name=$1 seconds=$2
    shift 2
    echo "== $name: $*" | tee -a "$RESULTS/log"
    timeout "$seconds" "$@" 2>&1 | tee -a "$RESULTS/log" || failed+=("$name")
}
# The project's own pytest options need plugins that a bare machine lacks. The tests are those that use the device,
# LoRA's first.
PYTEST="-m pytest -q -c /dev/null --rootdir . --import-mode=importlib -p no:cacheprovider"
TESTS=$(grep -l DEVICE tests/kernels/test_*.py | sort -r)
run tests 150 $PYTHON $PYTEST $TESTS
if command -v compute-sanitizer >/dev/null; then
    run sanitizer 100 compute-sanitizer --error-exitcode 9 $PYTHON $PYTEST $TESTS -k "pads or beside or touched"
fi
run kernels 60 $PYTHON bench/kernel_table.py --shape 8b --json "$RESULTS/kernels.json"
if $PYTHON -c 'import msgspec' 2>/dev/null; then
    run steps-1.1b 70 $PYTHON bench/gpu_steps.py --shape 1.1b --resident 1000 --json "$RESULTS/steps-1.1b.json"
    run steps-8b 120 $PYTHON bench/gpu_steps.py --shape 8b --json "$RESULTS/steps-8b.json"
else
    echo "== steps: left out, for msgspec is not here; put its wheel into .whl/"
fi
$PYTHON bench/gpu_summary.py "$RESULTS" | tee "$RESULTS/summary.md"
[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
