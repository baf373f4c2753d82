#!/usr/bin/env bash
# Train on the machines of a hostfile: launch/deepspeed.sh CONFIG [a.b=c ...]
#
# HOSTFILE   which machines, default launch/hostfile; all see the same checkout, environment and run directory
# LOGS       one file a rank, default logs/<time>
# DeepSpeed starts the ranks by pdsh and ssh, and passes on what .deepspeed_env in the home folder sets.
set -euo pipefail
cd "$(dirname "$0")/.."
hostfile=${HOSTFILE:-launch/hostfile}
logs=${LOGS:-logs/$(date +%Y%m%d-%H%M%S)}
deepspeed --hostfile "$hostfile" --no_local_rank --module discovla.cli preflight "$@"
exec deepspeed --hostfile "$hostfile" --enable_each_rank_log "$logs" train.py "$@" resume=true
