#!/usr/bin/env bash
# launch/elastic.sh 4 [key=value ...]     4 processes on this host, brought back by the launcher when one of them dies.
set -euo pipefail
# Under nohup, whoever hangs up is ignored; torchrun would hear it nevertheless.
[[ -z $(trap -p HUP) ]] || export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT
exec torchrun --nproc-per-node "${1:?give the number of processes}" --max-restarts 10 \
  --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 -m digitdist.train "${@:2}"
