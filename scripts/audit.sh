#!/usr/bin/env bash
# Fails when a pinned version (of constraints.txt, or the file that is given) has a known vulnerability, by OSV (https://osv.dev).
# Where OSV cannot be reached it says so and succeeds: a test must not fail for the network. OSV_URL is another such service.
set -euo pipefail
cd "$(dirname "$0")/.."
pins=${1:-constraints.txt} osv=${OSV_URL:-https://api.osv.dev/v1/query}
report=$(mktemp)
trap 'rm -f "$report" "$report.log"' EXIT

ignored=( # one vulnerability a line, and why it does not matter here: --ignore-vuln PYSEC-2026-1  # reason
)

if ! reason=$(python - "$osv" 2>&1 << 'PROBE'
import sys, urllib.request
asked = urllib.request.Request(sys.argv[1], b'{"package": {"name": "pip", "ecosystem": "PyPI"}, "version": "26.0"}')
try:
    urllib.request.urlopen(asked, timeout=10).read()
except OSError as error:
    sys.exit(str(error))
PROBE
); then
  echo "known vulnerabilities of $pins: not checked: no network: $osv: $reason"
  exit 0
fi

code=0
pip-audit --requirement "$pins" --no-deps --disable-pip --vulnerability-service osv --osv-url "$osv" --progress-spinner off \
  --format json --output "$report" "${ignored[@]}" 2> "$report.log" || code=$?
if [ ! -s "$report" ]; then
  echo "known vulnerabilities of $pins: pip-audit ended with $code and no report:"
  tail -n 3 "$report.log"
  exit 1
fi
exec python - "$report" "$pins" << 'TELL'
import json, sys
found = json.load(open(sys.argv[1]))["dependencies"]
skipped = [one["name"] for one in found if "skip_reason" in one]
bad = [(one, vulnerability) for one in found for vulnerability in one.get("vulns", [])]
for one, vulnerability in bad:
    fixed = ", ".join(vulnerability["fix_versions"]) or "no version"
    print(f"{one['name']} {one['version']}: {vulnerability['id']}: fixed in {fixed}: {vulnerability['description'][:200]}")
print(f"known vulnerabilities of {sys.argv[2]}: {len(bad)} in {len(found) - len(skipped)} packages")
if skipped:
    print("not checked: " + ", ".join(skipped))
sys.exit(bool(bad) or len(found) == len(skipped))
TELL
