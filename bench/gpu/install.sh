#!/usr/bin/env bash
# Installs what `make gpu-bundle` collected, on a machine without network, into the checkout's .venv.
# What the machine's own Python has stays in use: PyTorch, CUDA's packages, NumPy. Run it again when more parts are there.
#   bash build/gpu-bundle/install.sh              PYTHON=python3.12 names another interpreter
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
say() { echo "install: $*"; }
fail() { echo "error: $*" >&2; exit 1; }

[ -f "$root/bench/gpu/__main__.py" ] || fail "$root is no checkout of the project: put this folder into its build/"
[ -f "$here/part-1/requirements.txt" ] || fail "part-1 is missing in $here"
command -v "$python" > /dev/null || fail "there is no $python: name one with PYTHON="
wanted=$(cat "$here/part-1/python")
found=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[ "$found" = "$wanted" ] || fail "$python is Python $found and these wheels are for $wanted: name another with PYTHON=, \
or make the bundle with \`make gpu-bundle PYTHON_THERE=$found\`"

# 1. whole files out of all parts, joined and compared with their sums
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
missing=()
while read -r sum name; do
  pieces=("$here"/part-*/"$name".piece-*)
  if compgen -G "$here/part-*/$name" > /dev/null; then
    ln -s "$(compgen -G "$here/part-*/$name")" "$stage/$name"
  elif [ -e "${pieces[0]}" ]; then
    printf '%s\n' "${pieces[@]}" | sort -t- -k"$(($(tr -cd - <<< "${pieces[0]}" | wc -c) + 1))" | xargs -d '\n' cat > "$stage/$name"
  else
    missing+=("$name")
    continue
  fi
  if [ "$(sha256sum < "$stage/$name" | cut -d' ' -f1)" != "$sum" ]; then
    rm "$stage/$name"
    missing+=("$name (incomplete)")
  fi
done < "$here/part-1/SHA256SUMS"
[ ${#missing[@]} = 0 ] || say "not here, and left out: ${missing[*]}"

# 2. an environment on top of the machine's Python, which may itself be an environment
if [ ! -x "$root/.venv/bin/python" ]; then
  "$python" -m venv --without-pip --system-site-packages "$root/.venv"
  "$python" - "$root/.venv" <<'PYTHON'
import sys, sysconfig
from pathlib import Path
if sys.prefix != sys.base_prefix:  # a new environment sees the packages of the base, not those of the one it came from
    site, = Path(sys.argv[1]).glob("lib/python*/site-packages")
    paths = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site / "parent.pth").write_text("\n".join(paths) + "\n")
    for path in paths:  # NVIDIA's libraries are looked for in site-packages alone, not on sys.path
        if Path(path, "nvidia").is_dir() and not (site / "nvidia").exists():
            (site / "nvidia").symlink_to(Path(path, "nvidia"))
PYTHON
fi

# 3. what is missing there
pip() {
  local wheel=("$stage"/pip-*.whl)
  [ -e "${wheel[0]}" ] || fail "pip's wheel is not in any part"
  "$root/.venv/bin/python" "${wheel[0]}/pip" --disable-pip-version-check install --quiet --no-index --no-cache-dir \
    --no-warn-script-location --find-links "$stage" "$@"
}
pip -r "$here/part-1/requirements.txt"
rtx=("$stage"/tensorrt_rtx*.whl)
if compgen -G "$stage/tensorrt_rtx_cu13_libs-*.whl" > /dev/null; then pip --no-deps "${rtx[@]}"; fi
if compgen -G "$stage/onnxruntime_gpu-*.whl" > /dev/null; then
  pip --no-deps --force-reinstall "$stage"/onnxruntime_gpu-*.whl
fi

# the kernels are compiled there: without a compiler that works nothing runs on a GPU, and this needs none
compiles() {
  (cd "$root" && .venv/bin/python -c 'from engines.cuda.kernels import Variant, compile_variant
compile_variant(Variant("float16", 5, 8), "90")')
}
if ! compiles 2> /dev/null; then
  compiler=("$stage"/nvidia_cuda_nvrtc-*.whl)
  [ -e "${compiler[0]}" ] || { compiles || true; fail "NVRTC does not work, and its wheel is not in these parts"; }
  link=("$root"/.venv/lib/python*/site-packages/nvidia)
  [ ! -L "${link[0]}" ] || rm "${link[0]}"
  pip --no-deps --force-reinstall "${compiler[0]}"
  compiles || fail "the kernels cannot be compiled here"
fi

# 4. exported models, where there are none
for archive in "$stage"/*.tar.gz; do
  [ -e "$archive" ] || continue
  model=$(basename "$archive" .tar.gz)
  [ -e "$root/build/$model/manifest.json" ] || tar -xzf "$archive" --no-same-owner -C "$root/build"
done

cd "$root"
.venv/bin/python - <<'PYTHON'
import bench.gpu, engines.load, runtime.pipeline, runtime.sampling.samplers, runtime.tokenizer  # everything but the GPU
from cuda.bindings import driver, nvrtc
PYTHON
say "done: make gpu-check, or .venv/bin/python -m bench.gpu --json bench/results/gpu.json"
