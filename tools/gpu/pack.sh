#!/usr/bin/env bash
# Collect in .gpu/ the packages that the GPU machine lacks. Run it in the project's root; needs no GPU.
#
#   bash tools/gpu/pack.sh              # makes .gpu/kit, and .gpu/1, .gpu/2, ...: one per call
#
# Downloads and archives are kept in .gpu/cache and reused. Variables: PYTHON, a Python 3.12 as on the
# GPU machine; LIMIT_MB, the most that a call may transfer, working tree included; ARCH, the GPU's
# compute capability without the dot.
set -euo pipefail
kit=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3.12}
limit_mb=${LIMIT_MB:-66}   # in units of 10^6 bytes; 64 MiB are 67.1
arch=${ARCH:-90}
ort=onnxruntime-gpu==${ORT:-1.31.1}
trt=${TRT:-1.7.1.116}
[ -f pyproject.toml ] || { echo "run it in the project's root" >&2; exit 2; }
exclude=$(git rev-parse --git-path info/exclude)
grep -qxs '/.gpu/' "$exclude" || { mkdir -p "$(dirname "$exclude")"; echo '/.gpu/' >> "$exclude"; }
root=$PWD/.gpu
mkdir -p "$root/cache"
cd "$root/cache"

# Packages that the GPU machine lacks; it has torch, numpy, onnx, cuda-core and pytest.
pure="nibabel isal pydantic annotated-types typing-inspection platformdirs onnxconverter-common
    cyclonedx-python-lib license-expression boolean.py packageurl-python py-serializable defusedxml monai"
platforms=""
for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms="$platforms --platform ${name}_x86_64"
done
if [ ! -x venv/bin/pip ]; then
    "$python" -m venv venv
    venv/bin/pip install --quiet zstandard
fi
# shellcheck disable=SC2086
get() {  # FOLDER PACKAGE...: download wheels for the GPU machine
    local folder=$1; shift
    [ -e "$folder.done" ] && return
    mkdir -p "$folder"
    nice venv/bin/pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp $platforms -d "$folder" "$@"
    touch "$folder.done"
}
unpack() {  # FOLDER TARGET: unzip all wheels into one folder
    rm -rf "$2"; mkdir -p "$2"
    for wheel in "$1"/*.whl; do "$python" -m zipfile -e "$wheel" "$2"; done
}
squeeze() {  # NAME: pack the folder NAME as NAME.tar.xz; the x86 filter compresses code best
    tar --sort=name --mtime=@0 --owner=0 --group=0 -C "$1" -cf - . |
        nice xz --x86 --lzma2="preset=${PRESET:-9},dict=${DICT:-64MiB}" > "$1.part"
    mv "$1.part" "$1.tar.xz"
}

get wheels-site $pure "pydantic-core==$(
    venv/bin/pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        $platforms -d wheels-look pydantic >/dev/null
    unzip -p wheels-look/pydantic-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==//p')"
if [ ! -e site.tar.xz ]; then
    unpack wheels-site site
    find site -path '*/tests/*' -delete    # nibabel's tests are the larger part of the archive
    squeeze site
fi
get wheels-ort "$ort"
if [ ! -e ort.tar.xz ]; then
    unpack wheels-ort ort
    cd ort/onnxruntime
    rm -f capi/libonnxruntime.so.* capi/libonnxruntime_providers_tensorrt.so   # not used by Python
    "$root/cache/venv/bin/python" "$kit/trim_fatbin.py" capi/libonnxruntime_providers_cuda.so trimmed \
        --arch "$arch" --drop 'flash|cutlass|attention|Moe|moe|llm|fmha|deep_gemm'
    mv trimmed capi/libonnxruntime_providers_cuda.so
    cd ../..
    squeeze ort
fi
get wheels-trt "tensorrt-rtx-cu13-libs==$trt" "tensorrt-rtx-cu13-bindings==$trt"
if [ ! -e trt.tar.xz ]; then
    unpack wheels-trt trt
    DICT=256MiB PRESET=9e squeeze trt
fi

# Distribute the archives over calls, those that most checks need first.
cd "$root"
tree=$(cd .. && git ls-files -co --exclude-standard -z | xargs -0 -r stat -c %s 2>/dev/null | awk '{s += $1} END {print s}')
room=$((limit_mb * 1000000 - tree))
[ "$room" -gt 4000000 ] || { echo "the working tree takes $tree bytes, which leaves too little of $limit_mb MB" >&2; exit 1; }
rm -rf kit [0-9] [0-9][0-9]
mkdir kit && cp "$kit"/*.sh "$kit"/*.py kit/
call=0 left=0
for name in site ort trt; do
    for piece in $(rm -f cache/"$name".tar.xz.[0-9]*; split -d -a 3 -b 2000000 "cache/$name.tar.xz" "cache/$name.tar.xz." &&
            ls cache/"$name".tar.xz.[0-9]*); do
        size=$(stat -c %s "$piece")
        if [ "$size" -gt "$left" ]; then call=$((call + 1)); mkdir "$call"; left=$((room - 200000)); fi
        mv "$piece" "$call/"
        left=$((left - size))
    done
    (cd cache && sha256sum "$name.tar.xz") >> kit/pieces.sha256
done
echo "working tree      $tree bytes; room for $room in each call of $limit_mb MB"
for name in site ort trt; do printf '%-17s %s bytes\n' "$name" "$(stat -c %s "cache/$name.tar.xz")"; done
for number in $(seq "$call"); do
    printf 'call %s            %s bytes: %s\n' "$number" "$(cat "$number"/* | wc -c)" \
        "$(for f in "$number"/*; do basename "$f" | cut -d. -f1; done | sort -u | xargs)"
done
