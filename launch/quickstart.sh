#!/usr/bin/env bash
# From a fresh clone to a trained model: sets up the environment, builds the demonstration, trains it with
# DPO under ZeRO-3 and reports what was learned. Flags are handed on to launch/train.py, for example
#   bash launch/quickstart.sh --max_steps 20
# Results: runs/quickstart/result.json, curves.png and the trained model itself.

set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh" requirements.txt

OUTPUT_DIR=runs/quickstart
# A run that fails must not leave an earlier run's figures behind as if they were its own.
rm -f "$OUTPUT_DIR/result.json" "$OUTPUT_DIR/run_summary.json" "$OUTPUT_DIR/curves.png"

say "building the demonstration (reused when it is there)"
python -m ds_align.demo build

num_gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
if [[ "$num_gpus" == 0 ]]; then
  say "no GPU found: training with ZeRO-3 on two CPU processes"
  export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
  num_processes=2
  arguments=()
else
  say "training with ZeRO-3 on $num_gpus GPU(s)"
  num_processes="$num_gpus"
  # The global batch of 32 preferences that the demonstration's learning rate is made for.
  arguments=(--per_device_train_batch_size "$((num_gpus < 32 ? 32 / num_gpus : 1))")
fi
# A fixed port would fail when another run on this machine has it.
port="$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')"

started=$SECONDS
deepspeed --num_gpus "$num_processes" --master_port "$port" launch/train.py --method dpo \
  --ds_config ds_configs/zero3.json --output_dir "$OUTPUT_DIR" --overwrite_output_dir "${arguments[@]}" "$@"

say "reporting"
python -m ds_align.demo report --output_dir "$OUTPUT_DIR" --seconds "$((SECONDS - started))" --require_accuracy 0.9
