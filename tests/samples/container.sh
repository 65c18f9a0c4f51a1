#!/usr/bin/env bash
# Builds samples/deploy/Containerfile and asks the server in it: tests/samples/container.sh (root, Debian, some 5 min).
# Its base image comes from a registry of images, which not every place reaches: without one, `--stand-in` makes the
# base from Debian's packages instead (their python3 in the place of Python 3.12), and every line of the file runs on it.
# Needs buildah, and debootstrap for the stand-in.
set -euo pipefail
cd "$(dirname "$0")/../.."
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=${STORAGE_DRIVER:-vfs}  # needs neither a daemon nor user namespaces
work=$(mktemp -d)
box=
trap '[ -z "$box" ] || buildah rm "$box" >/dev/null; rm -rf "$work"' EXIT

if [ "${1:-}" = --stand-in ]; then
    mirror=$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/debian.sources | head -1)
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates "$(. /etc/os-release; echo "$VERSION_CODENAME")" \
        "$work/base" "$mirror" >"$work/log" || { tail "$work/log" >&2; exit 1; }
    ln -s /usr/bin/python3 "$work/base/usr/local/bin/python"
    # what this machine trusts and where it fetches from
    cp --remove-destination /etc/ssl/certs/ca-certificates.crt "$work/base/etc/ssl/certs/"
    cp /etc/apt/sources.list.d/debian.sources "$work/base/etc/apt/sources.list.d/"
    for each in /etc/pip.conf /etc/xdg/pip; do
        [ ! -e "$each" ] || { mkdir -p "$work/base${each%/*}" && cp -r "$each" "$work/base$each"; }
    done
    box=$(buildah from scratch)
    buildah add -q "$box" "$work/base" / >/dev/null
    buildah config --env PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin "$box"
    buildah commit -q "$box" docker.io/library/python:3.12-slim >/dev/null
    buildah rm "$box" >/dev/null
    box=
fi

buildah bud --pull="$([ "${1:-}" = --stand-in ] && echo false || echo true)" --network host --format docker \
    -t edge-glm -f samples/deploy/Containerfile . >"$work/log" 2>&1 || { tail -20 "$work/log" >&2; exit 1; }
mapfile -t command < <(buildah inspect --type image edge-glm | python3 -c 'import json, sys
made = json.load(sys.stdin)["Docker"]["config"]
print(*made["Entrypoint"], *made["Cmd"], sep="\n")')
box=$(buildah from --pull-never edge-glm)
echo "runs as $(buildah run "$box" -- id -un): ${command[*]}"
buildah run --network host --env EDGE_GLM_API_KEY=change-me "$box" -- "${command[@]}" >"$work/log" 2>&1 &
health='import urllib.request; urllib.request.urlopen("http://127.0.0.1:8000/health/ready", timeout=3)'
for _ in $(seq 60); do
    kill -0 $! 2>/dev/null || { cat "$work/log" >&2; exit 1; }
    ! buildah run --network host "$box" -- python -c "$health" 2>/dev/null || break
    sleep 5
done
curl -fsS -H 'Authorization: Bearer change-me' -H 'Content-Type: application/json' \
    -d '{"model": "smollm2:135m", "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16}' \
    http://127.0.0.1:8000/v1/chat/completions
echo
[ "$(curl -s -o "$work/refused" -w '%{http_code}' http://127.0.0.1:8000/v1/models)" = 401 ]
pkill -TERM -f "^[^ ]*python [^ ]*${command[*]}"  # the server itself, not what runs the container
wait $!
tail -2 "$work/log"
