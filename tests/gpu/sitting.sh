#!/usr/bin/env bash
# One sitting at a machine with a GPU: every stage by name, in order of value, whatever fails.
#
#     tests/gpu/sitting.sh [--site DIR] MODELS_DIR [GSM8K_DIR] [OUT_DIR] [-- stage ...]
#
# DIR holds wheels that are already installed (PYTHONPATH), MODELS_DIR the model folders, GSM8K_DIR
# train.jsonl and test.jsonl, OUT_DIR (./gpu-sitting) gets a log per stage, figures.jsonl and runs.
# No network is used. PYTHON chooses the interpreter; STAGE_SECONDS is one limit for every stage,
# GPU_REAL_SECONDS the time of the real model's run. A table comes last; exit status 0 if no stage
# failed, 1 if one did, 2 for a wrong argument.
set -u

STAGES=(env generate float16 unsloth memory sync vllm speed real)
declare -A LIMIT=([env]=600 [generate]=1500 [float16]=1200 [unsloth]=2000 [memory]=2400
    [sync]=1200 [vllm]=2000 [speed]=3600 [real]=2400)
declare -A TESTS=(
    [env]="test_environment.py"
    [generate]="test_training.py -k [generate]"
    [float16]="test_training.py -k [generate-float16]"
    [unsloth]="test_training.py -k [unsloth"
    [memory]="test_memory_cap.py"
    [sync]="test_vllm_sync.py"
    [vllm]="test_training.py -k [vllm"
    [speed]="test_speed.py"
    [real]="test_real_run.py"
)
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)

refuse() {
    echo "error: $1" >&2
    echo "usage: sitting.sh [--site DIR] MODELS_DIR [GSM8K_DIR] [OUT_DIR] [-- stage ...]" >&2
    exit 2
}

site=""
folders=()
chosen=()
while [ $# -gt 0 ]; do
    case $1 in
        --site) [ $# -gt 1 ] || refuse "--site needs a folder"; site=$2; shift 2 ;;
        --) shift; chosen=("$@"); break ;;
        -*) refuse "unknown flag $1" ;;
        *) folders+=("$1"); shift ;;
    esac
done
[ ${#folders[@]} -ge 1 ] || refuse "MODELS_DIR is missing"
[ ${#folders[@]} -le 3 ] || refuse "too many folders: ${folders[*]}"
for folder in ${site:+"$site"} "${folders[@]:0:2}"; do
    [ -d "$folder" ] || refuse "$folder is no folder"
done
[ ${#chosen[@]} -gt 0 ] || chosen=("${STAGES[@]}")
for stage in "${chosen[@]}"; do
    [ -n "${TESTS[$stage]:-}" ] || refuse "no stage $stage; the stages are: ${STAGES[*]}"
done

OUT=${folders[2]:-gpu-sitting}
mkdir -p "$OUT" || refuse "$OUT cannot be written"
OUT=$(cd "$OUT" && pwd)
GPU_MODELS=$(cd "${folders[0]}" && pwd)
if [ ${#folders[@]} -gt 1 ]; then
    GPU_GSM8K=$(cd "${folders[1]}" && pwd)
    export GPU_GSM8K
fi
export GPU_MODELS GPU_OUT=$OUT HF_HUB_OFFLINE=1
[ -z "$site" ] || site=$(cd "$site" && pwd)
export PYTHONPATH=$ROOT${site:+:$site}${PYTHONPATH:+:$PYTHONPATH}
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x "$ROOT/.venv/bin/python" ] || PYTHON=$ROOT/.venv/bin/python
fi

declare -A RESULT SECONDS_OF NOTE

# The line of a log that says most: a figure, the error, or why nothing was run.
last_line() {
    local log=$1 result=$2 line=""
    case $result in
        ok) line=$(grep -a '^figure: ' "$log" | tail -n 1) ;;
        skipped) line=$(grep -a '^SKIPPED ' "$log" | tail -n 1 | sed 's/^SKIPPED \[[0-9]*\] [^ ]* //') ;;
        failed) line=$(grep -aE '^E  |^(error|[A-Za-z.]*Error): ' "$log" | tail -n 1) ;;
    esac
    [ -n "$line" ] || line=$(grep -av '^[[:space:]=]*$' "$log" | tail -n 1)
    printf '%s' "$line" | tr '\t' ' ' | cut -c 1-110
}

run_stage() {
    local stage=$1 log=$OUT/$1.log limit=${STAGE_SECONDS:-${LIMIT[$1]}} began=$SECONDS status words
    read -ra words <<<"${TESTS[$stage]}"
    # `timeout` leads a process group of its own, so that nothing of a stage outlives it.
    timeout -k 20 "$limit" "$PYTHON" -m pytest "$HERE/${words[0]}" "${words[@]:1}" \
        -s -v -rs -p no:cacheprovider >"$log" 2>&1 </dev/null &
    child=$!
    wait "$child"
    status=$?
    kill -KILL -- "-$child" 2>/dev/null
    child=""
    SECONDS_OF[$stage]=$((SECONDS - began))
    if [ $status -eq 124 ] || [ $status -eq 137 ]; then
        RESULT[$stage]=failed
        NOTE[$stage]="ended at its limit of $limit s"
        return
    fi
    RESULT[$stage]=failed
    if [ $status -eq 0 ]; then
        RESULT[$stage]=skipped
        ! grep -aqE '(^|[ =])[0-9]+ (passed|xfailed)' "$log" || RESULT[$stage]=ok
    fi
    NOTE[$stage]=$(last_line "$log" "${RESULT[$stage]}")
}

child=""
stopped=""
# The first interrupt ends the stage that runs; the table still comes.
trap 'stopped=1; [ -z "$child" ] || kill -KILL -- "-$child" 2>/dev/null' INT TERM

gpu=$(nvidia-smi -L 2>/dev/null | grep -m 1 '^GPU')
echo "python: $PYTHON; models: $GPU_MODELS; data: ${GPU_GSM8K:-arithmetic}; out: $OUT"
echo "gpu: ${gpu:-none}"
for stage in "${chosen[@]}"; do
    if [ -z "$gpu" ] || [ -n "$stopped" ]; then
        RESULT[$stage]=skipped
        SECONDS_OF[$stage]=0
        NOTE[$stage]="no GPU: nvidia-smi lists none"
        [ -z "$stopped" ] || NOTE[$stage]="the sitting was interrupted"
        echo "${NOTE[$stage]}" >"$OUT/$stage.log"
    else
        echo "$(date +%H:%M:%S) $stage ..."
        run_stage "$stage"
    fi
    echo "$stage: ${RESULT[$stage]}: ${NOTE[$stage]}"
done

failures=0
{
    echo
    printf '%-9s %-8s %8s  %s\n' stage result seconds "last line"
    for stage in "${chosen[@]}"; do
        printf '%-9s %-8s %8d  %s\n' "$stage" "${RESULT[$stage]}" "${SECONDS_OF[$stage]}" "${NOTE[$stage]}"
    done
} | tee "$OUT/table.txt"
for stage in "${chosen[@]}"; do
    [ "${RESULT[$stage]}" != failed ] || failures=1
done
exit $failures
