#!/usr/bin/env bash
# Train on several machines, each of which runs this script: launch/torchrun.sh CONFIG [a.b=c ...]
#
# NODES        number of machines, default 1
# GPUS         processes per machine, default all GPUs
# RENDEZVOUS   host:port of one machine, the same on all, default localhost:29500
# LOGS         folder with logs per rank, default logs
# RESTARTS     restarts of all ranks after a failure, default 3; each resumes from the newest checkpoint
# torchrun forwards SIGTERM and SIGUSR1, gives the ranks 30 s to save, and ends with status 1.
set -euo pipefail
cd "$(dirname "$0")/.."
ranks=(--nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-gpu}" --rdzv-backend c10d
  --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --rdzv-id discovla --rdzv-endpoint "${RENDEZVOUS:-localhost:29500}")
torchrun "${ranks[@]}" --module discovla.cli preflight "$@"
exec torchrun "${ranks[@]}" --max-restarts "${RESTARTS:-3}" --log-dir "${LOGS:-logs}" --redirects 3 --tee 0:3 \
  train.py "$@" resume=true
