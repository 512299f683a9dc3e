#!/usr/bin/env bash
# Makes .venv beside this folder and installs longtake into it (editable) with the versions of constraints.txt.
# Does nothing when constraints.txt, pyproject.toml and the Python of .venv are those of the last complete set-up.
# Usage: scripts/setup.sh [dev]      "dev" adds what tests, lint and types need. It prints to stderr only.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

say() { printf '%s\n' "$*" >&2; }
fail() { say "setup.sh: $*"; exit 1; }
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

case "${1-}" in
    "" | dev) extra=${1-} ;;
    -h | --help) sed -n '2,/^[^#]/{s/^# //p;s/^#$//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) fail "unknown argument '$1'; the only one is: dev" ;;
esac

find_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.13 python; do
        if command -v "$name" >/dev/null 2>&1 && is_new_enough "$name"; then
            printf '%s' "$name"
            return
        fi
    done
    fail "no Python 3.11 or newer was found (python3 is $(python3 --version 2>&1 || echo missing));" \
        "install one, or name it: PYTHON=/path/to/python3.11 bash scripts/..."
}

if [[ ! -e $venv ]]; then
    python=$(find_python)
    say "Making .venv with $("$python" --version)"
    if ! "$python" -m venv "$venv" >&2; then
        rm -rf "$venv"
        fail "$python cannot make a virtual environment; on Debian and Ubuntu install the package python3-venv"
    fi
elif ! is_new_enough "$venv/bin/python"; then
    fail "the Python of $venv does not run or is older than 3.11; remove that folder and start again"
fi

wanted=$({
    cat "$root/constraints.txt" "$root/pyproject.toml"
    "$venv/bin/python" -c 'import sys; print(sys.version, sys.prefix)'
} | cksum)
stamp=$venv/.longtake-setup
# The set-up for the tests holds everything that the plain one does.
for made in "$stamp-$extra" "$stamp-dev"; do
    if [[ -f $made && $(<"$made") == "$wanted" ]]; then
        exit 0
    fi
done

say "Installing the versions of constraints.txt into .venv (about two minutes)"
rm -f "$stamp"-*
# torch is asked for by its exact version: pip then takes a CPU build where it has one at hand.
torch=$(grep '^torch==' "$root/constraints.txt")
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -c "$root/constraints.txt" "$torch" -e "$root[serve${extra:+,$extra}]" >&2 ||
    fail "pip could not install the versions of constraints.txt; see its message above"
printf '%s' "$wanted" >"$stamp-$extra"
