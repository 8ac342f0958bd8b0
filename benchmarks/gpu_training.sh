#!/usr/bin/env bash
# Training on all GPUs of a machine: tests, the time of a step, CIFAR-10 with three seeds, and two GPUs
# against one: images a second, and the accuracy of each seed.
#
#   PYTHON=python3 GPUS="0 1 2 3" SEEDS="0 1 2" benchmarks/gpu_training.sh CIFAR10.npz OUTPUT_FOLDER
#
# PYTHON has torch and pytest; ModelOpt's rows come where it is installed. The first GPU runs the tests and measures the step,
# then takes seeds like the others: about 20 minutes a seed on an H200. The tables are in OUTPUT_FOLDER: step.txt, accuracy.txt.
set -uo pipefail
data=$1 out=$2 python=${PYTHON:-python3}
read -ra gpus <<<"${GPUS:-0}"
read -ra seeds <<<"${SEEDS:-0 1 2}"
rows=$out/rows
mkdir -p "$rows" "$out/taken"
export PYTHONPATH=.:${PYTHONPATH:-} PYTHONUNBUFFERED=1

note() { echo "$(date +%T) $*" | tee -a "$out/clock"; }
run() { # LOG COMMAND: what fails is noted, and the rest goes on
    local log=$1
    shift
    "$@" >"$out/$log.txt" 2>&1 || note "$log failed with $?"
    note "$log done"
}
step() {
    run tests $python -m pytest tests/gpu/test_training.py --confcutdir=tests/gpu -p no:cacheprovider -q --show-capture=no
    run step $python -m benchmarks.gpu_training_step --json "$out/step.json"
}
rows_of_seed() {
    local group
    for group in float qat peer stress ptq; do
        run "$group-$1" $python -m benchmarks.accuracy "$group" cifar10 --data "$data" --seed "$1" --folder "$rows"
    done
}
take_seeds() {
    local seed
    for seed in "${seeds[@]}"; do
        if mkdir "$out/taken/$seed" 2>/dev/null; then rows_of_seed "$seed"; fi
    done
}
train() { # SEED BATCH_OF_A_PROCESS COMMAND: the epochs of the row "QAT"
    local seed=$1 batch=$2
    shift 2
    "$@" -m qat.train --model benchmarks/cifar_models.py:resnet50 --data "$data" --weights "$rows/cifar10-$seed.safetensors" \
        --float-epochs 0 --qat-epochs 5 --qat-lr 4e-5 --weight-decay 0.05 --label-smoothing 0 --compile True \
        --seed "$seed" --batch-size "$batch" --output "$out/$batch-$seed/model.qat"
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | tee "$out/gpus"
for gpu in "${gpus[@]}"; do
    (
        export CUDA_VISIBLE_DEVICES=$gpu
        [[ $gpu != "${gpus[0]}" ]] || step
        take_seeds
    ) &
done
wait
if ((${#gpus[@]} > 1)); then
    torchrun="$python -m torch.distributed.run --standalone --nproc-per-node"
    CUDA_VISIBLE_DEVICES=${gpus[0]} run scaling-1 $python -m benchmarks.gpu_scaling
    CUDA_VISIBLE_DEVICES=${gpus[0]},${gpus[1]} run scaling-2 $torchrun 2 -m benchmarks.gpu_scaling
    for seed in "${seeds[@]}"; do
        CUDA_VISIBLE_DEVICES=${gpus[0]} run "one-gpu-$seed" train "$seed" 256 $python &
        CUDA_VISIBLE_DEVICES=${gpus[-2]},${gpus[-1]} run "two-gpus-$seed" \
            train "$seed" 128 $torchrun 2
        wait
    done
fi
$python -m benchmarks.accuracy table "$rows"/*.jsonl | tee "$out/accuracy.txt"
grep -H "INT8, trained" "$out"/{one,two}-gpu*.txt
grep -h images_per_second "$out"/scaling-*.txt
