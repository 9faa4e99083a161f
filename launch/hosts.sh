#!/usr/bin/env bash
# On every host, the same line:   launch/hosts.sh 2 FIRST_HOST [key=value ...]
# 2 is the number of hosts. 1:3 means one to three: training resumes without a lost host, which rejoins by running this again.
# FIRST_HOST is one of them, by a name or address that all can reach. It must stay up, because the others rendezvous there.
# PROCESSES=4 sets the number of processes on this host (default: one per GPU, or one without GPUs).
set -euo pipefail
hosts=${1:?give the number of hosts, such as 2 or 1:3} first=${2:?give the first host, by name or address}
processes=${PROCESSES:-$(python -c 'import torch; print(torch.accelerator.device_count() or 1)')}
# This host's address as the others see it: the source address of its route to the first host.
address=$(ip route get "$(getent ahostsv4 "$first" | awk 'NR == 1 { print $1 }')" | sed -n 's/.* src \([^ ]*\).*/\1/p')
# Without this, restarted workers would read their predecessors' addresses from the agent's store, and hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # otherwise each host that ends before another causes a stack trace
exec torchrun --nnodes "$hosts" --nproc-per-node "$processes" --local-addr "$address" \
  --rdzv-backend c10d --rdzv-endpoint "$first:29400" --rdzv-id digitdist --max-restarts 10 \
  -m digitdist.train "${@:3}"
