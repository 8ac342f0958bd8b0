#!/usr/bin/env bash
# Time and accuracy of scripts/demo in a fresh clone with an empty home folder, set-up included.
#
#   { time benchmarks/demo.sh; } 2>&1 | tee benchmarks/demo.txt
set -euo pipefail
source=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
git clone -q "$source" "$work/clone"
cd "$work/clone"
mkdir "$work/home"
echo "$(date -I)  benchmarks/demo.sh at $(git rev-parse --short HEAD)"
grep -m1 "model name" /proc/cpuinfo | cut -d: -f2 | xargs; echo "$(nproc) cores"
start=$SECONDS
env -u PYTHONPATH HOME="$work/home" UV_CACHE_DIR="$work/home/uv" scripts/demo 2>&1
echo "fresh clone to the end of scripts/demo: $((SECONDS - start)) s"
start=$(date +%s%N)
HOME="$work/home" bash -c 'extras=rtx,timm; source scripts/setup.sh; "$python" --version' > /dev/null
echo "set-up of a second run: $((($(date +%s%N) - start) / 1000000)) ms"
