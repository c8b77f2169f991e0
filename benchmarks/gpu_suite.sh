#!/usr/bin/env bash
# All that is to be known about a GPU, the most important first, in stages of less than 8 minutes each.
#
#   benchmarks/gpu_suite.sh [--stage 1|2|3|4] [--quick] [FOLDER]   results in FOLDER (default: benchmarks/results/suite-DATE)
#
#   1  the whole engine on ViT-B-48 and ViT-S-54 with batch 256, then the GPU tests of the kernels
#   2  the engine's model against the eager references, memory, DeepSpeed, the loader
#   3  every kernel and attention backend
#   4  the GPU tests of everything, and batch 64
#
# Without --stage: stage 1, and the last line says what to run next. A stage adds to what FOLDER holds. Each part has a
# limit and its own log; one that fails or runs out of time is reported and the rest goes on. Every result is on disk as
# soon as it is measured; SIGTERM and SIGINT end the part that runs, and the summary is written all the same.
# --quick: the smallest form of all stages in one, also for a machine without a GPU. Exit status 0 if every part passed.
# At the end: FOLDER/suite.json with everything measured, FOLDER/summary.md to read.
set -uo pipefail
cd "$(dirname "$0")/.."

quick=0
stage=1
folder=
while (($#)); do
    case $1 in
        --quick) quick=1 ;;
        --stage)
            stage=${2:-}
            [[ $stage == [1-4] ]] || { echo "stage is '$stage': give 1, 2, 3 or 4" >&2; exit 2; }
            shift
            ;;
        -*) echo "unknown flag $1: give --stage, --quick, a folder, or nothing" >&2; exit 2 ;;
        *) folder=$1 ;;
    esac
    shift
done
folder=${folder:-benchmarks/results/suite-$(date -u +%Y-%m-%dT%H%M%S)}
mkdir -p "$folder" || exit 1
folder=$(cd "$folder" && pwd)
touch "$folder/parts.tsv"
python=${PYTHON:-python}
failed=0
running=
stopped=

stop() {
    stopped=$1
    [[ -n $running ]] && kill -TERM -- "-$running" 2> /dev/null
}
trap 'stop TERM' TERM
trap 'stop INT' INT

# note NAME STATUS SECONDS LIMIT: one line of parts.tsv, in place of an earlier one of that name
note() {
    local kept
    kept=$(grep -v "^$1"$'\t' "$folder/parts.tsv")
    { [[ -n $kept ]] && printf '%s\n' "$kept"; printf '%s\t%s\t%s\t%s\n' "$@"; } > "$folder/parts.tmp"
    mv "$folder/parts.tmp" "$folder/parts.tsv"
}

# part NAME SECONDS COMMAND...
part() {
    local name=$1 limit=$2 started status
    shift 2
    [[ -n $stopped ]] && return
    printf '%-12s ' "$name"
    started=$(date +%s)
    # A process group of its own, so that all of a part can be ended; in the background, so that the traps run at once.
    setsid timeout --kill-after=10 "$limit" "$@" > "$folder/$name.log" 2>&1 &
    running=$!
    wait "$running"
    status=$?
    if [[ -n $stopped ]]; then
        wait "$running" 2> /dev/null
        status="stopped by SIG$stopped"
    fi
    running=
    note "$name" "$status" "$(($(date +%s) - started))" "$limit"
    case $status in
        0) echo "passed in $(($(date +%s) - started)) s" ;;
        5) echo "nothing to run here (pytest)" ;;
        124 | 137) echo "STOPPED after $limit s, see $folder/$name.log"; failed=1 ;;
        stopped*) echo "$status"; failed=1 ;;
        *) echo "FAILED ($status), see $folder/$name.log"; failed=1 ;;
    esac
}

# skip NAME REASON
skip() {
    [[ -n $stopped ]] && return
    printf '%-12s left out: %s\n' "$1" "$2"
    note "$1" "left out: $2" 0 0
}

has() { "$python" -c "import $1" 2> /dev/null; }

# step NAME SECONDS ARGUMENTS...: bench_step in a process of its own, results in FOLDER/NAME
step() {
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$python" -m benchmarks.bench_step --no-mae --variants paper --out "$folder/$name" --label "$name" "$@"
}

bench=("$python" -m pytest -q -p no:cacheprovider --benchmark-columns=median,iqr,rounds)
tests=("$python" -m pytest -q -p no:cacheprovider -m gpu)

# Limits: what a part would take by the count of its cases, times three. The engine on B-48: 390 million parameters made on
# the host (20 s), ten graphs compiled (60 s), thirty steps of 0.13 s. A kernel: four tests, one of them compiled, 0.4 s
# each. An attention case: a graph captured and 32 replays, 0.2 s.
stage_1() {
    if has deepspeed; then
        step headline 150 --models vit_b_48 --batch 256 --contestants engine_compiled --rounds 20
        step headline_s 120 --models vit_s_54 --batch 256 --contestants engine_compiled --rounds 20
    else
        skip headline "DeepSpeed is not installed (pip install deepspeed): the bare model stands in for the engine"
        step bare 150 --models vit_b_48 --batch 256 --contestants ours_compiled --rounds 20
    fi
    part tests 190 "${tests[@]}" tests/kernels tests/engine/models
}
stage_2() {
    step step_b_48 150 --models vit_b_48 --batch 256 --contestants ours ours_compiled eager_math eager_sdpa --rounds 6
    step step_s_54 120 --models vit_s_54 --batch 256 --contestants ours ours_compiled eager_math eager_sdpa --rounds 6
    part memory 60 "$python" -m benchmarks.bench_memory --target --out "$folder/memory"
    if has nvidia.dali; then
        part loader 80 "${bench[@]}" -s benchmarks/test_loop_overhead.py benchmarks/test_loader.py
    else
        skip loader "DALI is not installed (pip install nvidia-dali-cuda130)"
    fi
    if has deepspeed; then
        part deepspeed 60 "$python" -m benchmarks.bench_deepspeed --model vit_b --world-size 1
    else
        skip deepspeed "DeepSpeed is not installed (pip install deepspeed)"
    fi
}
stage_3() {
    part kernels 300 "${bench[@]}" benchmarks/test_kernels.py --results-dir "$folder/kernels"
    part attention 130 "${bench[@]}" benchmarks/test_attention.py --results-dir "$folder/attention"
}
stage_4() {
    part all_tests 240 "${tests[@]}" tests
    step batch_64 220 --models vit_b_48 vit_s_54 --batch 64 --contestants ours ours_compiled eager_sdpa --rounds 6
}
in_small() {
    step headline 150 --models vit_s --batch 2 --contestants engine --rounds 2 --warmup 1
    part tests 120 "${tests[@]}" tests/kernels tests/engine/models
    part step 150 "${bench[@]}" benchmarks/test_step.py --results-dir "$folder/step"
    part memory 120 "$python" -m benchmarks.bench_memory --depth 6 --batch 1 3 --out "$folder/memory"
    part kernels 120 "${bench[@]}" benchmarks/test_kernels.py -k "gather_tokens and forward-" --results-dir "$folder/kernels"
    part attention 90 "${bench[@]}" benchmarks/test_attention.py -k "forward" --results-dir "$folder/attention"
    if has nvidia.dali; then
        part loader 120 "${bench[@]}" -s benchmarks/test_loop_overhead.py
    else
        skip loader "DALI is not installed (pip install nvidia-dali-cuda130)"
    fi
    part deepspeed 200 "${bench[@]}" benchmarks/test_deepspeed.py
}

if ((quick)); then in_small; else "stage_$stage"; fi
"$python" -m benchmarks.suite_summary "$folder" || failed=1
if [[ -n $stopped ]]; then
    echo "stopped by SIG$stopped: $folder holds what was measured until then"
elif ((! quick && stage < 4)); then
    echo "next: benchmarks/gpu_suite.sh --stage $((stage + 1)) $folder"
fi
exit $failed
