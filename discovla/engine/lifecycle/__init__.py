"""Life of a run's processes, from start to end.

Start: `peers` waits until all processes that the launcher started have registered at rank 0, at most
`engine.rendezvous_timeout` seconds; then every process that is there ends with one line that names the
missing ranks.  Running: `heartbeat` keeps one connection from each rank to rank 0.  A closed connection, or
no heartbeat for `engine.heartbeat_timeout` seconds, means that a rank is lost: all others name it and end
with exit status 2, even from within a collective.  `pace` names ranks that are slow.  Stop: `signals` notes
SIGTERM, SIGUSR1 and the end of the launcher; all ranks stop after the same step, save, and end with exit
status 75.  End: each rank tells the others that it leaves as intended, so that nobody counts it as lost.
After any end, resume=true continues from the newest complete checkpoint."""
