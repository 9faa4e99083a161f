#!/usr/bin/env bash
# On every host, the same line:   launch/hosts.sh 2 FIRST_HOST [key=value ...]
# 2 hosts, or 1:3 for one to three: a host that is lost is then done without, and taken back when it runs this line again.
# FIRST_HOST is one of them, by a name or an address that all reach. The others meet there: it must not be the one lost.
# PROCESSES=4 sets how many processes this host runs (default: one a GPU, else one).
set -euo pipefail
hosts=${1:?how many hosts, such as 2 or 1:3} first=${2:?the first host, by name or address}
processes=${PROCESSES:-$(python -c 'import torch; print(torch.accelerator.device_count() or 1)')}
# The address of this host as the others see it: its own on the way to the first one.
address=$(ip route get "$(getent ahostsv4 "$first" | awk 'NR == 1 { print $1 }')" | sed -n 's/.* src \([^ ]*\).*/\1/p')
# The workers of a restart would otherwise meet the addresses of those before them in the agent's store, and hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # else a stack trace for each host that ends before another
exec torchrun --nnodes "$hosts" --nproc-per-node "$processes" --local-addr "$address" \
  --rdzv-backend c10d --rdzv-endpoint "$first:29400" --rdzv-id digitdist --max-restarts 10 \
  -m digitdist.train "${@:3}"
