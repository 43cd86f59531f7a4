#!/usr/bin/env bash
# Installs the programs that tests run, where they are missing and we may: a browser, Prometheus with
# its Alertmanager, and PostgreSQL. Tests that need one that is not there are skipped, and say so.
set -euo pipefail

has_postgres() {
    compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || command -v initdb >/dev/null
}

missing=()
for program in chromium prometheus prometheus-alertmanager; do
    command -v "$program" >/dev/null || missing+=("$program")
done
has_postgres || missing+=(postgresql)
[ ${#missing[@]} -gt 0 ] || exit 0

root=
[ "$(id -u)" -eq 0 ] || root='sudo -n'
policy=/usr/sbin/policy-rc.d
ours=
log=$(mktemp)
trap '[ -z "$ours" ] || $root rm -f "$policy"; rm -f "$log"' EXIT
# The packages start servers at once. Tests start their own.
if [ ! -e "$policy" ] &&
    printf '#!/bin/sh\nexit 101\n' | $root tee "$policy" >/dev/null 2>&1 &&
    $root chmod +x "$policy"; then
    ours=yes
fi

install() {
    $root apt-get install -y "${missing[@]}" >"$log" 2>&1 </dev/null
}

echo "installing what tests run: ${missing[*]}"
# The package lists of a fresh machine may be empty or old.
install || { $root apt-get update >"$log" 2>&1 </dev/null && install; } || {
    tail -n 3 "$log" >&2
    echo "note: ${missing[*]} could not be installed (that takes apt-get, and root or sudo without a" \
        "password). The tests that need them are skipped." >&2
}
