#!/usr/bin/env bash
# Makes a fresh Ubuntu machine a node: node_setup.sh NFS_EXPORT
#
# NFS_EXPORT (host:/path) is mounted at /shared, where runs and data lie; every node needs the same.
# Running it again does nothing that is done.
set -euo pipefail

export_path="${1:?usage: node_setup.sh HOST:/PATH}"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# Fresh machines still run their first update: wait for its lock.
sudo apt-get -o DPkg::Lock::Timeout=300 update -q
sudo apt-get -o DPkg::Lock::Timeout=300 install -q -y nfs-common python3-venv build-essential

sudo mkdir -p /shared
if ! mountpoint -q /shared; then
    # hard: a server that is away for a minute must not fail a checkpoint.
    sudo mount -t nfs4 -o hard,timeo=600,retrans=2,noresvport "$export_path" /shared
    sudo chmod 1777 /shared
fi

if [ ! -x "$here/.venv/bin/dist-lm" ]; then
    python3 -m venv "$here/.venv"
    "$here/.venv/bin/pip" install -q --upgrade pip
    "$here/.venv/bin/pip" install -q -c "$here/constraints.txt" -e "$here"
fi

# Ray makes the token readable for all; it is a password.
if [ -e "$HOME/.ray/auth_token" ]; then
    chmod 600 "$HOME/.ray/auth_token"
fi
