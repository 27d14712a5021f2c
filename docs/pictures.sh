#!/usr/bin/env bash
# Take the pictures that README and docs show (docs/pictures.py says which).
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONSAFEPATH=1
mkdir -p docs/images
.venv/bin/python docs/pictures.py docs/images "$@"
