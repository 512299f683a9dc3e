#!/usr/bin/env bash
# Set-up and the main job: writes the toy data, trains the causal initialisation and the distillation from the toy
# teacher that ships with the package, generates, measures and prints a table. Run again, it goes on where it stopped.
#
# Usage: bash scripts/train_i2v_local.sh [--gpus N] [--config FILE] [--logdir DIR] [--restarts N] [--no-setup]
#                                        [stage.key=value ...]
#   --gpus N       one process on each of N GPUs; 0 = two processes on the CPU. Default: every GPU, or 0 without one.
#   --config FILE  a job, or one stage; default configs/toy/i2v.yaml
#   --logdir DIR   where everything is written; default: what the file says (outputs/toy)
#   --restarts N   when a process dies, start all anew from the newest checkpoint, at most N times; default 0
#   --no-setup     use the python on the PATH as it is, instead of .venv
#   stage.key=value  wins over the file, e.g. distill.max_steps=100; `longtake config` lists the keys
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
config=$root/configs/toy/i2v.yaml
logdir=() overrides=() gpus="" setup=yes restarts=0

fail() { printf 'train_i2v_local.sh: %s\n' "$*" >&2; exit 2; }
need() { [[ $2 -ge 2 ]] || fail "$1 needs a value; see --help"; }

while [[ $# -gt 0 ]]; do
    case "$1" in
        --gpus) need "$1" $#; gpus=$2; shift 2 ;;
        --config) need "$1" $#; config=$2; shift 2 ;;
        --logdir) need "$1" $#; logdir=(--logdir "$2"); shift 2 ;;
        --restarts) need "$1" $#; restarts=$2; shift 2 ;;
        --gpus=* | --config=* | --logdir=* | --restarts=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        --no-setup) setup=no; shift ;;
        -h | --help) sed -n '2,/^[^#]/{s/^# //p;s/^#$//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
        -*) fail "unknown option $1; see --help" ;;
        *=*) overrides+=("$1"); shift ;;
        *) fail "'$1' is neither an option nor stage.key=value; see --help" ;;
    esac
done
[[ -z $gpus || $gpus =~ ^[0-9]+$ ]] || fail "--gpus $gpus must be a number"
[[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts $restarts must be a number"
[[ -f $config ]] || fail "--config $config does not exist"

if [[ $setup == yes ]]; then
    bash "$root/scripts/setup.sh"
    python=$root/.venv/bin/python
else
    python=$(command -v python || command -v python3) || fail "--no-setup: there is no python on the PATH"
    # The present python need not have the package installed.
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
fi

job=("$config" ${logdir[@]+"${logdir[@]}"} ${overrides[@]+"${overrides[@]}"})
# A wrong key or value ends here with one message, before any process is started. Meanwhile GPUs are counted: by their
# driver where there is one that torch is made for, since importing torch takes seconds.
"$python" -m longtake train "${job[@]}" --check >/dev/null &
check=$!
machine=$("$python" -c '
import ctypes, os, runpy
from importlib.util import find_spec
def gpus():
    number = ctypes.c_int()
    try:
        if runpy.run_path(os.path.join(os.path.dirname(find_spec("torch").origin), "version.py"))["cuda"]:
            cuda = ctypes.CDLL("libcuda.so.1")
            if cuda.cuInit(0) == cuda.cuDeviceGetCount(ctypes.byref(number)) == 0:
                return number.value
    except (OSError, AttributeError, KeyError):
        pass
    import torch
    return torch.cuda.device_count()
print(gpus(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
wait "$check"
read -r present cores <<<"$machine"
gpus=${gpus:-$present}
((gpus <= present)) || fail "--gpus $gpus: this machine has $present; give at most that, or 0 for the CPU"
if ((gpus > 0)); then
    processes=$gpus
else
    processes=2
    export CUDA_VISIBLE_DEVICES=""
fi
threads=$((cores / processes))
export OMP_NUM_THREADS=$((threads > 0 ? threads : 1))

# torchrun has nothing to do for one process that is not started anew, and takes seconds to begin. What a cluster's own
# launcher left in the environment, which torchrun would set anew, is not of this process.
if ((processes == 1 && restarts == 0)); then
    unset RANK WORLD_SIZE LOCAL_RANK
    exec "$python" -u -m longtake train "${job[@]}"
fi
program=(-m longtake)
if setpriv --pdeathsig KILL true 2>/dev/null; then
    # torchrun gives each process a session of its own: a killed torchrun would leave them training, unseen.
    program=(--no-python setpriv --pdeathsig KILL "$python" -u -m longtake)
fi
# How long torchrun waits after SIGTERM for the last checkpoint (versions before this variable wait 30 seconds).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" --max-restarts "$restarts" \
    "${program[@]}" train "${job[@]}"
