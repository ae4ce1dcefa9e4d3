#!/usr/bin/env bash
# All tests, with their own set-up, two files at a time: bash tests/run.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source train.sh setup
python -m pip install --quiet -r tests/requirements.txt
python -m pytest tests -n 2 --dist loadfile "$@"
