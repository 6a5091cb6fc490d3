# Sourced by the other scripts: a Python environment of the project's own in .venv, made once and updated when the
# requirements change. Quiet when there is nothing to do.
#
#   QLORA_PYTHON   the Python to make it with (default: python3)

ensure_env() { # ensure_env EXTRAS, for example: ensure_env dev,gguf,gptq
  local extras=$1 stamp have
  stamp="$extras $(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)"
  have=$(cat .venv/qlora-stamp 2>/dev/null || true)
  if [ "$have" != "$stamp" ]; then
    [ -x .venv/bin/python ] || "${QLORA_PYTHON:-python3}" -m venv .venv
    echo "installing into .venv (once, and when requirements change) …"
    # torch first and by itself: with it in place nothing else pulls another build.
    if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
      install torch
    else
      install torch==2.13.0
    fi
    # The pinned versions have wheels for these Pythons; others take the newest that pyproject.toml allows.
    case "$(.venv/bin/python -c 'import sys; print(*sys.version_info[:2], sep=".")')" in
      3.11 | 3.12 | 3.13) install -c constraints.txt -e ".[$extras]" ;;
      *) install -e ".[$extras]" ;;
    esac
    echo "$stamp" > .venv/qlora-stamp
  fi
  export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
}

install() {
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" 2> >(grep -v '^WARNING: Location' >&2)
}

ensure_chromium() { # the browser that tests of the report are run in; without it they are skipped, and say so
  command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null && return
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing chromium (once) …"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
  else
    echo "chromium is not installed: tests of the report in a browser will be skipped" >&2
  fi
}
