#!/usr/bin/env bash
# Everything that makes the shipped models, from no data at all: people, autoencoder, image encoder, base, hypernetwork,
# judges. Run it from the root of the checkout; what is done already is kept, so a run that was stopped goes on.
#
#   bash experiments/embedded/from_nothing.sh cpu [PART ...]
#   bash experiments/embedded/from_nothing.sh gpu [PART ...]
#
# What parts of it took on an H200 with 16 cores is in experiments/embedded/base128; it has not been run to its end.
#
# Parts, in their order: few people faces autoencoder encoder sharp base map hypernet judge clip
# vicreg verifier. All of them by default. The results lie in runs/from_nothing; a length can be set from outside, such as
# BASE_STEPS=4000.
set -eu
KIND=${1:?cpu or gpu}
shift
PARTS=${*:-few people faces autoencoder encoder sharp base map hypernet judge clip vicreg verifier}
OUT=${OUT_FOLDER:-runs/from_nothing}
PYTHON=${PYTHON:-python3}
case $KIND in
  gpu) : "${WORKERS:=$(nproc)}" "${PEOPLE:=10000}" "${BATCH:=1024}"
       : "${AUTOENCODER_STEPS:=2500}" "${WHOLE_STEPS:=600}" "${SHARP_STEPS:=1500}" "${AUTOENCODER_BATCH:=256}"
       : "${FACES:=40000}" "${ENCODER_STEPS:=8000}" "${ENCODER_BATCH:=256}"
       : "${BASE_STEPS:=6000}" "${LINEAR_STEPS:=1500}" "${DECODER_STEPS:=1500}" "${PEOPLE_A_STEP:=192}" "${JUDGE_STEPS:=1500}"
       : "${IMAGES_STEPS:=6000}" "${IMAGES_BATCH:=512}" ;;
  cpu) : "${WORKERS:=2}" "${PEOPLE:=10000}" "${BATCH:=64}"
       : "${AUTOENCODER_STEPS:=6000}" "${WHOLE_STEPS:=600}" "${SHARP_STEPS:=900}" "${AUTOENCODER_BATCH:=32}"
       : "${FACES:=20000}" "${ENCODER_STEPS:=12000}" "${ENCODER_BATCH:=96}"
       : "${BASE_STEPS:=25000}" "${LINEAR_STEPS:=210}" "${DECODER_STEPS:=1500}" "${PEOPLE_A_STEP:=48}" "${JUDGE_STEPS:=600}"
       : "${IMAGES_STEPS:=3000}" "${IMAGES_BATCH:=128}" ;;
  *) echo "from_nothing.sh: expected cpu or gpu, not $KIND" >&2; exit 2 ;;
esac
HEADS=$OUT/heads
WHOLE=$((AUTOENCODER_BATCH / 4))
run() { "$PYTHON" -m hyperdb "$@"; }
once() { # once FILE command ...: unless the file is there
  local file=$1
  shift
  if [ -e "$file" ]; then echo "$file is there"; else run "$@"; fi
}

few() { # for the autoencoder, which needs pictures more than people: it trains while the others are drawn
  once "$OUT/heads_few/index.json" render_heads size=128 identities=2000 views=8 photo_views=4 first=200000 \
    workers="$WORKERS" out="$OUT/heads_few"
}

people() { # the first people of each split; validation and test never share a person with training
  once "$HEADS/index.json" render_heads size=128 identities="$PEOPLE" views=6 photo_views=3 workers="$WORKERS" out="$HEADS"
  once "$OUT/heads_validation/index.json" render_heads split=validation size=128 identities=48 views=30 photo_views=9 \
    shard=4 workers="$WORKERS" out="$OUT/heads_validation"
}

faces() { # for the encoder: many people, few photos; none of them is met by the hypernetwork, to which they would be too clear
  once "$OUT/faces/index.json" render_heads size=64 identities="$FACES" views=3 photo_views=3 first=300000 \
    workers="$WORKERS" out="$OUT/faces"
}

autoencoder() { # crops, then whole pictures
  local rest="data=$OUT/heads_few channels=[32,64,128,128] latent_channels=8"
  once "$OUT/crops/report.json" train_autoencoder $rest crop=64 batch="$AUTOENCODER_BATCH" steps="$AUTOENCODER_STEPS" \
    out="$OUT/crops"
  once "$OUT/whole/report.json" train_autoencoder $rest init="$OUT/crops/vae" batch="$WHOLE" steps="$WHOLE_STEPS" \
    rate=0.0005 out="$OUT/whole"
}

sharp() { # the decoder alone, against a discriminator and on the encoder's features: the latents stay as they are
  once "$OUT/sharp/report.json" train_autoencoder data="$OUT/heads_few" channels=[32,64,128,128] latent_channels=8 \
    init="$OUT/whole/vae" decoder_only=true batch="$WHOLE" steps="$SHARP_STEPS" rate=0.0004 adversarial_weight=0.02 \
    feature_weight=0.3 encoder.weights="$OUT/encoder/encoder.safetensors" out="$OUT/sharp"
}

encoder() {
  once "$OUT/encoder/report.json" train_encoder data="$OUT/faces" batch="$ENCODER_BATCH" \
    steps="$ENCODER_STEPS" workers="$WORKERS" out="$OUT/encoder"
}

base() {
  once "$OUT/base/report.json" train_base data="$HEADS" vae="$OUT/sharp/vae" channels=[96,192,256] batch="$BATCH" \
    steps="$BASE_STEPS" rate=0.001 warmup=300 decay=0.5 ema=0.9995 logit_normal=[0.2,1.2] save_every=500 out="$OUT/base"
}

BASE="diffusion.path=$OUT/base/base diffusion.size=128"
map() { # where predictions begin; the linear map
  once "$OUT/fits/default/index.json" precompute $BASE data="$HEADS" identities=16 out="$OUT/fits/default"
  once "$OUT/map/report.json" train_hypernet $BASE experiment=linear data="$HEADS" validation="$OUT/heads_validation" \
    weights="$OUT/fits/default" batch="$PEOPLE_A_STEP" steps="$LINEAR_STEPS" \
    model.encoder.weights="$OUT/encoder/encoder.safetensors" out="$OUT/map"
}

hypernet() { # the decoder on the map
  once "$OUT/hypernet/report.json" train_hypernet $BASE experiment=decoder data="$HEADS" validation="$OUT/heads_validation" \
    init="$OUT/map/hypernet.safetensors" batch="$PEOPLE_A_STEP" steps="$DECODER_STEPS" out="$OUT/hypernet"
}

judge() {
  once "$OUT/judge/report.json" train_judge $BASE data="$HEADS" steps="$JUDGE_STEPS" out="$OUT/judge"
}

images() { # judges of whole pictures; `hyperdb evaluate judges.clip=$OUT/clip/judge` and so on asks them
  once "$OUT/$1/report.json" train_judge judge="$1" $BASE data="$HEADS" batch="$IMAGES_BATCH" steps="$IMAGES_STEPS" \
    out="$OUT/$1"
}
clip() { images clip; }
vicreg() { images vicreg; }
verifier() { images verifier; }

for part in $PARTS; do
  "$part"
done
