#!/bin/sh
# Tests and benchmarks on a CUDA device, in less than ten minutes. A part that exceeds its timeout is
# terminated; the other parts still run.
#
#     PYTHON=python3 sh benchmarks/gpu.sh [FOLDER]
#
# Requires PyTorch with CUDA and Triton, Keras, pytest, pytest-xdist, hypothesis and, for `paper-cuda`,
# CuPy. JAX with CUDA is measured where it is installed. Writes logs and CSV files to FOLDER (default:
# build/gpu).
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
OUT=${1:-build/gpu}
mkdir -p "$OUT"
export KERAS_BACKEND=torch PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=

part() {
  name=$1 seconds=$2
  shift 2
  echo "--- $name: $*"
  begun=$(date +%s)
  timeout "$seconds" "$@" > "$OUT/$name.log" 2>&1
  code=$?
  tail -n 60 "$OUT/$name.log"
  echo "--- $name: exit $code after $(($(date +%s) - begun)) s"
  [ $code -eq 0 ] || failed="$failed $name"
}

bench() {
  name=$1 seconds=$2
  shift 2
  part "$name" "$seconds" "$PYTHON" -m involution_cli bench --device cuda --batch 64 \
    --seconds 0.2 --output "$OUT/$name.csv" "$@"
}

"$PYTHON" -c '
import torch, triton, keras
print("torch", torch.__version__, "triton", triton.__version__, "keras", keras.__version__, torch.cuda.get_device_name())
' || exit 1

part oracle 100 "$PYTHON" -m pytest -n 8 -p no:cacheprovider tests/ops/test_triton.py -o addopts=-q
part device 100 "$PYTHON" -m pytest -p no:cacheprovider tests/ops/test_cuda.py -o addopts=-q --durations=0
if command -v compute-sanitizer > /dev/null; then
  part sanitizer 80 compute-sanitizer --error-exitcode 9 "$PYTHON" -m pytest -p no:cacheprovider \
    tests/ops/test_triton.py -o addopts=-q -k "more_than or samples_at_a_time"
else
  echo "--- sanitizer: compute-sanitizer is not installed"
  failed="$failed sanitizer"
fi

bench operator 90 --cases red1,red3 --dtypes float32,bfloat16 \
  --candidates triton,paper-cuda,im2col,compiled-taps,conv3,depthwise
if "$PYTHON" -c 'import jax; jax.devices("cuda")' 2> /dev/null; then
  bench jax 60 --backend jax --cases red1,red3 --dtypes float32,bfloat16 \
    --candidates pallas,taps,im2col,conv3,depthwise
else
  echo "--- jax: not measured, JAX is not installed or finds no CUDA device"
fi
bench fused 70 --cases red1,red3 --dtypes float32,bfloat16 --candidates fused,unfused --memory
part rednet 90 "$PYTHON" benchmarks/rednet.py --device cuda --dtype-policy mixed_bfloat16 --batch 64 \
  --steps 10 --networks selected,resnet50 --output "$OUT/rednet.csv"

[ -z "$failed" ] || { echo "Failed:$failed"; exit 1; }
