#!/usr/bin/env bash
# Everything CI runs: environment, style, types, tests. Under five minutes on two cores once installed.
#
#   bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
ensure_env dev,gguf,gptq,eval
bash scripts/fetch_model.sh
ensure_chromium
ruff check .
ruff format --check --quiet .
mypy
# Two workers of one thread each: tiny models gain nothing from more threads.
export OMP_NUM_THREADS=1
suite=(python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder)
[ $# -eq 0 ] || exec "${suite[@]}" "$@"
# The whole suite also shows what works with what: recipes/support.md must say the same.
results=$(mktemp -d)
trap 'rm -rf "$results"' EXIT
QLORA_SUPPORT_RESULTS=$results "${suite[@]}"
python scripts/support_table.py --check "$results"
