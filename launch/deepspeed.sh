#!/usr/bin/env bash
# Train on the machines of a hostfile: launch/deepspeed.sh CONFIG [a.b=c ...]
#
# HOSTFILE   list of machines, default launch/hostfile; they share the checkout, environment and run directory
# LOGS       folder with one log per rank, default logs/<time>
# DeepSpeed starts the ranks by pdsh and ssh, with the variables of ~/.deepspeed_env.
set -euo pipefail
cd "$(dirname "$0")/.."
hostfile=${HOSTFILE:-launch/hostfile}
logs=${LOGS:-logs/$(date +%Y%m%d-%H%M%S)}
deepspeed --hostfile "$hostfile" --no_local_rank --module discovla.cli preflight "$@"
exec deepspeed --hostfile "$hostfile" --enable_each_rank_log "$logs" train.py "$@" resume=true
