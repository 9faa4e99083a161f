#!/usr/bin/env bash
# On every host, the same line:   launch/hosts.sh 2 FIRST_HOST [key=value ...]
# 2 is the number of hosts. 1:3 means one to three: training resumes without a lost host, which rejoins by running this again.
# FIRST_HOST is one of them, by a name or address that all can reach. It must stay up, because the others rendezvous there.
# PROCESSES=4 sets the number of processes on this host (default: one per GPU, or one without GPUs).
set -euo pipefail
hosts=${1:?give the number of hosts, such as 2 or 1:3} first=${2:?give the first host, by name or address}
processes=${PROCESSES:-$(python -c 'import torch; print(torch.accelerator.device_count() or 1)')}
# This host's address as the others see it: the source address of its route to the first host.
source_address() { ip route get "$1" 2>/dev/null | sed -n 's/.* src \([^ ]*\).*/\1/p' || true; }
target=$(getent ahostsv4 "$first" | awk 'NR == 1 { print $1 }') || true
address=$(source_address "${target:?no host has the name or address $first}")
# Whether this is the first host, and no other launcher here serves the rendezvous already. By itself torchrun would go by the
# host's own name, which may be another one, or be 127.0.1.1 in /etc/hosts.
is_host=0
if [[ $(ip route get "$target") == local* ]] && ! (: <>"/dev/tcp/$target/29400") 2>/dev/null; then is_host=1; fi
if [[ $address == 127.* ]]; then # the first host's own name, which says nothing of its network: the address of the default route
  address=$(source_address 192.0.2.1)
  address=${address:-$(ip -4 -o addr show scope global | awk 'NR == 1 { sub("/.*", "", $4); print $4 }')}
fi
# Without this, restarted workers would read their predecessors' addresses from the agent's store, and hang.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Under nohup, whoever hangs up is ignored; torchrun would hear it nevertheless.
[[ -z $(trap -p HUP) ]] || export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} # otherwise each host that ends before another causes a stack trace
exec torchrun --nnodes "$hosts" --nproc-per-node "$processes" --local-addr "$address" \
  --rdzv-backend c10d --rdzv-endpoint "$first:29400" --rdzv-id digitdist --max-restarts 10 \
  --rdzv-conf "is_host=$is_host" \
  -m digitdist.train "${@:3}"
