#!/usr/bin/env bash
# Set-up and the tests.
#
# Usage: bash scripts/test.sh [--ci | --all] [pytest arguments]
#   (nothing)  the fast tests, some 5 minutes on two cores
#   --ci       those of whole commands and tiny trainings too, which .ci/run wants
#   --all      the slow ones too, and those that need a GPU where there is one
# Arguments go to pytest, e.g.: bash scripts/test.sh tests/test_config.py -k window
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
chosen="not whole and not slow and not gpu" all=no arguments=()
for argument in "$@"; do
    case "$argument" in
        --ci) chosen="not slow and not gpu" ;;
        --all) all=yes ;;
        -h | --help) sed -n '2,/^[^#]/{s/^# //p;s/^#$//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) arguments+=("$argument") ;;
    esac
done

bash "$root/scripts/setup.sh" dev
python=$root/.venv/bin/python
cd "$root"

if [[ $all == yes ]]; then
    chosen="not gpu"
    if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        chosen=""
    fi
fi
# Many small tensors: one thread a process, and two processes where there are two cores.
export OMP_NUM_THREADS=1
# Files in their order: by the number of tests in them, the few tests that take longest would come last, on one process.
# A process that ended at a test's limit is started again twice, no more: xdist begins with the same test in it.
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 2 -m "$chosen" ${arguments[@]+"${arguments[@]}"}
