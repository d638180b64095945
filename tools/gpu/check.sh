#!/usr/bin/env bash
# Unpack the transferred packages and run the checks. Run it on the GPU machine, in the project's root.
#
#   bash .gpu/kit/check.sh core         # kernels, CUDA pipeline, streams, graphs; torch as the engine
#   bash .gpu/kit/check.sh ort          # ONNX Runtime's CUDA provider: probe, runs, benchmark
#   bash .gpu/kit/check.sh rtx          # TensorRT-RTX: probe, runs, benchmark, tests
#   bash .gpu/kit/check.sh STEP...      # single steps by name; `steps` lists them
#   bash .gpu/kit/check.sh receive      # only store the pieces of this call for a later one
#
# Every call stores the pieces that were transferred with it, so a package may arrive in several calls.
#
# No step starts later than LIMIT_S (230) seconds after the start; each step also has its own limit.
# A failed step does not stop the others. Logs and JSON are written to $OUT; a table is printed last.
set -uo pipefail
kit=$(cd "$(dirname "$0")" && pwd)
root=$PWD
store=${STORE:-${TMPDIR:-/tmp}/attnseg-gpu}   # kept while the machine is held
site=$store/site
out=${OUT:-$store/out}
logs=$store/logs                   # returned as one archive, as at most 8 files are returned
limit=${LIMIT_S:-230}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}             # cpu: test this script without a GPU
rm -rf "$logs"
mkdir -p "$store/pieces" "$site" "$out" "$logs"
export PYTHONPATH="$root:$site" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 XDG_CACHE_HOME=$store/cache
host=""; [ "$device" = cuda ] || host="--host"

# CUDA's libraries are among the interpreter's packages, not among those that are unpacked here.
libraries=$("$python" - <<'EOF'
import sysconfig
from pathlib import Path
site = Path(sysconfig.get_paths()["purelib"])
print(":".join(str(p) for p in (site / "nvidia/cu13/lib", site / "nvidia/cudnn/lib") if p.is_dir()))
EOF
)
export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

receive() {  # move the pieces of this call to where later calls find them
    local piece
    for piece in "$root"/.gpu/[0-9]*/*.tar.xz.*; do [ -e "$piece" ] && mv -f "$piece" "$store/pieces/"; done
    ls "$store/pieces" | cut -d. -f1 | sort | uniq -c
}

assemble() {  # NAME: unpack a package if all its pieces have arrived
    [ -e "$store/$1.done" ] && { echo "$1: already unpacked"; return 0; }
    "$python" - "$store/pieces" "$kit/pieces.sha256" "$site" "$1" <<'EOF' && touch "$store/$1.done"
import hashlib, io, sys, tarfile
from pathlib import Path
pieces, sums, site, name = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
content = b"".join(p.read_bytes() for p in sorted(pieces.glob(f"{name}.tar.xz.*")))
wanted = dict(reversed(line.split()) for line in sums.read_text().splitlines())[f"{name}.tar.xz"]
if hashlib.sha256(content).hexdigest() != wanted:
    sys.exit(f"{name}: incomplete ({len(content)} bytes have arrived)")
with tarfile.open(fileobj=io.BytesIO(content), mode="r:xz") as archive:
    archive.extractall(site, filter="data")
print(f"{name}: {len(content)} bytes unpacked")
EOF
}

check() { "$python" "$kit/checks.py" "$@" --json "$out/results.json" $host; }

case_folder() {  # make a synthetic case of full size, once
    [ -d "$store/scan" ] || "$python" - "$store" <<'EOF'
import sys
from pathlib import Path
from attnseg.demo import make_demo_scan
make_demo_scan(Path(sys.argv[1]))
EOF
    ls "$store/scan"/*
}

export_bundle() {  # FOLDER OPTIONS...
    local folder=$1; shift
    rm -rf "$folder"
    "$python" -m attnseg export attnseg/runtime/model/default/weights.safetensors -o "$folder" --fp16 "$@"
}

run_twice() {  # ENGINE BUNDLE PRECISION: two processes must give equal bytes
    local one first="" again
    rm -rf "$store"/run-"$1"-?
    for one in 1 2; do
        "$python" -m attnseg run "$store/scan" -o "$store/run-$1-$one" --model "$2" \
            --device "$device" --engine "$1" --precision "$3" --tta paper || return 1
        again=$(cat "$store/run-$1-$one"/*_seg.nii.gz | sha256sum)
        [ -z "$first" ] || [ "$first" = "$again" ] || { echo "the labels differ"; return 1; }
        first=$again
    done
    cp "$store/run-$1-2"/*.json "$logs/run-$1.json"
    echo "both: ${first%% *}"
}

gpu_tests() {  # ARGUMENTS: tests marked gpu; warnings of the machine's packages are not errors
    "$python" -m pytest -m gpu -q -rfE -p no:cacheprovider -W default --tb=short --durations=5 "$@"
}

resources() {  # registers, spills and stack of each kernel on this GPU
    local arch
    arch=sm_$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d .)
    nvcc -x cu -arch="$arch" -fmad=false -std=c++17 -Xptxas -v -cubin -o "$store/kernels.cubin" \
        attnseg/runtime/cuda/kernels.cu
    cuobjdump -sass "$store/kernels.cubin" > "$store/kernels.sass" && wc -l "$store/kernels.sass"
}

sanitize() {  # TOOL: the tests of the kernels under compute-sanitizer
    compute-sanitizer --tool "$1" --error-exitcode 9 "$python" -m pytest -m gpu -q -x \
        -p no:cacheprovider -W default tests/runtime/cuda/test_kernels.py -k 'not float'
}

counters() {  # share of the peak rates that each kernel reaches in one volume
    ncu --clock-control none --print-summary per-kernel --section SpeedOfLight --section Occupancy \
        -k 'regex:^(scan|normalise|occupy|gather|blend|label_.*|restore)$' -c 24 \
        "$python" "$kit/checks.py" once
}

# NAME LIMIT_S COMMAND, in their order
step_list() {
    cat <<'EOF'
site 60 assemble site
machine 60 check machine
nvidia 20 nvidia-smi
resources 60 resources
kernels-tests 120 gpu_tests tests/runtime/cuda/test_kernels.py tests/runtime/pipelines/test_cuda.py
device-tests 60 gpu_tests tests/runtime/cuda/test_on_gpu.py -k 'not engine and not less_memory'
golden 60 check golden
volume 120 check volume
case 60 case_folder
kernels 120 check kernels
benchmark 120 $python -m benchmarks.gpu --repeats 10
batches 90 check batches
full 60 check full
profile 60 check profile
copies 60 check copies
host 60 check host
ort 60 assemble ort
ort-probe 90 check ort
ort-settings 90 check settings
ort-tests 150 gpu_tests tests/runtime/cuda/test_on_gpu.py -k onnxruntime
bundle 150 export_bundle $store/graphs --builder none
ort-doctor 60 $python -m attnseg doctor --model $store/graphs
ort-run 90 run_twice onnxruntime-cuda $store/graphs fp16
ort-benchmark 120 check kernels --model $store/graphs --engine onnxruntime-cuda
memcheck 90 sanitize memcheck
racecheck 90 sanitize racecheck
initcheck 90 sanitize initcheck
counters 60 counters
trt 90 assemble trt
rtx-probe 90 check rtx
rtx-bundle 200 export_bundle $store/rtx --compatible ampere+
rtx-doctor 60 $python -m attnseg doctor --model $store/rtx
rtx-tests 200 gpu_tests tests/runtime/cuda/test_on_gpu.py -k tensorrt
rtx-run 120 run_twice tensorrt-rtx $store/rtx fp16
rtx-benchmark 120 check kernels --model $store/rtx --engine tensorrt-rtx
EOF
}
core="site machine nvidia resources kernels-tests device-tests golden volume kernels batches copies host
    full profile memcheck racecheck initcheck counters"
ort="site ort case ort-probe ort-settings bundle ort-doctor ort-run ort-benchmark ort-tests"
rtx="site ort trt case rtx-probe rtx-bundle rtx-doctor rtx-run rtx-benchmark rtx-tests"

began=$SECONDS
table=""
run_step() {  # NAME
    local line name seconds command rc left took
    line=$(step_list | grep "^$1 ") || { table+="$1|no such step|"$'\n'; return; }
    read -r name seconds command <<< "$line"
    left=$((limit - (SECONDS - began)))
    if [ "$left" -lt 8 ]; then table+="$name|not begun: LIMIT_S|"$'\n'; return; fi
    [ "$seconds" -lt "$left" ] || seconds=$left
    echo "== $name"
    took=$SECONDS
    export -f assemble check case_folder export_bundle run_twice gpu_tests resources sanitize counters
    export kit root store site out logs python device host
    timeout -k 5 "$seconds" bash -c "set -o pipefail; $command" > "$logs/$name.txt" 2>&1
    rc=$?
    took=$((SECONDS - took))
    [ "$rc" -ne 124 ] || rc="124 (its limit)"
    tail -n 3 "$logs/$name.txt" | cut -c1-160
    table+="$name|$rc|$took s"$'\n'
    printf '%s\n' "$table" | awk -F'|' 'NF == 3 && $3 {print "{\"step\": \"" $1 "\", \"rc\": \"" $2 "\", \"took\": \"" $3 "\"}"}' \
        > "$out/steps.jsonl"
    tar -C "$logs" -czf "$out/logs.tar.gz" .
}

receive
case "${1:-core}" in
    receive) exit 0 ;;
    steps) step_list | cut -d' ' -f1,2; exit 0 ;;
    core) set -- $core ;;
    ort) set -- $ort ;;
    rtx) set -- $rtx ;;
esac
for step in "$@"; do run_step "$step"; done
printf '\n%s\n' "$table" | column -t -s'|' 2>/dev/null || printf '\n%s\n' "$table"
[ ! -e "$out/results.json" ] || grep -E 'golden|bytes|differ|gpu|refused|ms' "$out/results.json"
