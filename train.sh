#!/usr/bin/env bash
# bash train.sh [options of pivot.py]     the whole recipe on the embedded world, from nothing
# bash train.sh paper --encoder DIR --llm DIR --captions FILE --instruct FILE --preferences FILE [options]
#                                         the paper's recipe on real models and data; set
#                                         LAUNCH="torchrun --nproc-per-node=8" to use eight GPUs
# source train.sh setup                   only prepares the environment
# Makes .venv if no virtual environment is active; a torch of 2.9 or later that is there is kept.
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

run="${LAUNCH:-torchrun} pivot.py"
case "${1:-}" in
setup)
    ;;
paper)
    shift
    while [ $# -gt 0 ]; do
        case $1 in
        --encoder) encoder=$2 ;; --llm) llm=$2 ;; --captions) captions=$2 ;; --instruct) instruct=$2 ;;
        --preferences) preferences=$2 ;; *) break ;;
        esac
        shift 2
    done
    : "${encoder:?--encoder DIR}" "${llm:?--llm DIR}" "${captions:?--captions FILE}"
    : "${instruct:?--instruct FILE}" "${preferences:?--preferences FILE}"
    $run --preset paper --stage align --encoder "$encoder" --llm "$llm" --data "$captions" --template plain "$@"
    $run --preset paper --stage instruct --data "$instruct" "$@"
    for stage in sft dpo; do
        $run --preset paper --stage $stage --data "$preferences" "$@"
    done
    for stage in instruct sft dpo; do       # base, +SFT, +PIVOT: each encoder frozen under a fresh projector and LLM
        to="--preset paper --name paper-$stage --encoder runs/paper/$stage/encoder"
        $run $to --stage pivot-align --llm "$llm" --data "$captions" --template plain "$@"
        $run $to --stage pivot --data "$instruct" "$@"
    done
    ;;
*)
    $run --stage dpo "$@"
    $run --stage sft "$@"
    ;;
esac
