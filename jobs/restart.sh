#!/bin/sh
# Run a command until it succeeds, at most N times: sh jobs/restart.sh N COMMAND...
# It restarts a driver that was killed. SIGTERM (`ray job stop`) also reaches the command, which saves a checkpoint; it is then
# not started again.
attempts=$1
shift
trap 'attempts=0' TERM # with a trap, the shell waits for the command
while :; do
    "$@"
    status=$?
    attempts=$((attempts - 1))
    if [ "$status" -eq 0 ] || [ "$attempts" -le 0 ]; then
        exit "$status"
    fi
    echo "restart: exit status $status; starting the command again (attempts left: $attempts)" >&2
done
