#!/usr/bin/env bash
# All that is to be known about a GPU in under 8 minutes: tests, kernels, attention, steps, memory, loader, DeepSpeed.
#
#   benchmarks/gpu_suite.sh [--quick] [FOLDER]      results in FOLDER (default: benchmarks/results/suite-DATE)
#
# Each part has a time limit and its own log; one that fails or runs out of time is reported and the rest goes on.
# --quick: the smallest form of every part, also for a machine without a GPU. Exit status 0 if every part passed.
# At the end: FOLDER/suite.json with everything measured, FOLDER/summary.md to read.
set -uo pipefail
cd "$(dirname "$0")/.."

quick=0
folder=
for word in "$@"; do
    case $word in
        --quick) quick=1 ;;
        -*) echo "unknown flag $word: give --quick, a folder, or nothing" >&2; exit 2 ;;
        *) folder=$word ;;
    esac
done
folder=${folder:-benchmarks/results/suite-$(date -u +%Y-%m-%dT%H%M%S)}
mkdir -p "$folder" || exit 1
folder=$(cd "$folder" && pwd)
: > "$folder/parts.tsv"
python=${PYTHON:-python}
failed=0

# part NAME SECONDS COMMAND...
part() {
    local name=$1 limit=$2 started status
    shift 2
    printf '%-12s ' "$name"
    started=$(date +%s)
    timeout --kill-after=10 "$limit" "$@" > "$folder/$name.log" 2>&1
    status=$?
    printf '%s\t%s\t%s\t%s\n' "$name" "$status" "$(($(date +%s) - started))" "$limit" >> "$folder/parts.tsv"
    case $status in
        0) echo "passed in $(($(date +%s) - started)) s" ;;
        5) echo "nothing to run here (pytest)" ;;
        124 | 137) echo "STOPPED after $limit s, see $folder/$name.log"; failed=1 ;;
        *) echo "FAILED ($status), see $folder/$name.log"; failed=1 ;;
    esac
}

# skip NAME REASON
skip() {
    printf '%-12s left out: %s\n' "$1" "$2"
    printf '%s\tleft out: %s\t0\t0\n' "$1" "$2" >> "$folder/parts.tsv"
}

bench=("$python" -m pytest -q -p no:cacheprovider --benchmark-columns=median,iqr,rounds)
if ((quick)); then
    part tests 120 "$python" -m pytest -q -p no:cacheprovider -m gpu tests/kernels tests/models
    part kernels 120 "${bench[@]}" benchmarks/test_kernels.py -k "gather_tokens and forward-" --results-dir "$folder/kernels"
    part attention 90 "${bench[@]}" benchmarks/test_attention.py -k "forward" --results-dir "$folder/attention"
    part step 150 "${bench[@]}" benchmarks/test_step.py --results-dir "$folder/step"
    part memory 120 "$python" -m benchmarks.bench_memory --depth 6 --batch 1 3 --out "$folder/memory"
else
    # Limits add up to less than 8 minutes. torch.compile of a whole reference of 48 blocks takes minutes by itself, so it
    # is compared at vit_b alone; bench_step.py without --contestants measures it at every size.
    part tests 90 "$python" -m pytest -q -p no:cacheprovider -m gpu tests
    part kernels 70 "${bench[@]}" benchmarks/test_kernels.py --results-dir "$folder/kernels"
    part attention 30 "${bench[@]}" benchmarks/test_attention.py --results-dir "$folder/attention"
    part step 120 "$python" -m benchmarks.bench_step --batch 256 64 --models vit_b_48 vit_s_54 vit_b_24 vit_b --no-mae \
        --contestants ours ours_compiled eager_math eager_sdpa --rounds 6 --seconds 95 --out "$folder/step"
    part step_vit_b 60 "$python" -m benchmarks.bench_step --batch 256 --models vit_b --variants paper --rounds 6 \
        --out "$folder/step_vit_b"
    part memory 30 "$python" -m benchmarks.bench_memory --target --out "$folder/memory"
fi

if "$python" -c "import nvidia.dali" 2> /dev/null; then
    files=(benchmarks/test_loop_overhead.py)
    ((quick)) || files+=(benchmarks/test_loader.py)
    part loader $((quick ? 120 : 40)) "${bench[@]}" -s "${files[@]}"
else
    skip loader "DALI is not installed (pip install nvidia-dali-cuda130)"
fi
if [[ -e benchmarks/bench_deepspeed.py ]]; then
    if ((quick)); then
        part deepspeed 200 "${bench[@]}" benchmarks/test_deepspeed.py
    else
        part deepspeed 30 "$python" -m benchmarks.bench_deepspeed --model vit_b --world-size 1
    fi
else
    skip deepspeed "benchmarks/bench_deepspeed.py is not in this checkout"
fi

"$python" -m benchmarks.suite_summary "$folder" || failed=1
exit $failed
