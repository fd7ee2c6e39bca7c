#!/bin/bash
# Everything that wants several GPUs of one host, in one call of under ten minutes: contract of the exchange, its times beside
# torch's, whole steps of MiniMax-M2.7 with random weights over all ranks beside their floor, clients, a rank killed in
# mid-decode, scaling.
#
#   multi_gpu.sh BIN OUT [MODELS] [RANKS] [SECONDS] [PARTS]
#
# BIN holds `conclave` and `gpu_exchange` (built with --features cuda), OUT takes the raw outputs, MODELS is the folder of
# config.json files (default: tests/data/minimax-m2/full-size), RANKS defaults to the number of GPUs, SECONDS to 560: what
# does not fit any more is named as left out. PARTS: some of contract,times,steps,clients,kill,scaling (default: all). Needs
# NCCL's folder in LD_LIBRARY_PATH, and python3; torch for its part.
set -u
BIN=$(realpath "$1"); OUT=$(realpath "$2"); HERE=$(dirname "$(realpath "$0")")
MODELS=$(realpath "${3:-$HERE/../../tests/data/minimax-m2/full-size}")
GPUS=$(nvidia-smi --query-gpu=uuid --format=csv,noheader | wc -l)
[ -n "${CUDA_VISIBLE_DEVICES:-}" ] && GPUS=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | wc -l)
R=${4:-$GPUS}; LIMIT=${5:-560}; PARTS=${6:-contract,times,steps,clients,kill,scaling}
GB=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -1); GB=$((GB / 1000))
failed=0; SECONDS=0; cd "$OUT" || exit 1
wants() { [[ ",$PARTS," == *",$1,"* ]]; }

# run NAME SECONDS COMMAND...: into OUT/NAME.txt, bounded, counted
run() {
    local name=$1 most=$2 begin=$SECONDS; shift 2
    if ((SECONDS + most > LIMIT)); then echo "LEFT OUT $name: $((LIMIT - SECONDS)) s left, it may take $most"; return; fi
    echo "\$ $*" > "$name.txt"
    timeout -k 5 "$most" "$@" >> "$name.txt" 2>&1 < /dev/null
    local rc=$?; ((rc == 0)) || failed=$((failed + 1))
    echo "$([ $rc = 0 ] && echo ok || echo "FAILED ($rc)") $name, $((SECONDS - begin)) s"
}

# steps NAME FORMAT RANKS SCENARIO FLAGS...: steps over so many ranks, beside their floor
steps() {
    local name=$1 format=$2 ranks=$3 scenario=$4; shift 4
    run "$name" 40 "$BIN/conclave" bench "$MODELS/$format" --load-format=dummy --scenario="$scenario" --device=cuda --workers="$ranks" "$@"
    grep -E "reads|floor" "$name.txt" 2> /dev/null
}

# clients NAME FORMAT RANKS CLIENTS INPUT OUTPUT FLAGS: a cluster of its own under load
clients() {
    run "$1" 25 "$BIN/conclave" bench "$MODELS/$2" --load-format=dummy --scenario=serve --device=cuda --workers="$3" \
        --max-concurrency="$4" --num-prompts="$4" --random-input-len="$5" --random-output-len="$6" \
        --gpu-memory-utilization=0.92 --serve-args="--max-model-len=16384 --max-num-seqs=512 $7"
    grep -E "throughput|TTFT|TPOT" "$1.txt" 2> /dev/null | head -6
}

nvidia-smi > machine.txt; nvidia-smi topo -m >> machine.txt 2>&1
if wants contract; then
    echo "== contract, $R ranks on $GPUS GPUs"
    for t in ipc nccl; do
        run check-$t 60 "$BIN/gpu_exchange" check --transport $t --ranks "$R" --gpus "$GPUS"
        grep -c ^ok check-$t.txt; grep -v ^ok check-$t.txt | tail -5
        # Eight ranks, several a GPU where there are fewer: NCCL wants a GPU for each.
        [ $t = ipc ] && ((R < 8)) && run check-$t-8 60 "$BIN/gpu_exchange" check --transport $t --ranks 8 --gpus "$GPUS" &&
            grep -c ^ok check-$t-8.txt
        run kill-$t 30 "$BIN/gpu_exchange" kill --transport $t --ranks "$R" --gpus "$GPUS" --times 6; tail -1 kill-$t.txt
    done
fi
if wants times; then
    echo "== times of the exchange, beside torch's"
    for t in ipc nccl; do
        run bench-$t 25 "$BIN/gpu_exchange" bench --transport $t --ranks "$R" --gpus "$GPUS" --processes; grep -A99 tokens bench-$t.txt
        # DeepEP's published times over eight H800 are 8.7 and 6.4 us per MB.
        awk -v t=$t '/^ *(128 +few|4096 +many) bf16 / && $5 {printf "%s, %s tokens: %.1f us per MB, half of DeepEP'"'"'s is %s\n", t, $1, $4 / $5, $1 == 128 ? 4.3 : 3.2}' bench-$t.txt
    done
    run torch 40 python3 "$HERE/peers/torch_all_to_all.py" --gpus "$R"; grep -A9 tokens torch.txt
fi
# INT4 needs 66 GB a rank on two GPUs and 36 on four, FP8 120 and 64, BF16 60 on eight.
FORMAT=awq; ((GB * R > 260)) && FORMAT=fp8
if wants steps; then
    echo "== $FORMAT over $R ranks: steps"
    steps decode $FORMAT "$R" decode --batch=1,32,128 --context=256
    # Keys and values of 512 x 256 take 33 GB over the ranks: beside FP8 weights on four 80 GB devices only half of them fit.
    CONTEXT=256; ((GB * R > 500)) || CONTEXT=128
    ((GB * R > 300)) && steps decode-512 $FORMAT "$R" decode --batch=512 --context=$CONTEXT --gpu-memory-utilization=0.95
    steps decode-nccl $FORMAT "$R" decode --batch=1,32,128 --context=256 --transport=nccl
    steps prefill $FORMAT "$R" prefill --batch=8192
    ((GB * R > 500)) && steps decode-bf16 bf16 "$R" decode --batch=1,32,128 --context=256
    ((GB * R > 1000)) && steps decode-bf16-512 bf16 "$R" decode --batch=512 --context=256
    ((GB * R > 1000)) && steps prefill-bf16 bf16 "$R" prefill --batch=8192
fi
if wants kill; then
    echo "== one rank of $R killed in mid-decode"
    run survival 35 python3 "$HERE/kill_a_rank.py" "$BIN/conclave" "$MODELS/$FORMAT" --workers "$R"; tail -3 survival.txt
    run survival-nccl 25 python3 "$HERE/kill_a_rank.py" "$BIN/conclave" "$MODELS/$FORMAT" --workers "$R" --transport nccl --layers 4 --tokens 3000
    tail -3 survival-nccl.txt
fi
if wants clients; then
    echo "== $FORMAT over $R ranks: clients"
    for n in 1 32 128 512; do clients clients-$n $FORMAT "$R" $n 128 128 ""; done
    clients clients-32-nccl $FORMAT "$R" 32 128 128 "--transport=nccl"
    clients clients-8k $FORMAT "$R" $((2 * R)) 8192 2 "--max-num-batched-tokens=8192"
fi
if wants scaling; then
    echo "== scaling at 32 sequences a GPU"
    for ((n = 1; n <= R; n *= 2)); do
        ((GB > 100 || n > 1)) && steps scale-$n awq $n decode --batch=$((32 * n)) --context=256
    done
fi
echo "$failed failed, $SECONDS s"
exit $((failed > 0))
