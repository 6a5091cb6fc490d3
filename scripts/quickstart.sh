#!/usr/bin/env bash
# From a bare clone to a fine-tuned GPTQ checkpoint with its measurements: environment, model, `qlora run`.
#
#   bash scripts/quickstart.sh [section.key=value ...]
#
#   QLORA_CACHE   where models are kept (default: ~/.cache/qlora)
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
ensure_env gguf
bash scripts/fetch_model.sh
exec qlora run recipes/quickstart.yaml "$@"
