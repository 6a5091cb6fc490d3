#!/usr/bin/env bash
# Show that AutoGPTQ 0.7.1 loads a GPTQ checkpoint written by qlora and computes the same logits (CPU, fp32).
#
#   bash scripts/interop/autogptq.sh GPTQ_DIR [VENV_DIR]
#
# AutoGPTQ does not import beside transformers 5, so it gets an environment of its own, made once in VENV_DIR
# (default: ~/.cache/qlora/venv-autogptq, 1.5 GB). Exit code 0: they agree; 1: they do not; 2: wrong arguments.
#
#   PYTHON        Python with qlora installed, for the reference   (default: .venv/bin/python)
#   QLORA_PYTHON  CPython 3.10 or 3.11 to make the environment with (default: PYTHON); AutoGPTQ has no later wheels
#   QLORA_CACHE   the cache folder                                 (default: ~/.cache/qlora)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# -ge 1 ] && [ $# -le 2 ] || { echo "usage: autogptq.sh GPTQ_DIR [VENV_DIR]" >&2; exit 2; }
checkpoint=$1
venv=${2:-${QLORA_CACHE:-$HOME/.cache/qlora}/venv-autogptq}
PYTHON=${PYTHON:-$here/../../.venv/bin/python}
requirements=$here/autogptq-requirements.txt

[ -f "$checkpoint/quantize_config.json" ] || {
  echo "$checkpoint: no quantize_config.json, so not a GPTQ checkpoint; name a directory that qlora quantize wrote" >&2
  exit 2
}

if ! cmp -s "$requirements" "$venv/installed.txt"; then
  maker=${QLORA_PYTHON:-$PYTHON}
  "$maker" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 11))' || {
    echo "AutoGPTQ 0.7.1 has wheels for CPython 3.10 or 3.11 only, and $maker is another; name one in QLORA_PYTHON" >&2
    exit 2
  }
  echo "installing AutoGPTQ into $venv (once) …"
  "$maker" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements" \
    2> >(grep -v '^WARNING: Location' >&2)
  cp "$requirements" "$venv/installed.txt"
fi

logits=$(mktemp -d)
trap 'rm -rf "$logits"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
export HF_HUB_DISABLE_PROGRESS_BARS=1 CUDA_VISIBLE_DEVICES=
"$PYTHON" "$here/autogptq_compare.py" reference "$checkpoint" "$logits/logits.safetensors"
"$venv/bin/python" "$here/autogptq_compare.py" compare "$checkpoint" "$logits/logits.safetensors"
