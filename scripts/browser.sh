#!/usr/bin/env bash
# Installs Chromium for the tests that look at a browser, where this machine has none; needs .venv of scripts/setup.sh.
#
# Usage: bash scripts/browser.sh
# Uses chromium, chromium-browser or google-chrome of PATH where there is one. Else Debian's package `chromium` where
# apt-get has it (root), else what Playwright fetches, with the system's packages that it needs. It prints to stderr only.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
say() { printf '%s\n' "$*" >&2; }

case "${1-}" in
    "") ;;
    -h | --help) sed -n '2,/^[^#]/{s/^# //p;s/^#$//p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) say "browser.sh: it takes no argument '$1'"; exit 1 ;;
esac
for name in chromium chromium-browser google-chrome; do
    if found=$(command -v "$name"); then
        say "The tests' browser is $found"
        exit 0
    fi
done
if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
    say "No Chromium is in PATH: apt-get installs Debian's (about 300 MB)"
    if { apt-get update -q && apt-get install -q -y --no-install-recommends chromium; } >&2; then
        exit 0
    fi
    say "apt-get could not; its message is above"
fi
if [[ ! -x $python ]]; then
    say "browser.sh: $python is missing; run bash scripts/setup.sh dev first"
    exit 1
fi
say "Playwright installs a Chromium (about 300 MB) and the libraries that it needs"
"$python" -m playwright install --with-deps chromium >&2
