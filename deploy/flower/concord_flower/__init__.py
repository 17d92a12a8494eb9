"""Concord as an app on stock Flower: `flwr run` on Flower's simulation runtime gives the model of `concord simulate`.

    bash deploy/run.sh --with ray version      # once: installs concord with Ray
    export PATH="$PWD/.venv/bin:$PATH" FLWR_HOME=$(mktemp -d) RAY_ADDRESS=local RAY_AUTH_MODE=token
    export FLWR_TELEMETRY_ENABLED=0 RAY_USAGE_STATS_ENABLED=0
    export FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
    flwr run deploy/flower --stream --federation-config "num-supernodes=10 client-resources-num-cpus=1"

The first `flwr run` starts a SuperLink on port 39091, in the environment of that moment, and leaves it running (end it
by the process id that `pgrep -f flower-superlink` tells). Who reaches that port runs code on this machine; it listens
to this machine only. This is for trying things out: in a real federation no node runs code that arrives.
"""
