# What every shell that starts Ray on a node sources: `. ~/dist_lm/cluster/node_env.sh`.
export PATH="$HOME/dist_lm/.venv/bin:$PATH"
# Without a token anybody who reaches a port of Ray can run code here.
export RAY_AUTH_MODE=token
# A dead node is known after 3 to 6 s; Ray's own values take half a minute and more.
export RAY_health_check_period_ms=1000
export RAY_health_check_timeout_ms=3000
export RAY_health_check_failure_threshold=3
# Shards, sockets and workers are open files.
ulimit -n 65536 || echo "the limit of open files stays $(ulimit -n)" >&2
