#!/usr/bin/env bash
# Makes .venv beside this folder and installs longtake into it (editable) with the versions of constraints.txt.
# Does nothing when constraints.txt, pyproject.toml and the Python of .venv are those of the last complete set-up.
#
# Usage: [PYTHON=/path/to/python] bash scripts/setup.sh [dev] [--cpu | --torch-index URL] [--uv]
#   dev                what tests, lint and types need, too
#   --cpu              torch without CUDA, from PyTorch's own index
#   --torch-index URL  torch from another index, e.g. https://download.pytorch.org/whl/cu128 for another CUDA
#   --uv               uv instead of pip: faster, and brings a Python where there is none. pip stays the default, since
#                      only it reads pip.conf
# Where torch comes from is remembered for later calls. docs/install.md says more. It prints to stderr only.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
extra="" index="" uv=no

say() { printf '%s\n' "$*" >&2; }
fail() { say "setup.sh: $*"; exit 1; }
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

while [[ $# -gt 0 ]]; do
    case "$1" in
        dev) extra=dev; shift ;;
        --cpu) index=https://download.pytorch.org/whl/cpu; shift ;;
        --torch-index) [[ $# -ge 2 ]] || fail "--torch-index needs the URL of an index"; index=$2; shift 2 ;;
        --torch-index=*) index=${1#*=}; shift ;;
        --uv) uv=yes; shift ;;
        -h | --help) sed -n '2,/^[^#]/{s/^# //p;s/^#$//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) fail "unknown argument '$1'; there are dev, --cpu, --torch-index URL and --uv" ;;
    esac
done
[[ -z $index || $index =~ ^(https?|file):// ]] || fail "--torch-index $index must begin with https://, http:// or file://"
[[ $uv == no ]] || command -v uv >/dev/null || fail "--uv: uv is not installed; install it, or leave --uv out"

if [[ -n ${PYTHON-} ]]; then
    command -v "$PYTHON" >/dev/null 2>&1 || fail "PYTHON=$PYTHON is no program; give the path of a Python, or unset it"
    is_new_enough "$PYTHON" ||
        fail "PYTHON=$PYTHON is $("$PYTHON" --version 2>&1 || echo 'no Python'); Python 3.11 or newer is needed"
fi

find_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.13 python; do
        if command -v "$name" >/dev/null 2>&1 && is_new_enough "$name"; then
            printf '%s' "$name"
            return
        fi
    done
    fail "no Python 3.11 or newer was found (python3 is $(python3 --version 2>&1 || echo missing));" \
        "install one, name it with PYTHON=/path/to/python3.11 bash scripts/setup.sh, or use --uv"
}

make_venv() {
    if [[ $uv == yes ]]; then
        say "Making .venv with uv"
        uv venv --seed --python "${PYTHON:->=3.11}" "$venv" >&2 || fail "uv could not make .venv; see its message above"
        return
    fi
    local python
    python=$(find_python)
    say "Making .venv with $("$python" --version)"
    if ! "$python" -m venv "$venv" >&2; then
        rm -rf "$venv"
        fail "$python cannot make a virtual environment; on Debian and Ubuntu install the package python3-venv, or use --uv"
    fi
}

if [[ ! -e $venv ]]; then
    make_venv
elif ! is_new_enough "$venv/bin/python"; then
    fail "the Python of $venv does not run or is older than 3.11; remove that folder and start again"
fi

# Where torch comes from: as asked for now, or as it was before.
chosen=$venv/.longtake-torch-index
before=""
[[ ! -f $chosen ]] || before=$(<"$chosen")
index=${index:-$before}

wanted=$({
    cat "$root/constraints.txt" "$root/pyproject.toml"
    printf '%s\n' "$index"
    "$venv/bin/python" -c 'import sys; print(sys.version, sys.prefix)'
} | cksum)
stamp=$venv/.longtake-setup
# The set-up for the tests holds everything that the plain one does.
for made in "$stamp-$extra" "$stamp-dev"; do
    if [[ -f $made && $(<"$made") == "$wanted" ]]; then
        exit 0
    fi
done

# What pip and uv say, as a line a package with its size; all of it where they fail.
log=$venv/.longtake-setup.log
install() {
    if [[ $uv == yes ]]; then
        VIRTUAL_ENV=$venv uv pip "$@"
    else
        "$venv/bin/python" -m pip --disable-pip-version-check "$@"
    fi 2>&1 | tee "$log" | awk '/Downloading|Using cached|Installing collected|Prepared|Installed/ {print substr("  " $0, 1, 100); fflush()}' >&2
}

free=$(df -Pk "$venv" | awk 'NR == 2 {printf "%.1f", $4 / 1048576}')
say "Installing the versions of constraints.txt into .venv ($free GB of disk are free there; it takes 2, with CUDA's libraries 5)"
rm -f "$stamp"-*
if [[ $index != "$before" ]]; then
    install uninstall $([[ $uv == yes ]] || echo -y) torch # another build of the same version would stay
fi
# torch is asked for by its exact version: pip then takes a CPU build where it has one at hand.
torch=$(grep '^torch==' "$root/constraints.txt")
from=()
if [[ -n $index ]]; then
    from=(--extra-index-url "$index")
    [[ $uv == no ]] || from+=(--index-strategy unsafe-best-match) # as pip: the newest of all indexes
fi
if ! install install ${from[@]+"${from[@]}"} -c "$root/constraints.txt" "$torch" -e "$root[serve${extra:+,$extra}]"; then
    tail -n 20 "$log" >&2
    fail "the versions of constraints.txt could not be installed; see the message above, all of it in $log"
fi
printf '%s' "$index" >"$chosen"
printf '%s' "$wanted" >"$stamp-$extra"
say "Done: .venv takes $(du -sh "$venv" | cut -f1) of disk; next: .venv/bin/longtake --help"
