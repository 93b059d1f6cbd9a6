# Makes the project's Python environment and activates it; sourced by quickstart.sh and tests/run.sh:
#   source launch/setup_env.sh requirements.txt [requirements-dev.txt]
# An active virtual environment is used as it is, otherwise .venv in the project's root. A stamp in the
# environment holds the digest of what was installed, so that a later call skips pip altogether.
# DS_ALIGN_PYTHON names the interpreter that .venv is made with.

set -euo pipefail

DS_ALIGN_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

say() { printf '\n==> %s\n' "$*"; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

is_supported_python() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
  local candidate
  if [[ -n "${DS_ALIGN_PYTHON:-}" ]]; then
    is_supported_python "$DS_ALIGN_PYTHON" || die "DS_ALIGN_PYTHON=$DS_ALIGN_PYTHON is not Python 3.11 or newer"
    printf '%s\n' "$DS_ALIGN_PYTHON"
    return
  fi
  # An interpreter that can make environments by itself comes first; the second round takes any.
  for candidate in python3.11 python3.12 python3.13 python3 python; do
    if is_supported_python "$candidate" && "$candidate" -c 'import venv, ensurepip' 2>/dev/null; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  for candidate in python3.11 python3.12 python3.13 python3 python; do
    if is_supported_python "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  die "Python 3.11 or newer is needed, found $(python3 -V 2>&1 || true); install it or set DS_ALIGN_PYTHON=/path/to/python"
}

install_venv_module() {
  local python="$1" package
  package="python$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-venv"
  if [[ "$(id -u)" != 0 ]] || ! command -v apt-get >/dev/null; then
    die "$python cannot make virtual environments; install it first, on Debian and Ubuntu: sudo apt-get install $package"
  fi
  say "installing $package, which $python needs to make an environment"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$package"
}

make_environment() {
  local directory="$1" python
  python="$(find_python)"
  say "making the environment $directory with $("$python" -V)"
  "$python" -c 'import venv, ensurepip' 2>/dev/null || install_venv_module "$python"
  # Made beside and renamed, scripts would keep the old path; a half-made one is therefore cleared instead.
  "$python" -m venv --clear "$directory"
}

activate_environment() {
  if [[ -n "${VIRTUAL_ENV:-}" && -x "$VIRTUAL_ENV/bin/python" ]]; then
    is_supported_python "$VIRTUAL_ENV/bin/python" ||
      die "the active environment $VIRTUAL_ENV is older than Python 3.11; deactivate it or make it anew"
  else
    VIRTUAL_ENV="$DS_ALIGN_ROOT/.venv"
    if ! is_supported_python "$VIRTUAL_ENV/bin/python" || ! "$VIRTUAL_ENV/bin/python" -m pip --version >/dev/null 2>&1; then
      make_environment "$VIRTUAL_ENV"
    fi
  fi
  export VIRTUAL_ENV
  export PATH="$VIRTUAL_ENV/bin:$PATH"
  unset PYTHONHOME
}

requirements_digest() {
  {
    printf '%s\n' "$DS_ALIGN_ROOT"
    python -V
    printf '%s\n' "${DS_ALIGN_BUILD_EXT:-auto}" "${DS_ALIGN_CUDA:-auto}"
    # A compiler that came later builds the extension at the next call.
    command -v "${CXX:-c++}" g++ nvcc || true
    cat "$@" setup.py launch/setup_env.sh
    # The extension is built anew when its sources change.
    find csrc -type f ! -name '*.md' | LC_ALL=C sort | xargs cat
  } | python -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

# "cpu", "cuda", or "torch" and why there is no extension.
NAME_KERNELS='
from ds_align.kernels import backend, native
reason = native.WHY_ABSENT
print(backend() + (f", plain PyTorch: {reason}" if reason else ", from the compiled extension ds_align._C"))
'

pip_install() {
  python -m pip install --disable-pip-version-check "$@"
}

install_requirements() {
  local digest stamp arguments=() file
  stamp="$VIRTUAL_ENV/.ds_align-$(basename "${@: -1}").sha256"
  digest="$(requirements_digest "$@")"
  if [[ -f "$stamp" && "$(<"$stamp")" == "$digest" ]]; then
    say "the environment $VIRTUAL_ENV is up to date"
    return
  fi
  say "installing the pinned dependencies into $VIRTUAL_ENV"
  pip_install "$(grep -E '^torch==' requirements.txt)"
  for file in "$@"; do
    arguments+=(-r "$file")
  done
  # DeepSpeed builds its operators when they are first used, so that no compiler is needed here.
  DS_BUILD_OPS=0 pip_install "${arguments[@]}"
  pip_install --no-build-isolation --no-deps --editable .
  printf '%s\n' "$digest" >"$stamp"
}

[[ $# -gt 0 ]] || die "usage: source launch/setup_env.sh requirements.txt [requirements-dev.txt]"
cd "$DS_ALIGN_ROOT"
activate_environment
install_requirements "$@"
kernels="$(python -W ignore -c "$NAME_KERNELS")"
say "log-prob kernels: $kernels"
