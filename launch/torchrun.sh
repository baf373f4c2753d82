#!/usr/bin/env bash
# Train on machines that each run this script: launch/torchrun.sh CONFIG [a.b=c ...]
#
# NODES        how many machines, default 1
# GPUS         processes on each, default all GPUs
# RENDEZVOUS   host:port of one of them, the same everywhere, default localhost:29500
# LOGS         a folder of files for each rank, default logs
# RESTARTS     how often torchrun starts all ranks again after a failure, default 3; each goes on where it was
# SIGTERM and SIGUSR1 go on to the ranks, which have 30 s to save; torchrun then ends with status 1.
set -euo pipefail
cd "$(dirname "$0")/.."
ranks=(--nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-gpu}" --rdzv-backend c10d
  --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --rdzv-id discovla --rdzv-endpoint "${RENDEZVOUS:-localhost:29500}")
torchrun "${ranks[@]}" --module discovla.cli preflight "$@"
exec torchrun "${ranks[@]}" --max-restarts "${RESTARTS:-3}" --log-dir "${LOGS:-logs}" --redirects 3 --tee 0:3 \
  train.py "$@" resume=true
