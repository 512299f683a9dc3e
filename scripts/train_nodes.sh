#!/usr/bin/env bash
# Training on several machines with torchrun: the same command on each of them, in any order. It needs the set-up
# (scripts/setup.sh, once, in a folder that all see), and weights, data and log folder at the same paths everywhere.
#
# Usage: bash scripts/train_nodes.sh --nodes N --head HOST --config FILE [options] [key=value ...]
#   --nodes N        machines
#   --head HOST      one of the machines, HOST or HOST:PORT (29500); they meet there
#   --config FILE    a stage or a job
#   --gpus N         processes on this machine, one a GPU; 0 = one process on the CPU. Default: every GPU, or 0
#   --id NAME        name of the run, where several meet at one HOST:PORT; default longtake
#   --grace SECONDS  time for the last checkpoint after SIGTERM, before torchrun kills; default 600
#   --python FILE    default: .venv/bin/python
#   key=value        wins over the file, e.g. batch_size=16; `longtake config stage` lists the keys
# The same command goes on where the run stopped, also on another number of machines that divides batch_size.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
nodes="" head="" config="" gpus="" id=longtake grace=600 python=$root/.venv/bin/python overrides=()

fail() { printf 'train_nodes.sh: %s\n' "$*" >&2; exit 2; }
need() { [[ $2 -ge 2 ]] || fail "$1 needs a value; see --help"; }

while [[ $# -gt 0 ]]; do
    case "$1" in
        --nodes) need "$1" $#; nodes=$2; shift 2 ;;
        --head) need "$1" $#; head=$2; shift 2 ;;
        --config) need "$1" $#; config=$2; shift 2 ;;
        --gpus) need "$1" $#; gpus=$2; shift 2 ;;
        --id) need "$1" $#; id=$2; shift 2 ;;
        --grace) need "$1" $#; grace=$2; shift 2 ;;
        --python) need "$1" $#; python=$2; shift 2 ;;
        --nodes=* | --head=* | --config=* | --gpus=* | --id=* | --grace=* | --python=*)
            set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
        -h | --help) sed -n '2,/^[^#]/{s/^# //p;s/^#$//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
        -*) fail "unknown option $1; see --help" ;;
        *=*) overrides+=("$1"); shift ;;
        *) fail "'$1' is neither an option nor key=value; see --help" ;;
    esac
done
[[ $nodes =~ ^[1-9][0-9]*$ ]] || fail "--nodes '$nodes' must be a number of machines"
[[ -n $head ]] || fail "--head is missing: the name of one of the machines, the same on all of them"
[[ -f $config ]] || fail "--config '$config' does not exist"
[[ -z $gpus || $gpus =~ ^[0-9]+$ ]] || fail "--gpus $gpus must be a number"
[[ $grace =~ ^[0-9]+$ ]] || fail "--grace $grace must be a number of seconds"
command -v "$python" >/dev/null || fail "$python does not exist; run scripts/setup.sh once, or give --python"
[[ $head == *:* ]] || head=$head:29500

# The python need not have the package installed.
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
job=("$config" ${overrides[@]+"${overrides[@]}"})
# A wrong key or value ends here with one message, before any machine waits for another.
"$python" -m longtake train "${job[@]}" --check >/dev/null

present=$("$python" -c 'import torch; print(torch.cuda.device_count())')
gpus=${gpus:-$present}
((gpus <= present)) || fail "--gpus $gpus: this machine has $present; give at most that, or 0 for the CPU"
processes=$((gpus > 0 ? gpus : 1))
if ((gpus == 0)); then
    export CUDA_VISIBLE_DEVICES=""
fi
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
threads=$((cores / processes))
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
# Of torchrun: 30 seconds otherwise, too few for a checkpoint of large networks. Older versions of torch do not read it.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-$grace}"

meet=(--nnodes "$nodes" --nproc-per-node "$processes" --rdzv-backend c10d --rdzv-endpoint "$head" --rdzv-id "$id")
if [[ ${head%:*} == 127.0.0.1 || ${head%:*} == localhost ]]; then
    # All "machines" are this one: nothing need leave it, and its own name need not be known to it.
    meet+=(--local-addr 127.0.0.1)
    export GLOO_SOCKET_IFNAME="${GLOO_SOCKET_IFNAME:-lo}"
fi
exec "$python" -m torch.distributed.run "${meet[@]}" -m -- longtake train "${job[@]}"
