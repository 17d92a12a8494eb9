#!/usr/bin/env bash
# Runs concord from a fresh clone; needs python3 (3.11 or newer) with venv and nothing else.
#
#   bash deploy/run.sh simulate          the same as `concord simulate`
#   bash deploy/run.sh test              the tests; more arguments go to pytest
#   bash deploy/run.sh wheel [DIR]       the partners' distribution, concord-node, as one file in DIR (dist/ by default)
#   bash deploy/run.sh --with EXTRA,… …  also installs extras of pyproject.toml
#
# The first use makes .venv and installs into it (messages on standard error). Later uses start at once.
# PyTorch: a CPU build is taken wherever pip's index offers one (say so with PIP_EXTRA_INDEX_URL). On a machine with an
# NVIDIA GPU the CUDA build is installed and checked to see the GPU.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${CONCORD_VENV:-$root/.venv}
torch="torch>=2.13,<2.14"

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "error: $*"
  exit 1
}

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 \
      && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s' "$candidate"
      return
    fi
  done
  fail "python3 of version 3.11 or newer with venv is needed; install it, or name it with PYTHON=…"
}

has_nvidia() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; }

install_torch() {
  "$venv/bin/python" -m pip install --quiet "$torch" >&2
  has_nvidia || return 0
  if ! "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    local version
    version=$("$venv/bin/python" -c 'import torch; print(torch.__version__.split("+")[0])')
    say "An NVIDIA GPU is here, but this torch does not see it; installing the CUDA build of $version."
    "$venv/bin/python" -m pip install --quiet --force-reinstall --no-deps "torch===$version" >&2
    "$venv/bin/python" -m pip install --quiet "torch===$version" >&2
    "$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
      || say "warning: torch still does not see the GPU (driver too old?); training will use the CPU."
  fi
}

install() {
  local extras=$1 python
  if [ ! -x "$venv/bin/python" ]; then
    python=$(find_python)
    say "First use: installing concord into $venv (a few minutes)."
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --upgrade pip >&2
    install_torch
  fi
  say "Installing concord${extras:+ with $extras}."
  "$venv/bin/python" -m pip install --quiet --editable "$root${extras:+[$extras]}" >&2
}

# The stamp names what is installed: the project file's checksum and the extras.
ensure() {
  local wanted=$1 stamp="$venv/concord-installed" sum have="" all
  sum=$(cksum <"$root/pyproject.toml")
  if [ -f "$stamp" ]; then have=$(sed -n 2p "$stamp"); fi
  all=$(printf '%s' "$have,$wanted" | tr ',' '\n' | sed '/^$/d' | sort -u | paste -sd, -)
  if [ -f "$stamp" ] && [ "$(sed -n 1p "$stamp")" = "$sum" ] && [ "$have" = "$all" ]; then return; fi
  install "$all"
  printf '%s\n%s\n' "$sum" "$all" >"$stamp"
}

extras=""
if [ "${1:-}" = "--with" ]; then
  [ $# -ge 2 ] || fail "--with needs the extras' names, for example --with test,lint"
  extras=$2
  shift 2
fi
if [ "${1:-}" = "test" ]; then
  shift
  ensure "${extras:+$extras,}test"
  cd "$root"
  if [ $# -eq 0 ]; then set -- -n 2 --dist loadfile --no-loadscope-reorder; fi # all: two files at a time
  exec "$venv/bin/python" -m pytest "$@"
fi
if [ "${1:-}" = "wheel" ]; then
  ensure "${extras:+$extras,}build"
  exec "$venv/bin/python" -m build --wheel --no-isolation --outdir "${2:-$root/dist}" "$root/client"
fi
ensure "$extras"
exec "$venv/bin/concord" "$@"
