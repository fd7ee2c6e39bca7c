#!/bin/bash
# Everything that wants several GPUs of one host, in one call of under ten minutes: contract of the exchange, its times beside
# torch's, whole steps of MiniMax-M2.7 with random weights over all ranks, a rank killed in mid-decode, scaling.
#
#   multi_gpu.sh BIN OUT [MODELS] [RANKS] [SECONDS]
#
# BIN holds `conclave` and `gpu_exchange` (built with --features cuda), OUT takes the raw outputs, MODELS is the folder of
# config.json files (default: tests/data/minimax-m2/full-size), RANKS defaults to the number of GPUs, SECONDS to 560: what
# does not fit any more is named as left out. Needs NCCL's folder in LD_LIBRARY_PATH, and python3; torch for its part.
set -u
export CONCLAVE_GPU_EXCHANGE=1
BIN=$(realpath "$1"); OUT=$(realpath "$2"); HERE=$(dirname "$(realpath "$0")")
MODELS=$(realpath "${3:-$HERE/../../tests/data/minimax-m2/full-size}")
GPUS=$(nvidia-smi -L | wc -l); R=${4:-$GPUS}; LIMIT=${5:-560}
GB=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits | head -1); GB=$((GB / 1000))
failed=0; SECONDS=0; cd "$OUT" || exit 1

# run NAME SECONDS COMMAND...: into OUT/NAME.txt, bounded, counted
run() {
    local name=$1 most=$2 begin=$SECONDS; shift 2
    if ((SECONDS + most > LIMIT)); then echo "LEFT OUT $name: $((LIMIT - SECONDS)) s left, it may take $most"; return; fi
    echo "\$ $*" > "$name.txt"
    timeout -k 5 "$most" "$@" >> "$name.txt" 2>&1 < /dev/null
    local rc=$?; ((rc == 0)) || failed=$((failed + 1))
    echo "$([ $rc = 0 ] && echo ok || echo "FAILED ($rc)") $name, $((SECONDS - begin)) s"
}

nvidia-smi > machine.txt; nvidia-smi topo -m >> machine.txt 2>&1
echo "== contract, $R ranks on $GPUs GPUs"
for t in ipc nccl; do
    run check-$t 70 "$BIN/gpu_exchange" check --transport $t --ranks "$R" --gpus "$GPUS"
    run kill-$t 45 "$BIN/gpu_exchange" kill --transport $t --ranks "$R" --gpus "$GPUS" --times 6
done
echo "== times of the exchange, beside torch's"
for t in ipc nccl; do run bench-$t 30 "$BIN/gpu_exchange" bench --transport $t --ranks "$R" --gpus "$GPUS"; grep -A99 tokens bench-$t.txt; done
run torch 40 python3 "$HERE/peers/torch_all_to_all.py" --gpus "$R"; grep -A9 tokens torch.txt

# decode NAME FORMAT RANKS CLIENTS INPUT OUTPUT FLAGS: a cluster of its own under load
serve() {
    run "$1" 75 "$BIN/conclave" bench "$MODELS/$2" --load-format=dummy --scenario=serve --device=cuda --workers="$3" \
        --max-concurrency="$4" --num-prompts="$4" --random-input-len="$5" --random-output-len="$6" \
        --gpu-memory-utilization=0.92 --serve-args="--max-model-len=16384 --max-num-seqs=512 $7" --result-filename="$OUT/$1.json"
    grep -E "throughput|TTFT|TPOT" "$1.txt" 2> /dev/null | head -6
}
# INT4 needs 60 GB a rank on two GPUs, FP8 120, BF16 58 on eight.
FORMAT=awq; ((GB * R > 260)) && FORMAT=fp8
echo "== $FORMAT over $R ranks"
for clients in 1 32 128 512; do serve decode-$clients $FORMAT "$R" $clients 128 128 ""; done
serve decode-32-nccl $FORMAT "$R" 32 128 128 "--transport=nccl"
serve prefill-8k $FORMAT "$R" 4 8192 2 "--max-num-batched-tokens=8192"
((GB * R > 500)) && serve decode-32-bf16 bf16 "$R" 32 128 128 ""
echo "== one rank of $R killed in mid-decode"
run survival 90 python3 "$HERE/kill_a_rank.py" "$BIN/conclave" "$MODELS/$FORMAT" --workers "$R"; tail -3 survival.txt
echo "== scaling at 32 clients a GPU"
for ((n = 1; n < R; n *= 2)); do
    f=$FORMAT; ((n == 1)) && f=awq
    serve scale-$n $f $n $((32 * n)) 128 128 ""
done
echo "$failed failed, $SECONDS s"
exit $((failed > 0))
