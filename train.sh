#!/usr/bin/env bash
# The whole recipe on the embedded world, from nothing: bash train.sh [options of pivot.py]
# Makes .venv if no virtual environment is active; a torch of 2.9 or later that is already there is kept.
# `source train.sh setup` prepares the environment and nothing more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    source .venv/bin/activate
fi
if python -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)' 2>/dev/null; then
    python -m pip install --quiet -r <(grep -v '^torch' requirements.txt)
else
    python -m pip install --quiet -r requirements.txt
fi
[ "${1:-}" != setup ] || return 0

torchrun pivot.py --stage dpo "$@"
torchrun pivot.py --stage sft "$@"
