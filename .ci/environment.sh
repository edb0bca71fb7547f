# For .ci/run and .ci/full: a fresh environment as the README says, with all that tests can use.
# shellcheck shell=bash
export PIP_DISABLE_PIP_VERSION_CHECK=1

step() { printf '\n== %s (%ss)\n' "$*" "$SECONDS"; }

installing=
install_packages() { # of the system, in the background; wait_for_packages waits
    if [ "$(id -u)" = 0 ] && ! { command -v tc && command -v chromium; } > /dev/null; then
        step "beside what follows: iproute2, for tests between network namespaces; Chromium, for tests of pages"
        (apt-get update && apt-get install -y --no-install-recommends iproute2 chromium) > /dev/null 2>&1 &
        installing=$!
    fi
}

wait_for_packages() {
    [ -z "$installing" ] || wait "$installing" || echo "iproute2 or Chromium not installed; tests that need it are skipped"
}

environment() { # FOLDER PIP-ARGUMENTS ...: makes and activates it
    python3 -m venv "$1"
    # shellcheck disable=SC1091
    . "$1/bin/activate"
    shift
    pip install -q "$@" 2> >(grep -v 'Location .* is ignored' >&2)
}

developer_environment() { # FOLDER
    environment "$1" -e '.[dev]'
    pip install -q --no-deps 'torchvision<0.29' timm 2> >(grep -v 'Location .* is ignored' >&2)
    pip install -q pillow huggingface_hub safetensors pyyaml lightning 2> >(grep -v 'Location .* is ignored' >&2)
}
