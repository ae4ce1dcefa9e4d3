#!/usr/bin/env bash
# bash train.sh [options of tests/study.py]
#       the whole recipe on the embedded world, from nothing, one seed, and its report: runs/world/report.md
# bash train.sh study --seeds 5 [--first 100] [--sweeps SEEDS] [options]
#       the paper's study with intervals over seeds: runs/study/report.md
# bash train.sh paper --encoder DIR --llm DIR --captions FILE --instruct FILE --preferences FILE [--pivot FILE] [options
#       of pivot.py]: the paper's recipe on real models and data; with --dry-run only its price. --pivot: what the fresh
#       MLLMs learn from (default: what --instruct names). LAUNCH="torchrun --nproc-per-node=8" uses eight GPUs
# Makes .venv if no virtual environment is active; a torch of 2.9 or later that is there is kept. (tests/run.sh sources
# this file as `source train.sh setup`, for the environment alone.)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PIVOT needs Python 3.11 or later")'
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    source .venv/bin/activate
fi
if python -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)' 2>/dev/null; then
    python -m pip install --quiet -r <(grep -v '^torch' requirements.txt)
else
    python -m pip install --quiet -r requirements.txt
fi

case "${1:-}" in
setup)
    ;;
study)
    shift
    python tests/study.py --out runs/study "$@"
    ;;
paper)
    shift
    runs=runs options=()
    while [ $# -gt 0 ]; do
        case $1 in
        --encoder) encoder=$2; shift ;; --llm) llm=$2; shift ;; --captions) captions=$2; shift ;;
        --instruct) instruct=$2; shift ;; --preferences) preferences=$2; shift ;; --pivot) pivot=$2; shift ;;
        --runs) runs=$2; shift ;;
        *) options+=("$1") ;;
        esac
        shift
    done
    : "${encoder:?--encoder DIR}" "${llm:?--llm DIR}" "${captions:?--captions FILE}"
    : "${instruct:?--instruct FILE}" "${preferences:?--preferences FILE}" "${pivot:=$instruct}"
    run="${LAUNCH:-torchrun} pivot.py --preset paper --runs $runs"
    if [[ " ${options[*]} " == *" --dry-run "* ]]; then         # nothing is trained: all from the first models
        dry() { python pivot.py --preset paper --runs "$runs" --encoder "$encoder" --llm "$llm" "$@" "${options[@]}"; }
        plan=$(set -e; dry --stage align --data "$captions"; dry --stage instruct --data "$instruct"
               for stage in sft dpo; do
                   dry --stage $stage --data "$preferences" --take 20000 --max-prompt-chosen 1500
               done
               for row in base sft dpo; do
                   dry --stage pivot-align --data "$captions"; dry --stage pivot --data "$pivot"
               done)
        echo "$plan" | awk -F'|' 'NR < 3 || !/^\| (stage|-)/ { print; total += $(NF-1) } END { print "GPU-hours in all: " total }'
        exit
    fi
    $run --stage align --encoder "$encoder" --llm "$llm" --data "$captions" "${options[@]}"
    $run --stage instruct --data "$instruct" "${options[@]}"
    for stage in sft dpo; do
        $run --stage $stage --data "$preferences" --take 20000 --max-prompt-chosen 1500 "${options[@]}"
    done
    for stage in instruct sft dpo; do       # base, +SFT, +PIVOT: each encoder frozen under a fresh projector and LLM
        to="--name paper-$stage --encoder $runs/paper/$stage/encoder"
        $run $to --stage pivot-align --llm "$llm" --data "$captions" "${options[@]}"
        $run $to --stage pivot --data "$pivot" "${options[@]}"
    done
    ;;
*)
    python tests/study.py --out runs --name world "$@"
    ;;
esac
