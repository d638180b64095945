#!/usr/bin/env bash
# Train, evaluate and compare every network under one budget; run it again to go on.
#
#   bash benchmarks/compare.sh DATA OUTPUT [OPTION OF attnseg train]...
#
# Each row is a run in OUTPUT/ROW. Rows share OUTPUT/cache. Two tables come last, on the terminal: the
# networks, and the loss against either half of it.
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
row residualunet --model residualunet "$@"
row deeplabv3 --model deeplabv3 "$@"
row unetplusplus --model unetplusplus "$@"
row resized --preset paper "$@"
row cross-entropy --set cross_entropy_weight=1 "$@"
row dice --set cross_entropy_weight=0 "$@"
python -m benchmarks.comparison "$output"/{attnresunet-gap,wide16,multi-scale-only,attention-only,resunet,attnresunet-se,unet3d,deepmedic,residualunet,deeplabv3,unetplusplus,resized} -o "$output/comparison"
python -m benchmarks.comparison "$output"/{attnresunet-gap,cross-entropy,dice} -o "$output/comparison" --picture loss-halves.png
