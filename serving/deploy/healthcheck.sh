#!/bin/bash
# healthcheck PORT MODEL...: healthy where every model has a version that serves.
#
# The metadata, not the status, is asked for: a model's status is answered 200 while it is loading and after it failed.
# The image has neither curl nor wget, so bash opens the connection itself.
set -euo pipefail
port=$1
for model in "${@:2}"; do
  exec 3<>"/dev/tcp/127.0.0.1/$port"
  printf 'GET /v1/models/%s/metadata HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' "$model" >&3
  read -r _ status _ <&3
  exec 3<&-
  if [[ $status != 200 ]]; then
    echo "$model: HTTP status $status"
    exit 1
  fi
done
