#!/usr/bin/env bash
# Take the pictures that the README shows: the demo's page in headless Chromium.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
.venv/bin/lmtt trace --prompt "When Mary and John went to the store, John gave a drink to" --html "$work/route.html" >/dev/null
chromium --headless --no-sandbox --disable-gpu --disable-background-networking --hide-scrollbars \
  --user-data-dir="$work/profile" --window-size=1500,1180 --screenshot=docs/images/route.png "file://$work/route.html"
