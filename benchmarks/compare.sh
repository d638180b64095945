#!/usr/bin/env bash
# Train, evaluate and compare every network under one budget; run it again to go on.
#
#   bash benchmarks/compare.sh DATA OUTPUT [OPTION OF attnseg train]...
#
# Each row is a run in OUTPUT/ROW. Rows share OUTPUT/cache. The table comes last, on the terminal.
set -euo pipefail
data=$1 output=$2
shift 2

row() { # NAME, then what makes the row
    local run="$output/$1"
    shift
    mkdir -p "$run"
    [ -e "$run/cache" ] || ln -s "$(realpath "$output")/cache" "$run/cache"
    if [ -e "$run/last.pt" ]; then
        attnseg train --data "$data" -o "$run" --resume
    else
        attnseg train --data "$data" -o "$run" "$@"
    fi
    [ -e "$run/evaluation/cases.csv" ] ||
        attnseg evaluate --data "$data" --model "$run/best.pt" -o "$run/evaluation"
}

mkdir -p "$output/cache"
row attnresunet-gap "$@"
row wide16 --preset wide16 "$@"
row multi-scale-only --attention none "$@"
row attention-only --no-multi-scale "$@"
row resunet --model resunet "$@"
row attnresunet-se --attention se "$@"
row unet3d --model unet3d "$@"
row deepmedic --model deepmedic "$@"
row resized --preset paper "$@"
python -m benchmarks.comparison "$output"/{attnresunet-gap,wide16,multi-scale-only,attention-only,resunet,attnresunet-se,unet3d,deepmedic,resized} -o "$output/comparison"
