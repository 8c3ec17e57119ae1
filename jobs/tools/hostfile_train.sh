#!/bin/bash
# Trains on the machines of a hostfile over ssh: jobs/tools/hostfile_train.sh HOSTFILE train.toml [--resume]
# A line for each machine, the first is node 0: `node1 slots=4`. Paths are the same everywhere.
set -euo pipefail

hostfile=$1
shift
mapfile -t lines < <(grep -Ev '^[[:space:]]*(#|$)' "$hostfile")
master=${lines[0]%% *}
printf -v arguments '%q ' "$@"
secret=${HEADRACE_SECRET:-$(head -c 24 /dev/urandom | base64)}
launchers=()
for rank in "${!lines[@]}"; do
    host=${lines[$rank]%% *}
    slots=$(sed -En 's/.*slots=([0-9]+).*/--gpus \1/p' <<<"${lines[$rank]}")
    ${SSH:-ssh} "$host" "read -r HEADRACE_SECRET && export HEADRACE_SECRET && \
        cd $(printf %q "$PWD") && exec headrace train $arguments $slots \
        --nodes ${#lines[@]} --node-rank $rank --master $master" <<<"$secret" &
    launchers+=($!)
done
code=0
for launcher in "${launchers[@]}"; do
    wait "$launcher" || code=$?
done
exit "$code"
