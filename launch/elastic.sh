#!/usr/bin/env bash
# launch/elastic.sh 4 [key=value ...]     4 processes on this host, brought back by the launcher when one of them dies.
# With accelerate launch instead of torchrun:
#   TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 accelerate launch --multi_gpu --num_processes 4 --max_restarts 10 \
#     --rdzv_backend c10d --main_process_ip 127.0.0.1 --main_process_port 0 -m digitdist.train
set -euo pipefail
# The workers of a restart would otherwise meet the addresses of those before them in the agent's store, and hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --nproc_per_node "${1:?how many processes}" --max_restarts 10 \
  --rdzv_backend c10d --rdzv_endpoint 127.0.0.1:0 -m digitdist.train "${@:2}"
