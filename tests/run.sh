#!/usr/bin/env bash
# Sets up the environment, then lints, checks the import contracts and runs the whole test suite.
# Flags are handed on to pytest, for example: bash tests/run.sh tests/losses -k dpo

set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup_env.sh" requirements.txt requirements-dev.txt

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
# Tests use no network: a model or data set that is not in the project is an error, not a download.
export HF_HUB_OFFLINE=1
if [[ "$(python -c 'import torch; print(torch.cuda.device_count())')" == 0 ]]; then
  export DS_ACCELERATOR=cpu
fi

say "lint"
ruff check .
ruff format --check .

say "import contracts"
lint-imports --no-cache

say "tests"
python -m pytest "$@"
