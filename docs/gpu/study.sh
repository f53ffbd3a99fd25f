#!/usr/bin/env bash
# Does pre-training help with one and two labels? A residual encoder network, one GPU, about ten minutes.
#
#   docs/gpu/study.sh DATA OUT [key=value ...]
#
# DATA  a folder of volumes with labels (the hippocampus set: `tomoscale data fetch hippocampus DIR`), a store's URL, or
#       `simulated`
# OUT   a folder to create: store, pre-trained networks, cells and the report; the same command goes on after any death
# key=value  settings of the study that replace those below, such as `draws=2` or `gpus_per_cell=0 pretrain.engine.steps=4`
#
# What it does: two pre-trainings of 600 steps, 12 trainings of the search and 48 tested ones of 200 steps each, four at a
# time, with patches of 32 x 40 x 32 voxels, and the scores of 16 test subjects after each tested one. What it should cost,
# reckoned and not measured on any GPU yet: 7 to 12 minutes on one of 2020 or later, 10 GB of its memory, four CPU cores,
# 12 GB of memory, 2 GB on disk. The study says itself, cell by cell, how much time is left.
set -euo pipefail

if [ "$#" -lt 2 ]; then
    sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
data=$1
out=$2
shift 2
mkdir -p "$out"
out=$(cd "$out" && pwd)

# The program of this checkout, or the one on the path.
root=$(cd "$(dirname "$0")/../.." && pwd)
tomoscale=${TOMOSCALE:-"$root/.venv/bin/tomoscale"}
if [ ! -x "$tomoscale" ]; then
    tomoscale=tomoscale
fi

# The study ingests the folder itself, once.
store=file://$out/volumes
case $data in
    *://*) store=$data source=null ;;
    simulated) source=simulated ;;
    *) source=$(cd "$data" && pwd) ;;
esac

cat >"$out/study.yaml" <<YAML
name: gpu
data: $store
source: $source
pretrain:
  method:
    name: aligned
    w_consistency: 0
    w_position: 1
    crops: {size_DHW: [32, 32, 32], scale: [0.9, 1.2], min_overlap: 0.3, flip: [0, 0, 0], intensity: strong}
  backbone:
    name: resenc
    arguments:
      n_blocks_per_stage: [1, 3, 4, 6]
      features_per_stage: [32, 64, 128, 256]
      n_conv_per_stage_decoder: [1, 1, 1]
  stream: {global_batch: 16}
  engine: {steps: 600, warmup_steps: 60, lr: 1.0e-3, channels_last: true, deterministic: false, log_every: 50}
starts:
  scratch: {}
  place: {pretrain: {}}
  ibot:
    pretrain:
      method:
        name: ibot
        crops: {size_DHW: [32, 32, 32], scale: [0.9, 1.2], min_overlap: 0.3, flip: [0, 0, 0]}
        w_restore: 1.0
    transfer: encoder_decoder
labels: [1, 2]
draws: 8
pretrainings: 1
search: {lr: [2.0e-3, 5.0e-3], steps: [200], draws: 2, subjects: 4, labels: [1]}
finetune: {epochs: 4, batch: 4, patch_DHW: [32, 40, 32], flip: [0, 0, 0], warmup_steps: 20, channels_last: true}
test_limit: 16
concurrent: 4
gpus_per_cell: 1
YAML

"$tomoscale" study "$out/study.yaml" "$@" --local "$out" --dry-run | tail -n 4
exec "$tomoscale" study "$out/study.yaml" "$@" --local "$out"
